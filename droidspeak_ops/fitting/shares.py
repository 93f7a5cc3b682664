"""The share of a fitted map that each layer gets: what brings the receiver's next tokens nearest to its own prefill's.

A map is linear, and so is every mixture of it with what it would replace. The shares are learnt by gradient descent on the
output's divergence: one for K and one for V of each layer, few enough not to learn noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..context.context import Rotation, SharedContext
from ..example import Example
from ..hf.decoder import Decoder
from ..hf.passes import KeysValues, PackedSuffixes, Pass
from ..ops.reference import rope_ref, row_norm_ref

STEPS = 24
"""And so the most contexts that are looked at."""
EXAMPLES = 6
"""Examples of a context that are run at a time."""

_LEARNING_RATE, _START = 0.3, 0.3
_LOWEST, _HIGHEST = -0.25, 1.5


class Ingredients(NamedTuple):
    """The parts that K and V of one layer are mixed of: ``base + share * toward``.

    Args:
        base: K and V ``[2, K, N, D]`` of the last N tokens of a context, as the sender has them. K is rotated, or where it is
            yet to pass the receiver's norm of K neither normed nor rotated.
        toward: from `base` to what is fitted, in the same state.
        norm_weight: of K; None where there is nothing left to do.
    """

    base: torch.Tensor
    toward: torch.Tensor
    norm_weight: torch.Tensor | None


Mixture = Mapping[int, Ingredients]
"""A context's ingredients by layer, of all but the first, whose K and V are the receiver's own."""

Shares = Mapping[int, torch.Tensor]
"""By layer a share for K and one for V, ``[2]``."""


class Trial:
    """A context with what may follow it: how far the receiver is from its own prefill with any K/V of the context."""

    def __init__(self, decoder: Decoder, own: SharedContext, examples: Sequence[Example]) -> None:
        self._decoder, self._examples = decoder, examples
        self._tokens, self.device = own.tokens.shape[1], own.tokens.device
        self._over = Pass(decoder, own.tokens.shape)
        self._own_keys_values = [own.kv(layer)[:2] for layer in range(decoder.num_layers)]
        self._own: dict[int, torch.Tensor] = {}

    def divergence(self, mixture: Mixture, shares: Shares, visit: int = 0) -> torch.Tensor:
        """:meth:`divergence_with` of K and V that are mixed."""
        mixed = [self._mixed(layer, of, shares[layer]) for layer, of in sorted(mixture.items())]
        return self.divergence_with([self._own_keys_values[0], *mixed], visit)

    def divergence_with(self, keys_values: Sequence[KeysValues], visit: int = 0) -> torch.Tensor:
        """Mean Kullback-Leibler divergence of next tokens from those after the receiver's own prefill, in nats.

        Args:
            keys_values: K and V ``[1, K, N, D]`` of the context by layer.
            visit: :data:`EXAMPLES` are taken, and at another visit others, where there are more.
        """
        total = len(self._examples)
        which = [(visit * EXAMPLES + number) % total for number in range(min(EXAMPLES, total))]
        found, own = self._log_probabilities(keys_values, which), self._after_own(which)
        return F.kl_div(found, own, log_target=True, reduction="sum") / len(found)

    @torch.no_grad()
    def _after_own(self, which: Sequence[int]) -> torch.Tensor:
        missing = [number for number in which if number not in self._own]
        if missing:
            found = self._log_probabilities(self._own_keys_values, missing)
            judged = [self._examples[number].answer.shape[1] for number in missing]
            self._own |= dict(zip(missing, found.split(judged), strict=True))
        return torch.cat([self._own[number] for number in which])

    def _mixed(self, layer: int, of: Ingredients, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[1, K, N, D]`` of a layer, mixed with `shares` ``[2]``."""
        keys, values = of.base + shares[:, None, None, None] * of.toward
        if of.norm_weight is not None:
            rows = keys.transpose(0, 1)
            whole = rows if of.norm_weight.shape[0] == rows.shape[-1] else rows.flatten(-2)
            order, eps = self._decoder.family.norm_order, self._decoder.weights(layer).k_norm_eps
            rows = row_norm_ref(whole, of.norm_weight, order, eps).view(rows.shape)
            keys = rotated(rows, self._over.rotation(layer)).transpose(0, 1)
        return keys[None], values[None]

    def _log_probabilities(self, keys_values: Sequence[KeysValues], which: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token where examples are judged, ``[judged, vocabulary]``."""
        examples = [self._examples[number] for number in which]
        follow = [torch.cat((each.suffix, each.answer[:, :-1]), dim=1) for each in examples]
        ids = torch.cat(follow, dim=1)
        packed = PackedSuffixes(self._decoder, self._tokens, [each.shape[1] for each in follow])
        firsts = torch.tensor([each.suffix.shape[1] - 1 for each in examples], device=ids.device)
        logits = self._decoder.model(
            ids,
            attention_mask=packed.masks,
            position_ids=packed.over.position_ids,
            past_key_values=packed.cache(dict(enumerate(keys_values))),
            logits_to_keep=(packed.offsets >= firsts[packed.owners]).nonzero()[:, 0],
        ).logits
        return logits[0].float().log_softmax(-1)


def rotated(keys: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """K ``[N, K, D]`` of the last N tokens with RoPE, where the layer has it."""
    return keys if rotation is None else rope_ref(keys, *(half[-len(keys) :] for half in rotation))


@torch.enable_grad()
def learn_shares(
    layers: Iterable[int],
    trials: Sequence[Trial],
    mixture: Callable[[int], Mixture],
    track: Callable[[Sequence[int]], Iterable[int]],
) -> dict[int, torch.Tensor]:
    """The shares by layer that bring the receiver nearest to its own prefill.

    Args:
        layers: that get shares.
        trials: of each context; a step takes the next one.
        mixture: that of the context of a number, made anew whenever it is asked for: all at once would fill the memory.
        track: wraps the steps, to show progress.
    """
    steps = range(STEPS)
    shares = {layer: torch.full((2,), _START, device=trials[0].device, requires_grad=True) for layer in layers}
    optimizer = torch.optim.Adam(shares.values(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
    for step in track(steps):
        visit, which = divmod(step, len(trials))
        divergence = trials[which].divergence(mixture(which), shares, visit)
        for each, gradient in zip(shares.values(), torch.autograd.grad(divergence, list(shares.values())), strict=True):
            each.grad = gradient  # and none of the receiver's weights
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for each in shares.values():
                each.clamp_(_LOWEST, _HIGHEST)
    return {layer: each.detach() for layer, each in shares.items()}
