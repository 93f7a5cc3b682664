"""How much of a fitted map each layer gets: as much as brings the receiver's next tokens nearest to those of its own prefill.

A map is linear, and so is every mixture of it with what it would replace. The shares are learnt by gradient descent on the
output's divergence: one for K and one for V of each layer and part, few enough not to learn noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer

from ..context import Rotation, SharedContext
from ..example import Example
from ..reference import rope_ref, row_norm_ref
from .cache import MixedSlidingLayer
from .decoder import Decoder

STEPS = 24
EXAMPLES = 2
"""Of a context, that a step or a judgement takes."""

_LEARNING_RATE, _START = 0.1, 0.3
_LOWEST, _HIGHEST = -0.25, 1.5


class Ingredients(NamedTuple):
    """What K and V of one layer can be mixed of: ``base + sum of share * part``.

    Args:
        base: K and V ``[2, K, N, D]`` of the last N tokens of a context. K is rotated, or where it is yet to pass the
            receiver's norm of K neither normed nor rotated.
        parts: ``[2, P, K, N, D]``, in the same state.
        norm_weight: of K; None where there is nothing left to do.
    """

    base: torch.Tensor
    parts: torch.Tensor
    norm_weight: torch.Tensor | None


Mixture = Mapping[int, Ingredients]
"""A context's ingredients by layer, of all but the first, whose K and V are the receiver's own."""


KeysValues = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Trial:
    """A context with what may follow it: how far the receiver is from its own prefill with any K/V of the context."""

    def __init__(self, decoder: Decoder, own: SharedContext, examples: Sequence[Example]) -> None:
        self._decoder, self._examples = decoder, examples
        self._tokens = own.tokens.shape[1]
        self._over = decoder.over(own.tokens)
        self._own_keys_values = [own.kv(layer)[:2] for layer in range(decoder.num_layers)]
        self._own: dict[int, torch.Tensor] = {}

    def divergence(self, mixture: Mixture, shares: Mapping[int, torch.Tensor], visit: int = 0) -> torch.Tensor:
        """:meth:`divergence_with` of K and V that are mixed."""
        mixed = [self._mixed(layer, of, shares[layer]) for layer, of in sorted(mixture.items())]
        return self.divergence_with([self._own_keys_values[0], *mixed], visit)

    def divergence_with(self, keys_values: KeysValues, visit: int = 0) -> torch.Tensor:
        """Mean Kullback-Leibler divergence of next tokens from those after the receiver's own prefill, in nats.

        Args:
            keys_values: K and V ``[1, K, N, D]`` of the context by layer.
            visit: another one takes other examples, where there are many.
        """
        count = len(self._examples)
        which = [(visit * EXAMPLES + number) % count for number in range(min(EXAMPLES, count))]
        found = torch.cat(self._log_probabilities(keys_values, [self._examples[number] for number in which]))
        own = torch.cat([self._after_own(number) for number in which])
        return F.kl_div(found, own, log_target=True, reduction="sum") / len(found)

    @torch.no_grad()
    def _after_own(self, number: int) -> torch.Tensor:
        if number not in self._own:
            (self._own[number],) = self._log_probabilities(self._own_keys_values, [self._examples[number]])
        return self._own[number]

    def _mixed(self, layer: int, of: Ingredients, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[1, K, N, D]`` of a layer, mixed with `shares` ``[P, 2]``."""
        keys, values = (
            base + (share @ parts.flatten(1)).view(base.shape)
            for base, parts, share in zip(of.base, of.parts, shares.T, strict=True)
        )
        if of.norm_weight is not None:
            rows = keys.transpose(0, 1)
            whole = rows if of.norm_weight.shape[0] == rows.shape[-1] else rows.flatten(-2)
            order, eps = self._decoder.family.norm_order, self._decoder.weights(layer).k_norm_eps
            rows = row_norm_ref(whole, of.norm_weight, order, eps).view(rows.shape)
            keys = rotated(rows, self._over.rotation(layer)).transpose(0, 1)
        return keys[None], values[None]

    def _log_probabilities(self, keys_values: KeysValues, examples: Sequence[Example]) -> list[torch.Tensor]:
        """Of the next token where an example is judged, ``[judged, vocabulary]`` for each."""
        follow = [torch.cat((each.suffix, each.answer[:, :-1]), dim=1)[0] for each in examples]
        batch, tokens = len(examples), self._tokens
        layers: list[Any] = []
        for (keys, values), window in zip(keys_values, self._decoder.windows, strict=True):
            keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
            if window is None:
                layer = DynamicLayer()
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
            else:
                layer = MixedSlidingLayer.over(keys, values, window, tokens)
            layers.append(layer)
        ids = torch.nn.utils.rnn.pad_sequence(follow, batch_first=True)
        skipped = min(each.suffix.shape[1] for each in examples) - 1
        logits = self._decoder.model(
            ids, past_key_values=Cache(layers=layers), logits_to_keep=ids.shape[1] - skipped
        ).logits
        return [
            logits[row, example.suffix.shape[1] - 1 - skipped : len(given) - skipped].float().log_softmax(-1)
            for row, (example, given) in enumerate(zip(examples, follow, strict=True))
        ]


def rotated(keys: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """K ``[N, K, D]`` of the last N tokens with RoPE, where the layer has it."""
    return keys if rotation is None else rope_ref(keys, *(half[-len(keys) :] for half in rotation))


@torch.enable_grad()
def learn_shares(
    trials: Sequence[Trial],
    mixtures: Sequence[Mixture],
    track: Callable[[Sequence[int]], Iterable[int]],
) -> dict[int, torch.Tensor]:
    """The shares ``[P, 2]`` by layer that bring the receiver nearest to its own prefill.

    Args:
        trials, mixtures: of each context; a step takes the next one.
        track: wraps the steps, to show progress.
    """
    steps = range(max(STEPS, len(trials)))
    shares = {}
    for layer, of in mixtures[0].items():
        shares[layer] = torch.full((of.parts.shape[1], 2), _START, device=of.base.device, requires_grad=True)
    optimizer = torch.optim.Adam(shares.values(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
    for step in track(steps):
        visit, which = divmod(step, len(trials))
        divergence = trials[which].divergence(mixtures[which], shares, visit)
        for each, gradient in zip(shares.values(), torch.autograd.grad(divergence, list(shares.values())), strict=True):
            each.grad = gradient  # and none of the receiver's weights
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for each in shares.values():
                each.clamp_(_LOWEST, _HIGHEST)
    return {layer: each.detach() for layer, each in shares.items()}


@torch.no_grad()
def mean_divergence(trials: Sequence[Trial], mixtures: Sequence[Mixture], shares: Mapping[int, torch.Tensor]) -> float:
    """The divergence from the receiver's own prefill, in nats, of the mean trial."""
    found = [trial.divergence(mixture, shares) for trial, mixture in zip(trials, mixtures, strict=True)]
    return torch.stack(found).mean().item()
