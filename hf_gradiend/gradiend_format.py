"""Reading GRADIENDs saved by the official package `gradiend` 0.2, or by the paper's first code."""

import logging
import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.errors import ConfigError, first_line_of
from hf_gradiend.files import read_object
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, SelectedParameter

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

# What PyTorch's restricted unpickler raises from bytes that are no pickle of its own, as found by
# trying some thousands of them.
BROKEN_FILE = (
    OSError, SafetensorError, RuntimeError, EOFError, LookupError, ValueError, TypeError,
    AttributeError, AssertionError, struct.error,
)  # fmt: skip
# Their word: ours. The first code of the paper named the sides by their gradients.
SIDES = {
    "factual": "factual",
    "alternative": "counterfactual",
    "diff": "diff",
    "gradient": "factual",
    "inv_gradient": "counterfactual",
    "counterfactual": "counterfactual",
}
# "auto" is settled while training and not written down: the base model's saved head decides.
OBJECTIVES = {"mlm_mask_token": "masked", "clm_next_token": "causal", "auto": None}


@dataclass(frozen=True)
class Description:
    """What the files beside the weights say of a GRADIEND.

    Args:
        entries: Covered parameters in the order of the weights; some may select nothing.
        n_weights: Number of selected weights, as stated.
        n_features: Number of encoder neurons.
        has_decoder_bias: Whether the decoder has a bias.
        settings: Further fields of a `GradiendConfig`.
    """

    entries: tuple[SelectedParameter, ...]
    n_weights: int
    n_features: int
    has_decoder_bias: bool
    settings: dict


def from_gradiend(
    folder: str | os.PathLike[str], *, base_model: PreTrainedModel | None = None
) -> GradiendModel:
    """Import a checkpoint of the package `gradiend` 0.2, or of the paper's first code.

    All tensors are taken over as they are, so encodings of gradients and decoded updates are those
    of the original. What +1 means is kept too: there it is the class of the token whose gradient
    the encoder reads, here the class of the text. With source counterfactual these are opposite
    classes, and the pair of names in `feature_classes` changes places; so it does where the
    checkpoint's own evaluation found it reversed. A warning tells where nothing was evaluated. A
    checkpoint of the first code names no classes, nor does one of several features:
    `feature_classes` is then `None`.

    Gradients of texts are this package's own. Those of masked models are the same; of causal models
    `gradiend` 0.2 takes them one token early, so that their encodings of texts differ.

    Args:
        folder: Folder with config.json and the weights.
        base_model: Base model of a checkpoint of the first code, whose files hold the shapes of
            the parameters only where it is pruned; not needed otherwise.

    Returns:
        The GRADIEND on the CPU, in the type of the weights, in evaluation mode.

    Raises:
        ConfigError: If a file is missing, broken or contradicts another, needs code to be run, or
            describes what a `GradiendModel` cannot be (another activation, another objective).

    References:
        https://github.com/aieng-lab/gradiend
    """
    place = Path(folder)
    config = _read_json(place / "config.json")
    if "architecture" in config:
        description = _describe(place, config)
    elif "input_dim" in config and "layers" in config:
        description = _describe_first_code(place, config, base_model)
    else:
        raise ConfigError(
            f"Expected a checkpoint of the package gradiend, whose config.json has 'architecture' "
            f"or 'layers', but that of {str(place)!r} has neither. A GRADIEND of this package "
            f"loads with GradiendModel.from_pretrained."
        )
    weights = _read_weights(place)
    _check_sizes(place, description, weights)
    return _build(description, weights)


