"""Gradients against finite differences of a plain loss, and what a pass leaves behind.

Trap 12 of DESIGN.md section 4 (half precision, checkpointing, tied weights) and the property
"collecting leaves the model as it was" of STYLE.md section 3.
"""

import copy
import dataclasses

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from hf_gradiend.base_models import check_base_model
from hf_gradiend.errors import BaseModelError, CompatibilityError, NumericalError
from hf_gradiend.gradients.backward import encode_by_backward, gradient_stream, gradients
from hf_gradiend.gradients.objectives import target_log_probabilities
from hf_gradiend.parameters import ParameterSelection, SelectedParameter, select_parameters

SIDES = ("factual", "counterfactual", "diff")
ROW = ("Anna said that [TARGET] was late.", "she", "he")
ROWS = [
    ROW,
    ("The doctor was late because my nurse said that [TARGET] was tired.", "hers", "it"),
    ("Paul said [TARGET]", "her", "she"),
]
BY_HAND = {
    "bert": ("[CLS] anna said that [MASK] was late . [SEP]", 4, "she", "he"),
    "roberta": ("<s> Anna Ġsaid Ġthat <mask> Ġwas Ġlate . </s>", 4, "Ġshe", "Ġhe"),
    "gpt2": ("Anna Ġsaid Ġthat", 2, "Ġshe", "Ġhe"),
    "llama": ("<s> ▁Anna ▁said ▁that", 3, "▁she", "▁he"),
}
BY_HAND = {
    **dict.fromkeys(("bert", "distilbert", "electra"), BY_HAND["bert"]),
    **dict.fromkeys(("roberta", "modernbert"), BY_HAND["roberta"]),
    **dict.fromkeys(("gpt2", "gpt_neox", "qwen2", "qwen3"), BY_HAND["gpt2"]),
    **dict.fromkeys(("llama", "gemma2", "gemma3"), BY_HAND["llama"]),
}


def plain_losses(lm):
    """(factual, counterfactual, difference) of ROW by a plain pass, without the package."""
    tokens, position, *words = BY_HAND[lm.family]
    ids = torch.tensor([lm.tokenizer.convert_tokens_to_ids(tokens.split())])
    at_slot = lm.model(input_ids=ids).logits[0, position].float().log_softmax(-1)
    factual, counterfactual = -at_slot[lm.tokenizer.convert_tokens_to_ids(words)]
    return torch.stack([factual, counterfactual, factual - counterfactual])


@torch.no_grad()
def finite_difference(lm, move, step):
    """Derivative of the plain losses along a move of the weights, by four points: error step⁴."""
    at = {}
    for k in (-2, -1, 1, 2):
        move(k * step)
        at[k] = plain_losses(lm)
        move(-k * step)
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)


