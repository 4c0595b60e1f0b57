import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

import hf_gradiend  # noqa: F401 - registers the model
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.modeling_gradiend import GradiendModel

# Names out of alphabetical order, shapes that cannot be taken for one another.
SHAPES = {"z.weight": (4, 3), "a.weight": (5,), "m.bias": (2, 2, 2)}
INDICES = {"z.weight": [1, 6, 11], "m.bias": [0, 7]}  # "a.weight" stays dense
N_DENSE, N_SPARSE = 25, 10
LAYOUTS = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
FEATURES = pytest.mark.parametrize("n_features", [1, 2])


def new_gradiend(*, sparse: bool = False, n_features: int = 1, seed: int = 0) -> GradiendModel:
    """A GRADIEND with normal numbers everywhere, W_e scaled so that |h| is well below 1."""
    parameters = [
        {"name": n, "shape": s, "n_selected": len(INDICES[n]) if sparse and n in INDICES else None}
        for n, s in SHAPES.items()
    ]
    model = GradiendModel(GradiendConfig(parameters=parameters, n_features=n_features))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if name.startswith("encoder") else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        if sparse:
            for name, indices in INDICES.items():
                model.indices.at(name).copy_(torch.tensor(indices))
    return model


def new_gradients(*batch: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*batch, *s, generator=generator) for n, s in SHAPES.items()}


def single_gradiend(
    *, encoder: list, encoder_bias: list, decoder: list, decoder_bias: list
) -> GradiendModel:
    """A GRADIEND of one parameter "w" with given numbers."""
    weight = torch.tensor(encoder)
    parameters = [{"name": "w", "shape": list(weight.shape[1:])}]
    model = GradiendModel(GradiendConfig(parameters=parameters, n_features=len(encoder)))
    with torch.no_grad():
        model.encoder.weight.at("w").copy_(weight)
        model.encoder.bias.copy_(torch.tensor(encoder_bias))
        model.decoder.weight.at("w").copy_(torch.tensor(decoder))
        model.decoder.bias.at("w").copy_(torch.tensor(decoder_bias))
    return model


