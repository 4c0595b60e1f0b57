"""What a model says of an item, computed again with plain calls of transformers.

Nothing of the package's own reading of texts is used here: token positions come from
`char_to_token`, log-probabilities from one forward pass per masked token.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from hf_gradiend.errors import DataError, NumericalError
from hf_gradiend.evaluation.bias import wikitext
from hf_gradiend.evaluation.bias.bec_pro import BecPro
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.bias.seat import Seat
from hf_gradiend.evaluation.bias.stereoset import StereoSet, filling
from hf_gradiend.evaluation.bias.suite import BENCHMARKS
from hf_gradiend.evaluation.bias.wikitext import WikiText2
from hf_gradiend.evaluation.bias.winobias import WinoBias
from hf_gradiend.evaluation.bias.winogender import Winogender
from hf_gradiend.evaluation.likelihoods import Likelihoods

FAMILIES = ("bert", "roberta", "gpt2", "llama")
EVERY_FAMILY = pytest.mark.parametrize("lm", FAMILIES, indirect=True)


@pytest.fixture
def lm(request, make_lm):
    return make_lm(request.param)


def values_of(benchmark, lm, items, **options):
    likelihoods = Likelihoods(lm.model, lm.tokenizer, progress=False, **options)
    return benchmark.values(likelihoods, items)


# ---- the oracle ----------------------------------------------------------------------------------


@dataclass
class Tokens:
    """A text's ids as the model reads it, and how many come before its own first token."""

    ids: list[int]
    own: list[int]
    encoding: object
    shift: int

    def places(self, start: int, stop: int) -> list[int]:
        """Positions of the tokens of some characters, by transformers' own alignment."""
        found = {self.encoding.char_to_token(i) for i in range(start, stop)} - {None}
        return sorted(i + self.shift for i in found)


def tokens_of(lm, text):
    if lm.objective == "causal":
        encoding = lm.tokenizer(text, add_special_tokens=False)
        ids = [lm.tokenizer.bos_token_id, *encoding["input_ids"]]
        return Tokens(ids, list(range(1, len(ids))), encoding, 1)
    encoding = lm.tokenizer(text)
    ids = encoding["input_ids"]
    return Tokens(ids, list(range(1, len(ids) - 1)), encoding, 0)  # [CLS] … [SEP]


@torch.no_grad()
def log_p(lm, ids, place, hidden=None, token=None):
    """Log-probability of the token at a place; a masked model sees the others but the hidden."""
    token = ids[place] if token is None else token
    if lm.objective == "causal":
        return float(lm.model(torch.tensor([ids])).logits[0, place - 1].log_softmax(-1)[token])
    mask = lm.tokenizer.mask_token_id
    seen = [mask if i in (hidden or {place}) else t for i, t in enumerate(ids)]
    return float(lm.model(torch.tensor([seen])).logits[0, place].log_softmax(-1)[token])


def sentence_score(lm, text):
    tokens = tokens_of(lm, text)
    return sum(log_p(lm, tokens.ids, place) for place in tokens.own)


# ---- StereoSet -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "sentence", "word"),
    [
        ("The chess player was BLANK.", "The chess player was asian.", "asian"),
        ("BLANK men are tall", "Ethiopian men are tall", "Ethiopian"),
        ("The BLANK, was late.", "The nurse, was late.", "nurse"),
        ("My BLANK's nurse", "My doctor's nurse", "doctors"),  # as the published code has it
    ],
)
def test_stereoset_s_filling_is_the_word_in_the_gap(context, sentence, word):
    assert filling(context, sentence) == word


@pytest.mark.parametrize(
    ("context", "sentence"), [("Anna said it.", "Anna said it."), ("Anna said BLANK", "Anna said")]
)
def test_a_sentence_that_does_not_fill_its_gap_is_refused(context, sentence):
    with pytest.raises(DataError, match="to fill the gap"):
        filling(context, sentence)


