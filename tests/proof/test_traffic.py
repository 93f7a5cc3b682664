"""Bytes that the kernels load and store, counted in the interpreter: against the least, their tiling, and transformers."""

from functools import partial
from math import ceil

import pytest
import torch
from support.cases import attention, projection

from bench.traffic import measure
from droidspeak_ops.kernels.attend_rows import attend_rows
from droidspeak_ops.kernels.attention_config import attention_config, keys_per_lse, keys_per_split
from droidspeak_ops.kernels.attention_peaks import attention_peaks
from droidspeak_ops.kernels.head_norm import head_norm
from droidspeak_ops.kernels.kv_splice import heads_per_program, kv_splice
from droidspeak_ops.kernels.project_splice import project_splice
from droidspeak_ops.kernels.project_splice_config import project_splice_config, size_of
from droidspeak_ops.kernels.row_norm import rms_rstd, row_norm
from droidspeak_ops.proof import traffic
from droidspeak_ops.proof.shapes import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")

BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8


@pytest.mark.parametrize("source", [BF16, FP8, INT8])
@pytest.mark.parametrize("target", [BF16, FP8, INT8])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 128), (3, 64), (4, 80)])
def test_kv_splice_moves_what_it_must(
    source: torch.dtype, target: torch.dtype, rotated: bool, heads: int, head_dim: int
) -> None:
    tokens = 37
    size = (1, heads, tokens, head_dim)
    k, v, k_cache, v_cache = (torch.zeros(size, dtype=dtype) for dtype in (source, source, target, target))
    scales = [torch.ones(size[:3]) if dtype.itemsize == 1 else None for dtype in (source, source, target, target)]
    angles = [torch.zeros(tokens, head_dim // 2) if rotated else None for _ in range(2)]
    slots = torch.arange(tokens)
    counted = traffic.of_kernels(
        lambda: kv_splice(k, v, *scales[:2], *angles, slots, False, k_cache, v_cache, *scales[2:])
    )
    # A context as short as this has a program for each head, which reads slots and angles again: they stay in the caches.
    assert heads_per_program(1, heads) == 1 and heads_per_program(4096, heads) >= heads
    again = traffic.minimum([*angles, slots, slots], [])
    least = traffic.minimum([k, v, *scales[:2]], [k_cache, v_cache, *scales[2:]]) + again
    assert least + (heads - 1) * again <= counted.total <= 1.05 * (least + (heads - 1) * again)


def test_row_norm_moves_what_it_must() -> None:
    """And the weight for each row, which stays in the caches."""
    x, weight = torch.zeros(100, 64, dtype=BF16), torch.ones(64, dtype=BF16)
    out = torch.empty_like(x)
    counted = traffic.of_kernels(lambda: row_norm([x], [weight], "llama", 1e-6, [out]))
    assert counted.total == traffic.minimum([x], [out]) + 100 * weight.nbytes
    rstd = torch.empty(40)
    counted = traffic.of_kernels(lambda: rms_rstd([x[:40]], 1e-6, [rstd]))
    assert counted.total == traffic.minimum([x[:40]], [rstd])


def test_norm_over_all_heads_moves_each_row_once_in_and_once_out() -> None:
    rows, weight = torch.zeros(1, 4, 30, 64, dtype=BF16), torch.ones(256, dtype=BF16)
    cos, sin, slots = torch.zeros(30, 32, dtype=BF16), torch.zeros(30, 32, dtype=BF16), torch.arange(30)
    counted = traffic.of_kernels(lambda: head_norm(rows, weight, "olmo", 1e-6, cos, sin, None, slots, 30))
    assert counted.stored == rows.nbytes
    # The weight is read for each token: it stays in the caches.
    assert counted.loaded == rows.nbytes + cos.nbytes + sin.nbytes + slots.nbytes + 30 * weight.nbytes


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("q_heads", [0, 4])
@pytest.mark.parametrize("head_norm", [None, "each"])
def test_project_splice_moves_what_its_tiling_implies(target: str, q_heads: int, head_norm: str | None) -> None:
    tokens, hidden, kv_heads, head_dim, layers = 200, 128, 2, 64, 2
    case = projection(tokens=tokens, hidden=hidden, kv_heads=kv_heads, q_heads=q_heads, layers=layers, dtype=BF16,
                      rstd=True, bias=True, head_norm=head_norm, positions=True)  # fmt: skip
    config = project_splice_config(target, size_of(case))
    counted = traffic.of_kernels(lambda: project_splice(case, config))

    pairs, rows = head_dim // 2, ceil(tokens / config.block_m) * config.block_m
    q_tiles, kv_tiles = (ceil(heads * pairs / config.block_n) for heads in (q_heads, kv_heads))
    tiles, turned = q_tiles + 2 * kv_tiles, q_tiles + kv_tiles  # V is neither normed nor rotated
    m_tiles = rows // config.block_m
    if config.tma:  # of rows out of range nothing is read
        products = 2 * hidden * (tiles * tokens + m_tiles * (q_heads + 2 * kv_heads) * head_dim)
    else:
        products = 2 * hidden * (tiles * rows + m_tiles * tiles * 2 * config.block_n)
    a_program = 4 * config.block_m + 8 * config.block_m + 2 * 2 * config.block_n  # 1/rms, slots, bias
    epilogue = m_tiles * tiles * a_program
    heads = q_heads + kv_heads
    epilogue += turned * rows * 8 + rows * heads * pairs * 2 * 2  # positions; cos and sin
    if head_norm:
        epilogue += m_tiles * heads * head_dim * 2
    assert counted.loaded == layers * (products + epilogue)
    assert counted.stored == layers * tokens * (q_heads + 2 * kv_heads) * head_dim * 2


@pytest.mark.parametrize("seen", [128, 640])
def test_attention_moves_what_its_tiling_implies(seen: int) -> None:
    """Keys that no row sees, here 512 of 640, are neither read nor combined."""
    rows, keys, kv_heads, group, head_dim = 33, 640, 2, 3, 32
    case = attention(batch=1, rows=rows, keys=keys, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=BF16,
                     window=128 if seen < keys else None, missing=False)  # fmt: skip
    case = case._replace(positions=torch.full((1, rows), keys - 1))
    config = attention_config("sm_90", BF16, head_dim, reads_values=False)  # as many rows as with values
    m_tiles, packed = ceil(rows * group / config.block_m), ceil(rows * group / config.block_m) * config.block_m
    row, key, lse = head_dim * 2, 8 + head_dim * 2, 4  # a row of Q with its position is as much as a key with its slot

    splits = ceil(keys / keys_per_lse(kv_heads * group))
    counted = traffic.of_kernels(lambda: case.peaks_of(partial(attention_peaks, "sm_90"), case.new_peaks()))
    sums = splits * packed * key + m_tiles * seen * key
    key_tiles = seen // config.block_n
    # Blocks that no row sees still read their keys and the positions.
    peaks = keys * key + keys // config.block_n * packed * 8 + key_tiles * packed * (row + splits * lse)
    assert counted.loaded == kv_heads * (sums + peaks + keys * 4) + keys * 4
    assert counted.stored == kv_heads * (splits * packed * lse + keys * 4) + keys * 4

    size = keys_per_split(kv_heads * group)
    splits, seen_splits = ceil(keys / size), ceil(keys / size) - (keys - seen) // size
    counted = traffic.of_kernels(lambda: case.rows_of(partial(attend_rows, "sm_90"), case.new_rows()))
    combined = ceil(rows * group / (1024 // head_dim)) * (1024 // head_dim)
    parts = splits * packed * key + m_tiles * seen * (key + row)
    assert counted.loaded == kv_heads * (parts + combined * (8 + seen_splits * (lse + head_dim * 4)))
    assert counted.stored == kv_heads * (packed * (splits * lse + seen_splits * head_dim * 4) + combined * row)


def test_beyond_its_products_it_moves_at_most_half_of_what_transformers_does() -> None:
    """Against the layer's own modules and transformers' own cache, with either norm."""
    shape = Shape(512, 8, 2, 64, 64)
    (_, products, transformers), *ours = measure(shape, tokens=256)
    assert products == 2 * 2 * (256 * 512 + 128 * 512)  # both projections read rows and weight
    for name, _, beyond in ours:
        assert 0 < 2 * beyond <= transformers, name


def test_counting_torch_operations() -> None:
    x, y = torch.zeros(10, 20), torch.zeros(20, 30)
    counted = traffic.of_torch(lambda: x @ y)
    assert (counted.loaded, counted.stored, counted.loaded_by_products) == (4 * (200 + 600), 4 * 300, 4 * (200 + 600))
    counted = traffic.of_torch(lambda: x.view(200)[3:].unsqueeze(0))
    assert counted.total == 0
    counted = traffic.of_torch(lambda: torch.empty(200).copy_(x.view(200)))
    assert (counted.loaded, counted.stored) == (800, 800)
    counted = traffic.of_torch(lambda: x.mul_(2))
    assert (counted.loaded, counted.stored) == (800, 800)
