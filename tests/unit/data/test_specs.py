"""Specifications: what they mean, and the one line in which each mistake is refused."""

import json
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from hf_gradiend.data.spec_files import load_spec, package_specs, parse_spec
from hf_gradiend.data.specification import (
    CorpusRules,
    Filler,
    PartOfSpeech,
    Template,
    counterfactuals,
    fitting,
    word_units,
)
from hf_gradiend.errors import ConfigError

HEAD = """\
name: Weather
about: Words of warm and cold weather.
language: en
license: cc0-1.0
"""
CLASSES = """\
classes:
  warm: [sunny, hot]
  cold: [icy, cold]
"""
NAMES = "name,female,male\nAnna,990,10\nPaul,5,995\nKim,500,500\nRare,9,0\nMay,999,1\n"


def spec_of(text, tmp_path=Path("somewhere")):
    return parse_spec(text, tmp_path / "weather.yaml")


# ---- what is read ----


def test_a_short_specification_has_the_defaults():
    spec = spec_of(HEAD + CLASSES)

    assert (spec.id, spec.name, spec.language) == ("weather", "Weather", "en")
    assert spec.classes == {"warm": ("sunny", "hot"), "cold": ("icy", "cold")}
    assert spec.splits == {"train": 0.6, "validation": 0.15, "test": 0.25}
    assert (spec.pairing, spec.hold_out, spec.balance, spec.seed) == ("position", (), True, 0)
    assert spec.corpus == CorpusRules()
    assert spec.source == HEAD + CLASSES


def test_every_key_is_read():
    spec = spec_of(
        HEAD
        + """\
classes: {warm: [sunny, hot], cold: [icy, cold, grey]}
pairing: any
fillers:
  DAY: [Monday, Friday]
  PLACE: {warm: [desert], cold: [glacier]}
templates:
  - words: [hot, cold]
    texts: ["On [DAY] in the [PLACE] it is [TARGET]."]
  - texts: ["In the end, it was [TARGET]."]
corpus:
  must_have: [weather]
  must_not_have: [ice cream]
  must_match: ["day$"]
  must_not_match: ["[0-9]"]
  min_left_words: 3
  min_words: 4
  max_words: 9
  names: {warm: [Anna], cold: [Paul]}
  part_of_speech: {model: en_core_web_sm, tags: [ADJ]}
neutral_texts: [A chair.]
max_neutral_texts: 7
splits: {train: 0.75, test: 0.25}
hold_out: [template, document]
balance: false
max_texts: 50
seed: 3
"""
    )

    assert spec.pairing == "any"
    assert spec.fillers["DAY"] == Filler((("Monday", None), ("Friday", None)))
    assert spec.fillers["PLACE"] == Filler((("desert", "warm"), ("glacier", "cold")))
    assert spec.templates == (
        Template("On [DAY] in the [PLACE] it is [TARGET].", ("hot", "cold")),
        Template("In the end, it was [TARGET].", ("sunny", "hot", "icy", "cold", "grey")),
    )
    assert spec.corpus == CorpusRules(
        ("weather",), ("ice cream",), ("day$",), ("[0-9]",), 3, 4, 9,
        {"Anna": "warm", "Paul": "cold"}, PartOfSpeech("en_core_web_sm", ("ADJ",)),
    )  # fmt: skip
    assert (spec.neutral_texts, spec.max_neutral_texts) == (("A chair.",), 7)
    assert (spec.splits, spec.hold_out) == (
        {"train": 0.75, "test": 0.25},
        ("template", "document"),
    )
    assert (spec.balance, spec.max_texts, spec.seed) == (False, 50, 3)


def test_names_of_a_table_have_the_class_that_their_counts_tell(tmp_path):
    (tmp_path / "names.csv").write_text(NAMES, encoding="utf-8")
    spec = spec_of(
        HEAD
        + CLASSES
        + """\
corpus:
  names:
    file: names.csv
    counts: {warm: female, cold: male}
    min_count: 100
    min_share: 0.9
    except: [May]
""",
        tmp_path,
    )

    # Kim is of both and Rare too rare; May is no name here.
    assert spec.corpus.names == {"Anna": "warm", "Paul": "cold", "Kim": None, "Rare": None}


# ---- words that go with each other ----


