import json

import pytest
from transformers import AutoConfig

import hf_gradiend  # noqa: F401 - registers the configuration
from hf_gradiend.configuration_gradiend import GradiendConfig

PARAMETERS = [
    {"name": "z.weight", "shape": [4, 3], "n_selected": None},
    {"name": "a.weight", "shape": [5], "n_selected": 2},
    {"name": "m.bias", "shape": [2, 2, 2], "n_selected": None},
]
FULL = {
    "parameters": PARAMETERS,
    "n_features": 2,
    "feature_classes": [["female", "male"], ["plural", "singular"]],
    "feature_words": {"male": ["he", "him"], "female": ["she", "her"]},
    "source": "diff",
    "target": "factual",
    "objective": "masked",
    "base_model_name_or_path": "org/base",
    "base_model_revision": "0123abc",
    "base_model_class": "BertForMaskedLM",
    "selection_fingerprint": "f" * 64,
    "feature_factor": 0.25,
    "step_size": -0.01,
    "decoder_initialization": "uniform",
}


def test_the_defaults_are_the_papers_sides_and_no_chosen_edit():
    config = GradiendConfig()

    assert (config.source, config.target, config.n_features) == ("factual", "diff", 1)
    assert (config.feature_factor, config.step_size) == (None, None)
    assert config.n_selected == 0


def test_n_selected_counts_every_entry_or_the_indices():
    assert GradiendConfig(parameters=PARAMETERS).n_selected == 4 * 3 + 2 + 2 * 2 * 2


def test_every_field_survives_a_file(tmp_path):
    config = GradiendConfig(**FULL)
    config.save_pretrained(tmp_path)

    loaded = GradiendConfig.from_pretrained(tmp_path)

    assert {name: getattr(loaded, name) for name in FULL} == FULL
    # The control: every field differs from its default, so none can be missing from the file.
    default = GradiendConfig()
    assert all(getattr(default, name) != value for name, value in FULL.items())


def test_the_order_of_parameters_survives_the_sorted_keys_of_the_file(tmp_path):
    GradiendConfig(**FULL).save_pretrained(tmp_path)

    loaded = GradiendConfig.from_pretrained(tmp_path)

    assert [entry["name"] for entry in loaded.parameters] == ["z.weight", "a.weight", "m.bias"]
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert list(content) == sorted(content)  # the control: the file does sort its keys


def test_auto_config_knows_the_model_type(tmp_path):
    GradiendConfig(**FULL).save_pretrained(tmp_path)

    loaded = AutoConfig.from_pretrained(tmp_path)

    assert type(loaded) is GradiendConfig
    assert loaded.n_features == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "both"}, "source to be one of 'factual'.*'both'"),
        ({"target": None}, "target to be one of.*None"),
        ({"objective": "seq2seq"}, "objective to be one of 'masked', 'causal'"),
        ({"decoder_initialization": "normal"}, "decoder_initialization.*'normal'"),
        ({"format_version": 2}, "format_version to be one of 1, but got 2"),
        ({"n_features": 0}, "n_features to be at least 1"),
        ({"feature_classes": [["a", "b"], ["c", "d"]]}, "one pair of names for each of the 1"),
        ({"feature_classes": [["a", "b", "c"]]}, "one pair of names"),
        ({"n_features": 2, "feature_classes": [["a", "b"]]}, "each of the 2 features"),
    ],
)
def test_a_value_that_is_not_allowed_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        GradiendConfig(**settings)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"source.*target.*n_features"):
        GradiendConfig(source="x", target="y", n_features=-1)


def test_a_configuration_does_not_share_lists_with_its_arguments():
    shape, classes = [2, 3], [["a", "b"]]
    config = GradiendConfig(parameters=[{"name": "w", "shape": shape}], feature_classes=classes)

    shape[0] = 99
    classes[0][0] = "changed"

    assert config.parameters == [{"name": "w", "shape": [2, 3], "n_selected": None}]
    assert config.feature_classes == [["a", "b"]]
