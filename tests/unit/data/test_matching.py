"""Sentences of raw text, the words found in them, and why a sentence is kept or dropped."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from hf_gradiend.data import corpora, matching
from hf_gradiend.data.corpora import Corpus, pieces_of
from hf_gradiend.data.matching import Candidate, Finder, Sieve
from hf_gradiend.data.pieces import sentences
from hf_gradiend.data.specification import CorpusRules, FeatureSpec, PartOfSpeech
from hf_gradiend.data.tagging import tag_check
from hf_gradiend.errors import ConfigError, DataError

RULES = CorpusRules(
    must_have=("weather", "day"),
    must_not_have=("ice cream",),
    must_match=("^[A-Z]",),
    must_not_match=("[0-9]",),
    min_left_words=2,
    min_words=5,
    max_words=9,
    names={"Anna": "warm", "Will": "cold", "Kim": None},
)
SPEC = FeatureSpec(
    "weather", "Weather", "x", "en", "mit",
    {"warm": ("hot", "Saharan"), "cold": ("icy", "very cold")}, corpus=RULES,
)  # fmt: skip


def read(sentence, **changes):
    sieve = Sieve(replace(SPEC, corpus=replace(RULES, **changes)))
    return sieve.read(sentence, sieve.finder.find(sentence), "book")


def found(text, *words):
    return [text[hit.start : hit.end] for hit in Finder({"word": words}).find(text)]


# ---- finding ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the hen, he and she", ["he"]),
        ("He's HE'S he.", ["He", "HE", "he"]),
        ("a he-man, Anna--he, he--well, he- and -he", ["he", "he", "he", "he"]),
        ("he_1 1he he1 (he)", ["he"]),
        ("ché hé œhe", []),
        ("", []),
    ],
)
def test_a_word_is_found_whole_and_in_any_capitals(text, words):
    assert found(text, "he") == words


def test_several_words_are_found_as_one():
    assert found("A very cold day, and very  cold.", "very cold", "cold") == [
        "very cold", "cold", "cold"
    ]  # fmt: skip


def test_capitals_that_are_longer_in_small_letters_do_not_move_what_is_found():
    text = "İİİ is not he, ẞ is no he"  # "İ".lower() has two characters

    assert found(text, "he") == ["he", "he"]
    assert found("İstanbul and he", "İstanbul") == ["İstanbul"]


def test_thousands_of_words_are_found_as_one_by_one():
    words = [f"w{number}" for number in range(3000)]
    text = " ".join(f"w{number}" for number in range(0, 6000, 7))

    assert found(text, *words) == [word for word in text.split() if word in {*words}]


def test_a_word_of_two_lists_is_found_as_both():
    hits = Finder({"a": ["may"], "b": ["May", "June"]}).find("In May or may.")

    assert [(hit.start, hit.kind) for hit in hits] == [(3, "a"), (3, "b"), (10, "a"), (10, "b")]


# ---- keeping and dropping ----


def test_a_kept_sentence_has_a_slot_for_each_occurrence_of_its_word():
    text = "Anna said the day got hot, so hot."

    assert read(text) == Candidate(
        "Anna said the day got [TARGET], so [TARGET].", "hot", "Anna", "book"
    )


def test_the_longest_word_is_the_one_that_is_meant():
    assert read("Will said the day got very cold.") == Candidate(
        "Will said the day got [TARGET].", "very cold", "Will", "book"
    )


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("Anna said the day went well.", matching.NO_WORD),
        ("Anna said the day [TARGET] got hot.", matching.SLOTTED),
        ("Anna said the day got saharan.", matching.OTHER_SPELLING),
        ("Anna said Hot day got hot.", matching.OTHER_SPELLING),
        ("Anna said the day got hot, icy.", matching.SEVERAL_WORDS),
        ("Anna said hot day, Saharan day.", matching.SEVERAL_WORDS),
        ("Anna hot is the day.", matching.LITTLE_LEFT),
        ("Anna said hot ice cream day.", matching.FORBIDDEN_WORD),
        ("Anna said hot Ice Cream day.", matching.FORBIDDEN_WORD),
        ("Anna said the air got hot.", matching.NO_REQUIRED_WORD),
        ("“Anna said the day got hot.”", matching.NO_REQUIRED_MATCH),
        ("Anna said hot day.", matching.TOO_SHORT),
        ("Anna said the day got hot and all went to bed.", matching.TOO_LONG),
        ("Anna said the day got hot, 30 degrees.", matching.FORBIDDEN_MATCH),
        ("They said the day got hot.", matching.NO_NAME),
        ("They said the day will be hot.", matching.NO_NAME),
        ("Anna and Kim: the day got hot.", matching.SEVERAL_NAMES),
        ("It got hot that day, Anna.", matching.LATE_NAME),
        ("Will said the day got hot.", matching.OTHER_NAME),
        ("Kim said the day got hot.", matching.OTHER_NAME),
    ],
)
def test_a_dropped_sentence_has_one_reason(sentence, reason):
    assert read(sentence) == reason


def test_without_rules_for_names_no_name_is_asked_for():
    kept = read("They said the day will be hot.", names={})

    assert kept == Candidate("They said the day will be [TARGET].", "hot", "", "book")


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("The chair stands by the wall.", None),
        ("The chair will stand by the wall.", None),  # as a name it would be Will
        ("The chair of Will was red.", matching.HAS_WORD),
        ("The ice cream is on the table.", matching.HAS_WORD),
        ("The chair is HOT to touch.", matching.HAS_WORD),
        ("The chair is [TARGET] and red.", matching.SLOTTED),
        ("The chair stands.", matching.TOO_SHORT),
        ("The chair stands in room 7.", matching.FORBIDDEN_MATCH),
    ],
)
def test_a_neutral_sentence_has_no_word_of_the_specification(sentence, reason):
    sieve = Sieve(SPEC)

    assert sieve.neutral_problem(sentence, sieve.finder.find(sentence)) == reason


# ---- sentences ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("“One.” “Two.” Then three.", ["“One.”", "“Two.”", "Then three."]),
        ("Mr. White met Dr. J. Black. He left.", ["Mr. White met Dr. J. Black.", "He left."]),
        ("It cost 3.50 dollars. e.g. not here", ["It cost 3.50 dollars. e.g. not here"]),
        ("One line\nanother line", ["One line", "another line"]),
        ("  Much   white\tspace .  \n\n \n", ["Much white space ."]),
        ("Ça va. Écoute. Ok", ["Ça va.", "Écoute.", "Ok"]),
        ("", []),
    ],
)
def test_sentences_are_cut_behind_full_stops_and_lines(text, expected):
    assert list(sentences(text)) == expected


# ---- corpora ----


def texts_of(corpus):
    return [each for piece in pieces_of(corpus) for each in piece.texts()]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_BYTES", 40)
    monkeypatch.setattr(corpora, "PIECE_ROWS", 3)


@pytest.mark.usefixtures("small_pieces")
def test_the_pieces_of_a_file_are_its_lines_once_each(tmp_path):
    lines = [f"Line ü {number} of this file." for number in range(1, 12)]
    (tmp_path / "a.txt").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")

    pieces = pieces_of(Corpus(tmp_path / "a.txt"))

    assert len(list(pieces)) > 3
    assert texts_of(Corpus(tmp_path / "a.txt")) == [
        (f"a.txt:{number}", line) for number, line in enumerate(lines, start=1)
    ]


@pytest.mark.usefixtures("small_pieces")
def test_a_txt_file_of_a_folder_is_one_document(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("Two.\n\nThree.", encoding="utf-8")
    (tmp_path / "a.txt").write_text("One.\r\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("Not read.", encoding="utf-8")

    assert texts_of(Corpus(tmp_path)) == [
        ("a.txt", "One.\r"), ("b/c.txt", "Two."), ("b/c.txt", "Three.")
    ]  # fmt: skip


@pytest.mark.usefixtures("small_pieces")
def test_rows_of_jsonl_and_parquet_are_documents(tmp_path):
    rows = [{"text": f"Text {number}."} for number in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=2)

    assert texts_of(Corpus(tmp_path)) == [
        *((f"a.jsonl:{number + 1}", row["text"]) for number, row in enumerate(rows)),
        *((f"b.parquet:{number}", row["text"]) for number, row in enumerate(rows)),
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.usefixtures("small_pieces")
def test_a_data_set_of_the_hub_is_read_stored_or_streamed(monkeypatch, streaming):
    data = Dataset.from_dict({"body": [f"Text {number}." for number in range(8)]})
    asked = []

    def load(name, config, **options):  # the network's part; the rest is `datasets`
        asked.append((name, config, options))
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(corpora, "load_dataset", load)
    corpus = Corpus("org/books", column="body", config="en", split="test", streaming=streaming)

    assert texts_of(corpus) == [(f"org/books:{i}", f"Text {i}.") for i in range(8)]
    assert len(list(pieces_of(corpus))) == 3
    assert asked[0] == ("org/books", "en", {"split": "test", "streaming": streaming})
    assert corpus.name == "org/books en test"


BAD_CORPORA = {
    "missing.txt": (None, "Expected a corpus, but there is no file or folder '{path}'."),
    "a.csv": (b"x", "Expected text in a file that ends in one of ['.txt', '.jsonl', '.parquet'], "
                    "but got '{path}'."),
    "empty.txt": (b"", "Expected text in the corpus '{path}', but it is empty."),
    "latin.txt": ("schön\n".encode() + "schön".encode("latin-1"),
                  "Expected text in UTF-8 in '{path}', but byte 10 is none: invalid start byte. "
                  "Convert it, for instance with iconv."),
    "zero.txt": (b"a\0b", "Expected text in '{path}', but it has a zero byte."),
    "bad.jsonl": (b'{"text": "A."}\n{bad}\n', "Expected JSON in bad.jsonl:2, but got '{bad}'."),
    "body.jsonl": (b'{"body": "A."}\n',
                   "Expected text under 'text' in body.jsonl:1, but got '{\"body\": \"A.\"}'."),
    "number.jsonl": (b'{"text": 3}\n',
                     "Expected text under 'text' in number.jsonl:1, but got '{\"text\": 3}'."),
    "bad.parquet": (b"no", "Expected parquet in '{path}', but it cannot be read: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CORPORA)
def test_a_corpus_that_is_no_text_is_one_line_that_names_the_place(tmp_path, name):
    content, message = BAD_CORPORA[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError) as caught:
        texts_of(Corpus(tmp_path / name))

    expected = message.replace("{path}", str(tmp_path / name))
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_or_with_other_values_is_an_error(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"body": "A.", "n": 1}]), file)

    with pytest.raises(DataError, match=r"'text' with text in 'a.parquet', but got \['body', 'n'"):
        pieces_of(Corpus(file))
    with pytest.raises(DataError, match=r"Expected text in row 0 of 'a.parquet', but got 1"):
        texts_of(Corpus(file, column="n"))


def test_a_folder_without_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match=rf"in {re.escape(repr(str(tmp_path)))}, but it has none\."):
        pieces_of(Corpus(tmp_path))


@pytest.mark.parametrize("option", [{"config": "en"}, {"split": "test"}, {"streaming": True}])
def test_options_of_the_hub_have_no_meaning_for_files(tmp_path, option):
    with pytest.raises(ConfigError, match="for a data set on the Hub alone"):
        pieces_of(Corpus(tmp_path, **option))


def test_a_data_set_that_is_not_there_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    with pytest.raises(DataError, match="Expected a data set 'nobody/nothing', but it cannot be r"):
        pieces_of(Corpus("nobody/nothing"))


# ---- parts of speech ----

RULE = PartOfSpeech("tiny", ("ADJ",))


def test_without_spacy_its_rule_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)

    with pytest.raises(ConfigError, match=r'pip install "hf_gradiend\[spacy\]", or remove the key'):
        tag_check(RULE)


def test_without_the_pipeline_its_rule_is_an_error_that_says_how_to_install_it(monkeypatch):
    def load(name):
        raise OSError(f"[E050] Can't find model {name!r}.\nMore.")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))

    with pytest.raises(ConfigError, match=r"\[E050\] Can't .* python -m spacy download tiny\."):
        tag_check(RULE)


def test_the_tag_is_that_of_the_word_at_the_slot(monkeypatch):
    # spaCy is optional and large: this is its interface on white-space tokens, where a word in
    # capitals is a name and any other one an adjective.
    class Document:
        def __init__(self, text):
            self.text = text

        def char_span(self, start, end, alignment_mode):
            assert alignment_mode == "expand"
            tag = "PROPN" if self.text[start:end][0].isupper() else "ADJ"
            return [SimpleNamespace(pos_="DET"), SimpleNamespace(pos_=tag)]

    pipeline = SimpleNamespace(pipe=lambda texts: map(Document, texts))
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda _: pipeline))
    candidates = [Candidate(f"A {word} [TARGET].", word, "", "") for word in ("icy", "Icy")]

    assert tag_check(RULE)(candidates) == [True, False]
