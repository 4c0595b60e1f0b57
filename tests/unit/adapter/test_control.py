"""Strength and edit of loaded adapters, on a `PeftModel` and on a transformers model."""

import copy
import math

import pytest
import torch
from peft import PeftModel

from hf_gradiend import get_strength, set_edit, set_strength, strength
from hf_gradiend.errors import ConfigError, GradiendError


@pytest.fixture
def plain(tiny_llama):
    return copy.deepcopy(tiny_llama)


@pytest.fixture
def gradiend(plain, make_gradiend):
    return make_gradiend(plain, n_features=2)


@pytest.fixture
def other(plain, make_gradiend):
    return make_gradiend(plain, "*norm.weight", seed=1)


@pytest.fixture(params=["peft", "transformers"])
def model(request, tiny_llama, gradiend, other, saved, tmp_path):
    """With the adapters "default", which is active, and "other"."""
    first, second = saved(gradiend, tmp_path / "first"), saved(other, tmp_path / "second")
    if request.param == "peft":
        model = PeftModel.from_pretrained(tiny_llama, first)
        model.load_adapter(second, "other")
        return model
    tiny_llama.load_adapter(first)
    tiny_llama.load_adapter(second, adapter_name="other")
    tiny_llama.set_adapter("default")
    return tiny_llama


@pytest.fixture
def both_active(model):
    holder = model.base_model if isinstance(model, PeftModel) else model
    holder.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("number", [0.5, 2, -1.0, 0.0, 1e-3])
def test_strength_multiplies_the_update(model, plain, gradiend, edited_copy, logits_of, number):
    set_strength(model, number)

    assert get_strength(model) == number
    expected = logits_of(edited_copy(plain, gradiend, strength=number))
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(expected, logits_of(edited_copy(plain, gradiend)))


def test_a_strength_acts_at_once_on_the_weights(
    model, plain, gradiend, edited_copy, bits_of, same_bits, tiny_llama
):
    set_strength(model, 0.5)

    assert same_bits(bits_of(tiny_llama), bits_of(edited_copy(plain, gradiend, strength=0.5)))


def test_strength_zero_leaves_the_bits_of_the_base_model(
    model, tiny_llama, plain, logits_of, bits_of, same_bits
):
    assert not torch.equal(logits_of(model), logits_of(plain))

    set_strength(model, 0.0)

    assert same_bits(bits_of(tiny_llama), bits_of(plain))


def test_each_adapter_has_its_own_strength(
    both_active, plain, gradiend, other, edited_copy, logits_of
):
    set_strength(both_active, 0.5, "default")
    set_strength(both_active, 0.0, "other")
    assert torch.equal(
        logits_of(both_active), logits_of(edited_copy(plain, gradiend, strength=0.5))
    )

    set_strength(both_active, 0.0, "default")
    set_strength(both_active, -2.0, "other")
    assert torch.equal(logits_of(both_active), logits_of(edited_copy(plain, other, strength=-2.0)))
    assert get_strength(both_active, "default") == 0.0
    assert get_strength(both_active, "other") == -2.0


def test_the_context_brings_the_earlier_strength_back(
    model, plain, gradiend, edited_copy, logits_of
):
    set_strength(model, 0.5)

    seen = []

    def fail_inside() -> None:
        with strength(model, -1.0) as inside:
            assert inside is model
            seen.append(logits_of(model))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail_inside()

    inner = seen[0]
    assert torch.equal(inner, logits_of(edited_copy(plain, gradiend, strength=-1.0)))
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend, strength=0.5)))
    assert not torch.equal(inner, logits_of(model))


@pytest.mark.parametrize(
    ("numbers", "changed"),
    [
        ({"feature_factor": [1.0, 0.25]}, {"h": (1.0, 0.25)}),
        ({"step_size": 0.07}, {"alpha": 0.07}),
        ({"feature_factor": (0.0, 0.0), "step_size": -0.1}, {"h": (0.0, 0.0), "alpha": -0.1}),
    ],
)
def test_an_edit_is_changed_in_the_numbers_that_are_given(
    model, plain, gradiend, edited_copy, logits_of, numbers, changed
):
    set_edit(model, **numbers)

    expected = logits_of(edited_copy(plain, gradiend, **changed))
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(expected, logits_of(edited_copy(plain, gradiend)))


