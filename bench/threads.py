"""Threads that share one sender and one receiver: whether every result is, bit for bit, what it is alone.

    python -m bench.threads --csv threads.csv

Threads call everything that the package does with models, in an order drawn anew, beside a thread that does nothing but
generate with the plain receiver. A round begins at a barrier, with models, contexts and profiles that nothing was asked of yet,
so that what is computed at the first use is asked for by several threads at once; and the interpreter changes threads far more
often than it would. Results are compared with those of equal models in one thread. Files are written by all threads to one
path: what is read then is what one of them wrote. An exception is a wrong result. The exit status is 1 if there was any.

Of a model whose RoPE depends on the length only what the package computes itself is judged: a forward pass of transformers
replaces the frequencies of the model, between which and their use another thread may pass with another length.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import droidspeak_ops as ds
from bench.common import Row, checkout, parser, setting, show, write_csv
from droidspeak_ops import tensor_file

LAYERS = 4
COSTS = ds.CostModel((0, 1e-4, 0), (0, 1e-5, 0), (0.05, 0, 0), 4000, 1000, "made up", (100, 2000))
PLANS = (
    ds.Plan(),
    ds.Plan(project="rest"),
    ds.Plan([(1, 3)], project="rest"),
    ds.Plan([(0, 2)], project=[3]),
    ds.Plan([(0, LAYERS)]),
)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 30,  # between the lengths of contexts
}


class Kind(NamedTuple):
    """Models of a family with changes of its configuration, and what the names of functions begin with that are not judged."""

    model_type: str
    changes: Mapping[str, Any]
    unjudged: tuple[str, ...] = ()


KINDS = {
    "plain": Kind("llama", {}),
    "windows, two RoPEs": Kind("gemma3_text", {"sliding_window": 16, "sliding_window_pattern": 2}),
    "RoPE by length": Kind("llama", {"rope_parameters": LONGROPE}, unjudged=("generate", "fit")),
}
SLOW = ("fit", "profile")
FILES = ("Maps.save, load", "SharedContext.save, load", "Frontier.save, load")
BESIDE = "generate, all the time"
CONTEXT_TOKENS = 36
SUFFIX_TOKENS = 4
NEW_TOKENS = 6

Job = Callable[[], str]
"""A call, which returns the digest of its result."""
Jobs = Mapping[str, Sequence[Job]]
"""Calls by function."""
Call = tuple[str, int]
"""A function, and which of its jobs."""
Expected = Mapping[Call, frozenset[str]]
"""For each call the digests that are right; calls that are not judged are not in it."""


def tiny_pair(kind: Kind) -> tuple[Any, Any]:
    """Return a tiny random sender and a fine-tune of it, the same at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind.model_type,
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,  # so that layers matter, and greedy tokens vary
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **kind.changes,
    )
    sender = AutoModelForCausalLM.from_config(config).eval()
    receiver = copy.deepcopy(sender)
    with torch.no_grad():
        for weight in receiver.parameters():
            weight.add_(0.1 * weight.std() * torch.randn_like(weight))
    return sender, receiver


def tiny_examples(count: int) -> list[ds.Example]:
    """Return random examples with contexts of three lengths, the same at every call."""
    torch.manual_seed(1)
    lengths = [CONTEXT_TOKENS - 9 * (number % 3) for number in range(count)]
    return [
        ds.Example(*(torch.randint(1, 101, (1, each)) for each in (length, SUFFIX_TOKENS, 4))) for length in lengths
    ]


class Inputs(NamedTuple):
    """Inputs and expected results, made beforehand in one thread.

    Args:
        examples: of which the contexts are read.
        contexts: the same, as the sender read them, and one of them in 8 bits.
        maps: two, of which the first is of all examples.
        frontiers: two, without and with these maps.
    """

    examples: list[ds.Example]
    contexts: list[ds.SharedContext]
    maps: list[ds.Maps]
    frontiers: list[ds.Frontier]

    def fresh(self) -> Inputs:
        """Return contexts and frontiers of the same contents, of which nothing has been computed yet."""
        return self._replace(contexts=list(map(replace, self.contexts)), frontiers=list(map(replace, self.frontiers)))


def inputs_of(kind: Kind) -> Inputs:
    """Return what is made beforehand for a kind of models."""
    sender, receiver = tiny_pair(kind)
    examples = tiny_examples(4)
    contexts = [ds.capture(sender, each.context, layers=range(LAYERS)) for each in examples]
    maps = [
        ds.fit(sender, receiver, examples[:count], bands=[(1, 3)], steps=2, show_progress=False) for count in (4, 3)
    ]
    frontiers = [
        ds.profile(sender, receiver, examples[:3], maps=each, costs=COSTS, show_progress=False)
        for each in (None, maps[0])
    ]
    return Inputs(examples, [*contexts, contexts[0].quantized(torch.int8)], maps, frontiers)


