"""Which base-model weights a GRADIEND covers, and in which order.

This is the only module that orders, flattens or slices weights. A `ParameterSelection` is a list of
parameters in `named_parameters()` order; of each it takes every entry (dense) or the entries at
sorted flat indices (sparse). "Values" below means the selected entries of one parameter: a tensor
of the parameter's own shape when dense, of shape `(k,)` when sparse.
"""

import difflib
import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from hf_gradiend.errors import CompatibilityError, SelectionError


@dataclass(frozen=True, eq=False)
class SelectedParameter:
    """One parameter of a selection.

    Args:
        name: Name in `named_parameters()` of the base model.
        shape: Shape of the base model's parameter.
        indices: Sorted flat indices of the selected entries, int32 or int64 of shape `(k,)`;
            `None` selects every entry.
    """

    name: str
    shape: tuple[int, ...]
    indices: Tensor | None = None

    @property
    def n_entries(self) -> int:
        """Number of entries of the whole parameter."""
        return torch.Size(self.shape).numel()

    @property
    def n_selected(self) -> int:
        """Number of selected entries."""
        return self.n_entries if self.indices is None else self.indices.numel()

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the selected values: the parameter's own when dense, `(k,)` when sparse."""
        return self.shape if self.indices is None else (self.indices.numel(),)

    def gather(self, tensor: Tensor) -> Tensor:
        """Selected values of a tensor of shape `(*batch, *shape)`; a view when dense."""
        if self.indices is None:
            return tensor
        batch = tensor.shape[: tensor.ndim - len(self.shape)]
        flat = tensor.reshape(*batch, self.n_entries)  # (*batch, *shape) -> (*batch, n_entries)
        return flat.index_select(-1, self.indices.to(tensor.device))

    def scatter(self, values: Tensor) -> Tensor:
        """Tensor of shape `(*batch, *shape)` with the values in place and zeros elsewhere."""
        if self.indices is None:
            return values
        batch = values.shape[:-1]
        flat = values.new_zeros(*batch, self.n_entries)
        flat.index_copy_(-1, self.indices.to(values.device, torch.int64), values)
        return flat.view(*batch, *self.shape)  # (*batch, n_entries) -> (*batch, *shape)


