"""Several GRADIENDs of one base model side by side: their directions, and who reads whose texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.errors import CompatibilityError, ConfigError, DataError, NumericalError
from hf_gradiend.gradients.forward import encode_texts
from hf_gradiend.metrics import Estimate, bootstrap, pearson_correlation
from hf_gradiend.modeling_gradiend import Decoder, Encoder, GradiendModel
from hf_gradiend.parameters import SelectedParameter, layer_of, selection_of

Matrix = list[list[float | None]]  # (features, features); None where a value is not defined

REST = "rest"  # all other classes together, as `several_classes` names them
_BLOCK = 2**18  # weights that are in float64 at a time


@dataclass(frozen=True)
class Feature:
    """One axis of a GRADIEND.

    Args:
        name: The GRADIEND's name; of one with several features `"name/+-−"` with the classes of
            the axis, or `"name/0"` where they do not tell its axes apart.
        classes: The + class and the − class; `None` if the configuration does not hold them.
        n_selected: Number of base weights that it covers.
        energy_by_layer: Shares of ‖W_d‖² by layer, as `energy_by_layer` gives.
    """

    name: str
    classes: tuple[str, str] | None
    n_selected: int
    energy_by_layer: dict[int | None, float]


@dataclass(frozen=True)
class CrossReading:
    """What one axis reads in the texts of one pair of classes.

    Args:
        feature: Name of the axis.
        dataset: Name of the data set.
        classes: The class that counts as +1 and the one that counts as −1, the same for all axes.
        own: Whether they are the axis's own classes.
        correlation: Pearson correlation of h with the class, in [−1, 1]; `None` where all
            encodings are equal or one class is left. It does not say how far the classes lie apart.
        gap: Mean h of the + class minus mean h of the − class, in [−2, 2]; `None` likewise where
            one class is left.
        mean_absolute: Mean |h|, in [0, 1]; `None` where no text could be read.
        n: Number of texts that could be read.
    """

    feature: str
    dataset: str
    classes: tuple[str, str]
    own: bool
    correlation: Estimate | None
    gap: float | None
    mean_absolute: float | None
    n: int


@dataclass(frozen=True)
class FeatureComparison:
    """Several features of one base model side by side.

    Args:
        base_model: Name or path of the base model; empty if it has none.
        features: The axes, in the order of the matrices' rows and columns.
        encoder_cosines: Cosines of W_e, in [−1, 1]; `None` where one is zero everywhere.
        decoder_cosines: Cosines of W_d, likewise.
        top_k: Share of the smaller of two selections whose weights are compared.
        overlaps: |A ∩ B| / k of the k weights with the largest |W_d|, in [0, 1]; `None` where a
            W_d is zero everywhere.
        chance_overlaps: What k weights drawn at random from each selection would share.
        readings: For each axis and each pair of classes of each data set what it reads.
    """

    base_model: str
    features: tuple[Feature, ...]
    encoder_cosines: Matrix
    decoder_cosines: Matrix
    top_k: float
    overlaps: Matrix
    chance_overlaps: list[list[float]]
    readings: tuple[CrossReading, ...]


def compare_features(
    gradiends: Mapping[str, GradiendModel],
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    datasets: Mapping[str, Dataset],
    *,
    top_k: float = 0.01,
    progress: bool = True,
) -> FeatureComparison:
    """Compare GRADIENDs of one base model: directions, largest weights, layers, and readings.

    GRADIENDs may cover different weights: directions are compared over the union, in which a weight
    that one does not select is 0 there. A data set is read for the pairs of its classes that the
    GRADIENDs name (of several classes also one against `"rest"`), where they name none for all of
    its pairs. The + class is that of the first GRADIEND that names the pair, else the first by
    alphabet; it is the same for all, so that a GRADIEND of opposite sign correlates negatively.

    Args:
        gradiends: GRADIENDs by name. Each of several features counts on its own.
        base_model: Their base model; left as it was.
        processing_class: Its tokenizer.
        datasets: Feature data sets by name, each with one or more pairs of classes; may be empty.
        top_k: Share of the smaller of two selections, in (0, 1], for the overlap.
        progress: Show progress bars.

    Returns:
        The comparison, with 95 % bootstrap intervals (1,000 resamples) of the correlations.

    Raises:
        ConfigError: If there is no GRADIEND, two features have one name, or `top_k` is not in
            (0, 1].
        CompatibilityError: If a GRADIEND was made for another base model.
        DataError: If a data set has texts of one class alone, or none that can be read.
        NumericalError: If a GRADIEND holds NaN or infinity.

    References:
        Krishna et al. (2022), https://arxiv.org/abs/2202.01602, section 3.2 (the overlap, there
        called feature agreement).
    """  # noqa: DOC502 - raised by what it calls
    if not 0.0 < top_k <= 1.0:
        raise ConfigError(f"Expected top_k in (0, 1], but got {top_k!r}.")
    axes = _axes_of(gradiends, base_model)
    columns = [
        column for name, data in datasets.items() for column in _columns(name, data, axes)
    ]  # before the weights, which take longer
    encoders, decoders, energies = _inner_products(axes, base_model, progress)
    overlaps, chances = _overlaps(axes, decoders, top_k)
    return FeatureComparison(
        base_model=base_model.config.name_or_path or "",
        features=tuple(
            Feature(axis.name, axis.classes, axis.gradiend.config.n_selected, energy_by_layer(own))
            for axis, own in zip(axes, energies, strict=True)
        ),
        encoder_cosines=_cosines(encoders),
        decoder_cosines=_cosines(decoders),
        top_k=top_k,
        overlaps=overlaps,
        chance_overlaps=chances,
        readings=tuple(
            _cross_readings(axes, base_model, processing_class, datasets, columns, progress)
        ),
    )


def comparison_values(comparison: FeatureComparison) -> dict[str, object]:
    """A comparison as JSON values, for features.json and its figure.

    Layers are strings there, and weights outside of layers are under `"outside"`.
    """
    values = asdict(comparison)
    for feature in values["features"]:
        feature["energy_by_layer"] = {
            "outside" if layer is None else str(layer): share
            for layer, share in feature["energy_by_layer"].items()
        }
    for row in (*values["features"], *values["readings"]):
        row["classes"] = row["classes"] and list(row["classes"])
    return {
        "format": 1,
        **values,
        "features": list(values["features"]),
        "readings": list(values["readings"]),
    }


def energy_by_layer(energy: Mapping[str, float]) -> dict[int | None, float]:
    """Shares of the energy by layer.

    Args:
        energy: Squared norms by parameter name, as `GradiendModel.energy_by_parameter` gives.

    Returns:
        Shares that sum to 1, by number of the layer in rising order, then `None` for weights
        outside of layers; empty where all energies are 0.
    """
    total = sum(energy.values())
    shares: dict[int | None, float] = {}
    for name, value in energy.items():
        if total:
            shares[layer_of(name)] = shares.get(layer_of(name), 0.0) + value / total
    return {
        layer: shares[layer]
        for layer in sorted(shares, key=lambda layer: (layer is None, layer or 0))
    }


@dataclass(frozen=True)
class _Axis:
    """One feature of a GRADIEND, with what it covers under the base model's own names."""

    name: str
    gradiend: GradiendModel
    number: int
    classes: tuple[str, str] | None
    entries: dict[str, SelectedParameter]

    def top(self, n_kept: int) -> dict[str, SelectedParameter]:
        """The weights with the largest |W_d|."""
        selection = selection_of(self.gradiend)
        scores = {n: self.gradiend.decoder.weight.at(n)[self.number] for n in selection.names}
        top = selection.top_k(scores, fraction=n_kept / selection.n_selected)
        own_names = {entry.name: own for own, entry in self.entries.items()}
        return {own_names[entry.name]: entry for entry in top}


