"""The operators as ``torch.library`` knows them: schemas, references on the CPU, kernels on a GPU.

They mutate their outputs and return nothing, so the fake implementation does nothing, and nothing is allocated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from . import reference, tuning
from .checks import check_positions, check_separate, check_slot_range
from .namespace import NAMESPACE

_library = torch.library.Library(NAMESPACE, "DEF")

_SCHEMAS = (
    # A list holds a tensor for each layer, or is empty.
    "rms_rstd(Tensor[] x, float eps, Tensor(a!)[] out) -> ()",
    "row_norm(Tensor[] x, Tensor[] weight, str norm_order, float eps, Tensor(a!)[] out) -> ()",
    "kv_project(Tensor[] x, Tensor[] rstd, Tensor[] q_weight, Tensor[] k_weight, Tensor[] v_weight, Tensor[] q_bias, "
    "Tensor[] k_bias, Tensor[] v_bias, Tensor[] q_norm_weight, Tensor[] k_norm_weight, str norm_order, "
    "float head_norm_eps, Tensor[] cos, Tensor[] sin, Tensor? positions, Tensor slot_mapping, "
    "Tensor(a!)[] q, Tensor(b!)[] k_cache, Tensor(c!)[] v_cache) -> ()",
    "kv_splice(Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor? cos, Tensor? sin, Tensor slot_mapping, "
    "bool static_scale, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_cache_scale, "
    "Tensor(d!)? v_cache_scale) -> ()",
)


# The references are made of differentiable operations, and the operators are not.


@torch.no_grad()
def _rms_rstd_cpu(x: Sequence[torch.Tensor], eps: float, out: Sequence[torch.Tensor]) -> None:
    for layer, rows in enumerate(x):
        out[layer].copy_(reference.rms_rstd_ref(rows, eps))


@torch.no_grad()
def _row_norm_cpu(
    x: Sequence[torch.Tensor], weight: Sequence[torch.Tensor], norm_order: str, eps: float, out: Sequence[torch.Tensor]
) -> None:
    for layer, rows in enumerate(x):
        out[layer].copy_(reference.row_norm_ref(rows, weight[layer] if weight else None, norm_order, eps))


@torch.no_grad()
def _kv_project_cpu(*args: Any) -> None:
    cos, positions, slot_mapping, q, k_cache, v_cache = args[12], *args[14:]
    _check_projection_memory(args[0], q, k_cache, v_cache)
    check_slot_range(slot_mapping, k_cache[0].shape[0] * k_cache[0].shape[2])
    check_positions(positions, cos[0].shape[0] if cos else 0)
    reference.kv_project_ref(*args)


@torch.no_grad()
def _kv_splice_cpu(*args: Any) -> None:
    _check_splice_memory(*args)
    check_slot_range(args[6], args[8].shape[0] * args[8].shape[2])
    reference.kv_splice_ref(*args)


# Triton is imported at the first launch, so that a machine without a GPU never pays for it.


def _rms_rstd_gpu(x: Sequence[torch.Tensor], eps: float, out: Sequence[torch.Tensor]) -> None:
    from ..kernels.row_norm import rms_rstd

    with _device_of(x[0]):
        rms_rstd(x, eps, out)


def _row_norm_gpu(
    x: Sequence[torch.Tensor], weight: Sequence[torch.Tensor], norm_order: str, eps: float, out: Sequence[torch.Tensor]
) -> None:
    from ..kernels.row_norm import row_norm

    with _device_of(x[0]):
        row_norm(x, weight, norm_order, eps, out)


def _kv_project_gpu(*args: Any) -> None:
    from ..kernels.project_splice import project_splice
    from ..kernels.project_splice_config import size_of

    x, _, q_weight, k_weight, v_weight, *_, q, k_cache, v_cache = args
    _check_projection_memory(x, q, k_cache, v_cache)
    size = size_of(x, q_weight, k_weight, v_weight, args[9], args[12], q, k_cache)
    with _device_of(x[0]):
        project_splice(*args, tuning.config(x[0].device.index, x[0].shape[1], size))  # type: ignore[call-arg]


def _kv_splice_gpu(*args: Any) -> None:
    from ..kernels.kv_splice import kv_splice

    _check_splice_memory(*args)
    with _device_of(args[0]):
        kv_splice(*args)


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's GPU as the current one, which is where Triton launches."""
    index = tensor.device.index
    if index is None or index == torch.cuda.current_device():  # None where kernels are interpreted
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _check_projection_memory(
    x: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    k_cache: Sequence[torch.Tensor],
    v_cache: Sequence[torch.Tensor],
) -> None:
    for layer, (keys, values) in enumerate(zip(k_cache, v_cache, strict=True)):
        queries = {"q": q[layer]} if q else {}
        check_separate({"hidden_states": x[layer]}, {**queries, "k_cache": keys, "v_cache": values})
    starts = {tensor.data_ptr() for tensor in (*q, *k_cache, *v_cache)}
    if len(starts) < len(q) + len(k_cache) + len(v_cache) and x[0].shape[0] > 0:
        raise ValueError("k_caches, v_caches: got one memory for two layers; each layer's own is needed")


def _check_splice_memory(*args: Any) -> None:
    names = ("k_cache", "v_cache", "k_cache_scale", "v_cache_scale")
    check_separate({"k": args[0], "v": args[1]}, dict(zip(names, args[8:], strict=True)))


def _nothing(*args: Any) -> None:
    """The fake implementation: only outputs that exist already are written."""


for _schema in _SCHEMAS:
    _name = _library.define(_schema)
    _library.impl(_name, globals()[f"_{_name}_cpu"], "CPU")
    _library.impl(_name, globals()[f"_{_name}_gpu"], "CUDA")
    # Forward only: weights that ask for a gradient are read all the same, and no graph is recorded.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _nothing, lib=_library)