def test_by_position_a_word_goes_with_the_words_at_its_positions():
    spec = spec_of(HEAD + "classes: {a: [x1, x2, x1], b: [y1, y2, y3], c: [z1, z2, z1]}\n")

    assert counterfactuals(spec, "x1", spec.class_of) == [
        {"b": ("y1",), "c": ("z1",)},
        {"b": ("y3",), "c": ("z1",)},
    ]
    assert counterfactuals(spec, "x1", {"y3", "z1"}) == [{"b": ("y3",), "c": ("z1",)}]
    assert counterfactuals(spec, "y2", {"x1", "z2"}) == []


def test_by_any_a_word_goes_with_all_words_of_the_other_classes():
    spec = spec_of(HEAD + "pairing: any\nclasses: {a: [x1, x2], b: [y1], c: [z1, z2]}\n")

    assert counterfactuals(spec, "y1", spec.class_of) == [{"a": ("x1", "x2"), "c": ("z1", "z2")}]
    assert counterfactuals(spec, "y1", {"x2", "z1", "z2"}) == [{"a": ("x2",), "c": ("z1", "z2")}]
    assert counterfactuals(spec, "y1", {"x1", "x2"}) == []


def test_words_that_fit_limit_the_counterfactuals_of_their_own_classes_only():
    spec = spec_of(HEAD + CLASSES)

    assert fitting(spec, ["hot"]) == {"hot", "icy", "cold"}
    assert fitting(spec, ["hot", "cold"]) == {"hot", "cold"}


def test_words_are_held_out_with_those_that_they_belong_to():
    spec = spec_of(HEAD + "classes: {a: [x1, x2, x3, x1], b: [y1, y2, y3, y2]}\n")
    unit_of = word_units(spec)

    # x1 joins the first position, with y1, to the last and so the second, with y2.
    assert unit_of["x1"] == unit_of["y1"] == unit_of["y2"] == unit_of["x2"]
    assert unit_of["x3"] == unit_of["y3"] != unit_of["x1"]


# ---- what is refused ----


def changed(**changes):
    """A good specification with some of its top-level blocks replaced or added."""
    blocks = {
        "head": HEAD,
        "classes": CLASSES,
        "fillers": "fillers:\n  DAY: [Monday]\n",
        "templates": 'templates:\n  - texts:\n    - "On [DAY] it was [TARGET]."\n',
        "more": "",
    }
    return "".join({**blocks, **changes}.values())


def templates(*texts, words=""):
    lines = "".join(f"    - {json.dumps(text)}\n" for text in texts)
    return f"templates:\n  - {words}texts:\n{lines}"


