import pytest
import torch

from hf_gradiend.data.collation import collate
from hf_gradiend.errors import NumericalError
from hf_gradiend.gradients.backward import gradient_stream, gradients
from hf_gradiend.parameters import ParameterSelection, SelectedParameter, select_parameters
from hf_gradiend.training.means import ClassMeans

# Three texts of one class and five of the other, so that a mean over all texts is another number.
ROWS = {+1: [0, 9, 18], -1: [48, 57, 66, 75, 84]}
SIDES = ("factual", "counterfactual", "diff")


@pytest.fixture
def problem(planted, problem_of):
    return problem_of(planted, ROWS[+1] + ROWS[-1])


def single_gradients(problem, side: str) -> dict[int, dict[str, torch.Tensor]]:
    """Gradients of one side of each text on its own, stacked for each class."""
    found = {}
    for sign in ROWS:
        batches = [collate([text], problem.pad_token_id) for text in problem.texts.of_sign(sign)]
        each = [gradients(problem.base_model, b, problem.selection, (side,))[side] for b in batches]
        found[sign] = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    return found


def class_means(
    problem, source: str, target: str, *, size: int = 2, selection=None, dtype=torch.float32
) -> ClassMeans:
    means = ClassMeans(
        selection or problem.selection,
        source=source,
        target=target,
        class_sizes={sign: len(rows) for sign, rows in ROWS.items()},
        dtype=dtype,
    )
    with gradient_stream(problem.base_model, problem.selection) as stream:
        for sign in ROWS:
            texts = problem.texts.of_sign(sign)
            for start in range(0, len(texts), size):
                means.add(stream, collate(texts[start : start + size], problem.pad_token_id), sign)
    return means


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    largest = max(float(t.abs().max()) for t in expected.values())
    assert largest > 1e-3  # the control: there are gradients
    for name, tensor in expected.items():
        # Sums of float32 numbers in another order, over a few thousand terms of each gradient.
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("source", SIDES)
@pytest.mark.parametrize("target", SIDES)
def test_class_means_are_the_means_of_the_single_gradients(problem, source, target):
    means = class_means(problem, source, target)

    x, t = single_gradients(problem, source), single_gradients(problem, target)
    for sign in ROWS:
        assert_same(means.source_means[sign], {name: g.mean(0) for name, g in x[sign].items()})
        assert_same(means.target_means[sign], {name: g.mean(0) for name, g in t[sign].items()})


def test_the_size_of_the_batches_makes_no_difference(problem):
    one_by_one = class_means(problem, "factual", "diff", size=1)
    at_once = class_means(problem, "factual", "diff", size=5)

    assert_same(one_by_one.source_means[+1], at_once.source_means[+1])
    assert_same(one_by_one.target_means[-1], at_once.target_means[-1])


def test_a_sparse_selection_holds_its_entries_of_the_dense_means(problem):
    dense = class_means(problem, "factual", "diff")
    scores = {e.name: torch.rand(e.shape) for e in problem.selection}
    sparse_selection = problem.selection.top_k(scores, fraction=0.1)

    sparse = class_means(problem, "factual", "diff", selection=sparse_selection)

    gathered = sparse_selection.gather(dense.source_means[+1])
    found = sparse.source_means[+1]
    assert_same(found, gathered)
    assert sum(t.numel() for t in found.values()) == sparse_selection.n_selected


def test_a_direction_mixes_the_source_means(problem):
    means = class_means(problem, "factual", "diff")
    plus, minus = ({n: t.clone() for n, t in means.source_means[s].items()} for s in (+1, -1))

    direction = means.to_direction((3.0, -0.5))

    assert_same(direction, {name: 3.0 * plus[name] - 0.5 * minus[name] for name in plus})


def test_weights_that_no_loss_reaches_have_zero_means(planted, problem_of):
    planted.model.unused = torch.nn.Linear(2, 2)
    selection = select_parameters(planted.model, ["layers", "unused.*"])
    problem = problem_of(planted, ROWS[+1] + ROWS[-1], selection)

    means = class_means(problem, "factual", "diff")

    plus = means.source_means[+1]
    assert float(plus["unused.weight"].abs().max()) == 0.0
    assert max(float(t.abs().max()) for t in plus.values()) > 1e-3


