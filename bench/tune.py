"""Search launch configurations of `project_splice` on a GPU, and write those that beat the kernel's own choice.

    python bench/tune.py tuned.json && DROIDSPEAK_TUNED=tuned.json python ...

A configuration counts only if it compiles and gives what the default gives, and is written only if it is faster by 3 %. The
file holds for the GPU and the Triton that it was made with; :mod:`droidspeak_ops.tuning` reads it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from projection import errors, within
from rich.console import Console
from rich.progress import track
from rich.table import Table

from droidspeak_ops import tuning
from droidspeak_ops.kernels.project_splice import (
    ProjectSpliceConfig,
    pairs_per_head,
    project_splice,
    project_splice_config,
)
from droidspeak_ops.proof.shapes import SHAPES, projection

GAIN = 0.03
DTYPES = (torch.bfloat16, torch.float16)
TILES = ((64, 128, 256), (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))  # in the order of the configuration's fields

# Milliseconds of a configuration; None if it does not compile or gives something else than the default.
Timer = Callable[[ProjectSpliceConfig], float | None]


@dataclass(frozen=True)
class Choice:
    """A configuration, its time, and the default's."""

    config: ProjectSpliceConfig
    milliseconds: float
    default_milliseconds: float


def candidates(
    head_dim: int, has_head_norm: bool, dtype: torch.dtype, shared_limit: int, warp_size: int
) -> Iterator[ProjectSpliceConfig]:
    """Configurations that the kernel's rules and the GPU allow.

    Args:
        head_dim: columns per head.
        has_head_norm: whether a tile must hold whole heads.
        dtype: of the hidden states and weights.
        shared_limit: bytes of shared memory that a program may have.
        warp_size: threads of a warp.
    """
    pairs = pairs_per_head(head_dim, has_head_norm)
    for sizes in itertools.product(*TILES):
        config = ProjectSpliceConfig(*sizes)
        # A tile of x and one of the weights for each stage; some targets keep one stage fewer in shared memory.
        stage = (config.block_m + 2 * config.block_n) * config.block_k * dtype.itemsize
        accumulators = 2 * config.block_m * config.block_n // (config.num_warps * warp_size)  # registers of a thread
        fits = stage * (config.num_stages - 1) <= shared_limit and accumulators <= 128  # of 255
        if fits and not (has_head_norm and config.block_n % pairs):
            yield config


def choose(
    default: ProjectSpliceConfig, others: Iterable[ProjectSpliceConfig], time: Timer, gain: float = GAIN
) -> Choice:
    """The fastest configuration, but the default unless another is faster by `gain`, twice.

    Raises:
        RuntimeError: the default itself does not run.
    """
    default_time = time(default)
    if default_time is None:
        raise RuntimeError(f"{default}: the default does not run here")
    best, best_time = default, default_time
    for config in others:
        found = time(config)
        if found is not None and found < best_time:
            best, best_time = config, found
    if best_time > (1 - gain) * default_time:
        return Choice(default, default_time, default_time)
    # The winner of many is partly luck, so it has to win again, right before the default.
    again, default_again = time(best), time(default)
    if again is None or default_again is None or again > (1 - gain) * default_again:
        return Choice(default, default_time, default_time)
    return Choice(best, again, default_again)


def timer(arguments: dict[str, Any], default: ProjectSpliceConfig) -> Timer:
    """Times launches on a GPU: medians, with a cold L2 cache."""
    from triton.testing import do_bench

    outputs = [*arguments["k_cache"], *arguments["v_cache"]]
    project_splice(**arguments, config=default)
    wanted = [output.clone() for output in outputs]

    def time(config: ProjectSpliceConfig) -> float | None:
        def run() -> None:
            project_splice(**arguments, config=config)

        for output in outputs:
            output.fill_(float("nan"))
        try:
            run()
        except Exception:  # out of shared memory, ptxas, a pass of the compiler: Triton's errors have no common base
            return None
        return do_bench(run, return_mode="median") if within(errors(outputs, wanted), outputs[0].dtype) else None

    return time


def tune(models: Sequence[str], dtypes: Sequence[torch.dtype], tokens: int) -> Iterator[tuple[dict[str, Any], Choice]]:
    """For each shape and dtype the key by which a configuration is looked up, and the choice."""
    from triton.runtime import driver

    device = torch.cuda.current_device()
    shared_limit = driver.active.utils.get_device_properties(device)["max_shared_mem"]
    warp_size = driver.active.get_current_target().warp_size
    for model, dtype in itertools.product(models, dtypes):
        shape = SHAPES[model]
        key = {
            "hidden_size": shape.hidden_size,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "has_head_norm": shape.head_norm == "each",
        }
        default = project_splice_config(
            tuning.target(device), dtype, shape.num_kv_heads, shape.head_dim, key["has_head_norm"]
        )
        allowed = list(candidates(shape.head_dim, key["has_head_norm"], dtype, shared_limit, warp_size))
        time = timer(projection(shape, tokens, dtype=dtype, device="cuda"), default)
        yield (
            {"dtype": str(dtype), **key},
            choose(default, track(allowed, description=f"{model} {dtype}"), time),
        )


def write(path: Path, device: str, found: Iterable[tuple[dict[str, Any], Choice]]) -> Table:
    """Write the file for the device of that name, of what is faster than its default; a table of all."""
    entries = []
    out = Table(title=device)
    for column in (
        "dtype",
        "hidden_size",
        "num_kv_heads",
        "head_dim",
        "has_head_norm",
        "configuration",
        "ms",
        "default, ms",
    ):
        out.add_column(column)
    for key, choice in found:
        better = choice.milliseconds < choice.default_milliseconds
        if better:
            entries.append({**key, **asdict(choice), "config": asdict(choice.config)})
        config = " ".join(f"{name}={value}" for name, value in asdict(choice.config).items()) if better else "default"
        times = (f"{time:.4f}" for time in (choice.milliseconds, choice.default_milliseconds))
        out.add_row(*map(str, key.values()), config, *times)
    tuning.save(path, device, entries)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("Nothing was tuned: a GPU is needed.")
        return
    torch.manual_seed(0)
    found = tune(args.models, DTYPES, args.tokens)
    Console(width=140).print(write(args.output, torch.cuda.get_device_name(), found))


if __name__ == "__main__":
    main()