@dataclass(frozen=True)
class _Column:
    """The texts of one pair of classes of a data set: +1, −1, or 0 for texts of other pairs."""

    dataset: str
    classes: tuple[str, str]
    signs: Tensor


def _axes_of(gradiends: Mapping[str, GradiendModel], base_model: PreTrainedModel) -> list[_Axis]:
    if not gradiends:
        raise ConfigError("Expected at least one GRADIEND to compare, but got none.")
    names_of = {id(parameter): name for name, parameter in base_model.named_parameters()}
    axes: list[_Axis] = []
    for name, gradiend in gradiends.items():
        selection = selection_of(gradiend)
        try:
            parameters = selection.parameters(base_model).values()
        except CompatibilityError as error:
            raise CompatibilityError(f"The GRADIEND {name!r} does not fit. {error}") from error
        # One name for a weight, also where it is tied or one GRADIEND was made of the body alone.
        entries = {names_of[id(p)]: entry for p, entry in zip(parameters, selection, strict=True)}
        config = gradiend.config
        classes = [(positive, negative) for positive, negative in config.feature_classes or []]
        labels = ["-".join(pair) for pair in classes]
        if len(set(labels)) < config.n_features:
            labels = [str(number) for number in range(config.n_features)]
        for number, label in enumerate(labels):
            own = name if config.n_features == 1 else f"{name}/{label}"
            axes.append(_Axis(own, gradiend, number, classes[number] if classes else None, entries))
    names = [axis.name for axis in axes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"Expected features with names of their own, but two are {twice!r}.")
    return axes


