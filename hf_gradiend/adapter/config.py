"""Configuration of a GRADIEND adapter."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from peft import PeftConfig, PeftType
from torch import Tensor

from hf_gradiend.adapter.values import AdapterValues, GradiendFiles, entry_of
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.edits import chosen_edit
from hf_gradiend.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class GradiendAdapterConfig(PeftConfig):
    """Configuration of an adapter that adds strength·α·(h·W_d + b_d) to a base model's weights.

    Written by `GradiendModel.to_adapter`; `GradiendAdapter` builds one from a GRADIEND's folder or
    Hub id. Change the numbers of a loaded adapter with `set_strength` and `set_edit`.

    Args:
        parameters: One entry per base-model parameter, in order: `{"name": str, "shape": list[int],
            "n_selected": int | None, "index_bytes": int | None}`, where `None` selects every entry
            and numbers give the lengths of the values and of their packed indices.
        n_features: Number of features; 0 where h is fixed and lies in the values.
        feature_classes: For each feature, the pair of class names; the first is at h = +1.
        feature_factor: h, one number per feature, in [−1, 1] as a rule.
        step_size: α, in units of weight per unit of gradient.
        strength: Multiplies the update: 1 is the edit as it was chosen, 0 the base model, negative
            numbers the opposite.
        dtype: Type of the values, `"float32"`, `"bfloat16"` or `"float16"`.
        selection_fingerprint: SHA-256 of names, shapes and indices of the selection.
        gradiend_name_or_path: GRADIEND that the adapter was made from.
        target_modules: Not used; the parameters are named. So are the next two, which peft reads.
        exclude_modules: Not used.
        target_parameters: Not used.

    Raises:
        ConfigError: If a field has a value that is not allowed.

    References:
        Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 3.3 (the update).
    """

    parameters: list[dict] = field(default_factory=list)
    n_features: int = 1
    feature_classes: list[list[str]] | None = None
    feature_factor: list[float] = field(default_factory=lambda: [0.0])
    step_size: float = 1.0
    strength: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    selection_fingerprint: str | None = None
    gradiend_name_or_path: str | None = None
    target_modules: None = None
    exclude_modules: None = None
    target_parameters: None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Values that the next injection takes over, where they do not come from a file of its own.
        self.values: Mapping[str, AdapterValues] | None = None
        self.peft_type = cast("PeftType", PeftType["GRADIEND"])
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"Expected the dtype of a GRADIEND adapter to be one of {', '.join(DTYPES)}, but "
                f"got {self.dtype!r}."
            )
        for entry in self.parameters:
            missing = {"name", "shape", "n_selected", "index_bytes"} - entry.keys()
            if missing:
                raise ConfigError(
                    f"Expected name, shape, n_selected and index_bytes of every parameter of a "
                    f"GRADIEND adapter, but {entry.get('name', entry)!r} lacks "
                    f"{', '.join(sorted(missing))}. Is adapter_config.json whole?"
                )
        self.feature_factor = feature_factor_of(self.feature_factor, self.n_features)
        self.step_size = finite("step size", self.step_size)
        self.strength = finite("strength", self.strength)

    @classmethod
    def from_gradiend(
        cls,
        gradiend_name_or_path: str | os.PathLike[str],
        feature_factor: float | Sequence[float] | None = None,
        step_size: float | None = None,
        *,
        strength: float = 1.0,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "GradiendAdapterConfig":
        """A configuration that takes its values straight from a GRADIEND's own files.

        `get_peft_model(base_model, config)` and `base_model.add_adapter(config)` then read them
        there, without a second copy on disk. Of a sharded GRADIEND on the Hub, only the files
        that hold its decoder are fetched.

        Args:
            gradiend_name_or_path: Folder or Hub id of the GRADIEND.
            feature_factor: h, one number per feature; `None` for the GRADIEND's chosen edit.
            step_size: α; `None` for the chosen edit.
            strength: Strength to begin with.
            revision: Branch, tag or commit on the Hub.
            token: Token for a private repository.

        Raises:
            ConfigError: If there is no GRADIEND at that place, or no edit is given and none was
                chosen.
        """  # noqa: DOC502 - raised by what it calls
        values = GradiendFiles(gradiend_name_or_path, revision=revision, token=token)
        h, alpha = chosen_edit(values.config, feature_factor, step_size)
        config = cls.of_gradiend(
            values.config, h, alpha, values=values, dtype=values.dtype, strength=strength
        )
        config.selection_fingerprint = values.config.selection_fingerprint
        config.gradiend_name_or_path = os.fspath(gradiend_name_or_path)
        return config

    @classmethod
    def of_gradiend(
        cls,
        gradiend: GradiendConfig,
        feature_factor: float | Sequence[float],
        step_size: float,
        *,
        values: Mapping[str, AdapterValues],
        dtype: torch.dtype,
        strength: float = 1.0,
        adjustable: bool = True,
    ) -> "GradiendAdapterConfig":
        """The configuration of values that were made from a GRADIEND.

        Args:
            gradiend: Configuration of the GRADIEND.
            feature_factor: h.
            step_size: α.
            values: Values of each parameter.
            dtype: Their type.
            strength: Strength to begin with.
            adjustable: Whether h can be changed, or lies in the values.
        """
        shapes = {entry["name"]: tuple(entry["shape"]) for entry in gradiend.parameters}
        numbers = feature_factor_of(feature_factor, gradiend.n_features)
        auto_mapping = None
        if gradiend.base_model_class is not None:  # lets AutoPeftModel find the base model's class
            auto_mapping = {
                "base_model_class": gradiend.base_model_class,
                "parent_library": "transformers",
            }
        config = cls(
            parameters=[entry_of(name, shapes[name], values[name]) for name in values],
            n_features=gradiend.n_features if adjustable else 0,
            feature_classes=gradiend.feature_classes,
            feature_factor=numbers if adjustable else [],
            step_size=step_size,
            strength=strength,
            dtype=str(dtype).removeprefix("torch."),  # pyright: ignore[reportArgumentType]
            base_model_name_or_path=gradiend.base_model_name_or_path,
            revision=gradiend.base_model_revision,
            task_type="CAUSAL_LM" if gradiend.objective == "causal" else None,
            auto_mapping=auto_mapping,
            inference_mode=True,
        )
        config.values = values
        return config

    @property
    def n_values(self) -> int:
        """Number of base-model weights that the adapter has values for."""
        return sum(
            torch.Size(entry["shape"]).numel()
            if entry["n_selected"] is None
            else entry["n_selected"]
            for entry in self.parameters
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the values."""
        return getattr(torch, self.dtype)


def finite(what: str, number: float) -> float:
    """A finite float.

    Raises:
        ConfigError: If it is not a number, or NaN or infinite.
    """
    if (
        isinstance(number, bool)
        or not isinstance(number, (int, float))
        or not math.isfinite(number)
    ):
        raise ConfigError(f"Expected a finite number as {what}, but got {number!r}.")
    return float(number)


def feature_factor_of(h: float | Sequence[float] | Tensor | None, n_features: int) -> list[float]:
    """A feature factor as one finite number per feature.

    Raises:
        ConfigError: If it has another length, or holds NaN or infinity.
    """
    if n_features == 0:
        if h not in (None, []):
            raise ConfigError(
                f"Expected no feature factor, since this adapter was made for a fixed one, but got "
                f"{h!r}. Make the adapter with adjustable=True to change it afterwards."
            )
        return []
    if isinstance(h, Tensor):
        h = h.reshape(-1).tolist()
    numbers = list(h) if isinstance(h, (list, tuple)) else [h]
    if len(numbers) != n_features:
        raise ConfigError(
            f"Expected a feature factor of {n_features} numbers, one per feature, but got {h!r}."
        )
    return [finite("feature factor", number) for number in numbers]  # pyright: ignore[reportArgumentType]
