"""Traps 1 to 3 of DESIGN.md section 4 in numbers: every value is read off a plain forward pass."""

import pytest
import torch
from torch import nn

from hf_gradiend.errors import BaseModelError
from hf_gradiend.gradients.objectives import (
    head_at_sites,
    side_scores,
    site_log_probabilities,
    target_log_probabilities,
)

ROW = ("Anna said that [TARGET] was late.", "she", "he")
ROWS = [
    ROW,
    ("The doctor was late because my nurse said that [TARGET] was tired.", "he", "it"),
    ("Paul said [TARGET]", "her", "she"),
]

# What each tokenizer makes of ROW, written by hand: input, position that is read, " she", " he".
BY_HAND = {
    "bert": ("[CLS] anna said that [MASK] was late . [SEP]", 4, "she", "he"),
    "roberta": ("<s> Anna Ġsaid Ġthat <mask> Ġwas Ġlate . </s>", 4, "Ġshe", "Ġhe"),
    "gpt2": ("Anna Ġsaid Ġthat", 2, "Ġshe", "Ġhe"),
    "llama": ("<s> ▁Anna ▁said ▁that", 3, "▁she", "▁he"),
}
TOKENIZER_OF = {
    **dict.fromkeys(("bert", "distilbert", "electra"), "bert"),
    **dict.fromkeys(("roberta", "modernbert"), "roberta"),
    **dict.fromkeys(("gpt2", "gpt_neox", "qwen2", "qwen3"), "gpt2"),
    **dict.fromkeys(("llama", "gemma2", "gemma3"), "llama"),
}


@torch.no_grad()
def plain(lm, tokens):
    """Log-probabilities of the whole vocabulary after every token of one row, by a plain pass."""
    ids = lm.tokenizer.convert_tokens_to_ids(tokens.split())
    return lm.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def token(lm, name):
    found = lm.tokenizer.convert_tokens_to_ids(name)
    assert found != lm.tokenizer.unk_token_id
    return found


# ---- the right number ----


def test_log_probabilities_are_those_of_a_plain_forward_pass(make_lm, batch_of, family):
    lm = make_lm(family)
    tokens, position, she, he = BY_HAND[TOKENIZER_OF[family]]
    at_slot = plain(lm, tokens)[position]
    expected = torch.stack([at_slot[token(lm, she)], at_slot[token(lm, he)]])

    with torch.no_grad():
        found = target_log_probabilities(lm.model, batch_of(lm, [ROW]))

    torch.testing.assert_close(found, expected[None], rtol=1e-5, atol=1e-6)
    # The control: one position off, or the other word, is another number.
    elsewhere = plain(lm, tokens)[position - 1][token(lm, she)]
    assert min((elsewhere - found[0, 0]).abs(), (found[0, 0] - found[0, 1]).abs()) > 0.01


def test_the_loss_is_the_one_that_transformers_computes_from_labels(make_lm, batch_of, family):
    # Trap 1: transformers shifts the labels of causal models itself.
    lm = make_lm(family)
    tokens, _, she, _ = BY_HAND[TOKENIZER_OF[family]]
    ids = lm.tokenizer.convert_tokens_to_ids(tokens.split())
    labels = [-100] * len(ids)
    if lm.objective == "masked":
        labels[ids.index(lm.tokenizer.mask_token_id)] = token(lm, she)
    else:
        ids, labels = [*ids, token(lm, she)], [*labels, token(lm, she)]

    with torch.no_grad():
        expected = lm.model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        found = side_scores(target_log_probabilities(lm.model, batch_of(lm, [ROW])), "factual")

    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_last_word_of_a_causal_prefix_changes_the_loss(make_lm, batch_of, family):
    # Trap 1: with an off-by-one the last word of the prefix would not be seen.
    lm = make_lm(family)
    rows = [ROW, ("Anna said because [TARGET] was late.", *ROW[1:])]

    with torch.no_grad():
        first, other = target_log_probabilities(lm.model, batch_of(lm, rows))

    assert (first - other).abs().min() > 0.01


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_causal_model_does_not_see_what_follows_the_slot(make_lm, batch_of, family):
    lm = make_lm(family)
    rows = [ROW, ("Anna said that [TARGET], the doctor", *ROW[1:])]

    with torch.no_grad():
        first, other = target_log_probabilities(lm.model, batch_of(lm, rows))

    torch.testing.assert_close(first, other)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_masked_model_does_see_what_follows_the_slot(make_lm, batch_of, family):
    lm = make_lm(family)
    rows = [ROW, ("Anna said that [TARGET] was tired.", *ROW[1:])]

    with torch.no_grad():
        first, other = target_log_probabilities(lm.model, batch_of(lm, rows))

    assert (first - other).abs().min() > 1e-3


