"""A GRADIEND of the planted feature, made by plain backward passes: nothing of `training` in it."""

import math

import pytest
import torch

from hf_gradiend.base_models import objective_of
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.collation import collate, prepare_texts
from hf_gradiend.gradients.backward import gradients
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import select_parameters


@pytest.fixture
def gradiend(planted) -> GradiendModel:
    """Class means of 32 texts; the encoder puts the two means at ±0.9."""
    rows = planted.data["train"].select(range(0, 96, 3)).to_list()
    selection = select_parameters(planted.model)
    means = {}
    for label in ("F", "M"):
        own = [row for row in rows if row["factual_class"] == label]
        texts = prepare_texts(own, planted.tokenizer, objective_of(planted.model))
        batch = collate(texts.texts, planted.tokenizer.pad_token_id)
        means[label] = gradients(planted.model, batch, selection, ("factual", "diff"))
    config = GradiendConfig(
        parameters=selection.to_config(),
        feature_classes=[["F", "M"]],
        feature_words={"F": ["she"], "M": ["he"]},
        objective=objective_of(planted.model),
        selection_fingerprint=selection.fingerprint,
    )
    model = GradiendModel(config)

    def project(label: str, direction: dict[str, torch.Tensor]) -> float:
        return sum(float((means[label]["factual"][n] * d).sum()) for n, d in direction.items())

    direction = {
        name: means["F"]["factual"][name] - means["M"]["factual"][name] for name in selection.names
    }
    plus, minus = project("F", direction), project("M", direction)
    scale = 2 * math.atanh(0.9) / (plus - minus)
    with torch.no_grad():
        model.encoder.bias.fill_(-scale * (plus + minus) / 2)
        for name in selection.names:
            f, m = means["F"]["diff"][name], means["M"]["diff"][name]
            model.encoder.weight.at(name).copy_(scale * direction[name][None])
            model.decoder.weight.at(name).copy_((f - m)[None] / 2)
            model.decoder.bias.at(name).copy_((f + m) / 2)
    return model
