"""Fitting maps to a pair of models: ridge regressions of the receiver's K/V, and shares for each layer by their effect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress

from ..context.context import SharedContext
from ..example import Example, by_context, check_examples
from ..hf.decoder import Decoder
from ..hf.passes import check_takes_masks
from ..hf.receiver import partial_prefill
from ..hf.sender import capture
from ..prefill.maps import SINKS, Domain, Maps
from ..prefill.plan import Plan
from ..prefill.schedule import Source
from ..progress import bars
from .pair import FITTED, Key, Pair
from .ridge import NormalEquations, Regression
from .shares import STEPS, Mixture, Shares, Trial, learn_shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDS = 3
STRENGTHS = (0.001, 0.01, 0.03, 0.1, 1.0)
SHARES_AT_START = (0.0, 0.25, 0.5, 0.75, 1.0)

_WORTH = 0.98  # what shares must lower the divergence to, or layers stay as they are
_NOTHING = 0.02  # shares below it are none


def fit(
    sender: PreTrainedModel,
    receiver: PreTrainedModel,
    examples: Sequence[Example],
    *,
    bands: Sequence[tuple[int, int]] = (),
    show_progress: bool = True,
) -> Maps:
    """Fit what turns the sender's K/V into the receiver's, and give each layer as much of it as helps.

    The contexts are dealt into three folds. What a layer's map predicts on a fold is regressed on the others, so that the
    shares, which are learnt from what the predictions do to the receiver's next tokens, are learnt on contexts that the
    regression has not seen. The maps that are returned are regressed on all contexts.

    Args:
        sender, receiver: a pair that fits together; neither is changed.
        examples: of at least three contexts, such as those the maps are for; several may follow one context.
        bands: of the plans that the maps are for. The hidden states that they start from are corrected by as much as helps.
        show_progress: whether to draw bars on stderr.

    Returns:
        Maps for ``partial_prefill(receiver, context, plan, maps=maps)``.

    Raises:
        ReuseError, UnsupportedModelError: as :func:`partial_prefill`; or the receiver's attention is neither SDPA nor eager.
        ValueError: there are fewer than three contexts, one is no longer than its attention sinks, an example has no suffix or
            answer, or a band is none.
    """
    groups = by_context(examples)
    shortest = min((group[0].context.shape[1] for group in groups), default=0)
    if len(groups) < FOLDS or shortest <= SINKS:
        raise ValueError(
            f"examples: got {len(groups)} contexts, the shortest of {shortest} tokens; "
            f"{FOLDS} or more of more than {SINKS} tokens are needed"
        )
    check_examples(examples)
    check_takes_masks(receiver)
    plans = [Plan([band], project="rest") for band in bands]
    pair = Pair(Decoder(sender), Decoder(receiver), [plan.bands[0][0] for plan in plans])
    with bars(show_progress) as progress, torch.no_grad():
        folds = [pair.equations() for _ in range(FOLDS)]
        contexts, trials = [], []
        for number, group in enumerate(progress.track(groups, description="Reading contexts")):
            theirs, own = (capture(model, group[0].context, layers=pair.layers) for model in (sender, receiver))
            pair.add(folds[number % FOLDS], theirs, own)
            if number < STEPS:  # the rest are only summed, so that memory does not grow with what is calibrated on
                contexts.append(theirs)
                trials.append(Trial(pair.receiver, own, group))
        fits = {role: _Fits(pair, role, folds, progress) for role in FITTED}
        shares, worth = _learnt(pair, fits, contexts, trials, progress)
        domain = _domain(pair, folds, contexts)
        maps = _maps(pair, {role: each.of_all for role, each in fits.items()}, shares, worth, domain)
        if plans:
            unseen = _maps(pair, {role: each.without[0] for role, each in fits.items()}, shares, worth, domain)
            tried = list(zip(contexts[::FOLDS], trials[::FOLDS], strict=True))
            corrections = {}
            for plan in progress.track(plans, description="Weighing starts"):
                start = plan.bands[0][0]
                if start not in pair.starts:
                    continue
                share = _share_at_start(pair, plan, unseen, fits["fitted"].without[0][start], tried)
                if share:
                    corrections[start] = pair.correction(fits["fitted"].of_all[start], share)
            maps = replace(maps, corrections=corrections)
        return maps


def _share_at_start(
    pair: Pair, plan: Plan, maps: Maps, fitted: Regression, tried: Sequence[tuple[SharedContext, Trial]]
) -> float:
    """Choose the share of the correction where a band starts that brings the receiver nearest to its own prefill."""
    start = plan.bands[0][0]

    def divergence(share: float) -> float:
        corrected = replace(maps, corrections={start: pair.correction(fitted, share)})
        total = 0.0
        for context, trial in tried:
            cache = partial_prefill(pair.receiver.model, context, plan, maps=corrected)
            total += float(trial.divergence_with([(layer.keys, layer.values) for layer in cache.layers]))
        return total

    return min(SHARES_AT_START, key=divergence)


def _domain(pair: Pair, folds: Sequence[Mapping[Key, NormalEquations]], contexts: Sequence[SharedContext]) -> Domain:
    """The kind of contexts that maps are fitted to, with a limit that contexts stay within that are left out."""
    sums = [fold[pair.domain_layer, "fitted_kv"] for fold in folds]
    held_out = [(others, contexts[number::FOLDS]) for number, others in enumerate(_without_each(sums))]
    return pair.domain(NormalEquations.total(sums), held_out)


def _maps(
    pair: Pair,
    fits: Mapping[Source, Mapping[int, Regression]],
    shares: Shares,
    worth: Collection[Source],
    domain: Domain,
) -> Maps:
    """The maps with each layer's shares; a layer is reused where it has none, and all are by a role that is not worth it."""
    layers, choices = {}, {}
    kept = {layer: each.tolist() for layer, each in shares.items() if each.abs().max() > _NOTHING}
    for role in FITTED:
        # Layer 0 is projected from the receiver's own embeddings, which is exact.
        chosen: list[Source] = ["project"]
        for layer in pair.layers:
            mapped = role in worth and layer in kept
            chosen.append(role if mapped else "reuse")
            if mapped:
                layers[layer, role] = pair.layer_map((layer, role), fits[role][layer], shares[layer])
        choices[role] = tuple(chosen)
    return Maps(*pair.fingerprints, choices["fitted"], choices["fitted_kv"], layers, {}, kept, domain)


