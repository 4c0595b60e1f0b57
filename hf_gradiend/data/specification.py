"""What a feature is made from: its words, templates, rules for raw text, and splits."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

HOLD_OUT = ("name", "word", "template", "document")
NAME = "NAME"  # the filler whose values are persons' names

Pairing = Literal["position", "any"]


@dataclass(frozen=True)
class Template:
    """A text with a slot, and perhaps with fillers such as `[NAME]`.

    Args:
        text: The text.
        words: The classes' words that fit its slot.
    """

    text: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Filler:
    """What may stand in place of a filler of templates.

    Args:
        values: Each value with the class that it decides for; `None` for none.
    """

    values: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class PartOfSpeech:
    """Tags that the word at the slot must have.

    Args:
        model: Name or folder of a spaCy pipeline.
        tags: Universal tags, such as `ADJ`, one of which it must be.
    """

    model: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class CorpusRules:
    """Which sentences of raw text are kept.

    Args:
        must_have: Words at least one of which occurs; capitals do not matter.
        must_not_have: Words none of which occurs; capitals do not matter.
        must_match: Regular expressions all of which are found.
        must_not_match: Regular expressions none of which is found.
        min_left_words: Least number of words before the slot.
        min_words: Least number of words.
        max_words: Largest number of words.
        names: Class of each person's name, as it is spelled; `None` where it tells no class. A
            sentence must have exactly one of them, before the slot and of the word's class.
        part_of_speech: Tags of the word at the slot.
    """

    must_have: tuple[str, ...] = ()
    must_not_have: tuple[str, ...] = ()
    must_match: tuple[str, ...] = ()
    must_not_match: tuple[str, ...] = ()
    min_left_words: int = 2
    min_words: int = 5
    max_words: int = 60
    names: Mapping[str, str | None] = field(default_factory=dict)
    part_of_speech: PartOfSpeech | None = None


@dataclass(frozen=True)
class FeatureSpec:
    """Everything that decides what a feature data set holds, but for the corpus.

    Args:
        id: The specification's file name without its ending.
        name: Name for people.
        about: What it measures and what it does not; Markdown.
        language: Code of the texts' language.
        license: Licence as the Hub spells it.
        classes: Words of each class.
        pairing: `position`: the n-th words of the classes belong together. `any`: each word goes
            with any of the other class.
        templates: Texts for building without a corpus.
        fillers: Values of the templates' fillers.
        corpus: Rules for building from a corpus.
        neutral_texts: Neutral texts for building without a corpus, besides the package's own where
            the language is English.
        max_neutral_texts: Largest number of neutral texts.
        splits: Share of each split; the shares sum to 1.
        hold_out: Kinds of values that no two splits share: of `HOLD_OUT`.
        balance: Whether a split has equally many texts of each class.
        max_texts: Largest number of texts; `None` for all.
        seed: Seed of every choice.
        source: The specification as it was written, in YAML.
    """

    id: str
    name: str
    about: str
    language: str
    license: str
    classes: Mapping[str, tuple[str, ...]]
    pairing: Pairing = "position"
    templates: tuple[Template, ...] = ()
    fillers: Mapping[str, Filler] = field(default_factory=dict)
    corpus: CorpusRules = field(default_factory=CorpusRules)
    neutral_texts: tuple[str, ...] = ()
    max_neutral_texts: int = 1000
    splits: Mapping[str, float] = field(
        default_factory=lambda: {"train": 0.6, "validation": 0.15, "test": 0.25}
    )
    hold_out: tuple[str, ...] = ()
    balance: bool = True
    max_texts: int | None = None
    seed: int = 0
    source: str = ""

    @cached_property
    def class_of(self) -> dict[str, str]:
        """The class of each word."""
        return {word: label for label, words in self.classes.items() for word in words}


def fitting(spec: FeatureSpec, words: Collection[str]) -> set[str]:
    """Words that may stand at a slot as counterfactuals where some words are said to fit it.

    Args:
        spec: The specification.
        words: Words that fit. Of a class that is not among them, all words do.
    """
    fit: set[str] = set()
    for own in spec.classes.values():
        fit |= set(own).intersection(words) or set(own)
    return fit


def counterfactuals(
    spec: FeatureSpec, word: str, allowed: Collection[str]
) -> list[dict[str, tuple[str, ...]]]:
    """The words of the other classes that a word may be exchanged for.

    Args:
        spec: The specification.
        word: A word of one class.
        allowed: Words that may be taken.

    Returns:
        Alternatives, each with at least one word of every other class: for the pairing `position`
        one for each position of the word, for `any` one with all words. Empty where a class has
        no word that is allowed.
    """
    label = spec.class_of[word]
    others = {other: words for other, words in spec.classes.items() if other != label}
    if spec.pairing == "position":
        found = [
            {other: (words[place],) for other, words in others.items()}
            for place, own in enumerate(spec.classes[label])
            if own == word
        ]
        return [each for each in found if all(w in allowed for (w,) in each.values())]
    words_of = {
        other: tuple(each for each in words if each in allowed) for other, words in others.items()
    }
    return [words_of] if all(words_of.values()) else []


def word_units(spec: FeatureSpec) -> dict[str, str]:
    """The group that each word is held out with.

    Args:
        spec: The specification.

    Returns:
        For the pairing `any` each word is a group of its own. For `position` the words of one
        position are a group, and groups that share a word are one.
    """
    if spec.pairing == "any":
        return {word: word for word in spec.class_of}
    unit_of: dict[str, str] = {}
    for words in zip(*spec.classes.values(), strict=True):
        joined = {unit_of[word] for word in words if word in unit_of}
        unit = min(joined, default="/".join(words))
        unit_of.update(dict.fromkeys(words, unit))
        unit_of.update({word: unit for word, old in unit_of.items() if old in joined})
    return unit_of