def tensors(model: GradiendModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(first: GradiendModel, second: GradiendModel) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


# ---- encode ------------------------------------------------------------------


def test_encode_is_the_tanh_of_the_projection_over_all_parameters():
    model = new_gradiend()
    with torch.no_grad():
        for name in SHAPES:
            model.encoder.weight.at(name).zero_()
        model.encoder.weight.at("z.weight")[0, 1, 2] = 0.5
        model.encoder.weight.at("a.weight")[0, 4] = -2.0
        model.encoder.weight.at("m.bias")[0, 1, 0, 1] = 1.0
        model.encoder.bias.fill_(0.25)
    gradients = {n: torch.full(s, 100.0) for n, s in SHAPES.items()}
    gradients["z.weight"][1, 2] = 3.0
    gradients["a.weight"][4] = 0.5
    gradients["m.bias"][1, 0, 1] = -0.125

    h = model.encode(gradients)

    assert h.shape == (1,)
    # One float32 tanh.
    assert h.item() == pytest.approx(math.tanh(1.5 - 1.0 - 0.125 + 0.25), abs=1e-7)


def test_each_feature_has_its_own_direction_and_bias():
    model = single_gradiend(
        encoder=[[0.5, 0.0], [0.25, -1.0]],
        encoder_bias=[0.0, 0.5],
        decoder=[[0.0, 0.0], [0.0, 0.0]],
        decoder_bias=[0.0, 0.0],
    )

    h = model.encode({"w": torch.tensor([1.0, 0.5])})

    expected = [math.tanh(0.5), math.tanh(0.25 - 0.5 + 0.5)]
    assert h.tolist() == pytest.approx(expected, abs=1e-7)


@LAYOUTS
@FEATURES
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_encodings_of_a_batch_are_the_stack_of_the_single_ones(sparse, n_features, batch):
    model = new_gradiend(sparse=sparse, n_features=n_features)
    gradients = new_gradients(*batch)

    h = model.encode(gradients)

    assert h.shape == (*batch, n_features)
    for position in torch.cartesian_prod(*(torch.arange(length) for length in batch)).tolist():
        place = tuple(position) if isinstance(position, list) else (position,)
        single = model.encode({name: gradient[place] for name, gradient in gradients.items()})
        # Sums of at most 12 products in another order: a few float32 roundings.
        torch.testing.assert_close(h[place], single, atol=2e-7, rtol=1e-6)
    assert h.unique().numel() == h.numel()  # the control: the rows differ


def test_a_sparse_gradiend_reads_the_indexed_entries_only():
    model = new_gradiend(sparse=True)
    gradients = new_gradients()
    h = model.encode(gradients)

    unread, read = new_gradients(), new_gradients()
    unread["z.weight"].view(-1)[[0, 2, 3, 4, 5, 7, 8, 9, 10]] += 100.0
    read["z.weight"].view(-1)[6] += 1.0

    assert torch.equal(model.encode(unread), h)
    assert not torch.equal(model.encode(read), h)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
def test_a_sparse_gradiend_takes_the_selected_values_as_well(batch):
    model = new_gradiend(sparse=True, n_features=2)
    gradients = new_gradients(*batch)
    values = {
        name: gradient.flatten(len(batch))[..., INDICES[name]] if name in INDICES else gradient
        for name, gradient in gradients.items()
    }

    assert values["z.weight"].shape == (*batch, 3)
    assert torch.equal(model.encode(values), model.encode(gradients))


def test_selected_values_that_look_like_one_full_gradient_are_not_read_as_one():
    # Four rows of three values each have the shape (4, 3) of the whole parameter.
    values = {name: gradient.flatten(1) for name, gradient in new_gradients(4).items()}
    values |= {name: values[name][:, INDICES[name]] for name in INDICES}

    with pytest.raises(ValueError, match="one batch shape"):
        new_gradiend(sparse=True).encode(values)


@LAYOUTS
def test_a_missing_gradient_is_named(sparse):
    gradients = new_gradients()
    del gradients["m.bias"]

    with pytest.raises(ValueError, match=r"'m\.bias' is missing"):
        new_gradiend(sparse=sparse).encode(gradients)


@LAYOUTS
@pytest.mark.parametrize("shape", [(3, 4), (4,), (), (4, 3, 1)])
def test_a_gradient_of_another_shape_is_refused(sparse, shape):
    gradients = new_gradients()
    gradients["z.weight"] = torch.zeros(shape)

    with pytest.raises(ValueError, match=r"\(\*batch, 4, 3\) for 'z\.weight'"):
        new_gradiend(sparse=sparse).encode(gradients)


@pytest.mark.parametrize("other", [(), (1,), (3, 2)])
def test_gradients_of_different_batch_shapes_are_refused(other):
    gradients = new_gradients(2) | {"a.weight": new_gradients(*other)["a.weight"]}

    with pytest.raises(ValueError, match=r"one batch shape, but 'a\.weight'"):
        new_gradiend().encode(gradients)


def test_a_gradiend_of_no_parameters_says_that_it_cannot_encode():
    with pytest.raises(ValueError, match="no parameters"):
        GradiendModel(GradiendConfig()).encode({})


def test_extra_gradients_and_their_order_do_not_matter():
    model, gradients = new_gradiend(), new_gradients()

    permuted = {"other": torch.ones(7)} | {name: gradients[name] for name in sorted(gradients)}

    assert torch.equal(model.encode(permuted), model.encode(gradients))


# ---- precision ---------------------------------------------------------------


def test_products_stay_in_float32_under_bfloat16_autocast():
    model, gradients, targets = new_gradiend(n_features=2), new_gradients(3), new_gradients(3)
    plain, decoded = model(gradients, targets), model.decode([0.3, -0.7])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(gradients, targets)
        low_decoded = model.decode([0.3, -0.7])
        weight = model.encoder.weight.at("a.weight")
        control = gradients["a.weight"] @ weight.T

    assert control.dtype == torch.bfloat16  # the control: autocast does act on such products
    assert torch.equal(low.encodings, plain.encodings)
    assert torch.equal(low.loss, plain.loss)
    for name in SHAPES:
        assert torch.equal(low.updates[name], plain.updates[name])
        assert torch.equal(low_decoded[name], decoded[name])


def test_a_bfloat16_gradiend_computes_in_float32_with_its_rounded_weights():
    model = new_gradiend().bfloat16()
    rounded = new_gradiend().bfloat16().float()

    h = model.encode(new_gradients(2))

    assert h.dtype == torch.float32
    assert torch.equal(h, rounded.encode(new_gradients(2)))
    assert torch.equal(model.decode(0.5)["m.bias"], rounded.decode(0.5)["m.bias"])
    assert not torch.equal(h, new_gradiend().encode(new_gradients(2)))  # the control


def test_gradients_in_half_precision_are_read_in_float32():
    model = new_gradiend()
    halves = {name: gradient.bfloat16() for name, gradient in new_gradients(2).items()}

    h = model.encode(halves)

    assert h.dtype == torch.float32
    assert torch.equal(h, model.encode({name: half.float() for name, half in halves.items()}))


# ---- decode ------------------------------------------------------------------


def test_decode_is_h_times_the_direction_plus_the_bias():
    model = single_gradiend(
        encoder=[[0.0, 0.0], [0.0, 0.0]],
        encoder_bias=[0.0, 0.0],
        decoder=[[1.0, -2.0], [0.5, 4.0]],
        decoder_bias=[0.25, -0.5],
    )

    assert model.decode([0.5, -1.0])["w"].tolist() == [0.5 - 0.5 + 0.25, -1.0 - 4.0 - 0.5]
    assert model.decode([0.0, 0.0])["w"].tolist() == [0.25, -0.5]


@LAYOUTS
@FEATURES
def test_updates_of_a_batch_are_the_stack_of_the_single_ones(sparse, n_features):
    model = new_gradiend(sparse=sparse, n_features=n_features)
    h = torch.randn(2, 3, n_features, generator=torch.Generator().manual_seed(3))

    batched = model.decode(h)

    for name, shape in SHAPES.items():
        assert batched[name].shape == (2, 3, *shape)
        singles = torch.stack([model.decode(one)[name] for one in h.flatten(0, 1)])
        torch.testing.assert_close(batched[name].flatten(0, 1), singles)


def test_a_number_is_a_feature_factor_of_a_single_feature():
    model = new_gradiend()

    for name, shape in SHAPES.items():
        assert model.decode(0.5)[name].shape == shape
        assert torch.equal(model.decode(0.5)[name], model.decode([0.5])[name])
        assert torch.equal(model.decode()[name], model.decoder.bias.at(name))


def test_a_sparse_update_is_zero_where_nothing_is_selected():
    model = new_gradiend(sparse=True)

    update = model.decode(0.5)["z.weight"].flatten()

    weight, bias = model.decoder.weight.at("z.weight")[0], model.decoder.bias.at("z.weight")
    assert update.nonzero().squeeze(-1).tolist() == INDICES["z.weight"]
    torch.testing.assert_close(update[INDICES["z.weight"]], 0.5 * weight + bias)


@pytest.mark.parametrize("h", [0.5, [0.5], [0.1, 0.2, 0.3]])
def test_decode_refuses_a_feature_factor_of_another_length(h):
    with pytest.raises(ValueError, match="2 numbers"):
        new_gradiend(n_features=2).decode(h)


# ---- forward and loss --------------------------------------------------------


def test_the_loss_is_the_mean_square_over_all_weights():
    model = single_gradiend(
        encoder=[[0.0, 0.0]], encoder_bias=[0.0], decoder=[[3.0, 3.0]], decoder_bias=[1.0, 2.0]
    )

    output = model({"w": torch.ones(2)}, {"w": torch.tensor([0.0, 4.0])})

    assert output.updates["w"].tolist() == [1.0, 2.0]  # h = 0
    assert output.loss.item() == (1.0**2 + 2.0**2) / 2


@LAYOUTS
@FEATURES
def test_the_loss_of_a_batch_is_the_mean_of_the_single_losses(sparse, n_features):
    model = new_gradiend(sparse=sparse, n_features=n_features)
    sources, targets = new_gradients(3, seed=1), new_gradients(3, seed=2)

    loss = model(sources, targets).loss.item()

    def single(i: int) -> float:
        source, target = ({n: g[i] for n, g in side.items()} for side in (sources, targets))
        return model(source, target).loss.item()

    singles = [single(i) for i in range(3)]
    assert loss == pytest.approx(sum(singles) / 3, rel=1e-6)
    assert max(singles) - min(singles) > 0.01  # the control: they differ


@LAYOUTS
def test_the_loss_counts_selected_weights_only(sparse):
    model = new_gradiend(sparse=sparse)
    gradients, targets = new_gradients(), new_gradients(seed=2)

    loss = model(gradients, targets).loss

    updates = model.decode(model.encode(gradients))
    squares = {name: (updates[name] - targets[name]).square() for name in SHAPES}
    if sparse:
        squares |= {name: squares[name].flatten()[INDICES[name]] for name in INDICES}
    expected = sum(square.sum().item() for square in squares.values())
    assert loss.item() == pytest.approx(expected / (N_SPARSE if sparse else N_DENSE), rel=1e-6)


def test_forward_gives_what_encode_and_decode_give():
    model, gradients = new_gradiend(sparse=True, n_features=2), new_gradients(3)

    output = model(gradients)

    assert output.loss is None
    assert torch.equal(output.encodings, model.encode(gradients))
    for name, update in model.decode(output.encodings).items():
        assert torch.equal(output.updates[name], update)


@LAYOUTS
def test_gradients_of_the_loss_are_the_closed_form(sparse):
    # With r = dec(h) − t and c = 2/n: ∂b_d = c·r, ∂W_d = c·h·r, ∂W_e = c·⟨r, W_d⟩·(1 − h²)·x.
    model = new_gradiend(sparse=sparse)
    sources, targets = new_gradients(seed=1), new_gradients(seed=2)

    output = model(sources, targets)
    output.loss.backward()

    def values(tensors: dict[str, Tensor], name: str) -> Tensor:
        picked = sparse and name in INDICES
        return tensors[name].flatten()[INDICES[name]] if picked else tensors[name]

    h, c = output.encodings.item(), 2 / model.config.n_selected
    residuals = {n: (values(output.updates, n) - values(targets, n)).detach() for n in SHAPES}
    along = sum(
        float((residuals[n] * model.decoder.weight.at(n)[0].detach()).sum()) for n in SHAPES
    )
    close = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of up to 25 products
    for name, residual in residuals.items():
        torch.testing.assert_close(model.decoder.bias.at(name).grad, c * residual, **close)
        torch.testing.assert_close(model.decoder.weight.at(name).grad[0], c * h * residual, **close)
        expected = c * along * (1 - h**2) * values(sources, name)
        torch.testing.assert_close(model.encoder.weight.at(name).grad[0], expected, **close)
    bias_gradient = float(model.encoder.bias.grad)
    assert bias_gradient == pytest.approx(c * along * (1 - h**2), rel=1e-5)


@LAYOUTS
@FEATURES
def test_gradients_of_the_loss_are_finite_differences(sparse, n_features):
    model = new_gradiend(sparse=sparse, n_features=n_features)
    sources, targets = new_gradients(3, seed=1), new_gradients(3, seed=2)
    model(sources, targets).loss.backward()
    generator = torch.Generator().manual_seed(5)

    for name, parameter in model.named_parameters():
        original = parameter.detach().clone()
        direction = torch.randn(parameter.shape, generator=generator)
        direction /= direction.norm()
        losses: list[float] = []
        for step in (+0.02, -0.02):
            with torch.no_grad():
                parameter.copy_(original + step * direction)
                losses.append(model(sources, targets).loss.item())
        with torch.no_grad():
            parameter.copy_(original)
        slope = float((parameter.grad * direction).sum())
        # Central difference: error step²/6·f''' + 1e-7·loss/step, both below 1e-3 here.
        assert (losses[0] - losses[1]) / 0.04 == pytest.approx(slope, abs=1e-3), name
        assert abs(slope) > 2e-3, name  # the control: there is a slope to be found


# ---- flip, energy ------------------------------------------------------------


@LAYOUTS
@FEATURES
def test_flip_reverses_encodings_and_leaves_the_autoencoder_and_its_bias(sparse, n_features):
    model, gradients = new_gradiend(sparse=sparse, n_features=n_features), new_gradients(3)
    before, state = model(gradients), tensors(model)

    model.flip_()

    after = model(gradients)
    assert torch.equal(after.encodings, -before.encodings)
    assert (
        float(before.encodings.detach().abs().min()) > 0.01
    )  # the control: none is its own mirror
    for name in SHAPES:
        assert torch.equal(after.updates[name], before.updates[name])
        assert torch.equal(model.decoder.bias.at(name), state[f"decoder.bias.{name}"])
        assert torch.equal(model.decoder.weight.at(name), -state[f"decoder.weight.{name}"])


def test_flip_of_one_feature_leaves_the_other():
    model, gradients = new_gradiend(n_features=2), new_gradients(3)
    before = model(gradients)

    model.flip_([1])

    after = model(gradients)
    signs = torch.tensor([1.0, -1.0])
    assert torch.equal(after.encodings, before.encodings * signs)
    for name in SHAPES:
        assert torch.equal(after.updates[name], before.updates[name])


def test_flipping_twice_restores_every_bit():
    model = new_gradiend(n_features=2)
    before = tensors(model)

    model.flip_([0])
    assert not torch.equal(model.encoder.bias, before["encoder.bias"])
    model.flip_([0])

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_energies_are_squared_norms_of_the_direction():
    model = single_gradiend(
        encoder=[[0.0, 0.0], [0.0, 0.0]],
        encoder_bias=[0.0, 0.0],
        decoder=[[3.0, 0.0], [0.0, 2.0]],
        decoder_bias=[100.0, 100.0],  # no part of the direction
    )

    assert model.energy_by_parameter([1.0, 0.0]) == {"w": 9.0}
    assert model.energy_by_parameter([1.0, -2.0]) == {"w": 9.0 + 16.0}


# ---- initialisation ----------------------------------------------------------


@pytest.mark.parametrize("initialization", ["zeros", "uniform"])
@LAYOUTS
def test_a_new_gradiend_has_a_uniform_encoder_and_the_decoder_that_was_asked_for(
    initialization, sparse
):
    parameters = [{"name": "x.w", "shape": [40, 50], "n_selected": 400 if sparse else None}]
    config = GradiendConfig(parameters=parameters, decoder_initialization=initialization)
    bound = (400 if sparse else 2000) ** -0.5

    model = _seeded(0, config)

    uniform = [model.encoder.weight.at("x.w")]
    decoder = [model.decoder.weight.at("x.w"), model.decoder.bias.at("x.w")]
    if initialization == "uniform":
        uniform += decoder
    else:
        assert all(not tensor.any() for tensor in decoder)
    for tensor in uniform:
        # The largest of 400 uniform numbers lies above 98 % of the bound but once in 3000 times.
        assert 0.98 * bound < float(tensor.detach().abs().max()) <= bound
        assert (
            abs(float(tensor.detach().mean())) < 0.12 * bound
        )  # four standard errors of 400 numbers
    assert 0.0 < abs(model.encoder.bias.item()) <= bound


def test_initialisation_follows_the_seed():
    config = GradiendConfig(parameters=[{"name": "a.weight", "shape": [5]}])

    first, again, other = (_seeded(seed, config) for seed in (0, 0, 1))

    assert torch.equal(first.encoder.weight.at("a.weight"), again.encoder.weight.at("a.weight"))
    assert not torch.equal(first.encoder.weight.at("a.weight"), other.encoder.weight.at("a.weight"))


def _seeded(seed: int, config: GradiendConfig) -> GradiendModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GradiendModel(config)


def test_indices_that_were_never_set_cannot_be_used_silently():
    parameters = [{"name": "x.w", "shape": [4, 3], "n_selected": 2}]
    model = GradiendModel(GradiendConfig(parameters=parameters))

    with pytest.raises((IndexError, RuntimeError), match="index"):
        model.encode({"x.w": torch.ones(4, 3)})


# ---- saving and loading ------------------------------------------------------


@LAYOUTS
@FEATURES
def test_a_saved_gradiend_loads_with_every_bit(tmp_path, sparse, n_features):
    model = new_gradiend(sparse=sparse, n_features=n_features)
    model.save_pretrained(tmp_path)

    loaded, info = GradiendModel.from_pretrained(tmp_path, output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_tensors(loaded, model)
    assert loaded.names == list(SHAPES)
    gradients = new_gradients(2)
    assert torch.equal(loaded.encode(gradients), model.encode(gradients))


def test_the_order_of_parameters_survives_a_file_with_sorted_keys(tmp_path):
    model = new_gradiend()
    model.save_pretrained(tmp_path)

    loaded = GradiendModel.from_pretrained(tmp_path)

    assert loaded.names == ["z.weight", "a.weight", "m.bias"]
    assert list(loaded.decode(0.5)) == ["z.weight", "a.weight", "m.bias"]
    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(stored) != list(model.state_dict())  # the control: the file has another order


def test_a_file_holds_one_tensor_per_base_parameter_under_its_name(tmp_path):
    new_gradiend(sparse=True).save_pretrained(tmp_path)

    stored = load_file(tmp_path / "model.safetensors")

    parts = ("encoder.weight", "decoder.weight", "decoder.bias")
    expected = {f"{part}.{name}" for part in parts for name in SHAPES}
    assert stored.keys() == expected | {f"indices.{n}" for n in INDICES} | {"encoder.bias"}
    assert stored["indices.z.weight"].dtype == torch.int32


@pytest.fixture
def large() -> GradiendModel:
    """About 6 KB in 13 tensors of at most 0.8 KB."""
    parameters = [{"name": f"layer.{i}.weight", "shape": [10, 20]} for i in range(3)]
    model = GradiendModel(GradiendConfig(parameters=parameters))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_shards_are_no_larger_than_asked_and_load_with_every_bit(tmp_path, large):
    large.save_pretrained(tmp_path / "sharded", max_shard_size="2KB")
    large.save_pretrained(tmp_path / "whole")

    loaded = GradiendModel.from_pretrained(tmp_path / "sharded")

    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    assert shards(tmp_path / "whole") == ["model.safetensors"]  # the control
    assert len(shards(tmp_path / "sharded")) >= 3
    assert sorted(set(index["weight_map"].values())) == shards(tmp_path / "sharded")
    for name in shards(tmp_path / "sharded"):
        held = load_file(tmp_path / "sharded" / name).values()
        assert sum(tensor.nbytes for tensor in held) <= 2000
    assert_same_tensors(loaded, large)


@pytest.mark.parametrize(
    ("first", "second"), [("2KB", "5GB"), ("5GB", "2KB"), ("1KB", "3KB"), ("3KB", "1KB")]
)
def test_saving_again_with_another_shard_size_leaves_no_stale_file(tmp_path, large, first, second):
    large.save_pretrained(tmp_path / "again", max_shard_size=first)
    (tmp_path / "again" / "README.md").write_text("card")
    with torch.no_grad():
        large.encoder.bias.fill_(0.75)

    large.save_pretrained(tmp_path / "again", max_shard_size=second)

    large.save_pretrained(tmp_path / "fresh", max_shard_size=second)
    names, fresh = ({p.name for p in (tmp_path / d).iterdir()} for d in ("again", "fresh"))
    assert names == fresh | {"README.md"}
    assert GradiendModel.from_pretrained(tmp_path / "again").encoder.bias.item() == 0.75


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, large):
    folder = tmp_path / "gradiend"
    large.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        large.encoder.bias.fill_(0.75)

    with pytest.raises(ValueError, match="nonsense"):
        large.save_pretrained(folder, max_shard_size="nonsense")

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["gradiend"]  # no temporary folder either
    large.save_pretrained(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after != before  # the control: a good save does change it


def test_saving_makes_the_folders_above(tmp_path, large):
    large.save_pretrained(tmp_path / "a" / "b" / "c")

    assert_same_tensors(GradiendModel.from_pretrained(tmp_path / "a" / "b" / "c"), large)


def test_loading_in_bfloat16_rounds_the_weights_and_keeps_the_indices(tmp_path):
    model = new_gradiend(sparse=True)
    with torch.no_grad():
        model.indices.at("z.weight").copy_(torch.tensor([1, 2**24 + 1, 2**31 - 1]))
    model.save_pretrained(tmp_path)

    loaded = GradiendModel.from_pretrained(tmp_path, dtype=torch.bfloat16)

    assert loaded.indices.at("z.weight").dtype == torch.int32
    assert loaded.indices.at("z.weight").tolist() == [1, 2**24 + 1, 2**31 - 1]
    weight = model.encoder.weight.at("z.weight")
    assert torch.equal(loaded.encoder.weight.at("z.weight"), weight.bfloat16())
    assert not torch.equal(
        weight.bfloat16().float(), weight
    )  # the control: rounding does something


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casting_keeps_the_indices(cast):
    model = new_gradiend(sparse=True)

    getattr(model, cast)()

    assert model.indices.at("m.bias").dtype == torch.int32
    assert model.indices.at("m.bias").tolist() == INDICES["m.bias"]


def test_a_bfloat16_gradiend_stays_one_in_a_file(tmp_path):
    model = new_gradiend(sparse=True).bfloat16()
    model.save_pretrained(tmp_path)

    assert_same_tensors(GradiendModel.from_pretrained(tmp_path), model)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="device_map='auto' would not place on the CPU"
)
def test_device_map_auto_places_a_gradiend_and_encodes_the_same(tmp_path):
    pytest.importorskip("accelerate")
    model = new_gradiend(sparse=True)
    model.save_pretrained(tmp_path)

    loaded = GradiendModel.from_pretrained(tmp_path, device_map="auto")

    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.equal(loaded.encode(new_gradients()), model.encode(new_gradients()))


def test_auto_model_knows_the_model_type(tmp_path):
    model = new_gradiend(sparse=True)
    model.save_pretrained(tmp_path)

    loaded = AutoModel.from_pretrained(tmp_path)

    assert type(loaded) is GradiendModel
    assert_same_tensors(loaded, model)


@pytest.mark.parametrize(
    "name",
    [
        "type.weight",
        "layer.half.float.weight",
        "put.at.weight",
        "block.bound",
        "weight.bias.weight",
        "encoder.decoder.indices.weight",
        "gradiend.encoder.weight",
        "norm.LayerNorm.gamma",
        "norm.LayerNorm.beta",
        "conv.weight_g",
        "conv.parametrizations.weight.original0",
        "lonely",
    ],
)
@LAYOUTS
def test_names_that_mean_something_to_torch_or_transformers_survive_a_file(tmp_path, name, sparse):
    parameters = [
        {"name": name, "shape": [2, 3], "n_selected": 2 if sparse else None},
        {"name": "other.weight", "shape": [2]},
    ]
    model = GradiendModel(GradiendConfig(parameters=parameters))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        if sparse:
            model.indices.at(name).copy_(torch.tensor([1, 4]))
    model.save_pretrained(tmp_path)

    loaded, info = GradiendModel.from_pretrained(tmp_path, output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_tensors(loaded, model)
    gradients = {name: torch.ones(2, 3), "other.weight": torch.ones(2)}
    assert torch.equal(loaded.encode(gradients), model.encode(gradients))


@pytest.mark.parametrize("lost", ["encoder.bias", "decoder.weight.z.weight", "indices.z.weight"])
def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path, lost):
    # transformers alone would draw them at random, and warn.
    new_gradiend(sparse=True).save_pretrained(tmp_path)
    assert GradiendModel.from_pretrained(tmp_path).config.n_features  # the control
    _remove(tmp_path / "model.safetensors", [lost])

    with pytest.raises(OSError, match=rf"1 are missing.*{re.escape(lost)}"):
        GradiendModel.from_pretrained(tmp_path)


def test_a_truncated_checkpoint_is_refused_by_the_name_of_its_place(tmp_path):
    new_gradiend().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])

    with pytest.raises(OSError, match=rf"{re.escape(str(tmp_path))}.*broken"):
        GradiendModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "bert"}, "of type 'bert'"),
        ({"model_type": "gradiend"}, "list of parameters"),
        ({"model_type": "gradiend", "parameters": {"x": [3]}}, "list of parameters"),
        ({"model_type": "gradiend", "parameters": [{"name": "x"}]}, "list of parameters"),
    ],
)
def test_a_configuration_of_something_else_is_refused(tmp_path, content, words):
    new_gradiend().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")

    with pytest.raises(ValueError, match=words):
        GradiendModel.from_pretrained(tmp_path)


