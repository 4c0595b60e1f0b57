"""What the encoder reads: the classes, neutral tokens, and words it was never trained on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.data.neutral import neutral_readings
from hf_gradiend.errors import ConfigError, DataError, NumericalError
from hf_gradiend.gradients.forward import encode_texts
from hf_gradiend.metrics import (
    Estimate,
    auc,
    bootstrap,
    pearson_correlation,
    sign_accuracy,
    three_way_accuracy,
)
from hf_gradiend.modeling_gradiend import GradiendModel


@dataclass(frozen=True)
class SplitReport:
    """How well the encoder tells the two classes of one split apart.

    A correlation near 1 is nearly built in: the gradient is that of a *given* token. The harder
    readings are the neutral tokens and the transfer table.

    Args:
        correlation: Pearson correlation of h with the class's sign, in [−1, 1].
        accuracy: Share of texts on the side of their class, in [0, 1].
        three_way_accuracy: Balanced accuracy of the rule with neutral tokens at 0, in [0, 1].
        auc_against_neutral: For each class, P(h further out than a neutral token's), in [0, 1].
        mean_absolute: Mean |h| for each class, in [0, 1].
        counterfactual_correlation: Correlation of the counterfactual token's h with the factual
            class's sign; near −1, since that token flips h. `None` when the source is `"diff"`.
        encodings: h of every text, for each class.
    """

    correlation: Estimate
    accuracy: Estimate
    three_way_accuracy: Estimate
    auc_against_neutral: dict[str, float]
    mean_absolute: dict[str, Estimate]
    counterfactual_correlation: float | None
    encodings: dict[str, list[float]]


@dataclass(frozen=True)
class TransferPair:
    """Mean encodings of a pair of words that were never trained on, in the same contexts.

    Args:
        pair: The two words, the one of the + class first.
        kind: `"feature"` for words of the feature, `"neutral"` for ordinary words.
        positive: Mean h of the first word.
        negative: Mean h of the second word.
    """

    pair: str
    kind: str
    positive: float
    negative: float


@dataclass(frozen=True)
class OtherClass:
    """What the encoder reads in the words of a class that it does not tell apart.

    Args:
        mean: Mean h, in [−1, 1]; near ±1 the encoder takes the class for one of its own.
        mean_absolute: Mean |h|, in [0, 1]; lower is better.
    """

    mean: Estimate
    mean_absolute: Estimate


@dataclass(frozen=True)
class EncoderReport:
    """What the encoder of a GRADIEND reads.

    Args:
        classes: The + class and the − class.
        splits: One report per split.
        neutral: Mean |h| of ordinary words in neutral texts, in [0, 1]; lower is better.
        neutral_encodings: h of each of them.
        transfer: Word pairs that were never trained on.
        transfer_in_order: Share of the feature's pairs whose + word reads higher, in [0, 1]; 0.5 is
            chance. `None` without transfer data.
        transfer_gap: Mean difference of h between the two words of the feature's pairs.
        other_classes: By class, what is read in texts with words of the data set's other classes.
    """

    classes: tuple[str, str]
    splits: dict[str, SplitReport]
    neutral: Estimate
    neutral_encodings: list[float]
    transfer: list[TransferPair]
    transfer_in_order: Estimate | None
    transfer_gap: Estimate | None
    other_classes: dict[str, OtherClass] = field(default_factory=dict)


def class_names(gradiend: GradiendModel) -> tuple[str, str]:
    """Names of the + class and of the − class of a GRADIEND's first feature.

    Raises:
        ConfigError: If its configuration does not hold them.
    """
    if not gradiend.config.feature_classes:
        raise ConfigError(
            "Expected a GRADIEND that names its classes, but its configuration has none. Set "
            "config.feature_classes."
        )
    positive, negative = gradiend.config.feature_classes[0]
    return positive, negative


def evaluate_encoder(  # noqa: PLR0913 - a model, its texts, and how to run
    gradiend: GradiendModel,
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    splits: Mapping[str, Dataset],
    neutral_texts: Sequence[str],
    *,
    transfer: Dataset | None = None,
    other_texts: Dataset | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> EncoderReport:
    """Read texts, neutral tokens and untrained words with a GRADIEND's encoder.

    Args:
        gradiend: GRADIEND of one feature.
        base_model: Its base model; left as it was.
        processing_class: The base model's tokenizer.
        splits: Feature data sets by name, such as `{"test": data["test"]}`.
        neutral_texts: Texts without the feature.
        transfer: Rows with `text`, `factual`, `counterfactual`, `pair` and `kind`, as
            `hf_gradiend.data.templates.transfer_pairs` makes them.
        other_texts: Texts of other classes than the GRADIEND's two.
        batch_size: Texts per forward pass.
        max_length: Longest input in tokens.
        seed: Seed of the neutral words and of the bootstrap.
        progress: Show progress bars.

    Returns:
        The report, with 95 % bootstrap intervals (1,000 resamples).

    Raises:
        DataError: If the GRADIEND's classes are not those of the data, a split has texts of one
            class alone, or nothing can be read.
        NumericalError: If all texts of a split have the same encoding.
    """  # noqa: DOC502 - raised by what it calls
    positive, negative = class_names(gradiend)
    run = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
    neutral_rows = neutral_readings(neutral_texts, seed=seed)
    neutral = encode_texts(gradiend, base_model, processing_class, neutral_rows, **run).source[:, 0]
    neutral = neutral[neutral.isfinite()]
    reports: dict[str, SplitReport] = {}
    for name, dataset in splits.items():
        read = encode_texts(gradiend, base_model, processing_class, dataset, **run)
        signs = _signs(dataset["factual_class"], positive, negative)
        _check_variety(name, read.source[:, 0], signs)
        counter = None if read.counterfactual is None else read.counterfactual[:, 0]
        reports[name] = _split_report(
            read.source[:, 0], counter, signs, neutral, (positive, negative), seed
        )
    pairs: list[TransferPair] = []
    if transfer is not None:
        read = encode_texts(gradiend, base_model, processing_class, transfer, **run)
        if read.factual is not None and read.counterfactual is not None:
            pairs = _transfer_pairs(transfer, read.factual[:, 0], read.counterfactual[:, 0])
    others: dict[str, OtherClass] = {}
    if other_texts is not None:
        read = encode_texts(gradiend, base_model, processing_class, other_texts, **run)
        others = _other_classes(other_texts["factual_class"], read.source[:, 0], seed)
    gaps = torch.tensor([p.positive - p.negative for p in pairs if p.kind == "feature"])
    return EncoderReport(
        classes=(positive, negative),
        splits=reports,
        neutral=_mean(neutral.abs(), seed),
        neutral_encodings=neutral.tolist(),
        transfer=pairs,
        transfer_in_order=_mean((gaps > 0).float(), seed) if len(gaps) else None,
        transfer_gap=_mean(gaps, seed) if len(gaps) else None,
        other_classes=others,
    )


def _signs(classes: Sequence[str], positive: str, negative: str) -> Tensor:
    if {*classes} - {positive, negative}:
        raise DataError(
            f"Expected the GRADIEND's classes {positive!r} and {negative!r}, but the data set has "
            f"{sorted({*classes})}."
        )
    return torch.tensor([1.0 if name == positive else -1.0 for name in classes])


def _check_variety(split: str, encodings: Tensor, signs: Tensor) -> None:
    """Refuse a split for which no correlation is defined.

    Raises:
        DataError: If its readable texts are of one class.
        NumericalError: If they all have the same encoding.
    """
    read = encodings.isfinite()
    h, y = encodings[read], signs[read]
    if bool((y == y[0]).all()):
        raise DataError(
            f"Expected texts of both classes in the split {split!r}, but all of its {len(y):,} "
            f"readable texts are of one."
        )
    if bool((h == h[0]).all()):
        raise NumericalError(
            f"Expected encodings that differ, but all {len(h):,} texts of the split {split!r} read "
            f"{float(h[0]):.3g}. The GRADIEND has learned nothing, or was made for another model."
        )


def _split_report(
    encodings: Tensor,
    counterfactual: Tensor | None,
    signs: Tensor,
    neutral: Tensor,
    classes: tuple[str, str],
    seed: int,
) -> SplitReport:
    read = encodings.isfinite()
    h, y = encodings[read], signs[read]
    both = torch.cat([h, neutral])
    labels = torch.cat([y, torch.zeros(len(neutral))])
    of_class = {classes[0]: h[y > 0], classes[1]: h[y < 0]}
    return SplitReport(
        correlation=bootstrap(lambda i: pearson_correlation(h[i], y[i]), len(h), seed=seed),
        accuracy=bootstrap(lambda i: sign_accuracy(h[i], y[i]), len(h), seed=seed),
        three_way_accuracy=bootstrap(
            lambda i: three_way_accuracy(both[i], labels[i]), len(both), seed=seed
        ),
        auc_against_neutral={
            classes[0]: auc(of_class[classes[0]], neutral),
            classes[1]: auc(-of_class[classes[1]], -neutral),
        },
        mean_absolute={name: _mean(values.abs(), seed) for name, values in of_class.items()},
        counterfactual_correlation=(
            None if counterfactual is None else pearson_correlation(counterfactual[read], y)
        ),
        encodings={name: values.tolist() for name, values in of_class.items()},
    )


def _transfer_pairs(rows: Dataset, positive: Tensor, negative: Tensor) -> list[TransferPair]:
    members: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(rows["pair"], rows["kind"], strict=True)):
        members.setdefault(key, []).append(row)
    return [
        TransferPair(pair, kind, float(positive[found].nanmean()), float(negative[found].nanmean()))
        for (pair, kind), found in members.items()
        if bool(positive[found].isfinite().any())  # else none of its contexts could be read
    ]


def _other_classes(classes: Sequence[str], encodings: Tensor, seed: int) -> dict[str, OtherClass]:
    of_class: dict[str, list[float]] = {}
    for label, h in zip(classes, encodings.tolist(), strict=True):
        if not math.isnan(h):  # without room for its target
            of_class.setdefault(label, []).append(h)
    found = {label: torch.tensor(values) for label, values in sorted(of_class.items())}
    return {label: OtherClass(_mean(h, seed), _mean(h.abs(), seed)) for label, h in found.items()}


def _mean(values: Tensor, seed: int) -> Estimate:
    return bootstrap(lambda i: float(values[i].mean()), len(values), seed=seed)
