"""Keeping the few weights that carry the feature, before training or after it."""

import torch
from tqdm.auto import tqdm

from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.gradients.backward import gradient_stream
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, selection_of
from hf_gradiend.training.means import ClassMeans
from hf_gradiend.training.solvers import TrainingProblem
from hf_gradiend.training.texts import one_pass


def aligned_means(problem: TrainingProblem, *, progress: bool = False) -> ClassMeans:
    """Class means of the gradients of all texts of a problem.

    Args:
        problem: Base model, weights and texts.
        progress: Show a progress bar.
    """
    batches = one_pass(problem.texts, problem.batch_size)
    means = ClassMeans(
        problem.selection,
        source=problem.args.source,
        target=problem.args.target,
        class_sizes={sign: len(problem.texts.of_sign(sign)) for sign in (+1, -1)},
    )
    with gradient_stream(problem.base_model, problem.selection) as stream:
        for batch in tqdm(batches, desc="Pruning", unit="batch", disable=not progress):
            for part in problem.parts_of(batch.texts):
                means.add(stream, part, batch.sign)
    for tensor in means.state_tensors().values():
        problem.reduce(tensor)
    return means


def prune(selection: ParameterSelection, means: ClassMeans, fraction: float) -> ParameterSelection:
    """The weights with the largest class-aligned mean target gradient, |E[t|+] − E[t|−]|.

    Each gradient is multiplied by its class's sign before averaging. Without that the two classes
    cancel: with target `"diff"` they push the same weights in opposite directions.

    Args:
        selection: Weights to choose from.
        means: Class means over that selection; used up.
        fraction: Share to keep, in (0, 1].

    Raises:
        SelectionError: If the fraction is outside (0, 1] or a mean is not a number.
    """  # noqa: DOC502 - raised by top_k
    weight, _ = means.to_decoder()
    return selection.top_k(weight, fraction=fraction)


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
    kept = selection.top_k(scores, fraction=fraction)
    content = gradiend.config.to_dict()
    content |= {"parameters": kept.to_config(), "selection_fingerprint": kept.fingerprint}
    smaller = GradiendModel(GradiendConfig.from_dict(content)).to(
        gradiend.dtype  # pyright: ignore[reportArgumentType] - transformers' wrapper loses `self`
    )
    smaller.encoder.bias.copy_(gradiend.encoder.bias)
    positions = kept.positions_in(selection)
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
