"""Tolerances of two results: maximum and root-mean-square error, relative to the largest and RMS reference value."""

import torch

# By dtype: (maximum, RMS). Half precision and fp8: a few units in the last place of one rounding; float32: order of
# summation.
TOLERANCES = {
    torch.float32: (4e-6, 1e-6),
    torch.float16: (2e-3, 4e-4),
    torch.bfloat16: (1.6e-2, 3e-3),
    torch.float8_e4m3fn: (6.3e-2, 1.2e-2),
}


def errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Maximum and RMS relative error; NaN if anything in `actual` is."""
    actual, expected = actual.double(), expected.double()
    difference = actual - expected
    # Of a reference that is all zero the errors are absolute.
    largest, size = expected.abs().max().item() or 1.0, expected.pow(2).mean().sqrt().item() or 1.0
    return difference.abs().max().item() / largest, difference.pow(2).mean().sqrt().item() / size


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None, operations: int = 1
) -> None:
    """Compare by the tolerances of `dtype`, or that of `expected`, for a chain of that many operations."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    largest, rms = errors(actual, expected)
    allowed_largest, allowed_rms = (operations * allowed for allowed in TOLERANCES[dtype or expected.dtype])
    # Written so that NaN fails.
    assert largest <= allowed_largest and rms <= allowed_rms, f"max {largest:.2e}, RMS {rms:.2e}"


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the last bit, where NaN equals NaN."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert torch.equal(actual.contiguous().view(integer), expected.contiguous().view(integer))
