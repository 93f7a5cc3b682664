"""Reading comprehension over a made-up glossary: real WordNet definitions under invented words.

The words are invented, so the answers are in the context alone; the definitions are real text. A context lists
entries, a question asks either for the definition of a word or for the word that a definition belongs to. Two other kinds of
examples, which nothing was trained on, need several entries that lie far apart.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from droidspeak_ops.example import TextExample

_ONSETS = "b br d dr f fl g gl j k kr l m n p pl r s sk st t tr v z".split()
_VOWELS = "a e i o u ai ou".split()
_CODAS = ["", *"b d g k l m n nd p r rk s sh t x".split()]
ANSWERS = "<|im_start|>assistant\n"
"""End of a suffix, behind which the answer starts."""


@dataclass(frozen=True)
class Entry:
    """A line of a glossary."""

    word: str
    definition: str

    @property
    def line(self) -> str:
        """The entry as a context lists it."""
        return f"{self.word}: {self.definition}"


def read_definitions(wordnet: Path, split: str) -> list[str]:
    """Return definitions of 4 to 10 plain words from WordNet's ``data.noun``; a tenth of them, by hash, is the test split."""
    found = set()
    for line in (wordnet / "data.noun").read_text(encoding="latin-1").splitlines():
        if " | " not in line:
            continue
        definition = line.split(" | ", 1)[1].split(";")[0].strip()
        if re.fullmatch(r"[a-z][a-z ,'-]+", definition) and 4 <= len(definition.split()) <= 10:
            found.add(definition)
    return sorted(text for text in found if (zlib.crc32(text.encode()) % 10 == 0) == (split == "test"))


def draw_entries(definitions: list[str], count: int, rng: random.Random) -> list[Entry]:
    """Draw definitions, and an invented word for each."""
    words: set[str] = set()
    while len(words) < count:
        syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(2))
        words.add("".join(syllables))
    ordered = sorted(words)
    rng.shuffle(ordered)
    return [Entry(word, text) for word, text in zip(ordered, rng.sample(definitions, count), strict=True)]


def context_text(entries: list[Entry]) -> str:
    """Return a context that lists entries, as a chat turn."""
    lines = "\n".join(entry.line for entry in entries)
    return f"<|im_start|>user\nHere is a glossary.\n\n{lines}<|im_end|>\n"


def ask(entry: Entry, reverse: bool) -> tuple[str, str]:
    """Return a question as a chat turn that ends where the answer starts, and the answer."""
    question = f'Which word means "{entry.definition}"?' if reverse else f'What does "{entry.word}" mean?'
    return _turn(question), entry.word if reverse else entry.definition


def _turn(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n{ANSWERS}"


def draw_examples(definitions: list[str], entries: int, questions: int, rng: random.Random) -> list[TextExample]:
    """Draw questions in either direction about one context of `entries` entries, about 15 tokens each."""
    drawn = draw_entries(definitions, entries, rng)
    context = context_text(drawn)
    asked = (rng.choice(drawn) for _ in range(questions))
    return [TextExample(context, *ask(entry, reverse=rng.random() < 0.5)) for entry in asked]


def read_entries(context: str) -> list[Entry]:
    """Return the entries of what :func:`context_text` wrote."""
    lines = context.removesuffix("<|im_end|>\n").split("\n\n", 1)[1].split("\n")
    return [Entry(*line.split(": ", 1)) for line in lines]


def link(context: str, rng: random.Random) -> TextExample:
    """Draw an entry of the first quarter that is to refer to one of the second half, and ask what it means in two turns.

    The suffix holds the first question, the reference as its answer, and the question what that word means.
    """
    entries = read_entries(context)
    half = len(entries) // 2
    place, target = rng.randrange(half // 2), rng.choice(entries[half:])
    entries[place] = Entry(entries[place].word, f'another word for "{target.word}"')
    (first, reference), (second, answer) = (ask(entry, reverse=False) for entry in (entries[place], target))
    return TextExample(context_text(entries), f"{first}{reference}<|im_end|>\n{second}", answer)


def spread_out(context: str, rng: random.Random) -> TextExample:
    """Ask for entries without naming them; the answer is one of each quarter of the context, in any order."""
    entries = read_entries(context)
    ends = [len(entries) * quarter // 4 for quarter in range(5)]
    drawn = [rng.choice(entries[start:end]) for start, end in itertools.pairwise(ends)]
    rng.shuffle(drawn)
    listed = "\n".join(entry.line for entry in drawn)
    return TextExample(context, _turn("Read out some entries of the glossary."), listed)
