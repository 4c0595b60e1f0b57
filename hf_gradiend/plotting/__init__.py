"""Figures of report.json and of evaluation.json, one PNG each; needs matplotlib (extra `plot`).

Every title says the finding with its number, so that a figure stands on its own.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from hf_gradiend.files import writable_folder
from hf_gradiend.plotting.benchmarks import plot_benchmarks
from hf_gradiend.plotting.common import our_style
from hf_gradiend.plotting.decoder import DECODER, plot_decoder
from hf_gradiend.plotting.encodings import ENCODINGS, plot_encodings
from hf_gradiend.plotting.energy import ENERGY, plot_energy
from hf_gradiend.plotting.features import plot_features
from hf_gradiend.plotting.occupations import OCCUPATIONS, plot_occupations
from hf_gradiend.plotting.strengths import STRENGTHS, plot_strengths
from hf_gradiend.plotting.sweep import SWEEP, plot_sweep
from hf_gradiend.plotting.transfer import TRANSFER, plot_transfer

__all__ = [
    "plot_all",
    "plot_benchmarks",
    "plot_decoder",
    "plot_encodings",
    "plot_energy",
    "plot_features",
    "plot_occupations",
    "plot_strengths",
    "plot_sweep",
    "plot_transfer",
]

_DRAWINGS = (ENCODINGS, TRANSFER, OCCUPATIONS, SWEEP, DECODER, ENERGY, STRENGTHS)


def plot_all(report: Mapping[str, object], folder: str | os.PathLike[str]) -> list[Path]:
    """Draw every figure for which the report has data.

    Args:
        report: Content of report.json.
        folder: Where to write encodings.png, transfer.png, occupations.png, sweep.png,
            decoder.png, energy.png and strengths.png; made if it does not exist.

    Returns:
        Paths of the files that were written.

    Raises:
        OutputError: If the folder cannot be written to.
        ImportError: If matplotlib is missing.
    """  # noqa: DOC502 - raised by what it calls
    our_style()  # says that matplotlib is missing before a folder is made
    place = writable_folder(folder)
    return [
        drawing.write(report, place / f"{drawing.name}.png")
        for drawing in _DRAWINGS
        if drawing.data(report)
    ]
