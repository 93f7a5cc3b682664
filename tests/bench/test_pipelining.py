"""The bench of loading and prefill at once, on tiny models: what it writes."""

from pathlib import Path

from support.models import tiny_pair

from bench import pipelining
from bench.common import read_csv
from bench.pairs import PAIRS, LoadedPair


def test_what_is_written(tmp_path: Path) -> None:
    pair = LoadedPair(PAIRS["lora"], *tiny_pair(6), None)
    rows = pipelining.run(pair, tmp_path / "out", "tiny", tokens=32, rounds=1, bandwidths=[1e7, 1e9])
    compared, first_tokens = (read_csv(tmp_path / "out" / f"{name}.csv") for name in ("pipelining", "bandwidth"))
    names = ["band [2, 4)", "all projected"]
    assert [(row["plan"], float(row["load"])) for row in compared] == [
        (name, load) for name in names for load in pipelining.LOADS
    ]
    assert len(rows) == len(compared) and all(float(row["pipelined_of_max"]) > 0 for row in compared)
    assert [row["plan"] for row in first_tokens] == [
        "full prefill",
        *(["all reused"] * 2),
        *names[:1] * 2,
        *names[1:] * 2,
    ]
    assert all(float(row["first_token_ms"]) > 0 and float(row["predicted_ms"]) > 0 for row in first_tokens)
    for name in ("pipelining.png", "trace.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "trace.json").stat().st_size > 0


def test_bytes_are_those_that_are_read() -> None:
    loaded = pipelining.Loaded(LoadedPair(PAIRS["lora"], *tiny_pair(6), None), 32)
    band, rest = pipelining.plans(6)
    hidden_states, kv = 32 * 48 * 4, 2 * 2 * 32 * 16 * 4
    assert (loaded.nbytes(band), loaded.nbytes(rest)) == (hidden_states + 4 * kv, 5 * hidden_states)
