"""Tiny models and tokenizers, built in memory: two layers, hidden size 16, no download."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, select_parameters

SENTENCES = (
    "the nurse said that she was late .",
    "the doctor said that he was late .",
    "anna and paul went home because the day was long .",
    "when the rain began , she put on her red coat and he took his blue one .",
)


def _word_level_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {token: number for number, token in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=64,
    )


def _bert(vocabulary_size: int) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return BertForMaskedLM(config)


def _gpt2(vocabulary_size: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary_size,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _llama(vocabulary_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def session_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {"masked": _word_level_tokenizer(), "causal": _byte_level_tokenizer()}


@pytest.fixture(scope="session")
def session_models(session_tokenizers) -> dict[str, PreTrainedModel]:
    sizes = {kind: len(tokenizer) for kind, tokenizer in session_tokenizers.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = {
            "bert": _bert(sizes["masked"]),
            "gpt2": _gpt2(sizes["causal"]),
            "llama": _llama(sizes["causal"]),
        }
    return {name: model.eval() for name, model in built.items()}


@pytest.fixture
def masked_tokenizer(session_tokenizers) -> PreTrainedTokenizerFast:
    """One token per word; every text between `[CLS]` and `[SEP]`."""
    return copy.deepcopy(session_tokenizers["masked"])


@pytest.fixture
def causal_tokenizer(session_tokenizers) -> PreTrainedTokenizerFast:
    """Byte-level BPE, whose words carry their leading space; adds no special token."""
    return copy.deepcopy(session_tokenizers["causal"])


@pytest.fixture
def tiny_bert(session_models) -> BertForMaskedLM:
    """Masked; the decoder is tied to the embeddings."""
    return copy.deepcopy(session_models["bert"])


@pytest.fixture
def tiny_gpt2(session_models) -> GPT2LMHeadModel:
    """Causal; the head is tied to the embeddings, projections are `Conv1D`."""
    return copy.deepcopy(session_models["gpt2"])


@pytest.fixture
def tiny_llama(session_models) -> LlamaForCausalLM:
    """Causal; the head is its own."""
    return copy.deepcopy(session_models["llama"])


@pytest.fixture(params=["bert", "gpt2", "llama"])
def tiny_model(request, session_models) -> PreTrainedModel:
    """Each of the tiny models in turn."""
    return copy.deepcopy(session_models[request.param])


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    """Fills a model's parameters with eighths in [−2, 2]; float32 holds their sums exactly."""

    @torch.no_grad()
    def fill(model: nn.Module, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            eighths = torch.randint(-16, 17, parameter.shape, generator=generator)
            parameter.copy_(eighths / 8)

    return fill


@pytest.fixture(scope="session")
def gradiend_for(fill) -> Callable[..., GradiendModel]:
    """Makes a GRADIEND of a base model's weights with eighths in all its tensors."""

    def gradiend_for(
        base_model: PreTrainedModel,
        patterns: str | Sequence[str] = "layers",
        *,
        n_features: int = 1,
        every: int | None = None,
        **settings: object,
    ) -> GradiendModel:
        selection = select_parameters(base_model, patterns)
        if every is not None:
            selection = _every_nth_weight(selection, every)
        config = GradiendConfig(parameters=selection.to_config(), n_features=n_features, **settings)
        gradiend = GradiendModel(config)
        fill(gradiend)
        for entry in selection:
            if entry.indices is not None:
                gradiend.indices.at(entry.name).copy_(entry.indices)
        return gradiend

    return gradiend_for


def _every_nth_weight(selection: ParameterSelection, step: int) -> ParameterSelection:
    vector = torch.zeros(selection.n_selected)
    vector[::step] = 1.0
    n_kept = int(vector.sum())
    scores = selection.unflatten(vector)
    return selection.top_k(scores, fraction=n_kept / selection.n_selected)
