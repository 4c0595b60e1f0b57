"""Read texts with a GRADIEND: one encoding per text, and how well it tells the classes apart."""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch

from hf_gradiend.cli.common import feature_data, load_base_of, load_gradiend, split_of, table
from hf_gradiend.errors import CompatibilityError, ConfigError, DataError, OutputError
from hf_gradiend.files import writable_folder
from hf_gradiend.metrics import bootstrap, pearson_correlation, sign_accuracy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--gradiend", required=True, help="folder or Hub id of the GRADIEND")
    parser.add_argument("--dataset", required=True, help="feature data set: Hub id, folder or file")
    parser.add_argument("--split", default="test")
    parser.add_argument("--base_model", help="default: the one that the GRADIEND names")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", help="JSON-lines file for the rows with their encodings")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Encode one split; write the rows with their encodings where asked to.

    Raises:
        DataError: If the GRADIEND's classes are not those of the data.
        CompatibilityError: If all texts that can be read are of one class.
    """
    _check(args)
    data = split_of(feature_data(args.dataset), args.split)
    gradiend = load_gradiend(args.gradiend)
    base_model, tokenizer = load_base_of(gradiend, args.base_model)
    positive, negative = (gradiend.config.feature_classes or [["+", "−"]])[0]
    if set(data["factual_class"]) - {positive, negative}:
        raise DataError(
            f"Expected the GRADIEND's classes {positive!r} and {negative!r}, but the data set has "
            f"{sorted(set(data['factual_class']))}."
        )
    rows = cast("Iterable[Mapping[str, str]]", data)  # datasets does not say what its rows are
    encodings = gradiend.encode_texts(
        base_model, tokenizer, rows, batch_size=args.batch_size, progress=not args.json
    )[:, 0]
    read = encodings.isfinite()
    signs = torch.tensor([1.0 if name == positive else -1.0 for name in data["factual_class"]])
    h, y = encodings[read], signs[read]
    if len(set(y.tolist())) < 2:
        raise CompatibilityError(
            f"Expected texts of both classes in {args.split!r}, but all are of one; there is no "
            f"correlation."
        )
    correlation = bootstrap(lambda i: pearson_correlation(h[i], y[i]), len(h))
    accuracy = bootstrap(lambda i: sign_accuracy(h[i], y[i]), len(h))
    if args.output is not None:
        _write_rows(Path(args.output), data, encodings.tolist())
    if not args.json:
        lines = [["measure", "value", "95 % interval", "n"]]
        for name, found in (("correlation", correlation), ("accuracy", accuracy)):
            lines.append(
                [name, f"{found.value:.4f}", f"[{found.low:.4f}, {found.high:.4f}]", str(found.n)]
            )
        print(table(lines))
    return {
        "split": args.split,
        "correlation": correlation.value,
        "accuracy": accuracy.value,
        "n": correlation.n,
        "n_skipped": int((~read).sum()),
        "output": args.output,
    }


def _check(args: argparse.Namespace) -> None:
    """Refuse, before any work, what could not be done at the end of it.

    Raises:
        ConfigError: If the batch size is not positive.
        OutputError: If the rows cannot be written where asked to.
    """
    if args.batch_size < 1:
        raise ConfigError(f"Expected --batch_size of at least 1, but got {args.batch_size}.")
    if args.output is not None:
        writable_folder(Path(args.output).parent)
        if Path(args.output).is_dir():
            raise OutputError(f"Expected --output to be a file, but {args.output!r} is a folder.")


def _write_rows(path: Path, data, encodings: list[float]) -> None:  # noqa: ANN001 - a Dataset
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        for row, h in zip(data, encodings, strict=True):
            # A skipped text has no encoding; NaN is not JSON.
            file.write(json.dumps({**row, "encoding": None if h != h else h}) + "\n")
    temporary.replace(path)
