"""The tuner of the PEFT method GRADIEND."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from hf_gradiend.adapter import control
from hf_gradiend.adapter.combination import weighted_sum
from hf_gradiend.adapter.config import GradiendAdapterConfig
from hf_gradiend.adapter.layer import (
    Bag,
    GradiendLayer,
    layers_of,
    refuse_offloaded,
    steering_of,
    withdraw,
)
from hf_gradiend.adapter.quantized import backend_of, check_quantization
from hf_gradiend.adapter.steering import Steering
from hf_gradiend.adapter.values import LAYER_NAME, AdapterValues, key_of
from hf_gradiend.errors import CompatibilityError, ConfigError
from hf_gradiend.parameters import ParameterSelection, SelectedParameter


class GradiendTuner(BaseTuner):
    """Adds decoded updates to the weights of a model; made by peft.

    A `PeftModel` passes its methods on, so `PeftModel.set_strength(0.5)` is the one of this class.
    """

    prefix = "gradiend_"
    tuner_layer_cls = GradiendLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's own form

    # ---- dialling ---------------------------------------------------------------------------

    def set_strength(self, strength: float, adapter_name: str | None = None) -> None:
        """Set the strength of an adapter; see `hf_gradiend.set_strength`."""
        control.set_strength(self.model, strength, adapter_name)

    def get_strength(self, adapter_name: str | None = None) -> float:
        """Strength of an adapter; see `hf_gradiend.get_strength`."""
        return control.get_strength(self.model, adapter_name)

    def set_edit(
        self,
        feature_factor: float | Sequence[float] | None = None,
        step_size: float | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Set feature factor and step size of an adapter; see `hf_gradiend.set_edit`."""
        control.set_edit(self.model, feature_factor, step_size, adapter_name)

    # ---- injection --------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add a layer to every module that owns weights of the adapter; peft calls this.

        peft's own method chooses modules by patterns and replaces them. Here the configuration
        names the weights, and modules stay in their places.

        Args:
            model: Base model.
            adapter_name: Name of the adapter.
            autocast_adapter_dtype: Not used: values keep their type.
            low_cpu_mem_usage: Make the tensors on the meta device.
            state_dict: Not used.

        Raises:
            CompatibilityError: If the adapter was made for another base model.
            BaseModelError: If weights are offloaded or quantised.
        """  # noqa: DOC502 - raised by _places
        del autocast_adapter_dtype, state_dict
        given = cast("GradiendAdapterConfig", self.peft_config[adapter_name])
        # A copy: the numbers of an adapter are this model's own, and so are the names of weights.
        config = self.peft_config[adapter_name] = replace(given)
        try:
            places = list(_places(config, model))
            self._add_layers(model, adapter_name, places, given.values, meta=low_cpu_mem_usage)
        except Exception:
            withdraw(model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            raise
        config.parameters = [
            {**place.entry, "name": f"{place.module_name}.{place.name}".lstrip(".")}
            for place in places
        ]
        known = set(self.targeted_module_names)
        added = dict.fromkeys(place.module_name for place in places)
        self.targeted_module_names += [name for name in added if name not in known]
        self.set_adapter(self.active_adapters)

    def _add_layers(
        self,
        model: nn.Module,
        adapter_name: str,
        places: Sequence["_Place"],
        values: Mapping[str, AdapterValues] | None,
        *,
        meta: bool,
    ) -> None:
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            for parameter in model.parameters():
                parameter.requires_grad = False
        steering = steering_of(model) or Steering()
        steering.configs[adapter_name] = cast(
            "GradiendAdapterConfig", self.peft_config[adapter_name]
        )
        for place in places:
            layer = place.layer(model, steering)
            layer.add_adapter(adapter_name, place.name, place.entry, meta=meta)
            if values is not None:
                layer.put_values(adapter_name, place.name, values[place.entry["name"]])
        steered = {place.parameter for place in places}
        for module in model.modules():
            if not isinstance(module, (GradiendLayer, Bag, nn.ModuleDict)) and any(
                parameter in steered for parameter in module.parameters()
            ):
                steering.watch(module)

    def _create_and_replace(self, *_: object, **__: object) -> None:
        raise NotImplementedError  # peft's inject_adapter alone would call it

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave the values as they are: they are summed in float32 anyway."""

    # ---- peft's verbs -----------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Let adapters stand in the weights until `unmerge_adapter`.

        Args:
            adapter_names: Names; `None` for the active ones.
            safe_merge: Not needed here: values are checked before they are added.
        """
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        steering = steering_of(self.model)
        if steering is not None:
            steering.sync()

    def unmerge_adapter(self) -> None:
        """Take merged adapters back, bit for bit; active ones act again in the next pass."""
        super().unmerge_adapter()
        steering = steering_of(self.model)
        if steering is not None:
            steering.restore()

    def _check_merge_allowed(self) -> None:
        """Allow: tied weights are edited in place, and stay tied."""

    def _unload_and_optionally_merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        del progressbar
        layers = layers_of(self.model)
        if merge:
            for layer in layers:
                layer.merge(safe_merge, adapter_names)
        steering = steering_of(self.model)
        if steering is not None:
            steering.bake()
        for layer in layers:
            layer.remove()
        held = getattr(self.model, "peft_config", {})
        for name in [n for n, c in held.items() if isinstance(c, GradiendAdapterConfig)]:
            del held[name]
        if not held and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Make a new adapter that adds what several add, each times a weight.

        Its features are those of all of them, so their feature factors stay adjustable.

        Args:
            adapters: Names of adapters.
            weights: One number per adapter; multiplies its strength.
            adapter_name: Name of the new adapter.

        Raises:
            ConfigError: If a name is unknown or taken, or there is not one weight per adapter.
        """  # noqa: DOC502 - raised by weighted_sum
        self.peft_config[adapter_name] = weighted_sum(self.model, adapters, weights, adapter_name)
        self.inject_adapter(self.model, adapter_name)

    # ---- files ------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Keys of the file to keys of the model, which may have a head more or less.

        Raises:
            CompatibilityError: If tensors are missing; the model has lost the adapter then.
            ConfigError: If the name is that of an adapter whose values have come already.
        """
        del config
        remapped: dict[str, Tensor] = {}
        missing: list[str] = []
        for path, layer in model.named_modules():
            if not isinstance(layer, GradiendLayer):
                continue
            if layer.names_of(adapter_name) and layer.holds_values(adapter_name):
                raise ConfigError(
                    f"Expected a new adapter name, but {adapter_name!r} is in use, and its feature "
                    f"factor and step size would stay. Delete it first, or choose another name."
                )
            for kind, name, file_name in layer.tensors_of(adapter_name):
                key = key_of(file_name, kind)
                found = state_dict.get(key)
                if found is None:
                    missing.append(key)
                else:
                    remapped[f"{path}.{kind}.{adapter_name}.{name}"] = found
        if missing:
            withdraw(model, adapter_name)
            getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise CompatibilityError(
                f"Expected all tensors of the adapter {adapter_name!r} in its file, but "
                f"{len(missing):,} are missing, for instance {missing[0]!r}. Is the file whole?"
            )
        return remapped

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # A LoRA around the module adds a step to its path, which is not in the file.
        plain = super()._remove_adapter_name_from_key(key, adapter_name)
        return plain.replace(f".base_layer.{LAYER_NAME}.", f".{LAYER_NAME}.")


@dataclass(frozen=True, eq=False)
class _Place:
    """Where in a model an adapter's values of one parameter go.

    Args:
        module_name: Module that gets the layer: the one of the parameter's plain name, which may
            be the layer of another adapter around the owner.
        owner: Module that owns the parameter.
        name: Name of the parameter in it.
        parameter: The parameter.
        entry: The parameter's entry in the configuration.
        backend: peft's backend, where the parameter is quantised.
    """

    module_name: str
    owner: nn.Module
    name: str
    parameter: nn.Parameter
    entry: dict
    backend: QuantizationBackend | None

    def layer(self, model: nn.Module, steering: Steering) -> GradiendLayer:
        """The layer at this place, made where there is none yet."""
        parent = model.get_submodule(self.module_name)
        layer = parent._modules.get(LAYER_NAME)
        if not isinstance(layer, GradiendLayer):
            layer = GradiendLayer(parent, self.owner, steering)
        if self.backend is not None:
            layer.quantization_backend = self.backend
        return layer


def _places(config: GradiendAdapterConfig, model: nn.Module) -> Iterator[_Place]:
    """Find the places of all of an adapter's parameters.

    Yields:
        One place per parameter, in order.

    Raises:
        CompatibilityError: If a weight is missing or has another shape.
        BaseModelError: If a weight is offloaded or quantised.
        ConfigError: If there is none.
    """  # noqa: DOC502 - raised by what it calls
    selection = ParameterSelection(
        tuple(SelectedParameter(e["name"], tuple(e["shape"])) for e in config.parameters)
    )
    if not config.parameters:
        raise ConfigError(
            "Expected a GRADIEND adapter with parameters, but its configuration names none. Make "
            "one with GradiendModel.to_adapter or GradiendAdapterConfig.from_gradiend."
        )
    check_quantization(model, set(selection.names))
    names = selection.names_in(model, wrapped=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for entry in config.parameters:
        own = names[entry["name"]]
        parameter = parameters[own]
        owner_name, _, name = own.rpartition(".")
        owner = model.get_submodule(owner_name)
        if parameter.is_meta or getattr(getattr(owner, "_hf_hook", None), "offload", False):
            refuse_offloaded(repr(own))
        yield _Place(
            owner_name.replace(".base_layer", ""),
            owner,
            name,
            parameter,
            entry,
            backend_of(model, owner, name),
        )
