"""Refusals of the operators: each wrong argument by its name, before anything is written."""

import itertools
from typing import Any

import pytest
import torch
from support.cases import OUTPUTS, attention, call, poisoned, projection

from droidspeak_ops import ops
from droidspeak_ops.kernels.arguments import SHARED, to_operator
from droidspeak_ops.ops import library
from droidspeak_ops.ops.checks import check_separate

OPS = torch.ops.droidspeak_ops


def wrong_slots(*slots: int) -> dict[str, torch.Tensor]:
    return {"slot_mapping": torch.tensor(slots)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(9, 47)}, r"k_weight: expected .*\(128, 47\).*got torch.float32 \(128, 48\)"),
        ({"hidden_states": torch.zeros(9, 48, dtype=torch.float64)}, "hidden_states: expected .*got torch.float64"),
        ({"hidden_states": torch.zeros(48, 9).T}, "hidden_states: expected .* last stride of 1, got"),
        ({"k_weight": torch.zeros(128, 48, dtype=torch.float16)}, "k_weight: expected .*got torch.float16"),
        ({"v_weight": torch.zeros(64, 48)}, r"v_weight: expected .*\(128, 48\).*got torch.float32 \(64, 48\)"),
        ({"v_weight": torch.zeros(48, 128).T}, "v_weight: expected .* last stride of 1, got"),
        ({"k_weight": torch.zeros(128, 48, device="meta")}, "k_weight: expected .* got .* on meta"),
        ({"k_bias": torch.zeros(128)}, "k_bias, v_bias.* all or none"),
        ({"k_bias": torch.zeros(64), "v_bias": torch.zeros(128)}, "k_bias: expected .*got"),
        ({"k_norm_weight": torch.zeros(32)}, r"k_norm_weight: expected .*got .*\(32,\)"),
        ({"cos": None}, "cos, sin: expected both or neither"),
        ({"cos": torch.zeros(9, 33), "sin": torch.zeros(9, 33)}, "cos: expected .* 0 < R <= 64"),
        ({"cos": torch.zeros(8, 32)}, r"cos: expected .*\(9, 32\)"),
        ({"sin": torch.zeros(9, 16)}, r"sin: expected .*got .*\(9, 16\)"),
        ({"k_cache": torch.zeros(2, 14, 64)}, "k_cache: expected .*got"),
        ({"k_cache": torch.zeros(1, 2, 14, 64, dtype=torch.int8)}, "k_cache: expected .*got torch.int8"),
        ({"v_cache": torch.zeros(1, 2, 13, 64)}, r"v_cache: expected .*got .*\(1, 2, 13, 64\)"),
        ({"v_cache": torch.zeros(1, 2, 14, 64).half()}, "v_cache: expected torch.float32 .* got torch.float16"),
        ({"slot_mapping": torch.arange(8)}, r"slot_mapping: expected .*\(9,\).*got torch.int64 \(8,\)"),
        ({"slot_mapping": torch.arange(9).int()}, "slot_mapping: expected .*got torch.int32"),
        ({"slot_mapping": torch.arange(18)[::2]}, r"slot_mapping: expected .*got .* strides \(2,\)"),
        (wrong_slots(0, 1, 2, 3, 4, 5, 6, 7, 14), "slots from -1 to 13, got 0 to 14"),
        (wrong_slots(-2, 1, 2, 3, 4, 5, 6, 7, 8), "slots from -1 to 13, got -2 to 8"),
        (wrong_slots(0, 1, 2, 3, 3, 5, 6, 7, 8), "expected each slot at most once"),
        ({"norm": "rms"}, "norm: expected .*got 'rms'"),
        ({"norm": "hf"}, "norm_weight: expected a tensor, got None with norm_order='llama'"),
        ({"norm_weight": torch.ones(48)}, "norm_weight: expected None with norm='none'"),
        ({"rstd": torch.ones(9)}, "rstd: expected None with norm='none'"),
        ({"norm": "folded", "rstd": torch.ones(8)}, r"rstd: expected .*got torch.float32 \(8,\)"),
        ({"norm": "hf", "norm_weight": torch.ones(47)}, "weight: expected .*got"),
        (
            {"norm": "hf", "norm_weight": torch.ones(48), "norm_order": "bert"},
            "norm_order: expected one of 'llama'.*, got 'bert'",
        ),
        (
            {"norm": "hf", "norm_weight": torch.ones(48), "norm_order": "none"},
            "norm_weight: expected None, got a tensor with norm_order='none'",
        ),
        (
            {"k_norm_weight": torch.ones(64), "norm_order": "none"},
            "k_norm_weight: expected None, got a tensor with norm_order='none'",
        ),
        (
            {
                "k_norm_weight": torch.ones(128),
                "k_cache": torch.full((1, 2, 14, 64), float("nan")).half(),
                "v_cache": torch.full((1, 2, 14, 64), float("nan")).half(),
            },
            "k_cache: expected .* norm over all heads, got torch.float16",
        ),
        ({"positions": torch.arange(8)}, r"positions: expected .*got torch.int64 \(8,\)"),
        ({"positions": torch.arange(9) + 1}, "positions: expected 0 to 8, .* got 1 to 9"),
        ({"positions": torch.arange(9), "cos": None, "sin": None}, "positions: expected None without cos and sin"),
        (
            {"k_cache": torch.full((1, 1, 14, 64), float("nan")).expand(1, 2, 14, 64)},
            "k_cache: expected memory of its own for each element",
        ),
        ({"k_cache": torch.full((1, 2, 14, 65), float("nan"))}, "k_cache: expected .* even head_dim"),
        ({"k_cache": torch.zeros(1, 2, 14, 0)}, "k_cache: expected .* head_dim > 0"),
        ({"k_cache": torch.zeros(1, 0, 14, 64)}, "k_cache: expected .* kv_heads > 0"),
        ({"hidden_states": torch.zeros(9, 0)}, "hidden_states: expected .* C > 0"),
        *(
            ({name: eps}, f"{name}: expected a finite number of at least 0, got {eps}")
            for name in ("norm_eps", "head_norm_eps")
            for eps in (float("nan"), float("inf"), -1e-6)
        ),
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
        ({"k": torch.zeros(2, 9, 16)}, "k: expected .*got"),
        ({"k": torch.zeros(1, 3, 9, 16)}, r"k: expected .*\(1, 2, 9, 16\).*got .*\(1, 3, 9, 16\)"),
        ({"v": torch.zeros(1, 2, 8, 16)}, r"v: expected .*got .*\(1, 2, 8, 16\)"),
        ({"v": torch.zeros(1, 2, 9, 16).half()}, "v: expected .*got torch.float16"),
        (
            {"k": torch.zeros(1, 2, 9, 16).double(), "v": torch.zeros(1, 2, 9, 16).double()},
            "k: expected .*got torch.float64",
        ),
        ({"k": torch.zeros(1, 2, 9, 16).char(), "v": torch.zeros(1, 2, 9, 16).char()}, "k_scale: expected .* beside"),
        (
            {"k_scale": torch.ones(1, 2, 9), "v_scale": torch.ones(1, 2, 9)},
            "k_scale: expected None beside rows of torch.float32",
        ),
        ({"k_cache_scale": torch.ones(1, 2, 12)}, "k_cache_scale: expected None beside"),
        ({"slot_mapping": torch.arange(12)}, "slot_mapping: expected .*got"),
        ({"slot_mapping": torch.arange(4, 13)}, "slots from -1 to 11, got 4 to 12"),
        ({"cos": torch.zeros(9, 8)}, "cos, sin: expected both or neither"),
        (
            dict.fromkeys(("cos", "sin"), torch.zeros(9, 8, dtype=torch.complex64)),
            "cos: expected .*got torch.complex64",
        ),
    ],
)
def test_wrong_arguments_of_kv_splice_are_named(changes, message: str) -> None:
    arguments = {"k": torch.zeros(1, 2, 9, 16), "v": torch.zeros(1, 2, 9, 16), "slot_mapping": torch.arange(9)}
    caches = {name: poisoned((1, 2, 12, 16), torch.float32, "cpu") for name in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=message):
        ops.kv_splice(**{**arguments, **changes}, **caches)
    assert all(cache.isnan().all() for cache in caches.values())


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1e-6])
def test_an_eps_that_is_none_is_refused(eps: float) -> None:
    x = torch.ones(2, 4)
    for call_norm in (lambda: ops.rms_rstd(x, eps), lambda: ops.row_norm(x, torch.ones(4), eps)):
        with pytest.raises(ValueError, match=f"eps: expected a finite number of at least 0, got {eps}"):
            call_norm()
    for norm in (ops.rms_rstd(x, 0), ops.row_norm(x, None, 0, norm_order="none")):
        assert (norm == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([0.0, 4.0, 9.0])}, "cu_seqlens: expected int32 or int64 .*got torch.float32"),
        ({"cu_seqlens": torch.tensor(9)}, r"cu_seqlens: expected .*got torch.int64 \(\)"),
        ({"cu_seqlens": torch.tensor([[0, 4, 9]])}, r"cu_seqlens: expected .*got torch.int64 \(1, 3\)"),
        ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens: expected .* B > 0, got"),
        ({"cu_seqlens": torch.tensor([0, 5, 4])}, "cu_seqlens: expected bounds .* not fall, got .* step of -1"),
        ({"cu_seqlens": torch.tensor([1, 4, 9])}, "cu_seqlens: expected bounds from 0 .*got them from 1 to 9"),
        ({"cu_seqlens": torch.tensor([0, 4, 10])}, "cu_seqlens: expected .* at most 9 .*got them from 0 to 10"),
        ({"num_tokens": -1}, "num_tokens: expected an integer of at least 0, got -1"),
        ({"num_tokens": 9.0}, "num_tokens: expected an integer .*got 9.0"),
        ({"block_size": 0}, "block_size: expected an integer of at least 1, got 0"),
        ({"block_size": 4.0}, "block_size: expected an integer .*got 4.0"),
        ({"block_size": 4}, "cu_seqlens: expected at most 4 tokens a sequence, .*got 5"),
        ({"block_size": 2, "block_table": torch.arange(4).view(2, 2)}, "expected at most 4 tokens a sequence"),
        ({"block_table": torch.zeros(2, 1)}, "block_table: expected int32 or int64 .*got torch.float32"),
        ({"block_table": torch.arange(3)[:, None]}, r"block_table: expected .*\(2, pages\).*got torch.int64 \(3, 1\)"),
        ({"block_table": torch.arange(2)}, r"block_table: expected .*got torch.int64 \(2,\)"),
        ({"block_table": torch.tensor(2)}, r"block_table: expected .*got torch.int64 \(\)"),
        ({"block_table": torch.zeros(2, 0, dtype=torch.int64)}, "block_table: expected .* pages > 0"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int64, device="meta")}, "block_table: expected .* on meta"),
        ({"block_table": torch.tensor([[3], [-1]])}, "block_table: expected pages from 0 on .*got -1"),
    ],
)
def test_wrong_arguments_of_packed_slots_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = {"cu_seqlens": torch.tensor([0, 4, 9]), "num_tokens": 9, "block_size": 5}
    with pytest.raises(ValueError, match=message):
        ops.packed_slots(**{**arguments, **changes})


