import json
import math
from dataclasses import asdict

import pytest
import torch

from hf_gradiend.errors import CompatibilityError, ConfigError, GradiendError, NumericalError
from hf_gradiend.evaluation.decoder import (
    BALANCE,
    CRITERIA,
    EditMeter,
    EditRule,
    choose_edit,
    flat,
    sweep,
)
from hf_gradiend.evaluation.probe import EditMeasures, EditProbe

PROMPTS = [
    {"text": "the doctor said that [TARGET] was late ."},
    {"text": "the nurse went home because [TARGET] was tired ."},
    {"text": "the doctor was late because [TARGET] was tired ."},
    {"text": "when the nurse came home , [TARGET] was tired ."},
]
NEUTRAL = ["the doctor took the red coat home .", "the day was long because the rain began ."]
# Of which the masked model knows some words, the pronouns.
WITH_PRONOUNS = [
    "anna said that she was late .",
    "paul went home because he was tired .",
    "when lucy came home , she was late .",
    "john and the nurse said that he went home .",
]


@pytest.fixture
def probe(planted):
    return EditProbe(PROMPTS, (["she"], ["he"]), NEUTRAL, planted.model, planted.tokenizer)


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_bits(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def numbers(measures):
    return {name: value for name, value in vars(measures).items() if name != "p_others"}


# ---- what is asked of an edit ----


def test_the_default_is_the_least_imbalance_within_the_limits():
    assert EditRule() == BALANCE
    assert (BALANCE.criterion, BALANCE.rule) == ("imbalance", "limits")
    assert (BALANCE.lm_floor, BALANCE.mass_floor) == (0.99, 0.75)
    assert BALANCE.name == "imbalance, limits"
    assert EditRule("fpi", "product").name == "fpi, product"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("balance",), "'balance'"),
        (("mass",), "'mass'"),
        (("FPI",), "'FPI'"),
        (("bpi", "sum"), "'sum'"),
        (("bpi", ""), "limits or product"),
        (("imbalance", "product"), "no product"),
    ],
)
def test_a_rule_that_nobody_knows_is_refused(settings, words):
    with pytest.raises(ConfigError) as caught:
        EditRule(*settings)

    line = str(caught.value)
    assert words in line
    assert line.startswith("Expected ")
    assert "\n" not in line


# Two texts: P₊ and P₋ of 0.3, 0.1 and of 0.2, 0.2; a language-model score of ½.
P = torch.tensor([[0.3, 0.1], [0.2, 0.2]], dtype=torch.float64)
BY_HAND = {
    "bpi": (0.8 * 0.4 + 1.0 * 0.4) / 2,
    "fpi": (0.9 * 0.3 + 0.8 * 0.2) / 2,
    "mpi": (0.7 * 0.1 + 0.8 * 0.2) / 2,
    "several_class_index": (0.8 * 0.1 + 1.0 * 0.2) / 2,
}


@pytest.mark.parametrize("criterion", BY_HAND)
def test_the_product_is_with_the_score_and_the_limits_are_without(criterion):
    measures = EditMeasures.of(P, 0.5)

    product = EditRule(criterion, "product").value(measures)
    limits = EditRule(criterion, "limits").value(measures)

    assert product == pytest.approx(0.5 * BY_HAND[criterion], rel=1e-9)
    assert limits == pytest.approx(BY_HAND[criterion], rel=1e-9)


def test_the_value_of_imbalance_is_its_opposite():
    assert BALANCE.value(EditMeasures.of(P, 0.5)) == pytest.approx(-0.25)
    assert BALANCE.value(EditMeasures.of(P[1:], 0.1)) > BALANCE.value(EditMeasures.of(P, 0.9))
    assert {"imbalance", *BY_HAND} == set(CRITERIA)  # the control: every criterion has its case


@pytest.mark.parametrize("rule", ["limits", "product"])
def test_an_index_of_a_model_without_any_score_is_0(rule):
    assert EditRule("bpi", rule).value(EditMeasures.of(P, 0.0)) == 0.0


