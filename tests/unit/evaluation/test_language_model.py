import math

import pytest
import torch

from hf_gradiend.errors import BaseModelError, DataError, NumericalError
from hf_gradiend.evaluation.language_model import LanguageModelProbe

TEXTS = [
    "Anna said that she was late.",
    "The doctor was late because my nurse said that it was tired.",
    "Paul said",
    "The nurse was tired, she said.",
]


@torch.no_grad()
def causal_nll(lm, texts, *, scored=lambda _: True):
    """Negative log-likelihood of each token that has something before it, one text at a time."""
    losses = []
    for text in texts:
        ids = lm.tokenizer(text)["input_ids"]
        log_probabilities = lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        losses += [
            -float(log_probabilities[i - 1, ids[i]]) for i in range(1, len(ids)) if scored(ids[i])
        ]
    return losses


def predict_only(lm, word):
    """Make a masked model predict one word everywhere."""
    with torch.no_grad():
        lm.model.cls.predictions.bias[lm.tokenizer.convert_tokens_to_ids(word)] = 1000.0


def lean_towards(lm, word):
    """Let a masked model say one word often, so that a random model finds something at all."""
    (token,) = lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        lm.model.get_output_embeddings().bias[token] += 6.0


# ---- causal ----


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma3"])
def test_the_causal_score_is_one_over_one_plus_the_loss_per_token(make_lm, family):
    lm = make_lm(family)
    losses = causal_nll(lm, TEXTS)

    score = LanguageModelProbe(TEXTS, lm.tokenizer, "causal").score(lm.model)

    assert score == pytest.approx(1 / (1 + sum(losses) / len(losses)), rel=1e-5)


def test_a_model_that_knows_nothing_scores_the_entropy_of_its_vocabulary(make_lm):
    lm = make_lm("llama")
    torch.nn.init.zeros_(lm.model.lm_head.weight)

    score = LanguageModelProbe(TEXTS, lm.tokenizer, "causal").score(lm.model)

    assert score == pytest.approx(1 / (1 + math.log(86)), rel=1e-6)


def test_special_tokens_of_a_causal_text_are_not_scored(make_lm):
    # Trap 5. The start token is read from, but never predicted.
    lm = make_lm("gpt2")
    texts = ["Anna said<|endoftext|> Paul", "The nurse was late"]
    ordinary = causal_nll(lm, texts, scored=lambda token: token != 0)
    with_special = causal_nll(lm, texts)

    probe = LanguageModelProbe(texts, lm.tokenizer, "causal")

    score = probe.score(lm.model)
    assert probe.n_tokens == len(ordinary) == len(with_special) - 1
    assert score == pytest.approx(1 / (1 + sum(ordinary) / len(ordinary)), rel=1e-5)
    # The control: counting it would be another number.
    assert abs(score - 1 / (1 + sum(with_special) / len(with_special))) > 1e-3


def test_the_first_token_is_scored_where_a_start_token_stands_before_it(make_lm):
    lm = {family: make_lm(family) for family in ("gpt2", "llama")}

    tokens = {
        family: LanguageModelProbe(["Anna said that"], one.tokenizer, "causal").n_tokens
        for family, one in lm.items()
    }

    assert tokens == {"gpt2": 2, "llama": 3}


# ---- masked ----


def test_the_masked_score_is_the_share_of_tokens_that_are_found(make_lm):
    # With every token masked, a model that always says "she" finds one token in six.
    lm = make_lm("bert")
    predict_only(lm, "she")

    probe = LanguageModelProbe(["anna said she was late."], lm.tokenizer, "masked", mask_share=1.0)

    assert probe.n_tokens == 6 * 4  # four draws
    assert probe.score(lm.model) == pytest.approx(1 / 6)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_the_masked_score_is_that_of_a_plain_forward_pass(make_lm, family):
    lm = make_lm(family)
    lean_towards(lm, "said")
    found = n_tokens = 0
    for text in TEXTS:
        ids = torch.tensor(lm.tokenizer(text)["input_ids"])
        masked = ids.clone()
        masked[1:-1] = lm.tokenizer.mask_token_id
        with torch.no_grad():
            predicted = lm.model(masked[None]).logits[0].argmax(-1)
        found += int((predicted == ids)[1:-1].sum())
        n_tokens += len(ids) - 2

    probe = LanguageModelProbe(TEXTS, lm.tokenizer, "masked", mask_share=1.0, n_draws=1)

    assert probe.n_tokens == n_tokens
    assert probe.score(lm.model) == pytest.approx(found / n_tokens)
    assert 0 < found < n_tokens  # the control


@pytest.mark.parametrize("token", ["[CLS]", "[SEP]", "[UNK]", "[PAD]"])
def test_special_tokens_of_a_masked_text_are_not_scored(make_lm, token):
    # Trap 5: "queen" is unknown to the tokenizer, and the texts differ in length.
    lm = make_lm("bert")
    predict_only(lm, token)
    texts = ["anna said queen was late.", "anna said"]

    probe = LanguageModelProbe(texts, lm.tokenizer, "masked", mask_share=1.0, n_draws=1)

    assert probe.n_tokens == 5 + 2
    assert probe.score(lm.model) == 0.0
    # The control: of 11 tokens with [UNK] and the ends, this model would have found some.
    ids = [i for text in texts for i in lm.tokenizer(text)["input_ids"]]
    assert token == "[PAD]" or lm.tokenizer.convert_tokens_to_ids(token) in ids


