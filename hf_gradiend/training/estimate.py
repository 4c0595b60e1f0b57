"""What a training will take, in memory and time: measured in short runs, nothing is trained."""

import math
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers.trainer_callback import TrainerState

from hf_gradiend.base_models import pad_token_id_of
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.collation import (
    PreparedText,
    PreparedTexts,
    TargetBatch,
)
from hf_gradiend.gradients.backward import gradient_stream
from hf_gradiend.gradients.forward import (
    directional_derivatives,
    tangent_bytes,
    tangent_groups,
)
from hf_gradiend.gradients.packing import batch_for, groups_for
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, SelectedParameter
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.pruning import pruning_groups
from hf_gradiend.training.solvers import TOKENS_PER_PASS, adamw_steps
from hf_gradiend.training.texts import LabelledTexts, batch_at, one_pass
from hf_gradiend.training.trainer import GradiendTrainer
from hf_gradiend.training.update import AdamWSettings, FusedAdamW

Texts = tuple[PreparedText, ...]  # of one pass

# Steps of adamw whose texts are looked at; the others are taken to be like them.
STEPS_LOOKED_AT = 64
# Numbers that a probe adds to, more than a cache holds, and weights of a probed update.
SCRATCH, UPDATED = 2**25, 2**22
WRITTEN = 2**26  # bytes


@dataclass(frozen=True)
class Phase:
    """A part of a training.

    Args:
        name: Which one.
        seconds: How long it takes.
        held_bytes: What the solver holds meanwhile: sums, GRADIENDs, moments.
        working_bytes: What its passes take on top, beside the base model: activations, a gradient,
            tangents, the pruning's sums.
    """

    name: str
    seconds: float
    held_bytes: int
    working_bytes: int


@dataclass(frozen=True)
class TrainingEstimate:
    """What a training on one process will take.

    Args:
        n_selected: Number of weights of the GRADIEND.
        base_model_bytes: Size of the base model's weights.
        program_bytes: Main memory of the process before the training, without these weights.
        phases: Parts of the training in their order.
        on_accelerator: Whether the base model, and what works beside it, is on a GPU.
    """

    n_selected: int
    base_model_bytes: int
    program_bytes: int
    phases: tuple[Phase, ...]
    on_accelerator: bool = False

    @property
    def peak_bytes(self) -> int:
        """Largest main memory of the process, in the phase that takes the most."""
        if self.on_accelerator:
            return self.program_bytes + max(phase.held_bytes for phase in self.phases)
        most = max(phase.held_bytes + phase.working_bytes for phase in self.phases)
        return self.base_model_bytes + self.program_bytes + most

    @property
    def accelerator_peak_bytes(self) -> int:
        """Largest memory on the base model's GPU; 0 where it is on none."""
        most = max(phase.working_bytes for phase in self.phases)
        return self.base_model_bytes + most if self.on_accelerator else 0

    @property
    def seconds(self) -> float:
        """All phases together."""
        return sum(phase.seconds for phase in self.phases)


def estimate_training(
    trainer: GradiendTrainer, report_texts: Sequence[PreparedTexts] = ()
) -> TrainingEstimate:
    """Measure the passes of a training on a few of its texts, and add up what all of it takes.

    The base model is left as it was; nothing is learned, and no file remains. What is measured is
    the largest, the smallest and a middle pass of each kind, a weight update and a write to the
    folder for temporary files; sums, moments and numbers of passes are known beforehand.

    Args:
        trainer: The training, not started yet.
        report_texts: Texts that are encoded once afterwards, such as those of a report.

    Returns:
        Memory and seconds of every phase.
    """
    return _Probe(trainer).estimate(report_texts)


