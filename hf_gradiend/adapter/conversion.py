"""An adapter outside of any model: made from a GRADIEND, saved, loaded, applied."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_gradiend.adapter.config import GradiendAdapterConfig
from hf_gradiend.adapter.values import (
    ADAPTER_FILE,
    AdapterFile,
    AdapterValues,
    key_of,
    resolved_file,
)
from hf_gradiend.base_models import trainability_kept
from hf_gradiend.edits import Update, check_decoder, chosen_edit
from hf_gradiend.errors import ConfigError, first_line_of
from hf_gradiend.files import writable_folder
from hf_gradiend.modeling_gradiend import GradiendModel, package_module
from hf_gradiend.parameters import SelectedParameter, selection_of


@dataclass(frozen=True, eq=False)
class GradiendAdapter:
    """An adapter outside of any model: its configuration and its values.

    Args:
        config: Configuration.
        values: Values of each parameter, keyed by its name in the configuration.

    Example:
        ```py
        gradiend = GradiendModel.from_pretrained("org/gradiend-bert-gender")
        adapter = gradiend.to_adapter(feature_factor=0.1, step_size=0.004, top_k=0.01)
        adapter.save_pretrained("gradiend-bert-gender-adapter")
        model = adapter.apply_to(base_model)  # a PeftModel
        ```
    """

    config: GradiendAdapterConfig
    values: Mapping[str, AdapterValues]

    @classmethod
    def from_gradiend(
        cls,
        gradiend: GradiendModel,
        feature_factor: float | Sequence[float] | None = None,
        step_size: float | None = None,
        *,
        strength: float = 1.0,
        top_k: float | None = None,
        dtype: torch.dtype | None = None,
        adjustable: bool | None = None,
    ) -> "GradiendAdapter":
        """An adapter of a GRADIEND in memory; see `GradiendModel.to_adapter`.

        Raises:
            ConfigError: If no edit is given and none was chosen, or a number is not allowed.
            NumericalError: If the decoder holds NaN or infinity.
            SelectionError: If `top_k` is outside (0, 1].
        """  # noqa: DOC502 - raised by what it calls
        h, alpha = chosen_edit(gradiend.config, feature_factor, step_size)
        numbers = torch.as_tensor(h, dtype=torch.float64).reshape(-1).tolist()
        check_decoder(gradiend)
        selection = selection_of(gradiend)
        updates = {
            name: Update(
                gradiend.decoder.weight.at(name).detach(),
                gradiend.decoder.bias.at(name).detach(),
                numbers,
                1.0,
            )
            for name in selection.names
        }
        kept, positions = selection, {}
        if top_k is not None:
            kept = selection.top_k(_Sizes(updates), fraction=top_k)
            positions = kept.positions_in(selection)
        adjustable = top_k is None if adjustable is None else adjustable
        dtype = dtype or next(iter(updates.values())).bias.dtype
        values = {
            entry.name: _values_of(
                updates[entry.name], entry, positions.get(entry.name), dtype, adjustable=adjustable
            )
            for entry in kept
        }
        config = GradiendAdapterConfig.of_gradiend(
            gradiend.config, numbers, alpha,
            values=values, dtype=dtype, strength=strength, adjustable=adjustable,
        )  # fmt: skip
        config.selection_fingerprint = kept.fingerprint
        config.gradiend_name_or_path = gradiend.config.name_or_path or None
        return cls(config, values)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "GradiendAdapter":
        """An adapter from its folder or Hub id; values are read when they are asked for.

        Args:
            name_or_path: Folder or Hub id.
            revision: Branch, tag or commit on the Hub.
            token: Token for a private repository.

        Raises:
            ConfigError: If there is no GRADIEND adapter at that place, or its file is broken.
        """
        place = os.fspath(name_or_path)
        try:
            config = PeftConfig.from_pretrained(place, revision=revision, token=token)
        except (ValueError, KeyError, OSError) as error:
            raise ConfigError(
                f"Expected the folder or Hub id of an adapter, but {place!r} could not be loaded: "
                f"{first_line_of(error)}"
            ) from error
        if not isinstance(config, GradiendAdapterConfig):
            raise ConfigError(
                f"Expected a GRADIEND adapter, but {place!r} is one of type {config.peft_type}."
            )
        file = resolved_file(
            place, ADAPTER_FILE, "a GRADIEND adapter", revision=revision, token=token
        )
        return cls(config, AdapterFile(file, config.parameters, config.n_features))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json and adapter_model.safetensors.

        Interrupted, it leaves a folder without adapter_config.json or with the earlier adapter.

        Args:
            save_directory: Folder to write to; made where it does not exist.

        Raises:
            OutputError: If the folder cannot be written to.
        """  # noqa: DOC502 - raised by writable_folder
        folder = writable_folder(save_directory)
        tensors = {
            key_of(name, kind): tensor.detach().cpu().contiguous()
            for name, values in self.values.items()
            for kind, tensor in values.packed().items()
        }
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as temporary:
            save_file(tensors, Path(temporary) / ADAPTER_FILE, metadata={"format": "pt"})
            self.config.save_pretrained(temporary)
            for name in (ADAPTER_FILE, "adapter_config.json"):
                (Path(temporary) / name).replace(folder / name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        report: Mapping[str, object] | str | os.PathLike[str] | None = None,
        **options: object,
    ) -> CommitInfo:
        """Push the adapter in one commit, with a card and report.json where a report is given.

        Args:
            repo_id: Repository, `"org/name"`; made where it does not exist.
            report: Content or path of report.json; `None` pushes no card.
            **options: `private`, `revision`, `create_pr`, `commit_message` and `token`, as in
                `PreTrainedModel.push_to_hub`.

        Returns:
            The commit, or what is said in its place where nothing changed.

        Raises:
            ConfigError: If the report is not one, or the repository's name is not allowed.
            OutputError: If the Hub refuses.
        """  # noqa: DOC502 - raised by push_adapter
        hub = package_module("hub")
        return hub.push_adapter(self, hub.PushOptions(repo_id, **options), report=report)

    def apply_to(self, base_model: PreTrainedModel, adapter_name: str = "default") -> PeftModel:
        """Put the adapter into a base model.

        Args:
            base_model: Base model; it gets the adapter's layers, its weights stay frozen.
            adapter_name: Name of the adapter in the model.

        Returns:
            A `PeftModel` around the base model.

        Raises:
            CompatibilityError: If the adapter was made for another base model.
            BaseModelError: If weights of the base model are offloaded or quantised.
        """  # noqa: DOC502 - raised by the tuner
        own_name = base_model.name_or_path or self.config.base_model_name_or_path
        config = replace(self.config, base_model_name_or_path=own_name)  # or peft warns
        config.values = self.values
        return get_peft_model(base_model, config, adapter_name=adapter_name)  # pyright: ignore[reportReturnType]

    @contextmanager
    def applied(self, base_model: PreTrainedModel) -> Iterator[PeftModel]:
        """Context in which a base model carries the adapter; afterwards it is as it was before.

        Args:
            base_model: Base model; its weights are edited in place meanwhile.

        Yields:
            A `PeftModel` around the base model.

        Raises:
            CompatibilityError: If the adapter was made for another base model.
            BaseModelError: If weights of the base model are offloaded or quantised.
        """  # noqa: DOC502 - raised by apply_to
        with trainability_kept(base_model):
            model = self.apply_to(base_model)
            try:
                yield model
            finally:
                model.unload()  # pyright: ignore[reportCallIssue] - the tuner's

    def update(self, name: str) -> Tensor:
        """What the adapter adds to a parameter, strength·α·(h·W_d + b_d).

        Args:
            name: Name of the parameter in the configuration.

        Returns:
            float32 tensor of the parameter's shape, zero where a sparse adapter has no value.
        """
        entry = next(entry for entry in self.config.parameters if entry["name"] == name)
        values = self.values[name]
        scale = self.config.strength * self.config.step_size
        update = Update(values.weight, values.bias, self.config.feature_factor, scale)
        selected = SelectedParameter(name, tuple(entry["shape"]), values.indices)
        return selected.scatter(update.values().view(selected.values_shape))


class _Sizes(Mapping[str, Tensor]):
    """The values of updates, computed when they are asked for: all at once they are a model."""

    def __init__(self, updates: Mapping[str, Update]) -> None:
        self.updates = updates

    def __getitem__(self, name: str) -> Tensor:
        update = self.updates[name]
        return update.values().view_as(update.bias)

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


def _values_of(
    update: Update,
    entry: SelectedParameter,
    positions: Tensor | None,
    dtype: torch.dtype,
    *,
    adjustable: bool,
) -> AdapterValues:
    weight = update.weight if adjustable else None
    bias = update.bias if adjustable else update.values().view_as(update.bias)
    if positions is not None:
        at = positions.to(bias.device)
        bias = bias.reshape(-1)[at]
        weight = None if weight is None else weight.reshape(len(weight), -1)[:, at]
    weight = None if weight is None else weight.to(dtype)
    return AdapterValues(weight, bias.to(dtype), entry.indices)