class _Fits:
    """The regressions of one role by layer: without each fold, and of all contexts."""

    def __init__(
        self, pair: Pair, role: Source, folds: Sequence[Mapping[Key, NormalEquations]], progress: Progress
    ) -> None:
        self.role = role
        self.of_all: dict[int, Regression] = {}
        self.without: list[dict[int, Regression]] = [{} for _ in folds]
        for layer in progress.track(pair.layers, description=f"Fitting {role}"):
            sums = [fold[layer, role] for fold in folds]
            rest = _without_each(sums)
            strength = _strength(rest[0], sums[0], pair.blocks(layer, role))
            for without, equations in zip(self.without, rest, strict=True):
                without[layer] = equations.solve(strength)
            self.of_all[layer] = NormalEquations.total(sums).solve(strength)


def _without_each(folds: Sequence[NormalEquations]) -> list[NormalEquations]:
    """For each fold the equations of all others."""
    return [NormalEquations.total([each for each in folds if each is not fold]) for fold in folds]


def _strength(seen: NormalEquations, unseen: NormalEquations, blocks: Sequence[slice]) -> torch.Tensor:
    """For each output the strength with which its block of outputs is predicted best."""
    losses = torch.stack([unseen.losses(seen.solve(strength)) for strength in STRENGTHS])
    best = torch.empty(losses.shape[1], dtype=torch.float64, device=losses.device)
    for block in blocks:
        best[block] = STRENGTHS[int(losses[:, block].sum(1).argmin())]
    return best


def _learnt(
    pair: Pair,
    fits: Mapping[Source, _Fits],
    contexts: Sequence[SharedContext],
    trials: Sequence[Trial],
    progress: Progress,
) -> tuple[Shares, set[Source]]:
    """The shares of each layer, and the roles that lower the divergence with them.

    Both roles are fitted to the same K and V, so what is learnt with maps from hidden states serves those from K/V too.
    """

    def mixture(role: Source, number: int) -> Mixture:
        return pair.mixture(role, contexts[number], fits[role].without[number % FOLDS])

    shares = learn_shares(
        pair.layers, trials, partial(mixture, "fitted"), partial(progress.track, description="Weighing layers")
    )
    none = {layer: torch.zeros_like(each) for layer, each in shares.items()}

    def worthwhile(role: Source) -> bool:
        before = after = 0.0
        for number in range(0, len(trials), FOLDS):
            mixed = mixture(role, number)
            before += float(trials[number].divergence(mixed, none))
            after += float(trials[number].divergence(mixed, shares))
        return after < _WORTH * before

    return shares, {role for role in progress.track(FITTED, description="Judging maps") if worthwhile(role)}
