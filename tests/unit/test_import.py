import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_gradiend

# What the libraries do when they are imported is theirs: they come first, then the state is taken.
PROBE = """
import importlib, json, logging, os, sys, warnings

import accelerate, datasets, peft, torch, transformers
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers import TrainerCallback, TrainingArguments
from transformers.models.auto import modeling_auto

asked = []

def record(name):
    original = getattr(torch.cuda, name)
    def recorded(*arguments, **options):
        frame, files = sys._getframe(1), []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        asked.append([name, files[0]])
        return original(*arguments, **options)
    setattr(torch.cuda, name, recorded)

for name in ("is_available", "device_count", "current_device", "init", "get_device_properties"):
    record(name)

def state():
    root = logging.getLogger()
    return {
        "environment": dict(os.environ),
        "streams": [id(sys.stdout), id(sys.stderr), id(sys.stdin)],
        "root log level": root.level,
        "root log handlers": [repr(handler) for handler in root.handlers],
        "transformers log level": transformers.logging.get_verbosity(),
        "warning filters": [repr(each) for each in warnings.filters],
        "torch seed": torch.initial_seed(),
        "torch random state": torch.random.get_rng_state().sum().item(),
        "torch threads": torch.get_num_threads(),
        "torch gradients": torch.is_grad_enabled(),
        "torch dtype": str(torch.get_default_dtype()),
        "cuda": [torch.cuda.is_initialized(), list(asked)],
        "excepthook": repr(sys.excepthook),
        "folder": os.getcwd(),
    }

def imported(module):
    before = state()
    importlib.import_module(module)
    after = state()
    return {key: [before[key], after[key]] for key in before if before[key] != after[key]}

report = {"hf_gradiend": imported("hf_gradiend"), "noisy": imported("noisy")}
json.dump(report, open(sys.argv[1], "w"))
"""

NOISY = """
import logging, os, sys, warnings
import torch

os.environ["NOISY"] = "1"
print("noise on stdout")
print("noise on stderr", file=sys.stderr)
sys.stdout = open(os.devnull, "w")
logging.basicConfig(level=logging.DEBUG)
torch.manual_seed(7)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.cuda.is_available()
warnings.simplefilter("ignore")
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    """What importing the package changes in a fresh process, and what a noisy module changes."""
    tmp_path = tmp_path_factory.mktemp("import")
    (tmp_path / "noisy.py").write_text(NOISY, encoding="utf-8")
    root = Path(hf_gradiend.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}

    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "report.json")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    return report | {"stdout": done.stdout, "stderr": done.stderr}


def test_importing_the_package_changes_nothing_in_the_process(probe):
    assert probe["hf_gradiend"] == {}


def test_importing_the_package_prints_nothing(probe):
    assert probe["stdout"] == "noise on stdout\n"
    assert probe["stderr"] == "noise on stderr\n"


@pytest.mark.parametrize(
    "what",
    [
        "environment",
        "streams",
        "root log level",
        "root log handlers",
        "warning filters",
        "torch seed",
        "torch random state",
        "torch threads",
        "cuda",
    ],
)
def test_the_probe_sees_what_a_noisy_module_changes(probe, what):
    assert what in probe["noisy"]
