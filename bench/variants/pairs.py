"""The pairs of models that maps and plans are measured on, with the task of each receiver: examples, and what an answer scores.

Maps and plans are made on the `calibration` split and judged on `test`. No module or definition of the test split was trained
on or is in the calibration split.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import stdlib
import torch

from droidspeak_ops.demo.measure import glossary_examples
from droidspeak_ops.demo.run import load_glossary_variant
from droidspeak_ops.example import TextExample
from droidspeak_ops.hf.pretrained import SMOLLM2, cache_folder, load_pretrained
from droidspeak_ops.metrics import Metric, edit_similarity, f1, rouge_l

# Characters of contexts of about 1,000 to 4,000 tokens; most are short, for the time they take.
LENGTHS = (3_300,) * 9 + (6_600,) + (3_300,) * 9 + (13_000,)
TEST_CONTEXTS = 64
CALIBRATION_QUESTIONS = 8  # to a context


@dataclass(frozen=True)
class Task:
    """The task that a receiver was trained for.

    Args:
        metric: the name of what answers score, between 0 and 1.
        score: it, of an answer that was given and the one that was wanted.
        draw: a context of about so many characters of a split, with so many questions.
    """

    metric: str
    score: Metric
    draw: Callable[[str, int, int, random.Random], list[TextExample]] | None = None

    def examples(self, split: str, contexts: int) -> list[TextExample]:
        """Examples of so many contexts of a split: one question each to test on, several to calibrate on."""
        if self.draw is None:
            texts = glossary_examples(split)  # type: ignore[arg-type]
            kept = list(dict.fromkeys(example.context for example in texts))[:contexts]
            return [example for example in texts if example.context in kept]
        rng = random.Random(zlib.crc32(split.encode()))
        questions = 1 if split == "test" else CALIBRATION_QUESTIONS
        drawn = (self.draw(split, LENGTHS[number % len(LENGTHS)], questions, rng) for number in range(contexts))
        return [example for examples in drawn for example in examples]


GLOSSARY = Task("F1", f1)
CODE = Task("edit similarity", edit_similarity, stdlib.draw_code_examples)
DOCS = Task("ROUGE-L", rouge_l, stdlib.draw_docs_examples)


@dataclass(frozen=True)
class NamedPair:
    """A sender, a receiver and the receiver's task."""

    sender: str
    receiver: str
    task: Task
    what: str

    def load(self) -> tuple[Any, Any, Any]:
        """Sender, receiver and their tokenizer."""
        (sender, tokenizer), (receiver, _) = load_variant(self.sender), load_variant(self.receiver)
        return sender, receiver, tokenizer


PAIRS = {
    "lora": NamedPair("base", "glossary", GLOSSARY, "base to a LoRA adapter for a task"),
    "full": NamedPair("base", "code", CODE, "base to a full fine-tune"),
    "tasks": NamedPair("code", "docs", DOCS, "a full fine-tune for one task to that for another"),
    "far": NamedPair("glossary", "docs", DOCS, "two that have drifted far from their base, each its way"),
}


def load_variant(name: str) -> tuple[Any, Any]:
    """A variant and its tokenizer: the base, what is shipped, or what train.py has made.

    Raises:
        FileNotFoundError: train.py has not made it.
    """
    if name == "base":
        return load_pretrained(SMOLLM2)
    if name == "glossary":
        return load_glossary_variant()
    folder = cache_folder() / "variants" / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not there; make it with: python bench/variants/train.py {name}")
    return load_pretrained(folder)


def relative_distance(one: Any, other: Any) -> float:
    """Relative distance between the weights of two models: the norm of the difference over that of the first."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
        return (apart / sum(float(a.double().square().sum()) for a, _ in pairs)) ** 0.5
