"""From the hidden states of a layer to its K and V in the cache: this project's kernels against what else does it.

    python bench/projection.py --csv projection.csv --plot projection.png

What is timed: input norm, both projections, bias, norm of K, RoPE of K and the store, in bfloat16 on a GPU, as medians of
``triton.testing.do_bench``. Everything that needs no hidden states (folded weights, 1/rms) is made beforehand.

- `transformers`: the model's own modules, eager, and a copy into a preallocated cache. Q is neither projected nor rotated.
- `compile`: ``torch.compile`` of that.
- `unfused`: this project's row norm, linear layers, row norm of heads, and its splice, which rotates and stores.
- `liger`: the same with Liger's RMS norm and RoPE, and a copy. Its RoPE rotates a Q along with K: here of a single head.
- `ours`, `ours folded`: `kv_project` with the two orders of the input norm.
- `ours x8 single`, `ours x8 grouped`: 8 layers, folded, in 8 calls and in one; at 1,024 tokens alone.

No provider is timed before its K and V agree with a float64 computation. ``--device cpu`` runs all of this in float32 on any
machine, where this project's operators are their references: it shows that the bench works, and says nothing about kernels.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import droidspeak_ops as ds
from droidspeak_ops import tuning
from droidspeak_ops.demo.measure import timed
from droidspeak_ops.proof.shapes import SHAPES, Shape, projection
from droidspeak_ops.proof.targets import TARGETS, time_floor

EPS = 1e-6
MODELS = ["Llama-3-8B", "Qwen3-8B", "Gemma-3-12B", "Llama-3-70B-TP8", "SmolLM2-135M"]
NORMS = {"llama": LlamaRMSNorm, "gemma": Gemma3RMSNorm, "olmo": Olmo2RMSNorm}  # Qwen3RMSNorm is LlamaRMSNorm
GROUP, GROUP_TOKENS = 8, 1024

# Maximum and RMS error, relative to the largest and RMS value: what a chain of roundings adds up to.
TOLERANCES = {torch.float32: (1e-5, 3e-6), torch.float16: (2e-3, 8e-4), torch.bfloat16: (1.6e-2, 6e-3)}


@dataclass(frozen=True)
class Problem:
    """Layers of one shape, and the caches that a provider fills."""

    shape: Shape
    tokens: int
    dtype: torch.dtype
    device: str
    layers: int = 1

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Arguments of the operator, and the weights of the input norm; a list has a tensor for each layer."""
        made = projection(self.shape, self.tokens, dtype=self.dtype, device=self.device, layers=self.layers)
        return {**made, "norm_weight": [torch.randn_like(x[0]) for x in made["x"]]}

    def layer(self, index: int = 0) -> dict[str, Any]:
        """The arguments of one layer; None for what it does not have."""
        return {
            name: (value[index] if value else None) if isinstance(value, list) else value
            for name, value in self.tensors.items()
        }

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [*self.tensors["k_cache"], *self.tensors["v_cache"]]

    @property
    def flops(self) -> int:
        return sum(
            2 * self.tokens * weight.numel() for name in ("k_weight", "v_weight") for weight in self.tensors[name]
        )

    @property
    def bytes_moved(self) -> int:
        """Each input once, each output once."""
        values = self.tensors.values()
        lists = [value if isinstance(value, list) else [value] for value in values]
        return sum(tensor.nbytes for tensors in lists for tensor in tensors if isinstance(tensor, torch.Tensor))


@dataclass(frozen=True)
class Row:
    """One line of the result. Without a time where the provider did not run or was refused, and `check` says why."""

    model: str
    tokens: int
    provider: str
    milliseconds: float | None
    speedup: float | None  # transformers' time for as many layers, divided by this one
    roofline_percent: float | None
    check: str


# --- providers: each makes what needs no hidden states, and returns what is timed -----------------------------------------


def eager(problem: Problem) -> Callable[[], None]:
    shape, layer = problem.shape, problem.layer()
    norm = _norm(shape.hidden_size, shape, layer["norm_weight"])
    k_proj, v_proj = (_linear(layer[f"{name}_weight"], layer[f"{name}_bias"]) for name in "kv")
    k_norm = None if shape.head_norm is None else _norm(shape.head_dim, shape, layer["k_norm_weight"])
    cos, sin = (torch.cat((layer[name],) * 2, dim=-1) for name in ("cos", "sin"))

    def run() -> None:
        rows = norm(layer["x"][None])
        k, v = k_proj(rows), v_proj(rows)
        if shape.head_norm == "all":
            k = k_norm(k)
        k, v = (each.unflatten(-1, (-1, shape.head_dim)) for each in (k, v))
        if shape.head_norm == "each":
            k = k_norm(k)
        k, passed = k.transpose(1, 2).split([shape.rotary_dim, shape.head_dim - shape.rotary_dim], dim=-1)
        k = k * cos + rotate_half(k) * sin
        layer["k_cache"].copy_(torch.cat((k, passed), dim=-1) if passed.numel() else k)
        layer["v_cache"].copy_(v.transpose(1, 2))

    return run


