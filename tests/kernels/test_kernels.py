"""The Triton kernels against their references: numbers, rows left alone, rows written, rounding order."""

import dataclasses
import itertools

import pytest
import torch
from support.cases import Case, covering, kv_project_ref, poisoned, projection
from support.compare import assert_bitwise_equal, assert_close, errors

from droidspeak_ops.kernels.project_splice import project_splice
from droidspeak_ops.kernels.project_splice_config import (
    ProjectSpliceConfig,
    can_use_tma,
    pairs_per_head,
    project_splice_config,
    size_of,
)
from droidspeak_ops.kernels.row_norm import normed, rms_rstd, row_norm
from droidspeak_ops.ops import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ORDERS = ["llama", "gemma", "olmo"]
SMALL = ProjectSpliceConfig(block_m=32, block_n=32, block_k=16, num_warps=4, num_stages=2)


def small(case: Case) -> ProjectSpliceConfig:
    """A small tile, wide enough for a whole head where that is normed."""
    size = size_of(case)  # with one head, a norm over each is one over all
    return (
        dataclasses.replace(SMALL, block_n=max(32, pairs_per_head(size.head_dim, True)))
        if size.has_head_norm
        else SMALL
    )


def launch(case: Case, config: ProjectSpliceConfig | None = None) -> None:
    project_splice(case, config or small(case))


def check(case: Case, config: ProjectSpliceConfig | None = None) -> None:
    """Rows at the slots are those of the reference, NaN nowhere; all other rows keep their bits."""
    launch(case, config)
    expected = case.with_new_outputs()
    kv_project_ref(expected)
    written, dtype = case.written(), case[0].hidden_states.dtype
    for actual, wanted in zip(case.caches, expected.caches, strict=True):
        actual, wanted = actual.transpose(1, 2), wanted.transpose(1, 2)
        assert_close(actual[written], wanted[written], dtype)
        assert_bitwise_equal(actual[~written], poisoned(actual[~written].shape, actual.dtype, actual.device))
    for actual, wanted in zip(case.tensors("q"), expected.tensors("q"), strict=True):
        assert_close(actual, wanted, dtype)


AXES = {
    "dtype": DTYPES,
    "head_dim": [64, 80, 96, 128, 192, 256],
    "head_norm": [None, "each", "all"],
    "norm_order": ORDERS,
    "rotary": ["full", "partial", "none"],
    "rotary_dtype": [None, torch.float32],
    "layout": ["dense", "NHD", "HND", "strided"],
    "q_heads": [0, 3],
    "kv_heads": [2, 1, 3],
    "layers": [1, 2, 3],
    "tokens": [33, 1, 21],
    "hidden": [32, 50],
    "bias": [False, True],
    "rstd": [False, True],
    "positions": [False, True],
    "scattered": [True, False],
    "fused": [False, True],
    "strided": [False, True],
}


@pytest.mark.parametrize(
    "options", list(covering(AXES)), ids=lambda options: "-".join(str(v) for v in options.values())
)
def test_project_splice_in_every_pair_of_variants(options: dict, device: torch.device) -> None:
    rotary = options.pop("rotary")
    partial = options["head_dim"] // 4 // 2 * 2
    check(projection(**options, rotary_dim={"full": None, "partial": partial, "none": 0}[rotary], device=device))


TMA_AXES = {
    **AXES,
    "dtype": DTYPES[1:],
    "head_dim": [64, 128, 256],
    "rotary": ["full", "none"],
    "hidden": [32, 72],
    "persistent": [True, False],
    "tile": [(64, 128), (128, 128)],
}


@pytest.mark.parametrize(
    "options", list(covering(TMA_AXES)), ids=lambda options: "-".join(str(v) for v in options.values())
)
def test_project_splice_by_tma_in_every_pair_of_variants(options: dict, device: torch.device) -> None:
    rotary, persistent, (block_m, block_n) = (options.pop(name) for name in ("rotary", "persistent", "tile"))
    if options["q_heads"]:
        options["layers"] = 1
    case = projection(**options, rotary_dim=None if rotary == "full" else 0, device=device)
    size = size_of(case)
    assert can_use_tma(size)
    persistent &= size.num_q_heads == 0 and size.num_layers == 1
    check(case, ProjectSpliceConfig(block_m, block_n, 64, 8, 3, tma=True, persistent=persistent))


