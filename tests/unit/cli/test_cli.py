import hashlib
import json
import math
import shutil
import signal

import datasets
import pytest
import torch
from datasets.utils import logging as datasets_logging
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from hf_gradiend.adapter.config import feature_factor_of
from hf_gradiend.cli import main
from hf_gradiend.data.loading import load_feature_dataset
from hf_gradiend.errors import ConfigError
from hf_gradiend.evaluation.bias.stereoset import StereoSet
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.training.solvers import AdamWSolver

ENCODER_KEYS = {"correlation", "accuracy", "n"}


@pytest.fixture(autouse=True)
def quiet_again():
    """`main` sets transformers' verbosity and the bars for its process; the tests share one."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    datasets_logging.enable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory, session_planted):
    """A folder with a base model, another one of other shapes, and a data set."""
    folder = tmp_path_factory.mktemp("place")
    planted = session_planted("gpt2")
    narrow = type(planted.model.config)(**{**planted.model.config.to_dict(), "n_embd": 8})
    for name, model in (("base", planted.model), ("other", type(planted.model)(narrow))):
        model.save_pretrained(folder / name)
        planted.tokenizer.save_pretrained(folder / name)
    rows = [{**row, "split": split} for split, part in planted.data.items() for row in part]
    write_rows(folder / "data.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """A GRADIEND, made by the command line."""
    code = main(["train", "--base_model", str(place / "base"), "--dataset",
                 str(place / "data.jsonl"), "--output_dir", str(place / "gradiend"),
                 "--batch_size", "16", "--feature_classes", "F", "M", "--json"])  # fmt: skip
    assert code == 0
    return place / "gradiend"


@pytest.fixture
def run(capsys):
    """Function of arguments that gives the exit code and the two streams."""

    def run(*argv):
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def run_json(run):
    """Function of arguments that gives the JSON object on the last line of a successful run."""

    def run_json(*argv):
        code, out, _ = run(*argv, "--json")
        assert code == 0
        return json.loads(out.splitlines()[-1], parse_constant=pytest.fail)

    return run_json


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- the path ----


@pytest.mark.parametrize("solver", ["closed_form", "adamw"])
def test_training_writes_a_gradiend_and_a_report(run_json, place, tmp_path, solver):
    options = [] if solver == "closed_form" else [
        "--max_steps", "60", "--learning_rate", "0.003", "--n_seeds", "2"
    ]  # fmt: skip
    result = run_json(
        "train", "--base_model", place / "base", "--dataset", place / "data.jsonl",
        "--output_dir", tmp_path / "out", "--solver", solver, "--batch_size", "16", *options,
    )  # fmt: skip

    assert set(result) == {
        "base_model", "n_selected", "solver", "encoder", "neutral_mean_absolute", "convergence",
        "seconds", "peak_rss_bytes", "files",
    }  # fmt: skip
    assert (result["base_model"], result["solver"]) == ("base", solver)
    assert set(result["encoder"]) == {"validation", "test"}
    assert all(set(split) == ENCODER_KEYS for split in result["encoder"].values())
    assert result["encoder"]["test"]["correlation"] > 0.85
    assert result["encoder"]["test"]["n"] == 48
    assert len(result["convergence"]) == (1 if solver == "closed_form" else 2)
    assert result["peak_rss_bytes"] > 2**20
    gradiend = GradiendModel.from_pretrained(tmp_path / "out")
    assert gradiend.config.n_selected == result["n_selected"]
    assert gradiend.config.base_model_name_or_path == str(place / "base")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (
        report["encoder"]["splits"]["test"]["correlation"]["value"]
        == (result["encoder"]["test"]["correlation"])
    )
    assert str(tmp_path / "out" / "report.json") in result["files"]


def test_encoding_reads_the_split_and_writes_its_rows(run_json, place, trained, tmp_path):
    result = run_json("encode", "--gradiend", trained, "--dataset", place / "data.jsonl",
                      "--output", tmp_path / "rows" / "encoded.jsonl")  # fmt: skip

    assert set(result) == {"split", "correlation", "accuracy", "n", "n_skipped", "output"}
    assert (result["split"], result["n"], result["n_skipped"]) == ("test", 48, 0)
    assert result["correlation"] > 0.9
    rows = read_rows(tmp_path / "rows" / "encoded.jsonl")
    data = load_feature_dataset(place / "data.jsonl")["test"]
    assert [row["text"] for row in rows] == data["text"][:]
    assert all(set(row) == {*data.column_names, "encoding"} for row in rows)
    right = sum((row["encoding"] > 0) == (row["factual_class"] == "F") for row in rows)
    assert result["accuracy"] == right / 48


def test_a_row_that_was_skipped_has_no_encoding(run_json, place, trained, tmp_path):
    rows = read_rows(place / "data.jsonl")[-48:]
    rows.insert(0, {**rows[0], "text": "[TARGET] was late ."})
    data = write_rows(tmp_path / "data.jsonl", rows)

    result = run_json("encode", "--gradiend", trained, "--dataset", data,
                      "--output", tmp_path / "encoded.jsonl")  # fmt: skip

    assert (result["n"], result["n_skipped"]) == (48, 1)
    encodings = [row["encoding"] for row in read_rows(tmp_path / "encoded.jsonl")]
    assert encodings[0] is None
    assert all(isinstance(h, float) and math.isfinite(h) for h in encodings[1:])


def test_adapting_writes_an_adapter_of_the_edit(run_json, place, trained, tmp_path):
    folder = tmp_path / "adapter"
    result = run_json("adapt", "--gradiend", trained, "--output_dir", folder, "--strength", "0.5",
                      "--feature_factor", "0.5", "--step_size", "0.01")  # fmt: skip

    config = GradiendModel.from_pretrained(trained).config
    assert result == {
        "output_dir": str(folder), "feature_factor": 0.5, "step_size": 0.01, "strength": 0.5,
        "n_values": config.n_selected, "bytes": sum(f.stat().st_size for f in folder.iterdir()),
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    edited = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    update = GradiendModel.from_pretrained(trained).decode(0.5)
    for name, weight in edited.items():
        expected = before[name] + 0.005 * update[name] if name in update else before[name]
        torch.testing.assert_close(weight, expected.detach(), rtol=0, atol=1e-6)
    name = next(iter(update))
    assert not torch.equal(edited[name], before[name])  # the control


def test_a_small_adapter_holds_the_share_of_the_weights_and_type_asked_for(
    run_json, trained, tmp_path
):
    edit = ("adapt", "--gradiend", trained, "--feature_factor", "0.5", "--step_size", "0.01")
    whole = run_json(*edit, "--output_dir", tmp_path / "whole")
    small = run_json(*edit, "--output_dir", tmp_path / "small", "--top_k", "0.1",
                     "--dtype", "bfloat16")  # fmt: skip
    free = run_json(*edit, "--output_dir", tmp_path / "free", "--top_k", "0.1",
                    "--dtype", "bfloat16", "--adjustable")  # fmt: skip

    assert small["n_values"] == free["n_values"] == round(0.1 * whole["n_values"])
    assert small["bytes"] < free["bytes"] < whole["bytes"]
    with pytest.raises(ConfigError, match="fixed"):
        feature_factor_of(0.3, PeftConfig.from_pretrained(tmp_path / "small").n_features)
    assert PeftConfig.from_pretrained(tmp_path / "free").n_features == 1  # the control


def test_without_an_edit_adapting_chooses_one(run_json, trained, tmp_path):
    result = run_json("adapt", "--gradiend", trained, "--output_dir", tmp_path / "edited")

    assert result["step_size"] != 0.0
    assert abs(result["feature_factor"]) <= 1.0


@pytest.fixture
def stereoset(tmp_path, monkeypatch):
    """Three sentences in StereoSet's form, with their own checksum."""
    gap = {"context": "the nurse said that BLANK was late .", "bias_type": "x", "target": "nurse"}
    words = {"stereotype": "she", "anti-stereotype": "he", "unrelated": "day"}
    rows = {
        side: [{**gap, "sentence": gap["context"].replace("BLANK", word)}] * 3
        for side, word in words.items()
    }
    (tmp_path / "bias").mkdir()
    file = tmp_path / "bias" / "stereoset.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(StereoSet, "files", {"stereoset.json": digest})
    return tmp_path


