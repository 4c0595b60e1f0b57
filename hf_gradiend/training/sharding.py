"""Training on several processes: who keeps which weights, and what they send each other.

A process either keeps a whole GRADIEND, as all others do, or its share of it: of each base
parameter a range of rows (of dimension 0), cut by torch.chunk's rule. That is the layout of FSDP2's
`fully_shard` as well, so that a base model sharded by it hands over exactly those gradients.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.graph import Node
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from hf_gradiend.data.collation import TargetBatch
from hf_gradiend.errors import BaseModelError
from hf_gradiend.gradients.backward import Consume, GradientStream, gradient_stream
from hf_gradiend.parameters import ParameterSelection, SelectedParameter


def rows_of(entry: SelectedParameter, rank: int, world_size: int) -> tuple[int, int]:
    """First and last (exclusive) row of a parameter in a process's share; may be none at all."""
    n_rows = entry.shape[0] if entry.shape else 1
    per_process = -(-n_rows // world_size)  # by torch.chunk's rule the last ones get fewer, or none
    return min(rank * per_process, n_rows), min((rank + 1) * per_process, n_rows)


def span_of(entry: SelectedParameter, rank: int, world_size: int) -> slice:
    """Where a process's values stand among a parameter's selected values, flattened."""
    first, last = rows_of(entry, rank, world_size)
    row_size = torch.Size(entry.shape[1:]).numel()
    if entry.indices is None:
        return slice(first * row_size, last * row_size)
    bounds = torch.tensor([first * row_size, last * row_size], device=entry.indices.device)
    start, stop = torch.searchsorted(entry.indices.long(), bounds).tolist()
    return slice(start, stop)


def shard_of(selection: ParameterSelection, rank: int, world_size: int) -> ParameterSelection:
    """A process's share of a selection, as a selection of its own.

    Args:
        selection: The whole selection.
        rank: Number of the process.
        world_size: Number of processes.

    Returns:
        The same names; shapes are those of the process's rows (0 rows where it has none), indices
        count from its first row.
    """
    return ParameterSelection(
        tuple(_rows_entry(entry, rank, world_size) for entry in selection.entries)
    )


def _rows_entry(entry: SelectedParameter, rank: int, world_size: int) -> SelectedParameter:
    first, last = rows_of(entry, rank, world_size)
    shape = (last - first, *entry.shape[1:])
    if entry.indices is None:
        return SelectedParameter(entry.name, shape)
    own = entry.indices[span_of(entry, rank, world_size)]
    return SelectedParameter(entry.name, shape, own - first * torch.Size(entry.shape[1:]).numel())


@dataclass(frozen=True)
class Share:
    """This process among the others, and what part of a GRADIEND it keeps.

    Args:
        rank: Number of this process.
        world_size: Number of processes.
        sharded: Whether each process keeps its rows only; otherwise each keeps all.
        base_is_sharded: Whether FSDP2 keeps the base model in the same rows.
        device: Where tensors must be to be sent.
    """

    rank: int = 0
    world_size: int = 1
    sharded: bool = False
    base_is_sharded: bool = False
    device: torch.device | str = "cpu"

    def of(self, selection: ParameterSelection) -> ParameterSelection:
        """The part of a selection that this process keeps."""
        return shard_of(selection, self.rank, self.world_size) if self.sharded else selection

    def span(self, entry: SelectedParameter) -> slice:
        """Where this process's values stand among a parameter's, flattened."""
        if not self.sharded:
            return slice(0, entry.n_selected)
        return span_of(entry, self.rank, self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            sent = tensor.to(self.device)
            torch.distributed.all_reduce(sent)
            if sent is not tensor:
                tensor.copy_(sent)
        return tensor

    def sum_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sum numbers by name over all processes; every process must have the same names."""
        if self.world_size == 1:
            return dict(numbers)
        names = sorted(numbers)
        sums = self.sum(torch.tensor([numbers[name] for name in names], dtype=torch.float64))
        return dict(zip(names, sums.tolist(), strict=True))

    def any(self, *, here: bool) -> bool:
        """Whether something is so on any process."""
        return bool(self.sum(torch.tensor(float(here))))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            self.sum(torch.zeros(1))

    def whole(self, entry: SelectedParameter, values: Tensor) -> Tensor:
        """All selected values of one parameter, from each process's.

        Args:
            entry: The parameter in the whole selection.
            values: This process's values, any shape.

        Returns:
            Values of shape `entry.values_shape`, on every process.
        """
        if not self.sharded:
            return values
        spans = [span_of(entry, rank, self.world_size) for rank in range(self.world_size)]
        sizes = [span.stop - span.start for span in spans]
        sent = torch.zeros(max(sizes), dtype=values.dtype, device=self.device)
        sent[: values.numel()] = values.detach().flatten()
        parts = [torch.empty_like(sent) for _ in spans]
        torch.distributed.all_gather(parts, sent)  # of one size: gloo takes no others
        cut = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(cut).view(entry.values_shape).to(values.device)

    def whole_values(
        self, selection: ParameterSelection, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """All selected values of all parameters, n_selected numbers on every process.

        Args:
            selection: The whole selection.
            values: This process's values per name.
        """
        return {entry.name: self.whole(entry, values[entry.name]) for entry in selection}


def share_of(
    model: PreTrainedModel,
    selection: ParameterSelection,
    own: Share,
    *,
    shard: bool,
) -> Share:
    """How a process's GRADIEND over some weights of a base model is kept.

    Args:
        model: Base model, plain or sharded by FSDP2 (`fully_shard`).
        selection: The whole selection.
        own: This process among the others.
        shard: Whether a GRADIEND of a plain base model is to be sharded; that of a sharded one is
            always.

    Raises:
        BaseModelError: If the base model is sharded in another way than `fully_shard` does by
            default.
    """
    weights = selection.parameters(model)
    distributed = {name: p.data for name, p in weights.items() if isinstance(p.data, DTensor)}
    for name, weight in distributed.items():
        if weight.placements != (Shard(0),) or weight.device_mesh.size() != own.world_size:
            raise BaseModelError(
                f"Expected weights that fully_shard cut by rows over all {own.world_size} "
                f"processes, but {name!r} is kept as {weight.placements} over "
                f"{weight.device_mesh.size()}. Use fully_shard with a mesh of one dimension."
            )
    if distributed and len(distributed) < len(weights):
        name = next(name for name in weights if name not in distributed)
        raise BaseModelError(
            f"Expected all selected weights to be sharded, but {name!r} is not. Call fully_shard "
            f"on the whole model, too, or select others."
        )
    return Share(
        own.rank,
        own.world_size,
        sharded=bool(distributed) or (shard and own.world_size > 1),
        base_is_sharded=bool(distributed),
        device=own.device,
    )


class SharedStream(GradientStream):
    """A stream that hands over this process's rows of the gradients of all processes' texts.

    Each process runs its own texts; of a parameter's finished gradients the weighted sum
    Σ n_texts · gradient is formed over the processes and divided by this process's own n_texts, so
    that a consumer which weighs by its own texts has weighed everybody's. All processes must run
    the same number of batches. With a plain base model a finished gradient waits until those of
    the parameters that come after it in the model are finished on this process (about one layer),
    so that all processes send the same one at a time: no process ever holds n numbers. Parameters
    that the loss does not reach are known from its graph, and not waited for.

    Args:
        model: Base model, prepared by `gradient_stream`.
        selection: The whole selection.
        share: This process's share of it.
    """

    def __init__(self, model: PreTrainedModel, selection: ParameterSelection, share: Share) -> None:
        super().__init__(model)
        self.share = share
        self.parameters = selection.parameters(model)
        self.entries = {entry.name: entry for entry in selection}
        self.own = {entry.name: entry for entry in share.of(selection)}
        self.n_texts = 1

    def backward(self, loss: Tensor, consume: Consume, *, retain_graph: bool = False) -> None:
        """One backward pass over this process's texts, for the sum over all processes.

        Args:
            loss: Mean over the last batch, with its graph.
            consume: Takes a parameter's name and this process's rows of its gradient, float32.
            retain_graph: Keep the graph for another loss of the same forward pass.
        """
        loss = loss * self.n_texts
        if self.share.base_is_sharded:
            super().backward(loss, self._undoing_the_mean(consume), retain_graph=retain_graph)
        else:  # the first layers' gradients are finished last
            turns = _Turns(reversed(self.entries), self._summing(consume))
            reached = _reached_by(loss)
            for name, parameter in self.parameters.items():
                # A shared one may be reached by the parameter that stands for it elsewhere.
                if id(parameter) not in reached and name not in self.shared:
                    turns.put(name, None)
            super().backward(loss, turns.put, retain_graph=retain_graph)
            turns.finish()

    def _scores(self, batch: TargetBatch) -> Tensor:
        self.n_texts = batch.n_texts
        return super()._scores(batch)

    def _undoing_the_mean(self, consume: Consume) -> Consume:
        """FSDP2 has summed already, and divided by the number of processes."""
        factor = self.share.world_size / self.n_texts

        def take(name: str, gradient: Tensor) -> None:
            rows = gradient.to_local()  # pyright: ignore[reportAttributeAccessIssue] - a DTensor
            consume(name, rows.float() * factor)

        return take

    def _summing(self, consume: Consume) -> Callable[[str, Tensor | None], None]:
        def take(name: str, gradient: Tensor | None) -> None:
            entry, own = self.entries[name], self.own[name]
            values = (
                torch.zeros(entry.values_shape)
                if gradient is None
                else entry.gather(gradient).contiguous().float()
            )
            self.share.sum(values)
            rows = values.view(-1)[self.share.span(entry)].view(own.values_shape)
            consume(name, own.scatter(rows) / self.n_texts)

        return take


class _Turns:
    """Hands gradients over in one order, whatever the order in which they are finished.

    Args:
        names: All names in order.
        take: Takes a name and its gradient; `None` where the loss does not reach it.
    """

    def __init__(self, names: Iterator[str], take: Callable[[str, Tensor | None], None]) -> None:
        self.left = deque(names)
        self.take = take
        self.waiting: dict[str, Tensor | None] = {}

    def put(self, name: str, gradient: Tensor | None) -> None:
        """Take a finished gradient, or that there will be none, and hand over what has its turn.

        Raises:
            BaseModelError: If there was none to be.
        """
        if name not in self.left:
            raise BaseModelError(
                f"Expected a base model whose graph shows all weights that a loss depends on, but "
                f"a gradient of {name!r} came after it was taken to be zero. Does the model "
                f"checkpoint its layers by itself? Train without shard."
            )
        self.waiting[name] = gradient
        while self.left and self.left[0] in self.waiting:
            name = self.left.popleft()
            self.take(name, self.waiting.pop(name))

    def finish(self) -> None:
        """Hand over the rest after a backward pass; what did not come is none."""
        while self.left:
            name = self.left.popleft()
            self.take(name, self.waiting.pop(name, None))


def _reached_by(loss: Tensor) -> set[int]:
    """Identities of the parameters that a loss depends on, from its graph."""
    seen: set[Node] = set()
    left = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return {id(getattr(node, "variable", None)) for node in seen}  # which its leaves have


def shared_stream(
    model: PreTrainedModel,
    selection: ParameterSelection,
    share: Share,
    *,
    checkpointing: bool = False,
) -> AbstractContextManager[GradientStream]:
    """`gradient_stream` for this process: of its own texts, or where sharded of everybody's.

    Args:
        model: Base model; left as it was.
        selection: The whole selection.
        share: This process's share of it.
        checkpointing: As in `gradient_stream`.
    """
    kind = partial(SharedStream, selection=selection, share=share)
    return gradient_stream(
        model,
        selection,
        checkpointing=checkpointing,
        kind=kind if share.sharded else GradientStream,
    )