def test_the_two_rules_prefer_different_edits():
    strong, careful = EditMeasures.of(P, 0.4), EditMeasures.of(0.8 * P, 0.9)

    limits, product = EditRule("fpi", "limits"), EditRule("fpi", "product")

    assert limits.value(strong) > limits.value(careful)
    assert product.value(strong) < product.value(careful)


@pytest.mark.parametrize(
    ("scale", "lm_score", "limits", "mass"),
    [
        (1.0, 0.5, True, True),
        (0.75, 0.495, True, True),  # on both limits
        (0.75, 0.494, False, True),
        (0.74, 0.5, False, False),
        (0.1, 0.001, False, False),
        (1.2, 0.6, True, True),
    ],
)
def test_the_limits_are_relative_to_the_base_model_and_the_product_has_none(
    scale, lm_score, limits, mass
):
    before, after = EditMeasures.of(P, 0.5), EditMeasures.of(scale * P, lm_score)

    for criterion in CRITERIA:
        rule = EditRule(criterion, "limits", mass_floor=0.75 - 1e-12)
        assert rule.allows(after, before) is limits
        assert rule.allows_mass(after, before) is mass
    for criterion in BY_HAND:
        assert EditRule(criterion, "product").allows(after, before)
        assert EditRule(criterion, "product").allows_mass(after, before)


def test_which_rules_balance():
    balancing = {criterion for criterion in CRITERIA if EditRule(criterion).balances}

    assert balancing == {"imbalance", "bpi", "several_class_index"}


# ---- the choice (trap 9) ----


def test_the_chosen_edit_is_better_than_the_base_model_within_the_limits(gradiend, probe):
    choice = choose_edit(gradiend, probe, progress=False)

    assert choice is not None
    before, after = choice.before, choice.after
    assert before.imbalance > 0.02  # the control: there was something to better
    assert after.imbalance < before.imbalance
    assert after.lm_score >= 0.99 * before.lm_score
    assert after.mass >= 0.75 * before.mass
    # What it says of the edit is what the edited model does.
    assert probe.measure() == before
    with gradiend.edited(probe.model, choice.feature_factor, choice.step_size):
        assert probe.measure() == after
    assert choice.rule == BALANCE
    # The last of the ever better edits that kept the limits.
    imbalances = [point.measures.imbalance for point in choice.tried]
    assert min(imbalances) <= after.imbalance


def test_the_search_finds_what_a_fine_sweep_finds(gradiend, probe):
    choice = choose_edit(gradiend, probe, max_trials=200, progress=False)
    alpha = abs(choice.step_size)
    steps = [sign * alpha * 2.0**k for k in (-2, -1, 0, 1) for sign in (1, -1)]
    points = sweep(gradiend, probe, [-0.2, 0.0, 0.2], steps, progress=False)

    before = choice.before
    within = [
        p.measures.imbalance
        for p in points
        if p.measures.lm_score >= 0.99 * before.lm_score and p.measures.mass >= 0.75 * before.mass
    ]
    assert choice.after.imbalance <= min(within) + 0.02


def zero_decoder(gradiend):
    with torch.no_grad():
        for parameter in gradiend.decoder.parameters():
            parameter.zero_()


def test_an_edit_that_does_nothing_is_not_chosen(gradiend, probe):
    zero_decoder(gradiend)

    assert choose_edit(gradiend, probe, progress=False) is None


@pytest.mark.parametrize("planted", ["bert"], indirect=True)
def test_a_direction_that_only_harms_is_not_chosen(planted, gradiend, probe):
    # A base model that is balanced already: equal rows for she and he in the head.
    tokenizer, head = planted.tokenizer, planted.model.get_output_embeddings()
    space = "" if tokenizer.mask_token else " "
    she, he = (
        tokenizer(space + w, add_special_tokens=False)["input_ids"][0] for w in ("she", "he")
    )
    with torch.no_grad():
        head.weight[she] = head.weight[he]
        if head.bias is not None:
            head.bias[she] = head.bias[he]

    assert probe.measure().imbalance < 1e-6
    assert choose_edit(gradiend, probe, progress=False) is None