def _describe(place: Path, config: dict) -> Description:
    file = place / "config.json"
    architecture = _field(config, "architecture", dict, file)
    if config.get("mapping") is None:
        raise ConfigError(
            f"Expected 'mapping' in {str(file)!r}, which says what base-model weights the GRADIEND "
            f"covers, but it is empty. Save it with gradiend's ParamMappedGradiendModel."
        )
    activation = architecture.get("activation_encoder", "tanh")
    _check_activations(file, activation, architecture.get("activation_decoder", "id"))
    n_features = _field(architecture, "latent_dim", int, file)
    context_file = place / "gradiend_context.json"
    context = _read_json(context_file)
    source = SIDES[_trained_source(place) or _side(context, "source", context_file)]
    directions = _section(context, "feature_class_encoding_direction", context_file)
    metadata = _section(config, "metadata", file)
    return Description(
        entries=tuple(_mapped_parameters(place, _field(config, "mapping", dict, file))),
        n_weights=_field(architecture, "input_dim", int, file),
        n_features=n_features,
        has_decoder_bias=architecture.get("bias_decoder", True),
        settings={
            "feature_classes": _feature_classes(place, directions, source, n_features),
            "source": source,
            "target": SIDES[_side(context, "target", context_file)],
            "objective": _objective(metadata, file),
            "base_model_name_or_path": metadata.get("base_model"),
        },
    )


def _describe_first_code(
    place: Path, config: dict, base_model: PreTrainedModel | None
) -> Description:
    file = place / "config.json"
    activation = config.get("activation")
    _check_activations(file, activation, config.get("activation_decoder") or activation)
    training = _section(config, "training", file)
    training = _section(training, "config", file) or training
    if not {"source", "target"} <= training.keys():
        logger.warning(
            "%s does not say which gradients the GRADIEND was trained on; taken to be gradient and "
            "diff, as its own code does.", file,
        )  # fmt: skip
    training = {"source": "gradient", "target": "diff", **training}
    settings = {side: SIDES[_side(training, side, file)] for side in ("source", "target")}
    base_model_name = config.get("base_model") or training.get("base_model")
    if "layers_path" in config:
        masks = _read_tensors(_named_file(place, config, "layers_path"))
        entries = [_masked(name, tuple(mask.shape), mask) for name, mask in masks.items()]
    elif base_model is not None:
        entries = list(_parameters_of(base_model, _field(config, "layers", list, file)))
    else:
        raise ConfigError(
            f"Expected a base_model, as {str(place)!r} names parameters without their shapes. "
            f"Load {base_model_name or 'the base model'!r} and pass it: "
            f"from_gradiend(folder, base_model=model)."
        )
    return Description(
        entries=tuple(entries),
        n_weights=_field(config, "input_dim", int, file),
        n_features=_field(config, "latent_dim", int, file),
        has_decoder_bias=config.get("bias_decoder", False),
        settings={**settings, "base_model_name_or_path": base_model_name},
    )


# ---- fields ------------------------------------------------------------------


def _check_activations(file: Path, encoder: object, decoder: object) -> None:
    if (str(encoder).lower(), str(decoder).lower()) != ("tanh", "id"):
        raise ConfigError(
            f"Expected a GRADIEND with activation 'tanh' in the encoder and 'id' in the decoder, "
            f"the only ones that a GradiendModel has, but {str(file)!r} says {encoder!r} and "
            f"{decoder!r}."
        )


def _side(values: Mapping, key: str, file: Path) -> str:
    if str(values.get(key)) not in SIDES:
        raise ConfigError(
            f"Expected {key!r} in {str(file)!r} to be one of {', '.join(map(repr, SIDES))}, but "
            f"got {values.get(key)!r}."
        )
    return values[key]


def _trained_source(place: Path) -> str | None:
    # gradiend_context.json of older checkpoints holds a constructor's default instead.
    file = place / "training.json"
    if not file.exists():
        return None
    arguments = _section(_read_json(file), "training_args", file)
    return None if arguments.get("source") is None else _side(arguments, "source", file)


def _feature_classes(
    place: Path, directions: Mapping, source: str, n_features: int
) -> list[list[str]] | None:
    named = [[name for name, sign in directions.items() if sign == s] for s in (+1, -1)]
    if n_features != 1 or any(len(names) != 1 for names in named):
        return None
    pair = [names[0] for names in named]
    correlation = _measured_correlation(place)
    if correlation is None:
        logger.warning(
            "%s names the classes %s and %s, but no evaluation has checked which of them encodes "
            "to +1 (gradiend cannot evaluate the source diff). Encode a few texts; if they come "
            "out reversed, call flip_().", place, *pair,
        )  # fmt: skip
    reverse = (source == "counterfactual") != (correlation is not None and correlation < 0)
    return [pair[::-1] if reverse else pair]


