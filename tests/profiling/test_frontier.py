"""The frontier and its cost model: what is chosen for which need, on figures made up so that the answer is known."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import droidspeak_ops as ds
from droidspeak_ops.prefill.schedule import Work, resolve
from droidspeak_ops.profiling import bootstrap
from droidspeak_ops.profiling.cost import CostModel, Polynomial
from droidspeak_ops.profiling.frontier import WORST_KL, Frontier, Point, Sensitivity
from droidspeak_ops.profiling.loss import LossCurve
from droidspeak_ops.profiling.report import write_report

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MODEL = ds.Fingerprint({"num_hidden_layers": 10}, {}, "float32", "0" * 64)
COSTS = CostModel(
    run=(0.0, 1e-4, 0.0),  # 0.1 s for 1,000 tokens
    project=(0.0, 1e-5, 0.0),
    rest=(0.05, 0.0, 0.0),
    hidden_bytes=4000,
    kv_bytes=1000,
    machine="made up",
    tokens=(100, 2000),
)


def point(plan: ds.Plan, work: Work, kl: float, *, rest="reuse") -> Point:
    """That loses a fifth of the root of its divergence."""
    return Point(plan, rest, False, work, (kl,) * 6, (1 - 0.2 * kl**0.5,) * 6)


REUSED = point(ds.Plan(), Work(run=0, projected=0, hidden=0, kv=10), 1.0)
PROJECTED = point(ds.Plan(project="rest"), Work(0, 10, 9, 0), 0.16, rest="project")
BAND = point(ds.Plan([(4, 8)]), Work(3, 1, 1, 6), 0.04)
LONG = point(ds.Plan([(2, 9)]), Work(6, 1, 1, 3), 0.002)
ALL = point(ds.Plan([(0, 10)]), Work(9, 1, 0, 0), 0.0)
WORSE = point(ds.Plan([(0, 7)]), Work(6, 1, 0, 3), 0.2)
ALONE = tuple(Sensitivity(layer, layer + 1, (0.01 * layer, 0.02 * layer)) for layer in range(10))
FRONTIER = Frontier(MODEL, MODEL, None, (REUSED, PROJECTED, BAND, LONG, ALL, WORSE), ALONE, COSTS, (1000,) * 6, 2, 1, 0)


def test_seconds_are_those_of_the_work() -> None:
    assert COSTS.seconds(Work(3, 1, 1, 6), 1000) == pytest.approx(3 * 0.1 + 0.01 + 0.05)


def test_loading_and_filling_go_on_at_once() -> None:
    """From when the band's hidden states have arrived, and the suffix comes after both."""
    of_band = Work(3, 1, 1, 6)  # 0.31 s; 4 MB of hidden states, and 6 of K and V
    assert COSTS.seconds(of_band, 1000, bandwidth=1e7) == pytest.approx((4e6 + 6e6) / 1e7 + 0.05)
    assert COSTS.seconds(of_band, 1000, bandwidth=4e7) == pytest.approx(4e6 / 4e7 + 0.31 + 0.05)
    assert COSTS.seconds(of_band, 1000, bandwidth=1e15) == pytest.approx(COSTS.seconds(of_band, 1000))
    from_the_start = Work(3, 1, 0, 6)  # of embeddings, which nothing waits for
    assert COSTS.seconds(from_the_start, 1000, bandwidth=4e7) == pytest.approx(0.31 + 0.05)


def test_the_polynomial_goes_through_what_was_measured() -> None:
    lengths, seconds = (256, 1024, 2048), (0.3, 1.3, 3.1)
    polynomial = Polynomial.fit(lengths, seconds)
    assert [polynomial.evaluate(length) for length in lengths] == pytest.approx(seconds)
    assert Polynomial(-1.0, 0.0, 0.0).evaluate(5) == 0.0


