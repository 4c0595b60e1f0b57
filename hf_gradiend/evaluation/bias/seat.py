"""SEAT (May et al., 2019): association of words in sentence embeddings, after WEAT.

https://aclanthology.org/N19-1063; word lists of WEAT 6, 7 and 8 (Caliskan et al., 2017,
https://doi.org/10.1126/science.aal4230), "b" with terms in place of names and the other way round.
Words stand in sentences that say nothing else ("This is math."). With s(w, A, B) = mean cos(w, a) −
mean cos(w, b), the effect size is d = (mean over X of s − mean over Y of s) / standard deviation
over X ∪ Y (ddof 1); 0 is ideal. p is the share of random splits of X ∪ Y with a larger difference.
"""

import itertools
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_gradiend.base_models import evaluation_mode, pad_token_id_of
from hf_gradiend.data.collation import pad_rows
from hf_gradiend.errors import NumericalError
from hf_gradiend.evaluation.bias.benchmark import Benchmark, Columns, Item, Measure
from hf_gradiend.evaluation.likelihoods import Likelihoods

TESTS = ("6", "6b", "7", "7b", "8", "8b")
ROLES = ("X", "Y", "A", "B")
N_PERMUTATIONS = 10_000


class Seat(Benchmark):
    """SEAT 6 to 8b.

    Values of an item: its embedding, normalised: the mean of the last hidden states, in the variant
    `word` of the states of the word's own tokens.
    """

    name = "seat"
    paper = "May et al. (2019), https://aclanthology.org/N19-1063"
    files: ClassVar = {}
    divisible = False  # a test needs its four lists
    variants = ("word",)
    measures = tuple(Measure(f"d_{test}", -2.0, 2.0, 0.0) for test in TESTS)

    def load(self, folder: Path) -> list[dict[str, Any]]:
        """One item per sentence: `sentence`, `word` and its `start`, `test`, `role` (X to B)."""
        del folder  # the lists ship with the package
        file = resources.files("hf_gradiend.data") / "resources" / "weat.json"
        lists = json.loads(file.read_text("utf-8"))
        return [
            {
                "sentence": template.format(word), "word": word, "start": template.index("{}"),
                "test": test, "role": role,
            }
            for test in TESTS
            for role in ROLES
            for word in lists["words"][lists["tests"][test][role]]
            for template in lists["templates"]
        ]  # fmt: skip

    @torch.no_grad()
    def values(self, likelihoods: Likelihoods, items: Sequence[Item]) -> Tensor:
        """Normalised embeddings, `(items, hidden size)`.

        Raises:
            NumericalError: If a hidden state is NaN.
        """
        model, tokenizer = likelihoods.model, likelihoods.tokenizer
        sentences = list(dict.fromkeys(item["sentence"] for item in items))
        words = {item["sentence"]: (item["start"], item["word"]) for item in items}
        found: dict[str, Tensor] = {}
        pad = pad_token_id_of(tokenizer)
        with evaluation_mode(model):
            for start in range(0, len(sentences), 64):
                batch = sentences[start : start + 64]
                encoded = [tokenizer(text, return_offsets_mapping=True) for text in batch]
                ids, mask = pad_rows([one["input_ids"] for one in encoded], pad)
                states = model.base_model(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
                ).last_hidden_state.float()
                for row, (text, one) in enumerate(zip(batch, encoded, strict=True)):
                    places = self._places(*words[text], one["offset_mapping"])
                    vector = states[row, places].mean(0)
                    if not bool(torch.isfinite(vector).all()):
                        raise NumericalError(
                            "Expected finite hidden states, but got NaN. Is the model broken?"
                        )
                    found[text] = (vector / vector.norm()).double().cpu()
        return torch.stack([found[item["sentence"]] for item in items])

    def _places(self, start: int, word: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
        if self.variant is None:
            return list(range(len(offsets)))
        stop = start + len(word)
        return [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]

    def columns(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """`list`: four times the place in TESTS plus the place in ROLES."""
        lists = [4 * TESTS.index(item["test"]) + ROLES.index(item["role"]) for item in items]
        return {"list": torch.tensor(lists)}

    def scores(self, columns: Columns, values: Tensor) -> dict[str, float]:
        """Effect size of each test."""
        return {f"d_{test}": effect_size(*lists) for test, lists in _lists(columns, values)}

    def facts(self, columns: Columns, values: Tensor) -> dict[str, float]:
        """One-sided permutation p of each test."""
        return {f"p_{test}": permutation_p(*lists) for test, lists in _lists(columns, values)}


def _lists(columns: Columns, values: Tensor) -> list[tuple[str, list[Tensor]]]:
    """X, Y, A and B of each test.

    Raises:
        ValueError: If a list has no sentence.
    """
    found: list[tuple[str, list[Tensor]]] = []
    for number, test in enumerate(TESTS):
        lists = [values[columns["list"] == 4 * number + role] for role in range(4)]
        if not all(map(len, lists)):
            raise ValueError(f"Expected sentences of all four lists of test {test}.")
        found.append((test, lists))
    return found


def associations(words: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """s(w, A, B) of unit vectors `(words, d)`, `(words,)`, in [−2, 2]."""
    return words @ (a.mean(0) - b.mean(0))  # the mean of cosines is the cosine part of the mean


def effect_size(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> float:
    """WEAT's d of unit vectors, each `(words, d)`.

    Raises:
        ValueError: If all associations are the same.
    """
    of_x, of_y = associations(x, a, b), associations(y, a, b)
    spread = float(torch.cat([of_x, of_y]).std(correction=1))
    if spread == 0.0:
        raise ValueError("Expected associations that differ.")
    return float(of_x.mean() - of_y.mean()) / spread


def permutation_p(x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, seed: int = 0) -> float:
    """Share of the equal splits of X ∪ Y whose difference is larger than that of X and Y.

    All splits where there are at most 10,000, otherwise 10,000 random ones.
    """
    s = torch.cat([associations(x, a, b), associations(y, a, b)])
    n, k = len(s), len(x)
    observed = float(s[:k].sum())  # the difference grows with the sum over X alone
    if math.comb(n, k) <= N_PERMUTATIONS:
        sums = torch.stack([s[list(split)].sum() for split in itertools.combinations(range(n), k)])
        return float((sums > observed + 1e-12).double().mean())
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(N_PERMUTATIONS, n, generator=generator).argsort(1)[:, :k]
    larger = int((s[order].sum(1) > observed).sum())
    return (larger + 1) / (N_PERMUTATIONS + 1)
