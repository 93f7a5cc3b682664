"""Projections that are more than their weights, by hooks, own forwards, pruning or parametrisations: the layer runs."""

import copy
from functools import partial

import pytest
import torch
from support.models import fine_tuned, tiny, tiny_llama, tokens
from support.prefills import assert_is_own_prefill, own_prefill, prefill
from torch import nn
from torch.nn.utils import prune

import droidspeak_ops as ds
from droidspeak_ops.fitting.run import fit

LAYERS = 6
PLANS = [ds.Plan([(0, LAYERS)]), ds.Plan([(2, 4)]), ds.Plan(project="rest"), ds.Plan([(1, 3)], project=[4, 5])]


def scale(module, args, output):
    return output * 1.3


def hooked(layer, name: str) -> None:
    layer.get_submodule(name).register_forward_hook(scale)


def pre_hooked(layer, name: str) -> None:
    layer.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] * 1.1 + 0.2, *args[1:]))


def written_in_place(layer, name: str) -> None:
    def hook(module, args):
        args[0].mul_(1.1).add_(0.2)

    layer.get_submodule(name).register_forward_pre_hook(hook)


def replaced(layer, name: str) -> None:
    module = layer.get_submodule(name)
    forward = module.forward
    module.forward = lambda rows: forward(rows) * 1.3


def pruned(layer, name: str) -> None:
    prune.l1_unstructured(layer.get_submodule(name), "weight", amount=0.3)


def parametrised(layer, name: str) -> None:
    nn.utils.parametrizations.weight_norm(layer.get_submodule(name))
    with torch.no_grad():
        layer.get_submodule(name).parametrizations.weight.original0.mul_(1.3)


def replaced_attention(layer, name: str) -> None:
    forward = layer.self_attn.forward
    layer.self_attn.forward = lambda hidden_states, **options: forward(hidden_states=hidden_states * 1.1, **options)


CHANGES = [
    partial(hooked, name="self_attn.k_proj"),
    partial(hooked, name="self_attn.v_proj"),
    partial(hooked, name="input_layernorm"),
    partial(pre_hooked, name=""),
    partial(pre_hooked, name="input_layernorm"),
    partial(pre_hooked, name="self_attn.v_proj"),
    partial(written_in_place, name=""),
    partial(written_in_place, name="input_layernorm"),
    partial(replaced, name="self_attn.k_proj"),
    partial(replaced_attention, name="self_attn"),
    partial(pruned, name="self_attn.v_proj"),
    partial(parametrised, name="self_attn.k_proj"),
    partial(hooked, name="mlp"),
]


def changed(model: nn.Module, change) -> nn.Module:
    for index in (2, 3, LAYERS - 1):
        change(model.model.layers[index])
    return model


@pytest.mark.parametrize(
    "change", CHANGES, ids=lambda change: f"{change.func.__name__} {change.keywords['name'] or 'layer'}"
)
def test_what_a_model_computes_is_what_is_reused_and_projected(change) -> None:
    model, ids, suffix = tiny_llama(layers=LAYERS), tokens(20), tokens(5)
    plain = own_prefill(model, ids).layers[LAYERS - 1].keys
    assert not torch.equal(own_prefill(changed(model, change), ids).layers[LAYERS - 1].keys, plain)
    context = ds.capture(model, ids, layers=range(1, LAYERS))
    states = {layer: context.hidden(layer).clone() for layer in range(1, LAYERS)}
    for receiver in (model, ds.Receiver(model)):
        for plan in PLANS:
            cache = ds.partial_prefill(receiver, context, plan)
            for ours, theirs in zip(cache.layers, own_prefill(model, ids).layers, strict=True):
                torch.testing.assert_close(ours.keys, theirs.keys)
                torch.testing.assert_close(ours.values, theirs.values)
            if plan is PLANS[0]:
                assert_is_own_prefill(model, cache, ids, suffix)
    for layer, before in states.items():
        assert torch.equal(context.hidden(layer), before), "a hook wrote to the context"


@pytest.mark.parametrize("family", ["olmo2", "phi3", "gemma3_text", "gpt_oss"])
def test_of_other_families(family: str) -> None:
    sender = tiny(family, LAYERS)
    receiver = fine_tuned(sender, 0.3)
    for layer in (1, LAYERS - 1):
        attention = receiver.model.layers[layer].self_attn
        (attention.qkv_proj if family == "phi3" else attention.v_proj).register_forward_hook(scale)
    ids, suffix = tokens(20, batch=2), tokens(5, batch=2)
    assert_is_own_prefill(receiver, prefill(sender, receiver, ids, PLANS[0]), ids, suffix)
    prefill(sender, receiver, ids, PLANS[3])


def test_a_hook_runs_once() -> None:
    calls: list[int] = []
    sender, receiver = tiny_llama(layers=LAYERS), tiny_llama(layers=LAYERS)
    receiver.model.layers[3].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    for plan in PLANS[:3]:
        calls.clear()
        prefill(sender, receiver, tokens(9), plan)
        assert calls == [9]


def test_hooks_are_part_of_a_models_identity() -> None:
    """Nothing that was fitted to a model or measured of it serves the same weights with other hooks."""
    model = tiny_llama(layers=LAYERS)

    def name() -> str | None:
        return ds.capture(model, tokens(4)).sender.weights

    plain = name()
    handle = model.model.layers[2].mlp.register_forward_hook(scale)
    assert name() != plain
    handle.remove()
    assert name() == plain
    model.model.norm.variance_epsilon *= 2
    assert name() != plain
    model.model.norm.variance_epsilon /= 2
    model(tokens(4), output_hidden_states=True)  # for which transformers puts hooks of its own
    assert name() == plain == ds.capture(copy.deepcopy(model), tokens(4)).sender.weights


def test_maps_are_not_fitted_to_hooks() -> None:
    sender = tiny_llama(layers=LAYERS)
    receiver = changed(fine_tuned(sender, 0.3), CHANGES[0])
    examples = [ds.Example.cut(tokens(40), 8) for _ in range(3)]
    with pytest.raises(ds.UnsupportedModelError, match="receiver: expected layers whose weights .* in layer 2"):
        fit(sender, receiver, examples, steps=0, show_progress=False)
