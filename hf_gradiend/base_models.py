"""Loading a base model with its tokenizer, and what the rest of the package needs to know of it."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import try_to_load_from_cache
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from hf_gradiend.errors import BaseModelError, first_line_of

logger = logging.getLogger(__name__)

Objective = Literal["masked", "causal"]


def load_base_model(  # noqa: PLR0913 - the arguments of transformers' own loaders
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    objective: Objective | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a masked or causal language model with its head, and its tokenizer.

    Args:
        name_or_path: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        gguf_file: Name of a GGUF file in that place; its weights are dequantised.
        objective: Which head to load; `None` takes the one that the model was saved with.
        dtype: Type of the weights. float32 by default: an edit is often smaller than the spacing of
            bfloat16 numbers.
        device: Where to put the model; `None` leaves it on the CPU.
        token: Token for a private repository.
        trust_remote_code: Run the repository's own Python code.

    Returns:
        The model in evaluation mode, and a fast tokenizer with a padding token.

    Raises:
        BaseModelError: If there is no such model, it has no language-model head, its tokenizer is
            not a fast one, or its weights are not numbers.
    """
    place = os.fspath(name_or_path)
    arguments = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config = AutoConfig.from_pretrained(place, **arguments, **gguf)
        objective = objective or _saved_objective(config)
        loader = AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(place, **arguments, **gguf)
        model, loading = loader.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues] - a pair
            place,
            dtype=dtype,
            output_loading_info=True,
            **arguments,
            **gguf,
            **_dequantized(gguf_file),
        )
    except BaseModelError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        hint = "" if Path(place).exists() else " There is no such folder here either."
        raise BaseModelError(
            f"Expected the Hub id or folder of a masked or causal language model, but {place!r} "
            f"could not be loaded: {first_line_of(error)}{hint}"
        ) from error
    missing = sorted(loading.get("missing_keys", ()))
    if missing:
        logger.warning(
            "%d weights of %s are not in the checkpoint and were drawn at random, for instance %s. "
            "Was it saved without its language-model head?",
            len(missing), place, missing[0],
        )  # fmt: skip
    model.config._commit_hash = _commit_of(place, revision)
    check_tokenizer(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model = model.eval()
    if device is not None:
        model = model.to(device)  # pyright: ignore[reportArgumentType] - torch.device is accepted
    check_base_model(model)
    return model, tokenizer


def objective_of(model: PreTrainedModel) -> Objective:
    """Whether a model predicts masked tokens or the next one, from its class.

    Raises:
        BaseModelError: If the model has neither head.
    """
    name = type(model).__name__
    masked = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("ForMaskedLM")
    # A few classes stand in both lists; only masked models have a bidirectional backbone.
    if masked and not getattr(model.config, "is_decoder", False):
        return "masked"
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith(
        ("ForCausalLM", "LMHeadModel")
    ):
        return "causal"
    raise BaseModelError(
        f"Expected a masked or causal language model with its head, but got {name}. "
        f"Load it with AutoModelForMaskedLM or AutoModelForCausalLM."
    )


def check_base_model(model: PreTrainedModel) -> None:
    """Refuse base models whose gradients or weights would be wrong, with the reason.

    Raises:
        BaseModelError: If the model carries an adapter, is quantised or offloaded, or has weights
            that are NaN or infinite.
    """
    name = type(model).__name__
    for module_name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise BaseModelError(
                f"Expected a plain base model, but {name} carries a PEFT adapter at "
                f"{module_name!r}. Merge it first with merge_and_unload()."
            )
    if getattr(model, "is_quantized", False):
        raise BaseModelError(
            f"Expected a base model in float32, bfloat16 or float16, but {name} is quantised. "
            f"Load it without quantization_config."
        )
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise BaseModelError(
                f"Expected the whole base model in memory, but {parameter_name!r} of {name} is "
                f"offloaded. Load it without device_map, or with one that offloads nothing."
            )
        # The sum first, which makes no copy: only broken and huge weights go on to the next check.
        if (
            parameter.is_floating_point()
            and not bool(torch.isfinite(parameter.detach().sum()))
            and not bool(torch.isfinite(parameter.detach()).all())
        ):
            raise BaseModelError(
                f"Expected finite base-model weights, but {parameter_name!r} of {name} holds NaN "
                f"or infinity. The checkpoint is broken."
            )


def pad_token_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id to pad with; 0 where the tokenizer has none (GPT-2's), as padding is masked out."""
    found = tokenizer.pad_token_id
    return found if isinstance(found, int) else 0


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that cannot say where in the text a token lies, or that hold no words.

    Raises:
        BaseModelError: If the tokenizer is not a fast one, or knows special tokens alone.
    """
    if not tokenizer.is_fast:
        raise BaseModelError(
            f"Expected a fast tokenizer, which knows where in the text each token lies, but got "
            f"{type(tokenizer).__name__}. Convert it with transformers' AutoTokenizer."
        )
    # transformers 5 makes an empty tokenizer of the model's type where a folder has none.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise BaseModelError(
            f"Expected a tokenizer with a vocabulary, but got a {type(tokenizer).__name__} of "
            f"{len(tokenizer)} special tokens. Are the tokenizer's files missing beside the model? "
            f"Write them there with tokenizer.save_pretrained()."
        )


def evaluation_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Switch dropout off, module by module, and put every module's mode back afterwards."""
    return _with_flag((m for m in model.modules() if m.training), "training", value=False)


def without_cache(model: nn.Module) -> AbstractContextManager[None]:
    """Keep no keys and values of past tokens, which a single forward pass has no use for."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    caching = (config for config in configs.values() if getattr(config, "use_cache", None))
    return _with_flag(caching, "use_cache", value=False)


def sparse_embeddings(model: nn.Module) -> AbstractContextManager[None]:
    """Make embeddings give sparse gradients: a dense one has the table's size, and is nearly all 0.

    Where the head shares the table, the few rows can be added to the head's gradient in place.
    """
    embeddings = (
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and not module.sparse
        and not module.scale_grad_by_freq  # not offered for sparse ones
        and not isinstance(module.weight, DTensor)  # FSDP2 sums dense gradients
    )
    return _with_flag(embeddings, "sparse", value=True)


@contextmanager
def _with_flag(owners: Iterable[object], name: str, *, value: bool) -> Iterator[None]:
    """Set a flag that has the other value on all these objects, and put it back afterwards."""
    changed = list(owners)
    for owner in changed:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner in changed:
            setattr(owner, name, not value)


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Keep only the inputs of layers for the backward pass, which computes the layers once more.

    transformers checkpoints a layer only in training mode; its dropout must stay off all the same.
    So each layer is in training mode where it decides, and in evaluation mode where it computes.

    Args:
        model: Model in evaluation mode; every layer is put back as it was.

    Raises:
        BaseModelError: If its layers cannot be checkpointed.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise BaseModelError(
            f"Expected a base model whose layers can be checkpointed, but {type(model).__name__} "
            f"does not support it. Train without gradient_checkpointing."
        )
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    before = [{k: v for k, v in vars(layer).items() if k in names} for layer in layers]
    try:
        for layer in layers:
            layer.gradient_checkpointing = True
            vars(layer)["_gradient_checkpointing_func"] = partial(_checkpoint, layer)
            layer.training = True
        yield
    finally:
        for layer, held in zip(layers, before, strict=True):
            for name in names:
                vars(layer).pop(name, None)
            vars(layer).update(held)


def _checkpoint(layer: nn.Module, function: Callable[..., object], *inputs: object) -> object:
    def compute(*inputs: object) -> object:
        layer.training = False
        try:
            return function(*inputs)
        finally:
            layer.training = True

    return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def trainability_kept(model: nn.Module) -> Iterator[None]:
    """Put every parameter's `requires_grad` back afterwards: peft freezes a base model for good."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad = flag


def _commit_of(place: str, revision: str | None) -> str | None:
    """Commit of a model that came from the Hub; transformers does not keep it."""
    if Path(place).is_dir():
        return None
    found = try_to_load_from_cache(place, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _saved_objective(config: PretrainedConfig) -> Objective:
    architectures = config.architectures or []
    for name in architectures:
        if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("ForMaskedLM"):
            return "masked"
        if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return "causal"
    # Saved without a head: models that can be masked ones (BERT) are, the others are causal.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked"
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise BaseModelError(
        f"Expected a masked or causal language model, but {config.model_type!r} "
        f"({', '.join(architectures) or 'no architecture named'}) has neither head."
    )


def _dequantized(gguf_file: str | None) -> dict[str, object]:
    if gguf_file is None:
        return {}
    # Without it transformers keeps the model marked as quantised and refuses to save it.
    return {"quantization_config": GgufConfig(dequantize=True)}