def _remove(file: Path, names: list[str]) -> None:
    stored = load_file(file)
    for name in names:
        del stored[name]
    save_file(stored, file, metadata={"format": "pt"})


# ---- without the package -----------------------------------------------------

# Refusing the import makes this independent of whether the package is installed beside the tests.
REMOTE = """
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_gradiend":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Refuse())
try:
    import hf_gradiend
except ModuleNotFoundError:
    report = {"importable": False}
else:
    report = {"importable": True}

import torch
from transformers import AutoConfig, AutoModel
folder, gradients, result = sys.argv[1:]
try:
    AutoModel.from_pretrained(folder, trust_remote_code=False)
except ValueError:
    report["refused_without_trust"] = True
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
report["class"] = f"{type(model).__module__}.{type(model).__name__}"
report["config"] = type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__
report["names"] = model.names
inputs = torch.load(gradients, weights_only=True)
report["encodings"] = model.encode(inputs).tolist()
report["update"] = model.decode(0.5)["z.weight"].tolist()
thin = {
    "encode_texts": lambda: model.encode_texts(None, None, []),
    "edited": lambda: model.edited(None, 0.0, 0.01),
    "merge_into": lambda: model.merge_into(None, 0.0, 0.01),
}
for name, call in thin.items():
    try:
        call()
    except ImportError as error:
        report[name] = [type(error).__name__, str(error)]
model.save_pretrained(folder + "-again", include_code=True)
json.dump(report, open(result, "w"))
"""


