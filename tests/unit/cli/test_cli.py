import hashlib
import json
import math
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradiend.adapter.config import feature_factor_of
from hf_gradiend.adapter.control import set_strength
from hf_gradiend.cli import decode, main
from hf_gradiend.cli.common import feature_data, open_texts
from hf_gradiend.data.loading import load_feature_dataset
from hf_gradiend.errors import ConfigError, DataError
from hf_gradiend.evaluation import probe as probe_module
from hf_gradiend.evaluation.bias import benchmark as benchmark_module
from hf_gradiend.evaluation.bias import comparison, suite
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.bias.stereoset import StereoSet
from hf_gradiend.evaluation.bias.suite import run_benchmark
from hf_gradiend.evaluation.probe import EditProbe
from hf_gradiend.metrics import bootstrap_all
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.training.solvers import AdamWSolver

NO_PICTURES = 'No pictures: matplotlib is missing. Install it with pip install "hf_gradiend[plot]".'
ENCODER_KEYS = {"correlation", "accuracy", "n"}


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


def write_lines(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
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
        "seconds", "report_seconds", "peak_rss_bytes", "files",
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


ESTIMATED = ["pruning", "steps", "reading", "saving", "report"]


def test_an_estimate_is_a_plan_and_no_training(run, run_json, place, tmp_path):
    command = (
        "train", "--base_model", place / "base", "--dataset", place / "data.jsonl",
        "--output_dir", tmp_path / "out", "--solver", "adamw", "--max_steps", "3",
        "--prune_fraction", "0.1", "--dtype", "bfloat16", "--gradient_checkpointing", "--estimate",
    )  # fmt: skip

    found = run_json(*command)
    code, out, _ = run(*command)

    assert not (tmp_path / "out").exists()
    assert [phase["name"] for phase in found["phases"]] == ESTIMATED
    largest = max(phase["held_bytes"] + phase["working_bytes"] for phase in found["phases"])
    assert found["peak_bytes"] == found["base_model_bytes"] + found["program_bytes"] + largest
    assert found["seconds"] == sum(phase["seconds"] for phase in found["phases"]) > 0
    assert code == 0
    lines = [line.split()[0] for line in out.splitlines()[2:7]]
    assert lines == ESTIMATED
    assert f"{found['n_selected']:,} weights" in out
    assert "Nothing was trained" in out
    # The control: the same command without the option trains, in the type that it names.
    trained = run_json(*command[:-1])
    assert trained["n_selected"] == pytest.approx(found["n_selected"], abs=15)
    assert (tmp_path / "out" / "report.json").exists()


def test_a_report_reads_texts_within_the_longest_input(run, place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    content = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**content, "model_max_length": 10**30}), "utf-8")
    rows = read_rows(place / "data.jsonl")
    last = next(row for row in reversed(rows) if row["split"] != "train")
    long = {**last, "text": "the nurse said that she was late . " * 20 + last["text"]}
    lines = [json.dumps(row) + "\n" for row in [*rows, long]]
    (tmp_path / "data.jsonl").write_text("".join(lines), "utf-8")
    command = ["train", "--base_model", tmp_path / "base", "--dataset", tmp_path / "data.jsonl",
               "--output_dir", tmp_path / "out"]  # fmt: skip

    code, _, err = run(*command, "--max_length", "48")

    assert code == 0, err
    assert (tmp_path / "out" / "report.json").exists()


def test_an_estimate_of_contrasts_is_refused_before_anything_is_loaded(run, tmp_path):
    code, _, err = run(
        "train", "--base_model", tmp_path / "none", "--dataset", tmp_path / "none.jsonl",
        "--output_dir", tmp_path / "out", "--contrasts", "pairs", "--estimate",
    )  # fmt: skip

    assert code == 2
    assert "--estimate without --contrasts" in err


@pytest.mark.parametrize("other", [["--estimate"], ["--contrasts", "pairs"]], ids=str)
def test_what_starts_anew_does_not_resume(run, tmp_path, other):
    code, _, err = run(
        "train", "--base_model", tmp_path / "none", "--dataset", tmp_path / "none",
        "--output_dir", tmp_path / "out", "--resume", *other,
    )  # fmt: skip

    assert code == 2
    assert f"--resume without {other[0]}" in err


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


