"""The quality of contexts in 8 bits, and from a sender with another RoPE.

    python -m bench.contexts --examples 16 --csv FOLDER

Quality is measured on the shipped held-out examples, SmolLM2-135M-Instruct -> glossary variant. `kl` is the Kullback-Leibler
divergence, in nats, of the next-token distributions from those of the receiver's own full prefill, from the suffix's last
token on, with the answer's tokens given; `nll` is the negative log-likelihood of the answer per token. Both are means over
examples, `added` is that of paired differences of `kl`; `low` and `high` are where 95 % of 10,000 bootstrap means lie.

- `quantized`: each plan from a context in float32, fp8 and int8. Of an `own` context the sender is the receiver: prefix
  caching, in which nothing but the coding is lost. Bytes are those that a plan needs: K, V, its hidden states, and scales.
- `rope`: senders that are SmolLM2, or for an `own` context the variant itself, with another RoPE. Reused K are turned on to
  the receiver's RoPE, or left as they are. No model was trained for another RoPE, so each is a worse sender than without;
  what counts is turned against not turned, and of an `own` context nothing but RoPE differs.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track

import droidspeak_ops as ds
from bench.common import (
    Row,
    default_device,
    divergence,
    mean_and_interval,
    parser,
    setting,
    show,
    without_interval,
    write_csv,
)
from bench.pairs import PAIRS
from droidspeak_ops.metrics import answer_logits

PLAIN, FULL, UNCHANGED, TURNED, NOT_TURNED = "float32", "full prefill", "unchanged", "turned", "not turned"
FORMATS = {PLAIN: None, "fp8 (e4m3fn)": torch.float8_e4m3fn, "int8": torch.int8}
ROPES: dict[str, dict[str, Any]] = {
    "theta 130,000": {"rope_theta": 130_000.0},
    "theta 200,000": {"rope_theta": 200_000.0},
    "theta 500,000": {"rope_theta": 500_000.0},
    "linear, factor 2": {"rope_type": "linear", "factor": 2.0},
    "YaRN, factor 2": {"rope_type": "yarn", "factor": 2.0},
}


class Key(NamedTuple):
    """One way to answer: the context, the plan, and the form that the context is in or the keys are reused in."""

    context: str
    plan: str
    form: str


class Score(NamedTuple):
    """The score of one example in one way, and the bytes that the plan needs of the context."""

    kl: float
    nll: float
    nbytes: int


Scores = Iterator[tuple[Key, Score]]


def scorer(receiver: Any, question: ds.Example) -> Callable[[ds.SharedContext, ds.Plan | None], Score]:
    """Return a function that scores a context and a plan (None for full prefill) against full prefill of a question."""
    own = answer_logits(receiver, question)

    def score(context: ds.SharedContext, plan: ds.Plan | None) -> Score:
        found = own if plan is None else answer_logits(receiver, question, ds.partial_prefill(receiver, context, plan))
        return Score(divergence(own, found), F.cross_entropy(found, question.answer[0]).item(), context.nbytes)

    return score


def plans(depth: int) -> list[ds.Plan]:
    """Return the plans that are compared: reuse, projection, a band of a third of the layers, and that with projection."""
    band = (depth // 2, depth // 2 + depth // 3)
    return [ds.Plan(), ds.Plan(project="rest"), ds.Plan([band]), ds.Plan([band], project="rest")]


def for_plan(context: ds.SharedContext, plan: ds.Plan) -> ds.SharedContext:
    """Return the context with no more hidden states than a plan needs."""
    layers = plan.hidden_layers(context.num_layers)
    return replace(context, hidden_states={layer: context.hidden_states[layer] for layer in layers})


def quantized_scores(sender: Any, receiver: Any, question: ds.Example) -> Scores:
    """Yield the scores of plans by whose context it is and its format."""
    depth = receiver.config.num_hidden_layers
    theirs = ds.capture(sender, question.context, layers=range(1, depth))
    own = ds.capture(receiver, question.context)
    score = scorer(receiver, question)
    yield Key("", FULL, ""), score(own, None)
    for source, context, candidates in (("sender's", theirs, plans(depth)), ("own", own, [ds.Plan()])):
        coded = {name: context if dtype is None else context.quantized(dtype) for name, dtype in FORMATS.items()}
        for plan in candidates:
            for name in FORMATS:
                yield Key(source, str(plan), name), score(for_plan(coded[name], plan), plan)


def with_rope(model: Any, changes: Mapping[str, Any]) -> Any:
    """Return a model that is built for another RoPE, and shares the weights."""
    config = copy.deepcopy(model.config)
    length = {"original_max_position_embeddings": config.max_position_embeddings} if "factor" in changes else {}
    config.rope_parameters = {**config.rope_parameters, **length, **changes}
    other = type(model)(config).eval().to(model.device)
    other.load_state_dict(model.state_dict(), assign=True)
    if torch.equal(other.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq):
        raise RuntimeError(f"changes: expected parameters that change RoPE, got {dict(changes)}")
    return other


def rope_scores(
    senders: Mapping[str, Any], receiver: Any, candidates: Sequence[ds.Plan], question: ds.Example
) -> Scores:
    """Yield the scores of plans by the sender's RoPE, and by whether reused K are turned on to the receiver's."""
    depth = receiver.config.num_hidden_layers
    layers = sorted({layer for plan in candidates for layer in plan.hidden_layers(depth)})
    contexts = {name: ds.capture(sender, question.context, layers=layers) for name, sender in senders.items()}
    unchanged = contexts.pop(UNCHANGED)
    score = scorer(receiver, question)
    for plan in candidates:
        yield Key(UNCHANGED, str(plan), ""), score(unchanged, plan)
    for name, context in contexts.items():
        as_it_is = replace(context, sender=replace(context.sender, rope=unchanged.sender.rope))
        for plan in candidates:
            yield Key(name, str(plan), TURNED), score(context, plan)
            yield Key(name, str(plan), NOT_TURNED), score(as_it_is, plan)


def collect(
    measure: Callable[[ds.Example], Scores], questions: Sequence[ds.Example], description: str
) -> dict[Key, list[Score]]:
    """Return the scores of all questions, by key."""
    found: dict[Key, list[Score]] = {}
    for question in track(questions, description=description):
        for key, score in measure(question):
            found.setdefault(key, []).append(score)
    return found


def quality(scores: Sequence[Score], base: Sequence[Score] | None) -> Row:
    """Return means over examples, and of what was `added` to the divergence of `base`."""
    kl = [score.kl for score in scores]
    added = without_interval("added")
    if base is not None:
        added = mean_and_interval("added", [ours - theirs.kl for ours, theirs in zip(kl, base, strict=True)])
    nll = statistics.fmean(score.nll for score in scores)
    return {**mean_and_interval("kl", kl), **added, "nll": f"{nll:.4f}"}


def quantized_rows(sender: Any, receiver: Any, questions: Sequence[ds.Example]) -> list[Row]:
    """Measure plans from contexts in 8 bits."""
    found = collect(partial(quantized_scores, sender, receiver), questions, "8 bits")
    tokens = sum(question.context.shape[1] for question in questions)
    rows: list[Row] = []
    for key, scores in found.items():
        base = found.get(key._replace(form=PLAIN))
        size: Row = {"KiB_per_token": "", "of_float32": ""}
        if base is not None:
            nbytes, plain = (sum(score.nbytes for score in each) for each in (scores, base))
            size = {"KiB_per_token": f"{nbytes / tokens / 1024:.1f}", "of_float32": f"{nbytes / plain:.3f}"}
        added = quality(scores, None if key.form == PLAIN else base)
        rows.append({"context": key.context, "plan": key.plan, "format": key.form, **size, **added})
    return rows


def rope_rows(sender: Any, receiver: Any, questions: Sequence[ds.Example]) -> list[Row]:
    """Measure plans from senders with another RoPE."""
    without_projection = [plan for plan in plans(receiver.config.num_hidden_layers) if not plan.project]
    rows: list[Row] = []
    for source, model, candidates in (("sender's", sender, without_projection), ("own", receiver, [ds.Plan()])):
        senders = {UNCHANGED: model, **{name: with_rope(model, changes) for name, changes in ROPES.items()}}
        found = collect(partial(rope_scores, senders, receiver, candidates), questions, f"RoPE, {source} context")
        for key, scores in found.items():
            bases = {TURNED: Key(UNCHANGED, key.plan, ""), NOT_TURNED: key._replace(form=TURNED)}
            added = quality(scores, found[bases[key.form]] if key.form else None)
            rows.append({"context": source, "rope": key.context, "plan": key.plan, "reused_keys": key.form, **added})
    return rows


class Part(NamedTuple):
    """A table: what measures it, its title and its caption."""

    measure: Callable[[Any, Any, Sequence[ds.Example]], list[Row]]
    title: str
    note: str


PARTS = {
    "quantized": Part(quantized_rows, "Contexts in 8 bits", "added: over the same plan from the context in float32"),
    "rope": Part(
        rope_rows,
        "Senders with another RoPE",
        "added: of turned K over unchanged RoPE, which the models were trained for; of K not turned over turned",
    ),
}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; the rows are those of all parts, with `part` in front."""
    options = parser("contexts", __doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    options.add_argument("--examples", type=int, default=16, help="held-out examples, at most 64")
    options.add_argument(
        "--csv", type=Path, metavar="FOLDER", help="also write a CSV file for each part to this folder"
    )
    args = options.parse_args(argv)

    pair = PAIRS["lora"].load(default_device())
    questions = pair.examples("test", args.examples)
    lengths = [question.context.shape[1] for question in questions]
    where = (
        f"SmolLM2-135M-Instruct -> glossary variant, {len(questions)} examples, contexts of {min(lengths)} to {max(lengths)} "
        f"tokens, float32, {setting(pair.receiver.device)}"
    )
    found: list[Row] = []
    for name in args.only:
        part = PARTS[name]
        rows = part.measure(pair.sender, pair.receiver, questions)
        title = f"{part.title}: {where}"
        show(rows, title, part.note)
        if args.csv:
            args.csv.mkdir(parents=True, exist_ok=True)
            write_csv(args.csv / f"{name}.csv", rows, setting=title)
        found += [{"part": name, **row} for row in rows]
    return found


if __name__ == "__main__":
    main()
