"""Divergence of a receiver from its own full prefill, and intervals of a mean over examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from reporting import Row

import droidspeak_ops as ds
from droidspeak_ops.profiling import bootstrap
from droidspeak_ops.profiling.timing import first_token


@torch.no_grad()
def answer_distributions(
    receiver: Any, context: ds.SharedContext, question: ds.Example, plan: ds.Plan | None, maps: ds.Maps | None = None
) -> torch.Tensor:
    """Log-probabilities ``[N, vocabulary]`` for each token of the answer; of full prefill where `plan` is None."""
    first, cache = first_token(receiver, context, question.prompt, plan, maps=maps)
    if question.answer.shape[1] == 1:
        return first[0].double().log_softmax(-1)
    rest = receiver(question.answer[:, :-1], past_key_values=cache, use_cache=True).logits
    return torch.cat((first, rest), dim=1)[0].double().log_softmax(-1)


def divergence(own: torch.Tensor, found: torch.Tensor) -> float:
    """Kullback-Leibler divergence of `found` from `own`, log-probabilities ``[N, vocabulary]``, in nats: mean over rows."""
    return (own.exp() * (own - found)).sum(-1).mean().item()


def mean_and_interval(name: str, values: Sequence[float]) -> Row:
    """The mean, and where 95 % of the means of bootstrap samples lie."""
    return _named(name, bootstrap.mean(values))


def ratio_and_interval(name: str, values: Sequence[float], base: Sequence[float]) -> Row:
    """The ratio of two means over the same examples, and where 95 % of the ratios of bootstrap samples lie."""
    data = torch.tensor([values, base], dtype=torch.float64).T
    return _named(name, bootstrap.of_means(data, lambda means: means[..., 0] / means[..., 1]))


def _named(name: str, estimate: bootstrap.Estimate) -> Row:
    names = (name, f"{name}_low", f"{name}_high")
    return {name: f"{value:.3g}" for name, value in zip(names, estimate, strict=True)}
