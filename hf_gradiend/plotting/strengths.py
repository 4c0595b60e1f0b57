"""What the strength of the adapter does to occupations."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradiend.plotting.common import (
    DASHES,
    INK,
    MINUS,
    NEUTRAL,
    PLUS,
    Drawing,
    dot_legend,
    edit_label,
    empty_figure,
    names,
    number,
    plain,
    plus_share,
    plus_share_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = ("occupations mostly held by women", "mostly held by men")
MARKED = {0.0: "base model", 1.0: "chosen edit"}


def plot_strengths(report: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Draw the + word's share of both words' probability against the adapter's strength.

    One line per occupation; the first half of them are those mostly held by women.

    Args:
        report: Content of report.json with `edit` and with `strengths` that hold the base model
            (strength 0) and the edit as it was chosen (1).
        path: PNG file to write; its height grows with the number of occupations.

    Returns:
        The file's path.

    Raises:
        DataError: If the report lacks an edit or such strengths.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    return STRENGTHS.write(report, path)


def _shares(report: Mapping[str, Any]) -> dict[float, dict[str, float]]:
    """Shares by occupation, by rising strength; none without an edit or a marked strength."""
    rows = sorted(report.get("strengths") or [], key=lambda row: row["strength"])
    shares = {
        float(row["strength"]): {
            occupation["occupation"]: plus_share(occupation) for occupation in row["occupations"]
        }
        for row in rows
    }
    return shares if report.get("edit") and shares.keys() >= MARKED.keys() else {}


def _strengths_figure(report: Mapping[str, Any]) -> "Figure":
    shares = _shares(report)
    strengths, occupations = list(shares), list(shares[0.0])
    height = max(4.9, 2.2 + 0.18 * len(occupations))
    # Without the number of weights: the adapter may hold fewer of them than the GRADIEND.
    figure = empty_figure(
        _title(report),
        f"{plain(report['base_model'])} · {len(occupations)} occupations · "
        f"strength multiplies the {edit_label(report['edit'])}",
        height=height,
    )
    axes = figure.add_subplot()
    axes.axhline(0.5, color=INK, linewidth=1.0, linestyle=DASHES, zorder=0.9)
    for strength in MARKED:
        axes.axvline(strength, color=NEUTRAL, linewidth=0.8, zorder=0.9)
    colours = _group_colours(report)
    # Names 0.155 inches apart; about 1.6 inches of the height lie outside the axes.
    ends = list(shares[strengths[-1]].values())
    places = _spread(ends, 0.155 / (height - 1.6))
    for i, name in enumerate(occupations):
        colour = colours[i >= len(occupations) / 2]
        line = [shares[strength][name] for strength in strengths]
        axes.plot(strengths, line, "o-", color=colour, markersize=3.5, clip_on=False, zorder=3)
        _label_at_end(axes, name, (ends[i], places[i]), colour)
    axes.set(xlim=(strengths[0], strengths[-1]), ylim=(0.0, 1.0))
    marks = {strength: f"\n{MARKED[strength]}" for strength in MARKED}
    axes.set_xticks(strengths, [number(x) + marks.get(x, "") for x in strengths])
    axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "balance 0.5", "0.75", "1"])
    axes.set(xlabel="strength of the adapter", ylabel=plus_share_label(report))
    axes.grid(axis="y")
    dot_legend(axes, list(zip(GROUPS, colours, strict=True)))
    return figure


def _title(report: Mapping[str, Any]) -> str:
    base, edited = (list(_shares(report)[strength].values()) for strength in MARKED)
    verb = "narrows" if np.ptp(edited) < np.ptp(base) else "widens"
    before, after = (
        f"{number(min(values), 2)}–{number(max(values), 2)}" for values in (base, edited)
    )
    return f"At strength 1 the adapter {verb} shares of {names(report)[0]} from {before} to {after}"


def _group_colours(report: Mapping[str, Any]) -> tuple[str, str]:
    """Each group's colour is that of its pronoun's class, whichever of the classes comes first."""
    return (MINUS, PLUS) if names(report)[0] == "“he”" else (PLUS, MINUS)


def _label_at_end(axes: "Axes", name: str, ends: tuple[float, float], colour: str) -> None:
    """Name a line to the right of the axes, at the second height; a thin line leads from the first.

    Args:
        axes: The axes.
        name: The line's name.
        ends: Where the line ends and where its name stands.
        colour: The line's colour.
    """
    place = axes.get_yaxis_transform()
    axes.plot(
        [1.01, 1.035], ends, color=colour, linewidth=0.7, alpha=0.6, transform=place, clip_on=False
    )
    axes.text(1.042, ends[1], plain(name), color=colour, va="center", fontsize=9, transform=place)


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Heights in [0, 1], at least `gap` apart, as near to the values as they can be.

    They are the least-squares fit in the values' order, an isotonic regression.
    """
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(values))
    wanted = np.asarray(values)[order] - steps
    n = range(len(values))
    fit = [max(min(wanted[j : k + 1].mean() for k in n[i:]) for j in n[: i + 1]) for i in n]
    heights = np.empty(len(values))
    heights[order] = np.clip(fit, 0.0, 1.0 - steps[-1]) + steps
    return heights.tolist()


STRENGTHS = Drawing("strengths", _shares, _strengths_figure)
