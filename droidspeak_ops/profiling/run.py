"""Profiling: the quality and cost of the plans of a pair of models, measured on examples."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TypeVar

import torch

from ..example import Example, by_context, check_examples, examples_digest
from ..files import Journal
from ..hf.cache import MixedCache
from ..hf.decoder import Decoder, PreTrainedModel
from ..hf.passes import KeysValues, check_takes_masks
from ..hf.receiver import partial_prefill
from ..hf.sender import capture
from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..progress import bars
from .candidates import Candidate, Candidates, Measured, Quality, Unit, full_prefill
from .cost import CostModel
from .frontier import WORST_KL, Frontier, Point, check_agreement, check_kl
from .replay import compare, kl_and_top1, replay
from .timing import measure_costs

EVAL_TOKENS = 8
"""Most tokens of an answer at which next-token distributions are compared."""

_MAX_ANSWER_RATIO = 2  # of the tokens that the receiver may generate to those of the expected answer


def profile(
    sender: PreTrainedModel,
    receiver: PreTrainedModel,
    examples: Sequence[Example],
    *,
    maps: Maps | None = None,
    granularity: int = 1,
    costs: CostModel | None = None,
    score: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
    journal: str | os.PathLike[str] | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> Frontier:
    """Measure the quality and cost of plans for a pair of models (paper, section 4.1).

    On each context the receiver runs once from every layer to the last; all bands with that start share the K/V. Then only
    suffixes run, and what plans have in common runs once. For 30 layers and a context of 2,048 tokens this takes as long as 24
    to 25 full prefills, where measuring the 465 bands one by one needs 465 partial prefills and suffix passes.

    The first third of the contexts also measures the sensitivity of layers: the loss from reusing one alone, with all others
    recomputed. On the other contexts sets of the most sensitive layers are measured besides the bands. The last third is held
    out: no plan is chosen by it.

    Selections of tokens have no K/V in common with anything, so each runs by itself, for every example: shares of 5, 10 and
    20 % by every selector, over a context that is reused and over one that is projected or fitted, some five full prefills for
    an example. That is on the first third; on the others a selector is left out that a cheaper one was better than.

    Args:
        sender, receiver: models that fit together; neither is changed.
        examples: at least three contexts like those that plans are for. The first tokens of each answer are compared.
        maps: fitted to this pair. Plans are then measured with them: layers outside the bands are reused or filled by the maps,
            and bands start from corrected hidden states. Without maps, layers outside the bands are reused or projected.
        granularity: bands start and end at multiples of so many layers.
        costs: the receiver's cost model; measured if None.
        score: metric of the generated and the expected token ids, ``[N]`` each, such as
            ``metrics.of_tokens(metrics.f1, tokenizer)``. The Pareto-optimal plans are then also scored by the answers that the
            receiver generates, and quality loss means loss of this score.
        journal: a file of finished contexts, from which a killed run resumes.
        seed: seed of the order of contexts.
        show_progress: whether to draw progress bars on stderr.

    Raises:
        ReuseError, UnsupportedModelError: as :func:`partial_prefill`; or the receiver's attention is neither SDPA nor eager.
        ValueError: there are fewer than three contexts, an example has no suffix or answer, `granularity` is not between 1 and
            the number of layers, `score` returns no finite number, or the journal is of another run or damaged.
    """
    check_examples(examples)
    groups = by_context(examples)
    if len(groups) < 3:
        raise ValueError(f"examples: expected at least 3 contexts, got {len(groups)}")
    check_takes_masks(receiver)
    decoder = Decoder(receiver)
    fingerprints = Decoder(sender).fingerprint(weights=True), decoder.fingerprint(weights=True)
    fingerprints[0].check_reuse_by(fingerprints[1])
    if maps is not None:
        maps.check_pair(*fingerprints)
    if not 1 <= granularity <= decoder.num_layers:
        raise ValueError(f"granularity: expected 1 to {decoder.num_layers}, the number of layers, got {granularity}")
    random.Random(seed).shuffle(groups)
    digest = None if maps is None else maps.digest()
    run = {
        "profile of": [each.weights for each in fingerprints],
        "maps": digest,
        "granularity": granularity,
        "scored": score is not None,
        "examples": examples_digest([example for group in groups for example in group]),
    }
    # A record per context, then the cost model, then the scores per context.
    contexts = [examples_digest(group) for group in groups]
    with Journal(journal, run) as records:
        candidates = Candidates(decoder.num_layers, maps, granularity)
        third = len(groups) // 3
        records.check_end(len(groups) + 1 + (0 if score is None else len(groups)))
        measured: list[Measured] = []
        with bars(show_progress) as progress:
            task = progress.add_task("Profiling", total=len(groups), completed=min(len(records.done), len(groups)))
            for index, (context, group) in enumerate(zip(contexts, groups, strict=True)):
                some = candidates.on_pilots if index < third else candidates.plans(measured[:third])
                if index == len(records.done):
                    kl, agreement = measure_context(sender, decoder, maps, group, some)
                    records.add({"context": context, "kl": kl, "agreement": agreement})
                    progress.advance(task)
                found = read_record(records, index, MeasuredContext, context, len(some))
                measured.append(dict(zip(some, map(Quality, found.kl, found.agreement), strict=True)))
        if len(records.done) == len(groups):
            records.add(asdict(measure_costs(receiver, show_progress=show_progress) if costs is None else costs))
        frontier = Frontier(
            *fingerprints,
            maps=digest,
            points=tuple(candidates.points(measured, third)),
            sensitivity=tuple(candidates.sensitivity(measured[:third])),
            costs=records.read(len(groups), CostModel),
            contexts=tuple(group[0].context.shape[1] for group in groups),
            held_out=third,
            granularity=granularity,
            seed=seed,
        )
        if score is None:
            return frontier
        best, scored = frontier.pareto(), []
        with bars(show_progress) as progress:
            done = len(records.done) - len(groups) - 1
            task = progress.add_task("Scoring answers", total=len(groups), completed=done)
            for index, (context, group) in enumerate(zip(contexts, groups, strict=True), start=len(groups) + 1):
                if index == len(records.done):
                    scores = score_context(sender, decoder, maps, group, best, score)
                    records.add({"context": context, "scores": scores})
                    progress.advance(task)
                scored.append(read_record(records, index, ScoredContext, context, 1 + len(best)).scores)
        full, *of_best = zip(*scored, strict=True)
        by_point = dict(zip(best, of_best, strict=True))
        points = tuple(replace(point, scores=by_point.get(point)) for point in frontier.points)
        return replace(frontier, points=points, scores=full)


@dataclass(frozen=True)
class MeasuredContext:
    """A record of the journal: what was measured on a context, which is known by the digest of its examples."""

    context: str
    kl: list[float]
    agreement: list[float]

    def __post_init__(self) -> None:
        check_kl(self.kl)
        check_agreement(self.agreement)
        if len(self.agreement) != len(self.kl):
            raise ValueError(f"agreement: expected {len(self.kl)}, as many as kl has, got {len(self.agreement)}")

    def __len__(self) -> int:
        return len(self.kl)


@dataclass(frozen=True)
class ScoredContext:
    """A record of the journal: the scores of the answers on a context, after full prefill and with each point."""

    context: str
    scores: list[float]

    def __len__(self) -> int:
        return len(self.scores)


R = TypeVar("R", MeasuredContext, ScoredContext)


def read_record(records: Journal, index: int, kind: type[R], context: str, count: int) -> R:
    """Return the record of a context, by its digest, with so many measurements.

    Raises:
        ValueError: the record is another one; the message names the file and the line.
    """
    record = records.read(index, kind)
    if record.context != context:
        expected = f"the record of the context {context}"
        raise ValueError(f"{records.where(index)}: expected {expected}, got that of {record.context}")
    if len(record) != count:
        raise ValueError(f"{records.where(index)}: expected {count} measurements, got {len(record)}")
    return record


@torch.no_grad()
def measure_context(
    sender: PreTrainedModel,
    decoder: Decoder,
    maps: Maps | None,
    examples: Sequence[Example],
    candidates: Sequence[Candidate | Unit],
) -> tuple[list[float], list[float]]:
    """Measure candidates on one context: KL divergence from full prefill and top-1 agreement, means over its examples.

    A divergence that is no finite number, on any example, is :data:`WORST_KL`.
    """
    num_layers, receiver = decoder.num_layers, decoder.model
    context = capture(sender, examples[0].context, layers=range(num_layers))

    @cache
    def prefilled(plan: Plan) -> MixedCache:
        return partial_prefill(receiver, context, plan, maps=maps)

    def keys_values(plan: Plan, layer: int) -> KeysValues:
        held = prefilled(plan).layers[layer]
        return held.keys, held.values

    selections = [each for each in candidates if isinstance(each, Candidate) and each.select]
    replayed = [each for each in candidates if each not in selections]
    mixtures = [each.sources(num_layers) for each in replayed]
    totals = torch.zeros(2, len(candidates), dtype=torch.float64)
    for example in examples:
        answer = example.answer[:, :EVAL_TOKENS][:, :-1]
        ids = torch.cat((example.suffix, answer), dim=1)
        states = replay(decoder, context.tokens.shape[1], ids, mixtures, keys_values)[:, example.suffix.shape[1] - 1 :]
        reference = decoder.logits(states[replayed.index(full_prefill(num_layers))])
        found = dict(zip(replayed, zip(*kl_and_top1(decoder, states, reference), strict=True), strict=True))
        from_last = torch.cat((example.prompt[:, -1:], answer), dim=1)
        for each in selections:
            repaired = partial_prefill(receiver, context, each.plan, prompt_ids=example.prompt, maps=maps)
            logits = receiver(from_last, past_key_values=repaired, use_cache=True).logits.float()
            ((kl,), (agreement,)) = compare(reference, logits)
            found[each] = kl, agreement
        totals += torch.tensor([found[each] for each in candidates], dtype=torch.float64).T
    kls, agreements = totals / len(examples)
    return kls.clamp(max=WORST_KL).tolist(), agreements.tolist()


@torch.no_grad()
def score_context(
    sender: PreTrainedModel,
    decoder: Decoder,
    maps: Maps | None,
    examples: Sequence[Example],
    points: Sequence[Point],
    score: Callable[[torch.Tensor, torch.Tensor], float],
) -> list[float]:
    """Score the receiver's answers on one context, after full prefill and then with each point: means over its examples."""
    receiver = decoder.model
    context = capture(sender, examples[0].context, layers=range(decoder.num_layers))
    totals = [0.0] * (1 + len(points))
    for example in examples:
        for place, point in enumerate([None, *points]):
            cache = None
            if point is not None:
                cache = partial_prefill(receiver, context, point.plan, prompt_ids=example.prompt, maps=maps)
            longest = _MAX_ANSWER_RATIO * example.answer.shape[1]
            out = receiver.generate(example.prompt, past_key_values=cache, max_new_tokens=longest, do_sample=False)
            value = score(out[0, example.prompt.shape[1] :], example.answer[0])
            if not math.isfinite(value):
                raise ValueError(f"score: expected a finite number, got {value}")
            totals[place] += value
    return [total / len(examples) for total in totals]
