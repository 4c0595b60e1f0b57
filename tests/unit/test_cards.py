"""Model cards: what stands on them is what the report says."""

import ast
import copy
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
from huggingface_hub import ModelCard

import hf_gradiend
from hf_gradiend.cards import KINDS, render_card
from hf_gradiend.errors import ConfigError

FOLDER = Path(__file__).parent / "cards"
CASES = runpy.run_path(str(FOLDER / "regenerate.py"))["CASES"]
REPORT, WITHOUT_EDIT = (CASES[name][1] for name in ("gradiend", "gradiend_without_edit"))
PLAIN, MASKED = (CASES[name][1] for name in ("gradiend_of_other_words", "model_masked"))
EACH_CASE = pytest.mark.parametrize("name", CASES)
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def rendered(name: str) -> str:
    kind, report = CASES[name]
    return render_card(kind, report, f"me/{name}")


def tables(card: str) -> dict[str, list[list[str]]]:
    """The cells of each table below its head, by the text of its first column's head."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", card, flags=re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")]
                          for line in block.splitlines())  # fmt: skip
        found[head[0]] = rows
    return found


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def numbers_in(value: object, path: tuple = ()) -> Iterator[tuple[tuple, float]]:
    """Every number of a report with the keys that lead to it."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from numbers_in(inner, (*path, key))
    elif isinstance(value, int | float):
        yield path, value


def changed(report: dict, path: tuple, number: object) -> dict:
    """The report with another number at a place."""
    made = copy.deepcopy(report)
    *above, last = path
    place = made
    for key in above:
        place = place[key]
    place[last] = number
    return made


def estimate(of: dict) -> str:
    return f"{of['value']:.3f} [{of['low']:.3f}, {of['high']:.3f}]"


# ---- whole cards ---------------------------------------------------------------


@EACH_CASE
def test_a_card_is_the_expected_text(name):
    assert rendered(name) == (FOLDER / f"{name}.md").read_text("utf-8")


def test_every_expected_card_is_of_a_case():
    assert {file.stem for file in FOLDER.glob("*.md")} == set(CASES)


@EACH_CASE
def test_nothing_is_left_to_fill_in_and_no_line_ends_in_a_space(name):
    body = rendered(name).partition("\n---\n")[2]

    assert not re.search(r"\$|\bNone\b|\bnan\b|\n\n\n| \n", body)


# ---- front matter ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "license", "library", "relation", "task"),
    [
        ("gradiend", "cc0-1.0", "hf_gradiend", None, None),
        ("adapter", "apache-2.0", "peft", "adapter", "text-generation"),
        ("model", "apache-2.0", "transformers", "finetune", "text-generation"),
    ],
)
def test_the_front_matter_says_what_the_hub_files_a_repository_under(
    kind, license, library, relation, task
):
    data = ModelCard(render_card(kind, REPORT, "me/x")).data

    assert (data.license, data.library_name, data.pipeline_tag) == (license, library, task)
    assert data.base_model == "org/tiny-lm"
    assert data.to_dict().get("base_model_relation") == relation
    assert data.datasets == ["org/pronouns"]
    assert data.language == "en"
    assert set(data.tags) == {"gradiend", "interpretability", "fairness", "bias"}


def test_of_words_that_the_package_does_not_know_neither_language_nor_fairness_is_claimed():
    card = rendered("gradiend_of_other_words")
    data = ModelCard(card).data

    assert data.language is None
    assert data.tags == ["gradiend", "interpretability"]
    assert not re.search(r"English|gender|nurse|occupation", card)


def test_what_is_not_known_is_left_out_of_the_front_matter_and_said_below():
    card = rendered("gradiend_of_other_words")
    data = ModelCard(card).data

    assert (data.license, data.base_model, data.datasets) == (None, None, None)
    assert card.count("licence: not stated") == 2


def test_a_masked_model_is_filed_under_its_task():
    assert ModelCard(render_card("model", MASKED, "me/x")).data.pipeline_tag == "fill-mask"


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_results_for_the_hub_are_those_after_the_edit(kind):
    data = ModelCard(render_card(kind, REPORT, "me/x")).data

    assert data.model_name == "x"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        name: REPORT["after"][name] for name in ("imbalance", "mass", "lm_score")
    }