# The masked model, which has seen slots alone, finds none of the other words: its score is 0.
@pytest.mark.parametrize(
    ("planted", "limit"),
    [("gpt2", "lm_floor"), ("gpt2", "mass_floor"), ("bert", "mass_floor")],
    indirect=["planted"],
)
def test_a_limit_that_nothing_keeps_gives_no_edit(gradiend, probe, limit):
    assert choose_edit(gradiend, probe, EditRule(**{limit: 2.0}), progress=False) is None
    # the control
    assert choose_edit(gradiend, probe, EditRule(**{limit: 0.0}), progress=False) is not None


@pytest.mark.parametrize("limit", [0.9, 0.999])
def test_a_tighter_limit_is_kept(gradiend, probe, limit):
    choice = choose_edit(
        gradiend, probe, EditRule(lm_floor=limit, mass_floor=limit), progress=False
    )

    assert choice is not None
    assert choice.after.mass >= limit * choice.before.mass
    assert choice.after.lm_score >= limit * choice.before.lm_score


@pytest.mark.parametrize("max_trials", [1, 5, 48])
def test_no_more_edits_are_tried_than_asked_for(gradiend, probe, monkeypatch, max_trials):
    calls = []
    measured = probe.probabilities

    def counted():
        calls.append(1)
        return measured()

    monkeypatch.setattr(probe, "probabilities", counted)

    choose_edit(gradiend, probe, max_trials=max_trials, progress=False)

    assert 1 < len(calls) <= max_trials + 1  # and the base model's own


def test_the_choice_is_the_same_each_time(gradiend, probe):
    assert choose_edit(gradiend, probe, progress=False) == choose_edit(
        gradiend, probe, progress=False
    )


def test_the_base_model_has_its_old_bits_after_the_choice_and_the_sweep(gradiend, probe):
    before = bits(probe.model)

    choose_edit(gradiend, probe, progress=False)
    assert_bits(probe.model, before)
    points = sweep(gradiend, probe, [0.0, 0.5], [0.0, 0.1], progress=False)
    assert_bits(probe.model, before)

    assert points[0].measures != points[1].measures  # the control: edits were made