@dataclass(frozen=True, eq=False)
class ParameterSelection:
    """Base-model weights that a GRADIEND reads and writes, in a fixed order.

    Args:
        entries: Selected parameters in `named_parameters()` order of the base model.
    """

    entries: tuple[SelectedParameter, ...]

    def __iter__(self) -> Iterator[SelectedParameter]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def names(self) -> list[str]:
        """Names of the selected parameters."""
        return [entry.name for entry in self.entries]

    @property
    def n_selected(self) -> int:
        """Number of selected weights, n in the formulas."""
        return sum(entry.n_selected for entry in self.entries)

    @property
    def is_sparse(self) -> bool:
        """Whether any parameter is selected by indices."""
        return any(entry.indices is not None for entry in self.entries)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and indices, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(json.dumps([entry.name, list(entry.shape)]).encode())
            if entry.indices is not None:
                digest.update(entry.indices.to("cpu", torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def to_config(self) -> list[dict]:
        """The `parameters` field of a `GradiendConfig`; indices travel as the model's buffers."""
        return [
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "n_selected": None if entry.indices is None else entry.n_selected,
            }
            for entry in self.entries
        ]

    def names_in(self, model: nn.Module, *, wrapped: bool = False) -> dict[str, str]:
        """The model's own names of the selected parameters, keyed by this selection's names.

        A selection made on a body fits the same body under a head and the other way round: the
        model's `base_model_prefix` is added or taken off where a name is not found as it stands.

        Args:
            model: Base model.
            wrapped: Find weights that a PEFT layer wraps (`….base_layer.weight`) under their plain
                names; such a model is not the base model that gradients are taken of.

        Raises:
            CompatibilityError: If a name is missing or a shape differs.
        """
        found = {
            name.replace(".base_layer", "") if wrapped else name: (name, tuple(parameter.shape))
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        prefix = getattr(model, "base_model_prefix", "")
        names: dict[str, str] = {}
        problems: list[str] = []
        for entry in self.entries:
            candidates = (
                entry.name,
                f"{prefix}.{entry.name}",
                entry.name.removeprefix(f"{prefix}."),
            )
            match = next((found[name] for name in candidates if name in found), None)
            if match is None:
                problems.append(f"{entry.name} is missing")
            elif match[1] != entry.shape:
                problems.append(f"{entry.name} has shape {match[1]} instead of {entry.shape}")
            else:
                names[entry.name] = match[0]
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CompatibilityError(
                f"Expected a base model with the {len(self):,} parameters of this selection, but "
                f"in {type(model).__name__} {'; '.join(problems[:3])}{more}. "
                f"Load the base model that the GRADIEND names."
            )
        return names

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's own parameters, keyed by this selection's names, in its order.

        Args:
            model: Base model, as in `names_in`.

        Raises:
            CompatibilityError: If a name is missing or a shape differs.
        """  # noqa: DOC502 - raised by names_in
        own = dict(model.named_parameters(remove_duplicate=False))
        return {name: own[theirs] for name, theirs in self.names_in(model).items()}

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Selected values of full tensors of shape `(*batch, *shape)`, in this order.

        Raises:
            SelectionError: If a name is missing or a shape does not end in the parameter's.
        """
        problems = [entry.name for entry in self.entries if entry.name not in tensors]
        if problems:
            raise SelectionError(
                f"Expected one tensor per selected parameter, but {len(problems):,} are missing, "
                f"for instance {problems[0]!r}."
            )
        for entry in self.entries:
            shape = tuple(tensors[entry.name].shape)
            if shape[len(shape) - len(entry.shape) :] != entry.shape:
                raise SelectionError(
                    f"Expected a tensor of shape (*batch, {', '.join(map(str, entry.shape))}) for "
                    f"{entry.name!r}, but got {shape}."
                )
        return {entry.name: entry.gather(tensors[entry.name]) for entry in self.entries}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Selected values of full tensors as one vector of shape `(*batch, n_selected)`.

        Costs a copy of n_selected numbers.

        Raises:
            SelectionError: If a tensor is missing or does not fit.
        """  # noqa: DOC502 - raised by gather
        parts: list[Tensor] = []
        values = self.gather(tensors)
        for entry in self.entries:
            part = values[entry.name]
            batch = part.shape[: part.ndim - len(entry.values_shape)]
            parts.append(part.reshape(*batch, entry.n_selected))
        return torch.cat(parts, dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Full tensors of shape `(*batch, *shape)` from a vector, zero where nothing is selected.

        Args:
            vector: Tensor of shape `(*batch, n_selected)`.

        Raises:
            SelectionError: If the last dimension is not n_selected.
        """
        if vector.shape[-1] != self.n_selected:
            raise SelectionError(
                f"Expected a vector of {self.n_selected:,} entries, one per selected base-model "
                f"weight, but got {vector.shape[-1]:,}. Was it made for another parameter "
                f"selection?"
            )
        chunks = vector.split([entry.n_selected for entry in self.entries], dim=-1)
        return {
            entry.name: entry.scatter(chunk.reshape(*chunk.shape[:-1], *entry.values_shape))
            for entry, chunk in zip(self.entries, chunks, strict=True)
        }

    def top_k(self, scores: Mapping[str, Tensor], *, fraction: float) -> "ParameterSelection":
        """The part of this selection with the largest absolute scores.

        Args:
            scores: Selected values of a score per weight, keyed by name, of shape `values_shape`.
            fraction: Share of this selection's weights to keep, in (0, 1].

        Returns:
            A sparse selection of `round(fraction · n_selected)` weights, at least one; parameters
            that keep no weight are left out. Ties at the threshold are broken by position.

        Raises:
            SelectionError: If the fraction is outside (0, 1], or a score has another shape or is
                not a number.
        """
        if not 0.0 < fraction <= 1.0:
            raise SelectionError(f"Expected a fraction to keep in (0, 1], but got {fraction!r}.")
        return self.largest(scores, max(1, round(fraction * self.n_selected)))

    def largest(self, scores: Mapping[str, Tensor], n_kept: int) -> "ParameterSelection":
        """The `n_kept` weights of this selection with the largest absolute scores; see `top_k`.

        Args:
            scores: Selected values of a score per weight, keyed by name, of shape `values_shape`.
            n_kept: Number of weights to keep, from 1 to n_selected.

        Raises:
            SelectionError: If a score has another shape or is not a number.
        """  # noqa: DOC502 - raised by _magnitude_bits
        threshold, n_ties = self._threshold(scores, n_kept)
        entries: list[SelectedParameter] = []
        for entry in self.entries:
            bits = _magnitude_bits(entry, scores)
            ties = (bits == threshold).nonzero().squeeze(-1)[:n_ties]
            n_ties -= len(ties)
            kept = torch.cat([(bits > threshold).nonzero().squeeze(-1), ties]).sort().values
            if kept.numel():
                indices = kept if entry.indices is None else entry.indices.to(kept.device)[kept]
                entries.append(SelectedParameter(entry.name, entry.shape, indices.to(torch.int32)))
        return ParameterSelection(tuple(entries))

    def _threshold(self, scores: Mapping[str, Tensor], n_kept: int) -> tuple[int, int]:
        """The bits of the smallest score to keep, and how many of these bits to keep.

        Two counts, of the upper and of the lower half of the bits, instead of torch.topk, which
        takes sixteen bytes a score.
        """
        n_left, upper = n_kept, 0
        for shift in (16, 0):
            counts = torch.zeros(2**16, dtype=torch.int64)
            for entry in self.entries:
                bits = _magnitude_bits(entry, scores)
                if shift == 0:
                    bits = bits[bits >> 16 == upper] & 0xFFFF
                counts += torch.bincount(bits >> shift, minlength=2**16).cpu()
            from_above = counts.flip(0).cumsum(0)  # scores with this half or a larger one
            place = int(torch.searchsorted(from_above, n_left))
            half = 2**16 - 1 - place
            n_left -= int(from_above[place] - counts[half])
            if shift == 16:
                upper = half
        return (upper << 16) + half, n_left  # pyright: ignore[reportPossiblyUnbound]

    def groups(
        self, cost: Callable[[SelectedParameter], int], budget: int
    ) -> list["ParameterSelection"]:
        """This selection in consecutive parts, each as large as a budget allows.

        Args:
            cost: What a parameter costs.
            budget: Largest sum of the costs in a part; a parameter that costs more stands alone.
        """
        parts: list[list[SelectedParameter]] = []
        left = -1
        for entry in self.entries:
            price = cost(entry)
            if price > left or not parts:
                parts.append([])
                left = budget
            parts[-1].append(entry)
            left -= price
        return [ParameterSelection(tuple(part)) for part in parts]

    def positions_in(self, larger: "ParameterSelection") -> dict[str, Tensor]:
        """For each parameter, where its entries stand among a larger selection's values.

        Args:
            larger: Selection that contains this one.

        Returns:
            int64 tensors of shape `(k,)` into the flattened values of `larger`.

        Raises:
            SelectionError: If an entry of this selection is not in `larger`.
        """
        theirs = {entry.name: entry for entry in larger}
        positions: dict[str, Tensor] = {}
        for entry in self.entries:
            other = theirs.get(entry.name)
            if other is None:
                raise SelectionError(
                    f"Expected {entry.name!r} in the larger selection; it is missing."
                )
            mine = torch.arange(entry.n_entries) if entry.indices is None else entry.indices.long()
            if other.indices is None:
                positions[entry.name] = mine
                continue
            at = torch.searchsorted(other.indices.long(), mine)
            found = other.indices.long()[at.clamp(max=other.indices.numel() - 1)]
            if not torch.equal(found, mine):
                raise SelectionError(
                    f"Expected all entries of {entry.name!r} in the larger selection."
                )
            positions[entry.name] = at
        return positions


def select_parameters(
    model: nn.Module, patterns: str | Sequence[str] = "layers"
) -> ParameterSelection:
    """Choose which weights of a base model a GRADIEND covers.

    Tied weights are taken once, under the first of their names.

    Args:
        model: Base model.
        patterns: `"layers"` for every weight of the transformer blocks (matrices, norms, biases;
            no embeddings, no final norm, no head), `"backbone"` for the paper's choice (everything
            but the head; a head tied to the embeddings is then in), or shell-style patterns of
            parameter names, such as `"*.mlp.*"`.

    Returns:
        A dense selection in `named_parameters()` order.

    Raises:
        SelectionError: If a pattern matches no floating-point parameter.

    References:
        Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 3 (`"backbone"`).
    """
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    wanted: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern == "layers":
            matched = _layer_names(model)
        elif pattern == "backbone":
            matched = _backbone_names(model)
        else:
            matched = set(fnmatch.filter(parameters, pattern))
        matched &= parameters.keys()
        if not matched:
            raise SelectionError(_no_match_message(model, pattern, list(parameters)))
        wanted |= matched
    return ParameterSelection(
        tuple(SelectedParameter(n, tuple(p.shape)) for n, p in parameters.items() if n in wanted)
    )


def _magnitude_bits(entry: SelectedParameter, scores: Mapping[str, Tensor]) -> Tensor:
    """Bits of the absolute scores of one parameter, int32 `(k,)`: in the order of the numbers.

    Raises:
        SelectionError: If the scores have another shape, or are not all finite.
    """
    held = scores[entry.name]
    if tuple(held.shape) != entry.values_shape:
        raise SelectionError(
            f"Expected scores of shape {entry.values_shape} for {entry.name!r}, but got "
            f"{tuple(held.shape)}."
        )
    magnitude = held.detach().reshape(-1).abs().float()
    if not bool(torch.isfinite(magnitude).all()):
        raise SelectionError("Expected finite scores, but got NaN or infinity among them.")
    return magnitude.view(torch.int32)


def pack_indices(indices: Tensor) -> Tensor:
    """Sorted indices as bytes: between neighbours the gap, in bytes of 255 and one that is less.

    Takes about one byte an index at densities above 1 %, where int32 takes four.

    Args:
        indices: Strictly increasing, not negative, of shape `(k,)`.

    Returns:
        uint8 tensor of shape `(m,)`, m ≥ k.
    """
    indices = indices.to("cpu", torch.int64)
    gaps = torch.diff(indices, prepend=indices.new_tensor([-1])) - 1
    ends = (gaps // 255 + 1).cumsum(0)
    packed = torch.full((int(ends[-1]) if len(ends) else 0,), 255, dtype=torch.uint8)
    packed[ends - 1] = (gaps % 255).to(torch.uint8)
    return packed


def unpack_indices(packed: Tensor) -> Tensor:
    """Indices of `pack_indices`, int64 of shape `(k,)`, on the same device."""
    ends = packed != 255
    gaps = packed.cumsum(0, dtype=torch.int64)[ends]
    return gaps + torch.arange(len(gaps), device=packed.device)


class _Layout(Protocol):
    """What `selection_of` needs of a `GradiendConfig`, whose module stands above this one."""

    parameters: list[dict]


class _IndexTree(Protocol):
    """What `selection_of` needs of a `GradiendModel`'s `indices`; that module stands above too."""

    def at(self, name: str) -> Tensor: ...


def selection_of(model: nn.Module) -> ParameterSelection:
    """The selection that a `GradiendModel` covers, from its configuration and index buffers.

    Args:
        model: A `GradiendModel`.
    """
    config = cast("_Layout", model.config)
    indices = cast("_IndexTree", model.indices)
    return ParameterSelection(
        tuple(
            SelectedParameter(
                entry["name"],
                tuple(entry["shape"]),
                None if entry["n_selected"] is None else indices.at(entry["name"]),
            )
            for entry in config.parameters
        )
    )


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter's name says; `None` outside of layers."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _layer_names(model: nn.Module) -> set[str]:
    # The blocks of every transformers backbone stand in an nn.ModuleList; the outermost ones are
    # the stack itself (lists of experts or attention groups lie inside).
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    has_body = any(name.startswith(prefix) for name, _ in model.named_modules())
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (not has_body or name.startswith(prefix))
    ]
    return {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(f"{stack}.") for stack in lists)
    }


def _backbone_names(model: nn.Module) -> set[str]:
    backbone = getattr(model, "base_model", model)
    inside = {id(parameter) for parameter in backbone.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def _no_match_message(model: nn.Module, pattern: str, names: list[str]) -> str:
    bare = pattern.strip("*.")
    near = difflib.get_close_matches(bare, names, n=3, cutoff=0.3)
    near = near or [name for name in names if bare.split(".")[-1] in name][:3] or names[:3]
    return (
        f"Expected a pattern that matches parameters of {type(model).__name__}, but {pattern!r} "
        f"matches none. Near names: {', '.join(near)}."
    )
