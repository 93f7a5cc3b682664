"""Replay of a suffix over many mixtures of a context's K/V, in which what the mixtures have in common runs once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TypeVar

import torch
from einops import rearrange

from ..hf.decoder import Decoder
from ..hf.passes import KeysValues, PackedSuffixes
from ..metrics import kl_divergence

Source = TypeVar("Source", bound=Hashable)  # identifies K/V of all layers

ROW_TOKENS = 256
"""Least number of tokens in a row of packed suffixes, enough to fill a matrix product. Longer rows share one copy of the
context's K/V among more suffixes, but attention also scores the masked pairs of suffixes: a quarter of the context's length
is a good compromise."""

_CHUNK_LOGITS = 1 << 25


@torch.no_grad()
def replay(
    decoder: Decoder,
    tokens: int,
    ids: torch.Tensor,
    mixtures: Sequence[Sequence[Source]],
    keys_values: Callable[[Source, int], KeysValues],
) -> torch.Tensor:
    """Run a suffix after a context, with every mixture of the context's K/V; return the output of the last layer.

    Mixtures with the same sources up to a layer run as one up to there. Those with the same source at a layer run through it as
    packed suffixes. All L * (L + 1) / 2 bands of a model take a third of the passes that they would take alone.

    Args:
        decoder: the receiver.
        tokens: length of the context.
        ids: the suffix, int64 ``[1, S]``.
        mixtures: each the sources of all layers.
        keys_values: returns K and V ``[1, K, N, D]`` of a source at a layer.

    Returns:
        Hidden states ``[mixtures, S, C]``.
    """
    length = ids.shape[1]
    suffixes_per_row = max(1, max(ROW_TOKENS, tokens // 4) // length)
    packed = cache(lambda count: PackedSuffixes(decoder, tokens, [length] * count))
    states, rows = decoder.embed(ids), [0] * len(mixtures)
    for layer in range(decoder.num_layers):
        rows_by_source: dict[Source, dict[int, None]] = {}
        for row, mixture in zip(rows, mixtures, strict=True):
            rows_by_source.setdefault(mixture[layer], {})[row] = None
        outputs: list[torch.Tensor] = []
        output_rows: dict[tuple[int, Source], int] = {}
        for source, distinct in rows_by_source.items():
            held = {layer: keys_values(source, layer)}
            for some in torch.tensor(list(distinct)).split(suffixes_per_row):
                suffixes = packed(len(some))
                inputs = rearrange(states[some], "m s c -> 1 (m s) c")
                output = suffixes.over.run(layer, inputs, suffixes.cache(held))
                outputs.append(rearrange(output, "1 (m s) c -> m s c", s=length))
                output_rows |= {(index, source): len(output_rows) + n for n, index in enumerate(some.tolist())}
        states = torch.cat(outputs)
        rows = [output_rows[row, mixture[layer]] for row, mixture in zip(rows, mixtures, strict=True)]
    return states[rows]


@torch.no_grad()
def kl_and_top1(decoder: Decoder, states: torch.Tensor, reference: torch.Tensor) -> tuple[list[float], list[float]]:
    """Compare next-token distributions with those of full prefill, by KL divergence in nats and by top-1 agreement.

    Args:
        decoder: the receiver.
        states: outputs of the last layer ``[mixtures, N, C]`` at N tokens.
        reference: logits ``[N, vocabulary]`` after full prefill.

    Returns:
        For each mixture the mean of either over the tokens. If logits are NaN the divergence is infinite, which is the worst.
    """
    kl: list[float] = []
    agreement: list[float] = []
    for chunk in states.split(max(1, _CHUNK_LOGITS // reference.numel())):
        for found, part in zip((kl, agreement), compare(reference, decoder.logits(chunk)), strict=True):
            found += part
    return kl, agreement


def compare(reference: torch.Tensor, logits: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return what :func:`kl_and_top1` does, of logits ``[mixtures, N, vocabulary]``."""
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean(1)
    kl = kl_divergence(reference, logits).mean(1).clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return kl.tolist(), agreement.tolist()
