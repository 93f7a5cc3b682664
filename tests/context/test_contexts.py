"""Contexts and what is made of them: 8-bit codes, other RoPE parameters, files, what a sender is called."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import assert_bitwise_equal, assert_close
from support.models import fine_tuned, tiny, tiny_llama, tokens
from support.prefills import own_prefill
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import droidspeak_ops as ds
from bench.fuzzing.wholes import make_context
from droidspeak_ops import tensor_file
from droidspeak_ops.context.kv import KV

LAYERS = 4
EVERYTHING = ds.Plan([(0, LAYERS)])


# --- 8 bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_bytes_of_a_context_in_8_bits(dtype: torch.dtype) -> None:
    context = ds.capture(tiny_llama(layers=LAYERS), tokens(30), layers=[1, 3]).quantized(dtype)
    heads, rows, columns = 2 * 30, 64, 4
    kv = 2 * LAYERS * heads * (rows + columns)  # a code each, a float32 scale a row
    assert context.nbytes == kv + 2 * 30 * (48 + 48 // 8 * columns)  # hidden states in groups of 8 here


def test_hidden_states_in_8_bits_keep_small_columns_beside_huge_ones() -> None:
    """A few columns of a real residual stream are a thousand times the others."""
    model = tiny_llama(layers=LAYERS)
    context = ds.capture(model, tokens(9), layers=[2])
    states = context.hidden(2).clone()
    states[..., 0] *= 1000
    context = dataclasses.replace(context, hidden_states={2: states})
    for dtype in (torch.float8_e4m3fn, torch.int8):
        decoded = context.quantized(dtype).hidden(2)
        assert decoded.dtype == states.dtype
        assert ((decoded - states)[..., 8:].abs() < 0.07 * states[..., 8:].abs().amax()).all()


def test_no_codes_of_codes() -> None:
    context = ds.capture(tiny_llama(layers=LAYERS), tokens(5))
    with pytest.raises(ValueError, match="dtype: expected .*got torch.int16 for rows of torch.float32"):
        context.quantized(torch.int16)
    with pytest.raises(ValueError, match="dtype: expected .* got torch.int8 for rows of torch.int8"):
        context.quantized(torch.int8).quantized(torch.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_8_bits_of_a_model_in_half_precision(dtype: torch.dtype) -> None:
    sender = tiny_llama(layers=LAYERS).to(dtype)
    context = ds.capture(sender, tokens(9), layers=range(LAYERS)).quantized(torch.int8)
    cache = ds.partial_prefill(sender, context, ds.Plan(project=[1]))
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    for ours, theirs in zip(cache.layers, own_prefill(sender, context.tokens).layers, strict=True):
        assert (ours.keys - theirs.keys).float().pow(2).mean() < 1e-3 * theirs.keys.float().pow(2).mean()


# --- RoPE --------------------------------------------------------------------------------------------------------------


def rescaled(model, **parameters):
    """The same weights with other RoPE parameters."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, **parameters}
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_theta": 5e5},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},  # scales cos and sin as well
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=["theta", "linear", "yarn", "dynamic"],
)
def test_the_first_layer_is_exact_whatever_the_senders_rope(parameters: dict) -> None:
    """Its K and V depend on the embeddings alone, so reusing them must be the receiver's own prefill."""
    receiver = tiny_llama(layers=LAYERS)
    for sender, reader in ((rescaled(receiver, **parameters), receiver), (receiver, rescaled(receiver, **parameters))):
        ids = tokens(40)
        context = ds.capture(sender, ids)
        cache, own = ds.partial_prefill(reader, context, ds.Plan()), own_prefill(reader, ids)
        assert_close(cache.layers[0].keys, own.layers[0].keys, torch.float32, operations=2)
        assert_bitwise_equal(cache.layers[0].values, own.layers[0].values)
        if "dynamic" not in parameters.values():  # which only changes beyond the length that was trained
            assert (context.kv(0).keys - own.layers[0].keys).abs().max() > 0.1


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1 + 0.01 * i for i in range(32)],
    "long_factor": [1 + 0.5 * i for i in range(32)], "original_max_position_embeddings": 16,
}  # fmt: skip


