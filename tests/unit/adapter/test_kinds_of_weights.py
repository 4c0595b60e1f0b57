"""Weights in all kinds of modules, also those that are read without calling their module."""

import copy

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import Tensor

IDS = torch.tensor([[7, 11, 13, 8, 9, 12]])
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
MOE = {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": False}
MAMBA = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
T5 = {
    "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
MAMBA2 = {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}


def build(kind: str) -> hf.PreTrainedModel:
    classes = {
        "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**MOE, num_local_experts=2)),
        "qwen3_moe": (
            hf.Qwen3MoeForCausalLM,
            hf.Qwen3MoeConfig(
                **MOE, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, head_dim=8
            ),
        ),
        "mamba": (hf.MambaForCausalLM, hf.MambaConfig(**MAMBA)),
        "mamba2": (hf.Mamba2ForCausalLM, hf.Mamba2Config(**MAMBA2)),
        "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5)),
    }
    model_class, config = classes[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # at transformers' own initialisation some weights have hardly an effect
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def with_peft(base_model, folder):
    return PeftModel.from_pretrained(base_model, folder)


def with_transformers(base_model, folder):
    base_model.load_adapter(folder)
    return base_model


WAYS = pytest.mark.parametrize("load", [with_peft, with_transformers])


@pytest.fixture
def assert_steered(make_gradiend, edited_copy, saved, logits_of, bits_of, same_bits, tmp_path):
    """Function of a base model, patterns and inputs: the logits are those of the reference."""

    def assert_steered(base_model, patterns, load, inputs=None, **settings) -> None:
        inputs = inputs or {"input_ids": IDS}
        plain = copy.deepcopy(base_model)
        gradiend = make_gradiend(plain, patterns, **settings)
        expected = logits_of(edited_copy(plain, gradiend), **inputs)
        model = load(base_model, saved(gradiend, tmp_path / "adapter"))

        assert torch.equal(logits_of(model, **inputs), expected)
        assert not torch.allclose(expected, logits_of(plain, **inputs), atol=1e-4)
        for layer in (m for m in model.modules() if hasattr(m, "gradiend_decoder_bias")):
            layer.enable_adapters(enabled=False)
        assert torch.equal(logits_of(model, **inputs), logits_of(plain, **inputs))
        assert same_bits(bits_of(base_model), bits_of(plain))

    return assert_steered


@WAYS
@pytest.mark.parametrize(
    ("kind", "patterns"),
    [
        ("mixtral", "*.experts.*"),
        ("qwen3_moe", "*.experts.*"),
        ("mixtral", "*"),
        ("mamba", "*.A_log"),
        ("mamba", "*.D"),
        ("mamba", "*.conv1d.*"),
        ("mamba", "*"),
        ("mamba2", "*.A_log"),
        ("mamba2", "*.dt_bias"),
        ("mamba2", "*.conv1d.*"),
        ("mamba2", "*"),
    ],
)
def test_experts_and_state_space_weights(kind, patterns, load, assert_steered):
    assert_steered(build(kind), patterns, load)


@WAYS
def test_sparse_experts(load, assert_steered):
    base_model = build("mixtral")
    assert any(p.ndim == 3 for n, p in base_model.named_parameters() if ".experts." in n)
    assert_steered(base_model, "*.experts.*", load, every=7)


@WAYS
@pytest.mark.parametrize(
    "patterns", ["*layer_norm.weight", "*.SelfAttention.*", "shared.weight", "*"]
)
def test_encoder_and_decoder(patterns, load, assert_steered):
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    assert_steered(build("t5"), patterns, load, inputs)


@WAYS
@pytest.mark.parametrize(
    ("family", "patterns"),
    [
        ("bert", "*LayerNorm*"),
        ("bert", "*.bias"),
        ("bert", "*embeddings*"),
        ("gpt2", "*.c_attn.*"),
        ("gpt2", "*.ln_*"),
        ("gpt2", "*.wpe.*"),
        ("llama", "*norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "*.embed_tokens.*"),
    ],
)
@pytest.mark.parametrize("every", [None, 3], ids=["dense", "sparse"])
def test_norms_biases_embeddings_and_conv1d(
    session_models, family, patterns, load, every, assert_steered
):
    assert_steered(copy.deepcopy(session_models[family]), patterns, load, every=every)


def embeddings_of(model: hf.PreTrainedModel) -> Tensor:
    # From an untouched copy: the table of the model itself must not be read by a call.
    return copy.deepcopy(model).get_input_embeddings()(IDS).detach()


@WAYS
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("bert", ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")),
        ("gpt2", ("transformer.wte.weight", "lm_head.weight")),
    ],
)
@pytest.mark.parametrize("which", [0, 1], ids=["embeddings", "head"])
@pytest.mark.parametrize("with_embeddings", [False, True])
def test_tied_weights_are_steered_in_both_places_by_either_name(
    session_models, family, names, which, load, with_embeddings,
    make_gradiend, saved, edited_copy, logits_of, tmp_path,
):  # fmt: skip
    base = copy.deepcopy(session_models[family])
    plain = copy.deepcopy(base)
    assert base.get_parameter(names[0]) is base.get_parameter(names[1])
    gradiend = make_gradiend(plain, names[0])
    expected_model = edited_copy(plain, gradiend)
    folder = saved(gradiend, tmp_path / "adapter")
    if which == 1:
        rename_in(folder, names[0], names[1])
    inputs = {"inputs_embeds": embeddings_of(plain)} if with_embeddings else {"input_ids": IDS}

    model = load(base, folder)

    expected = logits_of(expected_model, **inputs)
    assert torch.equal(logits_of(model, **inputs), expected)
    assert not torch.allclose(expected, logits_of(plain, **inputs), atol=0.01)
    assert base.get_parameter(names[0]) is base.get_parameter(names[1])


@pytest.mark.parametrize("objective", ["causal", None])
def test_a_tied_head_is_steered_in_a_peft_model_that_reads_embeddings(
    tiny_gpt2, make_gradiend, saved, edited_copy, logits_of, tmp_path, objective
):
    # peft 0.18 calls the `forward` of the model, and so none of its hooks.
    gradiend = make_gradiend(tiny_gpt2, "transformer.wte.weight", objective=objective)
    inputs = {"inputs_embeds": embeddings_of(tiny_gpt2)}
    before = logits_of(tiny_gpt2, **inputs)
    expected = logits_of(edited_copy(tiny_gpt2, gradiend), **inputs)

    model = with_peft(tiny_gpt2, saved(gradiend, tmp_path))

    assert torch.equal(logits_of(model, **inputs), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("objective", ["causal", None])
def test_a_convolution_that_is_not_called_is_steered_in_a_peft_model(
    make_gradiend, saved, edited_copy, logits_of, tmp_path, objective
):
    base = build("mamba")
    gradiend = make_gradiend(base, "*.conv1d.*", objective=objective)
    before = logits_of(base)
    expected = logits_of(edited_copy(base, gradiend))

    model = with_peft(base, saved(gradiend, tmp_path))

    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(before, expected)


def rename_in(folder, old: str, new: str) -> None:
    """Write a file as it comes of a GRADIEND that named the weight by its other name."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - here alone

    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(old, new))
    file = folder / "adapter_model.safetensors"
    module, new_module = (name.removesuffix(".weight") for name in (old, new))
    tensors = {key.replace(module, new_module): t for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@WAYS
@pytest.mark.parametrize("switch", ["first pass", "on again"])
def test_a_body_called_by_itself_is_steered(
    load, switch, make_gradiend, saved, edited_copy, tmp_path
):
    # Mamba's convolution reads the weights of a module that it does not call.
    base = build("mamba")
    gradiend = make_gradiend(base, "*.conv1d.*")
    with torch.no_grad():
        before = base.backbone(IDS).last_hidden_state
        expected = edited_copy(base, gradiend).backbone(IDS).last_hidden_state
        load(base, saved(gradiend, tmp_path))
        if switch == "on again":
            base(IDS)
            for enabled in (False, True):
                for layer in (m for m in base.modules() if hasattr(m, "gradiend_decoder_bias")):
                    layer.enable_adapters(enabled=enabled)
                if not enabled:
                    base(IDS)

        ours = base.backbone(IDS).last_hidden_state

    assert torch.equal(ours, expected)
    assert not torch.equal(before, expected)


def test_a_tied_head_called_by_itself_is_steered(
    tiny_gpt2, make_gradiend, saved, edited_copy, tmp_path
):
    gradiend = make_gradiend(tiny_gpt2, "transformer.wte.weight")
    hidden = torch.ones(1, 1, 16)
    before = tiny_gpt2.lm_head(hidden)
    expected = edited_copy(tiny_gpt2, gradiend).lm_head(hidden)

    tiny_gpt2.load_adapter(saved(gradiend, tmp_path))

    assert torch.equal(tiny_gpt2.lm_head(hidden), expected)
    assert not torch.equal(before, expected)


def test_generation_with_state_space_caches(make_gradiend, saved, edited_copy, tmp_path):
    base = build("mamba")
    gradiend = make_gradiend(base, "*.conv1d.*")
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    before = base.generate(IDS, **options)
    expected = edited_copy(base, gradiend).generate(IDS, **options)

    model = with_peft(base, saved(gradiend, tmp_path))

    assert torch.equal(model.generate(input_ids=IDS, **options), expected)
    assert not torch.equal(before, expected)
