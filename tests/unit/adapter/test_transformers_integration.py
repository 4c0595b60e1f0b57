"""What people do with a transformers model, without a `PeftModel` around it."""

import copy

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

from hf_gradiend import GradiendAdapterConfig, set_strength
from hf_gradiend.errors import GradiendError


@pytest.fixture
def plain(tiny_gpt2):
    """Not touched by an adapter."""
    return copy.deepcopy(tiny_gpt2)


@pytest.fixture
def gradiend(plain, make_gradiend):
    return make_gradiend(plain, "*")


@pytest.fixture
def other(plain, make_gradiend):
    return make_gradiend(plain, seed=1, every=3)


@pytest.fixture
def model(tiny_gpt2, gradiend, saved, tmp_path):
    tiny_gpt2.load_adapter(saved(gradiend, tmp_path / "first"))
    return tiny_gpt2


@pytest.fixture
def edited(plain, gradiend, edited_copy):
    return edited_copy(plain, gradiend)


def test_load_adapter_reports_that_all_keys_were_found(
    tiny_gpt2, gradiend, saved, tmp_path, plain, edited, logits_of
):
    info = tiny_gpt2.load_adapter(saved(gradiend, tmp_path))

    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys
    assert torch.equal(logits_of(tiny_gpt2), logits_of(edited))
    assert not torch.equal(logits_of(plain), logits_of(edited))


def test_adapters_are_switched_off_and_on(model, plain, edited, logits_of, bits_of, same_bits):
    for _ in range(2):
        assert torch.equal(logits_of(model), logits_of(edited))
        model.disable_adapters()
        assert torch.equal(logits_of(model), logits_of(plain))
        assert same_bits(bits_of(model), bits_of(plain))
        model.enable_adapters()
    assert not torch.equal(logits_of(plain), logits_of(edited))


def test_weights_are_the_old_ones_as_soon_as_adapters_are_switched_off(
    model, plain, logits_of, bits_of, same_bits
):
    logits_of(model)

    model.disable_adapters()

    assert same_bits(bits_of(model), bits_of(plain))


def test_two_adapters_one_or_both(
    model, plain, gradiend, other, edited_copy, logits_of, saved, tmp_path
):
    model.load_adapter(saved(other, tmp_path / "second"), adapter_name="other")
    second = logits_of(edited_copy(plain, other))
    both = logits_of(edited_copy(plain, gradiend, other))

    model.set_adapter("other")
    assert torch.equal(logits_of(model), second)
    model.set_adapter(["default", "other"])
    assert torch.equal(logits_of(model), both)
    assert model.active_adapters() == ["default", "other"]
    model.set_adapter("default")
    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, gradiend)))
    assert not torch.equal(second, both)


def test_a_deleted_adapter_leaves_the_other_one(
    model, plain, other, edited_copy, logits_of, saved, tmp_path
):
    model.load_adapter(saved(other, tmp_path / "second"), adapter_name="other")
    model.set_adapter(["default", "other"])
    logits_of(model)

    model.delete_adapter("default")

    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, other)))


def test_deleting_the_only_adapter_gives_the_base_model_back(
    model, plain, logits_of, bits_of, same_bits
):
    logits_of(model)

    model.delete_adapter("default")

    assert same_bits(bits_of(model), bits_of(plain))
    assert torch.equal(logits_of(model), logits_of(plain))


def test_an_adapter_can_come_again_after_it_was_deleted(
    model, other, saved, tmp_path, plain, edited_copy, logits_of
):
    logits_of(model)
    model.delete_adapter("default")

    model.load_adapter(saved(other, tmp_path / "second"))

    assert torch.equal(logits_of(model), logits_of(edited_copy(plain, other)))


def test_a_saved_transformers_model_is_its_adapter_as_it_stands(
    model, plain, gradiend, edited_copy, logits_of, tmp_path
):
    set_strength(model, 0.5)
    logits_of(model)

    model.save_pretrained(tmp_path / "again")

    assert not (tmp_path / "again" / "model.safetensors").exists()
    expected = logits_of(edited_copy(plain, gradiend, strength=0.5))
    wrapped = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "again")
    assert torch.equal(logits_of(wrapped), expected)
    plain.load_adapter(tmp_path / "again")
    assert torch.equal(logits_of(plain), expected)


