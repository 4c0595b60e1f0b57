"""`hf-gradiend train --contrasts`: several classes, a GRADIEND and a report for each contrast."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.cli.common import (
    held_out,
    origin_of,
    peak_rss_bytes,
    short_splits,
    split_of,
    table,
)
from hf_gradiend.evaluation.report import build_report, read_encoder
from hf_gradiend.files import write_json
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.contrasts import Contrast, rows_of
from hf_gradiend.training.several_classes import train_contrasts


def learn_contrasts(
    args: argparse.Namespace,
    arguments: GradiendTrainingArguments,
    data: DatasetDict,
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    neutral: tuple[Sequence[str] | None, Sequence[str] | None],
) -> dict[str, object]:
    """Learn all contrasts; write a GRADIEND and a report.json in one folder each.

    Args:
        args: The command's own.
        arguments: How to train.
        data: Feature data set with several classes.
        base_model: Base model.
        tokenizer: Its tokenizer.
        neutral: Texts without the feature to fit on, and others to report on; `None` for the
            package's own.
    """
    started = time.perf_counter()
    fitted_on, unseen = neutral
    folder = Path(args.output_dir)
    rows = [
        [
            "contrast", "n", "correlation", "95 % interval", "accuracy", "neutral |h|",
            "other classes: h, |h|",
        ]
    ]  # fmt: skip
    short: dict[str, object] = {}
    learned = train_contrasts(
        base_model,
        tokenizer,
        arguments,
        split_of(data, "train"),
        kind=args.contrasts,
        eval_dataset=data.get("validation"),
        neutral_texts=fitted_on,
    )
    for contrast, gradiend in learned:
        gradiend.save_pretrained(folder / contrast.name)
        splits = {name: rows_of(contrast, part) for name, part in held_out(data).items()}
        encoder = read_encoder(
            gradiend,
            base_model,
            tokenizer,
            splits,
            neutral_texts=unseen,
            other_texts=other_rows(contrast, list(held_out(data).values())[-1]),
            max_length=args.max_length,
            progress=not args.json,
        )
        report = build_report(
            gradiend,
            encoder=encoder,
            judged=None,
            training={"seconds": time.perf_counter() - started, "contrasts": args.contrasts},
            origin=origin_of(args.base_model, args.dataset, data, arguments),
        )
        write_json(folder / contrast.name / "report.json", report)
        content: dict = report["encoder"]  # pyright: ignore[reportAssignmentType]
        name, split = list(content["splits"].items())[-1]
        r, accuracy = split["correlation"], split["accuracy"]
        rows.append(
            [
                f"{contrast.name} ({name})", str(r["n"]), f"{r['value']:.3f}",
                f"[{r['low']:.3f}, {r['high']:.3f}]", f"{accuracy['value']:.3f}",
                f"{encoder.neutral.value:.3f}",
                ", ".join(
                    f"{name} {other.mean.value:+.2f}, {other.mean_absolute.value:.2f}"
                    for name, other in encoder.other_classes.items()
                ),
            ]
        )  # fmt: skip
        short[contrast.name] = {
            "encoder": short_splits(content["splits"]),
            "neutral_mean_absolute": encoder.neutral.value,
            "other_classes": {
                name: {
                    "mean": other.mean.value,
                    "mean_absolute": other.mean_absolute.value,
                    "n": other.mean.n,
                }
                for name, other in encoder.other_classes.items()
            },
        }
    if not args.json:
        print(table(rows))
        print(f"Wrote {folder} ({time.perf_counter() - started:.0f} s)")
    return {
        "contrasts": short,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def other_rows(contrast: Contrast, dataset: Dataset) -> Dataset | None:
    """The rows whose class is on neither side of a contrast, each text once.

    Args:
        contrast: What is told apart.
        dataset: Feature data set with several classes.

    Returns:
        The rows; `None` where every class is on a side.
    """
    own = {*contrast.positive.labels, *contrast.negative.labels}
    texts = zip(dataset["text"], dataset["factual"], dataset["factual_class"], strict=True)
    first: dict[tuple[str, str, str], int] = {}
    for row, text in enumerate(texts):
        if text[2] not in own:
            first.setdefault(text, row)
    return dataset.select([*first.values()]) if first else None
