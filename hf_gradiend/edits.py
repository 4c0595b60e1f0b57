"""Adding a decoded update to a base model's weights, and taking it back bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.errors import BaseModelError, ConfigError, NumericalError
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, selection_of

FeatureFactor = float | Sequence[float]

# Numbers of one block: its float32 sum (0.5 MB) stays in a core's cache while four operations pass
# over it, so that an edit costs one pass through memory and not five.
BLOCK = 2**17


@dataclass(frozen=True, eq=False)
class Update:
    """One summand scale·(h·W_d + b_d) of an edit, on the selected values of one parameter.

    Args:
        weight: W_d of shape `(n_features, *values_shape)`; `None` where h is fixed and lies in
            the bias.
        bias: b_d of shape `values_shape`.
        feature_factor: h, one number per feature.
        scale: Strength times step size, in units of weight per unit of gradient.
        positions: Where its values stand among those that are edited, int64 `(k,)`; `None` where
            it covers all of them in order.
    """

    weight: Tensor | None
    bias: Tensor
    feature_factor: Sequence[float]
    scale: float
    positions: Tensor | None = None

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The summand from one flat position to another, float32 `(stop - start,)`."""
        bias = self.bias.reshape(-1)[start:stop].float()
        if self.weight is None:
            return bias * self.scale
        rows = self.weight.reshape(len(self.weight), -1)[:, start:stop]
        total = rows[0].float() * self.feature_factor[0]
        for row, h in zip(rows[1:], self.feature_factor[1:], strict=True):
            total += row.float() * h
        return total.add_(bias).mul_(self.scale)


@torch.no_grad()
def write_edited(out: Tensor, original: Tensor, updates: Sequence[Update]) -> None:
    """Write original + Σ updates into `out`; summed in float32 and rounded once.

    Args:
        out: Contiguous tensor to write to.
        original: Tensor of the same number of values.
        updates: What to add.
    """
    flat_out, flat_original = out.view(-1), original.reshape(-1)
    if any(update.positions is not None for update in updates):
        total = flat_original.to(torch.float32, copy=True)
        for update in updates:
            if update.positions is None:
                total += update.values()
            else:
                total.index_add_(0, update.positions, update.values())
        flat_out.copy_(total)
        return
    block = BLOCK if out.device.type == "cpu" else max(out.numel(), 1)
    for start in range(0, out.numel(), block):
        stop = start + block
        total = updates[0].values(start, stop)
        total += flat_original[start:stop]
        for update in updates[1:]:
            total += update.values(start, stop)
        flat_out[start:stop] = total


class EditedWeight:
    """One weight under edit: its original bits, and the updates that stand in it now.

    Every edit starts from the original bits, so any number of them leaves no rounding.

    Args:
        parameter: Weight of a base model; edited in place.
        indices: Sorted flat positions that edits touch, int64 `(k,)`; `None` for all.
    """

    def __init__(self, parameter: Tensor, indices: Tensor | None) -> None:
        self.parameter = parameter
        self.indices = indices
        self.updates: Sequence[Update] = ()
        self.originals = self._current().clone()
        self._witness = self.originals

    def write(self, updates: Sequence[Update]) -> None:
        """Set the weight to the original plus the updates, whatever edit stood there before."""
        self.updates = updates
        if self.indices is None and self.parameter.is_contiguous():
            written = self.parameter.detach()
            write_edited(written, self.originals, updates)
        else:
            written = self._edited()
            self._put(written)
        self._witness = self._seen(written)

    def restore(self) -> None:
        """Put the original bits back."""
        self.updates = ()
        self._put(self.originals)

    def absorb_changes(self) -> None:
        """Take what others have added to the weight meanwhile into the original.

        An optimiser or the merge of a LoRA may write to a weight that carries an edit; without
        this, the next edit would undo it.
        """
        if not self.updates:
            return
        current = self._current()
        if not torch.equal(self._seen(current), self._witness):
            change = current.float() - self._edited().float()
            self.originals.copy_(self.originals.float() + change)

    def _seen(self, values: Tensor) -> Tensor:
        """What is remembered of the values that were written, to see whether others change them."""
        return bit_sum(values) if self.indices is None else values

    def _edited(self) -> Tensor:
        edited = torch.empty_like(self.originals, memory_format=torch.contiguous_format)
        write_edited(edited, self.originals, self.updates)
        return edited

    def _current(self) -> Tensor:
        held = self.parameter.detach()
        return held if self.indices is None else held.reshape(-1).index_select(0, self.indices)

    @torch.no_grad()
    def _put(self, values: Tensor) -> None:
        if self.indices is None:
            self.parameter.copy_(values)
        elif self.parameter.is_contiguous():
            self.parameter.view(-1).index_copy_(0, self.indices, values)  # half the time of put_
        else:
            self.parameter.put_(self.indices, values)


