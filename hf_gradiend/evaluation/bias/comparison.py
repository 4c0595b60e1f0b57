"""What can be told from benchmarks that several models were put through."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Literal, TypedDict

import torch
from torch import Tensor

from hf_gradiend.errors import ConfigError
from hf_gradiend.evaluation.bias.benchmark import BenchmarkResult, Measure
from hf_gradiend.metrics import Estimate, bootstrap_all
from hf_gradiend.version import versions

Verdict = Literal["better", "worse", "cannot be told", "neither is better"]
VERDICTS: tuple[Verdict, ...] = ("better", "worse", "cannot be told", "neither is better")
Score = Callable[[Tensor], Mapping[str, float]]


class Row(TypedDict):
    """One measure of two models, as JSON values; each estimate has value, low, high and n."""

    benchmark: str
    measure: str
    best: Literal["high", "low"] | float | None
    before: dict[str, float]
    after: dict[str, float]
    change: dict[str, float]
    verdict: Verdict


def compared(before: BenchmarkResult, after: BenchmarkResult) -> list[Row]:
    """One row per measure: both models with 95 % intervals, the change, and what can be told.

    The change is resampled by item, the same items for both models. A change of the distance from
    the best value whose interval leaves out 0 is told; others are not.

    Args:
        before: What one model said.
        after: What another said of the same items.

    Raises:
        ConfigError: If the two are of different items.
    """
    if not _same_items(before, after):
        raise ConfigError(
            f"Expected two results of the same items, but got {before.n} of "
            f"{before.benchmark.title} and {after.n} of {after.benchmark.title}."
        )
    one = before.benchmark
    return compared_scores(one.title, one.measures, before.score, after.score, before.n)


def compared_scores(
    title: str, measures: Sequence[Measure], before: Score, after: Score, n: int
) -> list[Row]:
    """One row per measure, as `compared` gives them, of any two scores of the same items.

    Args:
        title: What was measured.
        measures: Its measures.
        before: From item numbers of shape `(n,)` to one model's measures by name.
        after: The same of the other model.
        n: Number of items.
    """

    def changes(rows: Tensor) -> dict[str, float]:
        first, second = before(rows), after(rows)
        found: dict[str, float] = {}
        for measure in measures:
            name = measure.name
            found[f"before {name}"], found[f"after {name}"] = first[name], second[name]
            found[f"change {name}"] = second[name] - first[name]
            was, is_now = measure.distance(first[name]), measure.distance(second[name])
            if was is not None and is_now is not None:
                found[f"distance {name}"] = is_now - was
        return found

    estimates = bootstrap_all(changes, n)
    return [
        {
            "benchmark": title,
            "measure": measure.name,
            "best": measure.better,
            "before": asdict(estimates[f"before {measure.name}"]),
            "after": asdict(estimates[f"after {measure.name}"]),
            "change": asdict(estimates[f"change {measure.name}"]),
            "verdict": verdict_of(measure, estimates.get(f"distance {measure.name}")),
        }
        for measure in measures
    ]


def _same_items(one: BenchmarkResult, other: BenchmarkResult) -> bool:
    facts = [(r.benchmark.title, r.n, r.items_digest, r.columns.keys()) for r in (one, other)]
    return facts[0] == facts[1] and all(
        torch.equal(column, other.columns[name]) for name, column in one.columns.items()
    )


def verdict_of(measure: Measure, distance: Estimate | None) -> Verdict:
    """What can be told from the change of the distance to the best value, with its interval.

    Args:
        measure: The measure, with its best value.
        distance: The change; `None` where there is no best value.
    """
    if distance is None or measure.better is None:
        return "neither is better"
    if distance.high < 0.0:
        return "better"
    return "worse" if distance.low > 0.0 else "cannot be told"


def comparison_report(
    base_model: str,
    base: Sequence[BenchmarkResult],
    edited: Mapping[str, Sequence[BenchmarkResult]],
    *,
    limit: int | None = None,
) -> dict[str, object]:
    """evaluation.json: all numbers of a base model and of edited ones, as JSON values.

    Args:
        base_model: The base model's name for people.
        base: Its results.
        edited: Results of the same benchmarks, by a label for people.
        limit: Largest number of items of each benchmark, if not all.
    """
    return {
        "format": 1,
        "versions": versions(),
        "base_model": base_model,
        "limit": limit,
        "papers": {result.benchmark.name: result.benchmark.paper for result in base},
        "base": {
            result.benchmark.title: {
                name: asdict(estimate) for name, estimate in result.estimates().items()
            }
            for result in base
        },
        "facts": _facts(base),
        "edited": [_edited(label, base, results) for label, results in edited.items()],
    }


def _edited(
    label: str, base: Sequence[BenchmarkResult], results: Sequence[BenchmarkResult]
) -> dict[str, object]:
    pairs = zip(base, results, strict=True)
    rows = [row for one, other in pairs for row in compared(one, other)]
    return {"label": label, "rows": rows, "told": told(rows), "facts": _facts(results)}


def _facts(results: Sequence[BenchmarkResult]) -> dict[str, dict[str, float]]:
    found = {r.benchmark.title: r.benchmark.facts(r.columns, r.values) for r in results}
    return {title: facts for title, facts in found.items() if facts}


def told(rows: Sequence[Row]) -> list[str]:
    """What got better, worse, or cannot be told: one line each, for people."""
    lines: list[str] = []
    for verdict in VERDICTS[:3]:
        names = [
            f"{row['benchmark']} {row['measure']}" for row in rows if row["verdict"] == verdict
        ]
        lines.append(f"{verdict.capitalize()}: {', '.join(names) or 'nothing'}.")
    return lines
