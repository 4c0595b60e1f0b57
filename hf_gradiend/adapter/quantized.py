"""Adapters on quantised weights, which cannot be edited in place: the update acts beside them."""

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import torch
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional

from hf_gradiend.adapter.steering import Term
from hf_gradiend.errors import BaseModelError

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

SUPPORTED = ("torchao", "bnb 8bit")  # names of peft's backends


def backend_of(model: nn.Module, owner: nn.Module, name: str) -> "QuantizationBackend | None":
    """Backend of peft for a quantised weight; `None` for one of ordinary numbers.

    Args:
        model: Base model, which says how it was quantised.
        owner: Module that owns the weight.
        name: Name of the weight in it.

    Raises:
        BaseModelError: If it is quantised in a way that the adapter does not support.
    """
    weight = owner._parameters[name]
    found = resolve_quantization_backend(owner, **get_quantization_kwargs(model))  # pyright: ignore[reportArgumentType]
    if found is None or name != "weight":
        found = None
        if weight.is_floating_point():  # pyright: ignore[reportOptionalMemberAccess]
            return None
    if found is None or found.backend_name not in SUPPORTED:
        how = found.backend_name if found is not None else str(weight.dtype)  # pyright: ignore[reportOptionalMemberAccess]
        raise BaseModelError(
            f"Expected base-model weights in floating point, or int8 of torchao or bitsandbytes, "
            f"but {name!r} of a {type(owner).__name__} is quantised ({how}), on which the adapter "
            f"was not found to be right. Write the merged model with `hf-gradiend export --to "
            f"merged` and quantise that."
        )
    return found


def check_quantization(model: nn.Module, names: Set[str]) -> None:
    """Refuse a model in which one of the named weights has an unsupported quantisation.

    Packed weights have other shapes, which would otherwise be taken for those of another model.

    Args:
        model: Base model.
        names: Plain names of the adapter's parameters.

    Raises:
        BaseModelError: If there is such a weight.
    """  # noqa: DOC502 - raised by backend_of
    if getattr(model, "is_quantized", False):
        for path, module in model.named_modules():
            if f"{path}.weight".replace(".base_layer", "") in names:
                backend_of(model, module, "weight")


class QuantizedSite:
    """A quantised weight of a linear layer: outputs get x·ΔWᵀ added.

    Exact up to the rounding of the activations' type; the quantised weight stays as it is until
    `bake`. Costs one dense matrix of that type and one more product.

    Args:
        owner: The linear layer.
        backend: peft's backend for it.
    """

    def __init__(self, owner: nn.Module, backend: "QuantizationBackend") -> None:
        self.owner, self.backend = owner, backend
        self.key: tuple = ()
        self.delta: Tensor | None = None
        self.handle = owner.register_forward_hook(self._add)

    def write(self, terms: Sequence[Term]) -> None:
        """Make the layer act as the original plus these terms; nothing where it does already."""
        key = tuple(term.key for term in terms)
        if key == self.key:
            return
        weight: Tensor = self.owner.weight  # pyright: ignore[reportAssignmentType]
        delta = torch.zeros(weight.shape, device=weight.device).view(-1)
        for term in terms:
            if term.indices is None:
                delta += term.update.values()
            else:
                delta.index_add_(0, term.indices, term.update.values())
        self.delta, self.key = delta.view(weight.shape), key

    def restore(self) -> None:
        """Let the layer act as it was."""
        self.handle.remove()
        self.delta, self.key = None, ()

    def bake(self) -> None:
        """Quantise the weight anew with the update in it; rounds as the quantisation does."""
        if self.delta is not None:
            weight = self.backend.get_base_weight(self.owner)
            merged = (weight.float() + self.delta.float()).to(weight.dtype)
            self.backend.set_base_weight(_Owned(self.owner), merged)
        self.restore()

    def _add(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.delta is None:
            return output
        self.delta = self.delta.to(inputs[0].dtype)
        return output + functional.linear(inputs[0], self.delta).to(output.dtype)


class _Owned:
    """What peft's backends ask of a layer: the module whose weight they set."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def get_base_layer(self) -> nn.Module:
        return self.owner
