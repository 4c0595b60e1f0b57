"""Checkpoints that the official package `gradiend` itself has made, read by this one."""

import copy
import csv
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_gradiend.base_models import load_base_model
from hf_gradiend.modeling_gradiend import GradiendModel

SCRIPT = Path(__file__).with_name("make_gradiend_checkpoint.py")
LONGEST = 256  # gradiend pads every text to it while training, whatever the base model takes
COLUMNS = ("masked", "label", "label_class", "alternative", "alternative_class", "split")

MASKED = (
    "factual",
    "alternative",
    "diff",
    "indices",
    "mixed",
    "bin",
    "pruned_bin",
    "named_objective",
    "layers",
)
ALL = (*MASKED, "two_features", "gpt2", "gpt2_indices")


@dataclass(frozen=True)
class Official:
    """A checkpoint and what the official package computed with it, as its script describes it."""

    gradiend: GradiendModel
    tensors: dict[str, Tensor]
    texts: list[dict[str, str]]
    mean_by_feature_class: dict[str, float] | None

    def by_name(self, kind: str) -> dict[str, Tensor]:
        """`gradient` or `decoded` of each parameter, of shape (texts, *shape)."""
        found = {name: t for name, t in self.tensors.items() if name.startswith(f"{kind}.")}
        return {name.removeprefix(f"{kind}."): tensor for name, tensor in found.items()}

    def dataset(self) -> Dataset:
        """The texts in this package's form."""
        rows = [
            {
                "text": row["masked"].replace("[MASK]", "[TARGET]"),
                "factual": row["label"],
                "counterfactual": row["alternative"],
            }
            for row in self.texts
        ]
        return Dataset.from_list(rows)


def with_more_positions(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = LONGEST  # GPT-2's n_positions, by its other name
    longer = type(model)(config)
    with torch.no_grad():
        for parameter, original in zip(longer.parameters(), model.parameters(), strict=True):
            parameter[: len(original)] = original
    return longer


def write_base(folder: Path, planted) -> None:
    folder.mkdir(parents=True)
    with_more_positions(planted.model).save_pretrained(folder)
    planted.tokenizer.save_pretrained(folder)
    with (folder / "data.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for split, rows in planted.data.items():
            for row in rows:
                text = row["text"].replace("[TARGET]", "[MASK]")
                own = (row["factual"], row["factual_class"])
                other = (row["counterfactual"], row["counterfactual_class"])
                writer.writerow([text, *own, *other, split])


@pytest.fixture(scope="session")
def made(session_planted, tmp_path_factory):
    """Folder with the checkpoints of all cases."""
    interpreter = os.environ.get("HF_GRADIEND_PEER_PYTHON")
    if not interpreter:
        pytest.skip("HF_GRADIEND_PEER_PYTHON names no Python that has the package gradiend 0.2")
    folder = tmp_path_factory.mktemp("gradiend")
    for kind in ("bert", "gpt2"):
        write_base(folder / "bases" / kind, session_planted(kind))
    run = subprocess.run(
        [interpreter, str(SCRIPT), str(folder / "bases"), str(folder / "made")],
        capture_output=True, text=True, check=False, cwd=folder, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "made"


@pytest.fixture
def official(made):
    """Function of a case that reads what was made."""

    def official(case: str) -> Official:
        recorded = json.loads((made / case / "recorded.json").read_text("utf-8"))
        gradiend = GradiendModel.from_gradiend(made / case / "checkpoint")
        return Official(gradiend, load_file(made / case / "recorded.safetensors"), **recorded)

    return official


@pytest.mark.parametrize("case", ALL)
def test_gradients_encode_to_what_the_official_package_says(official, case):
    found = official(case)

    encodings = found.gradiend.encode(found.by_name("gradient"))

    expected = found.tensors["encodings"]
    torch.testing.assert_close(encodings, expected, rtol=0, atol=1e-5)
    assert expected.std(0).min() > 1e-4  # the control: the texts do differ


@pytest.mark.parametrize("case", ALL)
def test_encodings_decode_to_what_the_official_package_says(official, case):
    found = official(case)

    decoded = found.gradiend.decode(found.tensors["encodings"])

    expected = found.by_name("decoded")
    left_out = expected.keys() - decoded.keys()
    for name, update in decoded.items():
        torch.testing.assert_close(update, expected[name], rtol=0, atol=1e-5)
        assert expected[name].abs().max() > 1e-4
    assert all(not expected[name].any() for name in left_out)
    assert bool(left_out) == (found.gradiend.config.n_selected < 1000)  # 2 % leave whole biases out


def test_a_decoder_without_bias_and_several_features_are_kept(official):
    without_bias, two = official("bin").gradiend, official("two_features").gradiend

    assert not without_bias.decode(0.0).popitem()[1].any()
    assert without_bias.decode(1.0).popitem()[1].any()
    assert (two.config.n_features, two.config.feature_classes) == (2, None)


@pytest.mark.parametrize("case", MASKED)
def test_texts_of_a_masked_model_encode_to_what_the_official_package_says(official, case):
    found = official(case)
    config = found.gradiend.config
    base, tokenizer = load_base_model(config.base_model_name_or_path, objective=config.objective)

    h = found.gradiend.encode_texts(base, tokenizer, found.dataset(), progress=False)

    torch.testing.assert_close(h, found.tensors["encodings"], rtol=0, atol=1e-5)


def mean_of_class(found: Official) -> dict[str, float]:
    encodings = found.gradiend.encode(found.by_name("gradient"))[:, 0].detach()
    labels = [row["label_class"] for row in found.texts]
    return {c: float(encodings[[label == c for label in labels]].mean()) for c in ("F", "M")}


@pytest.mark.parametrize("case", ["factual", "alternative"])
def test_texts_of_the_first_class_encode_above_zero(official, case, caplog):
    found = official(case)
    first, second = found.gradiend.config.feature_classes[0]

    means = mean_of_class(found)

    assert means[first] > 0.5
    assert means[second] < -0.5
    # The official package always names F first; with the source alternative it means the token.
    assert (first, second) == (("M", "F") if case == "alternative" else ("F", "M"))
    assert found.mean_by_feature_class["F"] > 0.5
    assert found.mean_by_feature_class["M"] < -0.5
    assert caplog.records == []


def test_the_unchecked_sign_of_the_source_diff_is_told_and_can_be_mended(official, caplog):
    found = official("diff")
    first, second = found.gradiend.config.feature_classes[0]
    means = mean_of_class(found)

    if means[first] < 0:  # as the warning says
        found.gradiend.flip_()
        means = mean_of_class(found)

    assert "flip_()" in caplog.text
    assert means[first] > 0.5
    assert means[second] < -0.5


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("factual", ("factual", "diff", None)),
        ("indices", ("factual", "counterfactual", None)),
        ("mixed", ("counterfactual", "factual", None)),
        ("named_objective", ("factual", "diff", "masked")),
    ],
)
def test_source_target_and_objective_are_read(official, case, expected):
    config = official(case).gradiend.config

    assert (config.source, config.target, config.objective) == expected
