"""Examples that fitting and profiling learn from: contexts, and what may follow them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Example(NamedTuple):
    """Token ids, int64 ``[1, N]`` each: a context, the receiver's own suffix after it, and an answer that may follow.

    A receiver is judged by its next-token distributions from the suffix's last token on, with the answer given. The answer need
    not be the right one: any text that the receiver may be in the middle of will do.
    """

    context: torch.Tensor
    suffix: torch.Tensor
    answer: torch.Tensor

    @property
    def prompt(self) -> torch.Tensor:
        """The context with the suffix."""
        return torch.cat((self.context, self.suffix), dim=1)

    @classmethod
    def cut(cls, input_ids: torch.Tensor, answer_tokens: int = 32) -> Example:
        """An example of plain text ``[1, N]``: its last tokens are the answer, the one before them the suffix.

        Raises:
            ValueError: the text is too short.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < answer_tokens + 2:
            raise ValueError(f"input_ids: got {tuple(input_ids.shape)}; (1, {answer_tokens + 2} or more) is needed")
        context, suffix, answer = input_ids.tensor_split((-answer_tokens - 1, -answer_tokens), dim=1)
        return cls(context, suffix, answer)


@dataclass(frozen=True)
class TextExample:
    """A shared context, the receiver's own suffix after it, and the answer that is wanted; text in chat format."""

    context: str
    suffix: str
    answer: str

    def encode(self, tokenizer: Any, device: torch.device | str = "cpu") -> Example:
        """Its token ids; the answer with its end."""
        context, suffix, answer = (
            tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(device)
            for text in (self.context, self.suffix, self.answer)
        )
        return Example(context, suffix, F.pad(answer, (0, 1), value=tokenizer.eos_token_id))


def by_context(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples of each context together, in the order in which contexts first come."""
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(tuple(example.context[0].tolist()), []).append(example)
    return list(groups.values())


def check_examples(examples: Sequence[Example]) -> None:
    """Raise unless all three parts of each are token ids.

    Raises:
        ValueError: one is not; the message says which.
    """
    for number, example in enumerate(examples):
        for name, ids in zip(Example._fields, example, strict=True):
            if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.dtype != torch.int64:
                got = f"{ids.dtype} {tuple(ids.shape)}"
                raise ValueError(
                    f"examples: got {got} as the {name} of number {number}; int64 [1, N], not empty, is needed"
                )


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over their token ids, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in example:
            digest.update(json.dumps(ids[0].tolist()).encode())
    return digest.hexdigest()
