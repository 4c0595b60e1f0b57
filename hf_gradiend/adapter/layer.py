"""The layer that holds an adapter's values beside the weights that they are added to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_gradiend.adapter.config import GradiendAdapterConfig
from hf_gradiend.adapter.quantized import QuantizedSite
from hf_gradiend.adapter.steering import PlainSite, Site, Steering, Term
from hf_gradiend.adapter.values import BIAS, GAPS, LAYER_NAME, WEIGHT, AdapterValues
from hf_gradiend.edits import Update, is_finite
from hf_gradiend.errors import BaseModelError, ConfigError, NumericalError
from hf_gradiend.parameters import unpack_indices


class Bag(nn.Module):
    """Tensors of one adapter, named like the parameters of the module that they belong to."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Hold a frozen parameter or, where it is not of floating point, a persistent buffer."""
        # Written directly: register_parameter refuses names that nn.Module has as attributes.
        if tensor.is_floating_point():
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            self._buffers[name] = tensor

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, if there is one."""
        found = self._parameters.get(name)
        return self._buffers.get(name) if found is None else found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Bag":
        # Values follow the model to another device, but keep their type: 1e-8 is 0 in float16.
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


class GradiendLayer(nn.Module, BaseTunerLayer):
    """Values of adapters for the weights of one module, as that module's child `gradiend`.

    The module itself stays in its place under its own name and class, whatever it is (Linear,
    Conv1D, Embedding, a norm, 3-D experts, one that owns weights beside other modules): its
    weights are edited in place by the model's `Steering`. Keys in a state dict are
    `<module>.gradiend.gradiend_decoder_weight.<adapter>.<parameter>` and so on.

    Args:
        parent: Module that the layer becomes a child of: the owner, or the layer of another
            adapter that wraps it.
        owner: Module that owns the weights.
        steering: The model's steering.
    """

    adapter_layer_names = (WEIGHT, BIAS)
    other_param_names = (GAPS, "scaling")

    def __init__(self, parent: nn.Module, owner: nn.Module, steering: Steering) -> None:
        super().__init__()
        self._above = (parent, owner)  # in a tuple, or they would become children of their child
        self.steering = steering
        self.gradiend_decoder_weight = nn.ModuleDict()  # bags of (n_features, *values_shape)
        self.gradiend_decoder_bias = nn.ModuleDict()  # bags of values_shape
        self.gradiend_index_gaps = nn.ModuleDict()  # bags of packed indices, uint8 (m,)
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._loads = 0
        self._checked: set[str] = set()
        self._ready: dict[tuple[str, str], AdapterValues] = {}
        self._file_names: dict[tuple[str, str], str] = {}
        parent._modules[LAYER_NAME] = self
        steering.layers.append(self)

    def get_base_layer(self) -> nn.Module:
        """The module that owns the weights."""
        return self._above[1]

    def add_adapter(self, adapter_name: str, name: str, entry: Mapping, *, meta: bool) -> None:
        """Make room for an adapter's values of one parameter; they hold NaN until they come.

        Args:
            adapter_name: Name of the adapter.
            name: Name of the parameter in the module.
            entry: The parameter's entry in the configuration.
            meta: Make the tensors on the meta device, for loading by assignment.
        """
        config = self.steering.configs[adapter_name]
        device = torch.device("meta") if meta else self._parameter(name).device
        shape = tuple(entry["shape"]) if entry["n_selected"] is None else (entry["n_selected"],)

        def unset(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, dtype=config.torch_dtype, device=device)

        for bags in (self.gradiend_decoder_weight, self.gradiend_decoder_bias):
            if adapter_name not in bags:
                bags[adapter_name] = Bag()
        if config.n_features:
            self._bag(WEIGHT, adapter_name).put(name, unset(config.n_features, *shape))
        self._bag(BIAS, adapter_name).put(name, unset(*shape))
        if entry["n_selected"] is not None:
            if adapter_name not in self.gradiend_index_gaps:
                self.gradiend_index_gaps[adapter_name] = Bag()
            # 255 continues a gap and ends none: gaps that never came unpack to no index.
            gaps = torch.full((entry["index_bytes"],), 255, dtype=torch.uint8, device=device)
            self._bag(GAPS, adapter_name).put(name, gaps)
        self.scaling.setdefault(adapter_name, 1.0)
        self._file_names[adapter_name, name] = entry["name"]

    def put_values(self, adapter_name: str, name: str, values: AdapterValues) -> None:
        """Set an adapter's values of one parameter, in place."""
        for kind, tensor in values.packed().items():
            held = self._bag(kind, adapter_name).get(name)
            held.data.copy_(tensor)  # pyright: ignore[reportOptionalMemberAccess]
        self._reloaded()

    def values_of(self, adapter_name: str, name: str) -> AdapterValues:
        """An adapter's values of one parameter, on the parameter's device."""
        key = (adapter_name, name)
        if key not in self._ready:
            device = self._parameter(name).device
            weight, bias, gaps = (
                None if held is None else held.detach().to(device)
                for held in (
                    self._bag(kind, adapter_name).get(name)
                    if adapter_name in getattr(self, kind)
                    else None
                    for kind in (WEIGHT, BIAS, GAPS)
                )
            )
            self._ready[key] = AdapterValues(
                weight,
                bias,  # pyright: ignore[reportArgumentType] - every adapter has one
                None if gaps is None else unpack_indices(gaps),
            )
        return self._ready[key]

    def names_of(self, adapter_name: str) -> list[str]:
        """Names of the parameters in the module that an adapter has values for."""
        if adapter_name not in self.gradiend_decoder_bias:
            return []
        return list(self._bag(BIAS, adapter_name)._parameters)

    def tensors_of(self, adapter_name: str) -> Iterator[tuple[str, str, str]]:
        """The tensors of an adapter in this layer.

        Args:
            adapter_name: Name of the adapter; there are none where the layer does not have it.

        Yields:
            Kind, name of the parameter in the module, and its full name in the adapter's file.
        """
        for kind in (WEIGHT, BIAS, GAPS):
            if adapter_name in getattr(self, kind):
                for name in self._bag(kind, adapter_name).state_dict():
                    yield kind, name, self._file_names[adapter_name, name]

    # ---- what the steering asks -------------------------------------------------------------

    def terms(
        self, configs: Mapping[str, GradiendAdapterConfig], *, at_rest: bool
    ) -> Iterator[tuple[nn.Module | Tensor, Term, Callable[[], Site]]]:
        """What the adapters want added to each weight of the module.

        Args:
            configs: Configurations of the adapters.
            at_rest: Merged adapters only.

        Yields:
            The weight, the term, and a function that makes a site for the weight.

        Raises:
            BaseModelError: If the weight is offloaded.
            NumericalError: If values are NaN or infinite, or never came.
        """  # noqa: DOC502 - raised by _check
        names = list(self.merged_adapters)
        if not at_rest:
            names += [name for name in self.active_adapters if name not in names]
        if self.disable_adapters and not at_rest:
            names = []
        for adapter_name in names:
            if adapter_name not in self.gradiend_decoder_bias:
                continue
            config = configs[adapter_name]
            scale = config.strength * config.step_size * self.scaling[adapter_name]
            if scale == 0.0:
                continue
            self._check(adapter_name)
            for name in self.names_of(adapter_name):
                values = self.values_of(adapter_name, name)
                source = (self, adapter_name, self._loads)
                term = Term(
                    (*source, scale, *config.feature_factor),
                    Update(values.weight, values.bias, config.feature_factor, scale),
                    values.indices,
                    source,
                )
                yield self._place(name), term, partial(self._new_site, name)

    def _is_quantized(self, name: str) -> bool:
        return name == "weight" and self.quantization_backend is not None

    def _place(self, name: str) -> nn.Module | Tensor:
        # Tied weights are one parameter in two modules; a quantised one is replaced now and then.
        return self.get_base_layer() if self._is_quantized(name) else self._parameter(name)

    def _new_site(self, name: str) -> Site:
        if self._is_quantized(name):
            return QuantizedSite(self.get_base_layer(), self.quantization_backend)  # pyright: ignore[reportArgumentType]
        return PlainSite(self._parameter(name))

    def _check(self, adapter_name: str) -> None:
        """Refuse values that cannot be added; once after they came.

        Raises:
            BaseModelError: If the weight is offloaded.
            NumericalError: If values are NaN or infinite, or never came.
        """  # noqa: DOC502 - the first is raised by refuse_offloaded
        for name in self.names_of(adapter_name):
            if self._parameter(name).is_meta:  # weights may be offloaded at any time
                refuse_offloaded(f"{name!r} of {type(self.get_base_layer()).__name__}")
            if adapter_name in self._checked:
                continue
            values = self.values_of(adapter_name, name)
            for held in (values.weight, values.bias):
                if held is not None and (held.is_meta or not is_finite(held)):
                    raise NumericalError(
                        f"Expected finite values of the adapter {adapter_name!r}, but those of "
                        f"{name!r} in a {type(self.get_base_layer()).__name__} are NaN or "
                        f"infinite, or never came. Load it again from a whole file."
                    )
            indices, n_values = values.indices, values.bias.numel()
            n_entries = self._parameter(name).numel()
            if indices is not None and (
                len(indices) != n_values or (n_values and int(indices[-1]) >= n_entries)
            ):
                raise NumericalError(
                    f"Expected {n_values:,} indices below {n_entries:,} of {name!r}, but the "
                    f"adapter {adapter_name!r} has others, or they never came. Load it again from "
                    f"a whole file."
                )
        self._checked.add(adapter_name)

    def _parameter(self, name: str) -> nn.Parameter:
        return self.get_base_layer()._parameters[name]  # pyright: ignore[reportReturnType]

    def _bag(self, kind: str, adapter_name: str) -> Bag:
        return getattr(self, kind)[adapter_name]

    def _reloaded(self) -> None:
        self._loads += 1
        self._checked.clear()
        self._ready.clear()
        self.steering.changed()

    # ---- peft's verbs -----------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Set the active adapters; unlike other layers' values, these are never trained.

        Args:
            adapter_names: Name or names.
            inference_mode: Not used.
        """
        del inference_mode
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._active_adapter = names
        self.steering.changed()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the layer on or off; off takes effect at once."""
        self._disable_adapters = not enabled
        if enabled:
            self.steering.changed()
        else:
            self.steering.restore()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Refuse to train the values.

        Raises:
            ConfigError: If `requires_grad` is true.
        """
        del adapter_names
        if requires_grad:
            raise ConfigError(
                "Expected a GRADIEND adapter to be dialled, not trained, but its values were asked "
                "to require gradients. Load it with is_trainable=False; train with GradiendTrainer."
            )

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the strength of an adapter in this layer alone.

        Args:
            adapter: Name of the adapter; nothing happens where the layer does not have it.
            scale: Factor; 1 by default.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale
            self.steering.changed()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let adapters stand in the weights whichever are active, until `unmerge`.

        Args:
            safe_merge: Not needed here: values are checked before they are added.
            adapter_names: Names; `None` for the active ones.
        """
        del safe_merge
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.gradiend_decoder_bias and name not in self.merged_adapters:
                self.merged_adapters.append(name)
        self.steering.changed()

    def unmerge(self) -> None:
        """Take merged adapters back; the original bits return."""
        self.merged_adapters.clear()
        self.steering.changed()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from the layer.

        Args:
            adapter_name: Name of the adapter.
        """
        self.steering.restore()
        super().delete_adapter(adapter_name)
        self._reloaded()

    def holds_values(self, adapter_name: str) -> bool:
        """Whether an adapter's values have come."""
        return any(
            not held.is_meta and not bool(torch.isnan(held).all())
            for held in self._bag(BIAS, adapter_name).parameters()
        )

    def withdraw(self, adapter_name: str) -> None:
        """Take back an adapter that could not be loaded, and the layer if it was made for it."""
        for kind in (WEIGHT, BIAS, GAPS):
            if adapter_name in getattr(self, kind):
                getattr(self, kind).pop(adapter_name)
        self.scaling.pop(adapter_name, None)
        self._reloaded()
        if not self.gradiend_decoder_bias:
            self.remove()

    def remove(self) -> None:
        """Take the layer out of its module."""
        self._above[0]._modules.pop(LAYER_NAME, None)
        self.steering.remove(self)

    # ---- torch's verbs ----------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GradiendLayer":
        # A child comes before its module's own weights: they move or change type as originals.
        self.steering.restore()
        self._reloaded()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        self._reloaded()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move values to their weights' device, and leave their type."""
        for kind in (WEIGHT, BIAS, GAPS):
            if adapter_name in getattr(self, kind):
                bag = self._bag(kind, adapter_name)
                target = device or next(iter(self.get_base_layer()._parameters.values())).device  # pyright: ignore[reportOptionalMemberAccess]
                if not any(t.is_meta for t in bag.state_dict().values()):
                    bag.to(target)

    def extra_repr(self) -> str:
        """The adapters, for `print(model)`."""
        return ", ".join(self.gradiend_decoder_bias)


def refuse_offloaded(what: str) -> NoReturn:
    """Refuse a weight that is not in memory.

    Raises:
        BaseModelError: Always.
    """
    raise BaseModelError(
        f"Expected base-model weights in memory, but {what} is offloaded. Load the base model with "
        f"a device_map that offloads nothing, or merge the adapter into the checkpoint with "
        f"`hf-gradiend export --to merged`."
    )


def steering_of(model: nn.Module) -> Steering | None:
    """The steering of a model, if it has a GRADIEND layer."""
    found = next((m for m in model.modules() if isinstance(m, GradiendLayer)), None)
    return None if found is None else found.steering


def layers_of(model: nn.Module) -> list[GradiendLayer]:
    """The GRADIEND layers of a model."""
    steering = steering_of(model)
    return [] if steering is None else list(steering.layers)


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take back an adapter that could not be loaded; the model is as it was before it."""
    for layer in layers_of(model):
        layer.withdraw(adapter_name)
        layer.steering.configs.pop(adapter_name, None)
