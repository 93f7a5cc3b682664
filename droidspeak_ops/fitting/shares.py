"""Shares, the mixing weights of fitted maps: how far K and V of each layer go from the sender's to the fitted.

A map is affine, and so is every interpolation between it and what it would replace. The shares, one for K and one for V of each
layer, are learnt by gradient descent on the divergence of the receiver's next tokens. They are too few to learn noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file

from ..context.context import SharedContext, last
from ..example import Example
from ..files import replacing
from ..hf.decoder import Decoder
from ..hf.passes import KeysValues, PackedSuffixes, Pass
from ..metrics import kl_divergence
from ..ops.reference import finish_heads_ref
from .parallel import in_parallel

STEPS = 24
"""Optimizer steps, one context each."""
EXAMPLES_PER_STEP = 6
"""Most examples of a context in one step; they are packed into one row."""
_EXAMPLES_PER_GRAPH = 3
"""Of those, as many as are differentiated together: two graphs, of which two cores take one each."""

_REFERENCE = "log_probabilities"
_LEARNING_RATE, _START = 0.3, 0.3
_LOWEST, _HIGHEST = -0.25, 1.5


class Interpolation(NamedTuple):
    """K and V of one layer as a function of their shares: ``base + share * difference``.

    Args:
        base: the sender's K and V ``[2, N, K, D]`` of the last N tokens of a context, K before RoPE.
        difference: from `base` to the fitted K and V; 0 for attention sinks.
        k_norm_weight: weight of the receiver's norm of K, if K is yet to be normed.
    """

    base: torch.Tensor
    difference: torch.Tensor
    k_norm_weight: torch.Tensor | None


Interpolations = Mapping[int, Interpolation]
"""Interpolation of every layer of a context but layer 0, whose K/V are the receiver's own."""

Shares = Mapping[int, torch.Tensor]
"""Share for K and share for V of every layer but 0, ``[2]``."""


