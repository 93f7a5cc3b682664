"""The frontier and its cost model: what is chosen for which need, on figures made up so that the answer is known."""

import dataclasses
import json

import pytest
import torch

import droidspeak_ops as ds
from droidspeak_ops.prefill.schedule import Work
from droidspeak_ops.profiling import bootstrap
from droidspeak_ops.profiling.cost import CostModel, Polynomial
from droidspeak_ops.profiling.frontier import Frontier, Point, Sensitivity

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
    assert COSTS.seconds(Work(3, 1, 1, 6), 1000, bandwidth=1e7) == pytest.approx(0.36 + (4e6 + 6e6) / 1e7)


def test_the_polynomial_goes_through_what_was_measured() -> None:
    lengths, seconds = (256, 1024, 2048), (0.3, 1.3, 3.1)
    polynomial = Polynomial.fit(lengths, seconds)
    assert [polynomial.evaluate(length) for length in lengths] == pytest.approx(seconds)
    assert Polynomial(-1.0, 0.0, 0.0).evaluate(5) == 0.0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_plan_whose_answers_are_no_numbers_is_the_worst(broken: float) -> None:
    """On one context or on all; the other plans are what they were without it."""
    for kl in ((broken,) * 6, (1.0, broken, 1.0, 1.0, 1.0, 1.0)):
        nothing = dataclasses.replace(REUSED, kl=kl)
        frontier = dataclasses.replace(FRONTIER, points=(nothing, *FRONTIER.points[1:]))
        assert frontier.typical_kl(nothing) == frontier.expected_loss(nothing) == float("inf")
        assert frontier.choose(max_quality_loss=1.0) == PROJECTED.plan
        assert frontier.pareto() == [PROJECTED, BAND, LONG, ALL]
        assert frontier.typical_kl(BAND) == pytest.approx(FRONTIER.typical_kl(BAND))


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
    on_easy = dataclasses.replace(WORSE, plan=ds.Plan([(1, 8)]), kl=(None, None, 0.2, 0.2, 0.2, 0.2))
    frontier = dataclasses.replace(FRONTIER, points=(*hard, on_easy))
    assert frontier.typical_kl(on_easy) == pytest.approx(0.2 * 3**0.5, rel=0.01)
    assert frontier.typical_kl(on_easy) == pytest.approx(frontier.typical_kl(hard[-1]), rel=0.01)
    assert frontier.kl(on_easy).value == pytest.approx(0.2)
    nothing = dataclasses.replace(on_easy, kl=(0.0, 0.0, None, None, 0.0, 0.0))  # on the harder half
    assert dataclasses.replace(frontier, points=(*hard, nothing)).typical_kl(nothing) == 0


def test_losses_are_expected_by_the_root_of_the_divergence() -> None:
    assert [FRONTIER.expected_loss(each) for each in FRONTIER.points] == pytest.approx(
        [1 - each.agreement[0] for each in FRONTIER.points]
    )


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


@pytest.mark.parametrize("text", ["[]", "{}", json.dumps({"bands": []})])
def test_another_file_is_refused(text: str, tmp_path) -> None:
    (tmp_path / "other.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="expected a frontier that Frontier.save wrote, got other JSON"):
        Frontier.load(tmp_path / "other.json")


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(100):
        value, low, high = bootstrap.mean(torch.randn(40, generator=generator).tolist())
        assert low <= value <= high
        held += low <= 0.0 <= high
    assert 85 <= held <= 100
