"""Traps 1 to 5 of DESIGN.md section 4, as far as they lie in the input of the model."""

import logging

import pytest
import torch

from hf_gradiend.base_models import check_tokenizer
from hf_gradiend.data.collation import batches_by_length, collate, pad_rows, prepare_texts
from hf_gradiend.errors import BaseModelError, DataError

KINDS = ["gpt2", "roberta", "bert", "llama"]
OBJECTIVES = {"gpt2": "causal", "llama": "causal", "roberta": "masked", "bert": "masked"}
SENTENCE = "Anna said that [TARGET] was late."


def row(text=SENTENCE, factual="she", counterfactual="he"):
    return {"text": text, "factual": factual, "counterfactual": counterfactual}


def read(tokenizer, objective, text, factual="she", counterfactual="he", **options):
    """Tokens, site positions and scored tokens of both words, in words rather than in numbers."""
    texts = prepare_texts([row(text, factual, counterfactual)], tokenizer, objective, **options)
    name = tokenizer.convert_ids_to_tokens
    return [
        (name(list(reading.input_ids)), [(at, name(token)) for at, token in reading.sites])
        for reading in texts[0].readings
    ]


# ---- which token, and where ----


def test_a_causal_model_is_read_at_the_last_token_of_the_prefix(make_tokenizer):
    # Trap 1: logits at position i predict token i + 1. Three tokens stand before the slot.
    tokens = ["Anna", "Ġsaid", "Ġthat"]

    readings = read(make_tokenizer("gpt2"), "causal", SENTENCE)

    assert readings == [(tokens, [(2, "Ġshe")]), (tokens, [(2, "Ġhe")])]


def test_the_start_token_of_a_causal_tokenizer_stands_before_the_prefix(make_tokenizer):
    tokens = ["<s>", "▁Anna", "▁said", "▁that"]

    readings = read(make_tokenizer("llama"), "causal", SENTENCE)

    assert readings == [(tokens, [(3, "▁she")]), (tokens, [(3, "▁he")])]


@pytest.mark.parametrize(
    ("kind", "tokens", "she", "he"),
    [
        ("bert", "[CLS] anna said that [MASK] was late . [SEP]", "she", "he"),
        ("roberta", "<s> Anna Ġsaid Ġthat <mask> Ġwas Ġlate . </s>", "Ġshe", "Ġhe"),
    ],
)
def test_a_masked_model_is_read_at_the_mask(make_tokenizer, kind, tokens, she, he):
    readings = read(make_tokenizer(kind), "masked", SENTENCE)

    assert readings == [(tokens.split(), [(4, she)]), (tokens.split(), [(4, he)])]


@pytest.mark.parametrize(("kind", "token"), [("gpt2", "Ġhe"), ("roberta", "Ġhe"), ("llama", "▁he")])
def test_the_token_has_the_space_that_it_has_in_the_text(make_tokenizer, kind, token):
    # Trap 2: " he" and not "he".
    tokenizer = make_tokenizer(kind)

    _, (_, sites) = read(tokenizer, OBJECTIVES[kind], SENTENCE)

    assert [name for _, name in sites] == [token]
    # The control: the word alone is something else for a byte-level tokenizer.
    assert kind == "llama" or tokenizer.tokenize("he") == ["h", "e"]


def test_a_word_at_the_start_of_a_text_has_no_space(make_tokenizer):
    (_, factual), (_, counterfactual) = read(
        make_tokenizer("roberta"), "masked", "[TARGET] was late.", "Anna", "Paul"
    )

    assert (factual, counterfactual) == ([(1, "Anna")], [(1, "Paul")])


