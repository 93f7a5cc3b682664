"""The inputs of ``fit`` and ``profile``: a pair of models, and a sample of contexts from texts."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from ..example import Example, TextExample, by_context, read_examples, read_text
from ..hf.pretrained import Pretrained, find_pair
from ..profiling.timing import timed
from .arguments import MIN_CONTEXTS, MIN_TOKENS


@dataclass(frozen=True)
class Inputs:
    """A pair of models whose weights are yet to be loaded, and examples in the tokens of the receiver.

    Args:
        sender, receiver: the pair, which fits together as far as configurations tell.
        examples: those of the sample of contexts.
        found: number of contexts and of their tokens that the sample is drawn from.
    """

    sender: Pretrained
    receiver: Pretrained
    examples: list[Example]
    found: tuple[int, int]

    @classmethod
    def read(cls, options: argparse.Namespace) -> Inputs:
        """Read the texts that options name, and then find the models.

        Raises:
            ValueError, OSError: texts or models cannot be read or do not fit together, or there are too few contexts.
        """
        texts = {path: read_examples(path) if is_jsonl(path) else read_text(path) for path in options.texts}
        sender, receiver = find_pair(options.sender, options.receiver, options.base)
        files = [_encode(path, text, receiver.tokenizer, options.tokens) for path, text in texts.items()]
        for path, examples in zip(texts, files, strict=True):
            _check_vocabulary(path, examples, sender, receiver)
        groups = by_context([*chain(*files)])
        if len(groups) < MIN_CONTEXTS:
            raise ValueError(
                f"texts: expected at least {MIN_CONTEXTS} contexts from pieces of {MIN_TOKENS} to {options.tokens} tokens, "
                f"got {len(groups)}"
            )
        chosen = groups if options.contexts is None else sample(files, options.contexts, options.seed)
        return cls(sender, receiver, [*chain(*chosen)], (len(groups), count_tokens(groups)))

    def load(self) -> tuple[Any, Any]:
        """Load the weights of sender and receiver."""
        return self.sender.load(), self.receiver.load()

    def announce(self, prog: str, receiver: Any, prefills: float, extra_tokens: int) -> None:
        """Say on stderr how much of the texts is used, and about how long that will take.

        Args:
            prog: the command.
            receiver: one of whose full prefills is timed.
            prefills: how many full prefills of its context each context takes.
            extra_tokens: number of tokens whose full prefill takes as long as what does not depend on contexts.
        """
        groups = by_context(self.examples)
        tokens = count_tokens(groups)
        ids = sorted((group[0].context for group in groups), key=torch.numel)[len(groups) // 2]
        seconds = prefill_seconds(receiver, ids) / ids.shape[1] * (prefills * tokens + extra_tokens)
        about = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
        print(
            f"{prog}: {len(groups)} of {self.found[0]:,} contexts, {tokens:,} of {self.found[1]:,} tokens; about {about}",
            file=sys.stderr,
        )


def is_jsonl(path: Path) -> bool:
    """Return whether a file is one of examples, rather than plain text."""
    return path.suffix.lower() == ".jsonl"


def count_tokens(groups: Sequence[Sequence[Example]]) -> int:
    """Count the tokens of the contexts of groups of examples."""
    return sum(group[0].context.shape[1] for group in groups)


def sample(files: Sequence[Sequence[Example]], contexts: int, seed: int) -> list[list[Example]]:
    """Draw contexts at random, as many from each file as it has or as others give; return their examples, in their order."""
    groups = by_context([*chain(*files)])
    file_of = {id(example): number for number, examples in enumerate(files) for example in examples}
    queues: list[list[int]] = [[] for _ in files]
    for index, group in enumerate(groups):
        queues[file_of[id(group[0])]].append(index)
    rng = random.Random(seed)
    rng.shuffle(queues)
    for queue in queues:
        rng.shuffle(queue)
    turns = [index for turn in zip_longest(*queues) for index in turn if index is not None]
    return [groups[index] for index in sorted(turns[:contexts])]


@torch.no_grad()
def prefill_seconds(model: Any, input_ids: torch.Tensor) -> float:
    """Return the seconds of a warm full prefill of ``[1, N]`` tokens."""

    def prefill() -> Any:
        return model(input_ids, use_cache=True, logits_to_keep=1)

    prefill()
    return timed(prefill)[1]


def _encode(path: Path, text: str | list[TextExample], tokenizer: Any, tokens: int) -> list[Example]:
    """Tokenize the examples of a file, or pieces of its text."""
    if isinstance(text, str):
        pieces = tokenizer(text, return_tensors="pt").input_ids.split(tokens, dim=1)
        return [Example.cut(piece) for piece in pieces if piece.shape[1] >= MIN_TOKENS]
    examples = []
    for number, each in enumerate(text, start=1):
        try:
            examples.append(each.encode(tokenizer))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return examples


def _check_vocabulary(path: Path, examples: Sequence[Example], sender: Pretrained, receiver: Pretrained) -> None:
    """Raise unless both models know the tokens of contexts, and the receiver those of suffixes and answers."""
    both = min(sender.vocab_size, receiver.vocab_size)
    for example in examples:
        for name, ids, size in zip(
            Example._fields, example, (both, receiver.vocab_size, receiver.vocab_size), strict=True
        ):
            if (largest := int(ids.max())) >= size:
                raise ValueError(
                    f"{path}: expected tokens below {size} in each {name}, got {largest} from the tokenizer"
                )
