import re
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_gradiend.errors import ConfigError
from hf_gradiend.training.arguments import GradiendTrainingArguments, settings_of


@pytest.mark.parametrize("settings", [{"sover": "adamw"}, {"lr": 1e-5}, {"n_seed": 2}])
def test_an_unknown_argument_is_an_error(settings):
    with pytest.raises(TypeError, match=next(iter(settings))):
        GradiendTrainingArguments(**settings)


# Trap 8: what transformers' own trainer knows and this one does not act upon.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("fp16", True),
        ("bf16", True),
        ("gradient_accumulation_steps", 4),
        ("warmup_steps", 10),
        ("max_grad_norm", 0.5),
        ("optim", "sgd"),
        ("dataloader_num_workers", 2),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}),
        ("push_to_hub", True),
        ("log_level", "debug"),
        ("data_seed", 3),
        ("neftune_noise_alpha", 1.0),
        ("auto_find_batch_size", True),
        ("group_by_length", True),
        ("eval_on_start", True),
    ],
)
def test_an_argument_that_would_be_ignored_is_an_error_that_names_it(name, value):
    if name not in {field.name for field in fields(TrainingArguments)}:
        pytest.skip(f"this version of transformers has no {name}")
    with pytest.raises(ConfigError, match=rf"no {name} \(.*but got {re.escape(repr(value))}"):
        GradiendTrainingArguments(**{name: value})


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_steps": 10}, "max_steps"),
        ({"num_train_epochs": 1}, "num_train_epochs"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"weight_decay": 0.0}, "weight_decay"),
        ({"adam_beta1": 0.5}, "adam_beta1"),
        ({"n_seeds": 2}, "n_seeds"),
        ({"warm_start": True}, "warm_start"),
        ({"decoder_initialization": "uniform"}, "decoder_initialization"),
        ({"torch_compile": True}, "torch_compile"),
        ({"prune_texts": 10}, "prune_texts"),
        ({"solver": "adamw", "prune_texts": 10}, "prune_texts"),
        ({"solver": "adamw", "calibration_fraction": 0.5}, "calibration_fraction"),
        ({"solver": "adamw", "warm_start": True, "n_seeds": 2}, "n_seeds"),
        (
            {"solver": "adamw", "warm_start": True, "decoder_initialization": "uniform"},
            "decoder_initialization",
        ),
    ],
)
def test_an_argument_that_this_solver_would_ignore_is_an_error(settings, name):
    with pytest.raises(ConfigError, match=f"no {name} with"):
        GradiendTrainingArguments(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"calibration_fraction": 0.5},
        {"prune_fraction": 0.1, "prune_texts": 10},
        {"solver": "adamw", "max_steps": 10, "learning_rate": 1e-3, "n_seeds": 2},
        {"solver": "adamw", "warm_start": True, "prune_texts": 10, "calibration_fraction": 0.5},
        {"solver": "adamw", "decoder_initialization": "uniform", "num_train_epochs": 0.5},
        {"save_strategy": "no", "load_best_model_at_end": False},
        {"logging_strategy": "no", "seed": 3, "run_name": "x"},
        {"parameters": "backbone", "feature_classes": ["M", "F"], "top_k": 1.0},
        {"eval_steps": 0.1, "save_steps": 0.1, "logging_steps": 0.5},
    ],
)
def test_arguments_with_an_effect_pass(settings):
    arguments = GradiendTrainingArguments(**settings)

    for name, value in settings.items():
        expected = [value] if name == "parameters" else value
        assert getattr(arguments, name) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("solver", "sgd"),
        ("source", "positive"),
        ("target", "negative"),
        ("decoder_initialization", "random"),
        ("lr_scheduler_type", "linear"),
        ("eval_strategy", "epoch"),
        ("save_strategy", "best"),
        ("logging_strategy", "epoch"),
        ("metric_for_best_model", "loss"),
        ("greater_is_better", False),
        ("prune_fraction", 0.0),
        ("prune_fraction", 1.1),
        ("top_k", -0.1),
        ("top_k", float("nan")),
        ("calibration_fraction", 0.0),
        ("calibration_fraction", 1.0),
        ("n_seeds", 0),
        ("num_train_epochs", 0.0),
        ("num_train_epochs", float("nan")),
        ("max_train_texts", 0),
        ("max_eval_texts", -1),
        ("max_length", 0),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("feature_classes", ["F"]),
        ("feature_classes", ["F", "F"]),
        ("feature_classes", ["F", "F", "M"]),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_argument_and_value(name, value):
    with pytest.raises(ConfigError, match=rf"{name}.*but got {re.escape(repr(value))}"):
        GradiendTrainingArguments(**{name: value})


