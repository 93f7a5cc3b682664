"""Sizes of a launch in plain integers: `triton.cdiv` and `triton.next_power_of_2` take 2.5 µs of the host for each call."""


def cdiv(size: int, part: int) -> int:
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()