def jobs_of(sender: Any, receiver: Any, inputs: Inputs, folder: Path) -> Jobs:
    """Return the calls, by function. Those of :data:`FILES` write to the same paths in `folder`."""
    once, depth = ds.Receiver(receiver), range(LAYERS)
    examples, contexts, maps, frontiers = inputs
    in_full = contexts[: len(examples)]
    ways = list(product((receiver, once), (None, maps[0]), ("hf", "folded")))

    def capture(example: ds.Example, layers: Sequence[int]) -> str:
        return of_context(ds.capture(sender, example.context, layers=layers))

    def capture_batch(batch: Mapping[str, torch.Tensor], layers: Sequence[int]) -> str:
        return "".join(map(of_context, ds.capture_batch(sender, **batch, layers=layers)))

    def prefill(context: ds.SharedContext, plan: ds.Plan, way: tuple[Any, Any, Any]) -> str:
        model, used, norm = way
        return of_cache(ds.partial_prefill(model, context, plan, maps=used, norm=norm))

    def prefill_batch(model: Any, used: ds.Maps | None, norm: Any) -> str:
        return of_cache(ds.partial_prefill_batch(model, in_full[:3], PLANS[1:4], maps=used, norm=norm))

    def generate(example: ds.Example, cache: ds.MixedCache | None = None, **options: Any) -> str:
        limits = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        out = receiver.generate(example.prompt, past_key_values=cache, **limits, **options)
        return str(out[0, example.prompt.shape[1] :].tolist())

    def generate_over(model: Any, number: int, **options: Any) -> str:
        cache = ds.partial_prefill(model, in_full[number], PLANS[number], maps=maps[0])
        return generate(examples[number], cache, **options)

    def generate_over_copy(example: ds.Example, cache: ds.MixedCache) -> str:
        return generate(example, copy.deepcopy(cache))

    def fit() -> str:
        return ds.fit(sender, receiver, examples, bands=[(1, 3)], steps=2, show_progress=False).digest()

    def profile(used: ds.Maps | None) -> str:
        return repr(ds.profile(sender, receiver, examples[:3], maps=used, costs=COSTS, show_progress=False))

    def choose(frontier: ds.Frontier, loss: float, tokens: int | None) -> str:
        return str(frontier.choose(max_quality_loss=loss, max_ttft=1.0, tokens=tokens))

    def save_and_load(name: str, describe: Callable[[Any], str], value: Any) -> str:
        path = folder / name.partition(".")[0]
        value.save(path)
        return describe(type(value).load(path))

    bounds = torch.tensor([0, *(each.context.shape[1] for each in examples)]).cumsum(0)
    packed = torch.cat([each.context[0] for each in examples])
    mask = torch.ones((3, 20), dtype=torch.int64)
    mask[0, :7] = mask[1, 12:] = 0
    batches = (
        {"input_ids": packed, "cu_seqlens": bounds},
        {"input_ids": packed[:60].view(3, 20), "attention_mask": mask},
    )
    shared = [ds.partial_prefill(ds.Receiver(receiver), *each) for each in zip(in_full, PLANS, strict=False)]
    over = list(product((receiver, once), range(len(examples))))
    contents = zip(FILES, (ds.Maps.digest, of_context, repr), (maps, contexts, frontiers), strict=True)
    return {
        "capture": [partial(capture, *each) for each in product(examples, ((), depth))],
        "capture_batch": [partial(capture_batch, *each) for each in product(batches, ((), depth))],
        "partial_prefill": [partial(prefill, *each) for each in product(contexts, PLANS, ways)],
        "partial_prefill_batch": [partial(prefill_batch, *each) for each in ways],
        "generate": [partial(generate, each) for each in examples],
        "generate over a MixedCache": [partial(generate_over, *each) for each in over],
        "generate over one, assisted": [partial(generate_over, *each, assistant_model=sender) for each in over],
        "generate over one, prompt lookup": [
            partial(generate_over, *each, prompt_lookup_num_tokens=3) for each in over
        ],
        "generate over copies of one": [
            partial(generate_over_copy, *each) for each in zip(examples, shared, strict=True)
        ],
        "fit": [fit],
        "profile": [partial(profile, each) for each in (None, maps[0])],
        "Frontier.choose": [partial(choose, *each) for each in product(frontiers, (0.0, 0.1, 0.5), (None, 2000))],
        **{
            name: [partial(save_and_load, name, describe, each) for each in values]
            for name, describe, values in contents
        },
    }


def of_context(context: ds.SharedContext) -> str:
    """Return a digest of the tensors of a context."""
    rows = (part for layer in range(context.num_layers) for part in context.kv(layer))
    return digest([context.tokens, *rows, *(context.hidden(layer) for layer in context.hidden_layers)])


def of_cache(cache: ds.MixedCache) -> str:
    """Return a digest of the tensors of a cache."""
    return digest([cache.tokens, cache.mask, *(part for layer in cache.layers for part in (layer.keys, layer.values))])


def digest(tensors: Iterable[torch.Tensor | None]) -> str:
    """Return a digest of dtypes, shapes and bytes."""
    return tensor_file.digest({}, {str(place): each for place, each in enumerate(tensors) if each is not None})


