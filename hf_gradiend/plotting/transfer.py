"""What the encoder reads in word pairs that it never saw."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradiend.plotting.common import (
    FAINT,
    MINUS,
    NEUTRAL,
    PLUS,
    Drawing,
    description,
    dot_legend,
    dumbbell,
    empty_figure,
    encoding_axis,
    names,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_transfer(report: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Draw the mean encodings of word pairs that were never trained on, with wrong orders marked.

    Args:
        report: Content of report.json with the encoder's `transfer` pairs. One that could not be
            read (NaN) is left out.
        path: PNG file to write; its height grows with the number of pairs.

    Returns:
        The file's path.

    Raises:
        DataError: If the report lacks pairs of the feature.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    return TRANSFER.write(report, path)


def _pairs(report: Mapping[str, Any], kind: str = "feature") -> list[Mapping[str, Any]]:
    """Readable transfer pairs of one kind, by falling gap."""
    pairs = [
        pair
        for pair in (report.get("encoder") or {}).get("transfer") or []
        if pair["kind"] == kind and np.isfinite([pair["positive"], pair["negative"]]).all()
    ]
    return sorted(pairs, key=lambda pair: pair["negative"] - pair["positive"])


def _transfer_figure(report: Mapping[str, Any]) -> "Figure":
    feature, neutral = _pairs(report), _pairs(report, "neutral")
    n_right = sum(pair["positive"] > pair["negative"] for pair in feature)
    plus, minus = names(report)
    n_rows = len(feature) + (len(neutral) + 1.2 if neutral else 0)
    figure = empty_figure(
        f"{n_right} of {len(feature)} word pairs never trained on are read in the right order",
        f"{description(report)} · trained on {plus} and {minus} alone · mean h per word",
        height=1.6 + 0.185 * n_rows,
    )
    axes = figure.add_subplot()
    ticks: list[float] = []
    for row, pair in enumerate([*feature, *neutral]):
        is_neutral = row >= len(feature)
        y = row + 1.2 * is_neutral
        wrong = not is_neutral and pair["positive"] <= pair["negative"]
        colours = (NEUTRAL, NEUTRAL) if is_neutral else (MINUS, PLUS)
        dumbbell(axes, y, (pair["negative"], pair["positive"]), colours, crossed=wrong)
        if wrong:
            low, high = pair["positive"], pair["negative"]
            x, side = (low - 0.04, "right") if high > -low else (high + 0.04, "left")
            axes.text(x, y, "wrong order", ha=side, va="center", fontweight="bold", fontsize=8)
        ticks.append(y)
    if neutral:
        axes.axhline(len(feature) + 0.1, color="#BBBBBB", linewidth=0.8)
    labels = [plain(pair["pair"].replace("/", " / ")) for pair in [*feature, *neutral]]
    axes.set_yticks(ticks, labels, fontsize=8.5)
    for tick in axes.get_yticklabels()[len(feature) :]:
        tick.set_color(FAINT)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(-1.04, 1.04), ylim=(n_rows - 0.3, -0.7))
    axes.grid(axis="x")
    axes.axvline(0.0, color="#BBBBBB", linewidth=0.8, zorder=0.9)
    encoding_axis(axes, plus, minus)
    positive, negative = (plain(name) for name in report["feature_classes"])
    entries = [(f"{positive} word (first)", PLUS), (f"{negative} word (second)", MINUS)]
    dot_legend(axes, [*entries, ("neutral pair", NEUTRAL)] if neutral else entries)
    return figure


TRANSFER = Drawing("transfer", _pairs, _transfer_figure)