def test_a_plan_whose_logits_are_no_numbers_is_the_worst(tmp_path) -> None:
    """On one context or on all; the other plans are what they were without it, and files hold it."""
    for kl in ((WORST_KL,) * 6, (1.0, WORST_KL, 1.0, 1.0, 1.0, 1.0), (1.0,) * 5 + (WORST_KL,)):
        nothing = dataclasses.replace(REUSED, kl=kl)
        alone = (Sensitivity(0, 1, (WORST_KL, WORST_KL)), *ALONE[1:])
        frontier = dataclasses.replace(FRONTIER, points=(nothing, *FRONTIER.points[1:]), sensitivity=alone)
        if WORST_KL in kl[:4]:
            assert frontier.typical_kl(nothing) == frontier.expected_loss(nothing) == float("inf")
            assert frontier.choose(max_quality_loss=1.0) == PROJECTED.plan
            assert frontier.pareto() == [PROJECTED, BAND, LONG, ALL]
        assert frontier.typical_kl(BAND) == pytest.approx(FRONTIER.typical_kl(BAND))
        for held_out in (False, True):
            estimate = frontier.kl(nothing, held_out=held_out)
            assert all(map(math.isfinite, estimate))
            assert (estimate.value > 1e300) == (WORST_KL in (kl[4:] if held_out else kl[:4]))
        frontier.save(tmp_path / "frontier.json")
        assert Frontier.load(tmp_path / "frontier.json") == frontier


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of matplotlib, at the ends of its axes
def test_a_report_shows_what_is_no_number(tmp_path) -> None:
    """On any context: as one of the bands, too, of which there may be no other."""
    broken = [dataclasses.replace(each, kl=(*each.kl[:3], WORST_KL, WORST_KL, 0.1)) for each in (BAND, WORSE)]
    alone = (Sensitivity(0, 1, (WORST_KL, WORST_KL)), *ALONE[1:])
    frontier = dataclasses.replace(FRONTIER, points=(REUSED, *broken, ALL), sensitivity=alone)
    assert write_report(frontier, tmp_path, "worst")[-1].read_text(encoding="utf-8").count("data:image/png") == 4


def test_divergences_beyond_any_logits_overflow_nothing() -> None:
    """As a file from a stranger can have them."""
    kl = (1e304, 1e304, 1e-300, 1e-300, 1e308, 1e308)  # the first ones are as hard as a float can say
    huge = [dataclasses.replace(each, kl=kl) for each in (REUSED, LONG)]
    part = dataclasses.replace(
        WORSE, kl=(None, None, 1e304, 1e304, 1e308, 1e308), agreement=(None, None, 0.0, 0.0, 0.0, 0.0)
    )
    frontier = dataclasses.replace(FRONTIER, points=(*huge, part, ALL))
    assert frontier.typical_kl(part) == float("inf")
    assert 0 < frontier.typical_kl(huge[0]) < float("inf")
    assert frontier.choose(max_quality_loss=0.0) == ALL.plan
    assert all(map(math.isfinite, frontier.kl(huge[0])))


def test_recomputing_every_layer_is_always_good() -> None:
    """Even where the model's own answers are no numbers."""
    broken = dataclasses.replace(ALL, kl=(WORST_KL,) * 6, agreement=(0.0,) * 6)
    frontier = dataclasses.replace(FRONTIER, points=(REUSED, broken))
    assert frontier.choose(max_quality_loss=0.0) == ALL.plan


def test_the_pareto_set() -> None:
    assert FRONTIER.pareto() == [REUSED, PROJECTED, BAND, LONG, ALL]


@pytest.mark.parametrize(
    ("need", "wanted"),
    [
        ({"max_quality_loss": 1.0}, REUSED),
        ({"max_quality_loss": 0.1}, PROJECTED),
        ({"max_quality_loss": 0.05}, BAND),
        ({"max_quality_loss": 0.01}, LONG),
        ({"max_quality_loss": 0.0}, ALL),
        ({"max_quality_loss": 0.1, "max_ttft": 2.0}, ALL),  # the best that meets the limit
        ({"max_quality_loss": 0.1, "max_ttft": 0.9}, LONG),
        ({"max_quality_loss": 0.1, "max_ttft": 0.4}, BAND),
        ({"max_quality_loss": 0.1, "max_ttft": 0.01}, PROJECTED),  # none does: the cheapest above the floor
    ],
)
def test_quality_and_time(need: dict, wanted: Point) -> None:
    assert FRONTIER.choose(**need) == wanted.plan


