"""Fitting of maps: ridge regressions of the receiver's K/V, and shares of them learnt by their effect on its next tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from rich.progress import Progress

from ..context.context import SharedContext
from ..context.parts import SINKS
from ..example import Example, by_context, check_examples, examples_digest
from ..hf.decoder import Decoder, PreTrainedModel
from ..hf.passes import check_takes_masks
from ..hf.receiver import partial_prefill
from ..hf.sender import capture
from ..metrics import answer_logits, kl_divergence
from ..prefill.maps import Affine, Domain, LayerMap, Maps
from ..prefill.plan import Plan
from ..prefill.schedule import Source
from ..progress import bars
from . import training
from .contexts import StoredContexts
from .pair import FITTED, Key, Pair
from .parallel import in_parallel
from .reading import Readings
from .ridge import NormalEquations
from .shares import STEPS, Interpolations, KLObjective, Shares, learn_shares
from .training import Workplace, is_held_out, train

FOLDS = 3
STRENGTHS = (0.001, 0.01, 0.03, 0.1, 1.0)
"""Candidate strengths of the ridge."""
CORRECTION_SHARES = (0.0, 0.5, 1.0)
"""Candidate shares of a correction."""
CORRECTED_CONTEXTS = 4
"""Most contexts on which they are tried, for the time it takes."""

_MAX_KL_RATIO = 0.98  # of the divergence with maps to that without, for the maps to be used
_ALL, _ALL_SELECTED = Plan(project="rest"), Plan(project="rest", select=0.1)
_EXAMPLES_SELECTED_FOR = 2  # of a context, each of which has tokens of its own recomputed
_MIN_SHARE = 0.02  # a layer whose shares are both smaller is reused


def fit(
    sender: PreTrainedModel,
    receiver: PreTrainedModel,
    examples: Sequence[Example],
    *,
    bands: Sequence[tuple[int, int]] = (),
    steps: int = training.STEPS,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> Maps:
    """Fit maps that predict the receiver's K/V from what the sender has, and train them on what its suffixes read from those.

    Contexts are split into three folds. The shares (mixing weights) of the layers are learnt with maps that are fitted to the
    other two folds, on contexts that the regression has not seen. From the maps that are then fitted to all contexts each layer
    is trained on its attention's output. One of five contexts is held out, and says whether that has helped.

    Args:
        sender, receiver: models that fit together; neither is changed.
        examples: at least three contexts like those that the maps are for; several examples may share a context.
        bands: bands of the plans that the maps are for. The hidden states that they start from are corrected if that helps.
        steps: of the training, in each layer; 0 for regressions and shares alone.
        seed: of the training.
        folder: where contexts, what suffixes read of them, and layers that are trained are kept until maps are returned; a run
            that was killed goes on there. It takes the bytes of both models' K and V and of the sender's hidden states, and
            half as much again. None for a temporary folder.
        show_progress: whether to draw progress bars on stderr.

    Returns:
        Maps for ``partial_prefill(receiver, context, plan, maps=maps)``.

    Raises:
        ReuseError, UnsupportedModelError: as :func:`partial_prefill`; or the receiver's attention is neither SDPA nor eager.
        ValueError: there are fewer than three contexts, one is no longer than its attention sinks, an example has no suffix or
            answer, or a band is invalid.
    """
    groups = by_context(examples)
    if len(groups) < FOLDS:
        raise ValueError(f"examples: expected at least {FOLDS} contexts, got {len(groups)}")
    shortest = min(group[0].context.shape[1] for group in groups)
    if shortest <= SINKS:
        raise ValueError(f"examples: expected contexts of more than {SINKS} tokens, got one of {shortest}")
    check_examples(examples)
    check_takes_masks(receiver)
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")
    plans = [Plan([band], project="rest") for band in bands]
    pair = Pair(Decoder(sender), Decoder(receiver), [plan.bands[0][0] for plan in plans])
    run = {
        "pair": [each.weights for each in pair.fingerprints],
        "examples": examples_digest(examples),
        "bands": list(map(list, bands)),
        "steps": steps,
        "seed": seed,
    }
    with Workplace(folder, run) as work, bars(show_progress) as progress, torch.no_grad():
        folds = [pair.equations() for _ in range(FOLDS)]
        sent, received = (
            StoredContexts(work.folder / "contexts" / role, receiver.device) for role in ("sender", "receiver")
        )
        readings, objectives = Readings(pair, sent, work.folder / "readings"), []
        for number, group in enumerate(progress.track(groups, description="Reading contexts")):
            read_by = partial(capture, input_ids=group[0].context, layers=pair.layers)
            sender_context, receiver_context = in_parallel(read_by, (sender, receiver), receiver.device)
            pair.add(folds[number % FOLDS], sender_context, receiver_context)
            if steps or number < STEPS:
                sent.append(sender_context)
            if steps:
                readings.add(receiver_context, group)
            if number < STEPS:  # the others are only summed and trained on
                received.append(replace(receiver_context, hidden_states={}))
                objectives.append(KLObjective(pair.receiver, received, number, group, work.folder / "references"))
        fits = {source: _fit_layers(pair, source, folds, progress) for source in FITTED}
        of_domain = [fold[pair.domain_layer, "fitted_kv"] for fold in folds]
        del folds  # together as large as a model
        shares, used = _learn(pair, fits, sent, objectives, progress)
        domain = _domain(pair, of_domain, sent, len(objectives))
        on_all = {source: each.on_all for source, each in fits.items()}
        maps = _maps(pair, on_all, shares, used, domain)
        # Corrections are chosen on the first fold, with maps and corrections that are fitted to the others.
        unseen = _maps(pair, {source: each.without_fold[0] for source, each in fits.items()}, shares, used, domain)
        if steps:
            trained = train(
                readings, maps.repaired, steps, seed, work, partial(progress.track, description="Training maps")
            )
            held_out = [number for number in range(len(objectives)) if is_held_out(number, len(groups))]
            better = _better(maps, trained, _Judged(pair, sent, objectives, groups, held_out), progress)
            maps, unseen = better, (unseen if better is maps else better)
        corrections = {}
        plans = [plan for plan in plans if plan.bands[0][0] in pair.starts]
        some_of_first_fold = range(0, len(objectives), FOLDS)[:CORRECTED_CONTEXTS]
        judged = _Judged(pair, sent, objectives, groups, some_of_first_fold)
        for plan in progress.track(plans, description="Choosing corrections"):
            start_layer = plan.bands[0][0]
            share = _correction_share(plan, unseen, fits["fitted"].without_fold[0][start_layer], judged)
            if share:
                corrections[start_layer] = pair.correction(fits["fitted"].on_all[start_layer], share)
        work.clear()
        return replace(maps, corrections=corrections)


class _Judged(NamedTuple):
    """Contexts by which maps are judged, of which few at a time are in memory."""

    pair: Pair
    contexts: Sequence[SharedContext]
    objectives: Sequence[KLObjective]
    groups: Sequence[Sequence[Example]]
    numbers: Sequence[int]

    def kl(self, plan: Plan, maps: Maps, source: Source = "fitted") -> float:
        """Return the divergence of contexts that a plan fills; with `source` ``"fitted_kv"`` without hidden states."""

        def of(number: int) -> float:
            cache = partial_prefill(self.pair.receiver.model, self._context(number, source), plan, maps=maps)
            return float(self.objectives[number].kl([(layer.keys, layer.values) for layer in cache.layers]))

        return self._total(of)

    def kl_selected(self, maps: Maps, source: Source) -> float:
        """Return the divergence with all mapped that is, and a tenth of the tokens recomputed for each example."""
        model = self.pair.receiver.model

        def of(number: int) -> float:
            context, total = self._context(number, source), 0.0
            for which, example in enumerate(self.groups[number][:_EXAMPLES_SELECTED_FOR]):
                cache = partial_prefill(model, context, _ALL_SELECTED, prompt_ids=example.prompt, maps=maps)
                found = answer_logits(model, example, cache)
                total += float(kl_divergence(self.objectives[number].reference([which]), found).mean())
            return total

        return self._total(of)

    def _total(self, of: Callable[[int], float]) -> float:
        return sum(in_parallel(of, self.numbers, self.pair.receiver.device))

    def _context(self, number: int, source: Source) -> SharedContext:
        context = self.contexts[number]
        return replace(context, hidden_states={}) if source == "fitted_kv" else context


def _better(maps: Maps, trained: Mapping[Key, LayerMap], judged: _Judged, progress: Progress) -> Maps:
    """Return `maps` with the trained ones of each source with which contexts diverge less than with those that they have.

    That is asked of plans that repair no tokens, and once more of those that do.
    """
    for source in progress.track(FITTED, description="Validating training"):
        of_source = {key: each for key, each in trained.items() if key[1] == source}
        choices: tuple[Source, ...] = ("project", *[source for _ in of_source])
        name = "choices" if source == "fitted" else "choices_without_hidden"
        changed = replace(maps, layers={**maps.layers, **of_source}, **{name: choices})  # type: ignore[arg-type]
        if judged.kl(_ALL, changed, source) < _MAX_KL_RATIO * judged.kl(_ALL, maps, source):
            maps = changed
        repairing = replace(maps, repaired={**maps.repaired, **of_source})
        if judged.kl_selected(repairing, source) < _MAX_KL_RATIO * judged.kl_selected(maps, source):
            maps = repairing
    return maps


def _correction_share(plan: Plan, maps: Maps, fit: Affine, judged: _Judged) -> float:
    """Return the share of the correction at the start of the plan's band with which contexts diverge least."""
    start = plan.bands[0][0]

    def kl(share: float) -> float:
        return judged.kl(plan, replace(maps, corrections={start: judged.pair.correction(fit, share)}))

    return min(CORRECTION_SHARES, key=kl)


