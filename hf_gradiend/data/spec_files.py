"""Reads a feature's specification from YAML, and refuses what cannot be meant."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from hf_gradiend.data.loading import TARGET_SLOT
from hf_gradiend.data.matching import Finder
from hf_gradiend.data.name_lists import Classes, read_names
from hf_gradiend.data.specification import (
    HOLD_OUT,
    NAME,
    CorpusRules,
    FeatureSpec,
    Filler,
    PartOfSpeech,
    Template,
    counterfactuals,
    fitting,
    word_units,
)
from hf_gradiend.data.yaml_places import Place, read_utf8, read_yaml, suggestion, word_at
from hf_gradiend.errors import ConfigError

_TEXTS = ("name", "about", "language", "license")
_FILLER = re.compile(r"\[([A-Z][A-Z_]*)\]")
_SPLIT = re.compile(r"\w+(\.\w+)*")  # what `datasets` takes for the name of a split
_LEFT_WORDS = 2  # of a template; a causal model sees nothing else


def load_spec(name_or_path: str | os.PathLike[str]) -> FeatureSpec:
    """Read a specification.

    Args:
        name_or_path: A YAML file, or the name of one of the package's specifications.

    Raises:
        ConfigError: If there is none, or it is not as it should be; names the line and the key.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return parse_spec(read_utf8(path, "a specification"), path)
    known = package_specs()
    if str(name_or_path) not in known:
        raise ConfigError(
            f"Expected a YAML file or the name of a specification, but got {str(name_or_path)!r}. "
            f"{suggestion(str(name_or_path), known)}"
        )
    file = _package_folder() / f"{name_or_path}.yaml"
    return parse_spec(file.read_text("utf-8"), Path(file.name))


def package_specs() -> list[str]:
    """Names of the specifications that ship with the package."""
    files = [file.name for file in _package_folder().iterdir() if file.name.endswith(".yaml")]
    return sorted(name.removesuffix(".yaml") for name in files)


def parse_spec(text: str, path: Path) -> FeatureSpec:
    """Read a specification from its text.

    Args:
        text: YAML.
        path: Where it stands; files that it names are searched beside it.

    Raises:
        ConfigError: If it is not as it should be; names the line and the key.
    """  # noqa: DOC502 - raised as `place.error`
    readers: dict[str, Callable[[Place], Any]] = {
        **dict.fromkeys(_TEXTS, Place.text),
        "pairing": lambda place: place.one_of(("position", "any")),
        "fillers": lambda place: _fillers(place, classes),
        "corpus": lambda place: _corpus(place, classes, path.parent),
        "neutral_texts": Place.texts,
        "max_neutral_texts": lambda place: place.integer(1),
        "splits": _splits,
        "hold_out": _hold_out,
        "balance": Place.truth,
        "max_texts": lambda place: place.integer(1),
        "seed": lambda place: place.integer(0),
    }
    required = (*_TEXTS, "classes")
    top = read_yaml(text, path.name).mapping((*readers, "classes", "templates"), required)
    classes = _classes(top["classes"])
    found = {key: read(top[key]) for key, read in readers.items() if key in top}
    spec = FeatureSpec(id=path.stem, classes=classes, source=text, **found)
    _check_pairing(spec, top["classes"])
    if "templates" in top:
        spec = replace(spec, templates=tuple(_templates(spec, top["templates"])))
    if "fillers" in top:
        _check_fillers(spec, top["fillers"])
    if "hold_out" in top:
        _check_hold_out(spec, top["hold_out"])
    return spec


def _package_folder():  # noqa: ANN202 - a Traversable, whose module moved in Python 3.14
    return resources.files("hf_gradiend.data") / "specs"