# ---- several tokens, several slots (trap 2) ----


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_causal_word_of_several_tokens_is_the_product_along_its_tokens(make_lm, batch_of, family):
    # " hers" = " her" + "s", " they" = " the" + "y", against " he" of one token.
    lm = make_lm(family)
    prefix = "Anna Ġsaid Ġthat"
    hers = (
        plain(lm, prefix)[-1][token(lm, "Ġher")] + plain(lm, f"{prefix} Ġher")[-1][token(lm, "s")]
    )
    they = (
        plain(lm, prefix)[-1][token(lm, "Ġthe")] + plain(lm, f"{prefix} Ġthe")[-1][token(lm, "y")]
    )
    he = plain(lm, prefix)[-1][token(lm, "Ġhe")]
    rows = [(ROW[0], "hers", "they"), (ROW[0], "he", "hers")]

    with torch.no_grad():
        found = target_log_probabilities(lm.model, batch_of(lm, rows))

    torch.testing.assert_close(
        found, torch.stack([hers, they, he, hers]).view(2, 2), rtol=1e-5, atol=1e-5
    )


def test_the_space_of_a_rare_causal_word_is_scored_with_it(make_lm, batch_of):
    # " Paul" is "Ġ" + "Paul" for this tokenizer; " he" is one token. Same prefix, same measure.
    lm = make_lm("gpt2")
    prefix = "Anna Ġsaid Ġthat"
    space = plain(lm, prefix)[-1][token(lm, "Ġ")]
    paul = plain(lm, f"{prefix} Ġ")[-1][token(lm, "Paul")]
    he = plain(lm, prefix)[-1][token(lm, "Ġhe")]

    with torch.no_grad():
        found = target_log_probabilities(lm.model, batch_of(lm, [(ROW[0], "Paul", "he")]))

    torch.testing.assert_close(found, torch.stack([space + paul, he])[None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_a_masked_word_of_several_tokens_is_the_product_over_its_masks(make_lm, batch_of, family):
    # "herself" = "her" + "##self" under two masks, against "he" under one.
    lm = make_lm(family)
    two = plain(lm, "[CLS] anna said that [MASK] [MASK] was late . [SEP]")
    one = plain(lm, "[CLS] anna said that [MASK] was late . [SEP]")
    herself = two[4][token(lm, "her")] + two[5][token(lm, "##self")]
    he = one[4][token(lm, "he")]

    with torch.no_grad():
        found = target_log_probabilities(lm.model, batch_of(lm, [(ROW[0], "herself", "he")]))

    torch.testing.assert_close(found, torch.stack([herself, he])[None], rtol=1e-5, atol=1e-5)
    # The control: with the masks of the longer word, "he" would be another number.
    assert (two[4][token(lm, "he")] - he).abs() > 1e-4


def test_a_masked_text_of_several_slots_has_the_mean_over_its_slots(make_lm, batch_of):
    lm = make_lm("bert")
    rows = [("[TARGET] said that [TARGET] was late.", "herself", "he")]
    he = plain(lm, "[CLS] [MASK] said that [MASK] was late . [SEP]")
    her = plain(lm, "[CLS] [MASK] [MASK] said that [MASK] [MASK] was late . [SEP]")
    mean_he = (he[1] + he[4])[token(lm, "he")] / 2
    mean_herself = (
        (her[1] + her[5])[token(lm, "her")] + (her[2] + her[6])[token(lm, "##self")]
    ) / 2

    with torch.no_grad():
        found = target_log_probabilities(lm.model, batch_of(lm, rows))

    torch.testing.assert_close(
        found, torch.stack([mean_herself, mean_he])[None], rtol=1e-5, atol=1e-5
    )


def test_a_causal_text_of_several_slots_is_read_at_the_first(make_lm, batch_of):
    lm = make_lm("gpt2")
    rows = [("Anna said that [TARGET] was late because [TARGET] was tired.", "she", "he")]
    first = plain(lm, "Anna Ġsaid Ġthat")[-1]

    with torch.no_grad():
        found = target_log_probabilities(lm.model, batch_of(lm, rows))

    expected = first[[token(lm, "Ġshe"), token(lm, "Ġhe")]]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


# ---- neighbours and padding (trap 3) ----


@pytest.mark.usefixtures("double_precision")
def test_a_row_does_not_depend_on_its_neighbours(make_lm, batch_of, family):
    lm = make_lm(family)
    lm.model.double()

    with torch.no_grad():
        alone = torch.cat([target_log_probabilities(lm.model, batch_of(lm, [r])) for r in ROWS])
        together = target_log_probabilities(lm.model, batch_of(lm, ROWS))
        reversed_ = target_log_probabilities(lm.model, batch_of(lm, ROWS[::-1])).flip(0)

    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(reversed_, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_reading_the_padding_would_change_the_numbers(make_lm, batch_of, family):
    # The control of the test above: the batch is padded, and the padding matters.
    lm = make_lm(family)
    batch = batch_of(lm, ROWS)
    wrong = vars(batch).copy()
    if lm.objective == "masked":  # attends to the padding
        wrong["attention_mask"] = torch.ones_like(batch.attention_mask)
    else:  # reads the last column instead of the last token
        wrong["site_positions"] = torch.full_like(
            batch.site_positions, batch.input_ids.shape[1] - 1
        )

    with torch.no_grad():
        right = target_log_probabilities(lm.model, batch)
        found = target_log_probabilities(lm.model, type(batch)(**wrong))

    changed = (found - right).abs().amax(1) > 0.01
    assert changed.tolist() == [True, False, True]  # the longest row has no padding


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_the_padding_side_of_the_tokenizer_makes_no_difference(make_lm, batch_of, family):
    lm = make_lm(family)
    found = []
    for side in ("left", "right"):
        lm.tokenizer.padding_side = side
        with torch.no_grad():
            found.append(target_log_probabilities(lm.model, batch_of(lm, ROWS)))

    assert torch.equal(*found)


# ---- shapes, sides, the hook ----


def test_sites_have_a_distribution_over_the_whole_vocabulary(make_lm, batch_of, family):
    lm = make_lm(family)

    with torch.no_grad():
        found = site_log_probabilities(lm.model, batch_of(lm, ROWS))

    assert found.shape == (3, len(lm.tokenizer))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3))


def test_the_head_runs_at_the_sites_only(make_lm, batch_of, family):
    lm = make_lm(family)
    batch = batch_of(lm, ROWS)
    widths = []
    handle = lm.model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: widths.append(output.shape[:-1].numel())
    )

    with torch.no_grad():
        target_log_probabilities(lm.model, batch)
        lm.model(batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()

    assert widths == [3, batch.input_ids.numel()]  # the control: all positions


@pytest.mark.parametrize(
    ("side", "expected"),
    [("factual", [-1.0, 3.0]), ("counterfactual", [2.0, 5.0]), ("diff", [-3.0, -2.0])],
)
def test_a_side_is_minus_the_log_probability_or_the_difference_of_both(side, expected):
    scores = torch.tensor([[1.0, -2.0], [-3.0, -5.0]])

    assert side_scores(scores, side).tolist() == expected


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_hook_on_the_backbone_is_gone_afterwards_also_after_an_error(make_lm, batch_of, family):
    lm = make_lm(family)
    batch = batch_of(lm, [ROW])
    backbone = lm.model.base_model

    with head_at_sites(lm.model, batch.site_rows, batch.site_positions) as at_sites:
        assert len(backbone._forward_hooks) == 1  # the control
        lm.model(**batch.inputs)
        assert at_sites
    with pytest.raises(IndexError):
        target_log_probabilities(
            lm.model, type(batch)(**{**vars(batch), "site_rows": torch.tensor([9])})
        )

    assert not backbone._forward_hooks


class _Body(nn.Module):
    def forward(self, hidden):
        return hidden, "cache"


class _WithBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_model = _Body()

    def forward(self, hidden):
        return self.base_model(hidden)


def test_a_backbone_that_gives_a_tuple_is_read_at_the_sites():
    hidden = torch.arange(24.0).view(2, 3, 4)
    model = _WithBody()

    with head_at_sites(model, torch.tensor([1, 0]), torch.tensor([2, 1])):
        at_sites, cache = model(hidden)

    assert at_sites.tolist() == [[[20.0, 21.0, 22.0, 23.0], [4.0, 5.0, 6.0, 7.0]]]
    assert cache == "cache"


def test_a_model_without_a_separate_backbone_is_read_from_all_its_logits(make_lm, batch_of):
    lm = make_lm("gpt2")
    batch = batch_of(lm, ROWS)
    with torch.no_grad():
        expected = target_log_probabilities(lm.model, batch)
        lm.model.base_model_prefix = "nothing"  # then base_model is the model itself
        found = target_log_probabilities(lm.model, batch)

    assert lm.model.base_model is lm.model
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_architecture_that_ignores_the_sites_is_refused(make_lm, batch_of):
    lm = make_lm("bert")
    batch = batch_of(lm, ROWS)
    # A head that does not read its backbone's output: here, all positions of another pass.
    lm.model.cls.register_forward_hook(lambda *_: torch.zeros(3, 17, len(lm.tokenizer)))

    with pytest.raises(BaseModelError, match="Expected logits at 3 positions from BertForMaskedLM"):
        target_log_probabilities(lm.model, batch)
