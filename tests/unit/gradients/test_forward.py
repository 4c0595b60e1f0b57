"""Forward-mode encodings against backward-and-dot (trap 12, section 1.2 of DESIGN.md)."""

import logging
import math

import pytest
import torch

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.collation import collate, prepare_texts
from hf_gradiend.errors import BaseModelError, CompatibilityError, NumericalError
from hf_gradiend.gradients import forward
from hf_gradiend.gradients.backward import encode_by_backward, gradients
from hf_gradiend.gradients.forward import (
    directional_derivatives,
    encode_texts,
    project_texts,
    tangent_groups,
    tangents_of,
)
from hf_gradiend.gradients.objectives import target_log_probabilities
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, SelectedParameter, select_parameters

ROWS = [
    ("Anna said that [TARGET] was late.", "she", "he"),
    ("The doctor was late because my nurse said that [TARGET] was tired.", "he", "it"),
    ("Paul said [TARGET]", "her", "she"),
]
ATTENTIONS = [
    (family, attention)
    for family in (
        *("bert", "distilbert", "electra", "roberta", "modernbert"),
        *("gpt2", "gpt_neox", "qwen2", "qwen3", "llama", "gemma2", "gemma3"),
    )
    for attention in ("eager", "sdpa")
    if (family, attention) != ("gemma2", "sdpa")  # transformers has no sdpa for Gemma 2
]


def random_direction(selection, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        entry.name: torch.randn(entry.values_shape, generator=generator, dtype=dtype)
        for entry in selection
    }


def by_backward(lm, batch_of, rows, selection, direction):
    """W_e·∇(−log p) of every text and word, one backward pass each; shape (texts, 2)."""
    lifted = {name: part[None] for name, part in direction.items()}
    return torch.stack(
        [encode_by_backward(lm.model, batch_of(lm, [row]), selection, lifted)[:, 0] for row in rows]
    )


def by_forward(lm, batch_of, rows, selection, direction):
    tangents = tangents_of(lm.model, selection, direction)
    return -directional_derivatives(lm.model, batch_of(lm, rows), tangents)


# ---- forward mode = backward and dot ----


@pytest.mark.parametrize("patterns", ["layers", "backbone"])
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_one_forward_pass_gives_what_backward_gives_text_by_text(
    make_lm, batch_of, family, attention, patterns
):
    lm = make_lm(family, attention=attention)
    selection = select_parameters(lm.model, patterns)
    direction = random_direction(selection)

    found = by_forward(lm, batch_of, ROWS, selection, direction)
    expected = by_backward(lm, batch_of, ROWS, selection, direction)

    assert lm.model.config._attn_implementation == attention
    assert found.shape == (3, 2)  # factual and counterfactual of all texts, from one pass
    # A projection is a sum that cancels, so its error is relative to the largest.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.1  # the control: the words differ


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("patterns", ["layers", "backbone"])
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_in_float64_both_paths_agree_to_ten_digits(make_lm, batch_of, family, attention, patterns):
    lm = make_lm(family, attention=attention)
    lm.model.double()
    selection = select_parameters(lm.model, patterns)
    direction = random_direction(selection, dtype=torch.float64)

    found = by_forward(lm, batch_of, ROWS, selection, direction)
    expected = by_backward(lm, batch_of, ROWS, selection, direction)

    assert found.dtype == expected.dtype == torch.float64
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.usefixtures("double_precision")
def test_the_derivative_is_a_finite_difference(make_lm, batch_of, family):
    # Independent of any backward pass.
    lm = make_lm(family)
    lm.model.double()
    selection = select_parameters(lm.model, "backbone")
    direction = random_direction(selection, dtype=torch.float64)
    parameters = selection.parameters(lm.model)
    batch = batch_of(lm, ROWS)

    @torch.no_grad()
    def at(step):
        for name, parameter in parameters.items():
            parameter += step * direction[name]
        scores = target_log_probabilities(lm.model, batch)
        for name, parameter in parameters.items():
            parameter -= step * direction[name]
        return scores

    found = directional_derivatives(lm.model, batch, tangents_of(lm.model, selection, direction))

    step = 1e-4  # four points: the error is of the order step⁴
    expected = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_words_of_several_tokens_and_several_slots_agree_too(make_lm, batch_of, family):
    # Trap 2: factual and counterfactual have different numbers of tokens.
    lm = make_lm(family)
    factual = "herself" if family == "bert" else "they"
    rows = [
        ("Anna said that [TARGET] was late because [TARGET] was tired.", factual, "he"),
        ("Anna said [TARGET]", "she", factual),
    ]
    selection = select_parameters(lm.model, "backbone")
    direction = random_direction(selection)

    found = by_forward(lm, batch_of, rows, selection, direction)
    expected = by_backward(lm, batch_of, rows, selection, direction)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_derivative_along_a_decoder_bias_is_the_analytic_one(make_lm, batch_of):
    # d log softmax(z)_t / dz · v = v_t − Σ p v. The bias is tied to the decoder's own.
    lm = make_lm("bert")
    ids = lm.tokenizer.convert_tokens_to_ids(
        ["[CLS]", "anna", "said", "that", "[MASK]", "was", "late", ".", "[SEP]"]
    )
    probabilities = lm.model(torch.tensor([ids])).logits[0, 4].softmax(-1).detach()
    words = lm.tokenizer.convert_tokens_to_ids(["she", "he"])
    selection = select_parameters(lm.model, "cls.predictions.bias")
    direction = random_direction(selection)
    (v,) = direction.values()

    found = by_forward(lm, batch_of, ROWS[:1], selection, direction)

    expected = probabilities @ v - v[words]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "embedding", "head"),
    [
        ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
    ],
)
def test_a_tied_weight_moves_in_both_its_places(make_lm, batch_of, family, embedding, head):
    lm = make_lm(family)
    untied = make_lm(family, tie_word_embeddings=False)
    untied.model.load_state_dict(lm.model.state_dict())
    selection = select_parameters(lm.model, embedding)
    direction = random_direction(selection)
    there = {
        name: -directional_derivatives(
            untied.model, batch_of(lm, ROWS), {name: direction[embedding]}
        )
        for name in (embedding, head)
    }

    found = by_forward(lm, batch_of, ROWS, selection, direction)

    torch.testing.assert_close(found, there[embedding] + there[head], rtol=1e-4, atol=1e-5)
    for part in there.values():  # the control: each place counts
        assert part.abs().min() > 1e-3


