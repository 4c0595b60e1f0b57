"""What cannot be loaded or pushed is refused in one clear line, before anything changes."""

import ast
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

BASE = "acme/tiny-gpt2"
PACKAGE = Path(__file__).parents[2] / "hf_gradiend"


@pytest.fixture(scope="module")
def broken(hub, published, tmp_path_factory):
    """Repositories that are no GRADIEND, or no whole one."""
    assert published
    gradiend = hub["acme/gradiend"].files()
    adapter = hub["acme/gradiend-adapter"].files()
    half = {name: content[: len(content) // 2] for name, content in gradiend.items()}
    half_adapter = {name: content[: len(content) // 2] for name, content in adapter.items()}
    pickled = tmp_path_factory.mktemp("pickled") / "pytorch_model.bin"
    torch.save(safetensors.torch.load(gradiend["model.safetensors"]), pickled)
    weights = {"model.safetensors"}
    hub.plant("acme/config-cut", {**gradiend, "config.json": half["config.json"]})
    config = json.loads(gradiend["config.json"])
    config["parameters"] = "all"
    hub.plant("acme/config-odd", {**gradiend, "config.json": json.dumps(config).encode()})
    hub.plant("acme/weights-cut", {**gradiend, "model.safetensors": half["model.safetensors"]})
    hub.plant("acme/no-weights", {n: c for n, c in gradiend.items() if n not in weights})
    hub.plant("acme/pickled", {
        "config.json": gradiend["config.json"], "pytorch_model.bin": pickled.read_bytes()
    })  # fmt: skip
    hub.plant("acme/adapter-cut", {
        **adapter, "adapter_model.safetensors": half_adapter["adapter_model.safetensors"]
    })  # fmt: skip
    hub.plant("acme/adapter-config-cut", {
        **adapter, "adapter_config.json": half_adapter["adapter_config.json"]
    })  # fmt: skip


PLACES = {
    "a language model": BASE,
    "an adapter": "acme/gradiend-adapter",
    "half a config.json": "acme/config-cut",
    "a config.json with other content": "acme/config-odd",
    "half of the weights": "acme/weights-cut",
    "no weights": "acme/no-weights",
    "a pickle alone": "acme/pickled",
    "no such repository": "acme/missing",
    "no such name": "acme/a/b",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_no_gradiend(reader, broken, failed, place):  # noqa: ARG001 - they have to be there
    with pytest.raises(failed) as caught:
        reader.gradiend_numbers(place)

    assert {"OSError", "ValueError"} & set(caught.value.kinds)
    assert 20 < len(caught.value.line) < 400


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_no_gradiend_for_the_command_line(reader, broken, tmp_path, place):  # noqa: ARG001
    code, out, err = reader.command_line(
        "adapt", "--gradiend", place, "--output_dir", str(tmp_path / "out")
    )

    assert code == 2
    assert not out
    lines = [line for line in err.splitlines() if line.startswith("hf-gradiend adapt: ")]
    assert len(lines) == 1
    assert "Expected the folder or Hub id of a GRADIEND" in lines[0]
    assert place in lines[0]


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_no_gradiend_to_take_an_adapter_from(reader, broken, failed, place):  # noqa: ARG001
    with pytest.raises(failed) as caught:
        reader.make_adapter_config(place)

    assert "ConfigError" in caught.value.kinds
    assert caught.value.line == caught.value.message
    assert place in caught.value.line


def test_the_same_places_whole_are_loaded(reader, published):
    """The control of the refusals above."""
    assert published
    reader.gradiend_numbers("acme/gradiend")
    reader.make_adapter_config("acme/gradiend")
    reader.load_adapter("acme/gradiend-adapter")


@pytest.mark.parametrize(
    "place",
    [BASE, "acme/gradiend", "acme/adapter-cut", "acme/adapter-config-cut", "acme/missing",
     "acme/a/b"],
)  # fmt: skip
def test_no_adapter(reader, broken, failed, place):  # noqa: ARG001
    with pytest.raises(failed) as caught:
        reader.load_adapter(place)

    assert "ConfigError" in caught.value.kinds
    assert caught.value.line == caught.value.message


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter"])
def test_half_an_adapter_never_acts(reader, broken, work, way):  # noqa: ARG001
    """peft puts its layers in before it reads the file, so they are there without values."""
    errors, logits = reader.load_broken_adapter(way, "acme/adapter-cut", BASE)

    assert len(errors) == 2  # peft's own, and ours of layers without values
    assert "whole file" in errors[1]
    assert logits == work.base_logits
    control, edited = reader.load_broken_adapter(way, "acme/gradiend-adapter", BASE)
    assert not control
    assert edited == work.adapter_logits != logits


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter"])
def test_an_adapter_with_half_a_configuration_is_not_put_in(reader, broken, work, way):  # noqa: ARG001
    errors, logits = reader.load_broken_adapter(way, "acme/adapter-config-cut", BASE)

    assert len(errors) == 1
    assert logits == work.base_logits


# ---- pushes ----


@pytest.fixture
def refused_push(hub, author, work):
    """Function of arguments of `hf-gradiend push` that gives its one line; nothing may change."""

    def refused_push(token="hf_test_user", **options):
        given = {"kind": "gradiend", "folder": work.gradiend, "repo_id": "acme/refused", **options}
        argv = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        before = {name: repository.state() for name, repository in hub.repositories.items()}

        code, out, err = author.command_line("push", *argv, token=token)

        assert code == 2, err
        assert not out
        (line,) = err.splitlines()
        assert line.startswith("hf-gradiend push: Expected ")
        after = {name: repository.state() for name, repository in hub.repositories.items()}
        assert after == before
        return line

    return refused_push


@pytest.mark.parametrize(
    "repo_id", ["acme/a/b", "acme/with space", "acme/-a", "with space", "a--b"]
)
def test_a_name_that_is_not_allowed(refused_push, repo_id):
    line = refused_push(repo_id=repo_id)

    assert "org/name" in line
    assert repo_id in line


@pytest.mark.parametrize("repo_id", ["acme/refused", "others/refused", "acme/gradiend"])
def test_no_right_to_write(refused_push, published, repo_id):
    assert published
    line = refused_push(repo_id=repo_id, token="hf_reader")

    assert repo_id in line
    assert "403" in line
    assert "hf auth login" in line


@pytest.mark.parametrize("token", ["", "hf_unknown"])
@pytest.mark.parametrize("repo_id", ["acme/refused", "bare"])
def test_no_token_or_one_that_nobody_knows(refused_push, token, repo_id):
    assert "hf auth login" in refused_push(token=token, repo_id=repo_id)


@pytest.mark.parametrize(
    ("kind", "folder"),
    [("gradiend", "adapter"), ("gradiend", "debiased"), ("adapter", "gradiend"),
     ("adapter", "debiased"), ("model", "gradiend"), ("model", "adapter")],
)  # fmt: skip
def test_a_kind_that_the_folder_is_not(refused_push, work, kind, folder):
    line = refused_push(kind=kind, folder=getattr(work, folder))

    assert getattr(work, folder) in line


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_folder_with_a_broken_configuration(refused_push, tmp_path, content):
    (tmp_path / "config.json").write_text(content)

    assert str(tmp_path) in refused_push(folder=tmp_path)


def test_a_folder_that_does_not_exist(refused_push, tmp_path):
    assert "nowhere" in refused_push(folder=tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1}', '{"format": 2}'])
def test_a_report_of_another_form(refused_push, tmp_path, content):
    (tmp_path / "report.json").write_text(content)

    assert "report" in refused_push(report=tmp_path / "report.json")


def test_a_report_that_does_not_exist(refused_push, tmp_path):
    assert "nowhere.json" in refused_push(report=tmp_path / "nowhere.json")


def test_a_report_without_an_edit_for_a_card_about_one(refused_push, work, tmp_path):
    report = json.loads(work.report.read_text()) | {"edit": None}
    (tmp_path / "report.json").write_text(json.dumps(report))

    line = refused_push(kind="adapter", folder=work.adapter, report=tmp_path / "report.json")
    assert "edit" in line


# ---- pickles ----


def test_a_pickle_is_never_opened(hub, reader, broken, failed):  # noqa: ARG001
    with pytest.raises(failed):
        reader.gradiend_numbers("acme/pickled")

    assert "pytorch_model.bin" not in hub.downloaded("acme/pickled")


def test_the_package_reads_no_code_from_pickles():
    calls = [
        node
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith((".load", ".loads", ".Unpickler"))
        and ast.unparse(node.func).startswith(("torch.", "pickle.", "joblib.", "dill."))
    ]
    assert calls  # the control: the weights of the first code's checkpoints are pickles
    for call in calls:
        assert ast.unparse(call.func) == "torch.load"
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"
