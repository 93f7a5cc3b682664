"""Decoders written out slowly in float64 to check against, sharing no code with transformers or the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

# K and V of the tokens of one sequence, by KV head.
KeysValues = tuple[list[Tensor], list[Tensor]]


class SlowDecoder:
    """A decoder of any family in `models.FAMILIES`, from its weights and config alone.

    Most differences between families are seen in which weights there are; the others are read in `__init__`. Hidden
    states are [tokens, channels] of one sequence.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.w = {name.removeprefix("model."): weight.detach().double() for name, weight in model.state_dict().items()}
        c = self.config = model.config
        gemma = c.model_type in ("gemma2", "gemma3_text")
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.norm_offset = 1.0 if gemma else 0.0  # norms multiply by weight + offset
        self.embedding_scale = math.sqrt(c.hidden_size) if gemma else getattr(c, "embedding_multiplier", 1.0)
        self.score_scale = (
            c.query_pre_attn_scalar**-0.5 if gemma else getattr(c, "attention_multiplier", self.head_dim**-0.5)
        )
        # Gemma 3's config has a cap of scores too, which its attention in transformers does not apply.
        self.score_cap = c.attn_logit_softcapping if c.model_type == "gemma2" else None
        self.logit_cap = c.final_logit_softcapping if gemma else None
        self.residual_scale = getattr(c, "residual_multiplier", 1.0)
        self.logit_scale = 1.0 / getattr(c, "logits_scaling", 1.0)

    def embed(self, ids: Tensor) -> Tensor:
        return self.w["embed_tokens.weight"][ids[0]] * self.embedding_scale

    def window(self, layer: int) -> int | None:
        """Number of tokens that a query of this layer sees, itself included; None for all before it."""
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types is not None and layer_types[layer] != "sliding_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    def kv(self, layer: int, x: Tensor, positions: Tensor | None = None) -> KeysValues:
        """K (rotated) and V of every token, beyond the window too, from the hidden states that enter a layer."""
        k, v = (self._heads(layer, x, name) for name in "kv")
        return list(self._rotate(layer, k, torch.arange(len(x)) if positions is None else positions)), list(v)

    def layer(self, layer: int, x: Tensor, past: KeysValues | None = None) -> Tensor:
        """The layer's output for `x`, which follows the tokens of `past`."""
        before = past[0][0].shape[0] if past else 0
        positions = torch.arange(before, before + len(x))
        keys, values = self.kv(layer, x, positions)
        if past:
            keys = [torch.cat(pair) for pair in zip(past[0], keys, strict=True)]
            values = [torch.cat(pair) for pair in zip(past[1], values, strict=True)]
        return self.layer_over(layer, x, positions, (keys, values), torch.arange(before + len(x)))

    def layer_over(
        self, layer: int, x: Tensor, positions: Tensor, keys_values: KeysValues, key_positions: Tensor
    ) -> Tensor:
        """The layer's output for tokens `x` at any positions, which see keys at any others up to their own."""
        p = f"layers.{layer}."
        # Where the MLP's output is normed, `post_attention_layernorm` is of attention's output. Elsewhere it is of the
        # MLP's input.
        output_norms = p + "post_feedforward_layernorm.weight" in self.w
        y = self._attention(layer, x, positions, keys_values, key_positions)
        if output_norms:
            y = self._norm(y, p + "post_attention_layernorm")
        x = x + y * self.residual_scale
        y = self._norm(x, p + ("pre_feedforward_layernorm" if output_norms else "post_attention_layernorm"))
        y = self._norm(self._mlp(y, p + "mlp."), p + "post_feedforward_layernorm")
        return x + y * self.residual_scale

    def logits(self, x: Tensor) -> Tensor:
        head = self.w.get("lm_head.weight", self.w["embed_tokens.weight"])
        return _capped(self._norm(x, "norm") @ head.T * self.logit_scale, self.logit_cap)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm over the last dimension; `x` itself where the family has no such norm."""
        if name + ".weight" not in self.w:
            return x
        rms = (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return x / rms * (self.w[name + ".weight"] + self.norm_offset)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0.0)

    def _heads(self, layer: int, x: Tensor, name: str) -> Tensor:
        """Queries, keys or values before rotation, [heads, tokens, head_dim]."""
        p = f"layers.{layer}.self_attn."
        x = self._norm(x, f"layers.{layer}.input_layernorm")
        if p + "qkv_proj.weight" in self.w:
            sizes = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
            y = self._linear(x, p + "qkv_proj").split(sizes, dim=-1)["qkv".index(name)]
        else:
            y = self._linear(x, f"{p}{name}_proj")
        norm = f"{p}{name}_norm"
        if norm + ".weight" in self.w:
            # As wide as one head where each is normed by itself, else as all of them together.
            groups = rearrange(y, "t (g c) -> t g c", c=len(self.w[norm + ".weight"]))
            y = rearrange(self._norm(groups, norm), "t g c -> t (g c)")
        return rearrange(y, "t (h d) -> h t d", d=self.head_dim)

    def _frequencies(self, layer: int) -> Tensor:
        """RoPE's angles per position; fewer than half of head_dim where only the first channels rotate."""
        c = self.config
        rope = c.rope_parameters
        if "full_attention" in rope:  # by type of layer
            rope = rope[c.layer_types[layer]]
        rotated = int(self.head_dim * rope.get("partial_rotary_factor", 1.0))
        if not getattr(c, "no_rope_layers", [True] * c.num_hidden_layers)[layer]:
            rotated = 0
        f = rope["rope_theta"] ** (-torch.arange(0, rotated, 2).double() / rotated)
        kind = rope["rope_type"]
        if kind == "linear":
            return f / rope["factor"]
        if kind == "llama3":  # fast frequencies are kept, slow ones divided, and those between interpolated
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return f * (kept + (1 - kept) / rope["factor"])
        if kind != "default":
            raise NotImplementedError(f"RoPE of type {kind}")
        return f

    def _rotate(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        frequencies = self._frequencies(layer)
        angles = positions[:, None].double() * frequencies
        cos, sin, half = angles.cos(), angles.sin(), len(frequencies)
        a, b, kept = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, kept], dim=-1)

    def probabilities(
        self, layer: int, x: Tensor, positions: Tensor, keys: list[Tensor], key_positions: Tensor
    ) -> Tensor:
        """Return the probability that each query head gives each key, ``[heads, tokens, keys]``."""
        p = f"layers.{layer}.self_attn."
        queries = self._rotate(layer, self._heads(layer, x, "q"), positions)
        distance = positions[:, None] - key_positions
        hidden = (distance < 0) | (distance >= (self.window(layer) or math.inf))
        out = []
        for head, q in enumerate(queries):
            kv_head = head // (self.heads // self.kv_heads)
            scores = _capped(q @ keys[kv_head].T * self.score_scale, self.score_cap).masked_fill(hidden, -math.inf)
            if p + "sinks" in self.w:  # a score like that of one more token, whose value is zero
                scores = torch.cat([scores, self.w[p + "sinks"][head].expand(len(x), 1)], dim=-1)
            out.append(scores.softmax(-1)[:, : len(key_positions)])
        return torch.stack(out)

    def _attention(
        self, layer: int, x: Tensor, positions: Tensor, keys_values: KeysValues, key_positions: Tensor
    ) -> Tensor:
        p = f"layers.{layer}.self_attn."
        keys, values = keys_values
        shares = self.probabilities(layer, x, positions, keys, key_positions)
        group = self.heads // self.kv_heads
        out = [share @ values[head // group] for head, share in enumerate(shares)]
        return self._linear(torch.cat(out, dim=-1), p + "o_proj")

    def _mlp(self, x: Tensor, p: str) -> Tensor:
        if p + "experts.gate_up_proj" in self.w:
            return self._mixture(x, p)
        if p + "gate_up_proj.weight" in self.w:
            gate, up = self._linear(x, p + "gate_up_proj").chunk(2, dim=-1)
        else:
            gate, up = self._linear(x, p + "gate_proj"), self._linear(x, p + "up_proj")
        return self._linear(self._activation(gate) * up, p + "down_proj")

    def _activation(self, x: Tensor) -> Tensor:
        name = getattr(self.config, "hidden_activation", None) or self.config.hidden_act
        if name == "silu":
            return x * x.sigmoid()
        if name == "gelu_pytorch_tanh":
            return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
        raise NotImplementedError(f"activation {name}")

    def _mixture(self, x: Tensor, p: str) -> Tensor:
        """Every expert on every token, weighted by its share, which is zero where it was not chosen."""
        router = p + ("router" if p + "router.weight" in self.w else "gate")
        shares, chosen = self._linear(x, router).softmax(-1).topk(self.config.num_experts_per_tok)
        if getattr(self.config, "norm_topk_prob", True):
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(len(self.w[p + "experts.gate_up_proj"])):
            share = (shares * (chosen == expert)).sum(-1, keepdim=True)
            out += share * self._expert(x, p + "experts.", expert)
        return out

    def _expert(self, x: Tensor, p: str, expert: int) -> Tensor:
        gate_up, down = self.w[p + "gate_up_proj"][expert], self.w[p + "down_proj"][expert]
        if p + "gate_up_proj_bias" not in self.w:
            gate, up = (x @ gate_up.T).chunk(2, dim=-1)
            return (self._activation(gate) * up) @ down.T
        # gpt_oss, in whose weights gate and up alternate. Its constants became options later.
        alpha, limit = getattr(self.config, "swiglu_alpha", 1.702), getattr(self.config, "swiglu_limit", 7.0)
        y = x @ gate_up + self.w[p + "gate_up_proj_bias"][expert]
        gate, up = y[:, ::2].clamp(max=limit), y[:, 1::2].clamp(-limit, limit)
        return (gate * (alpha * gate).sigmoid() * (up + 1)) @ down + self.w[p + "down_proj_bias"][expert]


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * (x / cap).tanh()


def slow_mixed(
    sender: SlowDecoder,
    receiver: SlowDecoder,
    ids: Tensor,
    suffix: Tensor,
    bands: Sequence[tuple[int, int]],
    project: Sequence[int],
) -> tuple[list[KeysValues], Tensor]:
    """K/V of every layer of a mixed cache, and the receiver's logits of a suffix over it."""
    entering = [sender.embed(ids)]
    for layer in range(sender.config.num_hidden_layers):
        entering.append(sender.layer(layer, entering[-1]))
    mixed = [sender.kv(layer, entering[layer]) for layer in range(sender.config.num_hidden_layers)]
    for layer in project:
        mixed[layer] = receiver.kv(layer, receiver.embed(ids) if layer == 0 else entering[layer])
    for start, end in bands:
        x = receiver.embed(ids) if start == 0 else entering[start]
        for layer in range(start, end):
            mixed[layer] = receiver.kv(layer, x)
            x = receiver.layer(layer, x)
    x = receiver.embed(suffix)
    for layer, past in enumerate(mixed):
        x = receiver.layer(layer, x, past)
    return mixed, receiver.logits(x)


def slow_selected(
    receiver: SlowDecoder,
    mixed: list[KeysValues],
    prompt: Tensor,
    tokens: int,
    chosen: Sequence[int],
    looked_at: range | None = None,
) -> tuple[list[dict[int, tuple[Tensor, Tensor]]], Tensor, Tensor]:
    """Some tokens of a context and then its suffix through the receiver, over K/V that are there already.

    Args:
        mixed: K/V of the context, of every layer; those that a window has left behind are not there.
        chosen: of the context.
        looked_at: layers whose shares count, with no need of any behind them; all layers if None.

    Returns:
        K and V ``[kv heads, head_dim]`` of each layer by position; the largest share that any head and any token of the suffix
        gives each token of the context, over these layers; and what leaves the last layer.
    """
    positions = torch.tensor([*chosen, *range(tokens, prompt.shape[1])])
    x = receiver.embed(prompt)[positions]
    tables, peaks = [], torch.zeros(tokens).double()
    looked_at = range(receiver.config.num_hidden_layers) if looked_at is None else looked_at
    for layer in range(looked_at.stop):
        window = receiver.window(layer)
        first = 0 if window is None else max(tokens - window + 1, 0)
        table = {
            at: tuple(torch.stack([head[at] for head in part]) for part in mixed[layer]) for at in range(first, tokens)
        }
        own = receiver.kv(layer, x, positions)
        for row, at in enumerate(positions.tolist()):
            table[at] = tuple(torch.stack([head[row] for head in part]) for part in own)
        there = torch.tensor(sorted(table))
        keys, values = (
            [torch.stack([table[at][part][head] for at in there.tolist()]) for head in range(receiver.kv_heads)]
            for part in (0, 1)
        )
        shares = receiver.probabilities(layer, x, positions, keys, there)[:, len(chosen) :].amax((0, 1))
        for at, share in zip(there.tolist(), shares, strict=True):
            if at < tokens and layer in looked_at:
                peaks[at] = max(peaks[at], share)
        x = receiver.layer_over(layer, x, positions, (keys, values), there)
        tables.append(table)
    return tables, peaks, x
