"""Encodings without a gradient: one forward-mode pass gives W_e·∇L for every text of a batch.

W_e·∇L is the directional derivative of the loss along W_e. Every selected parameter carries W_e as
its tangent through a forward pass; the tangent of each log-probability is then what the encoder
would have read from that token's gradient. No backward pass, no vector of n numbers per text.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import (
    evaluation_mode,
    objective_of,
    pad_token_id_of,
    without_cache,
)
from hf_gradiend.data.collation import (
    PreparedTexts,
    Rows,
    TargetBatch,
    prepare_texts,
)
from hf_gradiend.errors import BaseModelError, NumericalError
from hf_gradiend.gradients.objectives import side_scores, target_log_probabilities
from hf_gradiend.gradients.packing import passes_over
from hf_gradiend.parameters import ParameterSelection, SelectedParameter, selection_of

# Tangents made at a time, where they are not views of the direction itself.
TANGENT_BYTES = 2**30

_DIFFERENTIABLE_ATTENTION = ("eager", "sdpa", None)


@dataclass(frozen=True)
class TextEncodings:
    """Encodings of texts, each of shape `(texts, n_features)`, in [−1, 1].

    Args:
        source: Encodings of the gradient that the GRADIEND was trained to read.
        factual: Encodings of the factual token's gradient; `None` when the source is `"diff"`.
        counterfactual: Encodings of the counterfactual token's gradient; likewise.
    """

    source: Tensor
    factual: Tensor | None
    counterfactual: Tensor | None


def directional_derivatives(
    model: PreTrainedModel, batch: TargetBatch, tangents: Mapping[str, Tensor]
) -> Tensor:
    """Derivatives of each word's log-probability along a direction in weight space.

    Args:
        model: Base model with eager or sdpa attention; left as it was.
        batch: Texts and words, on the model's device.
        tangents: Direction, one tensor of the parameter's shape, dtype and device per name.

    Returns:
        Derivatives of shape `(texts, words)`, in nats per unit of the direction, float32.

    Raises:
        BaseModelError: If the attention has no forward derivative.

    References:
        Baydin et al. (2018), https://arxiv.org/abs/1502.05767, section 3.1 (forward mode).
    """
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in _DIFFERENTIABLE_ATTENTION:
        raise BaseModelError(
            f"Expected a base model with eager or sdpa attention, which have a forward derivative, "
            f"but got {attention!r}. Call model.set_attn_implementation('sdpa') first."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # The fused attention kernels have no forward derivative; the MATH backend has.
    with (
        torch.no_grad(),
        evaluation_mode(model),
        without_cache(model),
        sdpa_kernel(SDPBackend.MATH),
        forward_ad.dual_level(),
    ):
        duals = {
            name: forward_ad.make_dual(parameters[name].detach(), tangent)
            for name, tangent in tangents.items()
        }
        scores = torch.func.functional_call(
            _Scorer(model), {f"model.{name}": dual for name, dual in duals.items()}, (batch,)
        )
        derivative = forward_ad.unpack_dual(scores).tangent
    if derivative is None:  # no selected parameter lies on the way to the logits
        return torch.zeros(batch.n_texts, batch.n_words, device=scores.device)
    return derivative


class _Scorer(nn.Module):
    """The scores of a batch as a module's forward pass, where `functional_call` can swap weights.

    `functional_call` gives tied weights one shared dual tensor.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TargetBatch) -> Tensor:
        return target_log_probabilities(self.model, batch)


