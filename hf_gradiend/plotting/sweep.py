"""What each edit costs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradiend.plotting.common import (
    AFTER,
    DASHES,
    INK,
    MINUS,
    Drawing,
    description,
    edit_label,
    empty_figure,
    number,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOSEN: dict[str, Any] = {
    "marker": "*", "markersize": 15, "color": MINUS, "markeredgecolor": "white",
    "linestyle": "none", "zorder": 4, "label": "chosen edit",
}  # fmt: skip
# Measure, label and, relative to the base model, the default limit of `choose_edit`.
SWEEP_PANELS: list[tuple[str, str, float | None]] = [
    ("imbalance", "imbalance (0 is balanced)", None),
    ("lm_score", "LM score relative to α = 0", 0.99),
    ("bpi", "balanced index BPI (higher is more balanced)", None),
    ("mass", "mass P₊ + P₋ relative to α = 0", 0.75),
]


def plot_sweep(report: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Draw imbalance, balanced index, language-model score and mass against the step size α.

    Language-model score and mass are relative to the base model (α = 0), with the default limits of
    `choose_edit`. Each has a panel of its own: a limit of 0.99 cannot be read beside one of 0.75.

    Args:
        report: Content of report.json with a `sweep` that holds the base model (α = 0).
        path: PNG file to write.

    Returns:
        The file's path.

    Raises:
        DataError: If the report lacks a sweep with the base model.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    return SWEEP.write(report, path)


def _sweep(report: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """Rows of the sweep by rising step size; none if the base model (α = 0) is not among them."""
    rows = sorted(report.get("sweep") or [], key=lambda row: row["step_size"])
    return rows if any(row["step_size"] == 0 for row in rows) else []


def _sweep_figure(report: Mapping[str, Any]) -> "Figure":
    rows, edit = _sweep(report), report.get("edit")
    base = next(row for row in rows if row["step_size"] == 0)
    figure = empty_figure(*_sweep_heading(report), height=5.2)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (measure, label, floor) in zip(panels.flat, SWEEP_PANELS, strict=True):
        unit = 1.0 if floor is None else base[measure]
        for h, (colour, width) in _sweep_lines(report).items():
            # The base model belongs to every line, whichever h it was listed under.
            others = [row for row in rows if row["feature_factor"] == h and row["step_size"] != 0]
            line = sorted([base, *others], key=lambda row: row["step_size"])
            axes.plot(
                [row["step_size"] for row in line],
                [row[measure] / unit for row in line],
                color=colour,
                linewidth=width,
                zorder=2 + width / 10,
                marker="o",
                markersize=3.5,
                label=f"h = {number(h)}",
            )
        if edit and report.get("after"):
            axes.plot(edit["step_size"], report["after"][measure] / unit, **CHOSEN)
        if floor is not None:
            axes.axhline(floor, color=INK, linewidth=1.0, linestyle=DASHES)
            axes.margins(y=0.12)
            # At the base model, which is at 1, no line comes near the limit.
            side = "left" if rows[-1]["step_size"] > 0 else "right"
            axes.text(0.0, floor, f"limit {floor:g}", ha=side, va="bottom", fontsize=8)
        axes.set_title(label, loc="left", fontsize=9)
        axes.grid(axis="y")
        axes.locator_params(nbins=5)
    for axes in panels[1]:
        axes.set_xlabel("step size α")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7))
    return figure


def _sweep_heading(report: Mapping[str, Any]) -> tuple[str, str]:
    before, after, edit = report.get("before"), report.get("after"), report.get("edit")
    if not (edit and before and after):
        return "No edit within the limits is better than the base model", description(report)
    title = (
        f"The edit takes imbalance from {number(before['imbalance'], 2)} to "
        f"{number(after['imbalance'], 2)} at {100 * after['lm_score'] / before['lm_score']:.1f} % "
        f"of the LM score"
    )
    return title, f"{description(report)} · {edit_label(edit)}"


def _sweep_lines(report: Mapping[str, Any]) -> dict[float, tuple[str, float]]:
    """Colour and width of each line: the chosen h stands out, the others darken with h."""
    chosen = (report.get("edit") or {}).get("feature_factor")
    factors = sorted({row["feature_factor"] for row in report["sweep"]})
    others = [h for h in factors if h != chosen]
    shades = np.linspace(0.68, 0.15, len(others)) if len(others) > 1 else [0.6]
    looks = {h: (str(shade), 1.4) for h, shade in zip(others, shades, strict=True)}
    return {h: looks.get(h, (AFTER, 2.2)) for h in factors}


SWEEP = Drawing("sweep", _sweep, _sweep_figure)
