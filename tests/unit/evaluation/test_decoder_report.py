import json
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import pytest
import torch

from hf_gradiend.errors import CompatibilityError
from hf_gradiend.evaluation import probe as probe_module
from hf_gradiend.evaluation.decoder import EditMeter, EditRule, flat
from hf_gradiend.evaluation.decoder_report import (
    FEATURE_FACTORS,
    RULES,
    SHARES,
    decoder_values,
    evaluate_decoder,
)
from hf_gradiend.evaluation.probe import EditProbe, compared
from hf_gradiend.metrics import bootstrap_all

CHOOSING = [
    {"text": "the doctor said that [TARGET] was late ."},
    {"text": "the nurse went home because [TARGET] was tired ."},
    {"text": "when the nurse came home , [TARGET] was tired ."},
]
JUDGING = [
    {"text": "the doctor was late because [TARGET] was tired ."},
    {"text": "because the nurse was tired , [TARGET] took the day off ."},
]
# With pronouns, some of which the masked model finds; every measure is above 0.
NEUTRAL = [
    "anna said that she was late .",
    "paul went home because he was tired .",
    "when lucy came home , she was late .",
    "john and the nurse said that he went home .",
]
FEW = (EditRule(lm_floor=0.5), EditRule("fpi", "product"), EditRule("mpi", "product"))
GRID = ([-1.0, 0.0, 1.0], [-0.1, -0.02, 0.02, 0.1])


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals of 30 resamples, not of 1,000, which would take most of the time."""
    monkeypatch.setattr(probe_module, "bootstrap_all", partial(bootstrap_all, n_resamples=30))


@pytest.fixture
def probes(planted):
    return tuple(
        EditProbe(prompts, (["she"], ["he"]), neutral, planted.model, planted.tokenizer)
        for prompts, neutral in ((CHOOSING, NEUTRAL), (JUDGING, NEUTRAL[::-1]))
    )


def evaluated(gradiend, probes, rules=FEW, **options):
    options = {"grid": GRID, "max_trials": 4, "progress": False, **options}
    return evaluate_decoder(gradiend, *probes, rules=rules, **options)


def measured(gradiend, probe, h, alpha):
    with gradiend.edited(probe.model, h, alpha):
        return probe.measure()


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_the_grid_is_measured_on_the_texts_of_the_choice(gradiend, probes):
    choosing, judging = probes

    report = evaluated(gradiend, probes, rules=())

    assert [(p.feature_factor, p.step_size) for p in report.grid] == [
        (h, alpha) for h in GRID[0] for alpha in GRID[1]
    ]
    assert report.before == choosing.measure()
    assert report.judged_before == judging.measure()
    assert report.before != report.judged_before  # the control
    for point in report.grid[::5]:
        assert point.measures == measured(gradiend, choosing, point.feature_factor, point.step_size)
    assert report.classes == ("F", "M")
    assert report.judged == report.rules == ()


def test_an_edit_is_chosen_on_some_texts_and_judged_on_others(gradiend, probes):
    choosing, judging = probes

    report = evaluated(gradiend, probes)

    assert report.rules == FEW
    assert all(found is not None for found in report.judged)
    for rule, found in zip(report.rules, report.judged, strict=True):
        choice = found.choice
        edit = choice.feature_factor, choice.step_size
        assert choice.rule == rule
        assert choice.before == report.before
        assert choice.after == measured(gradiend, choosing, *edit)
        assert found.after == measured(gradiend, judging, *edit)
        assert found.after != choice.after  # the control
        with gradiend.edited(judging.model, *edit):
            after = judging.read()
        assert found.intervals == compared(judging.read(), after)
        for name, estimates in found.intervals.items():
            assert estimates["before"].value == getattr(report.judged_before, name)
            assert estimates["after"].value == getattr(found.after, name)


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_swapped_texts_give_another_choice_and_another_judgement(gradiend, probes):
    one, other = evaluated(gradiend, probes), evaluated(gradiend, probes[::-1])

    assert (one.before, one.judged_before) == (other.judged_before, other.before)
    edits = [
        [(found.choice.feature_factor, found.choice.step_size) for found in report.judged]
        for report in (one, other)
    ]
    assert edits[0] != edits[1]


def test_no_choice_is_worse_than_the_base_model_or_than_the_grid(gradiend, probes):
    report = evaluated(gradiend, probes, max_trials=8)

    for found in report.judged:
        rule, choice = found.choice.rule, found.choice
        assert rule.value(choice.after) > rule.value(choice.before)
        assert rule.allows(choice.after, choice.before)
        allowed = [p.measures for p in report.grid if rule.allows(p.measures, report.before)]
        assert rule.value(choice.after) >= max(map(rule.value, allowed))


def test_the_grid_reaches_what_one_bracket_misses(gradiend, probes):
    # The class to strengthen, from the side of either class.
    report = evaluated(gradiend, probes, rules=[EditRule("fpi", "product")], max_trials=0)

    (found,) = report.judged
    values = [EditRule("fpi", "product").value(p.measures) for p in report.grid]
    assert EditRule("fpi", "product").value(found.choice.after) == max(values)
    assert found.choice.tried == report.grid[: len(found.choice.tried)]


def test_a_rule_that_nothing_keeps_is_without_a_choice(gradiend, probes):
    impossible = EditRule(lm_floor=2.0, mass_floor=2.0)

    report = evaluated(gradiend, probes, rules=[FEW[0], impossible, FEW[1]])
    values = decoder_values(report)

    assert [found is None for found in report.judged] == [False, True, False]
    assert values["without_choice"] == [asdict(impossible)]
    assert [choice["criterion"] for choice in values["choices"]] == ["imbalance", "fpi"]


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_a_gradiend_that_does_nothing_has_no_choice_at_all(gradiend, probes):
    with torch.no_grad():
        for parameter in gradiend.decoder.parameters():
            parameter.zero_()

    report = evaluated(gradiend, probes, grid=None)

    assert report.judged == (None, None, None)
    assert decoder_values(report)["choices"] == []
    assert len(decoder_values(report)["without_choice"]) == 3
    assert all(point.measures == report.before for point in report.grid)


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_the_default_grid_has_five_h_and_both_signs(gradiend, probes):
    report = evaluated(gradiend, probes, rules=(), grid=None)

    with EditMeter(gradiend, probes[0]) as meter:
        steps = [meter.step_size_of(share, 1.0) for share in SHARES]
    assert SHARES[0] == 1e-4
    assert all(b == 2 * a for a, b in pairwise(SHARES))
    edits = [(point.feature_factor, point.step_size) for point in report.grid]
    both = sorted([*steps, *(-step for step in steps)])
    assert edits == [(h, alpha) for h in FEATURE_FACTORS for alpha in both]
    assert len(edits) == len(set(edits)) == 80
    assert FEATURE_FACTORS == (-1.0, -0.5, 0.0, 0.5, 1.0)


def test_the_default_rules_are_every_index_both_ways_and_the_balance():
    asked = [(rule.criterion, rule.rule) for rule in RULES]

    assert len(set(asked)) == len(asked) == 7
    assert set(asked) == {
        ("imbalance", "limits"),
        *((index, rule) for index in ("bpi", "fpi", "mpi") for rule in ("limits", "product")),
    }


def test_whatever_was_measured_once_is_not_measured_again(gradiend, probes, monkeypatch):
    calls = {"choosing": 0, "judging": 0}
    for name, probe in zip(calls, probes, strict=True):
        read = probe.probabilities

        def counted(name=name, read=read):
            calls[name] += 1
            return read()

        monkeypatch.setattr(probe, "probabilities", counted)

    report = evaluated(gradiend, probes, rules=[*FEW, *FEW], max_trials=3)

    n_grid = len(GRID[0]) * len(GRID[1])
    # The base model, the grid, and three trials of each of three different rules at most.
    assert 1 + n_grid < calls["choosing"] <= 1 + n_grid + 3 * 3
    edits = {(f.choice.feature_factor, f.choice.step_size) for f in report.judged}
    assert calls["judging"] == 1 + len(edits) < 1 + 6
    assert report.judged[:3] == report.judged[3:]


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_the_base_model_has_its_old_bits_afterwards_and_after_an_error(
    gradiend, probes, monkeypatch
):
    model = probes[0].model
    before = bits(model)

    evaluated(gradiend, probes)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    edited = []

    def fail():
        if any(not torch.equal(t, before[n]) for n, t in model.state_dict().items()):
            edited.append(True)
            raise KeyboardInterrupt
        return probe_read()

    probe_read = probes[1].read
    monkeypatch.setattr(probes[1], "read", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluated(gradiend, probes)
    assert edited == [True]  # the control
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_an_edit_that_breaks_the_model_is_not_in_the_grid(gradiend, probes):
    report = evaluated(gradiend, probes, rules=FEW[:1], grid=([0.0, 1.0], [1e38, 0.02, 0.1]))

    assert [p.step_size for p in report.grid] == [0.02, 0.1, 0.02, 0.1]
    assert abs(report.judged[0].choice.step_size) < 1e38


def test_a_gradiend_of_another_base_model_is_refused(probes, tiny_llama, gradiend_for):
    with pytest.raises(CompatibilityError):
        evaluated(gradiend_for(tiny_llama), probes)


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_the_values_are_json_and_hold_every_number(gradiend, probes):
    report = evaluated(gradiend, probes)

    values = decoder_values(report)

    back = json.loads(json.dumps(values, allow_nan=False))
    assert json.loads(json.dumps(back)) == back
    assert back.keys() == values.keys() >= {"format", "classes", "before", "grid", "choices"}

    def plain(measures):
        return json.loads(json.dumps(asdict(measures)))

    assert back["classes"] == ["F", "M"]
    assert back["before"] == plain(report.before)
    assert back["judged_before"] == plain(report.judged_before)
    assert back["grid"] == [json.loads(json.dumps(flat(point))) for point in report.grid]
    assert len(back["choices"]) == 3
    assert back["without_choice"] == []
    for row, rule, found in zip(back["choices"], report.rules, report.judged, strict=True):
        assert {name: row[name] for name in asdict(rule)} == asdict(rule)
        assert row["feature_factor"] == found.choice.feature_factor
        assert row["step_size"] == found.choice.step_size
        assert row["chosen_after"] == plain(found.choice.after)
        assert row["judged_after"] == plain(found.after)
        assert row["intervals"] == {
            name: {when: asdict(e) for when, e in estimates.items()}
            for name, estimates in found.intervals.items()
        }


@pytest.mark.parametrize("planted", ["bert"], indirect=True)
def test_a_language_model_score_of_0_does_not_end_the_report(planted, gradiend):
    neutral = ["the doctor took the red coat home .", "the day was long because the rain began ."]
    choosing, judging = (
        EditProbe(prompts, (["she"], ["he"]), neutral, planted.model, planted.tokenizer)
        for prompts in (CHOOSING, JUDGING)
    )
    assert judging.measure().lm_score == 0.0  # what the model is like

    report = evaluated(gradiend, (choosing, judging), rules=[EditRule(lm_floor=0.0)])

    assert report.judged[0].after.imbalance < report.judged_before.imbalance