def compiled(problem: Problem) -> Callable[[], None]:
    torch.compiler.reset()  # each problem is compiled for its own shapes
    return torch.compile(eager(problem), fullgraph=True, dynamic=False)


def unfused(problem: Problem) -> Callable[[], None]:
    shape, layer = problem.shape, problem.layer()
    order = shape.norm_order

    def run() -> None:
        rows = ds.ops.row_norm(layer["x"], layer["norm_weight"], EPS, norm_order=order)
        k = F.linear(rows, layer["k_weight"], layer["k_bias"])
        v = F.linear(rows, layer["v_weight"], layer["v_bias"])
        if shape.head_norm == "all":
            k = ds.ops.row_norm(k, layer["k_norm_weight"], EPS, norm_order=order)
        k, v = (each.unflatten(-1, (-1, shape.head_dim)) for each in (k, v))
        if shape.head_norm == "each":
            k = ds.ops.row_norm(k, layer["k_norm_weight"], EPS, norm_order=order)
        k, v = (each[None].transpose(1, 2) for each in (k, v))
        caches = layer["k_cache"], layer["v_cache"], layer["slot_mapping"]
        ds.ops.kv_splice(k, v, *caches, cos=layer["cos"], sin=layer["sin"])

    return run


def liger(problem: Problem) -> Callable[[], None]:
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    shape, layer = problem.shape, problem.layer()
    offset, casting = {"llama": (0.0, "llama"), "gemma": (1.0, "gemma"), "olmo": (0.0, "gemma")}[shape.norm_order]

    def norm_with(weight: torch.Tensor) -> nn.Module:
        norm = LigerRMSNorm(weight.shape[0], EPS, offset, casting, in_place=False)
        return _with(norm, weight=weight)

    norm = norm_with(layer["norm_weight"])
    k_norm = None if shape.head_norm is None else norm_with(layer["k_norm_weight"])
    q = layer["x"].new_zeros(1, problem.tokens, 1, shape.head_dim).transpose(1, 2)
    cos, sin = (torch.cat((layer[name],) * 2, dim=-1)[None] for name in ("cos", "sin"))

    def run() -> None:
        rows = norm(layer["x"][None])
        k, v = (F.linear(rows, layer[f"{name}_weight"], layer[f"{name}_bias"]) for name in "kv")
        if shape.head_norm == "all":
            k = k_norm(k)
        k, v = (each.unflatten(-1, (-1, shape.head_dim)) for each in (k, v))
        if shape.head_norm == "each":
            k = k_norm(k)
        k = liger_rotary_pos_emb(q, k.transpose(1, 2), cos, sin)[1]
        layer["k_cache"].copy_(k)
        layer["v_cache"].copy_(v.transpose(1, 2))

    return run


def ours(problem: Problem) -> Callable[[], None]:
    layer = problem.layer()
    given = {
        name: layer[name] for name in ("norm_weight", "norm_order", "k_bias", "v_bias", "k_norm_weight", "cos", "sin")
    }
    return partial(ds.ops.kv_project, *_positional(layer), norm="hf", norm_eps=EPS, head_norm_eps=EPS, **given)


def ours_folded(problem: Problem, index: int = 0) -> Callable[[], None]:
    layer = _folded(problem.layer(index))
    given = {name: layer[name] for name in ("rstd", "norm_order", "k_bias", "v_bias", "k_norm_weight", "cos", "sin")}
    return partial(ds.ops.kv_project, *_positional(layer), norm="folded", head_norm_eps=EPS, **given)


def ours_single(problem: Problem) -> Callable[[], None]:
    calls = [ours_folded(problem, index) for index in range(problem.layers)]

    def run() -> None:
        for call in calls:
            call()

    return run


def ours_grouped(problem: Problem) -> Callable[[], None]:
    layers = [_folded(problem.layer(index)) for index in range(problem.layers)]
    columns = list(zip(*(_positional(layer)[:5] for layer in layers), strict=True))
    plural = {"rstd": "rstds", "k_bias": "k_biases", "v_bias": "v_biases", "k_norm_weight": "k_norm_weights",
              "cos": "coses", "sin": "sines"}  # fmt: skip
    given = {plural[name]: [layer[name] for layer in layers] for name in plural if layers[0][name] is not None}
    return partial(
        ds.ops.kv_project_layers, *columns, layers[0]["slot_mapping"], norm="folded",
        norm_order=problem.shape.norm_order, head_norm_eps=EPS, **given,
    )  # fmt: skip