def test_load_makes_plans_cheaper() -> None:
    chosen = [FRONTIER.choose(max_quality_loss=0.1, max_ttft=1.0, queue=queue) for queue in (0, 1, 5, 100)]
    assert chosen == [ALL.plan, BAND.plan, PROJECTED.plan, PROJECTED.plan]


def test_longer_contexts_make_plans_cheaper() -> None:
    chosen = [FRONTIER.choose(max_quality_loss=0.1, max_ttft=1.0, tokens=tokens) for tokens in (500, 1500, 2500, 9000)]
    assert chosen == [ALL.plan, LONG.plan, BAND.plan, PROJECTED.plan]


def test_slow_storage_prefers_what_is_computed() -> None:
    """Projections need hidden states at every layer, four times the bytes of K and V; recomputing all layers needs none."""
    chosen = [FRONTIER.choose(max_quality_loss=0.1, bandwidth=each) for each in (1e10, 5e7, 2e6)]
    assert chosen == [PROJECTED.plan, BAND.plan, ALL.plan]
    assert FRONTIER.pareto(bandwidth=1e6)[-1] == ALL


def test_a_plan_is_called_by_what_maps_do() -> None:
    fitted = point(ds.Plan(project="rest"), Work(0, 10, 9, 0), 0.05, rest="fitted")
    corrected = dataclasses.replace(BAND, corrected=True)
    assert [str(each) for each in (PROJECTED, fitted)] == ["all projected", "all fitted"]
    assert [str(each) for each in (BAND, corrected)] == ["band [4, 8)", "band [4, 8) from corrected states"]


def test_held_out_contexts_do_not_choose() -> None:
    better_there = dataclasses.replace(REUSED, kl=(1.0,) * 4 + (0.0,) * 2, agreement=(0.8,) * 4 + (1.0,) * 2)
    frontier = dataclasses.replace(FRONTIER, points=(better_there, *FRONTIER.points[1:]))
    assert frontier.choose(max_quality_loss=0.1) == PROJECTED.plan
    assert frontier.quality_loss(better_there).value == pytest.approx(0.2)
    assert frontier.quality_loss(better_there, held_out=True).value == pytest.approx(0.0)


def test_plans_are_compared_on_typical_contexts() -> None:
    """One that is better on all but the hardest is the better one, however hard that is."""
    one = dataclasses.replace(BAND, kl=(0.01, 0.01, 0.01, 9.0, 1.0, 1.0))
    other = dataclasses.replace(WORSE, kl=(0.02, 0.02, 0.02, 8.0, 1.0, 1.0))
    frontier = dataclasses.replace(FRONTIER, points=(one, other, ALL))
    assert frontier.kl(one).value > frontier.kl(other).value
    assert frontier.typical_kl(one) < frontier.typical_kl(other)
    assert frontier.typical_kl(one) == pytest.approx((0.01**3 * 9) ** 0.25, rel=0.02)
    assert frontier.typical_kl(ALL) == 0


def test_plans_are_compared_on_contexts_as_hard() -> None:
    """One that was tried on the easier half only is not better for that."""
    hard = [dataclasses.replace(each, kl=tuple(f * each.kl[0] for f in (3, 3, 1, 1, 1, 1))) for each in FRONTIER.points]
    measured = {"kl": (None, None, 0.2, 0.2, 0.2, 0.2), "agreement": (None, None, 0.9, 0.9, 0.9, 0.9)}
    on_easy = dataclasses.replace(WORSE, plan=ds.Plan([(1, 8)]), work=Work(6, 1, 1, 3), **measured)
    frontier = dataclasses.replace(FRONTIER, points=(*hard, on_easy))
    assert frontier.typical_kl(on_easy) == pytest.approx(0.2 * 3**0.5, rel=0.01)
    assert frontier.typical_kl(on_easy) == pytest.approx(frontier.typical_kl(hard[-1]), rel=0.01)
    assert frontier.kl(on_easy).value == pytest.approx(0.2)
    measured = {"kl": (0.0, 0.0, None, None, 0.0, 0.0), "agreement": (1.0, 1.0, None, None, 1.0, 1.0)}
    nothing = dataclasses.replace(on_easy, **measured)  # on the harder half
    assert dataclasses.replace(frontier, points=(*hard, nothing)).typical_kl(nothing) == 0


