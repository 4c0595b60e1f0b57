import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_gradiend.errors import DataError, NumericalError
from hf_gradiend.evaluation.probe import (
    EditMeasures,
    EditProbe,
    ProbeReading,
    SlotProbe,
    compared,
    spellings,
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


# ---- measures ----


def test_the_measures_equal_those_worked_by_hand():
    # Two texts: P₊ and P₋ of 0.3, 0.1 and of 0.2, 0.2.
    found = EditMeasures.of(torch.tensor([[0.3, 0.1], [0.2, 0.2]]).double(), lm_score=0.5)

    expected = {
        "imbalance": (0.5 + 0.0) / 2,
        "mass": 0.4,
        "p_plus": 0.25,
        "p_minus": 0.15,
        "lm_score": 0.5,
        "bpi": 0.5 * (0.8 * 0.4 + 1.0 * 0.4) / 2,
        "fpi": 0.5 * (0.9 * 0.3 + 0.8 * 0.2) / 2,
        "mpi": 0.5 * (0.7 * 0.1 + 0.8 * 0.2) / 2,
        "several_class_index": 0.5 * (0.8 * 0.1 + 1.0 * 0.2) / 2,
    }
    numbers = asdict(found)
    assert numbers.pop("p_others") == ()
    assert numbers == pytest.approx(expected, rel=1e-6)  # float32 probabilities


def test_the_measures_of_three_classes_equal_those_worked_by_hand():
    # + − and another: 0.3, 0.1, 0.2 and 0.1, 0.1, 0.4.
    found = EditMeasures.of(torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.1, 0.4]]).double(), lm_score=0.5)

    expected = {
        "imbalance": (0.2 / 0.6 + 0.3 / 0.6) / 2,
        "mass": 0.6,
        "p_plus": 0.2,
        "p_minus": 0.1,
        "lm_score": 0.5,
        "bpi": 0.5 * (0.8 * 0.4 + 1.0 * 0.2) / 2,  # of the first two alone
        "fpi": 0.5 * (0.9 * 0.3 + 0.9 * 0.1) / 2,
        "mpi": 0.5 * (0.7 * 0.1 + 0.9 * 0.1) / 2,
        "several_class_index": 0.5 * (0.8 * 0.1 + 0.7 * 0.1) / 2,
    }
    numbers = asdict(found)
    assert numbers.pop("p_others") == pytest.approx((0.3,))
    assert numbers == pytest.approx(expected, rel=1e-6)
    # The control: means before the spread would be (0.3 − 0.1)/0.6 and (1 − 0.2)·0.1.
    assert found.imbalance != pytest.approx(1 / 3, abs=1e-3)
    assert found.several_class_index != pytest.approx(0.5 * 0.08, abs=1e-3)


def test_four_classes_in_any_order_have_the_same_index_and_imbalance():
    p = torch.tensor([[0.3, 0.1, 0.2, 0.05], [0.1, 0.1, 0.4, 0.3]])

    one, other = EditMeasures.of(p, 0.9), EditMeasures.of(p[:, [2, 0, 3, 1]], 0.9)

    for name in ("imbalance", "mass", "several_class_index"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-12)
    assert one.p_others == pytest.approx((0.3, 0.175))
    assert one.bpi != pytest.approx(other.bpi)  # the control


def test_the_two_classes_are_mirror_images():
    p = torch.tensor([[0.4, 0.1], [0.05, 0.3]])

    one, other = EditMeasures.of(p, 0.9), EditMeasures.of(p.flip(1), 0.9)

    assert (one.fpi, one.mpi, one.p_plus) == pytest.approx((other.mpi, other.fpi, other.p_minus))
    assert (one.bpi, one.imbalance, one.mass) == pytest.approx(
        (other.bpi, other.imbalance, other.mass)
    )
    assert one.fpi != pytest.approx(one.mpi)  # the control


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_text_without_any_mass_is_wholly_unbalanced_and_no_nan(n_classes):
    found = EditMeasures.of(torch.tensor([[0.0] * n_classes, [0.2] * n_classes]), 1.0)

    assert found.imbalance == 0.5
    assert all(map(math.isfinite, [*found.p_others, *(vars(found)[n] for n in NUMBERS)]))


NUMBERS = ("imbalance", "mass", "p_plus", "p_minus", "lm_score", "bpi", "fpi", "mpi",
           "several_class_index")  # fmt: skip


def test_another_language_model_score_multiplies_the_indices_alone():
    p = torch.tensor([[0.3, 0.1, 0.2], [0.2, 0.2, 0.1]])

    found = EditMeasures.of(p, 1.0).with_lm_score(0.37)

    assert found == EditMeasures.of(p, 0.37)
    assert found != replace(EditMeasures.of(p, 1.0), lm_score=0.37)  # the control


def test_measures_are_json_values_but_for_their_tuple():
    numbers = asdict(EditMeasures.of(torch.tensor([[0.3, 0.1, 0.2]]), 1.0))

    back = json.loads(json.dumps(numbers, allow_nan=False))

    assert back == {**numbers, "p_others": list(numbers["p_others"])}


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


# ---- several classes, several tokens ----


