"""The command that compares GRADIENDs, on folders as people have them."""

import json
import sys

import pytest
import torch

from hf_gradiend.cli import main
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import select_parameters


def save_gradiend(model, folder, seed, **settings):
    selection = select_parameters(model)
    gradiend = GradiendModel(
        GradiendConfig(
            parameters=selection.to_config(),
            feature_classes=[["F", "M"]],
            objective="causal",
            decoder_initialization="uniform",
            **settings,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gradiend.parameters():
            parameter.copy_(1e-3 * torch.randn(parameter.shape, generator=generator))
    gradiend.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory, session_planted):
    """A base model, two GRADIENDs of it, one of another base model, and a data set."""
    folder = tmp_path_factory.mktemp("place")
    planted = session_planted("gpt2")
    planted.model.save_pretrained(folder / "base")
    planted.tokenizer.save_pretrained(folder / "base")
    narrow = type(planted.model.config)(**{**planted.model.config.to_dict(), "n_embd": 8})
    base = {"base_model_name_or_path": str(folder / "base")}
    save_gradiend(planted.model, folder / "one", 1, **base)
    save_gradiend(planted.model, folder / "two", 2, **base)
    save_gradiend(planted.model, folder / "elsewhere", 2, base_model_name_or_path="org/other")
    save_gradiend(type(planted.model)(narrow), folder / "narrow", 3, **base)
    rows = [{**row, "split": split} for split, part in planted.data.items() for row in part]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "names.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run(capsys, tmp_path):
    """Function of arguments that gives the exit code and the two streams."""

    def run(*argv):
        capsys.readouterr()
        code = main(["compare", *map(str, argv), "--output_dir", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    return run


def test_the_command_writes_what_it_found_and_prints_it(run, place, tmp_path):
    code, out, _ = run(
        "--gradiend", f"first={place / 'one'}", "--gradiend", place / "two",
        "--dataset", place / "names.jsonl", "--dataset", f"again={place / 'names.jsonl'}",
        "--top_k", "0.1",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "features.json").read_text("utf-8"))

    assert code == 0
    assert [feature["name"] for feature in report["features"]] == ["first", "two"]
    assert (report["base_model"], report["split"], report["top_k"]) == ("base", "test", 0.1)
    assert [(row["feature"], row["dataset"]) for row in report["readings"]] == [
        (feature, data) for feature in ("first", "two") for data in ("names", "again")
    ]
    assert {(row["n"], row["own"]) for row in report["readings"]} == {(48, True)}
    assert (tmp_path / "out" / "features.png").stat().st_size > 0
    tables = [part.splitlines() for part in out.strip().split("\n\n")]
    cosines = dict(line.split(maxsplit=1) for line in tables[1][2:])
    assert tables[1][0].split() == ["cosine", "of", "the", "decoders", "first", "two"]
    assert cosines["first"].split() == ["1.000", f"{report['decoder_cosines'][0][1]:.3f}"]
    assert tables[2][0].startswith("top 10 % of |W_d| shared")
    assert f"{report['overlaps'][0][1]:.3f}" in tables[2][2]
    reading = report["readings"][0]
    assert tables[4][2].split()[:8] == [
        "first:", "names", "F", "M", "48", f"{reading['mean_absolute']:.3f}",
        f"{reading['gap']:.3f}", f"{reading['correlation']['value']:.3f}",
    ]  # fmt: skip
    assert str(tmp_path / "out" / "features.png") in tables[-1][-1]
    assert "No pictures" not in out


def test_without_matplotlib_people_are_told_and_machines_get_json(
    run, place, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    code, out, _ = run("--gradiend", place / "one")
    again, machine, _ = run("--gradiend", place / "one", "--json")

    assert code == again == 0
    assert sum(line.startswith("No pictures: matplotlib") for line in out.splitlines()) == 1
    assert json.loads(machine)["output"].endswith("features.json")
    assert not (tmp_path / "out" / "features.png").exists()


def test_json_is_the_last_line_and_the_file(run, place, tmp_path):
    code, out, err = run("--gradiend", place / "one", "--gradiend", place / "two", "--split",
                         "validation", "--dataset", place / "names.jsonl", "--json")  # fmt: skip
    result = json.loads(out, parse_constant=pytest.fail)
    path = tmp_path / "out" / "features.json"

    assert code == 0
    assert err == ""
    assert result == {"output": str(path), **json.loads(path.read_text("utf-8"))}
    assert result["split"] == "validation"


def test_weights_alone_are_compared_without_a_data_set(run, place):
    code, out, _ = run("--gradiend", place / "one", "--gradiend", place / "two", "--json")

    assert code == 0
    assert json.loads(out)["readings"] == []


def test_one_base_model_in_two_places_is_named_on_the_command_line(run, place):
    both = ["--gradiend", place / "one", "--gradiend", place / "elsewhere"]

    refused, _, err = run(*both)
    code, out, _ = run(*both, "--base_model", place / "base", "--json")

    assert refused == 2
    assert "elsewhere of org/other" in err
    assert "--base_model" in err
    assert code == 0
    assert json.loads(out)["base_model"] == "base"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gradiend", "{}/one", "--gradiend", "{}/base/../one"], "'one' stands for"),
        (["--gradiend", "a={}/one", "--gradiend", "a={}/two"], "'a' stands for"),
        (["--gradiend", "={}/one"], "NAME=DIR"),
        (["--gradiend", "a="], "NAME=DIR"),
        (["--gradiend", "{}/nowhere"], "could not be loaded"),
        (["--gradiend", "{}/one", "--gradiend", "{}/narrow"], "'narrow' does not fit"),
        (["--gradiend", "{}/one", "--dataset", "{}/nothing.jsonl"], "nothing.jsonl"),
        (["--gradiend", "{}/one", "--dataset", "{}/names.jsonl", "--split", "dev"], "'dev'"),
        (["--gradiend", "{}/one", "--top_k", "0"], "top_k in (0, 1]"),
    ],
)
def test_bad_input_is_one_line(run, place, argv, message):
    code, out, err = run(*(argument.replace("{}", str(place)) for argument in argv), "--json")

    assert code == 2
    assert out == ""
    assert err.startswith("hf-gradiend compare: ")
    assert message in err
    assert err.count("\n") == 1
