import copy
import math
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors, image, rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from hf_gradiend import plotting
from hf_gradiend.errors import DataError
from hf_gradiend.evaluation.decoder import EditRule
from hf_gradiend.parameters import layer_of
from hf_gradiend.plotting import (
    benchmarks,
    common,
    decoder,
    encodings,
    energy,
    occupations,
    strengths,
    sweep,
    transfer,
)

NAMES = ["encodings", "transfer", "occupations", "sweep", "decoder", "energy", "strengths"]
CHOSEN_EDIT = (0.1, 0.004)
# Share of the + word by strength, of the first occupation and of the second.
SHARES = {-1.0: (0.9, 0.1), 0.0: (0.8, 0.2), 1.0: (0.6, 0.35), 2.0: (0.4, 0.39)}


def estimate(value: float, n: int) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": n}


def point(h: float, alpha: float, imbalance: float, lm_score: float, mass: float) -> dict:
    return {
        "feature_factor": h,
        "step_size": alpha,
        "imbalance": imbalance,
        "lm_score": lm_score,
        "mass": mass,
        "bpi": mass * lm_score,
    }


def pair(words: str, positive: float, negative: float, kind: str = "feature") -> dict:
    return {"pair": words, "kind": kind, "positive": positive, "negative": negative}


def probabilities(plus: float, minus: float) -> dict:
    return {"p_plus": plus, "p_minus": minus}


def strength_rows(names: list[str], shares: dict) -> list[dict]:
    return [
        {
            "strength": strength,
            "occupations": [
                {"occupation": name, **probabilities(0.3 * share, 0.3 * (1 - share))}
                for name, share in zip(names, by_name, strict=True)
            ],
        }
        for strength, by_name in shares.items()
    ]


def measures(h: float, alpha: float, **changed: object) -> dict:
    """Measures of an edit: balance lies at h = 0.1 and α = 0.004; the LM score falls with |α|."""
    lm_score, away = 0.25 / (1 + 300 * alpha**2), abs(h - 0.1) + abs(alpha - 0.004) / 0.02
    p_plus = 0.1 + 0.05 * math.tanh(100 * h * alpha)
    return {
        "imbalance": 0.46 * away / (0.3 + away),
        "mass": 0.2,
        "p_plus": p_plus,
        "p_minus": 0.2 - p_plus,
        "p_others": [],
        "lm_score": lm_score,
        "bpi": lm_score * (0.2 - 0.1 * min(1.0, away)),
        "fpi": lm_score * p_plus,
        "mpi": lm_score * (0.2 - p_plus),
        "several_class_index": lm_score * min(p_plus, 0.2 - p_plus),
        **changed,
    }


def chosen(criterion: str, rule: str, h: float, alpha: float) -> dict:
    edit = {"feature_factor": h, "step_size": alpha}
    return {"criterion": criterion, "rule": rule, **edit, "chosen_after": measures(h, alpha)}


def grid_of_edits(factors: list[float], step_sizes: list[float]) -> dict:
    return {
        "classes": ["F", "M"],
        "lm_floor": 0.99,
        "before": measures(0.0, 0.0),
        "grid": [
            {"feature_factor": h, "step_size": alpha, **measures(h, alpha)}
            for h in factors
            for alpha in step_sizes
        ],
        "choices": [
            chosen("bpi", "product", 0.5, 0.05),
            chosen("imbalance", "limits", 0.1, 0.0035),
            chosen("fpi", "limits", 1.0, 0.005),
            chosen("fpi", "product", 1.0, 0.05),
        ],
    }


@pytest.fixture
def report() -> dict:
    """A small report whose numbers are simple enough to follow into the figures."""
    base, edited = point(0.0, 0.0, 0.46, 0.25, 0.2), point(*CHOSEN_EDIT, 0.23, 0.2505, 0.16)
    rows = [
        {"occupation": "doctor", "before": (0.1, 0.3), "after": (0.1, 0.15)},
        {"occupation": "nurse", "before": (0.3, 0.1), "after": (0.12, 0.08)},
    ]
    return {
        "base_model": "SmolLM2-135M",
        "objective": "causal",
        "n_selected": 106_202_880,
        "solver": "closed_form",
        "feature_classes": ["F", "M"],
        "feature_words": {"F": ["she"], "M": ["he"]},
        "encoder": {
            "classes": ["F", "M"],
            "splits": {
                "test": {
                    "correlation": estimate(0.982, 7),
                    "encodings": {"F": [0.9, 0.8, 0.95, 0.7], "M": [-0.9, -0.8, -0.6]},
                }
            },
            "neutral": estimate(0.15, 2),
            "neutral_encodings": [0.1, -0.2],
            "transfer": [
                pair("sister/brother", 0.5, -0.2),
                pair("wife/husband", -0.15, 0.77),
                pair("woman/man", 0.6, -0.7),
                pair("red/blue", 0.02, 0.07, "neutral"),
            ],
        },
        "edit": {"feature_factor": 0.1, "step_size": 0.004},
        "before": base,
        "after": edited,
        "occupations": [
            {
                "occupation": row["occupation"],
                "before": probabilities(*row["before"]),
                "after": probabilities(*row["after"]),
            }
            for row in rows
        ],
        "sweep": [
            base,
            point(0.0, 0.004, 0.35, 0.249, 0.17),
            point(0.0, -0.004, 0.6, 0.24, 0.19),
            edited,
            point(0.1, 0.008, 0.2, 0.24, 0.1),
        ],
        "energy": {
            "model.embed_tokens.weight": 1.0,
            "model.layers.0.self_attn.q_proj.weight": 2.0,
            "model.layers.0.mlp.up_proj.weight": 3.0,
            "model.layers.1.mlp.up_proj.weight": 3.5,
            "model.layers.1.input_layernorm.weight": 0.5,
        },
        "strengths": strength_rows(["nurse", "engineer"], SHARES),
        "decoder": grid_of_edits([-1.0, 0.0, 1.0], [-0.05, -0.005, 0.005, 0.05]),
    }


BASE_RESULTS = {
    "stereoset": {"ss": (61.9, 2.0), "lms": (90.3, 1.0), "icat": (68.8, 3.9)},
    "crows_pairs:gender": {
        "shared": (55.8, 2.5),
        "different": (54.2, 2.5),
        "sentence": (50.6, 2.6),
    },
    "winogender": {"correlation": (0.51, 0.1), "rmse": (0.25, 0.02), "share_of_she": (0.49, 0.03)},
    "wikitext2": {"perplexity": (35.9, 0.9)},
}
BETTER_SIDES = {"ss": 50.0, "lms": "high", "icat": "high", "correlation": 0.0, "perplexity": "low"}


def interval(value: float, half: float) -> dict:
    return {"value": value, "low": value - half, "high": value + half, "n": 1508}


