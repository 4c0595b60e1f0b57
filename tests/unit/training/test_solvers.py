import math
import weakref
from dataclasses import replace

import pytest
import torch

from hf_gradiend.data.collation import collate
from hf_gradiend.errors import NumericalError
from hf_gradiend.gradients.backward import gradient_stream, gradients
from hf_gradiend.metrics import pearson_correlation
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, SelectedParameter, select_parameters
from hf_gradiend.training import solvers
from hf_gradiend.training.calibration import fit_scale
from hf_gradiend.training.sharding import Share
from hf_gradiend.training.solvers import AdamWSolver, ClosedFormSolver, GradientSum
from hf_gradiend.training.texts import batch_at
from hf_gradiend.training.update import FusedAdamW

# ---- fit_scale ----


def test_the_fit_puts_the_class_means_at_plus_and_minus_85_hundredths():
    z = torch.tensor([3.0, 5.0, 4.0, -1.0, 1.0, 0.0])  # class means 4 and 0
    signs = torch.tensor([1, 1, 1, -1, -1, -1])

    scale, offset = fit_scale(z, signs)

    # artanh(0.85) = ln(37/3)/2; (4 − 0)·scale = 2·artanh(0.85) and the middle, 2, is at 0.
    assert scale == pytest.approx(math.log(37 / 3) / 4, rel=1e-12)
    assert offset == pytest.approx(-2 * math.log(37 / 3) / 4, rel=1e-12)
    assert math.tanh(scale * 4.0 + offset) == pytest.approx(0.85, abs=1e-12)
    assert math.tanh(scale * 0.0 + offset) == pytest.approx(-0.85, abs=1e-12)


