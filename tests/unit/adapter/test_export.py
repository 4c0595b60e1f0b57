"""Exports are read as people without the package read them: by plain transformers and peft."""

import copy
import json
import logging
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.core_model_loading import WeightRenaming

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.adapter.export import checkpoint
from hf_gradiend.adapter.export.lora import export_lora, singular_values
from hf_gradiend.adapter.export.merged import export_merged
from hf_gradiend.adapter.export.supertuning import export_supertuning
from hf_gradiend.cli import main
from hf_gradiend.errors import (
    BaseModelError,
    CompatibilityError,
    ConfigError,
    NumericalError,
    OutputError,
)
from hf_gradiend.evaluation.effect import effect_of, measure_effect

STEP = 0.01
TEXTS = ["the nurse said that [TARGET] was late .", "because [TARGET] was late , paul went home ."]


@pytest.fixture
def adapter_for(gradiend_for):
    """Function of a base model that makes an adapter of random values."""

    def adapter_for(model, patterns="layers", *, every=None, **settings):
        causal = not isinstance(model, BertForMaskedLM)
        gradiend = gradiend_for(
            model, patterns, every=every, objective="causal" if causal else "masked"
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in gradiend.decoder.parameters():
                parameter.normal_()
        return GradiendAdapter.from_gradiend(gradiend, 0.5, STEP, **settings)

    return adapter_for


def saved(model, folder, tokenizer=None, **options):
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def merged_in_memory(adapter, model):
    return adapter.apply_to(copy.deepcopy(model)).merge_and_unload().state_dict()


def assert_same_bits(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def loaded(folder):
    loader = AutoModelForMaskedLM if "bert" in (folder / "config.json").read_text() else (
        AutoModelForCausalLM
    )  # fmt: skip
    return loader.from_pretrained(folder, dtype="auto")


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 17)[None]).logits


# ---- merged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["50GB", "4KB"], ids=["one file", "shards"])
def test_a_merged_export_is_the_merged_model_bit_for_bit(
    tiny_model, adapter_for, tmp_path, caplog, dtype, size
):
    base = tiny_model.to(dtype)
    saved(base, tmp_path / "base", max_shard_size=size)
    adapter = adapter_for(base, "backbone", strength=0.5)  # tied embeddings are in it

    report = export_merged(adapter, tmp_path / "base", tmp_path / "out", progress=False)

    assert_same_bits(loaded(tmp_path / "out").state_dict(), merged_in_memory(adapter, base))
    assert report.energy_kept > 0.99
    assert not caplog.messages  # the files were edited, not the loaded model saved
    # The controls: the edit is in, and there are shards where there should be.
    assert not torch.equal(logits_of(loaded(tmp_path / "out")), logits_of(base))
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (size == "4KB")


def test_a_sparse_merged_export_leaves_other_entries_their_bits(tiny_llama, adapter_for, tmp_path):
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.view(-1)[1::2] = -0.0  # what + 0 would change
    saved(tiny_llama, tmp_path / "base")
    adapter = adapter_for(tiny_llama, every=4)

    export_merged(adapter, tmp_path / "base", tmp_path / "out", progress=False)

    assert_same_bits(loaded(tmp_path / "out").state_dict(), merged_in_memory(adapter, tiny_llama))


def test_only_edited_bytes_of_the_checkpoint_differ(tiny_llama, adapter_for, tmp_path):
    saved(tiny_llama, tmp_path / "base")
    adapter = adapter_for(tiny_llama, "*.0.mlp.up_proj.weight")

    export_merged(adapter, tmp_path / "base", tmp_path / "out", progress=False)

    before, after = (tmp_path / name / "model.safetensors" for name in ("base", "out"))
    with safe_open(before, "pt") as ours, safe_open(after, "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
        assert ours.offset_keys() == theirs.offset_keys()
        changed = [
            key
            for key in ours.offset_keys()
            if not torch.equal(ours.get_tensor(key), theirs.get_tensor(key))
        ]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]


