"""What the metrics share: inputs that are checked, and estimates as one flat dictionary."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_gradiend.errors import DataError
from hf_gradiend.metrics import Estimate


def column(name: str, values: Sequence[float | None], *, finite: bool = True) -> Tensor:
    """Numbers of one input, float64 `(n,)`.

    Args:
        name: Name of the input.
        values: Its numbers, as `evaluate` hands them over.
        finite: Refuse ±∞, which scores that are only compared may be.

    Raises:
        DataError: If there is none, or one is missing, NaN, or infinite and must not be.
    """
    if not values:
        raise DataError(f"Expected at least one number in {name}, but got none.")
    found = torch.tensor([torch.nan if v is None else v for v in values], dtype=torch.float64)
    bad = ~found.isfinite() if finite else found.isnan()
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        kind = "a finite number" if finite else "a number"
        raise DataError(f"Expected {kind} in {name}[{first}], but got {values[first]}.")
    return found


def flat(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """Each value by its name, with the ends of its interval as `name_low` and `name_high`."""
    results: dict[str, float] = {}
    for name, estimate in estimates.items():
        results |= {
            name: estimate.value,
            f"{name}_low": estimate.low,
            f"{name}_high": estimate.high,
        }
    return results
