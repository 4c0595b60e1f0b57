"""Perplexity on WikiText-2 (Merity et al., 2017, https://openreview.net/forum?id=Byj72udxe).

The raw text in windows of 256 tokens that do not overlap, every fourth of them; all of them in the
variant `whole`, which takes four times as long for an interval of half the width. Causal: exp of
the mean negative log-likelihood of all tokens of the windows, each after the token that begins a
document. Masked: of 15 % of the tokens, drawn with a fixed seed and masked together. Not comparable
with perplexities by word, or with longer windows.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_gradiend.errors import NumericalError
from hf_gradiend.evaluation.bias.benchmark import Benchmark, Columns, Item, Measure, as_values
from hf_gradiend.evaluation.likelihoods import Likelihoods, Reading

WINDOW = 256
MASK_SHARE = 0.15
STRIDE = 4
CHARACTERS = 1_000  # of an item; about 250 tokens of English


class WikiText2(Benchmark):
    """WikiText-2, test part.

    Values of an item: negative log-likelihood in nats, and the number of scored tokens.
    """

    name = "wikitext2"
    paper = "Merity et al. (2017), https://openreview.net/forum?id=Byj72udxe"
    files: ClassVar = {
        "wikitext2_test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"
    }
    variants = ("whole",)
    measures = (Measure("perplexity", 1.0, float("inf"), "low"),)

    def load(self, folder: Path) -> list[dict[str, Any]]:
        """One item per piece of about 1,000 characters, cut between words."""
        words = (folder / "wikitext2_test.txt").read_text("utf-8").split(" ")
        items: list[dict[str, Any]] = []
        piece: list[str] = []
        length = 0
        for word in words:
            piece.append(word)
            length += len(word) + 1
            if length >= CHARACTERS:
                items.append({"text": " ".join(piece).strip()})
                piece, length = [], 0
        items = [item for item in items if item["text"]]
        return items if self.variant == "whole" else items[::STRIDE]

    def values(self, likelihoods: Likelihoods, items: Sequence[Item]) -> Tensor:
        """Negative log-likelihood and number of tokens of each item."""
        readings = [_readings(likelihoods, item["text"]) for item in items]
        found = likelihoods.log_probabilities(readings, "WikiText-2")
        return as_values([[-float(p.sum()), len(p)] for p in found])

    def scores(self, columns: Columns, values: Tensor) -> dict[str, float]:
        """Perplexity: exp of the mean negative log-likelihood of a token.

        Raises:
            NumericalError: If it is too large for a number.
        """
        del columns
        perplexity = float((values[:, 0].sum() / values[:, 1].sum()).exp())
        if perplexity == float("inf"):
            raise NumericalError(
                "Expected a finite perplexity, but a token's mean negative log-likelihood is "
                "above 709 nats. Is the model broken?"
            )
        return {"perplexity": perplexity}


def _readings(likelihoods: Likelihoods, text: str) -> list[Reading]:
    tokenised = likelihoods.tokenised(text, WINDOW)
    places = tokenised.ordinary[:WINDOW]
    ids = tokenised.input_ids[: places[-1] + 1]
    if not likelihoods.is_masked:
        return [Reading(ids, tuple((i - 1, ids[i]) for i in places))]
    ids = (*ids, *tokenised.input_ids[tokenised.ordinary[-1] + 1 :])  # the closing special tokens
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    drawn = torch.rand(len(places), generator=generator) < MASK_SHARE
    hidden = [place for place, chosen in zip(places, drawn.tolist(), strict=True) if chosen]
    hidden = hidden or [places[0]]
    masked = tuple(likelihoods.special_id if i in set(hidden) else t for i, t in enumerate(ids))
    return [Reading(masked, tuple((i, ids[i]) for i in hidden))]
