"""Keeping the few weights that carry the feature, before training or after it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_gradiend.errors import SelectionError
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, selection_of
from hf_gradiend.training.setup import with_parameters
from hf_gradiend.training.solvers import TrainingProblem
from hf_gradiend.training.texts import ClassBatch, one_pass

# Float32 sums held at a time: those of 268 M weights.
ACCUMULATOR_BYTES = 2**30


def prune(
    problem: TrainingProblem,
    fraction: float,
    *,
    accumulator_bytes: int = ACCUMULATOR_BYTES,
    progress: bool = False,
) -> ParameterSelection:
    """The weights with the largest class-aligned mean target gradient, |E[t|+] − E[t|−]|.

    Each gradient is multiplied by its class's sign before averaging. Without that the two classes
    cancel: with target `"diff"` they push the same weights in opposite directions. The weights are
    taken in groups whose sums fit into a budget, each with a pass over the texts, so that memory
    does not grow with the model; the result does not depend on the groups.

    Args:
        problem: Base model, weights to choose from, and texts.
        fraction: Share of the weights to keep, in (0, 1].
        accumulator_bytes: Largest size of the sums of a group, of four bytes a weight; a parameter
            that is larger is a group of its own.
        progress: Show a progress bar.

    Raises:
        SelectionError: If the fraction is outside (0, 1], a mean is not a number, or the
            predictions depend on none of the weights.
    """
    if not 0.0 < fraction <= 1.0:
        raise SelectionError(f"Expected a fraction to keep in (0, 1], but got {fraction!r}.")
    n_kept = max(1, round(fraction * problem.selection.n_selected))
    batches = one_pass(problem.texts, problem.batch_size)
    groups = pruning_groups(problem.selection, accumulator_bytes)
    kept, values = ParameterSelection(()), {}
    unreached: list[SelectionError] = []
    with tqdm(
        total=len(groups) * len(batches), desc="Pruning", unit="batch", disable=not progress
    ) as bar:
        for group in groups:
            means = _zeros(problem, group)
            try:
                _add_batches(problem, group, batches, means, bar)
            except SelectionError as error:  # the predictions use no weight of this group
                unreached.append(error)
            for tensor in means.values():
                problem.reduce(tensor)
            means = problem.share.whole_values(group, means)
            found, of_found = _largest(group, means, n_kept)
            candidates = ParameterSelection((*kept.entries, *found.entries))
            kept, values = _largest(candidates, {**values, **of_found}, n_kept)
    if len(unreached) == len(groups):
        raise unreached[0]
    return kept


def pruning_groups(
    selection: ParameterSelection, accumulator_bytes: int = ACCUMULATOR_BYTES
) -> list[ParameterSelection]:
    """The parts of a selection that `prune` takes one after the other, each in a pass of its own.

    Args:
        selection: Weights to choose from.
        accumulator_bytes: As in `prune`.
    """
    return selection.groups(lambda entry: 4 * entry.n_selected, accumulator_bytes)


def _zeros(problem: TrainingProblem, group: ParameterSelection) -> dict[str, Tensor]:
    devices = {name: p.device for name, p in group.parameters(problem.base_model).items()}
    own = problem.share.of(group)
    return {e.name: torch.zeros(e.values_shape, device=devices[e.name]) for e in own}


def _add_batches(
    problem: TrainingProblem,
    group: ParameterSelection,
    batches: Sequence[ClassBatch],
    means: Mapping[str, Tensor],
    bar: tqdm,
) -> None:
    """Add this process's share of E[t|+] − E[t|−] for the weights of a group."""
    args = problem.args
    entries = {entry.name: entry for entry in problem.share.of(group)}
    sizes = {sign: len(problem.texts.of_sign(sign)) for sign in (+1, -1)}
    with problem.stream(group) as stream:
        for batch in batches:
            for part in problem.parts_of(batch.texts):
                factor = batch.sign * part.n_texts / sizes[batch.sign]

                def add(name: str, gradient: Tensor, factor: float = factor) -> None:
                    values = entries[name].gather(gradient)
                    means[name].add_(values, alpha=factor)  # float32, whatever the gradient's type

                stream.backward(stream.losses(part, (args.target,))[args.target], add)
            bar.update()


def _largest(
    selection: ParameterSelection, scores: Mapping[str, Tensor], n_kept: int
) -> tuple[ParameterSelection, dict[str, Tensor]]:
    """The weights with the largest scores, at most so many, on the CPU, and their scores."""
    kept = selection.largest(scores, min(n_kept, selection.n_selected))
    positions = kept.positions_in(selection)
    values = {name: scores[name].flatten()[at].cpu() for name, at in positions.items()}
    entries = (replace(e, indices=None if e.indices is None else e.indices.cpu()) for e in kept)
    return ParameterSelection(tuple(entries)), values


@torch.no_grad()
def pruned_gradiend(gradiend: GradiendModel, fraction: float) -> GradiendModel:
    """A sparse GRADIEND with the weights where the decoder's direction is largest, |W_d|.

    Args:
        gradiend: GRADIEND, dense or sparse; not changed.
        fraction: Share of its weights to keep, in (0, 1].

    Returns:
        A GRADIEND whose encoder and decoder are those of the kept weights.

    Raises:
        SelectionError: If the fraction is outside (0, 1].
    """  # noqa: DOC502 - raised by top_k
    selection = selection_of(gradiend)
    scores = {name: gradiend.decoder.weight.at(name).norm(dim=0) for name in selection.names}
    return part_of(gradiend, selection.top_k(scores, fraction=fraction))


@torch.no_grad()
def part_of(gradiend: GradiendModel, kept: ParameterSelection) -> GradiendModel:
    """A GRADIEND over some of another's weights, with its values there.

    Args:
        gradiend: GRADIEND, dense or sparse; not changed.
        kept: Weights to keep.
    """
    smaller = GradiendModel(with_parameters(gradiend.config, kept)).to(
        gradiend.dtype  # pyright: ignore[reportArgumentType] - transformers' wrapper loses `self`
    )
    smaller.encoder.bias.copy_(gradiend.encoder.bias)
    positions = kept.positions_in(selection_of(gradiend))
    for entry in kept:
        name = entry.name
        at = positions[name]
        for own, old in (
            (smaller.encoder.weight, gradiend.encoder.weight),
            (smaller.decoder.weight, gradiend.decoder.weight),
        ):
            own.at(name).copy_(old.at(name).flatten(1)[:, at])
        smaller.decoder.bias.at(name).copy_(gradiend.decoder.bias.at(name).flatten()[at])
        if entry.indices is not None:
            smaller.indices.at(name).copy_(entry.indices)
    return smaller
