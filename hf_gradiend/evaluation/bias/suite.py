"""Several benchmarks on several models, and what can be told from them."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.adapter.values import LAYER_NAME
from hf_gradiend.base_models import objective_of
from hf_gradiend.edits import bit_sum
from hf_gradiend.errors import BaseModelError, ConfigError, DataError
from hf_gradiend.evaluation.bias.bec_pro import BecPro
from hf_gradiend.evaluation.bias.benchmark import (
    Benchmark,
    BenchmarkResult,
    Measure,
    checked_files,
)
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.bias.seat import Seat
from hf_gradiend.evaluation.bias.stereoset import StereoSet
from hf_gradiend.evaluation.bias.wikitext import WikiText2
from hf_gradiend.evaluation.bias.winobias import WinoBias
from hf_gradiend.evaluation.bias.winogender import Winogender
from hf_gradiend.metrics import Estimate, bootstrap_all

BENCHMARKS: Mapping[str, type[Benchmark]] = {
    kind.name: kind
    for kind in (StereoSet, CrowsPairs, WinoBias, Winogender, BecPro, Seat, WikiText2)
}
Verdict = Literal["better", "worse", "cannot be told", "neither is better"]


def benchmarks_named(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name.

    Raises:
        ConfigError: If a name is unknown, or there is none.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise ConfigError(
            f"Expected benchmarks of {', '.join(BENCHMARKS)}, but got "
            f"{', '.join(map(repr, unknown)) or 'none'}."
        )
    return [BENCHMARKS[name]() for name in dict.fromkeys(names)]


def run_benchmark(
    benchmark: Benchmark,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data_dir: str | os.PathLike[str],
    *,
    limit: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> BenchmarkResult:
    """What a model says of a benchmark's items.

    Args:
        benchmark: The benchmark.
        model: Masked or causal language model with its head; left as it was.
        tokenizer: Its tokenizer.
        data_dir: Folder with the benchmark's files, or one with such a folder in it.
        limit: Number of items, evenly spread, for a quick look; `None` for all, and SEAT always
            takes all.
        cache_dir: Where to keep values; a model of the same bits is not asked again.
        progress: Show progress bars.

    Raises:
        BaseModelError: If the benchmark is not made for such models.
        DataError: If a file is missing or another one than was published.
        NumericalError: If the model gives NaN.
    """  # noqa: DOC502 - DataError and NumericalError are raised by what it calls
    objective = objective_of(model)
    if objective not in benchmark.objectives:
        raise BaseModelError(
            f"Expected a {' or '.join(benchmark.objectives)} language model for {benchmark.name}, "
            f"but {type(model).__name__} is {objective}."
        )
    items = benchmark.load(_folder_of(benchmark, data_dir))
    if limit is not None and benchmark.divisible:
        items = items[:: max(1, len(items) // max(limit, 1))][:limit]
    if not items:
        raise DataError(f"Expected items of {benchmark.name}, but there is none.")
    columns = benchmark.columns(items)
    file = None
    if cache_dir is not None:
        key = hashlib.sha256(
            repr((benchmark.name, vars(benchmark), items, fingerprint(model))).encode()
        )
        file = Path(cache_dir) / f"{benchmark.name}-{key.hexdigest()[:24]}.safetensors"
    values = None if file is None else _cached(file)
    if values is None:
        values = benchmark.values(model, tokenizer, items, progress=progress)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"values": values}, f"{file}.partial")
            Path(f"{file}.partial").replace(file)
    result = BenchmarkResult(benchmark, columns, values)
    try:
        result.score()
    except ValueError as error:
        raise DataError(
            f"Expected more items of {benchmark.name} than {len(items)}: {error} Raise the limit."
        ) from error
    return result


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and bits of a model's weights, as they stand now.

    The values of a GRADIEND adapter are left out: they act through the weights.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        if LAYER_NAME in name.split("."):
            continue
        facts = (name, tuple(parameter.shape), str(parameter.dtype), int(bit_sum(parameter)))
        digest.update(repr(facts).encode())
    return digest.hexdigest()


def compared(before: BenchmarkResult, after: BenchmarkResult) -> list[dict[str, object]]:
    """One row per measure: both models with 95 % intervals, the change, and what can be told.

    The change is resampled by item, the same items for both models. A change of the distance from
    the best value whose interval leaves out 0 is told; others are not.

    Args:
        before: What one model said.
        after: What another said of the same items.

    Raises:
        ConfigError: If the two are of different items.
    """
    if before.n != after.n or before.benchmark.name != after.benchmark.name:
        raise ConfigError(
            f"Expected two results of the same items, but got {before.n} of "
            f"{before.benchmark.name} and {after.n} of {after.benchmark.name}."
        )
    measures = before.benchmark.measures

    def changes(rows: Tensor) -> dict[str, float]:
        first, second = before.score(rows), after.score(rows)
        found = {f"change {m.name}": second[m.name] - first[m.name] for m in measures}
        for measure in measures:
            was, is_now = (
                measure.distance(first[measure.name]),
                measure.distance(second[measure.name]),
            )
            if was is not None and is_now is not None:
                found[f"distance {measure.name}"] = is_now - was
        return found

    estimates = bootstrap_all(changes, before.n)
    first, second = before.estimates(), after.estimates()
    return [
        {
            "benchmark": before.benchmark.name,
            "measure": measure.name,
            "best": measure.better,
            "before": asdict(first[measure.name]),
            "after": asdict(second[measure.name]),
            "change": asdict(estimates[f"change {measure.name}"]),
            "verdict": _verdict(measure, estimates.get(f"distance {measure.name}")),
        }
        for measure in measures
    ]


def _verdict(measure: Measure, distance: Estimate | None) -> Verdict:
    if distance is None or measure.better is None:
        return "neither is better"
    if distance.high < 0.0:
        return "better"
    return "worse" if distance.low > 0.0 else "cannot be told"


def _folder_of(benchmark: Benchmark, data_dir: str | os.PathLike[str]) -> Path:
    """The folder itself, or the one below it that has the benchmark's files."""
    place = Path(data_dir)
    first = next(iter(benchmark.files), None)
    inside = [place, *(sub for sub in sorted(place.glob("*")) if sub.is_dir())]
    found = next((sub for sub in inside if first is None or (sub / first).is_file()), place)
    return checked_files(benchmark, found)


def _cached(file: Path) -> Tensor | None:
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor("values")
    except (OSError, SafetensorError):
        return None
