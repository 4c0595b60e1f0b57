"""GRADIENDs for several classes, all pairs or one against the rest, from one pass over the data.

Every pair's closed form is made of mean gradients: of the token of word class w over the texts of
class c. A text is read once for all pairs: one forward pass, and one backward pass per class. Texts
that read the same to the model, such as a template that every class's word fits, count for all of
their classes at once.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import check_base_model, objective_of, pad_token_id_of
from hf_gradiend.data.collation import PreparedTexts, TargetBatch
from hf_gradiend.data.neutral import neutral_to_fit
from hf_gradiend.errors import ConfigError
from hf_gradiend.gradients.backward import Consume, GradientStream, gradient_stream
from hf_gradiend.gradients.forward import project_texts
from hf_gradiend.gradients.packing import passes_over
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, select_parameters
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.calibration import fit_plane
from hf_gradiend.training.class_texts import ClassTexts, Pattern, class_texts
from hf_gradiend.training.contrasts import Contrast, all_pairs, one_against_rest, rows_of
from hf_gradiend.training.pruning import pruned_gradiend
from hf_gradiend.training.setup import gradiend_config, words_of_classes
from hf_gradiend.training.solvers import TOKENS_PER_PASS, build_gradiend
from hf_gradiend.training.trainer import GradiendTrainer

# What the shared pass can do; with other values each contrast is trained on its own.
SHARED_PASS = {
    "solver": "closed_form", "source": "factual", "target": "diff", "prune_fraction": None,
    "accumulator_dtype": "float32", "accumulator_device": "cpu", "shard": False,
}  # fmt: skip


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
                values = entries[name].gather(gradient).to(held[name])
                held[name].add_(values, alpha=batch.n_texts)

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
    eval_dataset: Dataset | None = None,
    neutral_texts: Sequence[str] | None = None,
) -> Iterator[tuple[Contrast, GradiendModel]]:
    """Learn all pairs of several classes, or each against the rest, from one pass over the data.

    The decoder of each is the one that `GradiendTrainer` would make of the same texts. Its encoder
    lies in the plane of the two sides' mean gradients, where it fits +1, −1 and, for neutral words,
    0 best: the difference of the means alone reads neutral words as one side wherever that side's
    gradients are the smaller ones.

    The closed form with source factual and target diff shares the pass. With other arguments of
    that kind, with `prune_fraction`, `shard` or another accumulator, each contrast is trained by
    `GradiendTrainer` from its own rows, one after the other.

    Args:
        base_model: Masked or causal language model with its head; left as it was.
        processing_class: Its tokenizer.
        args: Training arguments.
        train_dataset: Feature data set with two or more classes, for each text one row per other
            class.
        kind: `"pairs"` or `"rest"`.
        eval_dataset: Feature data set for `adamw` to choose seed and checkpoint on.
        neutral_texts: Texts without the feature to fit the encoders on; `None` for the package's
            own, English, of the split `train`.

    Returns:
        Contrasts (`contrast.name` is `"christian-jewish"`, or `"christian-rest"`) and their
        GRADIENDs, one after the other: each holds 3 · n_selected numbers.

    Raises:
        ConfigError: If the kind is another one, or there are several processes, which it does not
            use.
        DataError: If a text lacks the word of a class.
        BaseModelError: If the base model carries an adapter, is quantised, offloaded or broken.
    """  # noqa: DOC502 - DataError and BaseModelError are raised by what it calls
    if kind not in {"pairs", "rest"}:
        raise ConfigError(f"Expected the kind pairs or rest, but got {kind!r}.")
    if (n := PartialState(cpu=args.use_cpu).num_processes) > 1:
        raise ConfigError(
            f"Expected one process for several contrasts, but got {n}. Start one, or train each "
            f"pair on its own with feature_classes."
        )
    names = args.feature_classes or sorted(set(train_dataset["factual_class"]))
    if all(getattr(args, name) == value for name, value in SHARED_PASS.items()):
        learned = _together(base_model, processing_class, args, train_dataset, neutral_texts)
    else:
        learned = _one_by_one(
            base_model, processing_class, args, (train_dataset, eval_dataset), neutral_texts
        )
    contrasts = (all_pairs if kind == "pairs" else one_against_rest)(names)
    return ((contrast, learned(contrast)) for contrast in contrasts)


def _one_by_one(
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    args: GradiendTrainingArguments,
    data: tuple[Dataset, Dataset | None],
    neutral_texts: Sequence[str] | None,
) -> Callable[[Contrast], GradiendModel]:
    """Trains a contrast from its own rows for training and evaluation, in a folder of its own."""
    train_dataset, eval_dataset = data

    def learned(contrast: Contrast) -> GradiendModel:
        own = copy.copy(args)
        own.output_dir = str(Path(args.output_dir or "gradiend") / contrast.name)
        own.feature_classes = [contrast.positive.name, contrast.negative.name]
        trainer = GradiendTrainer(
            base_model,
            processing_class,
            own,
            rows_of(contrast, train_dataset),
            None if eval_dataset is None else rows_of(contrast, eval_dataset),
            neutral_texts=neutral_texts,
        )
        trainer.train()
        return trainer.model

    return learned


def _together(
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    args: GradiendTrainingArguments,
    train_dataset: Dataset,
    neutral_texts: Sequence[str] | None,
) -> Callable[[Contrast], GradiendModel]:
    """Passes over the data, then makes any contrast's GRADIEND from the sums."""
    check_base_model(base_model)
    objective = objective_of(base_model)
    texts = class_texts(
        train_dataset, processing_class, objective, args.feature_classes, max_length=args.max_length
    ).balanced(args.max_train_texts, args.seed)
    fitted, calibration = texts.split(args.calibration_fraction, args.seed)
    neutral = neutral_to_fit(neutral_texts, processing_class, objective, max_length=args.max_length)
    selection = select_parameters(base_model, args.parameters)
    pad = pad_token_id_of(processing_class)
    sums = _class_sums(base_model, selection, fitted, pad, args)
    # A side's mean is a mean of class means, so that these projections serve every contrast.
    of_classes = _on_class_means(base_model, sums, calibration.prepared(), pad, args)
    of_neutral = None if neutral is None else _on_class_means(base_model, sums, neutral, pad, args)
    words = words_of_classes(train_dataset)

    def learned(contrast: Contrast) -> GradiendModel:
        sides = (contrast.positive, contrast.negative)

        def on_sides(projections: Tensor) -> Tensor:
            means = [projections[..., list(side.classes)].mean(-1) for side in sides]
            return torch.stack(means, dim=-1)

        z, signs = _signed(on_sides(of_classes), calibration, contrast)
        own_words = None if of_neutral is None else on_sides(of_neutral)[:, 0]
        mixture, offset = fit_plane(z, signs, own_words)
        (direction, minus), weight, bias = sums.closed_form(contrast)
        for name, values in direction.items():
            values.mul_(mixture[0]).add_(minus.pop(name), alpha=mixture[1])
        of_side = {side.name: sorted({w for c in side.labels for w in words[c]}) for side in sides}
        config = gradiend_config(base_model, selection, args, list(of_side), of_side)
        made = build_gradiend(selection, config, (direction, offset), (weight, bias))
        return made if args.top_k is None else pruned_gradiend(made, args.top_k)

    return learned


