"""Each example, run as its first line says, on a tiny model and few texts."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gradiend.base_models import load_base_model
from hf_gradiend.evaluation.probe import spellings
from hf_gradiend.modeling_gradiend import GradiendModel

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(file.name for file in EXAMPLES.glob("*.py"))
TRAIN = str(EXAMPLES / "train.py")
PICTURES = {"encodings.png", "energy.png"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, session_planted):
    """Folder with a tiny base model, a data set, and a configuration for train.py."""
    folder = tmp_path_factory.mktemp("examples")
    planted = session_planted("gpt2")
    planted.model.save_pretrained(folder / "base")
    planted.tokenizer.save_pretrained(folder / "base")
    rows = [{**row, "split": split} for split, part in planted.data.items() for row in part]
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "data.jsonl").write_text(lines, "utf-8")
    (folder / "config.yaml").write_text(
        "base_model: base\ndataset: data.jsonl\noutput_dir: gradiend\nseed: 7\n"
        "max_train_texts: 32\nfeature_classes: [F, M]\nsave_total_limit: null\n",
        "utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def run(place):
    """Function of a command that runs it in the folder, without network; its two streams."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")},
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(place / "cache"),  # no data-set cache and no launcher's configuration
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }

    def run(*command, code=0, **variables):
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=place, env={**environment, **variables}, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def trained(run, place):
    """What train.py printed under `accelerate launch`, and the folder that it wrote."""
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    out, err = run(*launch, TRAIN, "--config", "config.yaml", "--max_train_texts", "48")
    return SimpleNamespace(out=out, err=err, folder=place / "gradiend")


@pytest.fixture(scope="module")
def debiased(run, trained, place):
    """What debias_and_push.py printed with an edit that moves every prediction, and its folder."""
    out, _ = run(
        EXAMPLES / "debias_and_push.py", "--gradiend", trained.folder, "--output_dir", "debiased",
        "--feature_factor", "0.5", "--step_size", "-0.01", "--top_k", "1.0",
    )  # fmt: skip
    return SimpleNamespace(out=out, folder=place / "debiased")


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeHub:
    """What `hf_gradiend.hub` asks of the Hub; remembers the commits."""

    def __init__(self):
        self.commits = {}

    def __call__(self, **_):
        return self

    def create_repo(self, repo_id, *, private, **_):
        self.commits[repo_id] = {"private": private}
        return SimpleNamespace(repo_id=repo_id)

    def list_repo_files(self, *_, **__):
        return []

    def create_commit(self, repo_id, *, operations, **_):
        self.commits[repo_id]["files"] = {operation.path_in_repo for operation in operations}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr("hf_gradiend.hub.HfApi", fake)
    return fake


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_short_and_names_its_command(name):
    text = (EXAMPLES / name).read_text("utf-8")

    assert len(text.splitlines()) <= 120
    assert f"examples/{name}" in text.split('"""')[1]
    assert f"examples/{name}" in (EXAMPLES / "README.md").read_text("utf-8")


# ---- train.py -----------------------------------------------------------------------------------


def test_train_writes_what_it_promises_and_prints_what_it_measured(trained):
    report = report_of(trained.folder)
    gradiend = GradiendModel.from_pretrained(trained.folder)
    test = report["encoder"]["splits"]["test"]["correlation"]

    assert f"test: correlation {test['value']:.3f} (n = {test['n']})" in trained.out
    assert test["value"] > 0.5
    assert gradiend.config.n_selected == report["n_selected"]
    assert gradiend.config.step_size == report["edit"]["step_size"]
    assert f"imbalance {report['before']['imbalance']:.3f} -> " in trained.out
    if importlib.util.find_spec("matplotlib"):
        assert {file.name for file in trained.folder.glob("*.png")} > PICTURES


def test_train_takes_options_from_the_file_and_the_command_line_has_the_last_word(trained):
    settings = report_of(trained.folder)["settings"]

    assert settings["seed"] == 7  # the file's
    assert settings["max_train_texts"] == 48  # 32 in the file


def test_train_says_that_accelerate_launch_made_one_process_of_two(trained):
    assert "Processes: 1" in trained.out
    said = [line for line in trained.err.splitlines() if "asked for several" in line]
    assert len(said) == 1
    assert "torchrun --standalone --nproc-per-node 2" in said[0]


