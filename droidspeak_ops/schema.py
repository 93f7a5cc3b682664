"""JSON from files as typed values: the one reader of plans, frontiers, journals, examples and what is beside tensors.

A type says what is expected, a dataclass's ``__post_init__`` what its fields have to do with one another. Whatever a file
holds, either a value comes back or a ValueError that names the file, the field, what is expected and what came.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, TypeVar

import msgspec

T = TypeVar("T")


def decode(text: str | bytes, kind: type[T], where: str) -> T:
    """Decode a JSON document.

    Duplicate and unknown names, NaN and infinite numbers, and integers of more than 64 bits are refused.

    Args:
        text: the document; bytes are UTF-8, with or without a byte order mark.
        kind: a dataclass, a NamedTuple or another type that says what is expected.
        where: the file, or what else the text is, for errors.

    Raises:
        ValueError: the text is not JSON, or not of this type.
    """
    return convert(parse(text, where), kind, where)


def parse(text: str | bytes, where: str) -> Any:
    """Parse a JSON document whose type is not known yet, as :func:`decode` does.

    Raises:
        ValueError: the text is not JSON.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(
            decoded, object_pairs_hook=_unique, parse_constant=_refuse_number, parse_float=_finite, parse_int=_int64
        )
        if not decoded.isascii() or r"\u" in decoded:  # an escape can be half of a character, which nothing encodes
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{where}: expected UTF-8, got the byte {byte:#04x} at {error.start}") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where}: expected Unicode text, got half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, got {error.msg} at line {error.lineno}") from None
    except (RecursionError, ValueError) as error:
        reason = "too deeply nested JSON" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where}: expected JSON of finite numbers with every name once, got {reason}") from None
    return value


def convert(value: Any, kind: type[T], where: str) -> T:
    """Convert what JSON gave to a type. Names of objects may stand for numbers.

    Raises:
        ValueError: it is not of this type; the message begins with `where`.
    """
    try:
        found = msgspec.convert(value, kind, str_keys=True)
        _check_names(value, found, where, "")
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {_plain(str(error))}") from None
    except RecursionError:
        raise ValueError(f"{where}: expected JSON of this type, got too deeply nested JSON") from None
    return found


def _check_names(value: Any, found: Any, where: str, path: str) -> None:
    """Raise if an object has names that its dataclass does not."""
    if is_dataclass(found):
        known = [field.name for field in fields(found)]
        if unknown := sorted(value.keys() - set(known)):
            raise ValueError(f"{where}: expected the fields {', '.join(known)}{path and f' at {path}'}, got {unknown}")
        for name in value:
            _check_names(value[name], getattr(found, name), where, f"{path}.{name}".lstrip("."))
    elif isinstance(found, (list, tuple)) and isinstance(value, list) and len(found) == len(value):
        for index, (item, made) in enumerate(zip(value, found, strict=True)):
            _check_names(item, made, where, f"{path}[{index}]")
    elif isinstance(found, dict) and isinstance(value, dict):
        if len(found) != len(value):
            raise ValueError(f"{where}: expected every name once{path and f' at {path}'}, got {list(value)}")
        for name, made in zip(value, found.values(), strict=True):
            _check_names(value[name], made, where, f"{path}.{name}".lstrip("."))


def _plain(message: str) -> str:
    """msgspec's message in the words of ours: ``expected X, got Y at a.b[0]``."""
    message = re.sub(r" - at (?:`key` in )?`\$\.?(.*)`$", lambda path: f" at {path[1]}" if path[1] else "", message)
    message = re.sub(r"^Object missing required field (\S+)", r"expected the field \1, got none", message)
    message = re.sub(r"^Invalid enum value", "expected one of the values that are known, got", message)
    return (message[:1].lower() + message[1:]).replace("`", "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} more than once")
    return found


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(name)


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the number {digits[:20]}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]}")
    return number
