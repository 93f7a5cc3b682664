"""Metrics of next-token distributions and of answers; those of answers are from well-known libraries, between 0 and 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .example import Example

Metric = Callable[[str, str], float]
"""Score of an answer, given the expected one."""


@torch.no_grad()
def answer_logits(receiver: Any, example: Example, cache: Any = None) -> torch.Tensor:
    """Return a receiver's logits ``[N, vocabulary]`` at each token of the answer, in float32.

    Args:
        cache: of the example's context or of more of its prompt, and appended to; None for full prefill.
    """
    held = 0 if cache is None else cache.get_seq_length()
    ids = torch.cat((example.prompt, example.answer[:, :-1]), dim=1)
    out = receiver(ids[:, held:], past_key_values=cache, use_cache=True, logits_to_keep=example.answer.shape[1])
    return out.logits[0].float()


def kl_divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of ``softmax(logits)`` from ``softmax(reference)``, in nats, over the last axis.

    With p the reference distribution and d the difference of the logits it is ``log Σ p exp(d) - Σ p d``, by ``expm1`` and
    ``log1p``: the rounding error shrinks with d, so that small divergences are exact. d is clamped at 80, lest ``exp`` overflow
    float32, which understates divergences of tens of nats. Gradients flow to `logits` alone. One temporary of the broadcast
    shape is allocated.

    Args:
        reference, logits: logits or log-probabilities, float32 or wider; all axes but the last are broadcast.

    Returns:
        The divergences, without the last axis. Rounding may leave one slightly below 0; NaN gives NaN.
    """
    reference = reference.detach()
    probabilities = reference.softmax(-1)
    difference = (logits - reference).clamp_(max=80.0)
    mean = _expectation(probabilities, difference)
    return _expectation(probabilities, difference.expm1_()).log1p() - mean


def _expectation(probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.einsum("...v,...v->...", probabilities, values)  # which does not expand `probabilities`


def squad_scores(given: str, expected: str) -> tuple[float, float]:
    """Exact match and F1 of an answer, as SQuAD defines them."""
    from torchmetrics.functional.text import squad

    score = squad(
        [{"prediction_text": given, "id": "0"}],
        [{"answers": {"answer_start": [0], "text": [expected]}, "id": "0"}],
    )
    return score["exact_match"].item() / 100, score["f1"].item() / 100


def exact_match(given: str, expected: str) -> float:
    """SQuAD's exact match of an answer."""
    return squad_scores(given, expected)[0]


def f1(given: str, expected: str) -> float:
    """SQuAD's F1 of an answer."""
    return squad_scores(given, expected)[1]


def rouge_l(given: str, expected: str) -> float:
    """ROUGE-L F-measure of an answer."""
    from torchmetrics.functional.text import rouge_score

    return float(rouge_score(given, expected, rouge_keys="rougeL")["rougeL_fmeasure"])


def edit_similarity(given: str, expected: str) -> float:
    """Normalised Levenshtein similarity of the first line of an answer, the usual metric of code completion."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(given.strip().split("\n")[0].strip(), expected.strip())


METRICS: dict[str, Metric] = {
    "exact match": exact_match,
    "F1": f1,
    "ROUGE-L": rouge_l,
    "edit similarity": edit_similarity,
}


def of_tokens(metric: Metric, tokenizer: Any) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Return the metric as a function of token ids ``[N]``, for :func:`droidspeak_ops.profile`."""

    def score(given: torch.Tensor, expected: torch.Tensor) -> float:
        texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (given, expected))
        return metric(*texts)

    return score
