"""Reads feature and neutral texts from the Hub, a folder or a file, and checks their form."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from hf_gradiend.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TARGET_SLOT = "[TARGET]"
FEATURE_COLUMNS = ("text", "factual", "counterfactual", "factual_class", "counterfactual_class")

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# The names that `datasets.load_dataset` accepts for files, here for values of a column.
_SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}
_PRONOUN_COLUMNS = ("masked", "name", "pronoun", "label")
_PRONOUNS = {"F": "she", "M": "he"}
_SHOWN = 5


def load_feature_dataset(
    path: str | os.PathLike[str],
    *,
    preset: str | None = None,
    classes: tuple[str, str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> DatasetDict:
    """Reads and checks texts with a slot and the two words that can fill it.

    Rows of a preset that carry no slot are left out, and a warning of the logger says how many.

    Args:
        path: Id of a data set on the Hub, a folder (data files, with or without a data set card,
            or written by `save_to_disk`), or one jsonl, json, csv or parquet file. Data in one
            piece is split by its column `split` where it has one and is otherwise all `train`.
        preset: Form of other data to read: `gender` (columns `masked` with `[NAME]` and
            `[PRONOUN]`, `name`, `pronoun`, `label`) or `genter` (GENTER, the same form). By
            default found from the columns.
        classes: Take only the rows whose factual and counterfactual classes are these two, either
            way round; the one named first is to encode to +1. `None` takes all rows.
        revision: Revision of the data set on the Hub.
        token: Access token for the Hub, or whether to use the saved one.

    Returns:
        Splits with the columns `text` (with the slot `[TARGET]`), `factual`, `counterfactual`,
        `factual_class` and `counterfactual_class`. A preset gives these and `name`; other data
        keep their further columns.

    Raises:
        ConfigError: If there is no such preset or class, or a revision is given for local data.
        DataError: If the data cannot be read or do not have this form.
    """  # noqa: DOC502  # the functions below raise DataError
    if preset is not None and preset not in _PRESETS:
        raise ConfigError(f"Expected a preset of {list(_PRESETS)}, but got {preset!r}.")
    dataset = _read(path, revision=revision, token=token)
    converted = DatasetDict(
        {split: _converted(rows, preset, str(split)) for split, rows in dataset.items()}
    )
    validate_feature_dataset(converted)
    return converted if classes is None else of_classes(converted, classes)


def validate_feature_dataset(dataset: Dataset | DatasetDict) -> None:
    """Checks that every row has a slot, two different words, and that there are several classes.

    Args:
        dataset: One data set, or splits whose classes are counted together.

    Raises:
        DataError: If columns are missing, or rows do not have the form. Names all problems, of
            many rows the first ones.
    """
    named = dataset if isinstance(dataset, DatasetDict) else {"": dataset}
    splits = {str(split): rows for split, rows in named.items()}
    for split, rows in splits.items():
        _require_columns(rows, FEATURE_COLUMNS, split)
    problems = [
        f"row {number:,}{_of(split)}: {problem}"
        for split, rows in splits.items()
        for number, row in enumerate(_records(rows, FEATURE_COLUMNS))
        for problem in _row_problems(row)
    ]
    if problems:
        raise DataError(f"Expected rows with a slot and two words, but got {_listed(problems)}.")
    classes = classes_of(splits.values())
    if len(classes) < 2:
        raise DataError(
            f"Expected at least two classes in the columns 'factual_class' and "
            f"'counterfactual_class', but got {len(classes)}: {classes[:_SHOWN]}."
        )


def classes_of(parts: Iterable[Dataset]) -> list[str]:
    """The classes of some feature data, factual and counterfactual, in alphabetical order.

    Args:
        parts: Data with the columns `factual_class` and `counterfactual_class`.
    """
    columns = ("factual_class", "counterfactual_class")
    return sorted({label for rows in parts for column in columns for label in rows.unique(column)})


def load_neutral_texts(path: str | os.PathLike[str]) -> list[str]:
    """Reads texts that have nothing to do with the feature.

    Blank texts are left out, and a warning of the logger says how many.

    Args:
        path: A txt file with one text per line, or anything that `load_feature_dataset` takes,
            with a column `text`. Of data with a configuration `neutral`, as
            `save_feature_dataset` writes them, that one is read.

    Returns:
        The texts of all splits, in order.

    Raises:
        DataError: If the data cannot be read, hold no text, or hold one with the slot `[TARGET]`.
    """
    texts = _texts(path, config="neutral")
    slotted = [_excerpt(text) for text in texts if TARGET_SLOT in text]
    if slotted:
        raise DataError(
            f"Expected neutral texts without the slot {TARGET_SLOT}, but got {_listed(slotted)}."
        )
    return texts


def load_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Reads texts with a slot that leave the class open, to choose and judge an edit on.

    Args:
        path: As in `load_neutral_texts`.

    Returns:
        The texts of all splits, in order.

    Raises:
        DataError: If the data cannot be read, hold fewer than two texts, or one without the slot
            `[TARGET]`.
    """
    texts = _texts(path)
    without = [_excerpt(text) for text in texts if TARGET_SLOT not in text]
    if without or len(texts) < 2:
        raise DataError(
            f"Expected two or more texts with the slot {TARGET_SLOT} in {str(path)!r}, but got "
            f"{_listed(without) or 'one'}."
        )
    return texts