def test_a_checkpoint_of_the_body_is_edited_under_its_own_names(
    tiny_bert, adapter_for, tmp_path, caplog
):
    saved(tiny_bert.bert, tmp_path / "base")
    adapter = adapter_for(tiny_bert)  # names start with "bert."

    export_merged(adapter, tmp_path / "base", tmp_path / "out", progress=False)

    after = load_file(tmp_path / "out" / "model.safetensors")
    want = merged_in_memory(adapter, tiny_bert)
    assert after.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert all(torch.equal(tensor, want[f"bert.{name}"]) for name, tensor in after.items())
    assert not caplog.messages


def renamed_norms(folder):
    file = folder / "model.safetensors"
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})


def as_pickle(folder):
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(renamed_norms, "does not lie there"), (as_pickle, "there is no model.safetensors")],
)
def test_a_checkpoint_that_is_not_as_it_loads_is_loaded_and_saved(
    tiny_bert, masked_tokenizer, adapter_for, tmp_path, caplog, change, reason
):
    change(saved(tiny_bert, tmp_path / "base", masked_tokenizer))
    adapter = adapter_for(tiny_bert)

    export_merged(adapter, tmp_path / "base", tmp_path / "out", progress=False)

    assert_same_bits(loaded(tmp_path / "out").state_dict(), merged_in_memory(adapter, tiny_bert))
    assert reason in caplog.text


