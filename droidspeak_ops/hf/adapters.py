"""Linear layers as they are read from a model: plain, or with adapters of PEFT that are not merged.

An unmerged LoRA adapter adds ``up(down(x))`` to the layer's output. It stays a product of low rank here: the projection's
rows are lengthened by ``down(x)`` and its weights by `up`, so one projection computes both without rounding in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from ..context.fingerprint import ReuseError
from ..prefill.weights import LowRank


class UnsupportedModelError(ValueError):
    """The model's family is not known, or the loaded model is not what its family should be."""


@dataclass(frozen=True)
class Linear:
    """``x Wᵀ + bias`` and the adapters that are active on it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    low_rank: tuple[LowRank, ...] = ()

    def rows(self, start: int, end: int) -> Linear:
        """The rows of a fused projection that belong to one of its parts."""
        adapters = tuple(LowRank(each.down, each.up[start:end]) for each in self.low_rank)
        return Linear(self.weight[start:end], None if self.bias is None else self.bias[start:end], adapters)


def read_linear(parent: nn.Module, name: str, where: str, shape: tuple[int, int]) -> Linear:
    """Read a linear layer of a given shape, and what PEFT has put around it.

    Raises:
        UnsupportedModelError: it is another module, or an adapter that computes something else than a sum of low rank.
    """
    module: Any = getattr(parent, name, None)
    where = f"{where}.{name}"
    adapted = _is_lora(module)
    base = module.base_layer if adapted else module
    # Exactly nn.Linear: a quantised layer, or another kind of adapter, computes something else from the same weight.
    weight = getattr(base, "weight", None)  # of a dynamically quantised layer it is a method
    size = tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
    if type_before_parametrizations(base) is not nn.Linear or size != shape:
        got = f"{type(base).__name__} with weight {size}"
        raise UnsupportedModelError(f"{where}: expected a torch.nn.Linear with {shape}, got {got}{merge_hint(module)}")
    for each in {base, module}:
        check_weights(each, where)
    if adapted and module.merged and module.disable_adapters:
        raise UnsupportedModelError(
            f"{where}: expected an adapter that is merged or disabled, got one that is both; unmerge it first"
        )
    active = [adapter for adapter in active_adapters(module) if adapter in module.lora_A] if adapted else []
    plain = [
        adapter for adapter in active if not _is_activated(module, adapter)
    ]  # others apply to what follows a context
    return Linear(base.weight, base.bias, tuple(_read_lora(module, adapter, where) for adapter in plain))


def check_weights(module: nn.Module, where: str) -> None:
    """Raise unless a module's weights are plain tensors in memory.

    Raises:
        UnsupportedModelError: they are offloaded, or of another kind, as quantised ones are.
    """
    weights = [weight for weight in module._parameters.values() if weight is not None]
    if hasattr(module, "_hf_hook") or any(weight.is_meta for weight in weights):
        raise UnsupportedModelError(
            f"{where}: expected weights in memory, got offloaded ones; load the model without offloading"
        )
    for weight in weights:
        if type(weight.data) is not torch.Tensor:
            raise UnsupportedModelError(f"{where}: expected plain tensors, got weights of {type(weight.data)}")


def changes_input(module: nn.Module) -> bool:
    """Return whether a module does something else first than its class says: by a hook, or a forward of its own."""
    return bool(module._forward_pre_hooks) or "forward" in module.__dict__


def changes_output(module: nn.Module) -> bool:
    """Return whether calling a module gives something else than its class makes of its weights."""
    return bool(module._forward_hooks) or changes_input(module) or is_parametrized(module)


def decoder_model(model: Any) -> Any:
    """The transformers model inside a compiled one or a PEFT model, whose adapters lie in its layers; any other as it is.

    Raises:
        UnsupportedModelError: the active adapter puts tokens of its own before the prompt.
    """
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            f"model: expected an adapter in layers, got {model.active_peft_config.peft_type.value}"
        )
    base = model.get_base_model()
    return getattr(base, "_orig_mod", base)


def first_adapted(model: nn.Module) -> Any:
    """Return the first of PEFT's wrappers in a model, which all have the same adapters active; None in a plain model."""
    return next((module for module in model.modules() if hasattr(module, "base_layer")), None)


def active_adapters(module: Any) -> list[str]:
    """The adapters that one of PEFT's wrappers applies as it stands, in their order; a merged one is in the weights."""
    if getattr(module, "merged", False) or module.disable_adapters:
        return []
    return list(module.active_adapters)


def merge_hint(module: Any) -> str:
    """Hint for an error about a module that has an adapter around it."""
    return "; merge the adapter into the model first" if hasattr(module, "base_layer") else ""


