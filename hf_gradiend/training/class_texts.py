"""Texts of several classes, each tokenised and read once for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_gradiend.base_models import Objective
from hf_gradiend.data.collation import PreparedText, PreparedTexts, prepare_texts
from hf_gradiend.errors import DataError

Pattern = tuple[int, ...]  # numbers of the classes that a text belongs to


@dataclass(frozen=True)
class ClassTexts:
    """Texts with one word of every class, and the classes that each belongs to.

    Args:
        classes: Names of the classes.
        texts: Tokenised texts; reading k is that of class k's word.
        patterns: For each text the numbers of its classes.
    """

    classes: tuple[str, ...]
    texts: tuple[PreparedText, ...]
    patterns: tuple[Pattern, ...]

    def take(self, rows: Sequence[int]) -> "ClassTexts":
        """The texts of some rows."""
        return ClassTexts(
            self.classes,
            tuple(self.texts[row] for row in rows),
            tuple(self.patterns[row] for row in rows),
        )

    def counts(self) -> list[int]:
        """Number of texts of each class; a text of several classes counts for each."""
        return [sum(k in pattern for pattern in self.patterns) for k in range(len(self.classes))]

    def balanced(self, n_texts: int | None, seed: int) -> "ClassTexts":
        """At most about `n_texts`, drawn evenly from the classes; all of them for `None`."""
        if n_texts is None:
            return self
        wanted = max(1, n_texts // len(self.classes))
        counts, chosen = [0] * len(self.classes), []
        generator = torch.Generator().manual_seed(seed)
        for row in torch.randperm(len(self.texts), generator=generator).tolist():
            if any(counts[k] < wanted for k in self.patterns[row]):
                chosen.append(row)
                for k in self.patterns[row]:
                    counts[k] += 1
        return self.take(sorted(chosen))

    def split(self, fraction: float, seed: int) -> tuple["ClassTexts", "ClassTexts"]:
        """A first part and a second with this share of each pattern, at least one text in each.

        Raises:
            DataError: If there are fewer than two texts of some kind.
        """
        generator = torch.Generator().manual_seed(seed)
        second: set[int] = set()
        for pattern in sorted(set(self.patterns)):
            rows = [row for row, other in enumerate(self.patterns) if other == pattern]
            if len(rows) < 2:
                names = ", ".join(self.classes[k] for k in pattern)
                raise DataError(f"Expected at least two texts of {names} to train on, but got one.")
            size = min(max(1, round(fraction * len(rows))), len(rows) - 1)
            order = torch.randperm(len(rows), generator=generator)[:size]
            second |= {rows[i] for i in order}
        rows = range(len(self.texts))
        return self.take([r for r in rows if r not in second]), self.take(sorted(second))

    def prepared(self) -> PreparedTexts:
        """The same texts, numbered from 0."""
        return PreparedTexts.numbered(self.texts)


def class_texts(
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    objective: Objective,
    classes: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
) -> ClassTexts:
    """Texts of a feature data set with several classes, each read once for all of them.

    Args:
        dataset: Rows with `text`, `factual`, `counterfactual` and their classes: for each text one
            row per other class.
        processing_class: Tokenizer of the base model.
        objective: `"masked"` or `"causal"`.
        classes: The classes, in the order wanted; `None` for alphabetical order.
        max_length: Longest input in tokens; `None` for the model's limit, at most 256.

    Raises:
        DataError: If a text lacks the word of a class, or a class has no text.
    """
    names = tuple(classes or sorted(set(dataset["factual_class"])))
    words: dict[tuple[str, str, str], dict[str, str]] = {}
    columns = ("text", "factual_class", "factual", "counterfactual_class", "counterfactual")
    for text, own, word, other, against in zip(*(dataset[c] for c in columns), strict=True):
        words.setdefault((text, own, word), {own: word}).setdefault(other, against)
    for (text, _, _), found in words.items():
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(
                f"Expected for each text one row per other class, but {text[:60]!r} has no word of "
                f"{', '.join(missing)}. Build the data with every pair of classes."
            )
    wanted = {key: found for key, found in words.items() if key[1] in names}
    rows = [{"text": key[0], **found} for key, found in wanted.items()]
    prepared = prepare_texts(rows, processing_class, objective, words=names, max_length=max_length)
    labels = [names.index(key[1]) for key in wanted]
    patterns: dict[tuple, set[int]] = {}
    first: dict[tuple, PreparedText] = {}
    for text in prepared:
        first.setdefault(text.readings, text)
        patterns.setdefault(text.readings, set()).add(labels[text.index])
    absent = [name for k, name in enumerate(names) if not any(k in p for p in patterns.values())]
    if absent:
        raise DataError(f"Expected texts of every class, but got none of {', '.join(absent)}.")
    return ClassTexts(
        names, tuple(first.values()), tuple(tuple(sorted(patterns[key])) for key in first)
    )
