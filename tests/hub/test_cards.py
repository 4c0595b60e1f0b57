"""The cards on the Hub: what their code does, and what the Hub reads from them."""

import json
import re

import pytest
import yaml

BASE = "acme/tiny-gpt2"


def metadata_of(hub, repo_id):
    card = hub[repo_id].files()["README.md"].decode()
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture
def code_of(hub):
    """Function that gives the Python blocks of a repository's card."""

    def code_of(repo_id):
        card = hub[repo_id].files()["README.md"].decode()
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert any(f'"{repo_id}"' in block for block in blocks)
        return blocks

    return code_of


@pytest.fixture(scope="module")
def masked(author, make_work, work):
    """The three kinds of a masked model, under the name acme/masked."""
    masked = make_work("bert", "acme/tiny-bert", report=work.report)
    author.push_gradiend(masked.gradiend, "acme/masked", report=masked.report)
    author.push_adapter(masked.adapter, "acme/masked-adapter", report=masked.report)
    author.push_debiased(
        masked.gradiend, "acme/tiny-bert", "acme/masked-debiased", report=masked.report
    )
    return masked


@pytest.fixture(params=["published", "masked"])
def on_hub(request):
    """Name of the repositories of a causal and of a masked model, and the author's numbers."""
    name = "acme/masked" if request.param == "masked" else "acme/gradiend"
    return name, request.getfixturevalue(request.param)


def test_the_code_of_a_gradiends_card_runs_as_it_stands(reader, on_hub, code_of):
    name, _ = on_hub

    printed, _ = reader.run_code(*code_of(name))

    assert printed.startswith("tensor([[")
    assert "nan" not in printed


def test_the_code_of_an_adapters_card_runs_as_it_stands(reader, on_hub, code_of):
    name, numbers = on_hub
    blocks = code_of(f"{name}-adapter")

    reader.run_code(*blocks)
    _, logits = reader.run_code(*blocks, "model.set_strength(1.0)")
    assert logits == numbers.adapter_logits
    _, off = reader.run_code(*blocks, "model.set_strength(0.0)")
    assert off == numbers.base_logits != logits


def test_the_code_of_an_edited_models_card_runs_without_the_package(stranger, on_hub, code_of):
    name, _ = on_hub

    printed = stranger.run_code(*code_of(f"{name}-debiased"))

    assert ("token_str" if "masked" in name else "generated_text") in printed


@pytest.mark.parametrize(
    ("name", "library", "relation", "pipeline"),
    [
        ("gradiend", "hf_gradiend", None, None),
        ("gradiend-adapter", "peft", "adapter", "text-generation"),
        ("gradiend-debiased", "transformers", "finetune", "text-generation"),
    ],
)
def test_the_card_on_the_hub_is_ours(hub, published, name, library, relation, pipeline):
    card = hub[f"acme/{name}"].files()["README.md"].decode()
    data = metadata_of(hub, f"acme/{name}")

    assert data["library_name"] == library
    assert data["base_model"] == BASE
    assert data.get("base_model_relation") == relation
    assert data.get("pipeline_tag") == pipeline
    assert "gradiend" in data["tags"]
    (index,) = data["model-index"]
    assert index["name"] == name
    values = {m["type"]: m["value"] for r in index["results"] for m in r["metrics"]}
    report = json.loads(published.report.read_text())
    if name == "gradiend":
        correlation = report["encoder"]["splits"]["test"]["correlation"]["value"]
        assert values["correlation"] == pytest.approx(correlation, abs=1e-4)
    else:
        imbalance = report["intervals"]["imbalance"]["after"]["value"]
        assert values["imbalance"] == pytest.approx(imbalance, abs=1e-4)
    assert "[More Information Needed]" not in card
    assert "This is the model card of a 🤗 transformers model" not in card
    assert card.count("\n# ") == 1
    assert json.loads(hub[f"acme/{name}"].files()["report.json"]) == report


def test_the_card_names_the_commit_of_the_base_model(hub, work):
    report = json.loads(work.report.read_text())

    assert report["base_model_revision"] == hub[BASE].branches["main"]