@pytest.mark.parametrize(
    ("kind", "text", "tokens", "sites"),
    [
        # The slot is the last word, and the full stop is not part of it.
        ("gpt2", "that was [TARGET].", "t h a t Ġwas", [(4, "Ġher")]),
        ("bert", "that was [TARGET].", "[CLS] that was [MASK] . [SEP]", [(3, "her")]),
        ("roberta", "Anna was [TARGET], Paul", "<s> Anna Ġwas <mask> , Ġ Paul </s>", [(3, "Ġher")]),
        ("llama", "The [TARGET]'s late", "<s> ▁The", [(1, "▁her")]),
        # Letters directly behind the slot: the word's own tokens are scored, the rest is context.
        ("gpt2", "Anna said [TARGET]s", "Anna Ġsaid", [(1, "Ġher")]),
        ("bert", "anna said [TARGET]self.", "[CLS] anna said [MASK] ##self . [SEP]", [(3, "her")]),
        ("roberta", "Anna said [TARGET]s", "<s> Anna Ġsaid <mask> s </s>", [(3, "Ġher")]),
        # A bracket directly before it: no space belongs to the word.
        ("bert", "said '[TARGET]' was", "[CLS] said ' [MASK] ' was [SEP]", [(3, "her")]),
    ],
)  # fmt: skip
def test_punctuation_and_letters_at_the_slot_stay_outside_of_the_word(
    make_tokenizer, kind, text, tokens, sites
):
    found, _ = read(make_tokenizer(kind), OBJECTIVES[kind], text, "her", "he")

    assert found == (tokens.split(), sites)


def test_letters_that_merge_with_the_word_are_scored_with_it(make_tokenizer):
    # " s" + "he" is the one token " she" of the tokenizer: there is no token for "he" alone.
    found, _ = read(make_tokenizer("gpt2"), "causal", "Anna said s[TARGET]", "he", "it")

    assert found == (["Anna", "Ġsaid"], [(1, "Ġshe")])


# ---- words of several tokens, several slots ----


def test_a_causal_word_of_several_tokens_is_teacher_forced(make_tokenizer):
    factual, counterfactual = read(make_tokenizer("gpt2"), "causal", SENTENCE, "hers", "they")

    # p(" her" | that) p("s" | that her): the last token of the word is never an input.
    assert factual == (["Anna", "Ġsaid", "Ġthat", "Ġher"], [(2, "Ġher"), (3, "s")])
    assert counterfactual == (["Anna", "Ġsaid", "Ġthat", "Ġthe"], [(2, "Ġthe"), (3, "y")])


def test_a_masked_word_of_several_tokens_has_one_mask_for_each(make_tokenizer):
    factual, counterfactual = read(make_tokenizer("bert"), "masked", SENTENCE, "herself", "he")

    masks = ["[CLS]", "anna", "said", "that", "[MASK]", "[MASK]", "was", "late", ".", "[SEP]"]
    assert factual == (masks, [(4, "her"), (5, "##self")])
    assert counterfactual == (masks[:4] + masks[5:], [(4, "he")])  # its own row, with one mask


def test_a_masked_model_reads_every_slot_and_takes_the_mean(make_tokenizer):
    text = "[TARGET] said that [TARGET] was late."

    texts = prepare_texts([row(text)], make_tokenizer("bert"), "masked")

    factual = texts[0].readings[0]
    assert [at for at, _ in factual.sites] == [1, 4]
    assert factual.weight == 0.5
    # The second slot must not give the first away.
    assert factual.input_ids[1] == factual.input_ids[4] == make_tokenizer("bert").mask_token_id