def evaluated(base: dict, edited: dict[str, dict[tuple[str, str], tuple[float, str]]]) -> dict:
    """evaluation.json: measures move by a step with a verdict, the others stay."""

    def row(benchmark: str, measure: str, step: float, verdict: str) -> dict:
        value, half = base[benchmark][measure]
        neither = measure in {"rmse", "share_of_she"}
        return {
            "benchmark": benchmark,
            "measure": measure,
            "best": None if neither else BETTER_SIDES.get(measure, 50.0),
            "before": interval(value, half),
            "after": interval(value + step, half),
            "change": interval(step, 0.01 * abs(value)),
            "verdict": "neither is better" if neither else verdict,
        }

    return {
        "base_model": "SmolLM2-135M",
        "limit": None,
        "base": {
            benchmark: {measure: interval(*numbers) for measure, numbers in results.items()}
            for benchmark, results in base.items()
        },
        "edited": [
            {
                "label": label,
                "rows": [
                    row(name, measure, *moved.get((name, measure), (0.0, "cannot be told")))
                    for name, results in base.items()
                    for measure in results
                ],
            }
            for label, moved in edited.items()
        ],
    }


@pytest.fixture
def evaluation() -> dict:
    first = {
        ("stereoset", "ss"): (-6.0, "better"),
        ("stereoset", "lms"): (-2.0, "worse"),
        ("winogender", "rmse"): (0.04, ""),
    }
    second = {**first, ("wikitext2", "perplexity"): (9.0, "worse")}
    return evaluated(BASE_RESULTS, {"adapter at strength 1": first, "at strength 2": second})


def title(figure: Figure) -> str:
    return " ".join(figure.texts[0].get_text().split())


def dots(axes: Axes) -> dict[float, list[float]]:
    """x of all dots of a chart, in drawing order, by row."""
    rows: dict[float, list[float]] = {}
    for collection in axes.collections:
        for x, y in np.asarray(collection.get_offsets()):
            rows.setdefault(float(y), []).append(float(x))
    return rows


def rows_of(axes: Axes) -> list[str]:
    """Labels of the rows of a chart from top to bottom."""
    by_height = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    return [text.get_text() for _, text in sorted(by_height, key=lambda row: row[0])]


def marks(axes: Axes) -> list[tuple[float, str]]:
    return [(text.get_position()[1], text.get_text()) for text in axes.texts]


def without(report: dict, *path: str) -> dict:
    copied = copy.deepcopy(report)
    part = copied
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    return copied


# Files


@pytest.fixture
def no_pixels(monkeypatch):
    """For tests of which files there are: figures are drawn, but their files stay empty."""
    monkeypatch.setattr(Figure, "savefig", lambda _figure, path, **_options: path.touch())


@pytest.mark.parametrize("name", NAMES)
def test_each_figure_is_a_png_that_opens_and_is_not_blank(report, name, tmp_path):
    path = getattr(plotting, f"plot_{name}")(report, str(tmp_path / "figure.png"))

    pixels = image.imread(path)
    assert pixels.shape[1] == 8 * 150
    assert 0.005 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.5  # ink, and white around it
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def test_the_classes_keep_their_colours_in_the_files(report, tmp_path):
    def holds(name: str, colour: str) -> bool:
        pixels = image.imread(tmp_path / f"{name}.png")[..., :3]
        return bool((abs(pixels - np.array(colors.to_rgb(colour))).max(-1) < 0.01).any())

    plotting.plot_transfer(report, tmp_path / "transfer.png")
    plotting.plot_occupations(report, tmp_path / "occupations.png")

    assert holds("transfer", common.PLUS)
    assert holds("transfer", common.MINUS)
    assert not holds("occupations", common.PLUS)  # the control


def test_plot_all_writes_every_figure_into_a_new_folder(report, tmp_path):
    paths = plotting.plot_all(report, tmp_path / "new")

    assert paths == [tmp_path / "new" / f"{name}.png" for name in NAMES]
    assert all(path.is_file() for path in paths)


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize(
    ("missing", "name"),
    [
        (("encoder", "splits", "test"), "encodings"),
        (("encoder", "transfer"), "transfer"),
        (("occupations",), "occupations"),
        (("before",), "occupations"),
        (("sweep",), "sweep"),
        (("decoder",), "decoder"),
        (("decoder", "grid"), "decoder"),
        (("energy",), "energy"),
        (("strengths",), "strengths"),
    ],
)
def test_a_figure_whose_data_is_missing_is_left_out_and_refused_alone(
    report, missing, name, tmp_path
):
    report = without(report, *missing)

    paths = plotting.plot_all(report, tmp_path)

    assert [path.stem for path in paths] == [other for other in NAMES if other != name]
    with pytest.raises(DataError, match=name):
        getattr(plotting, f"plot_{name}")(report, tmp_path / "alone.png")


@pytest.mark.usefixtures("no_pixels")
def test_a_report_without_an_edit_keeps_the_figures_that_need_none(report, tmp_path):
    nothing = {"edit": None, "before": None, "after": None}
    empty = {"occupations": [], "sweep": [], "strengths": []}

    paths = plotting.plot_all({**report, **nothing, **empty}, tmp_path)

    assert [path.stem for path in paths] == ["encodings", "transfer", "decoder", "energy"]


def test_without_matplotlib_the_error_names_the_extra_and_nothing_is_written(
    report, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ImportError, match=r'pip install "hf_gradiend\[plot\]"'):
        plotting.plot_all(report, tmp_path / "folder")

    assert not (tmp_path / "folder").exists()


def test_a_figure_that_fails_leaves_the_old_file_and_nothing_else(report, tmp_path, monkeypatch):
    def savefig(_figure: Figure, path: Path, **_options: object) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("disk full")

    (tmp_path / "energy.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", savefig)

    with pytest.raises(OSError, match="disk full"):
        plotting.plot_energy(report, tmp_path / "energy.png")

    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_the_users_settings_neither_show_in_a_figure_nor_change(report, tmp_path):
    plain = plotting.plot_energy(report, tmp_path / "plain.png").read_bytes()

    with rc_context({"axes.facecolor": "black", "font.size": 20.0}):
        before = dict(rcParams)
        dark = plotting.plot_energy(report, tmp_path / "dark.png").read_bytes()
        assert dict(rcParams) == before

    assert dark == plain


def test_a_word_with_dollar_signs_is_no_formula(report, tmp_path):
    report["feature_words"]["F"] = [r"$\nosuch$"]

    assert plotting.plot_encodings(report, tmp_path / "figure.png").is_file()
    with pytest.raises(ValueError, match="nosuch"):  # the control: matplotlib would read one
        Figure().text(0, 0, r"$\nosuch$").get_window_extent()


# Encodings


def test_encodings_are_drawn_at_their_values_one_row_per_group(report):
    figure = encodings._encodings_figure(report)

    (axes,) = figure.axes
    points = dots(axes)
    by_row = [
        sorted(x for y, xs in points.items() if -row - 0.5 < y < -row for x in xs)
        for row in range(3)
    ]
    assert by_row == [
        pytest.approx([0.7, 0.8, 0.9, 0.95]),
        pytest.approx([-0.2, 0.1]),
        pytest.approx([-0.9, -0.8, -0.6]),
    ]
    assert rows_of(axes) == ["M (“he”)\nn = 3", "neutral tokens\nn = 2", "F (“she”)\nn = 4"]


