import json
import logging
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from hf_gradiend.data.loading import (
    classes_of,
    load_feature_dataset,
    load_neutral_texts,
    load_prompts,
    validate_feature_dataset,
)
from hf_gradiend.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared"

FEMALE = {
    "text": "Anna said that [TARGET] was late.",
    "factual": "she",
    "counterfactual": "he",
    "factual_class": "F",
    "counterfactual_class": "M",
}
MALE = {
    "text": "Paul said that [TARGET] was late.",
    "factual": "he",
    "counterfactual": "she",
    "factual_class": "M",
    "counterfactual_class": "F",
}
MASKED = {
    "text": "Anna said that she was late.",
    "masked": "[NAME] said that [PRONOUN] was late.",
    "name": "Anna",
    "pronoun": "she",
    "label": "F",
}
MASKED_MALE = {**MASKED, "text": "Paul said ...", "name": "Paul", "pronoun": "he", "label": "M"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, rows: list[dict]) -> Path:
    data = Dataset.from_list(rows)
    if path.suffix == ".csv":
        data.to_csv(path)
    elif path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_one_file_of_any_kind_is_the_training_split(tmp_path, suffix):
    file = write(tmp_path / f"data{suffix}", [FEMALE, MALE])

    data = load_feature_dataset(file)

    assert {split: rows.to_list() for split, rows in data.items()} == {"train": [FEMALE, MALE]}


def test_one_file_is_split_by_its_column_split(tmp_path):
    rows = [{**FEMALE, "split": "train"}, {**MALE, "split": "val"}, {**MALE, "split": "train"}]

    data = load_feature_dataset(write_jsonl(tmp_path / "data.jsonl", rows))

    # `val` becomes `validation`, as load_dataset does with names of files.
    assert data["train"].to_list() == [rows[0], rows[2]]
    assert data["validation"].to_list() == [rows[1]]


def test_a_row_without_the_name_of_its_split_is_an_error(tmp_path):
    rows = [{**FEMALE, "split": "train"}, {**MALE, "split": None}]

    with pytest.raises(DataError, match="row 1 has None"):
        load_feature_dataset(write_jsonl(tmp_path / "data.jsonl", rows))


def test_a_folder_of_files_gives_their_splits(tmp_path):
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [FEMALE, MALE])

    data = load_feature_dataset(tmp_path / "data")

    assert set(data) == {"train", "validation", "test"}
    assert data["test"].to_list() == [FEMALE, MALE]


def test_a_folder_with_a_data_set_card_gives_the_splits_of_the_card(tmp_path):
    write_jsonl(tmp_path / "data" / "first.jsonl", [FEMALE, MALE])
    write_jsonl(tmp_path / "data" / "second.jsonl", [MALE])
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += (
        "  - split: train\n    path: first.jsonl\n  - split: held\n    path: second.jsonl\n---\n"
    )
    (tmp_path / "data" / "README.md").write_text(card, encoding="utf-8")

    data = load_feature_dataset(tmp_path / "data")

    assert data["train"].to_list() == [FEMALE, MALE]
    assert data["held"].to_list() == [MALE]


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk_is_read(tmp_path, splits):
    rows = Dataset.from_list([FEMALE, MALE])
    (DatasetDict({"train": rows}) if splits else rows).save_to_disk(tmp_path / "saved")

    assert load_feature_dataset(tmp_path / "saved")["train"].to_list() == [FEMALE, MALE]


@pytest.mark.parametrize("preset", [None, "gender", "genter"])
def test_masked_pronouns_become_feature_rows(tmp_path, preset):
    rows = [{**MASKED, "pronoun_count": 1}, {**MASKED_MALE, "pronoun_count": 1}]

    data = load_feature_dataset(write_jsonl(tmp_path / "data.jsonl", rows), preset=preset)

    assert data["train"].to_list() == [{**FEMALE, "name": "Anna"}, {**MALE, "name": "Paul"}]


def test_every_slot_of_a_masked_row_becomes_a_slot(tmp_path):
    twice = {**MASKED, "masked": "[NAME] said [PRONOUN] would, and [PRONOUN] did."}

    data = load_feature_dataset(write_jsonl(tmp_path / "data.jsonl", [twice, MASKED_MALE]))

    assert data["train"][0]["text"] == "Anna said [TARGET] would, and [TARGET] did."


