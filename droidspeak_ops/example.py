"""Examples for fitting and profiling: a context, a suffix and an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Example(NamedTuple):
    """Token ids, int64 ``[1, N]`` each: a context, the receiver's own suffix, and an answer.

    The receiver's next-token distributions are compared from the suffix's last token on, teacher-forced on the answer. The
    answer need not be correct: any plausible continuation will do.
    """

    context: torch.Tensor
    suffix: torch.Tensor
    answer: torch.Tensor

    @property
    def prompt(self) -> torch.Tensor:
        """The context followed by the suffix."""
        return torch.cat((self.context, self.suffix), dim=1)

    @classmethod
    def cut(cls, input_ids: torch.Tensor, answer_tokens: int = 32) -> Example:
        """Cut plain text ``[1, N]`` into an example: the last `answer_tokens` are the answer, the token before them the suffix.

        Raises:
            ValueError: the text is too short.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < answer_tokens + 2:
            raise ValueError(
                f"input_ids: expected shape (1, {answer_tokens + 2} or more), got {tuple(input_ids.shape)}"
            )
        context, suffix, answer = input_ids.tensor_split((-answer_tokens - 1, -answer_tokens), dim=1)
        return cls(context, suffix, answer)


@dataclass(frozen=True)
class TextExample:
    """A context, the receiver's own suffix and the expected answer, as text with the chat template applied."""

    context: str
    suffix: str
    answer: str

    def encode(self, tokenizer: Any, device: torch.device | str = "cpu") -> Example:
        """Tokenize the three texts, and append the end-of-sequence token to the answer."""
        context, suffix, answer = (
            tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(device)
            for text in (self.context, self.suffix, self.answer)
        )
        return Example(context, suffix, F.pad(answer, (0, 1), value=tokenizer.eos_token_id))


def by_context(examples: Sequence[Example]) -> list[list[Example]]:
    """Group examples by context, in order of first appearance."""
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(tuple(example.context[0].tolist()), []).append(example)
    return list(groups.values())


def check_examples(examples: Sequence[Example]) -> None:
    """Raise unless each part of every example is non-empty int64 token ids ``[1, N]``.

    Raises:
        ValueError: one is not; the message says which.
    """
    for number, example in enumerate(examples):
        for name, ids in zip(Example._fields, example, strict=True):
            if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.dtype != torch.int64:
                raise ValueError(
                    f"examples: expected the {name} of example {number} to be non-empty int64 [1, N], "
                    f"got {ids.dtype} {tuple(ids.shape)}"
                )


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the token ids of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in example:
            digest.update(json.dumps(ids[0].tolist()).encode())
    return digest.hexdigest()
