"""The two solvers, behind one interface: a number of steps, a state to save, a model at the end."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.collation import PreparedText, PreparedTexts, TargetBatch
from hf_gradiend.errors import NumericalError
from hf_gradiend.gradients.backward import Consume, GradientStream
from hf_gradiend.gradients.forward import project_texts
from hf_gradiend.gradients.objectives import side_scores
from hf_gradiend.gradients.packing import batch_for, groups_for
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.calibration import fit_plane
from hf_gradiend.training.means import ClassMeans
from hf_gradiend.training.setup import with_parameters
from hf_gradiend.training.sharding import Share, shared_stream
from hf_gradiend.training.texts import LabelledTexts, batch_at, one_pass
from hf_gradiend.training.update import AdamWSettings, FusedAdamW

# Tokens per pass, so that the activations stay small however long and many the texts are.
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
        share: This process among the others, and what it keeps of the GRADIEND.
    """

    base_model: PreTrainedModel
    selection: ParameterSelection
    config: GradiendConfig
    texts: LabelledTexts
    neutral: PreparedTexts | None
    pad_token_id: int
    args: GradiendTrainingArguments
    share: Share = field(default_factory=Share)

    @property
    def batch_size(self) -> int:
        """Texts per step over all processes."""
        return self.args.per_device_train_batch_size * self.share.world_size

    @cached_property
    def own(self) -> ParameterSelection:
        """The part of the selection that this process keeps."""
        return self.share.of(self.selection)

    @cached_property
    def own_config(self) -> GradiendConfig:
        """Configuration of the GRADIEND over that part."""
        return with_parameters(self.config, self.own) if self.share.sharded else self.config

    def stream(
        self, selection: ParameterSelection | None = None
    ) -> AbstractContextManager[GradientStream]:
        """Gradients of the texts of `parts_of` for this process's part of the selection.

        Args:
            selection: Another selection of the base model's weights.
        """
        return shared_stream(
            self.base_model,
            selection or self.selection,
            self.share,
            checkpointing=self.args.checkpoints_activations,
        )

    def parts_of(self, texts: tuple[PreparedText, ...]) -> Iterator[TargetBatch]:
        """This process's share of a batch of texts, in parts of one forward pass each.

        A sharded GRADIEND needs as many parts of every process: one that has fewer repeats a text
        with weight 0.

        Yields:
            Batches, the longest texts first.
        """
        model, pad = self.base_model, self.pad_token_id
        n = self.share.world_size
        dealt = [groups_for(model, texts[r::n], max_tokens=TOKENS_PER_PASS) for r in range(n)]
        own = dealt[self.share.rank]
        for part in own:
            yield batch_for(model, part, pad)
        silent = max(map(len, dealt)) - len(own) if self.share.sharded else 0
        for _ in range(silent):
            batch = batch_for(model, texts[:1], pad)
            yield replace(batch, term_weights=torch.zeros_like(batch.term_weights))

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum what each process has of its own texts alone, in place; sharded it is summed yet."""
        return tensor if self.share.sharded else self.share.sum(tensor)

    def project(self, texts: PreparedTexts, direction: Mapping[str, Tensor]) -> Tensor:
        """Projections of the source gradients of texts on a direction, each process its texts.

        A sharded direction is put together on every process for the pass: n_selected numbers. Where
        the base model itself is sharded, forward mode does not work: there every process runs every
        text, one forward and one backward pass for each word.

        Args:
            texts: Tokenised texts, none of them skipped.
            direction: Values of the direction over `own` per name.

        Returns:
            Projections of shape `(texts,)`, float32, on the CPU; the same bits on all processes.
        """
        projected = self._by_backward if self.share.base_is_sharded else self._by_forward
        projections = self.share.sum(projected(texts, direction))  # -> (texts, words)
        return side_scores(-projections, self.args.source)

    def _by_forward(self, texts: PreparedTexts, direction: Mapping[str, Tensor]) -> Tensor:
        """Projections of this process's texts, 0 for the others."""
        direction = self.share.whole_values(self.selection, direction)
        own = PreparedTexts(texts.texts[self.share.rank :: self.share.world_size], texts.n_rows)
        if not own:
            return torch.zeros(texts.n_rows, len(texts[0].readings))
        found = project_texts(
            self.base_model,
            own,
            self.selection,
            direction,
            pad_token_id=self.pad_token_id,
            batch_size=self.args.per_device_eval_batch_size,
        )
        return found.nan_to_num_(0.0)  # project_texts has refused any other NaN

    def _by_backward(self, texts: PreparedTexts, direction: Mapping[str, Tensor]) -> Tensor:
        """Projections of all texts on this process's part of the direction."""
        own = {entry.name: entry for entry in self.own}
        projections = torch.zeros(texts.n_rows, len(texts[0].readings))
        with shared_stream(self.base_model, self.selection, self.share) as stream:
            for text in texts:
                batch = batch_for(self.base_model, [text], self.pad_token_id)

                def projector(word: int, row: Tensor = projections[text.index]) -> Consume:
                    def add(name: str, gradient: Tensor) -> None:
                        values = own[name].gather(gradient).flatten()
                        along = torch.dot(direction[name].to(values).flatten(), values)
                        row[word] += along.cpu() / self.share.world_size  # all had this text

                    return add

                stream.backward_each(stream.word_losses(batch), projector)
        return projections


