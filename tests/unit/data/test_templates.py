import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import blake2b

import pytest
from datasets import Dataset, DatasetDict

from hf_gradiend.data.templates import (
    build_gender_pronouns,
    build_neutral_texts,
    occupation_prompts,
    picture_prompts,
    transfer_pairs,
)
from hf_gradiend.errors import DataError

PRONOUNS = {"he", "she", "him", "her", "his", "hers", "himself", "herself"}
OTHER_GENDERED = """
    woman women man men girl girls boy boys lady ladies gentleman gentlemen female male sister
    sisters brother brothers mother mothers father fathers mom mum dad daughter daughters son sons
    wife wives husband husbands aunt uncle niece nephew grandmother grandfather grandma grandpa
    queen king princess prince mrs mr ms miss sir madam actress actor actors waitress waiter bride
    groom widow widower hostess host heroine salesman chairman policeman businessman fisherman
    fishermen firemen guy guys landlord landlady
"""
GENDERED = PRONOUNS | set(OTHER_GENDERED.split())
COLUMNS = [
    "text",
    "factual",
    "counterfactual",
    "factual_class",
    "counterfactual_class",
    "name",
    "template",
    "split",
]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def forbidden(
    texts: Iterable[str], *, names: Iterable[str], feature_words: Iterable[str]
) -> list[tuple[str, str]]:
    """The offending words of texts that should say nothing about the feature."""
    names, feature_words = set(names), set(feature_words)
    return [
        (word, text)
        for text in texts
        for word in words(text)
        if word in names or word.lower() in feature_words or word == "TARGET"
    ]


def shared(splits: Mapping[str, Dataset], column: str) -> set[object]:
    """Values of a column that occur in more than one split."""
    counts = Counter(value for rows in splits.values() for value in set(rows[column]))
    return {value for value, count in counts.items() if count > 1}


def names_in_texts(splits: Mapping[str, Dataset]) -> dict[str, set[str]]:
    """Names of any split that occur, word by word, in the texts of each split."""
    names = {name for rows in splits.values() for name in rows["name"]}
    return {
        split: {word for text in rows["text"] for word in words(text) if word in names}
        for split, rows in splits.items()
    }


@pytest.fixture(scope="module")
def pronouns() -> DatasetDict:
    return build_gender_pronouns()


@pytest.fixture(scope="module")
def all_pronouns() -> DatasetDict:
    """Every pair of template and name, so that a property holds for every seed."""
    return build_gender_pronouns(n_per_split={"train": 5760, "validation": 360, "test": 1000})


@pytest.fixture(scope="module")
def feature_words() -> set[str]:
    pairs = transfer_pairs().filter(lambda kind: kind == "feature", input_columns="kind")
    transferred = {word.lower() for word in [*pairs["factual"], *pairs["counterfactual"]]}
    return GENDERED | transferred


def test_pronoun_rows_have_the_columns_and_sizes_of_the_contract(pronouns):
    assert {split: len(rows) for split, rows in pronouns.items()} == {
        "train": 400,
        "validation": 100,
        "test": 200,
    }
    assert all(rows.column_names == COLUMNS for rows in pronouns.values())