def test_the_edit_of_an_inactive_adapter_waits_until_it_is_active(
    model, plain, gradiend, other, edited_copy, logits_of
):
    set_edit(model, 0.9, 0.4, "other")
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))

    model.set_adapter("other")
    expected = logits_of(edited_copy(plain, other, h=(0.9,), alpha=0.4))
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(expected, logits_of(edited_copy(plain, other)))


def test_a_peft_model_has_the_functions_as_methods(
    plain, tiny_llama, gradiend, edited_copy, saved, logits_of, tmp_path
):
    model = PeftModel.from_pretrained(tiny_llama, saved(gradiend, tmp_path))

    model.set_strength(0.5)
    model.set_edit([1.0, 1.0], 0.1)

    assert model.get_strength() == 0.5
    expected = logits_of(edited_copy(plain, gradiend, h=(1.0, 1.0), alpha=0.1, strength=0.5))
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(expected, logits_of(plain))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, "1", True, None, [1.0]], ids=str)
def test_a_strength_that_is_not_a_finite_number_is_refused_and_changes_nothing(
    model, plain, gradiend, edited_copy, logits_of, number
):
    with pytest.raises(ConfigError, match="finite number as strength"):
        set_strength(model, number)

    assert get_strength(model) == 1.0
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))


@pytest.mark.parametrize(
    "numbers",
    [
        {"feature_factor": [1.0, math.nan]},
        {"feature_factor": 1.0},
        {"feature_factor": [1.0, 2.0, 3.0]},
        {"feature_factor": "ab"},
        {"feature_factor": [0.5, 0.5], "step_size": math.inf},
        {"step_size": "0.1"},
        {"step_size": False},
    ],
    ids=str,
)
def test_an_edit_of_other_numbers_is_refused_and_changes_nothing(
    model, plain, gradiend, edited_copy, logits_of, numbers
):
    with pytest.raises(ConfigError, match="Expected a"):
        set_edit(model, **numbers)

    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))


@pytest.mark.parametrize("act", [get_strength, lambda *a: set_strength(a[0], 0.5, a[1])])
def test_an_unknown_adapter_is_refused_with_the_known_names(model, act):
    with pytest.raises(ConfigError, match=r"'default', 'other', but got 'nobody'"):
        act(model, "nobody")


def test_a_name_is_asked_for_where_two_adapters_are_active(both_active):
    with pytest.raises(ConfigError, match=r"name of an adapter.*'default', 'other'"):
        get_strength(both_active)


def test_a_model_without_an_adapter_is_refused(plain):
    with pytest.raises(GradiendError, match="LlamaForCausalLM has none"):
        set_strength(plain, 0.5)


def test_the_feature_factor_of_an_adapter_that_was_made_for_one_is_refused(
    tiny_llama, plain, gradiend, saved, edited_copy, logits_of, tmp_path
):
    tiny_llama.load_adapter(saved(gradiend, tmp_path, adjustable=False))

    with pytest.raises(ConfigError, match="adjustable=True"):
        set_edit(tiny_llama, [0.1, 0.1])

    set_edit(tiny_llama, step_size=0.4)
    assert torch.equal(logits_of(tiny_llama), logits_of(edited_copy(plain, gradiend, alpha=0.4)))


def test_a_scale_multiplies_the_strength_in_one_layer(
    model, plain, gradiend, edited_copy, logits_of
):
    for layer in (m for m in model.modules() if hasattr(m, "gradiend_decoder_bias")):
        layer.set_scale("default", 0.25)

    expected = logits_of(edited_copy(plain, gradiend, strength=0.25))
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(expected, logits_of(plain))


def test_models_that_share_a_configuration_have_strengths_of_their_own(
    plain, gradiend, edited_copy, logits_of
):
    config = gradiend.to_adapter().config
    config.values = gradiend.to_adapter().values
    first, second = copy.deepcopy(plain), copy.deepcopy(plain)
    first.add_adapter(config)
    second.add_adapter(config)

    set_strength(first, 0.0)

    assert get_strength(second) == 1.0
    assert torch.equal(logits_of(first), logits_of(plain))
    second.disable_adapters()
    second.enable_adapters()
    assert torch.equal(logits_of(second), logits_of(edited_copy(plain, gradiend)))
