"""The GRADIEND encoder-decoder as a transformers model.

Self-contained (torch, transformers and the configuration only), so that it loads with
`trust_remote_code` alone. Methods that touch a base model are thin and need the package.
"""

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from .configuration_gradiend import GradiendConfig  # noqa: TID252 - remote code knows no package


@dataclass
class GradiendOutput(ModelOutput):
    """Output of `GradiendModel.forward`.

    Args:
        loss: Mean squared error between decoded and target values, mean over n; `None` without
            targets.
        encodings: h of shape `(*batch, n_features)`, in [−1, 1].
        updates: dec(h), one tensor of shape `(*batch, *shape)` per base parameter.
    """

    loss: Tensor | None = None
    encodings: Tensor | None = None
    updates: dict[str, Tensor] | None = None


class TensorTree(nn.Module):
    """Tensors under dotted names, as a tree of modules: state-dict keys mirror the base model.

    Args:
        bound: Tensors of this tree are initialised uniformly in ±bound; 0 gives zeros.
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.initial_bound = bound

    def put(self, name: str, tensor: Tensor) -> None:
        """Hold a parameter or (where it is not an `nn.Parameter`) a persistent buffer."""
        *path, leaf = name.split(".")
        node: nn.Module = self
        for part in path:
            # Written to the dictionaries directly: add_module refuses names that nn.Module itself
            # has as attributes ("type", "half"), which a base model may well use.
            inner = node._modules.get(part)
            if inner is None:
                inner = node._modules[part] = TensorTree(self.initial_bound)
            node = inner
        if isinstance(tensor, nn.Parameter):
            node._parameters[leaf] = tensor
        else:
            node._buffers[leaf] = tensor

    def at(self, name: str) -> Tensor:
        """The tensor under a dotted name."""
        *path, leaf = name.split(".")
        node: nn.Module = self
        for part in path:
            node = node._modules[part]  # pyright: ignore[reportAssignmentType]
        held = node._parameters if leaf in node._parameters else node._buffers
        return held[leaf]  # pyright: ignore[reportReturnType]


class Encoder(nn.Module):
    """Encoder weights of shape `(n_features, *values_shape)` and biases `(n_features,)`."""

    def __init__(self, bound: float, n_features: int) -> None:
        super().__init__()
        self.initial_bound = bound
        self.weight = TensorTree(bound)
        self.bias = nn.Parameter(torch.empty(n_features))


class Decoder(nn.Module):
    """Decoder weights of shape `(n_features, *values_shape)` and biases `values_shape`."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.weight = TensorTree(bound)
        self.bias = TensorTree(bound)


