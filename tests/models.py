"""Tiny random models, and a Llama written out slowly to check against."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

# (query heads, kv heads, head_dim): grouped-query ratios 1, 2 and 4 at every head size.
SHAPES = [(heads, kv_heads, head_dim) for head_dim in (64, 80, 96, 128) for heads, kv_heads in ((2, 2), (4, 2), (4, 1))]


def tiny_llama(heads: int = 4, kv_heads: int = 2, head_dim: int = 64, layers: int = 6, **changes) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.2,  # so that layers matter, and greedy tokens vary
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config).eval()


def tiny(family: str, layers: int = 6, **changes) -> PreTrainedModel:
    """A model of any family that is built like Llama's, with weights that no initialisation leaves at 0 or 1."""
    config = AutoConfig.for_model(
        family, vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, **changes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def fine_tuned(model: LlamaForCausalLM, change: float = 0.05) -> LlamaForCausalLM:
    """The same model with every weight changed a little."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * change * parameter.std())
    return other


def tokens(count: int, batch: int = 1, vocabulary: int = 101) -> Tensor:
    return torch.randint(1, vocabulary, (batch, count))


class SlowLlama:
    """A Llama in plain loops over heads, with the bias and the norm of heads of its relatives where the weights have them,
    sharing no code with transformers or the package."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.w = {name: weight.detach().double() for name, weight in model.state_dict().items()}
        c = self.config = model.config
        self.theta = c.rope_parameters["rope_theta"]

    def embed(self, ids: Tensor) -> Tensor:
        return self.w["model.embed_tokens.weight"][ids[0]]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.w[name]

    def _rotate(self, x: Tensor, first_position: int) -> Tensor:
        out, half = x.clone(), x.shape[-1] // 2
        for t in range(x.shape[0]):
            for i in range(half):
                angle = (first_position + t) * self.theta ** (-i / half)
                a, b = x[t, i], x[t, i + half]
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def kv(self, layer: int, x: Tensor, first_position: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """K (rotated) and V by head from the hidden states that enter a layer."""
        p = f"model.layers.{layer}."
        x = self._norm(x, p + "input_layernorm.weight")
        k, v = (self._heads(x, p + "self_attn.", name) for name in "kv")
        return [self._rotate(head, first_position) for head in k], v

    def _heads(self, x: Tensor, attention: str, name: str) -> list[Tensor]:
        y = x @ self.w[f"{attention}{name}_proj.weight"].T
        if f"{attention}{name}_proj.bias" in self.w:
            y = y + self.w[f"{attention}{name}_proj.bias"]
        heads = list(y.split(self.config.head_dim, dim=-1))
        norm = f"{attention}{name}_norm.weight"
        return [self._norm(head, norm) for head in heads] if norm in self.w else heads

    def layer(self, layer: int, x: Tensor, past: tuple[list[Tensor], list[Tensor]] | None = None) -> Tensor:
        """The layer's output for `x`, which follows the tokens of `past`."""
        c, d, p = self.config, self.config.head_dim, f"model.layers.{layer}."
        before = past[0][0].shape[0] if past else 0
        keys, values = self.kv(layer, x, before)
        if past:
            keys = [torch.cat(pair) for pair in zip(past[0], keys, strict=True)]
            values = [torch.cat(pair) for pair in zip(past[1], values, strict=True)]
        q = self._heads(self._norm(x, p + "input_layernorm.weight"), p + "self_attn.", "q")
        out = []
        for h in range(c.num_attention_heads):
            kv_head = h // (c.num_attention_heads // c.num_key_value_heads)
            scores = self._rotate(q[h], before) @ keys[kv_head].T / math.sqrt(d)
            for t in range(len(x)):
                scores[t, before + t + 1 :] = -math.inf
            out.append(scores.softmax(-1) @ values[kv_head])
        x = x + torch.cat(out, dim=-1) @ self.w[p + "self_attn.o_proj.weight"].T
        y = self._norm(x, p + "post_attention_layernorm.weight")
        gate = y @ self.w[p + "mlp.gate_proj.weight"].T
        up = y @ self.w[p + "mlp.up_proj.weight"].T
        return x + (gate * gate.sigmoid() * up) @ self.w[p + "mlp.down_proj.weight"].T

    def logits(self, x: Tensor) -> Tensor:
        return self._norm(x, "model.norm.weight") @ self.w["lm_head.weight"].T


def slow_mixed(
    sender: SlowLlama,
    receiver: SlowLlama,
    ids: Tensor,
    suffix: Tensor,
    bands: Sequence[tuple[int, int]],
    project: Sequence[int],
) -> tuple[list, Tensor]:
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