def test_evaluating_compares_strengths_with_the_base_model(
    run_json, place, trained, stereoset, tmp_path
):
    edit = ("--feature_factor", "0.5", "--step_size", "0.01")
    run_json("adapt", "--gradiend", trained, "--output_dir", tmp_path / "adapter", *edit)
    argv = ("evaluate", "--base_model", place / "base", "--benchmarks", "stereoset",
            "--data_dir", stereoset, "--output_dir", tmp_path / "out")  # fmt: skip

    alone = run_json(*argv)
    both = run_json(*argv, "--adapter", tmp_path / "adapter", "--strength", "0", "1")

    assert alone["base"]["stereoset"].keys() == {"ss", "lms", "icat"}
    assert alone["edited"] == []
    assert [edit["strength"] for edit in both["edited"]] == [0.0, 1.0]
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["edited"] == both["edited"]
    for row in both["edited"][0]["rows"]:  # strength 0 is the base model
        assert row["before"] == row["after"] == alone["base"]["stereoset"][row["measure"]]
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 2  # the base model and the edit


def test_the_quickstart_writes_everything_and_says_it(run_json, place, tmp_path):
    result = run_json("quickstart", "--base_model", place / "base", "--dataset",
                      place / "data.jsonl", "--output_dir", tmp_path, "--fast")  # fmt: skip

    assert {
        "base_model", "n_selected", "solver", "encoder", "edit", "before", "after", "seconds",
        "peak_rss_bytes", "files",
    } <= set(result)  # fmt: skip
    for split in ("validation", "test"):
        assert set(result["encoder"][split]) == ENCODER_KEYS
    assert result["encoder"]["test"]["correlation"] > 0.9
    assert (tmp_path / "gradiend" / "config.json").is_file()
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["encoder"]["splits"].keys() == {"validation", "test"}
    assert {"gradiend", "report.json"} <= set(result["files"])
    assert all((tmp_path / file).exists() for file in result["files"])
    assert any(file.endswith(".png") for file in result["files"])
    edited = (tmp_path / "edited-model").is_dir()
    config = GradiendModel.from_pretrained(tmp_path / "gradiend").config
    if result["edit"] is None:
        assert not edited
        assert result["before"] is result["after"] is config.step_size is None
        assert "strengths" not in report
    else:
        assert edited
        assert PeftConfig.from_pretrained(tmp_path / "adapter").step_size == config.step_size
        at_zero = next(row for row in report["strengths"] if row["strength"] == 0)
        shown = {row["occupation"]: row["before"] for row in report["occupations"]}
        for row in at_zero["occupations"]:
            assert row["p_plus"] == pytest.approx(shown[row["occupation"]]["p_plus"])
        assert config.step_size == result["edit"]["step_size"]
        assert result["before"].keys() == result["after"].keys() >= {"imbalance", "mass"}


