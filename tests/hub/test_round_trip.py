"""What is pushed is loaded by another process with the same numbers."""

import json

import pytest

BASE = "acme/tiny-gpt2"


def test_a_gradiend_comes_back_with_the_same_numbers(reader, published):
    assert reader.gradiend_numbers("acme/gradiend") == published.encodings
    assert reader.gradiend_numbers("acme/gradiend", auto=True) == published.encodings
    assert len({*published.encodings}) > 3  # the control: they are not all zero


def test_a_revision_gives_the_gradiend_of_that_commit(hub, author, reader, work):
    first = author.push_gradiend(work.gradiend, "acme/twice")["commit"]
    second = author.push_gradiend(work.gradiend, "acme/twice", changed=True)["commit"]

    assert first != second == hub["acme/twice"].branches["main"]
    assert reader.gradiend_numbers("acme/twice", revision=first) == work.encodings
    newest = reader.gradiend_numbers("acme/twice")
    assert newest == reader.gradiend_numbers("acme/twice", revision="main")
    assert newest[:3] == [-h for h in work.encodings[:3]]  # the control


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter", "GradiendAdapter"])
def test_an_adapter_acts_as_in_the_process_that_pushed_it(reader, published, way):
    logits = reader.logits_with_adapter(way, "acme/gradiend-adapter", BASE)

    assert logits == published.adapter_logits == published.edited_logits
    assert logits != published.base_logits == reader.logits(BASE)  # the control


def test_an_adapters_id_alone_loads_its_base_model_too(reader, published):
    assert reader.logits("acme/gradiend-adapter") == published.adapter_logits


def test_an_adapter_of_a_revision(author, reader, work):
    first = author.push_adapter(work.adapter, "acme/adapter-twice")["commit"]
    weaker = work.folder / "weaker"
    code, _, err = author.command_line(
        "adapt", "--gradiend", work.gradiend, "--output_dir", str(weaker), "--strength", "0"
    )
    assert code == 0, err
    author.push_adapter(weaker, "acme/adapter-twice")

    for way in ("PeftModel", "load_adapter", "GradiendAdapter"):
        options = {"revision": first}
        if way == "load_adapter":
            options = {"adapter_kwargs": options}
        logits = reader.logits_with_adapter(way, "acme/adapter-twice", BASE, **options)
        assert logits == work.adapter_logits
    assert reader.logits_with_adapter("PeftModel", "acme/adapter-twice", BASE) == work.base_logits


def test_an_edited_model_needs_transformers_alone(stranger, published):
    assert not stranger.can_import("hf_gradiend")
    logits = stranger.logits("acme/gradiend-debiased")
    answer, piped = stranger.logits_of_pipeline("acme/gradiend-debiased")

    assert logits == piped == published.edited_logits
    assert logits != stranger.logits(BASE) == published.base_logits  # the control
    assert answer.startswith("the nurse said that")
    assert stranger.backbone("acme/gradiend-debiased") == "GPT2Model"


def test_a_gradiend_with_its_code_needs_transformers_alone(author, stranger, work, failed):
    author.push_gradiend(work.gradiend, "acme/with-code", include_code=True)
    author.push_gradiend(work.gradiend, "acme/without-code")

    numbers = stranger.gradiend_numbers("acme/with-code", trust_remote_code=True)
    assert numbers == work.encodings
    with pytest.raises(failed, match="pip install hf_gradiend"):
        stranger.verb_that_needs_the_package("acme/with-code", trust_remote_code=True)
    # The control: without the code, or without trust in it, transformers does not know the type.
    for repo_id, trust in (("acme/with-code", False), ("acme/without-code", True)):
        with pytest.raises(failed):
            stranger.gradiend_numbers(repo_id, trust_remote_code=trust)


def test_a_gradiend_in_shards(hub, author, reader, work):
    author.push_gradiend(work.gradiend, "acme/shards", max_shard_size=20_000)

    names = [name for name in hub["acme/shards"].files() if name.endswith(".safetensors")]
    assert len(names) > 4
    assert reader.gradiend_numbers("acme/shards") == work.encodings


def test_an_adapter_straight_from_a_gradiend_fetches_the_decoder_alone(hub, author, reader, work):
    author.push_gradiend(work.gradiend, "acme/decoder", max_shard_size=20_000)
    index = json.loads(hub["acme/decoder"].files()["model.safetensors.index.json"])
    needed = {file for key, file in index["weight_map"].items() if not key.startswith("encoder.")}
    others = set(index["weight_map"].values()) - needed
    since = len(hub.requests)

    logits = reader.logits_with_adapter("from_gradiend", "acme/decoder", BASE)

    fetched = {name for name in hub.downloaded("acme/decoder", since) if "safetensors" in name}
    assert fetched == {"model.safetensors.index.json", *needed}
    assert others  # the control: there was something to leave
    assert logits == work.adapter_logits


def test_an_adapter_straight_from_a_gradiend_of_a_revision(author, reader, work):
    first = author.push_gradiend(work.gradiend, "acme/straight")["commit"]
    author.push_gradiend(work.gradiend, "acme/straight", changed=True)

    old = reader.logits_with_adapter("from_gradiend", "acme/straight", BASE, revision=first)
    new = reader.logits_with_adapter("from_gradiend", "acme/straight", BASE)
    assert old == work.adapter_logits
    assert new != old  # the control


def test_the_command_line_pushes_what_python_pushes(hub, author, published):
    repositories = {"gradiend": "gradiend", "adapter": "gradiend-adapter",
                    "debiased": "gradiend-debiased"}  # fmt: skip
    for folder, name in repositories.items():
        kind = "model" if folder == "debiased" else folder
        code, out, err = author.command_line(
            "push", "--kind", kind, "--folder", str(published.folder / folder),
            "--repo_id", f"acme/cli-{name}", "--report", str(published.report), "--json",
        )  # fmt: skip

        assert code == 0, err
        told = json.loads(out.splitlines()[-1])
        assert told["repo_id"] == f"acme/cli-{name}"
        assert told["commit"] == hub[f"acme/cli-{name}"].branches["main"]
        pushed, ours = hub[f"acme/cli-{name}"].files(), hub[f"acme/{name}"].files()
        card = ours["README.md"].decode().replace(f"acme/{name}", f"acme/cli-{name}")
        card = card.replace(f"name: {name}", f"name: cli-{name}")
        assert pushed.pop("README.md").decode() == card
        ours.pop("README.md")
        pushed.pop("trainer_state.json", None)  # training wrote it into its folder
        assert pushed == ours
        assert "report.json" in ours
