"""Checks of the operators' arguments, before anything is written: errors name the argument, what is expected and what came.

Those that read values (slots), addresses (overlaps) or what autograd follows belong to the implementations: a trace has none of
them, and a GPU should not be asked.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from operator import gt
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import torch
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.float8_e4m3fn, torch.int8)

Norm = Literal["hf", "folded", "none"]
NormOrder = Literal["llama", "gemma", "olmo", "none"]
NORMS, NORM_ORDERS = get_args(Norm), get_args(NormOrder)


def fail(name: str, tensor: torch.Tensor, needed: str) -> NoReturn:
    got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
    raise ValueError(f"{name}: expected {needed}, got {got}")


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Rows of hidden states: floating, with contiguous rows."""
    if tensor.dim() < 1 or tensor.dtype not in FLOATS or tensor.stride(-1) != 1 or not tensor.shape[-1]:
        fail(name, tensor, "float32, float16 or bfloat16 [..., C] with C > 0 and a last stride of 1")


def check(
    name: str, tensor: torch.Tensor | None, shape: tuple[int | str, ...], like: torch.Tensor, dtype: torch.dtype | None
) -> None:
    """The shape, the device of `like`, contiguous last dimension and, if given, the dtype."""
    if tensor is None:
        return
    if (
        tensor.shape != shape
        or tensor.device != like.device
        or (dtype is not None and tensor.dtype != dtype)
        or (tensor.stride(-1) != 1 and tensor.shape[-1] != 1)
    ):
        fail(name, tensor, f"{dtype or 'any dtype'} {shape} on {like.device} with a last stride of 1")