def test_a_sparse_direction_is_zero_elsewhere(make_lm, batch_of):
    lm = make_lm("gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    indices = torch.tensor([3, 70, 500], dtype=torch.int32)
    selection = ParameterSelection((SelectedParameter(name, (16, 64), indices),))
    values = torch.tensor([1.0, -2.0, 4.0])

    found = by_forward(lm, batch_of, ROWS[:1], selection, {name: values})

    full = gradients(lm.model, batch_of(lm, ROWS[:1]), select_parameters(lm.model, name))
    expected = [full[s][name].view(-1)[indices] @ values for s in ("factual", "counterfactual")]
    torch.testing.assert_close(found[0], torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_a_selection_without_the_prefix_of_the_body_finds_the_same_weights(make_lm, batch_of):
    lm = make_lm("llama")
    whole = select_parameters(lm.model)
    body = select_parameters(lm.model.model)
    direction = random_direction(whole)
    shorter = {name.removeprefix("model."): part for name, part in direction.items()}

    found = by_forward(lm, batch_of, ROWS, body, shorter)

    assert body.names == list(shorter)
    assert torch.equal(found, by_forward(lm, batch_of, ROWS, whole, direction))


def test_a_weight_that_no_output_depends_on_has_derivative_zero(make_lm, batch_of):
    lm = make_lm("gpt2")
    lm.model.unused = torch.nn.Parameter(torch.ones(3))
    batch = batch_of(lm, ROWS)

    found = directional_derivatives(lm.model, batch, {"unused": torch.ones(3)})

    assert torch.equal(found, torch.zeros(3, 2))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_forward_derivative_is_refused(make_lm, batch_of, attention):
    lm = make_lm("gpt2")
    batch = batch_of(lm, ROWS)
    lm.model.config._attn_implementation = attention

    with pytest.raises(BaseModelError, match=rf"eager or sdpa.*but got '{attention}'.*set_attn"):
        directional_derivatives(lm.model, batch, {})


# ---- the model is left as it was ----


def awkward(lm):
    model = lm.model
    model.train()
    list(model.modules())[3].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        if number % 2:
            parameter.grad = torch.full_like(parameter, number)
    model.base_model.register_forward_hook(lambda *_: None)


def state(model):
    named = list(model.named_parameters(remove_duplicate=False))
    return {
        "parameters": [(name, id(p), id(p.grad), p.requires_grad) for name, p in named],
        "bits": [p.detach().clone() for _, p in named],
        "grads": [p.grad.clone() for _, p in named if p.grad is not None],
        "training": [m.training for m in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for m in model.modules()
        ],
        "grad_mode": torch.is_grad_enabled(),
        "kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        ),
    }


def assert_left_as_it_was(model, before):
    after = state(model)
    for key in ("bits", "grads"):
        assert all(map(torch.equal, before.pop(key), after.pop(key)))
    assert after == before


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "gemma3"])
def test_projecting_leaves_the_model_as_it_was(make_lm, batch_of, family):
    lm = make_lm(family)
    awkward(lm)
    before = state(lm.model)
    selection = select_parameters(lm.model, "backbone")

    found = by_forward(lm, batch_of, ROWS, selection, random_direction(selection))

    assert_left_as_it_was(lm.model, before)
    assert found.abs().min() > 0  # the control: something was computed


