"""Readings: attention of a receiver's suffixes over the K and V of contexts, layer by layer, which maps are trained to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file

from ..context.context import Rotation, SharedContext, last
from ..context.parts import sinks_among
from ..example import Example
from ..hf.passes import PackedSuffixes, Pass
from ..ops.checks import NormOrder
from ..ops.reference import finish_heads_ref, rope_ref
from ..prefill.schedule import Source
from .pair import Pair
from .shares import EXAMPLES_PER_STEP

QUERIES = 96
"""Most tokens of the suffixes of a context that look at it; they are taken evenly from all."""
READING_FILES = "reading-*.safetensors"


@dataclass(frozen=True)
class LayerReading:
    """One layer's attention of the suffixes of one context, as a function of the K and V that a map makes of its rows.

    Args:
        rows: what the map reads, ``[N, P]``, of the last N tokens of the context: as many as the layer keeps.
        sinks: the sender's K and V of the attention sinks among them, ``[2, K, S, D]``, which are reused.
        queries: ``[n, H, D]``, after RoPE.
        suffix: K and V of the suffixes' tokens, ``[2, K, M, D]``.
        mask: 0 where a query sees a row of both together, ``[n, N + M]``; otherwise -inf or as little.
        target: the attention's output behind its output projection, over the receiver's own K and V, ``[n, C]``.
        options: of the attention: `scale`, `softcap` and `sinks`.
        output, output_dtype: the attention's output projection, and the dtype that it takes.
        k_norm_weight, k_norm_eps, norm_order: the receiver's norm of K, where the map's K are yet to be normed.
        rotation: cos and sin ``[N, R / 2]``, or None.
    """

    rows: torch.Tensor
    sinks: torch.Tensor
    queries: torch.Tensor
    suffix: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor
    options: dict[str, Any]
    output: Any
    output_dtype: torch.dtype
    k_norm_weight: torch.Tensor | None
    k_norm_eps: float
    norm_order: NormOrder
    rotation: Rotation | None

    def loss(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the squared error of the attention's output over the square of the target, for a map of K and V together.

        Args:
            weight, bias: ``[2 * K * D, P]`` and ``[2 * K * D]``.
        """
        read = attend(self.queries, self.keys_values(weight, bias), self.suffix, self.mask, self.options)
        found = self.output(read.to(self.output_dtype)).to(self.target.dtype)
        return (found - self.target).square().sum() / self.target.square().sum()

    def keys_values(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """K (rotated) and V ``[2, K, N, D]`` that a map makes of the context."""
        heads, count = self.sinks.shape[1], self.sinks.shape[2]
        keys, values = rearrange(F.linear(self.rows, weight, bias), "n (kv h d) -> kv n h d", kv=2, h=heads)
        cos, sin = (None, None) if self.rotation is None else self.rotation
        keys = finish_heads_ref(keys, self.k_norm_weight, self.norm_order, self.k_norm_eps, cos, sin)
        return torch.cat((self.sinks, torch.stack((keys, values)).transpose(1, 2)[:, :, count:]), dim=2)


def attend(
    queries: torch.Tensor, context: torch.Tensor, suffix: torch.Tensor, mask: torch.Tensor, options: Mapping[str, Any]
) -> torch.Tensor:
    """Attention ``[n, H * D]`` of queries over K and V of a context, and those of the suffixes, which a gradient passes.

    Args:
        queries, suffix, mask, options: as :class:`LayerReading` has them.
        context: ``[2, K, N, D]``.
    """
    keys, values = torch.cat((context, suffix), dim=2)
    by_head = {"k": len(keys), "n": len(queries)}
    logits = rearrange(options["scale"] * queries, "n (k g) d -> k (n g) d", **by_head) @ keys.mT
    if (cap := options["softcap"]) is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = rearrange(logits, "k (n g) s -> k n g s", **by_head) + mask[:, None]
    if (sinks := options["sinks"]) is not None:
        of_heads = rearrange(sinks.float(), "(k g) -> k 1 g 1", k=len(keys)).expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, of_heads), dim=-1)
    shares = logits.softmax(-1)[..., : mask.shape[1]]
    return rearrange(rearrange(shares, "k n g s -> k (n g) s") @ values, "k (n g) d -> n (k g d)", **by_head)


