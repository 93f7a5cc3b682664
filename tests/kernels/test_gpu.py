"""Tests that need a GPU: the operators and partial prefill on it, without synchronisation, and in a CUDA graph."""

import copy
from typing import Any

import pytest
import torch
from support.cases import attention, projection
from support.compare import assert_close, errors
from support.models import FAMILIES, fine_tuned, tiny, tiny_llama, tokens
from support.prefills import own_prefill, prefill
from transformers.utils import is_flash_attn_2_available

import droidspeak_ops as ds
from droidspeak_ops.kernels import project_splice, project_splice_tma, row_norm
from droidspeak_ops.kernels.arguments import to_operator

pytestmark = pytest.mark.gpu

OPS = torch.ops.droidspeak_ops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_norm", ["each", "all"])
def test_operator_is_its_reference_on_the_cpu(dtype: torch.dtype, head_norm: str) -> None:
    case = projection(
        tokens=300, hidden=512, layers=2, q_heads=8, kv_heads=4, head_dim=128, dtype=dtype, scattered=True, bias=True,
        head_norm=head_norm, positions=True,
    )  # fmt: skip
    moved = case.change(lambda layer: {name: moved_to_gpu(value) for name, value in layer._asdict().items()})
    OPS.kv_project(*to_operator(case))
    OPS.kv_project(*to_operator(moved))
    for actual, expected in zip(moved.outputs, case.outputs, strict=True):
        actual = actual.cpu()
        assert torch.equal(actual.isnan(), expected.isnan())
        assert_close(actual.nan_to_num(), expected.nan_to_num(), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_attention_is_its_reference_on_the_cpu(dtype: torch.dtype, head_dim: int) -> None:
    case = attention(
        rows=80, keys=5000, kv_heads=2, group=4, head_dim=head_dim, dtype=dtype, layout="HND", window=3000, softcap=20.0,
        sinks=dtype,
    )  # fmt: skip
    moved = type(case)(*map(moved_to_gpu, case))
    for name, of, of_moved in (
        ("new_peaks", "peaks_of", OPS.attention_peaks),
        ("new_rows", "rows_of", OPS.attend_rows),
    ):
        actual, expected = (getattr(each, of)(of_moved, getattr(each, name)()) for each in (moved, case))
        assert_close(actual.cpu(), expected, operations=2)


def test_attention_neither_synchronises_nor_depends_on_the_call() -> None:
    """Captured in a graph, whose replay is bitwise the call."""
    case = attention(rows=40, keys=3000, head_dim=64, dtype=torch.bfloat16, device="cuda")
    expected = case.peaks_of(OPS.attention_peaks, case.new_peaks()), case.rows_of(OPS.attend_rows, case.new_rows())
    actual = case.new_peaks(), case.new_rows()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            case.peaks_of(OPS.attention_peaks, actual[0])
            case.rows_of(OPS.attend_rows, actual[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def moved_to_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", [ds.Plan([(0, 6)]), ds.Plan([(2, 4)], project="rest"), ds.Plan()])
def test_partial_prefill_is_as_exact_as_on_the_cpu(plan: ds.Plan, dtype: torch.dtype) -> None:
    """Against float32. Rounding in six layers takes two devices further from each other than a few units in the last place."""
    sender = tiny_llama(layers=6)
    receiver, ids = fine_tuned(sender, 0.3), tokens(130)
    sender, receiver = sender.to(dtype), receiver.to(dtype)

    def keys_values(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        one, other = (copy.deepcopy(model).to(device, dtype) for model in (sender, receiver))
        context = ds.capture(one, ids.to(device), layers=plan.hidden_layers(6))
        cache = ds.partial_prefill(other, context, plan)
        return [tensor.cpu() for layer in cache.layers for tensor in (layer.keys, layer.values)]

    results = keys_values("cuda", dtype), keys_values("cpu", dtype), keys_values("cpu", torch.float32)
    for on_gpu, on_cpu, exact in zip(*results, strict=True):
        (largest, rms), (usual_largest, usual_rms) = errors(on_gpu, exact), errors(on_cpu, exact)
        # Two of the CPU's own implementations of attention are up to 2.1 and 1.2 times as far from it as each other.
        assert largest <= 3 * usual_largest and rms <= 1.5 * usual_rms


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_everything_is_the_own_prefill(family: str, attention: str) -> None:
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("needs flash-attn")
    sender = tiny(family).to("cuda", torch.bfloat16)
    pair = [sender, fine_tuned(sender, 0.3)]
    try:
        for model in pair:
            model.set_attn_implementation(attention)
    except ValueError as error:  # not every family has every implementation
        pytest.skip(str(error))
    ids = tokens(130).cuda()
    cache = prefill(*pair, ids, ds.Plan([(0, 6)]))
    for ours, theirs in zip(cache.layers, own_prefill(pair[1], ids).layers, strict=True):
        assert_close(ours.keys, theirs.keys, torch.bfloat16, operations=6)
        assert_close(ours.values, theirs.values, torch.bfloat16, operations=6)


def test_no_synchronisation_and_capture_in_a_graph() -> None:
    case = projection(tokens=64, hidden=256, dtype=torch.float16, scattered=True, device="cuda")
    arguments = to_operator(case)
    OPS.kv_project(*arguments)  # compiles
    expected = [cache.clone() for cache in case.caches]
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS.kv_project(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.kv_project(*arguments)
    for cache in case.caches:
        cache.fill_(float("nan"))
    graph.replay()
    for actual, wanted in zip(case.caches, expected, strict=True):
        assert torch.equal(actual.nan_to_num(), wanted.nan_to_num())


# --- partial prefill ---------------------------------------------------------------------------------------------------

PLANS = [
    ds.Plan(),
    ds.Plan(project="rest"),
    ds.Plan([(2, 5)]),
    ds.Plan([(0, 2), (3, 6)], project=[2]),
]


def receiver_and_context(family: str, plan: ds.Plan) -> tuple[ds.Receiver, ds.SharedContext]:
    """In float16 with SDPA, as a model is served: of a family with windows too, shorter than the context."""
    sender = tiny(family).to("cuda", torch.float16)
    sender.set_attn_implementation("sdpa")
    context = ds.capture(sender, tokens(64).cuda(), layers=plan.hidden_layers(6))
    return ds.Receiver(fine_tuned(sender, 0.3)), context


def warmed_up(family: str, plan: ds.Plan, norm: str) -> tuple[ds.Receiver, ds.SharedContext]:
    """The same, with nothing left to compile, and nothing under way."""
    receiver, context = receiver_and_context(family, plan)
    receiver.warm_up([plan], tokens=[64], norm=norm)
    torch.cuda.synchronize()
    return receiver, context


@pytest.mark.parametrize("norm", ["hf", "folded"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_partial_prefill_does_not_synchronise(family: str, plan: ds.Plan, norm: str) -> None:
    receiver, context = warmed_up(family, plan, norm)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ds.partial_prefill(receiver, context, plan, norm=norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("norm", ["hf", "folded"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_partial_prefill_in_a_graph(family: str, plan: ds.Plan, norm: str) -> None:
    """Captured and replayed, for the context it was captured with and for another one that is written over it."""
    receiver, context = warmed_up(family, plan, norm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache = ds.partial_prefill(receiver, context, plan, norm=norm)
    for _ in range(2):
        # K and V that are the receiver's own become NaN first; those of reused layers are the context's.
        shared = {part.data_ptr() for layer in range(6) for part in context.kv(layer)[:2]}
        for layer in cache.layers:
            for part in (layer.keys, layer.values):
                if part.data_ptr() not in shared:
                    part.fill_(float("nan"))
        graph.replay()
        expected = ds.partial_prefill(receiver, context, plan, norm=norm)
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        context.tokens.copy_(tokens(64))
        for written in (
            *(part for layer in range(6) for part in context.kv(layer)[:2]),
            *context.hidden_states.values(),
        ):
            written.normal_()


def test_warm_up_compiles_what_a_prefill_launches() -> None:
    plan = PLANS[1]
    receiver, context = receiver_and_context("qwen3", plan)
    receiver.warm_up([plan])
    before = compiled_kernels()
    ds.partial_prefill(receiver, context, plan)
    assert compiled_kernels() == before > 0


def compiled_kernels() -> int:
    from triton.runtime.jit import JITFunction

    modules = (project_splice, project_splice_tma, row_norm)
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return sum(len(variants) for kernel in kernels for variants, *_ in kernel.device_caches.values())


def test_fit_gives_the_maps_of_a_cpu() -> None:
    sender = tiny("llama", 4)
    pair = [sender, fine_tuned(sender, 0.1)]
    examples = [ds.Example.cut(tokens(160), 32) for _ in range(8)]
    there = [ds.Example(*(part.cuda() for part in each)) for each in examples]
    options = {"bands": [(1, 3)], "steps": 20, "show_progress": False}
    wanted = ds.fit(*pair, examples, **options)
    ours = ds.fit(*(copy.deepcopy(model).cuda() for model in pair), there, **options)
    assert (ours.choices, ours.layers.keys(), ours.corrections.keys()) == (
        wanted.choices, wanted.layers.keys(), wanted.corrections.keys(),
    )  # fmt: skip
    for key, layer in ours.layers.items():
        for mine, theirs in zip(vars(layer).values(), vars(wanted.layers[key]).values(), strict=True):
            assert (mine.cpu() - theirs).norm() <= 1e-4 * theirs.norm()
