import json
from dataclasses import asdict

import pytest
import torch
from datasets import Dataset

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.templates import occupation_prompts, picture_prompts, transfer_pairs
from hf_gradiend.errors import ConfigError, DataError
from hf_gradiend.evaluation import report as report_module
from hf_gradiend.evaluation.probe import EditProbe
from hf_gradiend.evaluation.report import (
    WITH_MARGIN,
    Origin,
    build_report,
    choose_gender_edit,
    edit_probes,
    feature_words,
    is_gender,
    read_encoder,
)
from hf_gradiend.files import write_json
from hf_gradiend.modeling_gradiend import GradiendModel


@pytest.fixture
def planted(planted_gpt2):
    """The causal model alone, whose tokenizer reads any text."""
    return planted_gpt2


NEUTRAL = [
    "the doctor took the red coat home .",
    "the day was long because the rain began .",
    "when the rain began the nurse took the day off .",
    "the red coat was long .",
]


@pytest.fixture
def encoder(planted, gradiend):
    splits = {"test": planted.data["test"]}
    return read_encoder(gradiend, planted.model, planted.tokenizer, splits, progress=False)


@pytest.fixture
def judged(planted, gradiend):
    return choose_gender_edit(
        gradiend, planted.model, planted.tokenizer, max_trials=12, progress=False
    )


def report_of(gradiend, encoder, judged):
    training = {"global_step": 6, "seconds": 1.5, "convergence": [], "best_step": None}
    return build_report(
        gradiend, encoder=encoder, judged=judged, training=training,
        origin=Origin("tiny", "names", settings={"solver": "closed_form"}),
    )  # fmt: skip


def numbers_in(value) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers_in(part)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("with_edit", [True, False])
def test_a_report_is_valid_json_and_comes_back_as_it_was(
    gradiend, encoder, judged, tmp_path, with_edit
):
    report = report_of(gradiend, encoder, judged if with_edit else None)

    text = json.dumps(report, allow_nan=False)  # NaN is no JSON
    file = write_json(tmp_path / "report.json", report)

    assert json.loads(text) == json.loads(file.read_text(encoding="utf-8"))
    assert len(numbers_in(json.loads(text))) > 100  # the control: it is full of numbers
    assert (report["edit"] is None) == (not with_edit)
    for key in ("before", "after"):
        assert (report[key] is None) == (not with_edit)


def test_a_report_says_what_was_measured(gradiend, encoder, judged):
    report = json.loads(json.dumps(report_of(gradiend, encoder, judged)))

    assert report["n_selected"] == gradiend.config.n_selected
    assert report["objective"] == "causal"
    assert report["feature_classes"] == ["F", "M"]
    assert report["training"]["global_step"] == 6
    split = report["encoder"]["splits"]["test"]
    assert split["correlation"]["value"] == encoder.splits["test"].correlation.value
    assert report["edit"]["step_size"] == judged.choice.step_size
    assert report["edit"]["rule"] == asdict(WITH_MARGIN)
    assert report["before"] == {**vars(judged.before), "p_others": []}
    assert report["after"] == {**vars(judged.after), "p_others": []}
    assert set(report["energy"]) == set(gradiend.names)
    assert report["base_model"] == "tiny"


def test_the_edit_is_judged_on_other_texts_than_it_was_chosen_on(planted, gradiend, judged):
    assert judged.choice.after.imbalance < judged.choice.before.imbalance
    assert judged.before != judged.choice.before
    # The judgement by hand, on the second half of the occupations.
    rows = list(occupation_prompts("judge"))
    probe = EditProbe(rows, (["she"], ["he"]), NEUTRAL, planted.model, planted.tokenizer)
    base = probe.measure()
    choice = judged.choice
    with gradiend.edited(planted.model, choice.feature_factor, choice.step_size):
        edited = probe.measure()
    for name in ("imbalance", "mass", "p_plus", "p_minus"):
        assert getattr(judged.before, name) == pytest.approx(getattr(base, name), rel=1e-5)
        assert getattr(judged.after, name) == pytest.approx(getattr(edited, name), rel=1e-5)
    assert edited.imbalance != base.imbalance  # the control


def test_the_picture_and_the_curves_belong_to_the_judgement(planted, judged):
    occupations = list(dict.fromkeys(picture_prompts()["occupation"]))
    assert [row["occupation"] for row in judged.occupations] == occupations
    rows = [row for row in picture_prompts() if row["occupation"] == occupations[0]]
    probe = EditProbe(rows, (["she"], ["he"]), NEUTRAL, planted.model, planted.tokenizer)
    plus, minus = probe.probabilities().mean(0).tolist()
    assert judged.occupations[0]["before"] == pytest.approx(
        {"p_plus": plus, "p_minus": minus}, rel=1e-4
    )

    at_zero = [point for point in judged.sweep if point["step_size"] == 0.0]
    assert at_zero
    assert all(point["imbalance"] == judged.before.imbalance for point in at_zero)
    (chosen,) = [
        point for point in judged.sweep
        if point["step_size"] == judged.choice.step_size
        and point["feature_factor"] == judged.choice.feature_factor
    ]  # fmt: skip
    assert chosen["imbalance"] == judged.after.imbalance


def test_choosing_and_judging_leave_the_base_model_bit_for_bit(planted, gradiend):
    before = {name: t.detach().clone() for name, t in planted.model.state_dict().items()}

    judged = choose_gender_edit(
        gradiend, planted.model, planted.tokenizer, max_trials=8, progress=False
    )

    assert judged is not None  # the control: an edit was in
    assert all(torch.equal(t, before[n]) for n, t in planted.model.state_dict().items())


