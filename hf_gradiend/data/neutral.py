"""Neutral texts as readings: one ordinary word of each, against one of another text."""

import random
import re
from collections.abc import Sequence

from hf_gradiend.data.collation import SLOT
from hf_gradiend.errors import DataError


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
