"""Host time of a call: the public function, the operator beneath it, and the reference alone, on tensors of one token.

    OMP_NUM_THREADS=1 pytest bench/test_overhead.py --benchmark-enable --benchmark-columns=min,median,iqr

Public less operator is the checks of shapes; operator less reference is torch's dispatch and the checks of slots and memory.
On a GPU the launcher takes the reference's place: what it does on the host up to Triton's own launch, which is stubbed, is
timed by itself, with the check of memory that comes before.

Of partial prefill: a model of 30 layers with next to no work in them, given as it is or read once (`ds.Receiver`). The
operators do nothing there, as on a GPU the host only launches them. A plan that selects tokens runs its suffix as well, twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import droidspeak_ops as ds
from droidspeak_ops.kernels.arguments import Projection, to_operator
from droidspeak_ops.ops import attention, functions, library, projection, reference, tuning
from droidspeak_ops.proof.shapes import Shape, projections

OPS = torch.ops.droidspeak_ops
EPS = 1e-6
LAYERS = 8

Calls = dict[str, Callable[[], Any]]
"""Calls to time, by level."""


def kv_project(norm: str) -> Calls:
    """Return the calls for one layer."""
    weight = torch.randn(16) if norm == "hf" else None
    layer = _layers(1)[0]._replace(norm=norm, norm_weight=weight)
    return {
        "public": partial(ds.ops.kv_project, layer),
        "operator": partial(OPS.kv_project, *to_operator([layer])),
        "reference": partial(reference.kv_project_ref, layer),
    }


def kv_project_layers() -> Calls:
    """Return the calls for several layers together."""
    layers = _layers(LAYERS)

    def references() -> None:
        for layer in layers:
            reference.kv_project_ref(layer)

    return {
        "public": partial(ds.ops.kv_project_layers, layers),
        "operator": partial(OPS.kv_project, *to_operator(layers)),
        "reference": references,
    }


def kv_splice() -> Calls:
    """Return the calls for K and V of one token."""
    k, v, k_cache, v_cache = (torch.randn(1, 1, 1, 8) for _ in range(4))
    slots = torch.arange(1)
    values = (k, v, None, None, None, None, slots, False, k_cache, v_cache, None, None)
    return {
        "public": partial(ds.ops.kv_splice, k, v, k_cache, v_cache, slots),
        "operator": partial(OPS.kv_splice, *values),
        "reference": partial(reference.kv_splice_ref, *values),
    }


def rms_rstd() -> Calls:
    """Return the calls for one row."""
    x, out = torch.randn(1, 16), torch.empty(1)
    return {
        "public": partial(ds.ops.rms_rstd, x, EPS),
        "operator": partial(OPS.rms_rstd, x, EPS, out),
        "reference": partial(reference.rms_rstd_ref, x, EPS),
    }


def _layers(count: int) -> list[Projection]:
    return projections(Shape(16, 1, 1, 8, 8), 1, dtype=torch.float32, device="cpu", layers=count)


PLANS = [ds.Plan(), ds.Plan(project="rest"), ds.Plan([(15, 25)]), ds.Plan(select=2)]


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=30, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


CASES = {
    "kv_project norm=none": partial(kv_project, "none"),
    "kv_project norm=hf": partial(kv_project, "hf"),
    f"kv_project_layers {LAYERS} layers": kv_project_layers,
    "kv_splice": kv_splice,
    "rms_rstd": rms_rstd,
}


@pytest.mark.parametrize("layers", [1, LAYERS])
@torch.no_grad()
def test_launcher(benchmark: Any, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.JITFunction, "run", lambda *args, **options: None)
    monkeypatch.setattr(tuning, "target", lambda device: "sm_90")
    benchmark.group = "launcher of kv_project"
    benchmark(partial(library._kv_project_gpu, *to_operator(_layers(layers))))


@pytest.mark.parametrize("level", ["public", "operator", "reference"])
@pytest.mark.parametrize("case", list(CASES))
@torch.no_grad()
def test_overhead(benchmark: Any, case: str, level: str) -> None:
    benchmark.group = case
    benchmark(CASES[case]()[level])


@pytest.mark.parametrize("read", ["each time", "once"])
@pytest.mark.parametrize("norm", ["hf", "folded"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_partial_prefill(
    benchmark: Any, model: Any, plan: ds.Plan, norm: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.zeros((1, 6), dtype=torch.int64)
    context = ds.capture(model, ids[:, :4], layers=range(30))
    receiver = ds.Receiver(model) if read == "once" else model
    for module in (attention, functions, projection):
        monkeypatch.setattr(module, "ops", Launched())
    benchmark.group = f"partial_prefill {plan}, {norm}"
    prompt_ids = ids if plan.select else None
    benchmark(partial(ds.partial_prefill, receiver, context, plan, prompt_ids=prompt_ids, norm=norm))


class Launched:
    """The operators' namespace where none does anything."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None
