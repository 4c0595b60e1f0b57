"""Making the type GRADIEND known to peft."""

import logging

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from hf_gradiend.adapter.config import GradiendAdapterConfig
from hf_gradiend.adapter.model import GradiendTuner

logger = logging.getLogger(__name__)


def add_peft_type(name: str) -> None:
    """Extend the enumeration `PeftType`, which knows the types of peft itself alone.

    peft has no way for other packages to add a type (https://github.com/huggingface/peft/issues/2273);
    a type of that name, from an earlier import or a later peft, is left as it is.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue] - enum's own
    member._sort_order_ = len(PeftType.__members__)  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)  # Python 3.13
    type.__setattr__(PeftType, name, member)


def register() -> None:
    """Register config and tuner under GRADIEND, once."""
    add_peft_type("GRADIEND")
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType["GRADIEND"])
    if registered is None:
        register_peft_method(
            name="gradiend", config_cls=GradiendAdapterConfig, model_cls=GradiendTuner
        )
    elif registered.__name__ != GradiendAdapterConfig.__name__:
        logger.warning(
            "peft has a type GRADIEND of its own (%s), which stays in place: adapters are loaded "
            "by it, and not by hf_gradiend.",
            registered.__module__,
        )
