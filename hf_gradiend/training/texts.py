"""Which texts a step sees: labelled, balanced, and in an order that a step number alone decides."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset

from hf_gradiend.data.collation import PreparedText, PreparedTexts
from hf_gradiend.errors import DataError


@dataclass(frozen=True)
class LabelledTexts:
    """Tokenised texts with the sign of their factual class.

    Args:
        texts: Tokenised texts.
        signs: +1 or −1 for each of them.
    """

    texts: tuple[PreparedText, ...]
    signs: tuple[int, ...]

    def of_sign(self, sign: int) -> list[PreparedText]:
        """The texts of one class, in order."""
        return [t for t, s in zip(self.texts, self.signs, strict=True) if s == sign]

    def balanced(self, n_texts: int | None, seed: int) -> "LabelledTexts":
        """At most `n_texts` texts, drawn evenly from both classes; all of them for `None`."""
        if n_texts is None or n_texts >= len(self.texts):
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen: list[int] = []
        for sign in (+1, -1):
            rows = [row for row, s in enumerate(self.signs) if s == sign]
            order = torch.randperm(len(rows), generator=generator)[: max(1, n_texts // 2)]
            chosen += [rows[i] for i in order]
        return self.take(sorted(chosen))

    def split(self, fraction: float, seed: int) -> tuple["LabelledTexts", "LabelledTexts"]:
        """A first part and a second with this share of each class, at least one text in each.

        Raises:
            DataError: If a class has fewer than two texts.
        """
        generator = torch.Generator().manual_seed(seed)
        second: set[int] = set()
        for sign in (+1, -1):
            rows = [row for row, s in enumerate(self.signs) if s == sign]
            if len(rows) < 2:
                raise DataError(
                    f"Expected at least two texts of each class to train on, but one class has "
                    f"{len(rows)}."
                )
            size = min(max(1, round(fraction * len(rows))), len(rows) - 1)
            order = torch.randperm(len(rows), generator=generator)[:size]
            second |= {rows[i] for i in order}
        rows = range(len(self.texts))
        return self.take([r for r in rows if r not in second]), self.take(sorted(second))

    def prepared(self) -> PreparedTexts:
        """The same texts, numbered from 0, as a data set of their own."""
        return PreparedTexts.numbered(self.texts)

    def take(self, rows: Sequence[int]) -> "LabelledTexts":
        """The texts of some rows."""
        return LabelledTexts(
            tuple(self.texts[row] for row in rows), tuple(self.signs[row] for row in rows)
        )


@dataclass(frozen=True)
class ClassBatch:
    """Texts that all carry one class.

    Args:
        texts: Tokenised texts.
        sign: +1 or −1.
    """

    texts: tuple[PreparedText, ...]
    sign: int


def label_texts(texts: PreparedTexts, dataset: Dataset, classes: Sequence[str]) -> LabelledTexts:
    """Sign of each tokenised text's factual class.

    Args:
        texts: Tokenised rows of the data set.
        dataset: The data set, with `factual_class`.
        classes: The class that encodes to +1, and the other.

    Raises:
        DataError: If a class is not one of the two, or one of them has no text.
    """
    sign_of = {classes[0]: +1, classes[1]: -1}
    factual = dataset["factual_class"]
    labels = [factual[text.index] for text in texts]
    counts = Counter(labels)
    if counts.keys() != sign_of.keys():
        raise DataError(
            f"Expected texts of the classes {classes[0]!r} and {classes[1]!r}, but got "
            f"{dict(counts)}."
        )
    return LabelledTexts(texts.texts, tuple(sign_of[label] for label in labels))


def one_pass(texts: LabelledTexts, batch_size: int) -> list[ClassBatch]:
    """Every text once, in class-pure batches of similar length, the longest first."""
    batches: list[ClassBatch] = []
    for sign in (+1, -1):
        ordered = sorted(texts.of_sign(sign), key=lambda text: -text.length)
        for start in range(0, len(ordered), batch_size):
            batches.append(ClassBatch(tuple(ordered[start : start + batch_size]), sign))
    return sorted(batches, key=lambda batch: -batch.texts[0].length)


def batch_at(
    texts: Mapping[int, Sequence[PreparedText]], step: int, size: int, seed: int
) -> ClassBatch:
    """The batch of a training step: classes alternate, each shuffled anew whenever it is used up.

    A pure function of its arguments, so that a resumed run sees what the uninterrupted one would
    have.

    Args:
        texts: Texts of each sign.
        step: Step number from 0.
        size: Texts per batch; never more than the class has.
        seed: Seed of the order.
    """
    sign = +1 if step % 2 == 0 else -1
    own = texts[sign]
    size = min(size, len(own))
    per_epoch = len(own) // size
    epoch, number = divmod(step // 2, per_epoch)
    generator = torch.Generator().manual_seed(hash((seed, epoch, sign)) % 2**63)
    order = torch.randperm(len(own), generator=generator)
    chosen = order[number * size : (number + 1) * size].tolist()
    return ClassBatch(tuple(own[i] for i in chosen), sign)