def tangents_of(
    model: PreTrainedModel, selection: ParameterSelection, direction: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A direction as tangents: full tensors under the model's own names, in its dtype and device.

    Args:
        model: Base model.
        selection: Parameters that the direction covers.
        direction: Selected values per name, of shape `values_shape`.
    """
    own_names = {id(p): name for name, p in model.named_parameters()}
    tangents: dict[str, Tensor] = {}
    for entry, parameter in zip(selection, selection.parameters(model).values(), strict=True):
        full = entry.scatter(direction[entry.name].detach())
        tangents[own_names[id(parameter)]] = full.to(parameter.device, parameter.dtype)
    return tangents


def tangent_groups(
    model: PreTrainedModel,
    selection: ParameterSelection,
    direction: Mapping[str, Tensor],
) -> list[ParameterSelection]:
    """The parts of a selection whose tangents are made at a time, a pass over the texts each.

    Tangents that are views of the direction cost nothing; the others of a part take at most
    `TANGENT_BYTES`, or are those of one parameter.

    Args:
        model: Base model.
        selection: Parameters that the direction covers.
        direction: Selected values per name, of shape `values_shape`.
    """
    parameters = selection.parameters(model)
    return selection.groups(
        lambda entry: tangent_bytes(entry, parameters[entry.name], direction[entry.name]),
        TANGENT_BYTES,
    )


def tangent_bytes(entry: SelectedParameter, parameter: Tensor, values: Tensor) -> int:
    """Size of the tangent that `tangents_of` makes of a direction's values; 0 for a view of them.

    Args:
        entry: Which weights of the parameter are selected.
        parameter: The base model's parameter.
        values: The direction's values, or a tensor of their type and device.
    """
    alike = (parameter.dtype, parameter.device) == (values.dtype, values.device)
    dense = entry.indices is None
    return 0 if alike and dense else entry.n_entries * parameter.element_size()


def project_texts(
    model: PreTrainedModel,
    texts: PreparedTexts,
    selection: ParameterSelection,
    direction: Mapping[str, Tensor],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    progress: str | None = None,
) -> Tensor:
    """Projections of every word's token gradient on a direction, W_e·∇(−log p).

    A projection is linear in its direction. Where the tangents of all parameters would take more
    memory than allowed, it is the sum over groups of parameters, a pass over the texts for each.

    Args:
        model: Base model; left as it was.
        texts: Tokenised texts.
        selection: Parameters that the direction covers.
        direction: Selected values per name.
        pad_token_id: Token id to pad with.
        batch_size: Texts per pass.
        progress: Text of a progress bar; `None` for no bar.

    Returns:
        Projections of shape `(rows of the data set, words)`, float32, on the CPU; NaN for texts
        that were skipped.

    Raises:
        NumericalError: If a projection of a text is NaN or infinite.
    """
    scale = _scale_for(model, direction)
    groups = tangent_groups(model, selection, direction)
    n_words = len(texts[0].readings)
    projections = torch.full((texts.n_rows, n_words), torch.nan)
    projections[[text.index for text in texts]] = 0.0
    with tqdm(
        total=len(groups) * len(texts), desc=progress, unit="text", disable=progress is None
    ) as bar:
        for group in groups:
            scaled = {name: direction[name].detach() / scale for name in group.names if scale != 1}
            tangents = tangents_of(model, group, scaled or direction)
            for part, batch in passes_over(
                model, texts, pad_token_id=pad_token_id, batch_size=batch_size
            ):
                found = -scale * directional_derivatives(model, batch, tangents).float().cpu()
                if not bool(torch.isfinite(found).all()):
                    raise NumericalError(
                        "Expected finite encodings, but got NaN or infinity. Check the weights of "
                        "the GRADIEND and of the base model."
                    )
                projections[[text.index for text in part]] += found
                bar.update(len(part))
    return projections


def _scale_for(model: PreTrainedModel, direction: Mapping[str, Tensor]) -> float:
    """Power of two that brings a direction into float16's range; 1 for the other types."""
    if model.dtype != torch.float16:
        return 1.0
    largest = max(float(values.detach().abs().max()) for values in direction.values())
    return 2.0 ** math.frexp(largest)[1] if 0.0 < largest < math.inf else 1.0


def encode_texts(
    gradiend,  # noqa: ANN001 - a GradiendModel; modeling stands after gradients
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Rows,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
) -> TextEncodings:
    """Encodings of the factual and the counterfactual token of every text, in one pass per feature.

    Args:
        gradiend: The `GradiendModel`.
        model: Base model; left as it was.
        tokenizer: Its tokenizer.
        dataset: Rows with `text`, `factual` and `counterfactual`.
        batch_size: Texts per pass.
        max_length: Longest input in tokens.
        progress: Show a progress bar.

    Returns:
        Encodings on the CPU, float32; NaN for texts without room for their target.

    Raises:
        NumericalError: If the GRADIEND holds NaN.
        CompatibilityError: If it was made for another base model.
    """  # noqa: DOC502 - raised below
    texts = prepare_texts(dataset, tokenizer, objective_of(model), max_length=max_length)
    selection = selection_of(gradiend)
    encodings: dict[str, list[Tensor]] = {"source": [], "factual": [], "counterfactual": []}
    for feature in range(gradiend.config.n_features):
        projections = project_texts(
            model,
            texts,
            selection,
            {name: gradiend.encoder.weight.at(name)[feature] for name in gradiend.names},
            pad_token_id=pad_token_id_of(tokenizer),
            batch_size=batch_size,
            progress="Encoding texts" if progress else None,
        )
        bias = gradiend.encoder.bias[feature].detach().float().cpu()
        # project_texts has the sign of a loss already; side_scores expects log-probabilities.
        sides = {
            side: side_scores(-projections, side) for side in ("factual", "counterfactual", "diff")
        }
        for name, side in (
            ("source", gradiend.config.source),
            ("factual", "factual"),
            ("counterfactual", "counterfactual"),
        ):
            encodings[name].append(torch.tanh(sides[side] + bias))
    stacked = {name: torch.stack(columns, dim=1) for name, columns in encodings.items()}
    if gradiend.config.source == "diff":
        return TextEncodings(stacked["source"], None, None)
    return TextEncodings(stacked["source"], stacked["factual"], stacked["counterfactual"])
