"""Why some layers are fitted badly, maps of low rank, and the plots of a study of fitted maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from reporting import ReadRows, Row, read_csv, with_bars

import droidspeak_ops as ds
from droidspeak_ops.fitting.pair import Pair, tamed
from droidspeak_ops.fitting.ridge import NormalEquations
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.prefill.maps import SINKS, LayerMap

STRENGTH = 0.03  # what most layers choose


def of_rank(sender: Any, receiver: Any, maps: ds.Maps, rank: int) -> ds.Maps:
    """Maps from hidden states whose difference from the sender's own projection is cut to a rank."""
    pair = Pair(Decoder(sender), Decoder(receiver), [])
    layers = dict(maps.layers)
    for (layer, role), each in maps.layers.items():
        if role == "fitted":
            base = pair.projection(pair.sender, layer).weight
            left, sizes, right = torch.linalg.svd(
                torch.cat([each.k_weight, each.v_weight]).double() - base, full_matrices=False
            )
            weight = base + (left[:, :rank] * sizes[:rank]) @ right[:rank]
            k_weight, v_weight = weight.to(each.k_weight.dtype).chunk(2)
            layers[layer, role] = LayerMap(k_weight.contiguous(), v_weight.contiguous(), each.k_bias, each.v_bias)
    return replace(maps, layers=layers)


@torch.no_grad()
def by_layer(
    pair: Pair,
    maps: ds.Maps,
    calibration: Sequence[torch.Tensor],
    test: Sequence[torch.Tensor],
    delimiters: torch.Tensor,
) -> list[Row]:
    """Errors of K and V of test contexts against the receiver's, layer by layer: squared error over variance.

    Args:
        calibration, test: contexts ``[1, T]``.
        delimiters: token ids that delimit lines and turns.
    """
    read = {
        split: [
            tuple(ds.capture(each.model, ids, layers=pair.layers) for each in (pair.sender, pair.receiver))
            for ids in some
        ]
        for split, some in (("calibration", calibration), ("test", test))
    }
    of_delimiters = torch.cat([torch.isin(ids[0, SINKS:], delimiters) for ids in test])
    rows: list[Row] = []
    for layer in pair.layers:
        own = pair.projection(pair.receiver, layer)
        theirs = pair.projection(pair.sender, layer)

        def rows_of(split: str, layer: int = layer) -> tuple[torch.Tensor, torch.Tensor]:
            found = [[pair.unit(layer, each.hidden(layer))[SINKS:].double() for each in both] for both in read[split]]
            return torch.cat([given for given, _ in found]), torch.cat([wanted for _, wanted in found])

        given, wanted = rows_of("calibration")
        missing = F.linear(wanted - given, own.weight)
        maps_by_weights = []
        for weights in (tamed(missing), None):
            equations = NormalEquations(given.shape[1], missing.shape[1])
            equations.add(given, missing, weights)
            maps_by_weights.append(equations.solve(STRENGTH))
        given, wanted = rows_of("test")
        target = F.linear(wanted, own.weight)
        variance = (target - target.mean(0)).square().sum(1).mean()
        robust, plain = (F.linear(given, own.weight + each.weight, each.bias) for each in maps_by_weights)
        errors = {
            "reused": F.linear(given, theirs.weight),
            "projected": F.linear(given, own.weight),
            "fitted": robust,
            "fitted, all rows alike": plain,
        }
        relative = {name: (found - target).square().sum(1) / variance for name, found in errors.items()}
        drift = (wanted - given).norm(dim=1)
        share_of_k, share_of_v = maps.shares.get(layer, (0.0, 0.0))
        rows.append(
            {
                "layer": layer,
                **{name: f"{each.mean().item():.4f}" for name, each in relative.items()},
                "fitted, delimiters": f"{relative['fitted'][of_delimiters].mean().item():.4f}",
                "fitted, other tokens": f"{relative['fitted'][~of_delimiters].mean().item():.4f}",
                "largest drift over median": f"{(drift.max() / drift.median()).item():.1f}",
                "share of K": f"{share_of_k:.2f}",
                "share of V": f"{share_of_v:.2f}",
            }
        )
    return rows


# --- plots -----------------------------------------------------------------------------------------------------------------


def plot(folder: Path) -> None:
    """Draw each part whose CSV file is in `folder`."""
    for part, draw in (("pairs", _pairs), ("tokens", _tokens), ("layers", _layers)):
        path = folder / f"{part}.csv"
        if path.exists():
            draw(read_csv(path), folder / f"{part}.png")


WAYS = {
    "reuse": "#b8b8b8",
    "fitted, no hidden states": "#9ecae1",
    "fitted": "#3182bd",
    "band": "#fdae6b",
    "band corrected, rest fitted": "#a63603",
}


def _pairs(rows: ReadRows, path: Path) -> None:
    names = list(dict.fromkeys(row["pair"] for row in rows))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(WAYS)
    for number, (way, colour) in enumerate(WAYS.items()):
        values, below, above = zip(
            *(with_bars(row, "of_reuse") for name in names for row in rows if (row["pair"], row["way"]) == (name, way)),
            strict=True,
        )
        places = [place + (number - len(WAYS) / 2 + 0.5) * width for place in range(len(names))]
        axes.bar(places, values, width, yerr=(below, above), label=way, color=colour, error_kw={"lw": 1, "capsize": 2})
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("KL from the receiver's own prefill,\nrelative to plain reuse")
    axes.set_title(
        "Held-out contexts, 95 % bootstrap intervals; a band is [15, 20), all else runs no layer", fontsize=10
    )
    axes.legend(fontsize=8, ncols=3, frameon=False)
    axes.set_ylim(0, 1.45)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _tokens(rows: ReadRows, path: Path) -> None:
    names = list(dict.fromkeys(row["pair"] for row in rows))
    figure = Figure(figsize=(2 + 4 * len(names), 3.8), layout="constrained")
    (row_of_axes,) = figure.subplots(1, len(names), squeeze=False, sharey=True)
    for axes, name in zip(row_of_axes, names, strict=True):
        of_pair = [row for row in rows if row["pair"] == name]
        for way in dict.fromkeys(row["way"] for row in of_pair):
            of_way = [row for row in of_pair if row["way"] == way]
            values, below, above = zip(*(with_bars(row, "of_reuse") for row in of_way), strict=True)
            axes.errorbar(
                [int(row["tokens"]) for row in of_way], values, (below, above), label=way, color=WAYS[way], marker="o"
            )
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("calibration tokens")
        axes.set_title(f"pair '{name}'", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    row_of_axes[0].set_ylabel("KL relative to plain reuse")
    row_of_axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=130)


def _layers(rows: ReadRows, path: Path) -> None:
    names = list(dict.fromkeys(row["pair"] for row in rows))
    figure = Figure(figsize=(3.3 * len(names), 5.4), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(names):
        of_pair = [row for row in rows if row["pair"] == name]
        layers = [int(row["layer"]) for row in of_pair]
        above, below = grid[:, column]
        for what, colour in (("reused", "#b8b8b8"), ("projected", "#31a354"), ("fitted", "#3182bd")):
            above.plot(layers, [float(row[what]) for row in of_pair], color=colour, label=what)
        for side, style in (("K", "-"), ("V", "--")):
            shares = [float(row[f"share of {side}"]) for row in of_pair]
            below.plot(layers, shares, style, color="#3182bd", label=side)
        above.set_title(name, fontsize=10)
        below.set_xlabel("layer")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("squared error of K and V,\nover their variance")
    grid[1, 0].set_ylabel("share of what is fitted")
    grid[0, -1].legend(fontsize=8, frameon=False)
    grid[1, -1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
