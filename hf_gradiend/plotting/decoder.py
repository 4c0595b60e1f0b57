"""What a grid of edits does: indices, language-model score and probabilities."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradiend.plotting.common import (
    DASHES,
    FAINT,
    INK,
    MINUS,
    NEUTRAL,
    PLUS,
    Drawing,
    description,
    edit_label,
    empty_figure,
    number,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INDICES = ("imbalance", "bpi", "several_class_index", "fpi", "mpi")
TOGETHER = (("p_plus", "p_minus"), ("fpi", "mpi"))  # panels with one scale, side by side
FROM_ZERO = ("imbalance", *TOGETHER[0], *TOGETHER[1])
# Colours of Okabe and Ito's palette from −h to +h; the middle is dark, as lines stand on white.
RAMP = ("#E69F00", MINUS, INK, PLUS, "#56B4E9")
PICK = "#CC79A7"  # the palette's purple, which the ramp leaves free
RULES = {  # marker, the same as a letter, size in points, words
    "limits": ("*", "★", 12.0, "chosen within the limits"),
    "product": ("D", "◆", 5.5, "chosen by the product rule"),
}
# Ticks of the LM score, relative to the base model's; earlier ones push out later ones near them.
LM_TICKS = (1.0, 0.9, 0.97, 0.0, 0.5, 0.75, 0.995, 0.98, 0.95, 1.01, 1.03, 1.1, 1.25, 1.5, 2.0)
LM_UNIT = 0.01  # distance from the base model up to which the LM score's axis is about linear


def plot_decoder(report: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Draw what each edit of a grid does, against the step size α, one line per feature factor h.

    The axis of α is linear up to the least |α| and logarithmic beyond it, so that both signs and
    the base model (α = 0), through which all lines go, have a place. The LM score's axis is
    stretched near the base model's, where the limit is.

    Args:
        report: A grid of edits with `classes` (+ and −), `grid` (rows with `feature_factor`,
            `step_size` and the measures of `EditMeasures`), `before` (the base model's measures),
            `choices` (edits by `criterion`, a measure, and `rule`, `"limits"` or `"product"`, with
            their measures as `chosen_after`, and `judged_after` and `judged_before` on other
            texts, or from the grid) and `lm_floor`, relative to the base model: the content of
            decoder.json, or of a report.json with such a dictionary as `decoder`.
        path: PNG file to write.

    Returns:
        The file's path.

    Raises:
        DataError: If the report lacks a grid or the base model's measures.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    return DECODER.write(report, path)


def _decoder(report: Mapping[str, Any]) -> dict[str, Any]:
    """The grid with what the report around it says of the base model; empty without a grid."""
    parts = {**report, **(report.get("decoder") or {})}
    return parts if parts.get("grid") and parts.get("before") else {}


def _decoder_figure(report: Mapping[str, Any]) -> "Figure":
    report = _decoder(report)
    figure = empty_figure(*_heading(report), height=9.4)
    cells = figure.subplots(4, 2)
    panels: dict[str, Axes] = dict(zip(_measures(report), cells.flat, strict=True))
    for measure, axes in panels.items():
        _panel(axes, measure, report)
        _step_axis(axes, report)
    for group in TOGETHER:
        top = max(panels[measure].get_ylim()[1] for measure in group)
        for measure in group:
            panels[measure].set_ylim(0.0, top)
    for axes in cells[-1]:
        axes.set_xlabel("step size α")
    _colour_bar(figure, list(panels.values()), report)
    _legend(figure, report)
    return figure


def _measures(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Measures by panel; for two classes that were not weighed as several, the mass is one."""
    chosen_by = {choice["criterion"] for choice in report["choices"]}
    several = "several_class_index" in chosen_by or report["before"].get("p_others")
    sixth = "several_class_index" if several else "mass"
    return "imbalance", "lm_score", "p_plus", "p_minus", "bpi", sixth, "fpi", "mpi"


def _heading(report: Mapping[str, Any]) -> tuple[str, str]:
    rows = report["grid"]
    about = (
        f"grid of {len({row['feature_factor'] for row in rows})} h × "
        f"{len({row['step_size'] for row in rows} - {0.0})} α"
    )
    if "solver" in report:
        about = f"{description(report)} · {about}"
    if not report["choices"]:
        return "No edit of the grid within the limits is better than the base model", about
    # The choice that the library makes by default, where it is among them.
    choice = min(
        report["choices"],
        key=lambda row: (row["criterion"], row["rule"]) != ("imbalance", "limits"),
    )
    where, before, after = "", report["before"], _edited(report, choice)
    if "judged_after" in choice:
        where, before, after = " on other texts", report["judged_before"], choice["judged_after"]
    measure = choice["criterion"]
    verb = "falls" if after[measure] < before[measure] else "rises"
    name = _label(report, measure)
    title = (
        f"{name[0].upper()}{name[1:]} {verb} from {number(before[measure])} to "
        f"{number(after[measure])}{where} at "
        f"{100 * after['lm_score'] / before['lm_score']:.1f} % of the LM score"
    )
    about = f"{about} · {edit_label(choice)}"
    return title, f"{about} · an index marks the edits chosen by it, the other panels mark all"