@pytest.mark.parametrize("every", [None, 5], ids=["dense", "sparse"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"adjustable": False}], ids=str)
def test_a_saved_peft_model_is_its_adapter_as_it_stands(
    tiny_bert, make_gradiend, edited_copy, logits_of, saved, tmp_path, every, options
):
    plain = copy.deepcopy(tiny_bert)
    gradiend = make_gradiend(tiny_bert, every=every)
    model = PeftModel.from_pretrained(tiny_bert, saved(gradiend, tmp_path / "first", **options))
    model.set_strength(-1.5)
    logits_of(model)

    model.save_pretrained(tmp_path / "again")

    expected = logits_of(edited_copy(plain, gradiend, strength=-1.5, **options))
    again = PeftModel.from_pretrained(plain, tmp_path / "again")
    assert torch.equal(logits_of(again), expected)
    assert again.get_strength() == -1.5
    first, second = ((tmp_path / n / "adapter_model.safetensors") for n in ("first", "again"))
    assert first.stat().st_size == pytest.approx(second.stat().st_size, abs=64)


def test_one_of_two_adapters_is_saved(
    tiny_gpt2, gradiend, other, plain, edited_copy, saved, tmp_path, logits_of
):
    model = PeftModel.from_pretrained(tiny_gpt2, saved(gradiend, tmp_path / "first"))
    model.load_adapter(saved(other, tmp_path / "second"), "other")
    expected = logits_of(edited_copy(plain, other))

    model.save_pretrained(tmp_path / "both", selected_adapters=["other"])

    again = PeftModel.from_pretrained(plain, tmp_path / "both" / "other")
    assert torch.equal(logits_of(again), expected)
    assert not torch.equal(logits_of(model), expected)


def test_another_file_under_a_name_in_use_is_refused(
    tiny_gpt2, gradiend, plain, edited_copy, saved, tmp_path, logits_of
):
    # peft would load its values and keep the numbers of the first file.
    model = PeftModel.from_pretrained(tiny_gpt2, saved(gradiend, tmp_path / "first"))
    expected = logits_of(edited_copy(plain, gradiend))
    gradiend.config.step_size = 0.4
    folder = saved(gradiend, tmp_path / "second", strength=0.5)

    with pytest.raises(GradiendError, match="'default'"):
        model.load_adapter(folder, "default")

    assert torch.equal(logits_of(model), expected)


# ---- classes that find the base model by the adapter's own configuration -------------------------


@pytest.fixture
def causal_folder(tiny_gpt2, make_gradiend, saved, causal_tokenizer, tmp_path):
    base = tmp_path / "base"
    tiny_gpt2.save_pretrained(base)
    causal_tokenizer.save_pretrained(base)
    gradiend = make_gradiend(
        tiny_gpt2, "*", base_model_name_or_path=str(base), objective="causal",
        base_model_class="GPT2LMHeadModel",
    )  # fmt: skip
    return saved(gradiend, tmp_path / "adapter")


@pytest.fixture
def masked_folder(tiny_bert, make_gradiend, saved, masked_tokenizer, tmp_path):
    base = tmp_path / "base"
    tiny_bert.save_pretrained(base)
    masked_tokenizer.save_pretrained(base)
    gradiend = make_gradiend(
        tiny_bert, "*", base_model_name_or_path=str(base), objective="masked",
        base_model_class="BertForMaskedLM",
    )  # fmt: skip
    return saved(gradiend, tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_model_for_causal_lm_loads_an_adapter_folder(
    causal_folder, tiny_gpt2, gradiend, edited_copy, logits_of, dtype
):
    model = AutoModelForCausalLM.from_pretrained(causal_folder, dtype=dtype)

    expected = logits_of(edited_copy(tiny_gpt2.to(dtype), gradiend))
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(tiny_gpt2), expected)


def test_auto_model_for_masked_lm_loads_an_adapter_folder(
    masked_folder, tiny_bert, make_gradiend, edited_copy, logits_of
):
    model = AutoModelForMaskedLM.from_pretrained(masked_folder)

    expected = logits_of(edited_copy(tiny_bert, make_gradiend(tiny_bert, "*")))
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(tiny_bert), expected)


