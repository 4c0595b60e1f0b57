"""Arguments of `GradiendTrainer`."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from transformers import TrainingArguments

from hf_gradiend.configuration_gradiend import SIDES
from hf_gradiend.errors import ConfigError

# The arguments of transformers that the trainer acts upon. Any other that is set is an error: no
# option is silently ignored.
_HONOURED = {
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "num_train_epochs", "max_steps",
    "lr_scheduler_type", "logging_strategy", "logging_steps", "logging_first_step", "logging_dir",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "seed",
    "report_to", "run_name", "project", "disable_tqdm", "use_cpu", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "do_train", "do_eval", "do_predict",
    "resume_from_checkpoint", "overwrite_output_dir", "eval_delay", "trackio_space_id",
    "gradient_checkpointing", "activation_checkpointing", "torch_compile",
}  # fmt: skip
# What each solver (or option) alone reads: "adamw" has steps, the closed form has none.
_OF_ADAMW = (
    "n_seeds", "warm_start", "max_steps", "num_train_epochs", "learning_rate", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "decoder_initialization", "torch_compile",
)  # fmt: skip
_OF_CLOSED_FORM = ("calibration_fraction", "accumulator_dtype", "accumulator_device")


@dataclass
class GradiendTrainingArguments(TrainingArguments):
    """Arguments of `GradiendTrainer`; only what it adds to `transformers.TrainingArguments`.

    `torch_compile` compiles AdamW's update, which gains a tenth of a second or less for 100 M
    weights, after some seconds of compiling; it wants a C++ compiler or, on a GPU, Triton.

    The defaults of `learning_rate` (1e-5), `weight_decay` (1e-2), `adam_epsilon` (1e-8) and batch
    size (32) are the paper's (section 4, "Training"), without a schedule. An argument of
    `TrainingArguments` that this trainer does not act upon is an error when set.

    Args:
        solver: `"closed_form"` (one pass over class means, no optimiser) or `"adamw"` (the
            paper's).
        parameters: Which base-model weights: `"layers"`, `"backbone"` or patterns of names.
        source: Gradient that the encoder reads: `"factual"`, `"counterfactual"` or `"diff"`.
        target: Gradient that the decoder reproduces; same choices.
        feature_classes: The two class names, first the one that encodes to +1; `None` for the data
            set's two classes in alphabetical order.
        max_train_texts: Number of training texts to use, balanced over classes; `None` for all.
        prune_fraction: Share of the weights to keep before training, by the class-aligned mean
            gradient; `None` keeps all.
        prune_texts: Number of training texts that the pruning looks at.
        top_k: Share of the weights to keep after training, by the decoder's weight; `None` for all.
        calibration_fraction: Share of the training texts on which the closed form fits the scale of
            the encoder rather than its direction, in (0, 1).
        accumulator_dtype: Type of the closed form's sums: `"float32"` or `"bfloat16"`, which takes
            half the memory and rounds at every pass, so that it suits hundreds of texts, not
            thousands.
        accumulator_device: Where these sums are: `"cpu"`, or `"base_model"` for its device, which
            spares the gradients' way from a GPU.
        n_seeds: Number of random starts of `adamw`, trained side by side on the same gradients; the
            best by validation correlation is kept, so that evaluation data are needed.
        warm_start: Start `adamw` from the closed form of `prune_texts` texts, instead of at random.
        decoder_initialization: `"zeros"` or `"uniform"` (the paper's).
        max_length: Longest input in tokens; `None` for the model's limit, at most 256.
        max_eval_texts: Number of validation texts for evaluations during training, balanced over
            classes; `None` for all. The final report uses all of them.
        shard: On several processes, each keeps its rows of the GRADIEND and of the optimiser's
            state, instead of all. Always so where FSDP2 shards the base model.
    """

    output_dir: str | None = "gradiend"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    learning_rate: float = 1e-5
    weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    lr_scheduler_type: str = "constant"  # pyright: ignore[reportIncompatibleVariableOverride]
    logging_steps: float = 1
    # In the order that HfArgumentParser can read.
    report_to: None | str | list[str] = "none"  # noqa: RUF036
    save_strategy: str = "steps"  # pyright: ignore[reportIncompatibleVariableOverride]
    eval_strategy: str = "steps"  # pyright: ignore[reportIncompatibleVariableOverride]
    eval_steps: float | None = 25
    save_steps: float = 25
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "correlation"
    greater_is_better: bool | None = True
    solver: Literal["closed_form", "adamw"] = "closed_form"
    parameters: list[str] = field(default_factory=lambda: ["layers"])
    source: str = "factual"
    target: str = "diff"
    feature_classes: list[str] | None = None
    max_train_texts: int | None = None
    prune_fraction: float | None = None
    prune_texts: int = 128
    top_k: float | None = None
    calibration_fraction: float = 0.25
    accumulator_dtype: Literal["float32", "bfloat16"] = "float32"
    accumulator_device: Literal["cpu", "base_model"] = "cpu"
    n_seeds: int = 1
    warm_start: bool = False
    decoder_initialization: str = "zeros"
    max_length: int | None = None
    max_eval_texts: int | None = 64
    shard: bool = False

    def __post_init__(self) -> None:
        """Validate everything at once, before any work.

        Raises:
            ConfigError: If a value is not allowed, contradicts another one, or would be ignored.
        """
        if isinstance(self.parameters, str):
            self.parameters = [self.parameters]
        problems = [*self._not_offered(), *self._out_of_range(), *self._without_effect()]
        if problems:
            raise ConfigError(f"GradiendTrainingArguments expected {'; and '.join(problems)}.")
        if self.load_best_model_at_end and self.save_steps == type(self).save_steps:
            self.save_steps = self.eval_steps or self.save_steps  # transformers wants a multiple
        try:
            super().__post_init__()
        except ValueError as error:  # transformers' own checks of arguments against each other
            reason = " ".join(str(error).split())
            raise ConfigError(f"Expected arguments that fit together, but {reason}") from error

    @property
    def checkpoints_activations(self) -> bool:
        """Whether layers are computed again in the backward pass; transformers has two names."""
        names = ("activation_checkpointing", "gradient_checkpointing")
        return any(bool(getattr(self, name, False)) for name in names)

    @property
    def makes_closed_form(self) -> bool:
        """Whether a closed form is made, as the result or as the start of `adamw`."""
        return self.solver == "closed_form" or self.warm_start

    def _not_offered(self) -> list[str]:
        problems: list[str] = []
        for name, allowed in (
            ("solver", ("closed_form", "adamw")),
            ("source", SIDES),
            ("target", SIDES),
            ("decoder_initialization", ("zeros", "uniform")),
            ("accumulator_dtype", ("float32", "bfloat16")),
            ("accumulator_device", ("cpu", "base_model")),
            ("lr_scheduler_type", ("constant",)),
            # Steps are what this trainer counts; it has no epoch to end.
            ("logging_strategy", ("no", "steps")),
            ("eval_strategy", ("no", "steps")),
            ("save_strategy", ("no", "steps")),
            ("metric_for_best_model", ("correlation", "eval_correlation", None)),
            ("greater_is_better", (True, None)),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(repr(value) for value in allowed)
                problems.append(f"{name} to be one of {choices}, but got {getattr(self, name)!r}")
        return problems

    def _out_of_range(self) -> list[str]:
        problems: list[str] = []
        for name in ("prune_fraction", "top_k"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                problems.append(f"{name} to be in (0, 1], but got {value!r}")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            problems.append(f"num_train_epochs above 0, but got {self.num_train_epochs!r}")
        if not 0.0 < self.calibration_fraction < 1.0:
            value = self.calibration_fraction
            problems.append(f"calibration_fraction to be in (0, 1), but got {value!r}")
        for name in (
            "n_seeds", "prune_texts", "max_train_texts", "max_eval_texts", "max_length",
            "per_device_train_batch_size", "per_device_eval_batch_size",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} to be at least 1, but got {value!r}")
        classes = self.feature_classes
        if classes is not None and (len(classes) != 2 or classes[0] == classes[1]):
            problems.append(f"two different feature_classes, but got {self.feature_classes!r}")
        return problems

    def _without_effect(self) -> list[str]:
        problems = [
            f"no {item.name} (GradiendTrainer does not use it), "
            f"but got {getattr(self, item.name)!r}"
            for item in fields(TrainingArguments)
            if item.name not in _HONOURED
            and _as_parsed(getattr(self, item.name)) != _as_parsed(_default(item))
        ]
        own = {item.name: item for item in fields(self)}
        unread: dict[str, str] = {}
        if self.solver == "closed_form":
            unread = dict.fromkeys(_OF_ADAMW, "with the closed form (it takes no steps)")
        elif not self.warm_start:
            unread = dict.fromkeys(_OF_CLOSED_FORM, "without the closed form or warm_start")
        if self.solver == "adamw" and self.warm_start:  # one start, and it is not drawn
            unread |= dict.fromkeys(("n_seeds", "decoder_initialization"), "with warm_start")
        if self.prune_fraction is None and not self.warm_start:
            unread["prune_texts"] = "without prune_fraction or warm_start"
        problems += [
            f"no {name} {reason}, but got {getattr(self, name)!r}"
            for name, reason in unread.items()
            if getattr(self, name) != _default(own[name])
        ]
        return problems


def _default(item) -> object:  # noqa: ANN001 - dataclasses.Field is generic without a use here
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _as_parsed(value: object) -> object:
    """A value as HfArgumentParser may give it back: it turns "no" into False and "" into None."""
    return None if isinstance(value, (bool, str)) and value in {False, "", "no"} else value


def settings_of(arguments: GradiendTrainingArguments) -> dict[str, object]:
    """The settings that decide what is learned, for reports: plain JSON values."""
    names = [
        "solver", "parameters", "source", "target", "max_train_texts", "prune_fraction", "top_k",
        "seed",
    ]  # fmt: skip
    if arguments.makes_closed_form:
        names += ["calibration_fraction", "accumulator_dtype", "accumulator_device"]
    if arguments.solver == "adamw":
        names += [
            "max_steps", "num_train_epochs", "learning_rate", "weight_decay", "adam_beta1",
            "adam_beta2", "adam_epsilon",
            "per_device_train_batch_size", "n_seeds", "warm_start", "decoder_initialization",
        ]  # fmt: skip
    if arguments.prune_fraction is not None or arguments.warm_start:
        names += ["prune_texts"]
    return {name: getattr(arguments, name) for name in names}
