"""The estimate counts what a training does, and measures it without doing it."""

import copy
import math

import pytest
import torch
from transformers import TrainerCallback

from hf_gradiend.gradients.backward import GradientStream, gradient_stream
from hf_gradiend.training import estimate as estimate_module
from hf_gradiend.training import solvers
from hf_gradiend.training.estimate import (
    Phase,
    TrainingEstimate,
    _evenly_kept,
    _Held,
    _Memory,
    estimate_training,
)
from hf_gradiend.training.solvers import AdamWSolver, ClosedFormSolver
from hf_gradiend.training.trainer import GradiendTrainer

MIB = 2**20
SETTINGS = [
    {"solver": "closed_form"},
    {"solver": "closed_form", "max_train_texts": 40, "save_steps": 1, "eval_strategy": "no",
     "load_best_model_at_end": False},
    {"solver": "adamw", "max_steps": 7, "eval_steps": 3, "save_steps": 3},
    {"solver": "adamw", "max_steps": 5, "n_seeds": 2},
    {"solver": "adamw", "max_steps": 5, "warm_start": True, "prune_texts": 20},
    {"solver": "adamw", "max_steps": -1, "num_train_epochs": 0.01},
    {"solver": "adamw", "max_steps": 2, "evaluate": False, "max_eval_texts": 40,
     "eval_strategy": "no", "load_best_model_at_end": False},
    {"solver": "adamw", "max_steps": 4, "prune_fraction": 0.1, "prune_texts": 20,
     "save_strategy": "no", "load_best_model_at_end": False},
]  # fmt: skip


class Counter(TrainerCallback):
    """How often a trainer evaluates and saves."""

    def __init__(self):
        self.evaluations = self.checkpoints = 0

    def on_evaluate(self, *_, **__):
        self.evaluations += 1

    def on_save(self, *_, **__):
        self.checkpoints += 1


@pytest.fixture
def trainer_of(planted_gpt2, arguments):
    """Function of settings that makes a trainer."""

    def trainer_of(callbacks=(), *, evaluate=True, **settings):
        data = planted_gpt2.data
        return GradiendTrainer(
            planted_gpt2.model, planted_gpt2.tokenizer, arguments(**settings), data["train"],
            data["validation"] if evaluate else None, callbacks,
        )  # fmt: skip

    return trainer_of


def seconds_of(found):
    return {phase.name: phase.seconds for phase in found.phases}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['solver']}-{len(s)}")
def test_the_passes_of_an_estimate_are_those_of_the_training(trainer_of, monkeypatch, settings):
    # Every measured run is said to take a second, so that a phase's seconds are its passes.
    def run_and_count(work):
        work()
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(estimate_module, "_seconds", run_and_count)
        patch.setattr(estimate_module._Probe, "_seconds_of_choice", lambda _: 0.0)
        patch.setattr(estimate_module._Probe, "_seconds_of_update", lambda _: 0.0)
        patch.setattr(estimate_module, "_bytes_written_a_second", lambda: math.inf)
        estimated = seconds_of(estimate_training(trainer_of(**settings)))

    passes = {"gradients": 0, "readings": 0}
    counter = Counter()
    losses, derivatives = GradientStream.losses, estimate_module.directional_derivatives

    def counted_losses(self, *args):
        passes["gradients"] += 1
        return losses(self, *args)

    def counted_derivatives(*args):
        passes["readings"] += 1
        return derivatives(*args)

    monkeypatch.setattr(GradientStream, "losses", counted_losses)
    monkeypatch.setattr(
        "hf_gradiend.gradients.forward.directional_derivatives", counted_derivatives
    )
    trainer_of([counter], **settings).train()

    of_gradients = {"pruning", "steps"} & estimated.keys()
    warm_start = estimated.get("warm start", 0)
    steps = sum(estimated[name] for name in of_gradients)
    assert steps + estimated["reading"] + warm_start == sum(passes.values())
    if not warm_start:
        assert steps == passes["gradients"]
    assert estimated["saving"] == 0
    assert passes["gradients"] > 0
    assert passes["readings"] > 1


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['solver']}-{len(s)}")
def test_the_checkpoints_of_an_estimate_are_those_of_the_training(trainer_of, settings):
    counter = Counter()
    trainer = trainer_of([counter], **settings)
    probe = estimate_module._Probe(trainer)
    n_steps, _ = probe._steps()

    trainer.train()

    assert trainer.state.global_step == n_steps
    assert probe._n_checkpoints(n_steps) == counter.checkpoints
    if settings["solver"] == "adamw" and trainer.eval_texts:
        n_seeds = settings.get("n_seeds", 1)
        assert probe._n_evaluations(n_steps) == n_seeds * (counter.evaluations + 1)


