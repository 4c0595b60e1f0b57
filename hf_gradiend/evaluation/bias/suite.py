"""Benchmarks by name, run on a model."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_gradiend.adapter.values import LAYER_NAME
from hf_gradiend.errors import ConfigError, DataError, first_line_of
from hf_gradiend.evaluation.bias.bec_pro import BecPro
from hf_gradiend.evaluation.bias.benchmark import (
    Benchmark,
    BenchmarkResult,
    checked_files,
)
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.bias.seat import Seat
from hf_gradiend.evaluation.bias.stereoset import StereoSet
from hf_gradiend.evaluation.bias.wikitext import WikiText2
from hf_gradiend.evaluation.bias.winobias import WinoBias
from hf_gradiend.evaluation.bias.winogender import Winogender
from hf_gradiend.evaluation.likelihoods import Likelihoods
from hf_gradiend.version import __version__

BENCHMARKS: Mapping[str, type[Benchmark]] = {
    kind.name: kind
    for kind in (StereoSet, CrowsPairs, WinoBias, Winogender, BecPro, Seat, WikiText2)
}


def benchmarks_named(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name, such as `"stereoset"`, or with a variant, `"stereoset:gender"`.

    Raises:
        ConfigError: If a name or variant is unknown, or there is none.
    """
    unknown = [name for name in names if name.partition(":")[0] not in BENCHMARKS]
    if unknown or not names:
        raise ConfigError(
            f"Expected benchmarks of {', '.join(BENCHMARKS)}, but got "
            f"{', '.join(map(repr, unknown)) or 'none'}."
        )
    parts = [name.partition(":") for name in dict.fromkeys(names)]
    return [BENCHMARKS[name](variant if colon else None) for name, colon, variant in parts]


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
        data_dir: Folder with the benchmark's files, or one with such a folder in it; or the Hub id
            of a data set with the files as they were published.
        limit: Number of items, evenly spread, for a quick look; `None` for all, and SEAT always
            takes all.
        cache_dir: Where to keep values; a model of the same bits is not asked again.
        progress: Show progress bars.

    Raises:
        BaseModelError: If the model has no language-model head.
        DataError: If a file is missing or another one than was published.
        NumericalError: If the model gives NaN.
    """  # noqa: DOC502 - the others are raised by what it calls
    likelihoods = Likelihoods(model, tokenizer, progress=progress)
    items = limited(benchmark, benchmark.load(folder_of(benchmark, data_dir)), limit)
    if not items:
        raise DataError(f"Expected items of {benchmark.title}, but there is none.")
    columns, digest = benchmark.columns(items), _digest(items)
    file = None
    if cache_dir is not None:
        key = _digest(benchmark.title, digest, fingerprint(model), _settings_of(model, tokenizer))
        file = Path(cache_dir) / f"{benchmark.title.replace(':', '-')}-{key[:24]}.safetensors"
    values = None if file is None else _cached(file)
    if values is None:
        values = benchmark.values(likelihoods, items)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"values": values}, f"{file}.partial")
            Path(f"{file}.partial").replace(file)
    result = BenchmarkResult(benchmark, columns, values, digest)
    try:
        result.score()
    except ValueError as error:
        raise DataError(
            f"Expected more items of {benchmark.title} than {len(items)}: {error}"
            f"{' Raise the limit.' * (limit is not None)}"
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
        digest.update(repr((name, tuple(parameter.shape), str(parameter.dtype))).encode())
        held = parameter.detach().cpu().reshape(-1).view(torch.uint8)
        digest.update(held.numpy().data)
    return digest.hexdigest()


def _settings_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> object:
    """What a model's answers depend on beside its weights, whatever it is called."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):
        config.pop(name, None)
    fast = cast("PreTrainedTokenizerFast", tokenizer)  # offsets are asked of it, too
    spelling = json.loads(fast.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # left behind by earlier calls
        spelling.pop(name)
    return config, spelling, tokenizer.special_tokens_map


def _digest(*facts: object) -> str:
    """SHA-256 of JSON values, and of the package's version."""
    text = json.dumps([__version__, *facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def limited(
    benchmark: Benchmark, items: list[dict[str, Any]], limit: int | None
) -> list[dict[str, Any]]:
    """At most so many items (but one part at least), evenly spread.

    Args:
        benchmark: The benchmark; one that cannot be divided is taken as a whole.
        items: Its items.
        limit: How many; `None` for all.
    """
    if limit is None or not benchmark.divisible or limit >= len(items):
        return items
    parts = benchmark.parts(items)
    n = max(1, limit * len(parts) // len(items))
    return [item for i in range(n) for item in parts[i * len(parts) // n]]


def folder_of(benchmark: Benchmark, data_dir: str | os.PathLike[str]) -> Path:
    """The folder with a benchmark's files, checked.

    Args:
        benchmark: The benchmark.
        data_dir: That folder, one above it, or the Hub id of a data set.

    Raises:
        DataError: If a file is missing or another one than was published.
    """  # noqa: DOC502 - raised by what it calls
    place = Path(data_dir)
    if not benchmark.files:
        return place
    if not place.is_dir():
        place = _downloaded(benchmark, str(data_dir))
    first = next(iter(benchmark.files))
    inside = [place, *(sub for sub in sorted(place.glob("*")) if sub.is_dir())]
    return checked_files(benchmark, next((s for s in inside if (s / first).is_file()), place))


def _downloaded(benchmark: Benchmark, repo_id: str) -> Path:
    """A benchmark's files from a data set on the Hub, in the cache.

    Raises:
        DataError: If there is no folder and no data set of that name, or the Hub is out of reach.
    """
    patterns = [pattern for file in benchmark.files for pattern in (file, f"*/{file}")]
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:  # refused, out of reach, or no name of a repository
        raise DataError(
            f"Expected a folder or the Hub id of a data set with the files of {benchmark.name}, "
            f"but {repo_id!r} is neither: {first_line_of(error)}"
        ) from error


def _cached(file: Path) -> Tensor | None:
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor("values")
    except (OSError, SafetensorError):
        return None
