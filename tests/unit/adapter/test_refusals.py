"""What does not fit is refused with one message, and never a wrong forward pass."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gradiend import GradiendAdapter, GradiendAdapterConfig, set_strength
from hf_gradiend.base_models import check_base_model
from hf_gradiend.errors import (
    BaseModelError,
    CompatibilityError,
    ConfigError,
    GradiendError,
    NumericalError,
)

DENSE_AND_SPARSE = pytest.mark.parametrize("every", [None, 7], ids=["dense", "sparse"])


def with_peft(base_model, folder):
    return PeftModel.from_pretrained(base_model, folder)


def with_transformers(base_model, folder):
    base_model.load_adapter(folder)
    return base_model


WAYS = pytest.mark.parametrize("load", [with_peft, with_transformers])


@pytest.fixture
def plain(tiny_gpt2):
    return copy.deepcopy(tiny_gpt2)


@pytest.fixture
def assert_untouched(plain, logits_of, bits_of, same_bits):
    """Function of a base model: its weights and its logits are the old ones."""

    def assert_untouched(base_model) -> None:
        assert same_bits(bits_of(base_model), bits_of(plain))
        assert torch.equal(logits_of(base_model), logits_of(plain))

    return assert_untouched


def rewrite_tensors(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


def rewrite_config(folder, change) -> None:
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# ---- another base model --------------------------------------------------------------------------


@WAYS
def test_a_model_of_another_architecture(
    tiny_llama, tiny_gpt2, plain, make_gradiend, saved, tmp_path, load, assert_untouched
):
    folder = saved(make_gradiend(tiny_llama), tmp_path)

    with pytest.raises(CompatibilityError, match=r"GPT2LMHeadModel model\.layers\.\S+ is missing"):
        load(tiny_gpt2, folder)

    assert_untouched(tiny_gpt2)
    assert list(tiny_gpt2.state_dict()) == list(plain.state_dict())


@WAYS
def test_a_model_of_another_size(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, load, assert_untouched
):
    larger = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))
    folder = saved(make_gradiend(larger), tmp_path)

    with pytest.raises(CompatibilityError, match=r"has shape \(16,\) instead of \(32,\)"):
        load(tiny_gpt2, folder)

    assert_untouched(tiny_gpt2)
    assert list(tiny_gpt2.state_dict()) == list(plain.state_dict())


def test_a_second_adapter_that_does_not_fit_leaves_the_first_as_it_was(
    tiny_gpt2, tiny_llama, plain, make_gradiend, edited_copy, saved, tmp_path, logits_of
):
    gradiend = make_gradiend(plain)
    model = with_peft(tiny_gpt2, saved(gradiend, tmp_path / "first"))

    with pytest.raises(CompatibilityError):
        model.load_adapter(saved(make_gradiend(tiny_llama), tmp_path / "second"), "second")

    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))
    model.load_adapter(saved(make_gradiend(plain, seed=2), tmp_path / "third"), "second")
    model.set_adapter("second")
    expected = edited_copy(plain, make_gradiend(plain, seed=2))
    assert torch.equal(logits_of(model), logits_of(expected))


@WAYS
def test_offloaded_weights(tiny_gpt2, plain, make_gradiend, saved, tmp_path, load):
    folder = saved(make_gradiend(plain), tmp_path)
    tiny_gpt2.transformer.h[1].mlp.c_fc.to("meta")

    with pytest.raises(BaseModelError, match=r"'transformer\.h\.1\.mlp\.c_fc\.\w+' is offloaded"):
        load(tiny_gpt2, folder)


def test_weights_that_are_offloaded_after_loading(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, logits_of
):
    tiny_gpt2.load_adapter(saved(make_gradiend(plain), tmp_path))
    layer = tiny_gpt2.transformer.h[1].mlp.c_fc
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"))

    with pytest.raises(BaseModelError, match="offloaded"):
        logits_of(tiny_gpt2)


def test_weights_that_are_offloaded_after_the_first_pass(
    tiny_gpt2, plain, make_gradiend, edited_copy, saved, tmp_path, logits_of
):
    gradiend = make_gradiend(plain)
    model = with_peft(tiny_gpt2, saved(gradiend, tmp_path))
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))

    cpu_offload(tiny_gpt2, execution_device="cpu")

    with pytest.raises(BaseModelError, match="offloaded"):
        logits_of(model)


def test_training_a_gradiend_on_a_model_that_carries_one(tiny_gpt2, plain, make_gradiend):
    check_base_model(tiny_gpt2)  # the control
    make_gradiend(plain).to_adapter().apply_to(tiny_gpt2)

    with pytest.raises(BaseModelError, match="PEFT adapter"):
        check_base_model(tiny_gpt2)


# ---- broken files --------------------------------------------------------------------------------


@DENSE_AND_SPARSE
def test_a_file_with_missing_tensors_through_peft(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, every, assert_untouched
):
    folder = saved(make_gradiend(plain, every=every), tmp_path)
    rewrite_tensors(folder, lambda t: {k: v for k, v in t.items() if ".mlp.c_fc." not in k})

    with pytest.raises(CompatibilityError, match=r"missing, for instance '\S*mlp\.c_fc"):
        with_peft(tiny_gpt2, folder)

    assert_untouched(tiny_gpt2)


def test_a_broken_second_file_can_be_followed_by_a_whole_one(
    tiny_gpt2, plain, make_gradiend, edited_copy, saved, tmp_path, logits_of
):
    gradiend, other = make_gradiend(plain), make_gradiend(plain, seed=1)
    model = with_peft(tiny_gpt2, saved(gradiend, tmp_path / "first"))
    folder = saved(other, tmp_path / "second")
    rewrite_tensors(folder, lambda t: {k: v for k, v in t.items() if ".mlp.c_fc." not in k})
    with pytest.raises(CompatibilityError, match="missing"):
        model.load_adapter(folder, "other")
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))
    assert list(model.peft_config) == ["default"]

    model.load_adapter(saved(other, tmp_path / "whole"), "other")
    model.set_adapter("other")

    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, other)))


@pytest.mark.parametrize(
    ("every", "kind"),
    [
        (None, "decoder_weight"),
        (None, "decoder_bias"),
        (None, "mlp.c_fc"),
        (7, "decoder_weight"),
        (7, "decoder_bias"),
        (7, "index_gaps"),
        (7, "mlp.c_fc"),
    ],
)
def test_a_file_with_missing_tensors_through_transformers(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, every, kind,
    logits_of, bits_of, same_bits,
):  # fmt: skip
    folder = saved(make_gradiend(plain, every=every), tmp_path)
    rewrite_tensors(folder, lambda t: {k: v for k, v in t.items() if kind not in k})
    tiny_gpt2.load_adapter(folder)

    for _ in range(2):  # and not the first time alone
        with pytest.raises(NumericalError, match="never came"):
            logits_of(tiny_gpt2)

    assert same_bits(bits_of(tiny_gpt2), bits_of(plain))
    tiny_gpt2.disable_adapters()
    assert torch.equal(logits_of(tiny_gpt2), logits_of(plain))


@WAYS
def test_a_truncated_file(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, load, bits_of, same_bits
):
    folder = saved(make_gradiend(plain), tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])

    # safetensors' own message: peft and transformers open the file.
    with pytest.raises(Exception, match=r"incomplete|IncompleteBuffer|not fully covered"):
        load(tiny_gpt2, folder)

    assert same_bits(bits_of(tiny_gpt2), bits_of(plain))


def test_a_truncated_file_outside_of_a_model(plain, make_gradiend, saved, tmp_path):
    folder = saved(make_gradiend(plain), tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])

    with pytest.raises(ConfigError, match="the file is broken"):
        GradiendAdapter.from_pretrained(folder)


def test_missing_tensors_outside_of_a_model(plain, make_gradiend, saved, tmp_path):
    folder = saved(make_gradiend(plain), tmp_path)
    rewrite_tensors(folder, lambda t: {k: v for k, v in t.items() if ".mlp.c_fc." not in k})

    with pytest.raises(ConfigError, match=r"missing, for instance '\S*mlp\.c_fc"):
        GradiendAdapter.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["decoder_weight", "index_gaps"])
def test_one_kind_of_tensor_missing_outside_of_a_model(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, kind
):
    folder = saved(make_gradiend(plain, every=7), tmp_path)
    rewrite_tensors(folder, lambda t: {k: v for k, v in t.items() if kind not in k})

    with pytest.raises(GradiendError, match="missing"):
        GradiendAdapter.from_pretrained(folder).apply_to(tiny_gpt2)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_one_of_the_files(plain, make_gradiend, saved, tmp_path, missing):
    folder = saved(make_gradiend(plain), tmp_path)
    (folder / missing).unlink()

    with pytest.raises(ConfigError, match="folder or Hub id of a"):
        GradiendAdapter.from_pretrained(folder)


def test_the_adapter_of_another_method(tmp_path, plain):
    from peft import LoraConfig  # noqa: PLC0415 - this test alone

    plain.add_adapter(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    plain.save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match="Expected a GRADIEND adapter"):
        GradiendAdapter.from_pretrained(tmp_path)


def test_a_folder_that_holds_no_gradiend(tiny_gpt2, tmp_path):
    tiny_gpt2.save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()

    with pytest.raises(ConfigError, match="holds a model of type 'gpt2'"):
        GradiendAdapterConfig.from_gradiend(tmp_path / "model", 0.1, 0.1)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        GradiendAdapterConfig.from_gradiend(tmp_path / "empty", 0.1, 0.1)


def test_a_gradiend_that_lacks_a_shard_leaves_the_model_usable(
    tiny_gpt2, plain, make_gradiend, tmp_path, assert_untouched
):
    make_gradiend(plain).save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    last = make_gradiend(plain).names[-1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    config = GradiendAdapterConfig.from_gradiend(tmp_path)
    (tmp_path / index[f"decoder.weight.{last}"]).unlink()

    with pytest.raises(ConfigError, match=r"has no model-\d+-of-\d+\.safetensors"):
        tiny_gpt2.add_adapter(config)

    assert_untouched(tiny_gpt2)
    assert list(tiny_gpt2.state_dict()) == list(plain.state_dict())


# ---- broken numbers ------------------------------------------------------------------------------


@WAYS
@DENSE_AND_SPARSE
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["decoder_weight", "decoder_bias"])
def test_values_that_are_not_finite(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, load, every, number, kind,
    logits_of, bits_of, same_bits,
):  # fmt: skip
    folder = saved(make_gradiend(plain, every=every), tmp_path)

    def spoil(tensors):
        key = sorted(key for key in tensors if kind in key)[-1]
        tensors[key].view(-1)[-1] = number
        return tensors

    rewrite_tensors(folder, spoil)
    model = load(tiny_gpt2, folder)

    for _ in range(2):
        with pytest.raises(NumericalError, match="finite values of the adapter 'default'"):
            logits_of(model)

    assert same_bits(bits_of(tiny_gpt2), bits_of(plain))


@WAYS
def test_finite_float16_values_with_an_infinite_sum_are_no_error(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, load, logits_of, edited_copy
):
    gradiend = make_gradiend(plain, "*.c_fc.weight")
    with torch.no_grad():
        for parameter in gradiend.decoder.parameters():
            parameter.fill_(60000.0)
    gradiend.config.step_size = 1e-6

    model = load(tiny_gpt2, saved(gradiend, tmp_path, dtype=torch.float16))

    expected = edited_copy(plain, gradiend, alpha=1e-6, dtype=torch.float16)
    assert torch.equal(logits_of(model), logits_of(expected))
    assert not torch.equal(logits_of(model), logits_of(plain))


def spoiled_gaps(spoil):
    def change(tensors):
        for key in tensors:
            if "index_gaps" in key:
                tensors[key] = spoil(tensors[key])
        return tensors

    return change


@WAYS
@pytest.mark.parametrize(
    "spoil",
    [
        lambda gaps: torch.full_like(gaps, 254),  # as many indices, most beyond the weight
        lambda gaps: torch.full_like(gaps, 255),  # none
    ],
    ids=["too large", "none"],
)
def test_corrupt_indices(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, load, spoil, bits_of, same_bits, logits_of
):
    folder = saved(make_gradiend(plain, every=7), tmp_path)
    rewrite_tensors(folder, spoiled_gaps(spoil))
    model = load(tiny_gpt2, folder)

    for _ in range(2):
        with pytest.raises(GradiendError, match="ind"):
            logits_of(model)

    assert same_bits(bits_of(tiny_gpt2), bits_of(plain))


@WAYS
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("strength", float("nan"), "finite number as strength"),
        ("strength", "strong", "finite number as strength"),
        ("step_size", None, "finite number as step size"),
        ("feature_factor", [0.1, 0.2], "feature factor of 1 numbers"),
        ("dtype", "int8", "dtype of a GRADIEND adapter"),
        ("dtype", None, "dtype of a GRADIEND adapter"),
        ("parameters", [{"name": "transformer.h.0.ln_1.weight"}], "lacks index_bytes"),
        ("parameters", [], "parameters"),
    ],
)
def test_a_configuration_with_a_field_that_is_not_allowed(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, load, field, value, message, assert_untouched
):
    folder = saved(make_gradiend(plain), tmp_path)
    rewrite_config(folder, lambda content: content.update({field: value}))

    with pytest.raises(ConfigError, match=message):
        load(tiny_gpt2, folder)

    assert_untouched(tiny_gpt2)


@WAYS
def test_a_configuration_of_other_lengths_than_the_file(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, load, bits_of, same_bits, logits_of
):
    folder = saved(make_gradiend(plain, every=7), tmp_path)

    def change(content):
        for entry in content["parameters"]:
            entry["n_selected"] += 1

    rewrite_config(folder, change)

    def use() -> None:
        logits_of(load(tiny_gpt2, folder))

    with pytest.raises(Exception, match=r"size|shape|never came"):
        use()

    assert same_bits(bits_of(tiny_gpt2), bits_of(plain))


def test_a_configuration_without_values(
    tiny_gpt2, plain, make_gradiend, saved, tmp_path, logits_of
):
    config = PeftConfig.from_pretrained(saved(make_gradiend(plain), tmp_path))
    model = get_peft_model(tiny_gpt2, config)

    with pytest.raises(NumericalError, match="never came"):
        logits_of(model)


def test_an_empty_configuration(tiny_gpt2):
    with pytest.raises(GradiendError, match="parameters"):
        get_peft_model(tiny_gpt2, GradiendAdapterConfig())


def test_a_gradiend_without_a_chosen_edit(plain, make_gradiend, tmp_path):
    gradiend = make_gradiend(plain)
    gradiend.config.feature_factor = None
    gradiend.save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match="no chosen edit"):
        gradiend.to_adapter()
    with pytest.raises(ConfigError, match="no chosen edit"):
        GradiendAdapterConfig.from_gradiend(tmp_path)
    assert GradiendAdapterConfig.from_gradiend(tmp_path, 0.5, 0.1).feature_factor == [0.5]


@pytest.mark.parametrize("strength", [float("nan"), "1", True])
def test_an_adapter_of_a_strength_that_is_no_number(plain, make_gradiend, strength):
    with pytest.raises(ConfigError, match="finite number as strength"):
        make_gradiend(plain).to_adapter(strength=strength)


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1])
def test_a_share_to_keep_outside_of_zero_to_one(plain, make_gradiend, share):
    with pytest.raises(GradiendError, match=r"\(0, 1\]"):
        make_gradiend(plain).to_adapter(top_k=share)


def test_an_adapter_in_a_type_that_files_do_not_hold(plain, make_gradiend):
    with pytest.raises(ConfigError, match="dtype"):
        make_gradiend(plain).to_adapter(dtype=torch.float64)


def test_a_decoder_with_nan(plain, make_gradiend, tiny_gpt2, logits_of, bits_of, same_bits):
    gradiend = make_gradiend(plain)
    with torch.no_grad():
        gradiend.decoder.bias.at(gradiend.names[0]).view(-1)[0] = torch.nan

    def use() -> None:
        logits_of(gradiend.to_adapter().apply_to(tiny_gpt2))

    with pytest.raises(NumericalError, match="finite"):
        use()
    assert same_bits(bits_of(tiny_gpt2), bits_of(plain))


def test_a_failed_pass_leaves_the_model_usable_with_another_adapter(
    tiny_gpt2, plain, make_gradiend, edited_copy, saved, tmp_path, logits_of
):
    good = make_gradiend(plain)
    model = with_peft(tiny_gpt2, saved(good, tmp_path / "good"))
    broken = saved(make_gradiend(plain, seed=1), tmp_path / "broken")
    rewrite_tensors(broken, lambda t: {k: torch.full_like(v, torch.nan) for k, v in t.items()})
    model.load_adapter(broken, "broken")
    expected = logits_of(edited_copy(plain, good))
    assert torch.equal(logits_of(model), expected)

    model.set_adapter("broken")
    with pytest.raises(NumericalError):
        logits_of(model)
    with pytest.raises(NumericalError):
        set_strength(model, 0.5, "broken")
    model.set_adapter("default")

    assert torch.equal(logits_of(model), expected)
