"""The result of ``python -m bench.gpu``: as rows, as one figure and as a short table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.common import Row

Result = dict[str, Any]
"""The setting, and under `steps` the state and rows of each step."""


def rows_of(result: Result, step: str, what: str) -> list[Row]:
    """Return the rows of one kind that have values."""
    found = result["steps"].get(step, {}).get("rows", [])
    return [row for row in found if row["what"] == what and "error" not in row and "not_run" not in row]


def all_rows(result: Result) -> list[Row]:
    """Return the rows of all steps; texts of several lines are in the JSON alone."""
    return [
        {"step": step, **{name: value for name, value in row.items() if not isinstance(value, list)}}
        for step, state in result["steps"].items()
        for row in state["rows"]
    ]


def setting(result: Result) -> Row:
    """Return the setting that all rows have in common."""
    return {name: value for name, value in result.items() if name != "steps"}


def title(result: Result) -> str:
    """Return the setting in words."""
    commit = (result["commit"] or "unknown")[:10] + (" with changes" if result["changed_since_commit"] else "")
    known = {**result, "commit": commit}
    names = ("driver", "torch", "triton", "transformers", "commit")
    return ", ".join(
        (result["device"], *(f"{name} {known[name]}" for name in names if known.get(name)), result["date"])
    )


# --- table ----------------------------------------------------------------------------------------------------------------


def table(result: Result) -> list[str]:
    """Return at most 60 lines of at most 160 characters."""
    lines = [title(result)]
    lines += [f"{name}: {state['status']}, {state['seconds']} s" for name, state in result["steps"].items()]
    lines += _ceilings(result) + _tests(result) + _wrong(result) + _micro(result) + _streaming(result)
    lines += _attention(result) + _ttft(result) + _graph(result) + _tune(result) + _trace(result)
    return [line[:160] for line in lines[:60]]


def _ceilings(result: Result) -> list[str]:
    parts = []
    for what, unit, name in (
        ("matmul", "TFLOP/s", "tflops"),
        ("copy", "TB/s", "tb_per_s"),
        ("l2 read", "TB/s", "tb_per_s"),
    ):
        parts += [f"{what} {row[name]:.3g} {unit}" for row in rows_of(result, "ceilings", what)]
    for row in rows_of(result, "ceilings", "launch"):
        parts.append(f"launch {row['triton_host_us']:.1f} us on the host, {row['in_graph_us']:.1f} us in a graph")
    return ["CEILINGS  " + "; ".join(parts)] if parts else []


def _tests(result: Result) -> list[str]:
    lines = [
        f"TESTS  {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped; {row['state']}"
        for row in rows_of(result, "tests", "counts")
    ]
    failures = [row for row in result["steps"].get("tests", {}).get("rows", []) if row["what"] == "failure"]
    lines += [f"  {row['test']}: {row['error'].splitlines()[0] if row['error'] else ''}" for row in failures[:5]]
    lines += [f"  and {len(failures) - 5} more"] if len(failures) > 5 else []
    lines += [f"SANITIZER  {row['verdict']}" for row in rows_of(result, "tests", "sanitizer")]
    return lines


def _timed(result: Result) -> list[Row]:
    return [row for row in rows_of(result, "micro", "provider") if row.get("cold_ms") is not None]


def _micro(result: Result) -> list[str]:
    rows = _timed(result)
    cases = list(dict.fromkeys((row["model"], row["tokens"]) for row in rows))
    cells = {(row["provider"], row["model"], row["tokens"]): row for row in rows}
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = _grid(
        "MICRO, us a layer: cold/graph, % of cublas, % of floor",
        names,
        [f"{model} {tokens}" for model, tokens in cases],
        [[_micro_cell(cells.get((name, *case))) for case in cases] for name in names],
    )
    refused = [row for row in rows_of(result, "micro", "provider") if row["check"].startswith(("refused", "failed"))]
    return lines + [f"  {row['provider']}, {row['model']} {row['tokens']}: {row['check']}" for row in refused[:5]]


def _micro_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return _microseconds(row) + _percents(row["percent_of_cublas"], row["percent_of_floor"])


def _microseconds(row: Row) -> str:
    return "/".join("-" if ms is None else f"{1e3 * ms:.0f}" for ms in (row["cold_ms"], row["replay_ms"]))


def _percents(*percents: float | None) -> str:
    return "".join(" -" if percent is None else f" {percent:.0f}" for percent in percents)


def _streaming(result: Result) -> list[str]:
    def cell(row: Row) -> str:
        return f"{row['tb_per_s']:.2f}" + _percents(row["percent_of_copy"], row["percent_of_same_copy"])

    heading = "STREAMING, TB/s, % of a copy of gigabytes, % of one of as many bytes"
    return _grid_by_tokens(heading, rows_of(result, "micro", "streaming"), "kernel", cell)


def _attention(result: Result) -> list[str]:
    def cell(row: Row) -> str:
        if "cold_ms" not in row:
            return row["check"].partition(",")[0]  # it was refused
        return f"{_microseconds(row)} {row['speedup']:.1f}x{_percents(row['percent_of_floor'])} {row['host_us']:.0f}"

    heading = "ATTENTION, us: cold/graph, speed-up over torch with a mask, % of floor, host"
    return _grid_by_tokens(heading, rows_of(result, "micro", "attention"), "kernel", cell)


def _ttft(result: Result) -> list[str]:
    def cell(row: Row) -> str:
        times = f"{row['full_ms']:.0f}/{row['plan_ms']:.1f} {row['speedup']:.1f}x"
        return f"{times} {row['of_parts']:.2f} {row['fill_host_ms']:.1f}"

    heading = "FIRST TOKEN, ms: full/plan, speed-up, of its parts, host of the filling"
    lines = _grid_by_tokens(heading, rows_of(result, "ttft", "plan"), "plan", cell)
    chosen = [
        f"{row['ms']:.1f} ms ({row['percent_of_plan']:.0f} %) of {row['tokens']}"
        for row in rows_of(result, "ttft", "choosing")
    ]
    return lines + (["CHOOSING tokens, ms (share of the first token): " + ", ".join(chosen)] if chosen else [])


def _graph(result: Result) -> list[str]:
    lines = [
        f"GRAPH  {row['plan']}: bitwise {row['bitwise']}, {row['eager_ms']:.2f} ms, replayed {row['replay_ms']:.2f} ms"
        for row in rows_of(result, "graph", "graph")
    ]
    decoded = [f"{row['provider']} {row['ms_per_token']:.2f}" for row in rows_of(result, "graph", "decode")]
    return lines + (["DECODE, ms a token  " + ", ".join(decoded)] if decoded else [])


def _tune(result: Result) -> list[str]:
    return [
        f"TUNED  {row['model']}: {row['ms']:.4f} ms, by default {row['default_ms']:.4f} ms; {row['config']}"
        for row in rows_of(result, "tune", "choice")
    ]


def _trace(result: Result) -> list[str]:
    lines = [f"TRACE  {row['ms']:.1f} ms, busy {row['busy_ms']:.1f} ms" for row in rows_of(result, "trace", "trace")]
    return lines + [
        f"  {row['ms']:.2f} ms, {row['calls']} x {row['kernel'][:90]}" for row in rows_of(result, "trace", "kernel")[:3]
    ]


def _wrong(result: Result) -> list[str]:
    lines = []
    for step, state in result["steps"].items():
        for row in state["rows"]:
            if "error" in row and row["what"] != "failure":
                which = " ".join(str(row[name]) for name in ("provider", "kernel", "plan", "tokens") if name in row)
                lines.append(f"ERROR  {step} {row['what']} {which}: {' '.join(row['error'].split())}")
    return lines[:6]


def _grid_by_tokens(heading: str, rows: list[Row], name: str, cell: Callable[[Row], str]) -> list[str]:
    """Return a grid with a line for each name and a column for each number of tokens."""
    names, tokens = (list(dict.fromkeys(row[key] for row in rows)) for key in (name, "tokens"))
    cells = {(row[name], row["tokens"]): cell(row) for row in rows}
    return _grid(
        heading, names, map(str, tokens), [[cells.get((each, count), "-") for count in tokens] for each in names]
    )


def _grid(heading: str, names: Iterable[str], columns: Iterable[str], cells: Iterable[Iterable[str]]) -> list[str]:
    lines = [f"  {name:<22}" + "".join(f"{cell:>27}" for cell in line) for name, line in zip(names, cells, strict=True)]
    return [heading, " " * 24 + "".join(f"{column:>27}" for column in columns), *lines] if lines else []


# --- figure ---------------------------------------------------------------------------------------------------------------


def plot(result: Result, path: Path) -> None:
    """Draw times of kernels against a bare product, speed-ups by plan, shares of a copy's rate: what was measured of these."""
    from matplotlib.figure import Figure

    streaming = [row for row in rows_of(result, "micro", "streaming") if row["percent_of_copy"] is not None]
    panels = [
        (draw, rows)
        for draw, rows in (
            (_draw_micro, [row for row in _timed(result) if row["percent_of_cublas"] is not None]),
            (_draw_ttft, rows_of(result, "ttft", "plan")),
            (_draw_streaming, streaming),
        )
        if rows
    ]
    figure = Figure(figsize=(7 * max(len(panels), 1), 5), layout="constrained")
    figure.suptitle(title(result), fontsize=9)
    for index, (draw, rows) in enumerate(panels):
        draw(figure.add_subplot(1, len(panels), index + 1), rows)
    figure.savefig(path, dpi=110)


