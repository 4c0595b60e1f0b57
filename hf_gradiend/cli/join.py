"""Join GRADIENDs of one feature each into one with several axes, blind to each other's classes."""

import argparse

from hf_gradiend.cli.common import feature_data, load_base_of, load_gradiend, split_of
from hf_gradiend.errors import ConfigError
from hf_gradiend.files import empty_folder
from hf_gradiend.training.axes import join_axes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--gradiend", action="append", required=True, help="folder or Hub id; once for each axis"
    )
    parser.add_argument(
        "--dataset", action="append", required=True,
        help="feature data set of each, in the same order",
    )  # fmt: skip
    parser.add_argument(
        "--split", default="validation", help="texts to fit on, which none was learned from"
    )
    parser.add_argument("--base_model", help="default: the first GRADIEND's own")
    parser.add_argument("--output_dir", required=True, help="folder for the joined GRADIEND")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Join and save.

    Raises:
        ConfigError: If there is not one data set for each GRADIEND.
    """
    if len(args.gradiend) != len(args.dataset):
        raise ConfigError(
            f"Expected one --dataset for each --gradiend, in the same order, but got "
            f"{len(args.dataset)} for {len(args.gradiend)}."
        )
    folder = empty_folder(args.output_dir, "the GRADIEND", another="--output_dir")
    datasets = [split_of(feature_data(place), args.split) for place in args.dataset]
    gradiends = [load_gradiend(place) for place in args.gradiend]
    base_model, tokenizer = load_base_of(gradiends[0], args.base_model)
    joined = join_axes(gradiends, base_model, tokenizer, datasets, progress=not args.json)
    joined.save_pretrained(folder)
    axes = joined.config.feature_classes or []
    if not args.json:
        print(f"Wrote {folder}: {', '.join('/'.join(pair) for pair in axes)}")
    return {"output_dir": args.output_dir, "feature_classes": axes}
