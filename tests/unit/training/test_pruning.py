import dataclasses
import weakref

import pytest
import torch

from hf_gradiend.data.collation import collate
from hf_gradiend.errors import SelectionError
from hf_gradiend.gradients.backward import gradients
from hf_gradiend.parameters import ParameterSelection, select_parameters, selection_of
from hf_gradiend.training import pruning as pruning_module
from hf_gradiend.training.pruning import prune, pruned_gradiend, pruning_groups
from hf_gradiend.training.sharding import Share


@pytest.fixture
def means_by_hand():
    """Function of a problem: E[t|+] and E[t|−], one text at a time."""

    def means_by_hand(problem):
        means = {}
        for sign in (+1, -1):
            each = [
                gradients(problem.base_model, collate([text], problem.pad_token_id),
                          problem.selection, (problem.args.target,))[problem.args.target]
                for text in problem.texts.of_sign(sign)
            ]  # fmt: skip
            means[sign] = {
                name: torch.stack([one[name] for one in each]).mean(0)
                for name in problem.selection.names
            }
        return means

    return means_by_hand


def kept_by(selection: ParameterSelection) -> set[tuple[str, int]]:
    return {(entry.name, at) for entry in selection for at in entry.indices.tolist()}


def assert_same_selection(one: ParameterSelection, other: ParameterSelection) -> None:
    assert one.names == other.names
    assert one.fingerprint == other.fingerprint
    for mine, theirs in zip(one, other, strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine.indices, theirs.indices)
        assert mine.indices.dtype == torch.int32


@pytest.mark.parametrize("target", ["diff", "factual"])
def test_pruning_keeps_the_weights_that_the_classes_push_apart(
    planted, problem_of, means_by_hand, target
):
    problem = problem_of(planted, [0, 9, 18, 48, 57], target=target)
    means = means_by_hand(problem)

    kept = prune(problem, 0.05)

    apart = {name: means[+1][name] - means[-1][name] for name in problem.selection.names}
    expected = kept_by(problem.selection.top_k(apart, fraction=0.05))
    n_kept = round(0.05 * problem.selection.n_selected)
    assert kept.n_selected == len(expected) == n_kept
    # Batches add up in another order than texts alone: a few at the threshold may change places.
    assert len(kept_by(kept) & expected) > 0.99 * n_kept
    # The control: the mean over all gradients, without the class's sign, keeps others.
    alike = {name: means[+1][name] + means[-1][name] for name in problem.selection.names}
    unaligned = kept_by(problem.selection.top_k(alike, fraction=0.05))
    assert len(kept_by(kept) & unaligned) < 0.95 * n_kept


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("budget", [1, 3000, 9000])
def test_pruning_in_groups_keeps_the_same_weights(planted, problem_of, fraction, budget):
    problem = problem_of(planted, [0, 9, 18, 48, 57])
    n_groups = len(pruning_groups(problem.selection, budget))

    whole = prune(problem, fraction)
    grouped = prune(problem, fraction, accumulator_bytes=budget)

    assert n_groups > 1
    assert len(pruning_groups(problem.selection)) == 1
    assert_same_selection(grouped, whole)


def test_ties_between_groups_go_to_the_first_in_order(planted_gpt2, problem_of):
    # Weights that no prediction depends on have gradient zero: all of them tie.
    planted_gpt2.model.unused = torch.nn.ParameterList([torch.ones(10) for _ in range(4)])
    patterns = ["*mlp.c_proj.bias", "unused*"]
    selection = select_parameters(planted_gpt2.model, patterns)
    problem = problem_of(planted_gpt2, [0, 48], selection)
    n_used = sum(e.n_selected for e in selection if "unused" not in e.name)
    fraction = (n_used + 25) / selection.n_selected

    whole = prune(problem, fraction)
    grouped = prune(problem, fraction, accumulator_bytes=1)

    assert_same_selection(grouped, whole)
    tied = [entry.n_selected for entry in grouped if "unused" in entry.name]
    assert tied == [10, 10, 5]
    unused = problem_of(planted_gpt2, [0, 48], select_parameters(planted_gpt2.model, "unused*"))
    with pytest.raises(SelectionError, match="predictions depend on"):
        prune(unused, 0.5, accumulator_bytes=1)


def test_pruning_holds_the_sums_of_one_group_at_a_time(planted_gpt2, problem_of, monkeypatch):
    problem = problem_of(planted_gpt2, [0, 48])
    budget = 6000
    live, largest = weakref.WeakSet(), 0
    zeros = torch.zeros

    def counted(*args, **kwargs):
        nonlocal largest
        made = zeros(*args, **kwargs)
        if made.is_floating_point():
            live.add(made)
            largest = max(largest, sum(tensor.nbytes for tensor in live))
        return made

    monkeypatch.setattr(pruning_module.torch, "zeros", counted)

    prune(problem, 0.01, accumulator_bytes=budget)

    single = 4 * max(entry.n_selected for entry in problem.selection)
    assert single < largest <= 2 * budget  # the next group's are made before the last one's go
    assert 4 * problem.selection.n_selected > 3 * budget  # the control: all at once are more


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_fraction_out_of_range_is_an_error(planted_gpt2, problem_of, fraction):
    with pytest.raises(SelectionError, match=r"\(0, 1\]"):
        prune(problem_of(planted_gpt2, [0, 48]), fraction)


def test_processes_add_up_their_sums_before_they_choose(planted_gpt2, problem_of):
    """Two processes with half of each batch, their sums added: the choice of one process."""
    whole = problem_of(planted_gpt2, [0, 9, 18, 48, 57, 66])
    sums: list[list[torch.Tensor]] = []

    def of_rank(rank, add):
        share = Share(rank, 2)
        object.__setattr__(share, "sum", add)
        return dataclasses.replace(whole, share=share)

    def note(tensor):
        sums.append(tensor.clone())
        return tensor

    def add_other(tensor):
        return tensor.add_(sums.pop(0))

    alone = prune(of_rank(1, note), 0.05, accumulator_bytes=9000)
    together = prune(of_rank(0, add_other), 0.05, accumulator_bytes=9000)

    assert sums == []
    expected = prune(whole, 0.05)
    same = len(kept_by(together) & kept_by(expected)) / expected.n_selected
    assert same > 0.99
    assert kept_by(alone) != kept_by(together)  # the control: half of the texts choose others


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