def assert_same(first, other, **tolerance):
    for side in first:
        for name in first[side]:
            torch.testing.assert_close(
                first[side][name], other[side][name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )


# ---- the right gradient ----


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("patterns", ["layers", "backbone"])
def test_gradients_are_the_finite_differences_of_a_plain_loss(make_lm, batch_of, family, patterns):
    lm = make_lm(family)
    lm.model.double()
    selection = select_parameters(lm.model, patterns)
    found = gradients(lm.model, batch_of(lm, [ROW]), selection, SIDES)
    flat = {side: torch.cat([v.flatten() for v in found[side].values()]) for side in SIDES}
    parameters = selection.parameters(lm.model)
    generator = torch.Generator().manual_seed(0)

    for _ in range(3):
        direction = torch.randn(selection.n_selected, generator=generator, dtype=torch.float64)
        parts = selection.unflatten(direction)

        def move(step, parts=parts):
            for name, parameter in parameters.items():
                parameter.data += step * parts[name]

        expected = finite_difference(lm, move, 1e-4)
        projected = torch.stack([flat[side] @ direction for side in SIDES])
        torch.testing.assert_close(projected, expected, rtol=1e-7, atol=1e-8)
        assert expected.abs().min() > 1e-3  # the control: there is something to find


@pytest.mark.usefixtures("double_precision")
def test_single_entries_of_a_gradient_are_finite_differences(make_lm, batch_of, family):
    # One coordinate of every parameter: the largest, so that it can be told from zero.
    lm = make_lm(family)
    lm.model.double()
    selection = select_parameters(lm.model, "backbone")
    found = gradients(lm.model, batch_of(lm, [ROW]), selection)
    parameters = selection.parameters(lm.model)

    for name, parameter in parameters.items():
        at = int(found["factual"][name].abs().argmax())

        def move(step, parameter=parameter, at=at):
            parameter.data.view(-1)[at] += step

        expected = finite_difference(lm, move, 1e-4)[:2]
        entries = torch.stack([found[side][name].view(-1)[at] for side in SIDES[:2]])
        torch.testing.assert_close(entries, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("double_precision")
def test_the_gradient_of_a_batch_is_the_mean_of_its_texts(make_lm, batch_of, family):
    lm = make_lm(family)
    lm.model.double()
    selection = select_parameters(lm.model)
    rows = [(text, "she" if f == "hers" else f, c) for text, f, c in ROWS]

    together = gradients(lm.model, batch_of(lm, rows), selection)
    alone = [gradients(lm.model, batch_of(lm, [row]), selection) for row in rows]

    mean = {
        side: {name: sum(one[side][name] for one in alone) / 3 for name in together[side]}
        for side in together
    }
    assert_same(together, mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_difference_is_factual_minus_counterfactual(make_lm, batch_of, family):
    lm = make_lm(family)
    rows = [row if lm.family != "bert" else (row[0], "herself", "he") for row in ROWS]

    found = gradients(lm.model, batch_of(lm, rows), select_parameters(lm.model), SIDES)

    for name, difference in found["diff"].items():
        expected = found["factual"][name] - found["counterfactual"][name]
        torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(found["factual"][name], found["counterfactual"][name])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_sparse_selection_gives_the_entries_of_the_dense_gradient(make_lm, batch_of, family):
    lm = make_lm(family)
    dense = select_parameters(lm.model)
    first, *_, last = dense.entries
    sparse = ParameterSelection(
        (
            SelectedParameter(first.name, first.shape, torch.tensor([0, 3, 7], dtype=torch.int32)),
            SelectedParameter(last.name, last.shape),
        )
    )
    batch = batch_of(lm, ROWS[::2])

    found = gradients(lm.model, batch, sparse)["factual"]
    full = gradients(lm.model, batch, dense)["factual"]

    assert list(found) == [first.name, last.name]
    assert torch.equal(found[first.name], full[first.name].view(-1)[[0, 3, 7]])
    assert torch.equal(found[last.name], full[last.name])


def test_a_parameter_that_the_loss_does_not_reach_has_gradient_zero(make_lm, batch_of):
    lm = make_lm("gpt2")
    lm.model.unused = torch.nn.Parameter(torch.ones(3))

    found = gradients(
        lm.model, batch_of(lm, [ROW]), select_parameters(lm.model, ["unused", "*wpe*"])
    )

    assert torch.equal(found["factual"]["unused"], torch.zeros(3))
    assert found["factual"]["transformer.wpe.weight"].abs().max() > 0  # the control


def test_a_projection_is_the_dot_product_with_the_gradient(make_lm, batch_of):
    lm = make_lm("gpt2")
    selection = select_parameters(lm.model, "*wpe*")
    directions = {"transformer.wpe.weight": torch.zeros(2, 64, 16)}
    directions["transformer.wpe.weight"][0, 2, 5] = 1.0
    directions["transformer.wpe.weight"][1, 1, 4] = -2.0
    batch = batch_of(lm, [ROW])

    found = encode_by_backward(lm.model, batch, selection, directions)

    for row, side in zip(found, ("factual", "counterfactual"), strict=True):
        entries = gradients(lm.model, batch, selection)[side]["transformer.wpe.weight"]
        assert row.tolist() == [entries[2, 5].item(), -2 * entries[1, 4].item()]


# ---- tied weights (trap 12) ----


TIED = {
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "gemma3": ("model.embed_tokens.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("family", list(TIED))
def test_a_tied_weight_gets_the_sum_of_both_its_uses(make_lm, batch_of, family):
    lm = make_lm(family)
    embedding, head = TIED[family]
    untied = make_lm(family, tie_word_embeddings=False)
    untied.model.load_state_dict(lm.model.state_dict())
    selection = select_parameters(lm.model, "backbone")

    found = gradients(lm.model, batch_of(lm, [ROW]), selection)["factual"]
    plain_losses(untied)[0].backward()

    own = dict(untied.model.named_parameters())
    assert own[embedding] is not own[head]
    torch.testing.assert_close(
        found[embedding], own[embedding].grad + own[head].grad, rtol=1e-4, atol=1e-6
    )
    assert head not in selection.names
    # The control: either part alone is another gradient.
    for name in (embedding, head):
        assert own[name].grad.abs().max() > 0.01
        assert (found[embedding] - own[name].grad).abs().max() > 0.01


def test_the_bias_of_a_tied_decoder_has_the_gradient_softmax_minus_one_hot(make_lm, batch_of):
    # Analytic: d(−log softmax(z)_t)/dz = softmax(z) − onehot(t), and the bias is added to z.
    lm = make_lm("bert")
    tokens, position, she, he = BY_HAND["bert"]
    ids = torch.tensor([lm.tokenizer.convert_tokens_to_ids(tokens.split())])
    probabilities = lm.model(input_ids=ids).logits[0, position].softmax(-1).detach()

    (entry,) = selection = select_parameters(lm.model, "cls.predictions.bias")
    found = gradients(lm.model, batch_of(lm, [ROW]), selection)

    for side, word in (("factual", she), ("counterfactual", he)):
        expected = probabilities.clone()
        expected[lm.tokenizer.convert_tokens_to_ids(word)] -= 1
        torch.testing.assert_close(found[side][entry.name], expected, rtol=1e-5, atol=1e-6)


# ---- which parameters (section 1 of DESIGN.md) ----


V = {"bert": 27, "gpt2": 312, "llama": 86}  # lengths of the vocabularies


@pytest.mark.parametrize(
    ("family", "per_layer", "outside"),
    [
        # query, key, value, output: 4·(16·16 + 16); up (16·32 + 32), down (32·16 + 16); two norms
        # of 2·16. Outside: words, 66 positions, 2 segments, a norm; no pooler, no head but its tie.
        ("bert", 4 * 272 + 544 + 528 + 2 * 32, V["bert"] * 16 + 66 * 16 + 2 * 16 + 32),
        # Fused query-key-value 16·48 + 48, output 272, up 16·64 + 64, down 64·16 + 16, two norms.
        # Outside: words (tied to the head), 64 positions, the final norm.
        ("gpt2", 816 + 272 + 1088 + 1040 + 2 * 32, V["gpt2"] * 16 + 64 * 16 + 32),
        # query and output 16·16, key and value (one of two heads) 16·8, three 16·32, two norms.
        # Outside: words and final norm; the head is not tied and stays out.
        ("llama", 2 * 256 + 2 * 128 + 3 * 512 + 2 * 16, V["llama"] * 16 + 16),
    ],
)
def test_layers_and_backbone_cover_what_a_count_by_hand_says(make_lm, family, per_layer, outside):
    lm = make_lm(family)

    layers = select_parameters(lm.model, "layers")
    backbone = select_parameters(lm.model, "backbone")

    assert len(lm.tokenizer) == V[family]
    assert layers.n_selected == 2 * per_layer
    assert backbone.n_selected == 2 * per_layer + outside
    assert set(layers.names) < set(backbone.names)
    assert not [n for n in layers.names if "embed" in n or "wte" in n or "head" in n or "cls" in n]


def test_a_tied_head_of_a_llama_comes_in_with_its_backbone(make_lm):
    lm = make_lm("llama", tie_word_embeddings=True)

    backbone = select_parameters(lm.model, "backbone")

    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    assert "model.embed_tokens.weight" in backbone.names
    assert sum(p.numel() for p in lm.model.parameters()) == backbone.n_selected


def test_layers_are_two_stacks_of_equal_size_in_every_family(make_lm, family):
    lm = make_lm(family)

    layers = select_parameters(lm.model, "layers")
    backbone = select_parameters(lm.model, "backbone")

    outside = set(backbone.names) - set(layers.names)
    words = {id(p) for p in lm.model.get_input_embeddings().parameters()}
    own = dict(lm.model.named_parameters())
    assert any(id(own[name]) in words for name in outside)
    assert not any(id(own[name]) in words for name in layers.names)
    halves = [sum(own[n].numel() for n in layers.names if f".{k}." in n) for k in (0, 1)]
    # ModernBERT leaves the norm out that would follow the embeddings' own.
    assert halves[1] - halves[0] == (16 if family == "modernbert" else 0)
    assert sum(halves) == layers.n_selected


# ---- a consumer of the stream ----


@pytest.mark.parametrize("patterns", ["layers", "backbone"])
def test_a_consumer_sees_each_selected_parameter_once_per_backward(
    make_lm, batch_of, family, patterns
):
    lm = make_lm(family)
    selection = select_parameters(lm.model, patterns)
    seen = {"factual": [], "counterfactual": []}

    with gradient_stream(lm.model, selection) as stream:
        losses = stream.losses(batch_of(lm, ROWS[:1]), list(seen))
        for side, loss in losses.items():
            stream.backward(
                loss, lambda name, _, side=side: seen[side].append(name), retain_graph=True
            )

    # Tied weights, too: the hook fires when both uses are summed.
    for names in seen.values():
        assert sorted(names) == sorted(selection.names)


def test_gradients_have_the_shape_and_type_of_their_parameter(make_lm, batch_of):
    lm = make_lm("gpt2")
    lm.model.bfloat16()
    selection = select_parameters(lm.model)
    parameters = selection.parameters(lm.model)
    seen = {}

    with gradient_stream(lm.model, selection) as stream:
        loss = stream.losses(batch_of(lm, [ROW]), ["factual"])["factual"]
        stream.backward(loss, lambda name, g: seen.update({name: (g.shape, g.dtype)}))

    assert seen == {n: (p.shape, torch.bfloat16) for n, p in parameters.items()}


def test_no_gradient_is_held_once_it_is_handed_over(make_lm, batch_of):
    lm = make_lm("bert")
    selection = select_parameters(lm.model)
    held = []

    with gradient_stream(lm.model, selection) as stream:
        loss = stream.losses(batch_of(lm, [ROW]), ["factual"])["factual"]
        stream.backward(
            loss,
            lambda *_: held.append(sum(p.grad is not None for p in lm.model.parameters())),
        )

    assert len(held) == len(selection)
    assert max(held) == 0


def test_only_selected_parameters_get_a_gradient_of_their_own(make_lm):
    lm = make_lm("llama")
    selection = select_parameters(lm.model, "*layers.1.mlp*")

    with gradient_stream(lm.model, selection):
        wanted = [n for n, p in lm.model.named_parameters() if p.requires_grad]

    assert wanted == [f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]


# ---- the model is left as it was ----


def awkward(lm):
    """A model in a state that a careless pass would lose."""
    model = lm.model
    model.train()
    list(model.modules())[3].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        if number % 2:
            parameter.grad = torch.full_like(parameter, number)
    fired = []
    model.base_model.register_forward_hook(lambda *_: fired.append("mine"))
    return fired


def state(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "names": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "identity": [id(p) for _, p in model.named_parameters(remove_duplicate=False)],
        "weights": [p.detach().clone() for p in model.parameters()],
        "grad_identity": [id(p.grad) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [list(getattr(m, h)) for m in model.modules() for h in hooks],
        "parameter_hooks": [
            list(getattr(p, h) or ())
            for p in model.parameters()
            for h in ("_backward_hooks", "_post_accumulate_grad_hooks")
        ],
        "buffers": [b.clone() for b in model.buffers()],
    }


def assert_left_as_it_was(model, before):
    after = state(model)
    for key in ("weights", "grads", "buffers"):
        for old, new in zip(before.pop(key), after.pop(key), strict=True):
            assert (old is None) == (new is None), key
            assert old is None or torch.equal(old, new), key
    assert after == before


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "gemma3"])
def test_collecting_gradients_leaves_the_model_as_it_was(make_lm, batch_of, family):
    lm = make_lm(family)
    fired = awkward(lm)
    before = state(lm.model)

    gradients(lm.model, batch_of(lm, ROWS[:1]), select_parameters(lm.model, "backbone"), SIDES)

    assert_left_as_it_was(lm.model, before)
    assert fired == ["mine"]  # one forward pass, and the user's own hook saw it


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("where", ["before", "forward", "consumer", "loss"])
def test_an_exception_inside_leaves_the_model_as_it_was(make_lm, batch_of, where):
    lm = make_lm("gpt2")
    awkward(lm)
    batch = batch_of(lm, [ROW])
    selection = select_parameters(lm.model, "backbone")
    if where == "forward":
        batch = type(batch)(**{**vars(batch), "input_ids": batch.input_ids + 10**6})
    before = state(lm.model)
    raised = {"forward": IndexError, "loss": RuntimeError}.get(where, InterruptionError)

    def interrupt(*_):
        raise InterruptionError

    def run():
        with gradient_stream(lm.model, selection) as stream:
            if where == "before":
                raise InterruptionError
            loss = stream.losses(batch, ["factual"])["factual"]
            stream.backward(loss.detach() if where == "loss" else loss, interrupt)

    with pytest.raises(raised):
        run()

    assert_left_as_it_was(lm.model, before)


def test_a_selection_of_another_model_is_refused_and_nothing_is_touched(make_lm, batch_of):
    lm, other = make_lm("gpt2"), make_lm("llama")
    awkward(lm)
    before = state(lm.model)

    with pytest.raises(CompatibilityError):
        gradients(lm.model, batch_of(lm, [ROW]), select_parameters(other.model))

    assert_left_as_it_was(lm.model, before)


def test_the_check_of_a_model_s_state_sees_what_a_plain_backward_changes(make_lm):
    # The control of the tests above.
    lm = make_lm("gpt2")
    before = state(lm.model)

    plain_losses(lm)[0].backward()

    with pytest.raises(AssertionError):
        assert_left_as_it_was(lm.model, before)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_dropout_is_off_inside_whatever_the_model_s_mode(make_lm, batch_of, family):
    lm = make_lm(family)  # both families have dropout 0.1
    selection = select_parameters(lm.model)
    expected = gradients(lm.model, batch_of(lm, [ROW]), selection)
    lm.model.train()

    found = gradients(lm.model, batch_of(lm, [ROW]), selection)

    assert_same(found, expected, rtol=0, atol=0)
    first, second = plain_losses(lm), plain_losses(lm)  # the control
    assert not torch.equal(first, second)


def test_gradients_can_be_taken_under_no_grad(make_lm, batch_of):
    lm = make_lm("gpt2")
    selection = select_parameters(lm.model)
    expected = gradients(lm.model, batch_of(lm, [ROW]), selection)

    with torch.no_grad():
        found = gradients(lm.model, batch_of(lm, [ROW]), selection)
        assert not torch.is_grad_enabled()

    assert_same(found, expected, rtol=0, atol=0)


# ---- trap 12: never wrong numbers ----


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradients(make_lm, batch_of, family):
    lm = make_lm(family)
    selection = select_parameters(lm.model, "backbone")
    expected = gradients(lm.model, batch_of(lm, ROWS[:1]), selection, SIDES)
    # transformers 5.23 deprecates the old name; 6 will drop it.
    new_name = hasattr(lm.model, "activation_checkpointing_enable")
    getattr(
        lm.model, "activation_checkpointing_enable" if new_name else "gradient_checkpointing_enable"
    )()
    lm.model.train()

    found = gradients(lm.model, batch_of(lm, ROWS[:1]), selection, SIDES)

    assert_same(found, expected, rtol=1e-6, atol=1e-7)
    assert any(getattr(module, "gradient_checkpointing", False) for module in lm.model.modules())


def streamed(lm, batch, selection, *, checkpointing):
    """Gradients of both words, by two backward passes through one forward pass."""
    found = {"factual": {}, "counterfactual": {}}
    with gradient_stream(lm.model, selection, checkpointing=checkpointing) as stream:
        losses = stream.losses(batch, list(found))
        stream.backward_each(
            losses, lambda side: lambda name, g: found[side].update({name: g.clone()})
        )
    return found


@pytest.fixture
def falcon(make_lm):
    """A model whose layers themselves apply dropout, in their training mode."""
    lm = make_lm("gpt2")
    config = FalconConfig(
        vocab_size=len(lm.tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout=0.5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dataclasses.replace(lm, model=FalconForCausalLM(config).eval())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3", "falcon"])
@pytest.mark.parametrize("patterns", ["layers", "backbone"])
def test_a_stream_that_checkpoints_gives_the_same_gradients(
    make_lm, falcon, batch_of, family, patterns
):
    lm = falcon if family == "falcon" else make_lm(family)
    selection = select_parameters(lm.model, patterns)
    batch = batch_of(lm, ROWS[:1])
    awkward(lm)
    before, config = state(lm.model), lm.model.config.to_dict()
    attributes = [dict(vars(module)) for module in lm.model.modules()]
    computed = []
    last = next(m for m in lm.model.modules() if isinstance(m, torch.nn.ModuleList))[-1]
    inside = next(m for m in last.modules() if "Attention" in type(m).__name__)
    handle = inside.register_forward_hook(lambda *_: computed.append(1))

    plain = streamed(lm, batch, selection, checkpointing=False)
    n_plain = len(computed)
    found = streamed(lm, batch, selection, checkpointing=True)
    handle.remove()

    assert_same(found, plain, rtol=1e-6, atol=1e-7)
    assert min(len(gradients) for gradients in found.values()) == len(selection)
    assert n_plain == 1
    # The control: the layer is computed once more in each of the two backward passes.
    assert len(computed) == n_plain + 3
    assert_left_as_it_was(lm.model, before)
    assert lm.model.config.to_dict() == config
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    for module, held in zip(lm.model.modules(), attributes, strict=True):
        for name in names:
            assert vars(module).get(name, "none") == held.get(name, "none")


def test_a_model_without_layers_to_checkpoint_is_refused(make_lm):
    lm = make_lm("gpt2")
    block = lm.model.transformer.h
    lm.model.transformer.h = torch.nn.ModuleList(torch.nn.Identity() for _ in block)

    with (
        pytest.raises(BaseModelError, match="layers can be checkpointed"),
        gradient_stream(lm.model, select_parameters(lm.model, "*wpe*"), checkpointing=True),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_half_precision_gives_gradients_near_those_of_float32(make_lm, batch_of, family, dtype):
    lm = make_lm(family)
    lm.model.to(dtype)
    exact = copy.deepcopy(lm.model).float()  # the same rounded weights; only the arithmetic differs
    check_base_model(lm.model)
    selection = select_parameters(lm.model)
    batch = batch_of(lm, ROWS[:1])

    found = gradients(lm.model, batch, selection)
    expected = gradients(exact, batch, selection)

    # bfloat16 has 8 bits: 0.4 % per rounding, over some 20 operations in a row.
    for side in found:
        got = selection.flatten(found[side])
        want = selection.flatten(expected[side])
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all()
        error = (got - want).norm() / want.norm()
        assert error < (0.1 if dtype == torch.bfloat16 else 0.01)


def test_a_loss_that_is_not_a_number_is_an_error_that_says_what_to_do(make_lm, batch_of):
    lm = make_lm("gpt2")
    with torch.no_grad():
        lm.model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan

    with pytest.raises(
        NumericalError, match=r"finite factual loss, but got nan.*load it in float32"
    ):
        gradients(lm.model, batch_of(lm, [ROW]), select_parameters(lm.model))


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_of_embeddings_gives_its_gradient_without_dense_copies(make_lm, batch_of, tied):
    lm = make_lm("llama", tie_word_embeddings=tied)
    selection = select_parameters(lm.model, "backbone")
    batch = batch_of(lm, ROWS)
    name = next(name for name in selection.names if "embed" in name)
    table = selection.parameters(lm.model)[name]
    found = {}

    with gradient_stream(lm.model, selection) as stream:
        sparse = lm.model.get_input_embeddings().sparse
        losses = stream.losses(batch, ["factual"])
        stream.backward(losses["factual"], lambda key, value: found.update({key: value}))

    scores = target_log_probabilities(lm.model.requires_grad_(), batch)
    (expected,) = torch.autograd.grad(-scores[:, 0].mean(), table)
    assert sparse
    assert not lm.model.get_input_embeddings().sparse
    assert not found[name].is_sparse
    torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)
    rows = expected.abs().sum(1) > 0
    assert rows.all() if tied else 0 < rows.sum() < len(rows)  # the head reaches every row


def test_a_shared_table_is_held_once_and_put_back(make_lm, batch_of):
    lm = make_lm("llama", tie_word_embeddings=True)
    selection = select_parameters(lm.model, "backbone")
    batch = batch_of(lm, ROWS)
    table = lm.model.get_input_embeddings().weight

    with gradient_stream(lm.model, selection) as stream:
        head = lm.model.get_output_embeddings().weight
        assert head is not table  # two gradients, added in place
        assert head.data_ptr() == table.data_ptr()
        handed = []
        for _ in range(2):
            losses = stream.losses(batch, SIDES)
            stream.backward_each(losses, lambda side: lambda name, _: handed.append((side, name)))

    assert lm.model.get_output_embeddings().weight is table
    assert len(handed) == len(set(handed)) * 2 == 2 * len(SIDES) * len(selection.names)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_a_shared_table_is_put_back_after_an_error(make_lm, batch_of):
    lm = make_lm("llama", tie_word_embeddings=True)
    selection = select_parameters(lm.model, "backbone")
    batch = batch_of(lm, ROWS)

    def fail(name, _gradient):
        raise RuntimeError(name)

    with pytest.raises(RuntimeError), gradient_stream(lm.model, selection) as stream:
        stream.backward(stream.losses(batch, ["factual"])["factual"], fail)

    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    assert not lm.model.get_input_embeddings().sparse
