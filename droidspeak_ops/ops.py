"""The operators on plain tensors: K/V projection and splicing in place into a KV cache, and the norms they start from.

Each is a ``torch.library`` operator under ``torch.ops.droidspeak_ops`` that mutates its outputs and returns nothing:
forward only, without host synchronisation on a GPU, usable under ``torch.compile(fullgraph=True)``. On the CPU the
implementation is the reference (:mod:`droidspeak_ops.reference`); on CUDA and ROCm it is a Triton kernel.

A KV cache is ``[blocks, kv_heads, block_size, head_dim]`` with any strides whose last is 1. A dense transformers cache
``[batch, kv_heads, tokens, head_dim]`` is that already, with a sequence for a block; for a paged cache in NHD order pass
``cache.transpose(1, 2)``. Slot ``s`` is row ``s % block_size`` of block ``s // block_size``; slot -1 stores nothing.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

from . import reference
from ._ops import NAMESPACE, ops

__all__ = ["fold_norm_weight", "kv_project", "kv_splice", "rms_rstd", "row_norm"]

Norm = Literal["hf", "folded", "none"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rms_rstd(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """1/rms of the hidden states of each token, which depends on no weight and so can be kept with a context.

    Args:
        hidden_states: ``[..., C]``, float32, float16 or bfloat16.
        eps: added to the mean square.

    Returns:
        float32 ``[...]``.
    """
    _check_rows("hidden_states", hidden_states)
    out = torch.empty(hidden_states.shape[:-1], dtype=torch.float32, device=hidden_states.device)
    ops.rms_rstd(_rows(hidden_states), eps, out.view(-1))
    return out


def row_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each token's hidden states, rounded where transformers' Llama norm rounds.

    Args:
        hidden_states: ``[..., C]``, float32, float16 or bfloat16.
        weight: ``[C]``, of the same dtype.
        eps: added to the mean square.

    Returns:
        Normalised hidden states, of the shape and dtype of `hidden_states`, contiguous.
    """
    _check_rows("hidden_states", hidden_states)
    _check("weight", weight, (hidden_states.shape[-1],), hidden_states)
    out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    ops.row_norm(_rows(hidden_states), weight, eps, out.view(-1, out.shape[-1]))
    return out


def fold_norm_weight(weight: torch.Tensor, norm_weight: torch.Tensor) -> torch.Tensor:
    """Fold the weight of an RMS norm ``[C]`` into a projection ``[N, C]`` that follows it, for ``norm="folded"``."""
    return weight * norm_weight


