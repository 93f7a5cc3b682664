"""The operators as ``torch.library`` knows them: schemas, references on the CPU, kernels on a GPU.

They mutate their outputs and return nothing, so the fake implementation does nothing, and nothing is allocated.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch

from ..kernels.arguments import Projection, from_operator
from . import reference, tuning
from .checks import (
    Named,
    check_forward_only,
    check_positions,
    check_positions_of_rows,
    check_separate,
    check_slot_range,
    check_slots_to_write,
)
from .namespace import NAMESPACE, ops

# Several layers share a launch: at most 8, whose pointers fit in a kernel's arguments, and this many tokens in all. Beyond, one
# launch takes a GPU longer than the host needs for the next; norm="hf" wants a normalised copy of all that share one.
LAYERS_PER_LAUNCH = 8
_TOKENS_PER_LAUNCH = 65536
_COPIED_TOKENS_PER_LAUNCH = 16384

_library = torch.library.Library(NAMESPACE, "DEF")

_SCHEMAS = (
    "rms_rstd(Tensor hidden_states, float eps, Tensor(a!) out) -> ()",
    "row_norm(Tensor hidden_states, Tensor? weight, str norm_order, float eps, Tensor(a!) out) -> ()",
    # In the order of `Projection`. A list holds a tensor for each layer, or is empty.
    "kv_project(Tensor[] hidden_states, Tensor[] k_weight, Tensor[] v_weight, Tensor(a!)[] k_cache, Tensor(b!)[] v_cache, "
    "Tensor slot_mapping, str norm, Tensor[] norm_weight, str norm_order, float norm_eps, Tensor[] rstd, Tensor[] q_weight, "
    "Tensor(c!)[] q, Tensor[] q_bias, Tensor[] k_bias, Tensor[] v_bias, Tensor[] q_norm_weight, Tensor[] k_norm_weight, "
    "float head_norm_eps, Tensor[] cos, Tensor[] sin, Tensor? positions) -> ()",
    "kv_splice(Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor? cos, Tensor? sin, Tensor slot_mapping, "
    "bool static_scale, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_cache_scale, "
    "Tensor(d!)? v_cache_scale) -> ()",
    "attention_peaks(Tensor q, Tensor k_cache, Tensor key_slots, Tensor positions, Tensor(a!) peaks, float scale, "
    "int? window, float? softcap, Tensor? sinks) -> ()",
    "attend_rows(Tensor q, Tensor k_cache, Tensor v_cache, Tensor key_slots, Tensor positions, Tensor(a!) out, "
    "float scale, int? window, float? softcap, Tensor? sinks) -> ()",
)


_TENSORS: dict[str, list[tuple[int, str, bool]]] = {}
"""Tensor arguments of each operator: place, name, and whether they are written."""


def _checked(implementation: Callable[..., None]) -> Callable[..., None]:
    """Return an implementation behind the checks of memory and of what autograd follows, for any operator."""
    operator = implementation.__name__.removeprefix("_").rpartition("_")[0]

    @functools.wraps(implementation)
    def checked(*args: Any) -> None:
        read: list[Named] = []
        written: list[Named] = []
        static_scale = operator == "kv_splice" and args[7]
        for place, name, is_written in _TENSORS[operator]:
            value = args[place]
            tensors = value if isinstance(value, list) else [value]
            if value is None or not tensors:
                continue
            if is_written and not (static_scale and name in _STATIC):
                written.append((name, tensors))
            else:
                read.append((name, tensors))
        check_forward_only(read, written)
        check_separate(read, written)
        implementation(*args)
        # A kernel writes past torch, which would not know that values changed.
        torch.autograd.graph.increment_version([tensor for _, tensors in written for tensor in tensors])

    return checked


_STATIC = ("k_cache_scale", "v_cache_scale")  # read, and not written, with static_scale


def _reference(implementation: Callable[..., None]) -> Callable[..., None]:
    """Return a CPU implementation made of torch's operations, which alone would record a graph and cast as autocast says.

    In inference mode, so that tensors which were made in it are written outside of it too, as by a kernel.
    """
    return _checked(torch.inference_mode()(torch.autocast("cpu", enabled=False)(implementation)))


@_reference
def _rms_rstd_cpu(x: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    out.copy_(reference.rms_rstd_ref(x, eps))


@_reference
def _row_norm_cpu(x: torch.Tensor, weight: torch.Tensor | None, norm_order: str, eps: float, out: torch.Tensor) -> None:
    out.copy_(reference.row_norm_ref(x, weight, norm_order, eps))


@_reference
def _kv_project_cpu(*args: Any) -> None:
    layers = from_operator(*args)
    first = layers[0]
    check_slots_to_write(first.slot_mapping, first.k_cache.shape[0] * first.k_cache.shape[2])
    check_positions(first.positions, 0 if first.cos is None else first.cos.shape[0])
    for layer in layers:
        reference.kv_project_ref(layer)


@_reference
def _kv_splice_cpu(*args: Any) -> None:
    check_slots_to_write(args[6], args[8].shape[0] * args[8].shape[2])
    reference.kv_splice_ref(*args)


@_reference
def _attention_peaks_cpu(
    q: torch.Tensor, k_cache: torch.Tensor, key_slots: torch.Tensor, positions: torch.Tensor, *rest: Any
) -> None:
    _check_attention_values(k_cache, key_slots, positions)
    reference.attention_peaks_ref(q, k_cache, key_slots, positions, *rest)


@_reference
def _attend_rows_cpu(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, key_slots: torch.Tensor, positions: torch.Tensor,
    *rest: Any,
) -> None:  # fmt: skip
    _check_attention_values(k_cache, key_slots, positions)
    reference.attend_rows_ref(q, k_cache, v_cache, key_slots, positions, *rest)


def _check_attention_values(k_cache: torch.Tensor, key_slots: torch.Tensor, positions: torch.Tensor) -> None:
    check_slot_range("key_slots", key_slots, k_cache.shape[0] * k_cache.shape[2])
    check_positions_of_rows(positions)


# Triton is imported at the first launch, so that a machine without a GPU never pays for it.


@_checked
def _rms_rstd_gpu(x: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    from ..kernels.row_norm import rms_rstd

    with _device_of(x):
        rms_rstd([x], eps, [out])


@_checked
def _row_norm_gpu(x: torch.Tensor, weight: torch.Tensor | None, norm_order: str, eps: float, out: torch.Tensor) -> None:
    from ..kernels.row_norm import row_norm

    with _device_of(x):
        row_norm([x], [] if weight is None else [weight], norm_order, eps, [out])


@_checked
def _kv_project_gpu(*args: Any) -> None:
    from ..kernels.project_splice import kv_project

    layers = from_operator(*args)
    rows = layers[0].hidden_states
    choose = partial(tuning.config, rows.device.index, rows.shape[1])
    with _device_of(rows):
        for group in _launches(layers):
            kv_project(group, choose)


@_checked
def _kv_splice_gpu(*args: Any) -> None:
    from ..kernels.kv_splice import kv_splice

    with _device_of(args[0]):
        kv_splice(*args)


@_checked
def _attention_peaks_gpu(*args: Any) -> None:
    from ..kernels.attention_peaks import attention_peaks

    q = args[0]
    with _device_of(q):
        attention_peaks(tuning.target(q.device.index), *args)


@_checked
def _attend_rows_gpu(*args: Any) -> None:
    from ..kernels.attend_rows import attend_rows

    q = args[0]
    with _device_of(q):
        attend_rows(tuning.target(q.device.index), *args)


def _launches(layers: list[Projection]) -> Iterator[list[Projection]]:
    """Yield the layers of each launch."""
    most = _COPIED_TOKENS_PER_LAUNCH if layers[0].norm == "hf" else _TOKENS_PER_LAUNCH
    group = min(LAYERS_PER_LAUNCH, max(most // max(layers[0].hidden_states.shape[0], 1), 1))
    first = 0
    while first < len(layers):
        size = min(group, len(layers) - first)
        size = 1 << (size.bit_length() - 1)  # powers of two, so that four kernels serve any number of layers
        yield layers[first : first + size]
        first += size


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's GPU as the current one, which is where Triton launches."""
    index = tensor.device.index
    if index is None or index == torch.cuda.current_device():  # None where kernels are interpreted
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _refuse_transforms(operator: str, *args: Any) -> NoReturn:
    raise ValueError(
        f"{operator}: expected a call outside of torch.func's transforms (grad, jvp, vmap, ...), got one within; "
        "the operators are forward only"
    )


def _nothing(*args: Any) -> None:
    """The fake implementation: only outputs that exist already are written."""


for _schema in _SCHEMAS:
    _name = _library.define(_schema)
    _TENSORS[_name] = [
        (place, argument.name, argument.alias_info is not None)
        for place, argument in enumerate(getattr(ops, _name).default._schema.arguments)
        if "Tensor" in str(argument.type)
    ]
    _library.impl(_name, globals()[f"_{_name}_cpu"], "CPU")
    _library.impl(_name, globals()[f"_{_name}_gpu"], "CUDA")
    # Forward only: weights that ask for a gradient are read all the same, and no graph is recorded.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    _library.impl(_name, partial(_refuse_transforms, _name), "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _nothing, lib=_library)