def alone(jobs: Jobs, calls: Iterable[Call]) -> Expected:
    """Make each call once, in this thread, and return what is right; of a file, what any call writes there."""
    results = {
        (function, number): jobs[function][number]() for function, number in track(set(calls), description="Alone")
    }
    return {
        call: frozenset(job() for job in jobs[call[0]]) if call[0] in FILES else frozenset([result])
        for call, result in results.items()
    }


def order(jobs: Jobs, calls: int, slow: bool, rng: random.Random) -> list[Call]:
    """Draw the calls of a thread in a round: as many of each function, and one of each slow one if they are to be made."""
    quick = [function for function in jobs if function not in SLOW]
    rng.shuffle(quick)
    once = [function for function in SLOW if function in jobs and slow]
    functions = [*once, *quick * -(-calls // len(quick))][:calls]
    rng.shuffle(functions)
    return [(function, rng.randrange(len(jobs[function]))) for function in functions]


class Outcome(NamedTuple):
    """A call, and what was wrong with its result."""

    function: str
    wrong: str | None


def called(function: str, job: Job, right: frozenset[str] | None) -> Outcome:
    """Run a job and judge its result; without what is right, only whether there is one."""
    try:
        result = job()
    except Exception as error:  # a wrong result, like any other
        return Outcome(function, f"{type(error).__name__}: {error}")
    return Outcome(function, None if right is None or result in right else "another result")


@contextmanager
def changing_threads_often() -> Iterator[None]:
    """Let the interpreter change threads a thousand times more often, and each use one core."""
    interval, cores = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(interval / 1000)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(cores)


def run_round(jobs: Jobs, expected: Expected, orders: Sequence[Sequence[Call]]) -> list[Outcome]:
    """Run a thread for each order, and beside them one that generates with the plain receiver until they have ended."""
    outcomes: list[Outcome] = []
    begin, left = threading.Barrier(len(orders) + 1), threading.Semaphore(0)

    def work(calls: Sequence[Call]) -> None:
        begin.wait()
        for function, number in calls:
            outcomes.append(called(function, jobs[function][number], expected[function, number]))
        left.release()

    def generate() -> None:
        begin.wait()
        ended = 0
        for number, job in itertools.cycle(enumerate(jobs["generate"])):
            outcome = called(BESIDE, job, expected.get(("generate", number)))
            if outcome.wrong or ("generate", number) in expected:
                outcomes.append(outcome)
            ended += left.acquire(blocking=False)
            if ended == len(orders):
                return

    threads = [threading.Thread(target=work, args=(each,)) for each in orders] + [threading.Thread(target=generate)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def run(kind: Kind, threads: int, calls: int, rounds: int, seed: int) -> list[Outcome]:
    """Run `rounds` of `calls` calls in each thread over a kind of models; every other round fits and profiles."""
    outcomes, rng = [], random.Random(seed)
    with changing_threads_often(), tempfile.TemporaryDirectory() as folder:
        inputs = inputs_of(kind)
        jobs = jobs_of(*tiny_pair(kind), inputs, Path(folder))
        judged = {function: each for function, each in jobs.items() if not function.startswith(kind.unjudged)}
        orders = [[order(judged, calls, number % 2 == 0, rng) for _ in range(threads)] for number in range(rounds)]
        beside = [("generate", number) for number in range(len(judged.get("generate", ())))]
        expected = alone(jobs, itertools.chain(beside, *itertools.chain(*orders)))
        for each in track(orders, description="Rounds"):
            outcomes += run_round(jobs_of(*tiny_pair(kind), inputs.fresh(), Path(folder)), expected, each)
    return outcomes


def rows_of(models: str, outcomes: Sequence[Outcome]) -> list[Row]:
    """Return a row for each function, and one for them all."""
    by_function: dict[str, list[str | None]] = defaultdict(list)
    for function, wrong in outcomes:
        by_function[function].append(wrong)
    by_function["all"] = [wrong for _, wrong in outcomes]
    return [
        {
            "models": models,
            "function": function,
            "calls": len(each),
            "wrong": sum(wrong is not None for wrong in each),
            "first": next((wrong for wrong in each if wrong is not None), ""),
        }
        for function, each in by_function.items()
    ]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command."""
    options = parser("threads", __doc__)
    options.add_argument("--threads", type=int, default=4)
    options.add_argument("--calls", type=int, default=20, help="of each thread in a round")
    options.add_argument("--rounds", type=int, default=8, help="of each kind of models")
    options.add_argument("--seed", type=int, default=0, help="of what is called, and when")
    options.add_argument("--csv", type=Path, help="also write the table to this file")
    args = options.parse_args(argv)

    logging.set_verbosity_error()
    rows: list[Row] = []
    for name, kind in KINDS.items():
        rows += rows_of(name, run(kind, args.threads, args.calls, args.rounds, args.seed))
    show(
        rows,
        f"{args.threads} threads, {args.rounds} rounds of {args.calls} calls in each, seed {args.seed}, {setting()}",
    )
    if args.csv:
        write_csv(args.csv, rows, threads=args.threads, seed=args.seed, setting=setting(), **checkout())
    return rows


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    sys.exit(any(row["wrong"] for row in main()))