def test_the_quickstart_prints_its_tables_for_people(run, place, tmp_path):
    code, out, _ = run("quickstart", "--base_model", place / "base", "--dataset",
                       place / "data.jsonl", "--output_dir", tmp_path, "--fast")  # fmt: skip

    assert code == 0
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("split "))
    assert lines[head].split()[:4] == ["split", "n", "correlation", "95"]
    assert [line.split()[0] for line in lines[head + 2 : head + 4]] == ["validation", "test"]
    assert any("pairs in the right order" in line for line in lines)
    assert any("imbalance" in line for line in lines) or "none was written" in out
    assert "report.json" in lines[-1]


@pytest.mark.parametrize("command", ["train", "encode"])
def test_people_get_a_table_and_machines_one_line_without_bars(
    run, place, trained, tmp_path, command
):
    argv = {
        "train": ["train", "--base_model", place / "base", "--dataset", place / "data.jsonl",
                  "--output_dir", tmp_path / "out"],
        "encode": ["encode", "--gradiend", trained, "--dataset", place / "data.jsonl"],
    }[command]  # fmt: skip

    code, out, err = run(*argv, "--json")
    for_people = run(*argv)

    assert code == for_people[0] == 0
    assert len(out.splitlines()) == 1
    assert err == ""
    assert "correlation" in for_people[1]
    assert not for_people[1].splitlines()[-1].startswith("{")
    assert "%" in for_people[2]  # the control: bars are shown, and captured here


def test_an_interrupted_training_goes_on_with_resume(run, run_json, place, tmp_path, monkeypatch):
    argv = ["train", "--base_model", place / "base", "--dataset", place / "data.jsonl",
            "--output_dir", tmp_path / "out", "--solver", "adamw", "--max_steps", "4",
            "--save_steps", "25", "--eval_steps", "25"]  # fmt: skip
    step = AdamWSolver.step

    def interrupted(self, stream, number):
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, stream, number)

    monkeypatch.setattr(AdamWSolver, "step", interrupted)
    code, _, err = run(*argv, "--json")
    monkeypatch.setattr(AdamWSolver, "step", step)
    resumed = run_json(*argv, "--resume")

    assert code == 130
    assert err.splitlines()[-1] == "hf-gradiend train: interrupted; what was saved stays."
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    assert resumed["solver"] == "adamw"


