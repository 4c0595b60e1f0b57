"""Texts with a slot, from templates and their fillers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from hf_gradiend.data.loading import TARGET_SLOT
from hf_gradiend.data.specification import NAME, FeatureSpec, Template
from hf_gradiend.errors import ConfigError

MOST_TEXTS = 1_000_000


@dataclass(frozen=True)
class SlottedText:
    """A text with a slot and the word that belongs there.

    Args:
        text: The text.
        word: The word, of one of the classes.
        fit: The classes' words that fit the slot.
        name: The person's name in it; empty where there is none.
        template: Number of the template that it is from; `None` for a corpus.
        document: Document that it is from; empty for a template.
    """

    text: str
    word: str
    fit: tuple[str, ...]
    name: str = ""
    template: int | None = None
    document: str = ""

    @property
    def filled(self) -> str:
        """The text with its word."""
        return self.text.replace(TARGET_SLOT, self.word)


def filled_templates(spec: FeatureSpec) -> list[SlottedText]:
    """Every template with every combination of its fillers' values and every word that fits.

    Args:
        spec: A specification with templates.

    Raises:
        ConfigError: If these are more than a million texts.
    """
    texts: list[SlottedText] = []
    for number, template in enumerate(spec.templates):
        for each in _filled(template, number, spec):
            texts.append(each)
            if len(texts) > MOST_TEXTS:
                raise ConfigError(
                    f"Expected at most {MOST_TEXTS:,} texts from the templates of {spec.id!r}, but "
                    f"the values of their fillers give more. List fewer values."
                )
    return texts


def _filled(template: Template, number: int, spec: FeatureSpec) -> Iterator[SlottedText]:
    names = [name for name in spec.fillers if f"[{name}]" in template.text]
    for label, words in spec.classes.items():
        values = [
            [value for value, own in spec.fillers[name].values if own in (None, label)]
            for name in names
        ]
        own_words = [word for word in dict.fromkeys(words) if word in template.words]
        for chosen in product(*values):
            text = template.text
            for name, value in zip(names, chosen, strict=True):
                text = text.replace(f"[{name}]", value)
            person = dict(zip(names, chosen, strict=True)).get(NAME, "")
            for word in own_words:
                yield SlottedText(text, word, template.words, person, number)
