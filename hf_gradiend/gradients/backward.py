"""Gradients by backward passes, streamed parameter by parameter.

One forward pass serves all losses of a batch. Each parameter's gradient is handed over as soon as
autograd has finished it, and freed there: peak memory is the base model, its activations and one
parameter's gradient.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_gradiend.base_models import (
    checkpointed_layers,
    evaluation_mode,
    sparse_embeddings,
    without_cache,
)
from hf_gradiend.data.collation import TargetBatch
from hf_gradiend.errors import NumericalError, SelectionError
from hf_gradiend.gradients.objectives import side_scores, target_log_probabilities
from hf_gradiend.parameters import ParameterSelection

Consume = Callable[[str, Tensor], None]
Key = TypeVar("Key")


class GradientStream:
    """Backward passes of one base model whose gradients go to a consumer instead of `.grad`.

    Made by `gradient_stream`; valid inside its context.

    Args:
        model: Base model, prepared by `gradient_stream`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.consume: Consume | None = None
        # Of the parameters that several modules share, what has come in of each sum.
        self.shared: dict[str, Tensor | None] = {}

    def losses(self, batch: TargetBatch, sides: Sequence[str]) -> dict[str, Tensor]:
        """Mean token loss over the batch for each side, from one forward pass.

        Args:
            batch: Texts with a factual and a counterfactual word, on the model's device.
            sides: Which of `"factual"`, `"counterfactual"` and `"diff"`.

        Returns:
            Scalars in nats, with their graph.

        Raises:
            NumericalError: If a loss is NaN or infinite.
            SelectionError: If no selected parameter lies on the way to the predictions.
        """  # noqa: DOC502 - raised by what it calls
        scores = self._scores(batch)
        return self._finite({side: side_scores(scores, side).mean() for side in sides})

    def word_losses(self, batch: TargetBatch) -> dict[int, Tensor]:
        """Mean token loss over the batch for each of its words, from one forward pass.

        Args:
            batch: Texts with any number of words, on the model's device.

        Returns:
            For each word's number a scalar in nats, with its graph.

        Raises:
            NumericalError: If a loss is NaN or infinite.
            SelectionError: If no selected parameter lies on the way to the predictions.
        """  # noqa: DOC502 - raised by what it calls
        return self._finite(dict(enumerate((-self._scores(batch)).mean(0).unbind())))

    def _scores(self, batch: TargetBatch) -> Tensor:
        scores = target_log_probabilities(self.model, batch)
        if not scores.requires_grad:
            raise SelectionError(
                f"Expected selected weights that the predictions depend on, but "
                f"{type(self.model).__name__} does not use any of them at the slot. Select others."
            )
        return scores

    def _finite(self, losses: dict[Key, Tensor]) -> dict[Key, Tensor]:
        for key, loss in losses.items():
            if not bool(torch.isfinite(loss)):
                raise NumericalError(
                    f"Expected a finite {key} loss, but got {loss.item()}. Check the base model's "
                    f"weights, or load it in float32 instead of {self.model.dtype}."
                )
        return losses

    def backward_each(
        self, losses: Mapping[Key, Tensor], consumer_of: Callable[[Key], Consume]
    ) -> None:
        """One backward pass for each loss of one forward pass.

        Args:
            losses: Scalars that share a graph; it is freed after the last.
            consumer_of: What takes the gradients of a loss, by its key.
        """
        left = len(losses)
        for key, loss in losses.items():
            left -= 1
            self.backward(loss, consumer_of(key), retain_graph=left > 0)

    def backward(self, loss: Tensor, consume: Consume, *, retain_graph: bool = False) -> None:
        """One backward pass; calls `consume(name, gradient)` once per selected parameter.

        Args:
            loss: Scalar with a graph over the base model.
            consume: Takes a parameter's name and its gradient of the parameter's shape and dtype;
                the tensor is freed after the call. Parameters that the loss does not reach are not
                handed over.
            retain_graph: Keep the graph for another loss of the same forward pass.
        """
        self.consume = consume
        try:
            loss.backward(retain_graph=retain_graph)
            for name in self.shared:
                gradient, self.shared[name] = self.shared[name], None
                if gradient is not None:
                    consume(name, _dense(gradient))
        finally:
            self.consume = None
            self.shared = dict.fromkeys(self.shared)

    def hand_over(self, parameter: nn.Parameter, *, name: str) -> None:
        """Hook of a parameter: pass its finished gradient on and free it."""
        gradient, parameter.grad = parameter.grad, None
        if self.consume is None or gradient is None:
            return
        if gradient.is_sparse:  # the rows of a token that occurs twice, in an order of their own
            gradient = gradient.coalesce()
        if name not in self.shared:
            self.consume(name, _dense(gradient))
            return
        held = self.shared[name]
        if held is None:
            self.shared[name] = gradient
        else:  # in place of a third tensor, as autograd makes one
            self.shared[name] = gradient.add_(held) if held.is_sparse else held.add_(gradient)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


