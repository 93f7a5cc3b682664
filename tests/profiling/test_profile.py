"""The profiler: every plan as if tried alone, few long passes, the same result after a kill, and errors."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import fine_tuned, save_with_tokenizer, tiny_pair, tokens

import droidspeak_ops as ds
from droidspeak_ops.hf.passes import Pass
from droidspeak_ops.prefill.schedule import Work, resolve
from droidspeak_ops.profiling import run as profiling
from droidspeak_ops.profiling.frontier import WORST_KL
from droidspeak_ops.profiling.run import EVAL_TOKENS

LAYERS = 5
COSTS = ds.CostModel((0, 1e-4, 0), (0, 1e-5, 0), (0.05, 0, 0), 4000, 1000, "made up", (100, 2000))
BANDS = LAYERS * (LAYERS + 1) // 2


def examples(count: int, answer: int = 12) -> list[ds.Example]:
    return [ds.Example(tokens(90), tokens(6 + number), tokens(answer)) for number in range(count)]


@pytest.fixture(scope="module")
def pair() -> tuple:
    return tiny_pair(LAYERS)


@pytest.fixture(scope="module")
def maps(pair) -> ds.Maps:
    torch.manual_seed(1)
    cut = [ds.Example.cut(tokens(160), 32) for _ in range(12)]
    return ds.fit(*pair, cut, bands=[(2, 4)], show_progress=False)


@pytest.fixture(scope="module")
def some() -> list[ds.Example]:
    torch.manual_seed(2)
    return examples(6)


@pytest.fixture(scope="module")
def plain(pair, some) -> ds.Frontier:
    """Without maps."""
    return ds.profile(*pair, some, costs=COSTS, show_progress=False)


@pytest.fixture(scope="module")
def frontier(pair, some, maps) -> ds.Frontier:
    """With maps."""
    return ds.profile(*pair, some, maps=maps, costs=COSTS, show_progress=False)


def by_hand(pair, maps, point, example: ds.Example) -> tuple[float, float]:
    """Divergence and agreement of one plan on one example."""
    sender, receiver = pair
    context = ds.capture(sender, example.context, layers=range(LAYERS))
    return compared(receiver, ds.partial_prefill(receiver, context, point.plan, maps=maps), example)


@torch.no_grad()
def compared(receiver, cache, example: ds.Example) -> tuple[float, float]:
    """Divergence and agreement behind a cache of the context, by two ordinary forward passes."""
    answer = example.answer[:, :EVAL_TOKENS]
    ids = torch.cat((example.prompt, answer[:, :-1]), dim=1)
    count = answer.shape[1]
    own = receiver(ids, logits_to_keep=count).logits[0].double().log_softmax(-1)
    got = receiver(ids[:, 90:], past_key_values=cache, logits_to_keep=count).logits[0].double().log_softmax(-1)
    kl = (own.exp() * (own - got)).sum(-1).mean()
    return float(kl), float((own.argmax(-1) == got.argmax(-1)).double().mean())


def in_order(some: list[ds.Example], seed: int = 0) -> list[ds.Example]:
    import random

    groups = [[example] for example in some]
    random.Random(seed).shuffle(groups)
    return [group[0] for group in groups]


def test_every_plan_is_as_if_tried_alone(pair, maps, some, plain, frontier) -> None:
    assert maps.corrections, "or corrected starts are not tried"
    for used, found in ((None, plain), (maps, frontier)):
        for number, example in enumerate(in_order(some)):
            if number % 2:
                continue
            for point in found.points:
                if point.kl[number] is None:
                    continue
                kl, agreement = by_hand(pair, used, point, example)
                assert point.kl[number] == pytest.approx(kl, abs=2e-5), str(point)
                assert point.agreement[number] == pytest.approx(agreement), str(point)


def test_what_is_tried(maps, plain, frontier) -> None:
    # With the rest projected or fitted, a band of one layer is none; and the band of all layers has no rest.
    expected = {"reuse": 0, "project": 1 + LAYERS}, {"reuse": 0, "fitted": 1 + LAYERS}
    for found, missing_of_rest in zip((plain, frontier), expected, strict=True):
        assert {point.rest for point in found.points} == missing_of_rest.keys()
        for rest, missing in missing_of_rest.items():
            bands = [point.plan.bands for point in found.points if point.rest == rest]
            assert bands.count(()) == 1
            of_one = [each for each in bands if len(each) == 1]
            assert len(of_one) == len(set(of_one)) == BANDS - missing
        scattered = [point for point in found.points if len(point.plan.bands) > 1]
        assert scattered
        assert all(point.kl[:2] == (None, None) and None not in point.kl[2:] for point in scattered)
        whole = found.point(ds.Plan([(0, LAYERS)]))
        assert found.quality_loss(whole) == (0, 0, 0)
        assert max(whole.kl) < 1e-5
    assert not any(point.corrected for point in plain.points)
    for point in frontier.points:
        assert point.corrected == any(start in maps.corrections for start, _ in point.plan.bands)


@torch.no_grad()
def test_a_layer_that_is_reused_alone(pair, some, plain, frontier) -> None:
    sender, receiver = pair
    for number, example in enumerate(in_order(some)[:2]):
        context = ds.capture(sender, example.context)
        for layer in range(LAYERS):
            own = ds.capture(receiver, example.context)
            own.kv(layer).keys.copy_(context.kv(layer).keys)
            own.kv(layer).values.copy_(context.kv(layer).values)
            kl, _ = compared(receiver, ds.partial_prefill(receiver, own, ds.Plan()), example)
            for each in (plain.sensitivity[layer], frontier.sensitivity[layer]):
                assert (each.start, each.end) == (layer, layer + 1)
                assert each.kl[number] == pytest.approx(kl, abs=2e-5)


def test_sets_are_of_the_most_sensitive_layers(plain, frontier) -> None:
    for found in (plain, frontier):
        order = [each.start for each in sorted(found.sensitivity, key=lambda each: -sum(each.kl))]
        for point in found.points:
            if len(point.plan.bands) > 1:
                layers = {layer for start, end in point.plan.bands for layer in range(start, end)}
                assert layers == set(order[: len(layers)])


def test_the_work_of_a_plan(frontier, maps) -> None:
    assert frontier.point(ds.Plan()).work == Work(0, 0, 0, LAYERS)
    assert frontier.point(ds.Plan([(0, LAYERS)])).work == Work(LAYERS - 1, 1, 0, 0)
    fitted = frontier.point(ds.Plan([(1, 3)], project="rest"))
    roles = resolve(fitted.plan, LAYERS, maps).sources
    assert fitted.work.run == 1
    assert fitted.work.projected == 1 + sum(role in ("project", "fitted", "fitted_kv") for role in roles)
    assert fitted.work.hidden == len(maps.hidden_layers(fitted.plan))


@pytest.mark.parametrize("with_maps", [False, True])
def test_one_long_pass_from_each_start(pair, maps, with_maps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each band: of L layers, all run at most (L - 1) / 2 times, and the sender's, all but its last, once."""
    long, run = [], Pass.run

    def counted(self: Pass, layer: int, hidden_states: torch.Tensor, cache) -> torch.Tensor:
        long.append(hidden_states.shape[1] == 90)
        return run(self, layer, hidden_states, cache)

    monkeypatch.setattr(Pass, "run", counted)
    few = [ds.Example(tokens(90), tokens(4), tokens(1)) for _ in range(3)]
    ds.profile(*pair, few, maps=maps if with_maps else None, costs=COSTS, show_progress=False)
    assert sum(long) == 3 * (LAYERS - 1 + sum(LAYERS - 1 - start for start in range(LAYERS)))