def _texts(path: str | os.PathLike[str], *, config: str | None = None) -> list[str]:
    """The texts that are not blank, of all splits; at least one.

    Raises:
        DataError: If there is none.
    """
    if Path(path).suffix == ".txt":
        lines = _text_lines(Path(path).expanduser())
    else:
        splits = _read(path, config=config)
        for split, rows in splits.items():
            _require_columns(rows, ("text",), str(split))
        lines = concatenate_datasets([rows.select_columns("text") for rows in splits.values()])[
            "text"
        ]
    texts = [line for line in lines if line is not None and line.strip()]
    if not texts:
        raise DataError(f"Expected at least one text in {str(path)!r}, but it is empty.")
    if len(texts) < len(lines):
        logger.warning("Blank texts left out of %s: %d.", path, len(lines) - len(texts))
    return texts


def _read(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    config: str | None = None,
) -> DatasetDict:
    # The configuration is the one to take where the data have it.
    local = Path(path).expanduser()
    if revision is not None and local.exists():
        raise ConfigError(
            f"Expected no revision for local data, but got {revision!r} for {str(path)!r}."
        )
    if local.is_file():
        return _split_by_column(_read_file(local))
    if local.is_dir():
        return _split_by_column(_read_folder(local, config))
    if local.suffix in _BUILDERS or local.is_absolute() or len(local.parts) > 2:
        raise DataError(f"There is no file or folder {str(path)!r}.")
    return _split_by_column(_load(os.fspath(path), config, revision=revision, token=token))


def _read_file(file: Path) -> Dataset | DatasetDict:
    if file.suffix not in _BUILDERS:
        raise DataError(
            f"Expected a file that ends in one of {list(_BUILDERS)}, but got {str(file)!r}."
        )
    if file.stat().st_size == 0:  # datasets raises a bare StopIteration for an empty json file
        raise DataError(f"Cannot read data from {str(file)!r}: the file is empty.")
    return _loaded(str(file), lambda: load_dataset(_BUILDERS[file.suffix], data_files=str(file)))


def _read_folder(folder: Path, config: str | None) -> Dataset | DatasetDict:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _loaded(str(folder), lambda: load_from_disk(folder))
    return _load(str(folder), config)