def _measured_correlation(place: Path) -> float | None:
    """Correlation of encodings and labels at the saved step, where it was evaluated."""
    file = place / "training.json"
    if not file.exists():
        return None
    training = _read_json(file)
    scores = _section(_section(training, "training_stats", file), "scores", file)
    best = _section(training, "best_score_checkpoint", file)
    score = scores.get(str(best.get("global_step")))
    return score if isinstance(score, float) else None


def _objective(metadata: Mapping, file: Path) -> str | None:
    objective = str(metadata.get("prediction_objective", "auto"))
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"Expected a GRADIEND of a masked or causal language model's own predictions, but "
            f"{str(file)!r} has the objective {objective!r}, for which this package has no base "
            f"models. It reads {', '.join(map(repr, OBJECTIVES))}."
        )
    return OBJECTIVES[objective]


# ---- which weights -----------------------------------------------------------


def _mapped_parameters(place: Path, mapping: dict) -> Iterator[SelectedParameter]:
    file = place / "config.json"
    read = {
        kind: _read_tensors(_named_file(place, mapping, key)) if key in mapping else {}
        for kind, key in (("indices", "indices_file"), ("mask", "masks_file"))
    }
    for entry in _field(mapping, "param_map", list, file):
        name = _field(entry, "name", str, file)
        shape = tuple(_field(entry, "shape", list, file))
        if not all(isinstance(length, int) for length in shape):
            raise ConfigError(f"Expected whole numbers as the shape of {name!r}, but got {shape}.")
        if entry.get("repr") == "all":
            yield SelectedParameter(name, shape)
            continue
        tensor = read.get(entry.get("repr", ""), {}).get(entry.get("key", ""))
        if tensor is None:
            raise ConfigError(
                f"Expected the indices or the mask {entry.get('key')!r} of {name!r} in the files "
                f"that {str(file)!r} names, but there is none for {entry.get('repr')!r}."
            )
        made = _masked if entry["repr"] == "mask" else _indexed
        yield made(name, shape, tensor)


def _masked(name: str, shape: tuple[int, ...], mask: Tensor) -> SelectedParameter:
    if tuple(mask.shape) != shape:
        raise ConfigError(
            f"Expected a mask of shape {shape} for {name!r}, but got {tuple(mask.shape)}."
        )
    return _indexed(name, shape, mask.flatten().nonzero().squeeze(-1))


def _indexed(name: str, shape: tuple[int, ...], indices: Tensor) -> SelectedParameter:
    entry = SelectedParameter(name, shape, indices.to(torch.int32))
    n_entries = entry.n_entries
    ordered = (
        indices.ndim == 1 and not indices.is_floating_point() and bool((indices.diff() > 0).all())
    )
    last = min(n_entries, 2**31) - 1  # what int32 holds
    if not ordered or (len(indices) and (indices[0] < 0 or indices[-1] > last)):
        raise ConfigError(
            f"Expected ascending positions from 0 to {last:,} as the indices of {name!r}, but got "
            f"others. The file is broken."
        )
    return SelectedParameter(name, shape) if len(indices) == n_entries else entry


def _parameters_of(base_model: PreTrainedModel, names: list) -> Iterator[SelectedParameter]:
    own = dict(base_model.named_parameters(remove_duplicate=False))
    prefix = f"{base_model.base_model_prefix}."
    for name in names:
        found = [n for n in (name, prefix + name, name.removeprefix(prefix)) if n in own]
        if not found:
            raise ConfigError(
                f"Expected the base model of the checkpoint, but {type(base_model).__name__} has "
                f"no parameter {name!r}."
            )
        yield SelectedParameter(name, tuple(own[found[0]].shape))


