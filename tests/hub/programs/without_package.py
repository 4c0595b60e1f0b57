"""What a person with nothing but transformers does."""

import importlib.util
from contextlib import redirect_stdout
from io import StringIO

import torch
from transformers import AutoModel, AutoModelForCausalLM, pipeline

IDS = torch.tensor([[5, 7, 11, 13]])  # as in with_package.py


def can_import(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


@torch.no_grad()
def logits(place, **options):
    model = AutoModelForCausalLM.from_pretrained(place, **options)
    return model(IDS).logits[0, -1].tolist()


@torch.no_grad()
def logits_of_pipeline(place):
    generate = pipeline("text-generation", model=place)
    answer = generate("the nurse said that", max_new_tokens=2)[0]["generated_text"]
    return answer, generate.model(IDS).logits[0, -1].tolist()


def backbone(place):
    return type(AutoModel.from_pretrained(place)).__name__


def gradiend_numbers(place, **options):
    """As in with_package.py, by remote code."""
    model = AutoModel.from_pretrained(place, **options)
    generator = torch.Generator().manual_seed(0)
    gradients = {
        entry["name"]: torch.randn(3, *entry["shape"], generator=generator) / 100
        for entry in model.config.parameters
    }
    decoded = [update.double().square().sum().item() for update in model.decode(0.5).values()]
    return [*model.encode(gradients).flatten().tolist(), *decoded]


def verb_that_needs_the_package(place, **options):
    AutoModel.from_pretrained(place, **options).to_adapter(feature_factor=0.0, step_size=1.0)


def run_code(*blocks):
    names, out = {}, StringIO()
    with redirect_stdout(out):
        for block in blocks:
            exec(block, names)
    return out.getvalue()
