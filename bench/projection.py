"""From the hidden states of a layer to its K and V in the cache: this project's kernels against what else does it.

    python -m bench.projection --csv projection.csv --plot projection.png

What is timed: input norm, both projections, bias, norm of K, RoPE of K and the store, in bfloat16 on a GPU, as medians of
``triton.testing.do_bench``. Everything that needs no hidden states (folded weights, 1/rms) is made beforehand.

- `transformers`: the model's own modules, eager, and a copy into a preallocated cache. Q is neither projected nor rotated.
- `compile`: ``torch.compile`` of that.
- `unfused`: this project's row norm, linear layers, row norm of heads, and its splice, which rotates and stores.
- `concatenated`, `concatenated folded`: the same with one product for K and V; the second scales the product by 1/rms.
- `liger`: as `unfused`, with Liger's RMS norm and RoPE, and a copy. Its RoPE rotates a Q along with K: here of a single head.
- `ours`, `ours folded`: `kv_project` with the two orders of the input norm.
- `ours x8 single`, `ours x8 grouped`: 8 layers, folded, in 8 calls and in one; at 1,024 tokens alone.

No provider is timed before its K and V agree with a float64 computation. ``--device cpu`` runs all of this in float32 on any
machine, where this project's operators are their references: it shows that the bench works, and says nothing about kernels.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import track

from bench.common import Row, environment, parser, show, write_csv
from bench.providers import GROUPED, PROVIDERS, Problem, Provider, expected
from droidspeak_ops.ops import tuning
from droidspeak_ops.profiling.timing import timed
from droidspeak_ops.proof.shapes import SHAPES
from droidspeak_ops.proof.targets import TARGETS, time_floor

MODELS = ["Llama-3-8B", "Qwen3-8B", "Gemma-3-12B", "Llama-3-70B-TP8", "SmolLM2-135M"]
GROUP, GROUP_TOKENS = 8, 1024

# Maximum and RMS error, relative to the largest and RMS value: what a chain of roundings adds up to.
TOLERANCES = {torch.float32: (1e-5, 3e-6), torch.float16: (2e-3, 8e-4), torch.bfloat16: (1.6e-2, 6e-3)}


# --- what is right, and how long it takes ---------------------------------------------------------------------------------


def errors(actual: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return the worst maximum and RMS error of any tensor, relative to its largest and RMS value; NaN if an element is."""
    found = []
    for one, other in zip(actual, wanted, strict=True):
        difference, other = one.double() - other, other.double()
        found.append(torch.stack((difference.abs().max() / other.abs().max(), difference.norm() / other.norm())))
    largest, rms = torch.stack(found).amax(0).tolist()  # amax keeps NaN
    return largest, rms


def within(found: tuple[float, float], dtype: torch.dtype) -> bool:
    """Return whether errors are within the tolerances of a dtype."""
    return all(error <= allowed for error, allowed in zip(found, TOLERANCES[dtype], strict=True))  # NaN is not


def cold_milliseconds(run: Callable[[], None], device: str, rounds: int) -> float:
    """Return a call's median time: of `rounds` calls on the CPU, of as many as it takes on a GPU, with a cold L2 cache."""
    if device == "cpu":
        return statistics.median(timed(run)[1] for _ in range(rounds)) * 1e3
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")


def skipped(provider: str, device: str) -> str | None:
    """Return why a provider cannot run here, or None."""
    if provider != "liger":
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "skipped: liger_kernel is not installed (pip install liger-kernel)"
    return "skipped: Liger needs a GPU" if device == "cpu" else None


def verified(
    problem: Problem, provider: Provider, wanted: Sequence[torch.Tensor]
) -> tuple[Callable[[], None] | None, str]:
    """Return what is to be timed, or None if it fails or gives something else than `wanted`; and what the check found."""
    for output in problem.outputs:
        output.fill_(float("nan"))
    try:
        run = provider(problem)
        run()
        found = errors(problem.outputs, wanted)
    except Exception as error:  # one provider's compiler or memory must not end the others' run
        return None, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    check = f"max {found[0]:.1e}, RMS {found[1]:.1e}"
    return (run, check) if within(found, problem.dtype) else (None, f"refused: {check}")


