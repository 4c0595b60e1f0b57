"""Writing results so that nothing is ever half-written: to a temporary name, then a rename."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hf_gradiend.errors import ConfigError, OutputError, first_line_of


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder where it does not exist, and check that it can be written to.

    Args:
        path: The folder.

    Returns:
        Its path.

    Raises:
        OutputError: If it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"Expected a folder to write to, but {str(folder)!r} cannot be written: "
            f"{error.strerror}. Choose another output folder."
        ) from error
    return folder


def empty_folder(path: str | os.PathLike[str], what: str, *, another: str = "one") -> Path:
    """A folder that can be written to and holds nothing; made where it does not exist.

    Args:
        path: The folder.
        what: What it is for, for the message.
        another: What the message says to choose another of: on the command line, the option.

    Returns:
        Its path.

    Raises:
        OutputError: If it holds files, or cannot be written to.
    """
    folder = writable_folder(path)
    if any(folder.iterdir()):
        raise OutputError(
            f"Expected a new or empty folder for {what}, but {str(folder)!r} holds files. "
            f"Choose another {another}, or empty it."
        )
    return folder


def write_json(path: str | os.PathLike[str], content: Mapping[str, object]) -> Path:
    """Write a JSON file under a temporary name and rename it.

    Args:
        path: The file.
        content: JSON values.

    Returns:
        The file's path.
    """
    file = Path(path)
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(file)
    return file


def read_object(file: Path, what: str) -> dict:
    """The object in a JSON file.

    Args:
        file: The file.
        what: What it should be, for the message.

    Raises:
        ConfigError: If it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected {what}, but {str(file)!r} could not be read: {first_line_of(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"Expected {what}, but {str(file)!r} holds no JSON object.")
    return content


@contextmanager
def replaced_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder beside its place and swap it in once it is complete.

    Args:
        path: Folder to write; one that exists is replaced as a whole.

    Yields:
        A new, empty folder to write to. On an error it is removed and the old one stays.
    """
    folder = Path(path)
    writable_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        yield fresh
        if folder.exists():
            folder.replace(Path(temporary) / "old")
        fresh.replace(folder)
        shutil.rmtree(Path(temporary) / "old", ignore_errors=True)