REFUSALS = {
    "no YAML": ("name: [", "line 1: Expected YAML, but expected the node content, but found "
                "'<stream end>'."),
    "empty": ("", "Expected keys with values, but the file is empty."),
    "no mapping": ("- 1", "line 1: Expected keys with values, but got [1]."),
    "unknown key": (changed(more="clases: 1\n"),
                    "line 13, clases: Unknown key 'clases'. Did you mean 'classes'?"),
    "unknown key, unlike all": (
        changed(more="corpus:\n  zzz: 1\n"),
        "line 14, corpus.zzz: Unknown key 'zzz'. Known are must_have, must_not_have, must_match, "
        "must_not_match, min_left_words, min_words, max_words, names, part_of_speech."),
    "missing key": (
        changed(head="name: Weather\nabout: x\nlicense: mit\n"),
        "line 1: Expected the keys name, about, language, license, classes, but ['language'] are "
        "missing."),
    "a key twice": (
        changed(classes="classes:\n  warm: [hot]\n  cold: [icy]\n  warm: [sunny]\n"),
        "line 8, classes.warm: Expected each key once, but got 'warm' twice."),
    "a word that YAML reads as another value": (
        changed(classes="classes:\n  yes: [hot]\n  cold: [icy]\n"),
        "line 5, classes: Expected text as a key, but got True. Put the word in quotation marks "
        "if it is one."),
    "a number as a word": (
        changed(classes="classes:\n  warm:\n  - hot\n  - 30\n  cold: [icy, cold]\n"),
        "line 8, classes.warm[1]: Expected text, but got 30. Put the word in quotation marks if "
        "it is one."),
    "nothing as text": (changed(head=HEAD.replace("Weather", "")),
                        "line 1, name: Expected text, but got None. Write it as text."),
    "blank text": (changed(head=HEAD.replace("Weather", "' '")),
                   "line 1, name: Expected text, but it is blank."),
    "one class": (changed(classes="classes: {warm: [hot]}\n"),
                  "line 5, classes: Expected at least two classes, but got ['warm']."),
    "an empty class": (
        changed(classes="classes:\n  warm: [hot]\n  cold: []\n"),
        "line 7, classes.cold: Expected a list with at least one element, but got []."),
    "words that are no list": (
        changed(classes="classes:\n  warm: hot\n  cold: [icy]\n"),
        "line 6, classes.warm: Expected a list with at least one element, but got 'hot'."),
    "a word in two classes": (
        changed(classes="classes:\n  warm: [hot, mild]\n  cold: [icy, Hot]\n"),
        "line 7, classes.cold[1]: Expected each word in one class, but 'Hot' is in 'warm', too."),
    "a word with signs": (
        changed(classes="classes:\n  warm: [hot!]\n  cold: [icy]\n"),
        "line 6, classes.warm[0]: Expected words that begin and end with a letter or digit, with "
        "single spaces between them, but got 'hot!'."),
    "another number of words": (
        changed(classes="classes:\n  warm: [hot, mild]\n  cold: [icy]\n"),
        "line 7, classes.cold: Expected as many words as 'warm' has, 2, since words at the same "
        "position belong together, but got 1. Or set pairing to any."),
    "the same words at two positions": (
        changed(classes="classes:\n  warm: [hot, hot]\n  cold: [icy, icy]\n"),
        "line 5, classes: Expected other words at each position, but got ('hot', 'icy') twice."),
    "a word twice in a set": (
        changed(classes="classes:\n  warm: [hot, hot]\n  cold: [icy]\n", more="pairing: any\n"),
        "line 6, classes.warm: Expected each word once, but got 'hot' twice."),
    "another pairing": (
        changed(more="pairing: random\n"),
        "line 13, pairing: Expected one of ['position', 'any'], but got 'random'."),
    "shares that sum to less": (
        changed(more="splits: {train: 0.5, test: 0.4}\n"),
        "line 13, splits: Expected shares that sum to 1, but they sum to 0.9."),
    "a share of nothing": (
        changed(more="splits:\n  train: 1\n  test: 0\n"),
        "line 15, splits.test: Expected a share above 0 and at most 1, but got 0."),
    "a split with signs": (
        changed(more="splits: {a-b: 1}\n"),
        "line 13, splits.a-b: Expected letters, digits, _ and . in a name, but got 'a-b'."),
    "another kind to hold out": (
        changed(more="hold_out: [names]\n"),
        "line 13, hold_out[0]: Expected one of ['name', 'word', 'template', 'document'], but got "
        "'names'."),
    "a kind twice": (changed(more="hold_out: [word, word]\n"),
                     "line 13, hold_out: Expected each kind once, but got 'word' twice."),
    "no names to hold out": (
        changed(more="hold_out: [name]\n"),
        "line 13, hold_out: Expected names to hold out, but there are neither a filler NAME nor "
        "names for a corpus."),
    "too few words to hold out": (
        changed(more="hold_out: [word]\n"),
        "line 13, hold_out: Expected words to hold out for 3 splits, but those of 'warm' are in 2 "
        "groups that share no word."),
    "no truth": (changed(more="balance: 1\n"),
                 "line 13, balance: Expected true or false, but got 1."),
    "no whole number": (
        changed(more="max_texts: 0\n"),
        "line 13, max_texts: Expected a whole number of at least 1, but got 0."),
    "a negative seed": (changed(more="seed: -1\n"),
                        "line 13, seed: Expected a whole number of at least 0, but got -1."),
    "no slot": (
        changed(templates=templates("On [DAY] it was TARGET.")),
        "line 12, templates[0].texts[0]: Expected the slot [TARGET] in the text, but got 'On [DAY] "
        "it was TARGET.'."),
    "nothing before the slot": (
        changed(templates=templates("On [DAY] it was [TARGET].", "So [TARGET] it was.")),
        "line 13, templates[0].texts[1]: Expected at least 2 words before the slot, since a causal "
        "model sees only these, but got 'So [TARGET] it was.'."),
    "an unknown filler": (
        changed(templates=templates("On [DAYS] it was [TARGET].")),
        "line 12, templates[0].texts[0]: Expected a filler that is listed, but got [DAYS]. Did you "
        "mean 'DAY'?"),
    "a class's word beside the slot": (
        changed(templates=templates("On [DAY] it was Icy and [TARGET].")),
        "line 12, templates[0].texts[0]: Expected words of the classes at the slot alone, but the "
        "text has 'Icy'."),
    "a template twice": (
        changed(templates=templates(*["On [DAY] it was [TARGET]."] * 2)),
        "line 13, templates[0].texts[1]: Expected each template once, but got 'On [DAY] it was "
        "[TARGET].' again."),
    "an unknown word of a group": (
        changed(templates=templates("On [DAY] it was [TARGET].", words="words: [hott]\n    ")),
        "line 11, templates[0].words[0]: Expected words of the classes, but got 'hott'. Did you "
        "mean 'hot'?"),
    "words of a group that do not belong together": (
        changed(templates=templates("On [DAY] it was [TARGET].", words="words: [hot, icy]\n    ")),
        "line 11, templates[0].words[0]: Expected words that belong together, but none of the "
        "others goes with 'hot'."),
    "a group without texts": (
        changed(templates="templates:\n  - words: [hot]\n"),
        "line 11, templates[0]: Expected the keys texts, but ['texts'] are missing."),
    "an unused filler": (
        changed(fillers="fillers:\n  DAY: [Monday]\n  TOWN: [Rome]\n"),
        "line 10, fillers.TOWN: Expected fillers that a template has, but none has [TOWN]."),
    "a filler in small letters": (
        changed(fillers="fillers:\n  day: [Monday]\n"),
        "line 9, fillers.day: Expected a filler in capitals other than [TARGET], but got 'day'."),
    "a value twice": (
        changed(fillers="fillers:\n  DAY: [Monday, Monday]\n"),
        "line 9, fillers.DAY: Expected each value once, but got 'Monday' twice."),
    "a value of an unknown class": (
        changed(fillers="fillers:\n  DAY: {hot: [Monday]}\n"),
        "line 9, fillers.DAY.hot: Unknown key 'hot'. Known are warm, cold."),
    "a class's word in a value": (
        changed(fillers="fillers:\n  DAY: [a cold Monday]\n"),
        "line 9, fillers.DAY: Expected values without a class's word, but got 'a cold Monday'."),
    "no regular expression": (
        changed(more="corpus:\n  must_match:\n  - 'a('\n"),
        "line 15, corpus.must_match[0]: Expected a regular expression, but 'a(' is none: missing "
        "), unterminated subpattern at position 1."),
    "lengths that exclude all": (
        changed(more="corpus: {min_words: 9, max_words: 8}\n"),
        "line 13, corpus: Expected min_words of at most max_words, but got 9 and 8."),
    "a class's word that must not occur": (
        changed(more="corpus: {must_not_have: [rain, HOT]}\n"),
        "line 13, corpus.must_not_have[1]: Expected words of no class, but 'HOT' is of one."),
    "a name in two classes": (
        changed(more="corpus: {names: {warm: [Kim], cold: [Kim]}}\n"),
        "line 13, corpus.names.cold[0]: Expected each name in one class, but 'Kim' is in 'warm', "
        "too."),
    "options of a table without one": (
        changed(more="corpus: {names: {min_count: 3}}\n"),
        "line 13, corpus.names: Expected the key file where names come from a table."),
    "no such table": (
        changed(more="corpus: {names: {file: none.csv, counts: {warm: f, cold: m}}}\n"),
        "line 13, corpus.names.file: Expected a table of names, but '{folder}/none.csv' could not "
        "be read: [Errno 2] No such file or directory: '{folder}/none.csv'."),
    "a table without the columns": (
        changed(more="corpus:\n  names:\n    file: names.csv\n    counts: {warm: f, cold: male}\n"),
        "line 15, corpus.names.file: Expected the columns ['name', 'f', 'male'], the counts as "
        "whole numbers, but line 2 of 'names.csv' has {'name': 'Anna', 'female': '990', 'male': "
        "'10'}."),
    "a table without a class": (
        changed(more="corpus:\n  names:\n    file: names.csv\n    min_count: 996\n"
                     "    counts: {warm: female, cold: male}\n"),
        "line 14, corpus.names: Expected names of each class, but 'names.csv' has none of "
        "['cold']."),
    "tags without a pipeline": (
        changed(more="corpus: {part_of_speech: {tags: [ADJ]}}\n"),
        "line 13, corpus.part_of_speech: Expected the keys model, tags, but ['model'] are "
        "missing."),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSALS)
