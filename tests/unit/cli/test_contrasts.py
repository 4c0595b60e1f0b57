"""Several classes and several axes from the command line."""

import json
import re

import pytest

from hf_gradiend.base_models import load_base_model
from hf_gradiend.cli import main
from hf_gradiend.modeling_gradiend import GradiendModel

WORDS = {"F": "she", "M": "he", "N": "it"}
TEXTS = [
    "Anna said that [TARGET] was late.",
    "The nurse was tired and [TARGET] said so.",
    "Paul was late because [TARGET] was tired.",
    "My doctor said [TARGET] was late.",
]


@pytest.fixture
def place(make_lm, tmp_path):
    """A base model, and texts of three classes."""
    lm = make_lm("gpt2")
    lm.model.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    rows = [
        {
            "text": text, "factual": WORDS[own], "factual_class": own,
            "counterfactual": WORDS[other], "counterfactual_class": other, "split": split,
        }
        for split in ("train", "validation")
        for text in TEXTS
        for own in WORDS
        for other in WORDS
        if other != own
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def train(place, capsys, *options):
    code = main(
        ["train", "--base_model", str(place / "base"), "--dataset", str(place / "data.jsonl"),
         *options, "--json"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("kind", "names"),
    [("pairs", ["F-M", "F-N", "M-N"]), ("rest", ["F-rest", "M-rest", "N-rest"])],
)
def test_every_contrast_has_a_gradiend_and_a_report(place, capsys, kind, names):
    folder = place / "out"

    code, out, _ = train(place, capsys, "--contrasts", kind, "--output_dir", str(folder))

    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert sorted(result["contrasts"]) == names
    for name in names:
        report = json.loads((folder / name / "report.json").read_text("utf-8"))
        assert report["feature_classes"] == name.split("-")
        found = report["encoder"]["splits"]["validation"]["correlation"]["value"]
        assert found == result["contrasts"][name]["encoder"]["validation"]["correlation"]
        gradiend = GradiendModel.from_pretrained(folder / name)
        assert gradiend.config.feature_classes == [name.split("-")]


def test_every_report_says_its_own_seconds_and_those_of_the_pass_that_all_share(place, capsys):
    folder = place / "out"

    _, out, _ = train(place, capsys, "--contrasts", "pairs", "--output_dir", str(folder))

    result = json.loads(out.splitlines()[-1])
    trainings = {
        name: json.loads((folder / name / "report.json").read_text("utf-8"))["training"]
        for name in result["contrasts"]
    }
    shared = {training["shared_pass_seconds"] for training in trainings.values()}
    assert shared == {result["shared_pass_seconds"]}
    for name, training in trainings.items():
        assert training["seconds"] == result["contrasts"][name]["seconds"] > 0
    own = sum(training["seconds"] for training in trainings.values())
    assert own + result["shared_pass_seconds"] < result["seconds"]  # reading takes its time, too


def test_a_pair_also_reads_the_words_of_the_other_classes(place, capsys):
    folder = place / "out"

    _, out, _ = train(place, capsys, "--contrasts", "pairs", "--output_dir", str(folder))

    short = json.loads(out.splitlines()[-1])["contrasts"]["F-M"]["other_classes"]
    report = json.loads((folder / "F-M" / "report.json").read_text("utf-8"))
    found = report["encoder"]["other_classes"]
    gradiend = GradiendModel.from_pretrained(folder / "F-M")
    base, tokenizer = load_base_model(str(place / "base"))
    means = {}
    for name, word in WORDS.items():
        rows = [{"text": text, "factual": word, "counterfactual": "he"} for text in TEXTS]
        means[name] = gradiend.encode_texts(base, tokenizer, rows, progress=False)[:, 0]
    assert found.keys() == short.keys() == {"N"}
    assert found["N"]["mean"]["n"] == short["N"]["n"] == len(TEXTS)  # each text once
    assert found["N"]["mean"]["value"] == pytest.approx(float(means["N"].mean()), abs=1e-5)
    assert found["N"]["mean_absolute"]["value"] == short["N"]["mean_absolute"]
    assert short["N"]["mean_absolute"] == pytest.approx(float(means["N"].abs().mean()), abs=1e-5)
    # The control: the pair's own classes read something else.
    assert found["N"]["mean"]["value"] != pytest.approx(float(means["F"].mean()), abs=1e-3)
    assert found["N"]["mean"]["value"] != pytest.approx(float(means["M"].mean()), abs=1e-3)


def test_one_against_the_rest_has_no_other_class(place, capsys):
    _, out, _ = train(place, capsys, "--contrasts", "rest", "--output_dir", str(place / "out"))

    contrasts = json.loads(out.splitlines()[-1])["contrasts"]
    assert [each["other_classes"] for each in contrasts.values()] == [{}, {}, {}]


def test_the_table_shows_what_other_classes_read(place, capsys):
    code = main(
        ["train", "--base_model", str(place / "base"), "--dataset", str(place / "data.jsonl"),
         "--contrasts", "pairs", "--output_dir", str(place / "out")]
    )  # fmt: skip

    head, _, first = capsys.readouterr().out.splitlines()[:3]
    assert code == 0
    assert "other classes: h, |h|" in head
    assert re.search(r"F-M \(validation\) .* N [+-]\d\.\d\d, \d\.\d\d", first)


def test_two_of_several_classes_can_be_chosen_and_joined(place, capsys):
    for one, other in (("F", "M"), ("F", "N")):
        code, _, _ = train(
            place, capsys, "--feature_classes", one, other, "--output_dir", str(place / other)
        )
        assert code == 0
    data = str(place / "data.jsonl")
    for name in ("M", "N"):
        lines = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
        own = [r for r in lines if {r["factual_class"], r["counterfactual_class"]} == {"F", name}]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))

    code = main(
        ["join", "--gradiend", str(place / "M"), "--gradiend", str(place / "N"), "--dataset",
         str(place / "M.jsonl"), "--dataset", str(place / "N.jsonl"), "--output_dir",
         str(place / "joined"), "--json"]
    )  # fmt: skip

    assert code == 0
    joined = GradiendModel.from_pretrained(place / "joined")
    assert joined.config.feature_classes == [["F", "M"], ["F", "N"]]
    capsys.readouterr()
    bad = (
        (["join", "--gradiend", str(place / "M"), "--dataset", data, "--dataset", data,
          "--output_dir", str(place / "bad")], "one --dataset for each"),
        (["join", "--gradiend", str(place / "M"), "--dataset", data,
          "--output_dir", str(place / "joined")], "new or empty folder for the GRADIEND"),
    )  # fmt: skip
    for argv, words in bad:
        assert main(argv) == 2
        _, err = capsys.readouterr()
        assert words in err
        assert len(err.splitlines()) == 1


def test_several_classes_without_contrasts_are_one_line(place, capsys):
    code, _, err = train(place, capsys, "--output_dir", str(place / "out"))

    assert code == 2
    assert len(err.splitlines()) == 1
    assert "two classes" in err
