"""Feature, neutral and evaluation texts that ship with the package; all written for it (CC0)."""

import json
import random
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Literal, TypedDict

from datasets import Dataset, DatasetDict

from hf_gradiend.errors import DataError

OWN_TEXTS = "gender pronouns of hf_gradiend"  # for reports: what `build_gender_pronouns` makes
OWN_TEXTS_LICENSE = "cc0-1.0"  # as the Hub spells it; the resources say CC0-1.0
DEFAULT_ROWS: Mapping[str, int] = {"train": 400, "validation": 100, "test": 200}


class _GenderPronouns(TypedDict):
    classes: dict[str, str]
    names: dict[str, dict[str, list[str]]]
    templates: dict[str, list[str]]


class _Neutral(TypedDict):
    texts: dict[str, list[str]]


class _Occupations(TypedDict):
    occupations: dict[str, dict[str, list[str]]]
    picture: list[str]
    templates: dict[str, list[str]]


class _Pair(TypedDict):
    words: list[str]
    contexts: list[str]


class _Transfer(TypedDict):
    pairs: list[_Pair]
    neutral_pairs: list[_Pair]


def build_gender_pronouns(
    *, n_per_split: Mapping[str, int] | None = None, seed: int = 0
) -> DatasetDict:
    """Sentences with a first name and a slot for the he or she that refers to it.

    Half of each split is of class `F` (she) and half of class `M` (he). Both classes use the same
    templates equally often (give or take one), so that only the name tells the class. No name and
    no template occurs in two splits, and no pair of both occurs twice.

    Args:
        n_per_split: Rows of each split; even numbers. Splits that are left out keep their default
            of 400 (train), 100 (validation) or 200 (test) rows.
        seed: Seed of the choice and of the order of the rows.

    Returns:
        Splits with the columns `text` (with the slot `[TARGET]`), `factual`, `counterfactual`,
        `factual_class`, `counterfactual_class`, `name`, `template` (number of the template) and
        `split`.

    Raises:
        DataError: If a split is unknown, or its number of rows is not positive and even or more
            than there are pairs of a template and a name.
    """
    data: _GenderPronouns = _resource("gender_pronouns.json")
    rows_of = {**DEFAULT_ROWS, **(n_per_split or {})}
    problems = list(_row_count_problems(rows_of, data))
    if problems:
        raise DataError(f"Expected numbers of rows that can be built: {'; '.join(problems)}.")
    first_id = 0
    splits = {}
    for split, templates in data["templates"].items():
        # A split must not depend on how many rows were asked of the splits before it.
        rng = random.Random(f"{seed}/{split}")
        numbered = list(enumerate(templates, start=first_id))
        rng.shuffle(numbered)
        rows = [
            _pronoun_row(data["classes"], label, name, template) | {"split": split}
            for label in data["classes"]
            for template, name in _template_name_pairs(
                rng, numbered, data["names"][label][split], rows_of[split] // 2
            )
        ]
        rng.shuffle(rows)
        splits[split] = Dataset.from_list(rows)
        first_id += len(templates)
    return DatasetDict(splits)


def build_neutral_texts() -> DatasetDict:
    """Sentences without a slot, a person's name or a gendered word.

    Returns:
        Splits `train`, `validation` and `test` with the column `text`; they share no sentence.
    """
    data: _Neutral = _resource("neutral.json")
    return DatasetDict(
        {split: Dataset.from_dict({"text": texts}) for split, texts in data["texts"].items()}
    )


def occupation_prompts(part: Literal["choose", "judge"]) -> Dataset:
    """Sentences about an occupation that leave he or she open.

    The slot is where a causal model that reads only the text before it expects he or she, and the
    text after it makes sense of it for a masked model. The two parts share neither an occupation
    nor a sentence: an edit that was chosen on one is judged on the other.

    Args:
        part: `choose` for selecting an edit, `judge` for reporting it.

    Returns:
        Every occupation of the part in every sentence of the part, with the columns `text` (with
        the slot `[TARGET]`) and `occupation`.

    Raises:
        DataError: If there is no such part.
    """
    data: _Occupations = _resource("occupations.json")
    if part not in data["templates"]:
        raise DataError(f"Expected the part 'choose' or 'judge', but got {part!r}.")
    occupations = [name for group in data["occupations"][part].values() for name in group]
    return _fill_occupations(data["templates"][part], occupations)


def picture_prompts() -> Dataset:
    """The ten occupations that figures show, in the sentences of the part `judge`.

    Returns:
        A part of `occupation_prompts("judge")`, with the same columns, half of the occupations
        mostly held by women and half by men, in this order.
    """
    data: _Occupations = _resource("occupations.json")
    return _fill_occupations(data["templates"]["judge"], data["picture"])


def transfer_pairs() -> Dataset:
    """Contexts for word pairs that a GRADIEND of he and she was never trained on.

    Both words of a pair fit each of its four contexts, and the text before the slot leads to
    either of them. Pairs of ordinary words are the control: they should encode near zero.

    Returns:
        Columns `text` (with the slot `[TARGET]`), `factual` (the female word; of a neutral pair
        the first), `counterfactual` (the other word), `pair` ("woman/man") and `kind` ("feature"
        or "neutral").
    """
    data: _Transfer = _resource("transfer_gender.json")
    rows = [
        {
            "text": context,
            "factual": pair["words"][0],
            "counterfactual": pair["words"][1],
            "pair": "/".join(pair["words"]),
            "kind": kind,
        }
        for kind, pairs in (("feature", data["pairs"]), ("neutral", data["neutral_pairs"]))
        for pair in pairs
        for context in pair["contexts"]
    ]
    return Dataset.from_list(rows)


def _resource(name: str):  # noqa: ANN202  # each caller names the type of its own file
    file = resources.files("hf_gradiend.data") / "resources" / name
    return json.loads(file.read_text(encoding="utf-8"))


def _row_count_problems(rows_of: Mapping[str, int], data: _GenderPronouns) -> Iterator[str]:
    for split, n_rows in rows_of.items():
        if split not in data["templates"]:
            yield f"there is no split {split!r}, only {list(data['templates'])}"
            continue
        n_names = min(len(names[split]) for names in data["names"].values())
        most = len(data["classes"]) * n_names * len(data["templates"][split])
        if not 0 < n_rows <= most or n_rows % 2:
            yield f"{split!r} got {n_rows:,}, but must be even and from 2 to {most:,}"


def _template_name_pairs(
    rng: random.Random, templates: list[tuple[int, str]], names: list[str], n_pairs: int
) -> list[tuple[tuple[int, str], str]]:
    """Distinct pairs that use each template equally often, give or take one."""
    orders = [rng.sample(names, len(names)) for _ in templates]
    pairs = [
        (template, order[turn])
        for turn in range(len(names))
        for template, order in zip(templates, orders, strict=True)
    ]
    return pairs[:n_pairs]


def _pronoun_row(
    words: Mapping[str, str], label: str, name: str, template: tuple[int, str]
) -> dict[str, str | int]:
    (other,) = set(words) - {label}
    number, text = template
    return {
        "text": text.replace("[NAME]", name),
        "factual": words[label],
        "counterfactual": words[other],
        "factual_class": label,
        "counterfactual_class": other,
        "name": name,
        "template": number,
    }


def _fill_occupations(templates: list[str], occupations: list[str]) -> Dataset:
    return Dataset.from_list(
        [
            {"text": template.format(occupation=occupation), "occupation": occupation}
            for occupation in occupations
            for template in templates
        ]
    )