@pytest.mark.parametrize(("factor", "shift"), [(1e-6, 0.0), (1e6, 3e6), (2.0, -100.0)])
def test_encodings_after_the_fit_do_not_depend_on_the_projections_unit(factor, shift):
    z = torch.tensor([3.0, 5.0, -1.0, 2.0], dtype=torch.float64)
    signs = torch.tensor([1, 1, -1, -1])

    encodings = []
    for projections in (z, factor * z + shift):
        scale, offset = fit_scale(projections, signs)
        encodings.append(torch.tanh(scale * projections + offset))

    torch.testing.assert_close(encodings[0], encodings[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "z",
    [[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], [math.nan, 1.0, 0.0, 0.0]],
    ids=["reversed", "equal", "NaN"],
)
def test_classes_that_are_not_in_order_are_an_error(z):
    with pytest.raises(NumericalError, match="class labels right"):
        fit_scale(torch.tensor(z), torch.tensor([1, 1, -1, -1]))


# ---- the closed form ----


def run(problem, solver, first: int = 0) -> list[dict[str, float]]:
    with gradient_stream(problem.base_model, problem.selection) as stream:
        return [solver.step(stream, number) for number in range(first, solver.n_steps)]


def source_gradients(problem, texts):
    return [
        gradients(problem.base_model, collate([text], problem.pad_token_id), problem.selection,
                  ("factual", "diff"))
        for text in texts
    ]  # fmt: skip


@pytest.mark.parametrize("with_neutral", [False, True], ids=["difference", "plane"])
def test_the_closed_form_is_made_of_the_class_means_of_the_texts_that_do_not_calibrate(
    planted, problem_of, with_neutral
):
    problem = problem_of(planted)
    if not with_neutral:
        problem = replace(problem, neutral=None)
    solver = ClosedFormSolver(problem)
    found = {sign: source_gradients(problem, solver.fitted.of_sign(sign)) for sign in (+1, -1)}

    run(problem, solver)
    (gradiend,) = solver.models()

    def mean(sign, side):
        means = (torch.stack([g[side][n] for g in found[sign]]).mean(0) for n in gradiend.names)
        return torch.cat([values.flatten() for values in means])

    def flat(part):
        return torch.cat([part.at(name).flatten() for name in gradiend.names])

    means = torch.stack([mean(+1, "factual"), mean(-1, "factual")], 1)
    directions = means if with_neutral else means[:, :1] - means[:, 1:]
    encoder = flat(gradiend.encoder.weight)[:, None]
    mixture = torch.linalg.lstsq(directions, encoder, driver="gelsd").solution
    assert mixture[0] > 0  # towards the + class
    close = {"rtol": 1e-3, "atol": 1e-5 * float(means.abs().max())}  # float32 in another order
    torch.testing.assert_close(encoder / mixture[0], directions @ mixture / mixture[0], **close)
    plus, minus = mean(+1, "diff"), mean(-1, "diff")
    torch.testing.assert_close(flat(gradiend.decoder.weight), (plus - minus) / 2, **close)
    torch.testing.assert_close(flat(gradiend.decoder.bias), (plus + minus) / 2, **close)


def test_the_average_text_that_calibrated_is_encoded_at_85_hundredths(planted, problem_of):
    problem = problem_of(planted)
    solver = ClosedFormSolver(problem)
    run(problem, solver)
    (gradiend,) = solver.models()

    for sign in (+1, -1):
        found = source_gradients(problem, solver.calibration.of_sign(sign))
        # tanh's argument, from each text's own gradient by a backward pass
        z = [
            sum((gradiend.encoder.weight.at(n)[0] * one["factual"][n]).sum().item() for n in
                gradiend.names) + gradiend.encoder.bias.item()
            for one in found
        ]  # fmt: skip
        assert math.tanh(sum(z) / len(z)) == pytest.approx(sign * 0.85, abs=1e-3)


def test_the_closed_form_takes_one_step_per_batch_and_every_text_once(planted_bert, problem_of):
    problem = problem_of(planted_bert, calibration_fraction=0.25)  # 48 texts a class

    solver = ClosedFormSolver(problem)

    assert solver.n_steps == 2 * 3  # 36 of each class in batches of 16
    assert len(solver.fitted.texts) + len(solver.calibration.texts) == 96
    assert not {t.index for t in solver.fitted.texts} & {t.index for t in solver.calibration.texts}


# ---- adamw ----


def test_seeds_side_by_side_equal_each_start_trained_alone_on_the_same_batches(
    planted_bert, problem_of
):
    together = AdamWSolver(problem_of(planted_bert, solver="adamw", n_seeds=2, seed=3, max_steps=5))
    run(together.problem, together)

    for k, gradiend in enumerate(together.models()):
        alone = AdamWSolver(problem_of(planted_bert, solver="adamw", seed=3 + k, max_steps=5))
        alone.problem.args.seed = 3  # the order of the texts is that of the first seed
        run(alone.problem, alone)
        for p, q in zip(gradiend.parameters(), alone.models()[0].parameters(), strict=True):
            assert torch.equal(p, q)

    first, second = together.models()
    assert not torch.equal(first.encoder.bias, second.encoder.bias)  # the control


def test_one_adamw_step_moves_along_the_gradient_of_the_models_own_loss(planted, problem_of):
    problem = problem_of(planted, solver="adamw", max_steps=1, weight_decay=0.0,
                         learning_rate=1e-3, decoder_initialization="uniform")  # fmt: skip
    solver = AdamWSolver(problem)
    before = [p.detach().clone() for p in solver.models()[0].parameters()]
    plain = GradiendModel(problem.config)
    plain.load_state_dict(solver.models()[0].state_dict())
    texts = batch_at(solver.texts, 0, 16, problem.args.seed).texts
    found = gradients(problem.base_model, collate(texts, problem.pad_token_id), problem.selection,
                      ("factual", "diff"))  # fmt: skip

    (logs,) = run(problem, solver)

    output = plain(found["factual"], found["diff"])
    output.loss.backward()
    assert logs["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    assert logs["signed_encoding"] == pytest.approx(output.encodings.item(), abs=1e-6)
    # Adam's first step is lr·g/(|g| + ε): minus the sign of the gradient, where it is not tiny.
    for p, old, q in zip(solver.models()[0].parameters(), before, plain.parameters(), strict=True):
        clear = q.grad.abs() > 1e-5
        moved = (p.detach() - old)[clear]
        expected = -1e-3 * q.grad.sign()[clear]
        torch.testing.assert_close(moved, expected, rtol=0.01, atol=1e-6)


STEPS = {"solver": "adamw", "max_steps": 3, "decoder_initialization": "uniform"}


def with_a_spare_weight(planted, *, sparse: bool = False) -> ParameterSelection:
    """All weights, some of each or every one, and one that no prediction depends on.

    The first matrix, and so its gradient, lies in memory column by column.
    """
    planted.model.spare = torch.nn.Parameter(torch.ones(3))
    chosen = select_parameters(planted.model).parameters(planted.model)
    matrix = next(parameter for parameter in chosen.values() if parameter.ndim == 2)
    matrix.data = matrix.data.t().contiguous().t()
    step = 3 if sparse else None
    entries = [
        SelectedParameter(e.name, e.shape, step and torch.arange(0, e.n_entries, step).int())
        for e in select_parameters(planted.model)
        if e.name != "spare"
    ]
    return ParameterSelection((*entries, SelectedParameter("spare", (3,))))


@pytest.mark.parametrize(
    ("settings", "sparse"),
    [({}, False), ({"n_seeds": 2}, False), ({}, True), ({"source": "diff"}, False),
     ({"source": "counterfactual", "target": "factual"}, False)],
)  # fmt: skip
def test_adamw_makes_the_steps_of_its_update_on_gradients_held_whole(
    planted, problem_of, settings, sparse
):
    selection = with_a_spare_weight(planted, sparse=sparse)
    problem = problem_of(planted, None, selection, **STEPS, **settings)
    args = problem.args
    solver, held = AdamWSolver(problem), AdamWSolver(problem)
    start = solver.models()[0].decoder.bias.at("spare").detach().clone()

    logs = run(problem, solver)

    for number in range(3):
        (part,) = problem.parts_of(batch_at(held.texts, number, 16, args.seed).texts)
        found = gradients(problem.base_model, part, selection, (args.source, args.target))
        results = [u.step(found[args.source], found[args.target]) for u in held.updates]
        losses = [value for name, value in logs[number].items() if name.startswith("loss")]
        assert losses == [loss for loss, _ in results]
    state = held.state_tensors()
    for name, tensor in solver.state_tensors().items():
        assert torch.equal(tensor, state[name]), name
    # The control: what no loss reaches was updated, too.
    assert bool((solver.models()[0].decoder.bias.at("spare") != start).all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_the_compiled_update_within_a_backward_pass_is_the_same(planted_bert, problem_of):
    plain = AdamWSolver(problem_of(planted_bert, **STEPS))
    compiled = AdamWSolver(problem_of(planted_bert, **STEPS, torch_compile=True))

    logs, expected = run(compiled.problem, compiled), run(plain.problem, plain)

    for one, other in zip(logs, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    state, differ = plain.state_tensors(), 0
    for name, tensor in compiled.state_tensors().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-3)
        differ += not torch.equal(tensor, state[name])
    assert differ > 0  # the control: it was compiled


def test_of_the_target_gradient_one_parameter_is_held_at_a_time(planted, problem_of, monkeypatch):
    problem = problem_of(planted, **STEPS)
    solver = AdamWSolver(problem)
    targets: list[weakref.ref] = []
    alive: list[int] = []
    update_decoder = FusedAdamW.update_decoder

    def watched(self, name, target):
        targets.append(weakref.ref(target))
        alive.append(sum(held() is not None for held in targets))
        update_decoder(self, name, target)

    monkeypatch.setattr(FusedAdamW, "update_decoder", watched)

    def most_alive() -> int:
        targets.clear()
        alive.clear()
        run(problem, solver, first=2)
        return max(alive)

    def n_held(side: str) -> int:
        return sum(tensor.numel() for tensor in solver.sums[side].values.values())

    assert most_alive() == 1
    assert (n_held("factual"), n_held("diff")) == (problem.selection.n_selected, 0)
    monkeypatch.setattr(solvers, "TOKENS_PER_PASS", 30)  # the control: a batch of several parts
    assert most_alive() == len(problem.selection)
    assert n_held("diff") == n_held("factual") == problem.selection.n_selected


def test_a_sum_of_gradients_has_nothing_of_the_batch_before():
    dense = SelectedParameter("dense", (1, 2))
    sparse = SelectedParameter("sparse", (3,), torch.tensor([0, 2], dtype=torch.int32))
    total = GradientSum(ParameterSelection((dense, sparse)))

    total.begin()
    total.add(0.25, "dense", torch.tensor([[4.0, 8.0]]))
    total.add(0.75, "dense", torch.tensor([[4.0, 0.0]], dtype=torch.bfloat16))
    total.add(0.75, "sparse", torch.tensor([4.0, 5.0, 8.0]))
    values = {name: tensor.tolist() for name, tensor in total.finish().items()}
    assert values == {"dense": [[4.0, 2.0]], "sparse": [3.0, 6.0]}

    total.begin()
    total.add(1.0, "sparse", torch.tensor([1.0, 2.0, 3.0]))
    values = {name: tensor.tolist() for name, tensor in total.finish().items()}
    assert values == {"dense": [[0.0, 0.0]], "sparse": [1.0, 3.0]}


@pytest.mark.parametrize(
    ("settings", "n_steps"),
    [({"max_steps": 7}, 7), ({"max_steps": -1, "num_train_epochs": 2}, 12),
     ({"max_steps": -1, "num_train_epochs": 0.5}, 3)],
)  # fmt: skip
def test_epochs_and_steps_give_the_number_of_steps(planted_bert, problem_of, settings, n_steps):
    # 96 texts in batches of 16: six steps an epoch.
    assert AdamWSolver(problem_of(planted_bert, solver="adamw", **settings)).n_steps == n_steps


def test_a_given_start_is_where_every_seed_starts(planted_bert, problem_of):
    problem = problem_of(planted_bert, solver="adamw", n_seeds=2)
    start = GradiendModel(problem.config)

    solver = AdamWSolver(problem, start)

    for gradiend in solver.models():
        assert all(map(torch.equal, gradiend.parameters(), start.parameters()))
    own = AdamWSolver(problem).models()[0]
    assert not torch.equal(own.encoder.bias, start.encoder.bias)  # the control


def test_starting_does_not_touch_the_global_generator(planted_bert, problem_of):
    problem = problem_of(planted_bert, solver="adamw")
    before = torch.random.get_rng_state()

    AdamWSolver(problem)

    assert torch.equal(torch.random.get_rng_state(), before)


class Apart(Share):
    """A process that adds nothing of the others'."""

    def sum(self, tensor):
        return tensor


def test_the_solvers_share_of_two_processes_adds_up_to_that_of_one(planted, problem_of):
    # Two ranks in one process: each adds its part of every batch, and the sums are added.
    whole = problem_of(planted)
    solver = ClosedFormSolver(whole)
    run(whole, solver)
    expected = {name: tensor.clone() for name, tensor in solver.state_tensors().items()}

    total: dict[str, torch.Tensor] = {}
    for rank in (0, 1):
        part = replace(problem_of(planted, per_device_train_batch_size=8), share=Apart(rank, 2))
        solver = ClosedFormSolver(part)
        run(part, solver)
        for name, tensor in solver.state_tensors().items():
            total[name] = total.get(name, 0) + tensor

    for name, tensor in expected.items():
        torch.testing.assert_close(total[name], tensor, rtol=1e-3, atol=1e-6)
    assert float(expected["source_plus." + whole.selection.names[0]].abs().max()) > 1e-5


@pytest.mark.parametrize("solver_class", [ClosedFormSolver, AdamWSolver])
def test_the_parts_that_a_batch_is_cut_into_make_no_difference(
    planted, problem_of, monkeypatch, solver_class
):
    adamw = {"solver": "adamw", "max_steps": 3, "n_seeds": 2}
    settings = adamw if solver_class is AdamWSolver else {}
    found, passes = [], []
    handle = planted.model.register_forward_hook(lambda *_: passes.append(1))
    for tokens in (1, 30, 10_000):  # a text at a time, two or three, all at once
        monkeypatch.setattr(solvers, "TOKENS_PER_PASS", tokens)
        problem = problem_of(planted, per_device_train_batch_size=8, **settings)
        solver = solver_class(problem)
        passes.clear()
        logs = run(problem, solver)
        found.append((len(passes), logs, dict(solver.state_tensors())))
    handle.remove()

    (most, logs, state), (some, *_), (least, last_logs, last_state) = found
    assert most > some > least  # the control: the batches were cut
    for one, other in zip(logs, last_logs, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    # Adam's first steps divide a gradient by its size: where it nearly vanishes, rounding may turn
    # its sign, and the weight is then up to two learning rates of 3e-3 per step away.
    tolerance = {"rtol": 1e-3, "atol": 1e-6 if solver_class is ClosedFormSolver else 1e-3}
    far = 0
    for name, tensor in last_state.items():
        close = torch.isclose(state[name], tensor, **tolerance)
        far += int((~close).sum())
    assert far <= 1e-3 * sum(tensor.numel() for tensor in last_state.values())


def test_a_planted_feature_is_read_from_gradients_of_names_never_trained_on(planted, problem_of):
    problem = problem_of(planted)
    solver = ClosedFormSolver(problem)
    run(problem, solver)
    (gradiend,) = solver.models()

    h = gradiend.encode_texts(
        planted.model, planted.tokenizer, planted.data["test"], progress=False
    )

    signs = [1.0 if label == "F" else -1.0 for label in planted.data["test"]["factual_class"]]
    assert planted.learned > 0.9  # the control: there is a feature to be read
    assert pearson_correlation(h[:, 0], torch.tensor(signs)) > 0.9
