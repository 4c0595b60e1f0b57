"""Metrics for `evaluate.load`: one folder each, which is a Space of the Hub once it is pushed."""

from pathlib import Path

from hf_gradiend.errors import ConfigError

NAMES = ("balance_index", "crows_pairs", "encoder_correlation", "stereoset")


def module_path(name: str) -> str:
    """Folder of a metric, as `evaluate.load` and `huggingface_hub.upload_folder` take it.

    Args:
        name: One of `NAMES`.

    Raises:
        ConfigError: If there is no such metric.
    """
    if name not in NAMES:
        raise ConfigError(f"Expected a metric of {', '.join(NAMES)}, but got {name!r}.")
    return str(Path(__file__).parent / name)
