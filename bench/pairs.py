"""The pairs of models that maps and plans are measured on, with the task of each receiver: examples, and what an answer scores.

Regressions and plans are made on the `calibration` split, maps are trained on `packages` (on `calibration` where contexts are
the shipped ones), and both are judged on `test`. No module or definition of the test split was trained on or is in another.
"""

from __future__ import annotations

import hashlib
import random
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import droidspeak_ops as ds
from bench.variants import glossary, stdlib
from droidspeak_ops.demo.measure import MAX_ANSWER_TOKENS, glossary_examples
from droidspeak_ops.demo.run import load_glossary_variant
from droidspeak_ops.example import TextExample, by_context
from droidspeak_ops.fitting.training import STEPS
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.hf.pretrained import SMOLLM2, cache_folder, load_pretrained
from droidspeak_ops.metrics import METRICS

# Characters of contexts of about 1,000 to 4,000 tokens; most are short, for the time they take.
LENGTHS = (3_300,) * 9 + (6_600,) + (3_300,) * 9 + (13_000,)
TEST_CONTEXTS = 64
"""Contexts of the glossary's test split, and as many as are drawn of the others."""
CALIBRATION_CONTEXTS = 13
"""Contexts that regressions and shares alone are fitted to."""
TRAINING_CONTEXTS, TRAINING_LENGTHS = 48, (1_700, 3_300)
"""Contexts that maps are trained on, where there are as many, and characters of these."""
CALIBRATION_QUESTIONS = 8  # to a context
CORRECTED_BANDS = ((3, 8), (9, 14), (15, 20), (21, 26))
"""Bands whose starts the maps correct."""
LONG = 2_000
"""Tokens of contexts longer than most that are calibrated on."""


@dataclass(frozen=True)
class Task:
    """A task of a receiver: its examples, and what an answer scores.

    Args:
        metric: one of :data:`droidspeak_ops.metrics.METRICS`, by which answers are scored; None where none is generated, since
            no receiver gives a good one by itself: next tokens are looked at along the example's answer.
        draw: makes the examples of one context, given the split, about how many characters of context, how many questions, and
            a generator; None where the contexts are the shipped ones.
        ask: makes an example of a shipped context, given it and a generator; None for the shipped questions.
        first_turn: whether no more of a suffix than its first turn is known when the cache is filled.
    """

    metric: str | None
    draw: Callable[[str, int, int, random.Random], list[TextExample]] | None = None
    ask: Callable[[str, random.Random], TextExample] | None = None
    first_turn: bool = False

    def examples(self, split: str, contexts: int, lengths: Sequence[int] = LENGTHS) -> list[TextExample]:
        """Return examples of so many contexts of a split: one question each to test on, several to calibrate on.

        Args:
            lengths: characters of the contexts, where they are drawn; these in turn.
        """
        rng = random.Random(zlib.crc32(split.encode()))
        if self.draw is None:
            texts = glossary_examples("test" if split == "test" else "calibration")
            kept = list(dict.fromkeys(example.context for example in texts))[:contexts]
            if self.ask is not None:
                return [self.ask(context, rng) for context in kept]
            return [example for example in texts if example.context in kept]
        questions = 1 if split == "test" else CALIBRATION_QUESTIONS
        drawn = (self.draw(split, lengths[number % len(lengths)], questions, rng) for number in range(contexts))
        return [example for examples in drawn for example in examples]

    def score(self, given: str, expected: str) -> float:
        """Return the score of an answer, from 0 to 1.

        Raises:
            ValueError: answers are not scored.
        """
        if self.metric is None:
            raise ValueError("metric: expected a task whose answers are scored, got None")
        return METRICS[self.metric](given, expected)


GLOSSARY = Task("F1")
LINKED = Task("F1", ask=glossary.link)
FOLLOW_UP = Task("F1", ask=glossary.link, first_turn=True)
SPREAD_OUT = Task(None, ask=glossary.spread_out)
CODE = Task("edit similarity", stdlib.draw_code_examples)
DOCS = Task("ROUGE-L", stdlib.draw_docs_examples)


@dataclass(frozen=True)
class NamedPair:
    """Two variants, by name: a sender and a receiver, with the receiver's task."""

    name: str
    sender: str
    receiver: str
    task: Task
    description: str

    def load(self, device: torch.device | str = "cpu") -> LoadedPair:
        """Load both models, and their tokenizer."""
        (sender, tokenizer), (receiver, _) = load_variant(self.sender), load_variant(self.receiver)
        return LoadedPair(self, sender.to(device), receiver.to(device), tokenizer)


PAIRS = {
    pair.name: pair
    for pair in (
        NamedPair("lora", "base", "glossary", GLOSSARY, "base to a LoRA adapter for a task"),
        NamedPair("full", "base", "code", CODE, "base to a full fine-tune"),
        NamedPair("tasks", "code", "docs", DOCS, "a full fine-tune for one task to that for another"),
        NamedPair("far", "glossary", "docs", DOCS, "two that have drifted far from their base, each its way"),
    )
}


@dataclass(frozen=True)
class Case:
    """A pair, and a task that selected tokens are judged on; maps are fitted on the pair's own."""

    pair: NamedPair
    task: Task
    description: str


