import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_gradiend.errors import CompatibilityError, DataError, NumericalError
from hf_gradiend.evaluation.decoder import (
    EditMeasures,
    EditProbe,
    choose_edit,
    flat,
    spellings,
    sweep,
)

PROMPTS = [
    {"text": "the doctor said that [TARGET] was late ."},
    {"text": "the nurse went home because [TARGET] was tired ."},
    {"text": "the doctor was late because [TARGET] was tired ."},
    {"text": "when the nurse came home , [TARGET] was tired ."},
]
NEUTRAL = ["the doctor took the red coat home .", "the day was long because the rain began ."]


@pytest.fixture
def probe(planted):
    return EditProbe(PROMPTS, (["she"], ["he"]), NEUTRAL, planted.model, planted.tokenizer)


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_bits(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- measures ----


def test_the_measures_equal_those_worked_by_hand():
    # Two texts: P₊ and P₋ of 0.3, 0.1 and of 0.2, 0.2.
    found = EditMeasures.of(torch.tensor([[0.3, 0.1], [0.2, 0.2]]), lm_score=0.5)

    expected = {
        "imbalance": (0.5 + 0.0) / 2,
        "mass": 0.4,
        "p_plus": 0.25,
        "p_minus": 0.15,
        "lm_score": 0.5,
        "bpi": 0.5 * (0.8 * 0.4 + 1.0 * 0.4) / 2,
        "fpi": 0.5 * (0.9 * 0.3 + 0.8 * 0.2) / 2,
        "mpi": 0.5 * (0.7 * 0.1 + 0.8 * 0.2) / 2,
    }
    # float32 probabilities
    assert vars(found) == pytest.approx(expected, rel=1e-6)


def test_the_two_classes_are_mirror_images():
    p = torch.tensor([[0.4, 0.1], [0.05, 0.3]])

    one, other = EditMeasures.of(p, 0.9), EditMeasures.of(p.flip(1), 0.9)

    assert (one.fpi, one.mpi, one.p_plus) == pytest.approx((other.mpi, other.fpi, other.p_minus))
    assert (one.bpi, one.imbalance, one.mass) == pytest.approx(
        (other.bpi, other.imbalance, other.mass)
    )
    assert one.fpi != pytest.approx(one.mpi)  # the control


def test_a_text_without_any_mass_is_wholly_unbalanced_and_no_nan():
    found = EditMeasures.of(torch.tensor([[0.0, 0.0], [0.2, 0.2]]), 1.0)

    assert found.imbalance == 0.5
    assert all(math.isfinite(value) for value in vars(found).values())


# ---- spellings ----


def word_pieces(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("[UNK]", *words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def byte_pairs(*words: str) -> PreTrainedTokenizerFast:
    """Byte-level tokens, with Ġ for a space."""
    tokens = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("words", [["he"], [" he"], ["He "], ["he", "He"]])
def test_every_spelling_of_a_word_is_found_and_no_other_word(words):
    found = {"he", "He", "HE", "Ġhe", "ĠHe"}
    others = {"the", "Ġthe", "hey", "Ġshe", "h", "Ġher"}
    tokenizer = byte_pairs(*sorted(found | others))

    ids = spellings(words, tokenizer)

    assert set(tokenizer.convert_ids_to_tokens(ids)) == found
    assert len(ids) == len(found)


def test_a_piece_within_a_word_is_not_the_word():
    tokenizer = word_pieces("he", "##he", "the", "She", "s", "##s")

    assert tokenizer.convert_ids_to_tokens(spellings(["he"], tokenizer)) == ["he"]


def test_the_words_of_a_class_are_taken_together():
    tokenizer = word_pieces("she", "her", "he", "woman")

    assert tokenizer.convert_ids_to_tokens(spellings(["her", "she"], tokenizer)) == ["she", "her"]


def test_a_class_without_a_single_token_is_an_error_that_names_its_words():
    with pytest.raises(DataError, match="'xe'"):
        spellings(["xe"], word_pieces("she", "he"))


# ---- probabilities ----


def by_full_softmax(planted, text: str) -> list[float]:
    """P(she) and P(he) from the whole vocabulary's softmax of one text, without the package."""
    tokenizer = planted.tokenizer
    if tokenizer.mask_token:
        ids = tokenizer(text.replace("[TARGET]", "[MASK]"))["input_ids"]
        at, words = ids.index(tokenizer.mask_token_id), ("she", "he")
    else:
        ids = tokenizer(text.split(" [TARGET]")[0])["input_ids"]
        at, words = len(ids) - 1, (" she", " he")
    with torch.no_grad():
        softmax = planted.model(torch.tensor([ids])).logits[0, at].softmax(-1)
    tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    return [float(softmax[token].sum()) for token in tokens]


def test_probabilities_are_those_of_the_full_softmax(planted, probe):
    expected = torch.tensor([by_full_softmax(planted, row["text"]) for row in PROMPTS])

    found = probe.probabilities()

    # Padded batches against single texts, in float32.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float(found.sum(1).min()) > 0.1  # the control: the model says one of the two


def test_all_spellings_count(planted, probe):
    alone = probe.probabilities()[:, 0]
    both = EditProbe(PROMPTS, (["she", "he"], ["was"]), NEUTRAL, planted.model, planted.tokenizer)

    torch.testing.assert_close(both.probabilities()[:, 0], alone + probe.probabilities()[:, 1])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_makes_no_difference(planted, probe, batch_size):
    small = EditProbe(PROMPTS, (["she"], ["he"]), NEUTRAL, planted.model, planted.tokenizer,
                      batch_size=batch_size)  # fmt: skip

    torch.testing.assert_close(small.probabilities(), probe.probabilities(), rtol=1e-4, atol=1e-6)


def test_a_model_that_says_nan_at_one_text_alone_is_an_error(planted, probe):
    # Only one text says "came"; the others are read as numbers.
    word = "came" if planted.tokenizer.mask_token else " came"
    (token,) = planted.tokenizer(word, add_special_tokens=False)["input_ids"]
    model = planted.model
    embeddings = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    assert bool(probe.probabilities().isfinite().all())  # the control
    with torch.no_grad():
        embeddings[token] = torch.nan
    model.get_input_embeddings().weight = embeddings  # untied from the head

    with pytest.raises(NumericalError, match="finite probabilities"):
        probe.probabilities()


def test_texts_without_room_are_left_out(planted_gpt2):
    prompts = [{"text": "[TARGET] was late ."}, *PROMPTS]
    probe = EditProbe(prompts, (["she"], ["he"]), NEUTRAL, planted_gpt2.model,
                      planted_gpt2.tokenizer)  # fmt: skip

    assert probe.probabilities().shape == (len(PROMPTS), 2)


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
        assert vars(probe.measure()) == pytest.approx(vars(after), rel=1e-6)
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
    assert choose_edit(gradiend, probe, progress=False, **{limit: 2.0}) is None
    assert choose_edit(gradiend, probe, progress=False, **{limit: 0.0}) is not None  # the control


@pytest.mark.parametrize("limit", [0.9, 0.999])
def test_a_tighter_limit_is_kept(gradiend, probe, limit):
    choice = choose_edit(gradiend, probe, lm_floor=limit, mass_floor=limit, progress=False)

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
    assert all(math.isfinite(value) for value in vars(choice.after).values())
    assert choice.after.imbalance < choice.before.imbalance


def test_a_gradiend_of_another_base_model_is_refused(probe, tiny_llama, gradiend_for):
    with pytest.raises(CompatibilityError):
        choose_edit(gradiend_for(tiny_llama), probe, progress=False)


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

    assert row == {**vars(point.measures), "feature_factor": 0.5, "step_size": 0.01}
    assert json.loads(json.dumps(row)) == row
