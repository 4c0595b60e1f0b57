import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_gradiend.errors import BaseModelError
from hf_gradiend.gradients.backward import gradients
from hf_gradiend.parameters import ParameterSelection, SelectedParameter, select_parameters
from hf_gradiend.training import sharding
from hf_gradiend.training.sharding import (
    Share,
    _Turns,
    rows_of,
    shard_of,
    share_of,
    shared_stream,
    span_of,
)

WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3, 5])


@pytest.fixture
def selection():
    """Dense and sparse parameters; some have fewer rows than there are processes."""
    generator = torch.Generator().manual_seed(0)

    def some(n_entries, n_kept):
        return torch.randperm(n_entries, generator=generator)[:n_kept].sort().values.int()

    return ParameterSelection(
        (
            SelectedParameter("dense", (7, 3)),
            SelectedParameter("few_rows", (2, 2, 2)),
            SelectedParameter("scalar", ()),
            SelectedParameter("sparse", (8, 4), some(32, 9)),
            SelectedParameter("in_one_row", (6, 5), torch.tensor([11, 12], dtype=torch.int32)),
        )
    )


@WORLDS
def test_the_shares_put_together_give_the_whole(selection, world_size):
    whole = {e.name: torch.randn(e.shape) for e in selection}
    expected = selection.gather(whole)
    shares = [shard_of(selection, rank, world_size) for rank in range(world_size)]

    for number, entry in enumerate(selection):
        rows = torch.atleast_1d(whole[entry.name])
        parts = []
        for rank, share in enumerate(shares):
            first, last = rows_of(entry, rank, world_size)
            own = share.entries[number].gather(rows[first:last])
            span = span_of(entry, rank, world_size)
            assert torch.equal(own.flatten(), expected[entry.name].flatten()[span])
            parts.append(own.flatten())
        assert torch.equal(torch.cat(parts), expected[entry.name].flatten())
    assert sum(share.n_selected for share in shares) == selection.n_selected
    if world_size == 5:  # the control: some processes have nothing of a parameter
        assert [share.entries[1].n_selected for share in shares] == [4, 4, 0, 0, 0]


@WORLDS
def test_rows_are_cut_as_torch_chunk_cuts_them(world_size):
    for n_rows in range(1, 12):
        entry = SelectedParameter("weight", (n_rows, 2))
        chunks = [len(chunk) for chunk in torch.arange(n_rows).chunk(world_size)]

        bounds = [rows_of(entry, rank, world_size) for rank in range(world_size)]

        lengths = [last - first for first, last in bounds]
        assert lengths == chunks + [0] * (world_size - len(chunks))


def test_one_process_keeps_everything_and_sends_nothing(selection):
    share = Share()
    values = torch.ones(7, 3)

    assert share.of(selection) is selection
    assert share.whole(selection.entries[0], values) is values
    assert share.sum(values) is values
    assert share.sum_numbers({"b": 1.0, "a": 2.0}) == {"b": 1.0, "a": 2.0}
    assert share.any(here=True)
    assert not share.any(here=False)


def test_gradients_are_handed_over_in_one_order():
    taken = []
    turns = _Turns(iter("abcd"), lambda name, gradient: taken.append((name, gradient)))

    turns.put("b", 2)
    assert taken == []  # waits for "a"
    turns.put("a", 1)
    assert taken == [("a", 1), ("b", 2)]
    turns.put("d", 4)
    turns.finish()

    assert taken == [("a", 1), ("b", 2), ("c", None), ("d", 4)]  # no gradient came for "c"


def test_a_gradient_that_comes_after_its_turn_is_an_error_and_not_lost():
    turns = _Turns(iter("ab"), lambda *_: None)
    turns.put("a", None)

    with pytest.raises(BaseModelError, match="'a' came after it was taken to be zero"):
        turns.put("a", torch.ones(2))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("unused", [False, True])
def test_few_gradients_wait_also_where_the_loss_does_not_reach_the_last_parameter(
    make_lm, batch_of, monkeypatch, unused, checkpointing
):
    lm = make_lm("llama", num_hidden_layers=6)
    if unused:  # the last of all, so that all others come after it
        lm.model.model.layers[-1].post_attention_layernorm.unused = nn.Parameter(torch.ones(3, 2))
    selection = select_parameters(lm.model)
    name = "model.layers.5.post_attention_layernorm.unused"
    assert (selection.names[-1] == name) == unused
    waiting = []

    class Watched(_Turns):
        def put(self, name, gradient):
            super().put(name, gradient)
            waiting.append(len(self.waiting))

    monkeypatch.setattr(sharding, "_Turns", Watched)
    batch = batch_of(lm, [("Anna said that [TARGET] was late.", "she", "he")])
    found = {}
    share = Share(sharded=True)
    with shared_stream(lm.model, selection, share, checkpointing=checkpointing) as stream:
        stream.backward(stream.losses(batch, ["factual"])["factual"], found.__setitem__)

    per_layer = sum(name.startswith("model.layers.0.") for name in selection.names)
    assert max(waiting) <= per_layer
    assert len(found) == 6 * per_layer + unused  # the control: there were many more
    expected = gradients(lm.model, batch, selection, ["factual"])["factual"]
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert not unused or not found[name].any()


@pytest.fixture
def process_group():
    """A group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_base_model_that_is_sharded_in_part_is_refused(tiny_llama):
    selection = select_parameters(tiny_llama)
    assert not share_of(tiny_llama, selection, Share(), shard=True).sharded  # nothing to share yet
    fully_shard(tiny_llama.model.layers[0])

    with pytest.raises(BaseModelError, match=r"'model.layers.1.self_attn.q_proj.weight' is not"):
        share_of(tiny_llama, selection, Share(), shard=False)

    fully_shard(tiny_llama)
    share = share_of(tiny_llama, selection, Share(), shard=False)
    assert share.sharded
    assert share.base_is_sharded
    with pytest.raises(BaseModelError, match="over all 2 processes"):
        share_of(tiny_llama, selection, Share(0, 2), shard=False)
