"""Metrics of answers from well-kept libraries, each between 0 and 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Metric = Callable[[str, str], float]
"""Score an answer that was given by the one that was wanted."""


def squad_scores(given: str, wanted: str) -> tuple[float, float]:
    """Exact match and F1 of an answer as SQuAD counts them."""
    from torchmetrics.functional.text import squad

    score = squad(
        [{"prediction_text": given, "id": "0"}],
        [{"answers": {"answer_start": [0], "text": [wanted]}, "id": "0"}],
    )
    return score["exact_match"].item() / 100, score["f1"].item() / 100


def exact_match(given: str, wanted: str) -> float:
    return squad_scores(given, wanted)[0]


def f1(given: str, wanted: str) -> float:
    return squad_scores(given, wanted)[1]


def rouge_l(given: str, wanted: str) -> float:
    from torchmetrics.functional.text import rouge_score

    return float(rouge_score(given, wanted, rouge_keys="rougeL")["rougeL_fmeasure"])


def edit_similarity(given: str, wanted: str) -> float:
    """Score the first line alone, as code completion is judged."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(given.strip().split("\n")[0].strip(), wanted.strip())


METRICS: dict[str, Metric] = {
    "exact match": exact_match,
    "F1": f1,
    "ROUGE-L": rouge_l,
    "edit similarity": edit_similarity,
}


def of_tokens(metric: Metric, tokenizer: Any) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The metric of token ids ``[N]``, for :func:`droidspeak_ops.profile`."""

    def score(given: torch.Tensor, wanted: torch.Tensor) -> float:
        texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (given, wanted))
        return metric(*texts)

    return score
