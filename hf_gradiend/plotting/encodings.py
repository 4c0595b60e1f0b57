"""What the encoder reads in the test texts."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradiend.plotting.common import (
    MINUS,
    NEUTRAL,
    PLUS,
    Drawing,
    class_label,
    description,
    empty_figure,
    encoding_axis,
    names,
    number,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_encodings(report: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Draw the encodings h of the test texts by class, and those of neutral tokens.

    Each histogram is scaled to its own peak; the dots below it are the texts.

    Args:
        report: Content of report.json with the encoder's `test` split.
        path: PNG file to write.

    Returns:
        The file's path.

    Raises:
        DataError: If the report lacks the test split.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    return ENCODINGS.write(report, path)


def _test_split(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return ((report.get("encoder") or {}).get("splits") or {}).get("test")


def _encodings_figure(report: Mapping[str, Any]) -> "Figure":
    split = report["encoder"]["splits"]["test"]
    positive, negative = report["feature_classes"]
    neutral, r = report["encoder"]["neutral"], split["correlation"]
    plus, minus = names(report)
    figure = empty_figure(
        f"Encodings of {plus} and {minus} correlate {number(r['value'], 3)} with their class "
        f"(n = {r['n']:,})",
        f"{description(report)} · test texts, 95 % interval [{number(r['low'], 3)}, "
        f"{number(r['high'], 3)}] · neutral tokens: mean |h| {number(neutral['value'], 2)}",
    )
    axes = figure.add_subplot()
    groups: list[tuple[str, Sequence[float], str]] = [
        (class_label(report, 0), split["encodings"][positive], PLUS),
        ("neutral tokens", report["encoder"]["neutral_encodings"], NEUTRAL),
        (class_label(report, 1), split["encodings"][negative], MINUS),
    ]
    bins = np.linspace(-1.0, 1.0, 41)
    for row, (_, values, colour) in enumerate(groups):
        counts, _ = np.histogram(np.clip(values, -1.0, 1.0), bins)
        heights = 0.58 * counts / max(counts.max(), 1)
        axes.stairs(-row + heights, bins, baseline=-row, fill=True, color=colour, alpha=0.35)
        axes.stairs(-row + heights, bins, baseline=-row, color=colour, linewidth=1.0)
        # Multiples of the golden ratio spread points evenly and alike in every run.
        spread = np.arange(len(values)) * 0.6180339887 % 1.0
        axes.scatter(
            values,
            -row - 0.06 - 0.22 * spread,
            s=11,
            color=colour,
            alpha=float(np.clip(60 / max(len(values), 1), 0.12, 0.6)),
            linewidths=0,
        )
    axes.set_yticks([0, -1, -2], [f"{label}\nn = {len(values):,}" for label, values, _ in groups])
    for tick, (_, _, colour) in zip(axes.get_yticklabels(), groups, strict=True):
        tick.set_color(colour)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set(xlim=(-1.04, 1.04), ylim=(-2.4, 0.68))
    encoding_axis(axes, plus, minus)
    return figure


ENCODINGS = Drawing("encodings", _test_split, _encodings_figure)
