"""Persons' names and the class that each tells, from a specification or a table of counts."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from hf_gradiend.data.yaml_places import Place, read_utf8, word_at
from hf_gradiend.errors import ConfigError

Classes = Mapping[str, tuple[str, ...]]

_CSV_KEYS = ("file", "column", "counts", "min_count", "min_share", "except")


def read_names(place: Place, classes: Classes, folder: Path) -> dict[str, str | None]:
    """The class that each name tells; `None` for one that tells none.

    Args:
        place: Names of each class, or the key `file` with a csv table of counts and, where they
            differ from the defaults, `column` ("name"), `min_count` (0), `min_share` (0.95) and
            `except`. `counts` gives the column of each class.
        classes: Words of each class.
        folder: Folder that the table's path starts from.

    Raises:
        ConfigError: If the names are not as they should be.
    """  # noqa: DOC502 - raised as `place.error`
    if isinstance(place.value, dict) and "file" in place.value:
        return _names_of_csv(place, classes, folder)
    class_of: dict[str, str | None] = {}
    for label, names in place.mapping((*classes, *_CSV_KEYS)).items():
        if label not in classes:
            raise place.error("Expected the key file where names come from a table.")
        for element in names.elements():
            other = class_of.setdefault(word_at(element), label)
            if other != label:
                raise element.error(
                    f"Expected each name in one class, but {element.text()!r} is in {other!r}, too."
                )
    return class_of


def _names_of_csv(place: Place, classes: Classes, folder: Path) -> dict[str, str | None]:
    found = place.mapping(_CSV_KEYS, ("file", "counts"))
    file = folder / Path(found["file"].text()).expanduser()
    labels = tuple(classes)
    column = found["column"].text() if "column" in found else "name"
    columns = {
        label: each.text() for label, each in found["counts"].mapping(labels, labels).items()
    }
    least = found["min_count"].integer(0) if "min_count" in found else 0
    share = found["min_share"].share() if "min_share" in found else 0.95
    left_out = found["except"].texts() if "except" in found else ()
    try:
        table = csv.DictReader(io.StringIO(read_utf8(file, "a table of names")))
    except ConfigError as error:
        raise found["file"].error(str(error)) from error
    class_of: dict[str, str | None] = {}
    for line, row in enumerate(table, start=2):
        try:
            name, counts = row[column], {label: int(row[each]) for label, each in columns.items()}
            name[0]  # not empty
        except (LookupError, TypeError, ValueError) as error:
            raise found["file"].error(
                f"Expected the columns {[column, *columns.values()]}, the counts as whole numbers, "
                f"but line {line} of {file.name!r} has {row}."
            ) from error
        if name not in left_out:
            likeliest = max(counts, key=lambda label: counts[label])
            sure = 0 < counts[likeliest] >= max(least, share * sum(counts.values()))
            class_of[name] = likeliest if sure else None
    missing = [label for label in labels if label not in class_of.values()]
    if missing:
        raise place.error(f"Expected names of each class, but {file.name!r} has none of {missing}.")
    return class_of
