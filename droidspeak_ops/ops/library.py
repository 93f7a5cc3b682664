"""The operators as ``torch.library`` knows them: schemas, references on the CPU, kernels on a GPU.

They mutate their outputs and return nothing, so the fake implementation does nothing, and nothing is allocated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..kernels.arguments import Projection, from_operator
from . import reference, tuning
from .checks import Named, check_positions, check_separate, check_slot_range
from .namespace import NAMESPACE

_library = torch.library.Library(NAMESPACE, "DEF")

_SCHEMAS = (
    "rms_rstd(Tensor x, float eps, Tensor(a!) out) -> ()",
    "row_norm(Tensor x, Tensor? weight, str norm_order, float eps, Tensor(a!) out) -> ()",
    # In the order of `Projection`. A list holds a tensor for each layer, or is empty.
    "kv_project(Tensor[] hidden_states, Tensor[] k_weight, Tensor[] v_weight, Tensor(a!)[] k_cache, Tensor(b!)[] v_cache, "
    "Tensor slot_mapping, str norm, Tensor[] norm_weight, str norm_order, float norm_eps, Tensor[] rstd, Tensor[] q_weight, "
    "Tensor(c!)[] q, Tensor[] q_bias, Tensor[] k_bias, Tensor[] v_bias, Tensor[] q_norm_weight, Tensor[] k_norm_weight, "
    "float head_norm_eps, Tensor[] cos, Tensor[] sin, Tensor? positions) -> ()",
    "kv_splice(Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor? cos, Tensor? sin, Tensor slot_mapping, "
    "bool static_scale, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_cache_scale, "
    "Tensor(d!)? v_cache_scale) -> ()",
)


# The references are made of differentiable operations, and the operators are not.


@torch.no_grad()
def _rms_rstd_cpu(x: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    out.copy_(reference.rms_rstd_ref(x, eps))


@torch.no_grad()
def _row_norm_cpu(x: torch.Tensor, weight: torch.Tensor | None, norm_order: str, eps: float, out: torch.Tensor) -> None:
    out.copy_(reference.row_norm_ref(x, weight, norm_order, eps))


@torch.no_grad()
def _kv_project_cpu(*args: Any) -> None:
    layers = from_operator(*args)
    first = layers[0]
    _check_projection_memory(layers)
    check_slot_range(first.slot_mapping, first.k_cache.shape[0] * first.k_cache.shape[2])
    check_positions(first.positions, 0 if first.cos is None else first.cos.shape[0])
    for layer in layers:
        reference.kv_project_ref(layer)


@torch.no_grad()
def _kv_splice_cpu(*args: Any) -> None:
    _check_splice_memory(*args)
    check_slot_range(args[6], args[8].shape[0] * args[8].shape[2])
    reference.kv_splice_ref(*args)


# Triton is imported at the first launch, so that a machine without a GPU never pays for it.


def _rms_rstd_gpu(x: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    from ..kernels.row_norm import rms_rstd

    with _device_of(x):
        rms_rstd([x], eps, [out])


def _row_norm_gpu(x: torch.Tensor, weight: torch.Tensor | None, norm_order: str, eps: float, out: torch.Tensor) -> None:
    from ..kernels.row_norm import row_norm

    with _device_of(x):
        row_norm([x], [] if weight is None else [weight], norm_order, eps, [out])


def _kv_project_gpu(*args: Any) -> None:
    from ..kernels.project_splice import kv_project

    layers = from_operator(*args)
    _check_projection_memory(layers)
    rows = layers[0].hidden_states
    with _device_of(rows):
        kv_project(layers, partial(tuning.config, rows.device.index, rows.shape[1]))


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


def _check_projection_memory(layers: Sequence[Projection]) -> None:
    written: list[Named] = []
    for layer in layers:
        if layer.q is not None:
            written.append(("q", layer.q))
        written += (("k_cache", layer.k_cache), ("v_cache", layer.v_cache))
    check_separate([("hidden_states", layer.hidden_states) for layer in layers], written)


def _check_splice_memory(*args: Any) -> None:
    names = ("k_cache", "v_cache", "k_cache_scale", "v_cache_scale")
    check_separate((("k", args[0]), ("v", args[1])), list(zip(names, args[8:], strict=True)))


def _nothing(*args: Any) -> None:
    """The fake implementation: only outputs that exist already are written."""


for _schema in _SCHEMAS:
    _name = _library.define(_schema)
    _library.impl(_name, globals()[f"_{_name}_cpu"], "CPU")
    _library.impl(_name, globals()[f"_{_name}_gpu"], "CUDA")
    # Forward only: weights that ask for a gradient are read all the same, and no graph is recorded.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _nothing, lib=_library)
