"""Measure full prefill and plans on the same examples: answers, negative log-likelihood, time to first token."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any, Literal

import torch
import torch.nn.functional as F

import droidspeak_ops as ds
from droidspeak_ops.example import TextExample
from droidspeak_ops.metrics import squad_scores
from droidspeak_ops.profiling.timing import first_token, timed

MAX_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Measurement:
    """The measurements of one strategy on one example."""

    answer: str
    exact_match: float
    f1: float
    nll: float  # nats per answer token, the end of the answer included
    seconds: float  # time to first token


@dataclass
class Strategy:
    """A plan, or full prefill if None, with its measurements, example by example."""

    plan: ds.Plan | None
    measured: list[Measurement] = field(default_factory=list)

    def __str__(self) -> str:
        return "full prefill" if self.plan is None else str(self.plan)

    def mean(self, name: str) -> float:
        """Return the mean of a field of the measurements."""
        return statistics.fmean(getattr(measured, name) for measured in self.measured)

    def median_seconds(self) -> float:
        return statistics.median(measured.seconds for measured in self.measured)

    def speedup_over(self, other: Strategy) -> float:
        """Return the median over examples of the ratio of times to first token."""
        pairs = zip(self.measured, other.measured, strict=True)
        return statistics.median(reference.seconds / measured.seconds for measured, reference in pairs)


def glossary_examples(split: Literal["calibration", "test"] = "test") -> list[TextExample]:
    """Load the shipped examples: questions about WordNet definitions of invented words, contexts of about 1,000 tokens.

    No definition of the test split was trained on or is in the calibration split, which has several questions per context.
    """
    text = files(__package__).joinpath("glossary", f"{split}.json").read_text(encoding="utf-8")
    return [TextExample(**example) for example in json.loads(text)]


def measure(
    sender: Any,
    receiver: Any,
    tokenizers: tuple[Any, Any],
    strategies: Sequence[Strategy],
    examples: Sequence[TextExample],
) -> Iterator[int]:
    """Add a measurement of every example to every strategy; yield the length of its context after each example.

    Full prefill is the strongest baseline in transformers: the model's own attention, and logits of the last token alone,
    warmed up. The sender's pass is not timed: it has read the context already.
    """
    sender_tokenizer, tokenizer = tokenizers
    depth = receiver.config.num_hidden_layers
    layers = {layer for each in strategies if each.plan for layer in each.plan.hidden_layers(depth)}
    for number, example in enumerate(examples):
        ids = example.encode(tokenizer, receiver.device)
        context = ds.capture(sender, ids.context, layers=sorted(layers), tokenizer=sender_tokenizer)
        for strategy in strategies:
            start = partial(first_token, receiver, context, ids.prompt, strategy.plan, tokenizer=tokenizer)
            if number == 0:
                start()  # warm-up
            strategy.measured.append(_measure_one(receiver, tokenizer, start, ids, example.answer))
        yield ids.context.shape[1]


@torch.no_grad()
def _measure_one(
    receiver: Any,
    tokenizer: Any,
    start: Callable[[], tuple[torch.Tensor, Any]],
    ids: ds.Example,
    answer: str,
) -> Measurement:
    (_, cache), seconds = timed(start)
    if cache.get_seq_length() == ids.prompt.shape[1]:
        cache.crop(-1)  # generate has to run at least one token
    from_last = torch.cat((ids.prompt[:, -1:], ids.answer[:, :-1]), dim=1)
    logits = receiver(from_last, past_key_values=deepcopy(cache), use_cache=True).logits.float()
    nll = F.cross_entropy(logits[0], ids.answer[0]).item()
    given = generate_answer(receiver, tokenizer, ids.prompt, cache)
    exact_match, f1 = squad_scores(given, answer)
    return Measurement(given, exact_match, f1, nll, seconds)


def generate_answer(receiver: Any, tokenizer: Any, prompt_ids: torch.Tensor, cache: Any) -> str:
    """Generate the receiver's greedy answer to a prompt, of which `cache` holds K/V of all tokens but the last."""
    out = receiver.generate(prompt_ids, past_key_values=cache, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, prompt_ids.shape[1] :], skip_special_tokens=True).strip()
