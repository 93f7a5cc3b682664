"""vLLM's model loader, which keeps hold of what it has loaded: connectors are given no model."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ..context.context import Rotation
from ..context.fingerprint import Fingerprint
from ..prefill.weights import LayerWeights
from .plugin import CONNECTOR, LOAD_FORMAT
from .settings import Settings

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""vLLM's classes whose layers are read here; all of them are made as its Llama is."""
_HIDDEN_LAYERS = "droidspeak_hidden_layers"


class LoadedModel:
    """A model of vLLM's, as far as filling its KV cache needs it.

    Args:
        model: with its weights as they were read, before vLLM packs them.

    Raises:
        ValueError: it is of another class, or a layer is not as in Llama.
    """

    def __init__(self, model: Any) -> None:
        if type(model).__name__ not in MODELS:
            raise ValueError(f"model: expected one of vLLM's {', '.join(MODELS)}, got {type(model).__name__}")
        self._model, self._base = weakref.ref(model), model.model
        self.weights = [_read_layer(index, layer) for index, layer in enumerate(self.layers)]
        self._rotation: Any = (None, None)  # that was asked for last, and what for
        self.taps: list[torch.Tensor] = []
        """Hidden states of the last pass's tokens, one tensor for each layer that is tapped."""

    @property
    def layers(self) -> list[Any]:
        """The decoder layers, which run as they are."""
        return list(self._base.layers)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the hidden states ``[T, C]`` that enter layer 0."""
        return self._base.embed_input_ids(tokens)

    def rotation(self, layer: int, tokens: int) -> Rotation:
        """cos and sin ``[T, R / 2]`` by which a layer rotates K of the first tokens, in the model's dtype.

        Layers that are alike share them.

        Raises:
            ValueError: the model has angles for fewer tokens.
        """
        embedding = self.layers[layer].self_attn.rotary_emb
        table, key = embedding.cos_sin_cache, (id(embedding), tokens)
        if tokens > table.shape[0]:
            raise ValueError(f"context: expected up to {table.shape[0]} tokens, for which there is RoPE, got {tokens}")
        if key != self._rotation[0]:
            cos, sin = table[:tokens].to(self.weights[layer].k_weight.dtype).chunk(2, dim=-1)
            self._rotation = key, (cos.contiguous(), sin.contiguous())
        return self._rotation[1]

    def check_sizes(self, sender: Fingerprint) -> None:
        """Raise a ValueError unless vLLM reads the same sizes of heads from the model's configuration as transformers does."""
        expected, found = sender.size("head_dim"), self.layers[0].self_attn.attn.head_size
        if found != expected:
            raise ValueError(f"head_dim: expected {expected}, as transformers reads it, got {found} of vLLM's model")

    def plainly_normed(self, layer: int) -> LayerWeights:
        """The weights of a layer with a norm that only divides by the root mean square."""
        weights = self.weights[layer]
        return dataclasses.replace(weights, norm_weight=torch.ones_like(weights.norm_weight))  # type: ignore[arg-type]

    def tap(self, layers: tuple[int, ...]) -> None:
        """Have hidden states that enter layers kept at each pass, by the taps that vLLM has for speculative decoding.

        Raises:
            ValueError: there is no such layer.
        """
        outside = [layer for layer in layers if not 0 <= layer < len(self.layers)]
        if outside:
            raise ValueError(f"hidden_layers: expected layers 0 to {len(self.layers) - 1}, got {outside}")
        if not layers:
            return
        self._base._set_aux_hidden_state_layers(layers)
        model: Any = self._model()
        inner = model.forward  # which is around what is compiled

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_states, self.taps = inner(*args, **kwargs)
            return hidden_states

        model.forward = forward

    @property
    def tapped(self) -> tuple[int, ...]:
        """The layers of :attr:`taps`."""
        return tuple(self._base.aux_hidden_state_layers)


_loaded: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Loader(DefaultModelLoader):
    """The default loader, of the load format :data:`LOAD_FORMAT`: what it has loaded is found by :func:`loaded_model`."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(dataclasses.replace(load_config, load_format="auto"))

    def load_model(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        model = super().load_model(vllm_config, *args, **kwargs)
        transfer = vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == CONNECTOR:
            layers = Settings.of(transfer).hidden_layers
            model.droidspeak.tap(layers)
            # A compiled model is found again by what is hashed of the configuration, to which taps do not belong.
            vllm_config.additional_config[_HIDDEN_LAYERS] = list(layers)
        _loaded[_key(vllm_config)] = model
        return model

    def load_weights(self, model: Any, model_config: Any) -> None:
        super().load_weights(model, model_config)
        model.droidspeak = LoadedModel(model)  # now, as on a CPU the weights are packed and dropped next


def loaded_model(vllm_config: VllmConfig) -> LoadedModel:
    """Return the model of this process that was loaded with a configuration.

    Raises:
        ValueError: it was loaded by another loader.
    """
    model = _loaded.get(_key(vllm_config))
    if model is None:
        raise ValueError(f"load_format: expected {LOAD_FORMAT!r}, got {vllm_config.load_config.load_format!r}")
    return model.droidspeak


def _key(vllm_config: VllmConfig) -> int:
    return id(vllm_config.compilation_config.static_forward_context)


def _read_layer(index: int, layer: Any) -> LayerWeights:
    """Read the weights that K and V of a layer depend on, of this rank's heads.

    Raises:
        ValueError: the layer is not as in Llama.
    """
    attention, norm = layer.self_attn, layer.input_layernorm
    if getattr(attention, "do_llama_4_scaling", False) or not attention.rotary_emb.is_neox_style:
        raise ValueError(f"layer {index}: expected attention as in Llama, got another RoPE or scaling of queries")
    if attention.attn.sliding_window is not None:
        raise ValueError(f"layer {index}: expected attention over all tokens, got a sliding window")
    qkv, end = attention.qkv_proj, attention.q_size + attention.kv_size
    # Of a packed weight the rest is dropped, so that views would keep it for these rows' sake.
    k, v = (qkv.weight.detach()[rows].clone() for rows in (slice(attention.q_size, end), slice(end, None)))
    biases = (None, None) if qkv.bias is None else qkv.bias.detach()[attention.q_size :].clone().chunk(2)
    k_norm = getattr(attention, "k_norm", None)
    return LayerWeights(
        norm_weight=norm.weight.detach(), norm_eps=norm.variance_epsilon, k_weight=k, v_weight=v,
        k_bias=biases[0], v_bias=biases[1],
        k_norm_weight=None if k_norm is None else k_norm.weight.detach(),
        k_norm_eps=0.0 if k_norm is None else k_norm.variance_epsilon,
    )  # fmt: skip
