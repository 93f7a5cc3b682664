"""Attention of some rows over a cache, on the CPU: against loops in float64, and what a caller may count on."""

import math

import pytest
import torch
from support.cases import Attention, attention, covering, poisoned
from support.compare import assert_bitwise_equal, assert_close

from droidspeak_ops import ops


def peaks(case: Attention, before: torch.Tensor | None = None) -> torch.Tensor:
    result = case.new_peaks() if before is None else before
    ops.attention_peaks(case.q, case.k_cache, case.key_slots, case.positions, result, **case.options)
    return result


def rows(case: Attention) -> torch.Tensor:
    result = case.new_rows()
    ops.attend_rows(*case[:5], result, **case.options)
    return result


def by_loops(case: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Peaks and rows in float64, row by row and head by head, over lists of the keys that each sees."""
    result, out = case.new_peaks().double(), torch.zeros(case.q.shape, dtype=torch.float64)
    group, block_size = case.q.shape[2] // case.k_cache.shape[1], case.k_cache.shape[2]
    for b, n in torch.cartesian_prod(*(torch.arange(size) for size in case.positions.shape)).tolist():
        position = int(case.positions[b, n])
        first = 0 if case.window is None else max(position - case.window + 1, 0)
        slots = {j: int(case.key_slots[b, j]) for j in range(first, min(position + 1, case.key_slots.shape[1]))}
        seen = [j for j, slot in slots.items() if slot >= 0]
        for h in range(case.q.shape[2]) if seen else ():
            places = [(slots[j] // block_size, h // group, slots[j] % block_size) for j in seen]
            logits = [case.scale * float(case.q[b, n, h].double() @ case.k_cache[at].double()) for at in places]
            if case.softcap is not None:
                logits = [case.softcap * math.tanh(logit / case.softcap) for logit in logits]
            largest = max(logits)
            weights = [math.exp(logit - largest) for logit in logits]
            total = sum(weights) + (0.0 if case.sinks is None else math.exp(float(case.sinks[h]) - largest))
            for j, at, weight in zip(seen, places, weights, strict=True):
                result[b, j] = max(result[b, j], weight / total)
                out[b, n, h] += weight / total * case.v_cache[at].double()
    return result, out


@pytest.mark.parametrize("options", list(covering({
    "dtype": [torch.float32, torch.bfloat16],
    "layout": ["dense", "NHD", "HND", "strided"],
    "window": [None, 1, 9],
    "softcap": [None, 3.0],
    "sinks": [None, torch.float32, torch.bfloat16],
    "group": [1, 3],
    "missing": [True, False],
})), ids=lambda options: "-".join(str(value) for value in options.values()))  # fmt: skip
def test_attention_is_that_of_loops(options: dict) -> None:
    if options["sinks"] == torch.bfloat16:
        options = {**options, "dtype": torch.bfloat16}
    case = attention(rows=5, keys=24, **options)
    expected_peaks, expected_rows = by_loops(case)
    assert_close(peaks(case), expected_peaks, torch.float32, operations=2)
    assert_close(rows(case), expected_rows, case.q.dtype, operations=2)


def test_attention_is_that_of_torch() -> None:
    """Rows that are all tokens of a sequence, against causal attention with an output."""
    case = attention(batch=1, rows=24, keys=24, missing=False, padding=False)
    case = case._replace(positions=torch.arange(24)[None])
    q, k, v = case.q.transpose(1, 2), case.k_cache[:, :, :24], case.v_cache[:, :, :24]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=case.scale, enable_gqa=True
    )
    assert_close(rows(case).transpose(1, 2), expected, operations=2)


def test_peaks_are_raised_and_never_lowered() -> None:
    case = attention()
    once, before = peaks(case), torch.rand(case.key_slots.shape)
    assert once.max() > 0.5
    assert_bitwise_equal(peaks(case, before.clone()), torch.maximum(once, before))
    assert_bitwise_equal(peaks(case, once.clone()), once)
    assert peaks(case, torch.full_like(before, torch.nan)).isnan()[case.key_slots >= 0].all()


def test_what_sees_nothing_gives_nothing() -> None:
    """Padding, rows before all keys that the cache holds, no rows and no keys."""
    case = attention(sinks=torch.float32)
    case.key_slots[:, :4] = -1
    case = case._replace(positions=case.positions.clamp(max=3))
    assert not peaks(case).any()
    assert_bitwise_equal(rows(case), torch.zeros(case.q.shape))
    nothing = case._replace(key_slots=case.key_slots[:, :0])
    assert peaks(nothing).shape == (2, 0) and not rows(nothing).any()
    nobody = case._replace(q=case.q[:, :0], positions=case.positions[:, :0])
    assert not peaks(nobody).any() and rows(nobody).shape == (2, 0, 4, 16)


def test_rows_beyond_all_keys_see_them_all() -> None:
    case = attention(missing=False, padding=False)
    last, beyond = (case._replace(positions=torch.full_like(case.positions, place)) for place in (39, 1000))
    assert_bitwise_equal(peaks(beyond), peaks(last))
    assert_bitwise_equal(rows(beyond), rows(last))


def test_a_nan_is_never_hidden() -> None:
    """Neither one of a query nor one of a key that a row sees; others stay as they are."""
    case = attention(batch=1, missing=False, padding=False)
    case = case._replace(positions=torch.tensor([[3, 9, 20, 30, 39, 12, 25]]), q=case.q.clone())
    expected = rows(case)
    case.q[0, 3, 1, 5] = torch.nan
    assert peaks(case)[0].isnan().tolist() == [True] * 31 + [False] * 9
    broken = rows(case)
    assert broken[0, 3, 1].isnan().all()
    broken[0, 3, 1] = expected[0, 3, 1]
    assert_bitwise_equal(broken, expected)
    case.q[0, 3, 1, 5] = 0.0
    case.k_cache[0, :, 31] = torch.nan
    assert peaks(case)[0].isnan().all()  # of the row at 39, which sees it
    assert rows(case)[0].isnan().all(-1).all(-1).tolist() == [False] * 4 + [True] + [False] * 2


REFUSED = [
    ({"q": torch.zeros(2, 7, 64)}, r"q: expected .*\[B, N, H, D\], got torch.float32 \(2, 7, 64\)"),
    ({"q": torch.zeros(2, 7, 4, 16).double()}, "q: expected .*got torch.float64"),
    ({"q": torch.zeros(2, 7, 4, 18)}, r"q: expected .*\(2, 7, 4, 16\).*got torch.float32 \(2, 7, 4, 18\)"),
    ({"q": torch.zeros(2, 7, 3, 16)}, r"q: expected a multiple of 2 query heads.*got .*\(2, 7, 3, 16\)"),
    ({"q": torch.zeros(2, 7, 0, 16)}, "q: expected a multiple of 2 query heads"),
    ({"q": torch.zeros(2, 7, 16, 4).mT}, "q: expected .* last stride of 1, got"),
    ({"q": torch.zeros(2, 7, 4, 16).half()}, "k_cache: expected .* in one of torch.float16, got torch.float32"),
    ({"k_cache": torch.zeros(2, 43, 16)}, r"k_cache: expected .*got .*\(2, 43, 16\)"),
    ({"k_cache": torch.zeros(2, 2, 43, 16, device="meta")}, "k_cache: expected .*on cpu .*got .* on meta"),
    ({"k_cache": torch.zeros(1).expand(2**17, 2, 2**14, 16)}, "k_cache: expected .*got"),
    ({"key_slots": torch.zeros(2, 40).int()}, "key_slots: expected torch.int64 .*got torch.int32"),
    ({"key_slots": torch.zeros(3, 40).long()}, r"key_slots: expected .*\(2, 40\).*got .*\(3, 40\)"),
    ({"key_slots": torch.zeros(40).long()}, r"key_slots: expected .*\(2, 'S'\).*got .*\(40,\)"),
    ({"key_slots": torch.full((2, 40), 86)}, "key_slots: expected slots from -1 to 85, got 86 to 86"),
    ({"key_slots": torch.full((2, 40), -2)}, "key_slots: expected slots from -1 to 85, got -2 to -2"),
    ({"positions": torch.zeros(2, 7).int()}, "positions: expected torch.int64 .*got torch.int32"),
    ({"positions": torch.zeros(2, 6).long()}, r"positions: expected .*\(2, 7\).*got .*\(2, 6\)"),
    ({"positions": torch.full((2, 7), -2)}, "positions: expected -1 for padding, or more, got -2"),
    *(({"scale": scale}, f"scale: expected a finite number above 0, got {scale}") for scale in (0.0, -1.0, math.inf, math.nan)),
    *(({"softcap": cap}, f"softcap: expected a finite number above 0, got {cap}") for cap in (0.0, math.nan)),
    *(({"window": size}, f"window: expected None or an integer of at least 1, got {size}") for size in (0, -3, 2.0)),
    ({"sinks": torch.zeros(3)}, r"sinks: expected torch.float32 \(4,\).*got torch.float32 \(3,\)"),
    ({"sinks": torch.zeros(4).half()}, "sinks: expected torch.float32 .*got torch.float16"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [
    *REFUSED,
    ({"peaks": torch.zeros(2, 39)}, r"peaks: expected torch.float32 \(2, 40\).*got .*\(2, 39\)"),
    ({"peaks": torch.zeros(2, 40).half()}, "peaks: expected torch.float32 .*got torch.float16"),
])  # fmt: skip
def test_wrong_arguments_of_attention_peaks_are_named(changes: dict, message: str) -> None:
    given = attention()._asdict()
    del given["v_cache"]
    before = torch.rand(2, 40)
    arguments = {**given, "peaks": before.clone(), **changes}
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.attention_peaks(**arguments)
    assert "peaks" in changes or torch.equal(arguments["peaks"], before)


@pytest.mark.parametrize(("changes", "message"), [
    *REFUSED,
    ({"v_cache": torch.zeros(2, 2, 42, 16)}, r"v_cache: expected .*\(2, 2, 43, 16\).*got .*\(2, 2, 42, 16\)"),
    ({"v_cache": torch.zeros(2, 2, 43, 16).half()}, "v_cache: expected torch.float32 .*got torch.float16"),
    ({"out": torch.zeros(2, 7, 4, 17)}, r"out: expected torch.float32 \(2, 7, 4, 16\).*got .*\(2, 7, 4, 17\)"),
    ({"out": torch.zeros(2, 7, 4, 16).half()}, "out: expected torch.float32 .*got torch.float16"),
])  # fmt: skip
def test_wrong_arguments_of_attend_rows_are_named(changes: dict, message: str) -> None:
    out = poisoned((2, 7, 4, 16), torch.float32, "cpu")
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.attend_rows(**{**attention()._asdict(), "out": out, **changes})
    assert out.isnan().all()


def test_a_cache_may_serve_two_sequences_with_one_key() -> None:
    """Slots are read: a shared prefix has the same ones in several sequences."""
    case = attention(batch=1, padding=False)
    twice = case._replace(
        q=case.q.expand(2, -1, -1, -1), key_slots=case.key_slots.expand(2, -1), positions=case.positions.expand(2, -1)
    )
    for run in (peaks, rows):
        assert_bitwise_equal(run(twice), run(case).expand_as(run(twice)))
