"""What a GRADIEND of several classes tells apart: two of them, or one and the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from datasets import Dataset


@dataclass(frozen=True)
class Side:
    """One side of a contrast: a class, or several taken together.

    Args:
        name: Its name.
        classes: Numbers of its classes.
        labels: Their names.
    """

    name: str
    classes: tuple[int, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Contrast:
    """What one GRADIEND tells apart.

    Args:
        positive: What encodes to +1.
        negative: What encodes to −1.
    """

    positive: Side
    negative: Side

    @property
    def name(self) -> str:
        """For folders and tables: `"christian-jewish"`."""
        return f"{self.positive.name}-{self.negative.name}"


def all_pairs(classes: Sequence[str]) -> list[Contrast]:
    """Every pair of classes, in order.

    Args:
        classes: Names of the classes.
    """
    sides = [Side(name, (k,), (name,)) for k, name in enumerate(classes)]
    return [Contrast(one, other) for one, other in combinations(sides, 2)]


def one_against_rest(classes: Sequence[str]) -> list[Contrast]:
    """Each class against all the others together.

    Args:
        classes: Names of the classes.
    """
    contrasts: list[Contrast] = []
    for k, name in enumerate(classes):
        others = tuple(other for other in range(len(classes)) if other != k)
        rest = Side("rest", others, tuple(classes[other] for other in others))
        contrasts.append(Contrast(Side(name, (k,), (name,)), rest))
    return contrasts


def rows_of(contrast: Contrast, dataset: Dataset) -> Dataset:
    """The rows that a contrast is about, under the names of its two sides; each text once.

    Args:
        contrast: What is told apart.
        dataset: Feature data set with several classes.
    """
    side_of = {label: s.name for s in (contrast.positive, contrast.negative) for label in s.labels}
    classes = zip(dataset["factual_class"], dataset["counterfactual_class"], strict=True)
    texts = zip(dataset["text"], dataset["factual"], strict=True)
    seen: set[tuple[str, str]] = set()
    chosen: list[int] = []
    for row, ((own, other), text) in enumerate(zip(classes, texts, strict=True)):
        of_two_sides = {own, other} <= side_of.keys() and side_of[own] != side_of[other]
        if of_two_sides and text not in seen:
            chosen.append(row)
            seen.add(text)
    rows = dataset.select(chosen)
    for column in ("factual_class", "counterfactual_class"):
        named = [side_of[label] for label in rows[column]]
        rows = rows.remove_columns(column).add_column(column, named)  # pyright: ignore[reportCallIssue] - datasets fills the fingerprint in
    return rows
