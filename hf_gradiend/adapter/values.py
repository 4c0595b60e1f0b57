"""An adapter's values of each parameter, and the files that they lie in."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.errors import ConfigError, first_line_of
from hf_gradiend.parameters import pack_indices, unpack_indices

ADAPTER_FILE = "adapter_model.safetensors"

LAYER_NAME = "gradiend"  # of the layer in the module that owns the weights
WEIGHT, BIAS, GAPS = (  # kinds of tensors in it
    "gradiend_decoder_weight",
    "gradiend_decoder_bias",
    "gradiend_index_gaps",
)


@dataclass(frozen=True, eq=False)
class AdapterValues:
    """What an adapter holds for one base-model parameter.

    Args:
        weight: W_d of shape `(n_features, *values_shape)`; `None` where h is fixed.
        bias: b_d of shape `values_shape`, or h·W_d + b_d where h is fixed.
        indices: Sorted flat indices `(k,)` of the values; `None` where there is one per entry.
    """

    weight: Tensor | None
    bias: Tensor
    indices: Tensor | None = None

    def packed(self) -> dict[str, Tensor]:
        """The tensors as a layer and a file hold them, keyed by their kind."""
        tensors = {BIAS: self.bias}
        if self.weight is not None:
            tensors[WEIGHT] = self.weight
        if self.indices is not None:
            tensors[GAPS] = pack_indices(self.indices)
        return tensors


def key_of(name: str, kind: str) -> str:
    """Key in adapter_model.safetensors of one kind of values of a parameter.

    Args:
        name: Name of the parameter in the base model.
        kind: `WEIGHT`, `BIAS` or `GAPS`.
    """
    module, _, leaf = f"base_model.model.{name}".rpartition(".")
    return f"{module}.{LAYER_NAME}.{kind}.{leaf}"


def entry_of(name: str, shape: tuple[int, ...], values: AdapterValues) -> dict:
    """The parameter's entry in a `GradiendAdapterConfig`."""
    gaps = values.packed().get(GAPS)
    return {
        "name": name,
        "shape": list(shape),
        "n_selected": None if gaps is None else values.bias.numel(),
        "index_bytes": None if gaps is None else len(gaps),
    }


class GradiendFiles(Mapping[str, AdapterValues]):
    """The decoder of a saved GRADIEND, read tensor by tensor when it is asked for.

    Args:
        name_or_path: Folder or Hub id of the GRADIEND.
        revision: Branch, tag or commit on the Hub.
        token: Token for a private repository.

    Raises:
        ConfigError: If there is no GRADIEND at that place, or a file is missing or broken.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        self.place = os.fspath(name_or_path)
        self.options = {"revision": revision, "token": token}
        content = self._file("config.json").read_text("utf-8")
        try:
            self.config: GradiendConfig = GradiendConfig.from_dict(json.loads(content))
        except (ValueError, AttributeError) as error:  # not JSON, not an object, or another model's
            raise ConfigError(
                f"Expected the folder or Hub id of a GRADIEND, but {self.place!r} holds another "
                f"config.json: {first_line_of(error)}"
            ) from error
        self.shapes = {e["name"]: tuple(e["shape"]) for e in self.config.parameters}
        self.sparse = {e["name"] for e in self.config.parameters if e["n_selected"] is not None}
        try:
            index = self._file("model.safetensors.index.json")
        except ConfigError:
            self.shards = None
        else:
            self.shards = json.loads(index.read_text("utf-8"))["weight_map"]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoder's numbers."""
        return self._read(f"decoder.bias.{next(iter(self))}").dtype

    def __getitem__(self, name: str) -> AdapterValues:
        indices = self._read(f"indices.{name}") if name in self.sparse else None
        return AdapterValues(
            self._read(f"decoder.weight.{name}"), self._read(f"decoder.bias.{name}"), indices
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _read(self, key: str) -> Tensor:
        file = self._file("model.safetensors" if self.shards is None else self.shards[key])
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(key)
        except SafetensorError as error:
            raise ConfigError(
                f"Expected the tensor {key!r} in the GRADIEND {self.place!r}, but its file is "
                f"broken: {first_line_of(error)}. Save or download it again."
            ) from error

    def _file(self, name: str) -> Path:
        return resolved_file(self.place, name, "a GRADIEND", **self.options)


def resolved_file(
    place: str, name: str, what: str, *, revision: str | None, token: str | bool | None
) -> Path:
    """A file in a folder, or of a repository on the Hub (from the cache where it is there).

    Raises:
        ConfigError: If there is no such file.
    """
    file = Path(place) / name
    if Path(place).is_dir():
        if file.is_file():
            return file
        raise ConfigError(f"Expected the folder or Hub id of {what}, but {place!r} has no {name}.")
    try:
        return Path(hf_hub_download(place, name, revision=revision, token=token))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"Expected the folder or Hub id of {what}, but {name} of {place!r} could not be had: "
            f"{first_line_of(error)}"
        ) from error


class AdapterFile(Mapping[str, AdapterValues]):
    """The values in an adapter's file, read when they are asked for.

    Args:
        file: adapter_model.safetensors.
        entries: The parameters' entries in the configuration.
        n_features: Number of features; 0 where h is fixed.

    Raises:
        ConfigError: If the file is broken, or tensors are missing.
    """

    def __init__(self, file: Path, entries: list[dict], n_features: int) -> None:
        self.file = file
        self.kinds: dict[str, list[str]] = {
            entry["name"]: [
                BIAS,
                *([WEIGHT] if n_features else []),
                *([GAPS] if entry["n_selected"] is not None else []),
            ]
            for entry in entries
        }
        try:
            with safe_open(file, framework="pt") as tensors:
                present = set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"Expected an adapter's values in {str(file)!r}, but the file is broken: "
                f"{first_line_of(error)}. Save or download it again."
            ) from error
        keys = [key_of(name, kind) for name, kinds in self.kinds.items() for kind in kinds]
        missing = [key for key in keys if key not in present]
        if missing:
            raise ConfigError(
                f"Expected all tensors of the adapter in {str(file)!r}, but {len(missing):,} are "
                f"missing, for instance {missing[0]!r}."
            )

    def __getitem__(self, name: str) -> AdapterValues:
        with safe_open(self.file, framework="pt") as tensors:
            held = {kind: tensors.get_tensor(key_of(name, kind)) for kind in self.kinds[name]}
        gaps = held.get(GAPS)
        indices = None if gaps is None else unpack_indices(gaps)
        return AdapterValues(held.get(WEIGHT), held[BIAS], indices)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)
