"""What an export keeps of an adapter's update, and the folder that it is written to."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.errors import ConfigError, NumericalError, OutputError
from hf_gradiend.files import replaced_folder, write_json
from hf_gradiend.parameters import ParameterSelection, SelectedParameter

REPORT_FILE = "export_report.json"


@dataclass(frozen=True)
class KindFidelity:
    """What an export keeps of the update of one kind of parameters.

    Args:
        n_parameters: Number of parameters that the adapter updates.
        n_left_out: How many of them the export cannot hold at all.
        energy_share: Their part of the whole update's squared norm, in [0, 1].
        energy_kept: As in `ExportReport`, of these parameters; 1 where their update is zero.
    """

    n_parameters: int
    n_left_out: int
    energy_share: float
    energy_kept: float


@dataclass(frozen=True)
class ExportReport:
    """What an export keeps of an adapter's update ΔW.

    Args:
        form: `"merged"`, `"lora"` or `"supertuning"`.
        energy_kept: 1 − ‖ΔW − ΔW'‖² / ‖ΔW‖², where ΔW' is what the export adds: 1 is all, 0 is
            nothing, and a merged model whose weights are too coarse for ΔW falls below 0.
        kinds: The same by kind of parameter: `linear`, `conv1d`, `embedding`, `tied` (one weight
            of several modules), `norm`, `bias` or `other` (such as 3-D experts).
        left_out: Names of the parameters that the export cannot hold, or has no room for.
        ranks: Rank of each matrix of a LoRA, by the name of its parameter.
        n_bytes: Size of the weights' files.
    """

    form: str
    energy_kept: float
    kinds: dict[str, KindFidelity]
    left_out: list[str]
    ranks: dict[str, int]
    n_bytes: int


@dataclass(frozen=True, eq=False)
class Placed:
    """A parameter of an adapter in a base model.

    Args:
        name: Name in the adapter.
        own_name: Name in the base model.
        module_name: Module that owns it.
        kind: Kind, as in `ExportReport`.
        parameter: The base model's parameter.
    """

    name: str
    own_name: str
    module_name: str
    kind: str
    parameter: nn.Parameter


@dataclass(frozen=True)
class Outcome:
    """What became of one parameter's update.

    Args:
        placed: The parameter.
        energy: Squared norm of the update.
        lost: Squared norm of what the export lacks of it.
        rank: Rank in a LoRA.
        left_out: Whether the export does not hold it at all.
    """

    placed: Placed
    energy: float
    lost: float
    rank: int | None = None
    left_out: bool = False


def placed_in(adapter: GradiendAdapter, model: nn.Module) -> list[Placed]:
    """Where in a base model an adapter's parameters are, in the adapter's order.

    Raises:
        CompatibilityError: If one is missing or has another shape.
    """  # noqa: DOC502 - raised by names_in
    selection = ParameterSelection(
        tuple(SelectedParameter(e["name"], tuple(e["shape"])) for e in adapter.config.parameters)
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses: dict[int, int] = {}
    for parameter in parameters.values():
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found: list[Placed] = []
    for name, own_name in selection.names_in(model).items():
        module_name, _, leaf = own_name.rpartition(".")
        parameter = parameters[own_name]
        tied = uses[id(parameter)] > 1
        kind = "tied" if tied else _kind(model.get_submodule(module_name), leaf, parameter)
        found.append(Placed(name, own_name, module_name, kind, parameter))
    return found


def _kind(owner: nn.Module, leaf: str, parameter: Tensor) -> str:
    if leaf == "weight":
        for kind, types in (("linear", nn.Linear), ("conv1d", Conv1D), ("embedding", nn.Embedding)):
            if isinstance(owner, types):
                return kind
        if parameter.ndim == 1:
            return "norm"
    return "bias" if leaf == "bias" else "other"


def energy_of(tensor: Tensor) -> float:
    """Squared norm, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def report_of(form: str, outcomes: Sequence[Outcome], folder: Path) -> ExportReport:
    """The report on an export whose weights lie in a folder; written there as JSON, too.

    Raises:
        ConfigError: If the update is zero.
        NumericalError: If it holds NaN or infinity.
    """
    total = sum(outcome.energy for outcome in outcomes)
    if total == 0.0:
        raise ConfigError(
            "Expected an update to export, but this adapter's is zero. Set a strength, a feature "
            "factor and a step size at which it does something."
        )
    if not math.isfinite(total):
        broken = next(o.placed.name for o in outcomes if not math.isfinite(o.energy))
        raise NumericalError(
            f"Expected finite values of the adapter, but those of {broken!r} are NaN or infinite. "
            f"Save or download it again."
        )
    kinds: dict[str, KindFidelity] = {}
    for kind in dict.fromkeys(outcome.placed.kind for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.placed.kind == kind]
        energy, lost = sum(row.energy for row in rows), sum(row.lost for row in rows)
        kept = 1.0 - lost / energy if energy else 1.0
        n_left_out = sum(row.left_out for row in rows)
        kinds[kind] = KindFidelity(len(rows), n_left_out, energy / total, kept)
    report = ExportReport(
        form=form,
        energy_kept=1.0 - sum(outcome.lost for outcome in outcomes) / total,
        kinds=kinds,
        left_out=[outcome.placed.own_name for outcome in outcomes if outcome.left_out],
        ranks={o.placed.own_name: o.rank for o in outcomes if o.rank is not None},
        n_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )
    write_json(folder / REPORT_FILE, asdict(report))
    return report


def check_new_folder(output_dir: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds files: an export replaces its folder as a whole.

    Raises:
        OutputError: If it is not empty, or a file.
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"Expected a new or empty folder for the export, but {str(folder)!r} holds files. "
            f"Choose another one, or empty it."
        )


@contextmanager
def export_folder(output_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a new folder beside the place of an export, and move it there once it is complete.

    Yields:
        The folder to write to.

    Raises:
        OutputError: If the place is not empty, or cannot be written to.
    """  # noqa: DOC502 - raised by check_new_folder
    check_new_folder(output_dir)
    with replaced_folder(output_dir) as folder:
        yield folder
