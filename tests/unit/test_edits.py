import math

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_gradiend.edits import WeightEditor, edited, merge_into
from hf_gradiend.errors import BaseModelError, CompatibilityError, ConfigError, NumericalError

# All weights are eighths in [−2, 2]; with these factors float32 holds W + α·(h·W_d + b_d) exactly,
# so that equality, not closeness, is the expected result.
H, ALPHA = 0.5, 0.25
LAYOUTS = pytest.mark.parametrize("every", [None, 7], ids=["dense", "sparse"])


@pytest.fixture
def base_model(tiny_model, fill):
    fill(tiny_model, seed=1)
    return tiny_model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        # Compared as bytes: 0.0 equals −0.0, and NaN does not equal itself.
        same = torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8),
            before[name].contiguous().view(-1).view(torch.uint8),
        )
        assert same, name


def expected_weights(before: dict[str, Tensor], gradiend, h=H, alpha=ALPHA) -> dict[str, Tensor]:
    """W + α·(h·W_d + b_d) for one feature, from the tensors themselves."""
    state = gradiend.state_dict()
    after = dict(before)
    for name in gradiend.names:
        update = h * state[f"decoder.weight.{name}"][0] + state[f"decoder.bias.{name}"]
        full = torch.zeros(before[name].numel())
        index = state.get(f"indices.{name}", torch.arange(full.numel())).long()
        full[index] = update.flatten()
        after[name] = before[name] + alpha * full.view(before[name].shape)
    return after


# ---- edited ------------------------------------------------------------------


@LAYOUTS
def test_inside_the_context_the_weights_are_theta_plus_alpha_dec_h(base_model, gradiend_for, every):
    gradiend = gradiend_for(base_model, every=every)
    before = bits(base_model)
    expected = expected_weights(before, gradiend)

    with edited(gradiend, base_model, H, ALPHA) as model:
        assert model is base_model
        inside = bits(model)

    for name in gradiend.names:
        assert torch.equal(inside[name], expected[name])
        assert not torch.equal(inside[name], before[name])  # the control: every one was edited
    for name in before.keys() - gradiend.names:
        assert torch.equal(inside[name], before[name])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_afterwards_every_bit_is_the_old_one(tiny_model, gradiend_for, every, dtype):
    gradiend = gradiend_for(tiny_model, every=every)
    tiny_model.to(dtype)
    with torch.no_grad():
        next(tiny_model.parameters()).view(-1)[0] = -0.0
    before = bits(tiny_model)

    naive_differs = False
    with edited(gradiend, tiny_model, 0.3, 0.017):
        for name, update in gradiend.decode(0.3).items():
            inside = tiny_model.get_parameter(name).detach()
            assert not torch.equal(inside, before[name])
            naive = inside - (0.017 * update.detach()).to(dtype)
            naive_differs |= not torch.equal(naive, before[name])

    assert_bits(tiny_model, before)
    assert naive_differs  # the control: taking away what was added does not restore the bits


def test_an_exception_inside_restores_every_bit_and_is_passed_on(tiny_gpt2, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2)
    before = bits(tiny_gpt2)

    seen: dict[str, Tensor] = {}

    def fail_inside() -> None:
        with edited(gradiend, tiny_gpt2, H, ALPHA):
            seen.update(bits(tiny_gpt2))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail_inside()

    assert_bits(tiny_gpt2, before)
    assert not torch.equal(seen[gradiend.names[0]], before[gradiend.names[0]])


def test_an_edit_changes_the_output_inside_and_not_after(tiny_gpt2, gradiend_for, causal_tokenizer):
    gradiend = gradiend_for(tiny_gpt2)
    batch = causal_tokenizer("the nurse said that she", return_tensors="pt")

    with torch.no_grad():
        before = tiny_gpt2(**batch).logits
        with edited(gradiend, tiny_gpt2, H, ALPHA):
            inside = tiny_gpt2(**batch).logits
        after = tiny_gpt2(**batch).logits

    assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(after, before)


def test_step_size_zero_is_the_identity(tiny_gpt2, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2)
    before = bits(tiny_gpt2)

    with edited(gradiend, tiny_gpt2, H, 0.0):
        assert all(torch.equal(t, before[n]) for n, t in tiny_gpt2.state_dict().items())
    with edited(gradiend, tiny_gpt2, H, ALPHA):  # the control
        assert not all(torch.equal(t, before[n]) for n, t in tiny_gpt2.state_dict().items())


