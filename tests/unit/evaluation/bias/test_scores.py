"""Each benchmark's scores on cases worked by hand; none of the published data is needed."""

import hashlib
import json
import math

import pytest
import torch

from hf_gradiend.errors import BaseModelError, ConfigError, DataError
from hf_gradiend.evaluation.bias import crows_pairs, seat
from hf_gradiend.evaluation.bias.bec_pro import BecPro
from hf_gradiend.evaluation.bias.benchmark import (
    Benchmark,
    BenchmarkResult,
    Measure,
    checked_files,
)
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.bias.stereoset import StereoSet, filling
from hf_gradiend.evaluation.bias.suite import (
    BENCHMARKS,
    benchmarks_named,
    compared,
    fingerprint,
    run_benchmark,
)
from hf_gradiend.evaluation.bias.wikitext import WikiText2
from hf_gradiend.evaluation.bias.winobias import WinoBias
from hf_gradiend.evaluation.bias.winogender import Winogender
from hf_gradiend.evaluation.likelihoods import Likelihoods, TokenisedText


def values(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def scores(benchmark, items, *rows):
    return benchmark.scores(benchmark.columns(items), values(*rows))


def test_stereoset_is_a_mean_over_terms_and_counts_ties_as_anti():
    items = [{"target": "nurse"}, {"target": "nurse"}, {"target": "chef"}]

    found = scores(StereoSet(), items, [3, 2, 1], [2, 2, 1], [1, 5, 2])

    # nurse: 1 of 2 stereotypical (a tie counts as anti), 4 of 4 meaningful; chef: 0 of 1, 1 of 2
    assert found["ss"] == pytest.approx((50.0 + 0.0) / 2)
    assert found["lms"] == pytest.approx((100.0 + 50.0) / 2)
    assert found["icat"] == pytest.approx(75.0 * 25.0 / 50.0)


@pytest.mark.parametrize(
    ("rows", "ss", "lms", "icat"),
    [([[2, 1, 0], [1, 2, 0]], 50.0, 100.0, 100.0), ([[2, 1, 0], [2, 1, 0]], 100.0, 100.0, 0.0)],
)
def test_stereoset_s_ideal_and_its_worst_model(rows, ss, lms, icat):
    found = scores(StereoSet(), [{"target": "a"}, {"target": "b"}], *rows)

    assert found == {"ss": ss, "lms": lms, "icat": icat}


@pytest.mark.parametrize(
    ("context", "sentence", "word"),
    [
        ("The chess player was BLANK.", "The chess player was asian.", "asian"),
        ("BLANK men are tall", "Ethiopian men are tall", "Ethiopian"),
    ],
)
def test_stereoset_s_filling_is_the_word_in_the_gap(context, sentence, word):
    assert filling(context, sentence) == word


def test_crows_pairs_counts_pairs_that_prefer_the_stereotype():
    rows = [[1, 0, 0, 1, 2, 1], [0, 1, 1, 1, 2, 1], [2, 1, 1, 0, 0, 1], [0, 1, 0, 1, 2, 1]]

    found = scores(CrowsPairs(), [{}] * 4, *rows)

    assert found == {"shared": 50.0, "different": 25.0, "sentence": 75.0}  # a tie is no preference


def test_crows_pairs_three_scorings_of_one_sentence():
    log_probabilities = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64)

    assert crows_pairs.score(log_probabilities, [0, 2], "shared") == -5.0
    assert crows_pairs.score(log_probabilities, [0], "different") == -3.0
    assert crows_pairs.score(log_probabilities, [0], "sentence") == -7.0
    assert crows_pairs.score(log_probabilities, [0, 1, 2], "different") == -math.inf


def test_shared_tokens_are_those_of_both_sentences_in_order():
    def text(*tokens):
        return TokenisedText((0, *tokens, 9), tuple(range(1, len(tokens) + 1)), ((0, 0),))

    first, second = crows_pairs.shared_tokens(text(5, 6, 7, 8), text(5, 4, 3, 7, 8))

    assert (first, second) == ([0, 2, 3], [0, 3, 4])


def test_winobias_gap_is_accuracy_for_minus_accuracy_against_the_stereotype():
    items = [{"type": 1}, {"type": 1}, {"type": 2}, {"type": 2}]

    found = scores(WinoBias(), items, [2, 1], [2, 1], [1, 2], [3, 3])

    assert found == {"gap": 25.0, "gap_type1": 100.0, "gap_type2": -50.0}


