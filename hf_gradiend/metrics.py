"""Statistics of encodings: plain functions of tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % bootstrap interval.

    Args:
        value: The statistic on the whole sample.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of items.
    """

    value: float
    low: float
    high: float
    n: int


def pearson_correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of two samples, in [−1, 1].

    Args:
        x: Sample of shape `(n,)`.
        y: Sample of shape `(n,)`.

    Returns:
        The correlation, computed in float64.

    Raises:
        ValueError: If a sample is constant, for which the correlation is not defined.
    """
    # Compared, not centred: the mean of equal numbers may differ from them in the last digit.
    if bool((x == x[:1]).all()) or bool((y == y[:1]).all()):
        raise ValueError("Expected two samples that vary, but one is constant: no correlation.")
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x @ y / (x.norm() * y.norm())).clamp(-1.0, 1.0))


def sign_accuracy(encodings: Tensor, signs: Tensor) -> float:
    """Share of encodings on the side of their class, in [0, 1]; higher is better, 0.5 is chance.

    Args:
        encodings: h of shape `(n,)`.
        signs: +1 or −1 of shape `(n,)`. An encoding of exactly 0 is on neither side.
    """
    return float((encodings.sign() == signs.sign()).double().mean())


def three_way_accuracy(encodings: Tensor, labels: Tensor, threshold: float = 0.5) -> float:
    """Balanced accuracy of the rule h > ½ → +1, h < −½ → −1, else 0, in [0, 1].

    Args:
        encodings: h of shape `(n,)`.
        labels: +1, −1 or 0 (neutral) of shape `(n,)`.
        threshold: Where the neutral band ends.

    Returns:
        Mean over the labels that occur of the share that is read right; chance is 1 / number of
        labels.

    References:
        Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 5 (encoder
        evaluation).
    """
    read = (encodings > threshold).long() - (encodings < -threshold).long()
    shares = [(read[labels == label] == label).double().mean() for label in labels.unique()]
    return float(torch.stack(shares).mean())


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: P(positive > negative) + ½·P(equal), in [0, 1]; 0.5 is chance.

    Args:
        positive: Scores of shape `(n,)`.
        negative: Scores of shape `(m,)`.
    """
    ordered = negative.double().sort().values
    below = torch.searchsorted(ordered, positive.double(), side="left").double()
    up_to = torch.searchsorted(ordered, positive.double(), side="right").double()
    return float((below + up_to).mean() / (2 * len(negative)))


def bootstrap(
    statistic: Callable[[Tensor], float], n: int, *, n_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic with its 95 % percentile interval over resampled items.

    Args:
        statistic: Takes item numbers of shape `(n,)` and gives a number. A resample on which it is
            not defined (it raises ValueError) is drawn again, at most ten times over.
        n: Number of items.
        n_resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        The statistic on all items, with the interval.
    """

    def named(rows: Tensor) -> dict[str, float]:
        return {"": statistic(rows)}

    return bootstrap_all(named, n, n_resamples=n_resamples, seed=seed)[""]


def bootstrap_all(
    statistics: Callable[[Tensor], Mapping[str, float]],
    n: int,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Several statistics of the same items with their 95 % intervals, on the same resamples.

    Args:
        statistics: Takes item numbers of shape `(n,)` and gives numbers by name; may raise
            ValueError, as in `bootstrap`.
        n: Number of items.
        n_resamples: Number of resamples.
        seed: Seed of the resampling.
    """
    values = statistics(torch.arange(n))
    generator = torch.Generator().manual_seed(seed)
    resampled: list[Mapping[str, float]] = []
    for _ in range(10 * n_resamples):
        try:
            resampled.append(statistics(torch.randint(n, (n,), generator=generator)))
        except ValueError:
            continue
        if len(resampled) == n_resamples:
            break
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    found: dict[str, Estimate] = {}
    for name, value in values.items():
        drawn = torch.tensor([sample[name] for sample in resampled], dtype=torch.float64)
        low, high = drawn.quantile(ends).tolist()
        found[name] = Estimate(value, low, high, n)
    return found
