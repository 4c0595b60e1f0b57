"""From a text with a slot to the model's input, the positions to read and the tokens to score.

A *site* is one position whose logits are read. For a masked model it is a mask; for a causal model
it is the token before the target, because transformers' logits at position i predict token i + 1.
Words that lead to the same input (single-token words, the usual case) share one row.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_gradiend.base_models import Objective, check_tokenizer
from hf_gradiend.errors import DataError

logger = logging.getLogger(__name__)

SLOT = "[TARGET]"
DEFAULT_MAX_LENGTH = 256
# 32 texts of 128 tokens: longer texts would make a large model's activations several GB.
TOKENS_OF_A_BATCH = 4096

Rows = Iterable[Mapping[str, str]] | Dataset


@dataclass(frozen=True)
class WordReading:
    """How one word is read at the slots of one text.

    Args:
        input_ids: Input of the base model.
        sites: Pairs of a position in `input_ids` and the token scored there.
        weight: Weight of each site's log-probability: 1 / number of slots.
    """

    input_ids: tuple[int, ...]
    sites: tuple[tuple[int, int], ...]
    weight: float


@dataclass(frozen=True)
class PreparedText:
    """One tokenised text.

    Args:
        index: Row of the data set.
        readings: One reading per word, in the order of the words.
    """

    index: int
    readings: tuple[WordReading, ...]

    @property
    def length(self) -> int:
        """Number of tokens of the longest input."""
        return max(len(reading.input_ids) for reading in self.readings)


@dataclass(frozen=True)
class PreparedTexts(Sequence[PreparedText]):
    """Tokenised texts of a data set, without those that had no room for their target.

    Args:
        texts: The tokenised texts.
        n_rows: Number of rows of the data set.
        skipped: Row numbers of the texts that could not be read.
    """

    texts: tuple[PreparedText, ...]
    n_rows: int
    skipped: tuple[int, ...] = ()

    def __getitem__(self, index):  # noqa: ANN001, ANN204 - Sequence's own overloads
        return self.texts[index]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def numbered(cls, texts: Iterable[PreparedText]) -> "PreparedTexts":
        """Texts as a data set of their own, numbered from 0.

        Args:
            texts: Tokenised texts, of whatever rows.
        """
        own = tuple(PreparedText(row, text.readings) for row, text in enumerate(texts))
        return cls(own, n_rows=len(own))


@dataclass(frozen=True)
class TargetBatch:
    """A batch with the sites to read and the tokens to score there.

    Args:
        input_ids: Token ids of shape `(rows, length)`, padded on the right.
        attention_mask: 1 for tokens, 0 for padding, of the same shape. Where rows hold several
            texts (`gradients.packing`): what is added to attention scores, `(rows, 1, length,
            length)`, or `None` for a model that tells texts apart by their positions.
        site_rows: Row of each site, of shape `(sites,)`.
        site_positions: Position of each site, of shape `(sites,)`.
        term_sites: Site of each scored token, of shape `(terms,)`.
        term_tokens: Token id of each term.
        term_weights: Weight of each term's log-probability.
        term_outputs: Flat position of each term in the `(texts, words)` result.
        n_texts: Number of texts.
        n_words: Number of words scored in each text.
        position_ids: Position of each token in its text, where rows hold several texts.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    site_rows: Tensor
    site_positions: Tensor
    term_sites: Tensor
    term_tokens: Tensor
    term_weights: Tensor
    term_outputs: Tensor
    n_texts: int
    n_words: int
    position_ids: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor | bool | None]:
        """The model's input by its argument names."""
        found: dict[str, Tensor | bool | None] = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
        }
        if self.position_ids is not None:
            found["position_ids"] = self.position_ids
        if self.attention_mask is None:  # with a cache, transformers would not look at positions
            found["use_cache"] = False
        return found

    def to(self, device: torch.device | str) -> "TargetBatch":
        """The same batch on another device."""
        tensors = {name: held for name, held in vars(self).items() if isinstance(held, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass
class _BatchBuilder:
    """Rows, sites and terms of a batch under construction; equal inputs of a text share a row."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    sites: dict[tuple[int, int], int] = field(default_factory=dict)
    terms: list[tuple[int, int, float, int]] = field(default_factory=list)

    def add(self, text: PreparedText, first_output: int) -> None:
        row_of: dict[tuple[int, ...], int] = {}
        for offset, reading in enumerate(text.readings):
            if reading.input_ids not in row_of:
                row_of[reading.input_ids] = len(self.rows)
                self.rows.append(reading.input_ids)
            row = row_of[reading.input_ids]
            for position, token in reading.sites:
                site = self.sites.setdefault((row, position), len(self.sites))
                self.terms.append((site, token, reading.weight, first_output + offset))


def prepare_texts(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    *,
    words: Sequence[str] = ("factual", "counterfactual"),
    max_length: int | None = None,
) -> PreparedTexts:
    """Tokenise texts once, for any number of passes.

    A masked model reads all slots of a text (mean over slots, sum over a word's tokens). A causal
    model reads the first slot alone: what follows it, it has not seen yet, and what follows a
    filled slot would be given away.

    Args:
        rows: Rows with `text`, which holds the slot `[TARGET]`, and one column per word.
        tokenizer: Fast tokenizer of the base model.
        objective: `"masked"` or `"causal"`.
        words: Columns with the words to score.
        max_length: Longest input in tokens; `None` for the model's limit, at most 256. A longer
            masked text is cut around its slots; a longer causal prefix is cut on the left.

    Returns:
        The tokenised texts; those without room for their target are left out, and counted in a
        warning.

    Raises:
        DataError: If a text has no slot, a word has no token of its own, or nothing is left.
    """
    check_tokenizer(tokenizer)
    if max_length is None:
        max_length = min(tokenizer.model_max_length, DEFAULT_MAX_LENGTH)
    read = _read_masked if objective == "masked" else _read_causal
    special = _special_tokens(tokenizer)
    texts: list[PreparedText] = []
    skipped: list[int] = []
    n_rows = 0
    for index, row in enumerate(cast("Iterable[Mapping[str, str]]", rows)):
        n_rows += 1
        if SLOT not in row["text"]:
            raise DataError(
                f"Expected the slot {SLOT} in every text, but row {index} has none: "
                f"{row['text'][:80]!r}."
            )
        readings = [read(row["text"], row[word], tokenizer, special, max_length) for word in words]
        if any(reading is None for reading in readings):
            skipped.append(index)
        else:
            texts.append(PreparedText(index, tuple(filter(None, readings))))
    if not texts:
        raise DataError(
            f"Expected at least one text with room for its target in {max_length} tokens, but none "
            f"of the {n_rows:,} texts has."
        )
    if skipped:
        logger.warning(
            "%d of %d texts are skipped: no room for their target in %d tokens (or, for a causal "
            "model, nothing before the slot). First: row %d.",
            len(skipped), n_rows, max_length, skipped[0],
        )  # fmt: skip
    return PreparedTexts(tuple(texts), n_rows, tuple(skipped))


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to the longest of them, on the right.

    Right padding is exact for causal models too: no real token attends to what follows it, and each
    row is read at positions of its own.

    Args:
        rows: Token ids of each input.
        pad_token_id: Token id to pad with.

    Returns:
        The ids, int64 `(rows, length)`, and the attention mask of the same shape: 1 for tokens, 0
        for padding.
    """
    input_ids = torch.full((len(rows), max(map(len, rows))), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row)
        attention_mask[number, : len(row)] = 1
    return input_ids, attention_mask


def collate(texts: Sequence[PreparedText], pad_token_id: int) -> TargetBatch:
    """Texts as one batch, padded as `pad_rows` does.

    Args:
        texts: Tokenised texts that all have the same number of words.
        pad_token_id: Token id to pad with.
    """
    n_words = len(texts[0].readings)
    builder = _BatchBuilder()
    for number, text in enumerate(texts):
        builder.add(text, number * n_words)
    input_ids, attention_mask = pad_rows(builder.rows, pad_token_id)
    site_rows, site_positions = torch.tensor(list(builder.sites)).T  # (sites, 2) -> 2 × (sites,)
    sites, tokens, weights, outputs = zip(*builder.terms, strict=True)
    return TargetBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        site_rows=site_rows,
        site_positions=site_positions,
        term_sites=torch.tensor(sites),
        term_tokens=torch.tensor(tokens),
        term_weights=torch.tensor(weights),
        term_outputs=torch.tensor(outputs),
        n_texts=len(texts),
        n_words=n_words,
    )


def batches_by_length(
    texts: Sequence[PreparedText],
    batch_size: int | None,
    max_tokens: int = TOKENS_OF_A_BATCH,
    *,
    packed: bool = False,
) -> Iterator[tuple[PreparedText, ...]]:
    """Batches of texts of similar length, longest first, so that memory peaks early.

    A batch ends early where the next text would bring it beyond `max_tokens`, or, once it holds
    eight texts, where the next text would be padded by more than a third of its length.
    A text counts once there, though words of several tokens each have an input of their own.

    Args:
        texts: Tokenised texts.
        batch_size: Largest number of texts in a batch; `None` for any.
        max_tokens: Largest number of tokens in a batch of several texts.
        packed: Whether the batches will have no padding.

    Yields:
        Every text once.
    """
    batch: list[PreparedText] = []
    n_tokens = 0
    for text in sorted(texts, key=lambda text: -text.length):
        longest = batch[0].length if batch else 0
        n_tokens = n_tokens + text.length if packed else (len(batch) + 1) * longest
        dissimilar = not packed and len(batch) >= 8 and 4 * text.length < 3 * longest
        if batch and (len(batch) == batch_size or n_tokens > max_tokens or dissimilar):
            yield tuple(batch)
            batch, n_tokens = [], text.length
        batch.append(text)
    if batch:
        yield tuple(batch)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    first = mask.index(0)
    last = len(mask) - 1 - mask[::-1].index(0)
    return ids[:first], ids[last + 1 :]


def _fill(text: str, word: str) -> tuple[str, list[tuple[int, int]]]:
    """The text with every slot filled, and the character span of each filled word."""
    parts = text.split(SLOT)
    filled, spans = parts[0], []
    for part in parts[1:]:
        spans.append((len(filled), len(filled) + len(word)))
        filled += word + part
    return filled, spans


def _tokens_in_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the whole text, and for each span the positions of the tokens that overlap it.

    The whole text is tokenised, so that the target is " he" with the tokenizer's own space.

    Raises:
        DataError: If a word has no token of its own.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    positions = [
        [i for i, (first, last) in enumerate(offsets) if last > start and first < stop]
        for start, stop in spans
    ]
    for (start, _), found in zip(spans, positions, strict=True):
        # A space that is a token of its own ("▁" before a rare word) is the word's too: as context
        # it would give away that " he" does not follow. trim_offsets makes it a token of no width.
        if found and found[0] and text[start - 1 : start] == " ":
            first, last = offsets[found[0] - 1]
            if start - 1 <= first <= last == start:
                found.insert(0, found[0] - 1)
    special = set(tokenizer.all_special_ids)
    for (start, stop), found in zip(spans, positions, strict=True):
        if not found or any(ids[i] in special for i in found):
            raise DataError(
                f"Expected a word with tokens of its own at the slot, but {text[start:stop]!r} has "
                f"none in this tokenizer (it is empty, unknown or a special token)."
            )
    return ids, positions


def _read_causal(
    text: str,
    word: str,
    tokenizer: PreTrainedTokenizerBase,
    special: tuple[list[int], list[int]],
    max_length: int,
) -> WordReading | None:
    filled, spans = _fill(text, word)
    ids, (positions, *_) = _tokens_in_spans(filled, spans, tokenizer)
    before, target = ids[: positions[0]], [ids[i] for i in positions]
    room = max_length - len(special[0]) - (len(target) - 1)
    if room < 1 or not before + special[0]:
        return None
    prefix = special[0] + before[max(0, len(before) - room) :]
    first = len(prefix) - 1  # logits at the last prefix token predict the target's first token
    return WordReading(
        input_ids=tuple(prefix + target[:-1]),
        sites=tuple((first + i, token) for i, token in enumerate(target)),
        weight=1.0,
    )


def _read_masked(
    text: str,
    word: str,
    tokenizer: PreTrainedTokenizerBase,
    special: tuple[list[int], list[int]],
    max_length: int,
) -> WordReading | None:
    filled, spans = _fill(text, word)
    ids, slots = _tokens_in_spans(filled, spans, tokenizer)
    targets = [(position, ids[position]) for positions in slots for position in positions]
    room = max_length - len(special[0]) - len(special[1])
    first, last = targets[0][0], targets[-1][0]
    if last - first >= room:
        return None
    # As much context behind the slots as before them, where the text has it.
    start = max(0, min((first + last + 1 - room) // 2, len(ids) - room))
    mask_token_id = cast("int | None", tokenizer.mask_token_id)
    if mask_token_id is None:
        raise DataError("Expected a tokenizer with a mask token for a masked model; it has none.")
    for position, _ in targets:
        ids[position] = mask_token_id
    shift = len(special[0]) - start
    return WordReading(
        input_ids=tuple(special[0] + ids[start : start + room] + special[1]),
        sites=tuple((position + shift, token) for position, token in targets),
        weight=1.0 / len(slots),
    )
