"""Write an edited model with its tokenizer: the base model plus α·dec(h)."""

import argparse

from hf_gradiend.cli.common import load_gradiend_and_base
from hf_gradiend.errors import ConfigError, OutputError
from hf_gradiend.evaluation.report import choose_gender_edit, is_gender
from hf_gradiend.files import replaced_folder, writable_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--gradiend", required=True, help="folder or Hub id of the GRADIEND")
    parser.add_argument("--output_dir", required=True, help="folder for the edited model")
    parser.add_argument("--base_model", help="default: the one that the GRADIEND names")
    parser.add_argument("--feature_factor", type=float, help="h; default: the chosen edit's")
    parser.add_argument("--step_size", type=float, help="α; default: the chosen edit's")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Edit and save; where no edit is given or stored, choose one on the package's occupations.

    Raises:
        ConfigError: If half an edit is given, or none is given or stored and none can be chosen.
        OutputError: If the output folder is not empty.
    """
    if (args.feature_factor is None) != (args.step_size is None):
        raise ConfigError(
            "Expected --feature_factor and --step_size together, but got one of them."
        )
    folder = writable_folder(args.output_dir)
    if any(folder.iterdir()):  # it is replaced as a whole: never the GRADIEND or somebody's files
        raise OutputError(
            f"Expected a new or empty folder for the edited model, but {args.output_dir!r} holds "
            f"files. Choose another --output_dir, or empty it."
        )
    gradiend, base_model, tokenizer = load_gradiend_and_base(args)
    h, alpha = args.feature_factor, args.step_size
    if h is None:
        h, alpha = gradiend.config.feature_factor, gradiend.config.step_size
    if h is None or alpha is None:
        if not is_gender(gradiend):
            raise ConfigError(
                "Expected an edit, but this GRADIEND has no chosen one. Pass --feature_factor and "
                "--step_size."
            )
        judged = choose_gender_edit(
            gradiend, base_model, tokenizer, with_sweep=False, progress=not args.json
        )
        if judged is None:
            raise ConfigError(
                "Expected an edit that is better than the base model, but none was found within "
                "the limits. Pass --feature_factor and --step_size to write one all the same."
            )
        h, alpha = judged.choice.feature_factor, judged.choice.step_size
    gradiend.merge_into(base_model, h, alpha)
    with replaced_folder(args.output_dir) as folder:
        base_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if not args.json:
        print(f"Wrote {args.output_dir}: base model + {alpha:.4g} · dec({h:.3g})")
    return {"output_dir": args.output_dir, "feature_factor": h, "step_size": alpha}