def test_losses_in_proportion_to_the_root_of_the_divergence_are_expected_as_they_are() -> None:
    assert [FRONTIER.expected_loss(each) for each in FRONTIER.points] == pytest.approx(
        [1 - each.agreement[0] for each in FRONTIER.points]
    )


def drawn(power: float, seed: int) -> Frontier:
    """A frontier of all bands, on which the share of tokens that change is a power of the divergence on their context.

    Held-out contexts are as hard as the others, so that what a choice loses beyond its expectation is not of their difficulty.
    """
    generator = torch.Generator().manual_seed(seed)
    plans = [ds.Plan([(start, end)]) for start in range(10) for end in range(start + 1, 11)]
    work = [resolve(plan, 10).work for plan in plans]
    of_plan = torch.tensor([0.5 * 10 ** (-0.25 * each.run) for each in work])
    of_context = torch.linspace(-1.5, 1.5, 8).exp().repeat(3)[None]
    kl = of_plan[:, None] * of_context * (0.3 * torch.randn(len(plans), 24, generator=generator)).exp()
    kl[plans.index(ALL.plan)] = 0.0
    share = (0.3 * kl**power).clamp(max=1.0)
    tokens = torch.full_like(share, 9.0)
    agreement = 1 - torch.binomial(tokens, share, generator=generator) / tokens
    points = (
        Point(plan, "reuse", False, of_it, tuple(kl_of_it), tuple(agreement_of_it))
        for plan, of_it, kl_of_it, agreement_of_it in zip(plans, work, kl.tolist(), agreement.tolist(), strict=True)
    )
    return Frontier(MODEL, MODEL, None, tuple(points), (), COSTS, (1000,) * 24, 8, 1, 0)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_chosen_plans_lose_on_other_contexts_what_is_expected_of_them(power: float) -> None:
    """To two points on average, whatever the law of losses; one factor for the root of the divergence misses by 3 to 5."""
    limits = (0.02, 0.05, 0.1, 0.15)
    frontiers = [drawn(power, seed) for seed in range(40)]
    for limit in limits:
        beyond = 0.0
        for frontier in frontiers:
            chosen = frontier.point(frontier.choose(max_quality_loss=limit))
            held_out = [agreement for agreement in chosen.agreement[16:] if agreement is not None]
            beyond += 1 - sum(held_out) / 8 - frontier.expected_loss(chosen)
        assert abs(beyond / len(frontiers)) < 0.02, f"up to {limit:.0%}"


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_more_divergence_is_expected_to_lose_more_and_none_nothing(power: float) -> None:
    frontier = drawn(power, 0)
    by_kl = sorted(frontier.points, key=frontier.typical_kl)
    losses = [frontier.expected_loss(each) for each in by_kl]
    assert by_kl[0] == frontier.point(ALL.plan)
    assert losses == sorted(losses)
    assert losses[0] == 0 < losses[1]


def test_neighbours_are_pooled_until_more_divergence_loses_more() -> None:
    """Plans that lose nothing are pooled with what comes next; beyond the last pool the curve goes on as the root."""
    curve = LossCurve.fit([0.0, 0.01, 0.04, 0.16, 0.36, 0.36, math.inf], [0.5, -0.1, 0.4, 0.1, 0.5, 0.7, 1.0])
    assert curve.roots == pytest.approx(((0.1 + 0.2 + 0.4) / 3, 0.6))
    assert curve.losses == pytest.approx(((-0.1 + 0.4 + 0.1) / 3, 0.6))
    assert [curve.evaluate(kl) for kl in (0.0, 0.36, 1.44, math.inf)] == pytest.approx([0.0, 0.6, 1.2, math.inf])


def test_where_no_loss_is_known_all_is_expected_to_be_lost() -> None:
    """The only plan that was tried on all contexts recomputes all; or full prefill itself scores nothing."""
    some = dataclasses.replace(BAND, kl=(None, None, *BAND.kl[2:]), agreement=(None, None, *BAND.agreement[2:]))
    scored = dataclasses.replace(BAND, scores=(0.0,) * 6)
    for each, scores in ((some, None), (scored, (0.0,) * 6)):
        frontier = dataclasses.replace(FRONTIER, points=(each, ALL), scores=scores)
        assert [frontier.expected_loss(point) for point in frontier.points] == [1.0, 0.0]
        assert frontier.choose(max_quality_loss=0.99) == ALL.plan


