"""The two solvers, behind one interface: a number of steps, a state to save, a model at the end."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.collation import PreparedText, PreparedTexts, TargetBatch, collate
from hf_gradiend.errors import NumericalError
from hf_gradiend.gradients.backward import Consume, GradientStream
from hf_gradiend.gradients.forward import project_texts
from hf_gradiend.gradients.objectives import side_scores
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.calibration import fit_plane
from hf_gradiend.training.means import ClassMeans
from hf_gradiend.training.texts import ClassBatch, LabelledTexts, batch_at, one_pass
from hf_gradiend.training.update import AdamWSettings, FusedAdamW

# Tokens per forward pass. With book sentences in batches of 32, padding to the longest of the batch
# makes 2.8 tokens of each real one, padding part by part 1.7.
TOKENS_PER_PASS = 512


@dataclass(frozen=True)
class TrainingProblem:
    """What a solver works on.

    Args:
        base_model: Base model; left as it was.
        selection: Weights of the GRADIEND.
        config: Configuration of the GRADIEND to make.
        texts: Training texts.
        neutral: Neutral words, which the closed form's encoder is to read as 0; `None` for none.
        pad_token_id: Token id to pad with.
        args: Training arguments.
        reduce: Sums a tensor over all processes, in place.
        rank: Number of this process.
        world_size: Number of processes.
    """

    base_model: PreTrainedModel
    selection: ParameterSelection
    config: GradiendConfig
    texts: LabelledTexts
    neutral: PreparedTexts | None
    pad_token_id: int
    args: GradiendTrainingArguments
    reduce: Callable[[Tensor], Tensor]
    rank: int = 0
    world_size: int = 1

    @property
    def batch_size(self) -> int:
        """Texts per step over all processes."""
        return self.args.per_device_train_batch_size * self.world_size

    def parts_of(self, texts: tuple[PreparedText, ...]) -> Iterator[TargetBatch]:
        """This process's share of a batch of texts, in parts of similar length."""
        own = texts[self.rank :: self.world_size]
        return padded_parts(own, self.pad_token_id, self.base_model.device)


