"""Dialling the adapters of a loaded model, whether it is a `PeftModel` or a transformers model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from hf_gradiend.adapter.config import GradiendAdapterConfig, feature_factor_of, finite
from hf_gradiend.adapter.layer import steering_of
from hf_gradiend.adapter.steering import Steering
from hf_gradiend.errors import ConfigError


def set_strength(model: nn.Module, strength: float, adapter_name: str | None = None) -> None:
    """Set how strongly an adapter acts; takes effect at once.

    Args:
        model: `PeftModel`, or a transformers model after `load_adapter`.
        strength: 1 is the edit as it was chosen, 0 the base model, negative numbers the opposite.
        adapter_name: Name of the adapter; `None` for the active one.

    Raises:
        ConfigError: If the model has no GRADIEND adapter of that name, or the number is not finite.
    """  # noqa: DOC502 - raised by what it calls
    steering, config = adapter_of(model, adapter_name)
    config.strength = finite("strength", strength)
    steering.sync()


def get_strength(model: nn.Module, adapter_name: str | None = None) -> float:
    """How strongly an adapter acts.

    Args:
        model: `PeftModel`, or a transformers model after `load_adapter`.
        adapter_name: Name of the adapter; `None` for the active one.

    Raises:
        ConfigError: If the model has no GRADIEND adapter of that name.
    """  # noqa: DOC502 - raised by adapter_of
    return adapter_of(model, adapter_name)[1].strength


@contextmanager
def strength(
    model: nn.Module, strength: float, adapter_name: str | None = None
) -> Iterator[nn.Module]:
    """Context in which an adapter acts with another strength.

    Args:
        model: `PeftModel`, or a transformers model after `load_adapter`.
        strength: As in `set_strength`.
        adapter_name: Name of the adapter; `None` for the active one.

    Yields:
        The model.

    Raises:
        ConfigError: If the model has no GRADIEND adapter of that name, or the number is not finite.
    """  # noqa: DOC502 - raised by set_strength
    before = get_strength(model, adapter_name)
    set_strength(model, strength, adapter_name)
    try:
        yield model
    finally:
        set_strength(model, before, adapter_name)


def set_edit(
    model: nn.Module,
    feature_factor: float | Sequence[float] | None = None,
    step_size: float | None = None,
    adapter_name: str | None = None,
) -> None:
    """Set the feature factor and the step size of an adapter; takes effect at once.

    Args:
        model: `PeftModel`, or a transformers model after `load_adapter`.
        feature_factor: h, one number per feature; `None` leaves it.
        step_size: α, in units of weight per unit of gradient; `None` leaves it.
        adapter_name: Name of the adapter; `None` for the active one.

    Raises:
        ConfigError: If the model has no GRADIEND adapter of that name, a number is not finite, or
            the adapter was made for a fixed feature factor.
    """  # noqa: DOC502 - raised by what it calls
    steering, config = adapter_of(model, adapter_name)
    h, alpha = config.feature_factor, config.step_size
    if feature_factor is not None:
        h = feature_factor_of(feature_factor, config.n_features)
    if step_size is not None:
        alpha = finite("step size", step_size)
    config.feature_factor, config.step_size = h, alpha
    steering.sync()


def adapter_of(
    model: nn.Module, adapter_name: str | None
) -> tuple[Steering, GradiendAdapterConfig]:
    """The steering of a model, and the configuration of one of its adapters.

    Raises:
        ConfigError: If there is no such adapter, or no name was given and not one alone is active.
    """
    steering = steering_of(model)
    if steering is None:
        raise ConfigError(
            f"Expected a model with a GRADIEND adapter, but {type(model).__name__} has none. Load "
            f"one with PeftModel.from_pretrained or model.load_adapter."
        )
    layers = steering.layers
    known = list(dict.fromkeys(n for layer in layers for n in layer.gradiend_decoder_bias))
    if adapter_name is None:
        active = [name for name in known if any(name in layer.active_adapters for layer in layers)]
        if len(active) != 1:
            raise ConfigError(
                f"Expected the name of an adapter where not one alone is active; the model has "
                f"{', '.join(map(repr, known))}."
            )
        adapter_name = active[0]
    if adapter_name not in known:
        raise ConfigError(
            f"Expected the name of a GRADIEND adapter of the model, one of "
            f"{', '.join(map(repr, known))}, but got {adapter_name!r}."
        )
    return steering, steering.configs[adapter_name]
