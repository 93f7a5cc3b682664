"""The profiler: every plan as if tried alone, few long passes, scores of answers, and errors."""

import copy
import dataclasses

import pytest
import torch
from support.models import fine_tuned, tokens
from support.profiles import COSTS, LAYERS, alike, examples, in_order, interrupted_after, one_share

import droidspeak_ops as ds
from droidspeak_ops.hf.passes import Pass
from droidspeak_ops.prefill.schedule import Work, resolve
from droidspeak_ops.profiling import run as profiling
from droidspeak_ops.profiling.candidates import SELECTORS
from droidspeak_ops.profiling.frontier import WORST_KL
from droidspeak_ops.profiling.run import EVAL_TOKENS

BANDS = LAYERS * (LAYERS + 1) // 2


@pytest.fixture(scope="module")
def plain(pair, some) -> ds.Frontier:
    """Without maps."""
    with one_share():
        return ds.profile(*pair, some, costs=COSTS, show_progress=False)


def by_hand(pair, maps, point, example: ds.Example) -> tuple[float, float]:
    """Divergence and agreement of one plan on one example."""
    sender, receiver = pair
    context = ds.capture(sender, example.context, layers=range(LAYERS))
    cache = ds.partial_prefill(receiver, context, point.plan, prompt_ids=example.prompt, maps=maps)
    return compared(receiver, cache, example)


@torch.no_grad()
def compared(receiver, cache, example: ds.Example) -> tuple[float, float]:
    """Divergence and agreement behind a cache of the prompt's head, by two ordinary forward passes."""
    answer = example.answer[:, :EVAL_TOKENS]
    ids = torch.cat((example.prompt, answer[:, :-1]), dim=1)
    count = answer.shape[1]
    own = receiver(ids, logits_to_keep=count).logits[0].double().log_softmax(-1)
    rest = ids[:, cache.get_seq_length() :]
    got = receiver(rest, past_key_values=cache, logits_to_keep=count).logits[0].double().log_softmax(-1)
    kl = (own.exp() * (own - got)).sum(-1).mean()
    return float(kl), float((own.argmax(-1) == got.argmax(-1)).double().mean())


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
            bands = [point.plan.bands for point in found.points if point.rest == rest and not point.plan.select]
            assert bands.count(()) == 1
            of_one = [each for each in bands if len(each) == 1]
            assert len(of_one) == len(set(of_one)) == BANDS - missing
        scattered = [point for point in found.points if len(point.plan.bands) > 1]
        assert scattered
        assert all(point.kl[:2] == (None, None) and None not in point.kl[2:] for point in scattered)
        for rest in missing_of_rest:
            selected = [each for each in found.points if each.rest == rest and each.plan.select]
            assert selected
            assert all(not each.plan.bands and None not in each.kl for each in selected)
            # In the order of their cost each is better than all before it, where all were measured.
            order = sorted(selected, key=lambda each: SELECTORS.index(each.plan.selector))
            pilots = [sum(each.kl[:2]) for each in order]
            assert order[0].plan.selector == "recent"
            assert pilots == sorted(pilots, reverse=True)
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
    assert frontier.point(ds.Plan(select=0.1, selector="recent")).work == Work(0, 0, 0, LAYERS, LAYERS, 0.1, 0)
    assert resolve(ds.Plan(select=0.1), LAYERS).work == Work(0, 0, 0, LAYERS, LAYERS, 0.1, 3)
    assert resolve(ds.Plan(select=5, selector="deviation"), LAYERS).work == Work(1, 1, 0, LAYERS, LAYERS, 5, 0)
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
    monkeypatch.setattr("droidspeak_ops.profiling.candidates.SELECTED", ())  # each of which runs by itself
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
    for ours in both.points:
        # What is selected otherwise than by recency, and sets of layers, are not the same in all three.
        if len(ours.plan.bands) < 2 and (not ours.plan.select or ours.plan.selector == "recent"):
            first, second = (each.point(ours.plan) for each in (one, other))
            assert ours.kl[1] == pytest.approx((first.kl[1] + second.kl[1]) / 2, abs=1e-6)


def test_the_same_seed_gives_the_same_frontier(pair, some, frontier, maps) -> None:
    assert ds.profile(*pair, some, maps=maps, costs=COSTS, show_progress=False) == frontier
    other = ds.profile(*pair, some, maps=maps, costs=COSTS, seed=1, show_progress=False)
    assert [point.kl for point in other.points] != [point.kl for point in frontier.points]


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
        cache = ds.partial_prefill(pair[1], context, point.plan, prompt_ids=example.prompt, maps=maps)
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
