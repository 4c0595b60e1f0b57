"""Loading base models, and refusing those whose numbers would be wrong (traps 8, 10 and 12)."""

import json
import os
from pathlib import Path

import accelerate
import huggingface_hub.constants
import numpy as np
import peft
import pytest
import torch
import transformers as hf

from hf_gradiend.base_models import (
    _dequantized,
    check_base_model,
    check_tokenizer,
    evaluation_mode,
    load_base_model,
    objective_of,
    without_cache,
)
from hf_gradiend.errors import BaseModelError, CompatibilityError
from hf_gradiend.gradients.backward import gradients
from hf_gradiend.parameters import select_parameters


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """What HF_HUB_OFFLINE=1 sets when the process starts: who asks the Hub, fails at once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def saved(make_lm, tmp_path):
    """Function of a family that saves its model (or its body) and tokenizer in a folder."""

    def save(family, *, body=False, tokenizer=None) -> Path:
        lm = make_lm(family)
        (lm.model.base_model if body else lm.model).save_pretrained(tmp_path)
        (tokenizer or lm.tokenizer).save_pretrained(tmp_path)
        return tmp_path

    return save


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- loading ----


def test_a_saved_model_comes_back_with_its_head_its_weights_and_its_tokenizer(
    make_lm, saved, family
):
    lm = make_lm(family)

    model, tokenizer = load_base_model(saved(family))

    assert type(model) is type(lm.model)
    assert objective_of(model) == lm.objective
    own = dict(model.named_parameters())
    assert own.keys() == dict(lm.model.named_parameters()).keys()
    assert all(torch.equal(own[name], p) for name, p in lm.model.named_parameters())
    assert not model.training
    text = "Anna said that they were late."
    assert tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", hf.BertForMaskedLM),
        ("distilbert", hf.DistilBertForMaskedLM),
        ("roberta", hf.RobertaForMaskedLM),
        ("gpt2", hf.GPT2LMHeadModel),
        ("llama", hf.LlamaForCausalLM),
        ("qwen3", hf.Qwen3ForCausalLM),
    ],
)
def test_a_model_saved_without_its_head_gets_the_head_of_its_kind(make_lm, saved, family, head):
    folder = saved(family, body=True)
    assert json.loads((folder / "config.json").read_text())["architectures"] != [head.__name__]

    model, _ = load_base_model(folder)

    assert type(model) is head
    inside = dict(make_lm(family).model.base_model.named_parameters())
    assert all(torch.equal(p, inside[n]) for n, p in model.base_model.named_parameters())


def test_an_objective_that_is_asked_for_wins(saved):
    model, _ = load_base_model(saved("bert"), objective="causal")

    assert type(model) is hf.BertLMHeadModel
    assert type(load_base_model(saved("bert"))[0]) is hf.BertForMaskedLM  # the control


def test_an_objective_that_a_model_has_no_head_for_is_an_error(saved):
    with pytest.raises(BaseModelError, match="AutoModelForMaskedLM") as caught:
        load_base_model(saved("gpt2"), objective="masked")

    one_line(caught)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, torch.float32),
        ("auto", torch.float16),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_weights_are_float32_unless_another_type_is_asked_for(make_lm, tmp_path, asked, found):
    lm = make_lm("gpt2")
    lm.model.half().save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)

    model, _ = load_base_model(tmp_path, **({} if asked is None else {"dtype": asked}))

    assert {p.dtype for p in model.parameters()} == {found}


def test_a_model_goes_to_the_device_that_is_asked_for(saved):
    model, _ = load_base_model(saved("gpt2"), device=torch.device("cpu"))

    assert model.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("special", "padding"),
    [({"eos_token": "he"}, "he"), ({"unk_token": "[UNK]"}, "[UNK]"), ({"pad_token": "it"}, "it")],
)
def test_a_missing_padding_token_is_filled_in(make_lm, saved, special, padding):
    bare = hf.PreTrainedTokenizerFast(
        tokenizer_object=make_lm("bert").tokenizer.backend_tokenizer,
        **{"unk_token": None, "eos_token": None, "pad_token": None, **special},
    )
    assert (bare.pad_token is None) == ("pad_token" not in special)

    _, tokenizer = load_base_model(saved("gpt2", tokenizer=bare))

    assert tokenizer.pad_token == padding
    assert tokenizer.pad_token_id == bare.convert_tokens_to_ids(padding)


# ---- what cannot be loaded ----


@pytest.mark.parametrize("name", ["no-such-model-anywhere", "nobody/no-such-model"])
def test_an_unknown_name_is_an_error_of_one_line(name):
    with pytest.raises(BaseModelError, match=rf"but '{name}' could not be loaded: .*") as caught:
        load_base_model(name)

    assert one_line(caught).endswith("There is no such folder here either.")


def test_a_missing_folder_is_an_error_of_one_line(tmp_path):
    with pytest.raises(BaseModelError, match="could not be loaded") as caught:
        load_base_model(tmp_path / "missing")

    assert str(tmp_path / "missing") in one_line(caught)


def test_an_empty_folder_is_an_error_of_one_line(tmp_path):
    with pytest.raises(BaseModelError, match="model_type") as caught:
        load_base_model(tmp_path)

    assert "no such folder" not in one_line(caught)


@pytest.mark.parametrize(
    "config",
    ["{broken", '{"model_type": "nothing-of-the-kind"}', '{"model_type": "vit"}'],
)
def test_a_configuration_without_a_language_model_is_an_error_of_one_line(saved, config):
    folder = saved("gpt2")
    (folder / "config.json").write_text(config)

    with pytest.raises(BaseModelError, match="masked or causal language model") as caught:
        load_base_model(folder)

    one_line(caught)


def test_an_interrupted_download_is_an_error_of_one_line(saved):
    folder = saved("gpt2")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])

    with pytest.raises(BaseModelError, match="could not be loaded") as caught:
        load_base_model(folder)

    one_line(caught)


@pytest.mark.parametrize("family", ["bert", "gpt2", "roberta", "gpt_neox"])
def test_a_folder_without_a_tokenizer_is_an_error(make_lm, tmp_path, family):
    # transformers 5 makes up an empty one; every word would be unknown.
    make_lm(family).model.save_pretrained(tmp_path)

    with pytest.raises(BaseModelError, match=r"a tokenizer with a vocabulary.*save_pretrained"):
        load_base_model(tmp_path)


def test_a_slow_tokenizer_is_refused(saved):
    slow = hf.ByT5Tokenizer()  # bytes in plain Python; transformers has no fast one

    with pytest.raises(BaseModelError, match=r"Expected a fast tokenizer.*got ByT5Tokenizer"):
        load_base_model(saved("gpt2", tokenizer=slow))


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "bert", "llama"])
def test_a_fast_tokenizer_is_accepted(make_tokenizer, kind):
    check_tokenizer(make_tokenizer(kind))


def test_weights_that_are_not_numbers_are_refused_when_they_are_loaded(make_lm, tmp_path):
    lm = make_lm("llama")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)

    with pytest.raises(BaseModelError, match=r"'model.layers.1.mlp.up_proj.weight' of LlamaForC"):
        load_base_model(tmp_path)


# ---- GGUF (trap 10) ----


def test_a_gguf_file_is_dequantised_and_nothing_else_is():
    assert _dequantized(None) == {}
    assert _dequantized("model.gguf")["quantization_config"].dequantize is True


def write_gguf(path, tokenizer) -> dict[str, np.ndarray]:
    """A Llama of two layers in 8 bits, as llama.cpp writes it; returns its weights by name."""
    import gguf  # noqa: PLC0415 - a second to import

    words = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(words) - 1))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    shapes = {"token_embd.weight": (len(words), 32), "output_norm.weight": (32,)}
    for layer in range(2):
        for name, shape in {
            **{f"attn_{part}": (32, 32) for part in ("q", "k", "v", "output")},
            "attn_norm": (32,),
            "ffn_norm": (32,),
            "ffn_gate": (64, 32),
            "ffn_up": (64, 32),
            "ffn_down": (32, 64),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    random = np.random.default_rng(0)
    weights = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    for name, weight in weights.items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_model_of_a_gguf_file_can_be_used_and_saved(make_tokenizer, tmp_path):
    weights = write_gguf(tmp_path / "tiny.gguf", make_tokenizer("gpt2"))

    model, tokenizer = load_base_model(tmp_path, gguf_file="tiny.gguf")
    model.save_pretrained(tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")

    assert (type(model), model.dtype) == (hf.LlamaForCausalLM, torch.float32)
    assert tokenizer.tokenize("Anna said that she") == ["Anna", "Ġsaid", "Ġthat", "Ġshe"]
    down = model.model.layers[1].mlp.down_proj.weight
    # 8 bits for a block of 32: steps of max/127, rounded by half of one.
    assert np.abs(down.detach().numpy() - weights["blk.1.ffn_down.weight"]).max() < 4 / 127
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_without_dequantising_such_a_model_could_not_be_saved(make_tokenizer, tmp_path):
    # The control of the test above; when it fails, GgufConfig is no longer needed.
    write_gguf(tmp_path / "tiny.gguf", make_tokenizer("gpt2"))
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")

    with pytest.raises(ValueError, match=r"[Gg][Gg][Uu][Ff]|quant"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.skipif(
    "HF_GRADIEND_TEST_GGUF" not in os.environ,
    reason="HF_GRADIEND_TEST_GGUF names no GGUF file of a real model",
)
def test_a_real_gguf_file_can_be_saved_again(tmp_path):
    file = Path(os.environ["HF_GRADIEND_TEST_GGUF"])

    model, tokenizer = load_base_model(file.parent, gguf_file=file.name)
    model.save_pretrained(tmp_path)

    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    # Trap 1 on a real model: " he" is likely here, and four nats less so one token further on.
    ids = tokenizer("The boy said that he", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probabilities = model(ids).logits[0].log_softmax(-1)
    assert log_probabilities[-2, ids[0, -1]] > log_probabilities[-1, ids[0, -1]] + 4


# ---- what is refused (trap 12) ----


def test_a_plain_model_of_any_family_is_accepted(make_lm, family):
    check_base_model(make_lm(family).model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accepted_also_where_a_sum_of_weights_overflows(make_lm, dtype):
    lm = make_lm("gpt2")
    with torch.no_grad():
        lm.model.transformer.wte.weight.fill_(60000.0)

    check_base_model(lm.model.to(dtype))


def lora(target):
    return peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)


# peft 0.21 asks transformers 5.23 under a name that transformers 6 will drop.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "target"), [("bert", "query"), ("llama", "q_proj")])
def test_a_model_with_a_lora_adapter_is_refused_until_it_is_merged(make_lm, family, target):
    wrapped = peft.get_peft_model(make_lm(family).model, lora(target))

    with pytest.raises(BaseModelError, match=rf"PEFT adapter at .*{target}.*merge_and_unload"):
        check_base_model(wrapped)
    with pytest.raises(BaseModelError, match="carries a PEFT adapter"):
        check_base_model(wrapped.get_base_model())

    check_base_model(wrapped.merge_and_unload())  # the control


def test_an_adapter_added_by_transformers_itself_is_refused_too(make_lm):
    lm = make_lm("llama")
    lm.model.add_adapter(lora("q_proj"))

    with pytest.raises(BaseModelError, match="LlamaForCausalLM carries a PEFT adapter"):
        check_base_model(lm.model)


def test_a_selection_of_the_plain_model_does_not_fit_one_with_an_adapter(make_lm, batch_of):
    # Never wrong numbers: also where nobody has called check_base_model.
    lm = make_lm("llama")
    selection = select_parameters(lm.model)
    lm.model.add_adapter(lora("q_proj"))
    batch = batch_of(lm, [("Anna said [TARGET]", "she", "he")])

    with pytest.raises(CompatibilityError, match=r"q_proj.weight is missing"):
        gradients(lm.model, batch, selection)


def test_offloaded_weights_are_refused(make_lm):
    model = make_lm("gpt2").model
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    with pytest.raises(
        BaseModelError, match=r"of GPT2LMHeadModel is offloaded.*without device_map"
    ):
        check_base_model(model)


def test_a_quantised_model_is_refused(make_lm):
    model = make_lm("gpt2").model
    model.is_quantized = True  # as transformers' quantisers mark it; they need a GPU

    with pytest.raises(BaseModelError, match=r"GPT2LMHeadModel is quantised.*quantization_config"):
        check_base_model(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_numbers_are_refused(make_lm, value):
    model = make_lm("bert").model
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.bias[5] = value

    with pytest.raises(
        BaseModelError, match=r"'bert.encoder.layer.1.output.LayerNorm.bias'.*broken"
    ):
        check_base_model(model)


def test_infinities_that_cancel_are_refused(make_lm):
    model = make_lm("bert").model
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.bias[:2] = torch.tensor(
            [torch.inf, -torch.inf]
        )

    with pytest.raises(BaseModelError, match="NaN or infinity"):
        check_base_model(model)


# ---- which head, which mode ----


def test_the_objective_of_a_model_is_that_of_its_head(make_lm, family):
    lm = make_lm(family)

    assert objective_of(lm.model) == lm.objective


def test_a_decoder_of_a_masked_family_is_causal(make_lm):
    config = make_lm("bert").model.config

    assert (
        objective_of(hf.BertLMHeadModel(hf.BertConfig(**{**config.to_dict(), "is_decoder": True})))
        == "causal"
    )


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_model_without_a_head_has_no_objective(make_lm, family):
    body = make_lm(family).model.base_model

    with pytest.raises(BaseModelError, match=rf"with its head, but got {type(body).__name__}"):
        objective_of(body)


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("error", [False, True])
def test_evaluation_mode_puts_every_module_s_mode_back(make_lm, error):
    model = make_lm("bert").model.train()
    model.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    assert set(before) == {True, False}

    try:
        with evaluation_mode(model):
            inside = {module.training for module in model.modules()}
            if error:
                raise InterruptionError
    except InterruptionError:
        pass

    assert inside == {False}
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_keys_and_values_are_kept_where_none_are_wanted(make_lm, family):
    lm = make_lm(family)
    ids = torch.tensor([[5, 6, 7]])

    with without_cache(lm.model):
        inside = lm.model(input_ids=ids).past_key_values
    after = lm.model(input_ids=ids).past_key_values

    assert inside is None
    assert after is not None  # the control, and the configuration is as it was
