"""The check that a model is still what was read of it: modules, weights, hooks and adapters, without a look at values."""

from __future__ import annotations

import re
import weakref
from itertools import repeat
from operator import contains
from typing import TYPE_CHECKING, Any

import torch

from ..context.context import version_of
from ..context.fingerprint import ReuseError, forget_digests
from .adapters import active_adapters, decoder_model
from .families import PARTS, is_its_weights

if TYPE_CHECKING:
    from .decoder import Decoder

_LAYER = re.compile(r"layers\.(\d+)")
_READ = re.compile(rf"(rotary_emb|layers|layers\.\d+(\.self_attn|\.({'|'.join(map(re.escape, PARTS))})(\..+)?)?)")
# Of these the weights are read, so that nothing of them runs.
_READ_IN_PLACE_OF_CALLING = re.compile(rf"({'|'.join(map(re.escape, PARTS))})(\.base_layer)?$")


class Watch:
    """Parts of a model as they are now, to be compared with what they are later."""

    def __init__(self) -> None:
        self._modules: list[tuple[str, dict[str, Any], str, Any, type]] = []
        # Of modules that have to stay plain: their paths, their kinds of hooks, and where a forward of their own would be.
        self._plain: list[str] = []
        self._no_hooks: list[dict[int, Any]] = []
        self._no_forward: list[dict[str, Any]] = []
        self._hooks: list[tuple[str, dict[int, Any], tuple[int, ...], dict[str, Any], Any]] = []
        self._tensors: list[tuple[str, dict[str, Any], str, torch.Tensor, int, int | None]] = []
        self._numbers: list[tuple[str, dict[str, Any], str, float]] = []
        self._adapters: list[tuple[str, Any, Any]] = []

    @classmethod
    def over(cls, model: torch.nn.Module) -> Watch:
        """Watch all of a model that decides what it computes."""
        watch = cls()
        for path, module in model.named_modules(remove_duplicate=False):
            watch.module(model, path, module)
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                watch._hooks.append((path, hooks, tuple(hooks), vars(module), vars(module).get("forward")))
            for name, value in vars(module).items():
                if isinstance(value, float):
                    watch.number(path, module, name)
        return watch

    def module(self, root: torch.nn.Module, path: str, module: Any) -> None:
        """Watch a module's place in its parent, its own tensors and its adapters."""
        parent, _, name = path.rpartition(".")
        if path:
            self._modules.append((path, root.get_submodule(parent)._modules, name, module, type(module)))
        for name, tensor in module._parameters.items():
            if tensor is not None:
                self.tensor(f"{path}.{name}", module._parameters, name, tensor)
        if hasattr(module, "base_layer"):
            self._adapters.append((path, module, _adapters_of(module)))

    def plain(self, path: str, module: Any, *, output: bool) -> None:
        """Watch that a module stays without a forward of its own and without hooks, or without those on its input."""
        self._plain.append(path)
        self._no_hooks += (module._forward_hooks if output else {}, module._forward_pre_hooks)
        self._no_forward.append(vars(module))

    def number(self, path: str, module: Any, name: str) -> None:
        self._numbers.append((f"{path}.{name}", vars(module), name, getattr(module, name)))

    def tensor(self, path: str, tensors: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        self._tensors.append((path, tensors, name, tensor, tensor.data_ptr(), version_of(tensor)))

    def changed(self) -> str | None:
        """Return what is not as it was, or None."""
        for path, modules, name, module, kind in self._modules:
            if modules.get(name) is not module or type(module) is not kind:
                return path
        if any(self._no_hooks) or any(map(contains, self._no_forward, repeat("forward"))):
            hooked = (
                path
                for path, hooks, pre_hooks, attributes in zip(
                    self._plain, self._no_hooks[::2], self._no_hooks[1::2], self._no_forward, strict=True
                )
                if hooks or pre_hooks or "forward" in attributes
            )
            return f"{next(hooked)}, which has hooks or a forward of its own"
        for path, hooks, before, attributes, forward in self._hooks:
            if len(hooks) != len(before) or tuple(hooks) != before or attributes.get("forward") is not forward:
                return f"{path}, which has other hooks or another forward"
        for path, attributes, name, number in self._numbers:
            if attributes.get(name) != number:
                return path
        for path, tensors, name, tensor, address, version in self._tensors:
            if (
                tensors.get(name) is not tensor
                or tensor.data_ptr() != address
                or (version is not None and tensor._version != version)
            ):
                return path
        for path, module, adapters in self._adapters:
            if _adapters_of(module) != adapters:
                return f"the adapters of {path}"
        return None


class Reading:
    """The state of what a :class:`Decoder` was read from.

    Args:
        decoder: what was read of the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._depth = decoder, decoder.config.num_hidden_layers
        self._invalidations = _invalidations.get(decoder.model, 0)
        self._watch = watch = Watch()
        for path, module in decoder.base.named_modules(remove_duplicate=False):
            if not _READ.fullmatch(path):
                continue
            watch.module(decoder.base, path, module)
            layer = _LAYER.match(path)
            if layer is None or not is_its_weights(decoder.layers[int(layer[1])]):
                continue  # it runs as it is
            read = bool(_READ_IN_PLACE_OF_CALLING.search(path))
            if read or path.endswith("self_attn") or layer[0] == path:
                watch.plain(path, module, output=read)
            if read and hasattr(module, decoder.family.norm_eps):
                watch.number(path, module, decoder.family.norm_eps)
        if not decoder.rope_varies:  # where the model itself replaces them
            for name, frequencies in decoder.rotary._buffers.items():
                watch.tensor(f"rotary_emb.{name}", decoder.rotary._buffers, name, frequencies)
            for name in vars(decoder.rotary):
                if name.endswith("attention_scaling"):
                    watch.number("rotary_emb", decoder.rotary, name)

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
        if _invalidations.get(decoder.model, 0) != self._invalidations:
            raise _changed("its weights, as ds.invalidate says")
        if (what := self._watch.changed()) is not None:
            raise _changed(what)


_invalidations: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def invalidate(model: Any) -> None:
    """Have a model be read and hashed anew, because it was changed in a way that leaves no trace.

    Seen without this are modules and weights that were replaced, moved or written to in place, adapters, hooks, and numbers
    such as the eps of a norm. Writes through ``.data`` are seen only in part, and those in inference mode to weights made in it
    not at all.

    Args:
        model: a transformers model, or a PEFT model around one. Each :class:`Receiver` of it is refused from then on.
    """
    inner = decoder_model(model)
    _invalidations[inner] = _invalidations.get(inner, 0) + 1
    forget_digests(inner)


def _adapters_of(module: Any) -> tuple[Any, ...]:
    return active_adapters(module), list(module.merged_adapters), dict(module.scaling), module.disable_adapters


def _changed(what: str) -> ReuseError:
    return ReuseError(
        f"receiver: expected the model as it was read, got another state of {what}; make a ds.Receiver of the model as it is"
    )