def test_all_problems_are_named_at_once_in_one_line():
    with pytest.raises(ConfigError) as caught:
        GradiendTrainingArguments(source="x", top_k=2.0, fp16=True, n_seeds=0)

    message = str(caught.value)
    assert all(name in message for name in ("source", "top_k", "fp16", "n_seeds"))
    assert "\n" not in message


@pytest.mark.parametrize(
    "settings",
    [{"eval_steps": 10, "save_steps": 15}, {"save_strategy": "no"}, {"logging_steps": 0}],
)
def test_arguments_that_contradict_each_other_are_an_error_in_one_line(settings):
    # transformers' own checks, whose messages may have several lines.
    with pytest.raises(ConfigError, match="fit together") as caught:
        GradiendTrainingArguments(**settings)

    assert "\n" not in str(caught.value)


def test_checkpoints_follow_the_evaluations_where_nothing_else_is_said():
    assert GradiendTrainingArguments(eval_steps=10).save_steps == 10
    assert GradiendTrainingArguments(eval_steps=10, save_steps=20).save_steps == 20  # the control


def test_the_defaults_are_the_papers():
    # Drechsel and Herbold (2025), section 4 and its table of hyper-parameters.
    arguments = GradiendTrainingArguments()

    assert arguments.learning_rate == 1e-5
    assert arguments.weight_decay == 1e-2
    assert arguments.adam_epsilon == 1e-8
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.999)
    assert arguments.per_device_train_batch_size == 32
    assert arguments.lr_scheduler_type == "constant"
    assert (arguments.source, arguments.target) == ("factual", "diff")


def test_every_argument_is_documented():
    own = {field.name for field in fields(GradiendTrainingArguments)}
    own -= {field.name for field in fields(TrainingArguments)}
    documented = re.findall(r"^ +(\w+): ", GradiendTrainingArguments.__doc__ or "", re.MULTILINE)

    assert own <= set(documented)
    assert len(own) > 10  # the control: there are some


def test_the_command_line_parser_of_transformers_reads_them():
    parser = HfArgumentParser(GradiendTrainingArguments)

    (arguments,) = parser.parse_args_into_dataclasses(["--solver", "adamw", "--n_seeds", "3"])
    (plain,) = parser.parse_args_into_dataclasses([])

    assert (arguments.solver, arguments.n_seeds) == ("adamw", 3)
    assert (plain.solver, plain.n_seeds) == ("closed_form", 1)  # the control


def test_layers_are_checkpointed_where_transformers_is_told_so(arguments):
    # transformers 5.23 has a new name and warns of the old one, which 4 has alone.
    new = any(item.name == "activation_checkpointing" for item in fields(TrainingArguments))
    name = "activation_checkpointing" if new else "gradient_checkpointing"

    assert arguments(**{name: True}).checkpoints_activations
    assert not arguments().checkpoints_activations
    if new:
        with pytest.warns(FutureWarning, match="gradient_checkpointing"):
            assert arguments(gradient_checkpointing=True).checkpoints_activations


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            {"prune_fraction": 0.1, "accumulator_device": "base_model"},
            {"prune_fraction", "prune_texts", "accumulator_dtype"},
        ),
        (
            {"solver": "adamw", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
            {"learning_rate", "decoder_initialization", "n_seeds"},
        ),
        ({"solver": "adamw", "warm_start": True}, {"prune_texts", "calibration_fraction"}),
    ],
)
def test_a_report_names_the_settings_that_decide_what_is_learned(given, wanted):
    found = settings_of(GradiendTrainingArguments(**given))

    assert wanted <= found.keys()
    assert {name: found[name] for name in given} == given
    assert "prune_texts" not in settings_of(GradiendTrainingArguments())  # the control