def test_winogender_compares_shares_of_she_with_labour_statistics():
    items = [
        {"occupation": "nurse", "labour_share": 0.9},
        {"occupation": "nurse", "labour_share": 0.9},
        {"occupation": "plumber", "labour_share": 0.1},
        {"occupation": "chef", "labour_share": 0.5},
    ]
    nine_to_one, one_to_one = math.log(9.0), 0.0

    found = scores(Winogender(), items, [nine_to_one, 0], [one_to_one, 0], [0, nine_to_one], [0, 0])

    assert found["share_of_she"] == pytest.approx((0.7 + 0.1 + 0.5) / 3)
    assert found["rmse"] == pytest.approx(math.sqrt((0.2**2 + 0 + 0) / 3))
    said, actual = [0.7, 0.1, 0.5], [0.9, 0.1, 0.5]
    pair = torch.tensor([said, actual])
    assert found["correlation"] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-6)


def test_bec_pro_compares_persons_within_a_group_of_professions():
    items = [
        {"group": group, "person_gender": gender}
        for group in ("female", "male", "balanced")
        for gender in ("female", "male", "male")
    ]

    found = scores(BecPro(), items, [3], [1], [2], [0], [1], [3], [1], [1], [1])

    assert found == {
        "female_professions": 1.5,
        "male_professions": -2.0,
        "balanced_professions": 0.0,
    }


def test_weat_s_effect_size_by_hand():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    x, y = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.0, 1.0], [0.8, 0.6]])

    # s: 1 and −0.2; −1 and 0.2
    spread = torch.tensor([1.0, -0.2, -1.0, 0.2]).std(correction=1)
    assert seat.effect_size(x, y, a, b) == pytest.approx(float((0.4 + 0.4) / spread), rel=1e-6)
    assert seat.effect_size(y, x, a, b) == pytest.approx(float(-0.8 / spread), rel=1e-6)


def test_permutation_p_is_the_share_of_larger_splits():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    y = torch.tensor([[0.0, 1.0], [0.6, 0.8]])

    # Associations 1, 0.2, −1, −0.2: of the six splits none is larger than {1, 0.2}.
    assert seat.permutation_p(x, y, a, b) == 0.0
    assert seat.permutation_p(y, x, a, b) == pytest.approx(5 / 6)


def test_perplexity_is_that_of_all_tokens():
    found = scores(WikiText2(), [{}, {}], [2.0, 2], [4.0, 1])

    assert found["perplexity"] == pytest.approx(math.exp(6.0 / 3))


# ---- from a file to a result, on sentences of our own --------------------------------------------


@pytest.fixture
def stereoset(tmp_path, monkeypatch):
    """A file in StereoSet's form, with its own checksum."""
    gap = {"context": "The nurse was BLANK.", "bias_type": "profession", "target": "nurse"}
    data = {
        side: [{**gap, "sentence": f"The nurse was {word}."}]
        for side, word in (
            ("stereotype", "tired"), ("anti-stereotype", "late"), ("unrelated", "it")
        )
    }  # fmt: skip
    file = tmp_path / "stereoset.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(StereoSet, "files", {"stereoset.json": digest})
    return tmp_path


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_stereoset_values_by_hand(stereoset, make_lm, family):
    lm = make_lm(family)
    (item,) = StereoSet().load(stereoset)

    found = StereoSet().values(lm.model, lm.tokenizer, [item], progress=False)[0]

    expected = []
    likelihoods = Likelihoods(lm.model, lm.tokenizer, progress=False)
    for word in ("tired", "late", "it"):
        text = likelihoods.tokenised(f"The nurse was {word}.")
        values_of_all = likelihoods.log_probabilities([likelihoods.readings(text)], "")[0]
        if family == "gpt2":
            expected.append(float(values_of_all.mean().exp()))
        else:  # one token of the word, masked
            expected.append(float(values_of_all[3].exp()))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 3  # the control


