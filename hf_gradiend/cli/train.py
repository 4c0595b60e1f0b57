"""Learn a feature of a base model from a data set, and report what the encoder reads."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import TrainingArguments

from hf_gradiend.base_models import load_base_model, objective_of
from hf_gradiend.cli.common import (
    encoder_table,
    feature_data,
    held_out,
    origin_of,
    peak_rss_bytes,
    short_splits,
    split_of,
    table,
)
from hf_gradiend.cli.contrasts import learn_contrasts
from hf_gradiend.data.collation import Rows, prepare_texts
from hf_gradiend.data.loading import load_neutral_texts
from hf_gradiend.data.neutral import neutral_readings
from hf_gradiend.data.spec_files import package_specs
from hf_gradiend.data.templates import build_neutral_texts, transfer_pairs
from hf_gradiend.errors import ConfigError
from hf_gradiend.evaluation.report import GENDER_WORDS, build_report, read_encoder
from hf_gradiend.files import writable_folder, write_json
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.estimate import TrainingEstimate, estimate_training
from hf_gradiend.training.setup import words_of_classes
from hf_gradiend.training.trainer import GradiendTrainer, TrainingResult, training_summary

# The name that transformers 5.23 gives it; the older one warns there.
_CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)
# Options that go to GradiendTrainingArguments under another or the same name, where given.
_ARGUMENTS = {
    "solver": "solver", "parameters": "parameters", "source": "source", "target": "target",
    "max_train_texts": "max_train_texts", "prune_fraction": "prune_fraction", "top_k": "top_k",
    "n_seeds": "n_seeds", "warm_start": "warm_start", "max_steps": "max_steps",
    "num_train_epochs": "num_train_epochs", "learning_rate": "learning_rate",
    "batch_size": "per_device_train_batch_size", "eval_steps": "eval_steps",
    "save_steps": "save_steps", "feature_classes": "feature_classes", "max_length": "max_length",
    "seed": "seed", "gradient_checkpointing": _CHECKPOINTING,
    "accumulator_dtype": "accumulator_dtype",
}  # fmt: skip


DATASET_HELP = f"Hub id, folder or file, or one of the package's: {', '.join(package_specs())}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--base_model", required=True, help="Hub id or folder")
    parser.add_argument("--gguf_file", help="name of a GGUF file in it")
    parser.add_argument("--dataset", required=True, help=DATASET_HELP)
    parser.add_argument(
        "--output_dir", required=True, help="folder for the GRADIEND and its report"
    )
    parser.add_argument("--solver", choices=["closed_form", "adamw"], default="closed_form")
    parser.add_argument("--parameters", nargs="+", help="layers, backbone or patterns of names")
    parser.add_argument("--neutral", help="neutral texts, one a line; default: the package's own")
    parser.add_argument("--feature_classes", nargs=2, help="class at +1, class at −1")
    parser.add_argument(
        "--contrasts", choices=["pairs", "rest"],
        help="with more than two classes: learn every pair, or each class against the rest, from "
        "one pass over the data; one folder each",
    )  # fmt: skip
    for name in ("source", "target"):
        parser.add_argument(f"--{name}", choices=["factual", "counterfactual", "diff"])
    for name, kind in (
        ("max_train_texts", int), ("prune_fraction", float), ("top_k", float), ("n_seeds", int),
        ("max_steps", int), ("num_train_epochs", float), ("learning_rate", float),
        ("batch_size", int), ("eval_steps", int), ("save_steps", int), ("max_length", int),
        ("seed", int),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument(
        "--warm_start", action="store_true", help="start adamw from the closed form"
    )
    parser.add_argument(
        "--gradient_checkpointing", action="store_true",
        help="compute each layer again in the backward pass: less memory, more time",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="type of the base model's weights",
    )  # fmt: skip
    parser.add_argument(
        "--accumulator_dtype", choices=["float32", "bfloat16"],
        help="type of the closed form's sums; bfloat16 suits hundreds of texts",
    )  # fmt: skip
    parser.add_argument(
        "--estimate", action="store_true",
        help="print what the training will take in memory and time, from short runs; train nothing",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")


def run(args: argparse.Namespace) -> dict[str, object] | None:
    """Train, evaluate on the validation and test splits, write the GRADIEND and report.json.

    Returns:
        What `--json` prints; `None` on all processes but the main one, which evaluates and writes.

    Raises:
        ConfigError: If an estimate is asked for of several contrasts or on several processes, or
            either of a resumed run.
    """
    if args.estimate and args.contrasts is not None:
        raise ConfigError("Expected --estimate without --contrasts, which it does not cover.")
    for name in ("estimate", "contrasts"):
        if args.resume and getattr(args, name):
            raise ConfigError(f"Expected --resume without --{name}, which starts anew.")
    folder = Path(args.output_dir) if args.estimate else writable_folder(args.output_dir)
    given = {
        theirs: getattr(args, ours)
        for ours, theirs in _ARGUMENTS.items()
        if getattr(args, ours) is not None and getattr(args, ours) is not False  # 0 is a value
    }
    arguments = GradiendTrainingArguments(output_dir=str(folder), disable_tqdm=args.json, **given)
    data = feature_data(args.dataset, None if args.contrasts else args.feature_classes)
    neutral = None if args.neutral is None else load_neutral_texts(args.neutral)
    # Half of the neutral texts to fit on, half to report on.
    fitted_on, unseen = (None, None) if neutral is None else (neutral[1::2], neutral[::2])
    base_model, tokenizer = load_base_model(
        args.base_model, gguf_file=args.gguf_file, dtype=getattr(torch, args.dtype)
    )
    if args.contrasts is not None:
        return learn_contrasts(args, arguments, data, base_model, tokenizer, (fitted_on, unseen))
    trainer = GradiendTrainer(
        base_model=base_model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=split_of(data, "train"),
        eval_dataset=data.get("validation"),
        neutral_texts=fitted_on,
    )
    processes = trainer.accelerator
    if args.estimate:
        if processes.num_processes > 1:
            raise ConfigError(
                f"Expected --estimate on one process, but got {processes.num_processes}."
            )
        return _estimated(trainer, data, unseen, quiet=args.json)
    trained = trainer.train(resume_from_checkpoint=args.resume or None)
    result = _reported(args, trainer, trained, data, unseen) if processes.is_main_process else None
    processes.end_training()
    return result


def _reported(
    args: argparse.Namespace,
    trainer: GradiendTrainer,
    trained: TrainingResult,
    data: DatasetDict,
    unseen: Sequence[str] | None,
) -> dict[str, object]:
    """Read the encoder, write report.json, print a table, and return what `--json` prints."""
    folder, started = Path(args.output_dir), time.perf_counter()
    encoder = read_encoder(
        trainer.model,
        trainer.base_model,
        trainer.processing_class,
        held_out(data),
        neutral_texts=unseen,
        max_length=args.max_length,
        progress=not args.json,
    )
    report_seconds = time.perf_counter() - started
    report = build_report(
        trainer.model,
        encoder=encoder,
        judged=None,
        training=training_summary(trained),
        origin=origin_of(args.base_model, args.dataset, data, trainer.args),
    )
    write_json(folder / "report.json", report)
    content: dict = report["encoder"]  # pyright: ignore[reportAssignmentType]
    if not args.json:
        print(encoder_table(content["splits"]))
        print(f"Neutral tokens: mean |h| {encoder.neutral.value:.3f} (n = {encoder.neutral.n})")
        print(f"Wrote {folder} ({trained.n_selected:,} weights, {trained.seconds:.0f} s)")
    return {
        "base_model": report["base_model"],
        "n_selected": trained.n_selected,
        "solver": args.solver,
        "encoder": short_splits(content["splits"]),
        "neutral_mean_absolute": encoder.neutral.value,
        "convergence": trained.convergence,
        "seconds": trained.seconds,
        "report_seconds": report_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "files": sorted(str(file) for file in folder.iterdir()),
    }


def _estimated(
    trainer: GradiendTrainer, data: DatasetDict, unseen: Sequence[str] | None, *, quiet: bool
) -> dict[str, object]:
    """Estimate the training and its report, print a table, and return what `--json` prints."""
    rows: list[Rows] = list(held_out(data).values())
    rows.append(neutral_readings(unseen or list(build_neutral_texts()["test"]["text"])))
    if sorted(words_of_classes(trainer.train_dataset).values()) == sorted(GENDER_WORDS):
        rows.append(transfer_pairs())
    tokenizer, objective = trainer.processing_class, objective_of(trainer.base_model)
    longest = trainer.args.max_length
    read = [prepare_texts(r, tokenizer, objective, max_length=longest) for r in rows]
    found = estimate_training(trainer, read)
    if not quiet:
        print(_plan(found))
    return {
        "n_selected": found.n_selected,
        "base_model_bytes": found.base_model_bytes,
        "program_bytes": found.program_bytes,
        "phases": [asdict(phase) for phase in found.phases],
        "peak_bytes": found.peak_bytes,
        "accelerator_peak_bytes": found.accelerator_peak_bytes,
        "seconds": found.seconds,
    }


def _plan(found: TrainingEstimate) -> str:
    """A training's phases as a table, GiB and seconds."""

    def in_gib(n_bytes: int) -> str:
        return f"{n_bytes / 2**30:.2f}"

    lines = [["phase", "seconds", "held GiB", "working GiB"]]
    for phase in found.phases:
        sizes = (phase.held_bytes, phase.working_bytes)
        lines.append([phase.name, f"{phase.seconds:.0f}", *map(in_gib, sizes)])
    peak = f"Peak {in_gib(found.peak_bytes)} GiB"
    if found.on_accelerator:
        peak += f" in main memory, {in_gib(found.accelerator_peak_bytes)} GiB on the GPU"
    return (
        f"{table(lines)}\n"
        f"{found.n_selected:,} weights; base model {in_gib(found.base_model_bytes)} GiB, program "
        f"{in_gib(found.program_bytes)} GiB.\n"
        f"{peak}; {found.seconds:.0f} s. Nothing was trained."
    )
