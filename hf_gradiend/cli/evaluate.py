"""Compare a base model with edited ones on published bias benchmarks and on plain text."""

import argparse
import json
from pathlib import Path

from hf_gradiend.adapter.control import set_strength
from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.base_models import load_base_model
from hf_gradiend.cli.common import display_name, table
from hf_gradiend.errors import ConfigError
from hf_gradiend.evaluation.bias.benchmark import BenchmarkResult
from hf_gradiend.evaluation.bias.suite import (
    BENCHMARKS,
    benchmarks_named,
    compared,
    run_benchmark,
)
from hf_gradiend.files import writable_folder, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--base_model", required=True, help="Hub id or folder")
    parser.add_argument(
        "--adapter", action="append", default=[], help="GRADIEND adapter; repeatable"
    )
    parser.add_argument(
        "--strength", type=float, nargs="+", help="of every adapter; default: the adapter's own"
    )
    parser.add_argument(
        "--benchmarks", default=",".join(BENCHMARKS), help="names with commas between them"
    )
    parser.add_argument("--data_dir", required=True, help="folder with the benchmarks' files")
    parser.add_argument("--output_dir", required=True, help="folder for evaluation.json")
    parser.add_argument("--limit", type=int, help="items of each benchmark, for a quick look")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Run the benchmarks on each model and write evaluation.json.

    Raises:
        ConfigError: If strengths are given without an adapter, or a limit is not positive.
    """
    if args.strength and not args.adapter:
        raise ConfigError("Expected --strength together with --adapter, but got it alone.")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"Expected --limit of at least 1, but got {args.limit}.")
    benchmarks = benchmarks_named([name.strip() for name in args.benchmarks.split(",")])
    folder = writable_folder(args.output_dir)
    model, tokenizer = load_base_model(args.base_model)

    def results(what: str) -> list[BenchmarkResult]:
        if not args.json:
            print(f"\n{what}")
        return [
            run_benchmark(
                benchmark, model, tokenizer, args.data_dir,
                limit=args.limit, cache_dir=folder / "cache", progress=not args.json,
            )
            for benchmark in benchmarks
        ]  # fmt: skip

    base = results(display_name(args.base_model))
    report: dict[str, object] = {
        "base_model": display_name(args.base_model),
        "limit": args.limit,
        "base": {
            result.benchmark.name: {
                name: vars(estimate) for name, estimate in result.estimates().items()
            }
            for result in base
        },
        "edited": [],
    }
    edited: list[dict[str, object]] = []
    for place in args.adapter:
        adapter = GradiendAdapter.from_pretrained(place)
        for strength in args.strength or [adapter.config.strength]:
            with adapter.applied(model) as carrier:
                set_strength(carrier, strength)
                after = results(f"{display_name(place)} at strength {strength:g}")
            rows = [
                row for one, other in zip(base, after, strict=True) for row in compared(one, other)
            ]
            edited.append({"adapter": display_name(place), "strength": strength, "rows": rows})
    report["edited"] = edited
    write_json(folder / "evaluation.json", json.loads(json.dumps(report)))
    if not args.json:
        _show(report)
        print(f"\nWrote {folder / 'evaluation.json'}")
    return {"output": str(Path(folder) / "evaluation.json"), **report}


def _show(report: dict) -> None:
    if not report["edited"]:
        rows = [["benchmark", "measure", "n", "value", "95 % interval"]]
        for name, measures in report["base"].items():
            rows += [
                [name, m, str(e["n"]), f"{e['value']:.3f}", f"[{e['low']:.3f}, {e['high']:.3f}]"]
                for m, e in measures.items()
            ]
        print(f"\n{table(rows)}")
    for edit in report["edited"]:
        rows = [
            ["benchmark", "measure", "n", "before", "after", "change", "95 % interval", "verdict"]
        ]
        for row in edit["rows"]:
            change = row["change"]
            rows.append(
                [
                    row["benchmark"], row["measure"], str(change["n"]),
                    f"{row['before']['value']:.3f}", f"{row['after']['value']:.3f}",
                    f"{change['value']:+.3f}", f"[{change['low']:+.3f}, {change['high']:+.3f}]",
                    row["verdict"],
                ]
            )  # fmt: skip
        print(f"\n{edit['adapter']} at strength {edit['strength']:g}\n{table(rows)}")
