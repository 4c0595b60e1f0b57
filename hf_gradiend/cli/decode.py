"""Measure a GRADIEND's edits over a grid, and show which of them each rule chooses."""

import argparse
import json
import math

from hf_gradiend.cli.common import can_draw, load_base_of, load_gradiend, open_texts, speaker, table
from hf_gradiend.data.loading import load_neutral_texts
from hf_gradiend.errors import ConfigError
from hf_gradiend.evaluation.decoder_report import decoder_values, evaluate_decoder
from hf_gradiend.evaluation.report import edit_probes
from hf_gradiend.files import writable_folder, write_json
from hf_gradiend.plotting import plot_decoder

SHOWN = ("imbalance", "mass", "p_plus", "p_minus", "lm_score")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--gradiend", required=True, help="folder or Hub id of the GRADIEND")
    parser.add_argument("--output_dir", required=True, help="folder for decoder.json")
    parser.add_argument("--base_model", help="default: the GRADIEND's own")
    parser.add_argument(
        "--prompts",
        help="texts with [TARGET] that leave the class open: the first half chooses, the second "
        "judges; or number, race, religion or sentiment, whose own sentences fit all their "
        "classes; default: the package's occupations, for she against he",
    )
    parser.add_argument("--neutral", help="texts without the feature; default: the package's own")
    parser.add_argument("--feature_factors", type=float, nargs="+", help="h of the grid")
    parser.add_argument("--step_sizes", type=float, nargs="+", help="α of the grid")
    parser.add_argument(
        "--max_trials", type=int, default=16, help="edits that a rule tries beside the grid"
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Measure, choose and judge; write decoder.json and decoder.png.

    Raises:
        ConfigError: If half a grid is given, or a number is out of range.
    """
    if (args.feature_factors is None) != (args.step_sizes is None):
        raise ConfigError(
            "Expected --feature_factors and --step_sizes together, but got one of them."
        )
    numbers = [*(args.feature_factors or ()), *(args.step_sizes or ())]
    if args.max_trials < 0 or not all(map(math.isfinite, numbers)):
        raise ConfigError(
            f"Expected finite numbers for the grid and --max_trials of at least 0, but got "
            f"{numbers} and {args.max_trials}."
        )
    grid = None if args.step_sizes is None else (args.feature_factors, args.step_sizes)
    folder = writable_folder(args.output_dir)
    gradiend = load_gradiend(args.gradiend)
    base_model, tokenizer = load_base_of(gradiend, args.base_model)
    choosing, judging = edit_probes(
        gradiend,
        base_model,
        tokenizer,
        prompts=None if args.prompts is None else open_texts(args.prompts),
        neutral_texts=None if args.neutral is None else load_neutral_texts(args.neutral),
    )
    report = decoder_values(
        evaluate_decoder(
            gradiend, choosing, judging,
            grid=grid, max_trials=args.max_trials, progress=not args.json,
        )
    )  # fmt: skip
    write_json(folder / "decoder.json", report)
    written = [folder / "decoder.json"]
    if report["grid"] and can_draw(speaker(args)):
        content = json.loads((folder / "decoder.json").read_text("utf-8"))
        written.append(plot_decoder(content, folder / "decoder.png"))
    if not args.json:
        _show(report)
        print(f"\nWrote {', '.join(map(str, written))}")
    return {"output": str(written[0]), **{k: v for k, v in report.items() if k != "grid"}}


def _show(report: dict) -> None:
    rows = [["rule, judged on other texts", "h", "α", *SHOWN]]
    before = report["judged_before"]
    rows.append(["base model", "", "", *(f"{before[name]:.4f}" for name in SHOWN)])
    for choice in report["choices"]:
        after = choice["judged_after"]
        edit = f"{choice['feature_factor']:.3g}", f"{choice['step_size']:.4g}"
        rule = f"{choice['criterion']}, {choice['rule']}"
        rows.append([rule, *edit, *(f"{after[name]:.4f}" for name in SHOWN)])
    print(f"\n{table(rows)}")
    for rule in report["without_choice"]:
        print(f"{rule['criterion']}, {rule['rule']}: no edit is better than the base model.")
    print("Write one as an adapter: hf-gradiend adapt --feature_factor H --step_size A …")