def measure(model: str, problem: Problem, providers: Mapping[str, Provider], rounds: int) -> Iterator[Row]:
    """Yield a row of each provider, checked and then timed.

    Without a time the provider did not run or was refused, and `check` says why.
    """
    wanted, target = expected(problem), known_target(problem.device)
    for name, provider in providers.items():
        run, check = None, skipped(name, problem.device)
        if check is None:
            run, check = verified(problem, provider, wanted)
        time = None if run is None else cold_milliseconds(run, problem.device, rounds)
        percent = None
        if time is not None and target is not None:
            floor = time_floor(target, problem.flops, problem.bytes_moved, half=problem.dtype != torch.float32)
            percent = round(floor / time / 10, 1)
        yield {
            "model": model,
            "tokens": problem.tokens,
            "provider": name,
            "milliseconds": None if time is None else float(f"{time:.5g}"),
            "speedup": None,
            "roofline_percent": percent,
            "check": check,
        }


def measure_all(
    models: Sequence[str], tokens: Sequence[int], names: Sequence[str], device: str, rounds: int
) -> list[Row]:
    """Measure the providers of some names; `speedup` is transformers' time for as many layers over theirs."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows: list[Row] = []
    for model, count in track([(model, count) for model in models for count in tokens], description="models x tokens"):
        torch.compiler.reset()  # else there are more versions of one function than it allows
        base: float | None = None
        for layers, providers in ((1, PROVIDERS), (GROUP, GROUPED)):
            chosen = {name: provider for name, provider in providers.items() if name in names}
            if not chosen or (layers > 1 and count != GROUP_TOKENS):
                continue
            found = list(measure(model, Problem(SHAPES[model], count, dtype, device, layers), chosen, rounds))
            base = next((row["milliseconds"] for row in found if row["provider"] == "transformers"), base)
            for row in found:
                if base is not None and row["milliseconds"] is not None:
                    row["speedup"] = round(layers * base / row["milliseconds"], 2)
            rows += found
    return rows


def known_target(device: str) -> str | None:
    """Return the key of :data:`TARGETS` for the GPU's architecture, if it has one."""
    if device == "cpu":
        return None
    found = tuning.target(torch.cuda.current_device())
    return next((name for name in (found, f"{found}a") if name in TARGETS), None)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the speed-up over transformers by context tokens, as a PNG: a panel for each model."""
    from matplotlib.figure import Figure

    models, names = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "provider"))
    columns = min(len(models), 3)
    lines = -(-len(models) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 7), 3.4 * lines + 1), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for model, axes in zip(models, panels, strict=False):
        for index, name in enumerate(names):
            mine = [
                row for row in rows if (row["model"], row["provider"]) == (model, name) and row["speedup"] is not None
            ]
            if mine:
                tokens, speedups = [row["tokens"] for row in mine], [row["speedup"] for row in mine]
                axes.plot(tokens, speedups, marker="o", color=f"C{index}", label=name, linewidth=1.4, markersize=5)
        ticks = sorted({row["tokens"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(model, fontsize=10)
        axes.set_xlabel("context tokens", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)  # after all lines: it ends the scaling of all panels, which share it
    for axes in panels[len(models) :]:
        axes.set_axis_off()
    figure.supylabel("speed-up over transformers, eager", fontsize=9)
    shown = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; the exit code is 1 where a provider failed or was refused."""
    options = parser("projection", __doc__)
    options.add_argument("--models", nargs="+", choices=list(SHAPES), metavar="MODEL", help=", ".join(SHAPES))
    options.add_argument("--tokens", type=int, nargs="+", help="context lengths")
    options.add_argument("--providers", nargs="+", choices=[*PROVIDERS, *GROUPED], default=[*PROVIDERS, *GROUPED])
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--rounds", type=int, default=5, help="calls that are timed on the CPU")
    options.add_argument("--csv", type=Path, help="also write the rows to this file")
    options.add_argument("--plot", type=Path, help="also draw the speed-ups to this PNG")
    args = options.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("Nothing was timed: a GPU is needed, or --device cpu to try the bench itself.")
        return []

    small = args.device == "cpu"
    torch.manual_seed(0)
    rows = measure_all(
        args.models or (["SmolLM2-135M"] if small else MODELS),
        args.tokens or ([64, 256] if small else [1024, 8192, 32768]),
        args.providers,
        args.device,
        args.rounds,
    )
    here = environment(args.device)
    where = {name: here.get(name) for name in ("device", "torch", "triton", "transformers")}
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "transformers"))
    dtype = "float32, references" if small else "bfloat16"
    title = f"From hidden states to K/V in the cache: {dtype}\n{where['device']}, {versions}"
    show(rows, title, "speed-up over transformers, eager; errors against float64")
    if args.csv:
        write_csv(args.csv, rows, **where)
    if args.plot:
        plot(rows, title, args.plot)
    if any(row["check"].startswith(("refused", "failed")) for row in rows):
        sys.exit(1)
    return rows


if __name__ == "__main__":
    main()