@pytest.mark.slow
def test_train_on_two_processes_learns_the_same_and_writes_once(run, trained, place):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ("--config", "config.yaml", "--max_train_texts", "48", "--output_dir", "two")
    out, err = run(*launch, TRAIN, *options, ACCELERATE_USE_CPU="true")
    one, two = report_of(trained.folder), report_of(place / "two")

    assert out.count("Processes: 2") == out.count("Wrote two") == 1
    assert "started one" not in err  # two were asked for, and two came
    for split, found in one["encoder"]["splits"].items():
        again = two["encoder"]["splits"][split]["correlation"]["value"]
        assert again == pytest.approx(found["correlation"]["value"], abs=1e-3)


def test_an_unknown_key_of_the_file_is_one_clear_line(run, place):
    (place / "wrong.yaml").write_text("base_model: base\nlearning_rat: 1e-5\n", "utf-8")

    out, err = run(TRAIN, "--config", "wrong.yaml", code=2)

    assert out == ""
    assert err.count("\n") == 1
    assert "unknown key 'learning_rat' in wrong.yaml" in err


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("just words", [], "expected `name: value` in"),
        ("a: [", [], "expected `name: value` in"),
        ("", [], "expected `name: value` in"),
        ("max_train_texts: many", [], "argument --max_train_texts"),
        ("seed: 1", ["--sed", "2"], "unrecognized arguments: --sed 2"),
        ("push_to_hub: true", [], "--push_to_hub needs --hub_model_id"),
    ],
)
def test_bad_input_of_train_is_one_line(content, options, said, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(content, "utf-8")

    with pytest.raises(SystemExit) as stopped:
        example("train").parse(["--config", str(file), *options])

    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in err
    assert err.count("\n") == 1


def test_train_pushes_where_asked_to(place, hub, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(place)
    options = ["--config", "config.yaml", "--output_dir", str(tmp_path)]
    options += ["--push_to_hub", "--hub_model_id", "org/name", "--hub_private_repo", "true"]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])

    example("train").main()

    pushed = hub.commits["org/name"]
    assert pushed["private"] is True
    assert pushed["files"] >= {"README.md", "config.json", "model.safetensors", "report.json"}
    streams = capsys.readouterr()
    assert "Pushed to https://hub/org/name" in streams.out
    # The control: without accelerate launch there is no warning.
    assert "started one" not in streams.err


# ---- debias_and_push.py -------------------------------------------------------------------------


