"""What the commands share: loading a GRADIEND, choosing a split, speaking, printing a table."""

import argparse
import importlib.util
import random
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict
from huggingface_hub import RepoCard
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import load_base_model
from hf_gradiend.data.building import build_feature_dataset
from hf_gradiend.data.loading import load_feature_dataset, load_prompts, of_classes
from hf_gradiend.data.spec_files import package_specs
from hf_gradiend.data.templates import OWN_TEXTS, OWN_TEXTS_LICENSE
from hf_gradiend.errors import CompatibilityError, ConfigError, DataError, first_line_of
from hf_gradiend.evaluation.report import Origin
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.training.arguments import GradiendTrainingArguments, settings_of

MAX_OPEN_TEXTS = 64  # of a specification's sentences, for the choice of an edit and its judgement


def speaker(args: argparse.Namespace) -> Callable[[str], None]:
    """What takes a line for the person at the terminal: `print`, or with `--json` nothing."""
    return (lambda _line: None) if args.json else print


def can_draw(say: Callable[[str], None]) -> bool:
    """Whether matplotlib is installed; where it is not, a line says how to get it.

    Args:
        say: Takes the line.
    """
    installed = importlib.util.find_spec("matplotlib") is not None
    if not installed:
        say('No pictures: matplotlib is missing. Install it with pip install "hf_gradiend[plot]".')
    return installed


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


def load_base_of(
    gradiend: GradiendModel, name: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model that is named, or the one that the GRADIEND names, and its tokenizer.

    Raises:
        CompatibilityError: If the GRADIEND names no base model and none is given.
    """
    name = name or gradiend.config.base_model_name_or_path
    if name is None:
        raise CompatibilityError(
            "Expected a base model, but the GRADIEND names none. Pass --base_model."
        )
    return load_base_model(name, objective=gradiend.config.objective)  # pyright: ignore[reportArgumentType] - checked


def split_of(data: DatasetDict, split: str) -> Dataset:
    """One split of a data set.

    Raises:
        DataError: If the data set has no such split.
    """
    if split not in data:
        raise DataError(f"Expected the split {split!r}, but the data set has {sorted(data)}.")
    return data[split]


def feature_data(place: str, classes: Sequence[str] | None = None) -> DatasetDict:
    """Feature data by Hub id, folder or file, or built from one of the package's specifications.

    Args:
        place: Where it is, or the specification's name, such as `"religion"`.
        classes: The two classes to take; `None` for all.
    """
    pair = None if classes is None else (classes[0], classes[1])
    if not is_shipped(place):
        return load_feature_dataset(place, classes=pair)
    built = build_feature_dataset(place, progress=False).dataset
    return built if pair is None else of_classes(built, pair)


def is_shipped(place: str) -> bool:
    """Whether feature data of this name are built from one of the package's specifications."""
    return place in package_specs() and not Path(place).exists()


def open_texts(place: str) -> list[str]:
    """Texts with a slot that leave the class open, to choose an edit on and to judge it on.

    Args:
        place: Where they are, or the name of a specification of the package whose sentences fit all
            of its classes: those of its validation split, then as many of its test split.

    Raises:
        DataError: If they cannot be read, or the specification's sentences tell the class.
    """
    if not is_shipped(place):
        return load_prompts(place)
    data = feature_data(place)
    halves = []
    for split in ("validation", "test"):
        of_class: dict[str, set[str]] = {}
        for text, name in zip(data[split]["text"], data[split]["factual_class"], strict=True):
            of_class.setdefault(name, set()).add(text)
        halves.append(sorted(set.intersection(*of_class.values())))
    size = min(MAX_OPEN_TEXTS, *map(len, halves))
    if size == 0:
        raise DataError(
            f"Expected sentences that leave the class open, but those of {place!r} tell it. Pass a "
            f"file of texts with the slot [TARGET]."
        )
    generator = random.Random(0)
    return [text for half in halves for text in generator.sample(half, size)]


def held_out(data: DatasetDict) -> dict[str, Dataset]:
    """The splits that nothing was learned from; where there is none, the training split."""
    found = {name: data[name] for name in ("validation", "test") if name in data}
    return found or {"train": split_of(data, "train")}


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
    """A model's or data set's name for people: a Hub id as it is, a path by its last part."""
    return Path(name).name if Path(name).exists() else name


def license_of(name: str, repo_type: str) -> str | None:
    """Licence of a repository on the Hub or of a folder with a card; `None` where it is not said.

    Args:
        name: Hub id or folder.
        repo_type: `"model"` or `"dataset"`.
    """
    if Path(name).is_file():
        return None
    try:
        if Path(name).is_dir():
            card = Path(name) / "README.md"
            data = RepoCard.load(card).data.to_dict() if card.is_file() else {}
        else:
            data = RepoCard.load(name, repo_type=repo_type).data.to_dict()
    except (OSError, ValueError):  # offline, no such repository, or a card that is none
        return None
    found = data.get("license")
    return found if isinstance(found, str) else None


def origin_of(
    base_model: str,
    dataset: str,
    data: DatasetDict,
    arguments: GradiendTrainingArguments,
    licenses: tuple[str | None, str | None] | None = None,
) -> Origin:
    """What a training was made from, for the report.

    Args:
        base_model: Hub id or folder of the base model.
        dataset: Hub id or path of the feature data set.
        data: Its splits.
        arguments: Settings of the training.
        licenses: Of base model and data, where they are known; `None` looks them up.
    """
    shipped = is_shipped(dataset)
    if licenses is None:
        of_data = OWN_TEXTS_LICENSE if shipped else license_of(dataset, "dataset")
        licenses = license_of(base_model, "model"), of_data
    return Origin(
        base_model=display_name(base_model),
        dataset=f"{dataset} texts of hf_gradiend" if shipped else display_name(dataset),
        base_model_license=licenses[0],
        dataset_license=licenses[1],
        n_texts={str(split): len(rows) for split, rows in data.items()},
        settings=settings_of(arguments),
        hub_ids=[
            what
            for what, place in (("base_model", base_model), ("dataset", dataset))
            if not Path(place).exists() and place != OWN_TEXTS and not is_shipped(place)
        ],
    )