def _load(
    path: str,
    config: str | None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Dataset | DatasetDict:
    def load() -> object:
        known = [] if config is None else get_dataset_config_names(path, revision, token=token)
        name = config if config in known else None
        return load_dataset(path, name, revision=revision, token=token)

    return _loaded(path, load)


def _loaded(source: str, load: Callable[[], object]) -> Dataset | DatasetDict:
    # Says in one line what went wrong with which data.
    try:
        loaded = load()
    # DatasetsError: no such data or a broken file. OSError: no data files, or no connection.
    # ValueError: no rows, or rows that do not fit together.
    except (DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error  # the outer one only says that an error occurred
        raise DataError(f"Cannot read data from {source!r}: {reason}") from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise DataError(
            f"{source!r} is built by a script, which datasets no longer runs. Build it with "
            f"datasets<4, save it as jsonl, and pass that file."
        ) from error
    if not isinstance(loaded, Dataset | DatasetDict):
        raise DataError(f"Expected a data set in {source!r}, but got {type(loaded).__name__}.")
    return loaded


def _split_by_column(data: Dataset | DatasetDict) -> DatasetDict:
    if isinstance(data, DatasetDict) and len(data) > 1:
        return data
    name, rows = next(iter(data.items())) if isinstance(data, DatasetDict) else ("train", data)
    if "split" not in rows.column_names:
        return DatasetDict({name: rows})
    numbers: dict[str, list[int]] = {}
    for number, split in enumerate(rows["split"]):
        if not isinstance(split, str) or not split:
            raise DataError(
                f"Expected the name of a split in the column 'split', but row {number:,} has "
                f"{split!r}."
            )
        numbers.setdefault(_SPLIT_NAMES.get(split, split), []).append(number)
    return DatasetDict({split: rows.select(chosen) for split, chosen in numbers.items()})


def _converted(rows: Dataset, preset: str | None, split: str) -> Dataset:
    columns = set(rows.column_names)
    if preset is not None:
        return _PRESETS[preset](rows, split)
    if not columns.issuperset(FEATURE_COLUMNS) and columns.issuperset(_PRONOUN_COLUMNS):
        return _from_masked_pronouns(rows, split)
    return rows


def _from_masked_pronouns(rows: Dataset, split: str) -> Dataset:
    # The words are lower-case also where the sentence has "He" at the slot.
    _require_columns(rows, _PRONOUN_COLUMNS, split)
    made, problems, n_dropped = [], [], 0
    for number, row in enumerate(_records(rows, _PRONOUN_COLUMNS)):
        problem = _pronoun_problem(row)
        if problem is not None:
            problems.append(f"row {number:,}{_of(split)}: {problem}")
        elif "[PRONOUN]" not in str(row["masked"]):
            n_dropped += 1
        else:
            made.append(_feature_row({column: str(value) for column, value in row.items()}))
    if problems:
        raise DataError(f"Expected masked sentences with a name, but got {_listed(problems)}.")
    if not made:
        raise DataError(f"Expected rows with the slot [PRONOUN]{_of(split)}, but got none.")
    if n_dropped:
        logger.warning("Rows left out for lack of the slot [PRONOUN]%s: %d.", _of(split), n_dropped)
    return Dataset.from_list(made)


def _pronoun_problem(row: Mapping[str, object]) -> str | None:
    empty = [column for column in _PRONOUN_COLUMNS if _is_blank(row[column])]
    if empty:
        return f"{empty[0]} is empty"
    if row["label"] not in _PRONOUNS:
        return f"the label is {row['label']!r}, not 'F' or 'M'"
    expected = _PRONOUNS[str(row["label"])]
    if str(row["pronoun"]).lower() != expected:
        return (
            f"the pronoun is {row['pronoun']!r}, but label {row['label']!r} goes with {expected!r}"
        )
    return None


def _feature_row(row: Mapping[str, str]) -> dict[str, str]:
    label = row["label"]
    (other,) = set(_PRONOUNS) - {label}
    return {
        "text": row["masked"].replace("[NAME]", row["name"]).replace("[PRONOUN]", TARGET_SLOT),
        "factual": _PRONOUNS[label],
        "counterfactual": _PRONOUNS[other],
        "factual_class": label,
        "counterfactual_class": other,
        "name": row["name"],
    }


def of_classes(dataset: DatasetDict, classes: tuple[str, str]) -> DatasetDict:
    """The rows whose factual and counterfactual classes are these two, either way round.

    Args:
        dataset: Splits with two or more classes.
        classes: The two.

    Raises:
        ConfigError: If the data have no such classes.
    """
    known = classes_of(dataset.values())
    if len({*classes}) != 2 or not {*classes}.issubset(known):
        raise ConfigError(f"Expected two of the classes {known}, but got {list(classes)}.")
    chosen = {}
    for split, rows in dataset.items():
        pairs = zip(rows["factual_class"], rows["counterfactual_class"], strict=True)
        chosen[split] = rows.select([i for i, pair in enumerate(pairs) if {*pair} == {*classes}])
    return DatasetDict(chosen)


# GENTER has one more column, pronoun_count, which the slots of the text tell anyway.
_PRESETS = {"gender": _from_masked_pronouns, "genter": _from_masked_pronouns}


def _row_problems(row: Mapping[str, object]) -> Iterable[str]:
    if _is_blank(row["text"]) or TARGET_SLOT not in str(row["text"]):
        yield f"no slot {TARGET_SLOT} in the text {_excerpt(row['text'])}"
    empty = [column for column in FEATURE_COLUMNS[1:] if _is_blank(row[column])]
    yield from (f"{column} is {row[column]!r}, not a word" for column in empty)
    if not empty and row["factual"] == row["counterfactual"]:
        yield f"factual and counterfactual are both {row['factual']!r}"
    if not empty and row["factual_class"] == row["counterfactual_class"]:
        yield f"factual_class and counterfactual_class are both {row['factual_class']!r}"


def _records(rows: Dataset, columns: Sequence[str]) -> Iterator[dict[str, object]]:
    for values in zip(*(rows[column] for column in columns), strict=True):
        yield dict(zip(columns, values, strict=True))


def _require_columns(rows: Dataset, columns: Iterable[str], split: str) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DataError(
            f"Expected the columns {list(columns)}{_of(split)}, but {missing} are missing; got "
            f"{rows.column_names}. Rename or add them, for instance with Dataset.rename_columns."
        )


def _text_lines(file: Path) -> list[str]:
    try:
        # Not splitlines: it also splits at characters such as U+2028 and form feed.
        return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read text from {str(file)!r}: {error}") from error


def _is_blank(value: object) -> bool:
    return not isinstance(value, str) or not value.strip()


def _excerpt(text: object) -> str:
    return repr(text if not isinstance(text, str) or len(text) <= 60 else text[:57] + "...")


def _listed(problems: list[str]) -> str:
    rest = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {rest:,} more" if rest > 0 else "")


def _of(split: str) -> str:
    return f" of {split!r}" if split else ""
