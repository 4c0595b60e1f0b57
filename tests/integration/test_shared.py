"""The path from data to an edited model on a real, tiny masked model and sentences of books."""

import pytest
import torch
from datasets import Dataset

from hf_gradiend.errors import NumericalError
from hf_gradiend.evaluation.report import choose_gender_edit, read_encoder
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.trainer import GradiendTrainer

SOLVERS = {
    "closed_form": {"solver": "closed_form", "max_train_texts": 1200},
    "adamw": {"solver": "adamw", "max_steps": 100},
}
EMBEDDINGS = "*embeddings.word_embeddings.weight"


@pytest.fixture
def train(shared, tmp_path):
    model, tokenizer, data = shared

    def train(*, train=None, validation=True, **settings):
        arguments = GradiendTrainingArguments(
            output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **settings
        )
        trainer = GradiendTrainer(
            model, tokenizer, arguments, data["train"] if train is None else train,
            data["validation"] if validation else None,
        )  # fmt: skip
        trainer.train()
        return trainer.model

    return train


@pytest.fixture
def read(shared):
    model, tokenizer, data = shared

    def read(gradiend, test=None):
        splits = {"test": data["test"] if test is None else test}
        return read_encoder(gradiend, model, tokenizer, splits, progress=False)

    return read


def shuffled_labels(data: Dataset, seed: int) -> Dataset:
    """The same texts and words; half of each class's texts change class."""
    generator = torch.Generator().manual_seed(seed)
    labels = list(data["factual_class"])
    for label, other in (("F", "M"), ("M", "F")):
        rows = [row for row, found in enumerate(data["factual_class"]) if found == label]
        for i in torch.randperm(len(rows), generator=generator)[: len(rows) // 2].tolist():
            labels[rows[i]] = other
    kept = {name: data[name][:] for name in ("text", "factual", "counterfactual")}
    others = ["M" if label == "F" else "F" for label in labels]
    return Dataset.from_dict({**kept, "factual_class": labels, "counterfactual_class": others})


def test_the_closed_form_reads_gender_from_a_few_texts(train, read):
    split = read(train(max_train_texts=200)).splits["test"]

    assert split.correlation.value >= 0.95
    assert split.accuracy.value >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_both_solvers_read_gender_on_names_and_books_never_trained_on(train, read, solver):
    report = read(train(**SOLVERS[solver]))

    assert report.splits["test"].correlation.value >= 0.95
    assert report.splits["test"].accuracy.value >= 0.95
    assert report.splits["test"].correlation.n == 310
    # Beyond the two pronouns: words never trained on, and ordinary words nearer to 0.
    assert report.transfer_in_order.value >= 0.8
    assert report.neutral.value < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_shuffled_labels_teach_nothing(shared, train, read, solver):
    # The control of the test above.
    _, _, data = shared
    settings = {
        "closed_form": {"max_train_texts": 120},
        "adamw": {**SOLVERS["adamw"], "max_steps": 20},
    }
    for seed in range(12):
        try:
            texts = shuffled_labels(data["train"], seed)
            gradiend = train(train=texts, validation=False, seed=seed, **settings[solver])
        except NumericalError:  # the classes came out in the wrong order: one time in two
            continue
        split = read(gradiend, shuffled_labels(data["test"], 100 + seed)).splits["test"]
        # 310 texts: a standard error of 0.057.
        assert abs(split.correlation.value) <= 0.2
        return
    pytest.fail("no shuffling gave a GRADIEND")


@pytest.mark.slow
def test_embeddings_alone_are_a_detector_of_the_trained_words(train, read):
    # Trap 11. Both read the trained words equally well; words never trained on tell them apart.
    layers, embeddings = (
        read(train(max_train_texts=400, parameters=[name])) for name in ("layers", EMBEDDINGS)
    )

    for report in (layers, embeddings):
        assert report.splits["test"].correlation.value >= 0.95
    # Measured: gaps of 0.75 and 0.13. On this model the order of the pairs is right for both
    # (25 of 26); on SmolLM2 it is chance for the embeddings (DESIGN.md, section 1).
    assert layers.transfer_gap.value > 3 * embeddings.transfer_gap.value
    assert layers.transfer_gap.low > embeddings.transfer_gap.high


@pytest.mark.slow
def test_the_chosen_edit_balances_occupations_it_was_not_chosen_on(shared, train):
    model, tokenizer, _ = shared
    before = {name: t.clone() for name, t in model.state_dict().items()}

    gradiend = train(max_train_texts=400)
    judged = choose_gender_edit(gradiend, model, tokenizer, with_sweep=False, progress=False)

    assert judged is not None
    assert judged.choice.after.imbalance < judged.choice.before.imbalance
    assert judged.after.imbalance < judged.before.imbalance
    assert judged.after.lm_score >= 0.97 * judged.before.lm_score
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