def kv_project(
    hidden_states: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    norm: Norm = "hf",
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    rstd: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    v_bias: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    k_norm_eps: float = 1e-6,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """Compute a layer's K and V from its hidden states and store them in place: no attention, no MLP.

    Norm, both projections, bias, per-head norm of K, RoPE and the store at given rows, without the intermediate tensors.
    This is a projected layer, and the last layer of a band (paper, section 4.1: layers recomputed from the E cache).

    Args:
        hidden_states: ``[..., C]``: the residual stream that enters the layer; T tokens in all.
        k_weight, v_weight: ``[K * D, C]``, of the dtype of `hidden_states`.
        k_cache, v_cache: ``[blocks, K, block_size, D]``, written in place; any floating dtype, any strides but the last.
        slot_mapping: int64 ``[T]``, each slot at most once. On the CPU a slot outside the cache raises; on a GPU, where
            reading it would stall the host, such a token is not stored.
        norm: ``"hf"`` normalises rows first, in transformers' rounding order, with `norm_weight` and `norm_eps`.
            ``"folded"`` expects weights that went through :func:`fold_norm_weight`, and scales the float32 product by
            `rstd`: one rounding fewer and no pass over the rows. ``"none"`` takes rows that are normalised already.
        norm_weight: ``[C]``; for ``"hf"`` alone.
        norm_eps: eps of the input norm, where it is computed here.
        rstd: float32, shape of `hidden_states` without its last dimension; for ``"folded"``, computed when not given.
        k_bias, v_bias: ``[K * D]``, both or neither.
        k_norm_weight: ``[D]``, RMS norm over each head of K, with `k_norm_eps`.
        cos, sin: ``[T, R / 2]`` with R the rotated columns of a head: pairs (i, i + R/2) are rotated, the rest pass.

    Raises:
        ValueError: a shape, dtype, device or slot does not fit; the message names the argument.
    """
    _check_rows("hidden_states", hidden_states)
    _check_caches(k_cache, v_cache, hidden_states)
    x = _rows(hidden_states)
    num_tokens, hidden_size = x.shape
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    for name, weight in (("k_weight", k_weight), ("v_weight", v_weight)):
        _check(name, weight, (num_kv_heads * head_dim, hidden_size), hidden_states)
    if (k_bias is None) != (v_bias is None):
        raise ValueError("k_bias and v_bias: one is given and the other is not; both or neither are needed")
    for name, bias in (("k_bias", k_bias), ("v_bias", v_bias)):
        _check(name, bias, (num_kv_heads * head_dim,), hidden_states)
    _check("k_norm_weight", k_norm_weight, (head_dim,), hidden_states)
    _check_slots(slot_mapping, num_tokens, hidden_states)
    _check_rotation(cos, sin, num_tokens, head_dim, hidden_states)

    if norm not in ("hf", "folded", "none"):
        raise ValueError(f"norm: got {norm!r}; 'hf', 'folded' or 'none' is needed")
    if (norm == "hf") != (norm_weight is not None):
        raise ValueError(f"norm_weight: {'missing' if norm == 'hf' else 'given'} with norm={norm!r}")
    if rstd is not None and norm != "folded":
        raise ValueError(f"rstd: given with norm={norm!r}; only 'folded' scales by it")
    if norm == "hf":
        assert norm_weight is not None
        x = row_norm(x, norm_weight, norm_eps)
    elif norm == "folded":
        rstd = rms_rstd(x, norm_eps) if rstd is None else rstd.reshape(-1)
        if rstd.dtype != torch.float32 or rstd.shape[0] != num_tokens or rstd.device != x.device:
            got = f"{rstd.dtype} {tuple(rstd.shape)} on {rstd.device}"
            raise ValueError(f"rstd: got {got}; float32 with {num_tokens} elements on {x.device} is needed")
    ops.kv_project(
        x, rstd, k_weight, v_weight, k_bias, v_bias, k_norm_weight, k_norm_eps, cos, sin, slot_mapping, k_cache, v_cache
    )


def kv_splice(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """Copy rows of K and V into a cache of another layout or dtype, in place, and optionally rotate K further.

    Args:
        k, v: ``[B, K, T, D]``, float32, float16 or bfloat16; they must not share memory with the caches.
        k_cache, v_cache: ``[blocks, K, block_size, D]``, written in place.
        slot_mapping: int64 ``[B * T]``: row t of sequence b goes to ``slot_mapping[b * T + t]``.
        cos, sin: ``[B * T, R / 2]``: the angle by which each row of K is rotated on top of what it has, for a change of
            position or of RoPE base; computed in float32.

    Raises:
        ValueError: a shape, dtype, device or slot does not fit; the message names the argument.
    """
    _check_caches(k_cache, v_cache, k)
    expected = (k.shape[0], k_cache.shape[1], k.shape[2], k_cache.shape[3]) if k.dim() == 4 else ("B", "K", "T", "D")
    for name, tensor in (("k", k), ("v", v)):
        _check(name, tensor, expected, k)
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: got dtype {tensor.dtype}; float32, float16 or bfloat16 is needed")
    _check_slots(slot_mapping, k.shape[0] * k.shape[2], k)
    _check_rotation(cos, sin, k.shape[0] * k.shape[2], k.shape[3], None)
    ops.kv_splice(k, v, cos, sin, slot_mapping, k_cache, v_cache)


def _rows(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, hidden_states.shape[-1])


def _check_rows(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() < 1 or tensor.dtype not in _DTYPES or tensor.stride(-1) != 1:
        got = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"{name}: got {got}; float32, float16 or bfloat16 [..., C] with a last stride of 1 is needed")


def _check(
    name: str, tensor: torch.Tensor | None, shape: tuple[int | str, ...], like: torch.Tensor, *, same_dtype: bool = True
) -> None:
    if tensor is None:
        return
    fits = tensor.shape == shape and tensor.device == like.device and (tensor.dim() == 0 or tensor.stride(-1) == 1)
    if not fits or (same_dtype and tensor.dtype != like.dtype):
        got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
        needed = f"{like.dtype if same_dtype else 'any floating dtype'} {tuple(shape)} on {like.device}"
        raise ValueError(f"{name}: got {got}; {needed} with a last stride of 1 is needed")


def _check_caches(k_cache: torch.Tensor, v_cache: torch.Tensor, like: torch.Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or not cache.dtype.is_floating_point:
            got = f"{cache.dtype} {tuple(cache.shape)}"
            raise ValueError(f"{name}: got {got}; floating [blocks, kv_heads, block_size, head_dim] is needed")
        _check(name, cache, tuple(k_cache.shape), like, same_dtype=False)
    if v_cache.dtype != k_cache.dtype:
        raise ValueError(f"v_cache: got {v_cache.dtype}; {k_cache.dtype}, the dtype of k_cache, is needed")
    if k_cache.shape[3] % 2:
        raise ValueError(f"k_cache: got a head_dim of {k_cache.shape[3]}; an even one is needed")


def _check_slots(slot_mapping: torch.Tensor, num_tokens: int, like: torch.Tensor) -> None:
    if slot_mapping.shape != (num_tokens,) or slot_mapping.dtype != torch.int64 or slot_mapping.device != like.device:
        got = f"{slot_mapping.dtype} {tuple(slot_mapping.shape)} on {slot_mapping.device}"
        raise ValueError(f"slot_mapping: got {got}; int64 ({num_tokens},) on {like.device} is needed")
    if num_tokens > 1 and slot_mapping.stride(0) != 1:
        raise ValueError(f"slot_mapping: got stride {slot_mapping.stride(0)}; 1 is needed")


def _check_rotation(
    cos: torch.Tensor | None, sin: torch.Tensor | None, num_tokens: int, head_dim: int, like: torch.Tensor | None
) -> None:
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: one is given and the other is not; both or neither are needed")
    if cos is None or sin is None:
        return
    if cos.dim() != 2 or not 0 < 2 * cos.shape[-1] <= head_dim:
        raise ValueError(f"cos: got {tuple(cos.shape)}; ({num_tokens}, R/2) with 0 < R <= {head_dim} is needed")
    for name, tensor in (("cos", cos), ("sin", sin)):
        _check(name, tensor, (num_tokens, cos.shape[-1]), cos if like is None else like)


# --- torch.library -------------------------------------------------------------------------------------------------

_library = torch.library.Library(NAMESPACE, "DEF")

_SCHEMAS = (
    "rms_rstd(Tensor x, float eps, Tensor(a!) out) -> ()",
    "row_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()",
    "kv_project(Tensor x, Tensor? rstd, Tensor k_weight, Tensor v_weight, Tensor? k_bias, Tensor? v_bias, "
    "Tensor? k_norm_weight, float k_norm_eps, Tensor? cos, Tensor? sin, Tensor slot_mapping, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache) -> ()",
    "kv_splice(Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor slot_mapping, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache) -> ()",
)


def _check_slot_range(slot_mapping: torch.Tensor, cache: torch.Tensor) -> None:
    # Here and not in the public functions: it reads data, which a trace cannot and a GPU should not.
    if slot_mapping.numel() == 0:
        return
    slots = cache.shape[0] * cache.shape[2]
    low, high = (int(bound) for bound in slot_mapping.aminmax())
    if low < -1 or high >= slots:
        raise ValueError(f"slot_mapping: got slots from {low} to {high}; -1 to {slots - 1} are needed")
    ordered = slot_mapping[1:] > slot_mapping[:-1]
    if not bool(ordered.all()):
        used = slot_mapping[slot_mapping >= 0]
        if used.unique().numel() != used.numel():
            raise ValueError("slot_mapping: got a slot more than once; each at most once is needed")


def _check_separate(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    for name, tensor in (("k", k), ("v", v)):
        for target, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if torch._C._overlaps(tensor, cache):
                raise ValueError(f"{name}: shares memory with {target}; tensors of its own are needed")


# The references are made of differentiable operations, and the operators are not.


@torch.no_grad()
def _rms_rstd_cpu(x: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    out.copy_(reference.rms_rstd_ref(x, eps))


@torch.no_grad()
def _row_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    out.copy_(reference.row_norm_ref(x, weight, eps))


@torch.no_grad()
def _kv_project_cpu(*args: Any) -> None:
    _check_slot_range(args[-3], args[-2])
    reference.kv_project_ref(*args)


@torch.no_grad()
def _kv_splice_cpu(*args: Any) -> None:
    _check_separate(args[0], args[1], args[-2], args[-1])
    _check_slot_range(args[-3], args[-2])
    reference.kv_splice_ref(*args)


# Triton is imported at the first launch, so that a machine without a GPU never pays for it.


def _rms_rstd_gpu(x: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    from .kernels.row_norm import rms_rstd

    rms_rstd(x, eps, out)


def _row_norm_gpu(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    from .kernels.row_norm import row_norm

    row_norm(x, weight, eps, out)


def _kv_project_gpu(x, rstd, k_weight, v_weight, k_bias, v_bias, k_norm_weight, k_norm_eps, cos, sin, slots, k, v):
    from .kernels.project_splice import project_splice, project_splice_config

    target, has_k_norm = _target(x.device.index), k_norm_weight is not None
    config = project_splice_config(target, x.dtype, k.shape[1], k.shape[3], has_k_norm)
    project_splice(
        x, rstd, k_weight, v_weight, k_bias, v_bias, k_norm_weight, k_norm_eps, cos, sin, k, v, slots, config
    )


def _kv_splice_gpu(k, v, cos, sin, slot_mapping, k_cache, v_cache):
    from .kernels.kv_splice import kv_splice

    _check_separate(k, v, k_cache, v_cache)
    kv_splice(k, v, cos, sin, k_cache, v_cache, slot_mapping)


@functools.cache
def _target(device: int) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _nothing(*args: Any) -> None:
    """The fake implementation: only outputs that exist already are written."""


for _schema in _SCHEMAS:
    _name = _library.define(_schema)
    _library.impl(_name, globals()[f"_{_name}_cpu"], "CPU")
    _library.impl(_name, globals()[f"_{_name}_gpu"], "CUDA")
    # Forward only: weights that ask for a gradient are read all the same, and no graph is recorded.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _nothing, lib=_library)
