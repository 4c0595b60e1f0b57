"""Values of a YAML file that know where they stand, so that an error names the key and the line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from hf_gradiend.errors import ConfigError, first_line_of


@dataclass(frozen=True)
class Place:
    """A value of a YAML file with the keys that lead to it.

    The methods that read it raise `ConfigError` where it is not what they say.

    Args:
        value: The value, as `yaml.safe_load` gives it.
        path: Keys and positions from the top of the file.
        file: Name of the file, for messages.
        root: The file's node, which knows the lines; read by `error` alone.
    """

    value: object
    path: tuple[str | int, ...]
    file: str
    root: yaml.Node

    def error(self, message: str) -> ConfigError:
        """An error that names the file, the line and the key before the message."""
        keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.path)
        where = [self.file, f"line {_line(self.root, self.path)}", *filter(None, [keys.strip(".")])]
        return ConfigError(f"{', '.join(where)}: {message}")

    def at(self, key: str | int, value: object) -> "Place":
        """The place one key further down."""
        return Place(value, (*self.path, key), self.file, self.root)

    def entries(self) -> dict[str, "Place"]:
        """The values of a mapping by their keys, whatever these are."""
        if not isinstance(self.value, dict) or not self.value:
            raise self.error(f"Expected keys with values, but got {self.value!r}.")
        for key in self.value:
            if not isinstance(key, str):
                raise self.error(f"Expected text as a key, but got {key!r}. {_quoted(key)}")
        for key in _repeated_keys(_node(self.root, self.path)):
            raise self.at(key, None).error(f"Expected each key once, but got {key!r} twice.")
        return {key: self.at(key, value) for key, value in self.value.items()}

    def mapping(self, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, "Place"]:
        """The values of a mapping by their keys, all of which are known.

        Args:
            known: Keys that are allowed.
            required: Those of them that must be there.
        """
        found = self.entries()
        for key, place in found.items():
            if key not in known:
                raise place.error(f"Unknown key {key!r}. {suggestion(key, known)}")
        missing = [key for key in required if key not in found]
        if missing:
            raise self.error(f"Expected the keys {', '.join(required)}, but {missing} are missing.")
        return found

    def elements(self) -> Iterator["Place"]:
        """The elements of a list."""
        if not isinstance(self.value, list) or not self.value:
            raise self.error(f"Expected a list with at least one element, but got {self.value!r}.")
        return (self.at(number, value) for number, value in enumerate(self.value))

    def text(self) -> str:
        """Text that is not blank, without the white space around it."""
        if not isinstance(self.value, str):
            raise self.error(f"Expected text, but got {self.value!r}. {_quoted(self.value)}")
        if not self.value.strip():
            raise self.error("Expected text, but it is blank.")
        return self.value.strip()

    def texts(self) -> tuple[str, ...]:
        """The texts of a list."""
        return tuple(element.text() for element in self.elements())

    def integer(self, least: int) -> int:
        """A whole number.

        Args:
            least: Smallest number that is allowed.
        """
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < least:
            raise self.error(
                f"Expected a whole number of at least {least}, but got {self.value!r}."
            )
        return self.value

    def share(self) -> float:
        """A number above 0 and at most 1."""
        number = self.value
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number <= 1:
            raise self.error(f"Expected a share above 0 and at most 1, but got {number!r}.")
        return float(number)

    def one_of(self, options: Sequence[str]) -> str:
        """One of some texts."""
        if self.value not in options:
            raise self.error(f"Expected one of {list(options)}, but got {self.value!r}.")
        return str(self.value)

    def truth(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.error(f"Expected true or false, but got {self.value!r}.")
        return self.value


def read_yaml(text: str, file: str) -> Place:
    """The top of a YAML file.

    Args:
        text: The file's text.
        file: Its name, for messages.

    Raises:
        ConfigError: If the text is no YAML, or is empty.
    """
    try:
        root, value = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{file}, line {line}: Expected YAML, but {error.problem}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: Expected YAML, but {first_line_of(error)}.") from error
    if root is None:
        raise ConfigError(f"{file}: Expected keys with values, but the file is empty.")
    return Place(value, (), file, root)


def suggestion(word: str, known: Sequence[str]) -> str:
    """A sentence that names what may have been meant, or else all that is known."""
    close = get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(known)}."


def word_at(place: Place) -> str:
    """A word or several, as they are searched for.

    Raises:
        ConfigError: If it is none.
    """  # noqa: DOC502 - raised as `place.error`
    word = place.text()
    if not (word[0].isalnum() and word[-1].isalnum()) or word != " ".join(word.split()):
        raise place.error(
            f"Expected words that begin and end with a letter or digit, with single spaces "
            f"between them, but got {word!r}."
        )
    return word


def read_utf8(file: Path, what: str) -> str:
    """The text of a file.

    Args:
        file: The file.
        what: What it should be, for the message.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Expected {what}, but {str(file)!r} could not be read: {first_line_of(error)}."
        ) from error


def _quoted(value: object) -> str:
    # YAML reads no, yes, on, off and numbers as values of their own.
    simple = isinstance(value, bool | int | float)
    return "Put the word in quotation marks if it is one." if simple else "Write it as text."


def _node(node: yaml.Node, path: Sequence[str | int]) -> yaml.Node | None:
    for key in path:
        if isinstance(node, yaml.MappingNode):
            found = [value for name, value in node.value if name.value == key]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            found = node.value[key : key + 1]
        else:
            found = []
        if not found:  # of a merge key (<<), whose values stand elsewhere
            return None
        node = found[-1]
    return node


def _line(root: yaml.Node, path: Sequence[str | int]) -> int:
    """Line of a key, or of an element of a list; the nearest one above where it has none."""
    for length in range(len(path), 0, -1):
        above, last = _node(root, path[: length - 1]), path[length - 1]
        if isinstance(above, yaml.MappingNode):
            marks = [name.start_mark for name, _ in above.value if name.value == last]
        elif isinstance(above, yaml.SequenceNode) and isinstance(last, int):
            marks = [node.start_mark for node in above.value[last : last + 1]]
        else:
            marks = []
        if marks:
            return marks[-1].line + 1
    return root.start_mark.line + 1


def _repeated_keys(node: yaml.Node | None) -> list[str]:
    if not isinstance(node, yaml.MappingNode):
        return []
    keys = [name.value for name, _ in node.value]
    return [key for number, key in enumerate(keys) if key in keys[:number]]
