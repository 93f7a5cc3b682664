"""The check that a model is still what was read of it: the modules, weights and adapters behind its K/V projections."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..context.context import version_of
from ..context.fingerprint import ReuseError
from .adapters import active_adapters, decoder_model
from .decoder import Decoder

_READ = re.compile(
    r"rotary_emb|layers(\.\d+(\.(input_layernorm(\..+)?|self_attn(\.(qkv_proj|k_proj|v_proj|k_norm)(\..+)?)?))?)?"
)
# Of these the weights are read, so that nothing of them runs.
_READ_IN_PLACE_OF_CALLING = re.compile(r"(input_layernorm|qkv_proj|k_proj|v_proj|k_norm)(\.base_layer)?$")


class Reading:
    """The state that a :class:`Decoder` was read from, compared with the model as it is now without a look at any value.

    Args:
        decoder: what was read of the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._depth = decoder, decoder.config.num_hidden_layers
        self._modules: list[tuple[str, dict[str, Any], str, Any, type]] = []
        self._called: list[tuple[str, Any, Any, dict[str, Any]]] = []
        self._weights: list[tuple[str, dict[str, Any], str, torch.Tensor, int, int | None]] = []
        self._numbers: list[tuple[str, dict[str, Any], str, float]] = []
        self._adapted: list[tuple[str, Any, Any]] = []
        for path, module in decoder.base.named_modules(remove_duplicate=False):
            if not _READ.fullmatch(path):
                continue
            parent, _, name = path.rpartition(".")
            self._modules.append((path, decoder.base.get_submodule(parent)._modules, name, module, type(module)))
            if _READ_IN_PLACE_OF_CALLING.search(path):
                self._called.append((path, module._forward_hooks, module._forward_pre_hooks, vars(module)))
                if hasattr(module, decoder.family.norm_eps):
                    self._keep_number(path, module, decoder.family.norm_eps)
            for name, weight in module.named_parameters(recurse=False):
                self._keep(f"{path}.{name}", module._parameters, name, weight)
            if hasattr(module, "base_layer"):
                self._adapted.append((path, module, _adapters_of(module)))

        if not decoder.rope_varies:  # where the model itself replaces them
            for name, frequencies in decoder.rotary.named_buffers():
                self._keep(f"rotary_emb.{name}", decoder.rotary._buffers, name, frequencies)

        for name in vars(decoder.rotary):
            if name.endswith("attention_scaling") and not decoder.rope_varies:
                self._keep_number("rotary_emb", decoder.rotary, name)

    def _keep_number(self, path: str, module: Any, name: str) -> None:
        self._numbers.append((f"{path}.{name}", vars(module), name, getattr(module, name)))

    def _keep(self, path: str, tensors: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        self._weights.append((path, tensors, name, tensor, tensor.data_ptr(), version_of(tensor)))

    def check(self, model: Any) -> None:
        """Raise if the model is another than it was.

        Args:
            model: the same model, or PEFT model around it.

        Raises:
            ReuseError: a module or weight was replaced, moved or written to, or other adapters are active; the message
                names it.
        """
        decoder = self._decoder
        if (
            decoder_model(model) is not decoder.model
            or decoder.model.base_model.get_submodule(decoder.family.decoder) is not decoder.base
        ):
            raise _changed("the model inside")
        if decoder.base.training:
            raise _changed("its mode, which is training")
        if decoder.config.num_hidden_layers != self._depth:
            raise _changed("its number of layers")
        for path, modules, name, module, kind in self._modules:
            if modules.get(name) is not module or type(module) is not kind:
                raise _changed(path)
        for path, hooks, pre_hooks, attributes in self._called:
            if hooks or pre_hooks or "forward" in attributes:
                raise _changed(f"{path}, which has hooks or a forward of its own")
        for path, attributes, name, number in self._numbers:
            if attributes.get(name) != number:
                raise _changed(path)
        for path, weights, name, weight, address, version in self._weights:
            if (
                weights.get(name) is not weight
                or weight.data_ptr() != address
                or (version is not None and weight._version != version)
            ):
                raise _changed(path)
        for path, module, adapters in self._adapted:
            if _adapters_of(module) != adapters:
                raise _changed(f"the adapters of {path}")


def _adapters_of(module: Any) -> tuple[Any, ...]:
    return active_adapters(module), list(module.merged_adapters), dict(module.scaling), module.disable_adapters


def _changed(what: str) -> ReuseError:
    return ReuseError(
        f"receiver: expected the model as it was read, got another state of {what}; make a ds.Receiver of the model as it is"
    )
