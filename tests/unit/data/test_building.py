"""Feature data from specifications: rows, splits, balance, files, and going on after a kill."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from datasets import DatasetDict, load_dataset

from hf_gradiend.data import building, corpora, filling, searching
from hf_gradiend.data.building import BuiltFeature, build_feature_dataset
from hf_gradiend.data.corpora import Corpus
from hf_gradiend.data.dealing import deal, drawn, root_shares
from hf_gradiend.data.feature_files import save_feature_dataset
from hf_gradiend.data.filling import filled_templates
from hf_gradiend.data.loading import load_feature_dataset, load_neutral_texts
from hf_gradiend.data.spec_files import load_spec, parse_spec
from hf_gradiend.data.specification import CorpusRules, Filler, PartOfSpeech, Template
from hf_gradiend.errors import ConfigError, DataError, OutputError

SPECS = ("gender", "number", "race", "religion", "sentiment")
# Least number of texts of the smallest class in the test split.
LEAST = {"gender": 300, "number": 60, "race": 60, "religion": 60, "sentiment": 150}

NAMES = {"F": ["Ada", "Bea", "Cleo", "Dora", "Eve"], "M": ["Abe", "Ben", "Carl", "Dan", "Emil"]}
PLACES = ("garden", "kitchen", "harbour", "station", "market", "library", "tower", "meadow")

# Python warns of forks while other threads run, which the libraries start.
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def built_specs() -> dict[str, BuiltFeature]:
    """What the package's own specifications build."""
    return {name: build_feature_dataset(name) for name in SPECS}


