"""The Triton kernels against their references: numbers, rows left alone, rows written, rounding order."""

import pytest
import torch
from cases import Projection, poisoned, projection
from compare import assert_bitwise_equal, assert_close, errors

from droidspeak_ops import reference
from droidspeak_ops.kernels.kv_splice import kv_splice
from droidspeak_ops.kernels.project_splice import ProjectSpliceConfig, project_splice, project_splice_config
from droidspeak_ops.kernels.row_norm import rms_rstd, row_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = ProjectSpliceConfig(block_m=32, block_n=32, block_k=16, num_warps=4, num_stages=2)


def launch(case: Projection, config: ProjectSpliceConfig) -> None:
    project_splice(**case.arguments, config=config)


def check(case: Projection, config: ProjectSpliceConfig) -> None:
    """Rows at the slots are those of the reference, NaN nowhere; all other rows keep their bits."""
    launch(case, config)
    expected = case.with_new_caches()
    reference.kv_project_ref(**expected.arguments)
    written = case.written()
    for actual, wanted in zip(case.caches, expected.caches, strict=True):
        actual, wanted = actual.transpose(1, 2), wanted.transpose(1, 2)
        assert_close(actual[written], wanted[written], case.arguments["x"].dtype)
        assert_bitwise_equal(actual[~written], poisoned(actual[~written].shape, actual.dtype, actual.device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_project_splice_tokens(dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    check(projection(tokens=tokens, dtype=dtype, device=device), SMALL)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("kv_heads", "k_norm"), [(1, False), (1, True), (3, False), (3, True)])
def test_project_splice_heads(head_dim: int, kv_heads: int, k_norm: bool, device: torch.device) -> None:
    case = projection(tokens=33, head_dim=head_dim, kv_heads=kv_heads, k_norm=k_norm, device=device)
    block_n = project_splice_config("sm_90", torch.bfloat16, kv_heads, head_dim, k_norm).block_n
    check(case, ProjectSpliceConfig(32, block_n, 16, 4, 2))


@pytest.mark.parametrize("rotary_dim", [0, 16, 20, 32, 80])
@pytest.mark.parametrize("bias", [False, True])
def test_project_splice_rotary(rotary_dim: int, bias: bool, device: torch.device) -> None:
    check(projection(tokens=21, head_dim=80, rotary_dim=rotary_dim, bias=bias, device=device), SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("paged", "strided"), [(False, False), (False, True), (True, False)])
def test_project_splice_scattered_slots(dtype: torch.dtype, paged: bool, strided: bool, device: torch.device) -> None:
    check(projection(dtype=dtype, paged=paged, strided=strided, scattered=True, device=device), SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [16, 50, 96])
def test_project_splice_folded_norm(dtype: torch.dtype, hidden: int, device: torch.device) -> None:
    check(projection(tokens=20, hidden=hidden, dtype=dtype, rstd=True, bias=True, k_norm=True, device=device), SMALL)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_project_splice_shipped_configurations(target: str, device: torch.device) -> None:
    config = project_splice_config(target, torch.float16, 3, 64, False)
    check(projection(tokens=130, hidden=128, kv_heads=3, dtype=torch.float16, scattered=True, device=device), config)


def test_project_splice_casts_to_the_cache(device: torch.device) -> None:
    case = projection(dtype=torch.float32, cache_dtype=torch.float16, device=device)
    launch(case, SMALL)
    expected = case.with_new_caches()
    reference.kv_project_ref(**expected.arguments)
    for actual, wanted in zip(case.caches, expected.caches, strict=True):
        assert_close(actual.transpose(1, 2)[case.written()], wanted.transpose(1, 2)[case.written()], torch.float16)


def test_project_splice_of_nothing(device: torch.device) -> None:
    check(projection(tokens=0, device=device), SMALL)


def test_project_splice_skips_slots_outside_the_cache(device: torch.device) -> None:
    """Past the end no memory may be touched: what a GPU cannot check on the host, the kernel masks."""
    case = projection(tokens=8, device=device)
    slots = case.arguments["slot_mapping"]
    slots[3], slots[5] = 10_000, -7
    launch(case, SMALL)
    for cache in case.caches:
        assert cache[0, :, [0, 1, 2, 4, 6, 7]].isfinite().all()
        assert cache[0, :, [3, 5] + list(range(8, cache.shape[2]))].isnan().all()


def test_project_splice_rows_do_not_depend_on_the_batch(device: torch.device) -> None:
    case = projection(tokens=100, dtype=torch.float16, device=device)
    alone = case.with_new_caches()
    launch(case, SMALL)
    for name in ("x", "cos", "sin", "slot_mapping"):
        alone.arguments[name] = alone.arguments[name][70:71]
    launch(alone, SMALL)
    for together, single in zip(case.caches, alone.caches, strict=True):
        assert_bitwise_equal(together[:, :, 70], single[:, :, 70])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_order_is_that_of_transformers(dtype: torch.dtype, device: torch.device) -> None:
    """The kernel is nearer to the reference that rounds every step than to one that rounds once at the end."""
    case = projection(tokens=100, dtype=dtype, k_norm=True, device=device)
    launch(case, SMALL)
    stepwise, once = case.with_new_caches(), case.with_new_caches()
    reference.kv_project_ref(**stepwise.arguments)
    for name, value in once.arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            once.arguments[name] = value.float()
    reference.kv_project_ref(**once.arguments)
    rows = case.written().nonzero()[:, 1]
    to_stepwise = errors(case.caches[0][:, :, rows], stepwise.caches[0][:, :, rows])[1]
    to_once = errors(case.caches[0][:, :, rows], once.caches[0][:, :, rows].to(dtype))[1]
    assert to_stepwise < 0.5 * to_once


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 576), (7, 100), (0, 64)])
def test_row_norm(dtype: torch.dtype, tokens: int, hidden: int, device: torch.device) -> None:
    x = (torch.randn(tokens, hidden + 8, device=device) * 3).to(dtype)[:, :hidden]
    weight = torch.randn(hidden, device=device).to(dtype)
    out, rstd = poisoned((tokens, hidden), dtype, device), poisoned((tokens,), torch.float32, device)
    row_norm(x, weight, 1e-5, out)
    rms_rstd(x, 1e-5, rstd)
    assert_close(out, reference.row_norm_ref(x, weight, 1e-5))
    assert_close(rstd, reference.rms_rstd_ref(x, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [0, 20, 80])
def test_kv_splice(dtype: torch.dtype, cache_dtype: torch.dtype, rotary_dim: int, device: torch.device) -> None:
    batch, heads, tokens, head_dim = 2, 3, 21, 80
    k, v = (torch.randn(batch, tokens, heads, head_dim, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    angles = torch.rand(batch * tokens, rotary_dim // 2, device=device)
    rotation = (angles.cos(), angles.sin()) if rotary_dim else (None, None)
    slots = torch.randperm(4 * 16, device=device)[: batch * tokens]
    slots[5] = -1
    caches = [[poisoned((4, heads, 16, head_dim), cache_dtype, device) for _ in range(2)] for _ in range(2)]
    kv_splice(k, v, *rotation, *caches[0], slots)
    reference.kv_splice_ref(k, v, *rotation, slots, *caches[1])
    for actual, expected in zip(*caches, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert_close(actual.nan_to_num(), expected.nan_to_num(), cache_dtype if rotary_dim else torch.float32)
