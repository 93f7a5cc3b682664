"""The attention kernels against their references: what rows see, where keys lie, heads to a kv head, masks of every kind."""

from functools import partial

import pytest
import torch
from support.cases import attention, covering
from support.compare import assert_bitwise_equal, assert_close

from droidspeak_ops.kernels.attend_rows import attend_rows
from droidspeak_ops.kernels.attention_config import AttentionConfig, attention_config, keys_per_lse, keys_per_split
from droidspeak_ops.kernels.attention_peaks import attention_peaks
from droidspeak_ops.ops import reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def peaks_kernel(*args) -> None:
    attention_peaks("sm_80", *args)


def rows_kernel(*args) -> None:
    attend_rows("sm_80", *args)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 64 keys: a few keys are several, more than are combined at once. And a tile that is quick to interpret."""
    for kernel in ("attention_peaks", "attend_rows"):
        config = AttentionConfig(64, 64, num_warps=4, num_stages=1)
        monkeypatch.setattr(
            f"droidspeak_ops.kernels.{kernel}.attention_config", lambda *_, config=config, **options: config
        )
    monkeypatch.setattr("droidspeak_ops.kernels.attention_peaks.keys_per_lse", lambda num_q_heads: 64)
    monkeypatch.setattr("droidspeak_ops.kernels.attention_peaks.BLOCK_SPLITS", 2)
    monkeypatch.setattr("droidspeak_ops.kernels.attend_rows.keys_per_split", lambda num_q_heads: 64)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("options", list(covering({
    "dtype": FLOATS,
    "head_dim": [16, 80, 128, 256],
    "layout": ["dense", "NHD", "HND", "strided"],
    "window": [None, 1, 40],
    "softcap": [None, 5.0],
    "sinks": [None, torch.float32, "model"],
    "group": [1, 3, 4],
    "kv_heads": [1, 2],
    "rows": [5, 1, 19],
    "keys": [70, 1, 150],
    "missing": [True, False],
    "padding": [True, False],
})), ids=lambda options: "-".join(str(value) for value in options.values()))  # fmt: skip
def test_attention_in_every_pair_of_variants(options: dict, device: torch.device) -> None:
    if options["sinks"] == "model":
        options = {**options, "sinks": options["dtype"]}
    case = attention(**options, batch=2 if options["rows"] < 19 else 1, device=device)
    before = torch.rand(case.key_slots.shape, device=device) * 0.1
    results = [case.peaks_of(run, before.clone()) for run in (peaks_kernel, reference.attention_peaks_ref)]
    assert_close(*results, operations=2)
    results = [case.rows_of(run, case.new_rows()) for run in (rows_kernel, reference.attend_rows_ref)]
    assert_close(*results, operations=2)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *((target, torch.bfloat16) for target in ("sm_80", "sm_90", "gfx942")),
        *((target, torch.float32) for target in ("sm_90", "gfx942")),
    ],
)
def test_every_tile_gives_the_same(target: str, dtype: torch.dtype, device: torch.device) -> None:
    """With splits as they are: of 512 keys and of 256."""
    case = attention(batch=1, rows=3, keys=530, kv_heads=1, dtype=dtype, layout="HND", device=device)
    for run, reference_run, fresh in (
        (attention_peaks, reference.attention_peaks_ref, case.new_peaks),
        (attend_rows, reference.attend_rows_ref, case.new_rows),
    ):
        of = case.peaks_of if run is attention_peaks else case.rows_of
        assert_close(of(partial(run, target), fresh()), of(reference_run, fresh()), operations=2)


@pytest.mark.usefixtures("short_splits")
def test_a_row_does_not_depend_on_the_rows_around_it(device: torch.device) -> None:
    """Nor on other sequences, on the order of rows, or on keys that it does not see."""
    case = attention(rows=33, keys=130, dtype=torch.bfloat16, window=90, sinks=torch.float32, device=device)
    some = torch.tensor([31, 4, 17], device=device)
    case.positions[1, some] = torch.tensor([12, 66, 100], device=device)
    together = case.rows_of(rows_kernel, case.new_rows())
    alone = case._replace(q=case.q[1:, some], key_slots=case.key_slots[1:, :101], positions=case.positions[1:, some])
    assert_bitwise_equal(alone.rows_of(rows_kernel, alone.new_rows()), together[1:, some])
    row_by_row = [alone._replace(q=alone.q[:, n : n + 1], positions=alone.positions[:, n : n + 1]) for n in range(3)]
    peaks = [each.peaks_of(peaks_kernel, each.new_peaks()) for each in row_by_row]
    assert_bitwise_equal(alone.peaks_of(peaks_kernel, alone.new_peaks()), torch.stack(peaks).amax(0))


def test_slots_outside_of_the_cache_are_not_held(device: torch.device) -> None:
    """Where values are not looked at, as on a GPU: nothing is read there."""
    case = attention(missing=False, device=device)
    slots = case.key_slots.clone()
    slots[:, 5], slots[:, 9], slots[:, 20], slots[:, 30] = 86, -7, 2**40, -(2**40)
    held = slots.masked_fill((slots < 0) | (slots > 85), -1)
    for run in (lambda each: each.peaks_of(peaks_kernel, each.new_peaks()),
                lambda each: each.rows_of(rows_kernel, each.new_rows())):  # fmt: skip
        assert_bitwise_equal(run(case._replace(key_slots=slots)), run(case._replace(key_slots=held)))


def test_nothing_is_hidden_and_nothing_invented(device: torch.device) -> None:
    """NaN and what sees nothing are as in the reference, and so are sizes of 0 and positions beyond the keys."""
    case = attention(batch=1, missing=False, padding=False, sinks=torch.float32, device=device)
    case = case._replace(positions=torch.tensor([[3, -1, 20, 30, 1000, 12, 25]], device=device), q=case.q.clone())
    case.key_slots[0, :4] = -1
    broken = case._replace(q=case.q.clone(), positions=case.positions.clamp(max=30))
    broken.q[0, 3, 1, 5] = torch.nan
    unwritten = broken._replace(v_cache=case.v_cache.clone(), q=case.q)
    unwritten.v_cache[:, :, 31:] = torch.nan
    unwritten.k_cache[:, :, 31:] = torch.nan
    for each in (
        case, broken, unwritten,
        case._replace(key_slots=case.key_slots[:, :0]),
        case._replace(q=case.q[:, :0], positions=case.positions[:, :0]),
    ):  # fmt: skip
        for of, kernel, expected, fresh in (
            (each.peaks_of, peaks_kernel, reference.attention_peaks_ref, each.new_peaks),
            (each.rows_of, rows_kernel, reference.attend_rows_ref, each.new_rows),
        ):
            actual, wanted = of(kernel, fresh()), of(expected, torch.zeros_like(fresh()))
            assert torch.equal(actual.isnan(), wanted.isnan())
            assert_close(actual.nan_to_num(), wanted.nan_to_num(), operations=2)
    peaks = torch.full((1, 40), torch.nan, device=device)
    assert case.peaks_of(peaks_kernel, peaks).isnan().all()


def test_the_tile_depends_on_the_model_alone() -> None:
    """And splits grow with the heads, so that few rows fill a GPU whatever the model, and many leave no more to be combined."""
    assert [keys_per_split(heads) for heads in (1, 8, 9, 28, 32, 64)] == [512, 512, 1024, 2048, 2048, 4096]
    assert keys_per_lse(32) == 1024
    for dtype in FLOATS:
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            for head_dim in (16, 64, 80, 128, 256):
                for reads_values in (False, True):
                    config = attention_config(target, dtype, head_dim, reads_values=reads_values)
                    assert config.block_n <= 256 and 256 % config.block_n == 0  # splits are whole blocks of keys
