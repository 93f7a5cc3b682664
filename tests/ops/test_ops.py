"""The operators as torch operators: registration, compilation, autograd, and what they compute."""

import importlib
import itertools

import pytest
import torch
from support.cases import attention, call, poisoned, projection
from support.compare import assert_bitwise_equal, assert_close
from support.models import tiny_llama, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from droidspeak_ops import ops
from droidspeak_ops.kernels.arguments import Projection, to_operator
from droidspeak_ops.ops import library, tuning

OPS = torch.ops.droidspeak_ops


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rstd": True, "bias": True, "head_norm": "each", "layout": "NHD", "positions": True},
        {"layout": "strided", "q_heads": 4, "head_norm": "all", "bias": True},
        {"layers": 3, "rstd": True},
    ],
)
def test_opcheck_kv_project(options) -> None:
    case = projection(tokens=9, scattered=True, **options)
    torch.library.opcheck(OPS.kv_project.default, to_operator(case))


def test_opcheck_others() -> None:
    x, weight = torch.randn(5, 16), torch.randn(16)
    torch.library.opcheck(OPS.rms_rstd.default, (x, 1e-6, torch.empty(5)))
    torch.library.opcheck(OPS.row_norm.default, (x, weight, "gemma", 1e-6, torch.empty(5, 16)))
    k, v, caches = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), torch.zeros(2, 1, 2, 8, 16)
    slots, nothing = torch.arange(5), (None,) * 4
    torch.library.opcheck(OPS.kv_splice.default, (k, v, *nothing, slots, False, caches[0], caches[1], None, None))
    codes, scales = torch.zeros(2, 1, 2, 8, 16, dtype=torch.int8), torch.zeros(2, 1, 2, 8)
    torch.library.opcheck(OPS.kv_splice.default, (k, v, *nothing, slots, False, *codes.unbind(), *scales.unbind()))


@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 3.0, "sinks": torch.float32, "layout": "NHD"}])
def test_opcheck_attention(options) -> None:
    case = attention(**options)
    case.peaks_of(lambda *args: torch.library.opcheck(OPS.attention_peaks.default, args), case.new_peaks())
    case.rows_of(lambda *args: torch.library.opcheck(OPS.attend_rows.default, args), torch.zeros(case.q.shape))