def test_the_title_of_the_encodings_has_the_correlation_and_n(report):
    report["encoder"]["splits"]["test"]["correlation"] = estimate(-0.1234, 1500)

    figure = encodings._encodings_figure(report)

    assert (
        title(figure) == "Encodings of “she” and “he” correlate −0.123 with their class (n = 1,500)"
    )


def test_a_class_of_several_words_goes_by_its_name(report):
    report["feature_words"]["F"] = ["she", "her"]

    figure = encodings._encodings_figure(report)

    assert title(figure).startswith("Encodings of F and “he” correlate 0.982")


# Transfer


def test_the_transfer_title_counts_the_pairs_in_the_right_order(report):
    assert title(transfer._transfer_figure(report)) == (
        "2 of 3 word pairs never trained on are read in the right order"
    )


def test_transfer_pairs_stand_by_falling_gap_with_neutral_ones_below(report):
    (axes,) = transfer._transfer_figure(report).axes

    assert rows_of(axes) == ["woman / man", "sister / brother", "wife / husband", "red / blue"]
    assert axes.yaxis_inverted()
    assert list(dots(axes).values()) == [[-0.7, 0.6], [-0.2, 0.5], [0.77, -0.15], [0.07, 0.02]]
    assert sorted(dots(axes))[3] > 3  # apart from the others


def test_the_pair_in_the_wrong_order_is_marked_and_only_that_one(report):
    (axes,) = transfer._transfer_figure(report).axes
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]

    assert marks(axes) == [(2, "wrong order")]
    assert [list(line.get_ydata()) for line in dashed] == [[2, 2]]

    report["encoder"]["transfer"][1] = pair("wife/husband", 0.1, 0.0)
    (control,) = transfer._transfer_figure(report).axes
    assert marks(control) == []


def test_a_neutral_pair_has_no_wrong_order_and_is_grey(report):
    (axes,) = transfer._transfer_figure(report).axes

    assert (
        report["encoder"]["transfer"][3]["positive"] < report["encoder"]["transfer"][3]["negative"]
    )
    assert [text for y, text in marks(axes) if y > 3] == []
    faces = [colors.to_hex(rgba).upper() for rgba in axes.collections[-1].get_facecolor()]
    assert faces == [common.NEUTRAL, common.NEUTRAL]
    faces = [colors.to_hex(rgba).upper() for rgba in axes.collections[0].get_facecolor()]
    assert faces == [common.MINUS, common.PLUS]


def test_a_pair_that_could_not_be_read_is_left_out(report):
    report["encoder"]["transfer"].append(pair("queen/king", math.nan, -0.5))

    figure = transfer._transfer_figure(report)

    assert title(figure).startswith("2 of 3 ")
    assert "queen / king" not in rows_of(figure.axes[0])


# Occupations


def test_occupations_show_the_share_of_the_plus_word_before_and_after(report):
    (axes,) = occupations._occupations_figure(report).axes

    assert rows_of(axes) == ["nurse", "doctor"]
    # nurse 0.3 / 0.4 → 0.12 / 0.2, doctor 0.1 / 0.4 → 0.1 / 0.25
    assert dots(axes) == {0: pytest.approx([75, 60]), 1: pytest.approx([25, 40])}
    faces = [colors.to_hex(rgba).upper() for rgba in axes.collections[0].get_facecolor()]
    assert faces == [common.BEFORE, common.AFTER]
    assert axes.get_xlabel() == "P(“she”) / (P(“she”) + P(“he”))"
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [
        [50, 50]
    ]


@pytest.mark.parametrize(
    ("after", "words"), [(0.23, "falls from 0.46 to 0.23"), (0.5, "rises from")]
)
def test_the_occupations_title_says_what_the_edit_did(report, after, words):
    report["after"]["imbalance"] = after

    assert words in title(occupations._occupations_figure(report))


def test_without_an_edit_only_the_base_model_is_drawn(report):
    report["edit"] = report["after"] = None
    for row in report["occupations"]:
        row["after"] = None

    figure = occupations._occupations_figure(report)

    assert dots(figure.axes[0]) == {0: pytest.approx([75]), 1: pytest.approx([25])}
    assert title(figure) == "Imbalance between “she” and “he” for occupations is 0.46"


# Sweep


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): list(zip(*np.asarray(line.get_data()), strict=True))
        for line in axes.lines
    }


def test_every_line_of_the_sweep_starts_from_the_base_model(report):
    imbalance, *_ = sweep._sweep_figure(report).axes

    drawn = lines(imbalance)
    # The base model is listed under h = 0 alone; a negative step stands on its left.
    assert drawn["h = 0"] == [(-0.004, 0.6), (0.0, 0.46), (0.004, 0.35)]
    assert drawn["h = 0.1"] == [(0.0, 0.46), (0.004, 0.23), (0.008, 0.2)]


def test_lm_score_and_mass_are_relative_to_the_base_model_with_their_limits(report):
    _, lm_score, _, mass = sweep._sweep_figure(report).axes

    expected = {lm_score: ([1, 1.002, 0.96], 0.99), mass: ([1, 0.8, 0.5], 0.75)}
    for axes, (values, limit) in expected.items():
        assert [y for _, y in lines(axes)["h = 0.1"]] == pytest.approx(values)
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [list(line.get_ydata()) for line in dashed] == [[limit, limit]]


def test_the_limits_drawn_are_the_default_limits_of_the_choice():
    rule = EditRule()
    drawn = {measure: limit for measure, _, limit in sweep.SWEEP_PANELS if limit is not None}

    assert drawn == {"lm_score": rule.lm_floor, "mass": rule.mass_floor}


def test_the_chosen_edit_is_marked_where_it_was_measured(report):
    figure = sweep._sweep_figure(report)

    marked = [lines(axes)["chosen edit"] for axes in figure.axes]
    expected = [0.23, 0.2505 / 0.25, 0.16 * 0.2505, 0.16 / 0.2]
    assert marked == [[pytest.approx((0.004, value))] for value in expected]
    assert title(figure) == "The edit takes imbalance from 0.46 to 0.23 at 100.2 % of the LM score"


def test_a_sweep_without_a_chosen_edit_says_so_and_marks_none(report):
    report["edit"] = report["after"] = None

    figure = sweep._sweep_figure(report)

    assert title(figure) == "No edit within the limits is better than the base model"
    assert not any("chosen edit" in lines(axes) for axes in figure.axes)


# Decoder