def check_caches(
    k_cache: torch.Tensor, v_cache: torch.Tensor | None, like: torch.Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    """Two caches of one shape and dtype, or that of K alone."""
    shape = tuple(k_cache.shape)
    if len(shape) != 4 or not shape[1] or not shape[3] or shape[3] % 2 or k_cache.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        needed = "[blocks, kv_heads, block_size, head_dim] with kv_heads > 0 and an even head_dim > 0"
        fail("k_cache", k_cache, f"{needed} in one of {names}")
    check("k_cache", k_cache, shape, like, k_cache.dtype)
    check("v_cache", v_cache, shape, like, k_cache.dtype)


def check_rotation(
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    num_tokens: int,
    head_dim: int,
    like: torch.Tensor,
    dtype: torch.dtype | None,
) -> None:
    """cos and sin of half the rotated columns, in `dtype` or float32: a row a token, or rows that `positions` picks."""
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither, got one of them")
    if cos is None or sin is None:
        if positions is not None:
            raise ValueError("positions: expected None without cos and sin, whose rows they pick, got a tensor")
        return
    check("positions", positions, (num_tokens,), like, torch.int64)
    if cos.dim() != 2 or not 0 < 2 * cos.shape[1] <= head_dim or cos.dtype not in FLOATS:
        fail("cos", cos, f"float32, float16 or bfloat16 ({num_tokens}, R/2) with 0 < R <= {head_dim}")
    shape = (num_tokens if positions is None else cos.shape[0], cos.shape[1])
    check("cos", cos, shape, like, None if cos.dtype == torch.float32 else dtype)
    check("sin", sin, shape, like, cos.dtype)


def check_scales(
    names: tuple[str, str],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    like: torch.Tensor,
    *,
    needed: bool,
) -> None:
    """Scales of 8-bit rows: for both of K and V or neither; none beside rows that are not 8-bit."""
    for name, scale in zip(names, scales, strict=True):
        if scale is None:
            if needed or any(other is not None for other in scales):
                raise ValueError(f"{name}: expected float32 {shape} beside rows of {dtype}, got None")
        elif dtype not in CODES:
            raise ValueError(f"{name}: expected None beside rows of {dtype}, which have no scales, got a tensor")
        elif scale.shape != shape or scale.dtype != torch.float32 or scale.device != like.device:
            fail(name, scale, f"torch.float32 {shape} on {like.device}")


def check_alike(layers: Sequence[NamedTuple], shared: Sequence[str]) -> None:
    """Every field of a record is of one shape, dtype, device and layout in all layers; `shared` fields are one value."""
    for name, first, *others in zip(layers[0]._fields, *layers, strict=True):
        if first is None or name in shared:
            for layer, value in enumerate(others, start=1):
                if value is not first and (first is None or isinstance(first, torch.Tensor) or value != first):
                    raise ValueError(
                        f"{name}: expected one for all layers, got another in layer {layer} than in layer 0"
                    )
            continue
        shape, stride, dtype, device = first.shape, first.stride(), first.dtype, first.device
        for layer, tensor in enumerate(others, start=1):
            if tensor is first:
                continue
            if tensor is None:
                raise ValueError(f"{name}: expected a tensor of each layer, got None in layer {layer}")
            same = tensor.shape == shape and tensor.stride() == stride
            if not same or tensor.dtype != dtype or tensor.device != device:
                kind = f"{dtype} {tuple(shape)} on {device} with strides {stride}"
                fail(f"{name} of layer {layer}", tensor, f"{kind}, as of layer 0")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_eps(name: str, eps: float) -> None:
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {eps}")


def check_positive(name: str, number: float) -> None:
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {number}")


def check_norm_weight(name: str, weight: torch.Tensor | None, norm_order: str) -> None:
    """The order is known, and there is a weight unless it is "none"."""
    check_choice("norm_order", norm_order, NORM_ORDERS)
    if (weight is None) != (norm_order == "none"):
        given, other = ("a tensor", "None") if weight is None else ("None", "a tensor")
        raise ValueError(f"{name}: expected {given}, got {other} with norm_order={norm_order!r}")


# --- what reads values, addresses or what autograd follows -------------------------------------------------------------


def check_slot_range(name: str, slot_mapping: torch.Tensor, slots: int) -> None:
    if slot_mapping.numel() == 0:
        return
    low, high = (int(bound) for bound in slot_mapping.aminmax())
    if low < -1 or high >= slots:
        raise ValueError(f"{name}: expected slots from -1 to {slots - 1}, got {low} to {high}")


def check_slots_to_write(slot_mapping: torch.Tensor, slots: int) -> None:
    check_slot_range("slot_mapping", slot_mapping, slots)
    ordered = slot_mapping[1:] > slot_mapping[:-1]
    if not bool(ordered.all()):
        used = slot_mapping[slot_mapping >= 0]
        if used.unique().numel() != used.numel():
            raise ValueError("slot_mapping: expected each slot at most once, got one more often")


def check_positions(positions: torch.Tensor | None, rows: int) -> None:
    if positions is None or positions.numel() == 0:
        return
    low, high = (int(bound) for bound in positions.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"positions: expected 0 to {rows - 1}, the rows of cos and sin, got {low} to {high}")


def check_positions_of_rows(positions: torch.Tensor) -> None:
    if positions.numel() and (low := int(positions.min())) < -1:
        raise ValueError(f"positions: expected -1 for padding, or more, got {low}")


Named = tuple[str, Sequence[torch.Tensor]]
"""An argument's name, and its tensor or that of each layer: these are alike (:func:`check_alike`), and not none."""


def check_forward_only(read: Sequence[Named], written: Sequence[Named]) -> None:
    """No tensor has a tangent, and none that is written is followed by autograd: neither would know what the operator did."""
    if forward_ad._current_level >= 0:  # what unpack_dual looks at for each tensor, at the cost of a call
        for name, tensors in (*read, *written):
            if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
                raise ValueError(
                    f"{name}: expected no tangent, since the operators are forward only, got a dual tensor"
                )
    if torch.is_grad_enabled():
        for name, tensors in written:
            if any(tensor.requires_grad for tensor in tensors):
                raise ValueError(
                    f"{name}: expected a tensor to write to that requires no gradient, since the operators are forward "
                    "only, got one that requires one; torch.no_grad() allows it"
                )


def check_separate(read: Sequence[Named], written: Sequence[Named]) -> None:
    """No element that is written is another one, of the same tensor or of another, that is written or read."""
    spans = []
    for name, tensors in written:
        first = tensors[0]
        if first.is_contiguous():
            size = first.nbytes
        elif _is_nested(first):
            size = _strided_bytes(first)
        else:
            fail(name, first, "memory of its own for each element, with strides that step over all of a row")
        if size:
            spans += [(start := tensor.data_ptr(), start + size) for tensor in tensors]
    if not spans:
        return
    spans.sort()
    starts, ends = zip(*spans, strict=True)
    if any(map(gt, ends, starts[1:])):
        _check_interleaved(written)
        ends = tuple(accumulate(ends, max))
    first_start, last_end = starts[0], ends[-1]
    for name, tensors in read:
        first = tensors[0]
        size = first.nbytes if first.is_contiguous() else _strided_bytes(first)
        for tensor in tensors:
            start = tensor.data_ptr()
            if start < last_end and start + size > first_start:
                before_end = bisect_left(starts, start + size)  # as many of the written start before this one ends
                if start < ends[before_end - 1]:
                    _check_apart(name, tensor, written)


def _check_interleaved(written: Sequence[Named]) -> None:
    """Tensors that are written are apart though their ranges meet."""
    for place, (name, tensors) in enumerate(written):
        for layer, tensor in enumerate(tensors):
            _check_apart(name, tensor, [(name, tensors[layer + 1 :]), *written[place + 1 :]])


def _check_apart(name: str, tensor: torch.Tensor, written: Sequence[Named]) -> None:
    for other_name, others in written:
        if any(_overlap(tensor, other) for other in others):
            where = "that of another layer" if name == other_name else other_name
            raise ValueError(f"{name}: expected memory of its own, got some of {where}")


def _is_nested(tensor: torch.Tensor) -> bool:
    """Return whether each stride steps over all that the smaller ones reach, as in every layout whose elements are apart."""
    inner = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < inner:
            return False
        inner += (size - 1) * stride
    return True


def _strided_bytes(tensor: torch.Tensor) -> int:
    """The bytes from the first of a tensor to behind its last, with those between rows; none if it is empty."""
    return _extent(tensor) * tensor.element_size() if tensor.numel() else 0


def _extent(tensor: torch.Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors share an element; of different strides or dtypes, whether their ranges meet."""
    first, second = (one, other) if one.data_ptr() <= other.data_ptr() else (other, one)
    distance, rest = divmod(second.data_ptr() - first.data_ptr(), first.element_size())
    if not first.numel() or not second.numel() or distance >= _extent(first):
        return False
    if rest or (first.stride(), first.dtype) != (second.stride(), second.dtype):
        return True
    # Interleaved views, such as K and V side by side: is the distance one between two of their elements?
    return _reaches(distance, sorted(zip(first.stride(), first.shape, second.shape, strict=True), reverse=True))


def _reaches(distance: int, dimensions: list[tuple[int, int, int]]) -> bool:
    """Return whether steps make a distance; a dimension is its stride, and the sizes of the views that step on and back.

    With nested strides, largest first, two numbers of steps at most are tried of each.
    """
    if not dimensions or dimensions[0][0] == 0:
        return distance == 0
    (stride, ahead, back), *inner = dimensions
    farthest_on = sum((size - 1) * step for step, size, _ in inner)
    farthest_back = sum((size - 1) * step for step, _, size in inner)
    least = max(1 - back, -((farthest_on - distance) // stride))
    most = min(ahead - 1, (distance + farthest_back) // stride)
    return any(_reaches(distance - i * stride, inner) for i in range(least, most + 1))
