"""Whether a model is still what was read of it: the modules, weights and adapters behind its K/V projections."""

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


class Reading:
    """The state that a :class:`Decoder` was read from, compared with the model as it is now without a look at any value.

    Args:
        model: the model, or the PEFT model around it.
        decoder: what was read of it.
    """

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self._model, self._decoder = model, decoder
        self._modules: list[tuple[str, dict[str, Any], str, Any]] = []
        self._weights: list[tuple[str, dict[str, Any], str, torch.Tensor, int, int | None]] = []
        self._adapted: list[tuple[str, Any, Any]] = []
        for path, module in decoder.base.named_modules(remove_duplicate=False):
            if not _READ.fullmatch(path):
                continue
            parent, _, name = path.rpartition(".")
            self._modules.append((path, decoder.base.get_submodule(parent)._modules, name, module))
            for name, weight in module.named_parameters(recurse=False):
                self._keep(f"{path}.{name}", module._parameters, name, weight)
            if hasattr(module, "base_layer"):
                self._adapted.append((path, module, _adapters_of(module)))

        if not decoder.rope_varies:  # where the model itself replaces them
            for name, frequencies in decoder.rotary.named_buffers():
                self._keep(f"rotary_emb.{name}", decoder.rotary._buffers, name, frequencies)

    def _keep(self, path: str, tensors: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        self._weights.append((path, tensors, name, tensor, tensor.data_ptr(), version_of(tensor)))

    def check(self) -> None:
        """Raise if the model is another than it was.

        Raises:
            ReuseError: a module or weight was replaced, moved or written to, or other adapters are active; the message
                names it.
        """
        decoder = self._decoder
        if (
            decoder_model(self._model) is not decoder.model
            or decoder.model.base_model.get_submodule(decoder.family.decoder) is not decoder.base
        ):
            raise _changed("the model inside")
        if decoder.base.training:
            raise _changed("its mode, which is training")
        for path, modules, name, module in self._modules:
            if modules.get(name) is not module:
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