def test_a_causal_model_reads_the_first_slot_alone(make_tokenizer):
    text = "Anna said that [TARGET] was late because [TARGET] was tired."

    both = prepare_texts([row(text)], make_tokenizer("gpt2"), "causal")
    first = prepare_texts([row(SENTENCE)], make_tokenizer("gpt2"), "causal")

    assert both.texts == first.texts
    assert both[0].readings[0].weight == 1.0


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("gpt2", "Anna Ġsaid"), ("llama", "<s> ▁Anna ▁said")],
)
def test_a_space_that_is_a_token_of_its_own_belongs_to_the_word(make_tokenizer, kind, prefix):
    # Trap 2: the space of " Paul" is a token of its own here, that of " he" is not. Both words have
    # to follow the same prefix; a space that is given away already says that it is not " he".
    word = {"gpt2": "Paul", "llama": "yes"}[kind]

    factual, counterfactual = read(
        make_tokenizer(kind), "causal", "Anna said [TARGET] was", word, "he"
    )

    n_prefix = len(prefix.split())
    assert factual[0][:n_prefix] == prefix.split()
    assert counterfactual[0] == prefix.split()
    space = {"gpt2": "Ġ", "llama": "▁"}[kind]
    expected = {"gpt2": [space, "Paul"], "llama": [space, "y", "e", "s"]}[kind]
    assert [token for _, token in factual[1]] == expected
    assert [at for at, _ in factual[1]] == list(range(n_prefix - 1, n_prefix - 1 + len(expected)))


def test_a_masked_model_does_not_see_the_space_of_the_word_either(make_tokenizer):
    found, _ = read(make_tokenizer("roberta"), "masked", "Anna said [TARGET].", "Paul", "he")

    masks = ["<mask>"] * 2
    assert found[0] == ["<s>", "Anna", "Ġsaid", *masks, ".", "</s>"]
    assert [token for _, token in found[1]] == ["Ġ", "Paul"]


@pytest.mark.parametrize(
    ("text", "prefix"), [("Anna\n[TARGET]", "Anna Ċ"), ("Anna  [TARGET]", "Anna Ġ")]
)
def test_white_space_that_is_not_the_word_s_own_stays_context(make_tokenizer, text, prefix):
    # A line break, or the first of two spaces, comes before every word.
    factual, counterfactual = read(make_tokenizer("gpt2"), "causal", text, "Paul", "he")

    assert factual[0][:2] == counterfactual[0][:2] == prefix.split()


# ---- truncation ----


def test_a_long_causal_prefix_is_cut_on_the_left_and_keeps_its_start_token(make_tokenizer):
    # Trap 4: what stands right before the slot decides; it is never cut, nor is the target.
    text = "Anna said that the nurse was late because [TARGET] was tired."

    gpt2, _ = read(make_tokenizer("gpt2"), "causal", text, max_length=3)
    llama, _ = read(make_tokenizer("llama"), "causal", text, max_length=3)

    assert gpt2 == (["Ġwas", "Ġlate", "Ġbecause"], [(2, "Ġshe")])
    assert llama == (["<s>", "▁late", "▁because"], [(2, "▁she")])


def test_a_causal_target_of_several_tokens_keeps_its_room_in_a_cut_text(make_tokenizer):
    found, _ = read(make_tokenizer("gpt2"), "causal", SENTENCE, "hers", "he", max_length=3)

    assert found == (["Ġsaid", "Ġthat", "Ġher"], [(1, "Ġher"), (2, "s")])


@pytest.mark.parametrize(
    ("max_length", "tokens"),
    [
        (3, "[CLS] [MASK] [SEP]"),
        (5, "[CLS] because [MASK] was [SEP]"),
        (6, "[CLS] late because [MASK] was [SEP]"),
        (7, "[CLS] late because [MASK] was tired [SEP]"),
        (8, "[CLS] was late because [MASK] was tired [SEP]"),
        (9, "[CLS] was late because [MASK] was tired . [SEP]"),
        (10, "[CLS] nurse was late because [MASK] was tired . [SEP]"),
        (64, "[CLS] the nurse was late because [MASK] was tired . [SEP]"),
    ],
)
def test_a_long_masked_text_is_cut_around_its_slot(make_tokenizer, max_length, tokens):
    # A mask right before [SEP] asks for a full stop; what follows the slot is kept as well.
    text = "the nurse was late because [TARGET] was tired."

    found, _ = read(make_tokenizer("bert"), "masked", text, max_length=max_length)

    assert found == (tokens.split(), [(tokens.split().index("[MASK]"), "she")])


