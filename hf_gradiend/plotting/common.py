"""What the figures share: colours, style, titles, legends, and how a file is written."""

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradiend.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart: https://jfly.uni-koeln.de/color/
PLUS, MINUS, AFTER = "#0072B2", "#D55E00", "#009E73"
NEUTRAL, BEFORE, INK, FAINT = "#8C8C8C", "#A3A3A3", "#222222", "#666666"
STYLE: dict[str, object] = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#BBBBBB",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#EAEAEA",
    "xtick.color": "#BBBBBB",
    "xtick.labelcolor": INK,
    "ytick.color": "#BBBBBB",
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
    "legend.handletextpad": 0.4,
}
WIDTH, HEIGHT, DPI = 8.0, 4.5, 150  # inches, inches, dots per inch
DASHES: Any = (0, (4, 3))  # points on, points off


@dataclass(frozen=True)
class Drawing:
    """A figure before it is drawn.

    Args:
        name: Name of its file, without the ending.
        data: What it is drawn from; empty or `None` where a report lacks it.
        draw: Draws it from a report that has the data.
    """

    name: str
    data: Callable[[Mapping[str, Any]], object]
    draw: Callable[[Mapping[str, Any]], "Figure"]

    def write(self, report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
        """Draw the figure and write it as a PNG; an older file stays until the new one is whole.

        Returns:
            The file's path.

        Raises:
            DataError: If the report lacks the figure's data.
            ImportError: If matplotlib is missing.
        """  # noqa: DOC502 - raised by our_style
        file = Path(path)
        partial = file.with_name(f".{file.name}.partial")
        with our_style():
            if not self.data(report):
                raise DataError(
                    f"Expected a report with data for the figure of its {self.name}, "
                    f"but it has none."
                )
            figure = self.draw(report)
            try:
                figure.savefig(partial, format="png", dpi=DPI)
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
        return file


def our_style() -> AbstractContextManager[None]:
    """Context of our settings on top of matplotlib's own; the user's come back afterwards.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib import style  # noqa: PLC0415 - optional dependency
    except ImportError as error:
        raise ImportError(
            "Figures need matplotlib, which is missing. "
            'Install it with pip install "hf_gradiend[plot]".'
        ) from error
    return style.context(["default", STYLE])


def empty_figure(title: str, subtitle: str, *, height: float = HEIGHT) -> "Figure":
    """Empty figure with a title of as many lines as it needs, and room below it."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional dependency

    lines = textwrap.wrap(title, 78)
    below = textwrap.wrap(subtitle, 124)
    figure = Figure(figsize=(WIDTH, height))
    left, top = 0.15 / WIDTH, 1 - 0.14 / height
    figure.text(left, top, "\n".join(lines), va="top", fontsize=12, fontweight="bold")
    top -= (0.06 + 0.21 * len(lines)) / height
    figure.text(left, top, "\n".join(below), va="top", fontsize=8.5, color=FAINT)
    top -= (0.08 + 0.15 * len(below)) / height
    figure.set_layout_engine(
        "constrained", rect=(left, 0.0, 1 - 1.7 * left, top), w_pad=0.01, h_pad=0.06
    )
    return figure


def dumbbell(
    axes: "Axes",
    y: float,
    ends: tuple[float, float],
    colours: tuple[str, str],
    *,
    crossed: bool = False,
) -> None:
    """Two dots with a line between them; dark and dashed where they stand the wrong way round."""
    colour, dashes = (INK, DASHES) if crossed else ("#C9C9C9", "-")
    axes.plot(ends, [y, y], color=colour, linestyle=dashes, linewidth=1.6, zorder=2)
    axes.scatter(ends, [y, y], s=42, color=colours, zorder=3, linewidths=0)


def dot_legend(axes: "Axes", entries: Sequence[tuple[str, str]], marker: str = "o") -> None:
    """Legend in one line above the axes."""
    for label, colour in entries:
        axes.plot([], [], marker, color=colour, markersize=6.5, label=label)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.01), ncols=len(entries), columnspacing=1.6)


def encoding_axis(axes: "Axes", plus: str, minus: str) -> None:
    """Put encodings h from −1 to 1 on the x axis."""
    axes.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0], ["−1", "−0.5", "0", "+0.5", "+1"])
    axes.set_xlabel(f"encoding h   (+1: {plus}, −1: {minus}, 0: neutral)")


def description(report: Mapping[str, Any]) -> str:
    """Base model, number of weights and solver, for a subtitle."""
    n = report["n_selected"]
    count = f"{n / 1e6:.0f} M" if n >= 10_000_000 else f"{n:,}"
    return f"{plain(report['base_model'])} · {count} weights · {report['solver'].replace('_', ' ')}"


def edit_label(edit: Mapping[str, float]) -> str:
    """An edit as a subtitle names it."""
    return f"edit h = {number(edit['feature_factor'])}, α = {number(edit['step_size'])}"


def names(report: Mapping[str, Any]) -> tuple[str, str]:
    """The classes' words in quotation marks, or the classes' names where a class has several."""
    words = report.get("feature_words") or {}
    plus, minus = (
        f"“{words[name][0]}”" if len(words.get(name, [])) == 1 else name
        for name in report["feature_classes"]
    )
    return plain(plus), plain(minus)


def class_label(report: Mapping[str, Any], index: int) -> str:
    """The class, with its word where that is all it has."""
    name, shown = plain(report["feature_classes"][index]), names(report)[index]
    return name if shown == name else f"{name} ({shown})"


def plus_share(probabilities: Mapping[str, float]) -> float:
    """The + word's share of both words' probability, in [0, 1]."""
    return probabilities["p_plus"] / (probabilities["p_plus"] + probabilities["p_minus"])


def plus_share_label(report: Mapping[str, Any]) -> str:
    """Label of an axis of such shares."""
    plus, minus = names(report)
    return f"P({plus}) / (P({plus}) + P({minus}))"


def plain(text: str) -> str:
    """Text of the report in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def number(value: float, digits: int | None = None) -> str:
    """A number with a true minus sign, with fixed decimal places or three significant digits."""
    text = f"{value:.3g}" if digits is None else f"{value:.{digits}f}"
    return text.replace("-", "−")