@pytest.fixture(scope="module")
def remote_report(tmp_path_factory) -> dict:
    """What a process without the package finds in a folder saved with its code."""
    tmp_path = tmp_path_factory.mktemp("remote")
    new_gradiend(sparse=True).save_pretrained(tmp_path / "gradiend", include_code=True)
    torch.save(new_gradients(2), tmp_path / "gradients.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    files = [str(tmp_path / name) for name in ("gradiend", "gradients.pt", "report.json")]

    done = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE, *files],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    return report | {"again": sorted(p.name for p in (tmp_path / "gradiend-again").iterdir())}


def test_the_code_in_a_repository_loads_a_gradiend_without_the_package(remote_report):
    model = new_gradiend(sparse=True)

    assert not remote_report["importable"]
    assert remote_report["refused_without_trust"]  # the control: it is the remote code that loads
    assert remote_report["class"].startswith("transformers_modules.")
    assert remote_report["config"] == "GradiendConfig"
    assert remote_report["names"] == list(SHAPES)
    # JSON writes doubles, which hold float32 exactly; another process, the same operations.
    expected = model.encode(new_gradients(2))
    torch.testing.assert_close(
        torch.tensor(remote_report["encodings"]), expected, atol=1e-6, rtol=0
    )
    assert torch.equal(torch.tensor(remote_report["update"]), model.decode(0.5)["z.weight"])