def test_compiled_in_one_graph() -> None:
    case = projection(tokens=9, scattered=True, rotary_dim=32)
    norm_weight = torch.rand(48)

    def function(x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        call(case, hidden_states=x * 2, k_cache=k_cache, v_cache=v_cache, norm="hf", norm_weight=norm_weight)
        ops.kv_splice(k_cache[:, :, :3] + 1, v_cache[:, :, :3] + 1, k_cache, v_cache, torch.arange(6, 9))
        return k_cache.nan_to_num().sum() + ops.rms_rstd(x, 1e-6).sum()

    eager, compiled = case.with_new_outputs(), case.with_new_outputs()
    expected = function(case[0].hidden_states, *eager.caches)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(case[0].hidden_states, *compiled.caches)
    assert_close(actual, expected)
    for one, other in zip(compiled.caches, eager.caches, strict=True):
        assert_bitwise_equal(one, other)


def test_every_operator_compiles_in_one_graph() -> None:
    case = projection(tokens=9, layers=3, q_heads=4, head_norm="each", positions=True, bias=True)
    weights, attended = [torch.rand(48) for _ in case], attention(window=9, softcap=3.0, sinks=torch.float32)

    def function(q, k_caches, v_caches, codes, scales, cu_seqlens, peaks, out):
        caches = zip(case.without_q(), weights, k_caches, v_caches, strict=True)
        ops.kv_project_layers([
            layer._replace(norm="hf", norm_weight=weight, norm_order="gemma", k_cache=k_cache, v_cache=v_cache)
            for layer, weight, k_cache, v_cache in caches
        ])  # fmt: skip
        ops.qkv_project(case[0]._replace(norm="folded", q=q, k_cache=k_caches[0], v_cache=v_caches[0]))
        (cos, sin), (other_cos, other_sin) = ((layer.cos[:9], layer.sin[:9]) for layer in case[:2])
        rotation = ops.rotation_between(cos, sin, other_cos, other_sin)
        k, v = (cache[:, :, :9].clone() for cache in (k_caches[1], v_caches[1]))
        ops.kv_splice(
            k,
            v,
            *codes,
            case[0].slot_mapping,
            cos=rotation[0],
            sin=rotation[1],
            k_cache_scale=scales[0],
            v_cache_scale=scales[1],
        )
        queries, (k_cache, v_cache, *places) = attended.q * 2, attended[1:5]
        ops.attention_peaks(queries, k_cache, *places, peaks, **attended.options)
        ops.attend_rows(queries, k_cache, v_cache, *places, out, **attended.options)
        return ops.packed_slots(cu_seqlens, 9, 14)

    def arguments() -> tuple:
        fresh = case.with_new_outputs()
        codes = [torch.zeros(1, 2, 14, 64, dtype=torch.float8_e4m3fn) for _ in "kv"]
        scales = [torch.zeros(1, 2, 14) for _ in "kv"]
        caches, written = (
            (fresh.tensors("k_cache"), fresh.tensors("v_cache")),
            (attended.new_peaks(), attended.new_rows()),
        )
        return fresh[0].q, *caches, codes, scales, torch.tensor([0, 4, 9]), *written

    eager, compiled = arguments(), arguments()
    expected = function(*eager)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    for one, other in zip(tree_leaves((compiled, actual)), tree_leaves((eager, expected)), strict=True):
        assert_bitwise_equal(one, other)


class Calls(TorchDispatchMode):
    """Every torch operation that runs, and whether all it gives back are views of what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        gives = [leaf for leaf in tree_leaves(result) if leaf is not None]
        if not all(isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() in given for leaf in gives):
            self.others.append(str(function))
        return result


def test_launches_neither_allocate_nor_ask_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the launch itself the implementations for a GPU make views and nothing else."""
    if torch.cuda.is_available():
        pytest.skip("tests/kernels/test_gpu.py watches the device itself")
    from triton.runtime.interpreter import InterpretedFunction

    launched = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **options: launched.append(self.fn.__name__))
    monkeypatch.setattr(tuning, "target", lambda device: "sm_90")
    case = projection(
        tokens=9, layers=2, q_heads=4, head_norm="all", layout="NHD", positions=True, bias=True, rstd=True
    )
    k, caches = torch.randn(1, 2, 5, 16), torch.zeros(2, 1, 2, 8, 16, dtype=torch.float8_e4m3fn)
    scales, slots, x, normed = torch.zeros(2, 1, 2, 8), torch.arange(5), torch.randn(5, 16), torch.empty(5, 16)
    outputs = [*caches.unbind(), *scales.unbind()]
    with Calls() as calls:
        library._kv_project_gpu(*to_operator(case))
        library._kv_splice_gpu(k, k, None, None, None, None, slots, False, *outputs)
        library._row_norm_gpu(x, None, "none", 1e-6, normed)
        library._rms_rstd_gpu(x, 1e-6, scales[0, 0, 0, :5])
    assert calls.others == []
    attended = attention(window=9, sinks=torch.float32)
    peaks, out = attended.new_peaks(), attended.new_rows()
    with Calls() as calls:
        attended.peaks_of(library._attention_peaks_gpu, peaks)
        attended.rows_of(library._attend_rows_gpu, out)
    assert calls.others == 4 * ["aten.empty.memory_format"]  # what one kernel leaves for the next
    assert set(launched) == {
        *("_project_splice_kernel", "_head_norm_kernel", "_kv_splice_kernel", "_row_norm_kernel"),
        *("_attention_lse_kernel", "_attention_peaks_kernel", "_raise_peaks_kernel"),
        *("_attend_rows_kernel", "_combine_splits_kernel"),
    }