def _shorter(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 32
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def _has_read_more(model: Any) -> Any:
    other = copy.deepcopy(model)
    own_prefill(other, tokens(90))
    return other


def _set_by_hand(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.model.rotary_emb.inv_freq.div_(4)
    return other


def _rounded(model: Any) -> Any:
    other = copy.deepcopy(model)
    rotary = other.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    return other


@pytest.mark.parametrize(
    ("parameters", "positions", "change"),
    [
        (DYNAMIC, 64, _shorter),
        (DYNAMIC, 16, _has_read_more),
        (LONG, 64, _shorter),
        (PLAIN, 512, _set_by_hand),
        (PLAIN, 512, _rounded),
    ],
)
def test_keys_are_rotated_by_what_is_applied_not_by_what_is_configured(
    parameters: dict, positions: int, change: Any
) -> None:
    """The same `rope_parameters`, and other angles: K of layer 0, which depends on embeddings alone, must be the receiver's."""
    sender = tiny_llama(layers=LAYERS, rope_parameters=parameters, max_position_embeddings=positions)
    receiver = change(sender)
    assert receiver.config.rope_parameters == sender.config.rope_parameters
    ids = tokens(40)
    context, own = ds.capture(sender, ids), own_prefill(receiver, ids)
    assert (context.kv(0).keys - own.layers[0].keys).abs().max() > 1e-3
    cache = ds.partial_prefill(receiver, context, ds.Plan())
    assert_close(cache.layers[0].keys, own.layers[0].keys, torch.float32, operations=2)


def test_other_rope_and_8_bits_at_once() -> None:
    receiver = tiny_llama(layers=LAYERS)
    context = ds.capture(rescaled(receiver, rope_theta=5e5), tokens(40)).quantized(torch.int8)
    ours, theirs = (
        ds.partial_prefill(receiver, context, ds.Plan()).layers[0],
        own_prefill(receiver, context.tokens).layers[0],
    )
    assert (ours.keys - theirs.keys).pow(2).mean() < 1e-4 * theirs.keys.pow(2).mean()


# --- kept and moved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3"])  # one RoPE, two, and layers without
def test_a_context_comes_back_from_its_file(family: str, stored: torch.dtype | None, tmp_path: Path) -> None:
    sender = tiny(family, LAYERS)
    context = ds.capture(sender, tokens(20), layers=[1, 3])
    if stored is not None:
        context = context.quantized(stored)
    context.save(tmp_path / "context")
    loaded = ds.SharedContext.load(tmp_path / "context").to("cpu")
    assert loaded.sender == context.sender and loaded.hidden_layers == (1, 3)
    receiver, plan = fine_tuned(sender, 0.3), ds.Plan([(1, 3)], project=[3])
    ours, theirs = (ds.partial_prefill(receiver, each, plan) for each in (loaded, context))
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert_bitwise_equal(one.keys, other.keys)
        assert_bitwise_equal(one.values, other.values)
    assert [path.name for path in tmp_path.iterdir()] == ["context"]


def test_a_damaged_file_of_a_context_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "context"
    ds.capture(tiny_llama(layers=LAYERS), tokens(5)).save(path)
    whole = path.read_bytes()
    places = [*range(0, 8), *range(8, 1200, 17), *range(1200, len(whole), len(whole) // 97), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="context: expected (the digest|a file of droidspeak context)"):
            ds.SharedContext.load(path)
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="context: expected (the digest|a file of droidspeak context)"):
            ds.SharedContext.load(path)


def _rewritten(path: Path, values: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> None:
    """Write the context of a file again, with other values or tensors, or without some, and a digest that fits."""

    def make(old: dict[str, Any], held: tensor_file.Tensors) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return old, {name: held.take(name) for name in held.names}

    old, held = tensor_file.read(path, "context", dict[str, Any], make)
    kept = {name: tensor for name, tensor in (held | tensors).items() if tensor is not None}
    tensor_file.write(path, "context", old | values, kept)


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ({"layers": 10**15}, {}, "rotations: expected one for each layer of 1000000000000000, got 3"),
        ({"layers": 2, "rotations": [0, 0]}, {}, "keys_values: expected an entry for each layer of 3, got 2"),
        ({"hidden_layers": [1, 1]}, {}, "hidden_layers: expected every layer once"),
        ({"hidden_layers": [7]}, {"hidden.7.states": torch.ones(1, 5, 16)}, r"expected layers 0 to 2, got \[7\]"),
        ({"hidden_layers": []}, {}, "tensors: expected no others, got ..hidden.1.states"),
        ({"hidden_layers": [2]}, {}, "tensors: expected one named 'hidden.2.keys', got none"),
        ({"rotations": [0, 1, None]}, {}, "tensors: expected one named 'rotation.1.cos', got none"),
        ({"rotations": [None] * 3}, {}, "tensors: expected no others"),
        ({"owner": 1}, {}, "expected the fields sender, layers, hidden_layers, rotations, got .'owner'."),
        ({}, {"tokens": torch.full((1, 5), 50)}, "tokens: expected ids from 0 to 49, got others"),
        ({}, {"tokens": torch.full((1, 5), -1)}, "tokens: expected ids from 0 to 49, got others"),
        ({}, {"tokens": torch.ones(1, 5)}, "tokens: expected int64"),
        ({}, {"kv.1.keys": None}, "tensors: expected one named 'kv.1.keys', got none"),
        ({}, {"kv.1.k_scale": torch.ones(1, 2, 3)}, "layer 1: expected k_scale to be none, got torch.float32"),
        ({}, {"kv.3.keys": torch.ones(1)}, "tensors: expected no others, got ..kv.3.keys"),
    ],
)  # fmt: skip
def test_what_a_context_of_a_stranger_gets_wrong_is_named(
    values: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "context"
    make_context().save(path)
    _rewritten(path, values, tensors)
    with pytest.raises(ValueError, match=f"context: .*{message}"):
        ds.SharedContext.load(path)


# --- what a context is made of ---------------------------------------------------------------------------------------------


def _with_kv(layer: int, **parts: Any) -> Callable[[ds.SharedContext], dict[str, Any]]:
    def change(context: ds.SharedContext) -> dict[str, Any]:
        rows = list(context.keys_values)
        rows[layer] = rows[layer]._replace(**parts)
        return {"keys_values": rows}

    return change


def _with_sizes(**sizes: Any) -> Callable[[ds.SharedContext], dict[str, Any]]:
    def change(context: ds.SharedContext) -> dict[str, Any]:
        architecture = {**context.sender.architecture, **sizes}
        return {"sender": dataclasses.replace(context.sender, architecture=architecture)}

    return change


def _codes(rows: int, dtype: torch.dtype = torch.int8, scale: torch.dtype = torch.float32) -> KV:
    codes, scales = torch.ones(1, 2, rows, 4, dtype=dtype), torch.ones(1, 2, rows, dtype=scale)
    return KV(codes, codes, scales, scales)


HALVES = torch.ones(5, 2), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"tokens": torch.arange(5)}, r"tokens: expected int64 \[B, T\] of one token or more, got"),
        (lambda _: {"tokens": torch.ones(1, 0, dtype=torch.int64)}, r"tokens: .* got torch.int64 \(1, 0\)"),
        (lambda _: {"tokens": torch.arange(5, dtype=torch.int32)[None]}, "tokens: .* got torch.int32"),
        (lambda _: {"tokens": torch.arange(4)[None]}, "layer 0: expected keys of 1 to 4 tokens, got 5"),
        (lambda _: {"tokens": torch.arange(6)[None]}, "layer 0: expected keys of 6 tokens by its sliding window, got 5"),
        (lambda _: {"tokens": torch.ones(2, 5, dtype=torch.int64)}, r"layer 0: expected keys to be .* \(2, 2, 5, 4\)"),
        (lambda each: {"keys_values": each.keys_values[:2]}, "keys_values: expected an entry for each layer of 3, got 2"),
        (lambda each: {"rotations": each.rotations[:2]}, "rotations: expected an entry for each layer of 3, got 2"),
        (_with_sizes(num_hidden_layers=4), "keys_values: expected an entry for each layer of 4, got 3"),
        (_with_sizes(num_key_value_heads=4), r"layer 0: expected keys to be .*\(1, 4, 5, 4\), got .*\(1, 2, 5, 4\)"),
        (_with_sizes(head_dim=8), r"layer 0: expected keys to be torch.float32 \(1, 2, 5, 8\)"),
        (_with_sizes(hidden_size=32), r"hidden states of layer 1: expected torch.float32 \(1, 5, 32\), got .*\(1, 5, 16\)"),
        (_with_kv(1, keys=torch.ones(2, 5, 4)), r"layer 1: expected keys \[B, K, N, D\], got \(2, 5, 4\)"),
        (_with_kv(1, values=torch.ones(1, 2, 2, 4)), "layer 1: expected values to be"),
        (_with_kv(1, values=torch.ones(1, 2, 3, 4).half()), "layer 1: expected values to be .* got torch.float16"),
        (_with_kv(1, values=torch.ones(1, 2, 3, 4, device="meta")), "layer 1: expected values on cpu, as the tokens, got meta"),
        (_with_kv(1, keys=_codes(3).keys), "layer 1: expected values to be torch.int8"),
        (_with_kv(2, **_codes(5)._replace(k_scale=None)._asdict()), "layer 2: expected k_scale to be .*, got none"),
        (_with_kv(2, **_codes(5, scale=torch.float16)._asdict()), "layer 2: expected k_scale to be torch.float32"),
        (_with_kv(2, **_codes(5, torch.uint8)._asdict()), "layer 2: expected keys to be torch.float32 .* got torch.uint8"),
        (_with_kv(0, **_codes(4)._asdict()), "layer 0: expected keys of 5 tokens by its sliding window, got 4"),
        (lambda _: {"hidden_states": {3: torch.ones(1, 5, 16)}}, r"hidden_states: expected layers 0 to 2, got \[3\]"),
        (lambda _: {"hidden_states": {0: torch.ones(1, 4, 16)}}, r"layer 0: expected torch.float32 \(1, 5, 16\)"),
        (lambda _: {"hidden_states": {0: torch.ones(1, 5, 16).half()}}, "layer 0: expected torch.float32 .* got torch.float16"),
        (lambda _: {"hidden_states": {0: torch.ones(1, 5, 16, device="meta")}}, "layer 0: expected cpu, .* got meta"),
        (lambda _: {"hidden_states": {0: _codes(5)}}, "hidden states of layer 0: expected keys to be torch.int8 .1, 1, 5, 8."),
        (lambda _: {"hidden_states": {0: KV(*torch.ones(2, 1, 1, 5, 8))}}, "layer 0: expected keys to be in 8 bits"),
        (lambda _: {"rotations": [(torch.ones(4, 2),) * 2] * 3}, r"rotations: expected cos to be floating \(5, 1 to 2\)"),
        (lambda _: {"rotations": [(torch.ones(5, 3),) * 2] * 3}, "rotations: expected cos to be floating"),
        (lambda _: {"rotations": [(HALVES[0], torch.ones(5, 1))] * 3}, "rotations: expected sin to be floating"),
        (lambda _: {"rotations": [(HALVES[0], HALVES[1].long())] * 3}, "rotations: expected sin to be floating"),
        (lambda _: {"rotations": [None, tuple(half.to("meta") for half in HALVES), None]}, "rotations: expected cos on cpu"),
    ],
)  # fmt: skip
def test_a_context_whose_parts_do_not_fit_is_refused(change: Any, message: str) -> None:
    context = make_context()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(context, **change(context))


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
def test_values_are_looked_at_on_request(stored: torch.dtype | None) -> None:
    context = make_context()
    if stored is not None:
        context = context.quantized(stored)
    context.check_finite()
    places = {
        "layer 1: values": context.kv(1).values,
        "layer 0: sin": context.rotations[0][1],
        **({} if stored is None else {"layer 2: k_scale": context.kv(2).k_scale}),
    }
    held = context.hidden_states[1]
    places |= {"hidden states of layer 1: states": held} if stored is None else {"layer 1: v_scale": held.v_scale}
    for where, tensor in places.items():
        if tensor.dtype == torch.int8:
            continue
        before = tensor.clone()
        tensor[..., -1:] = torch.nan
        with pytest.raises(ds.ReuseError, match=f"{where}: expected finite values, got NaN or infinity"):
            context.check_finite()
        tensor.copy_(before)
    context.check_finite()


