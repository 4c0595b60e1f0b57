"""The package's version, in one place."""

from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of the package and of what its numbers depend on, for a report."""
    return {
        "hf_gradiend": __version__,
        **{name: version(name) for name in ("torch", "transformers")},
    }
