"""What every benchmark is: items from a file, values of a model per item, scores of the values."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_gradiend.errors import ConfigError, DataError
from hf_gradiend.evaluation.likelihoods import Likelihoods
from hf_gradiend.metrics import Estimate, bootstrap_all

Item = Mapping[str, Any]
Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measure:
    """One number of a benchmark.

    Args:
        name: Its name.
        low: Smallest value it can take.
        high: Largest value.
        better: `"high"`, `"low"`, a number that is ideal, or `None` where neither side is better.
    """

    name: str
    low: float
    high: float
    better: Literal["high", "low"] | float | None

    def distance(self, value: float) -> float | None:
        """How far a value is from the best one; `None` where there is no best."""
        if self.better is None:
            return None
        if self.better == "high":
            return self.high - value
        return value - self.low if self.better == "low" else abs(value - float(self.better))


class Benchmark(ABC):
    """A benchmark for masked and causal language models.

    A subclass names its paper, files and measures, and says how items are loaded, valued and
    scored. Scoring is a pure function of the items' values, so that intervals are resamples.

    Args:
        variant: One of `variants`; `None` for the usual form.

    Raises:
        ConfigError: If there is no such variant.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    files: ClassVar[Mapping[str, str]]  # file name → SHA-256 of the published file
    measures: ClassVar[tuple[Measure, ...]]
    variants: ClassVar[tuple[str, ...]] = ()
    divisible: ClassVar[bool] = True  # whether a part of the items is a smaller benchmark

    def __init__(self, variant: str | None = None) -> None:
        if variant is not None and variant not in self.variants:
            raise ConfigError(
                f"Expected {self.name} alone or with one of {', '.join(self.variants) or 'nothing'}"
                f" after a colon, but got {variant!r}."
            )
        self.variant = variant

    @property
    def title(self) -> str:
        """Its name, with the variant: `"stereoset:gender"`."""
        return self.name if self.variant is None else f"{self.name}:{self.variant}"

    @abstractmethod
    def load(self, folder: Path) -> list[dict[str, Any]]:
        """The items, from a folder with the benchmark's files."""

    @abstractmethod
    def values(self, likelihoods: Likelihoods, items: Sequence[Item]) -> Tensor:
        """What the model says of each item, float64 `(items, k)`."""

    def parts(self, items: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The items in the parts that a limit takes or leaves as a whole."""
        return [[item] for item in items]

    def columns(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """What the scores need to know of the items, one number per item and column."""
        del items
        return {}

    @abstractmethod
    def scores(self, columns: Columns, values: Tensor) -> dict[str, float]:
        """The measures of items with their values: a pure function of both.

        Args:
            columns: As `columns` gives them, each `(items,)`.
            values: `(items, k)` as `values` gives them.

        Raises:
            ValueError: If the measures are not defined for these items.
        """

    def facts(self, columns: Columns, values: Tensor) -> dict[str, float]:
        """Numbers beside the measures, which have no interval."""
        del columns, values
        return {}


@dataclass(frozen=True, eq=False)
class BenchmarkResult:
    """What one model did on one benchmark.

    Args:
        benchmark: The benchmark.
        columns: What its scores need to know of the items.
        values: What the model said of each, `(items, k)`.
        items_digest: Hash of the items, by which two results are known to be of the same.
    """

    benchmark: Benchmark
    columns: Columns
    values: Tensor
    items_digest: str = ""

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.values)

    def score(self, rows: Tensor | None = None) -> dict[str, float]:
        """The measures of all items, or of a resample of them."""
        if rows is None:
            return self.benchmark.scores(self.columns, self.values)
        columns = {name: column[rows] for name, column in self.columns.items()}
        return self.benchmark.scores(columns, self.values[rows])

    def estimates(self) -> dict[str, Estimate]:
        """Each measure with its 95 % bootstrap interval over items."""
        return bootstrap_all(self.score, self.n)


def codes(labels: Sequence[object], names: Sequence[object] | None = None) -> Tensor:
    """Labels as numbers, int64 `(n,)`: places in `names`, or in the order of appearance."""
    known = {name: i for i, name in enumerate(dict.fromkeys(labels) if names is None else names)}
    return torch.tensor([known[label] for label in labels])


def checked_files(benchmark: Benchmark, folder: str | os.PathLike[str]) -> Path:
    """A folder that holds a benchmark's files as they were published.

    Raises:
        DataError: If a file is missing, or its SHA-256 is another.
    """
    place = Path(folder)
    for name, expected in benchmark.files.items():
        file = place / name
        if not file.is_file():
            raise DataError(
                f"Expected {name} of {benchmark.name} in {str(place)!r}, but there is none. "
                f"It is published with {benchmark.paper}."
            )
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise DataError(
                f"Expected {name} of {benchmark.name} with SHA-256 {expected[:16]}…, but "
                f"{str(file)!r} has {found[:16]}…. Numbers of another version would not compare."
            )
    return place


def as_values(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of numbers as float64 `(items, k)`."""
    return torch.tensor(rows, dtype=torch.float64)
