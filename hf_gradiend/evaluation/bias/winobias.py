"""WinoBias (Zhao et al., 2018): pronouns that go with or against an occupation's stereotype.

https://aclanthology.org/N18-2003. Sentences come in pairs that differ in the pronoun alone. A model
"answers" a pair by giving one of them the higher (pseudo-)log-likelihood. Score: accuracy on the
pro-stereotypical reading minus accuracy on the anti-stereotypical one, in percentage points; 0 is
ideal. In type 1 the pronoun must be resolved by world knowledge, in type 2 syntax suffices.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_gradiend.errors import DataError
from hf_gradiend.evaluation.bias.benchmark import (
    Benchmark,
    Columns,
    Item,
    Measure,
)
from hf_gradiend.evaluation.likelihoods import Likelihoods

TYPES = (1, 2)
PARTS = ("dev", "test")


class WinoBias(Benchmark):
    """WinoBias by likelihood.

    Values of an item: score of the pro- and of the anti-stereotypical sentence.
    """

    name = "winobias"
    paper = "Zhao et al. (2018), https://aclanthology.org/N18-2003"
    files: ClassVar = {
        "winobias/pro_stereotyped_type1.txt.dev": "dd55a0d220fe4c0ceb63dd4648223fb4fe1a58d5ad95c116a002ad24b0e292a5",
        "winobias/anti_stereotyped_type1.txt.dev": "a4e0ebae344e78b56f657a42e8ae684b9db7747d177c5e7149c0907ebb7f3bf6",
        "winobias/pro_stereotyped_type1.txt.test": "db7838907238a758eeb5779e48f38c013b892910d6fe864456c59f04245c6689",
        "winobias/anti_stereotyped_type1.txt.test": "331db5bd74bfefebf146a60b67645152a4a1991570d2a56f57154103ac361dd2",
        "winobias/pro_stereotyped_type2.txt.dev": "8f0250de723cea9328e3eaf7169e07936f01aa5909ce7aa580db66eb803f4e86",
        "winobias/anti_stereotyped_type2.txt.dev": "763ad829ad724f9a85ead689ba8ca69072020cb1238def6210f0fc6a47b97e59",
        "winobias/pro_stereotyped_type2.txt.test": "ea1c1fd94fa612e3cc44d7fa3cc4cb76021bb63fdf94f9826f430051e9052438",
        "winobias/anti_stereotyped_type2.txt.test": "336571ac1ea8c06cd2aba8e5dd2bd98e00acc0c48da3e4ec5ec7e54eb2633a8f",
    }
    measures = (
        Measure("gap", -100.0, 100.0, 0.0),
        Measure("gap_type1", -100.0, 100.0, 0.0),
        Measure("gap_type2", -100.0, 100.0, 0.0),
    )

    def load(self, folder: Path) -> list[dict[str, Any]]:
        """One item per pair: `pro`, `anti` and `type` (1 or 2).

        Raises:
            DataError: If the two files of a kind have different numbers of lines.
        """
        items: list[dict[str, Any]] = []
        for kind in TYPES:
            for part in PARTS:
                pro, anti = (
                    _sentences(folder / f"winobias/{side}_stereotyped_type{kind}.txt.{part}")
                    for side in ("pro", "anti")
                )
                if len(pro) != len(anti):
                    raise DataError(
                        f"Expected pairs in WinoBias' type {kind} {part}, but there are "
                        f"{len(pro)} sentences for and {len(anti)} against the stereotype."
                    )
                items += [
                    {"pro": one, "anti": other, "type": kind}
                    for one, other in zip(pro, anti, strict=True)
                ]
        return items

    def values(self, likelihoods: Likelihoods, items: Sequence[Item]) -> Tensor:
        """(Pseudo-)log-likelihoods of both sentences of each pair."""
        pairs = [(item["pro"], item["anti"]) for item in items]
        return likelihoods.sentence_scores(pairs, "WinoBias")

    def columns(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """`type`: 1 or 2."""
        return {"type": torch.tensor([item["type"] for item in items])}

    def scores(self, columns: Columns, values: Tensor) -> dict[str, float]:
        """Gap over all pairs and by type, in percentage points.

        Raises:
            ValueError: If there is no item of a type.
        """
        preferred = values[:, 0].sub(values[:, 1]).sign()  # +1 pro, −1 anti, 0 a tie
        found = {"gap": 100.0 * float(preferred.mean())}
        for kind in TYPES:
            of_kind = preferred[columns["type"] == kind]
            if not len(of_kind):
                raise ValueError(f"Expected at least one item of type {kind}.")
            found[f"gap_type{kind}"] = 100.0 * float(of_kind.mean())
        return found


def _sentences(file: Path) -> list[str]:
    """A file's sentences without line numbers and without the brackets around mentions."""
    lines = file.read_text("utf-8").splitlines()
    return [re.sub(r"[\[\]]", "", re.sub(r"^\d+ ", "", line)).strip() for line in lines if line]
