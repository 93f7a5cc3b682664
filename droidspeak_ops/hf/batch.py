"""Several contexts at once: read from a padded or packed batch, and prefilled into one cache, each by a plan of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..context.context import SharedContext
from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..prefill.weights import Norm
from .cache import MixedCache, rows_held, uninitialized_layer
from .receiver import Receiver, prefill
from .sender import capture


def capture_batch(
    sender: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    layers: Sequence[int] = (),
    tokenizer: Any = None,
) -> list[SharedContext]:
    """:func:`capture` of each sequence of a batch, padded or packed.

    A sequence is read by itself: no padding is computed, and what is captured is what it would be alone.

    Args:
        input_ids: int64 ``[B, T]`` with `attention_mask`, or ``[N]`` with `cu_seqlens`, on the sender's device.
        attention_mask: ``[B, T]``: 1 for tokens, 0 for padding before or behind them.
        cu_seqlens: integer ``[B + 1]``: sequence b is tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
        layers, tokenizer: as of :func:`capture`.

    Returns:
        A context of one sequence for each, in their order.

    Raises:
        UnsupportedModelError: the sender's family is not supported.
        ValueError: an argument does not fit, a sequence is empty, or padding lies between its tokens.
    """
    if (attention_mask is None) == (cu_seqlens is None):
        raise ValueError("attention_mask, cu_seqlens: expected exactly one of them")
    if attention_mask is not None:
        sequences = _unpadded(input_ids, attention_mask)
    else:
        sequences = _unpacked(input_ids, [int(bound) for bound in cu_seqlens])  # type: ignore[union-attr]
    return [capture(sender, ids.unsqueeze(0), layers=layers, tokenizer=tokenizer) for ids in sequences]


def partial_prefill_batch(
    receiver: PreTrainedModel | Receiver,
    contexts: Sequence[SharedContext],
    plans: Plan | Sequence[Plan],
    *,
    suffixes: Sequence[torch.Tensor] | None = None,
    maps: Maps | None = None,
    tokenizer: Any = None,
    norm: Norm = "hf",
) -> MixedCache:
    """:func:`partial_prefill` of several contexts into one cache, in which shorter ones are padded on the left.

    Each is computed by itself, so its K/V are bitwise those that it would have alone. :meth:`MixedCache.prompt` makes the
    prompts: ``receiver.generate(**cache.prompt(suffixes), past_key_values=cache)``.

    Args:
        receiver, maps, tokenizer, norm: as of :func:`partial_prefill`.
        contexts: at least one; they may differ in length.
        plans: one for all, or one for each.
        suffixes: int64 ``[N]`` for each sequence, those of one context of one length. Plans that select tokens need them. If
            one does, the cache is of all prompts without their last tokens, and ``cache.prompt([suffix[-1:] for suffix in
            suffixes])`` makes the prompts.

    Returns:
        A cache of all sequences, as long as the longest. It holds copies also of reused layers: in a batch their rows lie side
        by side.

    Raises:
        ReuseError, UnsupportedModelError: as :func:`partial_prefill`.
        ValueError: there is no context, or there are not as many plans or suffixes.
    """
    plans = [plans] * len(contexts) if isinstance(plans, Plan) else plans
    if not contexts or len(plans) != len(contexts):
        raise ValueError(f"plans: expected one for each of at least one context, got {len(plans)} for {len(contexts)}")
    receiver = receiver if isinstance(receiver, Receiver) else Receiver(receiver)
    decoder = receiver.decoder()
    rows_of = [context.tokens.shape[0] for context in contexts]
    if suffixes is not None and len(suffixes) != sum(rows_of):
        raise ValueError(f"suffixes: expected one for each of {sum(rows_of)} sequences, got {len(suffixes)}")
    selects = any(plan.select for plan in plans)
    prompts = [None] * len(contexts) if suffixes is None else _prompts(contexts, suffixes)
    sizes = [
        context.tokens if prompt is None or not selects else prompt[:, :-1]
        for context, prompt in zip(contexts, prompts, strict=True)
    ]
    batch, width = sum(rows_of), max(held.shape[1] for held in sizes)
    tokens = contexts[0].tokens.new_zeros((batch, width))
    mask = torch.zeros_like(tokens)

    def layer(window: int | None) -> Any:
        shape = (batch, decoder.num_kv_heads, rows_held(width, window), decoder.head_dim)
        return uninitialized_layer(shape, window, width, decoder.dtype, decoder.device)

    together = MixedCache([layer(window) for window in decoder.windows], tokens, mask, decoder)
    logits: list[Any] = []
    row = 0
    for context, plan, prompt, held in zip(contexts, plans, prompts, sizes, strict=True):
        alone = prefill(receiver, context, plan, prompt, maps, tokenizer, norm, runs_suffix=selects)
        rows = slice(row, row + context.tokens.shape[0])
        for source, target in zip(alone.layers, together.layers, strict=True):
            for part, whole in ((source.keys, target.keys), (source.values, target.values)):
                padding = whole.shape[2] - part.shape[2]
                whole[rows, :, :padding] = 0  # masked, but NaN would pass through any mask
                whole[rows, :, padding:] = part
        padding = width - held.shape[1]
        tokens[rows, padding:] = held
        mask[rows, padding:] = 1
        logits.append(alone.next_logits)
        row = rows.stop
    if selects:
        together.next_logits = torch.cat(logits)
    if bool(mask.all()):
        together.mask = None
    return together


def _prompts(contexts: Sequence[SharedContext], suffixes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The contexts with their suffixes behind them, ``[B, T + N]`` each."""
    prompts, first = [], 0
    for context in contexts:
        own = suffixes[first : first + context.tokens.shape[0]]
        lengths = {suffix.numel() for suffix in own}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(
                f"suffixes: expected one length of at least 1 for a context of {len(own)}, got {sorted(lengths)}"
            )
        prompts.append(torch.cat((context.tokens, torch.stack(list(own))), 1))
        first += len(own)
    return prompts


def _unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected [B, T] as of input_ids, got {tuple(attention_mask.shape)} and {tuple(input_ids.shape)}"
        )
    sequences = []
    for row, (ids, kept) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
        where = kept.nonzero().flatten().tolist()
        if not where or where[-1] - where[0] + 1 != len(where):
            raise ValueError(
                f"attention_mask: expected tokens with padding at one end, got none or padding between them in row {row}"
            )
        sequences.append(ids[where[0] : where[-1] + 1])
    return sequences


def _unpacked(input_ids: torch.Tensor, bounds: list[int]) -> list[torch.Tensor]:
    increasing = all(start < end for start, end in itertools.pairwise(bounds))
    if input_ids.dim() != 1 or len(bounds) < 2 or not increasing or bounds[0] != 0 or bounds[-1] > input_ids.numel():
        raise ValueError(
            f"cu_seqlens: expected bounds that increase from 0 into [N], got {bounds} for input_ids {tuple(input_ids.shape)}"
        )
    return [input_ids[start:end] for start, end in itertools.pairwise(bounds)]