def _domain(pair: Pair, sums: Sequence[NormalEquations], contexts: Sequence[SharedContext], count: int) -> Domain:
    """Domain of the contexts, with a limit from the distances of the first `count` when they are left out of it.

    Args:
        sums: of each fold, of :attr:`Pair.domain_layer` from K/V.
    """
    by_fold = [
        (others, [contexts[each] for each in range(number, count, FOLDS)])
        for number, others in enumerate(_without_each(sums))
    ]
    return pair.domain(NormalEquations.total(sums), by_fold)


def _maps(
    pair: Pair,
    fits: Mapping[Source, Mapping[int, Affine]],
    shares: Shares,
    used: Collection[Source],
    domain: Domain,
) -> Maps:
    """Maps with each layer's shares; layers with negligible shares, and all layers of an unused source, are reused.

    Beside them are those at share 1 for plans that repair tokens: what was learnt without a repair is of no account there.
    """
    layers, repaired, choices = {}, {}, {}
    kept = {layer: each.tolist() for layer, each in shares.items() if each.abs().max() > _MIN_SHARE}
    for source in FITTED:
        # Layer 0 is projected from the receiver's own embeddings, which is exact.
        chosen: list[Source] = ["project"]
        for layer in pair.layers:
            key, fit = (layer, source), fits[source][layer]
            repaired[key] = pair.layer_map(key, fit, torch.ones(2, device=fit.weight.device))
            mapped = source in used and layer in kept
            chosen.append(source if mapped else "reuse")
            if mapped:
                layers[key] = pair.layer_map(key, fit, shares[layer])
        choices[source] = tuple(chosen)
    return Maps(*pair.fingerprints, choices["fitted"], choices["fitted_kv"], layers, repaired, {}, kept, domain)


