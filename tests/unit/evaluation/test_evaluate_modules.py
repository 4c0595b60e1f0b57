import ast
import doctest
import re
import runpy
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import evaluate
import pandas as pd
import pytest
import torch
from evaluate.loading import get_imports
from huggingface_hub import SpaceCard

from hf_gradiend.errors import ConfigError, DataError
from hf_gradiend.evaluate_modules import NAMES, module_path
from hf_gradiend.evaluation.bias.benchmark import BenchmarkResult
from hf_gradiend.evaluation.bias.crows_pairs import SCORINGS, CrowsPairs
from hf_gradiend.evaluation.bias.stereoset import StereoSet
from hf_gradiend.evaluation.probe import EditMeasures
from hf_gradiend.metrics import bootstrap, pearson_correlation, sign_accuracy, three_way_accuracy

EACH = pytest.mark.parametrize("name", NAMES)
# By hand: r = 3 / (√2.5 · 2); the rule with ±½ reads one of two right in each of three classes.
ENCODINGS = {
    "predictions": [0.5, 1.0, -0.5, -1.0, 0.25, 0.75],
    "references": [1, 1, -1, -1, 0, 0],
}
PROBABILITIES = {"p_plus": [0.25, 0.125], "p_minus": [0.25, 0.375]}
FILLINGS = {
    "stereotype": [0.3, 0.2, 0.1],
    "anti_stereotype": [0.1, 0.4, 0.2],
    "unrelated": [0.0, 0.3, 0.0],
    "target": ["nurse", "nurse", "engineer"],
}
PAIRS = {"more": [-21.5, -30.2, -18.0, -25.1], "less": [-22.0, -29.8, -19.3, -26.4]}
INPUTS = {
    "balance_index": PROBABILITIES,
    "crows_pairs": PAIRS,
    "encoder_correlation": ENCODINGS,
    "stereoset": FILLINGS,
}


@pytest.fixture(scope="module", autouse=True)
def _own_caches_and_no_network(tmp_path_factory):
    """Point evaluate's caches to a folder of this file, and let nothing reach a network."""
    cache = tmp_path_factory.mktemp("evaluate")

    def refuse(*arguments):
        raise AssertionError(f"a connection was asked for: {arguments[1:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", cache / "metrics")
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(socket.socket, "connect", refuse)
        yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def load(name):
    # In memory: after a refusal, evaluate would wait a second for its own lock on the file.
    return evaluate.load(module_path(name), keep_in_memory=True)


def values(name, **options):
    return load(name).compute(**INPUTS[name], **options)


# ---- results -----------------------------------------------------------------


@EACH
def test_a_metric_loads_from_the_folder_of_the_installed_package_and_knows_its_name(name):
    metric = evaluate.load(module_path(name))

    assert (metric.name, metric.module_type) == (name, "metric")
    assert metric.description
    assert metric.citation
    assert metric.inputs_description
    assert set(metric.features) == set(INPUTS[name])


def test_encoder_correlation_by_hand():
    found = values("encoder_correlation")

    assert found["correlation"] == pytest.approx(3 / 10**0.5)
    assert (found["sign_accuracy"], found["three_way_accuracy"]) == (1.0, 0.5)
    assert found["correlation_low"] <= found["correlation"] <= found["correlation_high"]


def test_without_neutral_texts_there_is_no_three_way_accuracy_and_the_rest_is_the_same():
    of_classes = {key: column[:4] for key, column in ENCODINGS.items()}

    found = load("encoder_correlation").compute(**of_classes)

    with_neutral = values("encoder_correlation")
    assert set(with_neutral) - set(found) == {
        "three_way_accuracy", "three_way_accuracy_low", "three_way_accuracy_high"
    }  # fmt: skip
    assert found == {key: with_neutral[key] for key in found}


def test_balance_index_by_hand():
    found = values("balance_index", lm_score=0.5)

    assert found == {
        "imbalance": 0.25,
        "mass": 0.5,
        "p_plus": 0.1875,
        "p_minus": 0.3125,
        "lm_score": 0.5,
        "bpi": 0.5 * (0.5 + 0.375) / 2,
        "fpi": 0.5 * (0.75 * 0.25 + 0.625 * 0.125) / 2,
        "mpi": 0.5 * (0.75 * 0.25 + 0.875 * 0.375) / 2,
    }


