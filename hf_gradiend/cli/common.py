"""What the commands share: loading a GRADIEND, choosing a split, printing a table."""

import argparse
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import load_base_model
from hf_gradiend.errors import CompatibilityError, ConfigError, DataError, first_line_of
from hf_gradiend.modeling_gradiend import GradiendModel


def load_gradiend(path: str) -> GradiendModel:
    """Load a GRADIEND from a folder or the Hub.

    Raises:
        ConfigError: If there is none at that place.
    """
    try:
        return GradiendModel.from_pretrained(path).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"Expected the folder or Hub id of a GRADIEND, but {path!r} could not be loaded: "
            f"{first_line_of(error)}"
        ) from error


def load_gradiend_and_base(
    args: argparse.Namespace,
) -> tuple[GradiendModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The GRADIEND of `--gradiend` and its base model, or the one of `--base_model`.

    Raises:
        CompatibilityError: If the GRADIEND names no base model and none is given.
    """
    gradiend = load_gradiend(args.gradiend)
    name = args.base_model or gradiend.config.base_model_name_or_path
    if name is None:
        raise CompatibilityError(
            f"Expected a base model, but the GRADIEND {args.gradiend!r} names none. "
            f"Pass --base_model."
        )
    model, tokenizer = load_base_model(name, objective=gradiend.config.objective)
    return gradiend, model, tokenizer


def split_of(data: DatasetDict, split: str) -> Dataset:
    """One split of a data set.

    Raises:
        DataError: If the data set has no such split.
    """
    if split not in data:
        raise DataError(f"Expected the split {split!r}, but the data set has {sorted(data)}.")
    return data[split]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def encoder_table(splits: Mapping[str, Mapping]) -> str:
    """Correlation and accuracy of each split with 95 % intervals, from a report's dictionary."""
    rows = [["split", "n", "correlation", "95 % interval", "accuracy", "95 % interval"]]
    for name, split in splits.items():
        r, a = split["correlation"], split["accuracy"]
        rows.append(
            [
                name, str(r["n"]),
                f"{r['value']:.3f}", f"[{r['low']:.3f}, {r['high']:.3f}]",
                f"{a['value']:.3f}", f"[{a['low']:.3f}, {a['high']:.3f}]",
            ]
        )  # fmt: skip
    return table(rows)


def short_splits(splits: Mapping[str, Mapping]) -> dict[str, dict[str, float]]:
    """Correlation, accuracy and n of each split, for `--json`."""
    return {
        name: {
            "correlation": split["correlation"]["value"],
            "accuracy": split["accuracy"]["value"],
            "n": split["correlation"]["n"],
        }
        for name, split in splits.items()
    }


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def display_name(name: str) -> str:
    """A base model's name for people: a Hub id as it is, a folder by its last part."""
    return Path(name).name if Path(name).is_dir() else name