class Solver(Protocol):
    """A way to make GRADIENDs from texts."""

    n_steps: int
    same_everywhere: bool  # whether every process has the same state

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
        self.same_everywhere = problem.share.world_size == 1  # sums, until the end
        self.means = ClassMeans(
            problem.own,
            source=args.source,
            target=args.target,
            class_sizes={sign: len(self.fitted.of_sign(sign)) for sign in (+1, -1)},
            dtype=getattr(torch, args.accumulator_dtype),
            device="cpu" if args.accumulator_device == "cpu" else problem.base_model.device,
        )

    def step(self, stream: GradientStream, number: int) -> dict[str, float]:
        """Add one batch to the class means."""
        batch = self.batches[number]
        sides = (self.problem.args.source, self.problem.args.target)
        logs = Counter({f"{side}_loss": 0.0 for side in sides})
        for part in self.problem.parts_of(batch.texts):
            found = self.means.add(stream, part, batch.sign)
            weight = part.n_texts / len(batch.texts)
            logs.update({name: weight * loss for name, loss in found.items()})
        return self.problem.share.sum_numbers(logs)

    def models(self) -> list[GradiendModel]:
        """The GRADIEND of the means, calibrated. Uses the means up: call it once, at the end."""
        for tensor in self.means.state_tensors().values():
            self.problem.reduce(tensor)
        mixture, offset = self._calibrate()
        encoder = (self.means.to_direction(mixture), offset)
        decoder = self.means.to_decoder()
        return [build_gradiend(self.problem.own, self.problem.own_config, encoder, decoder)]

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
        means = self.means.source_means
        return torch.stack([self.problem.project(texts, means[sign]) for sign in (+1, -1)], dim=1)


class AdamWSolver:
    """The paper's training, for several seeds at once on the same gradients.

    The base model's gradients do not depend on the GRADIEND, so k seeds cost k cheap updates and
    one pass through the base model. Beside GRADIENDs and moments it holds the source gradient; of
    the target gradient, each parameter updates its part of the decoders as it comes in. The target
    gradient is held, too, where a batch has several parts, or where several processes that each
    keep a whole GRADIEND are yet to sum it.

    Args:
        problem: What to learn from.
        start: GRADIEND to start from, which is updated in place; `None` for a random start of each
            seed.
    """

    def __init__(self, problem: TrainingProblem, start: GradiendModel | None = None) -> None:
        args = problem.args
        self.problem = problem
        self.texts = {sign: problem.texts.of_sign(sign) for sign in (+1, -1)}
        self.n_steps = adamw_steps(args, len(problem.texts.texts), problem.batch_size)
        settings = AdamWSettings(
            args.learning_rate,
            args.weight_decay,
            args.adam_beta1,
            args.adam_beta2,
            args.adam_epsilon,
        )
        share = problem.share
        self.same_everywhere = not share.sharded
        self.updates = [
            FusedAdamW(
                start or random_start(problem, args.seed + k),
                settings,
                n_selected=problem.selection.n_selected,
                # Whole GRADIENDs are the same on all processes: there is nothing to exchange.
                total=share.sum if share.sharded else lambda tensor: tensor,
                compiled=args.torch_compile,
            )
            for k in range(args.n_seeds)
        ]
        self.sums = {side: GradientSum(problem.own) for side in (args.source, args.target)}

    def step(self, stream: GradientStream, number: int) -> dict[str, float]:
        """One batch of one class, one forward and two backward passes, one update per seed.

        Raises:
            NumericalError: If a seed's loss is NaN.
        """
        args, share = self.problem.args, self.problem.share
        batch = batch_at(self.texts, number, self.problem.batch_size, args.seed)
        parts = list(self.problem.parts_of(batch.texts))
        weights = [part.n_texts / len(batch.texts) for part in parts]
        yet_to_sum = share.world_size > 1 and not share.sharded
        if len(parts) > 1 or args.source == args.target or yet_to_sum:
            found = self._update_after(stream, parts, weights)
        else:
            found = self._update_meanwhile(stream, parts[0], weights[0])
        logs: dict[str, float] = {}
        for k, (loss, h) in enumerate(found):
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

    def _update_after(
        self, stream: GradientStream, parts: Sequence[TargetBatch], weights: Sequence[float]
    ) -> list[tuple[float, float]]:
        """Hold both gradients, then update; returns loss and encoding of every seed."""
        for held in self.sums.values():
            held.begin()
        for part, weight in zip(parts, weights, strict=True):
            adders = {side: partial(held.add, weight) for side, held in self.sums.items()}
            stream.backward_each(stream.losses(part, tuple(adders)), adders.__getitem__)
        for held in self.sums.values():
            for tensor in held.finish().values():
                self.problem.reduce(tensor)
        source, target = self.problem.args.source, self.problem.args.target
        values = self.sums[source].values, self.sums[target].values
        return [update.step(*values) for update in self.updates]

    def _update_meanwhile(
        self, stream: GradientStream, part: TargetBatch, weight: float
    ) -> list[tuple[float, float]]:
        """Hold the source gradient and update while the target gradient comes in; likewise."""
        source, target = self.sums
        losses = stream.losses(part, (source, target))
        self.sums[source].begin()
        add = partial(self.sums[source].add, weight)
        stream.backward(losses[source], add, retain_graph=True)
        for update in self.updates:
            update.begin(self.sums[source].finish())
        left = {entry.name: entry for entry in self.problem.own}

        def decode(name: str, gradient: Tensor) -> None:
            values = left.pop(name).gather(gradient).to("cpu", torch.float32)
            values = values if weight == 1.0 else values * weight
            for update in self.updates:
                update.update_decoder(name, values)

        stream.backward(losses[target], decode)
        for name in tuple(left):  # which the loss does not reach
            decode(name, torch.zeros(left[name].shape))
        return [update.finish() for update in self.updates]


