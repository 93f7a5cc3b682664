"""The slow decoder itself: equal to transformers' own models in every family."""

import pytest
import torch
from support.compare import assert_close
from support.models import FAMILIES, fine_tuned, tiny, tokens
from support.slow import SlowDecoder, slow_mixed
from transformers import DynamicCache, PreTrainedModel

LAYERS = 6
TOKENS = 21  # more than twice the windows

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
WITHOUT_WINDOWS = {"layer_types": ["full_attention"] * LAYERS}
CASES = [
    *((family, {}) for family in FAMILIES),
    *((family, {"sliding_window": None}) for family in ("mistral", "phi3", "mixtral")),
    *((family, {"use_sliding_window": True}) for family in ("qwen2", "qwen3", "smollm3", "qwen3_moe")),
    *((family, WITHOUT_WINDOWS) for family in ("gemma2", "gemma3_text", "gpt_oss")),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": True}),
    ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2}),
]
# Of the attention implementations here only the eager one caps scores and has sinks.
EAGER_ONLY = ("gemma2", "gpt_oss")
pytestmark = [
    pytest.mark.parametrize(
        ("family", "changes"), CASES, ids=[" ".join([family, *changes]) for family, changes in CASES]
    )
]


@pytest.fixture
def model(family: str, changes: dict) -> PreTrainedModel:
    return tiny(family, LAYERS, **changes)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_and_cache_are_those_of_transformers(model: PreTrainedModel, family: str, attention: str) -> None:
    if attention == "sdpa" and family in EAGER_ONLY:
        pytest.skip("eager attention only")
    model.set_attn_implementation(attention)
    ids, cache, slow = tokens(TOKENS), DynamicCache(), SlowDecoder(model)
    logits = model(ids, past_key_values=cache).logits[0]
    x = slow.embed(ids)
    for layer, theirs in enumerate(cache.layers):
        keys, values = slow.kv(layer, x)
        # Made without a config, the cache holds what is beyond the window too.
        assert_close(theirs.keys[0], torch.stack(keys), torch.float32, operations=layer + 1)
        assert_close(theirs.values[0], torch.stack(values), torch.float32, operations=layer + 1)
        x = slow.layer(layer, x)
    assert_close(logits, slow.logits(x), torch.float32, operations=LAYERS)


@torch.no_grad()
def test_continuing_after_past_is_one_pass(model: PreTrainedModel) -> None:
    ids, slow = tokens(TOKENS), SlowDecoder(model)
    first, rest = slow.embed(ids[:, :13]), slow.embed(ids[:, 13:])
    for layer in range(LAYERS):
        past = slow.kv(layer, first)
        first, rest = slow.layer(layer, first), slow.layer(layer, rest, past)
    assert_close(slow.logits(torch.cat([first, rest])), model(ids).logits[0], torch.float32, operations=LAYERS)


@torch.no_grad()
def test_recomputing_every_layer_is_the_receivers_prefill(model: PreTrainedModel) -> None:
    receiver = fine_tuned(model, 0.3)
    ids, suffix = tokens(13), tokens(8)
    _, logits = slow_mixed(SlowDecoder(model), SlowDecoder(receiver), ids, suffix, bands=[(0, LAYERS)], project=[])
    expected = receiver(torch.cat([ids, suffix], dim=1)).logits[0, 13:]
    assert_close(logits, expected, torch.float32, operations=LAYERS)
