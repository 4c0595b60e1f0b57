"""Adding a decoded update to a base model's weights, and taking it back bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_gradiend.errors import BaseModelError, ConfigError, NumericalError
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, selection_of

FeatureFactor = float | Sequence[float]


class WeightEditor:
    """Puts edits θ + α·dec(h) into a base model in place, one after the other, and restores θ.

    Every edit starts from the original weights, so any number of them leaves no rounding. The sum
    is taken in float32 and rounded to the base model's dtype once. Use as a context manager; the
    originals (of a sparse GRADIEND only the selected entries) are kept in memory meanwhile.

    Args:
        gradiend: The GRADIEND.
        base_model: Base model to edit.

    Raises:
        BaseModelError: If selected weights of the base model are offloaded or quantised.
        CompatibilityError: If the GRADIEND was made for another base model.
        NumericalError: If its decoder holds NaN or infinity.
    """

    def __init__(self, gradiend: GradiendModel, base_model: PreTrainedModel) -> None:
        self.gradiend = gradiend
        self.selection: ParameterSelection = selection_of(gradiend)
        self.parameters = self.selection.parameters(base_model)
        for name, parameter in self.parameters.items():
            if parameter.is_meta or not parameter.is_floating_point():
                state = "offloaded" if parameter.is_meta else f"quantised ({parameter.dtype})"
                raise BaseModelError(
                    f"Expected base-model weights in memory that can be added to, but {name!r} is "
                    f"{state}. Load the base model without device_map or quantization_config."
                )
        self.originals: dict[str, Tensor] = {}
        for name in self.selection.names:
            for held in (gradiend.decoder.weight.at(name), gradiend.decoder.bias.at(name)):
                # Summed in float32: finite float16 numbers may add up to infinity.
                if not bool(torch.isfinite(held.detach().sum(dtype=torch.float32))):
                    raise NumericalError(
                        f"Expected finite decoder weights, but those of {name!r} hold NaN or "
                        f"infinity. The GRADIEND is broken; train it again."
                    )

    def __enter__(self) -> "WeightEditor":
        for entry in self.selection:
            values = entry.gather(self.parameters[entry.name].detach())
            self.originals[entry.name] = values.clone()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        self.originals.clear()

    def apply(self, feature_factor: FeatureFactor, step_size: float) -> None:
        """Set the weights to θ + α·dec(h), whatever edit stood there before.

        Args:
            feature_factor: h, one number per feature.
            step_size: α, in units of weight per unit of gradient.

        Raises:
            RuntimeError: Outside the editor's context, where nothing could be undone.
        """
        if not self.originals:
            raise RuntimeError("Expected apply() inside `with editor:`, which keeps the originals.")
        h = torch.as_tensor(feature_factor, dtype=torch.float32).reshape(-1)
        for name, original in self.originals.items():
            self._write(name, _edited_values(self.gradiend, name, original, h, step_size))

    def restore(self) -> None:
        """Put the original bits back."""
        for name, original in self.originals.items():
            self._write(name, original)

    @torch.no_grad()
    def _write(self, name: str, values: Tensor) -> None:
        parameter = self.parameters[name]
        indices = next(entry.indices for entry in self.selection if entry.name == name)
        if indices is None:
            parameter.copy_(values)
        else:
            parameter.view(-1).index_copy_(0, indices.to(values.device, torch.int64), values)


@torch.no_grad()
def _edited_values(
    gradiend: GradiendModel, name: str, original: Tensor, h: Tensor, step_size: float
) -> Tensor:
    weight = gradiend.decoder.weight.at(name).to(original.device, torch.float32)
    bias = gradiend.decoder.bias.at(name).to(original.device, torch.float32)
    with torch.autocast(original.device.type, enabled=False):  # the sum is taken in float32
        update = torch.tensordot(h.to(original.device), weight, 1).add_(bias)  # -> values_shape
    return update.mul_(step_size).add_(original).to(original.dtype)


@contextmanager
def edited(
    gradiend: GradiendModel,
    base_model: PreTrainedModel,
    feature_factor: FeatureFactor | None = None,
    step_size: float | None = None,
) -> Iterator[PreTrainedModel]:
    """Context in which the base model carries θ + α·dec(h); afterwards its bits are the old ones.

    Args:
        gradiend: The GRADIEND.
        base_model: Base model; edited in place.
        feature_factor: h; `None` for the chosen edit.
        step_size: α; `None` for the chosen edit.

    Yields:
        The base model.

    Raises:
        ConfigError: If no edit is given and none was chosen, or a number is not finite.
        CompatibilityError: If the GRADIEND was made for another base model.
    """  # noqa: DOC502 - CompatibilityError is raised by WeightEditor
    h, alpha = _chosen(gradiend, feature_factor, step_size)
    with WeightEditor(gradiend, base_model) as editor:
        editor.apply(h, alpha)
        yield base_model


def merge_into(
    gradiend: GradiendModel,
    base_model: PreTrainedModel,
    feature_factor: FeatureFactor | None = None,
    step_size: float | None = None,
) -> PreTrainedModel:
    """Add α·dec(h) to the base model's weights for good, in place.

    Args:
        gradiend: The GRADIEND.
        base_model: Base model; edited in place.
        feature_factor: h; `None` for the chosen edit.
        step_size: α; `None` for the chosen edit.

    Returns:
        The same base model.

    Raises:
        ConfigError: If no edit is given and none was chosen, or a number is not finite.
        CompatibilityError: If the GRADIEND was made for another base model.
    """  # noqa: DOC502 - CompatibilityError is raised by WeightEditor
    h, alpha = _chosen(gradiend, feature_factor, step_size)
    editor = WeightEditor(gradiend, base_model)
    with editor:
        editor.apply(h, alpha)
        editor.originals.clear()  # nothing to restore: the edit stays
    return base_model


def _chosen(
    gradiend: GradiendModel, feature_factor: FeatureFactor | None, step_size: float | None
) -> tuple[FeatureFactor, float]:
    h = gradiend.config.feature_factor if feature_factor is None else feature_factor
    alpha = gradiend.config.step_size if step_size is None else step_size
    if h is None or alpha is None:
        raise ConfigError(
            "Expected a feature factor and a step size, but this GRADIEND has no chosen edit. Pass "
            "both, or choose one with hf_gradiend.evaluation.choose_edit."
        )
    numbers = torch.as_tensor(h, dtype=torch.float32).reshape(-1)
    if numbers.numel() != gradiend.config.n_features:
        raise ConfigError(
            f"Expected a feature factor of {gradiend.config.n_features} numbers, one per feature, "
            f"but got {h!r}."
        )
    if not bool(torch.isfinite(numbers).all()) or alpha != alpha or abs(alpha) == float("inf"):
        raise ConfigError(f"Expected finite numbers, but got h = {h!r} and step size = {alpha!r}.")
    return h, alpha
