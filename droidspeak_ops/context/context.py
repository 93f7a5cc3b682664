"""The context that a sender leaves behind after reading it, for receivers to build on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from einops import rearrange

from .. import ops, tensor_file
from ..trace import Trace
from .fingerprint import Fingerprint, ReuseError
from .kv import KV, decode_rows, encode, encode_rows, splice
from .parts import Arriving, Parts

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class SharedContext:
    """The tokens of a context with the sender's K/V at every layer and its hidden states at some.

    It is read layer by layer, through :meth:`kv` and :meth:`hidden`, and never written to: receivers that reuse a layer
    share its tensors until they append to it.

    Args:
        tokens: int64 ``[B, T]``.
        keys_values: for each layer K (rotated) and V, each ``[B, K, N, D]``: of all T tokens, or of as many of the last ones
            as the layer's sliding window still shows to the next token.
        hidden_states: by layer, the residual stream that enters it, ``[B, T, C]`` (the paper's E cache).
        rotations: for each layer cos and sin ``[T, R / 2]`` that the sender rotated its K by; None where it did not.
        sender: who made it.

    Raises:
        ValueError: the parts do not fit together, or not the sender's architecture and dtype, or lie on several devices; the
            message names layer and part. No values are looked at: :meth:`check_finite` does that.
    """

    tokens: torch.Tensor
    keys_values: Sequence[KV]
    hidden_states: Mapping[int, torch.Tensor | KV]
    rotations: Sequence[Rotation | None]
    sender: Fingerprint
    _rstds: dict[tuple[int, float], tuple[int | None, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.tokens.dtype != torch.int64 or self.tokens.numel() == 0:
            found = f"{self.tokens.dtype} {tuple(self.tokens.shape)}"
            raise ValueError(f"tokens: expected int64 [B, T] of one token or more, got {found}")
        num_layers = self.sender.size("num_hidden_layers") or self.num_layers
        for name in ("keys_values", "rotations"):
            if len(getattr(self, name)) != num_layers or num_layers == 0:
                count = len(getattr(self, name))
                raise ValueError(f"{name}: expected an entry for each layer of {num_layers}, got {count}")
        if outside := [layer for layer in self.hidden_states if not 0 <= layer < num_layers]:
            raise ValueError(f"hidden_states: expected layers 0 to {num_layers - 1}, got {outside}")
        parts = self._parts
        if not isinstance(self.keys_values, Arriving):
            for layer, kv in enumerate(self.keys_values):
                parts.check_kv(layer, kv)
        if not isinstance(self.hidden_states, Arriving):
            for layer, states in self.hidden_states.items():
                parts.check_hidden(layer, states)
        for rotation in {id(each[0]): each for each in self.rotations if each is not None}.values():
            parts.check_rotation(rotation)

    @property
    def _parts(self) -> Parts:
        """The checks of all parts; sizes that the sender does not know are those of the first layer."""
        sizes = [self.sender.size(name) for name in ("num_key_value_heads", "head_dim")]
        if None in sizes:
            shape = self.keys_values[0].keys.shape
            if len(shape) != 4:
                raise ValueError(f"layer 0: expected keys [B, K, N, D], got {tuple(shape)}")
            sizes = [known or found for known, found in zip(sizes, shape[1::2], strict=True)]
        return Parts(self.tokens, self.sender, self.num_layers, *sizes)  # type: ignore[arg-type]

    def check_finite(self) -> None:
        """Raise unless all values are finite. It reads all of them, and waits for a GPU.

        Raises:
            ReuseError: a value is NaN or infinite; the message names the layer and the part.
        """
        parts: dict[str, torch.Tensor | None] = {}
        for layer, kv in enumerate(self.keys_values):
            parts |= {f"layer {layer}: {name}": part for name, part in kv._asdict().items()}
        for layer, states in self.hidden_states.items():
            by_name = {"states": states} if isinstance(states, torch.Tensor) else states._asdict()
            parts |= {f"hidden states of layer {layer}: {name}": part for name, part in by_name.items()}
        for layer, rotation in enumerate(self.rotations):
            parts |= {
                f"layer {layer}: {name}": half for name, half in zip(("cos", "sin"), rotation or (), strict=False)
            }
        for where, part in parts.items():
            if part is not None and part.is_floating_point() and not bool(part.float().isfinite().all()):
                raise ReuseError(f"{where}: expected finite values, got NaN or infinity")

    @property
    def num_layers(self) -> int:
        return len(self.keys_values)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The layers at which hidden states are held."""
        return tuple(sorted(self.hidden_states))

    @property
    def nbytes(self) -> int:
        """Bytes of K, V, hidden states and their scales."""
        states = self.hidden_states.values()
        parts = [*self.keys_values, *((each,) if isinstance(each, torch.Tensor) else each for each in states)]
        return sum(tensor.nbytes for part in parts for tensor in part if tensor is not None)

    def prefetch(self, reads: Iterable[tuple[str, int]], trace: Trace | None = None) -> None:
        """Have parts read ahead, in this order: those of a context in memory are there already.

        Args:
            reads: of which layers what is read, as :attr:`droidspeak_ops.prefill.schedule.Schedule.reads` has it.
            trace: takes the spans of reading.
        """

    def has_arrived(self, reads: Iterable[tuple[str, int]]) -> bool:
        """Return whether these parts are there, so that nothing waits for them."""
        return True

    def wait(self, reads: Iterable[tuple[str, int]]) -> None:
        """Wait until these parts are there, or raise what their reading raised."""

    def kv(self, layer: int) -> KV:
        """K (rotated) and V of one layer, each ``[B, K, N, D]``, with the scales of 8-bit rows."""
        return self.keys_values[layer]

    def sinks(self, layer: int, count: int) -> KV:
        """K and V of the attention sinks that a layer holds, as :meth:`kv`: its first `count` rows, which may be read alone."""
        return self.kv(layer).at(slice(count))

    def hidden(self, layer: int) -> torch.Tensor:
        """The hidden states that enter one layer, ``[B, T, C]``.

        Raises:
            ReuseError: they were not captured.
        """
        self.check_hidden([layer])
        states = self.hidden_states[layer]
        return states if isinstance(states, torch.Tensor) else decode_rows(states, self.sender.torch_dtype)

    def rstd(self, layer: int, eps: float) -> torch.Tensor:
        """1/rms of the hidden states that enter one layer, float32 ``[B, T]``: for ``norm="folded"``, computed at first use.

        It is remembered for as long as the hidden states are not written to. While a CUDA graph is captured it is computed in
        the graph, which may be replayed over other contents.

        Args:
            layer: which.
            eps: added to the mean square.

        Raises:
            ReuseError: the hidden states were not captured.
        """
        if is_capturing(self.tokens.device):
            return ops.rms_rstd(self.hidden(layer), eps)
        self.check_hidden([layer])
        held = self.hidden_states[layer]
        version = version_of(held if isinstance(held, torch.Tensor) else held.keys)
        known = self._rstds.get((layer, eps))
        if known is None or known[0] != version:
            known = self._rstds[layer, eps] = version, ops.rms_rstd(self.hidden(layer), eps)
        return known[1]

    def unrotated(self, layer: int, which: slice = slice(None)) -> torch.Tensor:
        """K of one layer as it was before RoPE and V, side by side: ``[B, N, 2 * K * D]``.

        Args:
            which: of the rows that the layer holds.
        """
        rows, applied = self.kv(layer).keys.shape[2], self.rotations[layer]
        kv = self.kv(layer).at(which)
        batch, heads, count, head_dim = kv.keys.shape
        dtype = self.sender.torch_dtype
        both = torch.empty((batch, count, 2 * heads * head_dim), dtype=dtype, device=kv.keys.device)
        back = {}
        if applied is not None:
            unturned = torch.ones_like(applied[0]), torch.zeros_like(applied[1])
            halves = (last(half, rows)[which] for half in ops.rotation_between(*applied, *unturned))
            back = dict(zip(("cos", "sin"), (half.repeat(batch, 1) for half in halves), strict=True))
        keys, values = rearrange(both, "b n (kv h d) -> kv b h n d", kv=2, h=heads)
        splice(kv, keys, values, **back)
        return both

    def quantized(self, dtype: torch.dtype) -> SharedContext:
        """The same context in 8 bits, each row of a head (or 32 columns of hidden states) with a scale of its own.

        Receivers decode a layer when they reuse it. What that costs in quality is measured in docs/models.md.

        Args:
            dtype: ``torch.float8_e4m3fn`` or ``torch.int8``.

        Raises:
            ValueError: another dtype, or a context that is in 8 bits already.
        """
        return SharedContext(
            tokens=self.tokens,
            keys_values=[encode(kv, dtype) for kv in self.keys_values],
            hidden_states={layer: encode_rows(self.hidden(layer), dtype) for layer in self.hidden_states},
            rotations=self.rotations,
            sender=self.sender,
        )

    def to(self, device: torch.device | str) -> SharedContext:
        """Move the context to another device; tensors that layers share stay shared."""
        move = mover(device)
        return SharedContext(
            tokens=self.tokens.to(device),
            keys_values=[KV(*map(move, kv)) for kv in self.keys_values],  # type: ignore[arg-type]
            hidden_states={
                layer: states.to(device) if isinstance(states, torch.Tensor) else KV(*map(move, states))  # type: ignore[arg-type]
                for layer, states in self.hidden_states.items()
            },
            rotations=[None if each is None else (move(each[0]), move(each[1])) for each in self.rotations],  # type: ignore[misc]
            sender=self.sender,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with a digest of it all; nothing half-written is left in its place."""
        tensor_file.write(path, "context", *self._described())

    def _described(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Describe the context for :meth:`load`: plain values, and tensors by name."""
        rotations = list({id(each[0]): each for each in self.rotations if each is not None}.values())
        places = {id(cos): place for place, (cos, _) in enumerate(rotations)}
        tensors = {"tokens": self.tokens}
        for place, angles in enumerate(rotations):
            tensors |= {f"rotation.{place}.{name}": half for name, half in zip(("cos", "sin"), angles, strict=True)}
        for layer, kv in enumerate(self.keys_values):
            tensors |= {f"kv.{layer}.{name}": part for name, part in kv._asdict().items() if part is not None}
        for layer, states in self.hidden_states.items():
            parts = {"states": states} if isinstance(states, torch.Tensor) else states._asdict()
            tensors |= {f"hidden.{layer}.{name}": part for name, part in parts.items() if part is not None}
        described = {
            "sender": asdict(self.sender),
            "layers": self.num_layers,
            "hidden_layers": self.hidden_layers,
            "rotations": [None if each is None else places[id(each[0])] for each in self.rotations],
        }
        return described, tensors

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SharedContext:
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            ValueError: the file holds something else, is damaged, or is none that :meth:`save` writes.
        """

        def make(described: Described, tensors: tensor_file.Tensors) -> SharedContext:
            context = cls._from_described(described, tensors)
            (vocabulary,) = context.sender.sizes("vocab_size")
            if not bool(((context.tokens >= 0) & (context.tokens < vocabulary)).all()):
                raise ValueError(f"tokens: expected ids from 0 to {vocabulary - 1}, got others")
            return context

        return tensor_file.read(path, "context", Described, make)

    @classmethod
    def _from_described(cls, described: Described, tensors: tensor_file.Tensors) -> SharedContext:
        """Return the context that :meth:`_described` describes.

        Raises:
            ValueError: a tensor is missing, or the parts do not fit together.
        """

        def kv(prefix: str) -> KV:
            scales = (tensors.take_if(f"{prefix}.{name}") for name in KV._fields[2:])
            return KV(*(tensors.take(f"{prefix}.{name}") for name in KV._fields[:2]), *scales)

        def hidden(layer: int) -> torch.Tensor | KV:
            states = tensors.take_if(f"hidden.{layer}.states")
            return kv(f"hidden.{layer}") if states is None else states

        rotations: dict[int | None, Rotation | None] = {None: None}
        for place in described.rotations:
            if place not in rotations:
                cos, sin = (tensors.take(f"rotation.{place}.{name}") for name in ("cos", "sin"))
                rotations[place] = cos, sin
        return cls(
            tokens=tensors.take("tokens"),
            keys_values=[kv(f"kv.{layer}") for layer in range(len(described.rotations))],
            hidden_states={layer: hidden(layer) for layer in described.hidden_layers},
            rotations=[rotations[place] for place in described.rotations],
            sender=described.sender,
        )

    def check_hidden(self, layers: Sequence[int]) -> None:
        """Raise unless hidden states are held at all of `layers`.

        Raises:
            ReuseError: some are missing; the message names them.
        """
        missing = [layer for layer in layers if layer not in self.hidden_states]
        if missing:
            raise ReuseError(
                f"hidden states: expected them at layers {list(layers)}, got them at {list(self.hidden_layers)}; "
                "capture with layers=plan.hidden_layers(num_layers)"
            )

    def check_prompt(self, prompt_ids: torch.Tensor) -> None:
        """Raise unless `prompt_ids` ``[B, N]`` are the tokens of this context followed by at least one more.

        Raises:
            ReuseError: the prompt is another one, or has no suffix; the message says where they part.
        """
        check_continues(self.tokens, prompt_ids)


@dataclass(frozen=True)
class Described:
    """The plain values in a file of a context; of `rotations` the tensors of the layer, or None."""

    sender: Fingerprint
    layers: int
    hidden_layers: tuple[int, ...]
    rotations: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if len(self.rotations) != self.layers:
            raise ValueError(f"rotations: expected one for each layer of {self.layers}, got {len(self.rotations)}")
        if len(set(self.hidden_layers)) != len(self.hidden_layers):
            raise ValueError(f"hidden_layers: expected every layer once, got {self.hidden_layers}")


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured: tensors made then hold no values yet, and must not be cached."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def version_of(tensor: torch.Tensor) -> int | None:
    """Number of writes to a tensor, but for those through ``.data``; None if none are counted (inference mode)."""
    return None if tensor.is_inference() else tensor._version


def mover(device: torch.device | str) -> Callable[[torch.Tensor | None], torch.Tensor | None]:
    """Return a function that moves tensors, or None, to a device, and a tensor that it is given again only once."""
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else moved.setdefault(id(tensor), tensor.to(device))

    return move


def last(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The last rows, or none of them."""
    skipped = rows.shape[0] - count
    return rows[skipped:] if skipped else rows


def check_continues(tokens: torch.Tensor, prompt_ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Raise unless `prompt_ids` ``[B, N]`` are `tokens` ``[B, T]``, where `mask` is true, followed by at least one more.

    Raises:
        ReuseError: the prompt is another one, or has no suffix; the message says where they part.
    """
    batch, length = tokens.shape
    if prompt_ids.dim() != 2 or prompt_ids.shape[0] != batch or prompt_ids.shape[1] <= length:
        raise ReuseError(
            f"prompt_ids: expected ({batch}, more than {length}), the tokens of the context and then a suffix, "
            f"got shape {tuple(prompt_ids.shape)}"
        )
    differs = prompt_ids[:, :length].to(tokens.device) != tokens
    if mask is not None:
        differs &= mask.bool()
    differing = differs.any(0).nonzero()
    if differing.numel():
        at = int(differing[0])
        raise ReuseError(f"prompt_ids: expected the tokens of the context at their head, got another at token {at}")