def test_tokens_without_a_row_have_no_slot_where_values_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: neither the rows of another sequence, nor a page that the table does not have."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    cu_seqlens = torch.tensor([0, 5, 7])
    assert ops.packed_slots(cu_seqlens, 7, 4)[1].tolist() == [0, 1, 2, 3, -1, 4, 5]
    table = torch.tensor([[6, 2], [-1, 0]])
    assert ops.packed_slots(cu_seqlens, 7, 2, table)[1].tolist() == [12, 13, 4, 5, -1, -1, -1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sin": torch.ones(9, 7)}, r"sin: expected floating \(9, 8\) on cpu, as cos, got .*\(9, 7\)"),
        ({"new_cos": torch.ones(1, 8)}, r"new_cos: expected .*got .*\(1, 8\)"),
        ({"new_sin": torch.ones(9, 8, dtype=torch.complex64)}, "new_sin: expected .*got torch.complex64"),
        ({"cos": torch.ones(9, 8, dtype=torch.int64)}, "cos: expected floating .*got torch.int64"),
        ({"cos": torch.ones(8)}, r"cos: expected .*got .*\(8,\)"),
        ({"sin": torch.ones(9, 8, device="meta")}, "sin: expected .* on cpu, as cos, got .* on meta"),
    ],
)
def test_wrong_arguments_of_rotation_between_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = {name: torch.ones(9, 8) for name in ("cos", "sin", "new_cos", "new_sin")}
    with pytest.raises(ValueError, match=message):
        ops.rotation_between(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("weight", "norm_weight", "message"),
    [
        (torch.ones(48), torch.ones(48), r"weight: expected floating \[N, C\], got .*\(48,\)"),
        (torch.ones(4, 48, dtype=torch.int8), torch.ones(48), "weight: expected floating .*got torch.int8"),
        (torch.ones(4, 48), torch.ones(1), r"norm_weight: expected .*\(48,\) .*got .*\(1,\)"),
        (torch.ones(48, 48), torch.ones(48, 1), r"norm_weight: expected .*\(48,\) .*got .*\(48, 1\)"),
        (
            torch.ones(4, 48).half(),
            torch.ones(48),
            "norm_weight: expected torch.float16 or a narrower .*got torch.float32",
        ),
        (torch.ones(4, 48), torch.ones(48, dtype=torch.complex64), "norm_weight: expected .*got torch.complex64"),
        (torch.ones(4, 48), torch.ones(48, device="meta"), "norm_weight: expected .* on cpu, .*got .* on meta"),
    ],
)
def test_wrong_arguments_of_fold_norm_weight_are_named(weight, norm_weight, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.fold_norm_weight(weight, norm_weight)


# --- memory ------------------------------------------------------------------------------------------------------------


TENSORS = {operator: [name for _, name, _ in tensors] for operator, tensors in library._TENSORS.items()}


def placed(memory: torch.Tensor, like: torch.Tensor, first_byte: int = 0) -> torch.Tensor:
    """A tensor of the same shape, strides and dtype in given memory."""
    return memory.view(like.dtype).as_strided(like.shape, like.stride(), first_byte // like.itemsize)


def last_two(tensor: torch.Tensor) -> int:
    """The byte at which the last two elements of a float32 tensor start, or one of int64."""
    return (tensor.numel() - 2) * tensor.itemsize


@pytest.mark.parametrize("name", TENSORS["kv_project"])
def test_no_tensor_of_a_projection_is_in_what_it_writes(name: str) -> None:
    """In none of its own layer's outputs, and in none of another's."""
    case = projection(tokens=9, hidden=4, layers=2, q_heads=1, kv_heads=1, head_dim=8, bias=True, head_norm="each",
                      positions=True, rstd=name == "rstd")  # fmt: skip
    if name == "norm_weight":
        case = case.change(norm="hf", norm_weight=torch.ones(4))
    for output, layer in itertools.product(OUTPUTS, range(2)):
        if (output, layer) == (name, 0) or (name in SHARED and layer):
            continue
        memory = torch.full((256,), float("nan"))
        written = placed(memory, getattr(case[0], output))
        layers = [case[0]._replace(**{output: written}), case[1]]
        layers[layer] = layers[layer]._replace(**{name: placed(memory, getattr(case[0], name), last_two(written))})
        before = memory.clone()
        with pytest.raises(ValueError, match=f"({name}|{output}): expected memory of its own, got some of") as error:
            OPS.kv_project(*to_operator(layers))
        assert name in str(error.value)
        assert output in str(error.value)
        assert torch.equal(memory.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("layers", [9, 11])
def test_layers_of_several_launches_are_apart_too(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched before all are looked at."""
    case = projection(tokens=9, hidden=4, layers=layers, kv_heads=1, head_dim=8)
    case[-1] = case[-1]._replace(v_cache=case[0].v_cache)
    monkeypatch.setattr("droidspeak_ops.kernels.project_splice.kv_project", lambda *args: pytest.fail("launched"))
    for project in (OPS.kv_project, library._kv_project_gpu):
        with pytest.raises(ValueError, match="v_cache: expected memory of its own, got some of that of another layer"):
            project(*to_operator(case))
    case[-1] = case[-1]._replace(v_cache=torch.zeros(1, 1, 14, 8), k_bias=torch.ones(8), v_bias=torch.ones(8))
    with pytest.raises(ValueError, match=f"k_bias: expected one for all layers, got another in layer {layers - 1}"):
        ops.kv_project_layers(case)
    assert all(cache.isnan().all() for cache in case.tensors("k_cache"))


@pytest.mark.parametrize("name", TENSORS["kv_splice"])
def test_no_tensor_of_a_splice_is_in_what_it_writes(name: str) -> None:
    rows, caches, scales = (2, 9, 8), (2, 12, 8), {"source": (1, 2, 9), "cache": (1, 2, 12)}
    arguments = {
        "k": torch.zeros(1, *rows, dtype=torch.int8), "v": torch.zeros(1, *rows, dtype=torch.int8),
        "k_scale": torch.ones(scales["source"]), "v_scale": torch.ones(scales["source"]),
        "cos": torch.ones(9, 4), "sin": torch.zeros(9, 4), "slot_mapping": torch.arange(9), "static_scale": False,
        "k_cache": torch.zeros(1, *caches, dtype=torch.int8), "v_cache": torch.zeros(1, *caches, dtype=torch.int8),
        "k_cache_scale": torch.zeros(scales["cache"]), "v_cache_scale": torch.zeros(scales["cache"]),
    }  # fmt: skip
    for output in ("k_cache", "v_cache", "k_cache_scale", "v_cache_scale"):
        if output == name:
            continue
        memory = torch.zeros(256)
        written = placed(memory, arguments[output])
        changes = {output: written, name: placed(memory, arguments[name], written.nbytes - 8)}
        with pytest.raises(ValueError, match=f"({name}|{output}): expected memory of its own, got some of") as error:
            OPS.kv_splice(**{**arguments, **changes})
        assert name in str(error.value)
        assert output in str(error.value)
        assert not memory.any()


@pytest.mark.parametrize(
    ("operator", "name"),
    [(operator, name) for operator in ("attention_peaks", "attend_rows") for name in TENSORS[operator]],
)
def test_no_tensor_of_attention_is_in_what_it_writes(operator: str, name: str) -> None:
    output = {"attention_peaks": "peaks", "attend_rows": "out"}[operator]
    if name == output:
        return
    case = attention(sinks=torch.float32)
    arguments = {**case._asdict(), "peaks": case.new_peaks(), "out": torch.zeros(case.q.shape)}
    arguments = {
        argument.name: arguments[argument.name] for argument in getattr(OPS, operator).default._schema.arguments
    }
    memory = torch.zeros(20_000)
    written = placed(memory, arguments[output])
    changes = {output: written, name: placed(memory, arguments[name], last_two(written))}
    with pytest.raises(ValueError, match=f"{name}: expected memory of its own, got some of {output}"):
        getattr(OPS, operator)(**{**arguments, **changes})
    assert not memory.any()


def test_what_lies_in_a_long_tensor_behind_a_short_one_is_found() -> None:
    """Outputs side by side, of which the first to start is the last to end."""
    grid = torch.zeros(10, 10)
    written = [("k_cache", [grid[:, :2]]), ("v_cache", [grid[2:4, 5:7]])]
    check_separate([("k", [grid[6:8, 2:4]])], written)
    with pytest.raises(ValueError, match="k: expected memory of its own, got some of k_cache"):
        check_separate([("k", [grid[6:8, 1:3]])], written)


def test_static_scales_are_read_and_may_be_one() -> None:
    """Neither apart from each other nor from themselves: one scale for a whole cache."""
    k, v, slots = torch.rand(1, 2, 9, 8), torch.rand(1, 2, 9, 8), torch.arange(9)
    caches, expected = torch.zeros(2, 1, 2, 12, 8, dtype=torch.int8), torch.zeros(2, 1, 2, 12, 8, dtype=torch.int8)
    scale = torch.tensor(0.01).expand(1, 2, 12)
    ops.kv_splice(k, v, *caches, slots, k_cache_scale=scale, v_cache_scale=scale, static_scale=True)
    apart = {name: torch.full((1, 2, 12), 0.01) for name in ("k_cache_scale", "v_cache_scale")}
    ops.kv_splice(k, v, *expected, slots, **apart, static_scale=True)
    assert caches.any() and torch.equal(caches, expected)
    with pytest.raises(ValueError, match="k_cache_scale: expected memory of its own for each element"):
        ops.kv_splice(k, v, *caches, slots, k_cache_scale=scale, v_cache_scale=apart["v_cache_scale"])


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (0, 4, "hidden_states: expected memory of its own, got some of out"),
        (3, 7, "hidden_states: expected memory of its own, got some of out"),
        (4, 8, "weight: expected memory of its own, got some of out"),
    ],
)
def test_no_norm_is_written_over_what_it_is_made_of(first: int, last: int, message: str) -> None:
    memory = torch.rand(8, 4)
    before = memory.clone()
    with pytest.raises(ValueError, match=message):
        OPS.row_norm(memory[:4], memory[7], "llama", 1e-6, memory[first:last])
    if first < 4:
        with pytest.raises(ValueError, match=message):
            OPS.rms_rstd(memory[:4], 1e-6, memory[first])
    with pytest.raises(ValueError, match="out: expected memory of its own for each element"):
        OPS.row_norm(memory[:4], memory[7], "llama", 1e-6, memory[4].expand(4, 4))
    assert torch.equal(memory, before)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize(("head_stride", "row_stride"), [(0, 8), (120, 4), (72, 8), (4, 16)])
def test_an_output_over_itself_is_refused(name: str, head_stride: int, row_stride: int) -> None:
    """Rows or heads that share elements, without and with a stride of 0."""
    case = projection(tokens=10, hidden=4, q_heads=2, kv_heads=2, head_dim=8)
    shape, memory = getattr(case[0], name).shape, torch.full((600,), float("nan"))
    strides = (row_stride, head_stride, 1) if name == "q" else (300, head_stride, row_stride, 1)
    with pytest.raises(ValueError, match=f"{name}: expected memory of its own for each element"):
        ops.qkv_project(case[0]._replace(**{name: memory.as_strided(shape, strides)}))
    assert all(output.isnan().all() for output in (memory, *case.outputs))


def test_caches_that_share_memory_are_refused() -> None:
    case = projection(tokens=9)
    cache = case.caches[0]
    with pytest.raises(ValueError, match="k_cache: expected memory of its own, got some of v_cache"):
        call(case, v_cache=cache)
    both = poisoned((1, 2, 20, 64), torch.float32, "cpu")
    with pytest.raises(ValueError, match="k_cache: expected memory of its own, got some of v_cache"):
        call(case, k_cache=both[:, :, :14], v_cache=both[:, :, 6:])
    assert both.isnan().all()
    with pytest.raises(ValueError, match="hidden_states: expected memory of its own, got some of k_cache"):
        call(case, hidden_states=torch.as_strided(cache, (9, 48), (48, 1)))


@pytest.mark.parametrize("layout", ["dense", "NHD", "HND", "strided"])
def test_caches_in_one_storage_are_accepted(layout: str) -> None:
    """K and V as halves of one tensor, or side by side in it, as serving engines keep them."""
    case = projection(tokens=9, layout=layout)
    both = poisoned((2, 1, 14, 2, 64), torch.float32, "cpu")
    call(case)
    call(case, k_cache=both[0].transpose(1, 2), v_cache=both[1].transpose(1, 2))
    interleaved = poisoned((1, 14, 2, 2, 64), torch.float32, "cpu")
    call(case, k_cache=interleaved[:, :, 0].transpose(1, 2), v_cache=interleaved[:, :, 1].transpose(1, 2))
    for cache in (both[0], both[1], interleaved[:, :, 0], interleaved[:, :, 1]):
        assert cache[:, :9].isfinite().all()
        assert cache[:, 9:].isnan().all()


def test_memory_with_negative_strides_is_no_tensor() -> None:
    """torch has none, so the operators need no check; numpy's are refused on the way."""
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(torch.zeros(4, 4).numpy()[::-1])


def test_layers_that_differ_are_refused() -> None:
    case = projection(tokens=9, layers=3)

    def run(**of_layer_1: Any) -> None:
        ops.kv_project_layers([case[0], case[1]._replace(**of_layer_1), case[2]])

    with pytest.raises(ValueError, match="cos: expected a tensor of each layer, got None in layer 1"):
        run(cos=None, sin=None)
    with pytest.raises(ValueError, match="k_bias: expected one for all layers, got another in layer 1"):
        run(k_bias=torch.zeros(128), v_bias=torch.zeros(128))
    with pytest.raises(ValueError, match="norm_eps: expected one for all layers"):
        run(norm_eps=1e-5)
    with pytest.raises(ValueError, match="slot_mapping: expected one for all layers"):
        run(slot_mapping=torch.arange(9).flip(0))
    with pytest.raises(ValueError, match="k_weight of layer 1: expected .* as of layer 0"):
        run(k_weight=torch.zeros(128, 64)[:, :48])
    with pytest.raises(ValueError, match="k_cache: expected memory of its own, got some of that of another layer"):
        run(k_cache=case[0].k_cache)
    assert all(cache.isnan().all() for cache in case.caches)
    run()
    assert all(cache[:, :, :9].isfinite().all() for cache in case.caches)


def test_splice_from_the_cache_itself_is_refused() -> None:
    cache = torch.zeros(2, 1, 2, 12, 16)
    with pytest.raises(ValueError, match="k: expected memory of its own, got some of k_cache"):
        ops.kv_splice(cache[0][:, :, :4], cache[1][:, :, :4], cache[0], cache[1], torch.arange(4, 8))
