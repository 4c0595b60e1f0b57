"""What can be told from a change: verdicts on coins, whose numbers are known."""

import json
import math
from dataclasses import asdict
from typing import ClassVar

import pytest
import torch

from hf_gradiend.errors import ConfigError, NumericalError
from hf_gradiend.evaluation.bias.benchmark import Benchmark, BenchmarkResult, Measure
from hf_gradiend.evaluation.bias.comparison import compared, comparison_report, told
from hf_gradiend.evaluation.bias.seat import Seat
from hf_gradiend.evaluation.bias.stereoset import StereoSet
from hf_gradiend.evaluation.bias.suite import run_benchmark
from hf_gradiend.evaluation.bias.wikitext import WikiText2
from hf_gradiend.metrics import bootstrap

BETTER = {"high": "high", "low": "low", "half": 0.5, "mean": None}


class Coins(Benchmark):
    """Share of heads, judged in four ways."""

    name = "coins"
    paper = "Tossed here."
    files: ClassVar = {}
    measures = tuple(Measure(name, 0.0, 1.0, better) for name, better in BETTER.items())
    variants = ("gold",)

    load = values = None  # not asked here

    def columns(self, items):
        return {"item": torch.tensor([item["number"] for item in items])}

    def scores(self, columns, values):
        del columns
        return {name: float(values[:, 0].mean()) for name in BETTER}


def result(heads, n=200, *, order=None, variant=None):
    """So many heads among n coins: the first ones, or in another order."""
    values = torch.zeros(n, 1, dtype=torch.float64)
    values[:heads] = 1.0
    items = [{"number": number} for number in range(n)]
    benchmark = Coins(variant)
    return BenchmarkResult(
        benchmark, benchmark.columns(items), values if order is None else values[order]
    )


def shuffled(n=200):
    return torch.randperm(n, generator=torch.Generator().manual_seed(3))


# ---- measures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "value", "distance"),
    [
        (Measure("a", 0.0, 100.0, "high"), 70.0, 30.0),
        (Measure("a", 1.0, math.inf, "low"), 70.0, 69.0),
        (Measure("a", 0.0, 100.0, 50.0), 70.0, 20.0),
        (Measure("a", 0.0, 100.0, 50.0), 30.0, 20.0),
        (Measure("a", -2.0, 2.0, 0.0), -1.5, 1.5),
        (Measure("a", 0.0, 1.0, None), 0.3, None),
    ],
)
def test_the_distance_from_the_best_value(measure, value, distance):
    assert measure.distance(value) == distance


# ---- verdicts ------------------------------------------------------------------------------------


def verdicts(before, after, **options):
    rows = compared(result(before, **options), result(after, **options))
    return {row["measure"]: row["verdict"] for row in rows}


@pytest.mark.parametrize(
    ("before", "after", "high", "low", "half"),
    [
        (60, 140, "better", "worse", "cannot be told"),  # 0.3 and 0.7: as far from a half
        (140, 60, "worse", "better", "cannot be told"),
        (180, 110, "worse", "better", "better"),
        (110, 180, "better", "worse", "worse"),
        (20, 90, "better", "worse", "better"),
        (90, 20, "worse", "better", "worse"),
        (180, 181, "cannot be told", "cannot be told", "cannot be told"),
        (120, 120, "cannot be told", "cannot be told", "cannot be told"),
        (0, 200, "better", "worse", "cannot be told"),
    ],
)
def test_a_change_is_told_where_its_interval_leaves_out_none(before, after, high, low, half):
    found = verdicts(before, after)

    assert found == {"high": high, "low": low, "half": half, "mean": "neither is better"}


def test_a_row_has_both_models_and_the_change():
    before, after = result(180), result(110)

    rows = compared(before, after)

    for row in rows:
        assert row["benchmark"] == "coins"
        assert row["best"] == BETTER[row["measure"]]
        for name, value in (("before", 0.9), ("after", 0.55), ("change", -0.35)):
            assert set(row[name]) == {"value", "low", "high", "n"}
            assert row[name]["value"] == pytest.approx(value)
            assert row[name]["low"] <= value <= row[name]["high"]
            assert row[name]["n"] == 200
        # The models' own intervals are those of the models alone.
        measure = row["measure"]
        assert row["before"] == asdict(before.estimates()[measure])
        assert row["after"] == asdict(after.estimates()[measure])
    assert [row["measure"] for row in rows] == list(BETTER)


def width(estimate):
    return estimate["high"] - estimate["low"]


def test_pairing_by_item_narrows_the_interval():
    # 100 of 200 heads, then 110: the same coins and ten more.
    paired = compared(result(100), result(110))[0]
    unpaired = compared(result(100), result(110, order=shuffled()))[0]

    # Each coin's change is 0 or 1: the deviation of 10 ones in 200, against that of two samples.
    assert width(paired["change"]) == pytest.approx(
        2 * 1.96 * math.sqrt(0.05 * 0.95 / 200), rel=0.1
    )
    assert width(unpaired["change"]) == pytest.approx(
        2 * 1.96 * math.sqrt((0.5 * 0.5 + 0.55 * 0.45) / 200), rel=0.1
    )
    assert paired["verdict"] == "better"
    assert unpaired["verdict"] == "cannot be told"  # the control
    # The models alone have the same intervals either way, to the rounding of resamples.
    for name in ("before", "after"):
        assert paired[name]["value"] == unpaired[name]["value"]
        assert width(paired[name]) == pytest.approx(width(unpaired[name]), rel=0.1)
        assert width(paired[name]) > 3 * width(paired["change"]) / 2