# --- what else ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "theirs", "match"),
    [
        ("mistral", {"sliding_window": 9}, "sliding_windows is"),
        ("gemma2", {"layer_types": ["full_attention"] * LAYERS}, "sliding_windows is"),
        ("smollm3", {"no_rope_layer_interval": 2, "no_rope_layers": None}, "layers_with_rope is"),
    ],
)
def test_layers_of_another_kind_are_refused(family: str, theirs: dict, match: str) -> None:
    context = ds.capture(tiny(family, LAYERS), tokens(5))
    with pytest.raises(ds.ReuseError, match=match):
        ds.partial_prefill(tiny(family, LAYERS, **theirs), context, ds.Plan())


def test_gemma3_with_its_vision_tower_reads_text() -> None:
    text = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=92)
    sender = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in sender.parameters():
            parameter.normal_(std=0.2)
    receiver = fine_tuned(sender, 0.3)
    ids = tokens(21, vocabulary=80)
    prompt = torch.cat([ids, tokens(3, vocabulary=80)], dim=1)
    cache = ds.partial_prefill(receiver, ds.capture(sender, ids), EVERYTHING)
    for ours, theirs in zip(cache.layers, own_prefill(receiver.model.language_model, ids).layers, strict=True):
        assert_bitwise_equal(ours.keys, theirs.keys)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    made = receiver.generate(prompt, past_key_values=cache, **options)
    assert torch.equal(made, receiver.generate(prompt, **options))

    ids[0, 2] = config.image_token_index
    with pytest.raises(ValueError, match="input_ids: expected .*got placeholders of an image .token 92."):
        ds.capture(sender, ids)


def _other_eps(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3


def _other_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()


def _other_scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 1.1


@pytest.mark.parametrize("change", [_other_eps, _other_activation, _other_scaling])
def test_what_a_model_is_called_is_of_what_it_computes(change: Any) -> None:
    """With the same weights: maps and frontiers of one are not those of the other."""
    model = tiny_llama(layers=LAYERS)
    before = ds.capture(model, tokens(3)).sender.weights
    assert ds.capture(copy.deepcopy(model), tokens(3)).sender.weights == before
    change(model)
    assert ds.capture(model, tokens(3)).sender.weights != before


def test_writing_through_data_changes_what_a_model_is_called() -> None:
    """It leaves no trace in torch's version counters."""
    model = tiny_llama(layers=LAYERS)
    before = ds.capture(model, tokens(3)).sender.weights
    model.model.layers[2].mlp.up_proj.weight.data.mul_(2)
    assert ds.capture(model, tokens(3)).sender.weights != before
