"""One GRADIEND with several axes, made of one-feature GRADIENDs so that no axis reads another's."""

from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import objective_of, pad_token_id_of
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.collation import prepare_texts
from hf_gradiend.errors import CompatibilityError, ConfigError, NumericalError
from hf_gradiend.gradients.forward import project_texts
from hf_gradiend.gradients.objectives import side_scores
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import selection_of
from hf_gradiend.training.calibration import fit_scale
from hf_gradiend.training.texts import label_texts

# Beyond this condition number of the matrix of readings two features are one to the encoders.
LARGEST_CONDITION = 100.0


def join_axes(
    gradiends: Sequence[GradiendModel],
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    datasets: Sequence[Dataset],
    *,
    n_texts: int | None = 128,
    batch_size: int = 32,
    progress: bool = True,
) -> GradiendModel:
    """One GRADIEND whose axes are the features of several, each blind to the others' classes.

    Let P_ij be how far encoder i's projections of feature j's two classes lie apart. The new
    encoder directions are those of P⁻¹ times the old ones: each axis tells its own classes apart,
    and the class means of every other feature project alike on it. Scale and bias are fitted as in
    the closed form. W_d of each axis is the old one, and b_d the mean of the old ones: the least in
    squared error when the features have as many texts.

    Args:
        gradiends: One-feature GRADIENDs with the same selection of weights, by any solver.
        base_model: Their base model; left as it was.
        processing_class: The base model's tokenizer.
        datasets: For each of them texts of its feature that the encoders were not made of, such as
            the validation split.
        n_texts: Largest number of texts of each feature to read, drawn evenly; `None` for all.
        batch_size: Texts per pass.
        progress: Show progress bars.

    Returns:
        A GRADIEND with one feature per axis, in the order given. `decode` and adapters take one h
        per axis.

    Raises:
        CompatibilityError: If the GRADIENDs cover different weights, or read different sources.
        ConfigError: If there are fewer than two, one has several features, or two use the name of a
            class for different words.
        NumericalError: If two features cannot be told apart.
        DataError: If a data set is not of its GRADIEND's classes.
    """  # noqa: DOC502 - DataError is raised by label_texts
    words = _checked(gradiends, datasets)
    first = gradiends[0]
    selection = selection_of(first)
    objective, pad = objective_of(base_model), pad_token_id_of(processing_class)
    readings: list[Tensor] = []  # for each feature, (texts, axes)
    signs: list[Tensor] = []
    for gradiend, dataset in zip(gradiends, datasets, strict=True):
        texts = prepare_texts(dataset, processing_class, objective)
        classes = _classes(gradiend)
        labelled = label_texts(texts, dataset, classes).balanced(n_texts, seed=0)
        projections = [
            project_texts(
                base_model,
                labelled.prepared(),
                selection,
                {name: reader.encoder.weight.at(name)[0] for name in reader.names},
                pad_token_id=pad,
                batch_size=batch_size,
                progress=f"Reading {'/'.join(classes)}" if progress else None,
            )
            for reader in gradiends
        ]
        source = first.config.source
        readings.append(torch.stack([side_scores(-z, source) for z in projections], 1).double())
        signs.append(torch.tensor(labelled.signs))
    mixing, offsets = separating(readings, signs)
    return _joined(gradiends, mixing, offsets, words)


def separating(readings: Sequence[Tensor], signs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mixture of projections by which each axis tells its own classes apart and no others.

    Args:
        readings: For each feature its texts' projections on every axis, `(texts, axes)`.
        signs: For each feature the signs of its texts, `(texts,)`.

    Returns:
        Mixture `(axes, axes)` and offsets `(axes,)`: h = tanh(mixture · z + offset).

    Raises:
        NumericalError: If two features cannot be told apart.
    """
    gaps = [z[s > 0].mean(0) - z[s < 0].mean(0) for z, s in zip(readings, signs, strict=True)]
    apart = torch.stack(gaps, 1)  # P: (axes, features)
    # Of what size the projections are says nothing about how far the features can be told apart.
    condition = float(torch.linalg.cond(apart / apart.norm(dim=1, keepdim=True)))
    if not condition < LARGEST_CONDITION:
        raise NumericalError(
            f"Expected features that differ, but their encoders read each other's texts alike "
            f"(condition number {condition:.3g}, at most {LARGEST_CONDITION:g}). Join other ones."
        )
    mixing = torch.linalg.inv(apart)
    offsets = torch.zeros(len(readings), dtype=torch.float64)
    for axis, (z, sign) in enumerate(zip(readings, signs, strict=True)):
        scale, offset = fit_scale(z @ mixing[axis], sign)
        mixing[axis] *= scale
        offsets[axis] = offset
    return mixing, offsets


@torch.no_grad()
def _joined(
    gradiends: Sequence[GradiendModel],
    mixing: Tensor,
    offsets: Tensor,
    words: Mapping[str, Sequence[str]],
) -> GradiendModel:
    config = gradiends[0].config.to_dict() | {
        "n_features": len(gradiends),
        "feature_classes": [list(_classes(gradiend)) for gradiend in gradiends],
        "feature_words": dict(words),
        "feature_factor": None,
        "step_size": None,
    }
    joined = GradiendModel(GradiendConfig.from_dict(config))
    joined.encoder.bias.copy_(offsets)
    for entry in selection_of(gradiends[0]):
        name = entry.name
        rows = torch.cat([g.encoder.weight.at(name).float() for g in gradiends])
        mixed = torch.tensordot(mixing.float(), rows, dims=1)
        joined.encoder.weight.at(name).copy_(mixed)
        joined.decoder.weight.at(name).copy_(
            torch.cat([g.decoder.weight.at(name) for g in gradiends])
        )
        biases = torch.stack([g.decoder.bias.at(name).float() for g in gradiends])
        joined.decoder.bias.at(name).copy_(biases.mean(0))
        if entry.indices is not None:
            joined.indices.at(name).copy_(entry.indices)
    return joined.eval()


def _classes(gradiend: GradiendModel) -> tuple[str, str]:
    positive, negative = (gradiend.config.feature_classes or [["+", "−"]])[0]
    return positive, negative


def _checked(
    gradiends: Sequence[GradiendModel], datasets: Sequence[Dataset]
) -> dict[str, list[str]]:
    """The words of all classes; refuses what cannot be joined.

    Raises:
        CompatibilityError: As `join_axes` says.
        ConfigError: As `join_axes` says.
    """
    if len(gradiends) < 2 or len(datasets) != len(gradiends):
        raise ConfigError(
            f"Expected two or more GRADIENDs with a data set each, but got {len(gradiends)} and "
            f"{len(datasets)}."
        )
    words: dict[str, list[str]] = {}
    for gradiend in gradiends:
        config, first = gradiend.config, gradiends[0].config
        if config.n_features != 1 or not config.feature_classes:
            raise ConfigError(
                f"Expected GRADIENDs of one feature that name their classes, but one has "
                f"{config.n_features} features with the classes {config.feature_classes}."
            )
        facts = (config.selection_fingerprint, config.source, config.target)
        expected = (first.selection_fingerprint, first.source, first.target)
        if facts != expected:
            raise CompatibilityError(
                f"Expected GRADIENDs of the same weights, source and target, but got {expected} "
                f"and {facts}. Train them with the same parameters, without pruning."
            )
        for name, held in (config.feature_words or {}).items():
            if words.setdefault(name, list(held)) != list(held):
                raise ConfigError(
                    f"Expected class names of one meaning, but {name!r} stands for {words[name]} "
                    f"and for {list(held)}. Rename the class in one of the data sets."
                )
    return words