def _label(report: Mapping[str, Any], measure: str) -> str:
    """What a measure is called."""
    plus, minus = (plain(name) for name in report["classes"][:2])
    return {
        "imbalance": "imbalance",
        "lm_score": "LM score, % of the base model’s",
        "p_plus": f"mean probability of {plus}",
        "p_minus": f"mean probability of {minus}",
        "bpi": "balanced index BPI",
        "several_class_index": "several-class index",
        "mass": f"mean probability of {plus} or {minus}",
        "fpi": f"{plus} index FPI",
        "mpi": f"{minus} index MPI",
    }[measure]


def _edited(report: Mapping[str, Any], choice: Mapping[str, Any]) -> Mapping[str, float]:
    """The measures of a chosen edit: its own where a search left the grid."""
    if "chosen_after" in choice:
        return choice["chosen_after"]
    edit = (choice["feature_factor"], choice["step_size"])
    return next(row for row in report["grid"] if (row["feature_factor"], row["step_size"]) == edit)


def _panel(axes: "Axes", measure: str, report: Mapping[str, Any]) -> None:
    before, colours = report["before"], _colours(report)
    unit = before[measure] if measure == "lm_score" else 1.0
    axes.axhline(before[measure] / unit, color=NEUTRAL, linewidth=1.4, zorder=1.5)
    # The neutral edit comes last, on top: in the middle all lines meet.
    for h in sorted(colours, key=abs, reverse=True):
        rows = [row for row in report["grid"] if row["feature_factor"] == h and row["step_size"]]
        line = sorted([{**before, "step_size": 0.0}, *rows], key=lambda row: row["step_size"])
        axes.plot(
            [row["step_size"] for row in line],
            # A measure that an edit broke is null in JSON, and a gap here.
            np.array([row[measure] for row in line], dtype=float) / unit,
            color=colours[h],
            linewidth=1.3,
            marker="o",
            markersize=2.6,
            label=f"h = {number(h)}",
        )
    # An index shows the edits chosen by it; the other panels show what all of them do.
    own = [choice for choice in report["choices"] if choice["criterion"] == measure]
    for choice in own if measure in INDICES else report["choices"]:
        place = choice["step_size"], _edited(report, choice)[measure] / unit
        label = f"{choice['criterion']}, {choice['rule']}"
        axes.plot(*place, **_mark(choice["rule"]), label=label, zorder=4, clip_on=False)
    label = _label(report, measure)
    axes.set_title(label + " (0 is balanced)" * (measure == "imbalance"), loc="left", fontsize=9)
    axes.set_title(_edits(own), loc="right", fontsize=7, color=FAINT)
    axes.grid(axis="y")
    if measure == "lm_score":
        _lm_axis(axes, report["lm_floor"])
    else:
        low, high = (0.0 if measure in FROM_ZERO else axes.dataLim.y0), axes.dataLim.y1
        margin = 0.08 * (high - low) or 0.01  # where no edit changes anything
        axes.set_ylim(max(0.0, low - margin), high + margin)
        axes.locator_params(axis="y", nbins=5)


def _mark(rule: str) -> dict[str, Any]:
    """How matplotlib draws the edits that a rule chose."""
    marker, _, size, _ = RULES[rule]
    return {
        "marker": marker, "markersize": size, "color": PICK, "markeredgecolor": INK,
        "markeredgewidth": 0.6, "linestyle": "none",
    }  # fmt: skip


def _edits(choices: Sequence[Mapping[str, Any]]) -> str:
    """One line per chosen edit, with the marks of the rules that chose it."""
    letters: dict[str, str] = {}
    for choice in choices:
        h, alpha = number(choice["feature_factor"]), _power(choice["step_size"])
        edit = f"h = {h}, α = {alpha}"
        letters[edit] = letters.get(edit, "") + RULES[choice["rule"]][1]
    return "\n".join(f"{marks} {edit}" for edit, marks in letters.items())


def _colours(report: Mapping[str, Any]) -> dict[float, tuple[float, float, float]]:
    """Colour of each h by rising h, in even steps from that of h = 0 to each side."""
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415 - optional dependency

    factors = sorted({float(row["feature_factor"]) for row in report["grid"]})
    # How many values lie between 0 and this one, itself included, with its sign.
    ranks = [
        np.sign(h) * sum(0 < other * np.sign(h) <= abs(h) for other in factors) for h in factors
    ]
    reach = max(map(abs, ranks)) or 1.0
    ramp = LinearSegmentedColormap.from_list("h", RAMP)
    return {h: ramp(0.5 + 0.5 * k / reach)[:3] for h, k in zip(factors, ranks, strict=True)}


