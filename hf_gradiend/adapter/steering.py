"""Keeping a model's weights in the state that its adapters ask for.

A model has one `Steering`, shared by all of its `GradiendLayer`s. Whatever changes what the
weights should be (a strength, the active adapters, a merge) makes it stale; before the next
forward pass it compares what should stand in each weight with what stands there, and rewrites
the weights that differ, from their original bits. So adapters cost nothing in a forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_gradiend.edits import EditedWeight, Update

if TYPE_CHECKING:
    from hf_gradiend.adapter.config import GradiendAdapterConfig
    from hf_gradiend.adapter.layer import GradiendLayer


Method = TypeVar("Method", bound=Callable)


def _outside_of_graphs(method: Method) -> Method:
    """Leave a method out of what torch.compile captures; typed, as torch's own is not."""
    return cast("Method", torch.compiler.disable(method))


@dataclass(frozen=True, eq=False)
class Term:
    """What one adapter adds to one weight.

    Args:
        key: Says which values with which numbers: two terms of the same key add the same.
        update: The update, on the values of that adapter.
        indices: Sorted flat positions of these values, int64 `(k,)`; `None` for all.
        source: Says which values alone: two terms of the same source have the same indices.
    """

    key: tuple
    update: Update
    indices: Tensor | None
    source: tuple


class Site(Protocol):
    """A weight that adapters write to."""

    def write(self, terms: Sequence[Term]) -> None:
        """Make the weight the original plus these terms."""

    def restore(self) -> None:
        """Put the original bits back."""

    def bake(self) -> None:
        """Let what stands in the weight stand for good."""


class PlainSite:
    """A weight of floating-point numbers, steered in place.

    Args:
        parameter: The weight.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.weight: EditedWeight | None = None
        self.sources: tuple = ()
        self.key: tuple = ()

    def write(self, terms: Sequence[Term]) -> None:
        """Make the weight the original plus these terms; nothing where it is that already."""
        key = tuple(term.key for term in terms)
        if key == self.key:
            return
        sources = tuple(term.source for term in terms)
        if self.weight is not None and sources != self.sources:
            self.restore()
        if self.weight is None:
            self.weight = EditedWeight(self.parameter, _union(terms))
            self.sources = sources
        else:
            self.weight.absorb_changes()
        self.weight.write([_placed(term, self.weight.indices) for term in terms])
        self.key = key

    def restore(self) -> None:
        """Put the original bits back, and give their copy free."""
        if self.weight is not None:
            self.weight.absorb_changes()
            self.weight.restore()
        self.weight, self.sources, self.key = None, (), ()

    def bake(self) -> None:
        """Let what stands in the weight stand for good."""
        self.weight, self.sources, self.key = None, (), ()


def _union(terms: Sequence[Term]) -> Tensor | None:
    """Positions that any of the terms touches; `None` where one touches all."""
    indices = [term.indices for term in terms]
    if len(indices) == 1 or any(positions is None for positions in indices):
        return indices[0] if len(indices) == 1 else None
    return torch.cat(indices).unique()  # pyright: ignore[reportArgumentType] - none is None here


def _placed(term: Term, union: Tensor | None) -> Update:
    """The term's update with the places of its values among those of the union."""
    if term.indices is None or term.indices is union:
        return term.update
    positions = term.indices if union is None else torch.searchsorted(union, term.indices)
    update = term.update
    return Update(update.weight, update.bias, update.feature_factor, update.scale, positions)


class Steering:
    """The adapters of one model, and what stands in its weights.

    The weights are *live* (what a forward pass should see), *at rest* (merged adapters alone, what
    a state dict should show) or *stale* (to be looked at before the next pass). Switching off
    takes effect at once; switching on waits for the next pass.
    """

    def __init__(self) -> None:
        self.layers: list[GradiendLayer] = []
        self.configs: dict[str, GradiendAdapterConfig] = {}
        self.sites: dict[nn.Module | Tensor, Site] = {}
        self.state: Literal["live", "at rest", "stale"] = "stale"
        self.watched: dict[nn.Module, list[RemovableHandle]] = {}

    def watch(self, module: nn.Module) -> None:
        """Keep the weights right for whoever calls, saves or loads a module that contains some.

        That is every module above a weight, not only the one that owns it: a tied head and
        Mamba's mixer read weights without calling the modules that own them.
        """
        if module not in self.watched:
            self.watched[module] = [
                module.register_forward_pre_hook(self.before_forward),
                module.register_state_dict_pre_hook(self.before_state_dict),
                module.register_load_state_dict_pre_hook(self.before_load),
            ]

    def before_forward(self, *_: object) -> None:
        """Bring the weights up to date; a hook."""
        if self.state != "live":
            self.sync()

    def before_state_dict(self, *_: object) -> None:
        """Show the base model's own weights (and merged ones) in state dicts; a hook."""
        if self.state != "at rest":
            self.sync(at_rest=True)

    def before_load(self, *_: object) -> None:
        """Give weights their original bits back before others are loaded; a hook."""
        self.restore()

    @_outside_of_graphs
    @torch.inference_mode(mode=False)
    def sync(self, *, at_rest: bool = False) -> None:
        """Write what the adapters ask for to every weight that does not hold it.

        Args:
            at_rest: Leave out adapters that are active but not merged.

        Raises:
            BaseModelError: If a weight is offloaded.
            NumericalError: If values of an adapter are NaN or infinite, or never came; no weight
                is changed then.
        """  # noqa: DOC502 - raised by the layers
        wanted: dict[nn.Module | Tensor, tuple[Site, list[Term]]] = {}
        for layer in self.layers:
            for place, term, new_site in layer.terms(self.configs, at_rest=at_rest):
                if place not in wanted:
                    site = self.sites[place] if place in self.sites else new_site()
                    wanted[place] = (site, [])
                wanted[place][1].append(term)
        for place in [place for place in self.sites if place not in wanted]:
            self.sites.pop(place).restore()
        for place, (site, terms) in wanted.items():
            self.sites[place] = site
            site.write(terms)
        self.state = "at rest" if at_rest else "live"

    def changed(self) -> None:
        """Say that what should stand in the weights may be something else now."""
        self.state = "stale"

    def restore(self) -> None:
        """Put every weight's original bits back; the next forward pass steers again."""
        for site in self.sites.values():
            site.restore()
        self.sites.clear()
        self.state = "stale"

    def bake(self) -> None:
        """Let merged adapters stand in the weights for good, and forget the originals."""
        self.sync(at_rest=True)
        for site in self.sites.values():
            site.bake()
        self.sites.clear()

    def remove(self, layer: "GradiendLayer") -> None:
        """Forget a layer whose adapters are gone, and the hooks with the last one."""
        self.layers.remove(layer)
        if not self.layers:
            for handles in self.watched.values():
                for handle in handles:
                    handle.remove()
            self.watched.clear()