def padded_parts(
    texts: Sequence[PreparedText], pad_token_id: int, device: torch.device
) -> Iterator[TargetBatch]:
    """Texts in parts of similar length, each of one forward pass.

    A part holds at most `TOKENS_PER_PASS` tokens (or one text), so that little is padded and the
    activations stay small however long the texts are.

    Args:
        texts: Tokenised texts.
        pad_token_id: Token id to pad with.
        device: Where the batches are wanted.

    Yields:
        Padded batches, the longest texts first.
    """
    left = sorted(texts, key=lambda text: -text.length)
    while left:
        size = max(1, TOKENS_PER_PASS // left[0].length)
        yield collate(left[:size], pad_token_id).to(device)
        left = left[size:]


class Solver(Protocol):
    """A way to make GRADIENDs from texts."""

    n_steps: int

    def step(self, stream: GradientStream, number: int) -> dict[str, float]:
        """Do one step and return what there is to log."""
        ...

    def models(self) -> list[GradiendModel]:
        """The GRADIENDs as they stand, one per seed; may use up the solver's state."""
        ...

    def state_tensors(self) -> Mapping[str, Tensor]:
        """All tensors that resuming needs, as they are (not copies)."""
        ...


class ClosedFormSolver:
    """Class means in one pass: the decoder that minimises the loss at h = ±1, and its encoder.

    W_d = (E[t|+] − E[t|−])/2, b_d = (E[t|+] + E[t|−])/2. The encoder lies in the plane of E[x|+]
    and E[x|−]; where in it, how long, and b_e are fitted on neutral words and on texts that the
    means have not seen, since a text's own gradient in the mean would flatter it. Their plain
    difference would read neutral words as one side wherever that side's gradients are the smaller.

    Args:
        problem: What to learn from.
    """

    def __init__(self, problem: TrainingProblem) -> None:
        args = problem.args
        self.problem = problem
        self.fitted, self.calibration = problem.texts.split(args.calibration_fraction, args.seed)
        self.batches = one_pass(self.fitted, problem.batch_size)
        self.n_steps = len(self.batches)
        self.means = ClassMeans(
            problem.selection,
            source=args.source,
            target=args.target,
            class_sizes={sign: len(self.fitted.of_sign(sign)) for sign in (+1, -1)},
            dtype=getattr(torch, args.accumulator_dtype),
            device="cpu" if args.accumulator_device == "cpu" else problem.base_model.device,
        )

    def step(self, stream: GradientStream, number: int) -> dict[str, float]:
        """Add one batch to the class means."""
        batch = self.batches[number]
        logs: Counter[str] = Counter()
        for part in self.problem.parts_of(batch.texts):
            found = self.means.add(stream, part, batch.sign)
            weight = part.n_texts / len(batch.texts)
            logs.update({name: weight * loss for name, loss in found.items()})
        return dict(logs)

    def models(self) -> list[GradiendModel]:
        """The GRADIEND of the means, calibrated. Uses the means up: call it once, at the end."""
        for tensor in self.means.state_tensors().values():
            self.problem.reduce(tensor)
        mixture, offset = self._calibrate()
        encoder = (self.means.to_direction(mixture), offset)
        decoder = self.means.to_decoder()
        return [build_gradiend(self.problem.selection, self.problem.config, encoder, decoder)]

    def state_tensors(self) -> dict[str, Tensor]:
        """The running means."""
        return self.means.state_tensors()

    def _calibrate(self) -> tuple[tuple[float, float], float]:
        neutral = self.problem.neutral
        return fit_plane(
            self._projected(self.calibration.prepared()),
            torch.tensor(self.calibration.signs),
            None if neutral is None else self._projected(neutral),
        )

    def _projected(self, texts: PreparedTexts) -> Tensor:
        """Source projections of texts on both classes' mean source gradients, `(texts, 2)`."""
        problem = self.problem
        found = [
            project_texts(
                problem.base_model,
                texts,
                problem.selection,
                self.means.source_means[sign],
                pad_token_id=problem.pad_token_id,
                batch_size=problem.args.per_device_eval_batch_size,
            )
            for sign in (+1, -1)
        ]
        return torch.stack([side_scores(-z, problem.args.source) for z in found], dim=1)


class AdamWSolver:
    """The paper's training, for several seeds at once on the same gradients.

    The base model's gradients do not depend on the GRADIEND, so k seeds cost k cheap updates and
    one pass through the base model.

    Args:
        problem: What to learn from.
        start: GRADIEND to start every seed from; `None` for random starts.
    """

    def __init__(self, problem: TrainingProblem, start: GradiendModel | None = None) -> None:
        args = problem.args
        self.problem = problem
        self.texts = {sign: problem.texts.of_sign(sign) for sign in (+1, -1)}
        n_batches = max(1, len(problem.texts.texts) // problem.batch_size)
        self.n_steps = (
            args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * n_batches)
        )
        settings = AdamWSettings(
            args.learning_rate,
            args.weight_decay,
            args.adam_beta1,
            args.adam_beta2,
            args.adam_epsilon,
        )
        self.updates = [
            FusedAdamW(_started(problem, args.seed + k, start), settings)
            for k in range(args.n_seeds)
        ]
        sides = tuple(dict.fromkeys((args.source, args.target)))
        self.values = {
            side: {e.name: torch.zeros(e.values_shape) for e in problem.selection} for side in sides
        }

    def step(self, stream: GradientStream, number: int) -> dict[str, float]:
        """One batch of one class, one forward and two backward passes, one update per seed.

        Raises:
            NumericalError: If a seed's loss is NaN.
        """
        args = self.problem.args
        batch = batch_at(self.texts, number, self.problem.batch_size, args.seed)
        self._fill_values(stream, batch)
        logs: dict[str, float] = {}
        for k, update in enumerate(self.updates):
            loss, h = update.step(self.values[args.source], self.values[args.target])
            if loss != loss:
                raise NumericalError(
                    f"Expected a finite training loss, but seed {args.seed + k} gave NaN at step "
                    f"{number}. Lower learning_rate, or check the base model's weights."
                )
            suffix = "" if len(self.updates) == 1 else f"_seed_{args.seed + k}"
            logs[f"loss{suffix}"] = loss
            logs[f"signed_encoding{suffix}"] = h * batch.sign
        return logs

    def models(self) -> list[GradiendModel]:
        """The GRADIEND of every seed, as it stands."""
        return [update.gradiend for update in self.updates]

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and moments of every seed."""
        return {
            f"seed_{k}.{name}": tensor
            for k, update in enumerate(self.updates)
            for name, tensor in update.state_tensors().items()
        }

    def _fill_values(self, stream: GradientStream, batch: ClassBatch) -> None:
        entries = {entry.name: entry for entry in self.problem.selection}
        for held in self.values.values():
            for tensor in held.values():
                tensor.zero_()

        def adder(side: str) -> Consume:
            def add(name: str, gradient: Tensor) -> None:
                self.values[side][name].add_(entries[name].gather(gradient))

            return add

        for part in self.problem.parts_of(batch.texts):
            losses = stream.losses(part, tuple(self.values))
            weight = part.n_texts / len(batch.texts)
            stream.backward_each({side: loss * weight for side, loss in losses.items()}, adder)
        for held in self.values.values():
            for tensor in held.values():
                self.problem.reduce(tensor)


def build_gradiend(
    selection: ParameterSelection,
    config: GradiendConfig,
    encoder: tuple[Mapping[str, Tensor], float],
    decoder: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
) -> GradiendModel:
    """A one-feature GRADIEND that takes over its tensors (selected values per name), no copy.

    Args:
        selection: Its weights.
        config: Its configuration.
        encoder: W_e and b_e.
        decoder: W_d and b_d.
    """
    weight, bias = decoder
    state: dict[str, Tensor] = {"encoder.bias": torch.tensor([encoder[1]], dtype=torch.float32)}
    for entry in selection:
        state[f"encoder.weight.{entry.name}"] = encoder[0][entry.name].unsqueeze(0)
        state[f"decoder.weight.{entry.name}"] = weight[entry.name].unsqueeze(0)
        state[f"decoder.bias.{entry.name}"] = bias[entry.name]
        if entry.indices is not None:
            state[f"indices.{entry.name}"] = entry.indices
    with torch.device("meta"):
        gradiend = GradiendModel(config)
    gradiend.load_state_dict(state, assign=True)
    return gradiend.eval()


def _started(problem: TrainingProblem, seed: int, start: GradiendModel | None) -> GradiendModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gradiend = GradiendModel(problem.config)
    if start is not None:
        gradiend.load_state_dict(start.state_dict())
    for entry in problem.selection:
        if entry.indices is not None:
            gradiend.indices.at(entry.name).copy_(entry.indices)
    return gradiend