def test_an_exception_inside_leaves_the_model_as_it_was(make_lm, batch_of):
    lm = make_lm("gpt2")
    awkward(lm)
    batch = batch_of(lm, ROWS)
    bad = type(batch)(**{**vars(batch), "input_ids": batch.input_ids + 10**6})
    selection = select_parameters(lm.model, "backbone")
    tangents = tangents_of(lm.model, selection, random_direction(selection))
    before = state(lm.model)

    with pytest.raises(IndexError):
        directional_derivatives(lm.model, bad, tangents)

    assert_left_as_it_was(lm.model, before)
    directional_derivatives(lm.model, batch, tangents)  # and it still works


def test_dropout_is_off_and_its_mode_restored(make_lm, batch_of):
    lm = make_lm("gpt2")
    selection = select_parameters(lm.model)
    direction = random_direction(selection)
    expected = by_forward(lm, batch_of, ROWS, selection, direction)
    lm.model.train()

    found = by_forward(lm, batch_of, ROWS, selection, direction)

    assert torch.equal(found, expected)
    assert lm.model.training


# ---- half precision (trap 12) ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("size", [1e6, 1.0, 1e-3, 1e-6, 1e-12])
def test_half_precision_gives_projections_near_those_of_float32(make_lm, family, dtype, size):
    # W_e of a large model has entries of 1e-4 and less; float16 loses digits below 6e-5 and holds
    # nothing below 6e-8 or above 65504.
    lm = make_lm(family)
    lm.model.to(dtype)
    selection = select_parameters(lm.model)
    direction = {n: size * part for n, part in random_direction(selection).items()}
    texts = prepare_texts(
        [dict(zip(("text", "factual", "counterfactual"), row, strict=True)) for row in ROWS],
        lm.tokenizer, lm.objective,
    )  # fmt: skip

    found = project_texts(lm.model, texts, selection, direction, pad_token_id=0)
    lm.model.float()
    expected = project_texts(lm.model, texts, selection, direction, pad_token_id=0)

    assert found.dtype == torch.float32
    error = (found - expected).norm() / expected.norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.01)


# ---- project_texts and encode_texts ----


def rows_of(*texts):
    return [{"text": text, "factual": "she", "counterfactual": "he"} for text in texts]


MIXED = rows_of(
    "Anna said [TARGET]",
    "[TARGET] was late.",  # nothing before the slot: skipped
    "The doctor was late because my nurse said that [TARGET] was tired.",
    "Anna said that [TARGET] was late.",
)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_projections_stand_in_the_order_of_the_data_set(make_lm, batch_of, batch_size):
    lm = make_lm("gpt2")
    selection = select_parameters(lm.model)
    direction = random_direction(selection)
    texts = prepare_texts(MIXED, lm.tokenizer, "causal")

    found = project_texts(
        lm.model, texts, selection, direction, pad_token_id=0, batch_size=batch_size
    )

    rows = [tuple(row.values()) for row in MIXED]
    expected = by_backward(lm, batch_of, [rows[0], rows[2], rows[3]], selection, direction)
    torch.testing.assert_close(found[[0, 2, 3]], expected, rtol=1e-4, atol=1e-4)
    # Trap 4: only the text without room is not a number.
    assert found.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_projection_is_linear_in_its_direction_to_the_last_bit(make_lm, family, dtype):
    # A power of two changes no digit; zero is zero.
    lm = make_lm(family)
    lm.model.to(dtype)
    selection = select_parameters(lm.model)
    direction = random_direction(selection)
    texts = prepare_texts(rows_of("Anna said [TARGET]"), lm.tokenizer, lm.objective)

    one, quarter, none = (
        project_texts(
            lm.model, texts, selection, {n: f * v for n, v in direction.items()}, pad_token_id=0
        )
        for f in (1.0, 0.25, 0.0)
    )

    assert torch.equal(quarter, one / 4)
    assert torch.equal(none, torch.zeros(1, 2))
    assert one.abs().min() > 0.01


