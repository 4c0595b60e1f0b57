"""The configuration of a GRADIEND to be trained."""

from collections.abc import Mapping, Sequence

from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from hf_gradiend.base_models import objective_of
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.parameters import ParameterSelection
from hf_gradiend.training.arguments import GradiendTrainingArguments


def gradiend_config(
    base_model: PreTrainedModel,
    selection: ParameterSelection,
    args: GradiendTrainingArguments,
    classes: Sequence[str],
    words: Mapping[str, Sequence[str]],
) -> GradiendConfig:
    """Configuration of a one-feature GRADIEND.

    Args:
        base_model: Its base model.
        selection: Its weights.
        args: How it is trained.
        classes: The class that encodes to +1, and the other.
        words: Words of each class; further classes are left out.
    """
    return GradiendConfig(
        parameters=selection.to_config(),
        feature_classes=[list(classes)],
        feature_words={name: list(words[name]) for name in classes},
        source=args.source,
        target=args.target,
        objective=objective_of(base_model),
        base_model_name_or_path=base_model.config._name_or_path or None,
        base_model_revision=getattr(base_model.config, "_commit_hash", None),
        base_model_class=plain_class_name(base_model),
        selection_fingerprint=selection.fingerprint,
        decoder_initialization=args.decoder_initialization,
    )


def words_of_classes(dataset: Dataset) -> dict[str, list[str]]:
    """The factual words of each factual class, in alphabetical order."""
    found: dict[str, set[str]] = {}
    for name, word in zip(dataset["factual_class"], dataset["factual"], strict=True):
        found.setdefault(name, set()).add(word)
    return {name: sorted(words) for name, words in found.items()}


def plain_class_name(model: PreTrainedModel) -> str:
    """Name of a model's class, without the one that FSDP2's `fully_shard` derives from it."""
    return next(c.__name__ for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def with_parameters(config: GradiendConfig, selection: ParameterSelection) -> GradiendConfig:
    """The configuration of a GRADIEND over other weights, otherwise the same."""
    content = config.to_dict() | {
        "parameters": selection.to_config(),
        "selection_fingerprint": selection.fingerprint,
    }
    return GradiendConfig.from_dict(content)