def _class_sums(
    base_model: PreTrainedModel,
    selection: ParameterSelection,
    texts: ClassTexts,
    pad_token_id: int,
    args: GradiendTrainingArguments,
) -> WordSums:
    """The one pass over the data: gradients of every class's word, summed by pattern."""
    sums = WordSums(selection, texts)
    with (
        gradient_stream(
            base_model, selection, checkpointing=args.checkpoints_activations
        ) as stream,
        tqdm(
            total=len(texts.texts), desc="Class means", unit="text", disable=args.disable_tqdm
        ) as bar,
    ):
        for pattern in sums.patterns:
            own = [t for t, p in zip(texts.texts, texts.patterns, strict=True) if p == pattern]
            for _, part in passes_over(
                base_model, own, pad_token_id=pad_token_id, max_tokens=TOKENS_PER_PASS
            ):
                sums.add(stream, part, pattern)
                bar.update(part.n_texts)
    return sums


def _on_class_means(
    base_model: PreTrainedModel,
    sums: WordSums,
    texts: PreparedTexts,
    pad_token_id: int,
    args: GradiendTrainingArguments,
) -> Tensor:
    """Projections of texts' words on the mean gradient of each class, `(texts, words, classes)`."""
    found: list[Tensor] = []
    for k in range(len(sums.counts)):
        direction = {entry.name: sums.mean(entry.name, k, k) for entry in sums.selection}
        found.append(
            project_texts(
                base_model,
                texts,
                sums.selection,
                direction,
                pad_token_id=pad_token_id,
                batch_size=args.per_device_eval_batch_size,
                progress=None if args.disable_tqdm else f"Calibration {k + 1}/{len(sums.counts)}",
            )
        )
    return torch.stack(found, dim=-1)


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
