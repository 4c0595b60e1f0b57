"""Neutral texts as readings: one ordinary word of each, against one of another text."""

import logging
import random
import re
from collections.abc import Sequence
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from hf_gradiend.base_models import Objective
from hf_gradiend.data.collation import SLOT, PreparedText, PreparedTexts, prepare_texts
from hf_gradiend.data.templates import build_neutral_texts
from hf_gradiend.errors import DataError

logger = logging.getLogger(__name__)

N_FITTED = 96  # neutral texts that an encoder is fitted on


def neutral_readings(texts: Sequence[str], *, seed: int = 0) -> list[dict[str, str]]:
    """One ordinary word of each text as its target, with a word of another text against it.

    Args:
        texts: Neutral texts. One with fewer than three words of three or more letters is left out.
        seed: Seed of the choice.

    Returns:
        Rows with `text`, `factual` (the text's own word) and `counterfactual`.

    Raises:
        DataError: If a text holds the slot already, or fewer than two texts are long enough.
    """
    generator = random.Random(seed)
    chosen: list[tuple[str, int, int]] = []
    for text in texts:
        if SLOT in text:
            raise DataError(
                f"Expected neutral texts without the slot {SLOT}, but got {text[:80]!r}."
            )
        # Not the first two words: a causal model needs something to go by.
        words = [match.span() for match in re.finditer(r"[^\W\d_]{3,}", text)][2:]
        if words:
            chosen.append((text, *generator.choice(words)))
    if len(chosen) < 2:
        raise DataError(
            f"Expected at least two neutral texts of several words, but got {len(chosen)}."
        )
    rows: list[dict[str, str]] = []
    for number, (text, start, stop) in enumerate(chosen):
        other, first, last = chosen[(number + 1) % len(chosen)]
        rows.append(
            {
                "text": text[:start] + SLOT + text[stop:],
                "factual": text[start:stop],
                "counterfactual": other[first:last],
            }
        )
    return rows


def neutral_to_fit(
    texts: Sequence[str] | None,
    processing_class: PreTrainedTokenizerBase,
    objective: Objective,
    *,
    max_length: int | None = None,
) -> PreparedTexts | None:
    """Neutral words that an encoder is fitted on, to be read as 0.

    Args:
        texts: Neutral texts, of which the first 96 are read; `None` for the package's own, English,
            of the split `train`.
        processing_class: Tokenizer of the base model.
        objective: `"masked"` or `"causal"`.
        max_length: Longest input in tokens; `None` for the model's limit, at most 256.

    Returns:
        Readings of each text's own word and of another, numbered from 0. Words that the tokenizer
        does not know are left out; where it knows none, `None` and a warning.

    Raises:
        DataError: If a text holds the slot, or fewer than two are long enough.
    """  # noqa: DOC502 - raised by neutral_readings
    own = build_neutral_texts()["train"]["text"] if texts is None else texts
    readings: list[PreparedText] = []
    for row in neutral_readings(own[:N_FITTED]):
        with suppress(DataError):
            readings += prepare_texts([row], processing_class, objective, max_length=max_length)
    if not readings:
        logger.warning(
            "The tokenizer knows none of the neutral words, so that the encoder is fitted without. "
            "Pass neutral_texts in its language."
        )
        return None
    return PreparedTexts.numbered(readings)
