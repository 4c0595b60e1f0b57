"""The development model and data beside the repository, where they are."""

import importlib
import warnings
from pathlib import Path

import datasets
import pytest

from hf_gradiend.base_models import load_base_model
from hf_gradiend.data.loading import load_feature_dataset

SHARED = Path(__file__).parents[2].parent / "shared"

# The first dual tensor makes torch (2.13) script its own derivatives, with this warning; see
# https://github.com/pytorch/pytorch/issues/42459 (TorchScript is not developed further).
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".torch.jit.script. is", category=DeprecationWarning)
    importlib.import_module("torch._decomp.decompositions_for_jvp")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Base model, tokenizer and data set of the development machine."""
    if not (SHARED / "models" / "bert-tiny-mlm").is_dir():
        pytest.skip(f"the development model and data are not at {SHARED}")
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        data = load_feature_dataset(SHARED / "data" / "gender")
        model, tokenizer = load_base_model(SHARED / "models" / "bert-tiny-mlm")
        yield model, tokenizer, data
