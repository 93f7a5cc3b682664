"""Other ways to say which tokens a plan recomputes, for comparison: functions that are its `selector`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import droidspeak_ops as ds
from droidspeak_ops.prefill.select import budget, highest

Selector = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Given the ids of a context ``[T]`` and of a suffix ``[N]``: float scores ``[T]``, or int64 ascending positions."""


def random_windows(context_ids: torch.Tensor, suffix_ids: torch.Tensor) -> torch.Tensor:
    """Return random scores ``[T]``, the same at every call: the windows around their peaks are random ones."""
    drawn = torch.rand(len(context_ids), generator=torch.Generator().manual_seed(0))
    return drawn.to(context_ids.device)


def mean_attention(receiver: Any, context: ds.SharedContext, select: int | float) -> Selector:
    """Return a selector of single tokens by the suffix's attention, averaged (ProphetKV, arXiv 2602.02579).

    The suffix runs over the reused cache, through all layers. Selected are the positions with the largest mean, over layers,
    heads and the suffix's tokens, of the attention probability; their neighbours are not. What this takes is no measure of
    ProphetKV's time: eager attention holds all probabilities.

    Args:
        receiver: a model that has eager attention.
        context: of one sequence.
        select: as :class:`droidspeak_ops.Plan` has it.
    """

    def selector(context_ids: torch.Tensor, suffix_ids: torch.Tensor) -> torch.Tensor:
        tokens = len(context_ids)
        cache = ds.partial_prefill(receiver, context, ds.Plan())
        scores = torch.zeros(tokens, device=context_ids.device)
        for probabilities in _attentions(receiver, suffix_ids[None], cache):
            scores += probabilities[0, :, :, :tokens].float().mean((0, 1))
        return highest(scores, budget(select, tokens))

    return selector


@torch.no_grad()
def _attentions(receiver: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, ...]:
    """Return each layer's attention probabilities ``[1, H, N, T + N]``, which no attention but the eager one gives."""
    usual = receiver.config._attn_implementation
    receiver.set_attn_implementation("eager")
    try:
        return receiver(ids, past_key_values=cache, output_attentions=True, logits_to_keep=1).attentions
    finally:
        receiver.set_attn_implementation(usual)