def test_masked_rows_without_a_slot_are_left_out_and_counted(tmp_path, caplog):
    rows = [MASKED, {**MASKED, "masked": "[NAME] said that SHE was late."}, MASKED_MALE]
    file = write_jsonl(tmp_path / "data.jsonl", rows)

    with caplog.at_level(logging.WARNING, logger="hf_gradiend"):
        data = load_feature_dataset(file)

    assert len(data["train"]) == 2
    messages = [record.message for record in caplog.records]
    assert messages == ["Rows left out for lack of the slot [PRONOUN] of 'train': 1."]


def test_nothing_is_logged_where_every_masked_row_has_a_slot(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_gradiend"):
        load_feature_dataset(write_jsonl(tmp_path / "data.jsonl", [MASKED, MASKED_MALE]))

    assert caplog.records == []


def test_masked_rows_that_contradict_themselves_are_all_named(tmp_path):
    rows = [MASKED, {**MASKED, "pronoun": "he"}, {**MASKED, "label": "X"}, {**MASKED, "name": ""}]

    with pytest.raises(DataError) as caught:
        load_feature_dataset(write_jsonl(tmp_path / "data.jsonl", rows))

    message = str(caught.value)
    assert "row 1 of 'train': the pronoun is 'he', but label 'F' goes with 'she'" in message
    assert "row 2 of 'train': the label is 'X'" in message
    assert "row 3 of 'train': name is empty" in message
    assert "row 0" not in message


def test_masked_rows_without_any_slot_are_an_error(tmp_path):
    rows = [{**MASKED, "masked": "[NAME] was late."}]

    with pytest.raises(DataError, match=r"rows with the slot \[PRONOUN\] of 'train', but got none"):
        load_feature_dataset(write_jsonl(tmp_path / "data.jsonl", rows))


def test_a_preset_names_the_columns_that_it_lacks(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl", [FEMALE, MALE])

    with pytest.raises(DataError, match=r"\['masked', 'name', 'pronoun', 'label'\] are missing"):
        load_feature_dataset(file, preset="gender")


def test_an_unknown_preset_is_an_error_that_lists_the_known(tmp_path):
    with pytest.raises(ConfigError, match=r"\['gender', 'genter'\], but got 'race'"):
        load_feature_dataset(tmp_path, preset="race")


def test_a_revision_of_local_data_is_an_error(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl", [FEMALE, MALE])

    with pytest.raises(ConfigError, match="no revision for local data, but got 'v1'"):
        load_feature_dataset(file, revision="v1")


@pytest.mark.parametrize("path", ["missing.jsonl", "/missing/folder", "some/missing/folder"])
def test_a_missing_path_is_an_error_that_names_it(path):
    with pytest.raises(DataError, match=f"no file or folder '{path}'"):
        load_feature_dataset(path)


def test_a_hub_id_that_cannot_be_read_is_an_error_that_names_it():
    with pytest.raises(DataError, match="Cannot read data from 'nobody/nothing'"):
        load_feature_dataset("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "{bad"), ("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "text,factual\n")],
)
def test_a_broken_or_empty_file_is_an_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")

    with pytest.raises(DataError, match=f"Cannot read data from '{tmp_path / name}'"):
        load_feature_dataset(tmp_path / name)


def test_a_file_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "data.xml").write_text("<a/>", encoding="utf-8")

    with pytest.raises(DataError, match=r"ends in one of .*\.jsonl.*but got"):
        load_feature_dataset(tmp_path / "data.xml")


def test_a_folder_without_data_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(DataError, match="Cannot read data from"):
        load_feature_dataset(tmp_path / "empty")


def test_missing_columns_are_listed_with_those_that_came():
    rows = Dataset.from_list([{"text": "A [TARGET].", "word": "he"}])

    with pytest.raises(DataError, match=r"'factual', .* are missing; got \['text', 'word'\]"):
        validate_feature_dataset(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "Anna was late."}, r"row 1: no slot \[TARGET\] in the text 'Anna was late.'"),
        ({"text": None}, r"row 1: no slot \[TARGET\] in the text None"),
        ({"factual": " "}, "row 1: factual is ' ', not a word"),
        ({"counterfactual": None}, "row 1: counterfactual is None, not a word"),
        ({"factual_class": None}, "row 1: factual_class is None"),
        ({"counterfactual": "she"}, "row 1: factual and counterfactual are both 'she'"),
        ({"counterfactual_class": "F"}, "row 1: factual_class and .* are both 'F'"),
    ],
)
def test_a_row_out_of_form_is_named_by_its_number(change, message):
    good = Dataset.from_list([MALE, FEMALE])
    bad = Dataset.from_list([MALE, {**FEMALE, **change}])

    validate_feature_dataset(good)
    with pytest.raises(DataError, match=message):
        validate_feature_dataset(bad)


