"""GRADIENDs for several classes, all pairs or one against the rest, from one pass over the data.

Every pair's closed form is made of mean gradients: of the token of word class w over the texts of
class c. A text is read once for all pairs: one forward pass, and one backward pass per class. Texts
that read the same to the model, such as a template that every class's word fits, count for all of
their classes at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import Objective, check_base_model, objective_of, pad_token_id_of
from hf_gradiend.data.collation import PreparedText, PreparedTexts, TargetBatch, prepare_texts
from hf_gradiend.data.neutral import neutral_readings
from hf_gradiend.data.templates import build_neutral_texts
from hf_gradiend.errors import ConfigError
from hf_gradiend.gradients.backward import Consume, GradientStream, gradient_stream
from hf_gradiend.gradients.forward import project_texts
from hf_gradiend.metrics import sign_accuracy
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, select_parameters
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.class_texts import ClassTexts, Pattern, class_texts
from hf_gradiend.training.pruning import pruned_gradiend
from hf_gradiend.training.setup import gradiend_config, words_of_classes
from hf_gradiend.training.solvers import build_gradiend, fit_scale, padded_parts

N_NEUTRAL = 96  # neutral texts that the encoders are fitted on


@dataclass(frozen=True)
class Side:
    """One side of a contrast: a class, or several taken together.

    Args:
        name: Its name.
        classes: Numbers of its classes.
        labels: Their names.
    """

    name: str
    classes: tuple[int, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Contrast:
    """What one GRADIEND tells apart.

    Args:
        positive: What encodes to +1.
        negative: What encodes to −1.
    """

    positive: Side
    negative: Side

    @property
    def name(self) -> str:
        """For folders and tables: `"christian-jewish"`."""
        return f"{self.positive.name}-{self.negative.name}"


def all_pairs(classes: Sequence[str]) -> list[Contrast]:
    """Every pair of classes, in order.

    Args:
        classes: Names of the classes.
    """
    sides = [Side(name, (k,), (name,)) for k, name in enumerate(classes)]
    return [Contrast(one, other) for one, other in combinations(sides, 2)]


def one_against_rest(classes: Sequence[str]) -> list[Contrast]:
    """Each class against all the others together.

    Args:
        classes: Names of the classes.
    """
    contrasts: list[Contrast] = []
    for k, name in enumerate(classes):
        others = tuple(other for other in range(len(classes)) if other != k)
        rest = Side("rest", others, tuple(classes[other] for other in others))
        contrasts.append(Contrast(Side(name, (k,), (name,)), rest))
    return contrasts


def rows_of(contrast: Contrast, dataset: Dataset) -> Dataset:
    """The rows that a contrast is about, under the names of its two sides; each text once.

    Args:
        contrast: What is told apart.
        dataset: Feature data set with several classes.
    """
    side_of = {label: s.name for s in (contrast.positive, contrast.negative) for label in s.labels}
    classes = zip(dataset["factual_class"], dataset["counterfactual_class"], strict=True)
    texts = zip(dataset["text"], dataset["factual"], strict=True)
    seen: set[tuple[str, str]] = set()
    chosen: list[int] = []
    for row, ((own, other), text) in enumerate(zip(classes, texts, strict=True)):
        of_two_sides = {own, other} <= side_of.keys() and side_of[own] != side_of[other]
        if of_two_sides and text not in seen:
            chosen.append(row)
            seen.add(text)
    rows = dataset.select(chosen)
    for column in ("factual_class", "counterfactual_class"):
        named = [side_of[label] for label in rows[column]]
        rows = rows.remove_columns(column).add_column(column, named)  # pyright: ignore[reportCallIssue] - datasets fills the fingerprint in
    return rows


class WordSums:
    """Sums of the gradients of each class's word over the texts of each pattern, float32.

    Holds (number of patterns) · (number of classes) · n_selected numbers.

    Args:
        selection: Weights whose gradients are summed.
        texts: The texts that will be added.
    """

    def __init__(self, selection: ParameterSelection, texts: ClassTexts) -> None:
        self.selection = selection
        self.counts = texts.counts()
        self.patterns = sorted(set(texts.patterns))
        self.sums = {
            (pattern, word): {entry.name: torch.zeros(entry.values_shape) for entry in selection}
            for pattern in self.patterns
            for word in range(len(texts.classes))
        }

    def add(self, stream: GradientStream, batch: TargetBatch, pattern: Pattern) -> None:
        """Add a batch whose texts all have one pattern: one forward pass, a backward per class."""
        entries = {entry.name: entry for entry in self.selection}

        def adder(word: int) -> Consume:
            held = self.sums[pattern, word]

            def add(name: str, gradient: Tensor) -> None:
                held[name].add_(entries[name].gather(gradient), alpha=batch.n_texts)

            return add

        stream.backward_each(stream.word_losses(batch), adder)

    def mean(self, name: str, of_class: int, word: int) -> Tensor:
        """Mean gradient of a class's word over the texts of a class, for one parameter."""
        held = [self.sums[p, word][name] for p in self.patterns if of_class in p]
        return sum(held[1:], held[0]) / self.counts[of_class]

    def closed_form(
        self, contrast: Contrast
    ) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
        """The directions E[x|+] and E[x|−], W_d and b_d of a contrast; source factual, target diff.

        Each side is the mean of its classes; a class's counterfactuals are the other side's.
        """
        directions: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        weight: dict[str, Tensor] = {}
        bias: dict[str, Tensor] = {}
        for entry in self.selection:
            sides = (
                (contrast.positive.classes, contrast.negative.classes),
                (contrast.negative.classes, contrast.positive.classes),
            )
            source, target = zip(
                *(self._side(entry.name, own, others) for own, others in sides), strict=True
            )
            for held, mean in zip(directions, source, strict=True):
                held[entry.name] = mean
            weight[entry.name] = (target[0] - target[1]) / 2
            bias[entry.name] = (target[0] + target[1]) / 2
        return directions, weight, bias

    def _side(self, name: str, own: Sequence[int], others: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean source and mean target of the texts of some classes."""
        source = _mean([self.mean(name, c, c) for c in own])
        return source, source - _mean([self.mean(name, c, w) for c in own for w in others])


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0]) / len(tensors)


def train_contrasts(
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    args: GradiendTrainingArguments,
    train_dataset: Dataset,
    *,
    kind: str = "pairs",
    neutral_texts: Sequence[str] | None = None,
) -> Iterator[tuple[Contrast, GradiendModel]]:
    """Learn all pairs of several classes, or each against the rest, from one pass over the data.

    The decoder of each is the one that `GradiendTrainer` would make of the same texts. Its encoder
    lies in the plane of the two sides' mean gradients, where it fits +1, −1 and, for neutral words,
    0 best: the difference of the means alone reads neutral words as one side wherever that side's
    gradients are the smaller ones.

    Args:
        base_model: Masked or causal language model with its head; left as it was.
        processing_class: Its tokenizer.
        args: Training arguments: solver `closed_form`, source `factual`, target `diff`.
        train_dataset: Feature data set with two or more classes, for each text one row per other
            class.
        kind: `"pairs"` or `"rest"`.
        neutral_texts: Texts without the feature to fit the encoders on; `None` for the package's
            own, English, of the split `train`.

    Returns:
        Contrasts (`contrast.name` is `"christian-jewish"`, or `"christian-rest"`) and their
        GRADIENDs, one after the other: each holds 3 · n_selected numbers.

    Raises:
        ConfigError: If the arguments ask for something else than the closed form of the difference.
        DataError: If a text lacks the word of a class.
        BaseModelError: If the base model carries an adapter, is quantised, offloaded or broken.
    """  # noqa: DOC502 - DataError and BaseModelError are raised by what it calls
    _check(args, kind)
    check_base_model(base_model)
    objective = objective_of(base_model)
    texts = class_texts(
        train_dataset, processing_class, objective, args.feature_classes, max_length=args.max_length
    ).balanced(args.max_train_texts, args.seed)
    fitted, calibration = texts.split(args.calibration_fraction, args.seed)
    selection = select_parameters(base_model, args.parameters)
    pad = pad_token_id_of(processing_class)
    sums = WordSums(selection, fitted)
    with (
        gradient_stream(base_model, selection) as stream,
        tqdm(total=len(fitted.texts), desc="Class means", unit="text", disable=args.disable_tqdm)
        as bar,
    ):  # fmt: skip
        for pattern in sums.patterns:
            own = [t for t, p in zip(fitted.texts, fitted.patterns, strict=True) if p == pattern]
            for part in padded_parts(own, pad, base_model.device):
                sums.add(stream, part, pattern)
                bar.update(part.n_texts)
    contrasts = (all_pairs if kind == "pairs" else one_against_rest)(texts.classes)
    words = words_of_classes(train_dataset)
    neutral = _neutral_readings(neutral_texts, processing_class, objective)

    def gradiend(contrast: Contrast) -> GradiendModel:
        directions, *decoder = sums.closed_form(contrast)
        classes, others = (
            torch.stack([
                project_texts(base_model, texts, selection, direction, pad_token_id=pad,
                              batch_size=args.per_device_eval_batch_size)
                for direction in directions
            ], -1)
            for texts in (calibration.prepared(), neutral)
        )  # fmt: skip
        z, signs = _signed(classes, calibration, contrast)
        mixture, offset = fit_plane(z, signs, others[:, 0])
        direction = directions[0]
        for name, values in direction.items():
            values.mul_(mixture[0]).add_(directions[1].pop(name), alpha=mixture[1])
        sides = (contrast.positive, contrast.negative)
        of_side = {s.name: sorted({w for k in s.classes for w in words[names[k]]}) for s in sides}
        config = gradiend_config(base_model, selection, args, list(of_side), of_side)
        made = build_gradiend(selection, config, (direction, offset), (decoder[0], decoder[1]))
        return made if args.top_k is None else pruned_gradiend(made, args.top_k)

    names = texts.classes
    contrasts = (all_pairs if kind == "pairs" else one_against_rest)(names)
    return ((contrast, gradiend(contrast)) for contrast in contrasts)


def _signed(projections: Tensor, texts: ClassTexts, contrast: Contrast) -> tuple[Tensor, Tensor]:
    """Projections of each text's own words, with the side that each is on.

    Args:
        projections: Of every class's word on both directions, `(texts, classes, 2)`.
        texts: The texts.
        contrast: The two sides; texts of other classes are left out.
    """
    values: list[Tensor] = []
    signs: list[int] = []
    for row, pattern in enumerate(texts.patterns):
        for k in pattern:
            sign = (k in contrast.positive.classes) - (k in contrast.negative.classes)
            if sign:
                values.append(projections[row, k])
                signs.append(sign)
    return torch.stack(values), torch.tensor(signs)


def _neutral_readings(
    texts: Sequence[str] | None, processing_class: PreTrainedTokenizerBase, objective: Objective
) -> PreparedTexts:
    if texts is None:
        texts = build_neutral_texts()["train"]["text"][:N_NEUTRAL]
    rows = neutral_readings(texts[:N_NEUTRAL])
    prepared = prepare_texts(rows, processing_class, objective, words=("factual",))
    numbered = (PreparedText(row, text.readings) for row, text in enumerate(prepared))
    return PreparedTexts(tuple(numbered), n_rows=len(prepared))


def fit_plane(z: Tensor, signs: Tensor, neutral: Tensor) -> tuple[tuple[float, float], float]:
    """Mixture of two projections that reads the sides as ±1 and neutral words as 0.

    Least squares with each of the three groups of equal weight, then scaled as by `fit_scale`. The
    plain difference is kept where that would tell the sides apart less often.

    Args:
        z: Projections of the sides' texts on E[x|+] and E[x|−], `(texts, 2)`.
        signs: +1 or −1, `(texts,)`.
        neutral: Projections of neutral words, `(words, 2)`.

    Returns:
        Mixture and offset of h = tanh(mixture · z + offset).

    Raises:
        NumericalError: If the sides' means are not finite or not in order.
    """  # noqa: DOC502 - raised by fit_scale
    z, neutral = z.double(), neutral.double()
    difference = torch.tensor([1.0, -1.0], dtype=torch.float64)
    plain, plane = (
        _scaled(z, signs, mixture) for mixture in (difference, _least_squares(z, signs, neutral))
    )

    def accuracy(fit: tuple[tuple[float, float], float]) -> float:
        mixture, offset = fit
        return sign_accuracy(mixture[0] * z[:, 0] + mixture[1] * z[:, 1] + offset, signs)

    return max((plane, plain), key=accuracy)  # the first where they are alike


def _least_squares(z: Tensor, signs: Tensor, neutral: Tensor) -> Tensor:
    unit = z.std()
    rows, targets = [], []
    for values, target in ((z[signs > 0], 1.0), (z[signs < 0], -1.0), (neutral, 0.0)):
        weight = len(values) ** -0.5
        ones = torch.ones(len(values), 1, dtype=torch.float64)
        rows.append(weight * torch.cat([values / unit, ones], 1))
        targets.append(torch.full((len(values), 1), weight * target, dtype=torch.float64))
    fitted = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets), driver="gelsd").solution
    return fitted[:2, 0] / unit


def _scaled(z: Tensor, signs: Tensor, mixture: Tensor) -> tuple[tuple[float, float], float]:
    scale, offset = fit_scale(z @ mixture, signs)
    first, second = (scale * mixture).tolist()
    return (first, second), offset


def _check(args: GradiendTrainingArguments, kind: str) -> None:
    if kind not in {"pairs", "rest"}:
        raise ConfigError(f"Expected the kind pairs or rest, but got {kind!r}.")
    if args.prune_fraction is not None:
        raise ConfigError("Expected no prune_fraction for several classes. Use top_k instead.")
    if (args.solver, args.source, args.target) != ("closed_form", "factual", "diff"):
        raise ConfigError(
            f"Expected the closed form with source factual and target diff for several classes, "
            f"but got {args.solver}, {args.source} and {args.target}. Train other pairs one by one."
        )