class _Fits(NamedTuple):
    """Regressions of one source, by layer: on all contexts, and for each fold on the contexts of the other folds."""

    on_all: dict[int, Affine]
    without_fold: list[dict[int, Affine]]


def _fit_layers(
    pair: Pair, source: Source, folds: Sequence[Mapping[Key, NormalEquations]], progress: Progress
) -> _Fits:
    fits = _Fits({}, [{} for _ in folds])
    for layer in progress.track(pair.layers, description=f"Fitting maps: {source}"):
        sums = [fold[layer, source] for fold in folds]
        without_each = _without_each(sums)
        strength = _strength(without_each[0], sums[0], pair.blocks((layer, source)))
        for without_fold, equations in zip(fits.without_fold, without_each, strict=True):
            fit = equations.solve(strength)
            without_fold[layer] = Affine(fit.weight.float(), fit.bias.float())  # all they are for is float32
        fits.on_all[layer] = NormalEquations.total(sums).solve(strength)
    return fits


def _without_each(folds: Sequence[NormalEquations]) -> list[NormalEquations]:
    """Return for each fold the equations of all others."""
    return [NormalEquations.total([each for each in folds if each is not fold]) for fold in folds]


def _strength(train: NormalEquations, validation: NormalEquations, blocks: Sequence[slice]) -> torch.Tensor:
    """Strength for each output, ``[Q]``: the one that predicts its block of outputs best."""
    losses = torch.stack([validation.losses(train.solve(strength)) for strength in STRENGTHS])
    best = torch.empty(losses.shape[1], dtype=torch.float64, device=losses.device)
    for block in blocks:
        best[block] = STRENGTHS[int(losses[:, block].sum(1).argmin())]
    return best


def _learn(
    pair: Pair,
    fits: Mapping[Source, _Fits],
    contexts: Sequence[SharedContext],
    objectives: Sequence[KLObjective],
    progress: Progress,
) -> tuple[Shares, set[Source]]:
    """Learn the shares of each layer, and return them with the sources whose maps lower the divergence.

    Maps from either source are fitted to the same K and V, so the shares that are learnt with maps from hidden states serve
    those from K/V too.
    """

    def interpolations(source: Source, number: int) -> Interpolations:
        return pair.interpolations(source, contexts[number], fits[source].without_fold[number % FOLDS])

    shares = learn_shares(
        pair.layers,
        objectives,
        partial(interpolations, "fitted"),
        partial(progress.track, description="Learning shares"),
    )
    zeros = {layer: torch.zeros_like(each) for layer, each in shares.items()}

    def total(source: Source, shares: Shares) -> float:
        def of(number: int) -> float:
            return float(objectives[number].kl_of_shares(interpolations(source, number), shares))

        return sum(in_parallel(of, range(0, len(objectives), FOLDS), pair.receiver.device))

    reused = total("fitted_kv", zeros)  # the sender's own K and V

    def helps(source: Source) -> bool:
        return total(source, shares) < _MAX_KL_RATIO * reused

    return shares, {source for source in progress.track(FITTED, description="Validating maps") if helps(source)}