# ---- weights -----------------------------------------------------------------


def _read_weights(place: Path) -> dict[str, Tensor]:
    files = [place / "model.safetensors", place / "pytorch_model.bin"]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        raise ConfigError(
            f"Expected model.safetensors or pytorch_model.bin in {str(place)!r}, but there is "
            f"neither."
        )
    return {
        name.replace(".0.linear.", ".0."): tensor for name, tensor in _read_tensors(found).items()
    }


def _check_sizes(place: Path, description: Description, weights: dict[str, Tensor]) -> None:
    n, n_features = description.n_weights, description.n_features
    n_mapped = sum(entry.n_selected for entry in description.entries)
    if n_mapped != n:
        raise ConfigError(
            f"Expected {n:,} selected weights, the 'input_dim' of {str(place)!r}, but its "
            f"parameters select {n_mapped:,}."
        )
    expected = {
        "encoder.0.weight": (n_features, n),
        "encoder.0.bias": (n_features,),
        "decoder.0.weight": (n, n_features),
    }
    if description.has_decoder_bias:
        expected["decoder.0.bias"] = (n,)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        raise ConfigError(
            f"Expected the weights {expected}, as the configuration of {str(place)!r} says, but "
            f"got {found}."
        )


def _build(description: Description, weights: dict[str, Tensor]) -> GradiendModel:
    """Cut the weights into one tensor per parameter; takes them out of the dictionary."""
    selection = ParameterSelection(tuple(e for e in description.entries if e.n_selected))
    config = GradiendConfig(
        parameters=selection.to_config(),
        n_features=description.n_features,
        selection_fingerprint=selection.fingerprint,
        decoder_initialization="uniform",
        **description.settings,
    )
    encoder, decoder = weights.pop("encoder.0.weight"), weights.pop("decoder.0.weight").T
    bias = weights.pop("decoder.0.bias", encoder.new_zeros(())).expand(description.n_weights)
    state: dict[str, Tensor] = {"encoder.bias": weights.pop("encoder.0.bias")}
    start = 0
    for entry in selection:
        here = slice(start, start := start + entry.n_selected)
        shape = entry.values_shape
        # (n_features, n_selected) -> (n_features, *values_shape)
        state[f"encoder.weight.{entry.name}"] = _copy(encoder[:, here]).view(-1, *shape)
        state[f"decoder.weight.{entry.name}"] = _copy(decoder[:, here]).view(-1, *shape)
        state[f"decoder.bias.{entry.name}"] = _copy(bias[here]).view(shape)
        if entry.indices is not None:
            state[f"indices.{entry.name}"] = entry.indices
    with torch.device("meta"):
        gradiend = GradiendModel(config)
    gradiend.load_state_dict(state, assign=True)
    return gradiend.eval()


def _copy(tensor: Tensor) -> Tensor:
    # Tensors that share memory would be written to a file as one, or not at all.
    return tensor.clone(memory_format=torch.contiguous_format)


# ---- files -------------------------------------------------------------------


def _read_json(file: Path) -> dict:
    return read_object(file, "the JSON object of a GRADIEND checkpoint")


def _field(values: object, key: str, kind: type[Value], file: Path) -> Value:
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, kind):
        raise ConfigError(
            f"Expected {key!r} in {str(file)!r} to be of type {kind.__name__}, but got {value!r}."
        )
    return value


def _section(values: dict, key: str, file: Path) -> dict:
    return {} if values.get(key) is None else _field(values, key, dict, file)


def _named_file(place: Path, values: dict, key: str) -> Path:
    return place / Path(_field(values, key, str, place / "config.json")).name


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"Expected nothing but tensors in {str(file)!r}, but it is broken, or reading it would "
            f"run code that it brings along, which is refused."
        ) from error
    except BROKEN_FILE as error:
        raise ConfigError(
            f"Expected tensors in {str(file)!r}, but it cannot be read: {first_line_of(error)}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ConfigError(f"Expected tensors by name in {str(file)!r}, but got something else.")
    return dict(tensors)