CASES = {name: Case(pair, pair.task, pair.description) for name, pair in PAIRS.items()} | {
    "linked": Case(PAIRS["lora"], LINKED, "an entry refers to another far away, and both are asked for in turn"),
    "follow-up": Case(PAIRS["lora"], FOLLOW_UP, "the same, with a cache that was filled for the first question"),
    "spread-out": Case(
        PAIRS["lora"], SPREAD_OUT, "entries of all quarters of the context, which the suffix does not name"
    ),
}
"""Pairs with their tasks, and tasks that are hard to select for: of several places, or such as the suffix does not name."""


def load_variant(name: str) -> tuple[Any, Any]:
    """Return a variant and its tokenizer: the base, what is shipped, or what ``python -m bench.variants.train`` made.

    Raises:
        FileNotFoundError: it has not been made.
    """
    if name == "base":
        return load_pretrained(SMOLLM2)
    if name == "glossary":
        return load_glossary_variant()
    folder = cache_folder() / "variants" / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a model in {folder}, got none; make it: python -m bench.variants.train {name}"
        )
    return load_pretrained(folder)


@dataclass(frozen=True)
class LoadedPair:
    """A pair of models in memory, and its examples as token ids."""

    named: NamedPair
    sender: Any
    receiver: Any
    tokenizer: Any

    @property
    def num_layers(self) -> int:
        return self.receiver.config.num_hidden_layers

    @property
    def weights(self) -> list[str]:
        """Digests of the sender's weights and of the receiver's."""
        return [str(Decoder(model).fingerprint(weights=True).weights) for model in (self.sender, self.receiver)]

    def examples(self, split: str, contexts: int, lengths: Sequence[int] = LENGTHS) -> list[ds.Example]:
        """Return the task's examples of so many contexts of a split."""
        texts = self.named.task.examples(split, contexts, lengths)
        return [each.encode(self.tokenizer, self.receiver.device) for each in texts]

    def known(self, text: TextExample) -> int:
        """Return how many tokens of an example's suffix are known when the cache is filled."""
        suffix = text.suffix
        if self.named.task.first_turn:
            first, start, _ = suffix.partition(glossary.ANSWERS)
            suffix = first + start
        return len(self.tokenizer(suffix, add_special_tokens=False).input_ids)

    def text(self, tokens: int) -> torch.Tensor:
        """Return ids ``[1, tokens]`` of the longest test example, repeated if need be: maps are not used for random ones."""
        longest = max((each.prompt for each in self.examples("test", TEST_CONTEXTS)), key=lambda ids: ids.shape[1])
        return longest.repeat(1, 1 + tokens // longest.shape[1])[:, :tokens]

    def capture(self, ids: torch.Tensor) -> ds.SharedContext:
        """Return the sender's context of token ids, with hidden states at every layer."""
        return ds.capture(self.sender, ids, layers=range(self.num_layers))

    def answer(self, example: ds.Example, cache: Any = None) -> str:
        """Return the receiver's greedy answer, given a cache of the context; by full prefill where there is none."""
        prompt = example.prompt
        out = self.receiver.generate(prompt, past_key_values=cache, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        return self.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()


class Fitted(NamedTuple):
    """The maps of a pair, the seconds that their fit took, and the tokens of the contexts that they were fitted to."""

    maps: ds.Maps
    seconds: float
    tokens: int


class Calibration(NamedTuple):
    """Contexts that maps are fitted to, as :meth:`Task.examples` draws them, and the steps that they are trained for."""

    split: str
    contexts: int
    lengths: tuple[int, ...]
    steps: int


RIDGE = Calibration("calibration", CALIBRATION_CONTEXTS, LENGTHS, 0)
TRAINED = Calibration("packages", TRAINING_CONTEXTS, TRAINING_LENGTHS, STEPS)


def fitted_maps(pair: LoadedPair, calibration: Calibration = TRAINED) -> Fitted:
    """Fit maps to a pair, or read them where they were fitted to these weights before."""
    identity = hashlib.sha256("".join([*pair.weights, repr(tuple(calibration))]).encode()).hexdigest()[:16]
    path = cache_folder() / "variants" / f"maps-{pair.named.name}-{calibration.contexts}-{identity}.safetensors"
    note = path.with_suffix(".txt")
    if note.exists():
        with suppress(ValueError):  # of maps in a format of before, or damaged
            seconds, tokens = note.read_text().split()
            return Fitted(ds.Maps.load(path, pair.receiver.device), float(seconds), int(tokens))
    path.parent.mkdir(parents=True, exist_ok=True)
    examples = pair.examples(calibration.split, calibration.contexts, calibration.lengths)
    began = time.perf_counter()
    maps = ds.fit(
        pair.sender, pair.receiver, examples, bands=CORRECTED_BANDS, steps=calibration.steps,
        folder=path.with_suffix(".fitting"),
    )  # fmt: skip
    fitted = Fitted(maps, time.perf_counter() - began, context_tokens(examples))
    maps.save(path)
    note.write_text(f"{fitted.seconds} {fitted.tokens}")
    return fitted


def context_tokens(examples: Sequence[ds.Example]) -> int:
    """Return how many tokens the contexts of examples have, each context counted once."""
    return sum(group[0].context.shape[1] for group in by_context(examples))