def test_half_of_each_split_is_of_each_class(pronouns):
    for rows in pronouns.values():
        assert Counter(rows["factual_class"]) == {"F": len(rows) // 2, "M": len(rows) // 2}


def test_both_classes_use_the_same_templates_equally_often(pronouns):
    for rows in pronouns.values():
        used = Counter(zip(rows["factual_class"], rows["template"], strict=True))
        for (label, template), count in used.items():
            assert count == used[("M" if label == "F" else "F"), template]


def test_the_counterfactual_is_the_other_pronoun_and_the_other_class(all_pronouns):
    rows = all_pronouns["test"]
    seen = set(zip(*(rows[column] for column in COLUMNS[1:5]), strict=True))

    assert seen == {("she", "he", "F", "M"), ("he", "she", "M", "F")}


def test_splits_share_no_name_and_no_template(all_pronouns):
    assert shared(all_pronouns, "name") == set()
    assert shared(all_pronouns, "template") == set()
    by_text = names_in_texts(all_pronouns)
    assert all(by_text[split] == set(rows["name"]) for split, rows in all_pronouns.items())


def test_the_check_for_shared_names_finds_a_planted_one(pronouns):
    planted = {**pronouns, "test": pronouns["train"].select(range(3))}

    assert shared(planted, "name") == set(planted["test"]["name"])
    assert shared(planted, "template") == set(planted["test"]["template"])


def test_no_class_shares_a_name_with_the_other(all_pronouns):
    of_class = {"F": set(), "M": set()}
    for rows in all_pronouns.values():
        for label, name in zip(rows["factual_class"], rows["name"], strict=True):
            of_class[label].add(name)

    assert of_class["F"].isdisjoint(of_class["M"])
    assert {label: len(names) for label, names in of_class.items()} == {"F": 80, "M": 80}


def test_no_pair_of_template_and_name_occurs_twice(all_pronouns):
    for rows in all_pronouns.values():
        assert len(set(zip(rows["template"], rows["name"], strict=True))) == len(rows)


def test_pronoun_texts_hold_a_name_before_the_slot_and_no_gendered_word(all_pronouns):
    for rows in all_pronouns.values():
        for text, name in zip(rows["text"], rows["name"], strict=True):
            before_slot, _, after_slot = text.partition("[TARGET]")
            assert name in words(before_slot)
            assert "[NAME]" not in text
            assert not GENDERED.intersection(words((before_slot + after_slot).lower()))


def test_no_slot_of_a_pronoun_begins_a_sentence(all_pronouns):
    for rows in all_pronouns.values():
        assert not [text for text in rows["text"] if re.search(r'(^|[.!?]["”]?\s)\[TARGET\]', text)]


def test_transfer_names_are_not_in_the_pronoun_texts(all_pronouns, feature_words):
    names = {name.lower() for rows in all_pronouns.values() for name in rows["name"]}

    assert names.isdisjoint(feature_words)
    assert {"mary", "john"} <= feature_words  # the control: names are among the words


def test_the_rows_are_those_that_published_numbers_were_measured_on(pronouns):
    # A regression snapshot of our own output, not a truth.
    content = {split: rows.to_list() for split, rows in pronouns.items()}
    digest = blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    assert digest == "4002ae68a0680eb2391fb858eeb081b8"


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(pronouns):
    again = build_gender_pronouns(seed=0)
    other = build_gender_pronouns(seed=1)

    assert again["train"].to_list() == pronouns["train"].to_list()
    assert other["train"]["text"] != pronouns["train"]["text"]


def test_a_split_does_not_depend_on_the_size_of_another(pronouns):
    smaller = build_gender_pronouns(n_per_split={"train": 20})

    assert len(smaller["train"]) == 20
    assert smaller["test"].to_list() == pronouns["test"].to_list()


@pytest.mark.parametrize(
    ("n_per_split", "message"),
    [
        ({"train": 5762}, r"'train' got 5,762, but must be even and from 2 to 5,760"),
        ({"test": 3}, r"'test' got 3, but must be even"),
        ({"validation": 0}, r"'validation' got 0"),
        ({"dev": 10}, r"there is no split 'dev'"),
    ],
)
def test_numbers_of_rows_that_cannot_be_built_are_errors(n_per_split, message):
    with pytest.raises(DataError, match=message):
        build_gender_pronouns(n_per_split=n_per_split)


def test_neutral_texts_hold_no_slot_no_name_and_no_feature_word(all_pronouns, feature_words):
    names = {name for rows in all_pronouns.values() for name in rows["name"]}

    for rows in build_neutral_texts().values():
        assert forbidden(rows["text"], names=names, feature_words=feature_words) == []


@pytest.mark.parametrize(
    "planted", ["A [TARGET] stood there.", "We met Susan.", "The Queen left.", "It was hers."]
)
def test_the_check_of_neutral_texts_finds_a_planted_word(planted, all_pronouns, feature_words):
    names = {name for rows in all_pronouns.values() for name in rows["name"]}

    assert len(forbidden([planted], names=names, feature_words=feature_words)) == 1


def test_neutral_splits_share_no_text():
    neutral = build_neutral_texts()

    assert {split: len(rows) for split, rows in neutral.items()} == {
        "train": 90,
        "validation": 20,
        "test": 40,
    }
    assert shared(neutral, "text") == set()
    assert all(len(set(rows["text"])) == len(rows) for rows in neutral.values())


def test_built_in_texts_have_8_to_25_words(all_pronouns):
    for splits in (all_pronouns, build_neutral_texts()):
        for rows in splits.values():
            assert not [text for text in rows["text"] if not 8 <= len(text.split()) <= 25]


def test_the_parts_of_the_occupation_prompts_share_no_occupation_and_no_sentence():
    parts = {"choose": occupation_prompts("choose"), "judge": occupation_prompts("judge")}
    sentences = {
        part: {
            text.replace(occupation, "{}")
            for text, occupation in zip(rows["text"], rows["occupation"], strict=True)
        }
        for part, rows in parts.items()
    }

    assert shared(parts, "occupation") == set()
    assert sentences["choose"].isdisjoint(sentences["judge"])
    assert {len(found) for found in sentences.values()} == {4}
    assert {len(set(rows["occupation"])) for rows in parts.values()} == {20}


def test_occupation_prompts_leave_the_gender_open():
    for part in ("choose", "judge"):
        for text in occupation_prompts(part)["text"]:
            assert text.count("[TARGET]") == 1
            assert not GENDERED.intersection(words(text.lower()))
            assert "{" not in text


def test_an_unknown_part_of_the_occupation_prompts_is_an_error():
    # Unwrapped, because the checks of types at test time would refuse the value first.
    prompts = inspect.unwrap(occupation_prompts)

    with pytest.raises(DataError, match="but got 'test'"):
        prompts("test")  # pyright: ignore[reportArgumentType]


def test_picture_prompts_are_ten_of_the_judged_occupations():
    picture = picture_prompts()

    assert len(set(picture["occupation"])) == 10
    assert set(picture["text"]) <= set(occupation_prompts("judge")["text"])


def test_every_transfer_pair_has_four_contexts_with_one_slot():
    rows = transfer_pairs()
    of_pair = Counter(zip(rows["kind"], rows["pair"], strict=True))

    assert set(of_pair.values()) == {4}
    assert Counter(kind for kind, _ in of_pair) == {"feature": 26, "neutral": 8}
    assert all(text.count("[TARGET]") == 1 for text in rows["text"])
    assert len(set(rows["text"])) == len(rows)


def test_the_female_word_of_a_transfer_pair_is_factual():
    rows = transfer_pairs()
    words_of = dict(
        zip(rows["pair"], zip(rows["factual"], rows["counterfactual"], strict=True), strict=True)
    )

    assert words_of["woman/man"] == ("woman", "man")
    assert words_of["Mrs/Mr"] == ("Mrs", "Mr")
    assert {"he", "she"}.isdisjoint(word for pair in words_of.values() for word in pair)


def test_transfer_contexts_do_not_give_the_gender_away():
    for text in transfer_pairs()["text"]:
        assert not GENDERED.intersection(words(text.lower())), text
