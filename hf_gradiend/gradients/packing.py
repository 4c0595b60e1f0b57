"""Several texts in one row of a base model's input, so that no token of a pass is padding.

Texts of one batch differ in length: book sentences in batches of eight are half padding. Packed,
they stand one after the other, each with positions from its own start, and each sees itself alone.
Which models compute the same then is not told by their class: every model is asked once.
"""

import heapq
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_gradiend.base_models import evaluation_mode, objective_of, without_cache
from hf_gradiend.data.collation import (
    TOKENS_OF_A_BATCH,
    PreparedText,
    TargetBatch,
    WordReading,
    batches_by_length,
    collate,
)

# Every token is compared with all of its row: in rows of about so many tokens that costs as much as
# all else. Measured on two cores: forward mode takes 1.2 times as long in rows of 256 as of 64.
COSTLY_LENGTH = 1024
# Lengths of the texts that a model is asked about, in the order in which they come to stand.
_ASKED = (5, 4, 3)
# How much nearer packed predictions must be to the right ones than those of texts that see each
# other. Measured: 1e-5 in float32 and 0.04 in bfloat16; 1 where a model does not take them packed.
_TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
_TOLERANCE_OF_HALF = 0.25
# What another text beside it may change of a text's predictions, of the largest logit. Measured: 0
# in any precision, 2e-7 where experts are chosen; a thousand times that with the faintest leak.
_INDEPENDENCE = 5e-7


@dataclass(frozen=True)
class Packing:
    """How a model takes several texts in a row.

    Args:
        first_position: Position of a text's first token.
        mask: Whether a mask tells which tokens see each other, all of a text or those before them.
            Most of transformers' causal models need none: they tell it from the positions.
    """

    first_position: int
    mask: Literal["text", "causal"] | None


def passes_over(
    model: PreTrainedModel,
    texts: Sequence[PreparedText],
    *,
    pad_token_id: int,
    batch_size: int | None = None,
    max_tokens: int = TOKENS_OF_A_BATCH,
) -> Iterator[tuple[tuple[PreparedText, ...], TargetBatch]]:
    """Texts as batches for one forward pass each, packed where the model allows it.

    Args:
        model: Base model.
        texts: Tokenised texts.
        pad_token_id: Token id to pad with.
        batch_size: Largest number of texts in a pass; `None` for any.
        max_tokens: Largest number of tokens in a pass of several texts.

    Yields:
        The texts of a pass and their batch on the model's device; every text once, the longest
        first.
    """
    for group in groups_for(model, texts, batch_size=batch_size, max_tokens=max_tokens):
        yield group, batch_for(model, group, pad_token_id)


def groups_for(
    model: PreTrainedModel,
    texts: Sequence[PreparedText],
    *,
    batch_size: int | None = None,
    max_tokens: int = TOKENS_OF_A_BATCH,
) -> list[tuple[PreparedText, ...]]:
    """The texts of each pass of `passes_over`."""
    packed = packing_of(model) is not None
    return list(batches_by_length(texts, batch_size, max_tokens, packed=packed))


def batch_for(
    model: PreTrainedModel, texts: Sequence[PreparedText], pad_token_id: int
) -> TargetBatch:
    """Texts as one batch on the model's device, packed where the model allows it.

    Args:
        model: Base model.
        texts: Tokenised texts that all have the same number of words.
        pad_token_id: Token id to pad with.
    """
    batch, packing = collate(texts, pad_token_id), packing_of(model)
    if packing is not None:
        longest = _longest_row(model)
        batch = pack(batch, packing, pad_token_id, longest_row=longest, dtype=model.dtype)
    return batch.to(model.device)