def test_a_masked_text_with_an_early_slot_is_cut_behind_it(make_tokenizer):
    found, _ = read(
        make_tokenizer("bert"), "masked", "anna [TARGET] was late because the nurse", max_length=7
    )

    assert found == (["[CLS]", "anna", "[MASK]", "was", "late", "because", "[SEP]"], [(2, "she")])


def test_the_whole_text_is_kept_where_it_fits_exactly(make_tokenizer):
    # 7 tokens and 2 special ones; the control is one token less.
    exact, _ = read(make_tokenizer("bert"), "masked", SENTENCE, max_length=9)
    cut, _ = read(make_tokenizer("bert"), "masked", SENTENCE, max_length=8)

    assert exact[0] == ["[CLS]", "anna", "said", "that", "[MASK]", "was", "late", ".", "[SEP]"]
    assert len(cut[0]) == 8


@pytest.mark.parametrize(
    ("kind", "text", "factual", "max_length"),
    [
        ("gpt2", SENTENCE, "herself", 4),  # 5 tokens, the last is no input: no place for a prefix
        ("llama", SENTENCE, "herself", 5),
        ("bert", SENTENCE, "herself", 3),  # 2 masks, 2 special tokens
        ("bert", "[TARGET] said that the nurse was [TARGET]", "she", 5),  # slots too far apart
        ("gpt2", "[TARGET] was late.", "she", 64),  # nothing before the slot, no start token
    ],
)
def test_a_text_without_room_for_its_target_is_left_out_and_reported(
    make_tokenizer, caplog, kind, text, factual, max_length
):
    rows = [row("said [TARGET]"), row(text, factual), row("was [TARGET]")]

    with caplog.at_level(logging.WARNING, logger="hf_gradiend"):
        texts = prepare_texts(rows, make_tokenizer(kind), OBJECTIVES[kind], max_length=max_length)

    assert texts.skipped == (1,)
    assert [text.index for text in texts] == [0, 2]
    assert texts.n_rows == 3
    assert "1 of 3 texts are skipped" in caplog.text
    assert "row 1" in caplog.text


@pytest.mark.parametrize(
    ("kind", "text", "factual", "max_length"),
    [
        ("gpt2", SENTENCE, "herself", 5),
        ("llama", SENTENCE, "herself", 6),
        ("bert", SENTENCE, "herself", 4),
        ("bert", "[TARGET] said that the nurse was [TARGET]", "she", 9),
        ("llama", "[TARGET] was late.", "she", 64),  # after the start token alone
    ],
)
def test_a_text_with_just_enough_room_is_read(
    make_tokenizer, caplog, kind, text, factual, max_length
):
    with caplog.at_level(logging.WARNING, logger="hf_gradiend"):
        texts = prepare_texts(
            [row(text, factual)], make_tokenizer(kind), OBJECTIVES[kind], max_length=max_length
        )

    assert (len(texts), texts.skipped, caplog.text) == (1, (), "")


def test_nothing_left_to_read_is_an_error(make_tokenizer):
    with pytest.raises(
        DataError, match="room for its target in 64 tokens, but none of the 1 texts"
    ):
        prepare_texts([row("[TARGET] was late.")], make_tokenizer("gpt2"), "causal")


def test_the_longest_input_is_that_of_the_tokenizer_and_at_most_256(make_tokenizer):
    text = "said" + " was" * 300 + " [TARGET]"
    short, long = make_tokenizer("gpt2"), make_tokenizer("gpt2")
    long.model_max_length = 10**30  # what transformers says where nobody knows

    lengths = [prepare_texts([row(text)], t, "causal")[0].length for t in (short, long)]

    assert lengths == [64, 256]