@pytest.fixture(scope="module")
def gender():
    """The package's specification, with a few names."""
    spec = load_spec("gender")
    pairs = tuple((name, label) for label, own in NAMES.items() for name in own)
    rules = replace(spec.corpus, names=dict(pairs), min_words=6)
    return replace(spec, corpus=rules, fillers={"NAME": Filler(pairs)})


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder of documents, in pieces of a few lines."""
    monkeypatch.setattr(corpora, "PIECE_BYTES", 600)
    folder = tmp_path / "books"
    folder.mkdir()
    for number, place in enumerate(PLACES):
        lines = []
        for label, names in NAMES.items():
            word, other = {"F": ("she", "he"), "M": ("he", "she")}[label]
            for name in names:
                lines.append(f"In the {place} {name} said that {word} was late. It rained there.")
                lines.append(f"In the {place} {name} met somebody when {word} and {other} sang.")
        lines += [f"The {place} number {number} lies behind the old town wall. No one came."] * 2
        lines += ["Near the wall Ada said that she would stay until noon."]  # in every document
        (folder / f"{place}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def values(dataset, column):
    """The values of a column in each split."""
    return {split: set(rows[column]) for split, rows in dataset.items()}


def shared(by_split):
    """Values that occur in more than one split."""
    counts = Counter(value for found in by_split.values() for value in found)
    return {value for value, count in counts.items() if count > 1}


def words_by_split(dataset):
    return {split: {*rows["factual"], *rows["counterfactual"]} for split, rows in dataset.items()}


def balances(sheet):
    return sheet["read"] == sheet["kept"] + sum(sheet["dropped"].values())


def bytes_of(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*")) if file.is_file()
    }  # fmt: skip


# ---- the package's specifications ----


@pytest.mark.parametrize("name", SPECS)
def test_a_specification_of_the_package_has_enough_texts_of_each_class(built_specs, name):
    splits = built_specs[name].statistics["splits"]

    assert list(splits) == ["train", "validation", "test"]
    for split in splits.values():
        assert len({*split["classes"].values()}) == 1  # balanced
    assert min(splits["test"]["classes"].values()) >= LEAST[name]
    texts = [split["texts"] for split in splits.values()]
    assert texts[2] >= 0.25 * sum(texts)


@pytest.mark.parametrize("name", SPECS)
def test_a_specification_of_the_package_keeps_what_it_holds_out_apart(built_specs, name):
    built = built_specs[name]

    assert shared(values(built.dataset, "template")) == set()
    assert shared(values(built.dataset, "text")) == set()
    if "name" in built.spec.hold_out:
        assert shared(values(built.dataset, "name")) == set()
    if "word" in built.spec.hold_out:
        assert shared(words_by_split(built.dataset)) == set()


def test_some_specifications_of_the_package_hold_out_names_and_some_words(built_specs):
    # The control of the test above.
    held_out = {name: built.statistics["hold_out"] for name, built in built_specs.items()}

    assert held_out["gender"] == ["name", "template"]
    assert held_out["sentiment"] == ["template", "word"]
    assert shared(words_by_split(built_specs["gender"].dataset)) == {"he", "she"}


@pytest.mark.parametrize("name", SPECS)
def test_the_texts_of_the_package_have_a_slot_behind_a_left_context(built_specs, name):
    for rows in built_specs[name].dataset.values():
        for text in rows["text"]:
            left, slot, _ = text.partition("[TARGET]")
            assert slot
            assert len(left.split()) >= 2
            assert not re.search(r"\[(?!TARGET\])", text)


@pytest.mark.parametrize("name", SPECS)
def test_the_neutral_texts_have_no_word_of_the_specification(built_specs, name):
    built = built_specs[name]
    names = built.dataset["train"]["name"] if name == "gender" else []
    words = {word.lower() for word in [*built.spec.class_of, *names]}

    for rows in built.neutral.values():
        for text in rows["text"]:
            assert words.isdisjoint(re.findall(r"\w+", text.lower())), text
    assert shared(values(built.neutral, "text")) == set()
    assert built.statistics["neutral"]["kept"] >= 60
    assert balances(built.statistics["neutral"])


def test_neutral_texts_with_a_word_of_the_specification_are_counted(built_specs):
    # The control of the test above: some of the package's neutral texts have a pronoun of the list.
    dropped = built_specs["number"].statistics["neutral"]["dropped"]

    assert dropped["a word of the specification"] >= 5


@pytest.mark.parametrize(("name", "kind"), [("religion", "template"), ("sentiment", "word")])
def test_without_holding_out_the_splits_share_templates_and_words(name, kind):
    # The control of the tests above.
    spec = load_spec(name)
    loose = replace(spec, hold_out=tuple(each for each in spec.hold_out if each != kind))
    dataset = build_feature_dataset(loose).dataset

    found = values(dataset, "template") if kind == "template" else words_by_split(dataset)
    assert len(shared(found)) > 10


def test_three_classes_give_two_rows_a_text(built_specs):
    rows = built_specs["religion"].dataset["test"]
    by_text = Counter(zip(rows["text"], rows["factual"], strict=True))
    others = {(row["text"], row["factual"]): set() for row in rows}
    for row in rows:
        others[row["text"], row["factual"]].add(row["counterfactual_class"])
        assert row["factual_class"] != row["counterfactual_class"]

    assert {*by_text.values()} == {2}
    assert {len(found) for found in others.values()} == {2}
    assert len(rows) == 2 * built_specs["religion"].statistics["splits"]["test"]["texts"]


def test_words_are_exchanged_for_those_at_their_own_position(built_specs):
    spec = built_specs["race"].spec
    positions = [set(words) for words in zip(*spec.classes.values(), strict=True)]

    for rows in built_specs["race"].dataset.values():
        for row in rows:
            template = spec.templates[row["template"]]
            assert {row["factual"], row["counterfactual"]} <= {*template.words}
            assert any({row["factual"], row["counterfactual"]} <= each for each in positions)


# ---- templates ----


def small_spec(text, tmp_path):
    head = "name: Weather\nabout: x\nlanguage: de\nlicense: mit\n"
    return parse_spec(head + text, tmp_path / "weather.yaml")


def test_a_template_gives_a_text_for_each_value_and_each_word_that_fits(tmp_path):
    spec = small_spec(
        """\
