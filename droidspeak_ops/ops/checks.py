"""Checks of the operators' arguments, before anything is written: errors name the argument, what is expected and what came.

Those that read values (slots) or addresses (overlaps) belong to the implementations: a trace has neither, and a GPU should
not be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import torch

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
    if tensor.dim() < 1 or tensor.dtype not in FLOATS or tensor.stride(-1) != 1:
        fail(name, tensor, "float32, float16 or bfloat16 [..., C] with a last stride of 1")


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
    k_cache: torch.Tensor, v_cache: torch.Tensor, like: torch.Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    """Two caches of one shape and dtype whose rows do not share memory."""
    shape = tuple(k_cache.shape)
    if len(shape) != 4 or shape[3] % 2 or k_cache.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        fail("k_cache", k_cache, f"[blocks, kv_heads, block_size, head_dim] with an even head_dim in one of {names}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check(name, cache, shape, like, k_cache.dtype)
        if any(size > 1 and not step for size, step in zip(shape, cache.stride(), strict=True)):
            fail(name, cache, "memory of its own for each row (no stride of 0)")


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
    if cos.dim() != 2 or not 0 < 2 * cos.shape[1] <= head_dim:
        fail("cos", cos, f"({num_tokens}, R/2) with 0 < R <= {head_dim}")
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
    written: bool,
) -> None:
    """Scales of 8-bit rows: for both of K and V or neither; none beside rows that are not 8-bit; apart if written."""
    for name, scale in zip(names, scales, strict=True):
        if scale is None:
            if needed or any(other is not None for other in scales):
                raise ValueError(f"{name}: expected float32 {shape} beside rows of {dtype}, got None")
        elif dtype not in CODES:
            raise ValueError(f"{name}: expected None beside rows of {dtype}, which have no scales, got a tensor")
        elif scale.shape != shape or scale.dtype != torch.float32 or scale.device != like.device:
            fail(name, scale, f"torch.float32 {shape} on {like.device}")
        elif written and 0 in scale.stride() and scale.numel() > 1:
            fail(name, scale, "memory of its own for each scale that is written (no stride of 0)")


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
            if tensor is None:
                raise ValueError(f"{name}: expected a tensor of each layer, got None in layer {layer}")
            same = tensor.shape == shape and tensor.stride() == stride
            if not same or tensor.dtype != dtype or tensor.device != device:
                kind = f"{dtype} {tuple(shape)} on {device} with strides {stride}"
                fail(f"{name} of layer {layer}", tensor, f"{kind}, as of layer 0")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_norm_weight(name: str, weight: torch.Tensor | None, norm_order: str) -> None:
    """The order is known, and there is a weight unless it is "none"."""
    check_choice("norm_order", norm_order, NORM_ORDERS)
    if (weight is None) != (norm_order == "none"):
        given, other = ("a tensor", "None") if weight is None else ("None", "a tensor")
        raise ValueError(f"{name}: expected {given}, got {other} with norm_order={norm_order!r}")


# --- what reads values or addresses ------------------------------------------------------------------------------------


def check_slot_range(slot_mapping: torch.Tensor, slots: int) -> None:
    if slot_mapping.numel() == 0:
        return
    low, high = (int(bound) for bound in slot_mapping.aminmax())
    if low < -1 or high >= slots:
        raise ValueError(f"slot_mapping: expected slots from -1 to {slots - 1}, got {low} to {high}")
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


Named = tuple[str, torch.Tensor | None]


def check_separate(read: Sequence[Named], written: Sequence[Named]) -> None:
    """No tensor that is read shares memory with one that is written, nor one that is written with another."""
    spans = [
        (*_range(tensor), place, name, tensor)
        for place, (name, tensor) in enumerate((*read, *written))
        if tensor is not None
    ]
    spans.sort(key=itemgetter(0))
    meeting: list[Any] = []  # spans that reach beyond where the next one starts
    reach = 0
    for span in spans:
        start, end, place, name, tensor = span
        if start < reach:
            for _, other_end, other_place, other_name, other in meeting:
                if start < other_end and max(place, other_place) >= len(read) and _overlap(tensor, other):
                    first, second = (name, other_name) if place < other_place else (other_name, name)
                    where = "that of another layer" if first == second else second
                    raise ValueError(f"{first}: expected memory of its own, got some of {where}")
            meeting.append(span)
        else:
            meeting = [span]
        reach = max(reach, end)


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a tensor to behind its last; none if it is empty."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    return start, start + _extent(tensor) * tensor.element_size()


def _extent(tensor: torch.Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors share an element; views of different strides are taken to where their ranges meet."""
    first, second = (one, other) if one.data_ptr() <= other.data_ptr() else (other, one)
    distance, rest = divmod(second.data_ptr() - first.data_ptr(), first.element_size())
    if not first.numel() or not second.numel() or distance >= _extent(first):
        return False
    if rest or (first.stride(), first.dtype) != (second.stride(), second.dtype):
        return True
    # Interleaved views, such as K and V side by side: is the distance one between two of their elements?
    return _reaches(distance, sorted(zip(first.stride(), first.shape, strict=True), reverse=True))


def _reaches(distance: int, dimensions: list[tuple[int, int]]) -> bool:
    if not dimensions or dimensions[0][0] == 0:
        return distance == 0
    (stride, size), *inner = dimensions
    steps = distance // stride
    return any(abs(i) < size and _reaches(distance - i * stride, inner) for i in (steps, steps + 1))
