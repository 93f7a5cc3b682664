"""Damages to the content of files: of bytes, of JSON, of files of tensors, under digests that fit or not."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from safetensors.torch import load

from droidspeak_ops import tensor_file
from droidspeak_ops.context import entry

Damage = Callable[[bytes, random.Random], bytes]


def flip(content: bytes, rng: random.Random) -> bytes:
    """Flip one to three bits."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Cut off the end."""
    return content[: rng.randrange(len(content))]


def splice_bytes(content: bytes, rng: random.Random) -> bytes:
    """Replace some bytes by random ones, by those of another place, or by none."""
    (start, end), (first, last) = (sorted(rng.choices(range(len(content) + 1), k=2)) for _ in "ab")
    if rng.random() < 0.5:  # a few, so that most of the file is left
        end, last = min(end, start + 8), min(last, first + 8)
    put = rng.choice([rng.randbytes(rng.randint(0, 9)), content[first:last], b"", b"\0" * (end - start)])
    return content[:start] + put + content[rng.choice([start, end]) :]


def encode(content: bytes, rng: random.Random) -> bytes:
    """Encode the file, as if it were text, otherwise."""
    text = content.decode("latin1")
    return text.encode(rng.choice(["utf-8", "utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037"]), "replace")


BYTES: tuple[Damage, ...] = (flip, cut, splice_bytes, encode)

_RAW = "<raw>"
_WILD = [
    *("null", "true", "false", "0", "1", "2", "-1", "3.5", "-0.0", "1e308", "-1e308", "5e-324", "1e999", "NaN", "-Infinity"),
    *("1.0", "4096", "65536", "9223372036854775807", "9223372036854775808", "1" + "0" * 400, "1" * 5000, "[]", "{}"),
    *('""', '"x"', '"1"', '"rest"', '"reuse"', '"fitted"', '"float16"', '"\\ud800"', '"\\u0000"', '"' + "x" * 9999 + '"'),
    *("[[1, 2]]", "[0, 1]", '{"0": [1, 2]}', "[" * 500 + "]" * 500, "[" * 99_999, '{"a":' * 99_999, '{"a":1,"a":2}'),
]  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every list or object in a value, with each index or name."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(item)


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Change the fields, items and values of a JSON document."""
    document, raw = [json.loads(content)], ""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(document))
        (at, key), (other, other_key) = rng.choices(places, k=2)
        action = rng.choice(["replace", "nudge", "remove", "rename", "double", "swap", "wrap", "add"])
        if action == "replace":
            at[key], raw = _RAW, rng.choice(_WILD)
        elif action == "nudge" and isinstance(at[key], (int, float)):
            at[key] = rng.choice([at[key] + 1, at[key] - 1, -at[key], at[key] * 1000, float(at[key]), str(at[key])])
        elif action == "remove" and at is not document:
            del at[key]
        elif action == "rename" and isinstance(at, dict):
            at[rng.choice(["", key + "s", key.upper(), "weights"])] = at.pop(key)
        elif action == "double" and isinstance(at, dict):
            at[_RAW], raw = at[key], json.dumps(key)
        elif action == "double":
            at.append(copy.deepcopy(at[key]))
        elif action == "swap":
            at[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(at[key])
        elif action == "wrap":
            at[key] = rng.choice([[at[key]], {"x": at[key]}, [at[key], at[key]]])
        elif action == "add" and isinstance(at, dict):
            at[rng.choice(["x", "", "__class__", "weights"])] = 1
    return json.dumps(document[0]).replace(json.dumps(_RAW), raw).encode()


def damage_line(content: bytes, rng: random.Random) -> bytes:
    """Damage a line of a file of JSON documents, or swap, double or drop lines."""
    lines = content.splitlines()
    first, second = rng.choices(range(len(lines)), k=2)
    action = rng.choice(["json", "json", "json", "swap", "double", "drop", "empty"])
    if action == "json":
        lines[first] = damage_json(lines[first], rng)
    elif action == "swap":
        lines[first], lines[second] = lines[second], lines[first]
    elif action == "double":
        lines.insert(second, lines[first])
    elif action == "drop":
        del lines[first]
    else:
        lines.insert(first, rng.choice([b"", b" ", b"\r", b"\x0c", "\u2028".encode()]))
    return b"".join(line + b"\n" for line in lines)


def damage_line_order(content: bytes, rng: random.Random) -> bytes:
    """Swap, double or drop lines whose checksums fit."""
    lines = content.splitlines(keepends=True)
    first, second = rng.choices(range(len(lines)), k=2)
    return b"".join(
        rng.choice(
            [
                [*lines[:first], *lines[first + 1 :]],
                [*lines[:first], lines[second], *lines[first:]],
                [lines[{first: second, second: first}.get(number, number)] for number in range(len(lines))],
            ]
        )
    )


def damage_journal(content: bytes, rng: random.Random) -> bytes:
    """The same, under checksums that fit."""
    lines = damage_line(b"".join(line[9:] + b"\n" for line in content.splitlines()), rng).split(b"\n")[:-1]
    return b"".join(b"%08x %b\n" % (zlib.crc32(line), line) for line in lines)


def split_header(content: bytes) -> tuple[bytes, bytes]:
    """Split a safetensors file into its header, which is JSON, and the tensors behind it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def in_order(content: bytes) -> bytes:
    """Return a safetensors file with the names in its header in order: as it is written, it has them in any."""
    header, data = split_header(content)
    described = json.dumps(json.loads(header), sort_keys=True).encode()
    described += b" " * (-len(described) % 8)  # the format has tensors begin at multiples of 8
    return struct.pack("<Q", len(described)) + described + data


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """Damage the header of a safetensors file, which says where its tensors are and of which shape."""
    header, data = split_header(content)
    header = damage_json(header, rng)
    return struct.pack("<Q", rng.choice([len(header), len(header), len(header), 2**63, 2**40])) + header + data