Provider = Callable[[Problem], Callable[[], None]]
PROVIDERS: dict[str, Provider] = {
    "transformers": eager,
    "compile": compiled,
    "unfused": unfused,
    "liger": liger,
    "ours": ours,
    "ours folded": ours_folded,
}
GROUPED: dict[str, Provider] = {"ours x8 single": ours_single, "ours x8 grouped": ours_grouped}


def _with(module: nn.Module, **weights: torch.Tensor | None) -> nn.Module:
    for name, weight in weights.items():
        setattr(module, name, None if weight is None else nn.Parameter(weight, requires_grad=False))
    return module


def _norm(width: int, shape: Shape, weight: torch.Tensor) -> nn.Module:
    return _with(NORMS[shape.norm_order](width, eps=EPS), weight=weight)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    return _with(nn.Linear(*reversed(weight.shape), device="meta"), weight=weight, bias=bias)


def _positional(layer: dict[str, Any]) -> list[torch.Tensor]:
    return [layer[name] for name in ("x", "k_weight", "v_weight", "k_cache", "v_cache", "slot_mapping")]


def _folded(layer: dict[str, Any]) -> dict[str, Any]:
    fold = partial(ds.ops.fold_norm_weight, norm_weight=layer["norm_weight"], norm_order=layer["norm_order"])
    weights = {name: fold(layer[name]) for name in ("k_weight", "v_weight")}
    return {**layer, **weights, "rstd": ds.ops.rms_rstd(layer["x"], EPS)}


# --- what is right, and how long it takes ---------------------------------------------------------------------------------


