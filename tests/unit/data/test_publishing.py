"""Cards of feature data sets, and what is refused before anything is pushed."""

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard

from hf_gradiend.data.loading import FEATURE_COLUMNS, load_feature_dataset
from hf_gradiend.data.publishing import push_feature_dataset, render_dataset_card
from hf_gradiend.data.templates import build_gender_pronouns
from hf_gradiend.errors import ConfigError, DataError

SAYS = {"name": "Trees", "license": "cc0-1.0", "about": "Written by hand, for this test."}


def rows(*words: tuple[str, str, str, str], **further: list) -> Dataset:
    columns = dict(zip(FEATURE_COLUMNS[1:], map(list, zip(*words, strict=True)), strict=True))
    return Dataset.from_dict({"text": ["The [TARGET] fell."] * len(words), **columns, **further})


@pytest.fixture
def trees() -> DatasetDict:
    oak, elm = ("oak", "elm", "A", "B"), ("elm", "oak", "B", "A")
    beech = ("elm", "beech", "B", "A")  # a word that is no text's own
    return DatasetDict(
        {
            "train": rows(oak, elm, beech, note=["x", "y", "z"]),
            "test": rows(oak, elm, note=["x", "y"]),
        }
    )


def test_a_card_tells_columns_words_and_numbers(trees):
    card = render_dataset_card(trees, "me/trees", **SAYS)

    assert "# Trees\n" in card
    assert "- `A`: “beech”, “oak”\n- `B`: “elm”\n" in card
    assert "- `train`: 3 texts, 1 of `A` and 2 of `B`\n- `test`: 2 texts, 1 of `A` and 1" in card
    assert "- Further columns: `note`.\n" in card
    assert "## How it was made\n\nWritten by hand, for this test.\n" in card
    assert all(f"`{column}`" in card for column in FEATURE_COLUMNS)


def test_a_card_tells_no_further_columns_where_there_are_none(trees):
    card = render_dataset_card(trees.remove_columns("note"), "me/trees", **SAYS)

    assert "Further columns" not in card
    assert "their classes.\n\n## Classes" in card


def test_of_three_classes_a_card_counts_rows_since_a_text_has_several(trees):
    trees["train"] = rows(("oak", "elm", "A", "B"), ("oak", "fir", "A", "C"))

    card = render_dataset_card(trees, "me/trees", **SAYS)

    assert "- `train`: 2 rows, 2 of `A`\n- `test`: 2 rows, 1 of `A` and 1 of `B`" in card


def test_of_many_words_a_card_shows_the_first():
    words = [(f"w{number:02}", "elm", "A", "B") for number in range(23)]

    card = render_dataset_card(DatasetDict({"train": rows(*words)}), "me/trees", **SAYS)

    assert "“w18”, “w19” and 3 more\n" in card
    assert "w20" not in card


def test_the_front_matter_keeps_what_datasets_wrote_and_adds_ours(trees):
    written = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "d/*"}]}],
        "dataset_info": {"splits": [{"name": "train", "num_examples": 3}]},
        "license": "other",
    }

    text = render_dataset_card(trees, "me/trees", **SAYS, language="en", metadata=written)
    data = DatasetCard(text).data.to_dict()

    assert {name: data[name] for name in ("configs", "dataset_info")} == {
        name: written[name] for name in ("configs", "dataset_info")
    }
    assert (data["license"], data["language"], data["pretty_name"]) == ("cc0-1.0", "en", "Trees")
    assert data["task_categories"] == ["fill-mask", "text-generation"]
    assert "gradiend" in data["tags"]


def test_a_language_that_is_not_given_is_not_claimed(trees):
    data = DatasetCard(render_dataset_card(trees, "me/trees", **SAYS)).data

    assert data.language is None


def test_parquet_files_beside_the_card_read_back(tmp_path):
    data = build_gender_pronouns(n_per_split={"train": 8, "validation": 4, "test": 4})
    files = [{"split": split, "path": f"data/{split}-*"} for split in data]
    metadata = {"configs": [{"config_name": "default", "data_files": files}]}
    (tmp_path / "data").mkdir()
    for split, part in data.items():
        part.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")

    card = render_dataset_card(data, "me/pronouns", **SAYS, metadata=metadata)
    (tmp_path / "README.md").write_text(card, "utf-8")

    read = load_feature_dataset(tmp_path)
    assert {split: part.to_list() for split, part in read.items()} == {
        split: part.to_list() for split, part in data.items()
    }


@pytest.mark.parametrize("blank", list(SAYS))
def test_a_card_that_leaves_something_unsaid_is_refused_before_a_push(trees, blank):
    # The suite has no network: without the refusal, this would fail with another error.
    with pytest.raises(ConfigError, match=f"says {blank}, but"):
        push_feature_dataset(trees, "me/trees", **{**SAYS, blank: " "})


def test_data_of_another_form_are_refused_before_a_push(trees):
    trees["train"] = trees["train"].remove_columns("factual")

    with pytest.raises(DataError, match="factual"):
        push_feature_dataset(trees, "me/trees", **SAYS)