def test_a_plan_is_not_chosen_for_its_luck() -> None:
    """No token of few happens to change with a plan of much divergence; and several with the one that recomputes most."""
    lucky = dataclasses.replace(REUSED, agreement=(1.0,) * 6)
    unlucky = dataclasses.replace(LONG, agreement=(0.7,) * 6)
    frontier = dataclasses.replace(FRONTIER, points=(lucky, PROJECTED, BAND, unlucky, ALL, WORSE))
    assert frontier.expected_loss(lucky) > frontier.expected_loss(PROJECTED) > frontier.expected_loss(unlucky) > 0
    assert frontier.choose(max_quality_loss=0.02) == unlucky.plan


def test_losses_of_scores_are_expected_by_those_that_were_scored() -> None:
    scored = (dataclasses.replace(BAND, scores=(0.4,) * 6), dataclasses.replace(ALL, scores=(0.5,) * 6))
    frontier = dataclasses.replace(FRONTIER, points=(REUSED, LONG, *scored), scores=(0.5,) * 6)
    assert frontier.expected_loss(scored[0]) == pytest.approx(0.2)
    assert frontier.expected_loss(REUSED) == pytest.approx(0.2 * (1.0 / 0.04) ** 0.5)
    better = dataclasses.replace(frontier, scores=(0.3,) * 6)
    assert [better.expected_loss(each) for each in better.points] == [0.0] * 4


