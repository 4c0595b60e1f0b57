"""`GradiendTrainer`: one loop for both solvers, with transformers' callbacks and arguments."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ProgressCallback,
    TrainerControl,
)

from hf_gradiend.base_models import check_base_model, objective_of, pad_token_id_of
from hf_gradiend.data.collation import PreparedTexts, prepare_texts
from hf_gradiend.data.neutral import neutral_to_fit
from hf_gradiend.errors import ConfigError, NumericalError
from hf_gradiend.files import writable_folder, write_json
from hf_gradiend.metrics import pearson_correlation, sign_accuracy
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import select_parameters
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.checkpoints import (
    STATE,
    RunState,
    best_beside,
    checkpoints_in,
    load_solver,
    remove_leftovers,
    rotate,
    run_digest,
    save_checkpoint,
    save_shared,
    texts_digest,
)
from hf_gradiend.training.interrupts import interrupts_held_back
from hf_gradiend.training.pruning import part_of, prune
from hf_gradiend.training.setup import (
    classes_to_learn,
    gradiend_config,
    two_classes_of,
    with_parameters,
    words_of_classes,
)
from hf_gradiend.training.sharding import Share, share_of
from hf_gradiend.training.solvers import (
    AdamWSolver,
    ClosedFormSolver,
    Solver,
    TrainingProblem,
)
from hf_gradiend.training.texts import LabelledTexts, label_texts

logger = logging.getLogger(__name__)

# What `accelerate launch` sets for several processes; on CPUs it starts one all the same
# (https://github.com/huggingface/accelerate/issues/2741).
LAUNCHED_FOR_SEVERAL = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"}

# A seed has converged when its encodings tell the classes apart this well on validation texts.
CONVERGED_CORRELATION = 0.8


@dataclass(frozen=True)
class TrainingResult:
    """What `GradiendTrainer.train` did.

    Args:
        global_step: Number of steps done.
        seconds: Wall-clock time of the call.
        n_selected: Number of weights of the GRADIEND.
        convergence: For each seed its last validation correlation, and whether it is at least 0.8.
        best_step: Step of the kept checkpoint; `None` where the last model was kept.
        history: Everything that was logged, in order.
    """

    global_step: int
    seconds: float
    n_selected: int
    convergence: list[dict[str, float | int | bool]]
    best_step: int | None
    history: list[dict[str, float]]


class GradiendTrainer:
    """Learns a feature of a base model.

    The base model is left bit for bit as it was. The best checkpoint by validation correlation is
    kept; without evaluation data the last model. Ctrl-C saves a checkpoint and stops; `train(
    resume_from_checkpoint=True)` goes on from there with the same numbers.

    Started by `torchrun` or `accelerate launch`, several processes share each batch: two with 4
    texts each learn what one learns with 8. Each keeps the whole GRADIEND, or with `shard` its
    rows; a base model may be sharded with FSDP2's `fully_shard` before it is given.

    Args:
        base_model: Masked or causal language model with its head.
        processing_class: Its tokenizer.
        args: Training arguments.
        train_dataset: Feature data set.
        eval_dataset: Feature data set for evaluation during training; `None` for none.
        callbacks: transformers' trainer callbacks.
        neutral_texts: Texts without the feature, which the closed form's encoder is fitted to read
            as 0; `None` for the package's own, English.

    Raises:
        ConfigError: If the arguments contradict each other or the data.
        DataError: If a data set lacks columns, slots or a class.
        BaseModelError: If the base model carries an adapter, is quantised, offloaded or broken.
        SelectionError: If a pattern of parameters matches nothing.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        args: GradiendTrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        neutral_texts: Sequence[str] | None = None,
    ) -> None:
        check_base_model(base_model)
        if args.n_seeds > 1 and eval_dataset is None:
            raise ConfigError(
                f"Expected evaluation data to choose the best of {args.n_seeds} seeds on, but got "
                f"none. Pass eval_dataset, or leave n_seeds out."
            )
        self.base_model = base_model
        self.processing_class = processing_class
        self.args = args
        self.accelerator = Accelerator(cpu=args.use_cpu)
        if self.accelerator.num_processes == 1 and os.environ.keys() >= LAUNCHED_FOR_SEVERAL:
            logger.warning(
                "accelerate launch was asked for several processes and started one. On CPUs: "
                "ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 your_script.py"
            )
        self.base_model.to(self.accelerator.device)  # pyright: ignore[reportArgumentType]
        self.classes = classes_to_learn(train_dataset, args.feature_classes)
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.train_texts = self._labelled(train_dataset).balanced(args.max_train_texts, args.seed)
        self.eval_texts = (
            None
            if eval_dataset is None
            else self._labelled(eval_dataset).balanced(args.max_eval_texts, args.seed)
        )
        self.neutral_texts = (
            neutral_to_fit(
                neutral_texts,
                processing_class,
                objective_of(base_model),
                max_length=args.max_length,
            )
            if args.makes_closed_form
            else None
        )
        self.selection = select_parameters(base_model, args.parameters)
        own = Share(
            self.accelerator.process_index,
            self.accelerator.num_processes,
            device=self.accelerator.device,
        )
        self.share = share_of(base_model, self.selection, own, shard=args.shard)
        self.state = RunState()
        self.control = TrainerControl()
        standard = [DefaultFlowCallback, *([] if args.disable_tqdm else [ProgressCallback])]
        reporting = get_reporting_integration_callbacks(args.report_to)
        self.callbacks = CallbackHandler(
            [*standard, *reporting, *callbacks], None, processing_class, None, None
        )
        self._model: GradiendModel | None = None
        self._saved_to: Path | None = None  # where a sharded one is
        self._run = ""  # what a checkpoint must agree with

    @property
    def model(self) -> GradiendModel:
        """The trained GRADIEND; a sharded one is loaded whole from `output_dir` when asked for.

        Raises:
            ConfigError: Before `train` was called.
        """
        if self._model is None and self._saved_to is not None:
            self._model = GradiendModel.from_pretrained(self._saved_to)
        if self._model is None:
            raise ConfigError("Expected a trained GRADIEND, but train() has not been called yet.")
        return self._model

    def train(self, *, resume_from_checkpoint: bool | str | None = None) -> TrainingResult:
        """Learn the feature.

        Args:
            resume_from_checkpoint: `True` for the last checkpoint in `output_dir`, or its folder.

        Returns:
            What was done; the GRADIEND is `self.model`, also on disk in `output_dir`.

        Raises:
            ConfigError: If a checkpoint is asked for and there is none, or it was made with other
                arguments, or its step is beyond this run's last.
            NumericalError: If a loss is NaN or infinite.
            OutputError: If `output_dir` cannot be written.
        """  # noqa: DOC502 - NumericalError is raised by the solvers
        started = time.perf_counter()
        args = self.args
        resume = resume_from_checkpoint or args.resume_from_checkpoint
        set_seed(args.seed)
        folder = writable_folder(self.args.output_dir or "gradiend")
        if self.accelerator.is_main_process:
            remove_leftovers(folder)
        self.share.barrier()
        self._prune()
        problem = self._problem()
        start = self._warm_start(problem) if args.warm_start else None
        solver: Solver = (
            ClosedFormSolver(problem)
            if args.solver == "closed_form"
            else AdamWSolver(problem, start)
        )
        self._run = run_digest(problem, self.classes)
        self.control = TrainerControl()
        self._begin(RunState(num_train_epochs=1), solver)
        if resume:
            self._resume(solver, folder, wanted=resume)
        self._loop(solver, problem, folder)
        best_step = self._load_best(solver)
        models = solver.models()
        correlations = [self._correlation(model) for model in models]
        n_selected = self._finish(self._chosen(models, correlations), problem, folder)
        self.control = self.callbacks.on_train_end(args, self.state, self.control)
        return TrainingResult(
            global_step=self.state.global_step,
            seconds=time.perf_counter() - started,
            n_selected=n_selected,
            convergence=[
                {
                    "seed": args.seed + k,
                    "correlation": abs(value),
                    "converged": abs(value) >= CONVERGED_CORRELATION,
                }
                for k, value in enumerate(correlations)
                if value is not None
            ],
            best_step=best_step,
            history=list(self.state.log_history),
        )

    def _begin(self, state: RunState, solver: Solver) -> None:
        """Take over a state, new or of a checkpoint, which was written by the main process."""
        state.evaluated_on = texts_digest(self.eval_texts) if self.eval_texts else None
        state.max_steps = solver.n_steps  # which may be more than the first run's
        state.is_local_process_zero = self.accelerator.is_local_main_process
        state.is_world_process_zero = self.accelerator.is_main_process
        state.compute_steps(self.args, solver.n_steps)  # numbers below 1 are shares of all steps
        self.state = state

    def _finish(self, own: GradiendModel, problem: TrainingProblem, folder: Path) -> int:
        """Write the GRADIEND, and return its number of weights."""
        if self.args.top_k is not None:
            scores = {name: own.decoder.weight.at(name).norm(dim=0) for name in own.names}
            scores = self.share.whole_values(problem.selection, scores)
            kept = problem.selection.top_k(scores, fraction=self.args.top_k)
            problem = replace(problem, selection=kept, config=with_parameters(problem.config, kept))
            own = part_of(own, problem.own)
        if self.share.sharded:
            self._model, self._saved_to = None, folder
            save_shared(own, problem, folder)
        else:
            self._model = own
        if self.accelerator.is_main_process:
            if not self.share.sharded:
                own.save_pretrained(folder)
            write_json(folder / "trainer_state.json", {"log_history": self.state.log_history})
        self.share.barrier()
        return problem.selection.n_selected

    def _loop(self, solver: Solver, problem: TrainingProblem, folder: Path) -> None:
        args = self.args
        self.control = self.callbacks.on_train_begin(args, self.state, self.control)
        whole = True  # whether the solver's state is that of a number of whole steps
        try:
            with (
                problem.stream() as stream,
                interrupts_held_back(self.share) as interrupt_now,
            ):
                while True:
                    logs = self.state.pending_logs
                    if logs is not None:  # of this run, or of the one that it goes on from
                        self._end_step(solver, folder, logs)
                        interrupt_now()
                    number = self.state.global_step
                    if self.control.should_training_stop or number >= solver.n_steps:
                        break
                    self.control = self.callbacks.on_step_begin(args, self.state, self.control)
                    whole = False
                    self.state.pending_logs = solver.step(stream, number)
                    self.state.global_step = number + 1
                    self.state.epoch = (number + 1) / solver.n_steps
                    whole = True
        except KeyboardInterrupt:
            if self.state.global_step and whole:
                self._save_checkpoint(solver, folder)
                logger.warning(
                    "Interrupted at step %d; saved. Go on with resume_from_checkpoint=True.",
                    self.state.global_step,
                )
            raise

    def _end_step(self, solver: Solver, folder: Path, logs: Mapping[str, float]) -> None:
        """Log, evaluate and save after a step, as the callbacks want it.

        Raises:
            KeyboardInterrupt: If it is interrupted. Until the step is evaluated that takes all back
                that was done here, for the resumed run to do.
        """
        before = replace(self.state, log_history=list(self.state.log_history))
        is_best = False
        try:
            self.control = self.callbacks.on_step_end(self.args, self.state, self.control)
            if self.control.should_log:
                self._log(logs)
            if self.control.should_evaluate and self.eval_texts and self.args.solver == "adamw":
                is_best = self._evaluate(solver)
            if is_best:
                self.state.best_model_checkpoint = str(self._checkpoint(folder))
            self.state.pending_logs = None
        except KeyboardInterrupt:
            self.state = before
            raise
        # Transformers saves at the last step; the closed form has nothing left to resume there.
        spent = self.args.solver == "closed_form" and self.state.global_step >= solver.n_steps
        if is_best or (self.control.should_save and not spent):
            self._save_checkpoint(solver, folder)

    def _evaluate(self, solver: Solver) -> bool:
        """Validation correlation of every seed; whether it is the best so far."""
        values = [self._correlation(model) or 0.0 for model in solver.models()]
        best = max(abs(value) for value in values)
        metrics = {"eval_correlation": best}
        if len(values) > 1:
            metrics |= {
                f"eval_correlation_seed_{self.args.seed + k}": v for k, v in enumerate(values)
            }
        self._log(metrics)
        self.control = self.callbacks.on_evaluate(self.args, self.state, self.control, metrics)
        if self.state.best_metric is None or best > self.state.best_metric:
            self.state.best_metric = best
            self.state.best_global_step = self.state.global_step
            return self.args.load_best_model_at_end
        return False

    def _log(self, logs: Mapping[str, float]) -> None:
        entry = {**logs, "step": self.state.global_step}
        self.state.log_history.append(entry)
        self.control = self.callbacks.on_log(self.args, self.state, self.control, dict(logs))

    def _correlation(self, gradiend: GradiendModel) -> float | None:
        """Signed validation correlation; `None` without evaluation texts."""
        if self.eval_texts is None:
            return None
        encodings = self._encode(gradiend, self.eval_texts)
        if bool((encodings == encodings[0]).all()):  # saturated, or nothing selected is reached
            return 0.0
        return pearson_correlation(encodings, torch.tensor(self.eval_texts.signs))

    def _encode(self, gradiend: GradiendModel, labelled: LabelledTexts) -> Tensor:
        projections = self._problem().project(
            labelled.prepared(),
            {name: gradiend.encoder.weight.at(name)[0] for name in gradiend.names},
        )
        return torch.tanh(projections + gradiend.encoder.bias.detach().float().cpu()[0])

    def _chosen(
        self, models: Sequence[GradiendModel], correlations: Sequence[float | None]
    ) -> GradiendModel:
        """The best seed, turned so that the first class encodes to +1.

        Raises:
            NumericalError: If its weights are NaN or infinite.
        """
        number = max(range(len(models)), key=lambda k: abs(correlations[k] or 0.0))
        model, signed = models[number], correlations[number]
        if signed is None:  # without evaluation texts, the training texts tell the sign
            texts = self.train_texts.balanced(self.args.max_eval_texts, self.args.seed)
            read = self._encode(model, texts)
            signed = sign_accuracy(read, torch.tensor(texts.signs)) - 0.5
        if signed < 0:
            model.flip_()
        finite = all(bool(torch.isfinite(p.detach().sum())) for p in model.parameters())
        if self.share.any(here=not finite):
            raise NumericalError(
                "Expected finite GRADIEND weights after training, but some are NaN or infinite. "
                "Lower learning_rate, or load the base model in float32."
            )
        return model

    # ---- preparation ----------------------------------------------------------------------------

    @property
    def _pad_token_id(self) -> int:
        return pad_token_id_of(self.processing_class)

    def _labelled(self, dataset: Dataset) -> LabelledTexts:
        two_classes_of(dataset)
        texts: PreparedTexts = prepare_texts(
            dataset,
            self.processing_class,
            objective_of(self.base_model),
            max_length=self.args.max_length,
        )
        return label_texts(texts, dataset, self.classes)

    def _prune(self) -> None:
        if self.args.prune_fraction is None:
            return
        # From all weights each time: train() may be called again, to resume for instance.
        self.selection = select_parameters(self.base_model, self.args.parameters)
        texts = self.train_texts.balanced(self.args.prune_texts, self.args.seed)
        self.selection = prune(
            self._problem(texts), self.args.prune_fraction, progress=self._shows_progress
        )

    def _warm_start(self, problem: TrainingProblem) -> GradiendModel:
        texts = self.train_texts.balanced(self.args.prune_texts, self.args.seed)
        solver = ClosedFormSolver(self._problem(texts))
        with problem.stream() as stream:
            for number in range(solver.n_steps):
                solver.step(stream, number)
        return solver.models()[0]

    def _problem(self, texts: LabelledTexts | None = None) -> TrainingProblem:
        return TrainingProblem(
            base_model=self.base_model,
            selection=self.selection,
            config=gradiend_config(
                self.base_model,
                self.selection,
                self.args,
                self.classes,
                words_of_classes(self.train_dataset),
            ),
            texts=texts or self.train_texts,
            neutral=self.neutral_texts,
            pad_token_id=self._pad_token_id,
            args=self.args,
            share=self.share,
        )

    @property
    def _shows_progress(self) -> bool:
        return self.accelerator.is_main_process and not self.args.disable_tqdm

    # ---- files ----------------------------------------------------------------------------------

    def _checkpoint(self, folder: Path) -> Path:
        return folder / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, solver: Solver, folder: Path) -> None:
        save_checkpoint(self._checkpoint(folder), solver, self.state, self._run, self.share)
        if self.args.save_total_limit is not None and self.accelerator.is_main_process:
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.control = self.callbacks.on_save(self.args, self.state, self.control)

    def _load_best(self, solver: Solver) -> int | None:
        best = self.state.best_model_checkpoint
        if best is not None and self.state.best_global_step != self.state.global_step:
            load_solver(Path(best), solver, self.share, self._run)
        return self.state.best_global_step if best else None

    def _resume(self, solver: Solver, folder: Path, *, wanted: bool | str) -> None:
        if isinstance(wanted, str):
            path = Path(wanted)
        else:
            path = [folder / "checkpoint-*", *checkpoints_in(folder)][-1]
        load_solver(path, solver, self.share, self._run)
        state = RunState.load_from_json(str(path / STATE))
        if state.global_step > solver.n_steps:
            raise ConfigError(
                f"Expected a checkpoint of a step that this run reaches, but {str(path)!r} is at "
                f"step {state.global_step}, and this run has {solver.n_steps} in all. Raise "
                f"max_steps or num_train_epochs, name an earlier checkpoint, or train without "
                f"resume_from_checkpoint."
            )
        before, best = state.best_model_checkpoint, best_beside(path, state.best_model_checkpoint)
        why, keeps_best = "is gone", self.args.load_best_model_at_end
        compares = state.evaluated_on == self.state.evaluated_on
        if not compares:
            best, why = None, "was chosen on other evaluation texts"
        if keeps_best and best is None and before is not None:
            logger.warning(
                "The best checkpoint until step %d, %s, %s: it takes no part in the choice.",
                state.global_step, before, why,
            )  # fmt: skip
        if not compares or (keeps_best and best is None):  # the best of the steps from here on
            state.best_metric = state.best_global_step = None
        if not keeps_best:
            best = None
        state.best_model_checkpoint = None if best is None else str(best)
        self._begin(state, solver)


def training_summary(result: TrainingResult) -> dict[str, object]:
    """A training result as plain JSON values, without the step-by-step history."""
    content = asdict(result)
    content.pop("history")
    return content