def _inner_products(
    axes: Sequence[_Axis],
    base_model: PreTrainedModel,
    progress: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, list[dict[str, float]]]:
    """Inner products of W_e and of W_d, float64 `(axes, axes)`, and ‖W_d‖² by parameter.

    One parameter at a time: an encoder or decoder as a whole is never one vector.

    Raises:
        NumericalError: If a GRADIEND holds NaN or infinity.
    """
    shape = len(axes), len(axes)
    encoders, decoders = torch.zeros(2, *shape, dtype=torch.float64)
    energies: list[dict[str, float]] = [{} for _ in axes]
    covered = [
        name for name, _ in base_model.named_parameters() if any(name in a.entries for a in axes)
    ]
    for name in tqdm(covered, desc="Comparing weights", unit="parameter", disable=not progress):
        here = [number for number, axis in enumerate(axes) if name in axis.entries]
        place = torch.meshgrid(torch.tensor(here), torch.tensor(here), indexing="ij")
        own = [axes[number] for number in here]
        encoders[place] += _gram([_values(axis, axis.gradiend.encoder, name) for axis in own])
        found = _gram([_values(axis, axis.gradiend.decoder, name) for axis in own])
        decoders[place] += found
        for number, energy in zip(here, found.diagonal().tolist(), strict=True):
            energies[number][name] = energy
    for axis, length in zip(axes, encoders.diagonal() + decoders.diagonal(), strict=True):
        if not bool(length.isfinite()):
            raise NumericalError(
                f"Expected finite weights, but those of {axis.name!r} hold NaN or infinity."
            )
    return encoders, decoders, energies


def _values(axis: _Axis, coder: Encoder | Decoder, name: str) -> Tensor:
    """W_e or W_d over one base parameter, `(entries,)`, zero where the axis selects nothing."""
    entry = axis.entries[name]
    return entry.scatter(coder.weight.at(entry.name)[axis.number].detach()).reshape(-1)


def _gram(vectors: Sequence[Tensor]) -> Tensor:
    """Inner products of every two vectors, `(vectors, vectors)`, float64 on the CPU."""
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for parts in zip(*(vector.split(_BLOCK) for vector in vectors), strict=True):
        block = torch.stack([part.to("cpu", torch.float64) for part in parts])
        products += block @ block.T
    return products


def _cosines(products: Tensor) -> Matrix:
    lengths = products.diagonal().sqrt()
    return [
        [
            max(-1.0, min(1.0, product / (a * b))) if a and b else None
            for product, b in zip(row, lengths.tolist(), strict=True)
        ]
        for row, a in zip(products.tolist(), lengths.tolist(), strict=True)
    ]


def _overlaps(
    axes: Sequence[_Axis], decoders: Tensor, top_k: float
) -> tuple[Matrix, list[list[float]]]:
    """Shares of the largest weights that two axes have in common, and what chance would give."""
    sizes = [axis.gradiend.config.n_selected for axis in axes]
    empty = (decoders.diagonal() == 0).tolist()
    overlaps: Matrix = [[None] * len(axes) for _ in axes]
    chances = [[0.0] * len(axes) for _ in axes]
    tops: dict[tuple[int, int], dict[str, SelectedParameter]] = {}
    for i, size in enumerate(sizes):
        overlaps[i][i] = None if empty[i] else 1.0
        chances[i][i] = _n_of(top_k, size) / size
    for i, j in combinations(range(len(axes)), 2):
        k = _n_of(top_k, min(sizes[i], sizes[j]))
        n_common = _n_shared(axes[i].entries, axes[j].entries)
        chances[i][j] = chances[j][i] = k * n_common / (sizes[i] * sizes[j])
        if not (empty[i] or empty[j]):
            for number in (i, j):
                if (number, k) not in tops:
                    tops[number, k] = axes[number].top(k)
            overlaps[i][j] = overlaps[j][i] = _n_shared(tops[i, k], tops[j, k]) / k
    return overlaps, chances


