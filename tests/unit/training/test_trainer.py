import json
import math
import shutil
import signal
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from hf_gradiend.errors import (
    BaseModelError,
    ConfigError,
    DataError,
    NumericalError,
    OutputError,
    SelectionError,
)
from hf_gradiend.metrics import pearson_correlation
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.training.trainer import GradiendTrainer

SOLVERS = pytest.mark.parametrize("solver", ["closed_form", "adamw"])
BEST_IN_THE_MIDDLE = {
    "solver": "adamw", "max_steps": 24, "learning_rate": 0.05, "eval_steps": 2, "save_steps": 2,
}  # fmt: skip
LEARNING = {
    "closed_form": {"solver": "closed_form"},
    "adamw": {"solver": "adamw", "max_steps": 100},
}


@pytest.fixture
def trainer_of(arguments):
    """Function of a planted feature and training arguments that makes a trainer."""

    def trainer_of(
        planted, *, train=None, validation=None, evaluate=True, callbacks=(), **settings
    ):
        train = planted.data["train"] if train is None else train
        if validation is None and evaluate:
            validation = planted.data["validation"]
        return GradiendTrainer(
            planted.model,
            planted.tokenizer,
            arguments(**settings),
            train,
            validation,
            callbacks,
        )

    return trainer_of


def held_out_correlation(planted, gradiend, *, data=None, positive="F") -> float:
    data = planted.data["test"] if data is None else data
    h = gradiend.encode_texts(planted.model, planted.tokenizer, data, progress=False)
    signs = [1.0 if label == positive else -1.0 for label in data["factual_class"]]
    return pearson_correlation(h[:, 0], torch.tensor(signs))