def _classes(place: Place) -> dict[str, tuple[str, ...]]:
    entries = place.entries()
    if len(entries) < 2:
        raise place.error(f"Expected at least two classes, but got {list(entries)}.")
    classes: dict[str, tuple[str, ...]] = {}
    class_of: dict[str, str] = {}
    for label, words in entries.items():
        for element in words.elements():
            word = word_at(element)
            # Without capitals, since a text must not hold a word of another class in any spelling.
            other = class_of.setdefault(word.lower(), label)
            if other != label:
                raise element.error(
                    f"Expected each word in one class, but {word!r} is in {other!r}, too."
                )
        classes[label] = words.texts()
    return classes


def _fillers(place: Place, classes: Classes) -> dict[str, Filler]:
    fillers = {}
    for name, value in place.entries().items():
        if not _FILLER.fullmatch(f"[{name}]") or f"[{name}]" == TARGET_SLOT:
            raise value.error(
                f"Expected a filler in capitals other than {TARGET_SLOT}, but got {name!r}."
            )
        lists = value.mapping(tuple(classes)) if isinstance(value.value, dict) else {None: value}
        values = tuple((text, label) for label, each in lists.items() for text in each.texts())
        texts = [text for text, _ in values]
        if len(set(texts)) < len(texts):
            raise value.error(f"Expected each value once, but got {_repeated(texts)!r} twice.")
        fillers[name] = Filler(values)
    return fillers


def _corpus(place: Place, classes: Classes, folder: Path) -> CorpusRules:
    readers: dict[str, Callable[[Place], Any]] = {
        **dict.fromkeys(("must_have", "must_not_have"), _words),
        **dict.fromkeys(("must_match", "must_not_match"), _expressions),
        **dict.fromkeys(("min_left_words", "min_words", "max_words"), lambda each: each.integer(0)),
        "names": lambda each: read_names(each, classes, folder),
        "part_of_speech": _part_of_speech,
    }
    found = place.mapping(tuple(readers))
    rules = CorpusRules(**{key: readers[key](each) for key, each in found.items()})
    if rules.min_words > rules.max_words:
        raise place.error(
            f"Expected min_words of at most max_words, but got {rules.min_words} and "
            f"{rules.max_words}."
        )
    feature_words = {word.lower() for words in classes.values() for word in words}
    for number, word in enumerate(rules.must_not_have):
        if word.lower() in feature_words:
            place = found["must_not_have"].at(number, word)
            raise place.error(f"Expected words of no class, but {word!r} is of one.")
    return rules


def _words(place: Place) -> tuple[str, ...]:
    return tuple(word_at(element) for element in place.elements())


def _expressions(place: Place) -> tuple[str, ...]:
    for element in place.elements():
        try:
            re.compile(element.text())
        except re.error as error:
            raise element.error(
                f"Expected a regular expression, but {element.text()!r} is none: {error}."
            ) from error
    return place.texts()


def _part_of_speech(place: Place) -> PartOfSpeech:
    keys = ("model", "tags")
    found = place.mapping(keys, keys)
    return PartOfSpeech(found["model"].text(), found["tags"].texts())


def _splits(place: Place) -> dict[str, float]:
    shares = {}
    for split, share in place.entries().items():
        if not _SPLIT.fullmatch(split):
            raise share.error(f"Expected letters, digits, _ and . in a name, but got {split!r}.")
        shares[split] = share.share()
    if abs(sum(shares.values()) - 1.0) > 1e-6:
        raise place.error(
            f"Expected shares that sum to 1, but they sum to {sum(shares.values()):g}."
        )
    return shares


def _hold_out(place: Place) -> tuple[str, ...]:
    kinds = tuple(element.one_of(HOLD_OUT) for element in place.elements())
    if len(set(kinds)) < len(kinds):
        raise place.error(f"Expected each kind once, but got {_repeated(kinds)!r} twice.")
    return kinds