def _n_of(share: float, size: int) -> int:
    return max(1, round(share * size))


def _n_shared(one: Mapping[str, SelectedParameter], other: Mapping[str, SelectedParameter]) -> int:
    """Number of base weights that are in both."""
    shared = 0
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.indices is None or b.indices is None:
            shared += min(a.n_selected, b.n_selected)  # one of them has all
        else:
            shared += int(torch.isin(a.indices.cpu(), b.indices.cpu(), assume_unique=True).sum())
    return shared


def _columns(name: str, data: Dataset, axes: Sequence[_Axis]) -> list[_Column]:
    """What a data set is read for: the classes that the axes name, or else all of its pairs.

    Raises:
        DataError: If all texts of a pair are of one class.
    """
    rows = list(zip(data["factual_class"], data["counterfactual_class"], strict=True))
    texts = list(zip(data["text"], data["factual"], strict=True))
    classes = {label for row in rows for label in row}
    told_apart = classes | {REST} if len(classes) > 2 else classes
    contrasts: dict[frozenset[str], tuple[str, str]] = {}
    for axis in axes:
        if axis.classes and told_apart.issuperset(axis.classes):
            contrasts.setdefault(frozenset(axis.classes), axis.classes)
    columns: list[_Column] = []
    for pair in contrasts.values() or sorted({(min(row), max(row)) for row in rows}):
        signs = _signs(rows, texts, pair, rest=pair[1] not in classes)
        if not (bool((signs > 0).any()) and bool((signs < 0).any())):
            raise DataError(
                f"Expected texts of both classes {pair[0]!r} and {pair[1]!r} in the data set "
                f"{name!r}, but it has {int((signs > 0).sum()):,} and {int((signs < 0).sum()):,}."
            )
        columns.append(_Column(name, pair, signs))
    return columns


def _signs(
    rows: Sequence[tuple[str, str]],
    texts: Sequence[tuple[str, str]],
    pair: tuple[str, str],
    *,
    rest: bool,
) -> Tensor:
    """+1 for texts of the + class, −1 for those of the − class, and 0 for all others.

    Args:
        rows: Class of the factual and of the counterfactual word of each row.
        texts: Text and factual word of each row.
        pair: The + class and the − class.
        rest: Whether the − class is all others together. There are rows of one text for each
            other class; the first of them counts.
    """
    signs: list[float] = []
    seen: set[tuple[str, str]] = set()
    for row, text in zip(rows, texts, strict=True):
        if rest:
            signs.append(0.0 if text in seen else 1.0 if row[0] == pair[0] else -1.0)
            seen.add(text)
        else:
            signs.append({pair: 1.0, pair[::-1]: -1.0}.get(row, 0.0))
    return torch.tensor(signs)


def _cross_readings(
    axes: Sequence[_Axis],
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    datasets: Mapping[str, Dataset],
    columns: Sequence[_Column],
    progress: bool,  # noqa: FBT001
) -> Iterator[CrossReading]:
    n_passes = len(datasets) * sum(axis.number == 0 for axis in axes)
    encodings: dict[str, Tensor] = {}
    silent = not (progress and n_passes)
    with tqdm(total=n_passes, desc="Cross-encoding", unit="data set", disable=silent) as bar:
        for axis in axes:
            if axis.number == 0:  # with it all other axes of its GRADIEND are read, too
                for name, data in datasets.items():
                    encodings[name] = encode_texts(
                        axis.gradiend, base_model, processing_class, data, progress=False
                    ).source
                    bar.update()
            for column in columns:
                yield _reading(axis, column, encodings[column.dataset][:, axis.number])


def _reading(axis: _Axis, column: _Column, encodings: Tensor) -> CrossReading:
    read = encodings.isfinite() & (column.signs != 0)
    h, y = encodings[read], column.signs[read]
    try:
        correlation = bootstrap(lambda i: pearson_correlation(h[i], y[i]), len(h))
    except ValueError:  # a constant has no correlation
        correlation = None
    return CrossReading(
        feature=axis.name,
        dataset=column.dataset,
        classes=column.classes,
        own=axis.classes is not None and {*axis.classes} == {*column.classes},
        correlation=correlation,
        gap=float(h[y > 0].mean() - h[y < 0].mean()) if len(y.unique()) == 2 else None,
        mean_absolute=float(h.abs().mean()) if len(h) else None,
        n=len(h),
    )
