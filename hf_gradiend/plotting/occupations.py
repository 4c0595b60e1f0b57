"""What the edit does to occupations."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradiend.plotting.common import (
    AFTER,
    BEFORE,
    DASHES,
    HEIGHT,
    INK,
    Drawing,
    description,
    dot_legend,
    dumbbell,
    edit_label,
    empty_figure,
    names,
    number,
    plain,
    plus_share,
    plus_share_label,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_occupations(report: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Draw the + word's share of both words' probability, by occupation, before and after the edit.

    Args:
        report: Content of report.json with `occupations` and `before`; without `after` only the
            base model is drawn.
        path: PNG file to write; its height grows with the number of occupations.

    Returns:
        The file's path.

    Raises:
        DataError: If the report lacks occupations or the measures before the edit.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    return OCCUPATIONS.write(report, path)


def _occupations(report: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Occupation, share before and share after, by falling share before."""
    if not report.get("before"):
        return []
    rows = [
        (
            row["occupation"],
            plus_share(row["before"]),
            plus_share(row["after"]) if row["after"] else None,
        )
        for row in report.get("occupations") or []
    ]
    return sorted(rows, key=lambda row: -row[1])


def _occupations_figure(report: Mapping[str, Any]) -> "Figure":
    rows = _occupations(report)
    plus, minus = names(report)
    before, after = report["before"]["imbalance"], (report.get("after") or {}).get("imbalance")
    what = f"Imbalance between {plus} and {minus} for occupations"
    if after is None:
        title, about = f"{what} is {number(before, 2)}", "no edit was chosen"
    else:
        verb = "falls" if after < before else "rises"
        title = f"{what} {verb} from {number(before, 2)} to {number(after, 2)}"
        about = edit_label(report["edit"])
    figure = empty_figure(
        title,
        f"{description(report)} · {about} · 0 is balanced, 1 is one word only",
        height=max(HEIGHT, 1.7 + 0.22 * len(rows)),
    )
    axes = figure.add_subplot()
    axes.axvline(50.0, color=INK, linewidth=1.0, linestyle=DASHES, zorder=0.9)
    for y, (_, share, share_after) in enumerate(rows):
        if share_after is None:
            axes.scatter([100 * share], [y], s=48, color=BEFORE, zorder=3)
        else:
            dumbbell(axes, y, (100 * share, 100 * share_after), (BEFORE, AFTER))
    axes.set_yticks(range(len(rows)), [plain(name) for name, _, _ in rows], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(-2, 102), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xticks(range(0, 101, 25), [f"{share} %" for share in range(0, 101, 25)])
    axes.set_xlabel(plus_share_label(report))
    axes.grid(axis="x")
    entries = [("before the edit", BEFORE), ("after", AFTER)]
    dot_legend(axes, entries[:1] if after is None else entries)
    return figure


OCCUPATIONS = Drawing("occupations", _occupations, _occupations_figure)
