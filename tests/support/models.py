"""Tiny random models."""

from __future__ import annotations

import copy
from pathlib import Path

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


# What makes a tiny model of each family one of its kind: windows shorter than a test's sequence, caps and multipliers
# that matter, layers that differ. Families with a switch for windows have them off, as most of their released models
# do: `use_sliding_window=True` turns them on.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"sliding_window": 8, "max_window_layers": 2},
    "gemma2": {
        "tie_word_embeddings": False,  # greedy tokens vary only then
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        "attn_implementation": "eager",  # SDPA does not cap scores, and not every version of transformers says so
    },
    "gemma3_text": {
        "tie_word_embeddings": False,  # greedy tokens vary only then
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 10.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
        },
    },
    "phi3": {
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.15,
        "logits_scaling": 2.5,
    },
    "smollm3": {"sliding_window": 8, "no_rope_layer_interval": 3},
    "mixtral": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "sliding_window": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def tiny(family: str, layers: int = 6, **changes) -> PreTrainedModel:
    """A model of a family, with weights that no initialisation leaves at 0 or 1, or as memory happened to be."""
    settings = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **settings | copy.deepcopy(FAMILIES[family]) | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    offset = 1.0 if family.startswith("gemma") else 0.0  # their norms multiply by 1 + weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5 - offset, 1.5 - offset)
            elif name.endswith("experts.gate_up_proj"):
                parameter.normal_(std=0.6)  # some values beyond 7, where gpt_oss clamps
            else:
                parameter.normal_(std=0.2)
    return model


def fine_tuned(model: LlamaForCausalLM, change: float = 0.05) -> LlamaForCausalLM:
    """The same model with every weight changed a little."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * change * parameter.std())
    return other


def tiny_pair(layers: int) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A sender and a fine-tune of it, the same at every call."""
    torch.manual_seed(0)
    sender = tiny_llama(head_dim=16, layers=layers)
    return sender, fine_tuned(sender, 0.1)


def tokens(count: int, batch: int = 1, vocabulary: int = 101) -> Tensor:
    return torch.randint(1, vocabulary, (batch, count))


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> str:
    """Save a model with a tokenizer of the words w1 to w99, so that it can be named on a command line."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, **{f"w{number}": number for number in range(1, 100)}}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)
