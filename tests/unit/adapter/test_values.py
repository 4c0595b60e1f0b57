"""What an adapter adds, by every way of loading one, against weights that were set by hand."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_gradiend import GradiendAdapter, GradiendAdapterConfig

DENSE_AND_SPARSE = pytest.mark.parametrize("every", [None, 7], ids=["dense", "sparse"])
DTYPES = (torch.float32, torch.bfloat16)


def with_peft(base_model, folder):
    return PeftModel.from_pretrained(base_model, folder)


def with_peft_on_meta(base_model, folder):
    return PeftModel.from_pretrained(base_model, folder, low_cpu_mem_usage=True)


def with_transformers(base_model, folder):
    base_model.load_adapter(folder)
    return base_model


WAYS = pytest.mark.parametrize("load", [with_peft, with_peft_on_meta, with_transformers])


@WAYS
@DENSE_AND_SPARSE
@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_those_of_weights_set_by_hand(
    tiny_model, make_gradiend, saved, edited_copy, logits_of, tmp_path,
    load, every, base_dtype, dtype,
):  # fmt: skip
    gradiend = make_gradiend(tiny_model, every=every)
    tiny_model.to(base_dtype)
    expected = logits_of(edited_copy(tiny_model, gradiend, dtype=dtype))
    before = logits_of(tiny_model)

    model = load(tiny_model, saved(gradiend, tmp_path, dtype=dtype))

    assert torch.equal(logits_of(model), expected)
    assert not torch.allclose(expected, before, atol=0.05)  # the control: the edit does something


@WAYS
@pytest.mark.parametrize("adjustable", [True, False])
@DENSE_AND_SPARSE
def test_two_features_are_summed(
    tiny_gpt2, make_gradiend, saved, edited_copy, logits_of, tmp_path, load, adjustable, every
):
    gradiend = make_gradiend(tiny_gpt2, n_features=2, every=every)
    expected = logits_of(edited_copy(tiny_gpt2, gradiend))
    first_alone = logits_of(edited_copy(tiny_gpt2, gradiend, h=(0.3, 0.0)))

    model = load(tiny_gpt2, saved(gradiend, tmp_path, adjustable=adjustable))

    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(expected, first_alone)


@DENSE_AND_SPARSE
def test_a_fixed_feature_factor_is_rounded_with_the_values(
    tiny_llama, make_gradiend, saved, edited_copy, logits_of, tmp_path, every
):
    gradiend = make_gradiend(tiny_llama, every=every)
    options = {"dtype": torch.bfloat16, "adjustable": False}
    expected = logits_of(edited_copy(tiny_llama, gradiend, **options))
    rounded_apart = logits_of(edited_copy(tiny_llama, gradiend, dtype=torch.bfloat16))

    tiny_llama.load_adapter(saved(gradiend, tmp_path, **options))

    assert torch.equal(logits_of(tiny_llama), expected)
    assert not torch.equal(expected, rounded_apart)


def test_top_k_keeps_the_largest_entries_of_dec_h(
    tiny_llama, make_gradiend, saved, logits_of, tmp_path
):
    gradiend = make_gradiend(tiny_llama)
    update = {n: 0.3 * t[0] for n, t in zip(gradiend.names, weights(gradiend), strict=True)}
    update = {n: t + gradiend.decoder.bias.at(n).detach() for n, t in update.items()}
    flat = torch.cat([tensor.flatten() for tensor in update.values()])
    n_kept = round(0.1 * len(flat))
    threshold = flat.abs().sort(descending=True).values[n_kept - 1]
    reference = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for name, tensor in update.items():
            reference.get_parameter(name).add_(
                torch.where(tensor.abs() >= threshold, tensor * 0.21, 0.0)
            )
    dense = logits_of(with_transformers(copy.deepcopy(tiny_llama), saved(gradiend, tmp_path / "d")))

    model = with_peft(tiny_llama, saved(gradiend, tmp_path / "s", top_k=0.1))

    assert torch.equal(logits_of(model), logits_of(reference))
    assert not torch.equal(logits_of(reference), dense)


def weights(gradiend):
    return [gradiend.decoder.weight.at(name).detach() for name in gradiend.names]


@DENSE_AND_SPARSE
@pytest.mark.parametrize("shard_size", ["5GB", "5KB"], ids=["one_file", "shards"])
def test_a_gradiends_own_files_serve_as_an_adapter(
    tiny_gpt2, make_gradiend, edited_copy, logits_of, tmp_path, every, shard_size
):
    gradiend = make_gradiend(tiny_gpt2, every=every)
    gradiend.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")
    expected = logits_of(edited_copy(tiny_gpt2, gradiend))
    before = logits_of(tiny_gpt2)
    with_add_adapter = copy.deepcopy(tiny_gpt2)

    wrapped = get_peft_model(tiny_gpt2, GradiendAdapterConfig.from_gradiend(tmp_path))
    with_add_adapter.add_adapter(GradiendAdapterConfig.from_gradiend(tmp_path))

    assert torch.equal(logits_of(wrapped), expected)
    assert torch.equal(logits_of(with_add_adapter), expected)
    assert not torch.equal(before, expected)


def test_one_configuration_serves_two_models(
    tiny_bert, make_gradiend, edited_copy, logits_of, tmp_path
):
    # Made on the body, so that the names in the models are not those of the GRADIEND.
    gradiend = make_gradiend(tiny_bert.bert)
    gradiend.save_pretrained(tmp_path)
    config = GradiendAdapterConfig.from_gradiend(tmp_path)
    rename = "bert.{}".format
    expected = logits_of(edited_copy(tiny_bert, gradiend, rename=rename))
    first, second = copy.deepcopy(tiny_bert), copy.deepcopy(tiny_bert)

    first.add_adapter(config)
    second.add_adapter(config)

    assert torch.equal(logits_of(first), expected)
    assert torch.equal(logits_of(second), expected)


def test_an_adapter_in_memory_is_applied_like_its_file(
    tiny_bert, make_gradiend, edited_copy, logits_of
):
    gradiend = make_gradiend(tiny_bert)
    expected = logits_of(edited_copy(tiny_bert, gradiend, strength=-0.5))
    before = logits_of(tiny_bert)

    model = gradiend.to_adapter(strength=-0.5).apply_to(tiny_bert)

    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(before, expected)


@DENSE_AND_SPARSE
@pytest.mark.parametrize("adjustable", [True, False])
def test_the_update_of_an_adapter_is_what_it_adds(
    tiny_gpt2, make_gradiend, edited_copy, saved, tmp_path, every, adjustable
):
    gradiend = make_gradiend(tiny_gpt2, every=every)
    with torch.no_grad():
        for parameter in tiny_gpt2.parameters():
            parameter.zero_()
    expected = edited_copy(tiny_gpt2, gradiend, strength=2.0)

    folder = saved(gradiend, tmp_path, strength=2.0, adjustable=adjustable)
    adapter = GradiendAdapter.from_pretrained(folder)

    for name in gradiend.names:
        assert torch.equal(adapter.update(name), expected.get_parameter(name))
        assert adapter.update(name).any()


def test_a_model_on_a_device_map_is_steered(
    tiny_llama, make_gradiend, saved, edited_copy, logits_of, tmp_path
):
    from transformers import LlamaForCausalLM  # noqa: PLC0415 - this test alone

    gradiend = make_gradiend(tiny_llama)
    tiny_llama.save_pretrained(tmp_path / "base")
    expected = logits_of(edited_copy(tiny_llama, gradiend))
    folder = saved(gradiend, tmp_path / "adapter")

    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
    assert torch.equal(logits_of(base), logits_of(tiny_llama))

    assert torch.equal(logits_of(PeftModel.from_pretrained(base, folder)), expected)
    assert not torch.equal(logits_of(tiny_llama), expected)
