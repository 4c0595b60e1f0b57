import pytest
import torch

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.training import update
from hf_gradiend.training.update import AdamWSettings, FusedAdamW

SETTINGS = AdamWSettings(learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8)
# After five steps of about the learning rate each, a two-hundredth of one step: AdamW divides by
# the gradient's own size, so that float32's rounding (1e-7) counts most where gradients cancel. Of
# the 400,000 residuals of the longest layout the smallest cancel to 1e-5 of their terms, and how
# the sum behind h rounds depends on the number of threads (1.4e-5 was seen with two).
TOLERANCE = 5e-5
LAYOUTS = {
    "one": [("w", (5,), None)],
    "several": [("block.0.weight", (3, 4), None), ("block.0.bias", (7,), None),
                ("block.1.weight", (2, 3, 2), None)],
    "sparse": [("block.0.weight", (3, 4), 5), ("block.1.weight", (11,), None), ("b", (6, 2), 1)],
    "longer than a block": [("w", (update.BLOCK + 3,), None), ("b", (4,), None)],
}  # fmt: skip


def a_gradiend(layout: str, seed: int = 0) -> GradiendModel:
    parameters = [{"name": n, "shape": s, "n_selected": k} for n, s, k in LAYOUTS[layout]]
    gradiend = GradiendModel(GradiendConfig(parameters=parameters))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gradiend.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name in gradiend.names:  # an encoding in the middle of its range
            gradiend.encoder.weight.at(name).mul_(gradiend.config.n_selected**-0.5)
    for name, _, k in LAYOUTS[layout]:
        if k is not None:
            gradiend.indices.at(name).copy_(torch.arange(0, 2 * k, 2))
    return gradiend


