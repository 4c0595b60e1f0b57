"""StereoSet's SS, LMS and ICAT, as a metric of `evaluate`."""

import datasets
import evaluate
import torch

from hf_gradiend.errors import DataError
from hf_gradiend.evaluate_modules.common import column, flat
from hf_gradiend.evaluation.bias import stereoset
from hf_gradiend.evaluation.bias.benchmark import BenchmarkResult

DESCRIPTION = (
    "StereoSet's measures from a model's scores of three fillings per item: how often it prefers "
    "the stereotype (SS), how often it prefers what makes sense (LMS), and both in one (ICAT), "
    "means over target terms with 95 % bootstrap intervals."
)

INPUTS = """
Args:
    stereotype: Score of the stereotype, one number per item.
    anti_stereotype: Score of the anti-stereotype.
    unrelated: Score of the unrelated filling.
    target: Target term of the item, such as "nurse".

Returns:
    `ss`, `lms` and `icat`, in [0, 100], each with the ends of its interval as `…_low` and
    `…_high`.
"""

CITATION = """\
@inproceedings{nadeem2021stereoset,
  title     = {{StereoSet}: Measuring stereotypical bias in pretrained language models},
  author    = {Nadeem, Moin and Bethke, Anna and Reddy, Siva},
  booktitle = {Proceedings of the 59th Annual Meeting of the Association for Computational
               Linguistics and the 11th International Joint Conference on Natural Language
               Processing (Volume 1: Long Papers)},
  pages     = {5356--5371},
  year      = {2021}
}
"""

SIDES = ("stereotype", "anti_stereotype", "unrelated")


class Stereoset(evaluate.Metric):
    """SS, LMS and ICAT of three scores per item and its target term."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {side: datasets.Value("float64") for side in SIDES}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(columns | {"target": datasets.Value("string")}),
            reference_urls=["https://aclanthology.org/2021.acl-long.416"],
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride] - evaluate calls it by name
        self,
        stereotype: list[float],
        anti_stereotype: list[float],
        unrelated: list[float],
        target: list[str | None],
    ) -> dict[str, float]:
        sides = zip(SIDES, (stereotype, anti_stereotype, unrelated), strict=True)
        values = torch.stack([column(*side, finite=False) for side in sides], 1)
        if None in target:
            raise DataError(f"Expected a term in target[{target.index(None)}], but got None.")
        benchmark = stereoset.StereoSet()
        columns = benchmark.columns([{"target": term} for term in target])
        return flat(BenchmarkResult(benchmark, columns, values).estimates())
