import math

import pytest
import torch
from torch import nn

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.errors import CompatibilityError, SelectionError
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import (
    ParameterSelection,
    SelectedParameter,
    select_parameters,
    selection_of,
)

# Per block, hidden size 16. BERT: 4 attention matrices 16·16+16, two of the feed-forward part
# 16·32+32 and 32·16+16, two norms. GPT-2: 16·48+48 and 16·16+16, 16·64+64 and 64·16+16, two norms.
# Llama: q and o 16·16, k and v 8·16, three of 32·16, two norms without bias.
LAYER_WEIGHTS = {
    "BertForMaskedLM": 2 * (4 * 272 + 544 + 528 + 2 * 32),
    "GPT2LMHeadModel": 2 * (816 + 272 + 1088 + 1040 + 2 * 32),
    "LlamaForCausalLM": 2 * (2 * 256 + 2 * 128 + 3 * 512 + 2 * 16),
}
LAYER_PREFIX = {
    "BertForMaskedLM": "bert.encoder.layer.",
    "GPT2LMHeadModel": "transformer.h.",
    "LlamaForCausalLM": "model.layers.",
}


def selection_of_shapes(**shapes: tuple[int, ...]) -> ParameterSelection:
    return ParameterSelection(tuple(SelectedParameter(n, s) for n, s in shapes.items()))


@pytest.fixture
def dense() -> ParameterSelection:
    return selection_of_shapes(z=(2, 3), a=(2,), m=(1, 2))


@pytest.fixture
def sparse() -> ParameterSelection:
    return ParameterSelection(
        (
            SelectedParameter("z", (2, 3), torch.tensor([1, 5], dtype=torch.int32)),
            SelectedParameter("a", (4,), torch.tensor([0, 2, 3], dtype=torch.int32)),
        )
    )


