"""Tiny random language models and hand-made tokenizers, built in memory.

A tokenizer here is a chain of merges from the left, so its tokens can be written down by hand: a
word of the lists below is one token, anything else falls into single characters after its longest
listed beginning (" hers" is " her" + "s").
"""

import importlib
import warnings
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from hf_gradiend.data.collation import TargetBatch, collate, prepare_texts

# The first dual tensor makes torch (2.13) script its own derivatives, with this warning; see
# https://github.com/pytorch/pytorch/issues/42459 (TorchScript is not developed further).
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".torch.jit.script. is", category=DeprecationWarning)
    importlib.import_module("torch._decomp.decompositions_for_jvp")

# " the" before " they": "they" is two tokens, " the" + "y".
SPACED_WORDS = (
    *("said", "that", "he", "she", "was", "late", "nurse", "her", "it", "the", "doctor", "my"),
    *("because", "tired"),
)
FIRST_WORDS = ("Anna", "Paul", "The")
PIECES = ("##self", "##s", "##y", "'", ".", ",")
MAX_LENGTH = 64


@dataclass(frozen=True)
class TinyModel:
    """A tiny language model with its tokenizer.

    Args:
        family: Key of `FAMILIES`.
        objective: How it predicts, from the literature, not from the package.
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
    """

    family: str
    objective: str
    model: hf.PreTrainedModel
    tokenizer: hf.PreTrainedTokenizerBase


def _chain(words) -> list[tuple[str, str]]:
    """Merges that build each word from its left end, shorter prefixes first."""
    merges = {(word[:i], word[i]) for word in words for i in range(1, len(word))}
    return sorted(merges, key=lambda pair: (len(pair[0]), pair))


def _bpe(space: str, alphabet, special: list[str], **options) -> Tokenizer:
    first = [space + word for word in FIRST_WORDS] if space == "▁" else list(FIRST_WORDS)
    merges = _chain([*(space + word for word in SPACED_WORDS), *first])
    tokens = dict.fromkeys([*special, *sorted(alphabet), *("".join(pair) for pair in merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = _bpe("Ġ", pre_tokenizers.ByteLevel.alphabet(), special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer, **special) -> hf.PreTrainedTokenizerFast:
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **special
    )


def _gpt2_tokenizer() -> hf.PreTrainedTokenizerFast:
    end = "<|endoftext|>"
    return _wrap(_byte_level([end]), bos_token=end, eos_token=end, unk_token=end, pad_token=end)


def _roberta_tokenizer() -> hf.PreTrainedTokenizerFast:
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    # Offsets without the space of " he", as RoBERTa has them; GPT-2's hold the space.
    tokenizer.post_processor = RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return _wrap(
        tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def _bert_tokenizer() -> hf.PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [word.lower() for word in (*SPACED_WORDS, *FIRST_WORDS)]
    vocabulary = {
        token: number for number, token in enumerate(dict.fromkeys([*special, *words, *PIECES]))
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return _wrap(tokenizer, **dict(zip(names, special, strict=True)))


def _llama_tokenizer() -> hf.PreTrainedTokenizerFast:
    characters = set("▁.,'" + "".join((*SPACED_WORDS, *FIRST_WORDS, "selfy")))
    tokenizer = _bpe("▁", characters, ["<unk>", "<s>", "</s>"], unk_token="<unk>")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


TOKENIZERS = {
    "gpt2": _gpt2_tokenizer,
    "roberta": _roberta_tokenizer,
    "bert": _bert_tokenizer,
    "llama": _llama_tokenizer,
}

_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": MAX_LENGTH + 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}  # two query heads share one key and value head
_LLAMA = {**_GROUPED, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_GEMMA = {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 3}
_ROBERTA = {**_SIZES, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_GPT2 = {"bos_token_id": 0, "eos_token_id": 0}
_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}

# family: model class, configuration class, its arguments, tokenizer
FAMILIES = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig, _SIZES, "bert"),
    "distilbert": (hf.DistilBertForMaskedLM, hf.DistilBertConfig, _DISTILBERT, "bert"),
    "electra": (hf.ElectraForMaskedLM, hf.ElectraConfig, {**_SIZES, "embedding_size": 8}, "bert"),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, _ROBERTA, "roberta"),
    "modernbert": (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig,
        # one global and one local layer, whose window is smaller than the texts
        {**_ROBERTA, "cls_token_id": 0, "sep_token_id": 2, "local_attention": 4},
        "roberta",
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        {**_GPT2, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": MAX_LENGTH},
        "gpt2",
    ),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {**_SIZES, **_GPT2}, "gpt2"),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {**_GROUPED, **_GPT2}, "gpt2"),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**_GROUPED, **_GPT2, "head_dim": 8}, "gpt2"),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _LLAMA, "llama"),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, _GEMMA, "llama"),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, _GEMMA, "llama"),
}
MASKED_FAMILIES = ("bert", "distilbert", "electra", "roberta", "modernbert")


@pytest.fixture(scope="session")
def make_tokenizer():
    """Function of a kind ("gpt2", "roberta", "bert", "llama") that builds a tokenizer."""
    return lambda kind: TOKENIZERS[kind]()


@pytest.fixture(scope="session")
def make_lm():
    """Function of a family that builds a tiny model with its tokenizer; the same weights each time.

    Every weight gets noise: with transformers' own initialisation (0.02; biases 0, norms 1) the
    predictions are nearly uniform, and much that is wrong would not show.
    """
    tokenizers = {kind: lru_cache(make) for kind, make in TOKENIZERS.items()}

    def make(family: str, *, attention: str | None = None, **config) -> TinyModel:
        model_class, config_class, arguments, kind = FAMILIES[family]
        tokenizer = tokenizers[kind]()
        settings = {**arguments, "vocab_size": len(tokenizer), **config}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = config_class(**settings)
            model = model_class._from_config(config, attn_implementation=attention)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                scale = 0.1 if "norm" in name.lower() else 0.3
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        objective = "masked" if family in MASKED_FAMILIES else "causal"
        return TinyModel(family, objective, model.eval(), tokenizer)

    return make


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """Every family of models in turn."""
    return request.param


@pytest.fixture
def double_precision(monkeypatch):
    """Arithmetic in float64 from end to end.

    transformers computes norms, softmax and rotary angles in float32 whatever the model's type, and
    the package computes log-probabilities so. Inside this fixture their `.float()` and
    `torch.float32` mean float64, so that differences can be compared to 1e-10.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)


@pytest.fixture(scope="session")
def batch_of():
    """Function of a tiny model and rows (text, factual, counterfactual) that collates them."""

    def batch_of(lm: TinyModel, rows, **options) -> TargetBatch:
        columns = ("text", "factual", "counterfactual")
        texts = prepare_texts(
            [dict(zip(columns, row, strict=True)) for row in rows],
            lm.tokenizer, lm.objective, **options,
        )  # fmt: skip
        return collate(texts, lm.tokenizer.pad_token_id)

    return batch_of
