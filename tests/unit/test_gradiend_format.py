import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_gradiend.errors import ConfigError
from hf_gradiend.gradiend_format import from_gradiend
from hf_gradiend.modeling_gradiend import GradiendModel

# name, shape, representation, selected flat positions
PARAMETERS = (
    ("body.first.weight", (2, 3), "all", [0, 1, 2, 3, 4, 5]),
    ("body.second.weight", (3, 4), "indices", [1, 5, 6, 11]),
    ("body.third.weight", (2, 2), "mask", [0, 3]),
    ("body.unused.bias", (4,), "indices", []),
    ("body.last.bias", (3,), "all", [0, 1, 2]),
)
N = 15
CLASSES = {"F": 1, "M": -1, "other": 0}


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def their_weights(n_features: int = 1, *, bias: bool = True) -> dict[str, Tensor]:
    weights = {
        "encoder.0.linear.weight": numbers(n_features, N, seed=0) / 4,
        "encoder.0.linear.bias": numbers(n_features, seed=1),
        "decoder.0.linear.weight": numbers(N, n_features, seed=2),
    }
    return {**weights, "decoder.0.linear.bias": numbers(N, seed=3)} if bias else weights


def write_json(file, content) -> None:
    file.write_text(json.dumps(content), "utf-8")


def write_tensors(folder, name: str, tensors, *, safe: bool, pickled: str) -> str:
    name = f"{name}.safetensors" if safe else f"{name}.{pickled}"
    if safe:
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return name


def architecture_of(weights: dict[str, Tensor]) -> dict:
    return {
        "input_dim": N,
        "latent_dim": len(weights["encoder.0.linear.bias"]),
        "activation_encoder": "tanh",
        "activation_decoder": "id",
        "bias_decoder": "decoder.0.linear.bias" in weights,
        "torch_dtype": "float32",
    }


def training_with(correlation: float | None, **arguments) -> dict:
    scores = {"0": 0.1} if correlation is None else {"0": 0.1, "20": correlation}
    best = {"correlation": correlation, "global_step": 20}
    return {
        "training_stats": {"scores": scores},
        "best_score_checkpoint": best,
        "training_args": arguments,
    }


@pytest.fixture
def checkpoint(tmp_path):
    """Function that writes the documented format and returns the folder."""

    def checkpoint(
        weights=None, *, safe=True, architecture=(), metadata=(), context=(), training=None
    ):
        weights = weights or their_weights()
        masks, indices, entries = {}, {}, []
        for number, (name, shape, form, positions) in enumerate(PARAMETERS):
            entry = {"name": name, "shape": shape, "repr": form, "num_selected": len(positions)}
            if form == "indices":
                indices[f"L{number}"] = torch.tensor(positions, dtype=torch.int32)
            elif form == "mask":
                mask = torch.zeros(shape, dtype=torch.uint8)
                mask.view(-1)[positions] = 1
                masks[f"L{number}"] = mask
            entries.append(entry if form == "all" else {**entry, "key": f"L{number}"})
        write_tensors(
            tmp_path, "model" if safe else "pytorch_model", weights, safe=safe, pickled="bin"
        )
        options = {"safe": safe, "pickled": "pth"}
        mapping = {
            "mode": "mixed",
            "param_map": entries,
            "indices_file": write_tensors(tmp_path, "mapping_indices", indices, **options),
            "masks_file": write_tensors(tmp_path, "mapping_masks", masks, **options),
        }
        config = {
            "format_version": 0,
            "architecture": {**architecture_of(weights), **dict(architecture)},
            "mapping": mapping,
            "metadata": {"base_model": "org/base", **dict(metadata)},
        }
        write_json(tmp_path / "config.json", config)
        directions = {"feature_class_encoding_direction": CLASSES}
        context = {"source": "factual", "target": "diff", **directions, **dict(context)}
        write_json(tmp_path / "gradiend_context.json", context)
        write_json(tmp_path / "training.json", training or training_with(0.9))
        return tmp_path

    return checkpoint


def change(file, **fields) -> None:
    write_json(file, {**json.loads(file.read_text("utf-8")), **fields})


def gradients() -> tuple[dict[str, Tensor], Tensor]:
    """Full gradients by name, two texts each, and their selected values in the format's order."""
    full, parts = {}, []
    for seed, (name, shape, _, positions) in enumerate(PARAMETERS):
        full[name] = numbers(2, *shape, seed=10 + seed)
        parts.append(full[name].flatten(1)[:, positions])
    return full, torch.cat(parts, dim=1)


