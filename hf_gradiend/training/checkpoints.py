"""A run's files: checkpoints to go on from, and a sharded GRADIEND as ordinary files.

Everything is written beside its place and renamed, so that a run killed at any moment leaves whole
files only. All processes must see the same output folder.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from hf_gradiend.errors import ConfigError
from hf_gradiend.files import write_json
from hf_gradiend.modeling_gradiend import GradiendModel, replace_files
from hf_gradiend.training.sharding import Share
from hf_gradiend.training.solvers import Solver, TrainingProblem
from hf_gradiend.training.texts import LabelledTexts

MAX_FILE_BYTES = 5 * 10**9  # transformers' own
STATE = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)(-replaced)?")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class RunState(TrainerState):
    """Where a run is; only what it adds to `transformers.TrainerState`.

    Args:
        pending_logs: What the last step gave to log, until it has been logged and evaluated.
        evaluated_on: What `texts_digest` gave for the evaluation texts; `None` without.
    """

    pending_logs: dict[str, float] | None = None
    evaluated_on: str | None = None


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing, and finish what it was replacing."""
    for hidden in (*folder.glob(".checkpoint-*"), *folder.glob(".partial-*")):
        shutil.rmtree(hidden)
    for replaced in folder.glob("checkpoint-*-replaced"):
        place = replaced.with_name(replaced.name.removesuffix("-replaced"))
        if place.exists():
            _remove(replaced)
        else:
            replaced.replace(place)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints in the order in which they were written; some may be of an earlier run.

    Not of their steps, of which an earlier run may have done more; steps decide where a clock or a
    file system tells no difference. A folder of another name is none.
    """
    found: list[tuple[int, int, Path]] = []
    for file in folder.glob(f"checkpoint-*/{STATE}"):
        if name := _FOLDER.fullmatch(file.parent.name):
            found.append((file.stat().st_mtime_ns, int(name[1]), file.parent))
    return [path for *_, path in sorted(found)]


def best_beside(path: Path, best: str | None) -> Path | None:
    """Where the best checkpoint is now: beside the one to go on from, or where it was.

    A run's folder may have been moved since, or be named by another path.

    Args:
        path: The checkpoint to go on from.
        best: The best one when that was written; `None` for none.

    Returns:
        Its folder; `None` where there is none any more.
    """
    if best is None:
        return None
    places = (path.parent / Path(best).name, Path(best))
    return next((place for place in places if (place / STATE).is_file()), None)


def save_checkpoint(path: Path, solver: Solver, state: RunState, run: str, share: Share) -> None:
    """Write a checkpoint, every process its own part of the solver's state.

    Args:
        path: Its folder; one that exists is replaced.
        solver: The solver.
        state: Where the run is.
        run: What `run_digest` gave.
        share: This process among the others.
    """
    is_main = share.rank == 0
    fresh = path.with_name(f".{path.name}")
    try:
        if is_main:
            fresh.mkdir()
        share.barrier()
        if is_main or not solver.same_everywhere:
            tensors = {name: t.contiguous() for name, t in solver.state_tensors().items()}
            save_file(tensors, fresh / _file_of(solver, share), {"run": run})
        share.barrier()
        if is_main:
            state.save_to_json(str(fresh / STATE))
            _swap_in(fresh, path)
        share.barrier()
    finally:
        if is_main:
            shutil.rmtree(fresh, ignore_errors=True)


def load_solver(path: Path, solver: Solver, share: Share, run: str) -> None:
    """Put a solver back to a checkpoint.

    Args:
        path: The checkpoint's folder.
        solver: The solver.
        share: This process among the others.
        run: What `run_digest` gives.

    Raises:
        ConfigError: If there is no checkpoint, or it was made with other arguments, data, weights
            or processes.
    """
    file_name = path / _file_of(solver, share)
    if not (path / STATE).is_file():
        raise ConfigError(
            f"Expected a checkpoint to resume from, but there is none at {str(path)!r}. Train "
            f"without resume_from_checkpoint."
        )
    made_with = None
    if file_name.is_file():
        with safe_open(file_name, framework="pt") as file, torch.no_grad():
            made_with = (file.metadata() or {}).get("run")
            if run == made_with:
                for name, tensor in solver.state_tensors().items():
                    tensor.copy_(file.get_tensor(name))
    if made_with != run:
        raise ConfigError(
            f"Expected a checkpoint of this run, but {str(path)!r} was made with other "
            f"arguments, data or weights, or other processes. Use the same ones, or train without "
            f"resume_from_checkpoint."
        )


def rotate(folder: Path, limit: int, best: str | None) -> None:
    """Remove the oldest checkpoints above a number, but neither the last nor the best."""
    checkpoints = checkpoints_in(folder)
    kept = {path.resolve() for path in (checkpoints[-1], Path(best or checkpoints[-1]))}
    for old in checkpoints[: max(0, len(checkpoints) - limit)]:
        if old.resolve() not in kept:
            _remove(old)


def run_digest(problem: TrainingProblem, classes: list[str]) -> str:
    """What two runs must share for one to go on from the other's checkpoint.

    Args:
        problem: What is learned, and from what.
        classes: The class that encodes to +1, and the other.
    """
    names = (
        "solver", "source", "target", "learning_rate", "weight_decay", "adam_beta1",
        "adam_beta2", "adam_epsilon", "seed", "n_seeds", "decoder_initialization", "warm_start",
        "calibration_fraction", "accumulator_dtype",
    )  # fmt: skip
    content = {name: getattr(problem.args, name) for name in names}
    content["batch_size"] = problem.batch_size
    content["selection"] = problem.selection.fingerprint
    content["classes"] = classes
    content["train_texts"] = texts_digest(problem.texts)
    content["neutral_texts"] = _digest(problem.neutral and problem.neutral.texts)
    content["base_weights"] = weights_digest(problem.base_model, problem.share)
    return json.dumps(content, sort_keys=True)


def texts_digest(texts: LabelledTexts) -> str:
    """A digest of tokenised texts, their order and their signs."""
    return _digest((texts.texts, texts.signs))


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def weights_digest(model: nn.Module, share: Share) -> str:
    """A digest of a model's weights: for each the sum of its bits, read as integers.

    Args:
        model: The model; one that FSDP2 shards has the digest of the whole.
        share: This process among the others.
    """
    sums: list[int] = []
    for parameter in model.parameters():
        weights = parameter.detach()
        local = weights.to_local() if isinstance(weights, DTensor) else weights
        bits = local.contiguous().view(_BITS[local.element_size()]).flatten()
        counts = share.rank == 0 or isinstance(weights, DTensor) or not share.base_is_sharded
        # In pieces: the sum of int32 in int64 makes a copy of eight bytes a weight. And as numbers:
        # small tensors among the copies would keep the allocator from giving those back (0.5 GB).
        total = sum(int(piece.sum(dtype=torch.int64)) for piece in bits.split(2**20))
        sums.append(((total + 2**63) % 2**64 - 2**63) * counts)  # as int64 would overflow
    every = torch.tensor(sums)
    if share.base_is_sharded:
        share.sum(every)
    return _digest(every.tolist())


def save_shared(
    gradiend: GradiendModel,
    problem: TrainingProblem,
    folder: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a sharded GRADIEND as `GradiendModel.save_pretrained` would write the whole.

    All processes must call it. The first gathers one parameter after the other and writes; it holds
    one file's numbers at a time.

    Args:
        gradiend: This process's share.
        problem: What was learned.
        folder: Folder to write to.
        max_file_bytes: Largest size of one file of weights.
    """
    tensors = _whole_tensors(gradiend, problem)
    if problem.share.rank == 0:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as temporary:
            _write_weights(tensors, Path(temporary), max_file_bytes)
            config = problem.config
            config.architectures = [type(gradiend).__name__]
            config.dtype = str(gradiend.dtype).removeprefix("torch.")
            config.save_pretrained(temporary)
            replace_files(Path(temporary), folder)
    else:
        for _ in tensors:  # takes part in the gathering
            pass
    problem.share.barrier()


