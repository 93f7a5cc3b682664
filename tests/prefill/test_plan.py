"""Plans: what they mean for a model, what they need, what they refuse, and that JSON keeps them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak_ops import Plan, ReuseError
from droidspeak_ops.prefill.plan import ChosenFor
from droidspeak_ops.prefill.schedule import resolve

LAYERS = 12


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    cuts = sorted(draw(st.sets(st.integers(0, LAYERS), max_size=6)))
    bands = [(start, end) for start, end in itertools.pairwise(cuts) if draw(st.booleans())]
    free = [layer for layer in range(LAYERS) if not any(start <= layer < end for start, end in bands)]
    return Plan(bands, draw(st.one_of(st.just("rest"), st.lists(st.sampled_from(free)) if free else st.just([]))))


@given(plans())
def test_json_keeps_a_plan(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(Plan.from_json(plan.to_json())) == hash(plan)


@given(plans())
def test_sources_cover_the_model(plan: Plan) -> None:
    schedule = resolve(plan, LAYERS)
    roles = schedule.sources
    assert len(roles) == LAYERS
    recomputed = {layer for start, end in plan.bands for layer in range(start, end)}
    assert {layer for layer, role in enumerate(roles) if role == "recompute"} == recomputed
    assert schedule.work.run == len(recomputed) - len(plan.bands)
    projected = {layer for layer, role in enumerate(roles) if role == "project"}
    assert projected == (set(range(LAYERS)) - recomputed if plan.project == "rest" else set(plan.project))
    assert set(plan.hidden_layers(LAYERS)) == (projected | {start for start, _ in plan.bands}) - {0}


def test_one_token_is_not_all_of_them() -> None:
    """1 and 1.0 are equal, and what they select is not."""
    one, every = Plan(select=1), Plan(select=1.0)
    assert one != every and len({one, every}) == 2
    for plan in (one, every, one):
        assert type(resolve(plan, LAYERS).select) is type(plan.select)
    assert Plan(select=0) == Plan(select=0.0) == Plan() and hash(Plan(select=0.0)) == hash(Plan())
    assert Plan(select=3) == Plan(select=3) != Plan(select=3, selector="recent")


def test_a_chosen_plan_is_for_its_pair_and_maps() -> None:
    chosen = ChosenFor("s", "r", "m")
    plan = Plan([(0, 2)], chosen_for=chosen)
    assert plan == Plan([(0, 2)]) and Plan.from_json(plan.to_json()).chosen_for == chosen
    chosen.check("s", "r", "m")
    for others, match in (
        (("x", "r", "m"), "a sender with other weights"),
        (("s", None, "m"), "a receiver with other weights"),
        (("s", "r", "x"), "maps, as it was chosen with, got other maps"),
        (("s", "r", None), "maps, as it was chosen with, got none"),
    ):
        with pytest.raises(ReuseError, match=f"plan: expected .*{match}"):
            chosen.check(*others)
    with pytest.raises(ReuseError, match="plan: expected no maps, as it was chosen with, got maps"):
        ChosenFor("s", "r", None).check("s", "r", "m")


def test_order_and_container_do_not_matter() -> None:
    assert Plan([[4, 6], (0, 2)], [9, 3, 9]) == Plan(((0, 2), (4, 6)), (3, 9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bands": [(3, 3)]}, "0 <= start < end"),
        ({"bands": [(5, 3)]}, "0 <= start < end"),
        ({"bands": [(-1, 3)]}, "got -1"),
        ({"bands": [(0, 4), (3, 6)]}, "do not overlap"),
        ({"bands": [3]}, "a pair"),
        ({"bands": [(1, 2, 3)]}, "a pair"),
        ({"bands": 3}, "a list"),
        ({"bands": [(0.5, 3)]}, "got 0.5"),
        ({"bands": [(False, True)]}, "got False"),
        ({"project": [-1]}, "got -1"),
        ({"project": "all"}, "layer indices or 'rest'"),
        ({"project": [3], "bands": [(2, 5)]}, "expected layers outside the bands, got 3"),
    ],
)
def test_a_wrong_plan_is_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, got"),
        ("[]", "expected object, got array"),
        ("null", "expected object, got null"),
        (
            '{"bands": [], "layers": []}',
            "expected the fields bands, project, select, selector, chosen_for, got .'layers'.",
        ),
        ('{"bands": [[2, 1]]}', r"bands: expected \(start, end\) with 0 <= start < end, got \(2, 1\)"),
        ('{"bands": [[1, 2.5]]}', r"expected int, got float at bands\[0\]\[1\]"),
        ('{"bands": [[1, 1e999]]}', "expected JSON of finite numbers"),
        ('{"bands": {}}', "expected array, got object at bands"),
        ('{"project": "all"}', "expected one of the values that are known, got 'all' at project"),
        ('{"project": [0], "project": [1]}', "got 'project' more than once"),
        (b"\xff", "expected UTF-8"),
    ],
)
def test_wrong_json_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^plan: .*{message}"):
        Plan.from_json(text)


@pytest.mark.parametrize("plan", [Plan([(10, 13)]), Plan(project=[12])])
def test_layers_outside_the_model_are_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match="expected layers 0 to 11 .* got layer 12"):
        resolve(plan, LAYERS)


def test_text() -> None:
    assert str(Plan()) == "all reused"
    assert str(Plan([(10, 20)], "rest")) == "band [10, 20), rest projected"
    assert str(Plan(project="rest")) == "all projected"
    assert str(Plan(project=[3])) == "[3] projected"