def shuffled_labels(data: Dataset, seed: int) -> Dataset:
    """The same texts and words with classes that have nothing to do with them.

    Half of each class's texts change class, so that no class is the pronoun in disguise.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = list(data["factual_class"])
    for label in ("F", "M"):
        rows = [row for row, found in enumerate(data["factual_class"]) if found == label]
        for i in torch.randperm(len(rows), generator=generator)[: len(rows) // 2].tolist():
            labels[rows[i]] = "M" if label == "F" else "F"
    others = ["M" if label == "F" else "F" for label in labels]
    kept = {name: data[name][:] for name in ("text", "factual", "counterfactual")}
    return Dataset.from_dict({**kept, "factual_class": labels, "counterfactual_class": others})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one, other) -> None:
    one, other = (m if isinstance(m, dict) else weights(m) for m in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- what is learned ----


@SOLVERS
def test_a_planted_feature_is_found_on_names_never_trained_on(planted, trainer_of, solver):
    trainer = trainer_of(planted, **LEARNING[solver])

    trainer.train()

    assert planted.learned > 0.9  # the control: there is a feature to be found
    assert held_out_correlation(planted, trainer.model) > 0.9


def test_a_closed_form_with_sums_in_bfloat16_reads_nearly_the_same(planted_bert, trainer_of):
    read = {}
    for name, settings in {
        "float32": {},
        "on the base model's device": {"accumulator_device": "base_model"},
        "bfloat16": {"accumulator_dtype": "bfloat16"},
    }.items():
        trainer = trainer_of(planted_bert, **settings)
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        read[name] = trainer.model.encode_texts(
            planted_bert.model, planted_bert.tokenizer, planted_bert.data["test"], progress=False
        )[:, 0]

    assert torch.equal(read["on the base model's device"], read["float32"])
    gap = (read["bfloat16"] - read["float32"]).abs().max()
    assert 0 < gap < 0.05  # the control: it did sum in another type
    assert pearson_correlation(read["bfloat16"], read["float32"]) > 0.999


@pytest.mark.parametrize(
    "settings", [{}, {"solver": "adamw", "max_steps": 4, "prune_fraction": 0.1}], ids=str
)
def test_training_that_checkpoints_layers_learns_the_same(planted, trainer_of, settings):
    # transformers 5.23 has a new name and warns of the old one.
    new_name = any(f.name == "activation_checkpointing" for f in fields(TrainingArguments))
    name = "activation_checkpointing" if new_name else "gradient_checkpointing"
    computed, learned = [], []
    inside = next(m for m in planted.model.modules() if "Attention" in type(m).__name__)
    inside.register_forward_hook(lambda *_: computed.append(1))
    for wanted in (False, True):
        trainer = trainer_of(planted, evaluate=False, **settings, **{name: wanted})
        computed.clear()
        trainer.train()
        learned.append((len(computed), weights(trainer.model)))

    (n_plain, plain), (n_checkpointed, found) = learned
    assert n_checkpointed > n_plain  # the control: layers were computed again
    assert found.keys() == plain.keys()
    for tensor_name, tensor in plain.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(found[tensor_name], tensor, rtol=1e-5, atol=1e-5 * largest)


@SOLVERS
def test_shuffled_labels_teach_nothing(planted_bert, trainer_of, solver):
    correlations = []
    for seed in range({"closed_form": 12, "adamw": 4}[solver]):
        train = shuffled_labels(planted_bert.data["train"], seed)
        test = shuffled_labels(planted_bert.data["test"], seed + 100)
        trainer = trainer_of(
            planted_bert, train=train, evaluate=False, solver=solver, seed=seed,
            save_strategy="no", load_best_model_at_end=False, eval_strategy="no",
        )  # fmt: skip
        try:
            trainer.train()
        except NumericalError:  # by chance the classes come out in the wrong order
            continue
        correlations.append(held_out_correlation(planted_bert, trainer.model, data=test))

    # 48 texts have a standard error of 0.14; the mean of three or more of 0.08.
    assert len(correlations) >= 3
    assert abs(sum(correlations) / len(correlations)) < 0.35


@SOLVERS
@pytest.mark.parametrize("classes", [["F", "M"], ["M", "F"]])
def test_the_class_named_first_encodes_to_plus_one(planted_bert, trainer_of, solver, classes):
    trainer = trainer_of(planted_bert, feature_classes=classes, **LEARNING[solver])

    trainer.train()

    assert trainer.model.config.feature_classes == [classes]
    assert held_out_correlation(planted_bert, trainer.model, positive=classes[0]) > 0.9


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_seed_that_comes_out_reversed_is_turned_round(planted_gpt2, trainer_of, evaluate):
    def run(seed):
        trainer = trainer_of(planted_gpt2, evaluate=evaluate, seed=seed, **LEARNING["adamw"])
        result = trainer.train()
        signs = [log["signed_encoding"] for log in result.history if "signed_encoding" in log]
        return sum(signs) / len(signs), held_out_correlation(planted_gpt2, trainer.model)

    in_training, after = zip(*(run(seed) for seed in (2, 3)), strict=True)

    assert min(in_training) < 0 < max(in_training)  # the control: one of them is reversed
    assert min(after) > 0.9


@SOLVERS
def test_the_base_model_is_left_bit_for_bit(planted, trainer_of, solver):
    planted.model.train()
    modes = [module.training for module in planted.model.modules()]
    next(planted.model.parameters()).requires_grad_(False)
    wanted = [p.requires_grad for p in planted.model.parameters()]
    before = weights(planted.model)

    trainer_of(planted, solver=solver, prune_fraction=0.5).train()

    assert_same_bits(planted.model, before)
    assert [module.training for module in planted.model.modules()] == modes
    assert [p.requires_grad for p in planted.model.parameters()] == wanted
    assert all(p.grad is None for p in planted.model.parameters())


@pytest.mark.parametrize("option", ["prune_fraction", "top_k"])
def test_a_tenth_of_the_weights_is_enough(planted_gpt2, trainer_of, option):
    trainer = trainer_of(planted_gpt2, **{option: 0.1})

    result = trainer.train()

    dense = sum(entry.n_selected for entry in trainer_of(planted_gpt2).selection)
    assert result.n_selected == trainer.model.config.n_selected == round(0.1 * dense)
    assert held_out_correlation(planted_gpt2, trainer.model) > 0.9


def test_training_twice_gives_the_same_bits(planted_bert, trainer_of):
    trainer = trainer_of(planted_bert, prune_fraction=0.1)

    trainer.train()
    first = weights(trainer.model)
    trainer.train()

    assert_same_bits(trainer.model, first)


def test_adamw_goes_on_from_the_closed_form(planted_bert, trainer_of):
    settings = {"solver": "adamw", "learning_rate": 1e-6, "max_steps": 1}
    cold, warm = (trainer_of(planted_bert, warm_start=warm, **settings) for warm in (False, True))

    cold.train()
    warm.train()

    assert held_out_correlation(planted_bert, warm.model) > 0.9
    bias = max(float(t.detach().abs().max()) for t in cold.model.decoder.bias.parameters())
    assert bias < 1e-5  # the control: a cold start has no decoder after one step of 1e-6


# ---- several seeds ----


def test_the_first_of_several_seeds_equals_the_run_with_that_seed_alone(planted_bert, trainer_of):
    together = trainer_of(planted_bert, solver="adamw", n_seeds=3, max_steps=10).train()
    alone = trainer_of(planted_bert, solver="adamw", max_steps=10).train()

    losses = {
        key: [log[key] for log in together.history if key in log]
        for key in ("loss_seed_42", "loss_seed_43", "loss_seed_44")
    }
    assert losses["loss_seed_42"] == [log["loss"] for log in alone.history if "loss" in log]
    assert losses["loss_seed_43"] != losses["loss_seed_42"]  # the control
    assert [entry["seed"] for entry in together.convergence] == [42, 43, 44]


def test_the_best_of_several_seeds_by_validation_is_kept(planted_bert, trainer_of):
    trainer = trainer_of(planted_bert, solver="adamw", n_seeds=3, max_steps=2, learning_rate=1e-6)

    result = trainer.train()

    correlations = [entry["correlation"] for entry in result.convergence]
    kept = trainer._correlation(trainer.model)
    assert kept == pytest.approx(max(correlations), abs=1e-6)
    assert min(correlations) < max(correlations) - 1e-3  # the control: they differ


# ---- which model is kept (trap 6) ----


class Recorder(TrainerCallback):
    """Remembers the events, and the correlation at each evaluation."""

    def __init__(self):
        self.events: list[str] = []
        self.evaluated: dict[int, float] = {}

    def on_train_begin(self, *_, **__):
        self.events.append("train_begin")

    def on_step_begin(self, *_, **__):
        self.events.append("step_begin")

    def on_step_end(self, *_, **__):
        self.events.append("step_end")

    def on_log(self, *_, logs, **__):
        self.events.append("log")
        assert all(math.isfinite(value) for value in logs.values())

    def on_evaluate(self, _, state, *__, metrics, **___):
        self.events.append("evaluate")
        self.evaluated[state.global_step] = metrics["eval_correlation"]

    def on_save(self, *_, **__):
        self.events.append("save")

    def on_train_end(self, *_, **__):
        self.events.append("train_end")


class Stop(TrainerCallback):
    """Stops at a step: in good order, or as Ctrl-C does."""

    def __init__(self, step: int, *, interrupt: bool = True):
        self.step, self.interrupt = step, interrupt

    def on_step_end(self, _, state, control, **__):
        if state.global_step == self.step:
            if self.interrupt:
                raise KeyboardInterrupt
            control.should_training_stop = True
        return control


def loaded(folder) -> GradiendModel:
    return GradiendModel.from_pretrained(folder)


def test_the_best_of_the_saved_checkpoints_is_kept(planted_bert, trainer_of, tmp_path):
    # A huge step size ruins a good start: the first evaluation is the best.
    recorder = Recorder()
    settings = {"solver": "adamw", "warm_start": True, "learning_rate": 0.5, "eval_steps": 1,
                "save_steps": 1, "max_eval_texts": None, "weight_decay": 0.0}  # fmt: skip
    trainer = trainer_of(planted_bert, callbacks=[recorder], max_steps=12, **settings)

    result = trainer.train()

    evaluated = recorder.evaluated
    best_step = max(evaluated, key=lambda step: (evaluated[step], -step))
    assert sorted(evaluated) == list(range(1, 13))
    assert result.best_step == best_step
    assert best_step < 12  # the control: the last one is another
    assert evaluated[best_step] > evaluated[12]
    assert abs(trainer._correlation(trainer.model)) == pytest.approx(evaluated[best_step], abs=1e-6)
    assert_same_bits(loaded(tmp_path / "run"), trainer.model)
    # The same run stopped there ends with the same weights.
    other = trainer_of(
        planted_bert, callbacks=[Stop(best_step, interrupt=False)], max_steps=12,
        output_dir=str(tmp_path / "other"), **settings,
    )  # fmt: skip
    other.train()
    assert_same_bits(other.model, trainer.model)


def test_a_good_start_does_not_keep_later_models_from_being_saved(
    planted_bert, trainer_of, tmp_path
):
    trainer = trainer_of(
        planted_bert, solver="adamw", warm_start=True, max_steps=4, eval_steps=2, save_steps=2
    )

    result = trainer.train()

    assert result.best_step in (2, 4)
    assert (tmp_path / "run" / "checkpoint-4" / "solver.safetensors").is_file()
    assert_same_bits(loaded(tmp_path / "run"), trainer.model)


@pytest.mark.parametrize("how", ["no data", "load_best_model_at_end", "too few steps"])
def test_without_a_best_checkpoint_the_last_model_is_kept(planted_bert, trainer_of, tmp_path, how):
    settings = {"solver": "adamw", "max_steps": 6, "eval_steps": 2, "save_steps": 2}
    if how == "load_best_model_at_end":
        settings["load_best_model_at_end"] = False
    if how == "too few steps":
        settings["eval_delay"] = 100
    trainer = trainer_of(planted_bert, evaluate=how != "no data", **settings)

    result = trainer.train()

    short = trainer_of(planted_bert, evaluate=False, solver="adamw", max_steps=4,
                       output_dir=str(tmp_path / "short"))  # fmt: skip
    long = trainer_of(planted_bert, evaluate=False, solver="adamw", max_steps=6,
                      output_dir=str(tmp_path / "long"))  # fmt: skip
    short.train()
    long.train()
    assert result.best_step is None
    assert_same_bits(trainer.model, long.model)
    assert_same_bits(loaded(tmp_path / "run"), trainer.model)
    first = trainer.model.names[0]
    assert not torch.equal(
        short.model.decoder.bias.at(first), trainer.model.decoder.bias.at(first)
    )  # the control: another step is another model


@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_go_but_the_best_and_the_last_stay(
    planted_bert, trainer_of, tmp_path, limit
):
    trainer = trainer_of(
        planted_bert, solver="adamw", warm_start=True, learning_rate=0.5, weight_decay=0.0,
        max_steps=8, eval_steps=1, save_steps=1, save_total_limit=limit, max_eval_texts=None,
    )  # fmt: skip

    best_step = trainer.train().best_step

    assert best_step < 6  # the control: it would have been removed by age
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    newest = {f"checkpoint-{step}" for step in range(9 - limit, 9)}
    assert kept == newest | {f"checkpoint-{best_step}"}


def test_checkpoints_of_an_earlier_run_do_not_displace_those_of_this_one(
    planted_bert, trainer_of, tmp_path
):
    settings = {"solver": "adamw", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
    trainer_of(planted_bert, evaluate=False, max_steps=8, **settings).train()
    assert (tmp_path / "run" / "checkpoint-8").is_dir()

    interrupted = trainer_of(
        planted_bert, evaluate=False, max_steps=8, callbacks=[Stop(5)], **settings
    )
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    recorder = Recorder()
    trainer_of(planted_bert, evaluate=False, max_steps=8, callbacks=[recorder], **settings).train(
        resume_from_checkpoint=True
    )

    # Steps 6 to 8 were done by the last call, after 1 to 5 of the call before it.
    assert (tmp_path / "run" / "checkpoint-8").is_dir()
    assert recorder.events.count("step_begin") == 3


def test_a_share_of_all_steps_is_a_number_of_steps(planted_bert, trainer_of):
    recorder = Recorder()
    trainer = trainer_of(planted_bert, callbacks=[recorder], solver="adamw", max_steps=10,
                         eval_steps=0.3, save_steps=0.3, logging_steps=0.5)  # fmt: skip

    result = trainer.train()

    assert sorted(recorder.evaluated) == [3, 6, 9, 10]
    assert [log["step"] for log in result.history if "loss" in log] == [5, 10]


def test_several_seeds_without_texts_to_choose_one_on_are_an_error(planted_bert, trainer_of):
    settings = {"solver": "adamw", "n_seeds": 2}
    trainer_of(planted_bert, **settings)  # the control

    with pytest.raises(ConfigError, match="choose the best of 2 seeds"):
        trainer_of(planted_bert, evaluate=False, **settings)


@pytest.mark.parametrize("max_length", [None, 24])
def test_neutral_texts_are_no_longer_than_the_others(planted_bert, arguments, max_length):
    planted_bert.tokenizer.model_max_length = 10**30  # as of a model that does not say its limit
    long = [
        " ".join(["the nurse said that she was late because"] * 20) + " .",
        "he was tired . " * 40,
    ]
    args = arguments(max_length=max_length)

    trainer = GradiendTrainer(
        planted_bert.model, planted_bert.tokenizer, args, planted_bert.data["train"],
        neutral_texts=long,
    )  # fmt: skip

    lengths = [text.length for text in trainer.neutral_texts]
    assert len(lengths) == 2
    if max_length is None:
        assert min(lengths) > 64  # the control: more than the model can read
    else:
        assert max(lengths) <= max_length
        trainer.train()


# ---- interruption and resuming ----


@SOLVERS
@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    planted_bert, trainer_of, tmp_path, solver, step
):
    settings = {"solver": solver, "prune_fraction": 0.5}
    if solver == "adamw":
        settings |= {"max_steps": 8, "eval_steps": 2, "save_steps": 2}
    whole = trainer_of(planted_bert, output_dir=str(tmp_path / "whole"), **settings)
    result = whole.train()

    with pytest.raises(KeyboardInterrupt):
        trainer_of(planted_bert, callbacks=[Stop(step)], **settings).train()
    recorder = Recorder()
    again = trainer_of(planted_bert, callbacks=[recorder], **settings)
    resumed = again.train(resume_from_checkpoint=True)

    assert_same_bits(again.model, whole.model)
    assert resumed.global_step == result.global_step > step
    assert resumed.best_step == result.best_step
    assert resumed.history == result.history
    # The control: it went on, and did not begin again.
    assert recorder.events.count("step_begin") == result.global_step - step


def test_a_resumed_run_that_keeps_the_last_model_knows_its_best_metric(
    planted_bert, trainer_of, tmp_path
):
    settings = {**BEST_IN_THE_MIDDLE, "load_best_model_at_end": False}
    whole = trainer_of(planted_bert, output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    best_step = whole.state.best_global_step
    assert 2 < best_step < 20  # the control: it lies before the interruption, and is not the last
    settings["output_dir"] = str(tmp_path / "stopped")

    with pytest.raises(KeyboardInterrupt):
        trainer_of(planted_bert, callbacks=[Stop(best_step + 3)], **settings).train()
    again = trainer_of(planted_bert, **settings)
    again.train(resume_from_checkpoint=True)

    assert again.state.best_metric == whole.state.best_metric
    assert again.state.best_global_step == best_step


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate", "on_save"])
def test_a_step_that_was_interrupted_before_its_evaluation_is_evaluated_on_resuming(
    planted_bert, trainer_of, tmp_path, event
):
    settings = {**BEST_IN_THE_MIDDLE, "save_total_limit": 1}
    whole = trainer_of(planted_bert, output_dir=str(tmp_path / "whole"), **settings)
    result = whole.train()
    best_step = result.best_step
    assert 2 < best_step < 20  # the control: neither the first nor the last is the best

    class StopAt(TrainerCallback):
        def stop(self, _, state, *__, **___):
            if state.global_step == best_step:
                raise KeyboardInterrupt

    setattr(StopAt, event, StopAt.stop)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(planted_bert, callbacks=[StopAt()], **settings).train()
    recorder = Recorder()
    again = trainer_of(planted_bert, callbacks=[recorder], **settings)
    resumed = again.train(resume_from_checkpoint=True)

    assert recorder.events.count("step_begin") == result.global_step - best_step  # the control
    assert (best_step in recorder.evaluated) == (event != "on_save")
    assert resumed.history == result.history
    assert resumed.best_step == best_step
    assert_same_bits(again.model, whole.model)


@SOLVERS
def test_ctrl_c_in_the_middle_of_a_step_does_not_cut_it_in_half(
    planted_bert, trainer_of, tmp_path, solver
):
    settings = {"solver": solver, **({"max_steps": 6} if solver == "adamw" else {})}
    whole = trainer_of(planted_bert, output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    trainer = trainer_of(planted_bert, **settings)
    calls = []

    def ctrl_c(_gradient):
        calls.append(1)
        if len(calls) == 5:  # in the backward passes of the third step
            signal.raise_signal(signal.SIGINT)

    name = trainer.selection.names[0]
    parameter = dict(planted_bert.model.named_parameters())[name]
    handle = parameter.register_hook(ctrl_c)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()

    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer.state.global_step == 3
    again = trainer_of(planted_bert, **settings)
    again.train(resume_from_checkpoint=True)
    assert_same_bits(again.model, whole.model)
    assert len(calls) < 8  # the control: the run was stopped


def test_a_step_that_was_cut_in_half_all_the_same_is_not_saved(planted_bert, trainer_of, tmp_path):
    trainer = trainer_of(planted_bert)
    name = trainer.selection.names[0]
    calls = []

    def twice(_gradient):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    parameter = dict(planted_bert.model.named_parameters())[name]
    handle = parameter.register_hook(twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()

    assert trainer.state.global_step == 2  # the control: there was something to save
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_same_trainer_can_go_on_itself(planted_bert, trainer_of, tmp_path):
    whole = trainer_of(planted_bert, prune_fraction=0.5, output_dir=str(tmp_path / "whole"))
    whole.train()
    stop = Stop(2)
    trainer = trainer_of(planted_bert, prune_fraction=0.5, callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()

    stop.step = -1
    trainer.train(resume_from_checkpoint=True)

    assert_same_bits(trainer.model, whole.model)


def test_a_finished_run_can_be_made_longer(planted_bert, trainer_of, tmp_path):
    settings = {"solver": "adamw", "evaluate": False, "save_steps": 2, "eval_steps": 2}
    whole = trainer_of(planted_bert, max_steps=8, output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    trainer_of(planted_bert, max_steps=4, **settings).train()

    longer = trainer_of(planted_bert, max_steps=8, **settings)
    result = longer.train(resume_from_checkpoint=True)

    assert result.global_step == 8
    assert_same_bits(longer.model, whole.model)


def test_a_finished_run_is_finished_and_not_made_shorter(planted_bert, trainer_of):
    settings = {"solver": "adamw", "save_steps": 2, "eval_steps": 2}
    finished = trainer_of(planted_bert, max_steps=4, **settings)
    result = finished.train()
    recorder = Recorder()

    again = trainer_of(planted_bert, max_steps=4, callbacks=[recorder], **settings)
    resumed = again.train(resume_from_checkpoint=True)

    assert "step_begin" not in recorder.events
    assert (resumed.global_step, resumed.best_step) == (4, result.best_step)
    assert resumed.history == result.history
    assert_same_bits(again.model, finished.model)
    with pytest.raises(ConfigError, match="at step 4, and this run has 3 in all") as caught:
        trainer_of(planted_bert, max_steps=3, **settings).train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-4},
        {"seed": 1},
        {"source": "diff"},
        {"n_seeds": 2},
        {"per_device_train_batch_size": 8},
        {"feature_classes": ["M", "F"]},
        {"parameters": ["backbone"]},
        {"prune_fraction": 0.5},
        {"max_train_texts": 40},
        {"max_length": 8},
        {"train": "validation"},
        {"base": "one bit"},
        {"solver": "closed_form"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_resuming_with_other_arguments_or_data_is_refused_in_one_line(
    planted_bert, trainer_of, change
):
    settings = {"solver": "adamw", "max_steps": 4, "learning_rate": 1e-3}
    trainer_of(planted_bert, **settings, save_steps=25).train()
    if change.get("solver") == "closed_form":
        settings = {}
    changed = {**settings, **change}
    if "train" in change:  # as many other texts
        rows = planted_bert.data["train"].to_list()
        rows[3] = {**rows[3], "text": rows[3]["text"].replace("late", "tired")}
        changed["train"] = Dataset.from_list(rows)

    if changed.pop("base", None):
        weight = next(planted_bert.model.parameters())
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))

    with pytest.raises(ConfigError, match="made with other arguments, data or weights") as caught:
        trainer_of(planted_bert, **changed).train(resume_from_checkpoint=True)

    assert "\n" not in str(caught.value)


@pytest.fixture
def stopped_after_its_best(planted_bert, trainer_of, tmp_path, monkeypatch):
    """Settings of a run with its best step in the middle, that step, and the step it stopped at."""
    settings = {**BEST_IN_THE_MIDDLE}
    best = trainer_of(planted_bert, output_dir=str(tmp_path / "whole"), **settings).train()
    assert 2 < best.best_step < 20  # the control: neither the first nor the last is the best
    monkeypatch.chdir(tmp_path)
    trainer = trainer_of(
        planted_bert, output_dir="run", callbacks=[Stop(best.best_step + 3)], **settings
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return settings, best.best_step, best.best_step + 3


def test_neutral_texts_that_adamw_does_not_read_do_not_decide_whether_it_resumes(
    planted_bert, arguments
):
    parts = planted_bert.model, planted_bert.tokenizer
    args = arguments(solver="adamw", max_steps=4, eval_steps=2, save_steps=2)
    data = planted_bert.data["train"], planted_bert.data["validation"]
    with pytest.raises(KeyboardInterrupt):
        GradiendTrainer(*parts, args, *data, [Stop(3)]).train()
    texts = ["the doctor took the red coat home .", "the day was long because the rain began ."]

    again = GradiendTrainer(*parts, args, *data, neutral_texts=texts)

    assert again.train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize("place", ["run", "moved"])
def test_the_best_checkpoint_is_found_under_another_path(
    planted_bert, trainer_of, tmp_path, stopped_after_its_best, place
):
    settings, best_step, _ = stopped_after_its_best
    (tmp_path / "run").rename(tmp_path / place)
    again = trainer_of(planted_bert, output_dir=str(tmp_path / place), **settings)

    result = again.train(resume_from_checkpoint=True)

    assert result.best_step == best_step
    assert_same_bits(again.model, GradiendModel.from_pretrained(tmp_path / "whole"))


def test_resuming_without_the_best_keeps_the_last(
    planted_bert, trainer_of, tmp_path, stopped_after_its_best
):
    settings, *_ = stopped_after_its_best
    settings["load_best_model_at_end"] = False
    last = trainer_of(planted_bert, output_dir=str(tmp_path / "last"), **settings)
    last.train()
    again = trainer_of(planted_bert, output_dir="run", **settings)

    result = again.train(resume_from_checkpoint=True)

    assert result.best_step is None
    assert_same_bits(again.model, last.model)


def test_where_the_best_checkpoint_is_gone_the_best_later_one_is_kept(
    planted_bert, trainer_of, tmp_path, stopped_after_its_best, caplog
):
    settings, best_step, stopped_at = stopped_after_its_best
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{best_step}")
    again = trainer_of(planted_bert, output_dir="run", **settings)

    result = again.train(resume_from_checkpoint=True)

    assert result.best_step == stopped_at + 1
    assert f"checkpoint-{best_step}, is gone" in caplog.text


@pytest.mark.parametrize("change", ["rows", "number", "none", "steps"])
def test_the_best_on_other_evaluation_texts_takes_no_part_in_the_choice(
    planted_bert, trainer_of, tmp_path, stopped_after_its_best, caplog, change
):
    settings, best_step, stopped_at = stopped_after_its_best
    state = json.loads(
        (tmp_path / "run" / f"checkpoint-{stopped_at}" / "trainer_state.json").read_text("utf-8")
    )
    assert state["best_global_step"] == best_step  # the control: there is one to be dropped
    changed = {
        "rows": {"validation": shuffled_labels(planted_bert.data["validation"], seed=0)},
        "number": {"max_eval_texts": 32},
        "none": {"evaluate": False},
        "steps": {"eval_steps": 4, "save_steps": 4},  # as many texts, read less often
    }[change]
    again = trainer_of(planted_bert, output_dir="run", **{**settings, **changed})

    result = again.train(resume_from_checkpoint=True)

    assert result.global_step == settings["max_steps"]
    if change == "steps":
        assert result.best_step == best_step
        assert "other evaluation texts" not in caplog.text
        return
    assert f"checkpoint-{best_step}, was chosen on other evaluation texts" in caplog.text
    if change == "none":
        assert result.best_step is None
    else:
        later = {log["step"]: log["eval_correlation"] for log in result.history
                 if "eval_correlation" in log and log["step"] > stopped_at}  # fmt: skip
        assert result.best_step == max(later, key=lambda step: (later[step], -step))


def test_a_best_checkpoint_of_another_run_is_refused(
    planted_bert, trainer_of, tmp_path, stopped_after_its_best
):
    settings, best_step, stopped_at = stopped_after_its_best
    own = tmp_path / "run" / f"checkpoint-{stopped_at}"
    own.rename(tmp_path / "kept")
    other = {**settings, "learning_rate": 0.01, "max_steps": best_step}
    trainer_of(planted_bert, output_dir="run", **other).train()
    (tmp_path / "kept").rename(own)
    again = trainer_of(planted_bert, output_dir="run", **settings)

    with pytest.raises(ConfigError, match="made with other arguments"):
        again.train(resume_from_checkpoint=str(own))


def test_resuming_without_a_checkpoint_is_an_error(planted_bert, trainer_of, tmp_path):
    with pytest.raises(ConfigError, match="none at"):
        trainer_of(planted_bert).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="elsewhere"):
        trainer_of(planted_bert).train(resume_from_checkpoint=str(tmp_path / "elsewhere"))


def test_a_named_checkpoint_is_resumed(planted_bert, trainer_of, tmp_path):
    settings = {"solver": "adamw", "max_steps": 6, "eval_steps": 2, "save_steps": 2,
                "save_total_limit": None, "evaluate": False}  # fmt: skip
    whole = trainer_of(planted_bert, **settings)
    whole.train()
    bits = weights(whole.model)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "elsewhere")

    again = trainer_of(planted_bert, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))

    assert_same_bits(again.model, bits)


# ---- callbacks, history, files, errors ----


def test_callbacks_are_called_in_order(planted_bert, trainer_of):
    recorder = Recorder()
    trainer_of(planted_bert, callbacks=[recorder], solver="adamw", max_steps=4, eval_steps=2,
               save_steps=2).train()  # fmt: skip

    step, evaluation = ["step_begin", "step_end", "log"], ["log", "evaluate", "save"]
    assert recorder.events == [
        "train_begin", *step, *step, *evaluation, *step, *step, *evaluation, "train_end"
    ]  # fmt: skip


def test_a_callback_can_stop_the_run(planted_bert, trainer_of):
    result = trainer_of(
        planted_bert, callbacks=[Stop(3, interrupt=False)], solver="adamw", max_steps=9
    ).train()

    assert result.global_step == 3


@SOLVERS
def test_the_history_holds_finite_numbers_for_every_step(planted, trainer_of, solver, tmp_path):
    result = trainer_of(planted, solver=solver).train()

    steps = [log["step"] for log in result.history if not any("eval" in key for key in log)]
    assert steps == list(range(1, result.global_step + 1))
    assert all(math.isfinite(value) for log in result.history for value in log.values())
    text = (tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8")
    assert json.loads(text)["log_history"] == result.history


def test_the_loss_falls(planted_bert, trainer_of):
    history = trainer_of(planted_bert, solver="adamw", max_steps=100).train().history

    losses = [log["loss"] for log in history if "loss" in log]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@SOLVERS
def test_the_saved_model_is_the_trainers_model(planted, trainer_of, tmp_path, solver):
    trainer = trainer_of(planted, solver=solver)
    trainer.train()

    model = loaded(tmp_path / "run")

    assert_same_bits(model, trainer.model)
    config = model.config
    assert config.feature_classes == [["F", "M"]]
    assert config.feature_words == {"F": ["she"], "M": ["he"]}
    assert config.base_model_class == type(planted.model).__name__
    assert config.objective == ("masked" if planted.tokenizer.mask_token else "causal")
    assert config.selection_fingerprint == trainer.selection.fingerprint


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(
    planted_bert, trainer_of, tmp_path
):
    (tmp_path / "file").write_text("", encoding="utf-8")
    trainer = trainer_of(planted_bert, output_dir=str(tmp_path / "file" / "run"))
    passes = []
    handle = planted_bert.model.register_forward_hook(lambda *_: passes.append(1))

    with pytest.raises(OutputError, match="cannot be written"):
        trainer.train()
    handle.remove()

    assert not passes


def test_before_training_there_is_no_model(planted_bert, trainer_of):
    with pytest.raises(ConfigError, match=r"train\(\) has not been called"):
        trainer_of(planted_bert).model  # noqa: B018 - the property raises


def test_bad_input_is_an_error_when_the_trainer_is_made(planted_bert, trainer_of):
    data = planted_bert.data["train"]
    one_class = data.filter(lambda row: row["factual_class"] == "F", load_from_cache_file=False)
    no_slot = Dataset.from_list([{**data[0], "text": "no slot"}, data[90]])

    with pytest.raises(ConfigError, match=r"feature_classes.*\['F', 'M'\]"):
        trainer_of(planted_bert, feature_classes=["F", "X"])
    with pytest.raises(SelectionError, match="matches none"):
        trainer_of(planted_bert, parameters=["*.nothing.*"])
    with pytest.raises(DataError, match="no slot"):
        trainer_of(planted_bert, train=no_slot)
    with pytest.raises(DataError, match="columns"):
        trainer_of(planted_bert, train=data.remove_columns("factual"))
    with pytest.raises(DataError, match="'F' and 'M'"):
        trainer_of(planted_bert, validation=one_class)
    with torch.no_grad():
        next(planted_bert.model.parameters())[0] = torch.nan
    with pytest.raises(BaseModelError, match="NaN"):
        trainer_of(planted_bert)


def test_one_class_of_training_texts_is_a_data_error(planted_bert, trainer_of):
    data = planted_bert.data["train"]
    one_class = data.filter(lambda row: row["factual_class"] == "F", load_from_cache_file=False)

    with pytest.raises(DataError, match="'F'"):
        trainer_of(planted_bert, train=one_class)


@pytest.mark.parametrize("column", ["factual_class", "counterfactual_class"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_three_classes_are_a_data_error_that_says_how_to_choose_two(
    planted_bert, trainer_of, column, split
):
    rows = planted_bert.data[split].to_list()
    other = Dataset.from_list([{**rows[0], column: "N"}, *rows[1:]])

    with pytest.raises(DataError) as caught:
        trainer_of(planted_bert, **{split: other})

    assert str(caught.value) == (
        "Expected texts of two classes, but got ['F', 'M', 'N']. Choose two, for instance with "
        "load_feature_dataset(…, classes=('F', 'M'))."
    )


def test_a_learning_rate_that_explodes_is_a_numerical_error(planted_bert, trainer_of):
    trainer = trainer_of(planted_bert, solver="adamw", learning_rate=1e30, max_steps=5)

    with pytest.raises(NumericalError, match="Lower learning_rate"):
        trainer.train()


@SOLVERS
def test_weights_that_no_prediction_depends_on_are_an_error(planted_bert, trainer_of, solver):
    planted_bert.model.unused = torch.nn.Linear(2, 2)

    with pytest.raises(SelectionError, match="BertForMaskedLM does not use any of them"):
        trainer_of(planted_bert, solver=solver, parameters=["unused.*"]).train()


def test_a_gradiend_that_reads_the_same_everywhere_has_no_correlation(planted_bert, trainer_of):
    trainer = trainer_of(planted_bert)
    trainer.train()
    with torch.no_grad():
        for name in trainer.model.names:
            trainer.model.encoder.weight.at(name).zero_()
        trainer.model.encoder.bias.fill_(0.1)

    assert trainer._correlation(trainer.model) == 0.0
