"""What people do with a `PeftModel`: off, on, merge, unmerge, several adapters, unload."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

# Everything: embeddings that are tied to the head, positions, Conv1D, norms, biases.
EVERY_WEIGHT = "*"


@pytest.fixture
def base(tiny_gpt2):
    return tiny_gpt2


@pytest.fixture
def plain(base):
    """Not touched by an adapter."""
    return copy.deepcopy(base)


@pytest.fixture
def gradiend(plain, make_gradiend):
    return make_gradiend(plain, EVERY_WEIGHT)


@pytest.fixture
def other(plain, make_gradiend):
    return make_gradiend(plain, "*.mlp.*", seed=1, every=3)


@pytest.fixture
def fresh_model(base, gradiend, saved, tmp_path):
    """Before its first forward pass."""
    return PeftModel.from_pretrained(base, saved(gradiend, tmp_path / "first"))


@pytest.fixture
def model(fresh_model, plain, logits_of):
    # The control of every test below.
    assert not torch.equal(logits_of(fresh_model), logits_of(plain))
    return fresh_model


@pytest.fixture
def model_with_two(model, other, saved, tmp_path):
    model.load_adapter(saved(other, tmp_path / "second"), "other")
    return model


def test_the_context_that_disables_gives_the_base_model_and_then_the_edit_again(
    model, base, plain, gradiend, edited_copy, logits_of, bits_of, same_bits
):
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(plain))
        assert same_bits(bits_of(base), bits_of(plain))

    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))


def test_an_error_inside_the_context_that_disables_brings_the_edit_back(
    model, plain, gradiend, edited_copy, logits_of
):
    with pytest.raises(KeyError, match="mine"), model.disable_adapter():
        raise KeyError("mine")

    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))


def test_disabled_layers_stay_off_until_they_are_enabled(
    model, base, plain, gradiend, edited_copy, logits_of, bits_of, same_bits
):
    model.base_model.disable_adapter_layers()
    assert same_bits(bits_of(base), bits_of(plain))
    assert torch.equal(logits_of(model), logits_of(plain))

    model.base_model.enable_adapter_layers()
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_is_taken_back_bit_for_bit(
    base, gradiend, edited_copy, saved, tmp_path, logits_of, bits_of, same_bits, dtype
):
    plain = copy.deepcopy(base.to(dtype))
    expected = edited_copy(plain, gradiend)
    model = PeftModel.from_pretrained(base, saved(gradiend, tmp_path))

    model.merge_adapter()
    assert same_bits(bits_of(base), bits_of(expected))
    assert torch.equal(logits_of(model), logits_of(expected))  # and not twice

    model.unmerge_adapter()
    assert same_bits(bits_of(base), bits_of(plain))
    assert torch.equal(logits_of(model), logits_of(expected))  # unmerged, and still active
    assert not same_bits(bits_of(expected), bits_of(plain))


def test_a_merged_adapter_stays_when_another_is_active(
    model_with_two, plain, gradiend, other, edited_copy, logits_of
):
    model_with_two.merge_adapter(["default"])
    # peft's own set_adapter unmerges first.
    for layer in (m for m in model_with_two.modules() if hasattr(m, "merged_adapters")):
        layer.set_adapter("other")

    both = logits_of(edited_copy(plain, gradiend, other))
    assert torch.equal(logits_of(model_with_two), both)
    assert not torch.equal(both, logits_of(edited_copy(plain, other)))


def test_merge_and_unload_gives_a_plain_model_with_the_edited_weights(
    model, base, plain, gradiend, edited_copy, logits_of, bits_of, same_bits, tmp_path
):
    merged = model.merge_and_unload()

    assert merged is base
    expected = edited_copy(plain, gradiend)
    assert same_bits(bits_of(merged), bits_of(expected))
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_pre_hooks for m in merged.modules())
    assert not hasattr(merged, "peft_config")
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(reloaded), logits_of(expected))
    assert not same_bits(bits_of(expected), bits_of(plain))


def test_unload_gives_the_base_model_back(model, base, plain, logits_of, bits_of, same_bits):
    unloaded = model.unload()

    assert unloaded is base
    assert same_bits(bits_of(unloaded), bits_of(plain))
    assert torch.equal(logits_of(unloaded), logits_of(plain))
    assert [type(m) for m in unloaded.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_pre_hooks for m in unloaded.modules())


def test_an_adapter_can_be_put_in_again_after_unload(
    model, plain, gradiend, edited_copy, logits_of, tmp_path
):
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "first")

    assert torch.equal(logits_of(again), logits_of(edited_copy(plain, gradiend)))


def test_set_adapter_switches_between_adapters_and_takes_several(
    model_with_two, plain, gradiend, other, edited_copy, logits_of
):
    first = logits_of(edited_copy(plain, gradiend))
    second = logits_of(edited_copy(plain, other))
    both = logits_of(edited_copy(plain, gradiend, other))
    assert not torch.equal(first, second)
    assert not torch.equal(first, both)

    assert torch.equal(logits_of(model_with_two), first)  # as peft has it: loading activates none
    model_with_two.set_adapter("other")
    assert torch.equal(logits_of(model_with_two), second)
    model_with_two.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits_of(model_with_two), both)
    model_with_two.set_adapter("default")
    assert torch.equal(logits_of(model_with_two), first)


def test_a_deleted_adapter_leaves_the_others(
    model_with_two, base, plain, gradiend, other, edited_copy, logits_of, bits_of, same_bits
):
    model_with_two.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits_of(model_with_two), logits_of(edited_copy(plain, gradiend, other)))

    model_with_two.delete_adapter("default")
    model_with_two.set_adapter("other")

    assert torch.equal(logits_of(model_with_two), logits_of(edited_copy(plain, other)))
    model_with_two.base_model.disable_adapter_layers()
    assert same_bits(bits_of(base), bits_of(plain))


def test_deleting_the_only_adapter_gives_the_base_model_back(
    model, base, plain, logits_of, bits_of, same_bits
):
    logits_of(model)

    model.delete_adapter("default")

    assert same_bits(bits_of(base), bits_of(plain))
    assert torch.equal(logits_of(base), logits_of(plain))


def test_a_merge_and_unload_of_one_of_two_takes_just_that_one(
    model_with_two, plain, other, edited_copy, bits_of, same_bits
):
    merged = model_with_two.merge_and_unload(adapter_names=["other"])

    assert same_bits(bits_of(merged), bits_of(edited_copy(plain, other)))


def test_any_number_of_switches_leaves_no_rounding(
    tiny_llama, make_gradiend, saved, tmp_path, logits_of, bits_of, same_bits
):
    base = tiny_llama.to(torch.bfloat16)
    before = bits_of(base)
    gradiend = make_gradiend(base)
    model = PeftModel.from_pretrained(base, saved(gradiend, tmp_path))
    subtracted = {name: bits.clone() for name, bits in before.items()}
    for name in gradiend.names:
        change = torch.randn(before[name].shape).to(torch.bfloat16)
        subtracted[name] = (before[name] + change) - change

    for number in range(5):
        model.set_strength(0.3 * number - 0.7)
        logits_of(model)
        model.merge_adapter()
        model.unmerge_adapter()
    with model.disable_adapter():
        after = bits_of(base)

    assert same_bits(after, before)
    assert not same_bits(subtracted, before)  # the control: taking away again does not restore


@pytest.mark.usefixtures("model")
def test_modules_keep_their_place_and_class(base, plain):
    ours = {name: type(m) for name, m in base.named_modules() if "gradiend" not in name}
    assert ours == {name: type(m) for name, m in plain.named_modules()}
    assert isinstance(base.transformer.h[0].attn.c_attn, type(plain.transformer.h[0].attn.c_attn))
    assert any("gradiend" in name for name, _ in base.named_modules())


def test_the_base_weights_and_the_values_are_frozen(model):
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.get_nb_trainable_parameters()[0] == 0


def test_values_are_not_trained_when_loaded_as_trainable(
    base, plain, gradiend, saved, tmp_path, edited_copy, logits_of
):
    model = PeftModel.from_pretrained(base, saved(gradiend, tmp_path), is_trainable=True)

    assert not any(p.requires_grad for n, p in model.named_parameters() if "gradiend" in n)
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))


def test_generate_uses_the_edited_weights(model, plain, gradiend, edited_copy):
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    expected = edited_copy(plain, gradiend).generate(input_ids=ids, **options)

    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    assert not torch.equal(plain.generate(input_ids=ids, **options), expected)


def test_peft_reports_the_state_of_the_adapter(model):
    status = model.get_model_status()

    assert status.peft_types == {"default": "GRADIEND"}
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.enabled is True
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_a_state_dict_holds_the_base_weights_and_a_merge(
    model, base, plain, gradiend, edited_copy, logits_of
):
    logits_of(model)
    active = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))
    model.merge_adapter()
    merged = base.state_dict()

    expected = edited_copy(plain, gradiend).state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(active[name], tensor)
        assert torch.equal(merged[name], expected[name])
        assert tensor.numel() == 0 or not torch.equal(expected[name], tensor)


def test_the_state_dict_of_a_part_holds_the_base_weights_too(
    model, base, plain, gradiend, edited_copy, logits_of
):
    # As `model.transformer.save_pretrained(folder)` writes it.
    state = {name: tensor.clone() for name, tensor in base.transformer.state_dict().items()}

    for name, tensor in plain.transformer.state_dict().items():
        assert torch.equal(state[name], tensor)
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))


@pytest.mark.parametrize("part", ["", "transformer", "transformer.h.0.mlp"])
def test_other_base_weights_are_loaded_under_the_adapter(
    model, base, plain, gradiend, edited_copy, fill, logits_of, part
):
    logits_of(model)
    fill(plain.get_submodule(part), seed=3)

    result = base.get_submodule(part).load_state_dict(
        plain.get_submodule(part).state_dict(), strict=False
    )

    assert not result.unexpected_keys
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(plain))


def test_the_whole_state_is_loaded_into_a_copy(model, plain, gradiend, edited_copy, logits_of):
    logits_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    receiver = copy.deepcopy(model)
    for parameter in receiver.parameters():
        parameter.data.zero_()

    receiver.load_state_dict(state)

    assert torch.equal(logits_of(receiver), logits_of(edited_copy(plain, gradiend)))


def test_a_copy_is_steered_apart_from_its_original(
    model, plain, gradiend, edited_copy, logits_of, bits_of, same_bits
):
    logits_of(model)
    full, half = (logits_of(edited_copy(plain, gradiend, strength=s)) for s in (1.0, 0.5))

    twin = copy.deepcopy(model)
    twin.set_strength(0.5)

    assert torch.equal(logits_of(twin), half)
    assert torch.equal(logits_of(model), full)
    assert twin.get_strength() == 0.5
    assert model.get_strength() == 1.0
    assert same_bits(bits_of(twin.unload()), bits_of(plain))
    assert torch.equal(logits_of(model), full)
    assert not torch.equal(half, full)


def test_a_pickled_model_is_steered_like_its_original(
    model, plain, gradiend, edited_copy, logits_of, tmp_path
):
    logits_of(model)
    torch.save(model, tmp_path / "model.pt")

    loaded = torch.load(tmp_path / "model.pt", weights_only=False)

    assert torch.equal(logits_of(loaded), logits_of(edited_copy(plain, gradiend)))
    with loaded.disable_adapter():
        assert torch.equal(logits_of(loaded), logits_of(plain))


@pytest.mark.parametrize("used_before", [False, True])
def test_a_change_of_type_rounds_the_base_weights_and_then_edits_them(
    base, plain, gradiend, edited_copy, saved, tmp_path, logits_of, used_before
):
    with torch.no_grad():  # values that bfloat16 holds, so that their own rounding does not matter
        for parameter in gradiend.decoder.parameters():
            parameter.copy_(parameter.bfloat16())
    model = PeftModel.from_pretrained(base, saved(gradiend, tmp_path))
    if used_before:
        logits_of(model)
    edited = edited_copy(plain.to(torch.bfloat16), gradiend)

    model.to(torch.bfloat16)

    assert torch.equal(logits_of(model), logits_of(edited))
    assert not torch.equal(logits_of(plain), logits_of(edited))
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(plain))


def test_small_values_survive_a_change_of_the_models_type(
    base, plain, gradiend, edited_copy, saved, tmp_path, logits_of
):
    # Gradients are small: float16 holds nothing below 6e-8.
    with torch.no_grad():
        for parameter in gradiend.decoder.parameters():
            parameter.mul_(1e-8)
    gradiend.config.step_size = 2e7
    model = PeftModel.from_pretrained(base, saved(gradiend, tmp_path))
    expected = logits_of(edited_copy(plain.half(), gradiend, alpha=2e7))

    model.half()

    assert torch.equal(logits_of(model), expected)
    assert not torch.allclose(expected, logits_of(plain), atol=0.05)


def test_double_and_back_leaves_every_bit(
    model, base, plain, gradiend, edited_copy, logits_of, bits_of, same_bits
):
    logits_of(model)

    model.double()
    doubled = logits_of(model)
    model.float()

    assert torch.equal(doubled, logits_of(edited_copy(plain.double(), gradiend)))
    assert doubled.dtype == torch.float64
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain.float(), gradiend)))
    with model.disable_adapter():
        assert same_bits(bits_of(base), bits_of(plain))


def test_inference_mode_serves_the_first_pass_and_every_later_change(
    fresh_model, base, plain, gradiend, edited_copy, logits_of, bits_of, same_bits
):
    model = fresh_model
    with torch.inference_mode():
        first = logits_of(model)
    model.set_strength(0.5)
    half = logits_of(model)
    with torch.inference_mode():
        model.set_strength(-1.0)
        opposite = logits_of(model)
    with model.disable_adapter():
        assert same_bits(bits_of(base), bits_of(plain))

    for ours, strength in ((first, 1.0), (half, 0.5), (opposite, -1.0)):
        assert torch.equal(ours, logits_of(edited_copy(plain, gradiend, strength=strength)))
    assert not torch.equal(first, half)


def test_weights_trained_after_a_first_pass_in_inference_mode_keep_their_change(
    fresh_model, base, plain, logits_of
):
    with torch.inference_mode():
        logits_of(fresh_model)
    change = torch.full_like(base.transformer.ln_f.weight, 0.5)

    with torch.no_grad():
        base.transformer.ln_f.weight += change

    with fresh_model.disable_adapter():
        after = base.transformer.ln_f.weight.detach().clone()
    torch.testing.assert_close(after, plain.transformer.ln_f.weight + change)


@pytest.mark.usefixtures("model")
def test_gradients_of_base_weights_are_those_at_the_edited_weights(
    base, plain, gradiend, edited_copy
):
    edited = edited_copy(plain, gradiend)
    ids = torch.tensor([[5, 6, 7, 8]])
    for held in (base, edited, plain):
        held.requires_grad_(True)
        held(input_ids=ids, labels=ids).loss.backward()

    for name, parameter in edited.named_parameters():
        assert torch.equal(base.get_parameter(name).grad, parameter.grad)
    assert not torch.equal(base.lm_head.weight.grad, plain.lm_head.weight.grad)


def optimizer_step(model: nn.Module, parameters) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(parameters, lr=0.1).step()


@pytest.mark.parametrize("name", ["transformer.h.0.mlp.c_fc.weight", "transformer.wpe.weight"])
def test_what_an_optimiser_adds_while_steered_stays_when_the_adapter_goes(
    model, base, plain, gradiend, edited_copy, name
):
    # Of the positions, few have a gradient: four rows of 64.
    edited = edited_copy(plain, gradiend)
    for held in (base, edited):
        weight = held.get_parameter(name).requires_grad_(True)
        optimizer_step(held, [weight])
    step = edited.get_parameter(name) - edited_copy(plain, gradiend).get_parameter(name)
    assert step.abs().max() > 1e-3

    with model.disable_adapter():
        trained = base.get_parameter(name).detach().clone()

    torch.testing.assert_close(trained, plain.get_parameter(name) + step, atol=1e-5, rtol=0)


@pytest.mark.parametrize("row", [0, 7, 61])
def test_a_change_of_one_row_while_steered_stays_when_the_adapter_goes(
    model, base, plain, logits_of, row
):
    # As the optimiser leaves it after a batch of few tokens.
    logits_of(model)
    table = base.transformer.wte.weight
    with torch.no_grad():
        table[row, 3] += 1.0

    with model.disable_adapter():
        changed = table.detach() - plain.transformer.wte.weight.detach()

    assert (changed[row, 3] - 1.0).abs() < 1e-6
    changed[row, 3] = 0.0
    assert changed.abs().max() < 1e-6


@pytest.mark.usefixtures("model")
def test_gradient_checkpointing_recomputes_with_the_edited_weights(
    base, plain, gradiend, edited_copy
):
    edited = edited_copy(plain, gradiend)
    ids = torch.tensor([[5, 6, 7, 8]])
    for held in (base, edited):
        held.train()
        for module in held.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        held.gradient_checkpointing_enable({"use_reentrant": False})
        held.transformer.wte.weight.requires_grad_(True)
        held(input_ids=ids, labels=ids).loss.backward()

    ours, theirs = (m.transformer.wte.weight.grad for m in (base, edited))
    assert torch.equal(ours, theirs)
    assert theirs.abs().max() > 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_follows_strength_and_switches(
    model, base, plain, gradiend, edited_copy, logits_of, backend
):
    torch._dynamo.reset()
    compiled = torch.compile(base, backend=backend)
    seen = [logits_of(compiled)]
    model.set_strength(0.5)
    seen.append(logits_of(compiled))
    model.base_model.disable_adapter_layers()
    seen.append(logits_of(compiled))
    model.base_model.enable_adapter_layers()
    seen.append(logits_of(compiled))
    torch._dynamo.reset()

    for ours, strength in zip(seen, (1.0, 0.5, 0.0, 0.5), strict=True):
        expected = logits_of(edited_copy(plain, gradiend, strength=strength))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
