"""How well an encoder tells two classes apart, as a metric of `evaluate`."""

import datasets
import evaluate

from hf_gradiend.errors import DataError
from hf_gradiend.evaluate_modules.common import column, flat
from hf_gradiend.metrics import bootstrap, pearson_correlation, sign_accuracy, three_way_accuracy

DESCRIPTION = (
    "How well a one-dimensional encoding h tells two classes apart: its Pearson correlation with "
    "the class's sign and the share of texts on the side of their class, both with a 95 % "
    "bootstrap interval; with neutral texts also the balanced accuracy of +, − and neutral."
)

INPUTS = """
Args:
    predictions: Encodings h, one number per text.
    references: +1 or −1, the class of the text, or 0 for a neutral one.

Returns:
    `correlation`, `sign_accuracy` and, with neutral texts, `three_way_accuracy`, each with the
    ends of its interval as `…_low` and `…_high`.
"""

CITATION = """\
@article{drechsel2025gradiend,
  title   = {GRADIEND: Feature Learning within Neural Networks Exemplified through Biases},
  author  = {Drechsel, Jonathan and Herbold, Steffen},
  journal = {arXiv preprint arXiv:2502.01406},
  year    = {2025}
}
"""


class EncoderCorrelation(evaluate.Metric):
    """Correlation of encodings with the sign of their class, and accuracies."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
            reference_urls=["https://arxiv.org/abs/2502.01406"],
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride] - evaluate calls it by name
        self, predictions: list[float], references: list[float]
    ) -> dict[str, float]:
        h, labels = column("predictions", predictions), column("references", references)
        unknown = sorted({*references} - {1.0, -1.0, 0.0})
        if unknown:
            raise DataError(f"Expected references +1, −1 or 0 (neutral), but got {unknown[0]}.")
        of_class = labels != 0
        x, y = h[of_class], labels[of_class]
        estimates = {
            "correlation": bootstrap(lambda i: pearson_correlation(x[i], y[i]), len(x)),
            "sign_accuracy": bootstrap(lambda i: sign_accuracy(x[i], y[i]), len(x)),
        }
        if len(x) < len(h):
            estimates["three_way_accuracy"] = bootstrap(
                lambda i: three_way_accuracy(h[i], labels[i]), len(h)
            )
        return flat(estimates)
