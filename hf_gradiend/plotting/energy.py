"""Where in the base model the feature sits."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradiend.evaluation.features import energy_by_layer
from hf_gradiend.parameters import layer_of
from hf_gradiend.plotting.common import Drawing, description, dot_legend, empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND_COLOURS = {"attention": "#56B4E9", "MLP": "#E69F00", "norm": "#CC79A7", "other": "#8C8C8C"}
ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
# BERT's two MLP matrices are "intermediate" and "output"; its attention has an "output" as well.
MLP = re.compile(
    r"mlp|ffn|feed_?forward|relu|intermediate|^output$|^fc\d|moe|expert", re.IGNORECASE
)


def plot_energy(report: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Draw the share of the decoder direction's energy (squared norm) by layer and kind of weight.

    Args:
        report: Content of report.json with `energy`.
        path: PNG file to write.

    Returns:
        The file's path.

    Raises:
        DataError: If the report lacks energies or all are 0.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    return ENERGY.write(report, path)


def _energy_shares(report: Mapping[str, Any]) -> dict[tuple[int | None, str], float]:
    """Shares of the energy, which sum to 1, by layer (`None`: outside) and kind of weight."""
    energy: Mapping[str, float] = report.get("energy") or {}
    total = sum(energy.values())
    shares: dict[tuple[int | None, str], float] = {}
    for name, value in energy.items():
        if total:
            key = (layer_of(name), _kind_of(name))
            shares[key] = shares.get(key, 0.0) + value / total
    return shares


def _kind_of(name: str) -> str:
    """Kind of a weight; norms first, as they stand inside attention and MLP modules too."""
    parts = name.split(".")
    for kind, pattern in (("norm", NORM), ("attention", ATTENTION), ("MLP", MLP)):
        if any(pattern.search(part) for part in parts):
            return kind
    return "other"


def _energy_figure(report: Mapping[str, Any]) -> "Figure":
    shares = _energy_shares(report)
    by_layer = energy_by_layer(report["energy"])
    by_kind: dict[str, float] = {}
    for (_, kind), share in shares.items():
        by_kind[kind] = by_kind.get(kind, 0.0) + share
    kind, layer = max(by_kind, key=by_kind.__getitem__), max(by_layer, key=by_layer.__getitem__)
    place = (
        "weights outside the layers alone hold" if layer is None else f"layer {layer} alone holds"
    )
    figure = empty_figure(
        f"{kind[0].upper()}{kind[1:]} weights hold {by_kind[kind]:.0%} of the decoder’s energy; "
        f"{place} {by_layer[layer]:.0%}".replace("%", " %"),
        f"{description(report)} · energy: squared norm of the decoder direction",
    )
    axes = figure.add_subplot()
    layers = sorted(number for number in by_layer if number is not None)
    # Weights outside the layers get a bar of their own, one place apart.
    places: dict[int | None, int] = {number: number for number in layers}
    places[None] = max(layers, default=-2) + 2
    heights = dict.fromkeys(by_layer, 0.0)
    for name in (name for name in KIND_COLOURS if name in by_kind):
        for number in by_layer:
            share = 100 * shares.get((number, name), 0.0)
            axes.bar(places[number], share, 0.8, heights[number], color=KIND_COLOURS[name])
            heights[number] += share
    every = max(1, round(len(layers) / 16))
    ticks = {places[number]: str(number) for number in layers[::every]}
    if None in by_layer:
        ticks[places[None]] = "outside"
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="x", length=0)
    axes.margins(x=0.02)
    outside = "   (outside: embeddings, last norm, head)" if None in by_layer else ""
    axes.set(xlabel=f"layer{outside}", ylabel="share of the energy (%)")
    axes.grid(axis="y")
    entries = [
        (f"{name} {by_kind[name]:.1%}".replace("%", " %"), colour)
        for name, colour in KIND_COLOURS.items()
        if name in by_kind
    ]
    dot_legend(axes, entries, marker="s")
    return figure


ENERGY = Drawing("energy", _energy_shares, _energy_figure)
