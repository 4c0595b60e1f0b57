"""Texts packed into rows: the same predictions, gradients and encodings, and no padding."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from hf_gradiend.data.collation import PreparedText, WordReading, collate, prepare_texts
from hf_gradiend.gradients import packing
from hf_gradiend.gradients.backward import gradients
from hf_gradiend.gradients.forward import directional_derivatives, tangents_of
from hf_gradiend.gradients.objectives import target_log_probabilities
from hf_gradiend.gradients.packing import Packing, batch_for, pack, packing_of, passes_over
from hf_gradiend.parameters import select_parameters

TEXTS = (
    "Anna said that [TARGET] was late because the doctor was tired.",
    "The nurse said [TARGET]",
    "Paul was tired because it was late, said the nurse, and [TARGET] was my doctor.",
    "The doctor was [TARGET].",
    "Anna was late. The nurse said that [TARGET] was tired, that it was late.",
)
# What was found by asking; beside it what the literature says of the position embeddings.
FOUND = {
    "bert": Packing(0, "text"),
    "distilbert": Packing(0, "text"),
    "electra": Packing(0, "text"),
    "roberta": Packing(2, "text"),  # positions from beyond the padding token, fairseq's way
    "modernbert": None,  # every other layer sees neighbours alone
    "gpt2": Packing(0, None),
    "gpt_neox": Packing(0, None),
    "qwen2": Packing(0, None),
    "qwen3": Packing(0, None),
    "llama": Packing(0, None),
    "gemma2": Packing(0, None),
    "gemma3": Packing(0, None),
}
SIZES = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
OTHERS = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16)  # learned positions, from 2
    ),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SIZES)),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, pad_token_id=1)
    ),
    "gemma3_with_pictures": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(  # whose text model alone has a vocabulary
            text_config={**SIZES, "num_key_value_heads": 1, "head_dim": 8},
            vision_config={
                **SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14,
            },
            mm_tokens_per_image=4,
        )
    ),
    "bigbird": lambda: hf.BigBirdForMaskedLM(hf.BigBirdConfig(**SIZES)),
    "recurrent_gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, num_key_value_heads=1)
    ),
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(  # three recurrent layers of four
        hf.Qwen3NextConfig(
            **{**SIZES, "num_hidden_layers": 4}, num_key_value_heads=2, head_dim=8,
            linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        )
    ),
}  # fmt: skip


def prepared(lm, texts=TEXTS):
    rows = [{"text": text, "factual": "he", "counterfactual": "herself"} for text in texts]
    return prepare_texts(rows, lm.tokenizer, lm.objective)


def of_lengths(*lengths):
    """Texts of some tokens, with two words read at the last one."""
    generator = torch.Generator().manual_seed(0)
    inputs = [tuple(torch.randint(5, 60, (n,), generator=generator).tolist()) for n in lengths]
    return [
        PreparedText(k, tuple(WordReading(ids, ((len(ids) - 1, word),), 1.0) for word in (7, 8)))
        for k, ids in enumerate(inputs)
    ]


def both(lm, texts):
    """The same texts padded and packed."""
    pad = lm.tokenizer.pad_token_id
    return collate(texts, pad), batch_for(lm.model, texts, pad)


@pytest.mark.parametrize("attention", [None, "eager"])
def test_packed_texts_are_predicted_as_padded_ones(make_lm, family, attention):
    lm = make_lm(family, attention=attention)
    padded, packed = both(lm, prepared(lm))

    with torch.no_grad():
        expected = target_log_probabilities(lm.model, padded)
        found = target_log_probabilities(lm.model, packed)

    assert packing_of(lm.model) == FOUND[family]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    if FOUND[family] is None:
        return
    assert packed.input_ids.numel() < padded.input_ids.numel()
    seen = replace(packed, attention_mask=torch.ones_like(packed.input_ids))  # the control
    with torch.no_grad():
        wrong = target_log_probabilities(lm.model, seen)
    assert (wrong - expected).abs().max() > 0.01


def test_gradients_and_encodings_of_packed_texts_are_those_of_padded_ones(make_lm, family):
    lm = make_lm(family)
    selection = select_parameters(lm.model, "backbone")
    generator = torch.Generator().manual_seed(0)
    direction = {e.name: torch.randn(e.values_shape, generator=generator) for e in selection}
    tangents = tangents_of(lm.model, selection, direction)
    padded, packed = both(lm, prepared(lm))

    expected = gradients(lm.model, padded, selection)["factual"]
    found = gradients(lm.model, packed, selection)["factual"]
    along = [directional_derivatives(lm.model, batch, tangents) for batch in (padded, packed)]

    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(along[1], along[0], atol=1e-4, rtol=1e-4)
    assert along[0].abs().min() > 1e-3  # something was compared


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("opt", Packing(0, "causal")),
        ("falcon", Packing(0, "causal")),
        ("gemma3_with_pictures", Packing(0, None)),
        ("bigbird", None),
        ("mamba", None),
        ("recurrent_gemma", None),
        ("qwen3_next", None),
    ],
)
def test_models_that_cannot_tell_texts_apart_are_told_or_given_padded_ones(name, expected):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    texts = of_lengths(9, 4, 7)

    padded, packed = collate(texts, 1), batch_for(model, texts, 1)
    with torch.no_grad():
        values = [target_log_probabilities(model, batch) for batch in (padded, packed)]
    selection = select_parameters(model, "layers")
    sums = [gradients(model, b, selection, ["factual"])["factual"] for b in (padded, packed)]

    assert packing_of(model) == expected
    assert (packed.position_ids is None) == (expected is None)
    torch.testing.assert_close(values[1], values[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums[1], sums[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_faint_leak_is_found_in_any_precision(dtype):
    torch.manual_seed(0)
    model = OTHERS["recurrent_gemma"]().eval().to(dtype)  # its convolution runs on into the next

    assert packing_of(model) is None


def test_what_ends_a_vocabulary_may_be_empty():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, initializer_range=0.2)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[40:] = 0.0
    model.config.pad_token_id = -1

    assert packing_of(model) == Packing(0, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_models_in_half_precision_are_found_to_pack_as_in_float32(make_lm, family, dtype):
    assert packing_of(make_lm(family).model.to(dtype)) == FOUND[family]


def test_a_model_is_asked_once_for_each_kind_of_attention(make_lm, monkeypatch):
    model = make_lm("llama").model
    asked = []
    agrees = packing._agrees
    monkeypatch.setattr(packing, "_agrees", lambda *args: asked.append(1) or agrees(*args))

    model.train()
    assert packing_of(model) == packing_of(model) == Packing(0, None)
    assert model.training  # left as it was
    assert model.config.use_cache
    assert len(asked) == 1
    model.set_attn_implementation("eager")
    assert packing_of(model) == Packing(0, None)
    assert len(asked) == 2


def test_rows_hold_whole_texts_and_little_padding():
    lengths = (9, 4, 8, 7, 1)
    batch = collate(of_lengths(*lengths), 0)

    packed = pack(batch, Packing(3, "text"), 0, longest_row=12)

    # 9 + 1, 8, 7 + 4: of two rows one would be longer than 12, and four hold more padding.
    assert packed.input_ids.shape == (3, 11)
    assert packed.site_rows.tolist() == [0, 2, 1, 2, 1]
    assert packed.site_positions.tolist() == [8, 10, 7, 6, 8]
    assert packed.position_ids[2].tolist() == [3, 4, 5, 6, 7, 8, 9, 3, 4, 5, 6]
    seen = packed.attention_mask[:, 0] == 0
    assert seen[2, 6].tolist() == [True] * 7 + [False] * 4
    assert seen[2, 7].tolist() == [False] * 7 + [True] * 4
    assert seen[0, 9].tolist() == [False] * 9 + [True] * 2  # what pads a row sees itself
    tokens = [token for text in of_lengths(*lengths) for token in text.readings[0].input_ids]
    assert sorted(packed.input_ids[packed.input_ids > 0].tolist()) == sorted(tokens)
    # Without a limit, short texts all stand in one row.
    assert pack(batch, Packing(0, None), 0).input_ids.shape == (1, 29)


def test_a_causal_mask_hides_what_comes_later():
    packed = pack(collate(of_lengths(3, 2), 0), Packing(0, "causal"), 0)

    assert (packed.attention_mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_texts_that_are_not_to_be_joined_stay_as_they_are():
    alike = collate(of_lengths(9, 9, 9), 0)  # nothing is padded as it is
    assert pack(alike, Packing(0, None), 0) is alike
    batch = collate(of_lengths(9, 8), 0)
    assert pack(batch, Packing(0, None), 0, longest_row=12) is batch
    alone = collate(of_lengths(9), 0)
    assert pack(alone, Packing(0, None), 0) is alone


def test_passes_hold_every_text_once_and_no_more_tokens_than_allowed(make_lm):
    lm = make_lm("llama")
    texts = prepared(lm, [*TEXTS, *TEXTS, *TEXTS])

    passes = list(passes_over(lm.model, texts, pad_token_id=2, batch_size=4, max_tokens=70))

    assert sorted(text.index for group, _ in passes for text in group) == list(range(15))
    for group, batch in passes:
        assert len(group) == batch.n_texts <= 4
        assert sum(text.length for text in group) <= 70
    assert len(passes) > 15 // 4  # the tokens decide as well