def some_gradients(gradiend: GradiendModel, seed: int) -> list[dict[str, torch.Tensor]]:
    """A source and a target gradient, as selected values."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(gradiend.decoder.bias.at(name).shape, generator=generator)
            for name in gradiend.names
        }
        for _ in range(2)
    ]


def textbook(gradiend: GradiendModel, settings: AdamWSettings, steps) -> list[tuple[float, float]]:
    """The same by autograd of `GradiendModel.forward` and `torch.optim.AdamW`."""
    optimizer = torch.optim.AdamW(
        gradiend.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    seen = []
    for source, target in steps:
        output = gradiend(source, target)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        seen.append((output.loss.item(), output.encodings.item()))
    return seen


def largest_difference(one: GradiendModel, other: GradiendModel) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_equal_autograd_with_torch_adamw(layout):
    fused, plain, start = (a_gradiend(layout) for _ in range(3))
    steps = [some_gradients(start, seed) for seed in range(5)]
    step = FusedAdamW(fused, SETTINGS).step

    found = [step(source, target) for source, target in steps]

    expected = textbook(plain, SETTINGS, steps)
    assert [number for pair in found for number in pair] == pytest.approx(
        [number for pair in expected for number in pair], rel=1e-4
    )
    assert largest_difference(fused, plain) < TOLERANCE
    assert largest_difference(fused, start) > 0.03  # the control: five steps of 0.01 were made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("field", [None, "learning_rate", "weight_decay", "beta1", "epsilon"])
def test_the_compiled_update_is_the_same(field):
    settings = AdamWSettings(**{**vars(SETTINGS), **({field: 0.5} if field else {})})
    compiled, plain, start = (a_gradiend("several") for _ in range(3))
    steps = [some_gradients(start, seed) for seed in range(5)]
    step = FusedAdamW(compiled, settings, compiled=True).step

    found = [step(source, target) for source, target in steps]

    expected = textbook(plain, settings, steps)
    assert [number for pair in found for number in pair] == pytest.approx(
        [number for pair in expected for number in pair], rel=1e-4
    )
    assert largest_difference(compiled, plain) < 50 * TOLERANCE
    assert largest_difference(compiled, start) > 0.03  # the control


@pytest.mark.parametrize("block", [1, 2, 5])
def test_the_size_of_a_block_makes_no_difference(monkeypatch, block):
    blocked, plain = a_gradiend("several"), a_gradiend("several")
    steps = [some_gradients(plain, seed) for seed in range(5)]
    monkeypatch.setattr(update, "BLOCK", block)
    step = FusedAdamW(blocked, SETTINGS).step

    for source, target in steps:
        step(source, target)

    textbook(plain, SETTINGS, steps)
    assert largest_difference(blocked, plain) < TOLERANCE


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "beta1", "beta2", "epsilon"])
def test_every_setting_of_adamw_has_its_textbook_effect(field):
    settings = AdamWSettings(**{**vars(SETTINGS), field: 0.5})
    fused, plain, default = (a_gradiend("several") for _ in range(3))
    steps = [some_gradients(plain, seed) for seed in range(3)]
    step, default_step = FusedAdamW(fused, settings).step, FusedAdamW(default, SETTINGS).step

    for source, target in steps:
        step(source, target)
        default_step(source, target)

    textbook(plain, settings, steps)
    # Steps are up to fifty times as long as above.
    assert largest_difference(fused, plain) < 50 * TOLERANCE
    assert largest_difference(fused, default) > 1e-3  # the control


def test_the_step_reports_loss_and_encoding_before_it():
    # One weight, by hand: h = tanh(1·0.5 + 0), residual h·2 + 1 − (−1).
    gradiend = GradiendModel(GradiendConfig(parameters=[{"name": "w", "shape": [1]}]))
    with torch.no_grad():
        gradiend.encoder.bias.fill_(0.0)
        gradiend.encoder.weight.at("w").fill_(1.0)
        gradiend.decoder.weight.at("w").fill_(2.0)
        gradiend.decoder.bias.at("w").fill_(1.0)
    one = {"w": torch.tensor([0.5])}

    loss, h = FusedAdamW(gradiend, SETTINGS).step(one, {"w": torch.tensor([-1.0])})

    assert h == pytest.approx(0.46211716, abs=1e-7)  # tanh(0.5)
    assert loss == pytest.approx((2 * 0.46211716 + 2) ** 2, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_may_come_in_any_order_and_go_after_their_update(layout):
    at_once, apart = (FusedAdamW(a_gradiend(layout), SETTINGS) for _ in range(2))

    for seed in range(3):
        source, target = some_gradients(at_once.gradiend, seed)
        expected = at_once.step(source, target)
        h = apart.begin(source)
        for name in reversed(apart.gradiend.names):
            apart.update_decoder(name, target[name])
            target[name].fill_(torch.nan)
        found = apart.finish()
        assert (found, h) == (expected, expected[1])

    assert largest_difference(at_once.gradiend, apart.gradiend) == 0.0


def test_the_gradients_that_come_in_are_not_changed():
    gradiend = a_gradiend("several")
    source, target = some_gradients(gradiend, 0)
    before = [{name: t.clone() for name, t in side.items()} for side in (source, target)]

    FusedAdamW(gradiend, SETTINGS).step(source, target)

    for side, old in zip((source, target), before, strict=True):
        assert all(torch.equal(side[name], old[name]) for name in side)


@pytest.mark.parametrize("without", [None, "first", "second", "steps", "model"])
def test_training_goes_on_from_its_state_with_the_same_bits(without):
    whole = FusedAdamW(a_gradiend("sparse"), SETTINGS)
    steps = [some_gradients(whole.gradiend, seed) for seed in range(5)]
    for source, target in steps[:3]:
        whole.step(source, target)
    saved = {name: tensor.clone() for name, tensor in whole.state_tensors().items()}

    resumed = FusedAdamW(a_gradiend("sparse", seed=1), SETTINGS)
    own = resumed.state_tensors()
    part = {n: own[n] if without and n.startswith(without) else t for n, t in saved.items()}
    resumed.load_state_tensors(part)
    for source, target in steps[3:]:
        whole.step(source, target)
        resumed.step(source, target)

    difference = largest_difference(whole.gradiend, resumed.gradiend)
    # The controls: each part of the state is needed.
    assert difference == 0.0 if without is None else difference > 1e-5