def test_zero_is_a_value_and_not_an_option_left_out(run_json, run, place, tmp_path):
    argv = ["train", "--base_model", place / "base", "--dataset", place / "data.jsonl",
            "--output_dir", tmp_path / "out", "--max_train_texts"]  # fmt: skip

    code, _, err = run(*argv, "0")
    run_json(*argv, "16", "--seed", "0")
    zero = GradiendModel.from_pretrained(tmp_path / "out")
    run_json(*argv, "16", "--seed", "42")  # the default
    default = GradiendModel.from_pretrained(tmp_path / "out")

    assert (code, "max_train_texts" in err) == (2, True)
    assert not torch.equal(zero.encoder.bias, default.encoder.bias)


# ---- bad input ----


@pytest.fixture
def bad_input(place, trained, tmp_path):
    """Arguments by name of what is wrong with them, with words of the message."""
    rows = read_rows(place / "data.jsonl")
    (tmp_path / "file").write_text("", encoding="utf-8")
    broken_base, broken = tmp_path / "nan-base", tmp_path / "nan-gradiend"
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    shutil.copytree(place / "base", broken_base)
    model.save_pretrained(broken_base)
    for part in ("encoder", "decoder"):
        gradiend = GradiendModel.from_pretrained(trained)
        with torch.no_grad():
            getattr(gradiend, part).weight.at(gradiend.names[0]).view(-1)[0] = torch.nan
        gradiend.save_pretrained(broken / part)
    data = {
        "no columns": [{"sentence": "the doctor said that [TARGET] was late .", "split": "train"}],
        "no slot": [*rows[:-1], {**rows[-1], "text": "the doctor was late ."}],
        "one class": [row for row in rows if row["split"] != "test" or row["factual_class"] == "F"],
        "other classes": [
            {**row, "factual_class": row["factual_class"] + "X",
             "counterfactual_class": row["counterfactual_class"] + "X"} for row in rows
        ],
    }  # fmt: skip
    files = {name: write_rows(tmp_path / f"{name}.jsonl", found) for name, found in data.items()}
    train = ["train", "--base_model", place / "base", "--output_dir", tmp_path / "out"]
    with_data = [*train, "--dataset", place / "data.jsonl"]
    encode = ["encode", "--dataset", place / "data.jsonl", "--gradiend"]
    evaluate = ["evaluate", "--base_model", place / "base", "--data_dir", tmp_path,
                "--output_dir", tmp_path / "out"]  # fmt: skip
    adapt = ["adapt", "--output_dir", tmp_path / "out", "--gradiend"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("mine", encoding="utf-8")
    return {
        "unknown base model": (
            [*with_data[:2], tmp_path / "nothing", *with_data[3:]], "could not be loaded"),
        "unknown data set": ([*train, "--dataset", tmp_path / "none.jsonl"], "no file or folder"),
        "data without the columns": ([*train, "--dataset", files["no columns"]], "columns"),
        "text without a slot": ([*train, "--dataset", files["no slot"]], "no slot"),
        "a test split of one class": ([*train, "--dataset", files["one class"]], "'test'"),
        "a pattern that matches nothing": (
            [*with_data, "--parameters", "*.nothing.*"], "matches none"),
        "other classes": ([*with_data, "--feature_classes", "F", "X"], "feature_classes"),
        "a fraction out of range": ([*with_data, "--top_k", "2"], "top_k"),
        "an option of the other solver": ([*with_data, "--n_seeds", "3"], "n_seeds"),
        "steps that do not fit together": (
            [*with_data, "--solver", "adamw", "--eval_steps", "10", "--save_steps", "15"],
            "round multiple"),
        "nothing to resume": ([*with_data, "--resume"], "checkpoint"),
        "a folder that cannot be written": (
            [*with_data, "--output_dir", tmp_path / "file" / "out"], "cannot be written"),
        "neutral texts that are not there": (
            [*with_data, "--neutral", tmp_path / "none.txt"], "none.txt"),
        "NaN in the base model": (
            ["train", "--base_model", broken_base, *with_data[3:]], "NaN"),
        "no GRADIEND there": ([*encode, tmp_path / "nothing"], "could not be loaded"),
        "a base model for a GRADIEND": ([*encode, place / "base"], "GRADIEND"),
        "a GRADIEND of another base model": (
            [*encode, trained, "--base_model", place / "other"], "shape"),
        "an unknown split": ([*encode, trained, "--split", "dev"], "'dev'"),
        "data of other classes": (
            ["encode", "--dataset", files["other classes"], "--gradiend", trained], "'FX'"),
        "one class to encode": (
            ["encode", "--dataset", files["one class"], "--gradiend", trained], "both classes"),
        "no batch": ([*encode, trained, "--batch_size", "0"], "batch_size"),
        "rows into a folder": ([*encode, trained, "--output", tmp_path], "is a folder"),
        "rows below a file": (
            [*encode, trained, "--output", tmp_path / "file" / "rows"], "cannot be written"),
        "NaN in the encoder": ([*encode, broken / "encoder"], "NaN"),
        "NaN in the decoder": (
            [*adapt, broken / "decoder", "--feature_factor", "0", "--step_size", "1"], "NaN"),
        "half an edit": ([*adapt, trained, "--feature_factor", "0.5"], "--step_size"),
        "half an edit, the other": ([*adapt, trained, "--step_size", "0.5"], "--feature_factor"),
        "an edit that is no number": (
            [*adapt, trained, "--feature_factor", "0", "--step_size", "nan"], "finite"),
        "an edit of another base model": (
            [*adapt, trained, "--base_model", place / "other"], "shape"),
        "a given edit of another base model": (
            [*adapt, trained, "--base_model", place / "other", "--feature_factor", "0",
             "--step_size", "1"], "shape"),
        "a strength that is no number": (
            [*adapt, trained, "--feature_factor", "0", "--step_size", "1", "--strength", "nan"],
            "strength"),
        "a share of the weights above all": (
            [*adapt, trained, "--feature_factor", "0", "--step_size", "1", "--top_k", "1.5"],
            "(0, 1]"),
        "a folder with files of others": (
            ["adapt", "--gradiend", trained, "--output_dir", full], "new or empty folder"),
        "the folder of the GRADIEND itself": (
            ["adapt", "--gradiend", trained, "--output_dir", trained], "new or empty folder"),
        "an unknown benchmark": ([*evaluate, "--benchmarks", "stereo"], "'stereo'"),
        "a benchmark's file that is not there": (
            [*evaluate, "--benchmarks", "crows_pairs"], "crows_pairs.csv"),
        "a strength of nothing": ([*evaluate, "--strength", "1"], "--adapter"),
        "a limit of no items": ([*evaluate, "--limit", "0"], "--limit"),
        "an adapter that is not there": (
            [*evaluate, "--benchmarks", "seat", "--adapter", tmp_path / "none"], "adapter"),
        "a quickstart without a folder": (
            ["quickstart", "--base_model", place / "base", "--output_dir", tmp_path / "file" / "q"],
            "cannot be written"),
        "a quickstart of nothing": (
            ["quickstart", "--base_model", tmp_path / "nothing", "--output_dir", tmp_path / "q"],
            "could not be loaded"),
        "a quickstart without texts": (
            ["quickstart", "--base_model", place / "base", "--output_dir", tmp_path / "q",
             "--max_train_texts", "0"], "max_train_texts"),
    }  # fmt: skip


def test_bad_input_is_one_line_and_exit_code_2(run, bad_input, trained, tmp_path):
    before = sorted(path.name for path in trained.iterdir())

    wrong = {}
    for name, (argv, words) in bad_input.items():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, out, err = run(*argv, "--json")
        lines = err.splitlines()
        fine = code == 2 and len(lines) == 1 and not out
        if not (fine and lines[0].startswith(f"hf-gradiend {argv[0]}: ") and words in lines[0]):
            wrong[name] = (code, out[:200], err[-300:])

    assert not wrong
    assert (tmp_path / "full" / "precious.txt").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in trained.iterdir()) == before
    assert len(bad_input) > 30  # the control: there was something to refuse


@pytest.mark.parametrize(
    "argv",
    [[], ["unknown"], ["train"], ["encode", "--gradiend", "x", "--dataset", "y", "--outptu", "z"]],
)
def test_arguments_that_nobody_knows_are_exit_code_2(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)

    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("hf-gradiend")
