"""Class means of gradients: what the closed form and the pruning are made of."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_gradiend.data.collation import TargetBatch
from hf_gradiend.gradients.backward import GradientStream
from hf_gradiend.parameters import ParameterSelection


class ClassMeans:
    """Running means of source and target gradients for the two classes.

    Holds 4 · n_selected numbers: the source means E[x|+] and E[x|−] and the target means E[t|+] and
    E[t|−]. What is made of them is float32 and on the CPU.

    Args:
        selection: Weights whose gradients are averaged.
        source: Side of the source gradient.
        target: Side of the target gradient.
        class_sizes: Number of texts of the + and the − class that will be added in all.
        dtype: Type of the means. bfloat16 takes half the memory, and rounds at every addition to 8
            bits.
        device: Where they are.
    """

    def __init__(
        self,
        selection: ParameterSelection,
        *,
        source: str,
        target: str,
        class_sizes: Mapping[int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.selection = selection
        self.source = source
        self.target = target
        self.class_sizes = dict(class_sizes)

        def zeros() -> dict[str, Tensor]:
            return {
                entry.name: torch.zeros(entry.values_shape, dtype=dtype, device=device)
                for entry in selection
            }

        self.source_means = {sign: zeros() for sign in (+1, -1)}
        self.target_means = {sign: zeros() for sign in (+1, -1)}

    def add(self, stream: GradientStream, batch: TargetBatch, sign: int) -> dict[str, float]:
        """Add the gradients of a batch whose texts all carry one class: one forward, two backwards.

        Args:
            stream: Stream of the base model, over this selection or a larger one.
            batch: Texts of the class.
            sign: +1 or −1.

        Returns:
            The batch's mean losses by side, in nats.
        """
        losses = stream.losses(batch, tuple(dict.fromkeys((self.source, self.target))))
        share = batch.n_texts / self.class_sizes[sign]
        adders: dict[str, list[Callable[[str, Tensor], None]]] = {side: [] for side in losses}
        adders[self.source].append(self._adder(self.source_means[sign], share))
        adders[self.target].append(self._adder(self.target_means[sign], share))
        stream.backward_each(losses, lambda side: _all_of(adders[side]))
        return {f"{side}_loss": loss.item() for side, loss in losses.items()}

    def to_direction(self, mixture: tuple[float, float]) -> dict[str, Tensor]:
        """The encoder's direction, a mixture of E[x|+] and E[x|−].

        Turns the source means into it, one parameter after the other, so that no copy of n numbers
        is made; call it once, at the end.

        Args:
            mixture: Factors of E[x|+] and of E[x|−]; (1, −1) is their difference.
        """
        plus, minus = self.source_means.pop(+1), self.source_means.pop(-1)
        for name in plus:
            values = plus[name] = _exact(plus[name])
            values.mul_(mixture[0]).add_(_exact(minus.pop(name)), alpha=mixture[1])
        return plus

    def to_decoder(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """W_d = (E[t|+] − E[t|−])/2 and b_d = (E[t|+] + E[t|−])/2, least in loss at h = ±1.

        Turns the target means into them likewise; call it once, at the end.
        """
        plus, minus = self.target_means.pop(+1), self.target_means.pop(-1)
        for name in plus:
            plus[name], minus[name] = _exact(plus[name]), _exact(minus[name])
            plus[name].sub_(minus[name]).div_(2)  # W_d
            minus[name].add_(plus[name])  # b_d = E[t|−] + W_d
        return plus, minus

    def state_tensors(self) -> dict[str, Tensor]:
        """The running sums under one flat set of names."""
        return {
            f"{kind}_{side}.{name}": tensor
            for kind, means in (("source", self.source_means), ("target", self.target_means))
            for side, sign in (("plus", +1), ("minus", -1))
            for name, tensor in means[sign].items()
        }

    def _adder(self, sums: dict[str, Tensor], factor: float) -> Callable[[str, Tensor], None]:
        entries = {entry.name: entry for entry in self.selection}

        def add(name: str, gradient: Tensor) -> None:
            entry = entries.get(name)
            if entry is not None:
                values = entry.gather(gradient).to(sums[name].device, torch.float32)
                sums[name].add_(values, alpha=factor)

        return add


def _exact(means: Tensor) -> Tensor:
    """As float32 on the CPU; no copy where they are that already."""
    return means.to("cpu", torch.float32)


def _all_of(adders: list[Callable[[str, Tensor], None]]) -> Callable[[str, Tensor], None]:
    def add(name: str, gradient: Tensor) -> None:
        for adder in adders:
            adder(name, gradient)

    return add
