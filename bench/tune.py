"""Search launch configurations of `project_splice` on a GPU, and write those that beat the kernel's own choice.

    python -m bench.tune tuned.json && DROIDSPEAK_TUNED=tuned.json python ...
    python -m bench.tune tuned.json --models Llama-3-8B --dtypes bfloat16 --candidates 25 --seconds 60

Candidates are compiled in parallel, by processes that launch each once, and timed one by one, those near the default first.
A configuration counts only if it compiles and gives the same bits as the default, and is written only if it is faster by 3 %.
It holds from its number of tokens on, for the GPU and the Triton that the file was made with; :mod:`droidspeak_ops.ops.tuning`
reads it.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from bench.common import Row, environment, parser, show
from droidspeak_ops.kernels.arguments import Projection
from droidspeak_ops.kernels.project_splice import project_splice
from droidspeak_ops.kernels.project_splice_config import (
    ProjectSpliceConfig,
    Size,
    can_use_tma,
    pairs_per_head,
    project_splice_config,
    size_of,
)
from droidspeak_ops.ops import tuning
from droidspeak_ops.proof.shapes import SHAPES, Shape, projections

GAIN = 0.03
DTYPES = ("bfloat16", "float16")
PROCESSES = min(os.cpu_count() or 1, 12)
TILES = {
    "block_m": (64, 128, 256),
    "block_n": (32, 64, 128),
    "block_k": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
"""Values by field of the configuration. Switches are tried both ways, and other fields stay as the default has them."""

Timer = Callable[[ProjectSpliceConfig], float | None]
"""Returns milliseconds of a configuration; None if it does not compile or gives something else than the default."""
Key = dict[str, Any]
"""The entries of :data:`droidspeak_ops.ops.tuning.KEY`, by which a configuration is found."""


@dataclass(frozen=True)
class Choice:
    """A configuration, its time, and the default's."""

    config: ProjectSpliceConfig
    milliseconds: float
    default_milliseconds: float


def candidates(
    default: ProjectSpliceConfig, size: Size, shared_limit: int, warp_size: int
) -> Iterator[ProjectSpliceConfig]:
    """Yield the configurations that the kernel's rules and the GPU allow.

    Args:
        default: the kernel's own choice.
        size: of the projection.
        shared_limit: bytes of shared memory that a program may have.
        warp_size: threads of a warp.
    """
    pairs = pairs_per_head(size.head_dim, size.has_head_norm)
    names = [field.name for field in fields(default)]
    for values in itertools.product(*(_values(name, getattr(default, name)) for name in names)):
        config = replace(default, **dict(zip(names, values, strict=True)))
        # A tile of x and one of the weights for each stage; some targets keep one stage fewer in shared memory.
        stage = (config.block_m + 2 * config.block_n) * config.block_k * size.dtype.itemsize
        accumulators = 2 * config.block_m * config.block_n // (config.num_warps * warp_size)  # registers of a thread
        fits = stage * (config.num_stages - 1) <= shared_limit and accumulators <= 128  # of 255
        whole_heads = config.block_n % pairs == 0
        if config.tma:
            works = can_use_tma(size) and whole_heads
        else:
            works = not config.persistent and (whole_heads or not size.has_head_norm)
        if fits and works:
            yield config


def _values(name: str, default: Any) -> tuple[Any, ...]:
    return TILES.get(name, (False, True) if isinstance(default, bool) else (default,))


def nearest(default: ProjectSpliceConfig, configs: Iterable[ProjectSpliceConfig]) -> list[ProjectSpliceConfig]:
    """Return all but the default, by how many doublings and other changes they are from it."""

    def distance(config: ProjectSpliceConfig) -> float:
        total = 0.0
        for field in fields(default):
            one, other = getattr(config, field.name), getattr(default, field.name)
            is_size = isinstance(one, int) and not isinstance(one, bool) and min(one, other) > 0
            total += abs(math.log2(one / other)) if is_size else one != other
        return total

    return sorted((config for config in configs if config != default), key=distance)


def selected(
    wanted: str | None, default: ProjectSpliceConfig, allowed: Iterable[ProjectSpliceConfig]
) -> list[ProjectSpliceConfig]:
    """Return configurations to try: all that are allowed, so many of the nearest, or those of a list.

    Args:
        wanted: None, a number, or a JSON list of changes to the default, or the path of a file with one.
        default: the kernel's own choice.
        allowed: what :func:`candidates` gives.
    """
    if wanted is None or wanted.isdigit():
        return nearest(default, allowed)[: None if wanted is None else int(wanted)]
    text = wanted if wanted.lstrip().startswith("[") else Path(wanted).read_text(encoding="utf-8")
    return [replace(default, **changes) for changes in json.loads(text)]