def test_a_mistake_is_one_line_that_names_its_place(tmp_path, mistake):
    text, message = REFUSALS[mistake]
    (tmp_path / "names.csv").write_text(NAMES, encoding="utf-8")
    file = "weather.yaml: " if mistake == "empty" else "weather.yaml, "

    with pytest.raises(ConfigError) as caught:
        spec_of(text, tmp_path)

    assert str(caught.value) == file + message.replace("{folder}", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_specification_that_is_changed_for_the_refusals_is_a_good_one():
    assert len(spec_of(changed()).templates) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("religon", "Expected a YAML file or the name of a specification, but got 'religon'. Did "
                    "you mean 'religion'?"),
        ("zzz", "Expected a YAML file or the name of a specification, but got 'zzz'. Known are "
                "gender, number, race, religion, sentiment."),
        ("none.yaml", "Expected a specification, but 'none.yaml' could not be read: [Errno 2] No "
                      "such file or directory: 'none.yaml'."),
    ],
)  # fmt: skip
def test_a_specification_that_is_not_there_is_an_error(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError) as caught:
        load_spec(name)

    assert str(caught.value) == message


def test_a_name_is_one_of_the_package_also_where_a_folder_is_named_so(tmp_path, monkeypatch):
    (tmp_path / "gender").mkdir()
    monkeypatch.chdir(tmp_path)

    assert load_spec("gender").name == "Gender by name and pronoun"


