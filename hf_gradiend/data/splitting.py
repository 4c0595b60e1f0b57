"""Deals texts to splits that share no held-out value, and draws equally many of each class."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hf_gradiend.data.dealing import deal, drawn, rank, root_shares
from hf_gradiend.data.filling import SlottedText
from hf_gradiend.data.specification import FeatureSpec, counterfactuals, fitting, word_units
from hf_gradiend.errors import DataError

SPLIT_APART = "values of hold_out that were dealt to several splits"
NO_COUNTERFACTUAL = "no counterfactual among the split's words"
NOT_DRAWN = "more than balance or max_texts allows"


@dataclass(frozen=True)
class Split:
    """The texts of a split.

    Args:
        texts: The texts, in a random order.
        words: The classes' words that may be their counterfactuals.
    """

    texts: Sequence[SlottedText]
    words: frozenset[str]
    _known: dict[tuple, list] = field(default_factory=dict, repr=False, compare=False)

    def options(self, text: SlottedText, spec: FeatureSpec) -> list[dict[str, tuple[str, ...]]]:
        """The words that a text's word may be exchanged for; see `counterfactuals`."""
        key = (text.word, text.fit)
        if key not in self._known:  # the same for many texts, and slow for thousands of words
            allowed = fitting(spec, text.fit) & self.words
            self._known[key] = counterfactuals(spec, text.word, allowed)
        return self._known[key]


@dataclass(frozen=True)
class Dealt:
    """Texts that are dealt to splits.

    Args:
        splits: The splits.
        hold_out: Kinds of values by which they were dealt.
        dropped: Number of the texts that are in no split by the reason.
    """

    splits: Mapping[str, Split]
    hold_out: Sequence[str]
    dropped: Counter[str]


def split_texts(texts: Sequence[SlottedText], spec: FeatureSpec) -> Dealt:
    """Deal texts to splits.

    Kinds of `spec.hold_out` of which the texts have no value, or each text one of its own, need no
    dealing: no two splits can share such a value.

    Args:
        texts: Different texts.
        spec: The specification, with shares, what to hold out, balance and seed.

    Raises:
        DataError: If there are fewer values to hold out than splits, or a split has no text of a
            class.
    """  # noqa: DOC502 - raised by the functions below
    value_of = _readers(spec)
    kinds = [kind for kind in spec.hold_out if _can_be_shared(texts, kind, value_of[kind])]
    free = [text for text in texts if not any(value_of[kind](text) for kind in kinds)]
    split_of = {kind: _dealt(texts, kind, value_of[kind], len(kinds), spec) for kind in kinds}
    if free:
        split_of["text"] = _dealt(free, "text", value_of["text"], 1, spec)
    dropped: Counter[str] = Counter()
    dealt: dict[str, list[SlottedText]] = {split: [] for split in spec.splits}
    for text in texts:
        values = [(kind, value) for kind in kinds if (value := value_of[kind](text))]
        found = {split_of[kind][value] for kind, value in values or [("text", text.text)]}
        if len(found) == 1:
            dealt[found.pop()].append(text)
        else:
            dropped[SPLIT_APART] += 1
    splits = {}
    for name, own in dealt.items():
        units = word_units(spec)
        words = [w for w in units if "word" not in kinds or split_of["word"][units[w]] == name]
        whole = Split(own, frozenset(words))
        fine = [text for text in own if whole.options(text, spec)]
        splits[name] = replace(whole, texts=_balanced(fine, name, spec))
        dropped[NO_COUNTERFACTUAL] += len(own) - len(fine)
        dropped[NOT_DRAWN] += len(fine) - len(splits[name].texts)
    return Dealt(splits, kinds, +dropped)


def _readers(spec: FeatureSpec) -> dict[str, Callable[[SlottedText], str]]:
    units = word_units(spec)
    return {
        "name": lambda text: text.name,
        "word": lambda text: units[text.word],
        "template": lambda text: "" if text.template is None else str(text.template),
        "document": lambda text: text.document,
        "text": lambda text: text.text,
    }


def _can_be_shared(
    texts: Sequence[SlottedText], kind: str, value_of: Callable[[SlottedText], str]
) -> bool:
    # A word can be shared even where one text has it: as the counterfactual of others.
    weights = Counter(value for text in texts if (value := value_of(text)))
    return max(weights.values(), default=0) > 1 or kind == "word"


def _dealt(
    texts: Sequence[SlottedText],
    kind: str,
    value_of: Callable[[SlottedText], str],
    n_kinds: int,
    spec: FeatureSpec,
) -> dict[str, str]:
    weights = Counter(value for text in texts if (value := value_of(text)))
    if kind == "word":  # also those that no text has may be counterfactuals
        weights.update(dict.fromkeys(word_units(spec).values(), 0))
    if len(weights) < len(spec.splits):
        raise DataError(
            f"Expected at least {len(spec.splits)} values of {kind!r} for as many splits, but the "
            f"texts have {len(weights)}. Give more, or hold out something else."
        )
    strata = _strata(texts, kind, value_of, spec)
    shares = root_shares(spec.splits, n_kinds)
    return deal(weights, shares, spec.seed, strata.get)


def _strata(
    texts: Sequence[SlottedText],
    kind: str,
    value_of: Callable[[SlottedText], str],
    spec: FeatureSpec,
) -> Mapping[str, Hashable]:
    """Groups of values each of which is dealt by the shares, so that all splits are alike."""
    if kind == "template":
        return {str(number): template.words for number, template in enumerate(spec.templates)}
    if kind == "word":
        return spec.class_of if spec.pairing == "any" else {}
    labels: dict[str, set[str]] = {}
    for text in texts:
        labels.setdefault(value_of(text), set()).add(spec.class_of[text.word])
    return {value: frozenset(own) for value, own in labels.items()}


def _balanced(texts: Sequence[SlottedText], split: str, spec: FeatureSpec) -> list[SlottedText]:
    of_class: dict[str, list[SlottedText]] = {label: [] for label in spec.classes}
    for text in texts:
        of_class[spec.class_of[text.word]].append(text)
    numbers = {label: len(own) for label, own in of_class.items()}
    if not all(numbers.values()):
        raise DataError(
            f"Expected texts of every class in the split {split!r}, but got {numbers}. Give more "
            f"texts, hold out less, or change the shares."
        )
    most = len(texts) if spec.max_texts is None else int(spec.max_texts * spec.splits[split])
    if spec.balance:
        each = min(*numbers.values(), most // len(of_class))
        groups = [(own, each) for own in of_class.values()]
    else:
        groups = [(texts, most)]
    kept = [text for own, number in groups for text in drawn(own, number, _stratum, _rank(spec))]
    if not kept:
        raise DataError(
            f"Expected max_texts to leave texts in every split, but {spec.max_texts} leave none in "
            f"{split!r}."
        )
    return sorted(kept, key=lambda text: rank(spec.seed, "order", text.filled))


def _stratum(text: SlottedText) -> Hashable:
    return (text.template, text.word)


def _rank(spec: FeatureSpec) -> Callable[[SlottedText], int]:
    return lambda text: rank(spec.seed, "draw", text.filled)