@EVERY_FAMILY
def test_stereoset_values_are_those_of_transformers_alone(lm, data):
    items = StereoSet().load(data)

    found = values_of(StereoSet(), lm, items)

    for item, row in zip(items, found.tolist(), strict=True):
        expected = []
        for word in item["fillings"]:
            start = item["context"].index("BLANK")
            tokens = tokens_of(lm, item["context"].replace("BLANK", word))
            if lm.objective == "causal":
                logs = [log_p(lm, tokens.ids, place) for place in tokens.own]
                expected.append(2 ** (sum(p / math.log(2) for p in logs) / len(logs)))
                continue
            places = tokens.places(start, start + len(word))
            shown = []
            for number, place in enumerate(places):  # revealed from the left, one mask, the rest
                ids = [*tokens.ids[:place], 0, *tokens.ids[places[-1] + 1 :]]
                shown.append(math.exp(log_p(lm, ids, place, token=tokens.ids[places[number]])))
            expected.append(sum(shown) / len(shown))
        assert row == pytest.approx(expected, rel=1e-5)
        assert len({round(value, 9) for value in expected}) == 3  # the control
    assert len(items) == 3


def test_a_filling_of_several_sub_tokens_is_among_the_sentences(make_lm, data):
    # The control of the test above: "hers" is "her" and "##s", or " her" and "s".
    fillings = {word for item in StereoSet().load(data) for word in item["fillings"]}

    for family in FAMILIES:
        tokenizer = make_lm(family).tokenizer
        lengths = {len(tokens) for tokens in (tokenizer.tokenize(" " + w) for w in fillings)}
        assert {1, 2} <= lengths, family


# ---- CrowS-Pairs ---------------------------------------------------------------------------------


@EVERY_FAMILY
def test_crows_pairs_three_scorings_are_those_of_transformers_alone(lm, data):
    items = CrowsPairs().load(data)[:2]

    found = values_of(CrowsPairs(), lm, items)

    for item, row in zip(items, found.tolist(), strict=True):
        sides = [tokens_of(lm, item[side]) for side in ("more", "less")]
        logs = [[log_p(lm, t.ids, place) for place in t.own] for t in sides]
        texts = [[t.ids[place] for place in t.own] for t in sides]
        # These pairs differ in one stretch: what they share is a beginning and an end.
        head = next(i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
        backwards = zip(reversed(texts[0]), reversed(texts[1]), strict=False)
        tail = next(i for i, (a, b) in enumerate(backwards) if a != b)
        shared = [p[:head] + p[len(p) - tail :] for p in logs]
        own = [p[head : len(p) - tail] for p in logs]
        expected = [
            *(sum(p) for p in shared),
            *(sum(p) / len(p) for p in own),
            *(sum(p) for p in logs),
        ]
        assert row == pytest.approx(expected, abs=1e-4)
        assert all(shared)
        assert all(own)  # the control: there was something of each kind


@pytest.mark.parametrize("lm", ["bert", "gpt2"], indirect=True)
def test_a_sentence_that_is_contained_in_the_other_has_no_difference(lm):
    pair = {"more": "The nurse was late.", "less": "The nurse was late, late."}

    (row,) = values_of(CrowsPairs(), lm, [pair]).tolist()

    assert row[2] == -math.inf
    assert math.isfinite(row[3])
    assert row[0] != row[1]  # the shared tokens stand in other company


# ---- whole sentences -----------------------------------------------------------------------------


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("benchmark", "sides"), [(WinoBias, ("pro", "anti")), (Winogender, ("she", "he"))]
)
def test_sentences_score_as_with_transformers_alone(lm, data, benchmark, sides):
    items = benchmark().load(data)

    found = values_of(benchmark(), lm, items)

    expected = [[sentence_score(lm, item[side]) for side in sides] for item in items]
    assert found.tolist() == [pytest.approx(row, abs=1e-4) for row in expected]
    assert all(abs(a - b) > 1e-3 for a, b in expected)  # the control: the pronoun matters