def _step_axis(axes: "Axes", report: Mapping[str, Any]) -> None:
    """Put α on the x axis, with powers of ten, or the ends where there are not two of them."""
    tried = {row["step_size"] for row in report["grid"]}
    drawn = {0.0, *tried, *(choice["step_size"] for choice in report["choices"])}
    low, high = min(drawn), max(drawn)
    sizes = sorted({abs(alpha) for alpha in drawn} - {0.0})
    if not sizes:  # the base model alone
        return
    decades = math.log10(sizes[-1] / sizes[0])
    axes.set_xscale("symlog", linthresh=sizes[0], linscale=max(0.2, 0.25 * decades))
    exponents = range(math.ceil(math.log10(sizes[0])), math.floor(math.log10(sizes[-1])) + 1)
    powers = [float(f"1e{k}") for k in exponents]
    shown = powers[:: (len(powers) + 1) // 3 or 1] if len(powers) > 1 else [sizes[0], sizes[-1]]
    ticks = sorted(x for x in {0.0, *shown, *(-size for size in shown)} if low <= x <= high)
    axes.set_xticks(ticks, [_power(x) for x in ticks], fontsize=8.5)
    axes.set_xticks(sorted(tried - {*ticks}), minor=True)
    # Margins in decades, as both ends may be 0.
    stretch = 10 ** (0.08 * (decades + 0.5))
    axes.set_xlim(
        low * stretch if low < 0 else -0.2 * sizes[0],
        high * stretch if high > 0 else 0.2 * sizes[0],
    )


def _power(value: float) -> str:
    """A number as ticks say it: 0.002, 10⁻⁵, 2·10⁻⁵."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return number(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = number(float(mantissa))
    return factor.replace("1", power) if factor in ("1", "−1") else f"{factor}·{power}"


def _lm_axis(axes: "Axes", floor: float) -> None:
    """Draw the limit, on a y axis so stretched near 1 that 0.99 stands apart and 0 is there too."""

    def there(y: np.ndarray | float) -> np.ndarray:
        return np.arcsinh((np.asarray(y) - 1.0) / LM_UNIT)

    def back(z: np.ndarray | float) -> np.ndarray:
        return 1.0 + LM_UNIT * np.sinh(z)

    low, high = there(np.array([min(axes.dataLim.y0, floor), max(axes.dataLim.y1, 1.0)]))
    margin = 0.08 * (high - low) or 0.1
    axes.set_yscale("function", functions=(there, back))
    axes.set_ylim(float(back(low - margin)), float(back(high + margin)))
    axes.axhline(floor, color=INK, linewidth=1.0, linestyle=DASHES, zorder=1.6)
    ticks: list[float] = []
    for tick in (floor, *LM_TICKS):
        inside = low - margin <= there(tick) <= high + margin
        if inside and all(abs(there(tick) - there(x)) > 0.11 * (high - low) for x in ticks):
            ticks.append(tick)
    axes.set_yticks(ticks, [f"{100 * tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def _colour_bar(figure: "Figure", panels: Sequence["Axes"], report: Mapping[str, Any]) -> None:
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415 - optional dependency
    from matplotlib.colors import BoundaryNorm, ListedColormap  # noqa: PLC0415

    colours = _colours(report)
    n, shades = len(colours), ListedColormap([*colours.values()])
    bar = figure.colorbar(
        ScalarMappable(BoundaryNorm(np.arange(n + 1) - 0.5, n), shades),
        ax=panels,
        location="bottom",
        shrink=min(0.95, 0.08 * n),
        aspect=min(83.0, 7.0 * n),
        pad=0.01,
    )
    bar.set_ticks(list(range(n)), labels=[number(h) for h in colours])
    bar.ax.tick_params(length=0, labelsize=8.5)
    plus, minus = (plain(name) for name in report["classes"][:2])
    bar.set_label(f"feature factor h   (+1: {plus}, −1: {minus})")


def _legend(figure: "Figure", report: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415 - optional dependency

    rules = {choice["rule"] for choice in report["choices"]}
    limit = f"limit, {100 * report['lm_floor']:g} % of the LM score"
    handles = [
        Line2D([], [], color=NEUTRAL, linewidth=1.4, label="base model"),
        Line2D([], [], color=INK, linewidth=1.0, linestyle=DASHES, label=limit),
        *(Line2D([], [], **_mark(r), label=RULES[r][3]) for r in RULES if r in rules),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.4)


DECODER = Drawing("decoder", _decoder, _decoder_figure)
