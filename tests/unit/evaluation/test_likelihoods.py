import pytest
import torch

from hf_gradiend.errors import DataError, NumericalError
from hf_gradiend.evaluation.likelihoods import Likelihoods

TEXTS = ["The nurse said that she was late.", "Anna said it.", "The doctor, my nurse, was tired."]


def by_hand(lm, text):
    """Log-probabilities of a text's tokens with transformers alone, one forward pass each."""
    tokenizer, model = lm.tokenizer, lm.model
    if lm.objective == "causal":
        begin = tokenizer.bos_token_id
        ids = [begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([scores[i - 1, ids[i]] for i in range(1, len(ids))])
    ids = tokenizer(text)["input_ids"]
    found = []
    for i, token in enumerate(ids):
        if token in tokenizer.all_special_ids:
            continue
        masked = torch.tensor([[*ids[:i], tokenizer.mask_token_id, *ids[i + 1 :]]])
        with torch.no_grad():
            found.append(model(input_ids=masked).logits[0, i].log_softmax(-1)[token])
    return torch.stack(found)


def scored(lm, texts, **options):
    likelihoods = Likelihoods(lm.model, lm.tokenizer, progress=False, **options)
    readings = [likelihoods.readings(likelihoods.tokenised(text)) for text in texts]
    return likelihoods.log_probabilities(readings, "")


def test_log_probabilities_are_those_of_transformers_alone(make_lm, family):
    lm = make_lm(family)

    found = scored(lm, TEXTS)

    for text, values in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(values.float(), by_hand(lm, text), atol=1e-5, rtol=0)
    assert len({tuple(values.tolist()) for values in found}) == len(TEXTS)  # the control


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_text_scores_the_same_alone_and_in_any_batch(make_lm, family):
    lm = make_lm(family)

    alone = [scored(lm, [text])[0] for text in TEXTS]

    for budget in (8, 64, 10_000):
        for one, other in zip(alone, scored(lm, TEXTS, tokens_per_batch=budget), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_chosen_positions_alone_are_scored(make_lm):
    lm = make_lm("bert")
    likelihoods = Likelihoods(lm.model, lm.tokenizer, progress=False)
    text = likelihoods.tokenised(TEXTS[0])

    all_of_them = likelihoods.log_probabilities([likelihoods.readings(text)], "")[0]
    (second,) = likelihoods.log_probabilities([likelihoods.readings(text, text.ordinary[1:2])], "")

    assert second.tolist() == pytest.approx(all_of_them[1:2].tolist())


def test_a_broken_model_and_texts_without_tokens_are_refused(make_lm):
    lm = make_lm("gpt2")
    with pytest.raises(DataError, match=r"0 tokens|1 to"):
        scored(lm, [""])
    with pytest.raises(DataError, match="texts of 1 to"):
        scored(lm, ["said " * 200])
    with torch.no_grad():
        next(lm.model.parameters()).fill_(torch.nan)
    with pytest.raises(NumericalError, match="NaN"):
        scored(lm, TEXTS)


@pytest.mark.parametrize(
    ("family", "n_tokens"),
    [
        *((family, n) for family in ("bert", "gpt2") for n in (64, 65, 66, 67)),
        *(("roberta", n) for n in (64, 65, 66, 67)),  # it counts positions from 2
    ],
)
def test_a_text_is_scored_or_refused_at_any_length(make_lm, family, n_tokens):
    lm = make_lm(family)
    lm.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    special = 1 if family == "gpt2" else 2

    try:
        (found,) = scored(lm, [" said" * (n_tokens - special)])
    except DataError:
        return

    assert len(found) == n_tokens - special
    assert bool(found.isfinite().all())


def test_equal_inputs_are_read_once_and_tokens_of_one_input_share_it(make_lm):
    lm = make_lm("gpt2")
    rows = []
    handle = lm.model.register_forward_pre_hook(
        lambda _module, _args, options: rows.extend(options["input_ids"].tolist()), with_kwargs=True
    )

    twice = scored(lm, [TEXTS[0], TEXTS[1], TEXTS[0]])
    handle.remove()

    assert len(rows) == 2
    assert torch.equal(twice[0], twice[2])
    assert not torch.equal(twice[0], twice[1])  # the control
