"""Attention of a pass whose tokens are anywhere in a KV cache, through the layers of a model as they are.

transformers' SDPA repeats K and V for every query head where it is given a mask, which for some tokens over a long cache takes
as long as attention itself. Such a pass attends by :func:`droidspeak_ops.ops.attend_rows` on a GPU, which needs no mask, and on
the CPU by SDPA that knows of grouped heads, for the same numbers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from .. import ops

_NAME = "droidspeak_rows"


@dataclass(frozen=True)
class SeenRows:
    """The rows of a layer's K and V that the tokens of a pass see.

    Args:
        key_slots: int64 ``[1, S]``: the row of the key at each position, -1 where there is none.
        positions: int64 ``[1, N]`` of the tokens.
        window: number of positions that a token sees, its own included; None for all.
        options: `scale`, `softcap` and `sinks`, as the operators take them.
    """

    key_slots: torch.Tensor
    positions: torch.Tensor
    window: int | None
    options: dict[str, Any]


def has_kernel(device: torch.device) -> bool:
    """Return whether attention over rows is a kernel there, which needs no mask."""
    return device.type != "cpu"


def attending_to_rows(layer: Any, config: Any) -> Any:
    """Return a decoder layer that shares all modules of `layer`, and whose attention takes :class:`SeenRows` as `rows`.

    The layer itself, which other threads may be running, is not changed.

    Args:
        config: the model's as :func:`config_of_rows` returns it.
    """
    attention, other = _shallow(layer.self_attn), _shallow(layer)
    vars(attention)["config"] = config
    vars(other)["_modules"] = {**layer._modules, "self_attn": attention}
    return other


def config_of_rows(config: Any) -> Any:
    """Return a model's configuration as the attention of :func:`attending_to_rows` reads it."""
    config = copy.copy(config)
    config._attn_implementation = _NAME
    return config


def _shallow(module: Any) -> Any:
    """Return a shallow copy of a module; `copy.copy` goes by pickle's protocol, whose time shows on the way to a GPU."""
    other = object.__new__(type(module))
    vars(other).update(vars(module))
    return other


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    rows: SeenRows,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: of queries ``[B, H, N, D]`` over K and V ``[B, K, S, D]``, as ``[B, N, H, D]``."""
    if attention_mask is not None:
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=rows.options["scale"], enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous(), None
    queries = query.transpose(1, 2)
    out = torch.empty(queries.shape, dtype=query.dtype, device=query.device)
    ops.attend_rows(queries, key, value, rows.key_slots, rows.positions, out, window=rows.window, **rows.options)
    return out, None


AttentionInterface.register(_NAME, _attend)