@pytest.mark.parametrize(("dtype", "head_dim"), list(itertools.product(DTYPES, AXES["head_dim"])))
@pytest.mark.parametrize(("q_heads", "head_norm"), [(0, None), (4, None), (0, "each"), (4, "each"), (4, "all")])
def test_project_splice_of_each_width(
    dtype: torch.dtype, head_dim: int, q_heads: int, head_norm: str | None, device: torch.device
) -> None:
    check(projection(tokens=9, hidden=32, dtype=dtype, head_dim=head_dim, q_heads=q_heads, head_norm=head_norm,
                     bias=True, rstd=True, scattered=True, device=device))  # fmt: skip


@pytest.mark.parametrize("rotary_dim", [0, 16, 20, 32, 80])
def test_project_splice_rotary(rotary_dim: int, device: torch.device) -> None:
    check(projection(tokens=21, head_dim=80, rotary_dim=rotary_dim, device=device))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("q_heads", "head_norm", "dtype"), [
    (0, None, torch.float16), (6, "each", torch.float16), (0, None, torch.float32),
])  # fmt: skip
def test_project_splice_shipped_configurations(
    target: str, q_heads: int, head_norm: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    case = projection(tokens=130, hidden=128, kv_heads=3, q_heads=q_heads, head_norm=head_norm, dtype=dtype,
                      scattered=True, device=device)  # fmt: skip
    check(case, project_splice_config(target, size_of(case)))


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.float8_e4m3fn])
def test_project_splice_casts_to_the_cache(cache_dtype: torch.dtype, device: torch.device) -> None:
    case = projection(dtype=torch.float32, cache_dtype=cache_dtype, q_heads=2, device=device)
    launch(case)
    expected = case.with_new_outputs()
    kv_project_ref(expected)
    for actual, wanted in zip(case.caches, expected.caches, strict=True):
        actual, wanted = (cache.transpose(1, 2).float()[case.written()] for cache in (actual, wanted))
        assert_close(actual, wanted, cache_dtype)
    assert_close(case[0].q, expected[0].q)


def test_project_splice_of_nothing(device: torch.device) -> None:
    check(projection(tokens=0, device=device))


def test_project_splice_skips_slots_outside_the_cache(device: torch.device) -> None:
    """Past the end no memory may be touched: what a GPU cannot check on the host, the kernel masks."""
    for head_norm in (None, "all"):
        case = projection(tokens=8, head_norm=head_norm, device=device)
        slots = case[0].slot_mapping
        slots[3], slots[5] = 10_000, -7
        launch(case)
        for cache in case.caches:
            assert cache[0, :, [0, 1, 2, 4, 6, 7]].isfinite().all()
            assert cache[0, :, [3, 5] + list(range(8, cache.shape[2]))].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_norm", "q_heads"), [("each", 2), ("all", 2), (None, 0)])
