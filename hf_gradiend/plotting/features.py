"""Several features of one base model side by side."""

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradiend.plotting.common import (
    AFTER,
    FAINT,
    INK,
    MINUS,
    NEUTRAL,
    PLUS,
    Drawing,
    empty_figure,
    number,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

    Draw = Callable[[Figure, SubplotSpec, Mapping[str, Any]], None]

UNDEFINED = "#EFEFEF"  # of the diagonal, which says nothing, and of what is not defined
MANY = 8  # columns up to which numbers have their leading zero
READ, HALF = 6.3, 2.8  # inches: width of the readings, and of a matrix beside another
SLOT = 0.36  # inches: height of a feature in the matrices


def plot_features(report: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Draw how alike several features are, whose texts each reads, and in which layers they sit.

    Args:
        report: Content of features.json, as `comparison_values` gives.
        path: PNG file to write; its height grows with the number of features.

    Returns:
        The file's path.

    Raises:
        DataError: If the report has no features.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    return FEATURES.write(report, path)


def _features(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return report.get("features") or []


def _features_figure(report: Mapping[str, Any]) -> "Figure":
    n, labels = len(_features(report)), _column_labels(report)
    bands: list[tuple[Draw, float, float]] = []  # how to draw it, and inches inside and around it
    if labels:
        # At an angle a label is about 0.045 inches tall per letter.
        around = 0.7 if _fit(labels, READ / len(labels)) else 0.4 + 0.045 * _longest(labels)
        bands.append((_readings_band, n * (0.46 if n <= 6 else 0.42), around))
    if n > 1:
        bands.append((_cosines_band, n * SLOT, 0.55))
    bands.append((_weights_band, n * SLOT, 0.6))
    height = 0.75 + sum(inside + around for _, inside, around in bands)
    figure = empty_figure(_title(report), _subtitle(report), height=height)
    grid = figure.add_gridspec(len(bands), 1, height_ratios=[inside for _, inside, _ in bands])
    for row, (draw, *_) in enumerate(bands):
        draw(figure, grid[row], report)
    return figure


def _readings_band(figure: "Figure", place: "SubplotSpec", report: Mapping[str, Any]) -> None:
    _readings(figure.add_subplot(place), report)


def _cosines_band(figure: "Figure", place: "SubplotSpec", report: Mapping[str, Any]) -> None:
    left, right = _halves(figure, place)
    for axes, coder in ((left, "encoder"), (right, "decoder")):
        values = np.array(report[f"{coder}_cosines"], dtype=float)  # None becomes NaN
        texts = [[_short(value, len(values)) for value in row] for row in values]
        _square(axes, report, values, texts, _diverging(), (-1.0, 1.0))
        axes.set_title(f"cosine of the {coder} weights", loc="left", fontsize=9)
        _name_rows(axes, report, names=axes is left)


def _weights_band(figure: "Figure", place: "SubplotSpec", report: Mapping[str, Any]) -> None:
    if len(_features(report)) == 1:
        alone = figure.add_subplot(place)
        _energy(alone, report)
        _name_rows(alone, report, names=True)
        return
    left, right = _halves(figure, place)
    _overlaps(left, report)
    _energy(right, report)
    _name_rows(left, report, names=True)
    _name_rows(right, report, names=False)


def _halves(figure: "Figure", place: "SubplotSpec") -> tuple["Axes", "Axes"]:
    """Axes side by side, with an empty column in the middle to keep them apart."""
    cells = place.subgridspec(1, 3, width_ratios=[1.0, 0.04, 1.0])
    return figure.add_subplot(cells[0]), figure.add_subplot(cells[2])


def _columns(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Data set and classes of each column of readings."""
    keys = ((row["dataset"], *row["classes"]) for row in report["readings"])
    return list(dict.fromkeys(keys))


def _title(report: Mapping[str, Any]) -> str:
    names = [plain(feature["name"]) for feature in _features(report)]
    defined = [row for row in report["readings"] if row["correlation"]]
    own, others = ([row for row in defined if row["own"] == wanted] for wanted in (True, False))
    if own:
        title = f"Own classes are read at {_means(own)}"
        return f"{title}, others at {_means(others)}" if others else title
    pairs = [
        (value, names[i], names[j])
        for i, j in combinations(range(len(names)), 2)
        if (value := report["decoder_cosines"][i][j]) is not None
    ]
    if pairs:
        value, one, other = max(pairs, key=lambda pair: abs(pair[0]))
        more = ", the furthest from 0" if len(pairs) > 1 else ""
        return f"Decoders of {one} and {other}: cosine {number(value, 2)}{more}"
    return f"Where the decoder of {names[0]} has its energy"


def _means(readings: Sequence[Mapping[str, Any]]) -> str:
    """Mean |correlation| and mean |gap|."""
    r = fmean(abs(row["correlation"]["value"]) for row in readings)
    gap = fmean(abs(row["gap"]) for row in readings)
    return f"|r| = {number(r, 2)} (gap {number(gap, 2)})"


def _subtitle(report: Mapping[str, Any]) -> str:
    sizes = sorted({feature["n_selected"] for feature in _features(report)})
    counts = " to ".join(f"{size:,}" for size in (sizes[0], *sizes[1:][-1:]))
    about = [plain(report["base_model"]), f"{counts} weights"]
    if report["readings"]:
        about.append(
            "r: correlation of h with the class; gap: mean h of one class − the other’s, up to 2"
        )
    return " · ".join(filter(None, about))


def _overlaps(axes: "Axes", report: Mapping[str, Any]) -> None:
    """Draw which share of their largest weights every two features have in common."""
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415 - optional dependency

    values = np.array(report["overlaps"], dtype=float)
    texts = [[_percent(value) for value in row] for row in values]
    shades = LinearSegmentedColormap.from_list("overlap", ["white", AFTER])
    # By the square root: chance is near 0, and what lies above it should be seen.
    _square(axes, report, np.sqrt(values), texts, shades, (0.0, 1.0))
    chances = [report["chance_overlaps"][i][j] for i, j in combinations(range(len(values)), 2)]
    ends = dict.fromkeys(_percent(chance) for chance in (min(chances), max(chances)))
    share = f"{100 * report['top_k']:g} %"
    axes.set_title(f"top {share} of $|W_d|$ shared (%)", loc="left", fontsize=9)
    axes.set_title(f"chance {' to '.join(ends)}", loc="right", fontsize=7.5, color=FAINT)


def _readings(axes: "Axes", report: Mapping[str, Any]) -> None:
    """Draw each feature's correlation with the classes of each data set."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415 - optional dependency

    features, columns = _features(report), _columns(report)
    n = len(columns)
    cells = {(r["feature"], (r["dataset"], *r["classes"])): r for r in report["readings"]}
    held = np.full((len(features), n), np.nan)
    texts: list[list[str]] = [[""] * n for _ in features]
    small: list[list[str]] = [[""] * n for _ in features]
    for y, feature in enumerate(features):
        for x, column in enumerate(columns):
            row = cells[feature["name"], column]
            found = row["correlation"]
            texts[y][x] = _short(found and found["value"], n)
            if found:
                held[y, x] = found["value"]
                ends = f"{_short(found['low'], n)} to {_short(found['high'], n)}"
                small[y][x] = f"{ends}\ngap {_short(row['gap'], n)}"
            if row["own"]:
                frame = Rectangle(
                    (x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.6, zorder=3
                )
                axes.add_patch(frame).set_clip_on(False)
    _heat_map(axes, held, texts, _diverging(), (-1.0, 1.0), small)
    axes.set_title("correlation of h with the class", loc="left", fontsize=9)
    about = "small: 95 % interval, gap of mean h · framed: own"
    if any(row["correlation"] is None for row in report["readings"]):
        about += " · –: h is constant"
    axes.set_title(about, loc="right", fontsize=7.5, color=FAINT)
    _name_columns(axes, _column_labels(report), READ / n)
    _name_rows(axes, report, names=True)


def _energy(axes: "Axes", report: Mapping[str, Any]) -> None:
    """Draw each feature's energy by layer as a line of small bars."""
    features = _features(report)
    every = {layer for feature in features for layer in feature["energy_by_layer"]}
    layers = sorted(int(layer) for layer in every if layer != "outside")
    # Weights outside the layers get a bar of their own, one place apart.
    places = {**{str(layer): layer for layer in layers}, "outside": max(layers, default=-2) + 2}
    shares = [feature["energy_by_layer"] for feature in features]
    highest = max((share for own in shares for share in own.values()), default=1.0)
    for y, own in enumerate(shares):
        axes.axhline(y + 0.44, color="#BBBBBB", linewidth=0.6, zorder=1)
        peak = max(own, key=own.__getitem__, default=None)
        for layer, share in own.items():
            colour = INK if layer == peak else NEUTRAL
            axes.bar(places[layer], -0.84 * share / highest, 0.8, y + 0.44, color=colour)
        if peak is not None:
            name = "outside" if peak == "outside" else f"layer {peak}"
            text = f"{name}\n{_percent(own[peak])} %"
            axes.text(
                1.01, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=6.5
            )
    axes.set_title("energy of the decoder by layer", loc="left", fontsize=9)
    step = max(1, round(len(layers) / 8))
    ticks = {places[str(layer)]: str(layer) for layer in layers[::step]}
    if "outside" in every:
        ticks[places["outside"]] = "out"
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=7.5)
    axes.tick_params(length=0)
    axes.set(ylim=(len(features) - 0.5, -0.5))
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _heat_map(
    axes: "Axes",
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    colours: "Colormap",
    limits: tuple[float, float],
    small: Sequence[Sequence[str]] | None = None,
) -> None:
    """Draw values as coloured cells with a text each, and a smaller one below; NaN is grey."""
    n_rows, n_columns = values.shape
    mesh = axes.pcolormesh(
        np.arange(n_columns + 1) - 0.5, np.arange(n_rows + 1) - 0.5, np.ma.masked_invalid(values),
        cmap=colours.with_extremes(bad=UNDEFINED), vmin=limits[0], vmax=limits[1],
        edgecolors="white", linewidth=1.5,
    )  # fmt: skip
    size = 8.5 if n_columns <= 6 else 7.5 if n_columns <= MANY else 6.3
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            red, green, blue, _ = mesh.cmap(mesh.norm(value))
            dark = np.isfinite(value) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
            look: dict[str, Any] = {"ha": "center", "color": "white" if dark else INK}
            below = small[y][x] if small else ""
            above = "bottom" if below else "center_baseline"
            axes.text(x, y - 0.08 * bool(below), texts[y][x], fontsize=size, va=above, **look)
            if below:
                axes.text(x, y, below, fontsize=max(5.0, size - 2), va="top", **look)
    axes.set(xlim=(-0.5, n_columns - 0.5), ylim=(n_rows - 0.5, -0.5))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _square(
    axes: "Axes",
    report: Mapping[str, Any],
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    colours: "Colormap",
    limits: tuple[float, float],
) -> None:
    """Draw a matrix of every two features; the diagonal is grey, as it says nothing."""
    off_diagonal = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    _heat_map(axes, off_diagonal, texts, colours, limits)
    names = _names(report)
    if _numbered(report):
        names = [str(number) for number in range(1, len(names) + 1)]
    _name_columns(axes, names, HALF / len(names))


def _name_columns(axes: "Axes", labels: Sequence[str], width: float) -> None:
    """Name the columns; at an angle where a name is wider than its column, in inches."""
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    look = {} if _fit(labels, width) else turned
    axes.set_xticks(range(len(labels)), labels, fontsize=7.5, **look)


def _name_rows(axes: "Axes", report: Mapping[str, Any], *, names: bool) -> None:
    """Name the rows, or number them where the columns are numbered, or both."""
    labels, numbered = _names(report), _numbered(report)
    axes.set_yticks(range(len(labels)), labels if names else [""] * len(labels), fontsize=8)
    axes.tick_params(axis="y", pad=18 if numbered else 3.5)
    for y in range(len(labels) * numbered):
        axes.annotate(
            str(y + 1), (0.0, y), (-4, 0), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", ha="right", va="center_baseline", fontsize=7.5,
        )  # fmt: skip


def _names(report: Mapping[str, Any]) -> list[str]:
    """Names of the features, long ones in two lines."""
    return [
        "\n".join(
            # After a hyphen, as textwrap does by itself, or after a slash.
            _cut(line.replace("/ ", "/"))
            for line in textwrap.wrap(
                feature["name"].replace("/", "/ "),
                width=16, break_long_words=False, max_lines=2, placeholder=" …",
            )
        )
        for feature in _features(report)
    ]  # fmt: skip


def _numbered(report: Mapping[str, Any]) -> bool:
    """Whether the columns of the matrices have numbers, since the names would not fit."""
    names = _names(report)
    return not _fit(names, HALF / len(names))


def _fit(labels: Sequence[str], width: float) -> bool:
    """Whether labels fit into columns of a width in inches."""
    return 0.065 * _longest(labels) < width


def _longest(labels: Sequence[str]) -> int:
    """Letters of the longest line."""
    return max(len(line) for label in labels for line in label.split("\n"))


def _column_labels(report: Mapping[str, Any]) -> list[str]:
    counts = {(row["dataset"], *row["classes"]): row["n"] for row in report["readings"]}
    return [
        f"{_cut(name)} (n = {n:,})\n{_cut(plus, 14)} against {_cut(minus, 14)}"
        for (name, plus, minus), n in counts.items()
    ]


def _cut(name: str, length: int = 20) -> str:
    """A name that is not longer than it may be, in which matplotlib sees no formula."""
    return plain(name if len(name) <= length else f"{name[: length - 1]}…")


def _diverging() -> "Colormap":
    """Colours from −1 to 1 with white in the middle, which colour-blind readers can tell apart."""
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415 - optional dependency

    return LinearSegmentedColormap.from_list("diverging", [MINUS, "white", PLUS])


def _short(value: float | None, n: int) -> str:
    """A number from −1 to 1 with two decimals; without the leading zero where there are many."""
    if value is None or np.isnan(value):
        return "–"
    text = number(round(value, 2) + 0.0, 2)  # no minus before a zero
    return text.replace("0.", ".", 1) if n > MANY and abs(value) < 0.995 else text


def _percent(share: float) -> str:
    """A share in per cent, with a decimal place where it is small."""
    if np.isnan(share):
        return "–"
    return f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"


FEATURES = Drawing("features", _features, _features_figure)
