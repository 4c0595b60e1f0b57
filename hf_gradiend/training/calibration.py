"""Scale and offset of the closed form's encoder, from projections of texts it has not seen."""

import math
from contextlib import suppress

import torch
from torch import Tensor

from hf_gradiend.errors import NumericalError
from hf_gradiend.metrics import sign_accuracy

# Where the closed form puts the average text of a class. On SmolLM2 (gender, 150 texts a class) 0.9
# gives a test correlation of 0.992 and neutral words a mean |h| of 0.33; 0.85 gives 0.989 and 0.29.
MEAN_ENCODING = 0.85

# Directions tried in the plane of the two means, evenly spread over a right angle.
N_ANGLES = 360
ACCURACY_SPENT = 0.02  # at most, for neutral words nearer to 0


def fit_scale(projections: Tensor, signs: Tensor) -> tuple[float, float]:
    """Scale and offset that put the two class means of tanh's argument at ±artanh(0.85).

    A least-squares fit to ±1 would have no end when the classes can be told apart: its scale grows
    until every text is at ±1, and with it every neutral token and every word never trained on.
    Putting the *average* text at 0.85 keeps the middle of the range readable.

    Args:
        projections: z of shape `(texts,)`.
        signs: +1 or −1 of the same shape.

    Returns:
        Scale and offset of h = tanh(scale · z + offset).

    Raises:
        NumericalError: If the classes' mean projections are not finite or not in order.
    """
    z = projections.double()
    plus, minus = float(z[signs > 0].mean()), float(z[signs < 0].mean())
    if not plus > minus:
        raise NumericalError(
            f"Expected the + class to project higher than the − class, but their means are "
            f"{plus:.3g} and {minus:.3g}. Are the class labels right, and do the texts carry the "
            f"feature?"
        )
    scale = 2.0 * math.atanh(MEAN_ENCODING) / (plus - minus)
    return scale, -scale * (plus + minus) / 2.0


def fit_plane(
    z: Tensor, signs: Tensor, neutral: Tensor | None
) -> tuple[tuple[float, float], float]:
    """Mixture of two projections that reads the sides as ±1 and neutral words as 0.

    Of the directions between E[x|+] and −E[x|−], each scaled by `fit_scale`, the one whose readings
    h have the least squared error, with both sides and the neutral words of equal weight, among
    those that tell the sides apart within 0.02 as often as the best.

    Args:
        z: Projections of the sides' texts on E[x|+] and E[x|−], `(texts, 2)`.
        signs: +1 or −1, `(texts,)`.
        neutral: Projections of neutral words, `(words, 2)`; `None` for the plain difference.

    Returns:
        Mixture and offset of h = tanh(mixture · z + offset).

    Raises:
        NumericalError: If the sides' means are not finite, or not in order.
    """  # noqa: DOC502 - raised by fit_scale
    z = z.double()
    fits = [_scaled(z, signs, math.pi / 4)]
    if neutral is None:
        return fits[0]
    for number in range(1, N_ANGLES):
        with suppress(NumericalError):
            fits.append(_scaled(z, signs, number / N_ANGLES * math.pi / 2))
    of_sides = [_read(fit, z) for fit in fits]
    accuracies = [sign_accuracy(h, signs) for h in of_sides]

    def error(number: int) -> float:
        h, of_neutral = of_sides[number], _read(fits[number], neutral.double())
        gaps = (h[signs > 0] - 1.0, h[signs < 0] + 1.0, of_neutral)
        return sum(float(gap.square().mean()) for gap in gaps)

    good = max(accuracies) - ACCURACY_SPENT
    return fits[min((k for k, own in enumerate(accuracies) if own >= good), key=error)]


def _read(fit: tuple[tuple[float, float], float], z: Tensor) -> Tensor:
    mixture, offset = fit
    return torch.tanh(z @ torch.tensor(mixture, dtype=torch.float64) + offset)


def _scaled(z: Tensor, signs: Tensor, angle: float) -> tuple[tuple[float, float], float]:
    mixture = math.cos(angle), -math.sin(angle)
    scale, offset = fit_scale(z @ torch.tensor(mixture, dtype=torch.float64), signs)
    return (scale * mixture[0], scale * mixture[1]), offset
