"""The operators as torch operators: registration, compilation, autograd, what they accept and what they refuse."""

import pytest
import torch
from cases import Projection, poisoned, projection
from compare import assert_bitwise_equal, assert_close
from models import tiny_llama, tokens

from droidspeak_ops import ops

OPS = torch.ops.droidspeak_ops


def call(case: Projection, **changes) -> None:
    """The public function with the arguments of a case, rows taken as they are."""
    arguments = {**case.arguments, "norm": "none", **changes}
    arguments["hidden_states"] = arguments.pop("x")
    ops.kv_project(**arguments)


@pytest.mark.parametrize(
    "options", [{}, {"rstd": True, "bias": True, "k_norm": True, "paged": True}, {"strided": True}]
)
def test_opcheck_kv_project(options) -> None:
    case = projection(tokens=9, scattered=True, **options)
    torch.library.opcheck(OPS.kv_project.default, tuple(case.arguments.values()))


def test_opcheck_others() -> None:
    x, weight = torch.randn(5, 16), torch.randn(16)
    torch.library.opcheck(OPS.rms_rstd.default, (x, 1e-6, torch.empty(5)))
    torch.library.opcheck(OPS.row_norm.default, (x, weight, 1e-6, torch.empty(5, 16)))
    k, v, caches = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), torch.zeros(2, 1, 2, 8, 16)
    torch.library.opcheck(OPS.kv_splice.default, (k, v, None, None, torch.arange(5), caches[0], caches[1]))