def test_coarser_bands(pair) -> None:
    frontier = ds.profile(*pair, examples(3), granularity=2, costs=COSTS, show_progress=False)
    bands = {point.plan.bands[0] for point in frontier.points if len(point.plan.bands) == 1}
    assert bands == {(0, 2), (0, 4), (0, 5), (2, 4), (2, 5), (4, 5)}


def test_several_examples_of_a_context_count_as_one(pair) -> None:
    torch.manual_seed(3)
    some = examples(3)
    more = [ds.Example(each.context, tokens(5), tokens(4)) for each in some]
    both = ds.profile(*pair, [*some, *more], costs=COSTS, show_progress=False)
    one, other = (ds.profile(*pair, each, costs=COSTS, show_progress=False) for each in (some, more))
    for ours, first, second in zip(both.points, one.points, other.points, strict=False):
        if len(ours.plan.bands) < 2:
            assert ours.kl[1] == pytest.approx((first.kl[1] + second.kl[1]) / 2, abs=1e-6)


def test_the_same_seed_gives_the_same_frontier(pair, some, frontier, maps) -> None:
    assert ds.profile(*pair, some, maps=maps, costs=COSTS, show_progress=False) == frontier
    other = ds.profile(*pair, some, maps=maps, costs=COSTS, seed=1, show_progress=False)
    assert [point.kl for point in other.points] != [point.kl for point in frontier.points]


