import math
import re

import pytest
import torch
from datasets import Dataset

from hf_gradiend.base_models import objective_of
from hf_gradiend.data.collation import collate, prepare_texts
from hf_gradiend.errors import DataError, NumericalError
from hf_gradiend.evaluation.encoder import evaluate_encoder, neutral_readings
from hf_gradiend.gradients.backward import gradients
from hf_gradiend.metrics import pearson_correlation
from hf_gradiend.parameters import selection_of

NEUTRAL = [
    "the doctor took the red coat home .",
    "the day was long because the rain began .",
    "when the rain began the nurse took the day off .",
]
# "said" and "took" are the words of two classes that nobody has trained on.
TRANSFER = [
    {"text": "the doctor [TARGET] the coat", "pair": "put/took", "kind": "feature",
     "factual": "put", "counterfactual": "took"},
    {"text": "the nurse and anna [TARGET] home", "pair": "put/took", "kind": "feature",
     "factual": "put", "counterfactual": "took"},
    {"text": "the coat was [TARGET] and long", "pair": "red/blue", "kind": "neutral",
     "factual": "red", "counterfactual": "blue"},
]  # fmt: skip


@pytest.fixture
def report_of(planted, gradiend):
    def report_of(splits=None, **options):
        splits = {"test": planted.data["test"]} if splits is None else splits
        return evaluate_encoder(
            gradiend, planted.model, planted.tokenizer, splits, NEUTRAL, progress=False, **options
        )

    return report_of


def by_backward(planted, gradiend, rows, side="factual") -> torch.Tensor:
    """Encodings from each text's own gradient: a backward pass and a dot product."""
    encodings = []
    for row in rows:
        texts = prepare_texts([row], planted.tokenizer, objective_of(planted.model))
        batch = collate(texts.texts, planted.tokenizer.pad_token_id)
        found = gradients(planted.model, batch, selection_of(gradiend), (side,))[side]
        encodings.append(gradiend.encode(found).detach())
    return torch.stack(encodings)


# ---- neutral readings ----


def test_a_neutral_reading_hides_one_ordinary_word_of_its_text():
    rows = neutral_readings(NEUTRAL, seed=0)

    assert len(rows) == len(NEUTRAL)
    for row, text in zip(rows, NEUTRAL, strict=True):
        assert row["text"].count("[TARGET]") == 1
        assert row["text"].replace("[TARGET]", row["factual"]) == text
        words = re.findall(r"[^\W\d_]{3,}", text)
        assert row["factual"] in words[2:]  # never one of the first two
        assert len(row["factual"]) >= 3


def test_the_word_against_it_is_one_of_another_text():
    rows = neutral_readings(NEUTRAL, seed=0)

    assert [row["counterfactual"] for row in rows] == [
        rows[1]["factual"], rows[2]["factual"], rows[0]["factual"]
    ]  # fmt: skip


def test_neutral_readings_depend_on_their_seed_alone():
    texts = NEUTRAL * 10

    assert neutral_readings(texts, seed=1) == neutral_readings(texts, seed=1)
    assert neutral_readings(texts, seed=1) != neutral_readings(texts, seed=2)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_text_that_holds_the_slot_already_is_an_error(where):
    texts = list(NEUTRAL)
    texts[where] = "when [TARGET] came home the day was long ."

    with pytest.raises(DataError, match=r"without the slot \[TARGET\]"):
        neutral_readings(texts)


def test_short_texts_are_left_out_and_one_alone_is_an_error():
    short = "the day ."

    assert neutral_readings([short, *NEUTRAL]) == neutral_readings(NEUTRAL)
    with pytest.raises(DataError, match="at least two neutral texts"):
        neutral_readings([short, NEUTRAL[0]])


# ---- the report ----


def test_the_encodings_of_the_report_are_those_of_each_texts_gradient(planted, gradiend, report_of):
    rows = planted.data["test"].select([0, 11, 30, 47])

    split = report_of({"test": rows}).splits["test"]

    expected = by_backward(planted, gradiend, rows)[:, 0]
    # Forward mode against backward, float32.
    assert split.encodings["F"] == pytest.approx(expected[:2].tolist(), abs=1e-3)
    assert split.encodings["M"] == pytest.approx(expected[2:].tolist(), abs=1e-3)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert split.correlation.value == pytest.approx(pearson_correlation(expected, signs), abs=1e-3)
    counter = by_backward(planted, gradiend, rows, "counterfactual")[:, 0]
    assert split.counterfactual_correlation == pytest.approx(
        pearson_correlation(counter, signs), abs=1e-3
    )


def test_every_interval_holds_its_value(report_of):
    report = report_of()

    split = report.splits["test"]
    estimates = [split.correlation, split.accuracy, split.three_way_accuracy, report.neutral]
    estimates += split.mean_absolute.values()
    assert len(estimates) == 6
    for estimate in estimates:
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.n >= 3
    assert split.correlation.low < split.correlation.high  # the control: an interval, not a point


def test_the_planted_feature_is_read_and_its_other_word_reads_the_opposite(report_of):
    split = report_of().splits["test"]

    assert split.correlation.value > 0.9
    assert split.accuracy.value > 0.9
    assert split.counterfactual_correlation < -0.3
    assert set(split.encodings) == {"F", "M"}
    assert sum(map(len, split.encodings.values())) == split.correlation.n == 48


