"""CrowS-Pairs' score, as a metric of `evaluate`."""

import datasets
import evaluate
import torch

from hf_gradiend.evaluate_modules.common import column, flat
from hf_gradiend.evaluation.bias import crows_pairs
from hf_gradiend.evaluation.bias.benchmark import BenchmarkResult

DESCRIPTION = (
    "CrowS-Pairs' score: the percentage of sentence pairs of which a model prefers the more "
    "stereotyping sentence, with its 95 % bootstrap interval. 50 is ideal."
)

INPUTS = """
Args:
    more: Score of the more stereotyping sentence, one number per pair.
    less: Score of the less stereotyping sentence.

Returns:
    `score`, in [0, 100], with the ends of its interval as `score_low` and `score_high`.
"""

CITATION = """\
@inproceedings{nangia2020crows,
  title     = {{CrowS-Pairs}: A Challenge Dataset for Measuring Social Biases in Masked Language
               Models},
  author    = {Nangia, Nikita and Vania, Clara and Bhalerao, Rasika and Bowman, Samuel R.},
  booktitle = {Proceedings of the 2020 Conference on Empirical Methods in Natural Language
               Processing (EMNLP)},
  pages     = {1953--1967},
  year      = {2020}
}
"""


class CrowsPairs(evaluate.Metric):
    """Percentage of pairs whose more stereotyping sentence scores higher."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"more": number, "less": number}),
            reference_urls=["https://aclanthology.org/2020.emnlp-main.154"],
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride] - evaluate calls it by name
        self, more: list[float], less: list[float]
    ) -> dict[str, float]:
        pairs = torch.stack(
            [column("more", more, finite=False), column("less", less, finite=False)], 1
        )
        # The benchmark holds its scorings side by side; whichever of them this is stands for all.
        values = pairs.repeat(1, len(crows_pairs.SCORINGS))
        result = BenchmarkResult(crows_pairs.CrowsPairs(), {}, values)
        return flat({"score": result.estimates()[crows_pairs.SCORINGS[0]]})
