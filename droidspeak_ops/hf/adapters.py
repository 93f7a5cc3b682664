"""Linear layers as they are read from a model: plain, or with adapters of PEFT that are not merged.

An unmerged LoRA adapter adds ``up(down(x))`` to the layer's output. It stays a product of low rank here: the projection's
rows are lengthened by ``down(x)`` and its weights by `up`, so one projection computes both without rounding in between.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    weights: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        if not (hasattr(module, "base_layer") or hasattr(module, "original_module")):  # PEFT's two kinds of wrappers
            continue
        active = active_adapters(module)
        own = {
            name.removeprefix(f"{path}."): weights.pop(name) for name in list(weights) if name.startswith(f"{path}.")
        }
        for name, tensor in own.items():
            part, _, rest = name.partition(".")
            adapter, _, rest_of_adapter = rest.partition(".")
            if part in ("base_layer", "original_module"):
                weights.setdefault(f"{path}.{rest}", tensor)
            elif part == "modules_to_save" and adapter in active:
                weights[f"{path}.{rest_of_adapter}"] = tensor
            elif adapter in active:
                place = f"{active.index(adapter)}*{getattr(module, 'scaling', {}).get(adapter, 1)}"
                weights[f"{path}.{part}.{place}.{rest_of_adapter}"] = tensor
    return weights


# Hooks of these change no number, or what they change is among the weights.
_KNOWN_HOOKS = ("accelerate.", "droidspeak_ops.", "peft.", "torch.nn.utils.prune", "transformers.")


def numbers_and_hooks(model: nn.Module) -> list[tuple[str, ...]]:
    """The numbers that modules hold beside their weights, such as eps and scales, and the names of hooks and own forwards.

    Paths are the same with PEFT's layers around a model's own or without; what an adapter adds is among the weights.
    """
    found, wrappers = [], []
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            wrappers.append(f"{path}.")
            continue
        within = [each for each in wrappers if path.startswith(each)]
        parts = [path.removeprefix(each).partition(".")[0] for each in within]
        if any(part not in ("base_layer", "original_module") for part in parts):
            continue
        where = path.replace(".base_layer", "").replace(".original_module", "")
        found += [(where, name, repr(value)) for name, value in vars(module).items() if isinstance(value, float)]
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            hooks.append(vars(module)["forward"])
        found += [(where, "hook", name) for name in map(_name, hooks) if not name.startswith(_KNOWN_HOOKS)]
    return sorted(found)


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
