"""What every test of the command line leaves as it was."""

import datasets
import pytest
from datasets.utils import logging as datasets_logging
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True)
def quiet_again():
    """`main` sets transformers' verbosity and the bars for its process; the tests share one."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    datasets_logging.enable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
