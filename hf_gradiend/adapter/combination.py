"""Several adapters of a model as one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from hf_gradiend.adapter.config import GradiendAdapterConfig, finite
from hf_gradiend.adapter.control import adapter_of
from hf_gradiend.adapter.layer import GradiendLayer
from hf_gradiend.adapter.values import LAYER_NAME, AdapterValues, entry_of
from hf_gradiend.errors import ConfigError


def weighted_sum(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> GradiendAdapterConfig:
    """Configuration, with values, of an adapter that adds what several add, each times a weight.

    Args:
        model: transformers model that has the adapters.
        adapters: Their names.
        weights: One number per adapter; multiplies its strength.
        adapter_name: Name of the new adapter.

    Raises:
        ConfigError: If a name is unknown or taken, or there is not one weight per adapter.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ConfigError(
            f"Expected one weight per adapter, but got {len(adapters)} adapters and "
            f"{len(weights)} weights."
        )
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigError(f"Expected a new adapter name, but {adapter_name!r} is taken.")
    configs = [adapter_of(model, name)[1] for name in adapters]
    scales = [
        finite("weight", weight) * config.strength * config.step_size
        for weight, config in zip(weights, configs, strict=True)
    ]
    layers = {
        path.removesuffix(LAYER_NAME).replace(".base_layer", ""): module
        for path, module in model.named_modules()
        if isinstance(module, GradiendLayer)
    }
    shapes = {e["name"]: tuple(e["shape"]) for config in configs for e in config.parameters}
    values: dict[str, AdapterValues] = {}
    for name, shape in shapes.items():
        module_name, dot, leaf = name.rpartition(".")
        layer = layers[module_name + dot]
        parts = [
            layer.values_of(adapter, leaf) if leaf in layer.names_of(adapter) else None
            for adapter in adapters
        ]
        values[name] = _summed(parts, scales, [config.n_features for config in configs], shape)
    pairs = [pair for config in configs for pair in config.feature_classes or ()]
    config = replace(
        configs[0],
        parameters=[entry_of(name, shape, values[name]) for name, shape in shapes.items()],
        n_features=sum(config.n_features for config in configs),
        feature_factor=[h for config in configs for h in config.feature_factor],
        feature_classes=pairs or None,
        step_size=1.0,
        strength=1.0,
        dtype="float32",
        selection_fingerprint=None,
        gradiend_name_or_path=None,
    )
    config.values = values
    return config


def _summed(
    parts: Sequence[AdapterValues | None],
    scales: Sequence[float],
    sizes: Sequence[int],
    shape: tuple[int, ...],
) -> AdapterValues:
    """Values of several adapters for one parameter as those of one, features side by side."""
    held = [part for part in parts if part is not None]
    device = held[0].bias.device
    indices = None
    if all(part.indices is not None for part in held):
        indices = torch.cat([part.indices for part in held]).unique()  # pyright: ignore[reportArgumentType]
    n_values = torch.Size(shape).numel() if indices is None else len(indices)
    bias = torch.zeros(n_values, device=device)
    weight = torch.zeros(sum(sizes), n_values, device=device)
    first = 0
    for part, scale, size in zip(parts, scales, sizes, strict=True):
        if part is not None:
            at = torch.arange(n_values, device=device)
            if part.indices is not None:
                at = part.indices if indices is None else torch.searchsorted(indices, part.indices)
            bias.index_add_(0, at, part.bias.reshape(-1).float(), alpha=scale)
            if part.weight is not None:
                rows = part.weight.reshape(size, -1).float()
                weight[first : first + size].index_add_(1, at, rows, alpha=scale)
        first += size
    values_shape = shape if indices is None else (n_values,)
    return AdapterValues(
        weight.view(-1, *values_shape) if len(weight) else None,
        bias.view(values_shape),
        indices,
    )
