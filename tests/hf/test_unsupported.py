"""Models that are refused by name: another family, or a module that is not what its family says."""

import pytest
import torch
import transformers
from support.models import tiny, tiny_llama, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import droidspeak_ops as ds

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("cohere", AutoModelForCausalLM, {}),  # LayerNorm
        ("mamba", AutoModelForCausalLM, {}),  # a recurrence
        ("qwen3_next", AutoModelForCausalLM, {}),  # linear attention
        ("jamba", AutoModelForCausalLM, {}),  # both
        ("t5", AutoModelForSeq2SeqLM, {"d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2}),
        ("gemma3n_text", AutoModelForCausalLM, {"num_kv_shared_layers": 2}),  # layers that share K and V
        ("gpt2", AutoModelForCausalLM, {"n_embd": 32, "n_head": 2, "n_layer": 2}),  # learned positions
    ],
)
def test_families_that_are_refused_by_name(family: str, kind, options: dict) -> None:
    config = AutoConfig.for_model(family, **{**SMALL, "bos_token_id": 1, "eos_token_id": 2, **options})
    model = kind.from_config(config).eval()
    with pytest.raises(ds.UnsupportedModelError, match=f"expected one of .*'llama'.* got the family '{family}'"):
        ds.capture(model, tokens(4))


def test_no_model_at_all() -> None:
    with pytest.raises(ds.UnsupportedModelError, match="got the family 'Linear'"):
        ds.capture(nn.Linear(2, 2), tokens(4))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_attention_in_both_directions_is_refused(family: str) -> None:
    model = tiny(family, use_bidirectional_attention=True)
    with pytest.raises(ds.UnsupportedModelError, match="layer 0 self_attn: expected causal attention"):
        ds.capture(model, tokens(4))


def test_another_kind_of_cache_is_refused() -> None:
    model = tiny_llama(layer_types=["full_attention"] * 5 + ["linear_attention"])
    with pytest.raises(ds.UnsupportedModelError, match="layer 5: expected .*got the cache LinearAttentionLayer"):
        ds.capture(model, tokens(4))


class LlamaAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    """A class of transformers' name that is somebody else's."""


def _layer_norm(layer: nn.Module) -> None:
    layer.input_layernorm = nn.LayerNorm(48)


def _own_attention(layer: nn.Module) -> None:
    layer.self_attn = LlamaAttention(layer.self_attn.config, 3)


def _norm_of_keys(layer: nn.Module) -> None:
    layer.self_attn.k_norm = nn.RMSNorm(64)


def _other_projection(layer: nn.Module) -> None:
    layer.self_attn.k_proj = nn.Linear(48, 64, bias=False)


def _quantised(layer: nn.Module) -> None:
    layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj)


def _narrow_norm(layer: nn.Module) -> None:
    layer.input_layernorm.weight = nn.Parameter(torch.ones(47))


def _no_norm(layer: nn.Module) -> None:
    del layer.input_layernorm


def _offloaded(layer: nn.Module) -> None:
    layer.self_attn.k_proj.to("meta")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_offloaded, "self_attn.k_proj: expected weights in memory, got offloaded ones"),
        (_layer_norm, "input_layernorm: expected transformers' LlamaRMSNorm, got LayerNorm"),
        (_own_attention, "self_attn: expected transformers' LlamaAttention, got LlamaAttention"),
        (_norm_of_keys, "self_attn: expected no norm of K in this family"),
        (
            _other_projection,
            r"self_attn.k_proj: expected a torch.nn.Linear with \(128, 48\), got Linear with weight \(64, 48\)",
        ),
        (_quantised, r"self_attn.v_proj: expected .*got Sequential"),
        (_narrow_norm, r"input_layernorm: expected \(48,\), got a weight \(47,\)"),
        (_no_norm, "input_layernorm: expected one in this family"),
    ],
)
def test_a_module_that_is_not_what_its_family_says(change, match: str) -> None:
    model = tiny_llama()
    change(model.model.layers[3])
    with pytest.raises(ds.UnsupportedModelError, match=f"layer 3 {match}"):
        ds.capture(model, tokens(4))


def test_a_dynamically_quantised_model_is_refused_by_name() -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny_llama(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ds.UnsupportedModelError, match="layer 0 self_attn.k_proj: expected .*got Linear"):
        ds.capture(model, tokens(4))


def test_a_model_that_is_being_trained() -> None:
    """Gradient checkpointing would leave layers without K and V; dropout makes them random, and is said."""
    model = tiny_llama()
    context = ds.capture(model, tokens(4))
    ds.capture(model.train(), tokens(4))  # without either it computes the same
    model.gradient_checkpointing_enable()
    with pytest.raises(ds.UnsupportedModelError, match="training mode with gradient checkpointing"):
        ds.partial_prefill(model, context, ds.Plan([(0, 6)]))
    model.gradient_checkpointing_disable()
    model.model.layers[2].self_attn.attention_dropout = 0.1
    with pytest.warns(UserWarning, match="dropout makes K and V random"):
        ds.capture(model, tokens(4))