# ---- special tokens and bad words ----


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_never_masked_and_never_scored(make_tokenizer, kind):
    # Trap 5.
    tokenizer = make_tokenizer(kind)
    rows = [row(), row(factual="herself"), row("[TARGET] said that [TARGET] was")][
        : 3 - (kind == "gpt2")
    ]

    texts = prepare_texts(rows, tokenizer, OBJECTIVES[kind])

    special = set(tokenizer.all_special_ids)
    own = {"bert": (2, 3), "roberta": (0, 2), "llama": (1,), "gpt2": ()}[kind]
    for text in texts:
        for reading in text.readings:
            assert not special & {token for _, token in reading.sites}
            ends = (reading.input_ids[0], reading.input_ids[-1])[: len(own)]
            assert ends == own


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("bert", "queen"),  # no such word: [UNK]
        ("bert", "[MASK]"),
        ("bert", "[SEP]"),
        ("roberta", "<mask>"),
        ("gpt2", "<|endoftext|>"),
        ("gpt2", ""),
        ("llama", "ß"),
    ],
)
def test_a_word_without_tokens_of_its_own_is_an_error(make_tokenizer, kind, word):
    with pytest.raises(DataError, match="Expected a word with tokens of its own"):
        prepare_texts([row(counterfactual=word)], make_tokenizer(kind), OBJECTIVES[kind])


def test_a_text_without_a_slot_is_an_error_that_names_the_row(make_tokenizer):
    with pytest.raises(
        DataError, match=r"slot \[TARGET\] in every text, but row 1 has none: 'Anna"
    ):
        prepare_texts([row(), row("Anna said.")], make_tokenizer("gpt2"), "causal")


def test_a_masked_model_needs_a_tokenizer_with_a_mask(make_tokenizer):
    with pytest.raises(DataError, match="tokenizer with a mask token"):
        prepare_texts([row()], make_tokenizer("gpt2"), "masked")


