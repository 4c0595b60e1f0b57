"""Export as a merged checkpoint, edited file by file without loading the model."""

import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.adapter.export.checkpoint import Checkpoint, NotStreamableError, Stored
from hf_gradiend.adapter.export.fidelity import (
    ExportReport,
    Outcome,
    Placed,
    check_new_folder,
    energy_of,
    export_folder,
    placed_in,
    report_of,
)
from hf_gradiend.base_models import load_base_model

logger = logging.getLogger(__name__)


def export_merged(
    adapter: GradiendAdapter,
    base_model_name_or_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> ExportReport:
    """Write the base model's checkpoint with the update added to its weights.

    The sum is taken in float32 and rounded once to the stored type: bit for bit what merging into
    the loaded model gives. The safetensors files are copied and edited in place, one weight in
    memory at a time. Where that cannot be (other formats, or weights that transformers renames or
    rearranges when it loads them) the model is loaded, edited and saved, and the log says so.

    Args:
        adapter: Adapter; its strength is folded in.
        base_model_name_or_path: Folder or Hub id of the base model.
        output_dir: New or empty folder; also gets the configuration and the tokenizer.
        revision: Branch, tag or commit of the base model on the Hub.
        gguf_file: Name of a GGUF file in that place; its weights are written as float32.
        token: Token for a private repository.
        progress: Show a progress bar.

    Returns:
        What the stored type keeps of the update; also in export_report.json.

    Raises:
        BaseModelError: If there is no such base model, or it is quantised.
        CompatibilityError: If the adapter was made for another base model.
        ConfigError: If the update is zero.
        OutputError: If the folder is not empty, or cannot be written to.
    """  # noqa: DOC502 - raised by what it calls
    check_new_folder(output_dir)
    place = os.fspath(base_model_name_or_path)
    checkpoint = None
    if gguf_file is None:
        try:
            checkpoint = Checkpoint.of(adapter, place, revision=revision, token=token)
        except NotStreamableError as reason:
            logger.warning("Loading the whole base model to merge into it: %s", reason)
    if checkpoint is None:
        return _load_and_save(
            adapter, place, output_dir, revision=revision, gguf_file=gguf_file, token=token
        )
    with export_folder(output_dir) as folder:
        for name, file in {**checkpoint.companions, **checkpoint.weights}.items():
            shutil.copyfile(file, folder / name)
        outcomes = [
            _edit_file(adapter, checkpoint.weights[stored.file], folder / stored.file, stored)
            for stored in tqdm(checkpoint.stored, disable=not progress, desc="Merging")
        ]
        return report_of("merged", outcomes, folder)


def edited(adapter: GradiendAdapter, placed: Placed, original: Tensor) -> tuple[Tensor, Outcome]:
    """A weight plus its update, and what rounding it loses.

    Args:
        adapter: Adapter.
        placed: The parameter.
        original: Its value, of floating-point numbers; not changed.
    """
    update = adapter.update(placed.name).view(-1)
    result = original.clone(memory_format=torch.contiguous_format)
    flat, indices = result.view(-1), adapter.values[placed.name].indices
    # Entries that a sparse adapter does not touch keep their bits: −0 + 0 would be +0.
    at = slice(None) if indices is None else indices.to(torch.int64)
    before = flat[at].float()
    after = (before + update[at]).to(flat.dtype)
    lost = energy_of(after.float() - before - update[at])
    flat[at] = after
    return result, Outcome(placed, energy_of(update), lost)


def _edit_file(adapter: GradiendAdapter, source: Path, copy: Path, stored: Stored) -> Outcome:
    """Overwrite one weight in a copied file: its type, shape and place stay the same."""
    with safe_open(source, framework="pt") as tensors:
        result, outcome = edited(adapter, stored.placed, tensors.get_tensor(stored.key))
    with copy.open("r+b") as file:
        file.seek(stored.offset)
        file.write(result.view(-1).view(torch.uint8).numpy().data)
    return outcome


@torch.no_grad()
def _load_and_save(
    adapter: GradiendAdapter,
    place: str,
    output_dir: str | os.PathLike[str],
    *,
    revision: str | None,
    gguf_file: str | None,
    token: str | bool | None,
) -> ExportReport:
    model, tokenizer = load_base_model(
        place,
        revision=revision,
        gguf_file=gguf_file,
        objective="causal" if adapter.config.task_type == "CAUSAL_LM" else None,
        dtype="auto" if gguf_file is None else torch.float32,
        token=token,
    )
    outcomes: list[Outcome] = []
    for placed in placed_in(adapter, model):
        result, outcome = edited(adapter, placed, placed.parameter)
        placed.parameter.copy_(result)
        outcomes.append(outcome)
    with export_folder(output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return report_of("merged", outcomes, folder)