def scattered(vector: Tensor) -> dict[str, Tensor]:
    """Full tensors by name of a vector in the format's order, zero where nothing is selected."""
    full, start = {}, 0
    for name, shape, _, positions in PARAMETERS:
        flat = torch.zeros(torch.Size(shape).numel())
        flat[positions] = vector[start : start + len(positions)]
        full[name] = flat.view(shape)
        start += len(positions)
    return full


# ---- tensors -----------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("n_features", [1, 2])
def test_encodings_and_updates_are_those_of_the_stored_matrices(checkpoint, safe, bias, n_features):
    weights = their_weights(n_features, bias=bias)
    full, selected = gradients()
    h = torch.tensor([0.5, -0.25][:n_features])

    gradiend = GradiendModel.from_gradiend(checkpoint(weights, safe=safe))

    encoder, encoder_bias, decoder = list(weights.values())[:3]
    expected = torch.tanh(selected @ encoder.T + encoder_bias)
    torch.testing.assert_close(gradiend.encode(full), expected)
    update = decoder @ h + weights.get("decoder.0.linear.bias", torch.zeros(N))
    expected = scattered(update)
    decoded = gradiend.decode(h)
    for name, tensor in decoded.items():
        torch.testing.assert_close(tensor, expected[name])
        assert tensor.any()
    # The control: the order of the selected weights makes a difference.
    wrong = torch.tanh(selected.flip(1) @ encoder.T + encoder_bias)
    assert not torch.allclose(gradiend.encode(full), wrong, atol=1e-2)


def test_a_parameter_that_selects_nothing_is_left_out(checkpoint):
    gradiend = from_gradiend(checkpoint())

    used = [name for name, _, _, positions in PARAMETERS if positions]
    assert gradiend.names == used
    assert gradiend.config.n_selected == N


def test_what_was_imported_can_be_saved_and_loaded(checkpoint, tmp_path):
    gradiend = from_gradiend(checkpoint(their_weights(2)))

    gradiend.save_pretrained(tmp_path / "saved")
    loaded = GradiendModel.from_pretrained(tmp_path / "saved")

    assert gradiend.training is False
    assert {k: str(t.dtype) for k, t in gradiend.state_dict().items() if "indices" in k} == {
        "indices.body.second.weight": "torch.int32",
        "indices.body.third.weight": "torch.int32",
    }
    state = loaded.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in gradiend.state_dict().items())
    assert loaded.config.parameters == gradiend.config.parameters


def test_half_precision_stays_as_it_was_stored(checkpoint):
    weights = {name: t.bfloat16() for name, t in their_weights().items()}

    assert from_gradiend(checkpoint(weights)).dtype == torch.bfloat16


# ---- meaning -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "ours", "classes"),
    [
        ("factual", "factual", [["F", "M"]]),
        ("diff", "diff", [["F", "M"]]),
        # +1 is the class of the token read; of the text that is read it is the other one.
        ("alternative", "counterfactual", [["M", "F"]]),
    ],
)
def test_the_class_of_the_texts_that_encode_to_plus_one_stands_first(
    checkpoint, source, ours, classes
):
    config = from_gradiend(checkpoint(context={"source": source})).config

    assert config.source == ours
    assert config.target == "diff"
    assert config.feature_classes == classes


def test_the_source_of_the_training_overrides_that_of_the_context(checkpoint):
    training = training_with(0.9, source="alternative")

    config = from_gradiend(checkpoint(training=training)).config

    assert (config.source, config.feature_classes) == ("counterfactual", [["M", "F"]])


def test_a_direction_that_the_evaluation_found_reversed_is_turned(checkpoint, caplog):
    config = from_gradiend(checkpoint(training=training_with(-0.4))).config

    assert config.feature_classes == [["M", "F"]]
    assert caplog.records == []


@pytest.mark.parametrize("training", [training_with(None), {}], ids=["not_evaluated", "empty"])
def test_a_direction_that_nothing_has_checked_is_told(checkpoint, training, caplog):
    folder = checkpoint(training=training)
    if not training:
        (folder / "training.json").unlink()

    config = from_gradiend(folder).config

    assert config.feature_classes == [["F", "M"]]
    assert "flip_()" in caplog.text


@pytest.mark.parametrize("directions", [None, {}, {"F": 1}, {"F": 1, "X": 1, "M": -1}])
def test_classes_that_are_no_pair_are_not_named(checkpoint, directions):
    folder = checkpoint(context={"feature_class_encoding_direction": directions})

    assert from_gradiend(folder).config.feature_classes is None


