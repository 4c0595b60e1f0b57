"""How much of an adapter's effect on a model's predictions an export keeps."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.base_models import (
    evaluation_mode,
    objective_of,
    pad_token_id_of,
    trainability_kept,
)
from hf_gradiend.data.collation import PreparedTexts, prepare_texts
from hf_gradiend.data.templates import picture_prompts
from hf_gradiend.errors import NumericalError
from hf_gradiend.gradients.objectives import site_log_probabilities
from hf_gradiend.gradients.packing import passes_over


@dataclass(frozen=True)
class EffectReport:
    """What an export does to a model's predictions, beside what the adapter does.

    Args:
        effect_kept: ⟨Δ', Δ⟩ / ⟨Δ, Δ⟩ of the shifts Δ (adapter) and Δ' (export) of all
            log-probabilities at the slots; 1 is all, 0 nothing.
        kl_export: KL(adapter ‖ export) in nats, mean over the slots; 0 is all kept.
        kl_base: KL(adapter ‖ base model) in nats, mean over the slots: what no edit at all gives.
        n_positions: Number of slots, or tokens in them.
    """

    effect_kept: float
    kl_export: float
    kl_base: float
    n_positions: int


def measure_effect(
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    adapter: GradiendAdapter,
    export_dir: str | os.PathLike[str],
    *,
    texts: Sequence[str] | None = None,
    word: str = "she",
    batch_size: int = 32,
) -> EffectReport:
    """Read the slots of some texts three times: without an edit, with the adapter, with the export.

    Costs three passes over the texts, and three times slots × vocabulary float32 numbers.

    Args:
        base_model: Base model with its head; its weights and their flags are left as they were.
        processing_class: Its tokenizer.
        adapter: The adapter.
        export_dir: Folder that `export_lora` or `export_supertuning` wrote.
        texts: Texts with the slot `[TARGET]`; `None` for the package's occupations.
        word: A word that fits the slots, which says how many tokens of them are read.
        batch_size: Texts per forward pass.

    Raises:
        NumericalError: If the adapter does not change the predictions, so that no share of it is
            defined, or they are NaN.
        DataError: If a text has no slot.
    """  # noqa: DOC502 - DataError is raised by prepare_texts
    rows = [{"text": text, "word": word} for text in texts or picture_prompts()["text"]]
    read = prepare_texts(rows, processing_class, objective_of(base_model), words=("word",))
    pad = pad_token_id_of(processing_class)
    base = _log_probabilities(base_model, read, pad, batch_size)
    with adapter.applied(base_model):
        true = _log_probabilities(base_model, read, pad, batch_size)
    with trainability_kept(base_model):
        exported = PeftModel.from_pretrained(base_model, export_dir)
        try:
            export = _log_probabilities(base_model, read, pad, batch_size)
        finally:
            exported.unload()
    return effect_of(base, true, export)


def effect_of(base: Tensor, true: Tensor, export: Tensor) -> EffectReport:
    """The effect from log-probabilities `(positions, vocabulary)` of the three models, in nats.

    Raises:
        NumericalError: If the first two are equal, or anything is NaN.
    """
    # Normalised again: the rounding of float32 can make a small divergence negative.
    base, true, export = (held.double().log_softmax(-1) for held in (base, true, export))
    shift = true - base
    norm = float(shift.square().sum())
    if not norm > 0.0 or not norm < float("inf"):
        raise NumericalError(
            f"Expected an adapter that shifts the predictions at the slots, but the squared norm "
            f"of the shift is {norm}. Its strength may be too small for the model's dtype, or its "
            f"values broken."
        )
    probability = true.exp()
    return EffectReport(
        effect_kept=float(((export - base) * shift).sum()) / norm,
        kl_export=float((probability * (true - export)).sum(-1).mean()),
        kl_base=float((probability * shift).sum(-1).mean()),
        n_positions=len(base),
    )


@torch.no_grad()
def _log_probabilities(
    model: PreTrainedModel, texts: PreparedTexts, pad_token_id: int, batch_size: int
) -> Tensor:
    with evaluation_mode(model):
        passes = passes_over(model, texts, pad_token_id=pad_token_id, batch_size=batch_size)
        return torch.cat([site_log_probabilities(model, batch).cpu() for _, batch in passes])