@pytest.mark.parametrize(
    "what",
    [
        lambda gradiend, probe: choose_edit(gradiend, probe, progress=False),
        lambda gradiend, probe: sweep(gradiend, probe, [0.5], [0.1], progress=False),
    ],
    ids=["choose", "sweep"],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_base_model_has_its_old_bits_after_an_error(gradiend, probe, what, error):
    before = bits(probe.model)
    edited = []

    def fail(*_):
        changed = any(not torch.equal(t, before[n]) for n, t in probe.model.state_dict().items())
        if changed:
            edited.append(1)
            raise error

    handle = probe.model.register_forward_pre_hook(fail)
    with pytest.raises(error):
        what(gradiend, probe)
    handle.remove()

    assert edited  # the control: the error came while an edit was in
    assert_bits(probe.model, before)


def test_an_edit_that_breaks_the_model_is_passed_over(gradiend, probe):
    # Any h but 0 overflows; the search must neither fail nor take NaN for the least imbalance.
    with torch.no_grad():
        for name in gradiend.names:
            gradiend.decoder.weight.at(name).mul_(1e36)
    with gradiend.edited(probe.model, 0.1, 1.0), pytest.raises(NumericalError, match="NaN"):
        probe.measure()  # the control

    choice = choose_edit(gradiend, probe, max_trials=100, progress=False)

    assert choice is not None
    assert choice.feature_factor == 0.0
    assert all(math.isfinite(value) for value in numbers(choice.after).values())
    assert choice.after.imbalance < choice.before.imbalance


def test_a_gradiend_of_another_base_model_is_refused(probe, tiny_llama, gradiend_for):
    with pytest.raises(CompatibilityError):
        choose_edit(gradiend_for(tiny_llama), probe, progress=False)


# ---- a class to strengthen ----


@pytest.fixture
def spoken(planted):
    """Neutral texts of which either model finds some tokens, so that no index is 0."""
    return EditProbe(PROMPTS, (["she"], ["he"]), WITH_PRONOUNS, planted.model, planted.tokenizer)


@pytest.mark.parametrize("rule", ["limits", "product"])
@pytest.mark.parametrize(("criterion", "sign"), [("fpi", 1), ("mpi", -1)])
def test_the_class_that_is_named_gets_stronger(gradiend, spoken, criterion, sign, rule):
    asked = EditRule(criterion, rule, lm_floor=0.5)

    choice = choose_edit(gradiend, spoken, asked, max_trials=32, progress=False)

    assert choice is not None
    assert choice.rule == asked
    before, after = choice.before, choice.after
    assert asked.value(after) > asked.value(before)
    assert asked.allows(after, before)
    p_before, p_after = ((m.p_plus, m.p_minus)[::sign] for m in (before, after))
    assert p_after[0] > p_before[0]  # the class's own words
    assert p_after[1] < p_before[1]  # the other's
    with gradiend.edited(spoken.model, choice.feature_factor, choice.step_size):
        assert spoken.measure() == after


def test_the_opposite_class_moves_the_edit_to_the_other_side(gradiend, spoken):
    fpi, mpi = (
        choose_edit(gradiend, spoken, EditRule(c, "product"), max_trials=32, progress=False)
        for c in ("fpi", "mpi")
    )

    assert fpi.after.p_plus > fpi.before.p_plus > mpi.after.p_plus
    assert mpi.after.fpi < fpi.before.fpi  # the control: one edit is not good for both


def falls_short(gradiend, probe, rules):
    """Rules for which the search gains less than nine tenths of what a sweep does."""
    with EditMeter(gradiend, probe) as meter:
        first = meter.step_size_of(1e-3, 1.0)
    steps = [sign * first * 2.0**k for k in range(10) for sign in (1, -1)]
    points = sweep(gradiend, probe, [-1.0, -0.5, 0.0, 0.5, 1.0], steps, progress=False)
    found = []
    for rule in rules:
        choice = choose_edit(gradiend, probe, rule, max_trials=100, progress=False)
        before = choice.before
        best = max(rule.value(p.measures) for p in points if rule.allows(p.measures, before))
        assert best > rule.value(before)  # the control: there is something to find
        if rule.value(choice.after) - rule.value(before) < 0.9 * (best - rule.value(before)):
            found.append((rule.name, rule.value(before), rule.value(choice.after), best))
    return found


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_the_search_for_any_rule_finds_about_what_a_sweep_finds(gradiend, probe):
    rules = [EditRule(criterion, lm_floor=0.9) for criterion in CRITERIA]
    rules += [EditRule(criterion, "product") for criterion in BY_HAND if criterion != "fpi"]

    assert falls_short(gradiend, probe, rules) == []


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_the_search_for_the_product_of_fpi_finds_about_what_a_sweep_finds(gradiend, probe):
    assert falls_short(gradiend, probe, [EditRule("fpi", "product")]) == []


@pytest.mark.parametrize("criterion", ["imbalance", "bpi"])
def test_without_a_decoder_bias_another_h_than_0_balances(gradiend, spoken, criterion):
    with torch.no_grad():
        for name in gradiend.names:
            gradiend.decoder.bias.at(name).zero_()

    choice = choose_edit(
        gradiend, spoken, EditRule(criterion, lm_floor=0.5), max_trials=32, progress=False
    )

    assert choice is not None
    assert choice.feature_factor != 0.0
    assert choice.after.imbalance < choice.before.imbalance


def test_balance_among_three_classes_raises_the_least_of_them(planted, gradiend):
    words = (["she"], ["he"], ["was"])
    probe = EditProbe(PROMPTS, words, WITH_PRONOUNS, planted.model, planted.tokenizer)
    rule = EditRule("several_class_index", lm_floor=0.0, mass_floor=0.0)

    choice = choose_edit(gradiend, probe, rule, max_trials=32, progress=False)

    assert len(choice.before.p_others) == 1
    assert choice.after.several_class_index / choice.after.lm_score > (
        choice.before.several_class_index / choice.before.lm_score
    )
    with gradiend.edited(planted.model, choice.feature_factor, choice.step_size):
        assert probe.measure() == choice.after


# ---- the meter ----


@pytest.fixture
def counted(probe, monkeypatch):
    """How often the slots and the neutral texts are read."""
    calls = {"slots": 0, "neutral": 0}
    slots, neutral = probe.probabilities, probe.language.score

    def read_slots():
        calls["slots"] += 1
        return slots()

    def read_neutral(model):
        calls["neutral"] += 1
        return neutral(model)

    monkeypatch.setattr(probe, "probabilities", read_slots)
    monkeypatch.setattr(probe.language, "score", read_neutral)
    return calls


def test_the_meter_measures_what_the_edited_model_does(gradiend, probe):
    edits = [(0.5, 0.05), (0.0, -0.05), (0.5, 0.05), (-1.0, 0.02), (0.0, 0.0)]
    without_score, expected = [], []
    for h, alpha in edits:
        with gradiend.edited(probe.model, h, alpha):
            without_score.append(EditMeasures.of(probe.probabilities(), 1.0))
            expected.append(probe.measure())

    with EditMeter(gradiend, probe) as meter:
        rough = [meter.rough(edit) for edit in edits]
        full = [meter.full(edit) for edit in reversed(edits)][::-1]

    assert rough == without_score
    assert full == expected
    assert meter.before == probe.measure() == full[-1]
    assert full[0] != full[1]  # the control


def test_each_edit_is_measured_once(gradiend, probe, counted):
    with EditMeter(gradiend, probe) as meter:
        assert counted == {"slots": 1, "neutral": 0}  # the base model, by its own reading
        for edit in ((0.5, 0.05), (0.0, 0.05), (0.5, 0.05)):
            meter.rough(edit)
        assert counted == {"slots": 3, "neutral": 0}
        for edit in ((0.5, 0.05), (0.5, 0.05), (0.0, 0.1), (0.0, 0.1)):
            meter.full(edit)
            meter.rough(edit)

    assert counted == {"slots": 4, "neutral": 2}


def test_an_edit_that_breaks_the_model_is_measured_once_as_well(gradiend, probe, counted):
    with EditMeter(gradiend, probe) as meter:
        assert [meter.full((1.0, 1e38)) for _ in range(3)] == [None, None, None]
        assert meter.rough((1.0, 1e38)) is None
        assert meter.full((0.0, 0.0)) == meter.before

    assert counted["slots"] == 3


def test_an_edit_that_breaks_neutral_texts_alone_is_none(gradiend, probe, monkeypatch):
    def broken(_model):
        raise NumericalError("Expected finite logits on neutral text, but got NaN.")

    monkeypatch.setattr(probe.language, "score", broken)

    with EditMeter(gradiend, probe) as meter:
        assert meter.rough((0.5, 0.05)) is not None
        assert meter.full((0.5, 0.05)) is None


def test_the_meter_leaves_the_old_bits(gradiend, probe):
    before = bits(probe.model)

    with EditMeter(gradiend, probe) as meter:
        meter.full((0.5, 0.05))
        changed = [n for n, t in probe.model.state_dict().items() if not torch.equal(t, before[n])]
        meter.full((1.0, 1e38))
    assert_bits(probe.model, before)

    assert changed  # the control: the edit was in
    with EditMeter(gradiend, probe) as meter:
        pass
    assert_bits(probe.model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_meter_leaves_the_old_bits_after_an_error_while_it_measures(gradiend, probe, error):
    before = bits(probe.model)
    meter = EditMeter(gradiend, probe)
    edited = []

    def fail(*_):
        edited.append(any(not torch.equal(t, before[n]) for n, t in bits(probe.model).items()))
        raise error

    def measure():
        with meter:
            meter.full((0.5, 0.05))

    handle = probe.model.register_forward_pre_hook(fail)
    with pytest.raises(error):
        measure()
    handle.remove()

    assert edited == [True]  # the control
    assert_bits(probe.model, before)
    assert probe.measure() == meter.before
    measure()  # nothing of the failed edit was kept
    with gradiend.edited(probe.model, 0.5, 0.05):
        assert meter.full((0.5, 0.05)) == probe.measure()


@pytest.mark.parametrize("h", [0.0, 1.0, -0.5])
def test_a_step_size_gives_the_update_its_share_of_the_weights_norm(gradiend, probe, h):
    selected = set(gradiend.names)
    before = {n: p.detach().clone() for n, p in probe.model.named_parameters() if n in selected}
    with EditMeter(gradiend, probe) as meter:
        alpha = meter.step_size_of(0.01, h)

    with gradiend.edited(probe.model, h, alpha):
        now = probe.model.named_parameters()
        moved = [p.detach() - before[name] for name, p in now if name in selected]

    def norm(tensors):
        return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))

    assert alpha > 0.0
    assert norm(moved) / norm(before.values()) == pytest.approx(0.01, rel=1e-3)