classes: {warm: [hot, mild], cold: [icy, fresh]}
fillers: {DAY: [Monday, Friday], PLACE: {warm: [desert], cold: [fjord, glacier]}}
templates:
  - words: [hot, icy]
    texts: ["On [DAY] the [PLACE] was [TARGET] on [DAY]."]
  - texts: ["In the end it was [TARGET]."]
""",
        tmp_path,
    )

    texts = filled_templates(spec)

    assert [(text.text, text.word, text.template) for text in texts] == [
        ("On Monday the desert was [TARGET] on Monday.", "hot", 0),
        ("On Friday the desert was [TARGET] on Friday.", "hot", 0),
        ("On Monday the fjord was [TARGET] on Monday.", "icy", 0),
        ("On Monday the glacier was [TARGET] on Monday.", "icy", 0),
        ("On Friday the fjord was [TARGET] on Friday.", "icy", 0),
        ("On Friday the glacier was [TARGET] on Friday.", "icy", 0),
        *(("In the end it was [TARGET].", word, 1) for word in ("hot", "mild", "icy", "fresh")),
    ]


def test_fillers_of_too_many_values_are_an_error(gender, monkeypatch):
    monkeypatch.setattr(filling, "MOST_TEXTS", 1000)
    digits = Filler(tuple((f"v{number}", None) for number in range(20)))
    spec = replace(
        gender, fillers={"A": digits, "B": digits},
        templates=(Template("The [A] and the [B] when [TARGET] came.", ("she", "he")),) * 3,
    )  # fmt: skip

    with pytest.raises(ConfigError, match=r"at most 1,000 texts .* List fewer values"):
        filled_templates(spec)


def test_without_templates_and_corpus_there_is_nothing_to_build_from(gender):
    with pytest.raises(ConfigError) as caught:
        build_feature_dataset(replace(gender, templates=()))

    assert str(caught.value) == (
        "Expected a corpus, since the specification 'gender' has no templates. Pass one "
        "(--corpus), or write templates."
    )


def test_a_language_without_neutral_texts_of_the_package_has_its_own(tmp_path):
    templates = "".join(f'    - "Nr. {number}: es war [TARGET]."\n' for number in range(6))
    spec = small_spec(
        f"classes: {{warm: [heiß], cold: [eisig]}}\nneutral_texts: [Es regnet., Es war eisig.]\n"
        f"templates:\n  - texts:\n{templates}",
        tmp_path,
    )

    built = build_feature_dataset(spec)

    assert [text for rows in built.neutral.values() for text in rows["text"]] == ["Es regnet."]
    assert built.statistics["neutral"]["dropped"] == {"a word of the specification": 1}
    assert built.statistics["hold_out"] == []
    assert shared(values(built.dataset, "text")) == set()  # also where nothing else is held out


# ---- a corpus ----


def test_the_rows_of_a_corpus_are_its_sentences_with_names_and_documents(gender, corpus):
    built = build_feature_dataset(gender, corpus=corpus, progress=False)
    rows = [row for part in built.dataset.values() for row in part]

    for row in rows:
        word = {"F": "she", "M": "he"}[row["factual_class"]]
        assert row["name"] in NAMES[row["factual_class"]]
        assert row["factual"] == word
        place = row["document"].removesuffix(".txt")
        assert row["text"] in (
            f"In the {place} {row['name']} said that [TARGET] was late.",
            "Near the wall Ada said that [TARGET] would stay until noon.",
        )
    assert list(rows[0]) == [
        "text", "factual", "counterfactual", "factual_class", "counterfactual_class", "name",
        "document", "split",
    ]  # fmt: skip


def test_the_counts_of_a_corpus_add_up(gender, corpus):
    statistics = build_feature_dataset(gender, corpus=corpus, progress=False).statistics
    texts, dropped = statistics["texts"], statistics["texts"]["dropped"]

    # 8 documents of 20 lines of names (10 with a second sentence), 2 doubled lines of two, and 1.
    assert texts["read"] == 8 * (10 * 2 + 10 + 2 * 2 + 1)
    assert balances(texts)
    assert dropped["no word of a class"] == 8 * (10 + 2 * 2)
    assert dropped["words of several classes, or several words of one"] == 8 * 10
    assert dropped["a duplicate"] == 7
    assert texts["kept"] == sum(split["texts"] for split in statistics["splits"].values())
    # "It rained there." and "No one came." are too short; the other one stands twice.
    neutral = statistics["neutral"]
    assert balances(neutral)
    assert neutral["read"] == dropped["no word of a class"]
    assert neutral["kept"] == len(PLACES)
    assert neutral["dropped"] == {
        "fewer words than min_words": 8 * 12,
        "a duplicate, or more than max_neutral_texts": 8,
    }


def test_splits_of_a_corpus_share_no_name_and_no_document(gender, corpus):
    built = build_feature_dataset(gender, corpus=corpus, progress=False)
    loose = build_feature_dataset(replace(gender, hold_out=()), corpus=corpus, progress=False)

    assert built.statistics["hold_out"] == ["name", "document"]
    assert shared(values(built.dataset, "name")) == set()
    assert shared(values(built.dataset, "document")) == set()
    apart = "values of hold_out that were dealt to several splits"
    assert built.statistics["texts"]["dropped"][apart] > 0
    # The control: without holding out, both are shared, and nothing is dropped for it.
    assert shared(values(loose.dataset, "name"))
    assert shared(values(loose.dataset, "document"))
    assert apart not in loose.statistics["texts"]["dropped"]


def test_documents_of_one_text_each_need_no_holding_out(gender, corpus, tmp_path):
    lines = [line for file in sorted(corpus.iterdir()) for line in file.read_text().splitlines()]
    (tmp_path / "one.txt").write_text("\n".join(lines), encoding="utf-8")
    spec = replace(gender, corpus=replace(gender.corpus, must_not_match=("Near",)))

    built = build_feature_dataset(spec, corpus=tmp_path / "one.txt", progress=False)

    assert built.statistics["hold_out"] == ["name"]
    assert shared(values(built.dataset, "document")) == set()


@FORKS
def test_two_runs_with_any_number_of_processes_give_the_same_bytes(
    gender, corpus, tmp_path, monkeypatch
):
    one = build_feature_dataset(gender, corpus=corpus, progress=False)
    again = build_feature_dataset(gender, corpus=corpus, num_proc=2, progress=False)
    monkeypatch.setattr(corpora, "PIECE_BYTES", 10_000)
    larger_pieces = build_feature_dataset(gender, corpus=corpus, progress=False)
    other_seed = build_feature_dataset(replace(gender, seed=1), corpus=corpus, progress=False)

    save_feature_dataset(one, tmp_path / "one")
    save_feature_dataset(again, tmp_path / "again")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "again")
    assert one.dataset["train"].to_list() == larger_pieces.dataset["train"].to_list()
    assert one.neutral["train"].to_list() == larger_pieces.neutral["train"].to_list()
    assert one.dataset["train"].to_list() != other_seed.dataset["train"].to_list()  # the control


def test_a_killed_search_goes_on_where_it_was(gender, corpus, tmp_path, monkeypatch):
    whole = build_feature_dataset(gender, corpus=corpus, progress=False)
    search, searched = searching.search_texts, []

    def killed(texts, spec):
        if len(searched) == 5:
            raise KeyboardInterrupt
        searched.append(texts)
        return search(texts, spec)

    monkeypatch.setattr(searching, "search_texts", killed)
    options = {"corpus": corpus, "work_dir": tmp_path / "work", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        build_feature_dataset(gender, **options)
    n_kept = len(list((tmp_path / "work").iterdir()))
    monkeypatch.setattr(
        searching, "search_texts", lambda texts, spec: searched.append(texts) or search(texts, spec)
    )
    resumed = build_feature_dataset(gender, **options)
    n_pieces = len(list(corpora.pieces_of(Corpus(corpus))))

    assert n_kept == 5
    assert len(searched) == n_pieces > 10  # none twice
    assert resumed.statistics == whole.statistics
    for split, rows in whole.dataset.items():
        assert resumed.dataset[split].to_list() == rows.to_list()
    # Other rules do not take the results of these.
    stricter = replace(gender, corpus=replace(gender.corpus, min_words=7))
    build_feature_dataset(stricter, **options)
    assert len(searched) == 2 * n_pieces
    # Other shares do: what a piece holds does not depend on them.
    build_feature_dataset(replace(gender, splits={"train": 0.5, "test": 0.5}), **options)
    assert len(searched) == 2 * n_pieces


def test_fewer_values_than_splits_are_an_error(gender, corpus):
    for file in sorted(corpus.iterdir())[2:]:
        file.unlink()

    with pytest.raises(DataError) as caught:
        build_feature_dataset(gender, corpus=corpus, progress=False)

    assert str(caught.value) == (
        "Expected at least 3 values of 'document' for as many splits, but the texts have 2. Give "
        "more, or hold out something else."
    )


def test_a_split_without_a_class_is_an_error(gender, corpus):
    names = {name: label for name, label in gender.corpus.names.items() if name < "Abf"}
    rules = replace(gender.corpus, names={**names, "Bea": "F", "Cleo": "F"})  # Abe alone is M

    with pytest.raises(DataError) as caught:
        build_feature_dataset(
            replace(gender, corpus=rules, hold_out=("name",)), corpus=corpus, progress=False
        )

    assert str(caught.value) == (
        "Expected texts of every class in the split 'train', but got {'F': 8, 'M': 0}. Give "
        "more texts, hold out less, or change the shares."
    )


def test_words_of_another_part_of_speech_are_dropped_and_counted(gender, corpus, monkeypatch):
    def check(rule):
        assert rule.tags == ("PRON",)
        return lambda candidates: ["Ada" not in each.text for each in candidates]

    monkeypatch.setattr(building, "tag_check", check)  # spaCy is optional; see test_matching
    rules = replace(gender.corpus, part_of_speech=PartOfSpeech("tiny", ("PRON",)))
    built = build_feature_dataset(replace(gender, corpus=rules), corpus=corpus, progress=False)

    assert built.statistics["texts"]["dropped"]["another part of speech"] == 8 * 2
    assert balances(built.statistics["texts"])
    assert "Ada" not in {name for own in values(built.dataset, "name").values() for name in own}


def test_rules_that_drop_all_are_an_error_that_says_why(gender, corpus):
    strict = replace(gender, corpus=replace(gender.corpus, min_words=50))

    with pytest.raises(DataError) as caught:
        build_feature_dataset(strict, corpus=corpus, progress=False)

    assert str(caught.value) == (
        "Expected texts that the rules keep, but all 280 were dropped: 112 for no word of a class, "
        "88 for fewer words than min_words, 80 for words of several classes, or several words of "
        "one."
    )


@FORKS
def test_an_error_in_another_process_is_the_same_error(gender, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "A."}\n{"body": "B."}\n', encoding="utf-8")

    with pytest.raises(DataError) as caught:
        build_feature_dataset(gender, corpus=tmp_path / "a.jsonl", num_proc=2, progress=False)

    assert str(caught.value) == (
        """Expected text under 'text' in a.jsonl:2, but got '{"body": "B."}'."""
    )


def test_fewer_than_one_process_is_an_error(gender, corpus):
    with pytest.raises(ConfigError, match="at least one process, but got 0"):
        build_feature_dataset(gender, corpus=corpus, num_proc=0)


# ---- balance and numbers of texts ----


def test_balance_gives_each_class_as_many_texts_as_the_rarest(gender, corpus):
    for file in corpus.iterdir():
        file.write_text(re.sub(r"(In .* (Ben|Carl) said)", r"1\1", file.read_text()), "utf-8")
    rules = replace(gender.corpus, must_not_match=("[0-9]",))
    spec = replace(gender, corpus=rules, hold_out=("document",))

    even = build_feature_dataset(spec, corpus=corpus, progress=False)
    uneven = build_feature_dataset(replace(spec, balance=False), corpus=corpus, progress=False)

    for split in even.statistics["splits"].values():
        assert split["classes"]["F"] == split["classes"]["M"]
    assert even.statistics["texts"]["dropped"]["more than balance or max_texts allows"] > 0
    for split in uneven.statistics["splits"].values():  # the control
        assert split["classes"]["F"] > split["classes"]["M"]


def test_max_texts_are_shared_among_splits_classes_and_templates():
    built = build_feature_dataset(replace(load_spec("religion"), max_texts=240))
    splits = built.statistics["splits"]

    assert {name: split["texts"] for name, split in splits.items()} == {
        "train": 132, "validation": 36, "test": 72
    }  # fmt: skip
    assert {number for split in splits.values() for number in split["classes"].values()} == {
        44, 12, 24
    }  # fmt: skip
    used = Counter(built.dataset["train"]["template"])
    assert max(used.values()) <= 2 * min(used.values())


def test_max_texts_that_leave_a_split_empty_are_an_error(gender):
    with pytest.raises(DataError, match="but 3 leave none in 'train'"):
        build_feature_dataset(replace(gender, max_texts=3))


# ---- dealing and drawing ----


def test_values_are_dealt_by_the_shares_and_every_split_gets_one():
    shares = {"train": 0.7, "validation": 0.1, "test": 0.2}
    even = Counter(deal({f"v{n}": 1 for n in range(100)}, shares, 0).values())
    few = deal({"a": 50, "b": 2, "c": 1}, shares, 0)
    heavy = {f"v{number}": 1000 // (number + 1) for number in range(200)}
    dealt = deal(heavy, shares, 0)

    assert even == {"train": 70, "validation": 10, "test": 20}
    assert few["a"] == "train"
    assert {*few.values()} == {*shares}
    for split, share in shares.items():
        own = sum(heavy[value] for value, found in dealt.items() if found == split)
        assert own / sum(heavy.values()) == pytest.approx(share, abs=0.01)


def test_groups_of_values_are_dealt_by_the_shares_one_by_one():
    shares = {"train": 0.6, "validation": 0.15, "test": 0.25}
    dealt = deal({f"{g}{n}": 1 for g in "abc" for n in range(12)}, shares, 0, lambda v: v[0])

    for group in "abc":
        own = Counter(split for value, split in dealt.items() if value[0] == group)
        assert own["train"] in (7, 8)
        assert own["test"] in (2, 3)
        assert own["validation"] in (1, 2)


def test_groups_of_one_value_are_dealt_by_the_shares_together():
    dealt = deal({f"v{n}": 1 for n in range(20)}, {"train": 0.75, "test": 0.25}, 0, lambda v: v)

    assert Counter(dealt.values()) == {"train": 15, "test": 5}


def test_another_seed_deals_equal_values_in_another_way():
    dealt = [
        deal({f"v{n}": 1 for n in range(20)}, {"a": 0.5, "b": 0.5}, seed) for seed in (0, 0, 1)
    ]

    assert dealt[0] == dealt[1] != dealt[2]


def test_the_shares_of_two_kinds_multiply_to_those_of_the_texts():
    shares = {"train": 0.64, "test": 0.36}
    roots = root_shares(shares, 2)

    assert roots == pytest.approx({"train": 0.8 / 1.4, "test": 0.6 / 1.4})
    assert roots["train"] ** 2 / roots["test"] ** 2 == pytest.approx(0.64 / 0.36)


def test_drawing_takes_as_many_of_each_group_as_it_can():
    items = [("a", n) for n in range(10)] + [("b", 100), ("c", 200), ("c", 201)]

    found = drawn(items, 6, lambda item: item[0], lambda item: item[1])

    assert Counter(group for group, _ in found) == {"a": 3, "b": 1, "c": 2}
    assert drawn(items, 99, lambda item: item[0], lambda item: item[1]) == items


# ---- files ----


def test_a_folder_is_read_back_by_all_who_should(built_specs, tmp_path):
    built = built_specs["religion"]
    folder = save_feature_dataset(built, tmp_path / "religion")

    for data in (load_feature_dataset(folder), load_dataset(str(folder))):
        assert {split: rows.to_list() for split, rows in data.items()} == {
            split: rows.to_list() for split, rows in built.dataset.items()
        }
    neutral = [text for rows in built.neutral.values() for text in rows["text"]]
    assert load_neutral_texts(folder) == load_neutral_texts(folder / "neutral") == neutral
    assert json.loads((folder / "statistics.json").read_text("utf-8")) == built.statistics
    assert load_spec(folder / "spec.yaml") == replace(built.spec, id="spec")


def test_a_folder_is_read_anew_where_another_one_of_its_name_was_read_before(built_specs, tmp_path):
    for name in ("race", "religion"):
        folder = save_feature_dataset(built_specs[name], tmp_path / name / "data")

        for rows in (load_feature_dataset(folder), load_dataset(str(folder))):
            assert rows["test"].to_list() == built_specs[name].dataset["test"].to_list()
        neutral = [text for rows in built_specs[name].neutral.values() for text in rows["text"]]
        assert load_neutral_texts(folder) == neutral


def test_two_classes_of_a_folder_are_two_classes_of_rows(built_specs, tmp_path):
    folder = save_feature_dataset(built_specs["religion"], tmp_path / "religion")

    chosen = load_feature_dataset(folder, classes=("muslim", "jewish"))

    assert isinstance(chosen, DatasetDict)
    for split, rows in chosen.items():
        pairs = set(zip(rows["factual_class"], rows["counterfactual_class"], strict=True))
        assert pairs == {("muslim", "jewish"), ("jewish", "muslim")}
        assert len(rows) == len(built_specs["religion"].dataset[split]) / 3


def test_the_card_says_what_is_measured_and_how_it_was_made(built_specs, tmp_path):
    folder = save_feature_dataset(built_specs["religion"], tmp_path / "religion")
    card = (folder / "README.md").read_text("utf-8")

    assert built_specs["religion"].spec.about in card
    assert "from the 72 templates of spec.yaml: of 1,593 texts, 1,593 are kept" in card
    assert "No two splits share a template." in card
    assert "Each text has one row for each of the 2 other classes." in card
    assert '`load_feature_dataset(…, classes=("christian", "jewish"))` takes the rows' in card
    assert "The configuration `neutral` has 154 texts" in card
    assert 'load_feature_dataset("your-org/religion")' in card
    assert str(tmp_path) not in card


def test_the_card_of_a_corpus_names_it_without_its_place(gender, corpus, tmp_path):
    built = build_feature_dataset(gender, corpus=corpus, progress=False)
    folder = save_feature_dataset(built, tmp_path / "data")
    card = (folder / "README.md").read_text("utf-8")

    assert "from the sentences of the corpus “books” by the rules of spec.yaml" in card
    assert "No two splits share a name and a document." in card
    assert all(str(tmp_path).encode() not in content for content in bytes_of(folder).values())


def test_a_folder_that_holds_files_is_left_alone(built_specs, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(OutputError, match="Expected a new or empty folder for the data set"):
        save_feature_dataset(built_specs["religion"], tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_rules_are_for_a_corpus_alone():
    # The control of the defaults: templates are not searched.
    spec = replace(load_spec("religion"), corpus=CorpusRules(min_words=1000, max_words=1000))

    assert build_feature_dataset(spec).statistics["texts"]["dropped"] == {}
