"""The file of a stored context: safetensors whose tensors are read one by one, each checked by a digest of its own.

Its header says all that has to fit together, and is checked before anything of the size that it tells is allocated or read. Of
tensors the hidden states come first, then the layers, in the order in which schedules read them.

Digests are XXH3, of 128 bits, and tell damage: whoever can write to a store can also make digests that fit.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import xxhash

from .. import schema, tensor_file
from .context import Described, SharedContext
from .fingerprint import ReuseError
from .keys import BLOCK, Chain, identity
from .kv import KV
from .parts import SINKS, sinks_among
from .slabs import Slabs
from .storage import OpenFile

_KIND = "droidspeak_stored_context"
DIGEST = "xxh3_128"
_DTYPES = {
    "I64": torch.int64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 16 << 20  # of bytes: some hundred are there for each tensor and each block of tokens


@dataclass(frozen=True)
class Manifest:
    """The plain values of a stored context.

    Args:
        key: of the context; see :mod:`droidspeak_ops.context.keys`.
        blocks: the hashes of its heads of whole blocks.
        namespace: of its tenant.
        context: what :class:`SharedContext` says of itself.
        digests: of each tensor's bytes.
    """

    key: str
    blocks: tuple[str, ...]
    namespace: str
    context: Described
    digests: dict[str, str]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file, as safetensors has it."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"expected one of {', '.join(_DTYPES)}, got {self.dtype}")
        nbytes = _DTYPES[self.dtype].itemsize * math.prod(self.shape)
        first, end = self.data_offsets
        if not 0 < len(self.shape) <= 4 or min(self.shape) < 1 or first < 0 or end - first != nbytes:
            raise ValueError(f"expected a shape and its {nbytes} bytes, got {self.shape} from {first} to {end}")

    def described(self) -> torch.Tensor:
        """A tensor of this dtype and shape, without memory."""
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")

    def tensor(self, content: memoryview) -> torch.Tensor:
        """The tensor of these bytes, which it holds."""
        return torch.frombuffer(content, dtype=_DTYPES[self.dtype]).view(self.shape)


def encode(context: SharedContext, chain: Chain, namespace: str) -> list[memoryview]:
    """Return the content of the file of a context, in parts that share memory with tensors on the CPU."""
    described, tensors = context._described()
    tensors |= sinks_of(context)
    parts = {name: _bytes_of(tensor.detach().cpu().contiguous()) for name, tensor in _in_order(tensors)}
    ends = [0]
    for part in parts.values():
        ends.append(ends[-1] + len(part))
    table = {
        name: asdict(_Place(_NAMES[tensors[name].dtype], tuple(tensors[name].shape), place))
        for name, place in zip(parts, pairwise(ends), strict=True)
    }
    digests = {name: xxhash.xxh3_128_hexdigest(part) for name, part in parts.items()}
    values = {
        "key": chain.key(chain.num_tokens), "blocks": chain.blocks, "namespace": namespace,
        "context": described, "digests": digests,
    }  # fmt: skip
    return [memoryview(sealed(json.dumps(values, allow_nan=False), table)), *parts.values()]


def sealed(text: str, table: dict[str, Any]) -> bytes:
    """Return the head of a file, up to its tensors, with a digest that fits: `text` has the manifest in JSON."""
    header = json.dumps({"__metadata__": {_KIND: text, DIGEST: _digest(text, table)}, **table}).encode()
    header += b" " * (-len(header) % 8)  # the format has tensors begin at multiples of 8
    return len(header).to_bytes(8, "little") + header


class Entry:
    """A stored context, of which the header is read.

    Args:
        path: its name, for errors.
        file: which is kept open.

    Raises:
        ValueError: it is none, or is damaged; the message begins with `path`.
        OSError: it cannot be read.
    """

    def __init__(self, path: str, file: OpenFile) -> None:
        self._path, self._file = path, file
        length = int.from_bytes(self._read(0, 8), "little") if file.nbytes >= 8 else 0
        self._data = 8 + length
        if not 0 < length <= min(_MOST_HEADER, file.nbytes - 8):
            raise ValueError(f"{path}: expected a stored context, got {file.nbytes} bytes with a header of {length}")
        header = schema.decode(bytes(self._read(8, length)), dict[str, Any], path)
        metadata = schema.convert(header.pop("__metadata__", {}), dict[str, str], path)
        if metadata.keys() != {_KIND, DIGEST}:
            raise ValueError(f"{path}: expected a stored context, got a safetensors file of something else")
        if metadata[DIGEST] != _digest(metadata[_KIND], header):
            raise ValueError(f"{path}: expected a header of the digest {metadata[DIGEST]}, got another: it is damaged")
        self.manifest = schema.decode(metadata[_KIND], Manifest, path)
        self._places = schema.convert(header, dict[str, _Place], path)
        try:
            self._check_places(file.nbytes - self._data)
            self._check_fits()
            self.identity = identity(self.manifest.context.sender)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self._slabs = Slabs(file.nbytes)

    def _check_places(self, nbytes: int) -> None:
        """Raise unless the tensors lie side by side in all of `nbytes`, in order, and each has a digest."""
        if self._places.keys() != self.manifest.digests.keys():
            raise ValueError("digests: expected one for each tensor, got others")
        end = 0
        for name, place in self._places.items():
            if place.data_offsets[0] != end:
                raise ValueError(f"{name}: expected to begin at {end}, got {place.data_offsets}")
            end = place.data_offsets[1]
        if end != nbytes:
            raise ValueError(f"expected {end} bytes of tensors, got {nbytes}: the file is cut, or another")

    def _check_fits(self) -> None:
        """Raise unless the tensors are, by name, dtype and shape, those of a context of such a sender."""
        tensors = tensor_file.Tensors({name: place.described() for name, place in self._places.items()})
        context = SharedContext._from_described(self.manifest.context, tensors)
        self._has_sinks = self._check_sinks(context, tensors)
        tensors.check_taken()
        if context.tokens.shape[0] != 1:
            raise ValueError(f"tokens: expected one row, got {context.tokens.shape[0]}")
        if len(self.manifest.blocks) != self.num_tokens // BLOCK:
            raise ValueError(f"blocks: expected those of {self.num_tokens} tokens, got {len(self.manifest.blocks)}")
        rows = {kv.keys.shape[2] for kv in context.keys_values}
        self.has_heads = rows == {self.num_tokens} and not _rope_varies(context.sender.rope)

    def _check_sinks(self, context: SharedContext, tensors: tensor_file.Tensors) -> bool:
        """Return whether the sinks are apart, as many as are read today; raise unless they are then those of such a context."""
        if "sinks.keys" not in tensors.names:
            return False
        keys, values = (tensors.take(f"sinks.{name}") for name in KV._fields[:2])
        sinks = KV(keys, values, *(tensors.take_if(f"sinks.{name}") for name in KV._fields[2:]))
        if keys.shape[2:3] != (min(SINKS, self.num_tokens),):
            return False
        context._parts.check_sinks(sinks)
        return True

    def check_head(self, length: int) -> None:
        """Raise a ReuseError unless the first `length` tokens of the context are a context.

        Windows do not hold the rows that a shorter head would, and angles that depend on the length are others for it.
        """
        if length != self.num_tokens and not (self.has_heads and length < self.num_tokens):
            raise ReuseError(f"{self._path}: expected a context of {length} tokens, got one of {self.num_tokens}")

    def use(self) -> None:
        """Count as used now, where that is known of files."""
        self._file.use()

    @property
    def num_tokens(self) -> int:
        return self._places["tokens"].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of K and V: the sender's, or one of 8 bits."""
        return _DTYPES[self._places["kv.0.keys"].dtype]

    @property
    def names(self) -> list[str]:
        """The names of sinks that are read, hidden states, K and V, in the order of the file."""
        kinds = ("sinks.", "hidden.", "kv.") if self._has_sinks else ("hidden.", "kv.")
        return [name for name in self._places if name.startswith(kinds)]

    def fetch(self, name: str) -> torch.Tensor:
        """Read a tensor onto the CPU; several threads may.

        Raises:
            ReuseError: it is damaged, or cannot be read any more; the message names file and tensor.
        """
        place, hashed = self._places[name], xxhash.xxh3_128()
        first, end = place.data_offsets
        try:
            content = self._slabs.take(end - first, self._data + first)
            for part in self._file.read(self._data + first, content):
                hashed.update(part)
        except OSError as error:
            raise ReuseError(f"{self._path}: {name}: expected to read it, got: {error}") from error
        if hashed.hexdigest() != self.manifest.digests[name]:
            raise ReuseError(
                f"{self._path}: {name}: expected the digest of what was written, got another: it is damaged"
            )
        return place.tensor(content)

    def head_of(self, name: str, tensor: torch.Tensor, length: int) -> torch.Tensor:
        """Return the first `length` tokens of a tensor; sinks are the same for all heads, which have whole blocks."""
        dim = 0 if name.startswith("rotation.") else 1 if name.endswith((".states", "tokens")) else 2
        is_whole = length == self.num_tokens or name.startswith("sinks.")
        return tensor if is_whole else tensor.narrow(dim, 0, length).contiguous()

    def rotations(self, length: int) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Read cos and sin of the first `length` tokens, by layer, those of several layers once; errors as :meth:`fetch`."""
        read: dict[int | None, tuple[torch.Tensor, torch.Tensor] | None] = {None: None}
        for place in self.manifest.context.rotations:
            if place not in read:
                names = (f"rotation.{place}.{half}" for half in ("cos", "sin"))
                cos, sin = (self.head_of(name, self.fetch(name), length) for name in names)
                read[place] = cos, sin
        return [read[place] for place in self.manifest.context.rotations]

    def check_all(self) -> None:
        """Read all tensors; raises as :meth:`fetch`."""
        for name in self._places:
            self.fetch(name)

    def _read(self, start: int, count: int) -> bytearray:
        content = bytearray(count)
        for _ in self._file.read(start, memoryview(content)):
            pass
        return content


def _rope_varies(rope: Mapping[str, Any]) -> bool:
    """Return whether the angles of a position depend on the length of the prompt; of several kinds of layers, at any."""
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, Mapping)}
    return not kinds.isdisjoint({"dynamic", "longrope"})


def sinks_of(context: SharedContext) -> dict[str, torch.Tensor]:
    """Return K and V of the sinks of all layers, heads side by side, or nothing of layers that are in several dtypes.

    So they are read at once, and without the layers. Sinks that a sliding window does not hold are zeros, which nothing reads.
    """
    if len({kv.keys.dtype for kv in context.keys_values}) > 1:
        return {}
    tokens = context.tokens.shape[1]
    count = min(SINKS, tokens)
    of_layers: dict[str, list[torch.Tensor]] = defaultdict(list)
    for kv in context.keys_values:
        held = sinks_among(kv.keys.shape[2], tokens)
        for name, part in kv.at(slice(held))._asdict().items():
            if part is not None:
                sinks = part.new_zeros((*part.shape[:2], count, *part.shape[3:]))
                sinks[:, :, count - held :] = part
                of_layers[f"sinks.{name}"].append(sinks)
    return {name: torch.cat(parts, 1) for name, parts in of_layers.items()}


def _in_order(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tokens, rotations and sinks, which are small; then hidden states, and then K/V, layer by layer."""
    ranks = {"tokens": 0, "rotation": 1, "sinks": 2, "hidden": 3, "kv": 4}

    def rank(name: str) -> tuple[int, int]:
        what, *place = name.split(".")
        return ranks[what], int(place[0]) if len(place) == 2 else 0

    return ((name, tensors[name]) for name in sorted(tensors, key=rank))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(text: str, table: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([text, list(table.items())]).encode())