# ---- the package's own ----

SPECS = ["gender", "number", "race", "religion", "sentiment"]


def test_these_specifications_ship_with_the_package():
    assert package_specs() == SPECS


@pytest.mark.parametrize("name", SPECS)
def test_a_specification_of_the_package_says_what_it_measures_and_has_templates(name):
    spec = load_spec(name)

    assert len(spec.about) > 300
    assert (spec.language, spec.license) == ("en", "cc0-1.0")
    assert len(spec.templates) >= 60
    assert spec.splits["test"] == 0.3
    assert {"template", "document"} <= {*spec.hold_out}
    for label, words in spec.classes.items():
        # Not at the beginning: each word is followed as it is spelled within a sentence.
        lower = [word for word in words if word != "I"]
        assert all(word[0].islower() or name in ("religion", "race") for word in lower), label


@pytest.mark.parametrize("name", SPECS)
def test_a_filler_that_tells_the_class_stands_before_the_slot(name):
    spec = load_spec(name)
    telling = [key for key, filler in spec.fillers.items() if filler.values[0][1] is not None]

    for template in spec.templates:
        left, _, right = template.text.partition("[TARGET]")
        assert not [key for key in telling if f"[{key}]" in right], template.text
        if telling:
            assert [key for key in telling if f"[{key}]" in left], template.text


@pytest.mark.parametrize(("name", "n_groups"), [("race", 6), ("religion", 6), ("number", 7)])
def test_each_group_of_words_has_templates_of_its_own(name, n_groups):
    spec = load_spec(name)
    groups = Counter(template.words for template in spec.templates)

    assert {*groups} == {*zip(*spec.classes.values(), strict=True)}
    assert len(groups) == n_groups
    assert min(groups.values()) >= (12 if len(spec.classes) == 3 else 10)


@pytest.mark.parametrize("name", ["number", "race", "religion", "sentiment"])
def test_only_the_slot_tells_the_class(name):
    spec = load_spec(name)
    words = {word.lower() for word in spec.class_of}

    assert all(label is None for f in spec.fillers.values() for _, label in f.values)
    for template in spec.templates:
        left, _, right = template.text.partition("[TARGET]")
        assert words.isdisjoint(re.findall(r"\w+", f"{left} {right}".lower())), template.text
    # The control: in the texts of gender a name tells the class.
    assert all(label for _, label in load_spec("gender").fillers["NAME"].values)


def test_no_article_before_a_slot_gives_the_word_away():
    # "an" fits some of the words only; "a" must fit all that the template has.
    vowel = re.compile(r"[aeiou]", re.IGNORECASE)
    for name in SPECS:
        for template in load_spec(name).templates:
            left = template.text.partition("[TARGET]")[0].split()
            if left[-1] in ("a", "an"):
                starts = {bool(vowel.match(word)) for word in template.words}
                assert starts == {left[-1] == "an"}, template.text


def test_the_gender_specification_has_the_names_and_templates_of_the_built_in_texts():
    file = resources.files("hf_gradiend.data") / "resources" / "gender_pronouns.json"
    data = json.loads(file.read_text("utf-8"))
    spec = load_spec("gender")

    names = {n: label for label, of in data["names"].items() for own in of.values() for n in own}
    assert dict(spec.fillers["NAME"].values) == spec.corpus.names == names
    texts = [text for own in data["templates"].values() for text in own]
    assert [template.text for template in spec.templates] == texts
    assert {label: words[0] for label, words in spec.classes.items()} == data["classes"]