@pytest.mark.parametrize("twice", [False, True])
def test_a_tied_weight_is_edited_under_any_of_its_names(
    tiny_gpt2, causal_tokenizer, adapter_for, tmp_path, caplog, twice
):
    file = saved(tiny_gpt2, tmp_path / "base", causal_tokenizer) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    if not twice:
        del tensors["transformer.wte.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    adapter = adapter_for(tiny_gpt2, "*wte*")

    export_merged(adapter, tmp_path / "base", tmp_path / "out", progress=False)

    want = merged_in_memory(adapter, tiny_gpt2)
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "transformer.wte.weight" if twice else "lm_head.weight"
    assert torch.equal(after[name], want["lm_head.weight"])
    # Two copies of one weight: only transformers knows which of them counts.
    assert ("lies there as lm_head.weight and transformer.wte.weight" in caplog.text) == twice


def test_a_weight_that_transformers_converts_is_not_edited_in_its_file(
    tiny_llama, causal_tokenizer, adapter_for, tmp_path, caplog, monkeypatch
):
    renaming = WeightRenaming(r"\.up_proj\.", ".down_proj.")
    monkeypatch.setattr(checkpoint, "get_model_conversion_mapping", lambda _model: [renaming])
    saved(tiny_llama, tmp_path / "base", causal_tokenizer)

    for name, is_converted in (("up_proj", True), ("gate_proj", False)):
        adapter = adapter_for(tiny_llama, f"*{name}.weight")
        export_merged(adapter, tmp_path / "base", tmp_path / name, progress=False)
        assert ("transformers converts" in caplog.text) == is_converted
        caplog.clear()


def test_fused_experts_are_merged_through_the_loaded_model(
    causal_tokenizer, adapter_for, tmp_path, caplog
):
    config = MixtralConfig(
        vocab_size=len(causal_tokenizer), hidden_size=16, intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    saved(model, tmp_path / "base", causal_tokenizer)
    adapter = adapter_for(model)

    export_merged(adapter, tmp_path / "base", tmp_path / "out", progress=False)
    report = export_lora(adapter, model, tmp_path / "lora", progress=False)

    assert_same_bits(loaded(tmp_path / "out").state_dict(), merged_in_memory(adapter, model))
    assert "Loading the whole base model" in caplog.text
    assert report.kinds["other"].n_left_out >= 2
    PeftModel.from_pretrained(model, tmp_path / "lora")


def test_a_checkpoint_on_the_hub_is_merged_without_its_other_weights(
    tiny_llama, adapter_for, tmp_path, monkeypatch
):
    base = saved(tiny_llama, tmp_path / "base")
    asked = []

    def snapshot(place, *, ignore_patterns, **options):
        asked.append((place, options["revision"]))
        assert {"*.safetensors*", "*.bin*", "*/*"} <= set(ignore_patterns)
        return str(base)

    def download(place, name, **options):
        asked.append((place, options["revision"]))
        return str(base / name)

    monkeypatch.setattr("hf_gradiend.adapter.export.checkpoint.snapshot_download", snapshot)
    monkeypatch.setattr("hf_gradiend.adapter.values.hf_hub_download", download)
    adapter = adapter_for(tiny_llama)

    export_merged(adapter, "org/base", tmp_path / "out", revision="v1", progress=False)

    assert_same_bits(loaded(tmp_path / "out").state_dict(), merged_in_memory(adapter, tiny_llama))
    assert set(asked) == {("org/base", "v1")}


def test_companions_are_copied_and_the_card_is_not(
    tiny_llama, causal_tokenizer, adapter_for, tmp_path
):
    base = saved(tiny_llama, tmp_path / "base", causal_tokenizer)
    for name in ("README.md", "LICENSE", "pytorch_model.bin", "adapter_config.json"):
        (base / name).write_text(name)
    (base / "onnx").mkdir()

    export_merged(adapter_for(tiny_llama), base, tmp_path / "out", progress=False)

    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "LICENSE"} <= names
    assert not names & {"README.md", "pytorch_model.bin", "adapter_config.json", "onnx"}
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_another_base_model_is_refused_and_nothing_is_written(
    tiny_llama, causal_tokenizer, adapter_for, tmp_path
):
    adapter = adapter_for(tiny_llama)
    narrow = LlamaForCausalLM(
        type(tiny_llama.config)(**{**tiny_llama.config.to_dict(), "intermediate_size": 24})
    )
    saved(narrow, tmp_path / "base", causal_tokenizer)

    with pytest.raises(CompatibilityError, match=r"has shape \(24, 16\) instead of \(32, 16\)"):
        export_merged(adapter, tmp_path / "base", tmp_path / "out", progress=False)

    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_bad_places_and_numbers_are_refused(tiny_llama, adapter_for, tmp_path):
    adapter, base = adapter_for(tiny_llama), saved(tiny_llama, tmp_path / "base")
    off = GradiendAdapter(replace(adapter.config, strength=0.0), adapter.values)
    with pytest.raises(OutputError, match="new or empty folder"):
        export_merged(adapter, base, base, progress=False)
    with pytest.raises(BaseModelError, match="could not be had"):
        export_merged(adapter, "no such//place", tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="update to export"):
        export_merged(off, base, tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match=r"in \(0, 1\], but got 1.5"):
        export_lora(adapter, tiny_llama, tmp_path / "out", energy=1.5, progress=False)
    with pytest.raises(ConfigError, match="at least 1, but got 0"):
        export_lora(adapter, tiny_llama, tmp_path / "out", max_rank=0, progress=False)
    with pytest.raises(ConfigError, match=r"in \(0, 1\], but got 0"):
        export_supertuning(adapter, tiny_llama, tmp_path / "out", fraction=0, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_quantised_or_broken_checkpoint_is_refused(tiny_llama, adapter_for, tmp_path):
    adapter, base = adapter_for(tiny_llama), saved(tiny_llama, tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    quantized = {**content, "quantization_config": {"quant_method": "fp8"}}

    (base / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(BaseModelError, match="is quantised"):
        export_merged(adapter, base, tmp_path / "out", progress=False)
    (base / "config.json").write_text(json.dumps(content))
    (base / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(BaseModelError, match="is broken"):
        export_merged(adapter, base, tmp_path / "out", progress=False)


def test_the_report_says_what_a_coarse_type_loses(tiny_llama, adapter_for, tmp_path):
    saved(tiny_llama, tmp_path / "fine")
    saved(copy.deepcopy(tiny_llama).bfloat16(), tmp_path / "coarse")
    adapter = adapter_for(tiny_llama, "*.mlp.up_proj.weight", strength=0.002)

    kept = {
        name: export_merged(
            adapter, tmp_path / name, tmp_path / f"{name}-out", progress=False
        ).energy_kept
        for name in ("fine", "coarse")
    }

    name = "model.layers.0.mlp.up_proj.weight"
    names = [name, name.replace("0", "1")]
    before, after = (
        load_file(tmp_path / f / "model.safetensors") for f in ("coarse", "coarse-out")
    )
    update = torch.cat([adapter.update(name) for name in names]).double()
    change = torch.cat([after[name].double() - before[name].double() for name in names])
    share = 1 - (change - update).square().sum() / update.square().sum()
    assert kept["coarse"] == pytest.approx(float(share), abs=1e-6)
    assert kept["coarse"] < 0.9 < kept["fine"]


# ---- LoRA ------------------------------------------------------------------------------------


def delta(model, name):
    """What peft says that a loaded adapter adds to a weight of the base model."""
    module_name = name.removesuffix(".weight")
    return model.get_base_model().get_submodule(module_name).get_delta_weight("default").detach()


def held(model, names):
    modules = dict(model.get_base_model().named_modules())
    return [
        name
        for name in names
        if hasattr(modules[name.rpartition(".")[0]], "get_delta_weight")
        and name.endswith(".weight")
    ]


def measured_energy(model, adapter):
    names = [entry["name"] for entry in adapter.config.parameters]
    lost = total = 0.0
    kept_names = held(model, names)
    for name in names:
        update = adapter.update(name).double()
        found = delta(model, name).double() if name in kept_names else torch.zeros_like(update)
        lost += float((update - found).square().sum())
        total += float(update.square().sum())
    return 1 - lost / total, sorted(set(names) - set(kept_names))


MATRICES = {
    BertForMaskedLM: (["*query.weight", "*position_embeddings*"], {"linear", "embedding"}),
    GPT2LMHeadModel: (["*c_*.weight", "*wpe*"], {"conv1d", "embedding"}),
    LlamaForCausalLM: (["*proj.weight", "*embed_tokens*", "lm_head*"], {"linear", "embedding"}),
}


def test_a_full_rank_lora_of_matrices_is_the_edit(tiny_model, adapter_for, tmp_path):
    patterns, kinds = MATRICES[type(tiny_model)]
    adapter = adapter_for(tiny_model, patterns)

    report = export_lora(adapter, tiny_model, tmp_path / "out", energy=1.0, progress=False)

    want = logits_of(adapter.apply_to(copy.deepcopy(tiny_model)))
    found = PeftModel.from_pretrained(copy.deepcopy(tiny_model), tmp_path / "out")
    torch.testing.assert_close(logits_of(found), want, atol=1e-5, rtol=0)
    assert report.energy_kept == pytest.approx(1.0, abs=1e-6)
    assert report.left_out == []
    assert set(report.kinds) == kinds
    # The control: the edit is seen.
    assert (logits_of(tiny_model) - want).abs().max() > 1e-2


def test_the_report_of_a_lora_is_what_peft_loads(tiny_model, adapter_for, tmp_path):
    adapter = adapter_for(tiny_model, "backbone")

    report = export_lora(adapter, tiny_model, tmp_path / "out", energy=0.8, progress=False)

    found = PeftModel.from_pretrained(copy.deepcopy(tiny_model), tmp_path / "out")
    share, left_out = measured_energy(found, adapter)
    assert report.energy_kept == pytest.approx(share, abs=1e-6)
    assert sorted(report.left_out) == left_out
    assert report.n_bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert sum(kind.energy_share for kind in report.kinds.values()) == pytest.approx(1.0)
    assert json.loads((tmp_path / "out" / "export_report.json").read_text()) == asdict(report)
    # Ranks are the smallest that keep the share, by the exact singular values.
    for name, rank in report.ranks.items():
        kept = torch.linalg.svdvals(adapter.update(name).double()).square().cumsum(0)
        assert kept[rank - 1] >= 0.8 * kept[-1] * (1 - 1e-6)
        assert rank == 1 or kept[rank - 2] < 0.8 * kept[-1]
    assert len(set(report.ranks.values())) > 1  # the control: there are patterns to get right


def test_a_lora_leaves_out_norms_biases_and_tied_embeddings(tiny_gpt2, adapter_for, tmp_path):
    adapter = adapter_for(tiny_gpt2, "backbone")

    kinds = export_lora(adapter, tiny_gpt2, tmp_path / "out", progress=False).kinds

    assert {name: (kind.n_parameters, kind.n_left_out) for name, kind in kinds.items()} == {
        "tied": (1, 1), "embedding": (1, 0), "norm": (5, 5), "bias": (13, 13), "conv1d": (8, 0),
    }  # fmt: skip
    assert kinds["tied"].energy_kept == kinds["norm"].energy_kept == 0.0
    assert kinds["conv1d"].energy_kept > 0.98


def test_a_large_rank_is_cut(tiny_llama, adapter_for, tmp_path):
    adapter = adapter_for(tiny_llama)

    report = export_lora(adapter, tiny_llama, tmp_path / "out", max_rank=2, progress=False)

    assert set(report.ranks.values()) == {2}
    assert report.kinds["linear"].energy_kept < 0.9


def test_an_update_without_matrices_is_refused(tiny_llama, adapter_for, tmp_path):
    adapter = adapter_for(tiny_llama, "*norm.weight")
    for export in (export_lora, export_supertuning):
        with pytest.raises(ConfigError, match="has room for"):
            export(adapter, tiny_llama, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_broken_values_are_refused(tiny_llama, adapter_for, tmp_path):
    adapter = adapter_for(tiny_llama)
    next(iter(adapter.values.values())).bias.view(-1)[0] = torch.nan
    saved(tiny_llama, tmp_path / "base")
    for export, base in (
        (export_lora, tiny_llama),
        (export_supertuning, tiny_llama),
        (export_merged, tmp_path / "base"),
    ):
        with pytest.raises(NumericalError, match="are NaN or infinite"):
            export(adapter, base, tmp_path / "out", progress=False)


def test_the_randomised_decomposition_finds_a_planted_spectrum():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(90, 90, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(80, 80, generator=generator))
    planted = 0.5 ** torch.arange(80.0)
    matrix = (left[:, :80] * planted) @ right.T
    state = torch.get_rng_state()

    u, values, v = singular_values(matrix, 8)

    assert len(values) < 80  # the control: not the exact one
    torch.testing.assert_close(values[:8], planted[:8], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((u[:, :8] * values[:8]) @ v[:, :8].T, matrix, atol=5e-3, rtol=0)
    assert torch.equal(torch.get_rng_state(), state)


# ---- Supertuning -----------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_the_report_of_supertuning_is_what_peft_loads(tiny_llama, adapter_for, tmp_path, fraction):
    adapter = adapter_for(tiny_llama)

    report = export_supertuning(
        adapter, tiny_llama, tmp_path / "out", fraction=fraction, progress=False
    )

    found = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "out")
    share, left_out = measured_energy(found, adapter)
    assert report.energy_kept == pytest.approx(share, abs=1e-6)
    assert sorted(report.left_out) == left_out == sorted(
        name for name, _ in tiny_llama.named_parameters() if "layernorm" in name
    )  # fmt: skip
    for name in held(found, [entry["name"] for entry in adapter.config.parameters]):
        update, kept = adapter.update(name), delta(found, name)
        smallest = update[kept != 0].abs().min()
        assert torch.equal(kept[kept != 0], update[kept != 0])
        assert bool((update[kept == 0].abs() <= smallest).all())


# ---- effect ----------------------------------------------------------------------------------


def test_the_effect_of_log_probabilities_by_hand():
    base = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    true = torch.tensor([[0.8, 0.2], [0.25, 0.75]]).log()
    export = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()

    report = effect_of(base, true, export)
    full, none = effect_of(base, true, true), effect_of(base, true, base)

    assert report.effect_kept == pytest.approx(0.0, abs=1e-7)  # it acts where the edit does not
    first = 0.8 * torch.tensor(0.8 / 0.5).log() + 0.2 * torch.tensor(0.2 / 0.5).log()
    second = 0.25 * torch.tensor(0.25 / 0.5).log() + 0.75 * torch.tensor(0.75 / 0.5).log()
    assert report.kl_base == pytest.approx(float(first) / 2, abs=1e-6)
    assert report.kl_export == pytest.approx(float(first + second) / 2, abs=1e-6)
    assert (full.effect_kept, full.kl_export) == (pytest.approx(1.0), 0.0)
    assert (none.effect_kept, none.kl_export) == (0.0, full.kl_base)
    with pytest.raises(NumericalError, match="shifts the predictions"):
        effect_of(base, base, true)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_effect_is_whole_at_full_rank_and_the_model_is_left_as_it_was(
    kind, session_models, session_tokenizers, adapter_for, tmp_path
):
    model = copy.deepcopy(session_models[kind])
    tokenizer = session_tokenizers["masked" if kind == "bert" else "causal"]
    matrices = "*output.dense.weight" if kind == "bert" else "*proj.weight"
    adapter = adapter_for(model, matrices, strength=30.0)
    before, names = copy.deepcopy(model.state_dict()), [n for n, _ in model.named_modules()]
    model.get_input_embeddings().weight.requires_grad = False
    flags = [parameter.requires_grad for parameter in model.parameters()]
    reports = []
    for rank in (1, 16):
        folder = tmp_path / str(rank)
        export_lora(adapter, model, folder, energy=1.0, max_rank=rank, progress=False)
        reports.append(measure_effect(model, tokenizer, adapter, folder, texts=TEXTS))
    part, whole = reports

    assert part.kl_base == whole.kl_base > 1e-6
    assert whole.effect_kept == pytest.approx(1.0, abs=1e-3)
    assert part.effect_kept < 0.9
    assert part.kl_export > 0.1 * part.kl_base
    assert 0.0 <= whole.kl_export < 1e-4 * whole.kl_base
    assert part.n_positions == len(TEXTS)
    assert_same_bits(model.state_dict(), before)
    assert [name for name, _ in model.named_modules()] == names
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_the_measured_effect_is_that_of_plain_models(
    tiny_llama, causal_tokenizer, adapter_for, tmp_path
):
    adapter = adapter_for(tiny_llama, strength=10.0)
    export_supertuning(adapter, tiny_llama, tmp_path / "out", fraction=0.3, progress=False)

    report = measure_effect(tiny_llama, causal_tokenizer, adapter, tmp_path / "out", texts=TEXTS)

    def predictions(model):
        prefixes = [text.partition(" [TARGET]")[0] for text in TEXTS]
        ids = [causal_tokenizer(prefix, return_tensors="pt")["input_ids"] for prefix in prefixes]
        with torch.no_grad():
            logits = torch.stack([model(input_ids=row).logits[0, -1] for row in ids])
        return logits.double().log_softmax(-1)

    base = predictions(tiny_llama)
    true = predictions(adapter.apply_to(copy.deepcopy(tiny_llama)))
    export = predictions(PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "out"))
    shift = true - base
    kept = ((export - base) * shift).sum() / shift.square().sum()
    assert report.effect_kept == pytest.approx(float(kept), abs=1e-4)
    assert report.kl_base == pytest.approx(float((true.exp() * shift).sum() / 2), rel=1e-3)
    lost = (true.exp() * (true - export)).sum() / 2
    assert report.kl_export == pytest.approx(float(lost), rel=1e-3)
    assert 0.1 < report.effect_kept < 0.99  # the control: there is something to get wrong


# ---- without the package ---------------------------------------------------------------------

READER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, merged, lora, supertuning, out = sys.argv[1:]
ids = torch.arange(5, 17)[None]
def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits
def load(place):
    return AutoModelForCausalLM.from_pretrained(place)
found = {
    "merged": logits(load(merged)),
    "lora": logits(PeftModel.from_pretrained(load(base), lora)),
    "supertuning": logits(PeftModel.from_pretrained(load(base), supertuning)),
}
through_transformers = load(base)
through_transformers.load_adapter(lora)
found["load_adapter"] = logits(through_transformers)
assert not any(name.startswith("hf_gradiend") for name in sys.modules)
torch.save(found, out)
"""


def test_exports_are_read_without_the_package(tiny_llama, adapter_for, tmp_path):
    base = saved(tiny_llama, tmp_path / "base")
    adapter = adapter_for(tiny_llama, "*proj.weight")
    export_merged(adapter, base, tmp_path / "merged", progress=False)
    export_lora(adapter, tiny_llama, tmp_path / "lora", energy=1.0, progress=False)
    export_supertuning(adapter, tiny_llama, tmp_path / "supertuning", fraction=1.0, progress=False)

    places = [str(tmp_path / n) for n in ("base", "merged", "lora", "supertuning", "found.pt")]
    subprocess.run([sys.executable, "-c", READER, *places], check=True, cwd=tmp_path)

    want = logits_of(adapter.apply_to(copy.deepcopy(tiny_llama)))
    found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found["merged"], want)
    for name in ("lora", "load_adapter", "supertuning"):
        torch.testing.assert_close(found[name], want, atol=1e-5, rtol=0)
    assert (logits_of(tiny_llama) - want).abs().max() > 1e-2  # the control: the edit is seen


# ---- the command line ------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """Function of arguments that gives the exit code and the two streams."""

    def run(*argv):
        level = logging.getLogger("transformers").level
        code = main(["export", *map(str, argv)])
        logging.getLogger("transformers").setLevel(level)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def place(tiny_llama, causal_tokenizer, adapter_for, tmp_path):
    """A folder with a base model and an adapter that names it."""
    saved(tiny_llama, tmp_path / "base", causal_tokenizer)
    adapter = adapter_for(tiny_llama)
    adapter.config.base_model_name_or_path = str(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize(
    ("form", "options"),
    [("merged", []), ("lora", ["--max_rank", 4]), ("supertuning", ["--fraction", 0.5])],
)
def test_the_command_line_exports_every_form(place, run, form, options):
    code, out, _ = run("--adapter", place / "adapter", "--to", form, "--output_dir",
                       place / "out", "--json", *options)  # fmt: skip

    result = json.loads(out.splitlines()[-1])
    assert code == 0
    written = json.loads((place / "out" / "export_report.json").read_text())
    assert result["energy_kept"] == written["energy_kept"]
    assert result["effect"] == written["effect"]
    assert (result["effect"] is None) == (form == "merged")
    if form != "merged":
        assert 0.1 < result["effect"]["effect_kept"] < 1.5


def test_the_command_line_takes_a_gradiend_and_a_strength(place, tiny_llama, gradiend_for, run):
    gradiend = gradiend_for(
        tiny_llama, objective="causal", feature_factor=0.5, step_size=STEP,
        base_model_name_or_path=str(place / "base"),
    )  # fmt: skip
    gradiend.save_pretrained(place / "gradiend")

    code, out, _ = run("--gradiend", place / "gradiend", "--strength", -2, "--to", "merged",
                       "--output_dir", place / "out")  # fmt: skip

    assert code == 0
    assert "share of energy" in out
    want = gradiend.merge_into(copy.deepcopy(tiny_llama), step_size=-2 * STEP).state_dict()
    assert_same_bits(loaded(place / "out").state_dict(), want)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "merged", "--energy", "0.9"], "--energy with --to lora alone"),
        (["--to", "lora", "--fraction", "0.9"], "--fraction with --to supertuning alone"),
        (["--to", "lora", "--gguf_file", "x.gguf"], "--gguf_file with --to merged alone"),
        (["--to", "lora", "--energy", "0"], "share of the energy"),
        (["--to", "lora", "--strength", "nan"], "finite number as strength"),
        (["--to", "merged", "--output_dir", "."], "new or empty folder"),
    ],
)
def test_the_command_line_refuses_what_it_would_have_to_ignore(
    place, run, monkeypatch, argv, message
):
    monkeypatch.chdir(place)

    code, _, error = run("--adapter", "adapter", "--output_dir", "out", *argv)

    assert code == 2
    assert message in error
    assert not (place / "out").exists()