def test_there_is_no_index_without_a_language_model_score():
    assert set(values("balance_index")) == {"imbalance", "mass", "p_plus", "p_minus"}


def test_stereoset_by_hand():
    found = values("stereoset")

    assert (found["ss"], found["lms"], found["icat"]) == (25.0, 87.5, 43.75)
    assert (found["ss_low"], found["ss_high"]) == (0.0, 100.0)


def test_crows_pairs_by_hand():
    assert values("crows_pairs") == {"score": 75.0, "score_low": 25.0, "score_high": 100.0}


def test_a_tie_is_no_preference_for_the_stereotype():
    found = load("crows_pairs").compute(more=[-1.0, float("-inf")], less=[-1.0, float("-inf")])

    assert found["score"] == 0.0


# ---- the package's own numbers -----------------------------------------------


def random(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def as_flat(estimates):
    return {
        name + end: getattr(estimate, field)
        for name, estimate in estimates.items()
        for end, field in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def test_encoder_correlation_is_that_of_the_encoder_report():
    labels = torch.tensor([1.0, -1.0, 0.0]).repeat(7)
    h = labels + random(21) - 0.5
    x, y = h[labels != 0], labels[labels != 0]

    found = load("encoder_correlation").compute(predictions=h, references=labels)

    assert found == as_flat(
        {
            "correlation": bootstrap(lambda i: pearson_correlation(x[i], y[i]), 14),
            "sign_accuracy": bootstrap(lambda i: sign_accuracy(x[i], y[i]), 14),
            "three_way_accuracy": bootstrap(lambda i: three_way_accuracy(h[i], labels[i]), 21),
        }
    )


def test_balance_index_is_that_of_an_edit():
    probabilities = random(9, 2) / 2

    found = load("balance_index").compute(
        p_plus=probabilities[:, 0], p_minus=probabilities[:, 1], lm_score=0.7
    )

    measures = asdict(EditMeasures.of(probabilities, 0.7))
    assert found == {name: measures[name] for name in found}
    assert len(found) == 8


def test_stereoset_is_that_of_the_benchmark():
    scores = random(30, 3)
    target = [f"term {i % 4}" for i in range(30)]
    columns = StereoSet().columns([{"target": term} for term in target])

    found = load("stereoset").compute(
        stereotype=scores[:, 0], anti_stereotype=scores[:, 1], unrelated=scores[:, 2], target=target
    )

    assert found == as_flat(BenchmarkResult(StereoSet(), columns, scores).estimates())


@pytest.mark.parametrize("scoring", SCORINGS)
def test_crows_pairs_is_the_benchmark_with_either_scoring(scoring):
    scores = random(30, 6)
    more, less = scores[:, 2 * SCORINGS.index(scoring) :].unbind(1)[:2]

    found = load("crows_pairs").compute(more=more, less=less)

    expected = BenchmarkResult(CrowsPairs(), {}, scores).estimates()[scoring]
    assert found == as_flat({"score": expected})


# ---- evaluate's own ways -----------------------------------------------------


@EACH
def test_batches_give_what_all_items_at_once_give(name):
    metric = evaluate.load(module_path(name))  # through evaluate's file, as it is by default
    metric.add_batch(**{key: column[:1] for key, column in INPUTS[name].items()})
    metric.add_batch(**{key: column[1:] for key, column in INPUTS[name].items()})

    assert metric.compute() == values(name)


def test_all_four_combine_when_their_inputs_come_in_batches():
    combined = evaluate.combine([load(name) for name in NAMES])
    columns = {key: column[:2] for inputs in INPUTS.values() for key, column in inputs.items()}
    combined.add_batch(**columns | {"predictions": [0.5, -1.0], "references": [1, -1]})

    found = combined.compute()

    assert {"imbalance", "score", "correlation", "icat"} < set(found)
    assert found["correlation"] == pytest.approx(1.0)


def test_a_metric_combines_with_itself_under_two_names():
    pair = {"train": load("encoder_correlation"), "test": load("encoder_correlation")}

    found = evaluate.combine(pair).compute(**ENCODINGS)

    assert found["train_correlation"] == found["test_correlation"]


# ---- refusals ----------------------------------------------------------------

NAN, INFINITE = float("nan"), float("inf")
REFUSED = {
    "NaN encoding": (
        "encoder_correlation",
        {"predictions": [0.5, NAN], "references": [1, -1]},
        "Expected a finite number in predictions[1], but got nan.",
    ),
    "infinite encoding": (
        "encoder_correlation",
        {"predictions": [INFINITE, 0.5], "references": [1, -1]},
        "Expected a finite number in predictions[0], but got inf.",
    ),
    "missing encoding": (
        "encoder_correlation",
        {"predictions": [0.5, None], "references": [1, -1]},
        "Expected a finite number in predictions[1], but got None.",
    ),
    "unknown reference": (
        "encoder_correlation",
        {"predictions": [0.5, 0.1], "references": [1, 2]},
        "Expected references +1, −1 or 0 (neutral), but got 2.0.",
    ),
    "one class": (
        "encoder_correlation",
        {"predictions": [0.5, 0.1, 0.2], "references": [1, 1, 0]},
        "Expected two samples that vary, but one is constant: no correlation.",
    ),
    "different lengths": (
        "encoder_correlation",
        {"predictions": [0.5, 0.1], "references": [1]},
        "Mismatch in the number of predictions (2) and references (1)",  # evaluate's own
    ),
    "no items": (
        "crows_pairs",
        {"more": [], "less": []},
        "Expected at least one number in more, but got none.",
    ),
    "NaN score": (
        "crows_pairs",
        {"more": [0.1, 0.2], "less": [NAN, 0.2]},
        "Expected a number in less[0], but got nan.",
    ),
    "NaN filling": (
        "stereoset",
        FILLINGS | {"unrelated": [0.0, NAN, 0.1]},
        "Expected a number in unrelated[1], but got nan.",
    ),
    "missing target": (
        "stereoset",
        FILLINGS | {"target": ["nurse", "nurse", None]},
        "Expected a term in target[2], but got None.",
    ),
    "too few targets": (
        "stereoset",
        FILLINGS | {"target": ["nurse"]},
        "Mismatch in the number of stereotype (3) and target (1)",
    ),
    "too much mass": (
        "balance_index",
        {"p_plus": [0.5, 0.6], "p_minus": [0.5, 0.6]},
        "Expected probabilities that are not negative and sum to at most 1, but got 0.5 as the "
        "smallest and 1.2 as the largest sum.",
    ),
    "negative probability": (
        "balance_index",
        {"p_plus": [-0.1], "p_minus": [0.5]},
        "Expected probabilities that are not negative and sum to at most 1, but got -0.1 as the "
        "smallest and 0.4 as the largest sum.",
    ),
    "perplexity for a score": (
        "balance_index",
        PROBABILITIES | {"lm_score": 23.5},
        "Expected an lm_score in [0, 1], but got 23.5.",
    ),
    "NaN language-model score": (
        "balance_index",
        PROBABILITIES | {"lm_score": NAN},
        "Expected an lm_score in [0, 1], but got nan.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(what):
    name, inputs, message = REFUSED[what]

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as refusal:
        load(name).compute(**inputs)

    own = not message.startswith(("Mismatch", "Expected two samples"))
    assert isinstance(refusal.value, DataError) == own


def test_rounded_probabilities_are_not_refused():
    found = load("balance_index").compute(p_plus=[0.502], p_minus=[0.5])

    assert found["mass"] == pytest.approx(1.002)


def test_a_mistyped_option_is_refused():
    with pytest.raises(TypeError, match="lm_scores"):
        values("balance_index", lm_scores=0.9)


def test_an_unknown_metric_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(ConfigError, match=f"^Expected a metric of {', '.join(NAMES)}, but got 'x'"):
        module_path("x")


# ---- files -------------------------------------------------------------------


def test_every_folder_is_named_and_complete():
    folders = {file.parent for file in Path(module_path(NAMES[0])).parent.glob("*/*.py")}

    assert {folder.name for folder in folders} == {*NAMES}
    for folder in folders:
        files = {f.name for f in folder.iterdir() if f.is_file()}
        assert files == {f"{folder.name}.py", "app.py", "README.md", "requirements.txt"}


def libraries(file):
    """What evaluate's line-wise reader takes for the libraries that a metric needs."""
    return {path for _, _, path, _ in get_imports(str(file))}


def imported(file):
    """The libraries that a file imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@EACH
def test_evaluate_reads_the_imports_right(name):
    file = Path(module_path(name), f"{name}.py")

    assert libraries(file) == imported(file) >= {"datasets", "evaluate", "hf_gradiend"}


def test_planted_imports_on_one_line_are_found(tmp_path):
    file = tmp_path / "planted.py"
    file.write_text('"""Planted."""\n\nimport datasets, evaluate\n', encoding="utf-8")

    assert libraries(file) == {"datasets,"} != imported(file)


@EACH
def test_the_card_is_that_of_a_space_with_a_metric(name):
    card = SpaceCard.load(Path(module_path(name), "README.md"))

    assert card.data.sdk == "gradio"
    assert card.data.app_file == "app.py"
    assert card.data.tags == ["evaluate", "metric"]
    assert card.data.title
    assert card.data.to_dict()["description"]


@EACH
def test_the_card_names_every_input_and_output(name):
    text = Path(module_path(name), "README.md").read_text(encoding="utf-8")
    outputs = values(name, **({"lm_score": 0.5} if name == "balance_index" else {}))
    named = {*re.findall(r"\*\*(\w+)\*\*", text)}
    if "**…_low**" in text:
        named |= {one + end for one in named for end in ("_low", "_high")}

    assert {*INPUTS[name], *outputs} <= named


def run_examples(text):
    """Failed and tried examples of a card's Python blocks."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "card", None, 0)
    return doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None)


@EACH
def test_the_examples_of_the_card_are_true(name):
    text = Path(module_path(name), "README.md").read_text(encoding="utf-8")

    failed, tried = run_examples(text)

    assert failed == 0
    assert tried >= 4


def test_a_planted_untrue_example_is_found():
    text = Path(module_path("crows_pairs"), "README.md").read_text(encoding="utf-8")

    assert run_examples(text.replace("'score': 75.0", "'score': 80.0")).failed == 1


# ---- the Space ---------------------------------------------------------------


class Interface:
    """In place of gradio's: keeps what evaluate gives it."""

    launched: "list[Interface]" = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, **options):
        self.options = options

    def launch(self):
        self.launched.append(self)


@pytest.fixture
def gradio(monkeypatch):
    """A gradio of version 4 or later, as far as evaluate's form uses it."""
    module = ModuleType("gradio")
    parts = {"Dataframe": dict, "Textbox": dict, "Interface": Interface}
    vars(module).update(parts)
    monkeypatch.setitem(sys.modules, "gradio", module)
    monkeypatch.setattr(Interface, "launched", [])
    return module


# evaluate 0.4.6 cleans the form's rows in a way that pandas 3.1 means to drop
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")
@EACH
def test_the_form_of_the_space_computes_the_metric(name, gradio, monkeypatch):
    app = Path(module_path(name), "app.py")
    monkeypatch.setattr(sys, "path", [str(app.parent), *sys.path])  # as Python sets it for a script

    runpy.run_path(str(app), run_name="__main__")

    (form,) = gradio.Interface.launched
    rows = pd.DataFrame(INPUTS[name])
    assert form.options["title"] == f"Metric: {name}"
    assert form.options["inputs"]["headers"] == tuple(INPUTS[name])
    assert form.options["article"].lstrip().startswith(f"# Metric card for {name}")
    assert form.options["fn"](rows) == values(name)


@EACH
def test_importing_the_app_launches_nothing(name, gradio):
    runpy.run_path(str(Path(module_path(name), "app.py")), run_name="app")

    assert gradio.Interface.launched == []