def drawn_panels(figure: Figure) -> dict[str, Axes]:
    """Panels by the title on their left."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


DECODER_PANELS = {
    "imbalance (0 is balanced)": "imbalance",
    "LM score, % of the base model’s": "lm_score",
    "mean probability of F": "p_plus",
    "mean probability of M": "p_minus",
    "balanced index BPI": "bpi",
    "mean probability of F or M": "mass",
    "F index FPI": "fpi",
    "M index MPI": "mpi",
}


def test_every_line_of_the_grid_has_its_values_and_goes_through_the_base_model(report):
    panels = drawn_panels(decoder._decoder_figure(report))

    assert list(panels) == list(DECODER_PANELS)
    for title_of_panel, measure in DECODER_PANELS.items():
        drawn = lines(panels[title_of_panel])
        unit = 0.25 if measure == "lm_score" else 1.0
        for h in (-1.0, 0.0, 1.0):
            assert drawn[f"h = {common.number(h)}"] == [
                (alpha, pytest.approx(measures(h if alpha else 0.0, alpha)[measure] / unit))
                for alpha in (-0.05, -0.005, 0.0, 0.005, 0.05)
            ]
        flat = [line for line in panels[title_of_panel].lines if line.get_color() == common.NEUTRAL]
        assert [list(line.get_ydata()) for line in flat] == [
            [measures(0.0, 0.0)[measure] / unit] * 2
        ]


def test_an_index_marks_its_own_choices_and_the_lm_score_all_with_the_limit(report):
    figure = decoder._decoder_figure(report)
    panels = drawn_panels(figure)

    def marked(title_of_panel: str) -> dict[str, tuple[str, list]]:
        axes = panels[title_of_panel]
        return {
            str(line.get_label()): (line.get_marker(), [*line.get_xdata(), *line.get_ydata()])
            for line in axes.lines
            if line.get_color() == decoder.PICK
        }

    # The edits were refined beside the grid: 0.0035 is not in it.
    assert marked("imbalance (0 is balanced)") == {
        "imbalance, limits": ("*", [0.0035, measures(0.1, 0.0035)["imbalance"]])
    }
    assert marked("F index FPI").keys() == {"fpi, limits", "fpi, product"}
    assert marked("M index MPI") == {}
    lm_score = marked("LM score, % of the base model’s")
    assert lm_score["bpi, product"] == ("D", [0.05, pytest.approx(1 / 1.75)])
    assert len(lm_score) == 4
    axes = panels["LM score, % of the base model’s"]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[0.99, 0.99]]
    assert "99" in [text.get_text() for text in axes.get_yticklabels()]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "base model",
        "limit, 99 % of the LM score",
        "chosen within the limits",
        "chosen by the product rule",
    ]


def test_chosen_edits_stand_beside_the_titles_once_for_both_rules(report):
    report["decoder"]["choices"].append(chosen("bpi", "limits", 0.5, 0.05))
    panels = drawn_panels(decoder._decoder_figure(report))

    beside = {name: axes.get_title(loc="right") for name, axes in panels.items()}
    assert beside["balanced index BPI"] == "◆★ h = 0.5, α = 0.05"
    assert beside["F index FPI"] == "★ h = 1, α = 0.005\n◆ h = 1, α = 0.05"
    assert beside["mean probability of F"] == ""


def test_choices_on_the_grid_need_no_measures_of_their_own(report):
    choice = {"criterion": "imbalance", "rule": "limits", "feature_factor": 0.0, "step_size": 0.005}
    report["decoder"]["choices"] = [choice]

    figure = decoder._decoder_figure(report)

    marked = lines(drawn_panels(figure)["imbalance (0 is balanced)"])["imbalance, limits"]
    assert marked == [(0.005, measures(0.0, 0.005)["imbalance"])]


def test_the_title_of_the_grid_tells_the_balanced_edit_on_texts_it_was_not_chosen_on(report):
    assert title(decoder._decoder_figure(report)) == (
        "Imbalance falls from 0.23 to 0.0354 at 99.6 % of the LM score"
    )

    grid = report["decoder"]
    grid["judged_before"] = measures(0.0, 0.0, imbalance=0.5)
    grid["choices"][1]["judged_after"] = measures(0.0, 0.0, imbalance=0.25, lm_score=0.245)
    assert title(decoder._decoder_figure(report)) == (
        "Imbalance falls from 0.5 to 0.25 on other texts at 98.0 % of the LM score"
    )

    grid["choices"] = []
    assert title(decoder._decoder_figure(report)).startswith("No edit of the grid")


def test_a_grid_alone_is_drawn_like_one_in_a_report(report):
    inside, alone = (
        drawn_panels(decoder._decoder_figure(part)) for part in (report, report["decoder"])
    )

    assert inside.keys() == alone.keys()
    assert all(lines(inside[name]) == lines(alone[name]) for name in inside)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_index_of_several_classes_has_a_panel_where_there_are_more_than_two(report, classes):
    report["decoder"]["before"]["p_others"] = [0.1] * (classes - 2)

    panels = drawn_panels(decoder._decoder_figure(report))

    assert ("several-class index" in panels) == (classes == 3)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ([-1.0, 0.0, 1.0], [decoder.RAMP[0], common.INK, decoder.RAMP[-1]]),
        ([-1.0, -0.5, 0.0, 0.1, 1.0], [*decoder.RAMP]),  # even steps on each side, whatever h is
        ([0.0, 0.1], [common.INK, decoder.RAMP[-1]]),
        ([0.0], [common.INK]),
    ],
)
def test_the_colours_of_h_run_from_class_to_class_over_dark_at_0(factors, expected):
    colours = decoder._colours(grid_of_edits(factors, [0.01]))

    assert list(colours) == factors
    assert [np.array(colours[h]) for h in factors] == [
        pytest.approx(np.array(colors.to_rgb(colour)), abs=0.01) for colour in expected
    ]


@pytest.mark.parametrize(
    ("step_sizes", "labels"),
    [
        ([-0.05, -0.005, 0.005, 0.05], ["−0.05", "−0.005", "0", "0.005", "0.05"]),
        ([0.001, 0.002, 0.02], ["0", "0.001", "0.01"]),
        ([-0.004], ["−0.004", "0"]),
        ([0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.5], ["0", "10⁻⁵", "0.001", "0.1"]),
        ([2e-5, 8e-5], ["0", "2·10⁻⁵", "8·10⁻⁵"]),
    ],
)
def test_step_sizes_are_labelled_at_powers_of_ten_or_at_their_ends(step_sizes, labels):
    grid = grid_of_edits([0.0, 0.1], step_sizes)
    grid["choices"] = []

    axes = drawn_panels(decoder._decoder_figure(grid))["balanced index BPI"]

    assert [text.get_text() for text in axes.get_xticklabels()] == labels
    low, high = axes.get_xlim()
    assert low < min(0.0, *step_sizes, 0.0) <= max(0.0, *step_sizes, 0.0) < high


def texts_of(axes: Axes) -> list[Text]:
    """Texts that are drawn: matplotlib also keeps labels of ticks outside the axes."""
    shown = [axes._left_title, axes._right_title, *axes.texts, axes.xaxis.label]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        shown += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return shown if axes.axison else []


def assert_legible(figure: Figure) -> None:
    """No text leaves the figure, and no two of them overlap."""
    figure.draw_without_rendering()
    texts = [*figure.texts, *(text for axes in figure.axes for text in texts_of(axes))]
    texts += [text for legend in figure.findobj(Legend) for text in legend.get_texts()]
    boxes = {text: text.get_window_extent() for text in texts if text.get_text()}
    assert len(boxes) > 20
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, box), (other, another) in combinations(boxes.items(), 2):
        overlap = Bbox.intersection(box, another)
        # By more than a pixel: the boxes of neighbouring lines of text touch.
        assert overlap is None or min(overlap.width, overlap.height) < 1.0, (one, other)


FIFTEEN = [-1.0, -0.8, -0.6, -0.4, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
EIGHT = [4.37e-4 * 2.0**k for k in range(8)]


@pytest.mark.parametrize(
    ("factors", "step_sizes"),
    [
        (FIFTEEN, [*(-alpha for alpha in EIGHT), *EIGHT]),
        ([-1.0, 0.0, 1.0], [-2e-4, -4.37e-5, 4.37e-5, 2e-4]),
        ([0.1], [0.004]),
    ],
)
def test_large_and_small_grids_are_legible(factors, step_sizes):
    grid = grid_of_edits(factors, step_sizes)
    largest = max(step_sizes)
    grid["choices"] = [
        chosen(criterion, rule, h, alpha)
        for criterion in ("imbalance", "bpi", "fpi", "mpi")
        for rule, h, alpha in (("limits", -0.15, -largest / 2), ("product", 0.15, largest))
    ]

    with common.our_style():
        figure = decoder._decoder_figure(grid)
        assert_legible(figure)

    bar = figure.axes[-1]
    labels = [text.get_text() for text in bar.get_xticklabels()]
    assert labels == [common.number(h) for h in factors]


def test_a_measure_that_an_edit_broke_is_a_gap(report):
    report["decoder"]["grid"][0]["lm_score"] = None

    axes = drawn_panels(decoder._decoder_figure(report))["LM score, % of the base model’s"]

    (first, *others) = (y for _, y in lines(axes)["h = −1"])
    assert math.isnan(first)
    assert not any(map(math.isnan, others))


def test_edits_that_change_nothing_can_be_drawn(report, tmp_path):
    grid = report["decoder"]
    grid.update(choices=[], lm_floor=1.0)
    grid["grid"] = [{**row, **measures(0.0, 0.0)} for row in grid["grid"]]

    assert plotting.plot_decoder(grid, tmp_path / "figure.png").is_file()


# Benchmarks


def verdict_marks(axes: Axes) -> list[tuple[float, float, str, str, bool]]:
    """Height, value, marker, colour and whether it is filled, from top to bottom."""
    found = [
        (
            float(np.asarray(line.get_ydata())[0]),
            float(np.asarray(line.get_xdata())[0]),
            str(line.get_marker()),
            str(line.get_color()),
            line.get_markerfacecolor() == line.get_color(),
        )
        for line in axes.lines
        if line.get_marker() != "None"
    ]
    return sorted(found)


def intervals_of(axes: Axes) -> list[tuple[float, float]]:
    """Ends of the intervals from top to bottom."""
    found = {
        float(np.asarray(line.get_ydata())[0]): tuple(map(float, line.get_xdata()))
        for line in axes.lines
        if line.get_marker() == "None" and line.get_linestyle() == "-"
    }
    return [found[y] for y in sorted(found)]


def ideals_of(axes: Axes) -> list[tuple[list, list]]:
    return [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
        if line.get_linestyle() == "--"
    ]


@pytest.mark.parametrize("n_edited", [0, 1, 2])
def test_every_value_of_the_benchmarks_stands_in_its_panel_with_its_interval(evaluation, n_edited):
    evaluation["edited"] = evaluation["edited"][:n_edited]
    panels = drawn_panels(benchmarks._figure(evaluation))

    assert list(panels) == ["StereoSet", "CrowS-Pairs: gender", "Winogender", "WikiText-2"]
    for (name, results), axes in zip(evaluation["base"].items(), panels.values(), strict=True):
        expected = []
        for measure, before in results.items():
            afters = [
                row["after"]
                for edit in evaluation["edited"]
                for row in edit["rows"]
                if (row["benchmark"], row["measure"]) == (name, measure)
            ]
            expected += [before, *afters]
        assert [mark[1] for mark in verdict_marks(axes)] == [e["value"] for e in expected]
        assert intervals_of(axes) == [(e["low"], e["high"]) for e in expected]
        assert axes.yaxis_inverted()


def test_the_base_model_is_grey_and_a_verdict_is_told_by_fill_colour_and_word(evaluation):
    axes = drawn_panels(benchmarks._figure(evaluation))["StereoSet"]

    looks = [mark[2:] for mark in verdict_marks(axes)]
    base, undecided = ("o", common.NEUTRAL, True), (common.INK, False)
    assert looks == [
        base, ("s", common.AFTER, True), ("D", common.AFTER, True),
        base, ("s", common.MINUS, True), ("D", common.MINUS, True),
        base, ("s", *undecided), ("D", *undecided),
    ]  # fmt: skip
    heights = [mark[0] for mark in verdict_marks(axes)]
    words = [(heights[i], word) for i, word in ((1, "better"), (2, "better"))]
    words += [(heights[i], word) for i, word in ((4, "worse"), (5, "worse"))]
    assert marks(axes) == words
    assert rows_of(axes) == [
        "stereotype score SS",
        "LM score LMS\nhigher is better",
        "both in one, ICAT\nhigher is better",
    ]


def test_a_told_change_without_a_better_side_is_said_to_be_a_change(evaluation):
    axes = drawn_panels(benchmarks._figure(evaluation))["Winogender"]

    # RMSE moved by 0.04 with an interval of 0.01; the mean share did not.
    assert [word for _, word in marks(axes)] == ["changed", "changed"]
    assert verdict_marks(axes)[4][3:] == (common.INK, True)
    assert verdict_marks(axes)[7][3:] == (common.INK, False)


@pytest.mark.parametrize("n_edited", [0, 2])
def test_ideal_values_are_dashed_lines_over_the_measures_that_have_them(evaluation, n_edited):
    # Without an edited model the report does not say them; the benchmarks do.
    evaluation["edited"] = evaluation["edited"][:n_edited]
    panels = drawn_panels(benchmarks._figure(evaluation))

    assert {name: ideals_of(axes) for name, axes in panels.items()} == {
        "StereoSet": [([50, 50], [-0.5, 0.5])],
        "CrowS-Pairs: gender": [([50, 50], [-0.5, 2.5])],
        "Winogender": [([0, 0], [-0.5, 0.5])],
        "WikiText-2": [],
    }
    assert rows_of(panels["WikiText-2"]) == ["perplexity\nlower is better"]


def test_the_legend_names_the_models_and_only_what_occurs(evaluation):
    def words() -> list[str]:
        legends = benchmarks._figure(evaluation).axes[0].findobj(Legend)
        return sorted({text.get_text() for legend in legends for text in legend.get_texts()})

    assert words() == sorted(
        [
            "SmolLM2-135M (base model)", "adapter at strength 1", "at strength 2",
            "better than the base model", "worse", "cannot be told apart",
            "changed; neither side is better", "ideal value",
        ]
    )  # fmt: skip
    evaluation["edited"] = []
    assert words() == ["SmolLM2-135M (base model)", "ideal value"]
    evaluation["base"] = {"wikitext2": evaluation["base"]["wikitext2"]}
    assert words() == ["SmolLM2-135M (base model)"]


def test_the_title_of_the_benchmarks_counts_what_is_told(evaluation):
    assert title(benchmarks._figure(evaluation)) == (
        "2 edited models: 1 of 8 measures better, 1 to 2 worse"
    )
    evaluation["edited"] = evaluation["edited"][:1]
    assert title(benchmarks._figure(evaluation)) == (
        "adapter at strength 1: 1 of 8 measures better, 1 worse"
    )
    evaluation["edited"] = []
    # ss, shared, different and the correlation; the scoring of whole sentences is at 50.6 ± 2.6.
    assert title(benchmarks._figure(evaluation)) == (
        "SmolLM2-135M is off the ideal value in 4 of 5 measures"
    )
    evaluation["base"] = {"wikitext2": evaluation["base"]["wikitext2"]}
    assert title(benchmarks._figure(evaluation)) == "SmolLM2-135M on WikiText-2"


def test_a_quick_look_says_so(evaluation):
    evaluation["limit"] = 1000

    assert "at most 1,000 items of each" in benchmarks._figure(evaluation).texts[1].get_text()


def test_measures_of_very_different_size_have_panels_of_their_own():
    base = {"own": {"accuracy": (0.6, 0.05), "perplexity": (35.9, 0.9), "f_1": (0.5, 0.05)}}

    panels = [axes for axes in benchmarks._figure(evaluated(base, {})).axes if axes.axison]

    assert [axes.get_title(loc="left") for axes in panels] == ["own", "own"]
    assert [rows_of(axes) for axes in panels] == [["accuracy", "f 1"], ["perplexity"]]


def many(n_edited: int) -> dict:
    """All benchmarks and three parts of them, with verdicts here and there."""
    base = {
        **BASE_RESULTS,
        "winobias": {"gap": (16.3, 5), "gap_type1": (4.3, 7), "gap_type2": (28.3, 7)},
        "bec_pro": {f"{who}_professions": (0.5, 0.1) for who in ("female", "male", "balanced")},
        "seat": {f"d_{test}": (1.2, 0.4) for test in ("6", "6b", "7", "7b", "8", "8b")},
    }
    base |= {f"{name}:race": base[name] for name in ("stereoset", "winogender", "seat")}
    keys = [(name, measure) for name, results in base.items() for measure in results]
    edited = {
        f"outputs/smollm2-gender-adapter at strength {k}": {
            key: (0.1 * k, ("better", "worse", "cannot be told")[(i * k) % 3])
            for i, key in enumerate(keys)
        }
        for k in range(1, n_edited + 1)
    }
    return evaluated(base, edited)


@pytest.mark.parametrize("n_edited", [0, 1, 6])
def test_ten_benchmarks_of_up_to_seven_models_are_legible(n_edited):
    with common.our_style():
        figure = benchmarks._figure(many(n_edited))
        assert_legible(figure)

    assert len(drawn_panels(figure)) == 10


@pytest.mark.parametrize("n_edited", [0, 2])
def test_the_benchmarks_are_written_also_where_there_is_one_measure(evaluation, n_edited, tmp_path):
    evaluation = evaluated({"wikitext2": BASE_RESULTS["wikitext2"]}, {"a": {}, "b": {}})
    evaluation["edited"] = evaluation["edited"][:n_edited]

    path = plotting.plot_benchmarks(evaluation, tmp_path / "evaluation.png")

    pixels = image.imread(path)
    assert pixels.shape[1] == 8 * 150
    assert 0.005 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.png"]


def test_no_benchmark_has_no_figure(evaluation, tmp_path):
    with pytest.raises(DataError, match="benchmarks"):
        plotting.plot_benchmarks({**evaluation, "base": {}}, tmp_path / "evaluation.png")


def test_every_published_measure_has_a_name_for_people():
    for name, benchmark in benchmarks.BENCHMARKS.items():
        assert {measure.name for measure in benchmark.measures} == benchmarks.WORDS[name][2].keys()


# Energy


def test_energy_shares_sum_to_one(report):
    shares = energy._energy_shares(report)

    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares == {
        (None, "other"): pytest.approx(0.1),
        (0, "attention"): pytest.approx(0.2),
        (0, "MLP"): pytest.approx(0.3),
        (1, "MLP"): pytest.approx(0.35),
        (1, "norm"): pytest.approx(0.05),
    }


def test_the_bars_of_a_layer_are_stacked_to_its_share(report):
    figure = energy._energy_figure(report)

    tops: dict[float, float] = {}
    for bar in figure.axes[0].patches:
        centre = round(bar.get_x() + bar.get_width() / 2)
        tops[centre] = max(tops.get(centre, 0.0), bar.get_y() + bar.get_height())
    # Layers 0 and 1, and the weights outside the layers apart from them.
    assert tops == {0: pytest.approx(50), 1: pytest.approx(40), 3: pytest.approx(10)}
    assert (
        title(figure) == "MLP weights hold 65 % of the decoder’s energy; layer 0 alone holds 50 %"
    )


def test_an_energy_of_zero_everywhere_has_no_shares(report):
    report["energy"] = dict.fromkeys(report["energy"], 0.0)

    assert energy._energy_shares(report) == {}


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "attention"),
        ("model.layers.3.post_attention_layernorm.weight", 3, "norm"),
        ("model.layers.3.self_attn.q_norm.weight", 3, "norm"),
        ("model.layers.7.mlp.experts.5.down_proj.weight", 7, "MLP"),
        ("model.norm.weight", None, "norm"),
        ("bert.encoder.layer.0.attention.self.query.weight", 0, "attention"),
        ("bert.encoder.layer.0.attention.output.dense.bias", 0, "attention"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", 0, "norm"),
        ("bert.encoder.layer.11.intermediate.dense.weight", 11, "MLP"),
        ("bert.encoder.layer.11.output.dense.weight", 11, "MLP"),
        ("bert.embeddings.word_embeddings.weight", None, "other"),
        ("transformer.h.0.mlp.c_fc.weight", 0, "MLP"),
        ("transformer.h.10.attn.c_attn.weight", 10, "attention"),
        ("transformer.h.1.ln_1.weight", 1, "norm"),
        ("transformer.wte.weight", None, "other"),
        ("model.decoder.layers.2.fc1.weight", 2, "MLP"),
        ("encoder.block.4.layer.1.DenseReluDense.wi.weight", 4, "MLP"),
        ("backbone.layers.6.mixer.in_proj.weight", 6, "other"),
    ],
)
def test_a_weights_layer_and_kind_are_read_from_its_name(name, layer, kind):
    assert (layer_of(name), energy._kind_of(name)) == (layer, kind)


# Strengths


def curves(axes: Axes) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """Name, colour and points of each line, in the order in which they were drawn."""
    drawn = [line for line in axes.lines if not line.get_clip_on()]
    found = []
    for line, leader, text in zip(drawn[::2], drawn[1::2], axes.texts, strict=True):
        # The thin line leads from the end of the line to its name.
        assert list(leader.get_ydata()) == [line.get_ydata()[-1], text.get_position()[1]]
        assert line.get_color() == leader.get_color() == text.get_color()
        points = list(zip(*np.asarray(line.get_data()).tolist(), strict=True))
        found.append((text.get_text(), line.get_color(), points))
    return found


def test_each_occupation_has_a_line_of_its_shares_in_the_colour_of_its_group(report):
    (axes,) = strengths._strengths_figure(report).axes

    nurse, engineer = (
        [(strength, pytest.approx(shares[i])) for strength, shares in SHARES.items()]
        for i in range(2)
    )
    assert curves(axes) == [
        ("nurse", common.PLUS, nurse),
        ("engineer", common.MINUS, engineer),
    ]
    assert axes.get_ylabel() == "P(“she”) / (P(“she”) + P(“he”))"
    assert axes.get_ylim() == (0, 1)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "occupations mostly held by women",
        "mostly held by men",
    ]
    assert [handle.get_color() for handle in legend.legend_handles] == [common.PLUS, common.MINUS]


def test_the_groups_keep_their_pronouns_colours_where_he_is_the_plus_word(report):
    report["feature_words"] = {"F": ["he"], "M": ["she"]}

    (axes,) = strengths._strengths_figure(report).axes

    assert [colour for _, colour, _ in curves(axes)] == [common.MINUS, common.PLUS]


def test_base_model_chosen_edit_and_balance_are_marked(report):
    (axes,) = strengths._strengths_figure(report).axes

    vertical = [line.get_xdata() for line in axes.lines if list(line.get_ydata()) == [0, 1]]
    assert [list(xs) for xs in vertical] == [[0, 0], [1, 1]]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[0.5, 0.5]]
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == ["−1", "0\nbase model", "1\nchosen edit", "2"]
    assert axes.get_yticklabels()[2].get_text() == "balance 0.5"


@pytest.mark.parametrize(
    ("edited", "words"),
    [((0.6, 0.35), "narrows shares of “she” from 0.20–0.80 to 0.35–0.60"), ((0.9, 0.1), "widens")],
)
def test_the_title_of_the_strengths_says_how_far_the_shares_lie_apart(report, edited, words):
    report["strengths"] = strength_rows(["nurse", "engineer"], {**SHARES, 1.0: edited})

    assert words in title(strengths._strengths_figure(report))


def test_strengths_in_another_order_make_the_same_lines(report):
    (axes,) = strengths._strengths_figure(report).axes
    report["strengths"] = report["strengths"][::-1]
    (reversed_axes,) = strengths._strengths_figure(report).axes

    assert curves(reversed_axes) == curves(axes)


@pytest.mark.parametrize("missing", [0.0, 1.0])
def test_strengths_without_base_model_or_chosen_edit_have_no_figure(report, missing, tmp_path):
    report["strengths"] = [row for row in report["strengths"] if row["strength"] != missing]

    with pytest.raises(DataError, match="strengths"):
        plotting.plot_strengths(report, tmp_path / "alone.png")


def test_strengths_without_an_edit_have_no_figure(report, tmp_path):
    report["edit"] = None

    with pytest.raises(DataError, match="strengths"):
        plotting.plot_strengths(report, tmp_path / "alone.png")


@pytest.mark.parametrize("end", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n", [10, 40])
def test_names_of_lines_that_end_together_neither_overlap_nor_leave_the_figure(report, end, n):
    names = [f"chief executive {i}" for i in range(n)]
    report["strengths"] = strength_rows(names, dict.fromkeys(SHARES, [end] * n))

    figure = strengths._strengths_figure(report)

    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == n
    assert all(figure.bbox.containsx(x) for box in boxes for x in box.intervalx)
    assert all(figure.bbox.containsy(y) for box in boxes for y in box.intervaly)
    boxes.sort(key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([0.2, 0.8, 0.5], [0.2, 0.8, 0.5]),  # far enough apart: none moves
        ([0.5, 0.45], [0.525, 0.425]),  # both move by half of what is missing, in their order
        ([0.0, 0.04, 0.9], [0.0, 0.1, 0.9]),  # none leaves the axes
        ([0.98, 1.0, 0.99], [0.8, 1.0, 0.9]),
        ([0.5], [0.5]),
    ],
)
def test_names_are_moved_as_little_as_they_must(values, spread):
    assert strengths._spread(values, 0.1) == pytest.approx(spread)


# Features side by side


def reading(feature: str, dataset: str, own: bool, r: float | None, gap: float) -> dict:
    found = None if r is None else {"value": r, "low": r - 0.05, "high": r + 0.04, "n": 48}
    return {
        "feature": feature, "dataset": dataset, "classes": [f"{dataset}+", f"{dataset}-"],
        "own": own, "correlation": found, "gap": gap, "mean_absolute": 0.5, "n": 1048,
    }  # fmt: skip


def side_by_side(names: list[str], n_read: int | None = None) -> dict:
    """features.json: cosine of i and j is −0.1·(i + j), overlap 0.01·(i + j); each reads all."""
    n = len(names)

    def matrix(step: float, diagonal: float) -> list[list[float]]:
        return [[diagonal if i == j else step * (i + j) for j in range(n)] for i in range(n)]

    return {
        "base_model": "SmolLM2-135M",
        "features": [
            {
                "name": name, "classes": [f"{name}+", f"{name}-"], "n_selected": 1000 + i,
                "energy_by_layer": {"0": 0.2, "1": 0.5 - 0.01 * i, "outside": 0.3 + 0.01 * i},
            }
            for i, name in enumerate(names)
        ],
        "encoder_cosines": matrix(0.04, 1.0),
        "decoder_cosines": matrix(-0.04, 1.0),
        "top_k": 0.01,
        "overlaps": matrix(0.01, 1.0),
        "chance_overlaps": [[0.01] * n for _ in names],
        "readings": [
            reading(one, other, one == other, 0.9 if one == other else -0.2,
                    1.6 if one == other else -0.01)
            for one in names
            for other in names[:n_read]
        ],
    }  # fmt: skip


def cells(axes: Axes) -> list[list[str]]:
    """Texts of a heat map by row and column, the smaller ones below the larger."""
    n_rows, n_columns = axes.collections[0].get_array().shape
    found = [[""] * n_columns for _ in range(n_rows)]
    for text in axes.texts:
        if text.get_ha() == "center":  # the others are beside the cells
            column, row = (round(place) for place in text.get_position())
            found[row][column] = f"{found[row][column]}\n{text.get_text()}".strip()
    return found


def colour_of(axes: Axes, row: int, column: int) -> tuple[float, ...]:
    mesh = axes.collections[0]
    return tuple(mesh.to_rgba(mesh.get_array())[row, column])


def test_every_number_of_the_comparison_stands_in_its_cell():
    report = side_by_side(["a", "b", "c"])
    report["readings"][1] = reading("a", "b", False, None, 0.0)

    readings, encoders, decoders, overlaps, _ = plotting.features._features_figure(report).axes

    assert cells(readings) == [
        ["0.90\n0.85 to 0.94\ngap 1.60", "–", "−0.20\n−0.25 to −0.16\ngap −0.01"],
        ["−0.20\n−0.25 to −0.16\ngap −0.01", "0.90\n0.85 to 0.94\ngap 1.60",
         "−0.20\n−0.25 to −0.16\ngap −0.01"],
        ["−0.20\n−0.25 to −0.16\ngap −0.01", "−0.20\n−0.25 to −0.16\ngap −0.01",
         "0.90\n0.85 to 0.94\ngap 1.60"],
    ]  # fmt: skip
    assert cells(encoders) == [
        ["1.00", "0.04", "0.08"], ["0.04", "1.00", "0.12"], ["0.08", "0.12", "1.00"]
    ]  # fmt: skip
    assert cells(decoders)[2] == ["−0.08", "−0.12", "1.00"]
    assert cells(overlaps)[1] == ["1.0", "100", "3.0"]
    assert overlaps.get_title("right") == "chance 1.0"
    assert overlaps.get_title("left") == "top 1 % of $|W_d|$ shared (%)"
    assert rows_of(readings) == rows_of(overlaps) == ["a", "b", "c"]
    labels = [text.get_text() for text in readings.get_xticklabels()]
    assert labels[0] == "a (n = 1,048)\na+ against a-"
    assert "h is constant" in readings.get_title("right")


def test_positive_is_blue_negative_vermilion_and_what_says_nothing_grey():
    report = side_by_side(["a", "b"])
    for key, value in (("encoder_cosines", 1.0), ("decoder_cosines", -1.0)):
        report[key][0][1] = report[key][1][0] = value

    _, encoders, decoders, *_ = plotting.features._features_figure(report).axes

    assert colour_of(encoders, 0, 1) == pytest.approx(colors.to_rgba(common.PLUS))
    assert colour_of(decoders, 0, 1) == pytest.approx(colors.to_rgba(common.MINUS))
    grey = colors.to_rgba(plotting.features.UNDEFINED)
    assert colour_of(encoders, 0, 0) == colour_of(decoders, 1, 1) == pytest.approx(grey)


def test_zero_is_white_on_the_scale_of_cosines():
    report = side_by_side(["a", "b"])
    report["encoder_cosines"][0][1] = 0.0
    report["encoder_cosines"][1][0] = -0.001

    _, encoders, *_ = plotting.features._features_figure(report).axes

    assert colour_of(encoders, 0, 1) == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert cells(encoders)[1][0] == "0.00"  # not −0.00


def test_a_features_own_classes_are_framed():
    report = side_by_side(["a", "b"])

    readings = plotting.features._features_figure(report).axes[0]

    assert [(patch.get_x(), patch.get_y()) for patch in readings.patches] == [
        (-0.5, -0.5), (0.5, 0.5)
    ]  # fmt: skip


def test_bars_are_each_features_energy_by_layer_on_one_scale():
    report = side_by_side(["a", "b"])

    axes = plotting.features._features_figure(report).axes[-1]

    bars = [bar for container in axes.containers for bar in container]
    heights = np.array([abs(bar.get_height()) for bar in bars])
    shares = [share for f in report["features"] for share in f["energy_by_layer"].values()]
    assert heights / heights.max() == pytest.approx(np.array(shares) / 0.5)
    places = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    assert places == pytest.approx([0, 1, 3, 0, 1, 3])  # outside stands one place apart
    dark = [bar.get_facecolor() == colors.to_rgba(common.INK) for bar in bars]
    assert dark == [False, True, False] * 2
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "out"]
    assert axes.texts[0].get_text() == "layer 1\n50 %"


def test_a_comparison_of_zeros_has_dashes_and_no_bars():
    report = side_by_side(["a", "b"])
    for key in ("encoder_cosines", "decoder_cosines", "overlaps"):
        report[key] = [[1.0, None], [None, None]]
    report["features"][1]["energy_by_layer"] = {}

    _, encoders, _, overlaps, layers = plotting.features._features_figure(report).axes

    assert cells(encoders) == [["1.00", "–"], ["–", "–"]]
    assert cells(overlaps) == [["100", "–"], ["–", "–"]]
    assert len(layers.containers) == 3


@pytest.mark.parametrize(
    ("names", "n_read", "words"),
    [
        (["a", "b"], None, "Own classes are read at |r| = 0.90 (gap 1.60), others at |r| = 0.20 "
                           "(gap 0.01)"),
        (["a"], None, "Own classes are read at |r| = 0.90 (gap 1.60)"),
        (["a", "b"], 0, "Decoders of a and b: cosine −0.04"),
        (["a", "b", "c"], 0, "Decoders of b and c: cosine −0.12, the furthest from 0"),
        (["a"], 0, "Where the decoder of a has its energy"),
    ],
)  # fmt: skip
def test_the_title_of_a_comparison_says_what_was_found(names, n_read, words):
    figure = plotting.features._features_figure(side_by_side(names, n_read))

    assert title(figure) == words
    # Readings where there are texts; cosines and overlaps where there are two features.
    assert len(figure.axes) == (n_read is None) + (1 if len(names) == 1 else 4)


def test_columns_of_long_names_are_numbered_like_their_rows():
    names = ["religion/christian-jewish", "religion/christian-muslim", "race", "gender"]

    figure = plotting.features._features_figure(side_by_side(names))

    for axes in figure.axes[1:4]:
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "3", "4"]
    for axes in figure.axes:
        aside = [text.get_text() for text in axes.texts if text.get_ha() == "right"]
        assert aside == ["1", "2", "3", "4"]
    assert rows_of(figure.axes[0])[0] == "religion/\nchristian-jewish"


@pytest.mark.parametrize("n", [2, 3, 7, 12])
def test_the_texts_of_many_features_neither_overlap_nor_leave_the_figure(n):
    names = [f"religion/christian-{i}" for i in range(n - 1)] + [
        "a_name_that_has_no_place_to_break"
    ]
    report = side_by_side(names)
    for row in report["readings"]:
        row["correlation"].update(value=-0.88, low=-0.95, high=-0.81)

    figure = plotting.features._features_figure(report)

    figure.draw_without_rendering()
    for axes in figure.axes:
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        boxes = [text.get_window_extent() for text in [*axes.texts, *ticks] if text.get_text()]
        assert all(figure.bbox.x0 <= x <= figure.bbox.x1 for box in boxes for x in box.intervalx)
        assert all(figure.bbox.y0 <= y <= figure.bbox.y1 for box in boxes for y in box.intervaly)
        inside = [text.get_window_extent() for text in axes.texts]
        assert not any(
            one.shrunk(0.98, 0.9).overlaps(other) for one, other in combinations(inside, 2)
        )


def test_a_comparison_is_written_and_one_without_features_is_refused(tmp_path):
    written = plotting.plot_features(side_by_side(["a", "$b$"]), tmp_path / "features.png")

    assert image.imread(written).shape[1] == round(common.WIDTH * common.DPI)
    with pytest.raises(DataError, match="features"):
        plotting.plot_features({"features": []}, tmp_path / "none.png")