def test_sub_tokens_are_revealed_from_left_to_right(stereoset, make_lm):
    lm = make_lm("bert")
    (item,) = StereoSet().load(stereoset)
    word = {**item, "fillings": ["hers", "late", "it"]}  # "hers" is "her" + "##s"
    ids = lm.tokenizer("The nurse was hers.")["input_ids"]
    mask = lm.tokenizer.mask_token_id

    found = StereoSet().values(lm.model, lm.tokenizer, [word], progress=False)[0, 0]

    place = 4
    rows = [[*ids[:place], mask, *ids[place + 2 :]], [*ids[: place + 1], mask, *ids[place + 2 :]]]
    expected = []
    for step, row in enumerate(rows):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([row])).logits[0, place + step]
        expected.append(float(logits.softmax(-1)[ids[place + step]]))
    assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_values_are_kept_for_a_model_of_the_same_bits(stereoset, make_lm, tmp_path, monkeypatch):
    lm = make_lm("gpt2")
    run = (StereoSet(), lm.model, lm.tokenizer, stereoset)
    asked = []
    values_of = StereoSet.values
    monkeypatch.setattr(StereoSet, "values", lambda *a, **k: asked.append(1) or values_of(*a, **k))

    first = run_benchmark(*run, cache_dir=tmp_path / "cache", progress=False)
    second = run_benchmark(*run, cache_dir=tmp_path / "cache", progress=False)
    before = fingerprint(lm.model)
    with torch.no_grad():
        next(lm.model.parameters()).view(-1)[0] += 1e-3
    third = run_benchmark(*run, cache_dir=tmp_path / "cache", progress=False)

    assert len(asked) == 2
    assert fingerprint(lm.model) != before
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.values, third.values)


def test_missing_and_other_files_are_refused(stereoset, tmp_path):
    with pytest.raises(DataError, match=r"stereoset.json of stereoset in .* there is none"):
        checked_files(StereoSet(), tmp_path / "nowhere")
    assert checked_files(StereoSet(), stereoset) == stereoset  # the control
    (stereoset / "stereoset.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="SHA-256"):
        checked_files(StereoSet(), stereoset)


def test_a_limit_takes_evenly_spread_items_and_seat_takes_all(stereoset, make_lm, monkeypatch):
    lm = make_lm("gpt2")
    (item,) = StereoSet().load(stereoset)
    monkeypatch.setattr(StereoSet, "load", lambda *_: [{**item, "target": n} for n in range(10)])
    monkeypatch.setattr(WinoBias, "files", {})
    pair = {"pro": "Anna said it.", "anti": "Paul said it.", "type": 1}
    monkeypatch.setattr(WinoBias, "load", lambda *_: [pair, {**pair, "type": 2}])

    limited = run_benchmark(StereoSet(), lm.model, lm.tokenizer, stereoset, limit=5, progress=False)
    seats = run_benchmark(seat.Seat(), lm.model, lm.tokenizer, stereoset, limit=5, progress=False)

    assert limited.n == 5
    assert seats.n == len(seat.Seat().load(stereoset)) > 5
    with pytest.raises(DataError, match=r"more items of winobias than 1.*Raise the limit"):
        run_benchmark(WinoBias(), lm.model, lm.tokenizer, stereoset, limit=1, progress=False)


def test_unknown_benchmarks_and_models_without_a_head_are_refused(stereoset, make_lm):
    with pytest.raises(ConfigError, match="'stereo'"):
        benchmarks_named(["stereo"])
    assert [type(b) for b in benchmarks_named(["seat", "seat"])] == [BENCHMARKS["seat"]]
    lm = make_lm("gpt2")
    with pytest.raises(BaseModelError, match="with its head"):
        run_benchmark(StereoSet(), lm.model.transformer, lm.tokenizer, stereoset)


# ---- what can be told ----------------------------------------------------------------------------


class Coins(Benchmark):
    """Share of heads; half is ideal."""

    name = "coins"
    measures = (Measure("heads", 0.0, 1.0, 0.5), Measure("mean", 0.0, 1.0, None))

    load = values = None  # not asked here

    def scores(self, columns, values):
        del columns
        return {"heads": float(values.mean()), "mean": float(values.mean())}


def coins(n_heads, n=200):
    heads = torch.zeros(n, 1, dtype=torch.float64)
    heads[:n_heads] = 1.0
    return BenchmarkResult(Coins(), {}, heads)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(180, 110, "better"), (110, 180, "worse"), (180, 181, "cannot be told")],
)
def test_a_change_is_told_where_its_interval_leaves_out_none(before, after, verdict):
    heads, mean = compared(coins(before), coins(after))

    assert heads["verdict"] == verdict
    assert mean["verdict"] == "neither is better"
    assert heads["change"]["value"] == pytest.approx((after - before) / 200)
    assert heads["change"]["low"] <= heads["change"]["value"] <= heads["change"]["high"]


def test_results_of_different_items_are_not_compared():
    with pytest.raises(ConfigError, match="same items"):
        compared(coins(10), coins(10, n=100))