def test_the_results_of_a_gradiend_for_the_hub_are_those_of_its_encoder():
    data = ModelCard(render_card("gradiend", REPORT, "me/x")).data

    found = {
        (result.dataset_split, result.metric_type): result.metric_value
        for result in data.eval_results
    }

    assert found == {
        (split, metric): REPORT["encoder"]["splits"][split][metric]["value"]
        for split in ("validation", "test")
        for metric in ("correlation", "accuracy")
    }


# ---- numbers ---------------------------------------------------------------------


@EACH_KIND
def test_the_table_of_the_edit_holds_the_numbers_of_the_report(kind):
    rows = tables(render_card(kind, REPORT, "me/x"))["measure"]

    order = ("imbalance", "mass", "p_plus", "p_minus", "lm_score")
    for row, found in zip(rows, (REPORT["intervals"][name] for name in order), strict=True):
        shown = [estimate(found[when]) for when in ("before", "after", "ratio")]
        assert row[1:] == [str(found["before"]["n"]), *shown]


@pytest.mark.parametrize("report", [REPORT, PLAIN], ids=["gender", "other words"])
def test_the_table_of_the_encoder_holds_the_numbers_of_the_report(report):
    rows = tables(render_card("gradiend", report, "me/x"))["texts"]

    for row, (name, split) in zip(rows, report["encoder"]["splits"].items(), strict=True):
        n, *shown, n_three = row[1:]
        metrics = ("correlation", "accuracy", "three_way_accuracy")
        assert row[0] == name
        assert shown == [estimate(split[metric]) for metric in metrics]
        assert [int(n), int(n_three)] == [split[metric]["n"] for metric in metrics[1:]]


def test_the_table_of_strengths_holds_the_means_over_the_occupations():
    rows = tables(render_card("adapter", REPORT, "me/x"))["strength"]

    points = [(f"{point['strength']:g}", point["occupations"]) for point in REPORT["strengths"]]
    points.append(("the whole edit", [row["after"] for row in REPORT["occupations"]]))
    assert [row[0] for row in rows] == [name for name, _ in points]
    for row, (_, occupations) in zip(rows, points, strict=True):
        for cell, side in zip(row[1:], ("p_plus", "p_minus"), strict=True):
            assert float(cell) == pytest.approx(fmean(o[side] for o in occupations), abs=5e-4)


@EACH_KIND
def test_the_table_of_the_origin_holds_the_numbers_of_the_report(kind):
    rows = dict(tables(render_card(kind, REPORT, "me/x"))["what"])

    assert rows["data"].endswith("texts: 1,234 train, 13 validation, 17 test")
    assert rows["weights covered"] == "123,456 (layers)"
    assert rows["settings"] == "max_train_texts 1000, seed 42, calibration_fraction 0.25"
    assert rows["base model"] == "org/tiny-lm at 0123abcd; licence: apache-2.0"


def shown_on(kind: str, path: tuple) -> bool:
    """Whether a card of this kind is to show a number of the report."""
    match path:
        case ("intervals", _, when, part):
            return part != "n" or when == "before"
        case ("encoder", "splits", _, "correlation" | "accuracy" | "three_way_accuracy" as m, p):
            return kind == "gradiend" and (m, p) != ("accuracy", "n")
        case ("encoder", "neutral" | "transfer_in_order", _):
            return kind == "gradiend"
        case ("strengths" | "adapter", *_) | ("occupations", _, "after", _):
            return kind == "adapter"
        case ("edit", "feature_factor" | "step_size") | ("n_texts", _) | ("n_selected",):
            return True
        case ("energy", _) | ("settings", *_):
            return True
    return False


@EACH_KIND
def test_a_card_changes_with_each_number_that_it_shows_and_with_no_other(kind):
    # The control of the tables above: none of their numbers stands in a template.
    card = render_card(kind, REPORT, "me/x")

    for path, number in numbers_in(REPORT):
        if path != ("format",):
            other = render_card(kind, changed(REPORT, path, number * 2 + 1), "me/x")
            assert (other != card) == shown_on(kind, path), path


