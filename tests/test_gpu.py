"""What only a GPU can show: the operators and partial prefill on it, without synchronisation, and in a CUDA graph."""

import copy
from typing import Any

import pytest
import torch
from cases import Projection, projection
from compare import assert_close
from models import FAMILIES, fine_tuned, tiny, tiny_llama, tokens
from prefills import own_prefill, prefill
from transformers.utils import is_flash_attn_2_available

import droidspeak_ops as ds

pytestmark = pytest.mark.gpu

OPS = torch.ops.droidspeak_ops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_norm", ["each", "all"])
def test_operator_is_its_reference_on_the_cpu(dtype: torch.dtype, head_norm: str) -> None:
    case = projection(
        tokens=300, hidden=512, layers=2, q_heads=8, kv_heads=4, head_dim=128, dtype=dtype, scattered=True, bias=True,
        head_norm=head_norm, positions=True,
    )  # fmt: skip
    moved = Projection({name: moved_to_gpu(value) for name, value in case.arguments.items()})
    OPS.kv_project(*case.arguments.values())
    OPS.kv_project(*moved.arguments.values())
    for actual, expected in zip(moved.outputs, case.outputs, strict=True):
        actual = actual.cpu()
        assert torch.equal(actual.isnan(), expected.isnan())
        assert_close(actual.nan_to_num(), expected.nan_to_num(), dtype)


def moved_to_gpu(value: Any) -> Any:
    if isinstance(value, list):
        return [tensor.cuda() for tensor in value]
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", [ds.Plan([(0, 6)]), ds.Plan([(2, 4)], project="rest"), ds.Plan()])
def test_partial_prefill_is_that_of_the_cpu(plan: ds.Plan, dtype: torch.dtype) -> None:
    sender = tiny_llama(layers=6)
    receiver, ids = fine_tuned(sender, 0.3), tokens(130)
    sender, receiver = sender.to(dtype), receiver.to(dtype)

    def keys_values(device: str) -> list[torch.Tensor]:
        pair = (copy.deepcopy(model).to(device) for model in (sender, receiver))
        one, other = pair
        context = ds.capture(one, ids.to(device), layers=plan.hidden_layers(6))
        cache = ds.partial_prefill(other, context, plan)
        return [tensor.cpu() for layer in cache.layers for tensor in (layer.keys, layer.values)]

    for actual, expected in zip(keys_values("cuda"), keys_values("cpu"), strict=True):
        assert_close(actual, expected, dtype, operations=6)


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
    arguments = tuple(case.arguments.values())
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