@pytest.mark.parametrize("target", ["diff", "factual"])
def test_the_closed_form_minimises_the_loss_at_plus_and_minus_one(problem, target):
    t = single_gradients(problem, target)
    weight, bias = class_means(problem, "factual", target).to_decoder()

    def loss(weight, bias):
        """Mean squared error over both classes, each text's encoding at its class's ±1."""
        return sum(
            float((sign * weight[name] + bias[name] - t[sign][name]).double().square().sum())
            for sign in ROWS
            for name in weight
        )

    least = loss(weight, bias)
    generator = torch.Generator().manual_seed(0)
    scale = max(float(tensor.abs().max()) for tensor in weight.values())
    for _ in range(5):
        noise = {n: scale * torch.randn(w.shape, generator=generator) for n, w in weight.items()}
        for step in (-0.1, 0.1):
            moved = {name: weight[name] + step * noise[name] for name in weight}
            shifted = {name: bias[name] + step * noise[name] for name in bias}
            assert loss(moved, bias) > least
            assert loss(weight, shifted) > least
    # A quadratic's gradient at its least is zero: central differences along every axis vanish.
    name = next(iter(weight))
    for held in (weight[name], bias[name]):
        old = held.view(-1)[3].clone()
        either = []
        for step in (-0.01, 0.01):
            held.view(-1)[3] = old + step
            either.append(loss(weight, bias))
        held.view(-1)[3] = old
        n_texts = sum(len(rows) for rows in ROWS.values())
        assert either == pytest.approx([least + n_texts * 1e-4] * 2, abs=1e-2 * 1e-4 * n_texts)


def test_adding_returns_the_mean_losses_of_the_batch(problem):
    means = ClassMeans(
        problem.selection, source="factual", target="diff", class_sizes={1: 3, -1: 5}
    )
    texts = problem.texts.of_sign(+1)

    with gradient_stream(problem.base_model, problem.selection) as stream:
        losses = means.add(stream, collate(texts, problem.pad_token_id), +1)
        alone = [
            stream.losses(collate([text], problem.pad_token_id), ("factual", "diff"))
            for text in texts
        ]

    for side in ("factual", "diff"):
        expected = sum(one[side].item() for one in alone) / 3
        assert losses[f"{side}_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_a_number_is_an_error(problem):
    with torch.no_grad():
        problem.base_model.get_input_embeddings().weight.fill_(torch.nan)

    with pytest.raises(NumericalError, match="finite factual loss"):
        class_means(problem, "factual", "diff")


def relative_error(found, expected) -> float:
    gap = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in expected)
    return (gap / sum(float(t.double().square().sum()) for t in expected.values())) ** 0.5


def test_sums_in_bfloat16_take_half_the_memory_and_err_by_a_percent(problem):
    exact = class_means(problem, "factual", "diff", size=1)
    rounded = class_means(problem, "factual", "diff", size=1, dtype=torch.bfloat16)

    sizes = [sum(t.nbytes for t in m.state_tensors().values()) for m in (exact, rounded)]
    assert sizes[0] == 2 * sizes[1]
    # bfloat16 has 8 bits: up to 2⁻⁹ = 0.2 % an addition, five of them; differences of means more.
    for sign in ROWS:
        error = relative_error(rounded.source_means[sign], exact.source_means[sign])
        assert 5e-4 < error < 5e-3
    direction, of_rounded = (m.to_direction((1.0, -1.0)) for m in (exact, rounded))
    decoder, decoder_of_rounded = (m.to_decoder() for m in (exact, rounded))
    for found, expected in zip(
        (of_rounded, *decoder_of_rounded), (direction, *decoder), strict=True
    ):
        assert relative_error(found, expected) < 0.02
        assert {(t.dtype, str(t.device)) for t in found.values()} == {(torch.float32, "cpu")}


@pytest.mark.parametrize(("n_passes", "largest"), [(100, 0.05), (2000, 1.0)])
def test_bfloat16_loses_what_many_passes_add(n_passes, largest):
    """What the argument's documentation warns of: beyond a few hundred passes nothing is added."""
    selection = ParameterSelection((SelectedParameter("w", (1000,)),))
    share = 1 / n_passes
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(n_passes, 1000, generator=generator) * 0.3 + 1.0
    sums = {}
    for dtype in (torch.float32, torch.bfloat16):
        means = ClassMeans(
            selection, source="factual", target="diff", class_sizes={+1: 1, -1: 1}, dtype=dtype
        )
        add = means._adder(means.source_means[+1], share)
        for gradient in gradients:
            add("w", gradient)
        sums[dtype] = means.source_means[+1]

    error = relative_error(sums[torch.bfloat16], sums[torch.float32])

    assert largest / 10 < error < largest
    assert relative_error(sums[torch.float32], {"w": gradients.mean(0)}) < 1e-5