def damage_tensors(content: bytes, rng: random.Random) -> bytes:
    """Damage the tensors and plain values of a file, under a digest that fits."""
    header = json.loads(split_header(content)[0])["__metadata__"]
    (key,) = header.keys() - {"sha256"}
    text, tensors = header[key], load(content)
    if rng.random() < 0.5:
        text = damage_json(text.encode(), rng).decode()
    else:
        for _ in range(rng.randint(1, 2)):
            name, other = rng.choices(sorted(tensors), k=2)
            _damage_tensor(tensors, name, other, rng)
    return tensor_file.sealed(key.removeprefix("droidspeak_"), text, tensors)


def damage_stored(content: bytes, rng: random.Random) -> bytes:
    """Damage the manifest of a stored context, or where its tensors are, under a digest that fits."""
    header, data = split_header(content)
    table = json.loads(header)
    (text,) = (value for name, value in table.pop("__metadata__").items() if name != entry.DIGEST)
    if rng.random() < 0.5:
        text = damage_json(text.encode(), rng).decode()
    else:
        with suppress(ValueError, RecursionError):  # there is no digest of what is no JSON
            damaged = json.loads(damage_json(json.dumps(table).encode(), rng))
            table = damaged if isinstance(damaged, dict) else table
    return entry.sealed(text, table) + data


def _damage_tensor(tensors: dict[str, torch.Tensor], name: str, other: str, rng: random.Random) -> None:
    tensor = torch.atleast_1d(tensors[name])
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]
    flat = (tensor.real if tensor.is_complex() else tensor).float().reshape(-1)
    changed: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.to(rng.choice([*dtypes, torch.complex64, torch.float8_e4m3fn, torch.uint8])),
        lambda: tensor.reshape(-1),
        lambda: tensor.mT if tensor.dim() > 1 else tensor[None],
        lambda: tensor[..., :-1],
        lambda: tensor[:0],
        lambda: torch.zeros(0, 2**40),
        lambda: torch.tensor(rng.random()),
        lambda: torch.cat([tensor, tensor]),
        lambda: flat.where(torch.arange(len(flat)) > 0, rng.choice([torch.nan, torch.inf, -1e9, 1e38])).view(tensor.shape),
        lambda: torch.full_like(tensor, rng.choice([0, 1, 99, -1])),
        lambda: tensors[other],
    ]  # fmt: skip
    action = rng.choice(["change"] * 4 + ["drop", "rename", "add", "swap"])
    if action == "change":
        tensors[name] = rng.choice(changed)()
    elif action == "swap":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        if action != "add" and len(tensors) > 1:
            del tensors[name]
        if action != "drop":
            names = [
                name + "s",
                "",
                "x",
                name.replace("1", "2"),
                name.replace("1", "99999999999999999999"),
                f"0{name}",
                "0.x",
            ]
            tensors[rng.choice(names)] = tensor