def pack(
    batch: TargetBatch,
    packing: Packing,
    pad_token_id: int,
    *,
    longest_row: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> TargetBatch:
    """A padded batch with its rows put one after the other, into as many rows as cost least.

    Args:
        batch: Padded batch.
        packing: How the model takes it.
        pad_token_id: Token id to pad with, at the ends of the new rows.
        longest_row: Most tokens of a new row, where the model has a table of positions.
        dtype: Type of a mask: the model's.

    Returns:
        The same sites and terms on fewer rows; the batch itself where nothing can be joined.
    """
    if batch.attention_mask is None or len(batch.input_ids) == 1:
        return batch
    lengths = batch.attention_mask.sum(1).tolist()
    places = _places(lengths, longest_row or sum(lengths))
    n_rows = 1 + max(row for row, _ in places)
    if n_rows == len(lengths):
        return batch
    width = max(start + n for (_, start), n in zip(places, lengths, strict=True))
    input_ids = torch.full((n_rows, width), pad_token_id)
    # What pads a row's end is one text more, which nothing reads.
    texts = torch.full((n_rows, width), -1)
    positions = torch.zeros_like(texts)
    for number, ((row, start), n) in enumerate(zip(places, lengths, strict=True)):
        span = slice(start, start + n)
        input_ids[row, span] = batch.input_ids[number, :n]
        texts[row, span] = number
        positions[row, span] = torch.arange(n) + packing.first_position
    new_rows, starts = torch.tensor(places).T  # (rows, 2) -> 2 × (rows,)
    return replace(
        batch,
        input_ids=input_ids,
        attention_mask=None if packing.mask is None else _mask(texts, packing.mask, dtype),
        position_ids=positions,
        site_rows=new_rows[batch.site_rows],
        site_positions=starts[batch.site_rows] + batch.site_positions,
    )


def packing_of(model: PreTrainedModel) -> Packing | None:
    """How a model takes several texts in a row, found out once by asking it.

    Its predictions for three short texts in a row must be those for each alone, up to rounding, and
    those of the later ones the same whatever stands first.

    Returns:
        How; `None` for a model that must be given padded batches: one whose texts would see each
        other (a recurrent one, say) or which has no positions to be told.
    """
    attention = getattr(model.config, "_attn_implementation", None)
    known, key = _KNOWN.setdefault(model, {}), (attention, model.dtype)
    if key not in known:
        known[key] = _ask(model) if attention in ("eager", "sdpa") else None
    return known[key]


_KNOWN: WeakKeyDictionary[PreTrainedModel, dict[tuple[str | None, torch.dtype], Packing | None]] = (
    WeakKeyDictionary()
)


def _ask(model: PreTrainedModel) -> Packing | None:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    config = model.config.get_text_config()
    if getattr(config, "attention_type", None) == "block_sparse":
        return None  # BigBird's short inputs turn it to full attention, for good
    masks = ("text",) if objective_of(model) == "masked" else (None, "causal")
    # A mask of ours would take the place of one that keeps a layer to a text's neighbouring tokens.
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        masks = tuple(mask for mask in masks if mask is None)
    # Also of models of text and pictures, whose configuration has no vocabulary of its own.
    n_tokens = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    pad = getattr(config, "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < n_tokens else 0
    # RoBERTa counts a text's positions from beyond its padding token's id.
    longest = _longest_row(model)
    firsts = (0, pad + 1) if longest is None or pad + 1 + sum(_ASKED) <= longest else (0,)
    for mask, first_position in product(masks, firsts):
        packing = Packing(first_position, mask)
        try:
            with evaluation_mode(model), without_cache(model):
                if _agrees(model, packing, pad, n_tokens):
                    return packing
        except _REFUSALS:
            continue
    return None


# What a model raises that does not take a form of input.
_REFUSALS = (
    AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@torch.no_grad()
def _agrees(model: PreTrainedModel, packing: Packing, pad_token_id: int, n_tokens: int) -> bool:
    """Whether packed predictions are the right ones, and no text changes another's."""
    # Tokens from all over the vocabulary: its ends often have no weights of their own.
    n_asked = sum(_ASKED)
    spread = [n_tokens * k // (2 * n_asked) for k in range(2 * n_asked)]
    ids = [token for token in spread if token != pad_token_id]
    apart, packed = _asked_with(ids[:n_asked], packing, pad_token_id, model.dtype)
    other_ids = [*ids[n_asked : n_asked + _ASKED[0]], *ids[_ASKED[0] : n_asked]]
    _, beside_another = _asked_with(other_ids, packing, pad_token_id, model.dtype)
    seen = replace(packed, attention_mask=torch.ones_like(packed.input_ids))
    right, found, wrong, moved = (
        model(**batch.to(model.device).inputs).logits.float()
        for batch in (apart, packed, seen, beside_another)
    )
    right = right[cast("Tensor", apart.attention_mask).bool()]
    gap, leak = ((logits[0] - right).norm() for logits in (found, wrong))
    change = (moved - found)[0, _ASKED[0] :].abs().max()
    near = gap < _TOLERANCE.get(model.dtype, _TOLERANCE_OF_HALF) * leak
    return bool(near & (change <= _INDEPENDENCE * found.abs().max()))


def _asked_with(
    ids: Sequence[int], packing: Packing, pad_token_id: int, dtype: torch.dtype
) -> tuple[TargetBatch, TargetBatch]:
    """The texts that a model is asked about, padded and packed."""
    left = iter(ids)
    readings = [WordReading(tuple(islice(left, n)), sites=((0, 0),), weight=1.0) for n in _ASKED]
    apart = collate([PreparedText(k, (own,)) for k, own in enumerate(readings)], pad_token_id)
    return apart, pack(apart, packing, pad_token_id, dtype=dtype)


def _longest_row(model: PreTrainedModel) -> int | None:
    """Length of the model's table of positions, where its configuration tells one."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _mask(texts: Tensor, kind: Literal["text", "causal"], dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, `(rows, 1, length, length)`: 0 where tokens are seen."""
    unseen = texts[:, None, :, None] != texts[:, None, None, :]
    if kind == "causal":
        unseen |= torch.ones_like(unseen).triu(1)
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, torch.finfo(dtype).min)


def _places(lengths: Sequence[int], longest_row: int) -> list[tuple[int, int]]:
    """New row and start of every text: as many rows of like length as cost least.

    The longest text first, each goes into the row that is shortest yet; fewer rows have less
    padding, shorter ones fewer tokens to compare.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    least, best = math.inf, [(number, 0) for number in range(len(lengths))]
    for n_rows in range(1, len(lengths) + 1):
        rows = [(0, row) for row in range(n_rows)]
        places = list(best)
        for number in order:
            start, row = rows[0]
            places[number] = row, start
            heapq.heapreplace(rows, (start + lengths[number], row))
        width = max(filled for filled, _ in rows)
        cost = n_rows * width * (COSTLY_LENGTH + width)
        if cost < least and width <= longest_row:
            least, best = cost, places
        if width == max(lengths):  # more rows would hold more padding
            break
    return best