def test_gpu_implementations_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementations for a GPU behind the operators, with their kernels interpreted."""
    if torch.cuda.is_available():
        pytest.skip("tests/kernels/test_gpu.py runs them")
    monkeypatch.setattr(tuning, "target", lambda device: "sm_90")
    case = projection(tokens=9, layers=2, q_heads=4, head_norm="all", layout="NHD", positions=True)
    other = case.with_new_outputs()
    library._kv_project_gpu(*to_operator(case))
    OPS.kv_project(*to_operator(other))
    for one, another in zip(case.outputs, other.outputs, strict=True):
        assert_close(one.nan_to_num(), another.nan_to_num())
    x, weight = torch.randn(5, 16), torch.randn(16)
    for name, arguments, shape in (
        ("rms_rstd", (x, 1e-6), (5,)),
        ("row_norm", (x, weight, "gemma", 1e-6), (5, 16)),
    ):
        outputs = [poisoned(shape, torch.float32, "cpu") for _ in range(2)]
        getattr(library, f"_{name}_gpu")(*arguments, outputs[0])
        getattr(OPS, name)(*arguments, outputs[1])
        assert_close(*outputs)
    k, v, codes = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), torch.zeros(2, 2, 1, 2, 8, 16, dtype=torch.int8)
    scales = torch.zeros(2, 2, 1, 2, 8)
    arguments = (k, v, None, None, None, None, torch.arange(5), False)
    library._kv_splice_gpu(*arguments, *codes[0].unbind(), *scales[0].unbind())
    OPS.kv_splice(*arguments, *codes[1].unbind(), *scales[1].unbind())
    assert torch.equal(*codes)
    assert torch.equal(*scales)
    attended = attention(window=9, softcap=3.0, sinks=torch.float32)
    for of, name, fresh in (
        (attended.peaks_of, "attention_peaks", attended.new_peaks),
        (attended.rows_of, "attend_rows", attended.new_rows),
    ):
        assert_close(of(getattr(library, f"_{name}_gpu"), fresh()), of(getattr(OPS, name), fresh()), operations=2)


@pytest.mark.parametrize("shape", [(9, 48), (3, 3, 48), (1, 9, 48)])
def test_leading_dimensions_are_tokens(shape: tuple[int, ...]) -> None:
    case = projection(tokens=9)
    flat = case.with_new_outputs()
    call(case, hidden_states=case[0].hidden_states.view(shape))
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
    ops.kv_project(ops.Projection(
        x, attention.k_proj.weight, attention.v_proj.weight, *caches, torch.arange(19),
        norm_weight=norm.weight, norm_eps=norm.variance_epsilon, cos=cos[0, :, :32], sin=sin[0, :, :32],
    ))  # fmt: skip
    assert_bitwise_equal(caches[0], k)
    assert_bitwise_equal(caches[1], v)


@pytest.mark.parametrize("given", [False, True])
def test_folded_norm_is_the_norm(given: bool) -> None:
    case, weight = projection(tokens=9, bias=True), torch.rand(48)
    folded = case.with_new_outputs()
    call(case, norm="hf", norm_weight=weight, norm_eps=1e-5)
    changes = {name: ops.fold_norm_weight(getattr(case[0], name), weight) for name in ("k_weight", "v_weight")}
    rstd = ops.rms_rstd(case[0].hidden_states, 1e-5) if given else None
    call(folded, norm="folded", norm_eps=1e-5, rstd=rstd, **changes)
    for one, other in zip(folded.caches, case.caches, strict=True):
        assert_close(one[:, :, :9], other[:, :, :9])


def test_splice_moves_rows_between_layouts_and_turns_keys() -> None:
    """From a dense cache to pages, K turned by a shift of position: the same as rotating by the sum of the angles."""
    from droidspeak_ops.ops.reference import rope_ref

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


@pytest.mark.parametrize("layers", [1, 3, 11])
@pytest.mark.parametrize("norm", ["hf", "folded"])
def test_several_layers_are_each_alone(layers: int, norm: str) -> None:
    case = projection(tokens=9, layers=layers, bias=True, head_norm="each")
    case = case.change(lambda layer: {"norm_weight": torch.rand(48) if norm == "hf" else None}, norm=norm)
    alone = case.with_new_outputs()
    ops.kv_project_layers(case)
    for layer in alone:
        ops.kv_project(layer)
    for one, other in zip(case.outputs, alone.outputs, strict=True):
        assert_bitwise_equal(one, other)


@pytest.mark.parametrize(
    ("layers", "tokens", "norm", "launches"),
    [
        (1, 9, "hf", [1]),
        (15, 9, "none", [8, 4, 2, 1]),
        (3, 20_000, "folded", [2, 1]),
        (3, 20_000, "hf", [1, 1, 1]),
    ],
)
def test_layers_are_launched_in_powers_of_two(
    layers: int, tokens: int, norm: str, launches: list[int], monkeypatch
) -> None:
    launched: list[list[Projection]] = []
    monkeypatch.setattr("droidspeak_ops.kernels.project_splice.kv_project", lambda group, _: launched.append(group))
    case = projection(tokens=tokens, layers=layers, hidden=2, kv_heads=1, head_dim=2)
    case = case.change(lambda layer: {"norm_weight": torch.ones(2) if norm == "hf" else None}, norm=norm)
    library._kv_project_gpu(*to_operator(case))
    assert [len(group) for group in launched] == launches
    for layer, given in zip(itertools.chain.from_iterable(launched), case, strict=True):
        assert layer.k_cache is given.k_cache


def test_q_k_and_v_at_once_are_those_of_transformers() -> None:
    """Qwen3, whose Q and K are normed by head: bitwise, through the layer's own modules."""
    from transformers import Qwen3Config, Qwen3Model
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         intermediate_size=64, vocab_size=32)  # fmt: skip
    model = Qwen3Model(config).eval().requires_grad_(False)
    layer, x = model.layers[0], torch.randn(1, 19, 48)
    attention, norm = layer.self_attn, layer.input_layernorm
    attention.q_norm.weight.uniform_(), attention.k_norm.weight.uniform_(), norm.weight.uniform_()
    cos, sin = model.rotary_emb(x, position_ids=torch.arange(19)[None])
    normed = norm(x)
    q, k, v = (
        project(normed).view(1, 19, -1, 16) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(attention.q_norm(q).transpose(1, 2), attention.k_norm(k).transpose(1, 2), cos, sin)
    out, caches = (
        poisoned((19, 4, 16), torch.float32, "cpu"),
        [poisoned((1, 2, 19, 16), torch.float32, "cpu") for _ in "kv"],
    )
    ops.qkv_project(ops.Projection(
        x, attention.k_proj.weight, attention.v_proj.weight, *caches, torch.arange(19),
        q_weight=attention.q_proj.weight, q=out, norm_weight=norm.weight, q_norm_weight=attention.q_norm.weight,
        k_norm_weight=attention.k_norm.weight,
        norm_eps=norm.variance_epsilon, head_norm_eps=attention.k_norm.variance_epsilon,
        cos=cos[0, :, :8], sin=sin[0, :, :8],
    ))  # fmt: skip
    assert_bitwise_equal(out.transpose(0, 1)[None], q)
    assert_bitwise_equal(caches[0], k)
    assert_bitwise_equal(caches[1], v.transpose(1, 2))


@pytest.mark.parametrize(("family", "order"), [("Gemma3", "gemma"), ("Olmo2", "olmo"), ("Llama", "llama")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orders_of_norms_are_those_of_transformers(family: str, order: str, dtype: torch.dtype) -> None:
    module = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    norm = getattr(module, f"{family}RMSNorm")(48, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.uniform_()
    x = torch.randn(30, 48).to(dtype)
    assert_bitwise_equal(ops.row_norm(x, norm.weight, 1e-5, norm_order=order), norm(x))
    weight = torch.randn(5, 48)
    folded = x.float() * ops.rms_rstd(x, 1e-5)[:, None] @ ops.fold_norm_weight(weight, norm.weight, norm_order=order).T
    assert_close(folded, norm(x).float() @ weight.T, dtype, operations=2)


def test_packed_sequences_are_sequences_one_by_one() -> None:
    """Three sequences in one call, at their own positions, into pages and into a dense cache; padding is not stored."""
    lengths, block_size = [5, 1, 11], 4
    cu_seqlens, tokens = torch.tensor([0, 5, 6, 17]), 20
    case = projection(tokens=tokens)
    angles = torch.rand(11, 32) * 6
    table = torch.tensor([[6, 2, 0], [1, 0, 0], [3, 5, 7]])
    positions, slots = ops.packed_slots(cu_seqlens, tokens, block_size, table)
    assert positions.tolist() == [*range(5), 0, *range(11), 0, 0, 0]
    assert slots.tolist()[:7] == [24, 25, 26, 27, 8, 4, 12] and slots.tolist()[17:] == [-1, -1, -1]
    assert ops.packed_slots(cu_seqlens, tokens, 11)[1].tolist() == [*range(5), 11, *range(22, 33), -1, -1, -1]
    pages = [poisoned((8, 2, block_size, 64), torch.float32, "cpu") for _ in "kv"]
    shared = {"cos": angles.cos(), "sin": angles.sin()}
    call(case, k_cache=pages[0], v_cache=pages[1], slot_mapping=slots, positions=positions, **shared)
    for sequence, length in enumerate(lengths):
        start = int(cu_seqlens[sequence])
        alone = [poisoned((1, 2, length, 64), torch.float32, "cpu") for _ in "kv"]
        call(
            case, hidden_states=case[0].hidden_states[start : start + length], k_cache=alone[0], v_cache=alone[1],
            slot_mapping=torch.arange(length), cos=shared["cos"][:length], sin=shared["sin"][:length],
        )  # fmt: skip
        for page, single in zip(pages, alone, strict=True):
            rows = page[table[sequence]].transpose(0, 1).flatten(1, 2)[:, :length]
            assert_close(rows, single[0])
    assert sum(int(page.isfinite().all(-1).sum()) for page in pages) == 2 * 2 * 17
