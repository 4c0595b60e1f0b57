"""Export as peft's Supertuning: the largest entries of each linear layer's update."""

import os

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.adapter.export.fidelity import (
    ExportReport,
    Outcome,
    energy_of,
    export_folder,
    placed_in,
    report_of,
)
from hf_gradiend.adapter.values import ADAPTER_FILE
from hf_gradiend.base_models import check_base_model
from hf_gradiend.errors import ConfigError


def export_supertuning(
    adapter: GradiendAdapter,
    base_model: PreTrainedModel,
    output_dir: str | os.PathLike[str],
    *,
    fraction: float = 0.01,
    progress: bool = True,
) -> ExportReport:
    """Write a Supertuning adapter (peft 0.21 or later) with the largest entries of the update.

    It has room for the weights of nn.Linear alone, with the same density in each layer; everything
    else, and weights that several modules share, is left out, and the report says so.

    Args:
        adapter: Adapter; its strength is folded in.
        base_model: Base model; not changed.
        output_dir: New or empty folder.
        fraction: Share of each weight's entries to keep, in (0, 1].
        progress: Show a progress bar.

    Returns:
        What the export keeps; also in export_report.json.

    Raises:
        ConfigError: If the fraction is not allowed, peft is too old, or there is no room for
            anything of the update.
        CompatibilityError: If the adapter was made for another base model.
        OutputError: If the folder is not empty, or cannot be written to.
    """  # noqa: DOC502 - the last two are raised by what it calls
    try:
        from peft import SupertuningConfig  # noqa: PLC0415 - newer peft only
    except ImportError as error:
        raise ConfigError(
            "Expected peft 0.21 or later, which brings Supertuning. Upgrade peft, or export a LoRA."
        ) from error
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"Expected a fraction to keep in (0, 1], but got {fraction!r}.")
    check_base_model(base_model)
    sparsity = 1.0 - fraction
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    outcomes: list[Outcome] = []
    for placed in tqdm(placed_in(adapter, base_model), disable=not progress, desc="Supertuning"):
        update = adapter.update(placed.name).view(-1)
        total = energy_of(update)
        n_kept = int(update.numel() * (1 - sparsity))  # as peft counts them, rounding included
        if placed.kind != "linear" or not n_kept or not total:
            outcomes.append(Outcome(placed, total, total, left_out=total != 0.0))
            continue
        indices = update.abs().topk(n_kept).indices.sort().values
        values = update[indices]
        key = f"base_model.model.{placed.module_name}"
        tensors[f"{key}.supertuning_indices"] = indices.to(torch.int32)
        tensors[f"{key}.supertuning_values"] = values
        modules.append(placed.module_name)
        update[indices] = 0.0  # what is left of it is what is lost
        outcomes.append(Outcome(placed, total, energy_of(update)))
    with export_folder(output_dir) as folder:
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        report = report_of("supertuning", outcomes, folder)
        if not modules:
            raise ConfigError(
                f"Expected an update that Supertuning has room for, but with a fraction of "
                f"{fraction} it holds no entry of it: it takes untied weights of nn.Linear alone. "
                f"Export a LoRA or a merged model instead."
            )
        SupertuningConfig(
            target_modules=modules,
            sparsity=sparsity,
            base_model_name_or_path=base_model.name_or_path
            or adapter.config.base_model_name_or_path,
            task_type=adapter.config.task_type,
            auto_mapping=adapter.config.auto_mapping,
            inference_mode=True,
        ).save_pretrained(str(folder))
    return report