def test_a_step_size_of_no_update_is_the_share_itself(gradiend, probe):
    zero_decoder(gradiend)

    with EditMeter(gradiend, probe) as meter:
        assert meter.step_size_of(0.01, 1.0) == 0.01


# ---- the sweep ----


def test_a_sweep_measures_every_combination(gradiend, probe):
    points = sweep(gradiend, probe, [0.0, 1.0], [0.0, -0.05, 0.05], progress=False)

    assert [(p.feature_factor, p.step_size) for p in points] == [
        (0.0, 0.0), (0.0, -0.05), (0.0, 0.05), (1.0, 0.0), (1.0, -0.05), (1.0, 0.05)
    ]  # fmt: skip
    assert points[0].measures == points[3].measures == probe.measure()  # α = 0 is the base model
    for point in (points[2], points[4]):
        with gradiend.edited(probe.model, point.feature_factor, point.step_size):
            assert probe.measure() == point.measures


def test_opposite_steps_along_a_class_move_its_probability_in_opposite_directions(gradiend, probe):
    # α < 0 at h = 1 is a descent step of the + class's loss: P₊ rises.
    down, base, up = (p.measures for p in sweep(gradiend, probe, [1.0], [-0.02, 0.0, 0.02],
                                                progress=False))  # fmt: skip

    ratio = [m.p_plus / (m.p_plus + m.p_minus) for m in (down, base, up)]
    assert ratio[0] > ratio[1] > ratio[2]


