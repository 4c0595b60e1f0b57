import copy
import inspect
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors, image, rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_gradiend import plotting
from hf_gradiend.errors import DataError
from hf_gradiend.evaluation.decoder import choose_edit
from hf_gradiend.parameters import layer_of
from hf_gradiend.plotting import (
    common,
    encodings,
    energy,
    occupations,
    strengths,
    sweep,
    transfer,
)

NAMES = ["encodings", "transfer", "occupations", "sweep", "energy", "strengths"]
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
    }


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

    plotting.plot_all(report, tmp_path)

    assert holds("transfer", common.PLUS)
    assert holds("transfer", common.MINUS)
    assert not holds("occupations", common.PLUS)  # the control


def test_plot_all_writes_every_figure_into_a_new_folder(report, tmp_path):
    paths = plotting.plot_all(report, tmp_path / "new")

    assert paths == [tmp_path / "new" / f"{name}.png" for name in NAMES]
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize(
    ("missing", "name"),
    [
        (("encoder", "splits", "test"), "encodings"),
        (("encoder", "transfer"), "transfer"),
        (("occupations",), "occupations"),
        (("before",), "occupations"),
        (("sweep",), "sweep"),
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


def test_a_report_without_an_edit_keeps_the_figures_that_need_none(report, tmp_path):
    nothing = {"edit": None, "before": None, "after": None}
    empty = {"occupations": [], "sweep": [], "strengths": []}

    paths = plotting.plot_all({**report, **nothing, **empty}, tmp_path)

    assert [path.stem for path in paths] == ["encodings", "transfer", "energy"]


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
    parameters = inspect.signature(choose_edit).parameters
    drawn = {measure: limit for measure, _, limit in sweep.SWEEP_PANELS if limit is not None}

    defaults = {name: parameters[f"{name}_floor"].default for name in ("lm", "mass")}
    assert drawn == {"lm_score": defaults["lm"], "mass": defaults["mass"]}


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