class _Memory:
    """Memory in use where the base model is: by the process, or on a GPU.

    Args:
        device: Where the base model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()

    def in_use(self) -> int:
        """Bytes in use now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self.process.memory_info().rss

    def most(self, work: Callable[[], object]) -> int:
        """Do something and return the most bytes that were in use meanwhile."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            return torch.cuda.max_memory_allocated(self.device)
        seen, done = [self.in_use()], threading.Event()

        def watch() -> None:
            while not done.wait(0.001):
                seen[0] = max(seen[0], self.in_use())

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            work()
        finally:
            done.set()
            watching.join()
        return max(seen[0], self.in_use())


class _Probe:
    """Short runs of a trainer's passes.

    Args:
        trainer: The training.
    """

    def __init__(self, trainer: GradiendTrainer) -> None:
        args, model = trainer.args, trainer.base_model
        self.trainer, self.args, self.model = trainer, args, model
        self.pad_token_id = pad_token_id_of(trainer.processing_class)
        self.dense = trainer.selection
        self.selection = (
            self.dense
            if args.prune_fraction is None
            else _evenly_kept(self.dense, args.prune_fraction)
        )
        self.sides = tuple(dict.fromkeys((args.source, args.target)))
        self.memory = _Memory(model.device)
        self.base_model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.on_accelerator = model.device.type != "cpu"
        in_program = psutil.Process().memory_info().rss
        if not self.on_accelerator:
            in_program = max(0, in_program - self.base_model_bytes)
        self.program_bytes = in_program
        # What the passes add to, in place of the sums: ones, so that its pages are there.
        largest = max(entry.n_selected for entry in self.dense)
        self.scratch = torch.ones(max(largest, min(SCRATCH, self.dense.n_selected)))
        self.place = 0
        self.before = self.memory.in_use()

    def estimate(self, report_texts: Sequence[PreparedTexts]) -> TrainingEstimate:
        """See `estimate_training`."""
        args, trainer = self.args, self.trainer
        first_texts = trainer.train_texts.balanced(args.prune_texts, args.seed)
        n_steps, steps = self._steps()
        step_parts = [part for parts in steps for part in parts]
        held = _Held(
            self.selection.n_selected,
            args,
            sparse=self.selection.is_sparse,
            on_accelerator=self.on_accelerator,
            in_parts=any(len(parts) > 1 for parts in steps),
        )
        phases: list[Phase] = []
        # In the order of a training: what a pass has freed may stay with the process.
        if args.prune_fraction is not None:
            phases.append(self._pruning(self._parts_of_pass(first_texts)))
        gradient_seconds, step_working = self._gradients(step_parts)
        # Without validation texts, those of the training tell the sign.
        some_texts = trainer.train_texts.balanced(args.max_eval_texts, args.seed)
        validation = (trainer.eval_texts or some_texts).prepared()
        fitting = self._calibrated(trainer.train_texts) if args.makes_closed_form else []
        reading_seconds, working = self._readings([validation, *fitting, *report_texts])
        working += self._tangent_bytes()
        if args.warm_start:
            seconds = sum(map(gradient_seconds, self._parts_of_pass(first_texts)))
            seconds += 2 * sum(map(reading_seconds, self._calibrated(first_texts)))
            phases.append(Phase("warm start", seconds, held.sums, max(step_working, working)))
        seconds = sum(map(gradient_seconds, step_parts))
        if args.solver == "adamw":
            seconds *= n_steps / min(n_steps, STEPS_LOOKED_AT)
            seconds += n_steps * args.n_seeds * self._seconds_of_update()
            reading = self._n_evaluations(n_steps) * reading_seconds(validation)
        else:
            reading = reading_seconds(validation) + 2 * sum(map(reading_seconds, fitting))
        saving = self._n_checkpoints(n_steps) * held.checkpoint + held.gradiend
        phases += [
            Phase("steps", seconds, held.steps, step_working + held.beside),
            Phase("reading", reading, held.steps, working + held.beside),
            Phase("saving", saving / _bytes_written_a_second(), held.steps, 0),
        ]
        if report_texts:
            seconds = sum(map(reading_seconds, report_texts))
            phases.append(Phase("report", seconds, held.steps, working))
        return TrainingEstimate(
            self.selection.n_selected,
            self.base_model_bytes,
            self.program_bytes,
            tuple(phases),
            self.on_accelerator,
        )

    def _parts_of_pass(self, texts: LabelledTexts) -> list[Texts]:
        batches = one_pass(texts, self.args.per_device_train_batch_size)
        return [part for batch in batches for part in self._parts(batch.texts)]

    def _parts(self, texts: Texts) -> list[Texts]:
        return groups_for(self.model, texts, max_tokens=TOKENS_PER_PASS)

    def _steps(self) -> tuple[int, list[list[Texts]]]:
        """Number of steps, and the parts of each of them or of some, evenly spread."""
        args, texts = self.args, self.trainer.train_texts
        size = args.per_device_train_batch_size
        if args.solver == "closed_form":
            fitted, _ = texts.split(args.calibration_fraction, args.seed)
            batches = one_pass(fitted, size)
            return len(batches), [self._parts(batch.texts) for batch in batches]
        n_steps = adamw_steps(args, len(texts.texts), size)
        of_sign = {sign: texts.of_sign(sign) for sign in (+1, -1)}
        seen = min(n_steps, STEPS_LOOKED_AT)
        batches = [batch_at(of_sign, k * n_steps // seen, size, args.seed) for k in range(seen)]
        return n_steps, [self._parts(batch.texts) for batch in batches]

    def _calibrated(self, texts: LabelledTexts) -> list[PreparedTexts]:
        """What the closed form reads on both of its mean gradients."""
        _, calibration = texts.split(self.args.calibration_fraction, self.args.seed)
        neutral = self.trainer.neutral_texts
        return [calibration.prepared(), *([] if neutral is None else [neutral])]

    def _pruning(self, parts: Sequence[Texts]) -> Phase:
        some = _three(parts)
        groups = pruning_groups(self.dense)
        seconds, most = self._seconds_of_choice(), 0
        for group in groups:
            with self._passes(group, (self.args.target,)) as run:
                of_part, working = self._measured(some, run)
                seconds += sum(map(of_part, parts))
                most = max(most, working)
        sums = max(4 * group.n_selected for group in groups)
        candidates = 2 * 8 * self.selection.n_selected  # two lists of them: scores and places
        return Phase("pruning", seconds, candidates, sums + most)

    def _gradients(self, parts: Sequence[Texts]) -> tuple[Callable[[Texts], float], int]:
        """Seconds of a part by its size, and the working memory."""
        some = _three(parts)
        with self._passes(self.selection, self.sides) as run:
            return self._measured(some, run)

    @contextmanager
    def _passes(
        self, selection: ParameterSelection, sides: Sequence[str]
    ) -> Iterator[Callable[[TargetBatch], None]]:
        """Prepare the base model for passes.

        Yields:
            A function that takes the gradients of a part and adds them up somewhere.
        """
        entries = {entry.name: entry for entry in selection}

        def add(name: str, gradient: Tensor) -> None:
            values = entries[name].gather(gradient).flatten().to(self.scratch.device)
            start = self.place if self.place + len(values) <= len(self.scratch) else 0
            self.place = start + len(values)
            self.scratch[start : self.place].add_(values, alpha=0.5)

        checkpointing = self.args.checkpoints_activations
        with gradient_stream(self.model, selection, checkpointing=checkpointing) as stream:

            def run(part: TargetBatch) -> None:
                stream.backward_each(stream.losses(part, sides), lambda _: add)

            yield run

    def _readings(
        self, texts: Sequence[PreparedTexts]
    ) -> tuple[Callable[[PreparedTexts], float], int]:
        """Seconds of encoding texts, and the working memory without the tangents."""
        some = _three([group for part in texts for group in self._read_groups(part)])
        parameters = self.selection.parameters(self.model)
        own_names = self.selection.names_in(self.model)
        # The weights are a direction, too, of the right types and shapes and without a copy.
        directions = [
            {own_names[name]: parameters[name].detach() for name in group.names}
            for group in self._tangent_groups()
        ]

        def run(batch: TargetBatch) -> None:
            for tangents in directions:
                directional_derivatives(self.model, batch, tangents).sum().item()

        seconds, working = self._measured(some, run)
        return lambda texts: sum(map(seconds, self._read_groups(texts))), working

    def _measured(
        self, some: Sequence[Texts], run: Callable[[TargetBatch], object]
    ) -> tuple[Callable[[Texts], float], int]:
        """Seconds of any batch, between those of three, and the working memory of the largest."""
        batches = [batch_for(self.model, texts, self.pad_token_id) for texts in some]
        run(batches[0])  # the first run of a kind is slower
        taken: list[float] = []
        most = self.memory.most(
            lambda: taken.extend(_seconds(lambda batch=batch: run(batch)) for batch in batches)
        )
        sizes = [_n_tokens(texts) for texts in some]
        return lambda texts: _between(_n_tokens(texts), sizes, taken), max(0, most - self.before)

    def _read_groups(self, texts: PreparedTexts) -> list[Texts]:
        return groups_for(self.model, texts, batch_size=self.args.per_device_eval_batch_size)

    def _tangent_groups(self) -> list[ParameterSelection]:
        values = dict.fromkeys(self.selection.names, torch.empty(0))
        return tangent_groups(self.model, self.selection, values)

    def _tangent_bytes(self) -> int:
        parameters, values = self.selection.parameters(self.model), torch.empty(0)
        return max(
            sum(tangent_bytes(entry, parameters[entry.name], values) for entry in group)
            for group in self._tangent_groups()
        )

    def _seconds_of_choice(self) -> float:
        """The largest of all sums, by the time that the scratch takes."""
        entry = SelectedParameter("scratch", (len(self.scratch),))
        one = ParameterSelection((entry,))
        scores = {"scratch": torch.rand(len(self.scratch))}
        taken = _seconds(lambda: one.top_k(scores, fraction=self.args.prune_fraction or 1.0))
        return taken * self.dense.n_selected / len(self.scratch)

    def _seconds_of_update(self) -> float:
        args, n = self.args, self.selection.n_selected
        size = min(n, UPDATED)
        config = GradiendConfig(parameters=[{"name": "w", "shape": [size]}])
        settings = AdamWSettings(
            args.learning_rate, args.weight_decay, args.adam_beta1, args.adam_beta2,
            args.adam_epsilon,
        )  # fmt: skip
        update = FusedAdamW(GradiendModel(config), settings)
        values = {"w": torch.full((size,), 1e-3)}
        update.step(values, values)
        return _seconds(lambda: update.step(values, values)) * n / size

    def _n_evaluations(self, n_steps: int) -> int:
        """How often encodings of the validation texts are read: for each seed when it is done."""
        if self.trainer.eval_texts is None:
            return 1
        during = 0
        if self.args.eval_strategy != "no":
            during = math.ceil(n_steps / self._every(n_steps).eval_steps)
        return self.args.n_seeds * (1 + during)

    def _n_checkpoints(self, n_steps: int) -> int:
        if self.args.save_strategy == "no":
            return 0
        every = self._every(n_steps).save_steps
        # The closed form has nothing left to resume at its last step.
        closed_form = self.args.solver == "closed_form"
        return (n_steps - 1) // every if closed_form else math.ceil(n_steps / every)

    def _every(self, n_steps: int) -> TrainerState:
        """A state that knows after how many steps there is what; below 1 they are shares."""
        state = TrainerState()
        state.compute_steps(self.args, n_steps)
        return state


class _Held:
    """Bytes of what a training holds, by n.

    Args:
        n: Number of weights.
        args: How it is trained.
        sparse: Whether the GRADIEND has an index per weight.
        on_accelerator: Whether the base model is on a GPU, where the sums may be, too.
        in_parts: Whether a batch has several parts, so that `adamw` holds its target gradient.
    """

    def __init__(
        self,
        n: int,
        args: GradiendTrainingArguments,
        *,
        sparse: bool,
        on_accelerator: bool = False,
        in_parts: bool = False,
    ) -> None:
        indices = 4 * n if sparse else 0
        size = getattr(torch, args.accumulator_dtype).itemsize
        self.sums = 4 * size * n + indices  # source and target means of both classes
        self.gradiend = 3 * 4 * n + indices
        if args.solver == "closed_form":
            self.checkpoint = self.sums - indices
            beside = on_accelerator and args.accumulator_device == "base_model"
            self.beside = self.sums if beside else 0
            self.steps = self.gradiend if beside else max(self.sums, self.gradiend)
            return
        self.beside = 0
        n_gradients = len({args.source, args.target}) if in_parts else 1
        with_moments = self.gradiend + 6 * 4 * n
        self.steps = args.n_seeds * with_moments + n_gradients * 4 * n + indices
        self.checkpoint = args.n_seeds * 9 * 4 * n


def _evenly_kept(selection: ParameterSelection, fraction: float) -> ParameterSelection:
    """As many weights as a pruning keeps, evenly spread, in place of those that it will choose."""
    entries: list[SelectedParameter] = []
    for entry in selection:
        size = max(1, round(fraction * entry.n_selected))
        places = torch.arange(size) * entry.n_selected // size
        entries.append(SelectedParameter(entry.name, entry.shape, places.to(torch.int32)))
    return ParameterSelection(tuple(entries))


def _n_tokens(texts: Texts) -> int:
    return sum(text.length for text in texts)


def _three(groups: Sequence[Texts]) -> list[Texts]:
    """The smallest, a middle and the largest."""
    ordered = sorted(groups, key=_n_tokens)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _between(x: int, xs: Sequence[int], ys: Sequence[float]) -> float:
    """The y of an x between the first and the last of ascending ones, on straight lines."""
    at = min(max(1, bisect_left(xs, x)), len(xs) - 1)
    width = xs[at] - xs[at - 1]
    share = (x - xs[at - 1]) / width if width else 1.0
    return ys[at - 1] + share * (ys[at] - ys[at - 1])


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _bytes_written_a_second() -> float:
    content = bytes(WRITTEN)
    with tempfile.TemporaryFile() as file:
        return WRITTEN / _seconds(lambda: (file.write(content), file.flush()))