def bit_sum(values: Tensor) -> Tensor:
    """Sum of a tensor's bits in words of 64, modulo 2⁶⁴: differs where a value has changed.

    Costs one read; a tenth of an edit.
    """
    held = values.detach().reshape(-1)
    if held.data_ptr() % 8:  # words of 64 bits begin at multiples of 8 bytes
        held = held.clone()
    held = held.view(torch.uint8)
    n_whole = len(held) // 8 * 8
    return held[:n_whole].view(torch.int64).sum() + held[n_whole:].sum()


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
        check_decoder(gradiend)
        self.weights: dict[str, EditedWeight] = {}

    def __enter__(self) -> "WeightEditor":
        for entry in self.selection:
            parameter = self.parameters[entry.name]
            indices = entry.indices
            if indices is not None:
                indices = indices.to(parameter.device, torch.int64)
            self.weights[entry.name] = EditedWeight(parameter, indices)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        self.weights.clear()

    @property
    def originals(self) -> dict[str, Tensor]:
        """The original bits of the selected values, keyed by name; none outside the context."""
        return {name: weight.originals for name, weight in self.weights.items()}

    def apply(self, feature_factor: FeatureFactor, step_size: float) -> None:
        """Set the weights to θ + α·dec(h), whatever edit stood there before.

        Args:
            feature_factor: h, one number per feature.
            step_size: α, in units of weight per unit of gradient.

        Raises:
            RuntimeError: Outside the editor's context, where nothing could be undone.
        """
        if not self.weights:
            raise RuntimeError("Expected apply() inside `with editor:`, which keeps the originals.")
        h = torch.as_tensor(feature_factor, dtype=torch.float32).reshape(-1).tolist()
        decoder = self.gradiend.decoder
        for name, weight in self.weights.items():
            device = weight.parameter.device
            update = Update(
                decoder.weight.at(name).detach().to(device),
                decoder.bias.at(name).detach().to(device),
                h,
                step_size,
            )
            weight.write([update])

    def restore(self) -> None:
        """Put the original bits back."""
        for weight in self.weights.values():
            weight.restore()


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # Summed in float32: finite float16 numbers may add up to infinity.
    return bool(torch.isfinite(values.detach().sum(dtype=torch.float32)))


def check_decoder(gradiend: GradiendModel) -> None:
    """Refuse a GRADIEND whose decoder is broken.

    Raises:
        NumericalError: If it holds NaN or infinity.
    """
    for name in gradiend.names:
        for held in (gradiend.decoder.weight.at(name), gradiend.decoder.bias.at(name)):
            if not is_finite(held):
                raise NumericalError(
                    f"Expected finite decoder weights, but those of {name!r} hold NaN or "
                    f"infinity. The GRADIEND is broken; train it again."
                )


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
    h, alpha = chosen_edit(gradiend.config, feature_factor, step_size)
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
    h, alpha = chosen_edit(gradiend.config, feature_factor, step_size)
    editor = WeightEditor(gradiend, base_model)
    with editor:
        editor.apply(h, alpha)
        editor.weights.clear()  # nothing to restore: the edit stays
    return base_model


def chosen_edit(
    config: GradiendConfig, feature_factor: FeatureFactor | None, step_size: float | None
) -> tuple[FeatureFactor, float]:
    """The numbers of an edit, those of the configuration where none are given.

    Raises:
        ConfigError: If no edit is given and none was chosen, or a number is not allowed.
    """
    h = config.feature_factor if feature_factor is None else feature_factor
    alpha = config.step_size if step_size is None else step_size
    if h is None or alpha is None:
        raise ConfigError(
            "Expected a feature factor and a step size, but this GRADIEND has no chosen edit. Pass "
            "both, or choose one with hf_gradiend.evaluation.choose_edit."
        )
    numbers = torch.as_tensor(h, dtype=torch.float32).reshape(-1)
    if numbers.numel() != config.n_features:
        raise ConfigError(
            f"Expected a feature factor of {config.n_features} numbers, one per feature, "
            f"but got {h!r}."
        )
    if not bool(torch.isfinite(numbers).all()) or alpha != alpha or abs(alpha) == float("inf"):
        raise ConfigError(f"Expected finite numbers, but got h = {h!r} and step size = {alpha!r}.")
    return h, alpha