class KLObjective:
    """Divergence of the receiver's next tokens from those after its own prefill, as a function of the K/V of one context.

    Args:
        decoder: the receiver.
        contexts: as the receiver itself has read them, of which one is looked at when it is needed.
        number: which.
        examples: the examples of the context.
        folder: where the next tokens after the receiver's own prefill are kept, which are of the whole vocabulary.
    """

    def __init__(
        self,
        decoder: Decoder,
        contexts: Sequence[SharedContext],
        number: int,
        examples: Sequence[Example],
        folder: Path,
    ) -> None:
        self._decoder, self._contexts, self._number, self._examples = decoder, contexts, number, examples
        self._folder = folder
        shape = contexts[number].tokens.shape
        self._tokens, self.device = shape[1], decoder.device
        self._pass = Pass(decoder, shape)

    def kl_of_shares(self, interpolations: Interpolations, shares: Shares) -> torch.Tensor:
        """Return :meth:`kl` with K/V interpolated by `shares`."""
        return self.kl([self._contexts[self._number].kv(0)[:2], *self._mixed(interpolations, shares)])

    def gradient_of_shares(
        self, interpolations: Interpolations, shares: Shares, visit: int
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradient of :meth:`kl` with K/V interpolated by `shares`, with respect to each of these.

        K and V are mixed once. The gradient with respect to them is summed over a few examples at a time.
        """
        which, first = self._examples_of(visit), self._contexts[self._number].kv(0)[:2]
        count = sum(self._examples[number].answer.shape[1] for number in which)
        mixed = [part for each in self._mixed(interpolations, shares) for part in each]
        leaves = [part.detach().requires_grad_() for part in mixed]
        keys_values = [first, *zip(leaves[::2], leaves[1::2], strict=True)]

        @torch.enable_grad()
        def gradient(some: Sequence[int]) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(self._kl(keys_values, some).sum() / count, leaves)

        graphs = [which[at : at + _EXAMPLES_PER_GRAPH] for at in range(0, len(which), _EXAMPLES_PER_GRAPH)]
        parts = in_parallel(gradient, graphs, self.device)
        total = functools.reduce(lambda one, other: tuple(map(torch.add, one, other)), parts)
        return torch.autograd.grad(mixed, list(shares.values()), total)

    def kl(self, keys_values: Sequence[KeysValues], visit: int = 0) -> torch.Tensor:
        """Return the mean KL divergence from full prefill over the answer tokens of some examples, in nats.

        Args:
            keys_values: K and V ``[1, K, N, D]`` of the context, by layer.
            visit: selects :data:`EXAMPLES_PER_STEP` of the examples; the next visit takes the following ones.
        """
        return self._kl(keys_values, self._examples_of(visit)).mean()

    def _kl(self, keys_values: Sequence[KeysValues], which: Sequence[int]) -> torch.Tensor:
        return kl_divergence(self.reference(which), self._log_probabilities(keys_values, which))

    def _examples_of(self, visit: int) -> list[int]:
        total = len(self._examples)
        return [(visit * EXAMPLES_PER_STEP + number) % total for number in range(min(EXAMPLES_PER_STEP, total))]

    @torch.no_grad()
    def reference(self, which: Sequence[int]) -> torch.Tensor:
        """Return log-probabilities of the answer tokens of some examples after full prefill, computed at first use."""
        new = [number for number in which if not self._path(number).exists()]
        if new:
            context = self._contexts[self._number]
            own = [context.kv(layer)[:2] for layer in range(self._decoder.num_layers)]
            computed = self._log_probabilities(own, new)
            lengths = [self._examples[number].answer.shape[1] for number in new]
            for number, part in zip(new, computed.split(lengths), strict=True):
                with replacing(self._path(number)) as scratch:
                    save_file({_REFERENCE: part.contiguous()}, scratch)
        device = str(self.device)
        return torch.cat([load_file(self._path(number), device)[_REFERENCE] for number in which])

    def _path(self, example: int) -> Path:
        return self._folder / f"{self._number:05}.{example}.safetensors"

    def _mixed(self, interpolations: Interpolations, shares: Shares) -> list[KeysValues]:
        return [self._mix(layer, parts, shares[layer]) for layer, parts in sorted(interpolations.items())]

    def _mix(self, layer: int, parts: Interpolation, shares: torch.Tensor) -> KeysValues:
        """K and V ``[1, K, N, D]`` of a layer with `shares` ``[2]``."""
        keys, values = parts.base + shares[:, None, None, None] * parts.difference
        rotation = self._pass.rotation(layer)
        cos, sin = (None, None) if rotation is None else (last(half, len(keys)) for half in rotation)
        eps = self._decoder.weights(layer).k_norm_eps
        keys = finish_heads_ref(keys, parts.k_norm_weight, self._decoder.family.norm_order, eps, cos, sin)
        keys, values = (rearrange(each.to(self._decoder.dtype), "n k d -> 1 k n d") for each in (keys, values))
        return keys, values

    def _log_probabilities(self, keys_values: Sequence[KeysValues], which: Sequence[int]) -> torch.Tensor:
        """Log-probabilities ``[N, vocabulary]`` of the N answer tokens of some examples, one after the other."""
        examples = [self._examples[number] for number in which]
        suffixes = [torch.cat((each.suffix, each.answer[:, :-1]), dim=1) for each in examples]
        ids = torch.cat(suffixes, dim=1)
        packed = PackedSuffixes(self._decoder, self._tokens, [each.shape[1] for each in suffixes])
        firsts = torch.tensor([each.suffix.shape[1] - 1 for each in examples], device=ids.device)
        logits = self._decoder.model(
            ids,
            attention_mask=packed.masks,
            position_ids=packed.over.position_ids,
            past_key_values=packed.cache(dict(enumerate(keys_values))),
            logits_to_keep=(packed.offsets >= firsts[packed.owners]).nonzero()[:, 0],
        ).logits
        return logits[0].float().log_softmax(-1)


@torch.enable_grad()
def learn_shares(
    layers: Iterable[int],
    objectives: Sequence[KLObjective],
    interpolations: Callable[[int], Interpolations],
    track: Callable[[Sequence[int]], Iterable[int]],
) -> dict[int, torch.Tensor]:
    """Learn the shares that minimise the divergence from full prefill, by Adam.

    Args:
        layers: the layers that get shares.
        objectives: one per context; each step takes the next.
        interpolations: computes those of a context, by its index, at every call: all contexts together would fill the memory.
        track: wraps the steps, to show progress.
    """
    shares = {layer: torch.full((2,), _START, device=objectives[0].device, requires_grad=True) for layer in layers}
    optimizer = torch.optim.Adam(shares.values(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    for step in track(range(STEPS)):
        visit, index = divmod(step, len(objectives))
        gradient = objectives[index].gradient_of_shares(interpolations(index), shares, visit)
        for each, of_each in zip(shares.values(), gradient, strict=True):
            each.grad = of_each
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for each in shares.values():
                each.clamp_(_LOWEST, _HIGHEST)
    return {layer: each.detach() for layer, each in shares.items()}
