"""Bias benchmarks and plain text: a base model and edited ones."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradiend.evaluation.bias.suite import BENCHMARKS
from hf_gradiend.plotting.common import (
    AFTER,
    DASHES,
    FAINT,
    INK,
    MINUS,
    NEUTRAL,
    Drawing,
    empty_figure,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key = tuple[str, str]  # benchmark and measure
Look = tuple[str, bool]  # colour of a marker, and whether it is filled

# Name and unit of each benchmark, and what its measures are called.
WORDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "stereoset": (
        "StereoSet",
        "score, 0 to 100",
        {"ss": "stereotype score SS", "lms": "LM score LMS", "icat": "both in one, ICAT"},
    ),
    "crows_pairs": (
        "CrowS-Pairs",
        "pairs with the stereotype preferred (%)",
        {"shared": "shared tokens", "different": "differing tokens", "sentence": "whole sentence"},
    ),
    "winobias": (
        "WinoBias",
        "pro − anti stereotype (percentage points)",
        {"gap": "all pairs", "gap_type1": "type 1, knowledge", "gap_type2": "type 2, syntax"},
    ),
    "winogender": (
        "Winogender",
        "share of she against labour statistics",
        {"correlation": "correlation", "rmse": "RMS error", "share_of_she": "mean share of she"},
    ),
    "bec_pro": (
        "BEC-Pro",
        "female − male association (nats)",
        {
            "female_professions": "women’s professions",
            "male_professions": "men’s professions",
            "balanced_professions": "balanced professions",
        },
    ),
    "seat": (
        "SEAT",
        "effect size d (standard deviations)",
        {
            "d_6": "career, names (6)",
            "d_6b": "career, terms (6b)",
            "d_7": "math, terms (7)",
            "d_7b": "math, names (7b)",
            "d_8": "science, terms (8)",
            "d_8b": "science, names (8b)",
        },
    ),
    "wikitext2": ("WikiText-2", "perplexity per token", {"perplexity": "perplexity"}),
}
BETTER = {"high": "\nhigher is better", "low": "\nlower is better"}
MARKERS = "sD^vPX"  # of the edited models, so that colour is free for the verdict
BASE: Look = (NEUTRAL, True)
VERDICTS: dict[str, tuple[Look, str]] = {
    "better": ((AFTER, True), "better than the base model"),
    "worse": ((MINUS, True), "worse"),
    "cannot be told": ((INK, False), "cannot be told apart"),
    "changed": ((INK, True), "changed; neither side is better"),
}
IDEAL = "ideal value"
ROW, LABEL = 0.12, 0.31  # inches: of a model's interval, and of a label of two lines
TITLE, FOOT, LEGEND = 0.33, 0.5, 0.17  # inches: above a panel, below it, a line of the legend
FAR_APART = 20.0  # measures whose sizes differ by this factor get panels of their own


def plot_benchmarks(report: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Draw each benchmark's measures with 95 % intervals, of a base model and of edited ones.

    Args:
        report: Content of evaluation.json, with at most six edited models.
        path: PNG file to write; its height grows with the numbers of measures and of models.

    Returns:
        The file's path.

    Raises:
        DataError: If the report has no benchmark.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    return BENCHMARK_RESULTS.write(report, path)


def _figure(report: Mapping[str, Any]) -> "Figure":
    meanings = _meanings(report)
    panels = _panels(report)
    models = 1 + len(report["edited"])
    slot = max(LABEL, 0.1 + ROW * models)
    tall = [TITLE + slot * len(panel) + FOOT for panel in panels]
    # In their order, in two columns that are as even as they can be.
    cut = min(range(1, len(panels) + 1), key=lambda i: max(sum(tall[:i]), sum(tall[i:])))
    columns = [part for part in (slice(0, cut), slice(cut, None)) if panels[part]]
    body = max(sum(tall[part]) for part in columns)
    strip = LEGEND * max(models, len(meanings))
    figure = empty_figure(*_heading(report), height=0.9 + strip + body)
    top, bottom = figure.add_gridspec(2, 1, height_ratios=[strip, body])
    _legends(figure.add_subplot(top), report, meanings)
    # With an empty column in the middle, which keeps the labels of the right half from the left.
    widths = [1.0, 0.06, 1.0][: 2 * len(columns) - 1]
    cells = bottom.subgridspec(1, len(widths), width_ratios=widths)
    for i, part in enumerate(columns):
        inner = [slot * len(panel) for panel in panels[part]]
        rest = max(body - sum(tall[part]), 0.01)
        places = cells[2 * i].subgridspec(len(inner) + 1, 1, height_ratios=[*inner, rest])
        for j, panel in enumerate(panels[part]):
            _panel(figure.add_subplot(places[j]), panel, report, ROW / slot)
    return figure


def _results(report: Mapping[str, Any]) -> dict[Key, Mapping[str, float]]:
    """The base model's estimates."""
    return {
        (benchmark, measure): estimate
        for benchmark, measures in (report.get("base") or {}).items()
        for measure, estimate in measures.items()
    }