class GradiendModel(PreTrainedModel):
    """A one-neuron (or `n_features`-neuron) encoder-decoder over a base model's gradients.

    The encoder reads h = tanh(W_e·x + b_e) from a gradient x; the decoder gives the update
    dec(h) = h·W_d + b_d, one tensor per base parameter. The class that the configuration names
    first encodes to +1.

    Args:
        config: Layout and origin. A GRADIEND of a whole model is made by `GradiendTrainer`.

    References:
        Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 3.
    """

    config: GradiendConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = GradiendConfig
    base_model_prefix = "gradiend"
    main_input_name = "gradients"
    _no_split_modules: set[str] | list[str] | None = []  # noqa: RUF012 - transformers' own form

    def __init__(self, config: GradiendConfig) -> None:
        super().__init__(config)
        self.model_tags = ["gradiend"]
        bound = max(config.n_selected, 1) ** -0.5
        self.encoder = Encoder(bound, config.n_features)
        self.decoder = Decoder(0.0 if config.decoder_initialization == "zeros" else bound)
        self.indices = TensorTree(0.0)
        for entry in config.parameters:
            name, n_kept = entry["name"], entry["n_selected"]
            values_shape = tuple(entry["shape"]) if n_kept is None else (n_kept,)
            weight_shape = (config.n_features, *values_shape)
            self.encoder.weight.put(name, nn.Parameter(torch.empty(weight_shape)))
            self.decoder.weight.put(name, nn.Parameter(torch.empty(weight_shape)))
            self.decoder.bias.put(name, nn.Parameter(torch.empty(values_shape)))
            if n_kept is not None:
                self.indices.put(name, torch.zeros(n_kept, dtype=torch.int32))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Each module fills its own tensors: transformers visits just those with missing keys.
        bound = getattr(module, "initial_bound", 0.0)
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.uniform_(-bound, bound) if bound else parameter.zero_()
        for indices in module.buffers(recurse=False):
            if not getattr(indices, "_is_hf_initialized", False):
                indices.fill_(-1)  # no such entry: indices that never came raise on use

    def get_submodule(self, target: str) -> nn.Module:
        """The submodule at a dotted path, also where a base name is an attribute of `nn.Module`.

        Raises:
            AttributeError: If there is none.
        """
        module: nn.Module = self
        for part in target.split(".") if target else []:
            found = module._modules.get(part)
            if found is None:
                raise AttributeError(f"{type(module).__name__} has no submodule {part!r}")
            module = found
        return module

    @property
    def names(self) -> list[str]:
        """Names of the base parameters, in order."""
        return [entry["name"] for entry in self.config.parameters]

    def encode(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Encodings of gradients.

        Args:
            gradients: One tensor per base parameter, of the parameter's shape `(*batch, *shape)`;
                for a sparse GRADIEND the selected values `(*batch, k)` serve as well.

        Returns:
            h of shape `(*batch, n_features)`, in [−1, 1], float32.

        Raises:
            ValueError: If a gradient is missing or has another shape, or batch shapes differ.
        """
        projection: Tensor | None = None
        # The n-long products stay in float32: bfloat16 autocast would lose the third digit.
        with torch.autocast(self.device.type, enabled=False):
            for entry in self.config.parameters:
                weight = self.encoder.weight.at(entry["name"]).float()
                values, batch = self._values(entry, gradients)
                flat = values.to(weight.device, torch.float32).reshape(*batch, -1)
                part = (
                    flat @ weight.reshape(self.config.n_features, -1).T
                )  # -> (*batch, n_features)
                if projection is not None and projection.shape != part.shape:
                    raise ValueError(
                        f"Expected gradients of one batch shape, but {entry['name']!r} has "
                        f"{batch} where those before it have {tuple(projection.shape[:-1])}."
                    )
                projection = part if projection is None else projection + part
            if projection is None:
                raise ValueError("This GRADIEND covers no parameters; it cannot encode.")
            return torch.tanh(projection + self.encoder.bias.float())

    def decode(self, feature_factor: float | Sequence[float] | Tensor = 0.0) -> dict[str, Tensor]:
        """Decoded update dec(h) = h·W_d + b_d, in the unit of the gradient.

        Args:
            feature_factor: h, one number for a single feature, otherwise `(*batch, n_features)`.

        Returns:
            One full tensor of shape `(*batch, *shape)` per base parameter, zero where a sparse
            GRADIEND selects nothing.

        Raises:
            ValueError: If the last dimension is not n_features.
        """
        h = torch.as_tensor(feature_factor, dtype=torch.float32, device=self.device)
        h = h.unsqueeze(0) if h.ndim == 0 else h
        if h.shape[-1] != self.config.n_features:
            raise ValueError(
                f"Expected a feature factor of {self.config.n_features} numbers, one per feature, "
                f"but got shape {tuple(h.shape)}."
            )
        return {
            entry["name"]: self._scatter(entry, self._decoded_values(entry["name"], h))
            for entry in self.config.parameters
        }

    def forward(
        self, gradients: Mapping[str, Tensor], targets: Mapping[str, Tensor] | None = None
    ) -> GradiendOutput:
        """Encode source gradients, decode them, and compare with target gradients.

        Args:
            gradients: Source gradients as in `encode`.
            targets: Target gradients in the same form.

        Returns:
            Encodings, updates and, with targets, the mean squared error over all n values.

        Raises:
            ValueError: If a gradient is missing or has another shape.
        """  # noqa: DOC502 - raised by _values
        h = self.encode(gradients)
        decoded = {name: self._decoded_values(name, h) for name in self.names}
        loss: Tensor | None = None
        if targets is not None:
            total = h.new_zeros(())
            for entry in self.config.parameters:
                values, batch = self._values(entry, targets)
                target = values.reshape(*batch, *self.decoder.bias.at(entry["name"]).shape)
                total = total + (decoded[entry["name"]] - target.to(total.device)).square().sum()
            count = self.config.n_selected * max(1, h.numel() // self.config.n_features)
            loss = total / count
        updates = {
            entry["name"]: self._scatter(entry, decoded[entry["name"]])
            for entry in self.config.parameters
        }
        return GradiendOutput(loss=loss, encodings=h, updates=updates)

    @torch.no_grad()
    def flip_(self, features: Sequence[int] | None = None) -> None:
        """Reverse the sign of features in place: negates W_e, b_e and W_d, and leaves b_d.

        The autoencoder dec∘enc is unchanged; encodings change sign.

        Args:
            features: Which features to flip; `None` flips all.
        """
        chosen = list(range(self.config.n_features)) if features is None else list(features)
        self.encoder.bias[chosen] *= -1
        for name in self.names:
            self.encoder.weight.at(name)[chosen] *= -1
            self.decoder.weight.at(name)[chosen] *= -1

    @torch.no_grad()
    def energy_by_parameter(
        self, feature_factor: float | Sequence[float] | None = None
    ) -> dict[str, float]:
        """Squared norm of each base parameter's part of the decoder direction h·W_d.

        Args:
            feature_factor: h, one number per feature; `None` for ones.

        Returns:
            Squared Euclidean norms, keyed by base parameter name.
        """
        factors = [1.0] * self.config.n_features if feature_factor is None else feature_factor
        h = torch.as_tensor(factors, dtype=torch.float32, device=self.device).reshape(-1)
        return {
            name: float(torch.tensordot(h, self.decoder.weight.at(name).float(), 1).square().sum())
            for name in self.names
        }

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        include_code: bool = False,
        **kwargs: object,
    ) -> None:
        """Write config.json and (sharded) safetensors, all or nothing, as `replace_files` says.

        Args:
            save_directory: Folder to write to; made where it does not exist.
            max_shard_size: Largest size of one file.
            include_code: Add the two Python files that let people load with `trust_remote_code`
                without the package.
            **kwargs: Forwarded to `PreTrainedModel.save_pretrained`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as temporary:
            super().save_pretrained(temporary, max_shard_size=max_shard_size, **kwargs)  # pyright: ignore[reportArgumentType]
            if include_code:
                self._add_code(Path(temporary))
            replace_files(Path(temporary), folder)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: object,
        **kwargs: object,
    ) -> "GradiendModel":
        """A GRADIEND from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            *model_args: Forwarded to `PreTrainedModel.from_pretrained`.
            **kwargs: Likewise: `revision`, `token`, `cache_dir`, `dtype`, `device_map`, ….

        Returns:
            The GRADIEND in evaluation mode.

        Raises:
            OSError: If there is no such place, or its weights are broken or incomplete.
            ValueError: If it holds another kind of model, or a broken configuration.
        """
        wants_info = bool(kwargs.pop("output_loading_info", False))
        kwargs.setdefault("use_safetensors", True)  # never a pickle
        try:
            model, info = super().from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                **kwargs,  # pyright: ignore[reportArgumentType] - forwarded as they came
            )
        except SafetensorError as error:
            raise OSError(
                f"Expected the weights of a GRADIEND in {str(pretrained_model_name_or_path)!r}, "
                f"but a file is broken: {error}. Save, push or download it again."
            ) from error
        except ValueError as error:
            place = str(pretrained_model_name_or_path)
            raise ValueError(f"{place!r} cannot be loaded as a GRADIEND: {error}") from error
        # transformers would draw missing weights at random, and warn.
        missing = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
        if missing:
            raise OSError(
                f"Expected all weights of a GRADIEND in {str(pretrained_model_name_or_path)!r}, "
                f"but {len(missing):,} are missing or of another shape, for instance {missing[0]}. "
                f"Save, push or download it again."
            )
        return (model, info) if wants_info else model  # pyright: ignore[reportReturnType]

    def push_to_hub(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        repo_id: str,
        *,
        report: Mapping[str, object] | str | os.PathLike[str] | None = None,
        include_code: bool = False,
        max_shard_size: int | str = "5GB",
        **options: object,
    ) -> CommitInfo:
        """Push in one commit, with a card and report.json where a report is given.

        Args:
            repo_id: Repository, `"org/name"`; made where it does not exist.
            report: Content or path of report.json; `None` leaves the repository's card as it is.
            include_code: Add the two Python files that let people load with `trust_remote_code`
                without the package.
            max_shard_size: Largest size of one file.
            **options: `private`, `revision` (a branch), `create_pr`, `commit_message` and `token`,
                as in `PreTrainedModel.push_to_hub`.

        Returns:
            The commit, or the last one where nothing changed.
        """
        hub = package_module("hub")
        return hub.push_gradiend(
            self,
            hub.PushOptions(repo_id, **options),
            report=report,
            include_code=include_code,
            max_shard_size=max_shard_size,
        )

    def _add_code(self, folder: Path) -> None:
        here = Path(__file__).parent
        for file in ("configuration_gradiend.py", "modeling_gradiend.py"):
            shutil.copyfile(here / file, folder / file)
        config = GradiendConfig.from_dict(self.config.to_dict())
        config.auto_map = {
            "AutoConfig": "configuration_gradiend.GradiendConfig",
            "AutoModel": "modeling_gradiend.GradiendModel",
        }
        config.architectures = [type(self).__name__]
        config.save_pretrained(folder)

    @classmethod
    def from_gradiend(
        cls, folder: str | os.PathLike[str], *, base_model: PreTrainedModel | None = None
    ) -> "GradiendModel":
        """Import a checkpoint of the official package `gradiend` 0.2, or of the paper's first code.

        Args:
            folder: Folder with config.json and the weights.
            base_model: Base model of a checkpoint of the first code that is not pruned: its files
                do not hold the parameters' shapes. Not needed otherwise.

        Returns:
            The GRADIEND, with the original's encodings of gradients and decoded updates.
        """
        return package_module("gradiend_format").from_gradiend(folder, base_model=base_model)

    # ---- with a base model: thin, the package does the work -------------------------------------

    def encode_texts(
        self,
        base_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        dataset: Iterable[Mapping[str, str]],
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Encodings of texts, by forward-mode differentiation; the base model is left as it was.

        Args:
            base_model: Base model that this GRADIEND was made for.
            processing_class: Its tokenizer.
            dataset: Feature data set (`text` with the slot `[TARGET]`, `factual`,
                `counterfactual`).
            batch_size: Texts per forward pass.
            max_length: Longest input in tokens; `None` for the model's limit, at most 256.
            progress: Show a progress bar.

        Returns:
            h of shape `(texts, n_features)` in the order of the data set, float32. A text without
            room for its target is NaN, and a warning counts them.
        """
        encoded = package_module("gradients.forward").encode_texts(
            self,
            base_model,
            processing_class,
            dataset,
            batch_size=batch_size,
            max_length=max_length,
            progress=progress,
        )
        return encoded.source

    def edited(
        self,
        base_model: PreTrainedModel,
        feature_factor: float | Sequence[float] | None = None,
        step_size: float | None = None,
    ) -> AbstractContextManager[PreTrainedModel]:
        """Context in which the base model carries θ + α·dec(h); then its bits are the old ones.

        Args:
            base_model: Base model that this GRADIEND was made for; edited in place.
            feature_factor: h; `None` for the chosen edit of the configuration.
            step_size: α; `None` for the chosen edit of the configuration.
        """
        return package_module("edits").edited(self, base_model, feature_factor, step_size)

    def merge_into(
        self,
        base_model: PreTrainedModel,
        feature_factor: float | Sequence[float] | None = None,
        step_size: float | None = None,
    ) -> PreTrainedModel:
        """Add α·dec(h) to the base model's weights for good, in place.

        Args:
            base_model: Base model that this GRADIEND was made for; edited in place.
            feature_factor: h; `None` for the chosen edit of the configuration.
            step_size: α; `None` for the chosen edit of the configuration.

        Returns:
            The same base model.
        """
        return package_module("edits").merge_into(self, base_model, feature_factor, step_size)

    def to_adapter(
        self,
        feature_factor: float | Sequence[float] | None = None,
        step_size: float | None = None,
        *,
        strength: float = 1.0,
        top_k: float | None = None,
        dtype: torch.dtype | None = None,
        adjustable: bool | None = None,
    ) -> "GradiendAdapter":  # noqa: F821 # pyright: ignore[reportUndefinedVariable] - the package's
        """A PEFT adapter that adds strength·α·dec(h) to any fitting base model.

        Args:
            feature_factor: h; `None` for the chosen edit of the configuration.
            step_size: α; `None` for the chosen edit of the configuration.
            strength: Strength to begin with; adjustable after loading, like h and α.
            top_k: Share of the weights to keep, in (0, 1], those with the largest |dec(h)|;
                `None` keeps all.
            dtype: Type of the values; `None` for the GRADIEND's own.
            adjustable: Keep W_d and b_d apart, so that h can be changed after loading; otherwise
                the adapter holds dec(h) alone, half as many values. `None` keeps them apart unless
                `top_k` is given, which keeps what is largest for this h.

        Returns:
            A `hf_gradiend.GradiendAdapter`, with `save_pretrained` and `apply_to`.
        """
        return package_module("adapter.conversion").GradiendAdapter.from_gradiend(
            self,
            feature_factor,
            step_size,
            strength=strength,
            top_k=top_k,
            dtype=dtype,
            adjustable=adjustable,
        )

    # ---- helpers --------------------------------------------------------------------------------

    def _values(
        self, entry: Mapping, gradients: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Selected values and batch shape of one gradient, `(*batch, *values_shape)`.

        Raises:
            ValueError: If the gradient is missing or has another shape.
        """
        name, shape = entry["name"], tuple(entry["shape"])
        if name not in gradients:
            raise ValueError(
                f"Expected a gradient for each base parameter, but {name!r} is missing."
            )
        gradient = gradients[name]
        batch = tuple(gradient.shape[: gradient.ndim - len(shape)])
        if tuple(gradient.shape[len(batch) :]) == shape:
            if entry["n_selected"] is None:
                return gradient, batch
            flat = gradient.reshape(*batch, -1)
            return flat.index_select(-1, self.indices.at(name).to(flat.device)), batch
        if entry["n_selected"] is not None and gradient.shape[-1:] == (entry["n_selected"],):
            return gradient, tuple(gradient.shape[:-1])
        raise ValueError(
            f"Expected a gradient of shape (*batch, {', '.join(map(str, shape))}) for {name!r}, "
            f"but got {tuple(gradient.shape)}."
        )

    def _decoded_values(self, name: str, h: Tensor) -> Tensor:
        weight = self.decoder.weight.at(name).float()
        bias = self.decoder.bias.at(name).float()
        with torch.autocast(weight.device.type, enabled=False):
            # (*batch, n_features) -> (*batch, *values_shape)
            return torch.tensordot(h.to(weight.device), weight, 1) + bias

    def _scatter(self, entry: Mapping, values: Tensor) -> Tensor:
        if entry["n_selected"] is None:
            return values
        batch, shape = values.shape[:-1], torch.Size(entry["shape"])
        index = self.indices.at(entry["name"]).to(values.device, torch.int64)
        full = values.new_zeros(*batch, shape.numel())
        return full.index_copy(-1, index, values).view(*batch, *shape)


def replace_files(fresh: Path, folder: Path) -> None:
    """Move the files of a GRADIEND into a folder, in place of those of an earlier one.

    config.json goes first and comes last: killed at any moment, this leaves the old GRADIEND, none
    that loads, or the new one, but never weights of both.

    Args:
        fresh: Folder with the new files, on the same disk.
        folder: Where they are wanted.
    """
    (folder / "config.json").unlink(missing_ok=True)
    names = {file.name for file in fresh.iterdir()}
    for stale in folder.glob("model*.safetensors*"):
        if stale.name not in names:  # shards of an earlier save with another shard size
            stale.unlink()
    for name in sorted(names, key=lambda name: name == "config.json"):
        (fresh / name).replace(folder / name)


def package_module(module: str) -> ModuleType:
    """A module of the package that stands above the one that asks.

    Raises:
        ImportError: If the package is not installed, as where this file was loaded as remote code.
        ModuleNotFoundError: If something else is missing.
    """
    try:
        return importlib.import_module(f"hf_gradiend.{module}")
    except ModuleNotFoundError as error:
        if error.name != "hf_gradiend":
            raise
        raise ImportError(
            "This method works on a base model and needs the package: pip install hf_gradiend"
        ) from error