def test_shares_of_the_energy_are_summed_by_layer():
    # By hand: layer 0 has 1.5 + 0.5, layer 1 has 6, the head 2, of 10 in all.
    card = render_card("gradiend", REPORT, "me/x")

    assert "layer 1 (60.0%), layer 0 (20.0%), the weights outside of layers (20.0%)" in card


# ---- what got worse ----------------------------------------------------------------

LM = "language-model score on neutral text"
MASS = "probability of both words"


def what_got_worse(**ratios: tuple[float, float, float]) -> str:
    """The card's sentences where measures came out at (value, low, high) of what they were."""
    report = copy.deepcopy(REPORT)
    better = {"imbalance": (0.5, 0.4, 0.6), "mass": (1.2, 1.1, 1.3), "lm_score": (1.2, 1.1, 1.3)}
    for name, (value, low, high) in {**better, **ratios}.items():
        report["intervals"][name]["ratio"].update(value=value, low=low, high=high)
    return re.search(r"\*\*What got worse.*", render_card("model", report, "me/x"))[0]


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({}, "nothing beyond doubt."),
        ({"lm_score": (0.9, 0.8, 0.95)}, f"{LM}, 0.900 [0.800, 0.950] times what it was."),
        ({"imbalance": (1.5, 1.2, 1.8)}, "imbalance, 1.500 [1.200, 1.800] times what it was."),
        (
            {"lm_score": (0.9, 0.8, 1.05)},
            f"nothing beyond doubt. Whether it changed cannot be told from these texts: {LM}.",
        ),
        (
            {"mass": (0.7, 0.6, 0.8), "imbalance": (1.0, 0.9, 1.1)},
            f"{MASS}, 0.700 [0.600, 0.800] times what it was. "
            "Whether it changed cannot be told from these texts: imbalance.",
        ),
        # A class's own probability is to change; that is no harm by itself.
        ({"p_plus": (0.5, 0.4, 0.6)}, "nothing beyond doubt."),
    ],
)
def test_what_got_worse_and_what_cannot_be_told_are_said(ratios, said):
    assert what_got_worse(**ratios) == f"**What got worse:** {said}"


# ---- code ------------------------------------------------------------------------


@EACH_CASE
def test_the_code_on_a_card_compiles_and_imports_public_names(name):
    (code,) = code_blocks(rendered(name))

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_gradiend":
            assert {alias.name for alias in node.names} <= set(hf_gradiend.__all__)
    assert f"me/{name}" in code


def test_words_with_quotes_do_not_break_the_code():
    words = {"F": ['"she"', "her"], "M": ["it's"]}

    (code,) = code_blocks(render_card("gradiend", {**REPORT, "feature_words": words}, "me/x"))

    constants = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
    assert {'"she"', "it's"} <= set(constants)


def test_a_card_without_an_edit_says_so_and_tells_of_none():
    card = render_card("gradiend", WITHOUT_EDIT, "me/x")

    assert "No edit was chosen." in card
    assert "What the edit does" not in card
    assert "What the edit does" in render_card("gradiend", REPORT, "me/x")  # the control


def test_an_adapter_that_was_not_measured_itself_gets_no_section():
    report = {name: value for name, value in REPORT.items() if name not in {"adapter", "strengths"}}

    assert "What the adapter does" not in render_card("adapter", report, "me/x")


def test_strengths_stand_without_a_whole_edit_that_was_not_measured_there():
    card = render_card("adapter", {**REPORT, "occupations": []}, "me/x")

    assert [row[0] for row in tables(card)["strength"]] == ["0", "1"]
    assert "Means over 2 occupations" in card


# ---- refusals --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "report", "said"),
    [
        ("dataset", REPORT, "gradiend, adapter, model, but got 'dataset'"),
        ("gradiend", {**REPORT, "format": 1}, "format 2, but got 1"),
        ("gradiend", {}, "format 2, but got None"),
        ("adapter", WITHOUT_EDIT, "chosen edit for the card of kind 'adapter'"),
        ("model", WITHOUT_EDIT, "chosen edit for the card of kind 'model'"),
    ],
)
def test_what_no_card_can_be_made_of_is_refused(kind, report, said):
    with pytest.raises(ConfigError, match=said):
        render_card(kind, report, "me/x")
