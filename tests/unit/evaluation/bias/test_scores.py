"""Each benchmark's scores on cases worked by hand; none of the published data is needed."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from hf_gradiend.evaluation.bias import crows_pairs, seat
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.bias.suite import BENCHMARKS
from hf_gradiend.evaluation.likelihoods import TokenisedText

CASES = {
    file.stem: json.loads(file.read_text(encoding="utf-8"))
    for file in sorted(Path(__file__).with_name("cases").glob("*.json"))
}
EVERY_CASE = pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{number}")
        for name, cases in CASES.items()
        for number, case in enumerate(cases)
    ],
)


def items_and_values(case):
    if "tests" not in case:  # every other benchmark than SEAT
        return case["items"], torch.tensor(case["values"], dtype=torch.float64)
    rows = [
        ({"test": test, "role": role}, vector)
        for test, lists in case["tests"].items()
        for role, vectors in lists.items()
        for vector in vectors
    ]
    return [item for item, _ in rows], torch.tensor([v for _, v in rows], dtype=torch.float64)


@EVERY_CASE
def test_the_scores_equal_those_worked_by_hand(name, case):
    benchmark = BENCHMARKS[name]()
    items, values = items_and_values(case)

    found = benchmark.scores(benchmark.columns(items), values)

    # float64 throughout; 1e-9 is far above its rounding of numbers up to 1,000.
    assert found == pytest.approx(case["expected"], rel=1e-12, abs=case.get("tolerance", 1e-9))
    assert found.keys() == {measure.name for measure in benchmark.measures}
    for measure in benchmark.measures:
        assert measure.low <= found[measure.name] <= measure.high
    facts = benchmark.facts(benchmark.columns(items), values)
    assert facts == pytest.approx(case.get("expected_facts", {}), abs=1e-12)
    # The controls: other definitions that are in use give other numbers.
    assert case["wrong"]
    for definition, numbers in case["wrong"].items():
        for measure, number in numbers.items():
            assert found[measure] != pytest.approx(number, abs=1e-3), definition


@EVERY_CASE
def test_the_order_of_the_items_makes_no_difference(name, case):
    benchmark = BENCHMARKS[name]()
    items, values = items_and_values(case)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()

    shuffled = benchmark.scores(benchmark.columns([items[i] for i in order]), values[order])

    assert shuffled == pytest.approx(case["expected"], rel=1e-9, abs=case.get("tolerance", 1e-9))


def test_every_benchmark_has_cases_with_controls():
    assert CASES.keys() == BENCHMARKS.keys()
    assert sum(map(len, CASES.values())) >= 25


@pytest.mark.parametrize(
    ("name", "items", "values", "words"),
    [
        ("winobias", [{"type": 1}], [[1, 0]], "type 2"),
        ("bec_pro", [{"group": "female", "person_gender": "female"}], [[1]], "both kinds"),
        ("winogender", [{"occupation": "a", "labour_share": 0.5}], [[1, 0]], "constant"),
        ("seat", [{"test": "6", "role": "X"}], [[1, 0]], "all four lists"),
    ],
)
def test_scores_of_too_few_items_are_not_defined(name, items, values, words):
    benchmark = BENCHMARKS[name]()

    with pytest.raises(ValueError, match=words):
        benchmark.scores(benchmark.columns(items), torch.tensor(values, dtype=torch.float64))


# ---- what the scores are made of -----------------------------------------------------------------


def test_crows_pairs_three_scorings_of_one_sentence():
    log_probabilities = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64)

    assert crows_pairs.score(log_probabilities, [0, 2], "shared") == -5.0
    assert crows_pairs.score(log_probabilities, [0], "different") == -3.0
    assert crows_pairs.score(log_probabilities, [0], "sentence") == -7.0
    assert crows_pairs.score(log_probabilities, [0, 1, 2], "different") == -math.inf


@pytest.mark.parametrize(
    ("more", "less", "preferred"),
    [(-math.inf, -math.inf, 0.0), (-5.0, -math.inf, 100.0), (-math.inf, -5.0, 0.0)],
)
def test_a_sentence_without_a_token_of_its_own_is_never_preferred_for_its_difference(
    more, less, preferred
):
    values = torch.tensor([[0.0, 0.0, more, less, 0.0, 0.0]], dtype=torch.float64)

    assert CrowsPairs().scores({}, values)["different"] == preferred


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ((5, 6, 7, 8), (5, 4, 3, 7, 8), ([0, 2, 3], [0, 3, 4])),
        ((5, 6), (5, 6), ([0, 1], [0, 1])),
        ((5, 6), (7, 8), ([], [])),
        ((5, 6, 7), (7, 6, 5), ([0], [2])),  # in order: one of them alone
        ((5, 5, 6), (5, 6), ([1, 2], [0, 1])),  # a token that comes twice is shared once
    ],
)
def test_shared_tokens_are_those_of_both_sentences_in_order(first, second, shared):
    def text(tokens):
        return TokenisedText((0, *tokens, 9), tuple(range(1, len(tokens) + 1)), ((0, 0),))

    assert crows_pairs.shared_tokens(text(first), text(second)) == shared


def test_long_sentences_share_their_frequent_tokens_as_well():
    # difflib's "autojunk" drops tokens that are more than 1 % of 200 or more.
    tokens = tuple(number % 7 for number in range(300))
    text = TokenisedText((9, *tokens), tuple(range(1, 301)), ((0, 0),))
    other = TokenisedText((9, 8, *tokens), tuple(range(1, 302)), ((0, 0),))

    first, second = crows_pairs.shared_tokens(text, other)

    assert first == list(range(300))
    assert second == list(range(1, 301))


def unit_vectors(n, seed):
    vectors = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_weat_s_effect_size_is_that_of_mean_cosines():
    x, y, a, b = (unit_vectors(n, seed) for seed, n in enumerate((5, 6, 4, 3)))

    def s(word):
        def cosine(other):
            return float(word @ other / (word.norm() * other.norm()))

        return sum(map(cosine, a)) / len(a) - sum(map(cosine, b)) / len(b)

    of_x, of_y = [s(w) for w in x], [s(w) for w in y]
    together = of_x + of_y
    mean = sum(together) / len(together)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in together) / (len(together) - 1))
    expected = (sum(of_x) / len(x) - sum(of_y) / len(y)) / deviation

    assert seat.effect_size(x, y, a, b) == pytest.approx(expected, rel=1e-12)
    assert seat.effect_size(y, x, a, b) == pytest.approx(-expected, rel=1e-12)
    assert seat.effect_size(x, y, b, a) == pytest.approx(-expected, rel=1e-12)
    with pytest.raises(ValueError, match="differ"):
        seat.effect_size(x, y, a, a)


def test_permutation_p_is_the_share_of_larger_splits():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    y = torch.tensor([[0.0, 1.0], [0.6, 0.8]])

    # Associations 1, 0.2, −1, −0.2: of the six splits none is larger than {1, 0.2}.
    assert seat.permutation_p(x, y, a, b) == 0.0
    assert seat.permutation_p(y, x, a, b) == pytest.approx(5 / 6)
    assert seat.permutation_p(x, x, a, b) == pytest.approx(1 / 6)  # {1, 1} alone is larger


def test_random_permutations_give_nearly_the_exact_p():
    # 8 of 16: 12,870 splits, which are drawn; the exact share by hand of all of them.
    x, y, a, b = (unit_vectors(n, seed) for seed, n in enumerate((8, 8, 4, 4)))
    s = torch.cat([x, y]) @ (a.mean(0) - b.mean(0))
    splits = torch.tensor(list(itertools.combinations(range(16), 8)))
    exact = float((s[splits].sum(1) > s[:8].sum() + 1e-12).double().mean())

    found = seat.permutation_p(x, y, a, b)

    # 10,000 draws: four standard errors of a share are at most 2 %.
    assert found == pytest.approx(exact, abs=0.02)
    assert 0.05 < exact < 0.95  # the control: the data leave room to be wrong
    assert found != exact
    assert seat.permutation_p(x, y, a, b) == found  # and the same again


def test_a_difference_that_no_split_exceeds_has_the_least_p():
    towards = torch.tensor([[1.0, 0.0]]).repeat(12, 1)
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])

    assert seat.permutation_p(towards, towards.flip(1), a, b) == 1 / 10_001
    assert seat.permutation_p(towards.flip(1), towards, a, b) > 0.99