@pytest.mark.parametrize("kept", [[35], [3, 39, 4], list(range(20, 38))])
def test_project_splice_rows_do_not_depend_on_the_batch(
    dtype: torch.dtype, head_norm: str | None, q_heads: int, kept: list[int], device: torch.device
) -> None:
    case = projection(tokens=40, dtype=dtype, head_norm=head_norm, q_heads=q_heads, device=device)
    alone = case.with_new_outputs()
    launch(case)
    names, slots = ("hidden_states", "cos", "sin"), case[0].slot_mapping[kept]
    alone = alone.change(lambda layer: {name: getattr(layer, name)[kept] for name in names}, slot_mapping=slots)
    if q_heads:
        alone = alone.change(lambda layer: {"q": layer.q[: len(kept)]})
    launch(alone)
    for together, single in zip(case.caches, alone.caches, strict=True):
        assert_bitwise_equal(together[:, :, kept], single[:, :, kept])
    for together, single in zip(case.tensors("q"), alone.tensors("q"), strict=True):
        assert_bitwise_equal(together[kept], single)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "kv_heads", "head_norm"), [
    (128, 8, None), (128, 8, "each"), (128, 1, "each"), (64, 8, None), (64, 3, "each"), (256, 2, "each"), (256, 1, None),
])  # fmt: skip
def test_project_splice_rows_do_not_depend_on_the_configuration(
    target: str, dtype: torch.dtype, head_dim: int, kv_heads: int, head_norm: str | None, device: torch.device
) -> None:
    """The result does not show which tile was taken, so a tile may depend on the numbers of tokens and of layers."""
    case = projection(tokens=70, hidden=192, dtype=dtype, head_dim=head_dim, kv_heads=kv_heads, head_norm=head_norm,
                      device=device)  # fmt: skip
    size = size_of(case)
    sizes = [
        size._replace(num_tokens=tokens, num_layers=layers) for tokens in (1, 1024, 4096, 32768) for layers in (1, 8)
    ]
    first, *others = dict.fromkeys(project_splice_config(target, each) for each in sizes)
    launch(case, first)
    for config in others:
        again = case.with_new_outputs()
        launch(again, config)
        for one, other in zip(case.outputs, again.outputs, strict=True):
            assert_bitwise_equal(one, other)


@pytest.mark.parametrize("layers", [2, 8])
def test_layers_in_one_launch_are_layers_one_by_one(layers: int, device: torch.device) -> None:
    case = projection(tokens=40, layers=layers, q_heads=2, head_norm="each", dtype=torch.bfloat16, bias=True,
                      device=device)  # fmt: skip
    together = case.with_new_outputs()
    launch(together)
    for layer in case:
        launch(Case([layer]))
    for one, other in zip(case.outputs, together.outputs, strict=True):
        assert_bitwise_equal(one, other)