def every_second_weight(selection):
    return ParameterSelection(
        tuple(
            SelectedParameter(e.name, e.shape, torch.arange(0, e.n_entries, 2, dtype=torch.int32))
            for e in selection
        )
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", ["sparse", "other type"])
def test_tangents_beyond_their_budget_are_taken_in_groups(make_lm, monkeypatch, family, kind):
    lm = make_lm(family)
    selection = select_parameters(lm.model, "backbone")
    if kind == "sparse":
        selection = every_second_weight(selection)
    dtype = torch.float32 if kind == "sparse" else torch.float64
    direction = random_direction(selection, dtype=dtype)
    texts = prepare_texts(
        rows_of("Anna said [TARGET]", "Paul [TARGET]"), lm.tokenizer, lm.objective
    )
    seen = []

    def tangents(model, group, held):
        made = tangents_of(model, group, held)
        seen.append(sum(tangent.nbytes for tangent in made.values()))
        return made

    monkeypatch.setattr(forward, "tangents_of", tangents)
    whole = project_texts(lm.model, texts, selection, direction, pad_token_id=0)
    monkeypatch.setattr(forward, "TANGENT_BYTES", 6000)
    grouped = project_texts(lm.model, texts, selection, direction, pad_token_id=0)

    torch.testing.assert_close(grouped, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    alone, *groups = seen
    largest = 4 * max(entry.n_entries for entry in selection)
    assert len(groups) > 3
    assert sum(groups) == alone
    assert max(groups) <= max(6000, largest)
    # The control: no group alone has the sum.
    monkeypatch.setattr(forward, "TANGENT_BYTES", 2**30)
    *_, part = selection.groups(lambda entry: 4 * entry.n_entries, 6000)
    last = project_texts(lm.model, texts, part, direction, pad_token_id=0)
    assert (last - whole).abs().max() > 1e-3


def test_tangents_that_are_views_of_the_direction_are_one_group(make_lm, monkeypatch):
    lm = make_lm("gpt2")
    selection = select_parameters(lm.model)
    monkeypatch.setattr(forward, "TANGENT_BYTES", 1)

    direction = random_direction(selection)
    tangents = tangents_of(lm.model, selection, direction)

    assert len(tangent_groups(lm.model, selection, direction)) == 1
    held = {values.data_ptr() for values in direction.values()}
    assert {tangent.data_ptr() for tangent in tangents.values()} == held
    sparse = every_second_weight(selection)
    assert len(tangent_groups(lm.model, sparse, random_direction(sparse))) == len(sparse)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_base_model_that_checkpoints_its_layers_is_read_the_same(make_lm, family):
    lm = make_lm(family)
    selection = select_parameters(lm.model, "backbone")
    direction = random_direction(selection)
    texts = prepare_texts(rows_of("Anna said [TARGET]"), lm.tokenizer, lm.objective)
    expected = project_texts(lm.model, texts, selection, direction, pad_token_id=0)
    # transformers 5.23 deprecates the old name; 6 will drop it.
    new_name = hasattr(lm.model, "activation_checkpointing_enable")
    getattr(
        lm.model, "activation_checkpointing_enable" if new_name else "gradient_checkpointing_enable"
    )()
    lm.model.train()

    found = project_texts(lm.model, texts, selection, direction, pad_token_id=0)

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert all(module.training for module in lm.model.modules())


def test_projections_that_are_not_numbers_are_an_error(make_lm):
    lm = make_lm("gpt2")
    selection = select_parameters(lm.model)
    direction = random_direction(selection)
    direction[selection.names[0]][0] = torch.nan
    texts = prepare_texts(MIXED, lm.tokenizer, "causal")

    with pytest.raises(NumericalError, match="Expected finite encodings, but got NaN"):
        project_texts(lm.model, texts, selection, direction, pad_token_id=0)


def gradiend_for(lm, *, patterns="layers", scale=0.05, **config):
    selection = select_parameters(lm.model, patterns)
    gradiend = GradiendModel(GradiendConfig(parameters=selection.to_config(), **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in gradiend.encoder.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return gradiend, selection


@pytest.mark.parametrize("source", ["factual", "counterfactual", "diff"])
def test_an_encoding_is_the_one_that_the_gradient_itself_has(make_lm, batch_of, source):
    # Two features; h by hand: tanh(W_e·∇ + b_e) of the gradient of one text.
    lm = make_lm("llama")
    gradiend, selection = gradiend_for(lm, n_features=2, source=source)
    rows = [MIXED[0], MIXED[2]]

    found = encode_texts(gradiend, lm.model, lm.tokenizer, rows, progress=False)

    expected = []
    for row in rows:
        held = gradients(lm.model, batch_of(lm, [tuple(row.values())]), selection, [source])[source]
        expected.append(
            [
                math.tanh(
                    sum(
                        float((gradiend.encoder.weight.at(name)[k] * part).sum().detach())
                        for name, part in held.items()
                    )
                    + float(gradiend.encoder.bias[k].detach())
                )
                for k in (0, 1)
            ]
        )
    torch.testing.assert_close(found.source, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert 0.1 < found.source.abs().max() < 0.999  # the control: neither zero nor saturated
    assert found.source.shape == (2, 2)
    if source == "diff":
        assert found.factual is None
        assert found.counterfactual is None
    else:
        assert torch.equal(found.source, getattr(found, source))
        assert not torch.allclose(found.factual, found.counterfactual, atol=1e-3)


def test_encodings_are_nan_for_the_text_without_room_and_for_no_other(make_lm, caplog):
    # Trap 4.
    lm = make_lm("gpt2")
    gradiend, _ = gradiend_for(lm)

    with caplog.at_level(logging.WARNING, logger="hf_gradiend"):
        found = encode_texts(gradiend, lm.model, lm.tokenizer, MIXED, progress=False)

    for encodings in (found.source, found.factual, found.counterfactual):
        assert encodings.shape == (4, 1)
        assert encodings.isnan()[:, 0].tolist() == [False, True, False, False]
    assert "1 of 4 texts are skipped" in caplog.text


@pytest.mark.parametrize("side", ["left", "right"])
def test_encodings_do_not_depend_on_batches_or_the_padding_side(make_lm, side):
    # Trap 3.
    lm = make_lm("llama")
    gradiend, _ = gradiend_for(lm)
    lm.tokenizer.padding_side = side

    alone = [
        encode_texts(gradiend, lm.model, lm.tokenizer, [row], progress=False).source
        for row in MIXED
    ]
    together = encode_texts(gradiend, lm.model, lm.tokenizer, MIXED, progress=False).source

    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_without_a_padding_token_will_do(make_lm, make_tokenizer):
    # GPT-2's own has none; what stands in the padding does not matter.
    lm = make_lm("gpt2")
    gradiend, _ = gradiend_for(lm)
    bare = make_tokenizer("gpt2")
    bare.pad_token = None
    rows = [MIXED[0], MIXED[2]]

    found = encode_texts(gradiend, lm.model, bare, rows, progress=False).source

    expected = encode_texts(gradiend, lm.model, lm.tokenizer, rows, progress=False).source
    torch.testing.assert_close(found, expected)


def test_the_gradiend_of_another_base_model_is_refused(make_lm):
    gradiend, _ = gradiend_for(make_lm("gpt2"))
    lm = make_lm("llama")

    with pytest.raises(CompatibilityError, match=r"LlamaForCausalLM .* is missing"):
        encode_texts(gradiend, lm.model, lm.tokenizer, MIXED, progress=False)


def test_a_batch_is_not_changed_by_reading_it(make_lm):
    lm = make_lm("gpt2")
    texts = prepare_texts(MIXED, lm.tokenizer, "causal")
    batch, same = collate(texts, 0), collate(texts, 0)
    selection = select_parameters(lm.model)

    directional_derivatives(
        lm.model, batch, tangents_of(lm.model, selection, random_direction(selection))
    )

    assert all(torch.equal(v, vars(same)[n]) for n, v in vars(batch).items() if torch.is_tensor(v))
