"""Finding an adapter's parameters in the files of a base model's checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.adapter.export.fidelity import Placed, placed_in
from hf_gradiend.adapter.values import resolved_file
from hf_gradiend.errors import BaseModelError, CompatibilityError, ConfigError, first_line_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The base model's card does not describe a merged model; the rest are weights in any format.
NOT_COPIED = (
    "README.md", ".*", "adapter_*", "*.safetensors*", "*.bin*", "*.pt*", "*.ckpt*", "*.h5*",
    "*.msgpack*", "*.gguf", "*.onnx*", "*.ot", "*.tflite", "*.npz",
)  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


class NotStreamableError(Exception):
    """A checkpoint cannot be edited file by file; the message says why."""


@dataclass(frozen=True)
class Stored:
    """A parameter of an adapter in a checkpoint.

    Args:
        placed: The parameter.
        file: Name of the file that holds it.
        key: Its key there.
        offset: Where its numbers start in the file, in bytes.
    """

    placed: Placed
    file: str
    key: str
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint, and where an adapter's parameters lie in them.

    Args:
        weights: safetensors files and their index, by the name to write them under.
        companions: Configuration, tokenizer and so on, in the same way.
        stored: The parameters.
    """

    weights: dict[str, Path]
    companions: dict[str, Path]
    stored: list[Stored]

    @classmethod
    def of(
        cls,
        adapter: GradiendAdapter,
        place: str,
        *,
        revision: str | None,
        token: str | bool | None,
    ) -> "Checkpoint":
        """The checkpoint in a folder or on the Hub.

        Args:
            adapter: The adapter.
            place: Folder or Hub id of the base model.
            revision: Branch, tag or commit on the Hub.
            token: Token for a private repository.

        Raises:
            BaseModelError: If there is no such place, or the model is quantised.
            NotStreamableError: If a parameter does not lie there as the loaded model has it.
        """  # noqa: DOC502 - raised by what it calls
        options = {"revision": revision, "token": token}
        folder = _folder(place, options)
        weights = _weight_files(place, options)
        stored = _find(adapter, _empty_model(adapter, folder), weights)
        companions = {
            file.name: file
            for file in folder.iterdir()
            if file.is_file() and not any(fnmatch(file.name, pattern) for pattern in NOT_COPIED)
        }
        return cls(weights, companions, stored)


def _folder(place: str, options: Mapping) -> Path:
    """The folder of a checkpoint; of one on the Hub, everything but weights is fetched.

    Raises:
        BaseModelError: If there is no such repository.
    """
    if Path(place).is_dir():
        return Path(place)
    try:
        return Path(snapshot_download(place, ignore_patterns=[*NOT_COPIED, "*/*"], **options))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise BaseModelError(
            f"Expected the Hub id or folder of a base model, but {place!r} could not be had: "
            f"{first_line_of(error)}"
        ) from error


def _weight_files(place: str, options: Mapping) -> dict[str, Path]:
    for name in (SINGLE_FILE, INDEX_FILE):  # in transformers' order
        try:
            file = resolved_file(place, name, "a base model", **options)
        except ConfigError:
            continue
        if name == SINGLE_FILE:
            return {name: file}
        shards = sorted(set(json.loads(file.read_text("utf-8"))["weight_map"].values()))
        found = {shard: resolved_file(place, shard, "a base model", **options) for shard in shards}
        return {name: file, **found}
    raise NotStreamableError(f"there is no {SINGLE_FILE} and no {INDEX_FILE}")


def _empty_model(adapter: GradiendAdapter, folder: Path) -> PreTrainedModel:
    """The base model without its weights, for its names, shapes and ties.

    Raises:
        BaseModelError: If it is quantised.
        NotStreamableError: If transformers cannot make it.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        quantized = getattr(config, "quantization_config", None) is not None
        masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        causal = adapter.config.task_type == "CAUSAL_LM" or not masked
        with torch.device("meta"):
            loader = AutoModelForCausalLM if causal else AutoModelForMaskedLM
            model = loader.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise NotStreamableError(first_line_of(error)) from error
    if quantized:
        raise BaseModelError(
            f"Expected a base model in float32, bfloat16 or float16 to merge into, but "
            f"{str(folder)!r} is quantised. Name the model that it was made from as the base model."
        )
    return model


def _find(
    adapter: GradiendAdapter, model: PreTrainedModel, weights: Mapping[str, Path]
) -> list[Stored]:
    entries: dict[str, tuple[str, dict]] = {}
    for name, file in weights.items():
        if name != INDEX_FILE:
            entries |= {key: (name, entry) for key, entry in _entries(file).items()}
    try:
        all_placed = placed_in(adapter, model)
    except CompatibilityError as error:
        raise NotStreamableError(first_line_of(error)) from error
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    transforms = get_model_conversion_mapping(model)
    found: list[Stored] = []
    for placed in all_placed:
        key = _key(aliases[id(placed.parameter)], model.base_model_prefix, entries)
        file, entry = entries[key]
        if tuple(entry["shape"]) != tuple(placed.parameter.shape) or entry["dtype"] not in FLOATS:
            raise NotStreamableError(f"{key} is {entry['dtype']} of shape {entry['shape']} there")
        if any(transform.rename_source_key(key)[1] is not None for transform in transforms):
            raise NotStreamableError(f"transformers converts {key} when it loads it")
        found.append(Stored(placed, file, key, entry["offset"]))
    return found


def _key(names: list[str], prefix: str, entries: Mapping) -> str:
    """The key of a parameter, which a checkpoint of a body or of a model with a head may hold.

    Raises:
        NotStreamableError: If there is not exactly one.
    """
    spellings = {
        spelling
        for name in names
        for spelling in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    }
    keys = sorted(spellings & entries.keys())
    if len(keys) != 1:
        lies = "lies there as " + " and ".join(keys) if keys else "does not lie there by its name"
        raise NotStreamableError(f"{names[0]} {lies}")
    return keys[0]


def _entries(file: Path) -> dict[str, dict]:
    """Type, shape and place of each tensor in a safetensors file, by key.

    Raises:
        BaseModelError: If the file is broken.

    References:
        https://github.com/huggingface/safetensors#format
    """
    try:
        with safe_open(file, framework="pt"), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"Expected a safetensors file, but {str(file)!r} is broken: {first_line_of(error)}. "
            f"Download it again."
        ) from error
    header.pop("__metadata__", None)
    return {
        key: {**entry, "offset": 8 + length + entry["data_offsets"][0]}
        for key, entry in header.items()
    }
