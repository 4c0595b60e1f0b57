"""The fused GRADIEND step: gradient of the encoder-decoder in closed form, with AdamW, in blocks.

With r = dec(h) − t and c = 2/n the loss ‖r‖²/n has the gradients ∂b_d = c·r, ∂W_d = c·h·r,
∂W_e = c·⟨r, W_d⟩·(1 − h²)·x and ∂b_e = c·⟨r, W_d⟩·(1 − h²). They are formed and consumed block by
block, so that each block is read from memory once and its gradient never leaves the cache; or, if
wanted, in compiled loops over each parameter.

h needs x alone, and the decoder's update needs of t one parameter at a time. So a step begins with
x, updates the decoder while t comes in, and finishes with the encoder, which needs ⟨r, W_d⟩ of all
parameters: x must be held, t need not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_gradiend.modeling_gradiend import GradiendModel

# Of the decoder 2 parameters + 4 moments + t + 2 gradients of 4 bytes each: 4.7 MB, within the
# shared cache.
BLOCK = 2**17

Result = TypeVar("Result")
Moved = tuple[Tensor, Tensor, Tensor]  # a parameter and its two moments, flat


@dataclass(frozen=True)
class AdamWSettings:
    """Settings of AdamW, as in `torch.optim.AdamW`.

    Args:
        learning_rate: Step length.
        weight_decay: Decoupled weight decay.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the second moment.
    """

    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float


class FusedAdamW:
    """AdamW on a one-feature GRADIEND, fused with the gradient of its loss.

    Args:
        gradiend: GRADIEND with one feature, in float32; updated in place. It may be one process's
            share of a larger one: then three numbers per step are all that processes exchange.
        settings: Settings of AdamW.
        n_selected: Number of weights of the whole GRADIEND; `None` for this one's.
        total: Sums a tensor over the processes that keep the shares, in place.
        compiled: Use `torch.compile`, which wants a C++ compiler (on a GPU, Triton).
    """

    def __init__(
        self,
        gradiend: GradiendModel,
        settings: AdamWSettings,
        *,
        n_selected: int | None = None,
        total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        compiled: bool = False,
    ) -> None:
        self.gradiend = gradiend
        self.settings = settings
        self.n_selected = n_selected or gradiend.config.n_selected
        self.total = total
        self.compiled = compiled
        self.steps = torch.zeros((), dtype=torch.float32)
        # Of the step that has begun: x, h, and by name what `finish` sums over the parameters.
        self.source: Mapping[str, Tensor] = {}
        self.h = 0.0
        self.sums: dict[str, tuple[float, float]] = {}
        self.moments = {
            f"{order}.{name}": torch.zeros_like(parameter)
            for order in ("first", "second")
            for name, parameter in gradiend.named_parameters()
        }

    def step(
        self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]
    ) -> tuple[float, float]:
        """One AdamW step on the mean squared error between dec(enc(source)) and target.

        Args:
            source: Selected values of the source gradient x, of shape `values_shape` per name.
            target: Selected values of the target gradient t, likewise.

        Returns:
            The loss before the step (mean over n) and the encoding h.
        """
        self.begin(source)
        for name in self.gradiend.names:
            self.update_decoder(name, target[name])
        return self.finish()

    @torch.no_grad()
    def begin(self, source: Mapping[str, Tensor]) -> float:
        """First part of a step: encode the source gradient.

        Args:
            source: As in `step`; must stay as it is until `finish`.

        Returns:
            The encoding h.
        """
        projection = torch.zeros((), dtype=torch.float64)
        for name in self.gradiend.names:
            weight, values = (
                self.gradiend.encoder.weight.at(name).view(-1),
                source[name].reshape(-1),
            )
            for block in _blocks(len(values)):
                projection += torch.dot(weight[block], values[block]).cpu()
        bias = self.gradiend.encoder.bias.item()
        self.source, self.sums = source, {}
        self.h = float(torch.tanh(self.total(projection) + bias))
        return self.h

    @torch.no_grad()
    def update_decoder(self, name: str, target: Tensor) -> None:
        """Second part of a step, once for every parameter in any order: update its W_d and b_d.

        Args:
            name: Name of the parameter.
            target: Selected values of its target gradient, of shape `values_shape`, float32,
                however they lie in memory; may be freed afterwards.
        """
        update = self._update_decoder_compiled if self.compiled else self._update_decoder_in_blocks
        self.sums[name] = update(name, target.reshape(-1))

    @torch.no_grad()
    def finish(self) -> tuple[float, float]:
        """Last part of a step: update W_e and b_e.

        Returns:
            The loss before the step (mean over n) and the encoding h.
        """
        # In the order of the names, whatever the order in which the targets came.
        sums = torch.tensor([self.sums[name] for name in self.gradiend.names], dtype=torch.float64)
        squared, along = self.total(sums.sum(0)).tolist()
        scale = 2.0 / self.n_selected * along * (1.0 - self.h * self.h)
        for name in self.gradiend.names:
            key, values = f"encoder.weight.{name}", self.source[name].reshape(-1)
            if self.compiled and len(values):
                _compiled(_encoder_update)(self._moved(key), values, self._numbers(values, scale))
            for block in () if self.compiled else _blocks(len(values)):
                self._adamw({key: values[block] * scale}, block)
        bias = self.gradiend.encoder.bias
        self._adamw({"encoder.bias": torch.full_like(bias, scale)}, slice(None))
        self.steps += 1
        self.source = {}
        return squared / self.n_selected, self.h

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, moments and step count: all that resuming needs."""
        weights = {f"model.{k}": v.detach() for k, v in self.gradiend.named_parameters()}
        return {**weights, **self.moments, "steps": self.steps.reshape(1)}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave."""
        for name, held in self.state_tensors().items():
            held.copy_(tensors[name])

    def _update_decoder_in_blocks(self, name: str, target: Tensor) -> tuple[float, float]:
        """Returns ‖r‖² and ⟨r, W_d⟩ of the parameter, before the update."""
        weights = self.gradiend.decoder.weight.at(name).view(-1)
        biases = self.gradiend.decoder.bias.at(name).view(-1)
        squared, along = 0.0, 0.0
        for block in _blocks(len(target)):
            residual = torch.add(biases[block], weights[block], alpha=self.h).sub_(target[block])
            squared += float(torch.dot(residual, residual))
            along += float(torch.dot(residual, weights[block]))
            residual.mul_(2.0 / self.n_selected)
            gradients = {
                f"decoder.weight.{name}": residual * self.h,
                f"decoder.bias.{name}": residual,
            }
            self._adamw(gradients, block)
        return squared, along

    def _update_decoder_compiled(self, name: str, target: Tensor) -> tuple[float, float]:
        """The same, compiled."""
        if not len(target):  # of which this process keeps no rows
            return 0.0, 0.0
        squared, along = _compiled(_decoder_update)(
            self._moved(f"decoder.weight.{name}"),
            self._moved(f"decoder.bias.{name}"),
            target,
            self._numbers(target, self.h, 2.0 / self.n_selected),
        )
        return float(squared), float(along)

    def _moved(self, key: str) -> Moved:
        tensors = self._parameter(key), self.moments[f"first.{key}"], self.moments[f"second.{key}"]
        parameter, first, second = (tensor.view(-1) for tensor in tensors)
        return parameter, first, second

    def _numbers(self, like: Tensor, *numbers: float) -> Tensor:
        """Numbers of a compiled update: as a tensor, so that no new value compiles anew."""
        own, step = self.settings, float(self.steps) + 1.0
        of_adamw = (
            1.0 - own.learning_rate * own.weight_decay, own.beta1, own.beta2,
            own.learning_rate / (1.0 - own.beta1**step), (1.0 - own.beta2**step) ** 0.5,
            own.epsilon,
        )  # fmt: skip
        return torch.tensor([*of_adamw, *numbers], device=like.device)

    def _adamw(self, gradients: Mapping[str, Tensor], block: slice) -> None:
        tensors = [[t[block] for t in self._moved(key)] for key in gradients]
        parameters, first, second = (list(some) for some in zip(*tensors, strict=True))
        # adamw counts the step itself; each block gets its own copy of the common count.
        steps = [self.steps.to(p.device, copy=True) for p in parameters]
        adamw(
            parameters,
            list(gradients.values()),
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=self.settings.beta1,
            beta2=self.settings.beta2,
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            eps=self.settings.epsilon,
            maximize=False,
        )

    def _parameter(self, name: str) -> Tensor:
        part, kind, *rest = name.split(".", 2)
        if not rest:
            return self.gradiend.encoder.bias
        return getattr(getattr(self.gradiend, part), kind).at(rest[0])


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def _adamw_of(moved: Moved, gradient: Tensor, numbers: Tensor) -> None:
    """AdamW on a parameter of the GRADIEND, in place."""
    parameter, first, second = moved
    decay, beta1, beta2, rate, correction, epsilon = numbers[:6].unbind()
    mean = first + (gradient - first) * (1.0 - beta1)
    square = second * beta2 + gradient * gradient * (1.0 - beta2)
    parameter.copy_(parameter * decay - rate * mean / (square.sqrt() / correction + epsilon))
    first.copy_(mean)
    second.copy_(square)


def _decoder_update(
    weight: Moved, bias: Moved, target: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """W_d and b_d of a base parameter; returns ‖r‖² and ⟨r, W_d⟩ of before."""
    h, scale = numbers[6:].unbind()
    residual = bias[0] + h * weight[0] - target
    exact = residual.double()
    sums = exact.square().sum(), (exact * weight[0]).sum()
    _adamw_of(weight, residual * scale * h, numbers)
    _adamw_of(bias, residual * scale, numbers)
    return sums


def _encoder_update(weight: Moved, source: Tensor, numbers: Tensor) -> None:
    """W_e of a base parameter."""
    _adamw_of(weight, source * numbers[6], numbers)


@cache
def _compiled(update: Callable[..., Result]) -> Callable[..., Result]:
    """One of these two, compiled; when asked for, as the compiler takes 25 MB and half a second."""
    return torch.compile(update, dynamic=True, fullgraph=True)
