"""Tiny models and tokenizers, built in memory: two layers, hidden size 16, no download."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from datasets import Dataset, DatasetDict
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


# A language in which the name decides the pronoun, and nothing else does.
NAMES = {
    "F": ["anna", "mary", "lucy", "emma", "clara", "rose", "alice", "helen", "julia", "laura",
          "nora", "ruth"],
    "M": ["paul", "john", "mark", "peter", "adam", "carl", "david", "eric", "frank", "henry",
          "jack", "luke"],
}  # fmt: skip
PRONOUNS = {"F": "she", "M": "he"}
SENTENCES_OF_A_NAME = (
    "{} said that [TARGET] was late .",
    "{} went home because [TARGET] was tired .",
    "when {} came home , [TARGET] was late .",
    "the doctor said that {} was late because [TARGET] was tired .",
    "{} and the nurse said that [TARGET] went home .",
    "because {} was tired , [TARGET] took the day off .",
    "the nurse took {} home when [TARGET] was tired .",
    "{} took the coat that [TARGET] put on .",
)
# The base model knows every name; a GRADIEND is tested on names that it was not trained on.
NAMES_OF_SPLITS = {"train": slice(0, 6), "validation": slice(6, 9), "test": slice(9, 12)}


def _word_level_tokenizer(sentences: Sequence[str]) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for sentence in sentences for word in sentence.split()})
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


def _byte_level_tokenizer(sentences: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
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
    return {
        "masked": _word_level_tokenizer(SENTENCES),
        "causal": _byte_level_tokenizer(SENTENCES),
    }


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


@dataclass(frozen=True)
class PlantedFeature:
    """A tiny base model that has learned which pronoun goes with which name.

    Args:
        model: The base model, in evaluation mode.
        tokenizer: Its tokenizer.
        data: Feature data set of the names; no name stands in two splits.
        learned: Share of the texts whose own pronoun the model prefers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    data: DatasetDict
    learned: float


def _feature_rows(split: str) -> list[dict[str, str]]:
    return [
        {
            "text": sentence.format(name),
            "factual": PRONOUNS[label],
            "counterfactual": PRONOUNS[other],
            "factual_class": label,
            "counterfactual_class": other,
            "name": name,
        }
        for label, other in (("F", "M"), ("M", "F"))
        for name in NAMES[label][NAMES_OF_SPLITS[split]]
        for sentence in SENTENCES_OF_A_NAME
    ]


def _learn_pronouns(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> int:
    """Train on the pronouns with plain PyTorch; how many texts the model then gets right."""
    filled = [row["text"].replace("[TARGET]", row["factual"]) for row in rows]
    encoded = tokenizer(filled, padding=True, return_tensors="pt")
    ids, attention = encoded["input_ids"], encoded["attention_mask"]
    space = "" if tokenizer.mask_token else " "
    pronouns = torch.tensor(
        [tokenizer(space + word, add_special_tokens=False)["input_ids"] for word in ("she", "he")]
    ).squeeze(1)
    is_pronoun = torch.isin(ids, pronouns)
    labels = torch.tensor([row["factual_class"] == "M" for row in rows]).long()
    # 85 %, not all: a model that is sure of itself has no gradients to learn a feature from.
    wanted = torch.zeros(len(rows), len(tokenizer))
    wanted[torch.arange(len(rows)), pronouns[labels]] = 0.85
    wanted[torch.arange(len(rows)), pronouns[1 - labels]] = 0.15
    read = is_pronoun if tokenizer.mask_token else is_pronoun.roll(-1, dims=1)
    if tokenizer.mask_token:
        ids = ids.masked_fill(is_pronoun, tokenizer.mask_token_id)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)  # from 0.02, where attention takes hundreds of steps to move
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        logits = model(input_ids=ids, attention_mask=attention).logits[read]
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        if loss.item() < 0.45:  # the least is the entropy of 85 %, 0.423 nats
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    return int((logits[:, pronouns].argmax(-1) == labels).sum())


@pytest.fixture(scope="session")
def session_planted() -> Callable[[str], PlantedFeature]:
    """Function of a kind, "bert" or "gpt2", that makes its model once."""
    rows = {split: _feature_rows(split) for split in NAMES_OF_SPLITS}
    everything = [row for part in rows.values() for row in part]
    sentences = [row["text"].replace("[TARGET]", row["factual"]) for row in everything]
    makers = {"bert": (_word_level_tokenizer, _bert), "gpt2": (_byte_level_tokenizer, _gpt2)}

    @lru_cache
    def make(kind: str) -> PlantedFeature:
        make_tokenizer, make_model = makers[kind]
        tokenizer = make_tokenizer([*SENTENCES, *sentences])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make_model(len(tokenizer)).eval()  # no dropout: it learns in fewer steps
            n_right = _learn_pronouns(model, tokenizer, everything)
        data = DatasetDict({split: Dataset.from_list(part) for split, part in rows.items()})
        return PlantedFeature(model, tokenizer, data, n_right / len(everything))

    return make


@pytest.fixture
def planted_bert(session_planted) -> PlantedFeature:
    """A masked model that knows a feature."""
    return copy.deepcopy(session_planted("bert"))


@pytest.fixture
def planted_gpt2(session_planted) -> PlantedFeature:
    """A causal model that knows a feature."""
    return copy.deepcopy(session_planted("gpt2"))


@pytest.fixture(params=["bert", "gpt2"])
def planted(request, session_planted) -> PlantedFeature:
    """Each of the models that know a feature in turn."""
    return copy.deepcopy(session_planted(request.param))


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
