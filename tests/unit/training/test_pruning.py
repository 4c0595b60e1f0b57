import pytest
import torch

from hf_gradiend.data.collation import collate
from hf_gradiend.errors import SelectionError
from hf_gradiend.gradients.backward import gradients
from hf_gradiend.parameters import ParameterSelection, SelectedParameter, selection_of
from hf_gradiend.training.means import ClassMeans
from hf_gradiend.training.pruning import aligned_means, prune, pruned_gradiend

SELECTION = ParameterSelection(
    (SelectedParameter("a.weight", (8, 5)), SelectedParameter("b.bias", (10,)))
)
# Weights that the two classes push in opposite directions, and those that both push alike.
PLANTED = {"a.weight": [3, 17, 39], "b.bias": [0, 9]}
SHARED = {"a.weight": [5, 18], "b.bias": [1, 2, 3]}


def planted_means() -> ClassMeans:
    means = ClassMeans(SELECTION, source="factual", target="diff", class_sizes={1: 1, -1: 1})
    generator = torch.Generator().manual_seed(0)
    for name in SELECTION.names:
        for sign, held in ((sign, means.target_means[sign][name]) for sign in (+1, -1)):
            held.copy_(0.1 * torch.rand(held.shape, generator=generator))
            held.view(-1)[PLANTED[name]] += sign * 1.0
            held.view(-1)[SHARED[name]] += 5.0
    return means


def kept_by(selection: ParameterSelection) -> dict[str, list[int]]:
    return {entry.name: entry.indices.tolist() for entry in selection}


def test_pruning_keeps_the_weights_that_the_classes_push_apart():
    means = planted_means()

    kept = prune(SELECTION, means, fraction=0.1)

    assert kept_by(kept) == PLANTED
    # The control: the mean over all gradients, without the class's sign, keeps the others.
    means = planted_means().target_means
    unaligned = {name: (means[+1][name] + means[-1][name]) / 2 for name in SELECTION.names}
    assert kept_by(SELECTION.top_k(unaligned, fraction=0.1)) == SHARED


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(SelectionError, match=r"\(0, 1\]"):
        prune(SELECTION, planted_means(), fraction)


def test_aligned_means_are_those_of_every_text_of_a_problem(planted, problem_of):
    problem = problem_of(planted, [0, 9, 18, 48, 57])

    means = aligned_means(problem)

    for sign in (+1, -1):
        each = [
            gradients(problem.base_model, collate([text], problem.pad_token_id), problem.selection,
                      ("diff",))["diff"]
            for text in problem.texts.of_sign(sign)
        ]  # fmt: skip
        for name in problem.selection.names:
            expected = torch.stack([one[name] for one in each]).mean(0)
            torch.testing.assert_close(
                means.target_means[sign][name], expected, rtol=1e-3, atol=1e-6
            )


# ---- after training ----


def assert_is_the_part_of(smaller, larger, selection):
    for entry in selection:
        at = entry.indices.long()
        name = entry.name
        for part in ("encoder", "decoder"):
            own = getattr(smaller, part).weight.at(name)
            full = scattered(larger, getattr(larger, part).weight.at(name), name)
            assert torch.equal(own, full[:, at])
        bias = scattered(larger, larger.decoder.bias.at(name)[None], name)[0]
        assert torch.equal(smaller.decoder.bias.at(name), bias[at])
    assert torch.equal(smaller.encoder.bias, larger.encoder.bias)


def scattered(gradiend, values, name):
    """Values over all entries of a parameter, NaN where the GRADIEND has none, (features, n)."""
    entry = next(entry for entry in selection_of(gradiend) if entry.name == name)
    full = torch.full((values.shape[0], entry.n_entries), torch.nan)
    index = torch.arange(entry.n_entries) if entry.indices is None else entry.indices.long()
    full[:, index] = values.detach().flatten(1)
    return full


@pytest.mark.parametrize("every", [None, 3], ids=["dense", "sparse"])
@pytest.mark.parametrize("n_features", [1, 2])
def test_a_pruned_gradiend_equals_the_larger_one_on_the_weights_it_keeps(
    tiny_model, gradiend_for, every, n_features
):
    gradiend = gradiend_for(tiny_model, every=every, n_features=n_features)

    smaller = pruned_gradiend(gradiend, 0.25)

    selection = selection_of(smaller)
    n_kept = round(0.25 * gradiend.config.n_selected)
    assert smaller.config.n_selected == selection.n_selected == n_kept
    assert smaller.config.selection_fingerprint == selection.fingerprint
    assert_is_the_part_of(smaller, gradiend, selection)


@pytest.mark.parametrize("every", [None, 3], ids=["dense", "sparse"])
def test_a_pruned_gradiend_keeps_the_largest_decoder_weights(tiny_bert, gradiend_for, every):
    gradiend = gradiend_for(tiny_bert, every=every)
    size = gradiend.config.n_selected // 50
    names = gradiend.names
    with torch.no_grad():
        flat = [gradiend.decoder.weight.at(name).view(-1) for name in names]
        total = torch.zeros(gradiend.config.n_selected)
        chosen = torch.randperm(len(total), generator=torch.Generator().manual_seed(0))[:size]
        total[chosen] = -7.0  # by size, whatever the sign
        for held, values in zip(flat, total.split([t.numel() for t in flat]), strict=True):
            held.copy_(values)

    smaller = pruned_gradiend(gradiend, size / gradiend.config.n_selected)

    values = torch.cat([smaller.decoder.weight.at(name).view(-1) for name in smaller.names])
    assert torch.equal(values, torch.full((size,), -7.0))


def test_a_pruned_gradiend_reads_and_writes_as_the_dense_one_on_its_weights(
    tiny_bert, gradiend_for
):
    gradiend = gradiend_for(tiny_bert)
    with torch.no_grad():
        gradiend.encoder.bias.fill_(0.1)
    smaller = pruned_gradiend(gradiend, 0.1)
    mask = {e.name: e.scatter(torch.ones(e.values_shape)) for e in selection_of(smaller)}
    generator = torch.Generator().manual_seed(0)
    x = {
        e.name: torch.randn(e.shape, generator=generator) * 1e-3
        * mask.get(e.name, torch.zeros(e.shape))
        for e in selection_of(gradiend)
    }  # fmt: skip

    # Gradients that vanish outside the kept weights read the same, up to float32's rounding.
    torch.testing.assert_close(smaller.encode(x), gradiend.encode(x), rtol=0, atol=1e-5)
    for name, update in smaller.decode(0.5).items():
        assert torch.equal(update, gradiend.decode(0.5)[name] * mask[name])
    assert abs(smaller.encode(x).item() - 0.0997) > 1e-3  # the control: not tanh(b_e) alone


def test_pruning_leaves_the_larger_gradiend_as_it_was(tiny_bert, gradiend_for):
    gradiend = gradiend_for(tiny_bert)
    before = {name: t.clone() for name, t in gradiend.state_dict().items()}

    smaller = pruned_gradiend(gradiend, 0.5)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()

    assert all(torch.equal(t, before[name]) for name, t in gradiend.state_dict().items())