def test_neutral_texts_of_ones_own_are_halved(planted, gradiend, monkeypatch):
    seen = []

    class Seen(EditProbe):
        def __init__(self, prompts, words, neutral_texts, *rest):
            seen.append(neutral_texts)
            super().__init__(prompts, words, neutral_texts, *rest)

    monkeypatch.setattr(report_module, "EditProbe", Seen)

    choose_gender_edit(
        gradiend, planted.model, planted.tokenizer, neutral_texts=NEUTRAL, max_trials=8,
        with_sweep=False, progress=False,
    )  # fmt: skip

    assert seen[:2] == [[" ".join(NEUTRAL[:2])], [" ".join(NEUTRAL[2:])]]


def test_a_decoder_of_zeros_gives_no_judged_edit(planted, gradiend):
    with torch.no_grad():
        for parameter in gradiend.decoder.parameters():
            parameter.zero_()

    assert (
        choose_gender_edit(gradiend, planted.model, planted.tokenizer, max_trials=4, progress=False)
        is None
    )


# ---- texts of one's own ----

SLOTTED = [
    "the doctor said that [TARGET] was late .",
    "the nurse went home because [TARGET] was tired .",
    "when the nurse came home , [TARGET] was tired .",
]


def test_prompts_of_ones_own_choose_and_judge_in_halves(planted, gradiend):
    choosing, judging = edit_probes(
        gradiend, planted.model, planted.tokenizer, prompts=SLOTTED, neutral_texts=NEUTRAL
    )

    words = (["she"], ["he"])
    for probe, texts, neutral in (
        (choosing, SLOTTED[:1], [" ".join(NEUTRAL[:2])]),
        (judging, SLOTTED[1:], [" ".join(NEUTRAL[2:])]),
    ):
        rows = [{"text": text} for text in texts]
        alone = EditProbe(rows, words, neutral, planted.model, planted.tokenizer)
        assert probe.measure() == alone.measure()
    assert choosing.measure() != judging.measure()  # the control


def test_the_package_s_occupations_are_the_default_for_gender_alone(planted, gradiend):
    probes = edit_probes(gradiend, planted.model, planted.tokenizer, neutral_texts=NEUTRAL)

    assert [probe.n_texts for probe in probes] == [
        len(occupation_prompts("choose")), len(occupation_prompts("judge"))
    ]  # fmt: skip
    gradiend.config.feature_words = {"F": ["was"], "M": ["the"]}
    with pytest.raises(ConfigError, match=r"Pass prompts with the slot \[TARGET\]"):
        edit_probes(gradiend, planted.model, planted.tokenizer)
    others = edit_probes(
        gradiend, planted.model, planted.tokenizer, prompts=SLOTTED, neutral_texts=NEUTRAL
    )
    assert [probe.n_texts for probe in others] == [1, 2]


def test_one_prompt_or_one_neutral_text_cannot_be_halved(planted, gradiend):
    model = (gradiend, planted.model, planted.tokenizer)

    with pytest.raises(DataError, match="at least one text with room"):
        edit_probes(*model, prompts=SLOTTED[:1], neutral_texts=NEUTRAL)
    with pytest.raises(DataError, match="neutral texts with tokens"):
        edit_probes(*model, prompts=SLOTTED, neutral_texts=NEUTRAL[:1])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"F": ["she"], "M": ["he"]}, True),
        ({"F": ["he"], "M": ["she"]}, True),  # whatever the classes' names
        ({"F": ["she", "her"], "M": ["he"]}, False),
        ({"F": ["Paris"], "M": ["London"]}, False),
    ],
)
def test_a_gradiend_of_she_and_he_is_recognised(words, expected):
    config = GradiendConfig(
        parameters=[{"name": "w", "shape": [2]}], feature_classes=[["F", "M"]], feature_words=words
    )

    assert is_gender(GradiendModel(config)) is expected


def test_the_words_come_in_the_order_of_the_classes(gradiend):
    assert feature_words(gradiend) == (["she"], ["he"])
    gradiend.config.feature_classes = [["M", "F"]]
    assert feature_words(gradiend) == (["he"], ["she"])
    gradiend.config.feature_words = None
    with pytest.raises(ConfigError, match="names its classes and their words"):
        feature_words(gradiend)


def test_another_feature_than_gender_has_no_occupations(planted, gradiend):
    gradiend.config.feature_words = {"F": ["was"], "M": ["the"]}

    with pytest.raises(ConfigError, match="she against he"):
        choose_gender_edit(gradiend, planted.model, planted.tokenizer, progress=False)


def test_the_transfer_pairs_have_the_word_of_the_plus_class_first(planted, gradiend, encoder):
    data: Dataset = planted.data["test"]
    gradiend.flip_()
    gradiend.config.feature_classes = [["M", "F"]]
    turned = read_encoder(
        gradiend, planted.model, planted.tokenizer, {"test": data}, progress=False
    )

    assert {pair.pair for pair in encoder.transfer} == set(transfer_pairs()["pair"])
    forward = {pair.pair: pair for pair in encoder.transfer}
    for pair in turned.transfer:
        own = forward["/".join(reversed(pair.pair.split("/")))]
        assert pair.positive == pytest.approx(-own.negative, abs=1e-5)
        assert pair.negative == pytest.approx(-own.positive, abs=1e-5)
    assert turned.transfer_in_order.value == pytest.approx(encoder.transfer_in_order.value)