class Shapes(nn.Module):
    """A model with parameters of given shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


# ---- choosing ----------------------------------------------------------------


def test_layers_are_every_weight_of_the_blocks_and_nothing_else(tiny_model):
    kind = type(tiny_model).__name__

    selection = select_parameters(tiny_model)

    in_blocks = [n for n, _ in tiny_model.named_parameters() if n.startswith(LAYER_PREFIX[kind])]
    assert selection.names == in_blocks
    assert selection.n_selected == LAYER_WEIGHTS[kind]
    assert not selection.is_sparse


def test_layers_of_a_bare_body_are_those_of_the_model_with_a_head(tiny_model):
    prefix = f"{tiny_model.base_model_prefix}."

    with_head = select_parameters(tiny_model)
    bare = select_parameters(tiny_model.base_model)

    assert [prefix + name for name in bare.names] == with_head.names


def test_backbone_is_everything_but_an_untied_head(tiny_llama):
    selection = select_parameters(tiny_llama, "backbone")

    everything = [name for name, _ in tiny_llama.named_parameters()]
    assert [name for name in everything if name not in selection.names] == ["lm_head.weight"]


def test_backbone_takes_embeddings_that_a_head_is_tied_to_once(tiny_gpt2):
    assert tiny_gpt2.lm_head.weight is tiny_gpt2.transformer.wte.weight

    names = select_parameters(tiny_gpt2, "backbone").names

    assert names.count("transformer.wte.weight") == 1
    assert "lm_head.weight" not in names
    assert names == [name for name, _ in tiny_gpt2.named_parameters()]


def test_backbone_leaves_out_the_own_weights_of_a_masked_head(tiny_bert):
    names = select_parameters(tiny_bert, "backbone").names

    everything = [name for name, _ in tiny_bert.named_parameters()]
    assert [n for n in everything if n not in names] == [n for n in everything if "cls." in n]
    assert "bert.embeddings.word_embeddings.weight" in names


def test_patterns_choose_by_name_in_the_order_of_the_model(tiny_gpt2):
    selection = select_parameters(tiny_gpt2, ["*.1.mlp.*", "*wpe*", "*.0.ln_1.weight"])

    assert selection.names == [
        "transformer.wpe.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.1.mlp.c_fc.bias",
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.1.mlp.c_proj.bias",
    ]
    assert [e.shape for e in selection][:2] == [(64, 16), (16,)]


def test_a_pattern_that_matches_nothing_is_an_error_that_lists_near_names(tiny_gpt2):
    with pytest.raises(SelectionError, match=r"'\*\.mpl\.c_fc\.weight'.*h\.0\.mlp\.c_fc\.weight"):
        select_parameters(tiny_gpt2, "*.mpl.c_fc.weight")


def test_one_empty_pattern_among_good_ones_is_an_error(tiny_gpt2):
    select_parameters(tiny_gpt2, ["*.mlp.*"])  # the control: the good one alone

    with pytest.raises(SelectionError, match="nowhere"):
        select_parameters(tiny_gpt2, ["*.mlp.*", "*.nowhere.*"])


def test_layers_of_a_model_without_blocks_are_an_error():
    with pytest.raises(SelectionError, match="'layers'"):
        select_parameters(Shapes(weight=(2, 2)), "layers")


def test_integer_parameters_are_never_selected():
    model = Shapes(weight=(2, 2))
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)

    assert select_parameters(model, "*").names == ["weight"]


def test_blocks_inside_the_body_are_the_layers_and_lists_in_the_head_are_not(tiny_bert):
    tiny_bert.extra_heads = nn.ModuleList([nn.Linear(16, 2)])

    names = select_parameters(tiny_bert).names

    assert not any("extra_heads" in name for name in names)
    assert select_parameters(tiny_bert, "extra_heads.*").names  # the control: it has weights


# ---- flat vectors ------------------------------------------------------------


def test_flatten_lines_up_the_parameters_in_order_row_by_row(dense):
    tensors = {
        "z": torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
        "a": torch.tensor([6.0, 7.0]),
        "m": torch.tensor([[8.0, 9.0]]),
    }

    assert dense.flatten(tensors).tolist() == list(range(10))


def test_flatten_ignores_the_order_and_the_extras_of_a_dictionary(dense):
    tensors = dense.unflatten(torch.arange(10.0))
    permuted = {name: tensors[name] for name in ("m", "z", "a")}

    assert torch.equal(dense.flatten(permuted | {"b": torch.ones(5)}), torch.arange(10.0))
    # The control: another order of the selection is another vector.
    other = ParameterSelection(dense.entries[::-1])
    assert not torch.equal(other.flatten(tensors), torch.arange(10.0))


def test_sparse_flatten_and_unflatten_read_and_write_the_indices(sparse):
    tensors = {
        "z": torch.tensor([[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]]),
        "a": torch.tensor([20.0, 21.0, 22.0, 23.0]),
    }

    vector = sparse.flatten(tensors)
    full = sparse.unflatten(vector)

    assert vector.tolist() == [11.0, 15.0, 20.0, 22.0, 23.0]
    assert full["z"].tolist() == [[0.0, 11.0, 0.0], [0.0, 0.0, 15.0]]
    assert full["a"].tolist() == [20.0, 0.0, 22.0, 23.0]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_flatten_undoes_unflatten_for_every_batch_shape(kind, batch, request):
    selection = request.getfixturevalue(kind)
    vectors = torch.randn(*batch, selection.n_selected)

    tensors = selection.unflatten(vectors)

    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        entry.name: (*batch, *entry.shape) for entry in selection
    }
    assert torch.equal(selection.flatten(tensors), vectors)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_batch_unflattens_to_the_stack_of_its_single_vectors(kind, request):
    selection = request.getfixturevalue(kind)
    vectors = torch.randn(3, selection.n_selected)

    batched = selection.unflatten(vectors)

    for name in selection.names:
        singles = torch.stack([selection.unflatten(vector)[name] for vector in vectors])
        assert torch.equal(batched[name], singles)


def test_unflatten_rejects_a_vector_of_another_selection(dense):
    with pytest.raises(SelectionError, match=r"10 entries.*got 9"):
        dense.unflatten(torch.zeros(9))


def test_gather_names_a_missing_tensor(dense):
    tensors = dense.unflatten(torch.zeros(10))
    del tensors["a"]

    with pytest.raises(SelectionError, match="'a'"):
        dense.gather(tensors)


@pytest.mark.parametrize("shape", [(3, 2), (3,), (), (2, 3, 1)])
def test_gather_rejects_a_tensor_of_another_shape(dense, shape):
    tensors = dense.unflatten(torch.zeros(10))
    tensors["z"] = torch.zeros(shape)

    with pytest.raises(SelectionError, match=r"\(\*batch, 2, 3\) for 'z'"):
        dense.gather(tensors)


def test_a_dense_gather_is_a_view_and_a_sparse_one_a_copy(dense, sparse):
    tensors = {"z": torch.zeros(2, 3), "a": torch.zeros(2), "m": torch.zeros(1, 2)}
    assert dense.gather(tensors)["z"].data_ptr() == tensors["z"].data_ptr()

    tensors["a"] = torch.zeros(4)
    assert sparse.gather(tensors)["z"].data_ptr() != tensors["z"].data_ptr()


def test_gather_is_differentiable(sparse):
    tensor = torch.zeros(2, 3, requires_grad=True)

    (sparse.entries[0].gather(tensor) * torch.tensor([5.0, 7.0])).sum().backward()

    assert tensor.grad.tolist() == [[0.0, 5.0, 0.0], [0.0, 0.0, 7.0]]


def test_sizes_add_up(dense, sparse):
    assert (dense.n_selected, len(dense), dense.is_sparse) == (10, 3, False)
    assert (sparse.n_selected, len(sparse), sparse.is_sparse) == (5, 2, True)
    assert [entry.n_entries for entry in sparse] == [6, 4]
    assert [entry.values_shape for entry in dense] == [(2, 3), (2,), (1, 2)]
    assert [entry.values_shape for entry in sparse] == [(2,), (3,)]


# ---- top k -------------------------------------------------------------------


def test_top_k_keeps_the_largest_magnitudes_over_all_parameters(dense):
    scores = {
        "z": torch.tensor([[0.1, -9.0, 0.2], [0.3, 0.0, 5.0]]),
        "a": torch.tensor([0.4, 0.5]),
        "m": torch.tensor([[-7.0, 6.0]]),
    }

    kept = dense.top_k(scores, fraction=0.4)

    # The four largest are −9, −7, 6 and 5; "a" keeps none and is left out.
    assert {e.name: (e.shape, e.indices.tolist()) for e in kept} == {
        "z": ((2, 3), [1, 5]),
        "m": ((1, 2), [0, 1]),
    }
    assert all(entry.indices.dtype == torch.int32 for entry in kept)


def test_top_k_of_a_sparse_selection_gives_indices_into_the_parameter(sparse):
    scores = {"z": torch.tensor([1.0, 9.0]), "a": torch.tensor([2.0, 0.0, -8.0])}

    kept = sparse.top_k(scores, fraction=0.4)

    assert {e.name: e.indices.tolist() for e in kept} == {"z": [5], "a": [3]}


def test_top_k_equals_a_full_sort():
    selection = selection_of_shapes(x=(40, 5), y=(77,), w=(3, 4, 5))
    vector = torch.randn(selection.n_selected, generator=torch.Generator().manual_seed(0))

    kept = selection.top_k(selection.unflatten(vector), fraction=0.1)

    by_size = sorted(range(len(vector)), key=lambda position: -abs(float(vector[position])))
    expected = sorted(by_size[:34])  # 10 % of 337 weights
    marks = selection.flatten(kept.unflatten(torch.ones(34)) | {
        entry.name: torch.zeros(entry.shape) for entry in selection if entry.name not in kept.names
    })  # fmt: skip
    assert marks.nonzero().squeeze(-1).tolist() == expected


# topk itself takes arbitrary ones of equal numbers, from about 20 on.
@pytest.mark.parametrize("n", [10, 1000])
def test_ties_at_the_threshold_go_to_the_first_positions(n):
    selection = selection_of_shapes(x=(n,), y=(n, 2))
    scores = {"x": torch.ones(n), "y": torch.ones(n, 2)}
    scores["y"][-1, -1] = -2.0

    kept = selection.top_k(scores, fraction=0.5)

    assert {e.name: e.indices.tolist() for e in kept} == {
        "x": list(range(n)),
        "y": [*range(n // 2 - 1), 2 * n - 1],
    }


def test_top_k_keeps_at_least_one_weight_and_at_most_all(dense):
    scores = dense.unflatten(torch.arange(10.0))

    assert [e.indices.tolist() for e in dense.top_k(scores, fraction=1e-9)] == [[1]]
    assert dense.top_k(scores, fraction=1.0).n_selected == 10


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_top_k_refuses_a_fraction_outside_its_range(dense, fraction):
    with pytest.raises(SelectionError, match="fraction"):
        dense.top_k(dense.unflatten(torch.zeros(10)), fraction=fraction)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_top_k_refuses_scores_that_are_not_numbers(dense, bad):
    scores = dense.unflatten(torch.zeros(10))
    scores["a"][1] = bad

    with pytest.raises(SelectionError, match="finite"):
        dense.top_k(scores, fraction=0.5)


def test_top_k_refuses_full_scores_for_a_sparse_selection(sparse):
    with pytest.raises(SelectionError, match=r"shape \(2,\) for 'z', but got \(2, 3\)"):
        sparse.top_k({"z": torch.ones(2, 3), "a": torch.ones(3)}, fraction=0.5)


def test_positions_point_into_the_values_of_the_larger_selection(dense, sparse):
    small = ParameterSelection(
        (
            SelectedParameter("z", (2, 3), torch.tensor([5])),
            SelectedParameter("a", (4,), torch.tensor([0, 3])),
        )
    )

    positions = small.positions_in(sparse)

    assert {n: p.tolist() for n, p in positions.items()} == {"z": [1], "a": [0, 2]}
    in_dense = ParameterSelection(small.entries[:1]).positions_in(dense)
    assert in_dense["z"].tolist() == [5]


def test_positions_of_values_that_the_larger_selection_lacks_are_refused(dense, sparse):
    with pytest.raises(SelectionError, match="all entries of 'z'"):
        ParameterSelection(dense.entries[:1]).positions_in(sparse)
    with pytest.raises(SelectionError, match="'m'"):
        ParameterSelection(dense.entries[2:]).positions_in(sparse)


def test_gathering_at_positions_equals_gathering_from_the_whole(tiny_gpt2):
    dense = select_parameters(tiny_gpt2)
    tensors = {n: torch.randn(p.shape) for n, p in dense.parameters(tiny_gpt2).items()}
    large = dense.top_k(tensors, fraction=0.5)
    small = large.top_k(large.gather(tensors), fraction=0.2)

    values = large.gather(tensors)

    for name, at in small.positions_in(large).items():
        assert torch.equal(values[name][at], small.gather(tensors)[name])


# ---- fingerprints and configurations -----------------------------------------


def test_a_fingerprint_depends_on_names_shapes_order_and_indices(dense):
    index = torch.tensor([0, 3])
    others = [
        selection_of_shapes(z=(2, 3), a=(2,), b=(1, 2)),
        selection_of_shapes(z=(3, 2), a=(2,), m=(1, 2)),
        selection_of_shapes(a=(2,), z=(2, 3), m=(1, 2)),
        selection_of_shapes(z=(2, 3), a=(2,)),
        ParameterSelection((SelectedParameter("z", (2, 3), index), *dense.entries[1:])),
        ParameterSelection((SelectedParameter("z", (2, 3), index + 1), *dense.entries[1:])),
    ]

    fingerprints = [selection.fingerprint for selection in (dense, *others)]

    assert len(set(fingerprints)) == 7
    assert dense.fingerprint == selection_of_shapes(z=(2, 3), a=(2,), m=(1, 2)).fingerprint
    assert all(len(f) == 64 and int(f, 16) >= 0 for f in fingerprints)


def test_a_fingerprint_does_not_depend_on_how_indices_are_stored():
    first, second = (
        ParameterSelection((SelectedParameter("z", (2, 3), torch.tensor([1, 4], dtype=dtype)),))
        for dtype in (torch.int32, torch.int64)
    )

    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_model_made_from_a_selection_gives_it_back(kind, request):
    selection = request.getfixturevalue(kind)
    gradiend = GradiendModel(GradiendConfig(parameters=selection.to_config()))
    for entry in selection:
        if entry.indices is not None:
            gradiend.indices.at(entry.name).copy_(entry.indices)

    again = selection_of(gradiend)

    assert again.fingerprint == selection.fingerprint
    assert again.names == selection.names


# ---- base models -------------------------------------------------------------


def test_parameters_are_the_models_own_in_the_order_of_the_selection(tiny_model):
    selection = select_parameters(tiny_model)

    parameters = selection.parameters(tiny_model)

    own = dict(tiny_model.named_parameters())
    assert list(parameters) == selection.names
    assert all(parameters[name] is own[name] for name in selection.names)


def test_a_selection_of_a_body_fits_it_under_a_head_and_the_other_way_round(tiny_model):
    of_body = select_parameters(tiny_model.base_model)
    of_head = select_parameters(tiny_model)

    under_head = of_body.parameters(tiny_model)
    in_body = of_head.parameters(tiny_model.base_model)

    assert list(under_head) == of_body.names
    assert list(in_body) == of_head.names
    for short, long in zip(under_head.values(), in_body.values(), strict=True):
        assert short is long


def test_a_tied_weight_is_found_under_either_name(tiny_gpt2):
    shape = tuple(tiny_gpt2.lm_head.weight.shape)
    for name in ("lm_head.weight", "transformer.wte.weight"):
        selection = ParameterSelection((SelectedParameter(name, shape),))

        assert selection.parameters(tiny_gpt2)[name] is tiny_gpt2.lm_head.weight


def test_another_base_model_is_refused_by_name(tiny_gpt2, tiny_llama):
    selection = select_parameters(tiny_gpt2)

    with pytest.raises(
        CompatibilityError, match=r"LlamaForCausalLM transformer\.h\.0.*missing.*21 more"
    ):
        selection.parameters(tiny_llama)  # 2 · 12 parameters, of which three are named


def test_a_base_model_of_another_size_is_refused_by_shape():
    selection = select_parameters(Shapes(weight=(2, 3)), "*")

    assert list(selection.parameters(Shapes(weight=(2, 3)))) == ["weight"]
    with pytest.raises(CompatibilityError, match=r"weight has shape \(3, 2\) instead of \(2, 3\)"):
        selection.parameters(Shapes(weight=(3, 2)))


# ---- groups ----


def test_groups_are_the_selection_in_consecutive_parts_within_the_budget():
    sizes = [3, 4, 10, 1, 1, 1, 5]
    selection = ParameterSelection(
        tuple(SelectedParameter(f"p{k}", (size,)) for k, size in enumerate(sizes))
    )

    groups = selection.groups(lambda entry: entry.n_selected, 7)

    assert [[entry.n_selected for entry in group] for group in groups] == [
        [3, 4], [10], [1, 1, 1], [5]
    ]  # fmt: skip
    assert [name for group in groups for name in group.names] == selection.names
    free = selection.groups(lambda _: 0, 0)
    assert [group.names for group in free] == [selection.names]


def test_the_largest_are_as_many_as_asked_for_and_ties_go_to_the_first():
    selection = ParameterSelection((SelectedParameter("a", (3,)), SelectedParameter("b", (2,))))
    scores = {"a": torch.tensor([1.0, -2.0, 1.0]), "b": torch.tensor([3.0, -1.0])}

    for n_kept, expected in (
        (1, {"b": [0]}),
        (3, {"a": [0, 1], "b": [0]}),
        (4, {"a": [0, 1, 2], "b": [0]}),
        (5, {"a": [0, 1, 2], "b": [0, 1]}),
    ):
        kept = selection.largest(scores, n_kept)
        assert {entry.name: entry.indices.tolist() for entry in kept} == expected
