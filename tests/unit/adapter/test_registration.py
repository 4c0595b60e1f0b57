"""The type GRADIEND in peft's enumeration and tables."""

import copy
import importlib
import pickle
import subprocess
import sys

from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import hf_gradiend
from hf_gradiend.adapter import registration
from hf_gradiend.adapter.config import GradiendAdapterConfig
from hf_gradiend.adapter.model import GradiendTuner


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_type_behaves_like_one_of_peft():
    member = PeftType.GRADIEND

    assert member == "GRADIEND"
    assert member.value == "GRADIEND"
    assert member.name == "GRADIEND"
    assert PeftType("GRADIEND") is member
    assert PeftType["GRADIEND"] is member
    assert isinstance(member, PeftType)
    assert list(PeftType).count(member) == 1
    assert "NOBODY" not in PeftType.__members__
    assert hash(member) == hash("GRADIEND")


def test_the_type_survives_pickle_and_copies():
    for twin in (
        pickle.loads(pickle.dumps(PeftType.GRADIEND)),
        copy.deepcopy(PeftType.GRADIEND),
        copy.copy(PeftType.GRADIEND),
    ):
        assert twin is PeftType.GRADIEND
        assert twin is not PeftType.LORA


def test_peft_knows_config_tuner_and_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["GRADIEND"] is GradiendAdapterConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GRADIEND] is GradiendTuner
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.GRADIEND] == "gradiend_"


def test_registering_again_changes_nothing(caplog):
    before = list(PeftType)

    registration.register()
    importlib.reload(registration)
    registration.register()
    importlib.reload(hf_gradiend)

    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING["GRADIEND"] is GradiendAdapterConfig
    assert not caplog.records


def test_a_type_of_that_name_in_a_later_peft_is_left_alone():
    done = run(
        "import dataclasses, logging\n"
        "logging.basicConfig()\n"
        "from peft import PeftConfig, PeftType\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING\n"
        "member = str.__new__(PeftType, 'GRADIEND')\n"
        "member._name_ = member._value_ = 'GRADIEND'\n"
        "PeftType._member_names_.append('GRADIEND')\n"
        "PeftType._member_map_['GRADIEND'] = member\n"
        "PeftType._value2member_map_['GRADIEND'] = member\n"
        "type.__setattr__(PeftType, 'GRADIEND', member)\n"
        "class TheirConfig(PeftConfig): pass\n"
        "PEFT_TYPE_TO_CONFIG_MAPPING[member] = TheirConfig\n"
        "import hf_gradiend\n"
        "assert PeftType.GRADIEND is member\n"
        "assert PEFT_TYPE_TO_CONFIG_MAPPING['GRADIEND'] is TheirConfig\n"
        "print('theirs')\n"
    )

    assert done.stdout.splitlines() == ["theirs"], done.stderr
    assert done.stderr.count("peft has a type GRADIEND of its own") == 1