@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("sides", [{}, {"source": "diff"}], ids=["two sides", "one side"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_what_an_adamw_training_holds_is_the_size_of_its_tensors(
    planted_gpt2, problem_of, monkeypatch, n_seeds, pruned, sides, in_parts
):
    monkeypatch.setattr(solvers, "TOKENS_PER_PASS", 30 if in_parts else 10_000)
    settings = {"solver": "adamw", "n_seeds": n_seeds, **sides}
    problem = problem_of(planted_gpt2, **settings)
    selection = _evenly_kept(problem.selection, 0.1) if pruned else problem.selection
    problem = problem_of(planted_gpt2, None, selection, **settings)
    solver = AdamWSolver(problem)
    with gradient_stream(problem.base_model, selection) as stream:
        solver.step(stream, 0)

    held = _Held(selection.n_selected, problem.args, sparse=pruned, in_parts=in_parts)

    state = sum(t.nbytes for t in solver.state_tensors().values())
    values = sum(t.nbytes for side in solver.sums.values() for t in side.values.values())
    indices = 4 * selection.n_selected * (1 + n_seeds) if pruned else 0
    few = 100 * n_seeds  # biases and counts
    assert held.steps == pytest.approx(state + values + indices, abs=few)
    assert held.checkpoint == pytest.approx(state, abs=few)
    of_model = sum(t.nbytes for t in solver.models()[0].state_dict().values())
    assert held.gradiend == pytest.approx(of_model, abs=few)
    # The control.
    assert values == (2 if in_parts and not sides else 1) * 4 * selection.n_selected > 0


def test_an_estimate_sees_whether_batches_have_several_parts(trainer_of, monkeypatch):
    held = []
    for tokens in (10_000, 30):
        monkeypatch.setattr(estimate_module, "TOKENS_PER_PASS", tokens)
        found = estimate_training(trainer_of(solver="adamw", max_steps=5))
        held.append({phase.name: phase.held_bytes for phase in found.phases}["steps"])

    assert held[1] - held[0] == 4 * found.n_selected


def test_what_a_closed_form_holds_is_the_size_of_its_sums(planted_gpt2, problem_of):
    problem = problem_of(planted_gpt2)

    held = _Held(problem.selection.n_selected, problem.args, sparse=False)

    solver = ClosedFormSolver(problem)
    assert held.sums == sum(t.nbytes for t in solver.state_tensors().values()) == held.steps


def test_sums_on_a_gpu_are_not_in_main_memory(arguments):
    args = arguments(accumulator_device="base_model", accumulator_dtype="bfloat16")

    on_gpu = _Held(1000, args, sparse=False, on_accelerator=True)
    on_cpu = _Held(1000, args, sparse=False)

    assert (on_gpu.beside, on_gpu.steps) == (4 * 2 * 1000, 3 * 4 * 1000)
    assert (on_cpu.beside, on_cpu.steps) == (0, 3 * 4 * 1000)  # the GRADIEND is the larger


def test_memory_that_is_taken_and_given_back_meanwhile_is_seen():
    memory = _Memory(torch.device("cpu"))
    before = memory.in_use()

    most = memory.most(lambda: [torch.ones(50 * MIB).sum() for _ in range(3)])
    nothing = memory.most(lambda: None)

    assert 190 * MIB < most - before < 260 * MIB  # each of 200 MiB, one at a time
    assert nothing - before < 50 * MIB


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['solver']}-{len(s)}")
def test_an_estimate_changes_nothing_and_leaves_no_file(trainer_of, settings, tmp_path):
    trainer = trainer_of(**settings)
    weights = copy.deepcopy(trainer.base_model.state_dict())
    selection = trainer.selection.fingerprint

    found = estimate_training(trainer, [trainer.train_texts.take(range(9)).prepared()])

    after = trainer.base_model.state_dict()
    assert all(torch.equal(weights[name], held) for name, held in after.items())
    assert trainer.selection.fingerprint == selection
    assert list(tmp_path.iterdir()) == []
    n = trainer.selection.n_selected
    assert found.n_selected == pytest.approx(n * settings.get("prune_fraction", 1.0), abs=15)
    assert found.seconds > 0
    assert found.peak_bytes > found.base_model_bytes + found.program_bytes > 0
    assert found.accelerator_peak_bytes == 0
    assert [phase.name for phase in found.phases][-4:] == ["steps", "reading", "saving", "report"]
    names = {phase.name for phase in found.phases}
    assert ("pruning" in names) == ("prune_fraction" in settings)
    assert ("warm start" in names) == ("warm_start" in settings)


def test_on_an_accelerator_base_model_and_passes_are_counted_there():
    phases = (Phase("steps", 1.0, 700, 30), Phase("reading", 1.0, 600, 50))

    found = TrainingEstimate(9, 1000, 200, phases, on_accelerator=True)

    assert (found.peak_bytes, found.accelerator_peak_bytes) == (900, 1050)
    assert TrainingEstimate(9, 1000, 200, phases).peak_bytes == 1930  # the control: all in one
