"""Examples for fitting and profiling: a context, a suffix and an answer."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .schema import decode


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
    """A context, the receiver's own suffix and the expected answer, as text with the chat template applied.

    Raises:
        ValueError: one of them is empty, or no text that UTF-8 can hold.
    """

    context: str
    suffix: str
    answer: str

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            if not text:
                raise ValueError(f"{name}: expected text, got an empty one")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}: expected text, got half a character, {text[error.start]!r}") from None

    def encode(self, tokenizer: Any, device: torch.device | str = "cpu") -> Example:
        """Tokenize the three texts, and append the end-of-sequence token to the answer where the tokenizer has one.

        Raises:
            ValueError: a text has no tokens.
        """
        parts = []
        for name, text in vars(self).items():
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if not ids:
                raise ValueError(f"{name}: expected text of one token or more, got {text[:80]!r}")
            parts.append(ids)
        if tokenizer.eos_token_id is not None:
            parts[-1] = [*parts[-1], tokenizer.eos_token_id]
        return Example(*(torch.tensor([ids], dtype=torch.int64, device=device) for ids in parts))


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file, with or without a byte order mark, that has some text; line ends become ``"\\n"``.

    Raises:
        ValueError: it is not UTF-8, or has nothing but white space; the message names the file.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8, got the byte 0x{content[error.start]:02x} at {error.start}"
        ) from None
    if not text.strip():
        raise ValueError(f"{path}: expected text, got an empty file")
    return text


def read_examples(path: str | os.PathLike[str]) -> list[TextExample]:
    """Read a JSON Lines file of objects with the texts context, suffix and answer.

    Raises:
        ValueError: as :func:`read_text`, or a line is no such object; the message names the file, the line and the field.
        OSError: it cannot be read.
    """
    # Other line breaks that str.splitlines knows may stand in a string.
    lines = read_text(path).rstrip(" \t\r\n").split("\n")
    return [decode(line, TextExample, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


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