# ---- benchmarks ----

GAPS = (
    ("the nurse said that BLANK was late .", "nurse", "gender"),
    ("the doctor said that BLANK was tired .", "doctor", "gender"),
    ("when the nurse came home , BLANK was tired .", "nurse", "profession"),
)
SIDES = {"stereotype": "she", "anti-stereotype": "he", "unrelated": "day"}
PAIRS = (
    ("anna said that she was late .", "anna said that he was late .", "gender"),
    ("paul was late because he was tired .", "paul was late because she was tired .", "gender"),
    ("the nurse was late .", "the doctor was late .", "age"),
)


@pytest.fixture
def bias_data(tmp_path, monkeypatch):
    """A folder with three items each of two benchmarks in a folder, with their own checksums."""
    folder = tmp_path / "data" / "bias"
    folder.mkdir(parents=True)
    rows = {
        side: [
            {"context": context, "sentence": context.replace("BLANK", word), "target": target,
             "bias_type": kind}
            for context, target, kind in GAPS
        ]
        for side, word in SIDES.items()
    }  # fmt: skip
    (folder / "stereoset.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = [f'"{more}","{less}",stereo,{kind}' for more, less, kind in PAIRS]
    head = "sent_more,sent_less,stereo_antistereo,bias_type"
    (folder / "crows_pairs.csv").write_text("\n".join([head, *lines, ""]), encoding="utf-8")
    for kind in (StereoSet, CrowsPairs):
        digests = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in kind.files
        }
        monkeypatch.setattr(kind, "files", digests)
    return folder.parent


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals of 50 resamples, not of 1,000, which would take most of the time."""
    few = partial(bootstrap_all, n_resamples=50)
    for module in (benchmark_module, comparison, probe_module):
        monkeypatch.setattr(module, "bootstrap_all", few)


@pytest.fixture
def asked(monkeypatch):
    """Titles of the benchmarks that a model was asked, in order."""
    found = []
    for kind in (StereoSet, CrowsPairs):
        values = kind.values

        def counted(self, *args, values=values):
            found.append(self.title)
            return values(self, *args)

        monkeypatch.setattr(kind, "values", counted)
    return found


@pytest.fixture(scope="module")
def adapter(place, trained):
    """An adapter, and the model that it makes, merged."""
    edit = ("--feature_factor", "0.5", "--step_size", "0.05")
    assert main(["adapt", "--gradiend", str(trained), "--output_dir", str(place / "adapter"),
                 *edit, "--json"]) == 0  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    shutil.copytree(place / "base", place / "merged")
    PeftModel.from_pretrained(base, place / "adapter").merge_and_unload().save_pretrained(
        place / "merged"
    )
    return place / "adapter"


BENCHMARKS = "stereoset,crows_pairs:gender,stereoset:gender"
MEASURES = {
    "stereoset": ("ss", "lms", "icat"),
    "crows_pairs:gender": ("shared", "different", "sentence"),
    "stereoset:gender": ("ss", "lms", "icat"),
}


@pytest.fixture
def evaluate(place, bias_data, tmp_path):
    return ("evaluate", "--base_model", place / "base", "--benchmarks", BENCHMARKS,
            "--data_dir", bias_data, "--output_dir", tmp_path / "out")  # fmt: skip


def test_evaluating_compares_strengths_and_whole_models_with_the_base_model(
    run_json, evaluate, place, adapter, asked, tmp_path
):
    result = run_json(*evaluate, "--adapter", adapter, "--strength", "0", "1",
                      "--edited_model", place / "merged")  # fmt: skip

    file = tmp_path / "out" / "evaluation.json"
    report = json.loads(file.read_text("utf-8"), parse_constant=pytest.fail)
    assert result == {"output": str(file), **report}
    assert {title: tuple(found) for title, found in report["base"].items()} == MEASURES
    for title, n in (("stereoset", 3), ("crows_pairs:gender", 2), ("stereoset:gender", 2)):
        assert all(estimate["n"] == n for estimate in report["base"][title].values())
    labels = ["adapter at strength 0", "adapter at strength 1", "merged"]
    assert [edit["label"] for edit in report["edited"]] == labels
    zero, one, merged = (edit["rows"] for edit in report["edited"])
    for row in zero:  # the base model
        assert row["before"] == row["after"] == report["base"][row["benchmark"]][row["measure"]]
        assert row["verdict"] == "cannot be told"
    assert one == merged
    # Each model was asked once: strength 0 is the base model, the merged model has the same bits
    # as the adapter at strength 1.
    assert asked == 2 * BENCHMARKS.split(",")
    assert (tmp_path / "out" / "evaluation.png").is_file()


def test_the_benchmarks_ask_the_model_with_the_adapter_in_it(
    run_json, evaluate, place, adapter, bias_data, tmp_path
):
    run_json(*evaluate, "--adapter", adapter, "--strength", "1", "2")

    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    expected = [run_benchmark(StereoSet(), base, tokenizer, bias_data, progress=False).values]
    for strength in (1.0, 2.0):
        model = AutoModelForCausalLM.from_pretrained(place / "base")
        edited = PeftModel.from_pretrained(model, adapter)
        set_strength(edited, strength)
        merged = edited.merge_and_unload()
        expected.append(
            run_benchmark(StereoSet(), merged, tokenizer, bias_data, progress=False).values
        )
    files = list((tmp_path / "out" / "cache").glob("stereoset-[0-9a-f]*.safetensors"))
    kept = [load_file(file)["values"] for file in files]
    kept = [values for values in kept if len(values) == 3]  # not the variant's two
    assert len(kept) == 3
    for values in expected:  # each of the three once, so that they differ from each other
        assert sum(torch.allclose(values, other, rtol=1e-4, atol=0.0) for other in kept) == 1


def test_what_was_asked_once_is_taken_from_the_cache(run_json, evaluate, adapter, asked, tmp_path):
    argv = (*evaluate, "--adapter", adapter, "--strength", "1")
    first = run_json(*argv)
    n_asked, files = len(asked), sorted((tmp_path / "out" / "cache").iterdir())
    times = [file.stat().st_mtime_ns for file in files]

    second = run_json(*argv)

    assert len(asked) == n_asked == 6
    assert sorted((tmp_path / "out" / "cache").iterdir()) == files
    assert [file.stat().st_mtime_ns for file in files] == times
    assert {**second, "seconds": None} == {**first, "seconds": None}
    run_json(*argv, "--limit", "1")
    assert len(asked) == 12  # the control: other items are asked


def test_a_limit_takes_some_items_and_is_reported(run_json, evaluate):
    result = run_json(*evaluate, "--limit", "2")

    assert result["limit"] == 2
    assert result["edited"] == []
    assert all(e["n"] == 2 for found in result["base"].values() for e in found.values())


def test_people_get_tables_of_the_benchmarks_and_what_can_be_told(run, evaluate, adapter):
    code, alone, _ = run(*evaluate)
    again, out, _ = run(*evaluate, "--adapter", adapter)

    assert code == again == 0
    for text, head in (
        (alone, ["benchmark", "measure", "n", "value", "95", "%", "interval"]),
        (out, ["benchmark", "measure", "n", "before", "after", "change", "95", "%", "interval",
               "verdict"]),
    ):  # fmt: skip
        lines = [line.split() for line in text.splitlines()]
        assert head in lines
        rows = [tuple(line[:2]) for line in lines]
        assert all((title, m) in rows for title, names in MEASURES.items() for m in names)
    assert "adapter at strength 1" in out.splitlines()
    assert [line.partition(":")[0] for line in out.splitlines() if line.endswith(".")][:3] == [
        "Better", "Worse", "Cannot be told"
    ]  # fmt: skip
    assert "evaluation.json" in out.splitlines()[-1]


def test_models_of_the_same_name_keep_apart(run_json, evaluate, place, adapter, tmp_path):
    shutil.copytree(place / "base", tmp_path / "merged")

    result = run_json(*evaluate, "--adapter", adapter, "--strength", "1", "1",
                      "--edited_model", place / "merged",
                      "--edited_model", tmp_path / "merged")  # fmt: skip

    rows = {edit["label"]: edit["rows"] for edit in result["edited"]}
    assert list(rows) == [
        "adapter at strength 1", "adapter at strength 1 (2)", "merged", "merged (2)"
    ]  # fmt: skip
    assert rows["adapter at strength 1"] == rows["adapter at strength 1 (2)"] == rows["merged"]
    assert all(row["before"] == row["after"] for row in rows["merged (2)"])


def test_models_of_the_same_name_with_brackets_keep_apart(run_json, evaluate, place, tmp_path):
    for folder in ("one", "two"):
        shutil.copytree(place / "base", tmp_path / folder / "model (1)")

    result = run_json(*evaluate, "--edited_model", tmp_path / "one" / "model (1)",
                      "--edited_model", tmp_path / "two" / "model (1)")  # fmt: skip

    assert len(result["edited"]) == 2


@pytest.fixture
def bad_evaluations(place, trained, adapter, bias_data, tmp_path, monkeypatch):
    """Arguments with what is wrong with them, and words of the message."""
    download = suite.snapshot_download

    def offline(repo_id, **options):  # a name that is none is refused without a network
        if repo_id.startswith("nobody/"):
            raise LocalEntryNotFoundError("Cannot find the snapshot on the Hub.\nAre you online?")
        return download(repo_id, **options)

    monkeypatch.setattr(suite, "snapshot_download", offline)
    broken = tmp_path / "nan"
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    shutil.copytree(place / "base", broken)
    model.save_pretrained(broken)
    other = tmp_path / "other" / "bias"
    shutil.copytree(bias_data / "bias", other)
    (other / "crows_pairs.csv").write_text("sent_more\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    base = ("--base_model", place / "base")
    data = ("--data_dir", bias_data)
    return {
        "an unknown benchmark": ((*base, *data, "--benchmarks", "stereoset,stereo"), "'stereo'"),
        "no benchmark": ((*base, *data, "--benchmarks", ""), "''"),
        "an unknown variant": ((*base, *data, "--benchmarks", "stereoset:age"), "'age'"),
        "a variant of nothing": ((*base, *data, "--benchmarks", "crows_pairs:religion"), "is none"),
        "an empty folder": ((*base, "--data_dir", tmp_path / "empty"), "stereoset.json"),
        "another file": (
            (*base, "--data_dir", other.parent, "--benchmarks", "crows_pairs"), "SHA-256"),
        "no folder and no name of the Hub": (
            (*base, "--data_dir", tmp_path / "no" / "where"), "is neither"),
        "no data set": ((*base, "--data_dir", "nobody/nothing"), "is neither"),
        "a limit of nothing": ((*base, *data, "--limit", "0"), "--limit"),
        "a negative limit": ((*base, *data, "--limit", "-3"), "--limit"),
        "a model without weights": (
            ("--base_model", tmp_path / "empty", *data), "could not be loaded"),
        "a GRADIEND in place of a model": (("--base_model", trained, *data), "hf-gradiend"),
        "a model that says NaN": (("--base_model", broken, *data), "NaN"),
        "an edited model that says NaN": ((*base, *data, "--edited_model", broken), "NaN"),
        "no edited model": (
            (*base, *data, "--edited_model", tmp_path / "empty"), "could not be loaded"),
        "no adapter": ((*base, *data, "--adapter", tmp_path / "empty"), "adapter"),
        "a model in place of an adapter": ((*base, *data, "--adapter", place / "merged"), ""),
        "an adapter of another model": (
            ("--base_model", place / "other", *data, "--adapter", adapter), "shape"),
        "a strength without an adapter": ((*base, *data, "--strength", "0"), "--adapter"),
        "a strength that is no number": (
            (*base, *data, "--adapter", adapter, "--strength", "nan"), "strength"),
        "no report": ((*base, *data, "--report", tmp_path / "none.json"), "none.json"),
        "a report that is none": ((*base, *data, "--report", tmp_path / "list.json"), "object"),
    }  # fmt: skip


def test_a_bad_evaluation_is_one_line_and_leaves_no_result(run, bad_evaluations, tmp_path):
    wrong = {}
    for name, (argv, words) in bad_evaluations.items():
        out_dir = tmp_path / "out"
        shutil.rmtree(out_dir, ignore_errors=True)
        options = () if "--benchmarks" in argv else ("--benchmarks", "stereoset")
        code, out, err = run("evaluate", "--output_dir", out_dir, *options, *argv, "--json")
        lines = err.splitlines()
        left = [path.name for path in out_dir.rglob("*") if path.is_file()]
        kept = all(name.startswith("stereoset-") for name in left)  # complete values of a model
        if not (
            code == 2
            and len(lines) == 1
            and lines[0].startswith("hf-gradiend evaluate: ")
            and words in lines[0]
            and not out
            and kept
            and not any(name.endswith(".partial") for name in left)
        ):
            wrong[name] = (code, out[:200], err[-300:], left)

    assert not wrong
    assert len(bad_evaluations) > 20


@pytest.mark.parametrize(
    "name", ["no adapter", "no edited model", "an adapter of another model", "missing file"]
)
def test_what_is_missing_is_said_before_the_base_model_is_asked(
    run, bad_evaluations, bias_data, place, tmp_path, asked, name
):
    if name == "missing file":
        (bias_data / "bias" / "crows_pairs.csv").unlink()
        argv = ("--base_model", place / "base", "--data_dir", bias_data)
    else:
        argv = bad_evaluations[name][0]

    code, _, _ = run("evaluate", "--output_dir", tmp_path / "out", *argv,
                     "--benchmarks", "stereoset,crows_pairs", "--json")  # fmt: skip

    assert code == 2
    assert asked == []


def test_the_result_goes_into_the_report_of_a_training(run_json, run, evaluate, trained, tmp_path):
    report = tmp_path / "report.json"
    shutil.copy(trained / "report.json", report)
    before = json.loads(report.read_text("utf-8"))

    result = run_json(*evaluate, "--report", report)

    after = json.loads(report.read_text("utf-8"))
    assert {**after, "evaluation": None} == {**before, "evaluation": None}
    assert {"output": result["output"], **after["evaluation"]} == result
    text = report.read_bytes()
    code, _, _ = run(*evaluate, "--report", report, "--limit", "0")
    assert code == 2
    assert report.read_bytes() == text


# ---- edits over a grid ----

SLOTTED = [
    "the doctor said that [TARGET] was late .",
    "the nurse went home because [TARGET] was tired .",
    "when the nurse came home , [TARGET] was tired .",
    "the doctor was late because [TARGET] was tired .",
]
PLAIN = [
    "the doctor took the red coat home .",
    "the day was long because the rain began .",
    "the nurse took the coat off .",
]


@pytest.fixture
def texts(tmp_path):
    """Options with prompts and neutral texts of our own."""
    for name, lines in (("prompts", SLOTTED), ("neutral", PLAIN)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "--prompts", tmp_path / "prompts.txt", "--neutral", tmp_path / "neutral.txt"


GRID = ("--feature_factors", "-1", "0", "1", "--step_sizes", "-0.1", "-0.02", "0.02", "0.1")


def test_decoding_measures_a_grid_and_judges_what_each_rule_chooses(
    run_json, place, trained, texts, tmp_path
):
    result = run_json("decode", "--gradiend", trained, "--output_dir", tmp_path / "out", *texts,
                      *GRID, "--max_trials", "3")  # fmt: skip

    file = tmp_path / "out" / "decoder.json"
    report = json.loads(file.read_text("utf-8"), parse_constant=pytest.fail)
    assert {"output": str(file), **{k: v for k, v in report.items() if k != "grid"}} == result
    assert (tmp_path / "out" / "decoder.png").stat().st_size > 1_000
    assert report["classes"] == ["F", "M"]
    assert [(row["feature_factor"], row["step_size"]) for row in report["grid"]] == [
        (h, alpha) for h in (-1.0, 0.0, 1.0) for alpha in (-0.1, -0.02, 0.02, 0.1)
    ]
    assert len(report["choices"]) + len(report["without_choice"]) == 7
    # By hand: the first half of the prompts chooses, the second half judges.
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    gradiend = GradiendModel.from_pretrained(trained)
    choosing, judging = (
        EditProbe([{"text": t} for t in prompts], (["she"], ["he"]), neutral, model, tokenizer)
        for prompts, neutral in (
            (SLOTTED[:2], PLAIN[:1]), (SLOTTED[2:], [" ".join(PLAIN[1:])])
        )
    )  # fmt: skip
    for key, probe in (("before", choosing), ("judged_before", judging)):
        assert report[key] == {**vars(probe.measure()), "p_others": []}
    for choice in (report["choices"][0], report["choices"][-1]):
        with gradiend.edited(model, choice["feature_factor"], choice["step_size"]):
            assert choice["chosen_after"] == {**vars(choosing.measure()), "p_others": []}
            assert choice["judged_after"] == {**vars(judging.measure()), "p_others": []}


@pytest.mark.parametrize("name", ["number", "religion"])
def test_sentences_of_a_shipped_feature_serve_to_choose_and_to_judge(name):
    texts = open_texts(name)

    data = feature_data(name)
    half = len(texts) // 2
    assert half * 2 == len({*texts})
    for part, split in ((texts[:half], "validation"), (texts[half:], "test")):
        classes: dict[str, set[str]] = {}
        for text, label in zip(data[split]["text"], data[split]["factual_class"], strict=True):
            classes.setdefault(text, set()).add(label)
        assert all(classes[text] == {*data["train"]["factual_class"]} for text in part)


def test_sentences_that_tell_the_class_are_refused():
    with pytest.raises(DataError, match="those of 'gender' tell it"):
        open_texts("gender")


def test_decoding_gender_needs_no_texts(run, trained, tmp_path):
    code, out, _ = run("decode", "--gradiend", trained, "--output_dir", tmp_path / "out",
                       "--feature_factors", "0", "1", "--step_sizes", "-0.02", "0.02",
                       "--max_trials", "1")  # fmt: skip

    assert code == 0
    report = json.loads((tmp_path / "out" / "decoder.json").read_text("utf-8"))
    assert len(report["grid"]) == 4
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("rule, judged"))
    assert lines[head].split()[-5:] == ["imbalance", "mass", "p_plus", "p_minus", "lm_score"]
    assert lines[head + 2].startswith("base model")
    for number, choice in enumerate(report["choices"]):
        row = lines[head + 3 + number]
        assert row.startswith(f"{choice['criterion']}, {choice['rule']} ")
        assert f"{choice['judged_after']['imbalance']:.4f}" in row
    assert "decoder.json" in lines[-1]


# The base model itself, and edits that all break it.
@pytest.mark.parametrize(("step_size", "n_points"), [("0", 1), ("1e38", 0)])
def test_a_grid_without_a_better_edit_is_told(run, trained, texts, tmp_path, step_size, n_points):
    code, out, _ = run("decode", "--gradiend", trained, "--output_dir", tmp_path / "out", *texts,
                       "--feature_factors", "1", "--step_sizes", step_size)  # fmt: skip

    assert code == 0
    report = json.loads((tmp_path / "out" / "decoder.json").read_text("utf-8"))
    assert (len(report["grid"]), len(report["choices"])) == (n_points, 0)
    assert len(report["without_choice"]) == 7
    assert sum(line.endswith("no edit is better than the base model.")
               for line in out.splitlines()) == 7  # fmt: skip
    assert (tmp_path / "out" / "decoder.png").is_file() or not n_points


def test_a_bad_decoding_is_one_line_and_leaves_no_result(run, place, trained, texts, tmp_path):
    of_others = tmp_path / "of-others"
    shutil.copytree(trained, of_others)
    config = json.loads((of_others / "config.json").read_text("utf-8"))
    config["feature_words"] = {"F": ["was"], "M": ["the"]}
    (of_others / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, lines in (("one", SLOTTED[:1]), ("plain", PLAIN), ("slotted", SLOTTED)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    begun = ["[TARGET] was late .", "[TARGET] came home .", *SLOTTED[:2]]
    (tmp_path / "begun.txt").write_text("\n".join(begun), encoding="utf-8")
    neutral = texts[2:]
    mine = ("--gradiend", trained)
    bad = {
        "half a grid": ((*mine, *texts, "--step_sizes", "0.1"), "--feature_factors"),
        "the other half": ((*mine, *texts, "--feature_factors", "0"), "--step_sizes"),
        "no GRADIEND": (("--gradiend", tmp_path / "none", *texts), "could not be loaded"),
        "a model in its place": (("--gradiend", place / "base", *texts), "GRADIEND"),
        "another base model": ((*mine, *texts, "--base_model", place / "other"), "shape"),
        "no base model": ((*mine, *texts, "--base_model", tmp_path / "none"), "be loaded"),
        "no prompts there": ((*mine, "--prompts", tmp_path / "none.txt"), "none.txt"),
        "one prompt": ((*mine, "--prompts", tmp_path / "one.txt"), "two or more"),
        "prompts without a slot": ((*mine, "--prompts", tmp_path / "plain.txt"), "[TARGET]"),
        "prompts without room": (
            (*mine, "--prompts", tmp_path / "begun.txt", *neutral), "room for its target"),
        "neutral texts with a slot": (
            (*mine, "--neutral", tmp_path / "slotted.txt"), "without the slot"),
        "one neutral text": (
            (*mine, *texts[:2], "--neutral", write_lines(tmp_path / "line.txt", PLAIN[:1])),
            "neutral texts"),
        "another feature without prompts": (("--gradiend", of_others, *neutral), "[TARGET]"),
        "a folder that cannot be written": (
            (*mine, *texts, "--output_dir", tmp_path / "one.txt" / "out"), "cannot be written"),
    }  # fmt: skip

    wrong = {}
    for name, (argv, words) in bad.items():
        out_dir = tmp_path / "out"
        shutil.rmtree(out_dir, ignore_errors=True)
        code, out, err = run("decode", "--output_dir", out_dir, *GRID[:0], *argv, "--json")
        lines = err.splitlines()
        fine = code == 2 and len(lines) == 1 and words in lines[0] and not out
        if not fine or list(out_dir.glob("*")):
            wrong[name] = (code, out[:200], err[-300:])

    assert not wrong


@pytest.mark.parametrize(
    "options",
    [
        ("--feature_factors", "0", "--step_sizes", "nan"),
        ("--feature_factors", "inf", "--step_sizes", "0.1"),
        ("--feature_factors", "0", "--step_sizes", "0.1", "--max_trials", "-1"),
    ],
)
def test_numbers_out_of_range_are_refused(run, trained, texts, monkeypatch, tmp_path, options):
    monkeypatch.setattr(decode, "plot_decoder", lambda _report, path: path)

    code, _, _ = run("decode", "--gradiend", trained, "--output_dir", tmp_path / "out", *texts,
                     *options, "--json")  # fmt: skip

    assert code == 2


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


@pytest.mark.parametrize("command", ["evaluate", "decode", "quickstart"])
def test_without_matplotlib_people_are_told_once_and_machines_get_json(
    run, evaluate, place, trained, texts, monkeypatch, tmp_path, command
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = {
        "evaluate": (*evaluate, "--limit", "2"),
        "decode": ("decode", "--gradiend", trained, "--output_dir", tmp_path / "out", *texts,
                   "--feature_factors", "0", "--step_sizes", "0.1", "--max_trials", "0"),
        "quickstart": ("quickstart", "--base_model", place / "base", "--dataset",
                       place / "data.jsonl", "--output_dir", tmp_path / "out", "--fast"),
    }[command]  # fmt: skip

    code, out, _ = run(*argv)
    again, machine, _ = run(*argv, "--json")

    assert code == again == 0
    assert out.splitlines().count(NO_PICTURES) == 1
    assert isinstance(json.loads(machine), dict)  # and nothing else
    assert not list(tmp_path.rglob("*.png"))


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
        "other classes": ([*with_data, "--feature_classes", "F", "X"], "two of the classes"),
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
            ["adapt", "--gradiend", trained, "--output_dir", full],
            "holds files. Choose another --output_dir, or empty it."),
        "the folder of the GRADIEND itself": (
            ["adapt", "--gradiend", trained, "--output_dir", trained],
            "new or empty folder for the adapter"),
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
