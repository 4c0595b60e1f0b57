"""Parts of a corpus, each of which can be read in a process of its own, and their sentences."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow.parquet as pq
from datasets import Dataset

from hf_gradiend.errors import DataError

_ABBREVIATIONS = (
    *("Mr", "Mrs", "Ms", "Dr", "St", "Prof", "Rev", "Gen", "Col", "Capt", "Lt", "Sgt", "Hon"),
    *("Jr", "Sr", "vs", "No", "Vol", "e.g", "i.e", "[A-Z]"),
)
# The mark first, which a search finds fast; a quotation mark behind it stays with its sentence.
_SENTENCE_END = re.compile(
    r"""[.!?…](?=["'”’)\]]?\s["'“‘«(\[]*[^\Wa-z_])"""
    + "".join(rf"(?<!\b{each}\.)" for each in _ABBREVIATIONS)
    + r"""["'”’)\]]?\s"""
)


class Piece(Protocol):
    """A part of a corpus."""

    def texts(self) -> Iterator[tuple[str, str]]:
        """Its texts.

        Yields:
            The name of the document and the text.
        """
        ...


@dataclass(frozen=True)
class LinesPiece:
    """Whole lines of a txt or jsonl file.

    Args:
        file: The file.
        name: Its name within the corpus.
        start: First byte.
        stop: Byte after the last one.
        first_line: Number of the first line, from 1.
        column: Column of the text in a jsonl file; `None` for a txt file.
        one_document: Whether the file is one document; else each line is.
    """

    file: Path
    name: str
    start: int
    stop: int
    first_line: int
    column: str | None
    one_document: bool

    def texts(self) -> Iterator[tuple[str, str]]:
        """Its texts.

        Yields:
            The name of the document and the text.
        """
        with self.file.open("rb") as file:
            file.seek(self.start)
            lines = file.read(self.stop - self.start).decode("utf-8").removesuffix("\n").split("\n")
        for number, line in enumerate(lines, start=self.first_line):
            place = f"{self.name}:{number}"
            line = line.removeprefix("\ufeff") if number == 1 else line
            if line.strip():
                text = line if self.column is None else _text_of_json(line, self.column, place)
                yield self.name if self.one_document else place, text


@dataclass(frozen=True)
class ParquetPiece:
    """One row group of a parquet file.

    Args:
        file: The file.
        name: Its name within the corpus.
        group: Number of the row group.
        first_row: Number of its first row.
        column: Column of the text.
    """

    file: Path
    name: str
    group: int
    first_row: int
    column: str

    def texts(self) -> Iterator[tuple[str, str]]:
        """Its texts.

        Yields:
            The name of the document and the text.
        """
        with pq.ParquetFile(self.file) as file:
            values = file.read_row_group(self.group, columns=[self.column])[0].to_pylist()
        yield from _rows(self.name, self.first_row, values)


@dataclass(frozen=True)
class DatasetPiece:
    """Rows of a data set.

    Args:
        dataset: The data set.
        name: Its name.
        start: Number of the first row.
        stop: Number behind the last row.
        column: Column of the text.
    """

    dataset: Dataset
    name: str
    start: int
    stop: int
    column: str

    def texts(self) -> Iterator[tuple[str, str]]:
        """Its texts.

        Yields:
            The name of the document and the text.
        """
        yield from _rows(self.name, self.start, self.dataset[self.start : self.stop][self.column])


@dataclass(frozen=True)
class StreamedPiece:
    """Rows of a data set that is streamed.

    Args:
        name: Name of the data set.
        first_row: Number of the first row.
        values: The texts.
    """

    name: str
    first_row: int
    values: tuple[object, ...]

    def texts(self) -> Iterator[tuple[str, str]]:
        """Its texts.

        Yields:
            The name of the document and the text.
        """
        yield from _rows(self.name, self.first_row, self.values)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, with single spaces between their words.

    A line ends a sentence, and so does white space between a full stop and a capital letter.

    Args:
        text: The text.

    Yields:
        Each sentence that is not empty.
    """
    for line in text.split("\n"):
        plain = " ".join(line.split()) if "  " in line or not line.isprintable() else line.strip()
        start = 0
        for end in _SENTENCE_END.finditer(plain):
            yield plain[start : end.end() - 1]
            start = end.end()
        if start < len(plain):
            yield plain[start:]


def _rows(name: str, first_row: int, values: Iterable[object]) -> Iterator[tuple[str, str]]:
    for number, value in enumerate(values, start=first_row):
        if not isinstance(value, str):
            raise DataError(f"Expected text in row {number:,} of {name!r}, but got {value!r:.60}.")
        yield f"{name}:{number}", value


def _text_of_json(line: str, column: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"Expected JSON in {place}, but got {line!r:.60}.") from error
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        raise DataError(f"Expected text under {column!r} in {place}, but got {line!r:.60}.")
    return row[column]
