"""The receiver's next tokens after a context whose K/V come from here and there: of many mixtures, what they share run once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache

import torch

from ..hf.decoder import Decoder
from ..hf.passes import KeysValues, PackedSuffixes

Source = Hashable
"""Where K/V of a layer come from."""

ROW_TOKENS = 256
"""Least tokens of suffixes side by side: enough to fill a matrix product. More of them share one copy of the context's K
and V, but each also scores the others, which it does not see: a quarter of the context's tokens is the best of both."""
_LOGITS = 1 << 25  # that are held at a time


@torch.no_grad()
def replay(
    decoder: Decoder,
    tokens: int,
    ids: torch.Tensor,
    mixtures: Sequence[Sequence[Source]],
    keys_values: Callable[[Source, int], KeysValues],
) -> torch.Tensor:
    """Return what leaves the last layer when a suffix runs behind a context, for every mixture of the context's K/V.

    Mixtures that have the same sources up to a layer are one up to there; and those that have the same source at a layer
    run through it side by side, wherever they were before. All L * (L + 1) / 2 bands of a model cost a third of as many passes.

    Args:
        decoder: the receiver.
        tokens: of the context.
        ids: int64 ``[1, S]``, the suffix.
        mixtures: for each the source of every layer.
        keys_values: K and V ``[1, K, N, D]`` of a source at a layer.

    Returns:
        ``[mixtures, S, C]``.
    """
    length = ids.shape[1]
    suffixes_a_row = max(1, max(ROW_TOKENS, tokens // 4) // length)
    packed = cache(lambda count: PackedSuffixes(decoder, tokens, [length] * count))
    states, rows = decoder.embed(ids), [0] * len(mixtures)
    for layer in range(decoder.num_layers):
        wanted: dict[Source, dict[int, None]] = {}
        for row, mixture in zip(rows, mixtures, strict=True):
            wanted.setdefault(mixture[layer], {})[row] = None
        following: list[torch.Tensor] = []
        places: dict[tuple[int, Source], int] = {}
        for source, from_rows in wanted.items():
            held = {layer: keys_values(source, layer)}
            for some in torch.tensor(list(from_rows)).split(suffixes_a_row):
                row_of_some = states[some].flatten(0, 1)[None]
                left = packed(len(some)).over.run(layer, row_of_some, packed(len(some)).cache(held))
                places |= {(row, source): len(places) + number for number, row in enumerate(some.tolist())}
                following.append(left.view(len(some), length, -1))
        states = torch.cat(following)
        rows = [places[row, mixture[layer]] for row, mixture in zip(rows, mixtures, strict=True)]
    return states[rows]


@torch.no_grad()
def judged(decoder: Decoder, states: torch.Tensor, own: torch.Tensor) -> tuple[list[float], list[float]]:
    """For each of many next-token distributions the divergence from the receiver's own, in nats, and how often the likeliest
    token is the same; means over tokens. Of logits that are NaN it is infinite.

    Args:
        states: ``[mixtures, N, C]``, what leaves the last layer at N tokens.
        own: logits ``[N, vocabulary]`` after the receiver's own prefill.
    """
    weights, likeliest = own.softmax(-1), own.argmax(-1)
    divergences: list[float] = []
    agreements: list[float] = []
    for some in states.split(max(1, _LOGITS // own.numel())):
        logits = decoder.logits(some)
        agreements += (logits.argmax(-1) == likeliest).float().mean(1).tolist()
        # log Σ p exp(d) - Σ p d, which is as exact as d is small; where exp would overflow, the divergence is beyond use.
        apart = (logits - own).clamp_(max=80.0)
        mean = torch.einsum("nv,mnv->mn", weights, apart)
        shift = torch.einsum("nv,mnv->mn", weights, apart.expm1_()).log1p()
        divergences += (shift - mean).mean(1).clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf).tolist()
    return divergences, agreements