def test_the_numbers_of_a_split_are_made_of_its_encodings(report_of):
    report = report_of()

    split = report.splits["test"]
    f, m = split.encodings["F"], split.encodings["M"]
    neutral = report.neutral_encodings
    right = sum(h > 0 for h in f) + sum(h < 0 for h in m)
    assert split.accuracy.value == right / len(f + m)
    assert split.mean_absolute["F"].value == pytest.approx(sum(map(abs, f)) / len(f), rel=1e-5)
    assert report.neutral.value == pytest.approx(sum(map(abs, neutral)) / len(neutral), rel=1e-5)
    pairs = [(h > n) + 0.5 * (h == n) for h in f for n in neutral]
    assert split.auc_against_neutral["F"] == pytest.approx(sum(pairs) / len(pairs))
    pairs = [(h < n) + 0.5 * (h == n) for h in m for n in neutral]
    assert split.auc_against_neutral["M"] == pytest.approx(sum(pairs) / len(pairs))
    shares = [
        sum(h > 0.5 for h in f) / len(f),
        sum(h < -0.5 for h in m) / len(m),
        sum(abs(h) <= 0.5 for h in neutral) / len(neutral),
    ]
    assert split.three_way_accuracy.value == pytest.approx(sum(shares) / 3)


def test_transfer_pairs_are_means_over_their_contexts(planted, gradiend, report_of):
    report = report_of(transfer=Dataset.from_list(TRANSFER))

    first, second = report.transfer
    assert (first.pair, first.kind) == ("put/took", "feature")
    assert (second.pair, second.kind) == ("red/blue", "neutral")
    own = by_backward(planted, gradiend, TRANSFER[:2])[:, 0]
    other = by_backward(planted, gradiend, TRANSFER[:2], "counterfactual")[:, 0]
    assert first.positive == pytest.approx(float(own.mean()), abs=1e-3)
    assert first.negative == pytest.approx(float(other.mean()), abs=1e-3)
    # Ordinary words are no part of the share and the gap.
    assert report.transfer_in_order.value == float(first.positive > first.negative)
    assert report.transfer_gap.value == pytest.approx(first.positive - first.negative, abs=1e-6)
    assert report.transfer_gap.n == 1


def test_without_transfer_data_there_is_no_transfer(report_of):
    report = report_of()

    assert report.transfer == []
    assert report.transfer_in_order is report.transfer_gap is None


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_other_classes_are_means_over_their_readable_texts(planted, gradiend, report_of):
    rows = [{**row, "factual_class": "N"} for row in planted.data["test"].select(range(3))]
    unreadable = {**rows[0], "text": "[TARGET] was late ."}  # nothing before the slot

    report = report_of(other_texts=Dataset.from_list([*rows, unreadable]))

    h = by_backward(planted, gradiend, rows)[:, 0]
    assert report.other_classes.keys() == {"N"}
    other = report.other_classes["N"]
    assert other.mean.n == other.mean_absolute.n == 3
    assert other.mean.value == pytest.approx(float(h.mean()), abs=1e-3)
    assert other.mean_absolute.value == pytest.approx(float(h.abs().mean()), abs=1e-3)
    assert report_of().other_classes == {}  # the control


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_texts_without_room_are_left_out_of_every_number(planted, report_of):
    # A causal model cannot read a slot with nothing before it.
    row = {**planted.data["test"][0], "text": "[TARGET] was late ."}
    transfer = [{**TRANSFER[0], "text": "[TARGET] the coat", "pair": "a/b"}, *TRANSFER]

    report = report_of(
        {"test": Dataset.from_list([row, *planted.data["test"].to_list()])},
        transfer=Dataset.from_list(transfer),
    )

    assert report.splits["test"].correlation.n == 48
    assert [pair.pair for pair in report.transfer] == ["put/took", "red/blue"]
    numbers = [p.positive for p in report.transfer] + [p.negative for p in report.transfer]
    assert all(math.isfinite(number) for number in numbers)


def test_a_gradiend_that_reads_the_difference_has_no_counterfactual(gradiend, report_of):
    gradiend.config.source = "diff"

    report = report_of(transfer=Dataset.from_list(TRANSFER))

    assert report.splits["test"].counterfactual_correlation is None
    assert report.transfer == []


def test_the_class_named_first_is_the_positive_one(gradiend, report_of):
    forward = report_of().splits["test"].correlation.value
    gradiend.config.feature_classes = [["M", "F"]]

    assert report_of().splits["test"].correlation.value == pytest.approx(-forward, abs=1e-6)


def test_other_classes_than_the_gradiends_are_an_error(gradiend, report_of):
    gradiend.config.feature_classes = [["F", "X"]]

    with pytest.raises(DataError, match="'F' and 'X'"):
        report_of()


def test_a_split_of_one_class_is_an_error_that_names_it(planted, report_of):
    with pytest.raises(DataError, match="both classes in the split 'odd'"):
        report_of({"odd": planted.data["test"].select(range(24))})


def test_an_encoder_that_reads_nothing_is_an_error(gradiend, report_of):
    with torch.no_grad():
        for name in gradiend.names:
            gradiend.encoder.weight.at(name).zero_()

    with pytest.raises(NumericalError, match="encodings that differ"):
        report_of()


def test_evaluating_leaves_the_base_model_as_it_was(planted, report_of):
    planted.model.train()
    before = {name: t.detach().clone() for name, t in planted.model.state_dict().items()}

    report_of(transfer=Dataset.from_list(TRANSFER))

    assert planted.model.training
    assert all(torch.equal(t, before[n]) for n, t in planted.model.state_dict().items())