def test_all_bad_rows_are_counted_and_the_first_ones_named():
    splits = DatasetDict(
        {
            "train": Dataset.from_list([FEMALE, MALE]),
            "test": Dataset.from_list([{**FEMALE, "text": "x" * 99}] * 8),
        }
    )

    with pytest.raises(DataError) as caught:
        validate_feature_dataset(splits)

    message = str(caught.value)
    assert message.count("no slot") == 5
    assert message.endswith("; and 3 more.")
    assert "row 4 of 'test'" in message
    assert "x" * 58 not in message
    assert "\n" not in message


def test_fewer_than_two_classes_are_an_error():
    empty = Dataset.from_list([FEMALE]).select([])

    with pytest.raises(DataError, match=r"at least two classes .* got 0: \[\]"):
        validate_feature_dataset(empty)


def test_three_classes_are_fine_and_counted_over_all_splits():
    other = {**FEMALE, "factual": "they", "factual_class": "N"}
    splits = DatasetDict({"train": Dataset.from_list([FEMALE]), "test": Dataset.from_list([other])})

    validate_feature_dataset(splits)

    assert classes_of(splits.values()) == ["F", "M", "N"]
    assert classes_of([splits["train"]]) == ["F", "M"]


@pytest.fixture
def three_classes(tmp_path):
    words = {"F": "she", "M": "he", "N": "they"}
    rows = [
        {
            **FEMALE, "factual": words[own], "counterfactual": words[other], "factual_class": own,
            "counterfactual_class": other, "split": split,
        }
        for split in ("train", "test") for own in words for other in words if own != other
    ]  # fmt: skip
    return write_jsonl(tmp_path / "data.jsonl", rows)


@pytest.mark.parametrize("classes", [("M", "N"), ("N", "M")])
def test_two_classes_of_three_are_their_rows_either_way_round(three_classes, classes):
    everything = load_feature_dataset(three_classes)
    chosen = load_feature_dataset(three_classes, classes=classes)

    assert {split: len(rows) for split, rows in everything.items()} == {"train": 6, "test": 6}
    for rows in chosen.values():
        assert list(zip(rows["factual"], rows["counterfactual"], strict=True)) == [
            ("he", "they"), ("they", "he")
        ]  # fmt: skip


@pytest.mark.parametrize("classes", [("M", "X"), ("M", "M")])
def test_classes_that_the_data_do_not_have_are_an_error_that_lists_them(three_classes, classes):
    with pytest.raises(ConfigError) as caught:
        load_feature_dataset(three_classes, classes=classes)

    assert str(caught.value) == (
        f"Expected two of the classes ['F', 'M', 'N'], but got {list(classes)}."
    )


def test_neutral_texts_of_a_txt_file_are_its_lines(tmp_path, caplog):
    file = tmp_path / "neutral.txt"
    file.write_text("First line.\nSecond\u2028 line.\n", encoding="utf-8")

    assert load_neutral_texts(file) == ["First line.", "Second\u2028 line."]
    assert caplog.records == []


def test_blank_neutral_texts_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "neutral.txt").write_text("One.\n\n \nTwo.\n", encoding="utf-8")
    rows = [{"text": "One."}, {"text": None}, {"text": ""}, {"text": "Two."}]
    file = write_jsonl(tmp_path / "neutral.jsonl", rows)

    assert load_neutral_texts(tmp_path / "neutral.txt") == ["One.", "Two."]
    assert load_neutral_texts(file) == ["One.", "Two."]
    assert [record.message[-3:] for record in caplog.records] == [" 2.", " 2."]