def test_the_change_is_that_of_paired_resamples():
    before, after = result(100), result(117, order=shuffled())

    found = compared(before, after)[0]["change"]

    difference = (after.values - before.values)[:, 0]
    alone = bootstrap(lambda rows: float(difference[rows].mean()), 200)
    assert found == pytest.approx(asdict(alone), abs=1e-12)


def test_a_change_across_the_ideal_is_judged_by_the_distance_not_by_the_change():
    # From 0.85 to 0.35 is 0.35 and then 0.15 from a half; from 0.7 to 0.3 is 0.2 twice.
    row = next(r for r in compared(result(170), result(70)) if r["measure"] == "half")
    same = next(r for r in compared(result(140), result(60)) if r["measure"] == "half")

    assert row["verdict"] == "better"
    assert same["change"]["high"] < 0.0
    assert same["verdict"] == "cannot be told"


@pytest.mark.parametrize(
    "other",
    [result(10, n=100), result(10, variant="gold"),
     BenchmarkResult(StereoSet(), {}, torch.zeros(200, 1))],
    ids=["number", "variant", "benchmark"],
)  # fmt: skip
def test_results_of_different_items_are_not_compared(other):
    with pytest.raises(ConfigError, match="same items"):
        compared(result(10), other)


def test_as_many_other_items_are_not_compared():
    other = BenchmarkResult(Coins(), {"item": torch.arange(200) + 200}, result(10).values)

    with pytest.raises(ConfigError, match="same items"):
        compared(result(10), other)


def test_told_names_each_measure_in_one_of_three_lines():
    lines = told(compared(result(60), result(140)))

    assert lines == [
        "Better: coins high.",
        "Worse: coins low.",
        "Cannot be told: coins half.",
    ]
    assert told([]) == ["Better: nothing.", "Worse: nothing.", "Cannot be told: nothing."]
    several = [*compared(result(60), result(140)), *compared(result(60), result(150))]
    assert told(several)[0] == "Better: coins high, coins high."
    variant = compared(result(60, variant="gold"), result(140, variant="gold"))
    assert told(variant)[0] == "Better: coins:gold high."


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_holds_every_number_and_is_json():
    base = [result(100), result(50, n=80, variant="gold")]
    edited = {
        "weak": [result(104), result(52, n=80, variant="gold")],
        "strong": [result(150), result(10, n=80, variant="gold")],
    }

    report = comparison_report("tiny", base, edited, limit=200)

    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["base_model"], report["limit"], report["format"]) == ("tiny", 200, 1)
    assert {"hf_gradiend", "torch", "transformers"} <= set(report["versions"])
    assert report["base"] == {
        one.benchmark.title: {name: asdict(e) for name, e in one.estimates().items()}
        for one in base
    }
    assert list(report["base"]) == ["coins", "coins:gold"]
    assert [edit["label"] for edit in report["edited"]] == ["weak", "strong"]
    for edit, results in zip(report["edited"], edited.values(), strict=True):
        pairs = zip(base, results, strict=True)
        assert edit["rows"] == [row for one, other in pairs for row in compared(one, other)]
        assert [(row["benchmark"], row["measure"]) for row in edit["rows"]] == [
            (title, name) for title in ("coins", "coins:gold") for name in BETTER
        ]
        for row in edit["rows"]:
            assert row["before"] == report["base"][row["benchmark"]][row["measure"]]
    assert report["edited"][0]["rows"] != report["edited"][1]["rows"]  # the control
    assert report["facts"] == {}


def test_a_report_without_an_edited_model_is_one_of_the_base_model():
    report = comparison_report("tiny", [result(100)], {})

    assert report["edited"] == []
    assert report["limit"] is None
    assert report["base"]["coins"]["mean"]["value"] == 0.5


def test_results_of_other_benchmarks_than_the_base_model_s_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        comparison_report("tiny", [result(1), result(2)], {"edit": [result(1)]})


def test_the_facts_of_seat_stand_beside_its_measures(make_lm, monkeypatch):
    items = Seat().load(None)[::5]  # one template of five
    monkeypatch.setattr(Seat, "load", lambda *_: items)
    lm, other = make_lm("gpt2"), make_lm("gpt2")
    with torch.no_grad():
        other.model.transformer.h[1].mlp.c_proj.weight.mul_(-1.0)
    results = [run_benchmark(Seat(), m.model, m.tokenizer, ".", progress=False)
               for m in (lm, other)]  # fmt: skip

    report = comparison_report("tiny", results[:1], {"edit": results[1:]})

    tests = ("6", "6b", "7", "7b", "8", "8b")
    for facts, one in ((report["facts"], results[0]), (report["edited"][0]["facts"], results[1])):
        assert list(facts) == ["seat"]
        assert facts["seat"] == one.benchmark.facts(one.columns, one.values)
        assert list(facts["seat"]) == [f"p_{test}" for test in tests]
        for test in tests:
            d, p = one.score()[f"d_{test}"], facts["seat"][f"p_{test}"]
            assert 0.0 < p <= 1.0
            # A larger difference has fewer that are larger still.
            assert abs(d) < 0.1 or (d > 0) == (p < 0.5)
    assert report["facts"] != report["edited"][0]["facts"]  # the control
    json.dumps(report, allow_nan=False)


def test_a_broken_model_is_told_or_refused_and_its_report_is_json():
    good, broken = (
        BenchmarkResult(WikiText2(), {}, torch.tensor([[nats, 1.0]] * 20, dtype=torch.float64))
        for nats in (3.0, 900.0)
    )

    try:
        report = comparison_report("tiny", [good], {"broken": [broken]})
    except NumericalError:
        return  # refused, as NaN is

    assert report["edited"][0]["rows"][0]["verdict"] == "worse"
    json.dumps(report, allow_nan=False)
