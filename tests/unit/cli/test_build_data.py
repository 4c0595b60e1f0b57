"""`hf-gradiend build-data`: what it writes, says and refuses, and how it goes on."""

import json

import pytest

from hf_gradiend.cli import main
from hf_gradiend.data import corpora, searching
from hf_gradiend.data.loading import load_feature_dataset, load_neutral_texts

SPEC = """\
name: Weather
about: Words of warm and cold weather.
language: en
license: cc0-1.0
classes: {warm: [hot], cold: [icy]}
splits: {train: 0.5, test: 0.5}
hold_out: [document]
"""


@pytest.fixture
def run(capsys):
    """Function of arguments that gives the exit code and the two streams."""

    def run(*argv):
        code = main(["build-data", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a specification and a corpus of 20 documents, a piece each."""
    monkeypatch.setattr(corpora, "PIECE_BYTES", 10)
    (tmp_path / "weather.yaml").write_text(SPEC, encoding="utf-8")
    (tmp_path / "books").mkdir()
    for number in range(20):
        word = "hot" if number % 2 else "icy"
        text = f"On day {number} the road was {word} at noon. A chair stood by the wall.\n"
        (tmp_path / "books" / f"{number:02}.txt").write_text(text * 2, encoding="utf-8")
    return tmp_path


def bytes_of(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*")) if file.is_file()
    }  # fmt: skip


def test_a_specification_of_the_package_is_built_by_its_name(run, tmp_path):
    code, out, err = run("religion", "--output_dir", tmp_path / "data", "--json")
    result = json.loads(out)

    assert (code, err, len(out.splitlines())) == (0, "", 1)
    assert result["specification"] == "religion"
    assert result["source"] == {"kind": "templates", "templates": 72}
    assert result["files"] == [
        "README.md", "data/test.jsonl", "data/train.jsonl", "data/validation.jsonl",
        "neutral/test.jsonl", "neutral/train.jsonl", "neutral/validation.jsonl", "spec.yaml",
        "statistics.json",
    ]  # fmt: skip
    data = load_feature_dataset(tmp_path / "data", classes=("jewish", "muslim"))
    assert {*data["train"]["factual_class"]} == {"jewish", "muslim"}
    assert len(load_neutral_texts(tmp_path / "data")) == result["neutral"]["kept"] > 100
    assert not (tmp_path / ".data.partial").exists()


def test_a_corpus_is_searched_and_its_counts_add_up(run, place):
    code, out, _ = run(
        place / "weather.yaml",
        "--corpus",
        place / "books",
        "--output_dir",
        place / "data",
        "--json",
    )
    result = json.loads(out)
    texts = result["texts"]

    assert code == 0
    assert result["source"]["name"] == "books"
    assert texts == {
        "read": 80, "kept": 20, "dropped": {"no word of a class": 40, "a duplicate": 20},
    }  # fmt: skip
    assert {name: split["classes"] for name, split in result["splits"].items()} == {
        "train": {"warm": 5, "cold": 5}, "test": {"warm": 5, "cold": 5},
    }  # fmt: skip
    statistics = json.loads((place / "data" / "statistics.json").read_text("utf-8"))
    assert {key: result[key] for key in statistics} == statistics
    assert not (place / ".data.partial").exists()


def test_people_get_tables_and_a_bar(run, place):
    code, out, err = run(
        place / "weather.yaml", "--corpus", place / "books", "--output_dir", place / "data"
    )
    lines = [line.split("  ") for line in out.splitlines()]

    assert code == 0
    assert [line[0] for line in lines[:6]] == [
        "texts", "-" * 18, "read", "kept", "no word of a class", "a duplicate"
    ]  # fmt: skip
    assert lines[4][-1] == "50.0%"
    assert [line[0] for line in lines[7:11]] == ["split", "-----", "train", "test"]
    assert "Neutral texts: 1 of 40 read" in out
    assert out.splitlines()[-1].startswith(f"Wrote {place / 'data'} (")
    assert "Searching" in err


def test_a_run_that_was_interrupted_goes_on(run, place, monkeypatch):
    argv = [place / "weather.yaml", "--corpus", place / "books", "--output_dir"]
    run(*argv, place / "whole", "--json")
    search, searched = searching.search_texts, []

    def interrupted(texts, spec):
        if len(searched) == 8:
            raise KeyboardInterrupt
        searched.append(texts)
        return search(texts, spec)

    monkeypatch.setattr(searching, "search_texts", interrupted)
    code, _, err = run(*argv, place / "data", "--json")
    n_kept = len(list((place / ".data.partial").iterdir()))
    monkeypatch.setattr(
        searching, "search_texts", lambda texts, spec: searched.append(texts) or search(texts, spec)
    )
    resumed, _, _ = run(*argv, place / "data", "--json")

    assert (code, resumed, n_kept) == (130, 0, 8)
    assert err == "hf-gradiend build-data: interrupted; what was saved stays.\n"
    assert len(searched) == 20  # each document once
    assert bytes_of(place / "data") == bytes_of(place / "whole")
    assert not (place / ".data.partial").exists()


BAD_INPUT = {
    "an unknown name": (["religon"], "Did you mean 'religion'?"),
    "no such file": (["{}/none.yaml"], "none.yaml' could not be read"),
    "a mistake in the file": (["{}/bad.yaml"], "bad.yaml, line 8, hold_outs: Unknown key"),
    "nothing to build from": (["{}/weather.yaml"], "has no templates. Pass one (--corpus)"),
    "no such corpus": (["{}/weather.yaml", "--corpus", "{}/none.txt"], "is no file or folder"),
    "a corpus that is no text": (["{}/weather.yaml", "--corpus", "{}/latin.txt"], "in UTF-8"),
    "a corpus without the words": (
        ["{}/weather.yaml", "--corpus", "{}/other.txt"],
        "all 1 were dropped: 1 for no word of a class."),
    "an option without a corpus": (["race", "--column", "body"], "--corpus with --column, but"),
    "an option of the Hub for a folder": (
        ["{}/weather.yaml", "--corpus", "{}/books", "--streaming"], "on the Hub alone"),
    "no process": (["race", "--num_proc", "0"], "at least one process, but got 0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(run, place, mistake):
    (place / "bad.yaml").write_text(SPEC + "hold_outs: [word]\n", encoding="utf-8")
    (place / "latin.txt").write_bytes("schön".encode("latin-1"))
    (place / "other.txt").write_text("A chair stood by the wall.", encoding="utf-8")
    argv, words = BAD_INPUT[mistake]

    code, out, err = run(
        *(each.replace("{}", str(place)) for each in argv), "--output_dir", place / "data", "--json"
    )

    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("hf-gradiend build-data: ")
    assert words in err


def test_a_folder_with_files_is_refused_before_any_work(run, place):
    code, out, err = run(place / "weather.yaml", "--corpus", place / "books", "--output_dir", place)

    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "Expected a new or empty folder for the data set" in err