@pytest.mark.parametrize("method", ["encode_texts", "edited", "merge_into"])
def test_methods_that_need_the_package_name_the_pip_line(remote_report, method):
    kind, message = remote_report[method]

    assert kind == "ImportError"
    assert "pip install hf_gradiend" in message


def test_remote_code_can_save_itself_again(remote_report):
    assert remote_report["again"] == [
        "config.json",
        "configuration_gradiend.py",
        "model.safetensors",
        "modeling_gradiend.py",
    ]


def test_code_is_added_only_when_asked_for(tmp_path):
    new_gradiend().save_pretrained(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("module", ["configuration_gradiend", "modeling_gradiend"])
def test_the_two_files_of_a_repository_import_nothing_but_torch_and_transformers(module):
    text = Path(importlib.util.find_spec(f"hf_gradiend.{module}").origin).read_text(
        encoding="utf-8"
    )

    assert "from hf_gradiend" not in text
    assert "import hf_gradiend" not in text


# ---- with a base model -------------------------------------------------------


def test_edited_and_merge_into_reach_the_package(tiny_gpt2, gradiend_for):
    gradiend = gradiend_for(tiny_gpt2, "*.mlp.c_fc.bias")
    name = gradiend.names[0]
    bias = tiny_gpt2.get_parameter(name)
    before, update = bias.detach().clone(), gradiend.decode(0.5)[name].detach()

    with gradiend.edited(tiny_gpt2, 0.5, 0.25) as model:
        inside = bias.detach().clone()
    assert model is tiny_gpt2
    torch.testing.assert_close(inside, before + 0.25 * update)
    assert torch.equal(bias, before)

    assert gradiend.merge_into(tiny_gpt2, 0.5, 0.25) is tiny_gpt2
    assert torch.equal(bias, inside)
