"""Several adapters as one."""

import copy
import math

import pytest
import torch
from peft import PeftModel

from hf_gradiend import set_edit
from hf_gradiend.errors import ConfigError


@pytest.fixture
def plain(tiny_llama):
    return copy.deepcopy(tiny_llama)


def combined(plain, first, second, weights, h=None):
    """W + Σ wᵢ·αᵢ·(hᵢ·W_d,ᵢ + b_d,ᵢ), in float64."""
    edited = copy.deepcopy(plain)
    with torch.no_grad():
        for number, gradiend in enumerate((first, second)):
            state = gradiend.state_dict()
            factor = 0.3 if h is None else h[number]
            for name in gradiend.names:
                values = factor * state[f"decoder.weight.{name}"][0].double()
                values = values + state[f"decoder.bias.{name}"].double()
                parameter = edited.double().get_parameter(name)
                index = state.get(f"indices.{name}", torch.arange(parameter.numel())).long()
                parameter.view(-1)[index] += weights[number] * 0.21 * values.flatten()
    return edited.float()


@pytest.fixture(
    params=[
        ("layers", None, "layers", None),
        ("layers", 3, "layers", 4),
        ("layers", None, "layers", 4),
        ("layers", 5, "layers", None),
        ("*.mlp.*", None, "*norm.weight", None),
        ("*.mlp.*", 3, "*", None),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def pair(request, plain, make_gradiend):
    patterns, every, other_patterns, other_every = request.param
    return (
        make_gradiend(plain, patterns, every=every),
        make_gradiend(plain, other_patterns, every=other_every, seed=1),
    )


@pytest.fixture
def model(pair, tiny_llama, saved, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama, saved(pair[0], tmp_path / "a"), "a")
    model.load_adapter(saved(pair[1], tmp_path / "b"), "b")
    return model


def test_a_weighted_sum_adds_what_its_parts_add(
    model, pair, plain, logits_of, bits_of, same_bits, tiny_llama
):
    before = logits_of(model)

    model.base_model.add_weighted_adapter(["a", "b"], [0.5, -0.25], "both")
    assert torch.equal(logits_of(model), before)  # the active one stays
    model.set_adapter("both")

    expected = logits_of(combined(plain, *pair, (0.5, -0.25)))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, before, atol=0.01)
    assert not torch.allclose(expected, logits_of(combined(plain, *pair, (0.5, 0.0))), atol=1e-3)
    with model.disable_adapter():
        assert same_bits(bits_of(tiny_llama), bits_of(plain))


def test_the_sum_keeps_every_feature_factor_adjustable_and_is_saved(
    model, pair, plain, logits_of, tmp_path
):
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 2.0], "both")
    model.set_adapter("both")

    set_edit(model, [0.9, -0.4])
    model.save_pretrained(tmp_path / "saved", selected_adapters=["both"])

    expected = logits_of(combined(plain, *pair, (1.0, 2.0), (0.9, -0.4)))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    again = PeftModel.from_pretrained(plain, tmp_path / "saved" / "both")
    assert torch.equal(logits_of(again), logits_of(model))


def test_the_strength_of_the_parts_goes_into_the_sum(model, pair, plain, logits_of):
    model.set_strength(0.5, "a")
    model.set_strength(-1.0, "b")
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    model.set_adapter("both")

    assert model.get_strength() == 1.0
    expected = logits_of(combined(plain, *pair, (0.5, -1.0)))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_parts_of_a_fixed_feature_factor(
    tiny_llama, plain, make_gradiend, saved, logits_of, tmp_path
):
    pair = make_gradiend(plain), make_gradiend(plain, seed=1)
    first = saved(pair[0], tmp_path / "a", adjustable=False)
    model = PeftModel.from_pretrained(tiny_llama, first, "a")
    model.load_adapter(saved(pair[1], tmp_path / "b"), "b")
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    model.set_adapter("both")

    set_edit(model, [0.8])

    expected = logits_of(combined(plain, *pair, (1.0, 1.0), (0.3, 0.8)))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_the_same_adapter_twice_counts_twice(
    tiny_llama, plain, make_gradiend, edited_copy, logits_of, saved, tmp_path
):
    gradiend = make_gradiend(plain)
    model = PeftModel.from_pretrained(tiny_llama, saved(gradiend, tmp_path))
    model.base_model.add_weighted_adapter(["default", "default"], [1.0, 1.0], "twice")
    model.set_adapter("twice")

    expected = logits_of(edited_copy(plain, gradiend, strength=2.0))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        (["default", "nobody"], [1.0, 1.0], "both", "got 'nobody'"),
        (["default"], [1.0, 1.0], "both", "one weight per adapter"),
        ([], [], "both", "one weight per adapter"),
        (["default"], [1.0], "default", "'default' is taken"),
        (["default"], [math.nan], "both", "finite number as weight"),
        (["default"], ["1"], "both", "finite number as weight"),
    ],
)
def test_a_sum_that_makes_no_sense_is_refused_and_changes_nothing(
    tiny_llama, plain, make_gradiend, edited_copy, logits_of, saved, tmp_path,
    adapters, weights, name, message,
):  # fmt: skip
    gradiend = make_gradiend(plain)
    model = PeftModel.from_pretrained(tiny_llama, saved(gradiend, tmp_path))

    with pytest.raises(ConfigError, match=message):
        model.base_model.add_weighted_adapter(adapters, weights, name)

    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))
