"""The splice kernel against its reference: layouts, casts, 8-bit codes and scales in and out, rotation."""

import pytest
import torch
from support.cases import covering, kv_tensors, poisoned
from support.compare import assert_bitwise_equal, assert_close

from droidspeak_ops import ops
from droidspeak_ops.kernels.kv_splice import kv_splice
from droidspeak_ops.ops import reference

FP8, INT8 = torch.float8_e4m3fn, torch.int8
STORED = [torch.float32, torch.float16, torch.bfloat16, FP8, INT8]


def codes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random rows [B, K, T, D], and scales [B, K, T] if they are 8-bit."""
    if dtype == INT8:
        rows = torch.randint(-127, 128, shape, device=device).to(dtype)
    else:
        rows = torch.randn(shape, device=device).to(dtype)
    return rows, torch.rand(shape[:3], device=device) + 0.5 if dtype in (FP8, INT8) else None


def blank(dtype: torch.dtype, device: torch.device, layout: str, shape: tuple[int, ...]) -> list[torch.Tensor | None]:
    """Poisoned K, V, and their scales if they are 8-bit."""
    blocks, heads, block_size, _ = shape
    caches = kv_tensors(layout, *shape, dtype, device)
    scales = [poisoned((blocks, block_size, heads), torch.float32, device).transpose(1, 2) for _ in range(2)]
    return [*caches, *(scales if dtype in (FP8, INT8) else [None, None])]


def rows_of(cache: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Rows [n, K, ...] of a cache by a mask [blocks, block_size]; of float8, which torch does not index on a GPU, the bits."""
    cache = cache.transpose(1, 2)
    return cache.view(torch.uint8)[which].view(FP8) if cache.dtype == FP8 else cache[which]