def _edited(report: Mapping[str, Any]) -> list[tuple[str, dict[Key, Mapping[str, Any]]]]:
    """Label and rows of each edited model."""
    return [
        (edit["label"], {(row["benchmark"], row["measure"]): row for row in edit["rows"]})
        for edit in report["edited"]
    ]


def _best(report: Mapping[str, Any], key: Key) -> str | float | None:
    """Which value of a measure is best; the base model's numbers alone do not say it."""
    for _, rows in _edited(report):
        return rows[key]["best"]
    known = BENCHMARKS.get(key[0].partition(":")[0])
    bests = {measure.name: measure.better for measure in known.measures} if known else {}
    return bests.get(key[1])


def _verdict(row: Mapping[str, Any]) -> str:
    """The verdict; `"changed"` for a told change of a measure of which neither side is better."""
    if row["verdict"] != "neither is better":
        return row["verdict"]
    told = row["change"]["low"] > 0 or row["change"]["high"] < 0
    return "changed" if told else "cannot be told"


def _panels(report: Mapping[str, Any]) -> list[list[Key]]:
    """Measures by panel: those of a benchmark, but apart where one scale would not show both."""
    panels: list[list[Key]] = []
    sizes: list[float] = []  # of the first measure of each panel
    for key, base in _results(report).items():
        estimates = [base, *(rows[key]["after"] for _, rows in _edited(report))]
        size = max(abs(estimate[end]) for estimate in estimates for end in ("low", "high"))
        for panel, other in zip(panels, sizes, strict=True):
            near = size <= FAR_APART * other and other <= FAR_APART * size
            if panel[0][0] == key[0] and near:
                panel.append(key)
                break
        else:
            panels.append([key])
            sizes.append(size)
    return panels


def _heading(report: Mapping[str, Any]) -> tuple[str, str]:
    limit = f"at most {report['limit']:,} items of each · " if report.get("limit") else ""
    about = f"{limit}points with 95 % intervals"
    if not report["edited"]:
        return _base_title(report), about
    about += (
        " · verdicts are those of the change on the same items: models whose intervals overlap may "
        "still be told apart"
    )
    counts = [
        Counter(row["verdict"] for row in rows.values() if row["best"] is not None)
        for _, rows in _edited(report)
    ]
    better, worse = (_range([count[name] for count in counts]) for name in ("better", "worse"))
    one = plain(report["edited"][0]["label"])
    who = one if len(counts) == 1 else f"{len(counts)} edited models"
    return f"{who}: {better} of {counts[0].total()} measures better, {worse} worse", about


def _base_title(report: Mapping[str, Any]) -> str:
    """Of how many measures the ideal value lies outside the interval."""
    ideals = [
        estimate["low"] <= best <= estimate["high"]
        for key, estimate in _results(report).items()
        if isinstance(best := _best(report, key), float | int)
    ]
    name = plain(report["base_model"])
    if not ideals:
        return f"{name} on {', '.join(_name(benchmark) for benchmark in report['base'])}"
    return f"{name} is off the ideal value in {ideals.count(False)} of {len(ideals)} measures"