def _draw_micro(axes: Any, rows: list[Row]) -> None:
    cells = {(row["provider"], row["model"], row["tokens"]): row for row in rows}
    cases = list(dict.fromkeys(key[1:] for key in cells))
    times = {
        name: [100 / cells[name, *case]["percent_of_cublas"] if (name, *case) in cells else None for case in cases]
        for name in dict.fromkeys(key[0] for key in cells)
    }
    _bars(axes, [f"{model}\n{tokens:,}" for model, tokens in cases], times)
    for index, case in enumerate(cases):
        percent = cells.get(("cublas", *case), {}).get("percent_of_floor")
        if percent is not None:
            axes.hlines(percent / 100, index - 0.45, index + 0.45, color="black", linestyle="--", linewidth=1)
    axes.set_title("K/V of a layer: time relative to the bare product (dashed: floor)", fontsize=9)


def _draw_ttft(axes: Any, rows: list[Row]) -> None:
    _by_tokens(axes, rows, "plan", "speedup")
    axes.set_yscale("log")
    ticks = (2, 3, 5, 10, 20)
    axes.set_yticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_title("Time to first token: speed-up over full prefill", fontsize=9)


def _draw_streaming(axes: Any, rows: list[Row]) -> None:
    _by_tokens(axes, rows, "kernel", "percent_of_copy")
    axes.axhline(100, color="black", linestyle="--", linewidth=1)
    axes.set_title("Kernels that move rows: % of a copy's rate", fontsize=9)


def _by_tokens(axes: Any, rows: list[Row], name: str, value: str) -> None:
    """Draw a group of bars for each number of tokens, a bar for each row of a name."""
    lengths = sorted({row["tokens"] for row in rows})
    values = {(row[name], row["tokens"]): row[value] for row in rows}
    heights = {
        each: [values.get((each, length)) for length in lengths] for each in dict.fromkeys(row[name] for row in rows)
    }
    _bars(axes, [f"{length:,}" for length in lengths], heights)


def _bars(axes: Any, groups: list[str], values: dict[str, list[float | None]]) -> None:
    width = 0.85 / max(len(values), 1)
    for index, (name, heights) in enumerate(values.items()):
        places = [group + (index - (len(values) - 1) / 2) * width for group in range(len(groups))]
        known = [(place, height) for place, height in zip(places, heights, strict=True) if height is not None]
        if known:
            axes.bar(
                *zip(*known, strict=True),
                width=width,
                label=name,
                color=f"C{index % 10}",
                alpha=1 - 0.5 * (index // 10),
            )
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