@pytest.mark.parametrize("options", list(covering({
    "source": STORED,
    "target": STORED,
    "head_dim": [80, 64, 96, 128, 192, 256],
    "rotary": ["none", "partial", "full"],
    "layout": ["dense", "NHD", "HND", "strided"],
    "static_scale": [False, True],
    "tokens": [21, 1, 40],
    "heads": [3, 1],
})), ids=lambda options: "-".join(str(value) for value in options.values()))  # fmt: skip
def test_kv_splice_in_every_pair_of_variants(options: dict, device: torch.device) -> None:
    source, target, static = options["source"], options["target"], options["static_scale"]
    batch, tokens, heads, head_dim = 2, options["tokens"], options["heads"], options["head_dim"]
    (k, k_scale), (v, v_scale) = (codes((batch, heads, tokens, head_dim), source, device) for _ in range(2))
    half = {"none": 0, "partial": head_dim // 8, "full": head_dim // 2}[options["rotary"]]
    angles = torch.rand(batch * tokens, half, device=device) * 6
    rotation = (angles.cos(), angles.sin()) if half else (None, None)
    shape = (6, heads, 16, head_dim)
    slots = torch.randperm(6 * 16, device=device)[: batch * tokens]
    slots[tokens // 2] = -1
    results = []
    for splice in (kv_splice, reference.kv_splice_ref):
        outputs = blank(target, device, options["layout"], shape)
        static_scale = static and target in (FP8, INT8)
        if static_scale:
            for scale in outputs[2:]:
                scale.fill_(0.02)  # saturates some
        splice(k, v, k_scale, v_scale, *rotation, slots, static_scale, *outputs)
        results.append(outputs)
    written = torch.zeros(6 * 16, dtype=torch.bool, device=device)
    written[slots[slots >= 0]] = True
    written = written.view(6, 16)
    for actual, expected in zip(*results, strict=True):
        if actual is None:
            continue
        assert_bitwise_equal(rows_of(actual, ~written), rows_of(expected, ~written))  # both poisoned
        actual, expected = rows_of(actual, written), rows_of(expected, written)
        assert not actual.float().isnan().any()
        if actual.dtype in (FP8, INT8) and not half:
            assert_bitwise_equal(actual, expected)
        elif actual.dtype in (FP8, INT8):
            # A value at the middle between two codes may round either way where the rotation's last bit differs.
            assert ((actual.float() - expected.float()).abs() <= (1 if target == INT8 else 32)).all()
            assert (actual.float() != expected.float()).float().mean() < 1e-3
        else:
            assert_close(actual, expected, target if half and target not in (FP8, INT8) else torch.float32)


def test_every_fp8_code_goes_through_unchanged(device: torch.device) -> None:
    """Decoded and encoded again: all 254 numbers, both zeros, subnormals; NaN stays NaN."""
    every = torch.arange(256, dtype=torch.uint8, device=device).view(FP8).view(1, 1, 4, 64)
    floats = [torch.empty(1, 1, 4, 64, device=device) for _ in range(2)]
    kv_splice(every, every, None, None, None, None, torch.arange(4, device=device), False, *floats, None, None)
    assert torch.equal(floats[0].nan_to_num(1e9), every.float().nan_to_num(1e9))
    back = blank(FP8, device, "dense", (1, 1, 4, 64))
    for scale in back[2:]:
        scale.fill_(1.0)
    kv_splice(*floats, None, None, None, None, torch.arange(4, device=device), True, *back)
    finite = ~every.float().isnan()
    assert torch.equal(back[0].view(torch.uint8)[finite], every.view(torch.uint8)[finite])
    assert back[0].float()[~finite].isnan().all()


def test_fp8_rounds_as_torch_does(device: torch.device) -> None:
    """Every midpoint between two codes, its neighbours, and what saturates."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat(
        [middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(500.0)), numbers[-1:]]
    )
    values = torch.cat([values, -values, torch.tensor([1e-30, 447.0, 464.0, 1e9, -1e9, 0.0])])
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).to(device).view(1, 1, -1, 64)
    rows = values.shape[2]
    cache = blank(FP8, device, "dense", (1, 1, rows, 64))
    for scale in cache[2:]:
        scale.fill_(1.0)
    kv_splice(values, values, None, None, None, None, torch.arange(rows, device=device), True, *cache)
    assert torch.equal(cache[0].view(torch.uint8), values.clamp(-448, 448).to(FP8).view(torch.uint8))


@pytest.mark.parametrize(("dtype", "step"), [(FP8, 1 / 16), (INT8, 1 / 254)])
def test_eight_bits_lose_at_most_half_a_step(dtype: torch.dtype, step: float, device: torch.device) -> None:
    """In and out again, with scales by row: rows of very different size are all as good."""
    size = torch.logspace(-6, 6, 40, device=device)[None, None, :, None]
    k, v = (torch.randn(1, 2, 40, 64, device=device) * size for _ in range(2))
    k[0, 0, 7] = 0.0
    stored, slots = blank(dtype, device, "dense", (1, 2, 40, 64)), torch.arange(40, device=device)
    kv_splice(k, v, None, None, None, None, slots, False, *stored)
    back = [poisoned((1, 2, 40, 64), torch.float32, device) for _ in range(2)]
    kv_splice(stored[0], stored[1], stored[2].contiguous(), stored[3], None, None, slots, False, *back, None, None)
    for actual, wanted in zip(back, (k, v), strict=True):
        largest = wanted.abs().amax(-1, keepdim=True)
        allowed = step * (wanted.abs() if dtype == FP8 else largest) + largest * 2**-15
        assert ((actual - wanted).abs() <= allowed).all()


def test_splice_of_rows_does_not_depend_on_the_batch(device: torch.device) -> None:
    k, v = (torch.randn(1, 2, 50, 64, device=device) for _ in range(2))
    angles = torch.rand(50, 32, device=device)
    together, alone = (blank(INT8, device, "dense", (1, 2, 50, 64)) for _ in range(2))
    some = slice(17, 31)
    slots = torch.arange(50, device=device)
    kv_splice(k, v, None, None, angles.cos(), angles.sin(), slots, False, *together)
    kv_splice(
        k[:, :, some], v[:, :, some], None, None, angles[some].cos(), angles[some].sin(), slots[some], False, *alone
    )
    for one, other in zip(together, alone, strict=True):
        assert_bitwise_equal(one[:, :, some], other[:, :, some])


@pytest.mark.parametrize("case", ["position", "base", "attention"])
def test_keys_turn_to_another_position_base_or_scaling(case: str) -> None:
    """The same as if they had been rotated so from the start, through the operator and `rotation_between`."""
    keys, position = torch.randn(9, 2, 32), torch.arange(9.0)[:, None]
    inverse = 10_000.0 ** -(torch.arange(16) / 16)
    old, new, factor = position * inverse, position * inverse, 1.0
    if case == "position":
        new = (position + 1234) * inverse
    elif case == "base":
        new = position * 500_000.0 ** -(torch.arange(16) / 16)
    else:
        factor = 1.2
    rotated = reference.rope_ref(keys, old.cos(), old.sin()).transpose(0, 1)[None]
    out = [poisoned((1, 2, 9, 32), torch.float32, "cpu") for _ in range(2)]
    cos, sin = ops.rotation_between(old.cos(), old.sin(), new.cos() * factor, new.sin() * factor)
    ops.kv_splice(rotated, rotated, *out, torch.arange(9), cos=cos, sin=sin)
    expected = reference.rope_ref(keys, new.cos() * factor, new.sin() * factor).transpose(0, 1)[None]
    assert_close(out[0], expected, operations=2)
    assert_bitwise_equal(out[1], rotated)