def _whole_tensors(
    gradiend: GradiendModel, problem: TrainingProblem
) -> Iterator[tuple[str, Tensor]]:
    share = problem.share
    yield "encoder.bias", gradiend.encoder.bias.detach()
    for entry in problem.selection:
        name, shape = entry.name, (1, *entry.values_shape)
        encoder, decoder = gradiend.encoder.weight.at(name), gradiend.decoder.weight.at(name)
        yield f"encoder.weight.{name}", share.whole(entry, encoder).detach().view(shape)
        yield f"decoder.weight.{name}", share.whole(entry, decoder).detach().view(shape)
        yield f"decoder.bias.{name}", share.whole(entry, gradiend.decoder.bias.at(name)).detach()
        if entry.indices is not None:
            yield f"indices.{name}", entry.indices


def _write_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_bytes: int) -> None:
    """Tensors as model.safetensors, or as several files with an index where they are larger."""
    written: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def write() -> None:
        save_file(held, folder / f"{len(written)}.safetensors", {"format": "pt"})
        written.append(list(held))
        held.clear()

    total = 0
    for name, tensor in tensors:
        if held and tensor.nbytes + sum(t.nbytes for t in held.values()) > max_bytes:
            write()
        held[name] = tensor.contiguous()
        total += tensor.nbytes
    write()
    if len(written) == 1:
        (folder / "0.safetensors").replace(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / f"{number}.safetensors").replace(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def _file_of(solver: Solver, share: Share) -> str:
    if solver.same_everywhere:
        return "solver.safetensors"
    return f"solver-{share.rank + 1:05d}-of-{share.world_size:05d}.safetensors"


def _swap_in(fresh: Path, path: Path) -> None:
    """Rename a complete folder to its place; one of the two is there at any moment."""
    if path.exists():
        replaced = path.with_name(f"{path.name}-replaced")
        path.replace(replaced)
        fresh.replace(path)
        _remove(replaced)
    else:
        fresh.replace(path)


def _remove(folder: Path) -> None:
    """Remove a folder at once, for whoever looks for one by its name."""
    hidden = folder.with_name(f".{folder.name}")
    folder.replace(hidden)
    shutil.rmtree(hidden)
