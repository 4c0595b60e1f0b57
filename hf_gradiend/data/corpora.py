"""Opens raw text, checks it, and cuts it into pieces of a few megabytes."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from hf_gradiend.data.pieces import DatasetPiece, LinesPiece, ParquetPiece, Piece, StreamedPiece
from hf_gradiend.errors import ConfigError, DataError, first_line_of

PIECE_BYTES = 4 * 2**20
PIECE_ROWS = 20_000
_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Corpus:
    """Where raw text is.

    Args:
        path: A txt, jsonl or parquet file, a folder of such files, or the id of a data set on the
            Hub.
        column: Column of the text; of no meaning for txt files.
        config: Configuration of a data set on the Hub; `None` for its default.
        split: Split of a data set on the Hub.
        streaming: Read a data set on the Hub without storing it first.
    """

    path: str | os.PathLike[str]
    column: str = "text"
    config: str | None = None
    split: str = "train"
    streaming: bool = False

    @property
    def name(self) -> str:
        """Its name for people: that of the file or folder, or the id with its configuration."""
        local = Path(self.path).expanduser()
        if local.exists():
            return local.resolve().name
        return " ".join(filter(None, [str(self.path), self.config, self.split]))


def pieces_of(corpus: Corpus) -> Iterable[Piece]:
    """The pieces of a corpus, in order; a list, unless the corpus is streamed.

    The files are read once, to see that they are text and to count their lines.

    Args:
        corpus: The corpus.

    Raises:
        ConfigError: If options are given that have no meaning for files.
        DataError: If there is no such corpus, it is no text, or is empty.
    """
    path = Path(corpus.path).expanduser()
    if not path.exists():
        if path.suffix in _SUFFIXES or path.is_absolute() or len(path.parts) > 2:
            raise DataError(f"Expected a corpus, but there is no file or folder {str(path)!r}.")
        return _pieces_of_data_set(corpus)
    if corpus.config is not None or corpus.split != "train" or corpus.streaming:
        raise ConfigError(
            f"Expected config, split and streaming for a data set on the Hub alone, but "
            f"{str(path)!r} is local."
        )
    files = _files(path)
    found = [piece for file, name in files for piece in _pieces_of_file(file, name, corpus, path)]
    if not found:
        raise DataError(f"Expected text in the corpus {str(path)!r}, but it is empty.")
    return found


def _files(path: Path) -> list[tuple[Path, str]]:
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(
                f"Expected text in a file that ends in one of {list(_SUFFIXES)}, but got "
                f"{str(path)!r}."
            )
        return [(path, path.name)]
    found = [each for each in path.rglob("*") if each.suffix in _SUFFIXES and each.is_file()]
    if not found:
        raise DataError(
            f"Expected files that end in one of {list(_SUFFIXES)} in {str(path)!r}, but it has "
            f"none."
        )
    return sorted(((each, each.relative_to(path).as_posix()) for each in found), key=lambda f: f[1])


def _pieces_of_file(file: Path, name: str, corpus: Corpus, top: Path) -> Iterator[Piece]:
    if file.suffix == ".parquet":
        return _pieces_of_parquet(file, name, corpus.column)
    column = corpus.column if file.suffix == ".jsonl" else None
    return _pieces_of_lines(file, name, column, one_document=column is None and top.is_dir())


def _pieces_of_lines(
    file: Path, name: str, column: str | None, *, one_document: bool
) -> Iterator[Piece]:
    start, line = 0, 1
    try:
        with file.open("rb") as lines:
            while block := lines.read(PIECE_BYTES):
                block += lines.readline()
                block.decode("utf-8")
                if b"\0" in block:
                    raise DataError(f"Expected text in {str(file)!r}, but it has a zero byte.")
                stop = start + len(block)
                yield LinesPiece(file, name, start, stop, line, column, one_document)
                start, line = stop, line + block.count(b"\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Expected text in UTF-8 in {str(file)!r}, but byte {start + error.start:,} is none: "
            f"{error.reason}. Convert it, for instance with iconv."
        ) from error
    except OSError as error:
        raise DataError(
            f"Expected text in {str(file)!r}, but it cannot be read: {error.strerror}."
        ) from error


def _pieces_of_parquet(file: Path, name: str, column: str) -> Iterator[Piece]:
    try:
        with pq.ParquetFile(file) as parquet:
            columns = parquet.schema_arrow.names
            sizes = [
                parquet.metadata.row_group(group).num_rows
                for group in range(parquet.num_row_groups)
            ]
    except (OSError, ArrowException) as error:
        raise DataError(
            f"Expected parquet in {str(file)!r}, but it cannot be read: {first_line_of(error)}."
        ) from error
    _require_column(column, columns, name)
    first = 0
    for group, size in enumerate(sizes):
        yield ParquetPiece(file, name, group, first, column)
        first += size


def _pieces_of_data_set(corpus: Corpus) -> Iterable[Piece]:
    name = str(corpus.path)
    data = _opened(
        name,
        lambda: load_dataset(name, corpus.config, split=corpus.split, streaming=corpus.streaming),
    )
    if isinstance(data, IterableDataset):
        return _streamed(name, data, corpus.column)
    if not isinstance(data, Dataset):
        raise DataError(f"Expected one split of {name!r}, but got {type(data).__name__}.")
    _require_column(corpus.column, data.column_names, name)
    return [
        DatasetPiece(data, name, start, min(start + PIECE_ROWS, len(data)), corpus.column)
        for start in range(0, len(data), PIECE_ROWS)
    ]


def _streamed(name: str, data: IterableDataset, column: str) -> Iterator[Piece]:
    first = 0
    for batch in data.iter(batch_size=PIECE_ROWS):
        _require_column(column, list(batch), name)
        values = tuple(batch[column])
        yield StreamedPiece(name, first, values)
        first += len(values)


def _opened(name: str, load: Callable[[], object]) -> object:
    try:
        return load()
    # DatasetsError: no such data. OSError: no connection. ValueError: no such configuration.
    # RuntimeError: data that are built by a script.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = first_line_of(error.__cause__ or error)
        raise DataError(f"Expected a data set {name!r}, but it cannot be read: {reason}") from error


def _require_column(column: str, columns: list[str], name: str) -> None:
    if column not in columns:
        raise DataError(
            f"Expected the column {column!r} with text in {name!r}, but got {columns}. Name "
            f"another one."
        )