def inputs_seen(lm, probe):
    seen = []
    handle = lm.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    probe.score(lm.model)
    handle.remove()
    return seen


def test_about_the_share_of_the_tokens_is_masked_and_no_special_one(make_lm):
    lm = make_lm("bert")
    text = "the nurse said that the doctor was late because my nurse was tired"  # 13 tokens
    probe = LanguageModelProbe([text] * 100, lm.tokenizer, "masked", mask_share=0.3, n_draws=2)

    rows = torch.cat(inputs_seen(lm, probe))

    masked = rows == lm.tokenizer.mask_token_id
    assert rows.shape == (200, 15)
    assert probe.n_tokens == int(masked.sum())
    assert not masked[:, [0, -1]].any()
    # 2,600 tokens at 0.3: standard deviation 0.009; five of them.
    assert abs(float(masked[:, 1:-1].float().mean()) - 0.3) < 0.045
    # What is not masked is the text itself.
    ids = torch.tensor(lm.tokenizer(text)["input_ids"])
    assert torch.equal(rows[~masked], ids.expand_as(rows)[~masked])


def test_every_draw_has_other_masks_and_a_seed_gives_them_again(make_lm):
    lm = make_lm("bert")

    def masks(seed):
        probe = LanguageModelProbe(
            TEXTS * 5, lm.tokenizer, "masked", n_draws=2, seed=seed, batch_size=20
        )
        return [rows == lm.tokenizer.mask_token_id for rows in inputs_seen(lm, probe)]

    first, second = masks(seed=0)

    assert not torch.equal(first, second)
    assert all(map(torch.equal, masks(seed=0), [first, second]))
    assert not torch.equal(masks(seed=1)[0], first)


# ---- both ----


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "gpt2", "llama"])
def test_the_score_does_not_depend_on_the_batch_size(make_lm, family):
    lm = make_lm(family)
    lm.model.double()
    if lm.objective == "masked":
        lean_towards(lm, "said")
    probes = [
        LanguageModelProbe(TEXTS * 3, lm.tokenizer, lm.objective, batch_size=size, mask_share=0.5)
        for size in (1, 3, 32)
    ]

    scores = [probe.score(lm.model) for probe in probes]

    assert len({probe.n_tokens for probe in probes}) == 1
    assert scores[1:] == pytest.approx([scores[0]] * 2, rel=1e-10)
    assert 0.0 < scores[0] < 1.0  # the control


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_padding_side_of_the_tokenizer_makes_no_difference(make_lm, family):
    lm = make_lm(family)
    scores = []
    for side in ("left", "right"):
        lm.tokenizer.padding_side = side
        probe = LanguageModelProbe(TEXTS, lm.tokenizer, lm.objective, mask_share=0.5)
        scores.append(probe.score(lm.model))

    assert scores[0] == scores[1]


def test_the_rest_of_a_long_text_is_not_read(make_lm):
    lm = make_lm("gpt2")

    long = LanguageModelProbe(
        ["Anna said that she was late."], lm.tokenizer, "causal", max_length=4
    )
    short = LanguageModelProbe(["Anna said that she"], lm.tokenizer, "causal")

    assert long.n_tokens == short.n_tokens == 3
    assert long.score(lm.model) == short.score(lm.model)


def test_a_text_of_any_length_fits_into_the_model(make_lm):
    lm = make_lm("gpt2")  # 64 positions

    probe = LanguageModelProbe(["Anna" + " said" * 500], lm.tokenizer, "causal")

    assert probe.n_tokens == 63
    assert 0.0 < probe.score(lm.model) < 1.0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_scoring_leaves_the_model_as_it_was(make_lm, family):
    lm = make_lm(family)
    lm.model.train()
    list(lm.model.modules())[2].eval()
    modes = [module.training for module in lm.model.modules()]
    weights = [parameter.clone() for parameter in lm.model.parameters()]
    probe = LanguageModelProbe(TEXTS, lm.tokenizer, lm.objective)

    scores = {probe.score(lm.model) for _ in range(3)}

    assert len(scores) == 1  # dropout is off inside
    assert [module.training for module in lm.model.modules()] == modes
    assert all(map(torch.equal, weights, lm.model.parameters()))
    assert not any(module._forward_hooks for module in lm.model.modules())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_logits_that_are_not_numbers_are_an_error_in_whichever_text(make_lm, family):
    # Only the last and shortest text holds the word whose embedding is broken.
    lm = make_lm(family, tie_word_embeddings=False)
    texts = ["Anna said that she was late.", "my doctor was late."]
    probe = LanguageModelProbe(texts, lm.tokenizer, lm.objective, mask_share=0.5)
    word = {"bert": "doctor", "llama": "▁doctor"}[family]
    assert 0.0 <= probe.score(lm.model) <= 1.0  # the control
    with torch.no_grad():
        embeddings = lm.model.get_input_embeddings().weight
        embeddings[lm.tokenizer.convert_tokens_to_ids(word)] = torch.nan

    with pytest.raises(NumericalError, match="Expected finite logits on neutral text"):
        probe.score(lm.model)


@pytest.mark.parametrize("texts", [["Anna"], [""], ["<|endoftext|>"], []])
def test_texts_without_a_token_to_score_are_an_error(make_tokenizer, texts):
    with pytest.raises(DataError, match=rf"the {len(texts)} texts have none"):
        LanguageModelProbe(texts, make_tokenizer("gpt2"), "causal")


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(BaseModelError, match="Expected a fast tokenizer"):
        LanguageModelProbe(TEXTS, Slow(), "causal")