def _name(benchmark: str) -> str:
    """A benchmark's published name, with the variant."""
    title, _, variant = benchmark.partition(":")
    name = WORDS[title][0] if title in WORDS else title
    return plain(f"{name}: {variant}" if variant else name)


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _panel(axes: "Axes", keys: Sequence[Key], report: Mapping[str, Any], step: float) -> None:
    """Draw some measures of a benchmark, one below the other.

    Args:
        axes: The axes.
        keys: The measures.
        report: Content of evaluation.json.
        step: Distance of two models, where that of two measures is 1.
    """
    results, edited = _results(report), _edited(report)
    benchmark = keys[0][0]
    _, unit, words = WORDS.get(benchmark.partition(":")[0], ("", "value", {}))
    bests = [_best(report, key) for key in keys]
    labels = [
        plain(words.get(key[1], key[1].replace("_", " "))) + BETTER.get(str(best), "")
        for key, best in zip(keys, bests, strict=True)
    ]
    for y, key in enumerate(keys):
        if y % 2 == 0:
            axes.axhspan(y - 0.5, y + 0.5, color="#F6F6F6", linewidth=0, zorder=0)
        first = y - step * len(edited) / 2
        _interval(axes, first, results[key], "o", BASE)
        for i, (_, rows) in enumerate(edited):
            place, verdict = first + step * (i + 1), _verdict(rows[key])
            look, _ = VERDICTS[verdict]
            _interval(axes, place, rows[key]["after"], _marker(i), look)
            if look[1]:
                axes.text(
                    1.015, place, verdict, color=look[0], fontsize=7, va="center_baseline",
                    transform=axes.get_yaxis_transform(),
                )  # fmt: skip
    y = 0
    for best, same in groupby(bests):
        top, y = y, y + len(list(same))
        if isinstance(best, float | int):
            ends = [top - 0.5, y - 0.5]
            axes.plot([best, best], ends, color=INK, linestyle=DASHES, linewidth=1.0, zorder=1.5)
    axes.set_title(_name(benchmark), loc="left", fontsize=9.5)
    axes.set_title(f"n = {results[keys[0]]['n']:,}", loc="right", fontsize=8, color=FAINT)
    axes.set_yticks(range(len(keys)), labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(unit, fontsize=8)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _marker(i: int) -> str:
    """Marker of the i-th edited model."""
    return MARKERS[i % len(MARKERS)]


def _interval(
    axes: "Axes", y: float, estimate: Mapping[str, float], marker: str, look: Look
) -> None:
    ends = [estimate["low"], estimate["high"]]
    axes.plot(ends, [y, y], color=look[0], linewidth=1.3, zorder=2)
    axes.plot(estimate["value"], y, zorder=3, **_dot(marker, look))


def _dot(marker: str, look: Look) -> dict[str, Any]:
    """How matplotlib draws a value."""
    colour, filled = look
    return {
        "marker": marker, "markersize": 5.0, "markeredgewidth": 1.1, "color": colour,
        "markerfacecolor": colour if filled else "white",
    }  # fmt: skip


def _meanings(report: Mapping[str, Any]) -> list[str]:
    """What the legend explains of what occurs: verdicts, and the line of the ideal value."""
    found = {_verdict(row) for _, rows in _edited(report) for row in rows.values()}
    bests = [_best(report, key) for key in _results(report)]
    ideal = [IDEAL] * any(isinstance(best, float | int) for best in bests)
    return [verdict for verdict in VERDICTS if verdict in found] + ideal


def _legends(axes: "Axes", report: Mapping[str, Any], meanings: Sequence[str]) -> None:
    """On the left the models by their markers, on the right what colours and lines say."""
    from matplotlib.lines import Line2D  # noqa: PLC0415 - optional dependency

    def dot(label: str, marker: str, look: Look) -> Line2D:
        return Line2D([], [], linewidth=1.3, label=label, **_dot(marker, look))

    models = [dot(f"{plain(report['base_model'])} (base model)", "o", BASE)]
    for i, edit in enumerate(report["edited"]):
        models.append(dot(plain(edit["label"]), _marker(i), (FAINT, True)))
    right = [dot(VERDICTS[name][1], "o", VERDICTS[name][0]) for name in meanings if name != IDEAL]
    if IDEAL in meanings:
        right.append(Line2D([], [], color=INK, linestyle=DASHES, linewidth=1.0, label=IDEAL))
    axes.axis("off")
    for handles, x in ((models, 0.0), (right, 0.56)):
        legend = axes.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(x, 1.0), fontsize=8.5,
            labelspacing=0.35, borderpad=0.0,
        )  # fmt: skip
        legend.set_in_layout(False)
        axes.add_artist(legend)


BENCHMARK_RESULTS = Drawing("benchmarks", _results, _figure)