def test_bfloat16_weights_are_rounded_once_from_a_float32_sum(tiny_llama, gradiend_for):
    gradiend = gradiend_for(tiny_llama)
    tiny_llama.to(torch.bfloat16)
    before = bits(tiny_llama)
    expected = expected_weights({n: t.float() for n, t in before.items()}, gradiend, 0.3, 0.017)

    with edited(gradiend, tiny_llama, 0.3, 0.017):
        inside = bits(tiny_llama)

    stepwise_differs = False
    for name in gradiend.names:
        # h·W_d + b_d may round differently in the last float32 bit: equal after bfloat16 rounding
        # but for numbers that lie on a rounding edge.
        equal = (inside[name] == expected[name].bfloat16()).double().mean()
        assert float(equal) > 0.999
        update = (0.017 * gradiend.decode(0.3)[name].detach()).bfloat16()
        stepwise_differs |= not torch.equal(before[name] + update, inside[name])
    assert stepwise_differs  # the control: rounding the update first is something else


def test_an_edit_is_not_rounded_by_autocast(tiny_gpt2, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2)
    name = gradiend.names[0]

    def weights() -> Tensor:
        with edited(gradiend, tiny_gpt2, 0.3, 0.017):
            return tiny_gpt2.get_parameter(name).detach().clone()

    plain = weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = weights()

    assert torch.equal(under_autocast, plain)


@LAYOUTS
def test_tied_weights_are_edited_once_and_stay_tied(tiny_gpt2, fill, gradiend_for, every):
    fill(tiny_gpt2, seed=1)
    gradiend = gradiend_for(tiny_gpt2, "backbone", every=every)
    before = bits(tiny_gpt2)
    expected = expected_weights(before, gradiend)["transformer.wte.weight"]

    with edited(gradiend, tiny_gpt2, H, ALPHA):
        assert tiny_gpt2.lm_head.weight is tiny_gpt2.transformer.wte.weight
        assert torch.equal(tiny_gpt2.lm_head.weight, expected)

    assert tiny_gpt2.lm_head.weight is tiny_gpt2.transformer.wte.weight
    assert_bits(tiny_gpt2, before)
    assert not torch.equal(before["lm_head.weight"], expected)


def test_every_feature_adds_its_part(tiny_gpt2, fill, gradiend_for):
    fill(tiny_gpt2, seed=1)
    gradiend = gradiend_for(tiny_gpt2, n_features=2)
    before = bits(tiny_gpt2)

    with edited(gradiend, tiny_gpt2, [0.5, -1.0], ALPHA):
        inside = bits(tiny_gpt2)

    for name in gradiend.names:
        weight, bias = gradiend.decoder.weight.at(name), gradiend.decoder.bias.at(name)
        expected = before[name] + ALPHA * (0.5 * weight[0] - 1.0 * weight[1] + bias)
        assert torch.equal(inside[name], expected)


def test_an_edit_of_a_body_reaches_it_under_a_head(tiny_bert, gradiend_for):
    gradiend = gradiend_for(tiny_bert.bert)
    name = gradiend.names[0]
    assert name.startswith("encoder.")
    before = bits(tiny_bert)

    with edited(gradiend, tiny_bert, H, ALPHA):
        assert not torch.equal(tiny_bert.state_dict()[f"bert.{name}"], before[f"bert.{name}"])

    assert_bits(tiny_bert, before)


def test_an_edit_leaves_gradients_flags_and_modes_alone(tiny_gpt2, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2)
    parameter = tiny_gpt2.get_parameter(gradiend.names[0])
    parameter.grad = torch.ones_like(parameter)
    other = tiny_gpt2.get_parameter(gradiend.names[1]).requires_grad_(False)
    tiny_gpt2.train()

    with edited(gradiend, tiny_gpt2, H, ALPHA):
        assert parameter.requires_grad
        assert parameter.is_leaf

    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert not other.requires_grad
    assert tiny_gpt2.training