# --- rounding order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_norm", ["each", "all"])
def test_rounding_order_is_that_of_transformers(dtype: torch.dtype, head_norm: str, device: torch.device) -> None:
    """The kernel is nearer to the reference that rounds every step than to one that rounds once at the end."""
    case = projection(tokens=100, dtype=dtype, head_norm=head_norm, device=device)
    launch(case)
    stepwise, once = case.with_new_outputs(), case.with_new_outputs()
    kv_project_ref(stepwise)
    once = once.change(
        lambda layer: {
            name: value.float()
            for name, value in layer._asdict().items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
    )
    kv_project_ref(once)
    rows = case.written().nonzero()[:, 1]
    actual, wanted, other = (each.caches[0][:, :, rows] for each in (case, stepwise, once))
    assert errors(actual, wanted)[1] < 0.5 * errors(actual, other.to(dtype))[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_order_of_a_norm_is_nearest_to_its_own_reference(dtype: torch.dtype, device: torch.device) -> None:
    """For the norm of rows and both norms of heads. Weights go into the "gemma" order less 1, so only roundings differ."""
    x = torch.randn(40, 320, device=device).to(dtype)
    weight = (1 + torch.rand(320, device=device)).to(dtype)
    weights = {order: weight - 1 if order == "gemma" else weight for order in ORDERS}
    expected = {order: reference.row_norm_ref(x, weights[order], order, 1e-6) for order in ORDERS}
    assert not torch.equal(expected["llama"], expected["olmo"])
    for order in ORDERS:
        out = poisoned(x.shape, dtype, device)
        row_norm([x], [weights[order]], order, 1e-6, [out])
        assert_nearest(out, order, expected)

    for head_norm in ("each", "all"):
        case = projection(tokens=40, dtype=dtype, head_norm=head_norm, rotary_dim=0, device=device)
        weight = 1 + case[0].k_norm_weight.abs()
        results, expected = {}, {}
        for order in ORDERS:
            changes = {"norm_order": order, "k_norm_weight": weight - 1 if order == "gemma" else weight}
            ours, theirs = (case.with_new_outputs().change(**changes) for _ in range(2))
            launch(ours)
            kv_project_ref(theirs)
            results[order], expected[order] = ours.caches[0][:, :, :40], theirs.caches[0][:, :, :40]
        for order in ORDERS:
            assert_nearest(results[order], order, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_norm_of_the_input_is_nearest_to_its_own_reference(dtype: torch.dtype, device: torch.device) -> None:
    """Rows normalised first ("hf"), or the norm in the epilogue ("folded"): the same mathematics, rounded elsewhere."""
    case = projection(tokens=40, dtype=dtype, device=device)
    weight = (1 + torch.rand(48, device=device)).to(dtype)
    fold = {name: getattr(case[0], name) * weight for name in ("k_weight", "v_weight")}
    changes = {"hf": {"norm": "hf", "norm_weight": weight}, "folded": {"norm": "folded", **fold}}
    results, expected = {}, {}
    for norm in changes:
        ours, theirs = (case.with_new_outputs().change(**changes[norm]) for _ in range(2))
        launch(Case(normed(ours)))
        kv_project_ref(theirs)
        results[norm], expected[norm] = ours.caches[1][:, :, :40], theirs.caches[1][:, :, :40]
    assert errors(results["hf"], expected["hf"])[1] < 0.5 * errors(results["hf"], expected["folded"])[1]
    assert errors(results["folded"], expected["folded"])[1] < 0.5 * errors(results["folded"], expected["hf"])[1]


def assert_nearest(actual: torch.Tensor, order: str, expected: dict[str, torch.Tensor]) -> None:
    """Nearer to the reference of its order than to any other that differs from it by more than a weight's rounding."""
    own = errors(actual, expected[order])[1]
    for other in ORDERS:
        if other != order and not torch.equal(expected[other], expected[order]):
            assert own < 0.5 * errors(actual, expected[other])[1], (order, other)


# --- norms of rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_order", [*ORDERS, "none"])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 576), (7, 100), (0, 64), (70, 16)])
def test_row_norm(dtype: torch.dtype, norm_order: str, tokens: int, hidden: int, device: torch.device) -> None:
    x = (torch.randn(tokens, hidden + 8, device=device) * 3).to(dtype)[:, :hidden]
    weight = None if norm_order == "none" else torch.randn(hidden, device=device).to(dtype)
    out = poisoned((tokens, hidden), dtype, device)
    row_norm([x], [] if weight is None else [weight], norm_order, 1e-5, [out])
    assert_close(out, reference.row_norm_ref(x, weight, norm_order, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 576), (7, 100), (0, 64), (70, 16)])
def test_rms_rstd(dtype: torch.dtype, tokens: int, hidden: int, device: torch.device) -> None:
    x, rstd = torch.randn(tokens, hidden, device=device).to(dtype), poisoned((tokens,), torch.float32, device)
    rms_rstd([x], 1e-5, [rstd])
    assert_close(rstd, reference.rms_rstd_ref(x, 1e-5))


def test_row_norm_does_not_depend_on_the_batch(device: torch.device) -> None:
    x, weight = torch.randn(600, 48, device=device).half(), torch.randn(48, device=device).half()
    out, alone = poisoned((600, 48), torch.float16, device), poisoned((5, 48), torch.float16, device)
    row_norm([x], [weight], "llama", 1e-6, [out])
    row_norm([x[300:305]], [weight], "llama", 1e-6, [alone])
    assert_bitwise_equal(out[300:305], alone)


@pytest.mark.parametrize("layers", [3, 8])
def test_norms_of_layers_in_one_launch_are_those_one_by_one(layers: int, device: torch.device) -> None:
    xs = [torch.randn(9, 80, device=device).half() for _ in range(layers)]
    weights = [torch.randn(80, device=device).half() for _ in range(layers)]
    outs = [poisoned(x.shape, x.dtype, device) for x in xs]
    rstds = [poisoned((9,), torch.float32, device) for _ in xs]
    row_norm(xs, weights, "gemma", 1e-6, outs)
    rms_rstd(xs, 1e-6, rstds)
    for x, weight, out, rstd in zip(xs, weights, outs, rstds, strict=True):
        alone, rstd_alone = torch.empty_like(out), torch.empty_like(rstd)
        row_norm([x], [weight], "gemma", 1e-6, [alone])
        rms_rstd([x], 1e-6, [rstd_alone])
        assert_bitwise_equal(out, alone)
        assert_bitwise_equal(rstd, rstd_alone)