@contextmanager
def gradient_stream(
    model: PreTrainedModel,
    selection: ParameterSelection,
    *,
    checkpointing: bool = False,
    kind: Callable[[PreTrainedModel], GradientStream] = GradientStream,
) -> Iterator[GradientStream]:
    """Prepare a base model for streamed gradients; leaves it bit for bit as it was, also on error.

    Inside, dropout is off and only the selected parameters require a gradient.

    Args:
        model: Base model.
        selection: Parameters whose gradients are wanted.
        checkpointing: Keep the inputs of the layers alone for the backward pass, which then
            computes each layer once more.
        kind: Makes the stream.

    Yields:
        The stream of the base model's gradients.

    Raises:
        BaseModelError: If checkpointing is asked for and the base model does not support it.
    """  # noqa: DOC502 - raised by checkpointed_layers
    parameters = selection.parameters(model)
    chosen = {id(parameter) for parameter in parameters.values()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    stream = kind(model)
    handles = []
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        with ExitStack() as stack:
            twins = stack.enter_context(_untied(model, parameters))
            stream.shared = dict.fromkeys(name for name, _ in twins)
            for name, parameter in (*parameters.items(), *twins):
                hook = partial(stream.hand_over, name=name)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(without_cache(model))
            stack.enter_context(sparse_embeddings(model))
            stack.enter_context(torch.enable_grad())
            if checkpointing:
                stack.enter_context(checkpointed_layers(model))
            yield stream
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def _untied(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Give each module that shares a parameter one of its own, of the same memory.

    A head and a table of embeddings that are one parameter then finish their gradients apart, to be
    added in place. FSDP2 shares out parameters that are known to it: those stay.

    Yields:
        The new parameters, each with the name of the one that it stands for.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    places = [
        (module, attribute, parameter)
        for module in model.modules()
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in names and not isinstance(parameter, DTensor)
    ]
    seen: set[int] = set()
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    twins: list[tuple[str, nn.Parameter]] = []
    try:
        for module, attribute, parameter in places:
            if id(parameter) in seen:
                twin = nn.Parameter(parameter.detach())
                replaced.append((module, attribute, parameter))
                setattr(module, attribute, twin)
                twins.append((names[id(parameter)], twin))
            seen.add(id(parameter))
        yield twins
    finally:
        for module, attribute, parameter in replaced:
            setattr(module, attribute, parameter)


def gradients(
    model: PreTrainedModel,
    batch: TargetBatch,
    selection: ParameterSelection,
    sides: Sequence[str] = ("factual", "counterfactual"),
) -> dict[str, dict[str, Tensor]]:
    """Gradients of the mean token losses of one batch, for every side.

    Args:
        model: Base model; left as it was.
        batch: Texts with a factual and a counterfactual word, on the model's device.
        selection: Parameters with respect to which the gradients are taken.
        sides: Which of `"factual"`, `"counterfactual"` and `"diff"`.

    Returns:
        For each side, selected values per parameter name (shape `values_shape`), float32, in nats
        per unit of weight; zero where the loss does not depend on a parameter. Holds
        `len(sides) · n_selected` numbers.

    Raises:
        NumericalError: If a loss is NaN or infinite.

    References:
        Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 3.1.
    """  # noqa: DOC502 - raised by losses
    result = {
        side: {entry.name: torch.zeros(entry.values_shape) for entry in selection} for side in sides
    }
    entries = {entry.name: entry for entry in selection}
    with gradient_stream(model, selection) as stream:

        def keeper(side: str) -> Consume:
            def keep(name: str, gradient: Tensor) -> None:
                result[side][name] = entries[name].gather(gradient).float()

            return keep

        stream.backward_each(stream.losses(batch, sides), keeper)
    return result


def encode_by_backward(
    model: PreTrainedModel,
    batch: TargetBatch,
    selection: ParameterSelection,
    directions: Mapping[str, Tensor],
    sides: Sequence[str] = ("factual", "counterfactual"),
) -> Tensor:
    """Projections W_e·∇L by a backward pass and a dot product: the oracle of the forward-mode path.

    Args:
        model: Base model; left as it was.
        batch: A batch of one text.
        selection: Parameters that the directions cover.
        directions: Selected values of W_e, of shape `(n_features, *values_shape)`.
        sides: Which gradients to project.

    Returns:
        Projections of shape `(sides, n_features)`, float32.
    """
    found = gradients(model, batch, selection, sides)
    projections: list[Tensor] = []
    for side in sides:
        parts = [
            directions[name].float().flatten(1) @ values.flatten()  # -> (n_features,)
            for name, values in found[side].items()
        ]
        projections.append(torch.stack(parts).sum(0))
    return torch.stack(projections)
