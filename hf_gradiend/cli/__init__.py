"""The command line: `hf-gradiend quickstart | build-data | train | encode | adapt | export`."""

from hf_gradiend.cli.main import main

__all__ = ["main"]
