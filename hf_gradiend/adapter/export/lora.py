"""Export as an ordinary LoRA: each matrix of the update by its largest singular values."""

import math
import os
from collections.abc import Mapping

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.adapter.export.fidelity import (
    ExportReport,
    Outcome,
    Placed,
    energy_of,
    export_folder,
    placed_in,
    report_of,
)
from hf_gradiend.adapter.values import ADAPTER_FILE
from hf_gradiend.base_models import check_base_model
from hf_gradiend.errors import ConfigError

# Singular values beyond the wanted ones that the randomised decomposition looks at.
OVERSAMPLING = 16


def export_lora(
    adapter: GradiendAdapter,
    base_model: PreTrainedModel,
    output_dir: str | os.PathLike[str],
    *,
    energy: float = 0.99,
    max_rank: int = 64,
    progress: bool = True,
) -> ExportReport:
    """Write a LoRA whose scaling is 1 and that adds the adapter's update as nearly as it can.

    LoRA has no room for norms, biases and 3-D weights, and none for embeddings that are tied to the
    head: there it would act on the input alone until it is merged, and on both afterwards. They are
    left out, and the report says so.

    Args:
        adapter: Adapter; its strength is folded in.
        base_model: Base model; not changed.
        output_dir: New or empty folder.
        energy: Share of each matrix's squared norm to keep, in (0, 1]; the rank is the smallest
            that does.
        max_rank: Largest rank, which wins over `energy`.
        progress: Show a progress bar.

    Returns:
        What the LoRA keeps; also in export_report.json.

    Raises:
        ConfigError: If a number is not allowed, or LoRA can hold nothing of the update.
        CompatibilityError: If the adapter was made for another base model.
        OutputError: If the folder is not empty, or cannot be written to.
    """  # noqa: DOC502 - the last two are raised by what it calls
    if not 0.0 < energy <= 1.0:
        raise ConfigError(f"Expected a share of the energy to keep in (0, 1], but got {energy!r}.")
    if max_rank < 1:
        raise ConfigError(f"Expected a largest rank of at least 1, but got {max_rank!r}.")
    check_base_model(base_model)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    outcomes: list[Outcome] = []
    conv1d = False
    for placed in tqdm(placed_in(adapter, base_model), disable=not progress, desc="LoRA"):
        update = adapter.update(placed.name)
        total = energy_of(update)
        if placed.kind not in ("linear", "conv1d", "embedding") or not 0.0 < total < math.inf:
            # A zero update needs no room; one that is not finite is refused with the report.
            outcomes.append(Outcome(placed, total, total, left_out=total != 0.0))
            continue
        left, values, right = singular_values(update, max_rank)
        kept = values.double().square().cumsum(0)
        rank = min(int((kept < energy * total).sum()) + 1, len(values), max_rank)
        root = values[:rank].sqrt()
        tensors |= _tensors(placed, left[:, :rank] * root, (right[:, :rank] * root).T)
        ranks[placed.module_name] = rank
        conv1d = conv1d or placed.kind == "conv1d"
        lost = max(total - float(kept[rank - 1]), 0.0)
        outcomes.append(Outcome(placed, total, lost, rank))
    with export_folder(output_dir) as folder:
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        report = report_of("lora", outcomes, folder)
        if not ranks:
            raise ConfigError(
                "Expected an update that LoRA has room for, but this adapter changes no untied "
                "matrix. Export a merged model instead."
            )
        _config(adapter, base_model, ranks, fan_in_fan_out=conv1d).save_pretrained(str(folder))
    return report


def singular_values(matrix: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix with their vectors.

    Exact where the matrix is small; otherwise randomised, with a seed of its own.

    Args:
        matrix: float32 `(rows, columns)`.
        n: How many at least, where there are as many.

    Returns:
        Left vectors `(rows, k)`, values `(k,)` in descending order, right vectors `(columns, k)`.

    References:
        Halko, Martinsson and Tropp (2011), https://arxiv.org/abs/0909.4061, algorithm 5.1.
    """
    n_drawn = n + OVERSAMPLING
    if min(matrix.shape) <= 2 * n_drawn:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right.mH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, q=n_drawn, niter=2)


def _tensors(placed: Placed, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """A LoRA's tensors of one weight `left @ right`, under peft's names.

    The product B·A is the weight of an nn.Linear, `(out, in)`; of the other two its transpose.
    """
    a, b = (right, left) if placed.kind == "linear" else (left.T, right.T)
    key = f"base_model.model.{placed.module_name}"
    names = ("lora_A.weight", "lora_B.weight")
    if placed.kind == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    return {f"{key}.{names[0]}": a.contiguous(), f"{key}.{names[1]}": b.contiguous()}


def _config(
    adapter: GradiendAdapter,
    base_model: PreTrainedModel,
    ranks: Mapping[str, int],
    *,
    fan_in_fan_out: bool,
) -> LoraConfig:
    rank = max(ranks.values())
    # Anchored: peft would also take "layers.1.fc" for a pattern of "other.layers.1.fc".
    others = {f"^{name}": found for name, found in ranks.items() if found != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,  # alpha / r is the scaling
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=base_model.name_or_path or adapter.config.base_model_name_or_path,
        task_type=adapter.config.task_type,
        auto_mapping=adapter.config.auto_mapping,
        inference_mode=True,
    )