class Readings:
    """The readings of many contexts, in a file for each, of which one layer at a time is read back.

    Args:
        pair: the sender and the receiver.
        contexts: as the sender has read them.
        folder: where the files are written.
    """

    def __init__(self, pair: Pair, contexts: Sequence[SharedContext], folder: Path) -> None:
        self._pair, self._contexts, self._folder = pair, contexts, folder
        self._masks: list[dict[int | None, torch.Tensor]] = []
        self._passes: list[Pass] = []
        self.device = pair.receiver.device

    def __len__(self) -> int:
        return len(self._passes)

    @torch.no_grad()
    def add(self, receiver_context: SharedContext, examples: Sequence[Example]) -> None:
        """Write what suffixes and answers of a context's first examples read of it: of the next one, as the receiver has it."""
        decoder, shape = self._pair.receiver, receiver_context.tokens.shape
        suffixes = [torch.cat((each.suffix, each.answer[:, :-1]), dim=1) for each in examples[:EXAMPLES_PER_STEP]]
        packed = PackedSuffixes(decoder, shape[1], [each.shape[1] for each in suffixes])
        ids = torch.cat(suffixes, dim=1)
        stride = -(-ids.shape[1] // QUERIES)
        masks = {window: packed.over.mask(window)[0, 0, ::stride].float() for window in dict.fromkeys(decoder.windows)}
        own = {layer: receiver_context.kv(layer)[:2] for layer in range(decoder.num_layers)}
        cache, states = packed.cache(own), decoder.embed(ids)
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(decoder.num_layers):
            if layer > 0:
                rotation = packed.over.rotation(layer)
                if rotation is not None:
                    rotation = rotation[0][::stride], rotation[1][::stride]
                queries = decoder.queries(layer, states[:, ::stride], rotation)[0]
                suffix = torch.stack(packed.over.project(layer, states, rows=ids.shape[1])[:2])[:, 0]
                read = attend(
                    queries.float(), torch.stack(own[layer])[:, 0].float(), suffix.float(), masks[decoder.windows[layer]],
                    decoder.attention(layer),
                )  # fmt: skip
                target = self._output(layer)(read.to(decoder.dtype))
                tensors |= {f"{layer}.queries": queries, f"{layer}.suffix": suffix, f"{layer}.target": target}
            states = packed.over.run(layer, states, cache)
        save_file(tensors, self._path(len(self)))
        self._masks.append(masks)
        self._passes.append(Pass(decoder, shape))

    def layer(self, number: int, layer: int, source: Source) -> LayerReading:
        """Read one layer of a context back, for maps of one kind."""
        decoder, context, rotation = self._pair.receiver, self._contexts[number], self._passes[number].rotation(layer)
        unrotated, weights = context.unrotated(layer)[0], decoder.weights(layer)
        held, tokens = len(unrotated), context.tokens.shape[1]
        if rotation is not None:
            rotation = last(rotation[0], held), last(rotation[1], held)
        keys, values = rearrange(
            unrotated[: sinks_among(held, tokens)].float(), "n (kv h d) -> kv n h d", kv=2, h=decoder.num_kv_heads
        )
        if rotation is not None:
            keys = rope_ref(keys, *(half[: len(keys)] for half in rotation))
        rows = unrotated if source == "fitted_kv" else last(self._pair.normalized(layer, context.hidden(layer)), held)
        with safe_open(self._path(number), "pt", device=str(decoder.device)) as file:
            queries, suffix, target = (
                file.get_tensor(f"{layer}.{name}").float() for name in ("queries", "suffix", "target")
            )
        return LayerReading(
            rows.float(), torch.stack((keys, values)).transpose(1, 2), queries, suffix,
            self._masks[number][decoder.windows[layer]], target, decoder.attention(layer), self._output(layer),
            decoder.dtype, weights.k_norm_weight if source == "fitted" else None, weights.k_norm_eps,
            decoder.family.norm_order, rotation,
        )  # fmt: skip

    def _output(self, layer: int) -> Any:
        return self._pair.receiver.layers[layer].self_attn.o_proj

    def _path(self, number: int) -> Path:
        return self._folder / READING_FILES.replace("*", f"{number:05}")