def test_a_probe_of_three_classes_reads_each_class_at_the_same_slot(planted):
    words = (["she"], ["he"], ["anna", "paul"])
    three = SlotProbe(PROMPTS, words, planted.model, planted.tokenizer)
    two = SlotProbe(PROMPTS, words[:2], planted.model, planted.tokenizer)
    other = SlotProbe(PROMPTS, (words[0], words[2]), planted.model, planted.tokenizer)

    found = three.probabilities()

    assert found.shape == (len(PROMPTS), 3)
    torch.testing.assert_close(found[:, :2], two.probabilities())
    torch.testing.assert_close(found[:, 2], other.probabilities()[:, 1])
    assert float(found.sum(1).max()) <= 1.0 + 1e-6
    measures = EditProbe(PROMPTS, words, NEUTRAL, planted.model, planted.tokenizer).measure()
    assert measures.p_others == pytest.approx((float(found[:, 2].double().mean()),))
    assert measures.mass == pytest.approx(float(found.sum(1).mean()))


def test_two_slots_of_a_text_are_read_as_their_mean(planted_bert):
    planted = planted_bert
    once = [{"text": "the nurse said that [TARGET] was late ."}]
    twice = [{"text": "the nurse said that [TARGET] was late . the nurse said that [TARGET] was"}]
    words = (["she"], ["he"])

    found = SlotProbe(twice, words, planted.model, planted.tokenizer).probabilities()[0]

    mask = planted.tokenizer.mask_token
    ids = planted.tokenizer(twice[0]["text"].replace("[TARGET]", mask), return_tensors="pt")
    with torch.no_grad():
        softmax = planted.model(**ids).logits[0].softmax(-1)
    at = ids["input_ids"][0] == planted.tokenizer.mask_token_id
    tokens = planted.tokenizer.convert_tokens_to_ids(["she", "he"])
    assert int(at.sum()) == 2
    torch.testing.assert_close(found, softmax[at][:, tokens].mean(0), rtol=1e-4, atol=1e-6)
    alone = SlotProbe(once, words, planted.model, planted.tokenizer).probabilities()[0]
    assert not torch.allclose(found, alone, atol=1e-3)  # the control


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_order_of_a_class_s_words_makes_no_difference(make_lm, family):
    lm = make_lm(family)
    prompts = [{"text": "The nurse said that [TARGET] was late."}]

    one, other = (
        SlotProbe(prompts, (words, ["he"]), lm.model, lm.tokenizer).probabilities()
        for words in (["she", "hers"], ["hers", "she"])  # "hers" is two tokens
    )

    torch.testing.assert_close(one, other)


# ---- readings ----


def reading(probe, probabilities, sums=None):
    sums = probe.language.sums_by_text(probe.model) if sums is None else sums
    return ProbeReading(torch.tensor(probabilities), sums, probe.language)


def test_a_reading_gives_the_measures_and_those_of_a_resample(planted_gpt2):
    planted = planted_gpt2
    probe = EditProbe(PROMPTS, (["she"], ["he"]), NEUTRAL, planted.model, planted.tokenizer)

    found = probe.read()

    assert found.measures == probe.measure()
    assert found.measures.lm_score == probe.language.score(planted.model)
    p = probe.probabilities()
    rows = torch.tensor([0, 0, 2])
    expected = EditMeasures.of(p[rows], 1.0)
    for name in ("imbalance", "mass", "p_plus", "p_minus"):
        assert found.value(name, rows) == getattr(expected, name)
        assert found.n_texts(name) == 4
    assert found.n_texts("lm_score") == 2
    one = found.value("lm_score", torch.tensor([1]))
    alone = float(1 / (1 + found.language_sums[1, 0] / found.language_sums[1, 1]))
    assert one == pytest.approx(alone)


def test_readings_are_compared_text_by_text(planted_gpt2):
    planted = planted_gpt2
    probe = EditProbe(PROMPTS, (["she"], ["he"]), NEUTRAL, planted.model, planted.tokenizer)
    p = [[0.1, 0.1], [0.2, 0.2], [0.4, 0.3], [0.3, 0.1]]
    before, after = reading(probe, p), reading(probe, [[x / 2, y] for x, y in p])

    found = compared(before, after)

    assert set(found) == {"imbalance", "mass", "p_plus", "p_minus", "lm_score"}
    for name, estimates in found.items():
        assert set(estimates) == {"before", "after", "ratio"}
        assert estimates["ratio"].value == pytest.approx(
            estimates["after"].value / estimates["before"].value
        )
        assert estimates["before"].value == pytest.approx(getattr(before.measures, name))
        assert estimates["after"].value == pytest.approx(getattr(after.measures, name))
        assert estimates["ratio"].n == (2 if name == "lm_score" else 4)
    # Each text's P₊ is halved: paired, the ratio is ½ in every resample; unpaired it is not.
    half = found["p_plus"]["ratio"]
    assert (half.low, half.value, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found["p_plus"]["after"].high / found["p_plus"]["before"].low > 0.6  # the control
    assert found["p_minus"]["ratio"].low == found["p_minus"]["ratio"].high == 1.0


def test_a_measure_of_0_before_the_edit_leaves_the_others_to_be_compared(planted_bert):
    planted = planted_bert
    probe = EditProbe(PROMPTS, (["she"], ["he"]), NEUTRAL, planted.model, planted.tokenizer)
    assert probe.measure().lm_score == 0.0  # what the model is like

    found = compared(probe.read(), probe.read())

    assert found["mass"]["ratio"].value == 1.0