def test_neutral_texts_of_a_folder_are_those_of_all_splits(tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "One.", "more": 1}])
    write_jsonl(tmp_path / "data" / "test.jsonl", [{"text": "Two.", "more": 2}])

    assert load_neutral_texts(tmp_path / "data") == ["One.", "Two."]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_of_neutral_texts_is_an_error(tmp_path, content):
    (tmp_path / "neutral.txt").write_text(content, encoding="utf-8")

    with pytest.raises(DataError, match="at least one text"):
        load_neutral_texts(tmp_path / "neutral.txt")


def test_neutral_texts_with_a_slot_are_an_error(tmp_path):
    (tmp_path / "neutral.txt").write_text("One.\nA [TARGET] came.\n", encoding="utf-8")

    with pytest.raises(DataError, match=r"without the slot \[TARGET\], but got 'A \[TARGET\] came"):
        load_neutral_texts(tmp_path / "neutral.txt")


def test_neutral_texts_are_those_of_the_configuration_of_this_name(tmp_path):
    write_jsonl(tmp_path / "first.jsonl", [FEMALE, MALE])
    write_jsonl(tmp_path / "second.jsonl", [{"text": "One."}])
    card = "---\nconfigs:\n- config_name: default\n  data_files: first.jsonl\n"
    card += "- config_name: neutral\n  data_files: second.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")

    assert load_neutral_texts(tmp_path) == ["One."]
    assert load_feature_dataset(tmp_path)["train"].to_list() == [FEMALE, MALE]


def test_neutral_data_without_texts_or_file_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"\['text'\] are missing; got \['word'\]"):
        load_neutral_texts(write_jsonl(tmp_path / "data.jsonl", [{"word": "x"}]))
    with pytest.raises(DataError, match="Cannot read text from"):
        load_neutral_texts(tmp_path / "missing.txt")


# ---- prompts ----

PROMPTS = ["She said that [TARGET] was late.", "[TARGET] came, and [TARGET] left."]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.csv", "folder"])
def test_prompts_are_read_from_whatever_neutral_texts_are(tmp_path, name):
    place = tmp_path / name
    if name == "prompts.txt":
        place.write_text("\n".join([*PROMPTS, "", " "]), encoding="utf-8")
    elif name == "folder":
        write_jsonl(place / "train.jsonl", [{"text": PROMPTS[0]}])
        write_jsonl(place / "test.jsonl", [{"text": PROMPTS[1]}])
    else:
        write(place, [{"text": text, "more": "x"} for text in PROMPTS])

    assert load_prompts(place) == PROMPTS
    with pytest.raises(DataError, match="without the slot"):
        load_neutral_texts(place)  # the control: the two kinds of text are told apart


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "at least one text"),
        (["", "  "], "at least one text"),
        (PROMPTS[:1], "but got one."),
        ([*PROMPTS, "Anna was late."], "but got 'Anna was late.'."),
        ([*PROMPTS, "[target] came.", "[TARGET ] came."], "'[target] came.'; '[TARGET ] came.'."),
        (["No slot."], "'No slot.'"),
    ],
)
def test_texts_that_are_no_prompts_are_an_error_that_names_them(tmp_path, lines, words):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines), encoding="utf-8")

    with pytest.raises(DataError) as caught:
        load_prompts(file)

    line = str(caught.value)
    assert words in line
    assert str(file) in line
    assert "\n" not in line


def test_many_texts_without_a_slot_are_counted(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"Text {number}." for number in range(9)), encoding="utf-8")

    with pytest.raises(DataError, match=r"'Text 4\.'; and 4 more"):
        load_prompts(file)


def test_prompts_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(DataError, match="Cannot read text from"):
        load_prompts(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="no file or folder"):
        load_prompts(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"\['text'\] are missing"):
        load_prompts(write_jsonl(tmp_path / "data.jsonl", [{"prompt": PROMPTS[0]}]))


@pytest.mark.skipif(not (SHARED / "data" / "gender").is_dir(), reason="needs shared/data/gender")
def test_the_shared_gender_data_are_read_but_for_the_row_without_a_slot():
    data = load_feature_dataset(SHARED / "data" / "gender")

    assert {split: len(rows) for split, rows in data.items()} == {
        "train": 3067,
        "validation": 171,
        "test": 310,
    }
    assert set(data["train"]["factual"]) == {"he", "she"}