def test_debias_writes_the_edited_model_and_its_adapter(debiased, trained, place):
    base, _ = load_base_model(place / "base")
    gradiend = GradiendModel.from_pretrained(trained.folder)
    edited = AutoModelForCausalLM.from_pretrained(debiased.folder / "edited-model").state_dict()
    expected = gradiend.merge_into(base, 0.5, -0.01).state_dict()

    assert all(torch.equal(edited[name], tensor) for name, tensor in expected.items())
    assert {file.name for file in (debiased.folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def numbers(measures: dict) -> dict[str, float]:
    """The measures without the list of further classes, which is empty for two."""
    assert measures["p_others"] == []
    return {name: value for name, value in measures.items() if name != "p_others"}


def test_debias_reports_the_edit_that_it_took_and_nothing_of_another(debiased, trained):
    report, earlier = report_of(debiased.folder), report_of(trained.folder)
    ratio = report["intervals"]["imbalance"]["ratio"]["value"]

    assert report["edit"] == {"feature_factor": 0.5, "step_size": -0.01}
    assert numbers(report["before"]) == pytest.approx(numbers(earlier["before"]))
    assert numbers(report["after"]) != pytest.approx(numbers(earlier["after"]))
    assert (report["occupations"], report["sweep"]) == ([], [])
    assert report["encoder"] == earlier["encoder"]
    assert re.search(rf"^imbalance .* ratio {ratio:.3f} ", debiased.out, re.MULTILINE)


def test_debias_chooses_again_and_pushes_all_three(trained, hub, monkeypatch, tmp_path, capsys):
    options = ["--gradiend", str(trained.folder), "--output_dir", str(tmp_path), "--choose",
               "--push_to_hub", "--hub_model_id", "org/name"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["debias_and_push.py", *options])
    monkeypatch.chdir(trained.folder.parent)  # the GRADIEND names its base model "base"

    example("debias_and_push").main()

    assert list(hub.commits) == ["org/name", "org/name-adapter", "org/name-gradiend"]
    assert all({"README.md", "report.json"} < made["files"] for made in hub.commits.values())
    assert capsys.readouterr().out.count("Pushed to https://hub/org/name") == 3
    # The same texts and the same search as train.py's.
    assert (
        report_of(tmp_path)["edit"]["step_size"] == report_of(trained.folder)["edit"]["step_size"]
    )


# ---- your_own_feature.py ------------------------------------------------------------------------


def test_a_feature_of_your_own_is_built_learned_and_read(run, place):
    out, _ = run(
        EXAMPLES / "your_own_feature.py", "--spec", EXAMPLES / "hot_and_cold.yaml",
        "--base_model", "base", "--output_dir", "own",
    )  # fmt: skip
    report = report_of(place / "own")
    test = report["encoder"]["splits"]["test"]["correlation"]
    statistics = json.loads((place / "own" / "data" / "statistics.json").read_text("utf-8"))

    assert f"test: correlation {test['value']:.3f} [" in out
    assert test["n"] == statistics["splits"]["test"]["texts"]
    assert report["feature_classes"] == ["cold", "hot"]
    assert (place / "own" / "data" / "README.md").is_file()
    if importlib.util.find_spec("matplotlib"):
        assert (place / "own" / "encodings.png").stat().st_size > 0


def test_two_classes_of_a_shipped_specification_are_learned(run, place):
    out, _ = run(
        EXAMPLES / "your_own_feature.py", "--spec", "religion", "--classes", "jewish", "muslim",
        "--base_model", "base", "--output_dir", "religion",
    )  # fmt: skip

    assert "test: correlation" in out
    assert report_of(place / "religion")["feature_classes"] == ["jewish", "muslim"]


# ---- steer_generation.py, inspect_feature.py ----------------------------------------------------


@torch.no_grad()
def test_steer_prints_a_text_and_both_probabilities_at_each_strength(run, debiased, place):
    prompt = "anna said that"
    out, _ = run(
        EXAMPLES / "steer_generation.py", "--base_model", "base", "--adapter",
        debiased.folder / "adapter", "--prompts", prompt, "--strengths", "0", "1", "-1",
        "--max_new_tokens", "4",
    )  # fmt: skip
    rows = {float(line.split()[0]): line.split()[1:] for line in out.strip().splitlines()[2:]}
    model, tokenizer = load_base_model(place / "base")
    says = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
    expected = [float(says[spellings([word], tokenizer)].sum()) for word in ("she", "he")]

    assert prompt in out
    assert list(rows) == [0.0, 1.0, -1.0]
    assert [float(number) for number in rows[0.0][:2]] == pytest.approx(expected, abs=6e-4)
    assert rows[1.0][:2] != rows[0.0][:2] != rows[-1.0][:2]
    assert all(len(row) > 2 for row in rows.values())


def test_inspect_shows_shares_that_sum_to_one_and_the_largest_weight(run, trained, tmp_path):
    out, _ = run(
        EXAMPLES / "inspect_feature.py", "--gradiend", trained.folder, "--n_weights", "3",
        "--output_dir", tmp_path / "new",
    )  # fmt: skip
    gradiend = GradiendModel.from_pretrained(trained.folder)
    largest = max(
        (float(gradiend.decoder.weight.at(name).detach().abs().max()), name)
        for name in gradiend.names
    )
    kinds, layers = (block for block in out.split("\n\n") if "share of the energy" in block)
    value, place = out.split("largest single weights")[1].splitlines()[1].split("  ")

    for block in (kinds, layers):
        shares = [float(number) for number in re.findall(r"([\d.]+)%", block)]
        assert sum(shares) == pytest.approx(100.0, abs=0.05 * len(shares))
    assert {line.split("  ")[0] for line in layers.splitlines()[1:]} == {"layer 0", "layer 1"}
    assert abs(float(value)) == pytest.approx(largest[0], rel=1e-3)
    assert place.startswith(f"{largest[1]}[")
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "new" / "energy.png").stat().st_size > 0
