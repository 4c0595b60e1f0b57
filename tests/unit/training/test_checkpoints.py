import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from hf_gradiend.errors import ConfigError
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.training.checkpoints import (
    STATE,
    RunState,
    checkpoints_in,
    load_solver,
    remove_leftovers,
    rotate,
    save_checkpoint,
    save_shared,
    weights_digest,
)
from hf_gradiend.training.sharding import Share
from hf_gradiend.training.solvers import random_start


def solver_of(value: float, *, same_everywhere: bool = True):
    """A solver whose state is one number."""
    state = {"number": torch.tensor([value])}
    return SimpleNamespace(same_everywhere=same_everywhere, state_tensors=lambda: state)


def saved(folder: Path, step: int, value: float, **settings) -> Path:
    path = folder / f"checkpoint-{step}"
    save_checkpoint(path, solver_of(value, **settings), RunState(global_step=step), "run", Share())
    return path


def value_in(path: Path) -> float:
    solver = solver_of(0.0)
    load_solver(path, solver, Share(), "run")
    return float(solver.state_tensors()["number"])


# ---- checkpoints ----


def test_a_checkpoint_takes_the_place_of_one_with_its_name(tmp_path):
    first, again = saved(tmp_path, 5, 1.0), saved(tmp_path, 5, 2.0)

    assert first == again
    assert value_in(again) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    whole = saved(tmp_path, 5, 1.0)
    for name in (".checkpoint-6", ".partial-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")

    remove_leftovers(tmp_path)

    assert list(tmp_path.iterdir()) == [whole]


@pytest.mark.parametrize("is_new_in_place", [True, False])
def test_a_replacement_that_was_killed_half_way_leaves_one_checkpoint(tmp_path, is_new_in_place):
    old = saved(tmp_path, 5, 1.0)
    old.replace(tmp_path / "checkpoint-5-replaced")
    if is_new_in_place:
        saved(tmp_path, 5, 2.0)
    assert checkpoints_in(tmp_path)  # the control: there is one to go on from at that moment, too

    remove_leftovers(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert value_in(old) == (2.0 if is_new_in_place else 1.0)


def test_the_best_and_the_last_are_kept(tmp_path):
    for step in range(1, 6):
        saved(tmp_path, step, float(step))

    rotate(tmp_path, 2, str(tmp_path / "checkpoint-1"))

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1", "checkpoint-4", "checkpoint-5"
    ]  # fmt: skip
    assert [path.name[-1] for path in checkpoints_in(tmp_path)] == ["1", "4", "5"]


def test_checkpoints_of_one_moment_are_in_the_order_of_their_steps(tmp_path):
    moment = 10**18
    for step in (100, 9, 30, 10, 11, 8, 2):
        os.utime(saved(tmp_path, step, 1.0) / STATE, ns=(moment, moment))
    os.utime(saved(tmp_path, 5, 1.0) / STATE, ns=(moment + 1, moment + 1))
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "checkpoint-of-mine")

    found = [path.name.removeprefix("checkpoint-") for path in checkpoints_in(tmp_path)]

    # Step 5 was done later than 100, by another run; a folder of another name is not one.
    assert found == ["2", "8", "9", "10", "11", "30", "100", "5"]


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    path = saved(tmp_path, 1, 1.0, same_everywhere=False)

    load_solver(path, solver_of(0.0, same_everywhere=False), Share(), "run")  # the control
    for share, run in ((Share(0, 2), "run"), (Share(), "another")):
        with pytest.raises(ConfigError, match="made with other arguments, data or weights"):
            load_solver(path, solver_of(0.0, same_everywhere=False), share, run)


# ---- weights ----


def test_the_digest_of_weights_sees_one_bit_and_not_how_they_are_kept(tiny_llama, tmp_path):
    before = weights_digest(tiny_llama, Share())
    weight = tiny_llama.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        held = float(weight[3, 4])
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
        changed = weights_digest(tiny_llama, Share())
        weight[3, 4] = held

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(tiny_llama)
        sharded = weights_digest(tiny_llama, Share(base_is_sharded=True))
    finally:
        torch.distributed.destroy_process_group()

    assert changed != before
    assert sharded == before


# ---- a sharded GRADIEND ----


@pytest.mark.parametrize("sparse", [False, True])
def test_a_sharded_gradiend_is_written_as_save_pretrained_writes_it(
    planted_bert, problem_of, tmp_path, sparse
):
    settings = {"solver": "adamw", "decoder_initialization": "uniform"}
    problem = problem_of(planted_bert, **settings)
    if sparse:
        scores = {e.name: torch.rand(e.values_shape) for e in problem.selection}
        kept = problem.selection.top_k(scores, fraction=0.3)
        problem = problem_of(planted_bert, selection=kept, **settings)
    gradiend = random_start(problem, seed=1)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()

    save_shared(gradiend, problem, ours, max_file_bytes=8_000)
    gradiend.save_pretrained(theirs, max_shard_size=8_000)

    files = [{path.name for path in folder.iterdir()} for folder in (ours, theirs)]
    assert len(files[0]) > 4
    assert "model.safetensors.index.json" in files[0] & files[1]
    assert json.loads((ours / "config.json").read_text("utf-8")) == json.loads(
        (theirs / "config.json").read_text("utf-8")
    )
    loaded = GradiendModel.from_pretrained(ours).state_dict()
    expected = gradiend.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert float(expected["encoder.bias"]) != 0.0  # the control: they are not all zeros


def test_the_digest_of_weights_holds_sums_beyond_64_bits():
    weights = torch.rand(2**21 + 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = torch.nn.ParameterList([weights])
    other = torch.nn.ParameterList([weights.clone()])
    assert int(weights.view(torch.int64).double().sum()) > 2**63  # the control

    assert weights_digest(model, Share()) == weights_digest(other, Share())
    with torch.no_grad():
        other[0][5] += 1e-12
    assert weights_digest(model, Share()) != weights_digest(other, Share())
