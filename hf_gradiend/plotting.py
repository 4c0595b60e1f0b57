"""Figures of a report (report.json), one PNG each; needs matplotlib (extra `plot`).

Every title says the finding with its number, so that a figure stands on its own.
"""

import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradiend.errors import DataError
from hf_gradiend.files import writable_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart: https://jfly.uni-koeln.de/color/
PLUS, MINUS, AFTER = "#0072B2", "#D55E00", "#009E73"
KIND_COLOURS = {"attention": "#56B4E9", "MLP": "#E69F00", "norm": "#CC79A7", "other": "#8C8C8C"}
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
ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
# BERT's two MLP matrices are "intermediate" and "output"; its attention has an "output" as well.
MLP = re.compile(
    r"mlp|ffn|feed_?forward|relu|intermediate|^output$|^fc\d|moe|expert", re.IGNORECASE
)


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
    return _write("encodings", report, path)


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
    return _write("transfer", report, path)


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
    return _write("occupations", report, path)


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
    return _write("sweep", report, path)


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
    return _write("energy", report, path)


def plot_all(report: Mapping[str, object], folder: str | os.PathLike[str]) -> list[Path]:
    """Draw every figure for which the report has data.

    Args:
        report: Content of report.json.
        folder: Where to write encodings.png, transfer.png, occupations.png, sweep.png and
            energy.png; made if it does not exist.

    Returns:
        Paths of the files that were written.

    Raises:
        OutputError: If the folder cannot be written to.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    _style()  # says that matplotlib is missing before a folder is made
    place = writable_folder(folder)
    return [
        _write(name, report, place / f"{name}.png")
        for name, (data, _) in _FIGURES.items()
        if data(report)
    ]


def _write(name: str, report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    data, draw = _FIGURES[name]
    file = Path(path)
    partial = file.with_name(f".{file.name}.partial")
    with _style():
        if not data(report):
            raise DataError(
                f"Expected a report with data for the figure of its {name}, but it has none."
            )
        figure = draw(report)
        try:
            figure.savefig(partial, format="png", dpi=DPI)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    return file


def _style() -> AbstractContextManager[None]:
    """Our settings on top of matplotlib's own; the user's come back afterwards.

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


# What each figure is drawn from; empty or None where the report lacks it.