def test_edits_inside_one_another_add_up_and_unwind(tiny_gpt2, fill, gradiend_for):
    fill(tiny_gpt2, seed=1)
    gradiend = gradiend_for(tiny_gpt2)
    name, before = gradiend.names[0], bits(tiny_gpt2)
    once = expected_weights(before, gradiend)
    twice = expected_weights(once, gradiend, h=-1.0)

    with edited(gradiend, tiny_gpt2, H, ALPHA):
        with edited(gradiend, tiny_gpt2, -1.0, ALPHA):
            assert torch.equal(tiny_gpt2.get_parameter(name), twice[name])
        assert torch.equal(tiny_gpt2.get_parameter(name), once[name])

    assert_bits(tiny_gpt2, before)


# ---- several edits -----------------------------------------------------------


@LAYOUTS
def test_a_second_edit_starts_from_the_original_weights(tiny_gpt2, fill, gradiend_for, every):
    fill(tiny_gpt2, seed=1)
    gradiend = gradiend_for(tiny_gpt2, every=every)
    before = bits(tiny_gpt2)
    first, second = (expected_weights(before, gradiend, h, 0.25) for h in (1.0, -0.5))

    with WeightEditor(gradiend, tiny_gpt2) as editor:
        editor.apply(1.0, 0.25)
        after_first = bits(tiny_gpt2)
        editor.apply(-0.5, 0.25)
        after_second = bits(tiny_gpt2)
        editor.restore()
        assert_bits(tiny_gpt2, before)
        editor.apply(1.0, 0.25)

    assert_bits(tiny_gpt2, before)
    for name in gradiend.names:
        assert torch.equal(after_first[name], first[name])
        assert torch.equal(after_second[name], second[name])
        assert not torch.equal(first[name], second[name])


def test_a_hundred_edits_leave_no_rounding(tiny_llama, gradiend_for):
    gradiend = gradiend_for(tiny_llama, "*.1.mlp.*")
    before = bits(tiny_llama)

    with WeightEditor(gradiend, tiny_llama) as editor:
        for step in range(100):
            editor.apply(math.sin(step), 0.01 * step)

    assert_bits(tiny_llama, before)


# ---- merge -------------------------------------------------------------------