@pytest.mark.parametrize(
    ("theirs", "ours"), [("mlm_mask_token", "masked"), ("clm_next_token", "causal"), ("auto", None)]
)
def test_objective_and_base_model_are_read(checkpoint, theirs, ours):
    config = from_gradiend(checkpoint(metadata={"prediction_objective": theirs})).config

    assert config.objective == ours
    assert config.base_model_name_or_path == "org/base"


# ---- the paper's first code --------------------------------------------------


class Base(nn.Module):
    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"one": nn.Linear(3, 2), "two": nn.Linear(2, 2)})


FIRST = {
    "input_dim": 10,
    "latent_dim": 1,
    "layers": ["body.one.weight", "body.two.weight"],
    "activation": "tanh",
    "activation_decoder": "id",
    "bias_decoder": False,
    "base_model": "org/base",
    "training": {"source": "inv_gradient", "target": "diff"},
}


@pytest.fixture
def first_code(tmp_path):
    """Function that writes a checkpoint of the paper's first code; linear layers or large ones."""

    def first_code(n=10, *, inner="", **fields):
        weights = {
            f"encoder.0.{inner}weight": numbers(1, n, seed=0),
            f"encoder.0.{inner}bias": numbers(1, seed=1),
            f"decoder.0.{inner}weight": numbers(n, 1, seed=2),
        }
        torch.save(weights, tmp_path / "pytorch_model.bin")
        write_json(tmp_path / "config.json", {**FIRST, "input_dim": n, **fields})
        return tmp_path

    return first_code


@pytest.mark.parametrize("inner", ["", "linear."])
def test_the_first_code_takes_its_shapes_from_the_base_model(first_code, inner):
    gradiend = from_gradiend(first_code(inner=inner), base_model=Base())

    x = numbers(10, seed=5)
    full = {"body.one.weight": x[:6].view(2, 3), "body.two.weight": x[6:].view(2, 2)}
    expected = torch.tanh(numbers(1, 10, seed=0) @ x + numbers(1, seed=1))
    torch.testing.assert_close(gradiend.encode(full), expected)
    assert gradiend.config.source == "counterfactual"
    assert gradiend.config.feature_classes is None
    assert gradiend.config.base_model_name_or_path == "org/base"


def test_names_of_the_first_code_may_lack_the_prefix_of_the_body(first_code):
    folder = first_code(layers=["one.weight", "two.weight"])

    assert from_gradiend(folder, base_model=Base()).names == ["one.weight", "two.weight"]


def test_the_first_code_takes_its_shapes_from_masks(first_code):
    masks = {
        "body.two.weight": torch.tensor([[True, False], [False, True]]),
        "body.one.weight": torch.tensor([[True, True, False], [False, False, False]]),
    }
    folder = first_code(4, layers_path="layers.pth")
    torch.save(masks, folder / "layers.pth")

    gradiend = from_gradiend(folder)

    decoder = numbers(4, 1, seed=2)[:, 0]
    decoded = gradiend.decode(1.0)
    assert torch.equal(decoded["body.two.weight"], torch.diag(decoder[:2]))
    assert torch.equal(decoded["body.one.weight"][0], torch.tensor([*decoder[2:], 0.0]))


@pytest.mark.parametrize("training", [{}, {"config": {"source": "gradient", "target": "diff"}}])
def test_the_sides_of_the_first_code_are_read_or_their_absence_is_told(
    first_code, training, caplog
):
    config = from_gradiend(first_code(training=training), base_model=Base()).config

    assert (config.source, config.target) == ("factual", "diff")
    assert bool(caplog.records) == (not training)


def test_the_first_code_without_shapes_asks_for_the_base_model(first_code):
    with pytest.raises(ConfigError, match=r"base_model, as .* without their shapes"):
        from_gradiend(first_code())


def test_another_base_model_is_refused(first_code):
    with pytest.raises(ConfigError, match=r"no parameter 'three'"):
        from_gradiend(first_code(layers=["three"]), base_model=Base())


