"""BPI, FPI and MPI: how balanced a model's words are, as a metric of `evaluate`."""

import datasets
import evaluate
import torch

from hf_gradiend.errors import DataError
from hf_gradiend.evaluate_modules.common import column
from hf_gradiend.evaluation.probe import EditMeasures

DESCRIPTION = (
    "How balanced a language model is between two classes of words, at texts that do not determine "
    "the class: the balanced index BPI and the one-sided indices FPI and MPI, which need a "
    "language-model score, and the imbalance and the probability mass, which do not."
)

INPUTS = """
Args:
    p_plus: Probability of the + class's words, one number per text.
    p_minus: Probability of the − class's words at the same place.
    lm_score: Language-model score of the same model on neutral text, in [0, 1].

Returns:
    `imbalance`, `mass`, `p_plus` and `p_minus`; with `lm_score` also `lm_score`, `bpi`, `fpi` and
    `mpi`. All are in [0, 1].
"""

CITATION = """\
@article{drechsel2025gradiend,
  title   = {GRADIEND: Feature Learning within Neural Networks Exemplified through Biases},
  author  = {Drechsel, Jonathan and Herbold, Steffen},
  journal = {arXiv preprint arXiv:2502.01406},
  year    = {2025}
}
"""

ROUNDING = 0.01  # by which bfloat16 probabilities may sum to more than 1
READINGS = ("imbalance", "mass", "p_plus", "p_minus")
INDICES = ("lm_score", "bpi", "fpi", "mpi")


class BalanceIndex(evaluate.Metric):
    """BPI, FPI, MPI, imbalance and mass of two probabilities per text."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"p_plus": number, "p_minus": number}),
            reference_urls=["https://arxiv.org/abs/2502.01406"],
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride] - evaluate calls it by name
        self, p_plus: list[float], p_minus: list[float], lm_score: float | None = None
    ) -> dict[str, float]:
        probabilities = torch.stack([column("p_plus", p_plus), column("p_minus", p_minus)], 1)
        mass = probabilities.sum(1)
        if bool((probabilities < 0).any()) or bool((mass > 1 + ROUNDING).any()):
            raise DataError(
                "Expected probabilities that are not negative and sum to at most 1, but got "
                f"{float(probabilities.min()):.3g} as the smallest and {float(mass.max()):.3g} as "
                "the largest sum."
            )
        if lm_score is not None and not 0 <= lm_score <= 1:
            raise DataError(f"Expected an lm_score in [0, 1], but got {lm_score}.")
        measures = EditMeasures.of(probabilities, 1.0 if lm_score is None else float(lm_score))
        # No index without its factor: with 1 in its place it would look like a better one.
        names = READINGS if lm_score is None else READINGS + INDICES
        return {name: getattr(measures, name) for name in names}