def test_compiled_in_one_graph() -> None:
    case = projection(tokens=9, scattered=True, rotary_dim=32)
    norm_weight = torch.rand(48)

    def function(x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        call(case, x=x * 2, k_cache=k_cache, v_cache=v_cache, norm="hf", norm_weight=norm_weight)
        ops.kv_splice(k_cache[:, :, :3] + 1, v_cache[:, :, :3] + 1, k_cache, v_cache, torch.arange(6, 9))
        return k_cache.nan_to_num().sum() + ops.rms_rstd(x, 1e-6).sum()

    eager, compiled = case.with_new_caches(), case.with_new_caches()
    expected = function(case.arguments["x"], *eager.caches)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(case.arguments["x"], *compiled.caches)
    assert_close(actual, expected)
    for one, other in zip(compiled.caches, eager.caches, strict=True):
        assert_bitwise_equal(one, other)


def test_weights_that_want_a_gradient_are_read_without_one() -> None:
    case = projection(tokens=9)
    changes = {name: torch.nn.Parameter(case.arguments[name]) for name in ("k_weight", "v_weight")}
    call(case, **changes)
    for cache in case.caches:
        assert not cache.requires_grad


@pytest.mark.parametrize("shape", [(9, 48), (3, 3, 48), (1, 9, 48)])
def test_leading_dimensions_are_tokens(shape: tuple[int, ...]) -> None:
    case = projection(tokens=9)
    flat = case.with_new_caches()
    call(case, x=case.arguments["x"].view(shape))
    call(flat)
    for one, other in zip(case.caches, flat.caches, strict=True):
        assert_bitwise_equal(one, other)


def test_norms_are_those_of_the_reference_and_of_transformers() -> None:
    layer = tiny_llama().model.layers[0]
    x = torch.randn(2, 7, 48)
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(torch.rand(48))
        assert_bitwise_equal(ops.row_norm(x, layer.input_layernorm.weight, 1e-6), layer.input_layernorm(x))
    assert_close(ops.rms_rstd(x, 1e-6), (x.double().pow(2).mean(-1) + 1e-6).rsqrt().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_is_that_of_transformers(dtype: torch.dtype) -> None:
    """Bitwise, through the layer's own modules and transformers' own RoPE."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = tiny_llama().to(dtype).model
    layer, x = model.layers[2], model.embed_tokens(tokens(19)).detach()
    cos, sin = model.rotary_emb(x, position_ids=torch.arange(19)[None])
    with torch.no_grad():
        normed = layer.input_layernorm(x)
        k, v = (
            proj(normed).view(1, 19, 2, 64).transpose(1, 2) for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    caches = [poisoned((1, 2, 19, 64), dtype, "cpu") for _ in range(2)]
    attention, norm = layer.self_attn, layer.input_layernorm
    ops.kv_project(
        x, attention.k_proj.weight, attention.v_proj.weight, *caches, torch.arange(19),
        norm_weight=norm.weight, norm_eps=norm.variance_epsilon, cos=cos[0, :, :32], sin=sin[0, :, :32],
    )  # fmt: skip
    assert_bitwise_equal(caches[0], k)
    assert_bitwise_equal(caches[1], v)


@pytest.mark.parametrize("given", [False, True])
def test_folded_norm_is_the_norm(given: bool) -> None:
    case, weight = projection(tokens=9, bias=True), torch.rand(48)
    folded = case.with_new_caches()
    call(case, norm="hf", norm_weight=weight, norm_eps=1e-5)
    changes = {name: ops.fold_norm_weight(case.arguments[name], weight) for name in ("k_weight", "v_weight")}
    rstd = ops.rms_rstd(case.arguments["x"], 1e-5) if given else None
    call(folded, norm="folded", norm_eps=1e-5, rstd=rstd, **changes)
    for one, other in zip(folded.caches, case.caches, strict=True):
        assert_close(one[:, :, :9], other[:, :, :9])


def test_splice_moves_rows_between_layouts_and_turns_keys() -> None:
    """From a dense cache to pages, K turned by a shift of position: the same as rotating by the sum of the angles."""
    from droidspeak_ops.reference import rope_ref

    k, v = torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    angles, shift = torch.rand(9, 8) * 6, torch.rand(9, 8) * 6
    dense_k, dense_v = (rows.transpose(0, 1)[None] for rows in (rope_ref(k, angles.cos(), angles.sin()), v))
    pages = [poisoned((3, 4, 2, 16), torch.float32, "cpu").transpose(1, 2) for _ in range(2)]
    slots = torch.tensor([11, 3, 4, 0, -1, 7, 2, 9, 5])
    ops.kv_splice(dense_k, dense_v, *pages, slots, cos=shift.cos(), sin=shift.sin())
    expected = rope_ref(k, (angles + shift).cos(), (angles + shift).sin())
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert_close(pages[0][slot // 4, :, slot % 4], expected[token], operations=4)
            assert_bitwise_equal(pages[1][slot // 4, :, slot % 4], v[token])
    for unused in (1, 6, 8, 10):
        assert pages[0][unused // 4, :, unused % 4].isnan().all()


# --- what is refused -----------------------------------------------------------------------------------------------


def wrong_slots(*slots: int) -> dict[str, torch.Tensor]:
    return {"slot_mapping": torch.tensor(slots)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(9, 47)}, r"k_weight: got torch.float32 \(128, 48\).*\(128, 47\)"),
        ({"x": torch.zeros(9, 48, dtype=torch.float64)}, "hidden_states: got torch.float64"),
        ({"x": torch.zeros(48, 9).T}, "hidden_states: got .* last stride of 1"),
        ({"k_weight": torch.zeros(128, 48, dtype=torch.float16)}, "k_weight: got torch.float16"),
        ({"v_weight": torch.zeros(64, 48)}, r"v_weight: got torch.float32 \(64, 48\).*\(128, 48\)"),
        ({"v_weight": torch.zeros(48, 128).T}, "v_weight: got .* last stride of 1"),
        ({"k_weight": torch.zeros(128, 48, device="meta")}, "k_weight: got .* on meta"),
        ({"k_bias": torch.zeros(128)}, "k_bias and v_bias: one is given"),
        ({"k_bias": torch.zeros(64), "v_bias": torch.zeros(128)}, "k_bias: got"),
        ({"k_norm_weight": torch.zeros(32)}, r"k_norm_weight: got .*\(32,\)"),
        ({"cos": None}, "cos and sin: one is given"),
        ({"cos": torch.zeros(9, 33), "sin": torch.zeros(9, 33)}, "cos: got .* 0 < R <= 64"),
        ({"cos": torch.zeros(8, 32)}, r"cos: got .*\(9, 32\)"),
        ({"sin": torch.zeros(9, 16)}, r"sin: got .*\(9, 16\)"),
        ({"k_cache": torch.zeros(2, 14, 64)}, "k_cache: got"),
        ({"k_cache": torch.zeros(1, 2, 14, 64, dtype=torch.int8)}, "k_cache: got torch.int8"),
        ({"v_cache": torch.zeros(1, 2, 13, 64)}, r"v_cache: got .*\(1, 2, 13, 64\)"),
        ({"v_cache": torch.zeros(1, 2, 14, 64).half()}, "v_cache: got torch.float16; torch.float32"),
        ({"slot_mapping": torch.arange(8)}, r"slot_mapping: got torch.int64 \(8,\).*\(9,\)"),
        ({"slot_mapping": torch.arange(9).int()}, "slot_mapping: got torch.int32"),
        ({"slot_mapping": torch.arange(18)[::2]}, "slot_mapping: got stride 2"),
        (wrong_slots(0, 1, 2, 3, 4, 5, 6, 7, 14), "slots from 0 to 14; -1 to 13"),
        (wrong_slots(-2, 1, 2, 3, 4, 5, 6, 7, 8), "slots from -2 to 8"),
        (wrong_slots(0, 1, 2, 3, 3, 5, 6, 7, 8), "a slot more than once"),
        ({"norm": "rms"}, "norm: got 'rms'"),
        ({"norm": "hf"}, "norm_weight: missing with norm='hf'"),
        ({"norm_weight": torch.ones(48)}, "norm_weight: given with norm='none'"),
        ({"rstd": torch.ones(9)}, "rstd: given with norm='none'"),
        ({"norm": "folded", "rstd": torch.ones(8)}, r"rstd: got torch.float32 \(8,\)"),
        ({"norm": "hf", "norm_weight": torch.ones(47)}, "weight: got"),
    ],
)
def test_wrong_arguments_of_kv_project_are_named(changes, message: str) -> None:
    case = projection(tokens=9)
    with pytest.raises(ValueError, match=message):
        call(case, **changes)
    for cache in case.caches:
        assert cache.isnan().all(), "nothing was written"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 9, 16)}, "k: got"),
        ({"k": torch.zeros(1, 3, 9, 16)}, r"k: got .*\(1, 3, 9, 16\).*\(1, 2, 9, 16\)"),
        ({"v": torch.zeros(1, 2, 8, 16)}, r"v: got .*\(1, 2, 8, 16\)"),
        ({"v": torch.zeros(1, 2, 9, 16).half()}, "v: got torch.float16"),
        (
            {"k": torch.zeros(1, 2, 9, 16).double(), "v": torch.zeros(1, 2, 9, 16).double()},
            "k: got dtype torch.float64",
        ),
        ({"slot_mapping": torch.arange(12)}, "slot_mapping: got"),
        ({"slot_mapping": torch.arange(4, 13)}, "slots from 4 to 12; -1 to 11"),
        ({"cos": torch.zeros(9, 8)}, "cos and sin"),
    ],
)
def test_wrong_arguments_of_kv_splice_are_named(changes, message: str) -> None:
    arguments = {"k": torch.zeros(1, 2, 9, 16), "v": torch.zeros(1, 2, 9, 16), "slot_mapping": torch.arange(9)}
    caches = {name: poisoned((1, 2, 12, 16), torch.float32, "cpu") for name in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=message):
        ops.kv_splice(**{**arguments, **changes}, **caches)
    assert all(cache.isnan().all() for cache in caches.values())


def test_splice_from_the_cache_itself_is_refused() -> None:
    cache = torch.zeros(2, 1, 2, 12, 16)
    with pytest.raises(ValueError, match="k: shares memory with k_cache"):
        ops.kv_splice(cache[0][:, :, :4], cache[1][:, :, :4], cache[0], cache[1], torch.arange(4, 8))
