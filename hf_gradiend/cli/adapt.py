"""Write a PEFT adapter that adds strength · α · dec(h) to a base model when it is loaded."""

import argparse

import torch

from hf_gradiend.adapter.config import DTYPES
from hf_gradiend.cli.common import load_base_of, load_gradiend
from hf_gradiend.errors import ConfigError
from hf_gradiend.evaluation.report import choose_gender_edit, is_gender
from hf_gradiend.files import empty_folder
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import selection_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--gradiend", required=True, help="folder or Hub id of the GRADIEND")
    parser.add_argument("--output_dir", required=True, help="folder for the adapter")
    parser.add_argument(
        "--base_model",
        help="checked to fit, and the one to choose an edit on; default: the GRADIEND's own",
    )
    parser.add_argument("--feature_factor", type=float, help="h; default: the chosen edit's")
    parser.add_argument("--step_size", type=float, help="α; default: the chosen edit's")
    parser.add_argument("--strength", type=float, default=1.0, help="0: base model, 1: the edit")
    parser.add_argument(
        "--top_k", type=float, help="share of the weights to keep, such as 0.01; default: all"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the GRADIEND's own")
    parser.add_argument(
        "--adjustable", action="store_true", default=None,
        help="with --top_k: keep h adjustable after loading, in a larger file",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, object]:
    """Make and save; where no edit is given or stored, choose one on the package's occupations.

    Raises:
        ConfigError: If half an edit is given, or none is given or stored and none can be chosen.
    """
    if (args.feature_factor is None) != (args.step_size is None):
        raise ConfigError(
            "Expected --feature_factor and --step_size together, but got one of them."
        )
    folder = empty_folder(args.output_dir, "the adapter", another="--output_dir")
    gradiend = load_gradiend(args.gradiend)
    h, alpha = args.feature_factor, args.step_size
    if h is None:
        h, alpha = gradiend.config.feature_factor, gradiend.config.step_size
    if h is None or alpha is None:
        h, alpha = _choose(gradiend, args)
    elif args.base_model is not None:
        base_model, _ = load_base_of(gradiend, args.base_model)
        selection_of(gradiend).names_in(base_model)
    adapter = gradiend.to_adapter(
        h, alpha,
        strength=args.strength,
        top_k=args.top_k,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        adjustable=args.adjustable,
    )  # fmt: skip
    adapter.save_pretrained(folder)
    n_values = adapter.config.n_values
    n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    if not args.json:
        print(
            f"Wrote {args.output_dir}: {args.strength:.3g} · {alpha:.4g} · dec({h:.3g}) on "
            f"{n_values:,} weights, {n_bytes / 1e6:.1f} MB"
        )
    return {
        "output_dir": args.output_dir,
        "feature_factor": h,
        "step_size": alpha,
        "strength": args.strength,
        "n_values": n_values,
        "bytes": n_bytes,
    }


def _choose(gradiend: GradiendModel, args: argparse.Namespace) -> tuple[float, float]:
    """An edit chosen on the package's occupations.

    Raises:
        ConfigError: If the GRADIEND is of another feature, or no edit is better than the base.
    """
    if not is_gender(gradiend):
        raise ConfigError(
            "Expected an edit, but this GRADIEND has no chosen one. Pass --feature_factor and "
            "--step_size."
        )
    base_model, tokenizer = load_base_of(gradiend, args.base_model)
    judged = choose_gender_edit(
        gradiend, base_model, tokenizer, with_sweep=False, progress=not args.json
    )
    if judged is None:
        raise ConfigError(
            "Expected an edit that is better than the base model, but none was found within "
            "the limits. Pass --feature_factor and --step_size to write one all the same."
        )
    return judged.choice.feature_factor, judged.choice.step_size