class GradientSum:
    """A batch's gradient of one side, summed over its parts: selected values per name, float32.

    Args:
        selection: Its weights; n_selected numbers are held from the first `begin` on.
    """

    def __init__(self, selection: ParameterSelection) -> None:
        self.entries = {entry.name: entry for entry in selection}
        self.values: dict[str, Tensor] = {}
        self.untouched: set[str] = set()  # whose values are those of an earlier batch

    def begin(self) -> None:
        """Take up a batch, from 0."""
        if not self.values:
            self.values = {name: torch.zeros(e.values_shape) for name, e in self.entries.items()}
        self.untouched = set(self.values)

    def add(self, weight: float, name: str, gradient: Tensor) -> None:
        """Add a part's gradient of one parameter.

        Args:
            weight: Share of the batch's texts that the part has.
            name: Name of the parameter.
            gradient: Gradient of the mean over the part's texts, of the parameter's shape.
        """
        held = self.values[name]
        values = self.entries[name].gather(gradient).to(held)
        if name in self.untouched:
            self.untouched.remove(name)
            torch.mul(values, weight, out=held)
        else:
            held.add_(values, alpha=weight)

    def finish(self) -> dict[str, Tensor]:
        """The sum; stays as it is until the next `begin`."""
        for name in self.untouched:
            self.values[name].zero_()
        return self.values


def adamw_steps(args: GradiendTrainingArguments, n_texts: int, batch_size: int) -> int:
    """Number of steps of `adamw`, at least one.

    Args:
        args: Training arguments; `max_steps` goes before `num_train_epochs`.
        n_texts: Number of training texts.
        batch_size: Texts per step over all processes.
    """
    if args.max_steps > 0:
        return args.max_steps
    return max(1, round(args.num_train_epochs * max(1, n_texts // batch_size)))


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


def random_start(problem: TrainingProblem, seed: int) -> GradiendModel:
    """This process's share of a random GRADIEND, the same one however it is shared.

    Holds one parameter's numbers more than the share.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = problem.selection.n_selected**-0.5
    own = {entry.name: entry for entry in problem.own}

    def drawn(limit: float) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for entry in problem.selection:
            shape = own[entry.name].values_shape
            if limit:
                whole = torch.empty(entry.n_selected).uniform_(-limit, limit, generator=generator)
                values[entry.name] = whole[problem.share.span(entry)].clone().view(shape)
            else:
                values[entry.name] = torch.zeros(shape)
        return values

    limit = bound if problem.config.decoder_initialization == "uniform" else 0.0
    bias = float(torch.empty(1).uniform_(-bound, bound, generator=generator))
    return build_gradiend(
        problem.own, problem.own_config, (drawn(bound), bias), (drawn(limit), drawn(limit))
    )
