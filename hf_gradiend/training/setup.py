"""What is to be learned: the classes of a data set, and the configuration of a GRADIEND."""

from collections.abc import Mapping, Sequence

from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from hf_gradiend.base_models import objective_of
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.loading import classes_of, validate_feature_dataset
from hf_gradiend.errors import ConfigError, DataError
from hf_gradiend.parameters import ParameterSelection
from hf_gradiend.training.arguments import GradiendTrainingArguments


def classes_to_learn(dataset: Dataset, wanted: Sequence[str] | None) -> list[str]:
    """The two classes of training data, first the one that encodes to +1.

    Args:
        dataset: Feature data set.
        wanted: The classes in order; `None` for alphabetical order.

    Raises:
        DataError: If there are not two, or all texts are of one.
        ConfigError: If other classes are wanted.
    """
    present = two_classes_of(dataset)
    if set(dataset["factual_class"]) != {*present}:
        raise DataError(
            f"Expected training texts of both classes {present}, but all have the factual "
            f"class {sorted(set(dataset['factual_class']))}."
        )
    if wanted is not None and sorted(wanted) != present:
        raise ConfigError(
            f"Expected feature_classes to name the data set's classes {present}, but got {wanted}."
        )
    return list(wanted) if wanted else present


def two_classes_of(dataset: Dataset) -> list[str]:
    """The two classes of a feature data set, in alphabetical order.

    Raises:
        DataError: If columns are missing, or there are more or fewer classes.
    """
    validate_feature_dataset(dataset)
    present = classes_of([dataset])
    if len(present) != 2:
        raise DataError(
            f"Expected texts of two classes, but got {present}. Choose two, for instance with "
            f"load_feature_dataset(…, classes=({present[0]!r}, {present[1]!r}))."
        )
    return present


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