def effective_weights(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """The weights that a model computes with, by names that are the same with PEFT's layers around its own or without.

    Of adapters those that are active are among them, by place, order and scaling rather than by name.
    """
    weights: dict[str, torch.Tensor] = {}
    for path, module in _effective_modules(model):
        for tensors in (module._parameters, module._buffers):
            weights |= {
                f"{path}.{name}".lstrip("."): tensor
                for name, tensor in tensors.items()
                if tensor is not None and name not in module._non_persistent_buffers_set
            }
    return weights


def _effective_modules(module: Any, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield what computes in a model: of PEFT's wrappers what they wrap, at their own path, and what is active of adapters."""
    wrapped = next((module._modules[name] for name in _WRAPPED if module._modules.get(name) is not None), None)
    if wrapped is None:
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from _effective_modules(child, f"{path}.{name}".lstrip("."))
        return
    active = active_adapters(module) if hasattr(module, "active_adapters") else []
    if "modules_to_save" in module._modules:
        chosen = [name for name in active if name in module.modules_to_save]
        yield from _effective_modules(module.modules_to_save[chosen[0]] if chosen else wrapped, path)
        return
    for kind, child in module._modules.items():
        for place, adapter in enumerate(active):
            if child is wrapped or not isinstance(child, _BY_ADAPTER) or adapter not in child:
                continue
            settings = [getattr(module, name, {}).get(adapter) for name in ("scaling", "token_indices")]
            # A wrapper inside another has a path of its own, or one's adapters would hide the other's.
            where = f"{path}+{type(module).__name__}.{getattr(module, 'parameter_name', '')}.{kind}.{place}*{settings}"
            part = child[adapter]
            if isinstance(part, torch.Tensor):
                part = nn.ParameterList([part])
            yield from _effective_modules(part, where)
    yield from _effective_modules(wrapped, path)


_WRAPPED = ("base_layer", "original_module", "token_adapter")
"""Where PEFT's wrappers hold what they are around."""
_BY_ADAPTER = (nn.ModuleDict, nn.ParameterDict)


# Hooks of these change no number, or what they change is among the weights.
_KNOWN_HOOKS = ("accelerate.", "droidspeak_ops.", "peft.", "torch.nn.utils.prune", "transformers.")


def numbers_and_hooks(model: nn.Module) -> list[tuple[str, ...]]:
    """The numbers that modules hold beside their weights, such as eps and scales, and the names of hooks and own forwards.

    Paths are the same with PEFT's layers around a model's own or without; what an adapter adds is among the weights.
    """
    found: list[tuple[str, ...]] = []
    for path, module in _effective_modules(model):
        if "+" in path:  # of an adapter
            continue
        found += [(path, name, repr(value)) for name, value in vars(module).items() if isinstance(value, float)]
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            hooks.append(vars(module)["forward"])
        found += [(path, "hook", name) for name in map(_name, hooks) if not name.startswith(_KNOWN_HOOKS)]
    return found


def _name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _is_lora(module: Any) -> bool:
    kind = type(module)
    return kind.__name__ == "Linear" and kind.__module__.startswith("peft.tuners.lora")


def _read_lora(module: Any, adapter: str, where: str) -> LowRank:
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    variant = module.lora_variant.get(adapter)
    if variant is not None or up.bias is not None or module.fan_in_fan_out:
        got = type(variant).__name__ if variant is not None else "a bias of its own"
        raise UnsupportedModelError(
            f"{where}: expected a plain LoRA, got the adapter {adapter!r} with {got}; merge the adapter into the model first"
        )
    return LowRank(down.weight, up.weight * module.scaling[adapter])


def _is_activated(module: Any, adapter: str) -> bool:
    """Return whether an adapter is an activated LoRA (aLoRA), which applies from its invocation tokens on."""
    return type(module.lora_variant.get(adapter)).__name__.startswith("ALora")


def check_not_invoked(model: Any, input_ids: torch.Tensor, tokens: int) -> None:
    """Raise if an activated LoRA of the model applies to any of the first `tokens` of `input_ids` ``[B, N]``.

    Before its invocation tokens the model is its base, so the K/V of a context are the base's; it is their last occurrence
    that counts.

    Raises:
        ReuseError: the invocation tokens begin in the context.
    """
    sequences = {
        name: torch.tensor(config.alora_invocation_tokens, device=input_ids.device)
        for name, config in (getattr(model, "peft_config", None) or {}).items()
        if getattr(config, "alora_invocation_tokens", None)
    }
    if not sequences:
        return
    active = {name for module in model.modules() if hasattr(module, "base_layer") for name in active_adapters(module)}
    for name in active & sequences.keys():
        sequence = sequences[name]
        if input_ids.shape[1] < len(sequence):
            continue
        found = (input_ids.unfold(1, len(sequence), 1) == sequence).all(-1)
        behind = torch.arange(1, found.shape[1] + 1, device=found.device)
        last = (found * behind).amax(1)  # place of the last occurrence, counted from 1; 0 without one
        if bool(((last > 0) & (last <= tokens)).any()):
            raise ReuseError(
                f"context: expected the invocation tokens of the adapter {name!r} behind it, got them at token "
                f"{int(last[last > 0].min()) - 1}; from there on K and V are the adapter's"
            )