def _test_split(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return ((report.get("encoder") or {}).get("splits") or {}).get("test")


def _pairs(report: Mapping[str, Any], kind: str = "feature") -> list[Mapping[str, Any]]:
    """Readable transfer pairs of one kind, by falling gap."""
    pairs = [
        pair
        for pair in (report.get("encoder") or {}).get("transfer") or []
        if pair["kind"] == kind and np.isfinite([pair["positive"], pair["negative"]]).all()
    ]
    return sorted(pairs, key=lambda pair: pair["negative"] - pair["positive"])


def _occupations(report: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Occupation, share before and share after, by falling share before."""

    def share(masses: Mapping[str, float]) -> float:
        return masses["p_plus"] / (masses["p_plus"] + masses["p_minus"])

    if not report.get("before"):
        return []
    rows = [
        (row["occupation"], share(row["before"]), share(row["after"]) if row["after"] else None)
        for row in report.get("occupations") or []
    ]
    return sorted(rows, key=lambda row: -row[1])


def _sweep(report: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """Rows of the sweep by rising step size; none if the base model (α = 0) is not among them."""
    rows = sorted(report.get("sweep") or [], key=lambda row: row["step_size"])
    return rows if any(row["step_size"] == 0 for row in rows) else []


def _energy_shares(report: Mapping[str, Any]) -> dict[tuple[int | None, str], float]:
    """Shares of the energy, which sum to 1, by layer (`None`: outside) and kind of weight."""
    energy: Mapping[str, float] = report.get("energy") or {}
    total = sum(energy.values())
    shares: dict[tuple[int | None, str], float] = {}
    for name, value in energy.items():
        if total:
            key = (_layer_of(name), _kind_of(name))
            shares[key] = shares.get(key, 0.0) + value / total
    return shares


def _layer_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _kind_of(name: str) -> str:
    """Kind of a weight; norms first, as they stand inside attention and MLP modules too."""
    parts = name.split(".")
    for kind, pattern in (("norm", NORM), ("attention", ATTENTION), ("MLP", MLP)):
        if any(pattern.search(part) for part in parts):
            return kind
    return "other"


# The figures.


def _encodings_figure(report: Mapping[str, Any]) -> "Figure":
    split = report["encoder"]["splits"]["test"]
    positive, negative = report["feature_classes"]
    neutral, r = report["encoder"]["neutral"], split["correlation"]
    plus, minus = _names(report)
    figure = _figure(
        f"Encodings of {plus} and {minus} correlate {_number(r['value'], 3)} with their class "
        f"(n = {r['n']:,})",
        f"{_about(report)} · test texts, 95 % interval [{_number(r['low'], 3)}, "
        f"{_number(r['high'], 3)}] · neutral tokens: mean |h| {_number(neutral['value'], 2)}",
    )
    axes = figure.add_subplot()
    groups: list[tuple[str, Sequence[float], str]] = [
        (_class_label(report, 0), split["encodings"][positive], PLUS),
        ("neutral tokens", report["encoder"]["neutral_encodings"], NEUTRAL),
        (_class_label(report, 1), split["encodings"][negative], MINUS),
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
    _encoding_axis(axes, plus, minus)
    return figure


def _transfer_figure(report: Mapping[str, Any]) -> "Figure":
    feature, neutral = _pairs(report), _pairs(report, "neutral")
    n_right = sum(pair["positive"] > pair["negative"] for pair in feature)
    plus, minus = _names(report)
    n_rows = len(feature) + (len(neutral) + 1.2 if neutral else 0)
    figure = _figure(
        f"{n_right} of {len(feature)} word pairs never trained on are read in the right order",
        f"{_about(report)} · trained on {plus} and {minus} alone · mean h per word",
        height=1.6 + 0.185 * n_rows,
    )
    axes = figure.add_subplot()
    ticks: list[float] = []
    for row, pair in enumerate([*feature, *neutral]):
        is_neutral = row >= len(feature)
        y = row + 1.2 * is_neutral
        wrong = not is_neutral and pair["positive"] <= pair["negative"]
        colours = (NEUTRAL, NEUTRAL) if is_neutral else (MINUS, PLUS)
        _dumbbell(axes, y, (pair["negative"], pair["positive"]), colours, crossed=wrong)
        if wrong:
            low, high = pair["positive"], pair["negative"]
            x, side = (low - 0.04, "right") if high > -low else (high + 0.04, "left")
            axes.text(x, y, "wrong order", ha=side, va="center", fontweight="bold", fontsize=8)
        ticks.append(y)
    if neutral:
        axes.axhline(len(feature) + 0.1, color="#BBBBBB", linewidth=0.8)
    labels = [_plain(pair["pair"].replace("/", " / ")) for pair in [*feature, *neutral]]
    axes.set_yticks(ticks, labels, fontsize=8.5)
    for tick in axes.get_yticklabels()[len(feature) :]:
        tick.set_color(FAINT)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(-1.04, 1.04), ylim=(n_rows - 0.3, -0.7))
    axes.grid(axis="x")
    axes.axvline(0.0, color="#BBBBBB", linewidth=0.8, zorder=0.9)
    _encoding_axis(axes, plus, minus)
    positive, negative = (_plain(name) for name in report["feature_classes"])
    entries = [(f"{positive} word (first)", PLUS), (f"{negative} word (second)", MINUS)]
    _dot_legend(axes, [*entries, ("neutral pair", NEUTRAL)] if neutral else entries)
    return figure


def _occupations_figure(report: Mapping[str, Any]) -> "Figure":
    rows = _occupations(report)
    plus, minus = _names(report)
    before, after = report["before"]["imbalance"], (report.get("after") or {}).get("imbalance")
    what = f"Imbalance between {plus} and {minus} for occupations"
    if after is None:
        title, about = f"{what} is {_number(before, 2)}", "no edit was chosen"
    else:
        verb = "falls" if after < before else "rises"
        title = f"{what} {verb} from {_number(before, 2)} to {_number(after, 2)}"
        about = _edit_label(report["edit"])
    figure = _figure(
        title,
        f"{_about(report)} · {about} · 0 is balanced, 1 is one word only",
        height=max(HEIGHT, 1.7 + 0.22 * len(rows)),
    )
    axes = figure.add_subplot()
    axes.axvline(50.0, color=INK, linewidth=1.0, linestyle=DASHES, zorder=0.9)
    for y, (_, share, share_after) in enumerate(rows):
        if share_after is None:
            axes.scatter([100 * share], [y], s=48, color=BEFORE, zorder=3)
        else:
            _dumbbell(axes, y, (100 * share, 100 * share_after), (BEFORE, AFTER))
    axes.set_yticks(range(len(rows)), [_plain(name) for name, _, _ in rows], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(-2, 102), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xticks(range(0, 101, 25), [f"{share} %" for share in range(0, 101, 25)])
    axes.set_xlabel(f"P({plus}) / (P({plus}) + P({minus}))")
    axes.grid(axis="x")
    entries = [("before the edit", BEFORE), ("after", AFTER)]
    _dot_legend(axes, entries[:1] if after is None else entries)
    return figure


def _sweep_figure(report: Mapping[str, Any]) -> "Figure":
    rows, edit = _sweep(report), report.get("edit")
    base = next(row for row in rows if row["step_size"] == 0)
    figure = _figure(*_sweep_heading(report), height=5.2)
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
                label=f"h = {_number(h)}",
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
        return "No edit within the limits is better than the base model", _about(report)
    title = (
        f"The edit takes imbalance from {_number(before['imbalance'], 2)} to "
        f"{_number(after['imbalance'], 2)} at {100 * after['lm_score'] / before['lm_score']:.1f} % "
        f"of the LM score"
    )
    return title, f"{_about(report)} · {_edit_label(edit)}"


def _sweep_lines(report: Mapping[str, Any]) -> dict[float, tuple[str, float]]:
    """Colour and width of each line: the chosen h stands out, the others darken with h."""
    chosen = (report.get("edit") or {}).get("feature_factor")
    factors = sorted({row["feature_factor"] for row in report["sweep"]})
    others = [h for h in factors if h != chosen]
    shades = np.linspace(0.68, 0.15, len(others)) if len(others) > 1 else [0.6]
    looks = {h: (str(shade), 1.4) for h, shade in zip(others, shades, strict=True)}
    return {h: looks.get(h, (AFTER, 2.2)) for h in factors}


def _energy_figure(report: Mapping[str, Any]) -> "Figure":
    shares = _energy_shares(report)
    by_layer: dict[int | None, float] = {}
    by_kind: dict[str, float] = {}
    for (layer, kind), share in shares.items():
        by_layer[layer] = by_layer.get(layer, 0.0) + share
        by_kind[kind] = by_kind.get(kind, 0.0) + share
    kind, layer = max(by_kind, key=by_kind.__getitem__), max(by_layer, key=by_layer.__getitem__)
    place = (
        "weights outside the layers alone hold" if layer is None else f"layer {layer} alone holds"
    )
    figure = _figure(
        f"{kind[0].upper()}{kind[1:]} weights hold {by_kind[kind]:.0%} of the decoder’s energy; "
        f"{place} {by_layer[layer]:.0%}".replace("%", " %"),
        f"{_about(report)} · energy: squared norm of the decoder direction",
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
    _dot_legend(axes, entries, marker="s")
    return figure


# What the figures share.


def _figure(title: str, subtitle: str, *, height: float = HEIGHT) -> "Figure":
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


def _dumbbell(
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


def _dot_legend(axes: "Axes", entries: Sequence[tuple[str, str]], marker: str = "o") -> None:
    """Legend in one line above the axes."""
    for label, colour in entries:
        axes.plot([], [], marker, color=colour, markersize=6.5, label=label)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.01), ncols=len(entries), columnspacing=1.6)


def _encoding_axis(axes: "Axes", plus: str, minus: str) -> None:
    axes.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0], ["−1", "−0.5", "0", "+0.5", "+1"])
    axes.set_xlabel(f"encoding h   (+1: {plus}, −1: {minus}, 0: neutral)")


def _about(report: Mapping[str, Any]) -> str:
    n = report["n_selected"]
    count = f"{n / 1e6:.0f} M" if n >= 10_000_000 else f"{n:,}"
    return (
        f"{_plain(report['base_model'])} · {count} weights · {report['solver'].replace('_', ' ')}"
    )


def _edit_label(edit: Mapping[str, float]) -> str:
    return f"edit h = {_number(edit['feature_factor'])}, α = {_number(edit['step_size'])}"


def _names(report: Mapping[str, Any]) -> tuple[str, str]:
    """The classes' words in quotation marks, or the classes' names where a class has several."""
    words = report.get("feature_words") or {}
    plus, minus = (
        f"“{words[name][0]}”" if len(words.get(name, [])) == 1 else name
        for name in report["feature_classes"]
    )
    return _plain(plus), _plain(minus)


def _class_label(report: Mapping[str, Any], index: int) -> str:
    """The class, with its word where that is all it has."""
    name, shown = _plain(report["feature_classes"][index]), _names(report)[index]
    return name if shown == name else f"{name} ({shown})"


def _plain(text: str) -> str:
    """Text of the report in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _number(value: float, digits: int | None = None) -> str:
    """A number with a true minus sign, with fixed decimal places or three significant digits."""
    text = f"{value:.3g}" if digits is None else f"{value:.{digits}f}"
    return text.replace("-", "−")


_FIGURES: dict[
    str, tuple[Callable[[Mapping[str, Any]], object], Callable[[Mapping[str, Any]], "Figure"]]
] = {
    "encodings": (_test_split, _encodings_figure),
    "transfer": (_pairs, _transfer_figure),
    "occupations": (_occupations, _occupations_figure),
    "sweep": (_sweep, _sweep_figure),
    "energy": (_energy_shares, _energy_figure),
}