# --- compiling in parallel ------------------------------------------------------------------------------------------------


@functools.cache
def _layers(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> list[Projection]:
    return projections(shape, tokens, dtype=dtype, device=device)


def launches(shape: Shape, tokens: int, dtype: torch.dtype, device: str, config: ProjectSpliceConfig) -> bool:
    """Launch a configuration once, which puts it into Triton's cache on disk, and return whether that works.

    One that accesses memory out of bounds ends with it what else its process would launch: better there than where the time
    is taken.
    """
    try:
        project_splice(_layers(shape, tokens, dtype, device), config)
        if device != "cpu":
            torch.cuda.synchronize()
    except Exception:  # out of shared memory, ptxas, a pass of the compiler: Triton's errors have no common base
        return False
    return True


def compiled(jobs: Sequence[Callable[[], bool]], processes: int, deadline: float = math.inf) -> list[bool]:
    """Return for each job, run by so many processes until a time of ``time.monotonic()``, whether it works."""
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    futures = [pool.submit(job) for job in jobs]
    wait(futures, timeout=None if deadline == math.inf else max(deadline - time.monotonic(), 0))
    pool.shutdown(cancel_futures=True)
    return [not future.cancelled() and future.exception() is None and future.result() for future in futures]


# --- timing ---------------------------------------------------------------------------------------------------------------


def choose(
    default: ProjectSpliceConfig, others: Iterable[ProjectSpliceConfig], timed: Timer, gain: float = GAIN
) -> Choice:
    """Return the fastest configuration, but the default unless another is faster by `gain`, twice.

    Raises:
        RuntimeError: the default itself does not run.
    """
    default_time = timed(default)
    if default_time is None:
        raise RuntimeError(f"default: expected a configuration that runs here, got {default}, which does not run")
    best, best_time = default, default_time
    for config in others:
        found = timed(config)
        if found is not None and found < best_time:
            best, best_time = config, found
    if best_time > (1 - gain) * default_time:
        return Choice(default, default_time, default_time)
    # The winner of many is partly luck, so it has to win again, right before the default.
    again, default_again = timed(best), timed(default)
    if again is None or default_again is None or again > (1 - gain) * default_again:
        return Choice(default, default_time, default_time)
    return Choice(best, again, default_again)


def timer(layers: Sequence[Projection], default: ProjectSpliceConfig) -> Timer:
    """Return a timer of launches on a GPU: medians, with a cold L2 cache."""
    from triton.testing import do_bench

    outputs = [cache for layer in layers for cache in (layer.k_cache, layer.v_cache)]
    project_splice(layers, default)
    wanted = [output.clone() for output in outputs]

    def timed(config: ProjectSpliceConfig) -> float | None:
        def run() -> None:
            project_splice(layers, config)

        for output in outputs:
            output.fill_(float("nan"))
        try:
            run()
        except Exception:  # out of shared memory, ptxas, a pass of the compiler: Triton's errors have no common base
            return None
        # To the last bit, or a row would depend on how many are computed with it.
        same = all(map(torch.equal, outputs, wanted))
        return do_bench(run, return_mode="median") if same else None

    return timed


@dataclass(frozen=True)
class Problem:
    """A shape and dtype to find a configuration for: the default, and what is tried against it."""

    model: str
    dtype: torch.dtype
    tokens: int
    default: ProjectSpliceConfig
    others: list[ProjectSpliceConfig]

    @classmethod
    def of(cls, model: str, dtype: torch.dtype, tokens: int, wanted: str | None) -> Problem:
        """Return the problem for the current GPU."""
        from triton.runtime import driver

        device = torch.cuda.current_device()
        size = size_of(projections(SHAPES[model], tokens, dtype=dtype))
        default = project_splice_config(tuning.target(device), size)
        shared_limit = driver.active.utils.get_device_properties(device)["max_shared_mem"]
        allowed = candidates(default, size, shared_limit, driver.active.get_current_target().warp_size)
        return cls(model, dtype, tokens, default, selected(wanted, default, allowed))

    @property
    def key(self) -> Key:
        """The key by which the configuration is looked up."""
        shape = SHAPES[self.model]
        values = (str(self.dtype), shape.hidden_size, shape.num_kv_heads, shape.head_dim, shape.head_norm is not None)
        return dict(zip(tuning.KEY, (*values, self.tokens), strict=True))

    @property
    def jobs(self) -> list[Callable[[], bool]]:
        """Functions that compile each of the others."""
        launch = functools.partial(launches, SHAPES[self.model], self.tokens, self.dtype, "cuda")
        return [functools.partial(launch, config) for config in self.others]

    def timer(self, report: Callable[[Row], None]) -> Timer:
        """Return a timer that reports each time as it is taken."""
        measured = timer(projections(SHAPES[self.model], self.tokens, dtype=self.dtype, device="cuda"), self.default)
        names = {"model": self.model, "dtype": str(self.dtype), "tokens": self.tokens}

        def timed(config: ProjectSpliceConfig) -> float | None:
            found = measured(config)
            report({**names, **asdict(config), "milliseconds": found})
            return found

        return timed


def tune(
    models: Sequence[str],
    dtypes: Sequence[torch.dtype],
    tokens: int,
    *,
    wanted: str | None = None,
    processes: int = 1,
    seconds: float = math.inf,
    report: Callable[[Row], None] = lambda row: None,
) -> Iterator[tuple[Key, Choice]]:
    """Yield for each shape and dtype the key by which a configuration is looked up, and the choice.

    Args:
        models: names of :data:`SHAPES`.
        dtypes: of hidden states and weights.
        tokens: of the context.
        wanted: which candidates, as :func:`selected` takes them.
        processes: that compile.
        seconds: for everything; what has not been timed by then is left out. At most half of it goes to compiling.
        report: is given each time as it is taken.
    """
    began = time.monotonic()
    problems = [Problem.of(model, dtype, tokens, wanted) for model, dtype in itertools.product(models, dtypes)]
    works = iter(compiled([job for problem in problems for job in problem.jobs], processes, began + seconds / 2))
    ready = [[config for config in problem.others if next(works)] for problem in problems]
    began_timing = time.monotonic()
    share = (began + seconds - began_timing) / len(problems)
    for number, (problem, configs) in enumerate(zip(problems, ready, strict=True)):
        in_time = _until(began_timing + share * (number + 1), configs)
        shown = track(in_time, description=f"{problem.model} {problem.dtype}", total=len(configs))
        yield problem.key, choose(problem.default, shown, problem.timer(report))


def _until(deadline: float, configs: Iterable[ProjectSpliceConfig]) -> Iterator[ProjectSpliceConfig]:
    return itertools.takewhile(lambda _: time.monotonic() < deadline, configs)


def write(path: Path, device: str, found: Iterable[tuple[Key, Choice]]) -> list[Row]:
    """Write what is faster than its default to the file, for the device of that name, and return rows of all."""
    entries: list[dict[str, Any]] = []
    rows: list[Row] = []
    for key, choice in found:
        better = choice.milliseconds < choice.default_milliseconds
        if better:
            entries.append({**key, **asdict(choice)})
        times = {"ms": f"{choice.milliseconds:.4f}", "default_ms": f"{choice.default_milliseconds:.4f}"}
        rows.append({**key, "configuration": in_words(choice.config) if better else "default", **times})
    tuning.save(path, device, entries)
    return rows


def in_words(config: ProjectSpliceConfig) -> str:
    """Return a configuration in words."""
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command."""
    options = parser("tune", __doc__)
    options.add_argument("output", type=Path, help="JSON file to write")
    options.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="MODEL")
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--candidates", help="how many, or a JSON list of changes to the default, or a file of one")
    options.add_argument("--processes", type=int, default=PROCESSES, help="that compile")
    options.add_argument("--seconds", type=float, default=math.inf, help="for everything; all are tried by default")
    args = options.parse_args(argv)
    if not torch.cuda.is_available():
        print("Nothing was tuned: a GPU is needed.")
        return []
    torch.manual_seed(0)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    found = tune(
        args.models, dtypes, args.tokens,
        wanted=args.candidates, processes=args.processes, seconds=args.seconds,
    )  # fmt: skip
    device = str(environment("cuda")["device"])
    rows = write(args.output, device, found)
    show(rows, device)
    return rows


if __name__ == "__main__":
    main()