def test_a_tokenizer_that_does_not_know_where_tokens_lie_is_refused(make_tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(BaseModelError, match=r"Expected a fast tokenizer.*but got Slow"):
        prepare_texts([row()], Slow(), "causal")
    check_tokenizer(make_tokenizer("gpt2"))  # the control


# ---- batches ----


def test_words_of_one_token_share_a_row_and_a_site(make_tokenizer):
    tokenizer = make_tokenizer("bert")
    texts = prepare_texts([row(), row("the nurse was [TARGET]")], tokenizer, "masked")

    batch = collate(texts, tokenizer.pad_token_id)

    assert batch.input_ids.shape == (2, 9)
    assert batch.site_rows.tolist() == [0, 1]
    assert batch.site_positions.tolist() == [4, 4]
    assert batch.term_sites.tolist() == [0, 0, 1, 1]
    assert tokenizer.convert_ids_to_tokens(batch.term_tokens.tolist()) == ["she", "he"] * 2
    assert batch.term_outputs.tolist() == [0, 1, 2, 3]


def test_words_of_different_length_have_rows_of_their_own(make_tokenizer):
    tokenizer = make_tokenizer("bert")
    texts = prepare_texts([row(factual="herself")], tokenizer, "masked")

    batch = collate(texts, tokenizer.pad_token_id)

    assert batch.input_ids.shape == (2, 10)
    assert batch.attention_mask.sum(1).tolist() == [10, 9]
    assert list(zip(batch.site_rows.tolist(), batch.site_positions.tolist(), strict=True)) == [
        (0, 4), (0, 5), (1, 4),
    ]  # fmt: skip
    assert batch.term_outputs.tolist() == [0, 0, 1]


def test_causal_words_that_begin_alike_are_still_scored_at_sites_of_their_own(make_tokenizer):
    # " her" and " hers" begin alike; only the longer one needs " her" as an input.
    texts = prepare_texts(
        [row(factual="hers", counterfactual="her")], make_tokenizer("gpt2"), "causal"
    )

    batch = collate(texts, 0)

    sites = [(batch.site_rows[i].item(), batch.site_positions[i].item()) for i in batch.term_sites]
    assert sites == [(0, 2), (0, 3), (1, 2)]
    assert batch.term_outputs.tolist() == [0, 0, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_right_whatever_the_tokenizer_says(make_tokenizer, side):
    # Trap 3.
    tokenizer = make_tokenizer("gpt2")
    tokenizer.padding_side = tokenizer.truncation_side = side
    texts = prepare_texts([row(), row("Anna [TARGET]")], tokenizer, "causal", max_length=2)

    batch = collate(texts, pad_token_id=7)

    names = [tokenizer.convert_ids_to_tokens(ids) for ids in batch.input_ids.tolist()]
    assert names[0] == ["Ġsaid", "Ġthat"]
    assert names[1][0] == "Anna"
    assert batch.input_ids[1, 1] == 7
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.site_positions.tolist() == [1, 0]


def test_rows_are_padded_to_the_longest_and_the_mask_knows_a_token_from_padding():
    # 7 is a token of the first row and the padding of the second.
    ids, mask = pad_rows([(7, 5, 7), [6], [4, 3]], 7)

    assert ids.tolist() == [[7, 5, 7], [6, 7, 7], [4, 3, 7]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)


def test_a_batch_is_as_long_as_its_longest_text(make_tokenizer):
    tokenizer = make_tokenizer("gpt2")
    texts = prepare_texts(
        [row(), row("Anna [TARGET]"), row("Anna said [TARGET]")], tokenizer, "causal"
    )

    widths = [collate(group, 0).input_ids.shape[1] for group in batches_by_length(texts, 2)]

    assert widths == [3, 1]  # the longest first


def test_batches_by_length_hold_every_text_once(make_tokenizer):
    rows = [row("Anna" + " was" * n + " [TARGET]") for n in (3, 0, 5, 2, 2)]
    texts = prepare_texts(rows, make_tokenizer("gpt2"), "causal")

    groups = list(batches_by_length(texts, 2))

    assert [[text.index for text in group] for group in groups] == [[2, 0], [3, 4], [1]]


def test_batches_by_length_hold_fewer_of_the_long_texts(make_tokenizer):
    rows = [row("Anna" + " was" * n + " [TARGET]") for n in (9, 9, 9, 9, 1, 1, 1, 1)]
    texts = prepare_texts(rows, make_tokenizer("gpt2"), "causal")

    def groups(max_tokens, batch_size=4, **options):
        found = batches_by_length(texts, batch_size, max_tokens, **options)
        return [[text.index for text in group] for group in found]

    # Two texts of ten tokens, ten of two.
    assert groups(20) == [[0, 1], [2, 3], [4, 5, 6, 7]]
    assert groups(5)[:4] == [[0], [1], [2], [3]]  # a longer text has a batch of its own
    # Padded, short texts take as much room as the long one beside them; packed, their own.
    assert groups(34, None) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert groups(34, None, packed=True) == [[0, 1, 2], [3, 4, 5, 6, 7]]


def test_moving_a_batch_keeps_every_field(make_tokenizer):
    batch = collate(prepare_texts([row()], make_tokenizer("gpt2"), "causal"), 0)

    moved = batch.to("meta")

    assert vars(moved).keys() == vars(batch).keys()
    for name, value in vars(moved).items():
        if isinstance(value, torch.Tensor):
            assert value.is_meta
            assert value.shape == vars(batch)[name].shape
        else:
            assert value == vars(batch)[name]


def test_any_columns_can_be_the_words(make_tokenizer):
    texts = prepare_texts(
        [{"text": SENTENCE, "a": "he", "b": "she", "c": "it"}],
        make_tokenizer("gpt2"), "causal", words=("a", "b", "c"),
    )  # fmt: skip

    batch = collate(texts, 0)

    assert (batch.n_texts, batch.n_words) == (1, 3)
    assert make_tokenizer("gpt2").convert_ids_to_tokens(batch.term_tokens.tolist()) == [
        "Ġhe", "Ġshe", "Ġit",
    ]  # fmt: skip
