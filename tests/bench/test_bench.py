"""The benches without a GPU: what they refuse, choose and write."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import fine_tuned, tiny_llama, tokens

import droidspeak_ops as ds
from bench import contexts, memory, projection, tune
from bench.common import read_csv
from bench.providers import GROUPED, PROVIDERS, Problem, ours
from droidspeak_ops.context.growing import HEADROOM
from droidspeak_ops.kernels.project_splice_config import ProjectSpliceConfig, Size, size_of
from droidspeak_ops.ops import tuning
from droidspeak_ops.proof.shapes import SHAPES, projections

EAGER = [name for name in PROVIDERS if name not in ("compile", "liger")]
DEFAULT = ProjectSpliceConfig(128, 64, 64, 8, 3)
OTHERS = [ProjectSpliceConfig(64, 64, 64, 4, stages) for stages in (2, 3, 4)]
ENTRY = {"dtype": "torch.bfloat16", "hidden_size": 64, "num_kv_heads": 2, "head_dim": 32, "has_head_norm": False,
         "num_tokens": 8192}  # fmt: skip
TUNED = {"device": "A100", "torch": "2", "triton": "3"}


def run_on_cpu(tmp_path: Path, *options: str) -> list[dict[str, str]]:
    path = tmp_path / "rows.csv"
    rows = projection.main(["--device", "cpu", "--tokens", "8", "--rounds", "1", "--csv", str(path), *options])
    written = read_csv(path)
    assert [(row["provider"], row["check"]) for row in rows] == [(row["provider"], row["check"]) for row in written]
    return written


def test_projection_on_the_cpu(tmp_path: Path) -> None:
    plot = tmp_path / "speedups.png"
    rows = run_on_cpu(tmp_path, "--providers", *EAGER, "liger", "--plot", str(plot))
    assert list(rows[0]) == [
        "model", "tokens", "provider", "milliseconds", "speedup", "roofline_percent", "check", "device", "torch", "triton",
        "transformers",
    ]  # fmt: skip
    assert [row["provider"] for row in rows] == [name for name in PROVIDERS if name != "compile"]
    for row in rows:
        timed = row["provider"] != "liger"
        assert bool(row["milliseconds"]) == bool(row["speedup"]) == timed
        assert row["check"].startswith("max " if timed else "skipped: ")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("model", ["Qwen2.5-7B", "Gemma-3-12B", "OLMo-2-7B", "Phi-2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_providers_agree_with_float64(model: str, dtype: torch.dtype) -> None:
    shape = replace(SHAPES[model], hidden_size=48, num_kv_heads=2)
    for layers, providers in ((1, {name: PROVIDERS[name] for name in EAGER}), (2, GROUPED)):
        problem = Problem(shape, 6, dtype, "cpu", layers)
        for row in projection.measure(model, problem, providers, rounds=1):
            assert row["milliseconds"] is not None, row


def slightly_wrong(problem: Any) -> Callable[[], None]:
    right = ours(problem)

    def run() -> None:
        right()
        problem.outputs[0][..., -1, 0] *= 1.001

    return run


def not_written(problem: Any) -> Callable[[], None]:
    return lambda: None


@pytest.mark.parametrize("wrong", [slightly_wrong, not_written])
def test_a_wrong_provider_is_refused(wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "ours", wrong)
    with pytest.raises(SystemExit) as stopped:
        run_on_cpu(tmp_path, "--providers", "transformers", "ours")
    assert stopped.value.code == 1
    right, refused = read_csv(tmp_path / "rows.csv")
    assert right["milliseconds"]
    assert refused["check"].startswith("refused: ")
    assert refused["milliseconds"] == refused["speedup"] == refused["roofline_percent"] == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_nothing_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert projection.main([]) == tune.main([str(tmp_path / "tuned.json")]) == []
    assert capsys.readouterr().out.count("a GPU is needed") == 2
    assert not list(tmp_path.iterdir())


def size(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Size:
    shape = replace(SHAPES["Llama-3-8B"], **changes)
    return size_of(projections(shape, 4096, dtype=dtype))


def allowed(*, shared: int = 227 << 10, **changes: Any) -> set[ProjectSpliceConfig]:
    return set(tune.candidates(DEFAULT, size(**changes), shared, 32))


def test_candidates_follow_the_rules_of_the_kernel() -> None:
    free = allowed()
    assert DEFAULT in free
    assert all(config.num_stages < 4 for config in allowed(shared=64 << 10) if config.block_k == 128)
    wide = allowed(head_dim=256, rotary_dim=256, head_norm="each")
    assert wide and {config.block_n for config in wide} == {128}
    assert wide < free
    assert {(config.tma, config.persistent) for config in free} == {(False, False), (True, False), (True, True)}
    assert all(config.block_n % 64 == 0 for config in free if config.tma)
    assert not any(config.tma for config in allowed(rotary_dim=64))


def test_candidates_of_a_configuration_with_other_fields() -> None:
    @dataclass(frozen=True)
    class Config(ProjectSpliceConfig):
        swizzled: bool = False
        order: str = "rows"

    default = Config(**vars(DEFAULT))
    found = list(tune.candidates(default, size(), 227 << 10, 32))
    assert len(found) == 2 * len(allowed())
    assert {(config.swizzled, config.order) for config in found} == {(False, "rows"), (True, "rows")}
    assert replace(default, swizzled=True) in tune.nearest(default, found)[:8]


def test_candidates_that_are_asked_for(tmp_path: Path) -> None:
    free = allowed()
    near = tune.selected("7", DEFAULT, free)
    assert len(near) == 7 and DEFAULT not in near
    assert all(sum(vars(config)[name] != vars(DEFAULT)[name] for name in vars(config)) == 1 for config in near[:5])
    assert set(tune.selected(None, DEFAULT, free)) == free - {DEFAULT}
    changes = [{"block_m": 64}, {"num_warps": 4, "num_stages": 2}]
    wanted = [replace(DEFAULT, **change) for change in changes]
    path = tmp_path / "candidates.json"
    path.write_text(json.dumps(changes))
    assert tune.selected(json.dumps(changes), DEFAULT, free) == tune.selected(str(path), DEFAULT, free) == wanted


def test_candidates_are_compiled_in_processes(device: torch.device) -> None:
    shape = replace(SHAPES["Llama-3-8B"], hidden_size=32, num_kv_heads=1, head_dim=32, rotary_dim=32)
    small = ProjectSpliceConfig(16, 16, 16, 1, 1)
    configs = [replace(small, block_n=17), small]  # the first does not compile
    jobs = [partial(tune.launches, shape, 20, torch.float16, str(device), config) for config in configs]
    assert [job() for job in jobs] == tune.compiled(jobs, processes=1) == [False, True]


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ([0.98, 0.99, None], DEFAULT),  # not by 3 %
        ([0.90, 0.80, None], OTHERS[1]),
        ([None, None, None], DEFAULT),
    ],
)
def test_choice(times: list[float | None], best: ProjectSpliceConfig) -> None:
    table = {DEFAULT: 1.0, **dict(zip(OTHERS, times, strict=True))}
    assert tune.choose(DEFAULT, OTHERS, table.__getitem__) == tune.Choice(best, table[best], 1.0)


def test_a_lucky_choice_has_to_win_again() -> None:
    times = {DEFAULT: iter([1.0, 1.0]), OTHERS[0]: iter([0.5, 0.99])}
    choice = tune.choose(DEFAULT, OTHERS[:1], lambda config: next(times[config]))
    assert choice == tune.Choice(DEFAULT, 1.0, 1.0)


def test_a_default_that_does_not_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not run"):
        tune.choose(DEFAULT, OTHERS, lambda config: None)


def test_a_configuration_with_another_result_is_not_timed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.testing.do_bench", lambda run, return_mode: 1.0)
    shape = replace(SHAPES["Llama-3-8B"], hidden_size=32, num_kv_heads=1, head_dim=32, rotary_dim=32)
    layers = projections(shape, 20, dtype=torch.float16, device=str(device))
    small = ProjectSpliceConfig(16, 16, 16, 1, 1)
    time = tune.timer(layers, small)
    assert time(replace(small, block_m=32)) == 1.0
    assert time(replace(small, block_n=17)) is None  # does not compile
    layers[0].hidden_states.mul_(1.01)
    assert time(small) is None


def test_the_search_times_what_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "target", lambda device: "sm_90")
    active = SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 << 10}),
        get_current_target=lambda: SimpleNamespace(warp_size=32),
    )
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=active))
    monkeypatch.setattr(tune, "compiled", lambda jobs, processes, deadline: [False] * 3 + [True] * (len(jobs) - 3))
    monkeypatch.setattr(tune, "projections", lambda *args, **options: projections(*args, dtype=options["dtype"]))
    monkeypatch.setattr(tune, "timer", lambda layers, default: lambda config: 1.0 if config == default else 0.5)
    models = ["Llama-3-8B", "Qwen3-8B"]
    found = list(tune.tune(models, [torch.bfloat16], 8192, wanted="5", report=reported.append))
    for model, (key, choice) in zip(models, found, strict=True):
        shape = SHAPES[model]
        assert tuple(key) == tuning.KEY and key["has_head_norm"] == (shape.head_norm is not None)
        assert (choice.milliseconds, choice.default_milliseconds) == (0.5, 1.0)
        times = [row["milliseconds"] for row in reported if row["model"] == model]
        # The default, what compiles, and the winner with the default once more: of the first model three do not compile.
        assert times == [1.0, *([0.5] * (2 if model == "Llama-3-8B" else 5)), 0.5, 1.0]


def test_without_time_the_default_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tune.Problem("Llama-3-8B", torch.bfloat16, 8192, DEFAULT, OTHERS)
    monkeypatch.setattr(tune.Problem, "of", lambda *args: problem)
    monkeypatch.setattr(tune.Problem, "timer", lambda self, report: lambda config: 1.0 if config == DEFAULT else 0.5)
    monkeypatch.setattr(tune, "compiled", lambda jobs, processes, deadline: [True] * len(jobs))
    ((_, choice),) = tune.tune(["Llama-3-8B"], [torch.bfloat16], 8192, seconds=0)
    assert choice == tune.Choice(DEFAULT, 1.0, 1.0)


def test_what_is_tuned_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    other = {**ENTRY, "has_head_norm": True}
    tune.write(path, "A100", [(ENTRY, tune.Choice(OTHERS[0], 0.9, 1.0)), (other, tune.Choice(DEFAULT, 1.0, 1.0))])
    assert tuning.load(path, "A100") == {tuple(ENTRY.values()): OTHERS[0]}  # defaults are not written


def test_tuned_for_another_gpu_or_triton(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    tuning.save(path, "A100", [{**ENTRY, "config": vars(DEFAULT)}])
    with pytest.warns(UserWarning, match=r"tuned\.json was tuned for .*A100.*not used"):
        assert tuning.load(path, "H100") == {}
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "triton": "0.1"}))
    with pytest.warns(UserWarning, match="not used"):
        assert tuning.load(path, "A100") == {}


@pytest.mark.parametrize(
    "text",
    ["not JSON", "{}", "[]", '{"device": "A100", "triton": "3", "project_splice": [{"dtype": "torch.float16"}]}',
     json.dumps({**TUNED, "project_splice": [{**ENTRY, "config": {"block_m": 1, "tile": 2}}]}),
     json.dumps({**TUNED, "project_splice": [{**ENTRY, "config": vars(DEFAULT), "milliseconds": float("nan")}]}),
     json.dumps({**TUNED, "project_splice": [{**ENTRY, "config": {**vars(DEFAULT), "block_m": 0}}]}),
     json.dumps({**TUNED, "project_splice": [{**ENTRY, "config": {**vars(DEFAULT), "tma": 1}}]}),
     json.dumps({**TUNED, "project_splice": [{**ENTRY, "config": vars(DEFAULT), "speed": 1}]}),
     json.dumps({**TUNED, "project_splice": []})[:-1] + ', "device": "H100"}',
     json.dumps({**TUNED, "project_splice": [{**ENTRY, "hidden_size": -1, "config": vars(DEFAULT)}]}),
     json.dumps({**TUNED, "project_splice": [{**ENTRY, "config": vars(DEFAULT)}] * 2}), b"\xff\xfe"],
)  # fmt: skip
def test_a_malformed_file_is_named(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"tuned\.json: expected "):
        tuning.load(path, "A100")


def test_contexts_of_tiny_models() -> None:
    sender = tiny_llama()
    receiver = fine_tuned(sender)
    asked = [ds.Example(ids[:, :20], ids[:, 20:], tokens(3)) for ids in (tokens(24), tokens(24))]

    rows = contexts.quantized_rows(sender, receiver, asked)
    assert len(rows) == 1 + 4 * 3 + 3
    own, *coded = [float(row["kl"]) for row in rows if row["context"] == "own"]
    assert own < 1e-10 < min(coded)
    assert {row["of_float32"] for row in rows if row["plan"] == "all reused"} == {"1.000", f"{(64 + 4) / 256:.3f}"}

    rows = contexts.rope_rows(sender, receiver, asked)
    assert len(rows) == 2 + len(contexts.ROPES) * 4 + 1 + len(contexts.ROPES) * 2
    own, *others = [float(row["kl"]) for row in rows if row["context"] == "own"]
    assert own < 1e-10 < min(others)


def test_memory_of_tiny_models() -> None:
    sender = tiny_llama()
    receiver = fine_tuned(sender)
    full = memory.full_caches(sender, receiver, tokens(300), 3)
    kept, released, appended = memory.shared_context(sender, receiver, tokens(300), 3)
    row = 2 * 2 * 64 * 4  # K and V of a token in a layer
    assert full[0].storages == 3 * 6 * 300 * row
    assert kept.storages == 6 * 300 * row + 300 * 48 * 4 + 3 * 2 * (300 + HEADROOM) * row
    assert released.storages == 4 * 300 * row + 3 * 2 * (300 + HEADROOM) * row
    assert appended.storages == 3 * (2 * (300 + HEADROOM) + 4 * (301 + HEADROOM)) * row
    assert len(memory.memory_rows([*full, kept, released, appended])) == 4