def test_a_pipeline_loads_an_adapter_folder(
    masked_folder, tiny_bert, make_gradiend, edited_copy, masked_tokenizer
):
    text = "the nurse said that [MASK] was late ."
    edited = edited_copy(tiny_bert, make_gradiend(tiny_bert, "*"))
    kind = {"task": "fill-mask", "tokenizer": masked_tokenizer}

    ours = pipeline(model=str(masked_folder), **kind)(text)

    assert ours == pipeline(model=edited, **kind)(text)
    assert ours != pipeline(model=tiny_bert, **kind)(text)


def test_peft_finds_the_base_model_of_a_causal_adapter(
    causal_folder, tiny_gpt2, gradiend, edited_copy, logits_of
):
    expected = logits_of(edited_copy(tiny_gpt2, gradiend))

    model = AutoPeftModelForCausalLM.from_pretrained(causal_folder)

    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(tiny_gpt2), expected)


def test_peft_finds_the_class_of_the_base_model(
    masked_folder, tiny_bert, make_gradiend, edited_copy, logits_of
):
    expected = logits_of(edited_copy(tiny_bert, make_gradiend(tiny_bert, "*")))

    model = AutoPeftModel.from_pretrained(masked_folder)

    assert type(model.get_base_model()).__name__ == "BertForMaskedLM"
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(tiny_bert), expected)


def test_a_complete_model_loads_the_adapter_that_lies_in_its_folder(
    tiny_gpt2, gradiend, saved, edited_copy, logits_of, tmp_path
):
    tiny_gpt2.save_pretrained(tmp_path)
    saved(gradiend, tmp_path)

    model = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert torch.equal(logits_of(model), logits_of(edited_copy(tiny_gpt2, gradiend)))
    assert not torch.equal(logits_of(tiny_gpt2), logits_of(model))


# ---- body and head -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["peft", "transformers"])
@pytest.mark.parametrize("every", [None, 7], ids=["dense", "sparse"])
def test_an_adapter_of_a_body_fits_the_body_under_a_head(
    tiny_bert, make_gradiend, edited_copy, saved, logits_of, tmp_path, way, every
):
    gradiend = make_gradiend(tiny_bert.bert, every=every)
    expected = logits_of(edited_copy(tiny_bert, gradiend, rename="bert.{}".format))
    plain = copy.deepcopy(tiny_bert)

    model = loaded(way, tiny_bert, saved(gradiend, tmp_path / "first"))
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(plain), expected)

    model.save_pretrained(tmp_path / "again")  # under the names of the model with the head
    assert torch.equal(logits_of(loaded(way, plain, tmp_path / "again")), expected)


@pytest.mark.parametrize("way", ["peft", "transformers"])
@pytest.mark.parametrize("every", [None, 7], ids=["dense", "sparse"])
def test_an_adapter_of_a_model_with_a_head_fits_the_body_alone(
    tiny_bert, make_gradiend, edited_copy, saved, tmp_path, way, every
):
    gradiend = make_gradiend(tiny_bert, every=every)
    body = copy.deepcopy(tiny_bert.bert)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = edited_copy(tiny_bert, gradiend).bert(ids).last_hidden_state
        before = body(ids).last_hidden_state

    model = loaded(way, body, saved(gradiend, tmp_path / "first"))
    with torch.no_grad():
        ours = model(ids).last_hidden_state
    assert torch.equal(ours, expected)
    assert not torch.equal(before, expected)

    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = loaded(way, copy.deepcopy(tiny_bert.bert), tmp_path / "again")(ids)
    assert torch.equal(again.last_hidden_state, expected)


def loaded(way, base_model, folder):
    if way == "peft":
        return PeftModel.from_pretrained(base_model, folder)
    base_model.load_adapter(folder)
    return base_model


def test_a_configuration_is_read_by_peft(causal_folder, tiny_gpt2, tmp_path):
    config = PeftConfig.from_pretrained(causal_folder)

    assert isinstance(config, GradiendAdapterConfig)
    assert config.base_model_name_or_path == str(tmp_path / "base")
    assert config.task_type == "CAUSAL_LM"
    assert config.feature_factor == [0.3]
    assert config.step_size == 0.21
    assert config.strength == 1.0
    assert [e["name"] for e in config.parameters] == [n for n, _ in tiny_gpt2.named_parameters()]