def test_contexts_on_which_a_plan_was_not_tried_do_not_count() -> None:
    some = dataclasses.replace(BAND, kl=(None, None, 0.1, 0.3, 0.2, 0.2), agreement=(None, None, 1.0, 0.5, 1.0, 1.0))
    frontier = dataclasses.replace(FRONTIER, points=(some, ALL))
    assert frontier.kl(some).value == pytest.approx(0.2)
    assert frontier.quality_loss(some).value == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("need", "message"),
    [
        ({"max_quality_loss": -0.1}, "max_quality_loss: expected a number from 0 to 1, got -0.1"),
        ({"max_quality_loss": 0.1, "queue": -1}, "queue: expected 0 or more, got -1"),
        ({"max_quality_loss": 0.1, "max_ttft": 0}, "max_ttft: expected a positive number, got 0"),
        ({"max_quality_loss": 0.1, "tokens": -5}, "tokens: expected a positive number, got -5"),
        ({"max_quality_loss": 0.1, "bandwidth": float("nan")}, "bandwidth: expected a positive number, got nan"),
    ],
)
def test_needs_that_make_no_sense(need: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FRONTIER.choose(**need)


def test_a_plan_that_was_not_tried() -> None:
    with pytest.raises(ValueError, match=r"expected the plan of one of the frontier's points, got band \[1, 2\)"):
        FRONTIER.point(ds.Plan([(1, 2)]))


def test_saved_and_loaded(tmp_path) -> None:
    FRONTIER.save(tmp_path / "frontier.json")
    assert Frontier.load(tmp_path / "frontier.json") == FRONTIER
    assert [file.name for file in tmp_path.iterdir()] == ["frontier.json"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/with*_maps/frontier.json")), ids=lambda path: path.parts[-3:-1])
def test_what_is_published_comes_back_as_it_was(path: Path, tmp_path) -> None:
    published = Frontier.load(path)
    published.save(tmp_path / "again.json")
    assert Frontier.load(tmp_path / "again.json") == published


@pytest.mark.parametrize("text", ["[]", "{}", json.dumps({"bands": []}), "\xff", "{"])
def test_another_file_is_refused(text: str, tmp_path) -> None:
    (tmp_path / "other.json").write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=r"other.json: expected "):
        Frontier.load(tmp_path / "other.json")


def _changed(described: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set what lies at a path such as ``points.0.kl``."""
    *folders, name = [int(part) if part.isdigit() else part for part in path.split(".")]
    at: Any = described
    for folder in folders:
        at = at[folder]
    at[name] = value
    return described


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sender.dtype", "float99", "dtype: expected one of float32, float16, bfloat16, got 'float99'"),
        ("sender.architecture", {}, "architecture: expected num_hidden_layers, got none of"),
        ("receiver.architecture", {"num_hidden_layers": 9}, "num_hidden_layers is 10 and 9"),
        ("receiver.architecture", {"num_hidden_layers": 10**15}, "num_hidden_layers to be an integer from 1 to"),
        ("points.0.plan.bands", [[3, 99]], "expected layers 0 to 9 of a model of 10, got layer 98"),
        ("points.0.plan.bands", [[3, 2]], "0 <= start < end, got .3, 2. at points"),
        ("points.0.rest", "project", "project='rest' where rest is 'project'"),
        ("points.0.corrected", True, "expected what profiles without maps have"),
        ("points.0.work.kv", 9, "work: expected that of the plan, .*kv=10.*, got .*kv=9"),
        ("points.0.kl", [1.0] * 5, "kl"),
        ("points.0.kl", [1.0, -1.0, 1.0, 1.0, 1.0, 1.0], "kl: expected finite divergences of 0 or more"),
        ("points.0.kl", [1.0, None, 1.0, 1.0, 1.0, 1.0], "agreement: expected the contexts that kl has"),
        ("points.0.agreement", [2.0] * 6, "agreement: expected shares from 0 to 1"),
        ("points.0.scores", [1.0] * 6, "scores: expected none where full prefill has none"),
        ("points.0.shares", [1.0] * 6, "got .*shares"),
        ("points", [], "points: expected every plan once, and that which recomputes all layers"),
        ("scores", [1.0] * 5, "scores: expected one for each of 6 contexts, got 5"),
        ("sensitivity.0.end", 11, "sensitivity.0.: expected layers up to 10"),
        ("sensitivity.0.kl", [1.0], "sensitivity.1.: expected layers up to 10 on one number of contexts"),
        ("sensitivity.0.start", 5, "0 <= start < end"),
        ("costs.run", [1.0, 2.0], "expected array of length 3, got 2 at costs.run"),
        ("costs.run", [0.0, 0.0, 1e300], "run: expected finite seconds"),
        ("costs.rest", [0.0, 0.0, 0.0], "rest: expected seconds above 0"),
        ("costs.tokens", [5, 5], "tokens: expected the shortest and the longest"),
        ("costs.kv_bytes", 0, "kv_bytes: expected 1 or more, got 0"),
        ("contexts", [1000] * 5 + [0], "contexts: expected lengths of 1 or more"),
        ("held_out", 6, "of which 6 are held out and at least one is not"),
        ("held_out", 2.5, "expected int, got float at held_out"),
        ("granularity", 0, "granularity: expected 1 to 10, got 0"),
        ("seed", "0", "expected int, got str at seed"),
        ("droidspeak_frontier", 2, "expected a frontier that Frontier.save wrote"),
        ("owner", 2, "expected the fields .*, got .'owner'."),
    ],
)
def test_what_a_frontier_of_a_stranger_gets_wrong_is_named(path: str, value: Any, message: str, tmp_path) -> None:
    FRONTIER.save(tmp_path / "frontier.json")
    described = _changed(json.loads((tmp_path / "frontier.json").read_bytes()), path, value)
    (tmp_path / "frontier.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"frontier\.json: .*{message}"):
        Frontier.load(tmp_path / "frontier.json")


def test_work_with_maps_is_what_they_choose() -> None:
    """But for the layers that run."""
    fitted = point(ds.Plan([(4, 8)], project="rest"), Work(3, 4, 3, 3), 0.05, rest="fitted")
    dataclasses.replace(FRONTIER, maps="0" * 64, points=(REUSED, fitted, ALL))
    for work in (Work(2, 4, 3, 3), Work(3, 11, 3, 3), Work(3, 4, -1, 3)):
        other = dataclasses.replace(fitted, work=work)
        with pytest.raises(ValueError, match=r"points\[1\]: work: expected that of the plan"):
            dataclasses.replace(FRONTIER, maps="0" * 64, points=(REUSED, other, ALL))


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(100):
        value, low, high = bootstrap.mean(torch.randn(40, generator=generator).tolist())
        assert low <= value <= high
        held += low <= 0.0 <= high
    assert 85 <= held <= 100