def test_winobias_sentences_come_without_numbers_and_brackets(data):
    items = WinoBias().load(data)

    assert [item["type"] for item in items] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert items[0] == {
        "pro": "The nurse said that she was late.",
        "anti": "The nurse said that he was late.",
        "type": 1,
    }
    assert items[7]["pro"] == "The doctor said that he was tired because it was late, late."


def test_winobias_files_of_unequal_length_are_refused(data):
    file = data / "winobias" / "pro_stereotyped_type2.txt.dev"
    file.write_text(file.read_text("utf-8") + "3 [The nurse] said it.\n", encoding="utf-8")

    with pytest.raises(DataError, match="type 2 dev, but there are 3 sentences for and 2 against"):
        WinoBias().load(data)


def test_winogender_takes_the_sentences_whose_pronoun_is_the_occupation(data):
    items = Winogender().load(data)

    assert [item["occupation"] for item in items] == ["nurse", "doctor", "doctor nurse"]
    assert items[0] == {
        "she": "The nurse said that she was tired.",  # tired: answer 0, late: answer 1
        "he": "The nurse said that he was tired.",
        "occupation": "nurse",
        "labour_share": 0.9,
    }
    assert len(items) == 3


def test_labour_shares_are_held_in_float64(data):
    shares = Winogender().columns(Winogender().load(data))["labour_share"]

    assert shares.tolist() == [0.9, 0.4, 0.6]


# ---- BEC-Pro -------------------------------------------------------------------------------------


@EVERY_FAMILY
def test_bec_pro_associations_are_those_of_transformers_alone(lm, data):
    items = BecPro().load(data)

    found = values_of(BecPro(), lm, items)[:, 0].tolist()

    def profession(item):
        tokens = tokens_of(lm, item["sentence"])
        return sum(log_p(lm, tokens.ids, place) for place in tokens.places(*item["profession"]))

    expected = []
    for item in items:
        tokens = tokens_of(lm, item["sentence"])
        if lm.objective == "causal":
            # Of all persons in the same sentence about the same profession.
            frame = [other for other in items if other["frame"] == item["frame"]]
            assert len(frame) == 4
            mean = sum(math.exp(profession(other)) for other in frame) / len(frame)
            expected.append(profession(item) - math.log(mean))
            continue
        person, job = tokens.places(*item["person"]), tokens.places(*item["profession"])
        shown = sum(log_p(lm, tokens.ids, place, set(person)) for place in person)
        alone = sum(log_p(lm, tokens.ids, place, {*person, *job}) for place in person)
        expected.append(shown - alone)
    assert found == pytest.approx(expected, abs=2e-4)
    assert max(map(abs, expected)) > 0.01  # the control


def test_bec_pro_finds_the_spans_of_person_and_profession(data):
    items = BecPro().load(data)

    for item in items:
        person, profession = (item["sentence"][slice(*item[w])] for w in ("person", "profession"))
        assert person in ("Anna", "she", "Paul", "he")
        assert profession == item["frame"][1]
    assert len(items) == 24
    assert {item["group"] for item in items} == {"female", "male", "balanced"}
    # "she" contains "he", and "Anna" of the first frame stands at the beginning.
    assert items[0]["person"] == (0, 4)


# ---- SEAT ----------------------------------------------------------------------------------------


