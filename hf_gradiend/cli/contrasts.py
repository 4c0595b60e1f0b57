"""`hf-gradiend train --contrasts`: several classes, a GRADIEND and a report for each contrast."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
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
from hf_gradiend.evaluation.encoder import EncoderReport
from hf_gradiend.evaluation.report import build_report, read_encoder
from hf_gradiend.files import write_json
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.contrasts import Contrast, rows_of
from hf_gradiend.training.several_classes import train_contrasts

_HEAD = [
    "contrast", "n", "correlation", "95 % interval", "accuracy", "neutral |h|",
    "other classes: h, |h|",
]  # fmt: skip


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
    learned = train_contrasts(
        base_model,
        tokenizer,
        arguments,
        split_of(data, "train"),
        kind=args.contrasts,
        eval_dataset=data.get("validation"),
        neutral_texts=fitted_on,
    )
    shared_pass_seconds = time.perf_counter() - started
    read = _reader(args, base_model, tokenizer, held_out(data), unseen)
    folder = Path(args.output_dir)
    origin = origin_of(args.base_model, args.dataset, data, arguments)
    rows, short = [_HEAD], {}
    for (contrast, gradiend), seconds in _timed(learned):
        gradiend.save_pretrained(folder / contrast.name)
        encoder = read(contrast, gradiend)
        training = {
            "seconds": seconds,
            "shared_pass_seconds": shared_pass_seconds,
            "contrasts": args.contrasts,
        }
        report = build_report(
            gradiend, encoder=encoder, judged=None, training=training, origin=origin
        )
        write_json(folder / contrast.name / "report.json", report)
        rows.append(_row(contrast, encoder))
        short[contrast.name] = {**_short(encoder), "seconds": seconds}
    total = time.perf_counter() - started
    if not args.json:
        print(table(rows))
        print(f"Wrote {folder} ({total:.0f} s)")
    return {
        "contrasts": short,
        "shared_pass_seconds": shared_pass_seconds,
        "seconds": total,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _timed(
    learned: Iterator[tuple[Contrast, GradiendModel]],
) -> Iterator[tuple[tuple[Contrast, GradiendModel], float]]:
    """Time what is learned, one after the other.

    Yields:
        A contrast and its GRADIEND, and the seconds that these took by themselves.
    """
    started = time.perf_counter()
    for found in learned:
        yield found, time.perf_counter() - started
        started = time.perf_counter()


def _reader(
    args: argparse.Namespace,
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Dataset],
    unseen: Sequence[str] | None,
) -> Callable[[Contrast, GradiendModel], EncoderReport]:
    """Function that reads an encoder on its contrast's rows, and on the last split's others."""

    def read(contrast: Contrast, gradiend: GradiendModel) -> EncoderReport:
        return read_encoder(
            gradiend,
            base_model,
            tokenizer,
            {name: rows_of(contrast, part) for name, part in splits.items()},
            neutral_texts=unseen,
            other_texts=other_rows(contrast, list(splits.values())[-1]),
            max_length=args.max_length,
            progress=not args.json,
        )

    return read


def _row(contrast: Contrast, encoder: EncoderReport) -> list[str]:
    """A contrast's row of the table, about the last of its splits."""
    name, split = list(encoder.splits.items())[-1]
    r = split.correlation
    others = (
        f"{label} {other.mean.value:+.2f}, {other.mean_absolute.value:.2f}"
        for label, other in encoder.other_classes.items()
    )
    return [
        f"{contrast.name} ({name})", str(r.n), f"{r.value:.3f}", f"[{r.low:.3f}, {r.high:.3f}]",
        f"{split.accuracy.value:.3f}", f"{encoder.neutral.value:.3f}", ", ".join(others),
    ]  # fmt: skip


def _short(encoder: EncoderReport) -> dict[str, object]:
    """What an encoder reads, for `--json`."""
    return {
        "encoder": short_splits(asdict(encoder)["splits"]),
        "neutral_mean_absolute": encoder.neutral.value,
        "other_classes": {
            label: {
                "mean": other.mean.value,
                "mean_absolute": other.mean_absolute.value,
                "n": other.mean.n,
            }
            for label, other in encoder.other_classes.items()
        },
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