def interrupted_after(count: int, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Let a function of the profiler be interrupted after so many calls, until its calls, which are returned, are cleared."""
    calls, original = [], getattr(profiling, name)

    def interrupted(*args):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(profiling, name, interrupted)
    return calls


def alike(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of wanted tokens that were given in their place."""
    return float((given[: len(wanted)] == wanted[: len(given)]).double().mean())


def test_answers_are_scored_where_it_is_worth_it(pair, maps, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    asked = [ds.Example(tokens(90), tokens(6), tokens(8)) for _ in range(6)]
    with torch.no_grad():
        said = [pair[1].generate(each.prompt, max_new_tokens=8, do_sample=False)[:, 96:] for each in asked]
    some = [each._replace(answer=answer) for each, answer in zip(asked, said, strict=True)]
    options = {"maps": maps, "granularity": 2, "costs": COSTS, "score": alike, "show_progress": False}
    frontier = ds.profile(*pair, some, **options)
    assert frontier.scores == (1.0,) * 6, "the wanted answers are those of full prefill"
    best = frontier.pareto()
    assert [point for point in frontier.points if point.scores is not None] == sorted(best, key=frontier.points.index)
    point = best[len(best) // 2]
    for number, example in enumerate(in_order(some)):
        context = ds.capture(pair[0], example.context, layers=range(LAYERS))
        cache = ds.partial_prefill(pair[1], context, point.plan, maps=maps)
        out = pair[1].generate(example.prompt, past_key_values=cache, max_new_tokens=16, do_sample=False)
        assert point.scores[number] == alike(out[0, 96:], example.answer[0])
    lost = {floor: frontier.point(frontier.choose(max_quality_loss=floor)) for floor in (0.0, 0.3, 1.0)}
    assert frontier.quality_loss(lost[0.3]).value <= 0.3
    assert frontier.quality_loss(lost[0.0]).value <= 0.0
    assert frontier.seconds(lost[1.0]) <= frontier.seconds(lost[0.3]) <= frontier.seconds(lost[0.0])
    with pytest.raises(ValueError, match="point: expected one of the points with scores, got"):
        frontier.quality_loss(next(each for each in frontier.points if each.scores is None))
    frontier.save(tmp_path / "frontier.json")
    assert ds.Frontier.load(tmp_path / "frontier.json") == frontier

    # Times differ from run to run; those of a run that goes on are those that it began with.
    monkeypatch.setattr(profiling, "measure_costs", lambda *args, **options: COSTS)
    options["costs"] = None
    original = profiling.score_context
    interrupted_after(2, "score_context", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        ds.profile(*pair, some, **options, journal=tmp_path / "journal")
    monkeypatch.setattr(profiling, "score_context", original)
    monkeypatch.setattr(profiling, "measure_costs", lambda *args, **options: pytest.fail("measured again"))
    assert ds.profile(*pair, some, **options, journal=tmp_path / "journal") == frontier


def test_an_interrupted_run_goes_on(pair, some, frontier, maps, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal"
    measured = interrupted_after(4, "measure_context", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        ds.profile(*pair, some, maps=maps, costs=COSTS, journal=journal, show_progress=False)
    assert len(measured) == 4
    measured.clear()
    again = ds.profile(*pair, some, maps=maps, costs=COSTS, journal=journal, show_progress=False)
    assert len(measured) == 2
    assert again == frontier
    with pytest.raises(ValueError, match="expected a journal of this run, got that of another"):
        ds.profile(*pair, some, costs=COSTS, journal=journal, show_progress=False)


def _swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


def _with(index: int, **changes: Any) -> Callable[[list[bytes]], list[bytes]]:
    """Change fields of a record, under a checksum that fits it."""

    def change(lines: list[bytes]) -> list[bytes]:
        text = json.dumps({**json.loads(lines[index].partition(b" ")[2]), **changes}).encode()
        return [*lines[:index], b"%08x %b" % (zlib.crc32(text), text), *lines[index + 1 :]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swapped, "line 2: expected the record of the context [0-9a-f]+, got that of"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3: expected the record of the context"),
        (lambda lines: [*lines[:2], lines[4]], "line 3: expected the field context, got none"),
        (lambda lines: [*lines, lines[-1]], "line 9: expected the end of the journal"),
        (_with(3, kl=[0.5], agreement=[0.5]), "line 4: expected 3 measurements, got 1"),
        (_with(3, kl=[0.5]), "line 4: agreement: expected 1, as many as kl has, got 3"),
        (_with(3, kl=["much"] * 3), r"line 4: expected float, got str at kl\[0\]"),
        (_with(3, kl=[-0.5] * 3), "line 4: kl: expected finite divergences of 0 or more"),
        (_with(3, agreement=[1.5] * 3), "line 4: agreement: expected shares from 0 to 1"),
        (_with(4, run=None), "line 5: expected array, got null at run"),
        (_with(5, scores=[0.5]), "line 6: expected [0-9]+ measurements, got 1"),
        (_with(5, scores=[True] * 3), r"line 6: expected float, got bool at scores\[0\]"),
    ],
)
def test_a_record_that_is_not_of_its_context_is_named(
    pair, some, whole_journal: bytes, change: Any, message: str, tmp_path
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"\n".join(change(whole_journal.splitlines())) + b"\n")
    with pytest.raises(ValueError, match=rf"{path}, {message}"):
        ds.profile(*pair, some[:3], granularity=LAYERS, costs=COSTS, score=alike, journal=path, show_progress=False)


@pytest.fixture(scope="module")
def whole_journal(pair, some, tmp_path_factory) -> bytes:
    """Of a run over three contexts: its first line, the contexts, the costs, and the scores of the contexts."""
    path = tmp_path_factory.mktemp("whole") / "journal"
    options = {"granularity": LAYERS, "costs": COSTS, "score": alike, "show_progress": False}
    frontier = ds.profile(*pair, some[:3], **options, journal=path)
    assert len(path.read_bytes().splitlines()) == 1 + 3 + 1 + 3
    assert ds.profile(*pair, some[:3], **options, journal=path) == frontier
    return path.read_bytes()


def test_scores_that_are_no_numbers_are_refused(pair, some) -> None:
    options = {"granularity": LAYERS, "costs": COSTS, "show_progress": False}
    with pytest.raises(ValueError, match="score: expected a finite number, got nan"):
        ds.profile(*pair, some[:3], **options, score=lambda *answers: float("nan"))


def test_plans_whose_logits_are_no_numbers_are_the_worst(pair, some, tmp_path) -> None:
    """Where a layer of the sender gives NaN, nothing that reads it there is chosen, and files hold what was measured."""
    sender = copy.deepcopy(pair[0])
    with torch.no_grad():
        sender.model.layers[2].self_attn.k_proj.weight.fill_(float("nan"))
    frontier = ds.profile(sender, pair[1], some[:3], costs=COSTS, journal=tmp_path / "journal", show_progress=False)
    assert set(frontier.point(ds.Plan()).kl) == {WORST_KL}
    own = [point for point in frontier.points if point.kl[2] < WORST_KL]
    assert {point.plan.bands for point in own} == {((start, LAYERS),) for start in range(3)}
    assert frontier.choose(max_quality_loss=1.0) in {point.plan for point in own}
    frontier.save(tmp_path / "frontier.json")
    assert ds.Frontier.load(tmp_path / "frontier.json") == frontier


def profile_many(journal: Path | None) -> ds.Frontier:
    return ds.profile(*tiny_pair(LAYERS), examples(16), costs=COSTS, journal=journal, show_progress=False)


SCRIPT = """
import os
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
import torch
from test_profile import profile_many
torch.set_num_threads(1)
profile_many(Path(sys.argv[2]))
"""


def test_a_run_that_is_killed_goes_on(tmp_path) -> None:
    """To the same bytes; test_files.py kills the journal itself at every moment."""
    journal, folders = tmp_path / "journal", os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, folders, str(journal)])
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before its end"
    profile_many(journal).save(tmp_path / "killed.json")
    profile_many(None).save(tmp_path / "whole.json")
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


# --- errors and the cost model -------------------------------------------------------------------------------------------


def test_a_pair_without_enough_contexts(pair) -> None:
    with pytest.raises(ValueError, match="examples: expected at least 3 contexts, got 2"):
        ds.profile(*pair, examples(2), costs=COSTS, show_progress=False)


@pytest.mark.parametrize("granularity", [0, LAYERS + 1])
def test_a_granularity_that_is_none(pair, granularity: int) -> None:
    with pytest.raises(
        ValueError, match=f"granularity: expected 1 to {LAYERS}, the number of layers, got {granularity}"
    ):
        ds.profile(*pair, examples(3), granularity=granularity, costs=COSTS, show_progress=False)


def test_maps_of_another_pair(pair, maps) -> None:
    with pytest.raises(ds.ReuseError, match="got maps fitted to a receiver with other weights"):
        ds.profile(pair[0], fine_tuned(pair[1]), examples(3), maps=maps, costs=COSTS, show_progress=False)


def test_an_empty_answer(pair) -> None:
    some = examples(3)
    some[0] = some[0]._replace(answer=tokens(2)[:, :0])
    with pytest.raises(ValueError, match="expected the answer of example 0 to be non-empty"):
        ds.profile(*pair, some, costs=COSTS, show_progress=False)


def test_costs_are_measured(pair) -> None:
    costs = ds.measure_costs(pair[1], tokens=(16, 32, 64), rounds=1, show_progress=False)
    assert costs.kv_bytes == 2 * 2 * 16 * 4
    assert costs.hidden_bytes == 48 * 4
    assert costs.tokens == (16, 64)
    assert "float32" in costs.machine
    with pytest.raises(ValueError, match="tokens: expected three increasing lengths, got"):
        ds.measure_costs(pair[1], tokens=(16, 32), show_progress=False)


def test_a_plan_that_was_chosen_serves_its_pair_alone(pair, maps) -> None:
    """The frontier's pair, and its maps or none, are checked where its plan is used."""
    sender, receiver = pair
    for used in (None, maps):
        frontier = ds.profile(*pair, examples(3), maps=used, costs=COSTS, granularity=3, show_progress=False)
        plan = frontier.choose(max_quality_loss=0.5)
        context = ds.capture(sender, tokens(20), layers=range(1, sender.config.num_hidden_layers))
        for given in (receiver, ds.Receiver(receiver)):
            ds.partial_prefill(given, context, plan, maps=used)
            with pytest.raises(ds.ReuseError, match="plan: expected (no maps|maps), as it was chosen with, got"):
                ds.partial_prefill(given, context, plan, maps=None if used is maps else maps)
        other = fine_tuned(receiver)
        if used is None:
            with pytest.raises(ds.ReuseError, match="plan: expected the pair .* got a receiver with other weights"):
                ds.partial_prefill(other, context, plan)


def test_a_digest_is_of_what_maps_do(maps, tmp_path) -> None:
    maps.save(tmp_path / "maps.safetensors")
    assert ds.Maps.load(tmp_path / "maps.safetensors").digest() == maps.digest()
    assert dataclasses.replace(maps, corrections={}).digest() != maps.digest()


# --- the command ---------------------------------------------------------------------------------------------------------


def words(count: int) -> str:
    return " ".join(f"w{number}" for number in tokens(count, vocabulary=100)[0].tolist())


@pytest.fixture
def named(pair, tmp_path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pair as folders, to be timed as if it had been."""
    monkeypatch.setattr(profiling, "measure_costs", lambda *args, **options: COSTS)
    return [save_with_tokenizer(model, tmp_path / str(number)) for number, model in enumerate(pair)]


def test_the_command_profiles_with_maps(named, maps, tmp_path, capsys) -> None:
    from droidspeak_ops.cli import main

    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(words(500), encoding="utf-8")
    maps.save(tmp_path / "maps.safetensors")
    options = ["--tokens", "100", "--granularity", "2", "--maps", str(tmp_path / "maps.safetensors"), "--out", str(out)]
    main(["profile", *named, str(text), *options])
    assert {path.name for path in out.iterdir()} == {
        "frontier.json", "report.html", "frontier.png", "quality.png", "bands.png", "sensitivity.png",
    }  # fmt: skip
    frontier = ds.Frontier.load(out / "frontier.json")
    assert frontier.contexts == (67,) * 5
    assert frontier.maps == maps.digest()
    said = capsys.readouterr().out.replace("\n", "")  # the console wraps long paths
    assert "faster" in said and "report.html" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
    assert "<td>10%</td>" in page and 'src="http' not in page


def test_the_command_scores_answers(named, tmp_path) -> None:
    from droidspeak_ops.cli import main

    lines = [json.dumps({"context": words(40), "suffix": words(5), "answer": words(4)}) for _ in range(4)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    main(
        ["profile", *named, str(tmp_path / "some.jsonl"), "--metric", "edit similarity", "--out", str(tmp_path / "out")]
        + ["--granularity", "2"]
    )
    frontier = ds.Frontier.load(tmp_path / "out" / "frontier.json")
    assert len(frontier.scores) == 4 and all(0 <= score <= 1 for score in frontier.scores)