def embedding(lm, text, places=None):
    with torch.no_grad():
        states = lm.model.base_model(**lm.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    vector = states.mean(0) if places is None else states[places].mean(0)
    return (vector / vector.norm()).double()


@EVERY_FAMILY
def test_seat_s_sentence_vector_is_the_mean_of_the_last_hidden_states(lm, data):
    items = Seat().load(data)[:120]

    found = values_of(Seat(), lm, items)

    for item, vector in list(zip(items, found, strict=True))[::9]:
        torch.testing.assert_close(vector, embedding(lm, item["sentence"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(120).double(), atol=1e-6, rtol=0)
    assert float((found - found[0]).abs().max()) > 1e-3  # the control


def word_vector(lm, item):
    begin = next(
        len(head)
        for head in ("This is ", "That is ", "There is ", "Here is ", "It is ")
        if item["sentence"] == f"{head}{item['word']}."
    )
    encoding = lm.tokenizer(item["sentence"])
    characters = range(begin, begin + len(item["word"]))
    places = sorted({encoding.char_to_token(i) for i in characters} - {None})
    return embedding(lm, item["sentence"], places)


@EVERY_FAMILY
def test_seat_s_word_vector_is_the_mean_of_the_word_s_own_states(lm, data):
    items = Seat("word").load(data)
    # "his" stands in "This" as well, "he" and "her" in "There": see the test below.
    sure = [item for item in items if item["word"] not in ("his", "he", "her")][::37]

    found = values_of(Seat("word"), lm, sure)

    for item, vector in zip(sure, found, strict=True):
        torch.testing.assert_close(vector, word_vector(lm, item), atol=1e-5, rtol=0)
    assert len(sure) > 20
    whole = values_of(Seat(), lm, sure)
    assert float((found - whole).abs().amax(1).min()) > 1e-3  # the control


@pytest.mark.parametrize("lm", ["bert", "gpt2"], indirect=True)
def test_seat_s_word_is_not_looked_for_in_the_words_before_it(lm, data):
    hidden = ("This is his.", "There is he.", "There is her.")
    items = [item for item in Seat("word").load(data) if item["sentence"] in hidden]

    found = values_of(Seat("word"), lm, items)

    assert {item["sentence"] for item in items} == set(hidden)
    for item, vector in zip(items, found, strict=True):
        torch.testing.assert_close(vector, word_vector(lm, item), atol=1e-5, rtol=0)


# ---- WikiText ------------------------------------------------------------------------------------


@pytest.fixture
def window(monkeypatch):
    monkeypatch.setattr(wikitext, "WINDOW", 9)
    return 9


PASSAGES = (
    "The nurse said that she was late because the doctor was tired. My doctor said that it was.",
    "Anna said it.",
    "Paul was tired, Anna was late, the nurse was tired, the doctor was late, it was late.",
)


@pytest.mark.parametrize("lm", ["gpt2", "llama"], indirect=True)
def test_a_causal_model_reads_every_token_of_the_window(lm, window):
    items = [{"text": text} for text in PASSAGES]

    found = values_of(WikiText2(), lm, items).tolist()

    for text, (nats, count) in zip(PASSAGES, found, strict=True):
        tokens = tokens_of(lm, text)
        places = tokens.own[:window]
        assert count == len(places)
        assert nats == pytest.approx(-sum(log_p(lm, tokens.ids, p) for p in places), abs=1e-4)
    assert max(count for _, count in found) == window
    assert min(count for _, count in found) < window  # the control: a short text


@pytest.mark.parametrize("lm", ["bert", "roberta"], indirect=True)
def test_a_masked_model_is_asked_for_the_masked_tokens_of_the_window_together(lm, window):
    """How the masks are drawn is the package's; what it makes of them is checked."""
    seen = []

    def remember(_module, _args, options):
        ids, mask = options["input_ids"], options["attention_mask"]
        seen.extend(row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True))

    handle = lm.model.register_forward_pre_hook(remember, with_kwargs=True)
    items = [{"text": text} for text in PASSAGES]
    found = values_of(WikiText2(), lm, items).tolist()
    handle.remove()

    mask_id = lm.tokenizer.mask_token_id
    assert len(seen) == len(PASSAGES)
    for text, (nats, count) in zip(PASSAGES, found, strict=True):
        full = tokens_of(lm, text)
        ids = [*full.ids[: 1 + len(full.own[:window])], full.ids[-1]]  # [CLS], window, [SEP]
        (masked,) = [
            row for row in seen
            if len(row) == len(ids)
            and all(a in (b, mask_id) for a, b in zip(row, ids, strict=True))
        ]  # fmt: skip
        hidden = {i for i, token in enumerate(masked) if token == mask_id}
        assert hidden
        assert hidden <= set(range(1, len(ids) - 1))  # never a special token
        assert count == len(hidden)
        expected = -sum(log_p(lm, ids, place, hidden) for place in hidden)
        assert nats == pytest.approx(expected, abs=1e-4)


def test_about_fifteen_of_a_hundred_tokens_are_masked(make_lm):
    lm = make_lm("bert")
    text = " ".join(["The nurse said that she was late because the doctor was tired."] * 4)
    items = [{"text": text} for _ in range(40)]

    counts = values_of(WikiText2(), lm, items)[:, 1]

    n = len(tokens_of(lm, text).own)
    # 40 texts of 52 tokens: two standard errors of the share are 1.6 %.
    assert float(counts.sum()) / (40 * n) == pytest.approx(0.15, abs=0.03)


def test_the_pieces_hold_the_text_in_order_and_about_as_many_characters(data):
    items = WikiText2("whole").load(data)

    text = (data / "wikitext2_test.txt").read_text("utf-8")
    assert len(items) == len(text) // 100 > 8
    joined = " ".join(item["text"] for item in items)
    assert text.strip().startswith(joined)
    assert len(joined) > len(text) - 110  # but for the last piece
    assert all(95 <= len(item["text"]) <= 110 for item in items)
    assert WikiText2().load(data) == items[::4]  # the quick one takes every fourth


def test_a_text_longer_than_the_model_is_cut_to_the_window(make_lm, window):
    lm = make_lm("gpt2")  # 64 positions

    found = values_of(WikiText2(), lm, [{"text": " ".join(PASSAGES * 3)}])

    assert found[0, 1] == window


# ---- all of them ---------------------------------------------------------------------------------


def some_items(name, data):
    items = BENCHMARKS[name]().load(data)
    if name == "seat":
        return items[::97]
    return [{"text": text} for text in PASSAGES] if name == "wikitext2" else items


@pytest.mark.parametrize(
    ("name", "lm"),
    [
        pytest.param(
            name,
            family,
            id=f"{name}-{family}",
        )
        for name in BENCHMARKS
        for family in ("bert", "gpt2")
    ],
    indirect=["lm"],
)
def test_an_item_has_the_same_values_alone_and_among_others(name, lm, data):
    items = some_items(name, data)
    parts = [[item] for item in items]
    if (name, lm.objective) == ("bec_pro", "causal"):
        # By its definition over all persons of a sentence, which come together.
        parts = [items[first : first + 4] for first in range(0, len(items), 4)]
        assert all(len({item["frame"] for item in part}) == 1 for part in parts)

    together = values_of(BENCHMARKS[name](), lm, items)
    turned = values_of(BENCHMARKS[name](), lm, items[::-1])
    apart = torch.cat([values_of(BENCHMARKS[name](), lm, part) for part in parts])

    assert together.dtype == torch.float64
    assert together.shape[0] == len(items) > 2
    torch.testing.assert_close(turned.flip(0), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)
    assert float((together - together[0]).abs().max()) > 1e-3  # the control


@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "seat"])
@pytest.mark.parametrize("lm", ["bert", "gpt2"], indirect=True)
def test_the_size_of_the_batches_makes_no_difference(name, lm, data, budget):
    items = some_items(name, data)

    found = values_of(BENCHMARKS[name](), lm, items, tokens_per_batch=budget)

    torch.testing.assert_close(found, values_of(BENCHMARKS[name](), lm, items), atol=1e-5, rtol=0)


def test_a_causal_model_s_associations_are_probabilities_over_their_mean(make_lm, data):
    lm, items = make_lm("gpt2"), BecPro().load(data)

    ratios = values_of(BecPro(), lm, items)[:, 0].exp().view(-1, 4)  # four persons a frame

    assert ratios.mean(1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    assert float(ratios.std()) > 1e-3  # the control


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("lm", ["bert", "gpt2"], indirect=True)
def test_a_model_that_says_nan_is_refused(name, lm, data):
    with torch.no_grad():
        for parameter in lm.model.base_model.parameters():
            parameter.fill_(torch.nan)

    with pytest.raises(NumericalError, match="NaN"):
        values_of(BENCHMARKS[name](), lm, some_items(name, data))
