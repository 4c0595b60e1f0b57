import json
from pathlib import Path

import pytest
import torch

from hf_gradiend import metrics
from hf_gradiend.metrics import auc, bootstrap, pearson_correlation

CASES = json.loads(Path(__file__).with_name("metrics_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case['why']}")
        for name in CASES
        for case in CASES[name]
    ],
)
def test_a_statistic_equals_the_value_worked_by_hand(name, case):
    samples = {key: torch.tensor(value) for key, value in case.items() if isinstance(value, list)}

    value = getattr(metrics, name)(**samples)

    # float64 throughout: 1e-12 is far above its rounding; a published value has its own digits.
    assert value == pytest.approx(case["expected"], abs=case.get("tolerance", 1e-12))


def test_every_statistic_of_a_sample_has_a_hand_worked_case():
    public = {
        n for n, f in vars(metrics).items() if getattr(f, "__module__", "") == metrics.__name__
    }

    assert public - {"Estimate", "bootstrap", "bootstrap_all"} == CASES.keys()


def test_correlation_is_symmetric_and_blind_to_scale_and_shift():
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x + torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    value = pearson_correlation(x, y)

    assert pearson_correlation(y, x) == pytest.approx(value, abs=1e-14)
    assert pearson_correlation(3 * x - 7, y) == pytest.approx(value, abs=1e-14)
    assert pearson_correlation(-x, y) == pytest.approx(-value, abs=1e-14)
    assert pearson_correlation(x**3, y) != pytest.approx(value, abs=1e-3)  # not of any function


# 1000 copies of 0.1 in float64 have a mean that is not 0.1: centring leaves a tiny variance.
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_correlation_with_a_constant_sample_is_refused(n, dtype):
    constant = torch.full((n,), 0.1, dtype=dtype)
    varied = torch.arange(n, dtype=dtype)

    with pytest.raises(ValueError, match="constant"):
        pearson_correlation(constant, varied)
    with pytest.raises(ValueError, match="constant"):
        pearson_correlation(varied, constant)


def test_correlation_never_leaves_its_range_by_rounding():
    samples = torch.randn(500, 10, generator=torch.Generator().manual_seed(0))

    values = [pearson_correlation(x, 0.1 * x) for x in samples]

    assert max(values) <= 1.0
    assert min(values) >= 1.0 - 1e-6  # the control: all of them are at the end of the range


def test_correlation_of_float16_is_taken_in_float64():
    x = torch.tensor([1000.0, 1001.0, 1002.0], dtype=torch.float16)  # squares overflow float16

    assert pearson_correlation(x, torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(0.5, abs=1e-12)


def test_auc_counts_the_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    positive = torch.randint(0, 6, (17,), generator=generator)
    negative = torch.randint(0, 5, (13,), generator=generator)

    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]

    assert auc(positive, negative) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auc(negative, positive) == pytest.approx(1 - sum(pairs) / len(pairs), abs=1e-12)


def test_bootstrap_interval_of_a_mean_has_the_textbook_width():
    sample = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    estimate = bootstrap(lambda items: float(sample[items].mean()), 400, n_resamples=1000)

    half_width = 1.96 * float(sample.std(correction=0)) / 400**0.5
    assert estimate.value == float(sample.mean())
    assert estimate.n == 400
    # 1000 resamples give a 2.5 % quantile to about 0.05 standard errors.
    assert estimate.low == pytest.approx(estimate.value - half_width, abs=0.1 * half_width)
    assert estimate.high == pytest.approx(estimate.value + half_width, abs=0.1 * half_width)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    samples = torch.randn(150, 40, generator=torch.Generator().manual_seed(0))
    estimates = [
        bootstrap(lambda items, s=sample: float(s[items].mean()), 40, n_resamples=200)
        for sample in samples
    ]

    def share_covering(truth: float, shrink: float = 1.0) -> float:
        ends = [(e.value + shrink * (e.low - e.value), e.value + shrink * (e.high - e.value))
                for e in estimates]  # fmt: skip
        return sum(low <= truth <= high for low, high in ends) / len(ends)

    # Percentile intervals of 40 items cover a little under 95 %; 150 trials: two errors are ±3.6 %.
    assert 0.89 <= share_covering(0.0) <= 0.99
    # The controls: half the interval covers P(|z| < 0.98) = 67 %, and a wrong value is not covered.
    assert share_covering(0.0, shrink=0.5) < 0.78
    assert share_covering(1.0) < 0.05


def test_bootstrap_is_reproducible_and_depends_on_its_seed():
    sample = torch.randn(30, generator=torch.Generator().manual_seed(0))

    first, again, other = (
        bootstrap(lambda items: float(sample[items].mean()), 30, n_resamples=50, seed=seed)
        for seed in (0, 0, 1)
    )

    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert first.value == other.value


def test_bootstrap_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()

    bootstrap(lambda items: float(items.double().mean()), 5, n_resamples=10)

    assert torch.equal(torch.random.get_rng_state(), before)


def test_bootstrap_draws_again_where_the_statistic_is_not_defined():
    signs = torch.tensor([1.0, -1.0, -1.0])  # 1/3³ + (2/3)³ = 1/3 of the resamples are constant
    encodings = torch.tensor([0.9, -0.2, -0.4])
    outcomes: list[bool] = []

    def statistic(items: torch.Tensor) -> float:
        outcomes.append(bool(signs[items].unique().numel() == 1))
        return pearson_correlation(encodings[items], signs[items])

    estimate = bootstrap(statistic, 3, n_resamples=100)

    assert any(outcomes)  # the control: undefined resamples were drawn
    assert len(outcomes) - sum(outcomes) == 100 + 1  # so many defined ones, and the whole sample
    assert -1.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0


def test_bootstrap_of_a_statistic_that_is_never_defined_says_why():
    with pytest.raises(ValueError, match="constant"):
        bootstrap(lambda items: pearson_correlation(items * 0.0, items * 1.0), 4)


def test_several_statistics_share_their_resamples():
    x = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    found = metrics.bootstrap_all(lambda rows: {"m": float(x[rows].mean()), "n": 1.0}, len(x))

    assert found["m"] == metrics.bootstrap(lambda rows: float(x[rows].mean()), len(x))
    assert found["n"] == metrics.Estimate(1.0, 1.0, 1.0, len(x))
    assert found["m"].low < found["m"].value < found["m"].high  # the control
