"""Adapters in folders, and the reference: a base model whose weights were set by hand."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradiend.modeling_gradiend import GradiendModel

# Not dyadic: a sum that is rounded elsewhere, or twice, shows in the last bit of a weight.
FACTORS, STEP_SIZE = (0.3, -0.7), 0.21
IDS = torch.tensor([[7, 11, 13, 8, 9, 12]])


# Warnings of peft itself: it asks for a property that transformers 5.23 renames, and it warns of a
# second adapter in a transformers model, LoRA or not.
PEFT_WARNINGS = (
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Already found a `peft_config` attribute:UserWarning",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    for ignored in PEFT_WARNINGS:
        item.add_marker(pytest.mark.filterwarnings(ignored))


@pytest.fixture(scope="session")
def make_gradiend(gradiend_for) -> Callable[..., GradiendModel]:
    """Makes a GRADIEND with a normal random decoder and a chosen edit."""

    def make_gradiend(base_model, patterns="layers", *, seed=0, **settings) -> GradiendModel:
        gradiend = gradiend_for(base_model, patterns, **settings)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in gradiend.decoder.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        factors = list(FACTORS[: gradiend.config.n_features])
        gradiend.config.feature_factor = factors[0] if len(factors) == 1 else factors
        gradiend.config.step_size = STEP_SIZE
        return gradiend

    return make_gradiend


@pytest.fixture(scope="session")
def saved() -> Callable[..., Path]:
    """Saves the adapter of a GRADIEND's chosen edit; options are those of `to_adapter`."""

    def saved(gradiend: GradiendModel, folder: Path, **options) -> Path:
        gradiend.to_adapter(**options).save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def edited_copy() -> Callable[..., PreTrainedModel]:
    """Copies a base model and sets W + strength·α·(h·W_d + b_d), in float32 and rounded once."""

    def edited_copy(
        base_model: PreTrainedModel,
        *gradiends: GradiendModel,
        h=None,
        alpha=STEP_SIZE,
        strength=1.0,
        dtype=torch.float32,
        adjustable=True,
        rename=lambda name: name,
    ) -> PreTrainedModel:
        edited = copy.deepcopy(base_model)
        weights: dict[str, Tensor] = {}
        for gradiend in gradiends:
            state = gradiend.state_dict()
            factors = FACTORS[: gradiend.config.n_features] if h is None else h
            for name in gradiend.names:
                parts = [*state[f"decoder.weight.{name}"], state[f"decoder.bias.{name}"]]
                if adjustable:
                    parts = [part.to(dtype).float() for part in parts]
                total = parts[0] * factors[0]
                for part, factor in zip(parts[1:], (*factors[1:], 1.0), strict=True):
                    total = total + part * factor
                total = total if adjustable else total.to(dtype).float()
                whole = torch.zeros(edited.get_parameter(rename(name)).numel())
                whole[state.get(f"indices.{name}", torch.arange(len(whole))).long()] = (
                    total.flatten() * (strength * alpha)
                )
                parameter = edited.get_parameter(rename(name)).detach()
                before = weights.get(name, parameter.float())
                weights[name] = before + whole.view(parameter.shape)
        with torch.no_grad():
            for name, weight in weights.items():
                edited.get_parameter(rename(name)).copy_(weight)
        return edited

    return edited_copy


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Tensor]:
    """Logits of a model for six fixed tokens."""

    @torch.no_grad()
    def logits_of(model: nn.Module, **inputs) -> Tensor:
        return model(**(inputs or {"input_ids": IDS})).logits

    return logits_of


@pytest.fixture(scope="session")
def bits_of() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Copies of a model's own weights as they stand in memory, adapters aside."""

    def bits_of(model: nn.Module) -> dict[str, Tensor]:
        return {
            name.replace(".base_layer", ""): parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if "gradiend." not in name and "lora_" not in name
        }

    return bits_of


@pytest.fixture(scope="session")
def same_bits() -> Callable[..., bool]:
    """Whether two sets of weights are the same bytes; 0.0 equals −0.0 as numbers."""

    def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
        return ours.keys() == theirs.keys() and all(
            ours[name].dtype == theirs[name].dtype
            and torch.equal(
                ours[name].contiguous().view(-1).view(torch.uint8),
                theirs[name].contiguous().view(-1).view(torch.uint8),
            )
            for name in ours
        )

    return same_bits