def _check_pairing(spec: FeatureSpec, place: Place) -> None:
    if spec.pairing == "any":
        for label, words in spec.classes.items():
            if len(set(words)) < len(words):
                raise place.at(label, words).error(
                    f"Expected each word once, but got {_repeated(words)!r} twice."
                )
        return
    first, *_ = spec.classes
    n_first = len(spec.classes[first])
    for label, words in spec.classes.items():
        if len(words) != n_first:
            raise place.at(label, words).error(
                f"Expected as many words as {first!r} has, {n_first}, since words at the same "
                f"position belong together, but got {len(words)}. Or set pairing to any."
            )
    together = list(zip(*spec.classes.values(), strict=True))
    if len(set(together)) < len(together):
        raise place.error(
            f"Expected other words at each position, but got {_repeated(together)} twice."
        )


def _templates(spec: FeatureSpec, place: Place) -> Iterator[Template]:
    finder = Finder({"class": spec.class_of})
    seen: set[str] = set()
    for group in place.elements():
        keys = group.mapping(("words", "texts"), ("texts",))
        words = _group_words(spec, keys["words"]) if "words" in keys else tuple(spec.class_of)
        for element in keys["texts"].elements():
            text = element.text()
            if text in seen:
                raise element.error(f"Expected each template once, but got {text!r} again.")
            problem = next(_template_problems(spec, text, finder), None)
            if problem is not None:
                raise element.error(problem)
            seen.add(text)
            yield Template(text, words)


def _group_words(spec: FeatureSpec, place: Place) -> tuple[str, ...]:
    words = place.texts()
    for element, word in zip(place.elements(), words, strict=True):
        if word not in spec.class_of:
            known = list(spec.class_of)
            raise element.error(
                f"Expected words of the classes, but got {word!r}. {suggestion(word, known)}"
            )
        if not counterfactuals(spec, word, fitting(spec, words)):
            raise element.error(
                f"Expected words that belong together, but none of the others goes with {word!r}."
            )
    return words


def _template_problems(spec: FeatureSpec, text: str, finder: Finder) -> Iterator[str]:
    left, slot, _ = text.partition(TARGET_SLOT)
    if not slot:
        yield f"Expected the slot {TARGET_SLOT} in the text, but got {text!r}."
    elif len(left.split()) < _LEFT_WORDS:
        yield (
            f"Expected at least {_LEFT_WORDS} words before the slot, since a causal model sees "
            f"only these, but got {text!r}."
        )
    for name in _FILLER.findall(text):
        if f"[{name}]" != TARGET_SLOT and name not in spec.fillers:
            known = [*spec.fillers, TARGET_SLOT.strip("[]")]
            yield f"Expected a filler that is listed, but got [{name}]. {suggestion(name, known)}"
    plain = _FILLER.sub("", text)
    for hit in finder.find(plain):
        word = plain[hit.start : hit.end]
        yield f"Expected words of the classes at the slot alone, but the text has {word!r}."


def _check_fillers(spec: FeatureSpec, place: Place) -> None:
    used = {name for template in spec.templates for name in _FILLER.findall(template.text)}
    finder = Finder({"class": spec.class_of})
    for name, filler in spec.fillers.items():
        if name not in used:
            raise place.at(name, None).error(
                f"Expected fillers that a template has, but none has [{name}]."
            )
        for value, _ in filler.values:
            if finder.find(value):
                raise place.at(name, None).error(
                    f"Expected values without a class's word, but got {value!r}."
                )


def _check_hold_out(spec: FeatureSpec, place: Place) -> None:
    if "name" in spec.hold_out and not spec.corpus.names and NAME not in spec.fillers:
        raise place.error(
            f"Expected names to hold out, but there are neither a filler {NAME} nor names for a "
            f"corpus."
        )
    if "word" in spec.hold_out:
        unit_of = word_units(spec)
        for label, words in spec.classes.items():
            n_units = len({unit_of[word] for word in words})
            if n_units < len(spec.splits):
                raise place.error(
                    f"Expected words to hold out for {len(spec.splits)} splits, but those of "
                    f"{label!r} are in {n_units} groups that share no word."
                )


def _repeated(values: Sequence[object]) -> object:
    return next(value for number, value in enumerate(values) if value in values[:number])