def expected(problem: Problem) -> list[torch.Tensor]:
    """K of all layers, then V, in float64 throughout."""
    keys, values, shape = [], [], problem.shape

    def normed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = rows * (rows.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return rows * (1 + weight if shape.norm_order == "gemma" else weight)

    for index in range(problem.layers):
        layer = {
            name: value.double() if isinstance(value, torch.Tensor) else value
            for name, value in problem.layer(index).items()
        }
        rows = normed(layer["x"], layer["norm_weight"])
        k, v = (F.linear(rows, layer[f"{name}_weight"], layer[f"{name}_bias"]) for name in "kv")
        if shape.head_norm is not None:
            k = normed(k.unflatten(-1, (-1, layer["k_norm_weight"].shape[0])), layer["k_norm_weight"]).flatten(-2)
        k, v = (each.unflatten(-1, (-1, shape.head_dim)).transpose(0, 1)[None] for each in (k, v))
        half = shape.rotary_dim // 2
        k1, k2, passed = k.split([half, half, shape.head_dim - 2 * half], dim=-1)
        cos, sin = layer["cos"], layer["sin"]
        keys.append(torch.cat((k1 * cos - k2 * sin, k2 * cos + k1 * sin, passed), dim=-1))
        values.append(v)
    return keys + values


def errors(actual: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The worst maximum and RMS error of any tensor, relative to its largest and RMS value; NaN if an element is."""
    found = []
    for one, other in zip(actual, wanted, strict=True):
        difference, other = one.double() - other, other.double()
        found.append(torch.stack((difference.abs().max() / other.abs().max(), difference.norm() / other.norm())))
    largest, rms = torch.stack(found).amax(0).tolist()  # amax keeps NaN
    return largest, rms


def within(found: tuple[float, float], dtype: torch.dtype) -> bool:
    return all(error <= allowed for error, allowed in zip(found, TOLERANCES[dtype], strict=True))  # NaN is not


def milliseconds(run: Callable[[], None], device: str, rounds: int) -> float:
    """The median: of `rounds` calls on the CPU, of as many as it takes on a GPU, with a cold L2 cache."""
    if device == "cpu":
        return statistics.median(timed(run)[1] for _ in range(rounds)) * 1e3
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")


def skipped(provider: str, device: str) -> str | None:
    if provider != "liger":
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "skipped: liger_kernel is not installed (pip install liger-kernel)"
    return "skipped: Liger needs a GPU" if device == "cpu" else None


def measure(model: str, problem: Problem, providers: dict[str, Provider], rounds: int) -> Iterator[Row]:
    """Check each provider, then time it."""
    wanted, target = expected(problem), known_target(problem.device)
    for name, provider in providers.items():
        check, time = skipped(name, problem.device), None
        if check is None:
            for output in problem.outputs:
                output.fill_(float("nan"))
            try:
                run = provider(problem)
                run()
            except Exception as error:  # one provider's compiler or memory must not end the others' run
                check = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            else:
                found = errors(problem.outputs, wanted)
                check = f"max {found[0]:.1e}, RMS {found[1]:.1e}"
                if within(found, problem.dtype):
                    time = milliseconds(run, problem.device, rounds)
                else:
                    check = f"refused: {check}"
        percent = None
        if time is not None and target is not None:
            floor = time_floor(target, problem.flops, problem.bytes_moved, half=problem.dtype != torch.float32)
            percent = round(floor / time / 10, 1)
        yield Row(model, problem.tokens, name, time, None, percent, check)


def bench(models: Sequence[str], tokens: Sequence[int], names: Sequence[str], device: str, rounds: int) -> list[Row]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows: list[Row] = []
    for model, count in track([(model, count) for model in models for count in tokens], description="models x tokens"):
        found: list[Row] = []
        for layers, providers in ((1, PROVIDERS), (GROUP, GROUPED)):
            chosen = {name: provider for name, provider in providers.items() if name in names}
            if chosen and (layers == 1 or count == GROUP_TOKENS):
                problem = Problem(SHAPES[model], count, dtype, device, layers)
                found += measure(model, problem, chosen, rounds)
        base = next((row.milliseconds for row in found if row.provider == "transformers"), None)
        for row in found:
            if base is not None and row.milliseconds is not None:
                layers = GROUP if row.provider in GROUPED else 1
                row = replace(row, speedup=round(layers * base / row.milliseconds, 2))
            rows.append(row)
    return rows


def known_target(device: str) -> str | None:
    """The key of :data:`TARGETS` for the GPU's architecture, if it has one."""
    if device == "cpu":
        return None
    found = tuning.target(torch.cuda.current_device())
    return next((name for name in (found, f"{found}a") if name in TARGETS), None)


# --- what is shown --------------------------------------------------------------------------------------------------------


def setting(device: str) -> dict[str, str]:
    name = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else torch.cuda.get_device_name()
    return {**tuning.versions(name), "transformers": transformers.__version__}


def table(rows: Sequence[Row], title: str) -> Table:
    out = Table(title=title, caption="speed-up over transformers, eager; errors against float64")
    for column in ("model", "tokens", "provider", "ms", "speed-up", "% of roofline", "check"):
        out.add_column(column, justify="left" if column in ("model", "provider", "check") else "right")
    for row in rows:
        ms, speedup, percent = (
            "" if value is None else form.format(value)
            for value, form in (
                (row.milliseconds, "{:.3f}"),
                (row.speedup, "{:.2f}x"),
                (row.roofline_percent, "{:.0f}"),
            )
        )
        out.add_row(row.model, str(row.tokens), row.provider, ms, speedup, percent, row.check)
    return out


def write_csv(rows: Sequence[Row], where: dict[str, str], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*Row.__dataclass_fields__, *where])
        writer.writeheader()
        writer.writerows({**asdict(row), **where} for row in rows)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Speed-up over transformers by context tokens, as a PNG: a panel for each model."""
    from matplotlib.figure import Figure

    models, names = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("model", "provider"))
    columns = min(len(models), 3)
    lines = -(-len(models) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 7), 3.4 * lines + 1), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for model, axes in zip(models, panels, strict=False):
        for index, name in enumerate(names):
            mine = [row for row in rows if (row.model, row.provider) == (model, name) and row.speedup is not None]
            if mine:
                tokens, speedups = [row.tokens for row in mine], [row.speedup for row in mine]
                axes.plot(tokens, speedups, marker="o", color=f"C{index}", label=name, linewidth=1.4, markersize=5)
        ticks = sorted({row.tokens for row in rows})
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
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), metavar="MODEL", help=", ".join(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", help="context lengths")
    parser.add_argument("--providers", nargs="+", choices=[*PROVIDERS, *GROUPED], default=[*PROVIDERS, *GROUPED])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=5, help="calls that are timed on the CPU")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    parser.add_argument("--plot", type=Path, help="also draw the speed-ups to this PNG")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("Nothing was timed: a GPU is needed, or --device cpu to try the bench itself.")
        return

    small = args.device == "cpu"
    torch.manual_seed(0)
    rows = bench(
        args.models or (["SmolLM2-135M"] if small else MODELS),
        args.tokens or ([64, 256] if small else [1024, 8192, 32768]),
        args.providers,
        args.device,
        args.rounds,
    )
    where = setting(args.device)
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "transformers"))
    dtype = "float32, references" if small else "bfloat16"
    title = f"From hidden states to K/V in the cache: {dtype}\n{where['device']}, {versions}"
    Console(width=140).print(table(rows, title))
    if args.csv:
        write_csv(rows, where, args.csv)
    if args.plot:
        plot(rows, title, args.plot)
    if any(row.check.startswith(("refused", "failed")) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
