"""GRADIEND beside a LoRA in one transformers model."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

from hf_gradiend import set_strength

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj"]}


@pytest.fixture(params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture
def plain(session_models, family):
    return copy.deepcopy(session_models[family])


@pytest.fixture
def gradiend(plain, make_gradiend):
    return make_gradiend(plain, "*")


def lora_config(family) -> LoraConfig:
    return LoraConfig(r=2, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")


@torch.no_grad()
def fill_lora(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            plain_name = name.replace(".gradiend", "")
            assert "gradiend" not in plain_name
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def with_lora(family):
    """Function that puts a LoRA with the same random values into a model."""

    def with_lora(model):
        model.add_adapter(lora_config(family), adapter_name="tuned")
        fill_lora(model)
        return model

    return with_lora


@pytest.fixture
def lora_folder(plain, with_lora, tmp_path):
    with_lora(copy.deepcopy(plain)).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def reference(plain, gradiend, edited_copy, with_lora):
    """The LoRA on a base model whose weights were set by hand."""
    return with_lora(edited_copy(plain, gradiend))


@pytest.fixture(params=["gradiend_first", "lora_first"])
def stacked(request, plain, gradiend, saved, lora_folder, tmp_path):
    folders = {"feature": saved(gradiend, tmp_path / "gradiend"), "tuned": lora_folder}
    names = ["feature", "tuned"] if request.param == "gradiend_first" else ["tuned", "feature"]
    model = copy.deepcopy(plain)
    for name in names:
        model.load_adapter(folders[name], adapter_name=name)
    model.set_adapter(["feature", "tuned"])
    return model


def test_both_act(stacked, plain, reference, edited_copy, gradiend, with_lora, logits_of):
    expected = logits_of(reference)

    assert torch.equal(logits_of(stacked), expected)
    assert not torch.allclose(expected, logits_of(edited_copy(plain, gradiend)), atol=0.01)
    assert not torch.allclose(expected, logits_of(with_lora(plain)), atol=0.01)


def test_each_can_be_active_alone(
    stacked, plain, gradiend, edited_copy, with_lora, logits_of, bits_of, same_bits
):
    stacked.set_adapter("feature")
    assert torch.equal(logits_of(stacked), logits_of(edited_copy(plain, gradiend)))
    stacked.set_adapter("tuned")
    assert torch.equal(logits_of(stacked), logits_of(with_lora(copy.deepcopy(plain))))
    stacked.disable_adapters()
    assert torch.equal(logits_of(stacked), logits_of(plain))
    assert same_bits(bits_of(stacked), bits_of(plain))


def test_strength_leaves_the_lora(stacked, plain, gradiend, edited_copy, with_lora, logits_of):
    set_strength(stacked, 0.5, "feature")
    half = logits_of(with_lora(edited_copy(plain, gradiend, strength=0.5)))
    assert torch.equal(logits_of(stacked), half)

    set_strength(stacked, 0.0, "feature")
    assert torch.equal(logits_of(stacked), logits_of(with_lora(plain)))
    assert not torch.equal(logits_of(stacked), half)


def test_gradients_flow_to_the_lora_and_are_right(stacked, reference, family):
    for model in (stacked, reference):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()

    theirs = {n: p.grad for n, p in reference.named_parameters() if "lora_" in n}
    ours = {n: p.grad for n, p in stacked.named_parameters() if "lora_" in n}
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 2 * len(TARGETS[family])
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient)
        assert gradient.abs().max() > 0
    others = [p for n, p in stacked.named_parameters() if "lora_" not in n]
    assert all(parameter.grad is None for parameter in others)


def test_a_new_lora_is_trained_on_a_steered_model(
    plain, gradiend, saved, edited_copy, family, logits_of, tmp_path
):
    model = copy.deepcopy(plain)
    model.load_adapter(saved(gradiend, tmp_path), adapter_name="feature")
    model.add_adapter(lora_config(family), adapter_name="tuned")
    model.set_adapter(["feature", "tuned"])
    reference = edited_copy(plain, gradiend)
    reference.add_adapter(lora_config(family), adapter_name="tuned")

    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    for held in (model, reference):
        fill_lora(held)
        parameters = [p for n, p in held.named_parameters() if "lora_" in n]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            held(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()

    assert torch.equal(logits_of(model), logits_of(reference))


def lora_layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("used_before", [False, True])
def test_a_lora_that_was_merged_stays_when_the_gradiend_goes(
    stacked, plain, reference, with_lora, logits_of, used_before
):
    if used_before:
        logits_of(stacked)
    for layer in lora_layers(stacked):
        layer.merge(adapter_names=["tuned"])
    torch.testing.assert_close(logits_of(stacked), logits_of(reference), atol=1e-4, rtol=1e-4)

    set_strength(stacked, 0.0, "feature")

    alone = logits_of(with_lora(copy.deepcopy(plain)))
    torch.testing.assert_close(logits_of(stacked), alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone, logits_of(plain), atol=0.01)
    for layer in lora_layers(stacked):
        layer.unmerge()
    torch.testing.assert_close(logits_of(stacked), alone, atol=1e-4, rtol=1e-4)


def test_each_is_saved_by_its_name(
    stacked, plain, gradiend, edited_copy, with_lora, logits_of, tmp_path
):
    logits_of(stacked)
    for name in ("feature", "tuned"):
        stacked.set_adapter(name)
        stacked.save_pretrained(tmp_path / "again")
        holder = copy.deepcopy(plain)
        info = holder.load_adapter(tmp_path / "again")
        assert not info.missing_keys
        assert not info.unexpected_keys
        expected = edited_copy(plain, gradiend) if name == "feature" else with_lora(plain)
        assert torch.equal(logits_of(holder), logits_of(expected))


def test_either_can_be_deleted(stacked, plain, gradiend, edited_copy, with_lora, logits_of):
    twin = copy.deepcopy(stacked)
    stacked.delete_adapter("tuned")
    twin.delete_adapter("feature")

    assert torch.equal(logits_of(stacked), logits_of(edited_copy(plain, gradiend)))
    assert torch.equal(logits_of(twin), logits_of(with_lora(plain)))