def test_a_point_is_flat_for_tables(gradiend, probe):
    (point,) = sweep(gradiend, probe, [0.5], [0.01], progress=False)

    row = flat(point)

    assert row == {**asdict(point.measures), "feature_factor": 0.5, "step_size": 0.01}
    assert json.loads(json.dumps(row, allow_nan=False)) == {**row, "p_others": []}


def test_a_sweep_passes_over_edits_that_break_the_model(gradiend, probe):
    before = bits(probe.model)

    points = sweep(gradiend, probe, [1.0, 0.5], [0.01, 1e38, -0.01, -1e38], progress=False)

    assert [(p.feature_factor, p.step_size) for p in points] == [
        (1.0, 0.01), (1.0, -0.01), (0.5, 0.01), (0.5, -0.01)
    ]  # fmt: skip
    assert all(math.isfinite(v) for p in points for v in numbers(p.measures).values())
    assert_bits(probe.model, before)
    with gradiend.edited(probe.model, 1.0, 1e38), pytest.raises(NumericalError):
        probe.measure()  # the control


def test_a_sweep_measures_an_edit_that_stands_twice_in_the_grid_once(gradiend, probe, counted):
    points = sweep(gradiend, probe, [0.5, 0.5], [0.01, 0.01], progress=False)

    assert len(points) == 4
    assert len(set(points)) == 1
    assert counted == {"slots": 2, "neutral": 1}


@pytest.mark.parametrize("planted", ["gpt2"], indirect=True)
def test_a_gradiend_of_two_features_is_refused(planted, probe, gradiend_for):
    gradiend = gradiend_for(planted.model, n_features=2)

    for search in (
        lambda: choose_edit(gradiend, probe, progress=False),
        lambda: sweep(gradiend, probe, [0.0], [0.1], progress=False),
    ):
        with pytest.raises(GradiendError):
            search()