@LAYOUTS
def test_merge_adds_alpha_dec_h_for_good(base_model, gradiend_for, every):
    gradiend = gradiend_for(base_model, every=every)
    before = bits(base_model)

    merged = merge_into(gradiend, base_model, H, ALPHA)

    assert merged is base_model
    expected = expected_weights(before, gradiend)
    for name, tensor in base_model.state_dict().items():
        if name in gradiend.names or name not in dict(base_model.named_parameters()):
            continue
        assert torch.equal(tensor, before[name])
    for name in gradiend.names:
        assert torch.equal(base_model.get_parameter(name), expected[name])
        assert not torch.equal(expected[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_weights_of_the_context(tiny_gpt2, gradiend_for, dtype):
    gradiend = gradiend_for(tiny_gpt2)
    tiny_gpt2.to(dtype)
    with edited(gradiend, tiny_gpt2, 0.3, 0.017):
        inside = bits(tiny_gpt2)

    merge_into(gradiend, tiny_gpt2, 0.3, 0.017)

    assert_bits(tiny_gpt2, inside)


def test_merging_twice_adds_twice(tiny_gpt2, fill, gradiend_for):
    fill(tiny_gpt2, seed=1)
    gradiend = gradiend_for(tiny_gpt2)
    before = bits(tiny_gpt2)

    for _ in range(2):
        merge_into(gradiend, tiny_gpt2, H, ALPHA)

    expected = expected_weights(before, gradiend, alpha=2 * ALPHA)
    assert all(torch.equal(tiny_gpt2.get_parameter(n), expected[n]) for n in gradiend.names)


# ---- the chosen edit ---------------------------------------------------------


def test_without_numbers_the_chosen_edit_is_applied(tiny_gpt2, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2, feature_factor=0.0, step_size=ALPHA)
    name = gradiend.names[0]
    before = tiny_gpt2.get_parameter(name).detach().clone()

    with edited(gradiend, tiny_gpt2):
        chosen = tiny_gpt2.get_parameter(name).detach().clone()
    with edited(gradiend, tiny_gpt2, 0.0, ALPHA):
        assert torch.equal(tiny_gpt2.get_parameter(name), chosen)
    with edited(gradiend, tiny_gpt2, 1.0):  # a given number goes before the chosen one
        assert not torch.equal(tiny_gpt2.get_parameter(name), chosen)

    assert not torch.equal(chosen, before)


@pytest.mark.parametrize("numbers", [(None, None), (0.5, None), (None, 0.01)])
@pytest.mark.parametrize("function", ["edited", "merge_into"])
def test_a_missing_chosen_edit_is_refused(tiny_gpt2, gradiend_for, numbers, function):
    gradiend = gradiend_for(tiny_gpt2)
    before = bits(tiny_gpt2)

    with pytest.raises(ConfigError, match="no chosen edit"):
        run(function, gradiend, tiny_gpt2, *numbers)

    assert_bits(tiny_gpt2, before)


@pytest.mark.parametrize("numbers", [
    (math.nan, 0.1), (math.inf, 0.1), (0.1, math.nan), (0.1, math.inf), (0.1, -math.inf),
])  # fmt: skip
@pytest.mark.parametrize("function", ["edited", "merge_into"])
def test_numbers_that_are_not_finite_are_refused(tiny_gpt2, gradiend_for, numbers, function):
    gradiend = gradiend_for(tiny_gpt2)
    before = bits(tiny_gpt2)

    with pytest.raises(ConfigError, match="finite"):
        run(function, gradiend, tiny_gpt2, *numbers)

    assert_bits(tiny_gpt2, before)


@pytest.mark.parametrize("h", [0.5, [0.5], [0.1, 0.2, 0.3]])
def test_a_feature_factor_of_another_length_is_refused(tiny_gpt2, gradiend_for, h):
    gradiend = gradiend_for(tiny_gpt2, n_features=2)

    with pytest.raises(ConfigError, match="2 numbers"):
        run("edited", gradiend, tiny_gpt2, h, 0.1)


def run(function: str, *arguments: object) -> None:
    if function == "merge_into":
        merge_into(*arguments)
        return
    with edited(*arguments):
        pass


# ---- refused models ----------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", ["edited", "merge_into"])
def test_a_decoder_that_is_not_finite_is_refused(tiny_gpt2, gradiend_for, part, bad, function):
    gradiend = gradiend_for(tiny_gpt2)
    name = gradiend.names[-1]
    with torch.no_grad():
        getattr(gradiend.decoder, part).at(name).view(-1)[-1] = bad
    before = bits(tiny_gpt2)

    with pytest.raises(NumericalError, match=name):
        run(function, gradiend, tiny_gpt2, H, ALPHA)

    assert_bits(tiny_gpt2, before)


def test_a_float16_decoder_whose_sum_overflows_is_fine(tiny_gpt2, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2).half()
    weight = gradiend.decoder.weight.at(gradiend.names[0])
    with torch.no_grad():
        weight.fill_(60_000.0)
    assert torch.isinf(weight.sum())  # the control: the sum of finite numbers is not

    with edited(gradiend, tiny_gpt2, 0.5, 1e-6):
        pass


def test_another_architecture_is_refused_and_left_alone(tiny_gpt2, tiny_llama, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2)
    before = bits(tiny_llama)

    for function in ("edited", "merge_into"):
        with pytest.raises(CompatibilityError, match="LlamaForCausalLM"):
            run(function, gradiend, tiny_llama, H, ALPHA)

    assert_bits(tiny_llama, before)


def test_the_same_architecture_in_another_size_is_refused(tiny_llama, gradiend_for):
    gradiend = gradiend_for(tiny_llama)
    wide = LlamaConfig(**{**tiny_llama.config.to_dict(), "intermediate_size": 48})

    with pytest.raises(CompatibilityError, match=r"\(48, 16\) instead of \(32, 16\)"):
        run("edited", gradiend, LlamaForCausalLM(wide), H, ALPHA)


def test_offloaded_weights_are_refused_rather_than_left_unchanged(tiny_gpt2, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2)
    with torch.device("meta"):
        offloaded = GPT2LMHeadModel(GPT2Config(**tiny_gpt2.config.to_dict()))

    with pytest.raises(BaseModelError, match="offloaded"):
        run("merge_into", gradiend, offloaded, H, ALPHA)


def test_quantised_weights_are_refused(tiny_gpt2, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2, "*.mlp.c_fc.weight")
    module = tiny_gpt2.transformer.h[1].mlp.c_fc
    module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)

    with pytest.raises(BaseModelError, match=r"h\.1\.mlp\.c_fc\.weight.*int8"):
        run("merge_into", gradiend, tiny_gpt2, H, ALPHA)