# ---- refusals ----------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_pickle_with_code_is_refused_and_not_run(checkpoint, capsys):
    folder = checkpoint(safe=False)
    torch.save({"encoder.0.weight": Malicious()}, folder / "pytorch_model.bin")

    with pytest.raises(ConfigError, match="would run code that it brings along, which is refused"):
        from_gradiend(folder)

    assert "code was run" not in capsys.readouterr().out
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the control
    assert "code was run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    ["config.json", "gradiend_context.json", "model.safetensors", "mapping_masks.safetensors"],
)
def test_a_missing_file_is_named(checkpoint, name):
    folder = checkpoint()
    (folder / name).unlink()

    with pytest.raises(ConfigError, match=name) as caught:
        from_gradiend(folder)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_truncated_file_is_refused(checkpoint, safe):
    folder = checkpoint(safe=safe)
    file = folder / ("model.safetensors" if safe else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(ConfigError, match=file.name) as caught:
        from_gradiend(folder)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": {"activation_encoder": "gelu"}}, "'tanh' in the encoder"),
        ({"architecture": {"activation_decoder": "tanh"}}, "'id' in the decoder"),
        ({"architecture": {"input_dim": N + 1}}, "Expected 16 selected weights.* select 15"),
        ({"architecture": {"latent_dim": 2}}, r"'encoder.0.weight': \(2, 15\)"),
        ({"architecture": {"latent_dim": "1"}}, "'latent_dim' .* of type int"),
        ({"architecture": {"bias_decoder": False}}, "but got .*decoder.0.bias"),
        ({"metadata": {"prediction_objective": "clm_mlm_head"}}, "objective 'clm_mlm_head'"),
        ({"context": {"source": "both"}}, "'source' .* to be one of 'factual'"),
        ({"context": {"target": None}}, "'target' .* got None"),
        ({"context": {"feature_class_encoding_direction": [1]}}, "of type dict"),
        ({"training": {"training_args": {"source": ["diff"]}}}, "'source' .*training.json"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(checkpoint, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_gradiend(checkpoint(**settings))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1, 5, 6, 12], "positions from 0 to 11"),
        ([-1, 5, 6, 11], "positions from 0 to 11"),
        ([5, 1, 6, 11], "ascending"),
        ([1, 1, 6, 11], "ascending"),
        ([1.0, 5.0, 6.0, 11.0], "ascending"),
        ([1, 5, 6], "select 14"),
    ],
)
def test_broken_indices_are_refused(checkpoint, indices, message):
    folder = checkpoint()
    tensors = {"L1": torch.tensor(indices), "L3": torch.zeros(0, dtype=torch.int32)}
    save_file(tensors, folder / "mapping_indices.safetensors")

    with pytest.raises(ConfigError, match=message):
        from_gradiend(folder)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"L2": torch.ones(4, dtype=torch.uint8)}, r"mask of shape \(2, 2\)"),
        ({"L9": torch.ones(2, 2, dtype=torch.uint8)}, "the mask 'L2' of 'body.third.weight'"),
    ],
)
def test_broken_masks_are_refused(checkpoint, masks, message):
    folder = checkpoint()
    save_file(masks, folder / "mapping_masks.safetensors")

    with pytest.raises(ConfigError, match=message):
        from_gradiend(folder)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (None, "says what base-model weights"),
        ([], "'mapping' .* of type dict"),
        ({"param_map": {}}, "'param_map' .* of type list"),
        ({"param_map": ["name"]}, "'name' .* of type str"),
        ({"param_map": [{"name": "a", "shape": ["2"], "repr": "all"}]}, "whole numbers"),
        ({"param_map": [{"name": "a", "shape": [2], "repr": "some", "key": "L0"}]}, "'some'"),
    ],
)
def test_a_broken_mapping_is_refused(checkpoint, mapping, message):
    folder = checkpoint()
    change(folder / "config.json", mapping=mapping)

    with pytest.raises(ConfigError, match=message):
        from_gradiend(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_json_that_is_none_is_refused(checkpoint, content):
    folder = checkpoint()
    (folder / "config.json").write_text(content, "utf-8")

    with pytest.raises(ConfigError, match=r"JSON .*config.json"):
        from_gradiend(folder)


def test_a_folder_of_this_package_is_told_apart(gradiend_for, tiny_bert, tmp_path):
    gradiend_for(tiny_bert).save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match=r"loads with GradiendModel\.from_pretrained"):
        from_gradiend(tmp_path)


def test_a_tensor_file_of_something_else_is_refused(first_code):
    folder = first_code()
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")

    with pytest.raises(ConfigError, match="Expected tensors by name"):
        from_gradiend(folder, base_model=Base())


def test_hidden_layers_of_the_first_code_are_refused(first_code):
    folder = first_code()
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "encoder.2.weight": torch.zeros(1, 1)}, folder / "pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"encoder\.2\.weight"):
        from_gradiend(folder, base_model=Base())
