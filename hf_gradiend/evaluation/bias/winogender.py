"""Winogender (Rudinger et al., 2018) against labour statistics: who is "she" at work?

https://aclanthology.org/N18-2002. Of the sentences whose pronoun stands for the occupation, the
share of she is P(she) / (P(she) + P(he)), by (pseudo-)likelihood of the whole sentence. Scores: its
Pearson correlation over occupations with the share of women in the occupation (US Bureau of
Labor Statistics), and the root mean square error against it.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_gradiend.evaluation.bias.benchmark import (
    Benchmark,
    Columns,
    Item,
    Measure,
    codes,
)
from hf_gradiend.evaluation.likelihoods import Likelihoods
from hf_gradiend.metrics import pearson_correlation


class Winogender(Benchmark):
    """Winogender by likelihood.

    Values of an item: score of the sentence with she and of the one with he.
    """

    name = "winogender"
    paper = "Rudinger et al. (2018), https://aclanthology.org/N18-2002"
    files: ClassVar = {
        "winogender_sentences.tsv": "bd69da16bf228cb8df63fd0843aec2d8b5c36a7f21bf8c7b168bcc83932556c8",
        "winogender_occupations.tsv": "3f7f37c16381a70571356982ea7fe613ac700ad04a6d3b19b9f2be18248df567",
    }
    measures = (
        Measure("correlation", -1.0, 1.0, 0.0),
        Measure("rmse", 0.0, 1.0, None),
        Measure("share_of_she", 0.0, 1.0, None),
    )

    def load(self, folder: Path) -> list[dict[str, Any]]:
        """One item per sentence about an occupation: `she`, `he`, `occupation`, `labour_share`."""
        shares = {
            row["occupation"]: float(row["bls_pct_female"]) / 100.0
            for row in _rows(folder / "winogender_occupations.tsv")
        }
        sentences = {
            row["sentid"]: row["sentence"] for row in _rows(folder / "winogender_sentences.tsv")
        }
        items: list[dict[str, Any]] = []
        for name, sentence in sentences.items():
            occupation, _, answer, gender, _ = name.split(".")
            if answer == "0" and gender == "female":  # 0: the pronoun stands for the occupation
                items.append(
                    {
                        "she": sentence,
                        "he": sentences[name.replace(".female.", ".male.")],
                        "occupation": occupation,
                        "labour_share": shares[occupation],
                    }
                )
        return items

    def values(self, likelihoods: Likelihoods, items: Sequence[Item]) -> Tensor:
        """(Pseudo-)log-likelihoods of both sentences of each pair."""
        pairs = [(item["she"], item["he"]) for item in items]
        return likelihoods.sentence_scores(pairs, "Winogender")

    def columns(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """`occupation`: its number; `labour_share`: share of women in it."""
        return {
            "occupation": codes([item["occupation"] for item in items]),
            "labour_share": torch.tensor(
                [item["labour_share"] for item in items], dtype=torch.float64
            ),
        }

    def scores(self, columns: Columns, values: Tensor) -> dict[str, float]:
        """Correlation with and distance from labour statistics, and the mean share of she."""
        shares = torch.sigmoid(values[:, 0] - values[:, 1])
        _, occupation = columns["occupation"].unique(return_inverse=True)
        n = occupation.bincount()
        said = occupation.bincount(shares) / n
        actual = occupation.bincount(columns["labour_share"]) / n
        return {
            "correlation": pearson_correlation(said, actual),
            "rmse": float((said - actual).square().mean().sqrt()),
            "share_of_she": float(said.mean()),
        }


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened, delimiter="\t"))
