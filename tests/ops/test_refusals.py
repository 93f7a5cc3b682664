"""Refusals of the operators: each wrong argument by its name, before anything is written."""

from typing import Any

import pytest
import torch
from support.cases import call, poisoned, projection

from droidspeak_ops import ops


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
            r"k_cache: expected .* \(no stride of 0\)",
        ),
        ({"k_cache": torch.full((1, 2, 14, 65), float("nan"))}, "k_cache: expected .* even head_dim"),
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
    ],
)
def test_wrong_arguments_of_kv_splice_are_named(changes, message: str) -> None:
    arguments = {"k": torch.zeros(1, 2, 9, 16), "v": torch.zeros(1, 2, 9, 16), "slot_mapping": torch.arange(9)}
    caches = {name: poisoned((1, 2, 12, 16), torch.float32, "cpu") for name in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=message):
        ops.kv_splice(**{**arguments, **changes}, **caches)
    assert all(cache.isnan().all() for cache in caches.values())


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
