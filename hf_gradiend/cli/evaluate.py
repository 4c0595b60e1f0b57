"""Compare a base model with edited ones on published bias benchmarks and on plain text."""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.adapter.control import set_strength
from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.base_models import load_base_model
from hf_gradiend.cli.common import can_draw, display_name, speaker, table
from hf_gradiend.errors import ConfigError
from hf_gradiend.evaluation.bias.benchmark import Benchmark, BenchmarkResult
from hf_gradiend.evaluation.bias.comparison import comparison_report, told
from hf_gradiend.evaluation.bias.suite import (
    BENCHMARKS,
    benchmarks_named,
    folder_of,
    run_benchmark,
)
from hf_gradiend.evaluation.harness import (
    HarnessResult,
    check_harness,
    compared_in_harness,
    evaluate_with_harness,
)
from hf_gradiend.files import read_object, writable_folder, write_json
from hf_gradiend.plotting import plot_benchmarks

RESULT = "evaluation.json"


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
        "--edited_model", action="append", default=[],
        help="Hub id or folder of a model to compare as a whole; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--benchmarks", default=",".join(BENCHMARKS),
        help="names with commas between them; stereoset:gender and crows_pairs:gender are parts, "
        "seat:word is another pooling (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--harness_tasks",
        help="tasks of lm-evaluation-harness as well, with commas between them; causal models",
    )
    parser.add_argument(
        "--data_dir", required=True, help="folder or Hub data set with the benchmarks' files"
    )
    parser.add_argument("--output_dir", required=True, help="folder for evaluation.json")
    parser.add_argument(
        "--report", help="report.json of a training, to add the result to, for its cards"
    )
    parser.add_argument("--limit", type=int, help="items of each benchmark, for a quick look")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Run the benchmarks on each model; write evaluation.json and evaluation.png.

    Raises:
        ConfigError: If strengths are given without an adapter, or a limit is not positive.
    """
    if args.strength and not args.adapter:
        raise ConfigError("Expected --strength together with --adapter, but got it alone.")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"Expected --limit of at least 1, but got {args.limit}.")
    started = time.perf_counter()
    say = speaker(args)
    benchmarks = benchmarks_named(_names(args.benchmarks))
    training = _training_report(args.report)
    folder = writable_folder(args.output_dir)
    adapters = _all_there(args, benchmarks)
    model, tokenizer = load_base_model(args.base_model)
    for adapter in adapters.values():
        with adapter.applied(model):  # refuses an adapter of another model
            pass
    name = display_name(args.base_model)
    base = _results(args, benchmarks, model, tokenizer, name, say)
    edited: dict[str, _Results] = {}
    for place, adapter in adapters.items():
        for strength in args.strength or [adapter.config.strength]:
            label = _new_label(f"{display_name(place)} at strength {strength:g}", edited)
            with adapter.applied(model) as carrier:
                set_strength(carrier, strength)
                edited[label] = _results(args, benchmarks, model, tokenizer, label, say)
    for place in args.edited_model:
        label = _new_label(display_name(place), edited)
        model, tokenizer = load_base_model(place)
        edited[label] = _results(args, benchmarks, model, tokenizer, label, say)
    report = _report(name, base, edited, args.limit)
    report["seconds"] = time.perf_counter() - started
    _write(report, folder, training, say)
    return {"output": str(folder / RESULT), **report}


def _all_there(args: argparse.Namespace, benchmarks: list[Benchmark]) -> dict[str, GradiendAdapter]:
    """Say what is missing before anything takes its time; the adapters by their places."""
    if args.harness_tasks is not None:
        check_harness(_names(args.harness_tasks), args.data_dir)
    for benchmark in benchmarks:
        folder_of(benchmark, args.data_dir)
    for place in args.edited_model:
        load_base_model(place)
    return {place: GradiendAdapter.from_pretrained(place) for place in args.adapter}


def _write(
    report: dict, folder: Path, training: tuple[Path, dict] | None, say: Callable[[str], None]
) -> None:
    write_json(folder / RESULT, report)
    if training is not None:
        write_json(training[0], {**training[1], "evaluation": report})
    _show(report, say)
    written = [folder / RESULT, *_picture(folder, say)]
    say(f"\n{report['seconds'] / 60:.1f} minutes. Wrote {', '.join(map(str, written))}")


def _training_report(path: str | None) -> tuple[Path, dict] | None:
    """The report to add the result to, read before anything takes its time."""
    if path is None:
        return None
    return Path(path), read_object(Path(path), "the report.json of a training")


@dataclass(frozen=True)
class _Results:
    """What one model did.

    Args:
        benchmarks: Its results on the package's benchmarks.
        harness: On tasks of lm-evaluation-harness; `None` where none were asked for.
    """

    benchmarks: list[BenchmarkResult]
    harness: HarnessResult | None


def _results(
    args: argparse.Namespace,
    benchmarks: list[Benchmark],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    label: str,
    say: Callable[[str], None],
) -> _Results:
    """All benchmarks on a model; what was asked before is taken from the folder's cache."""
    say(f"\n{label}")
    results = [
        run_benchmark(
            benchmark, model, tokenizer, args.data_dir,
            limit=args.limit, cache_dir=Path(args.output_dir) / "cache", progress=not args.json,
        )
        for benchmark in benchmarks
    ]  # fmt: skip
    harness = None
    if args.harness_tasks is not None:
        harness = evaluate_with_harness(
            model, tokenizer, _names(args.harness_tasks),
            data_dir=args.data_dir, limit=args.limit, progress=not args.json,
        )  # fmt: skip
    return _Results(results, harness)


def _report(name: str, base: _Results, edited: dict[str, _Results], limit: int | None) -> dict:
    """The comparison of all models, with the harness' rows below those of the benchmarks."""
    others = {label: results.benchmarks for label, results in edited.items()}
    report: dict = comparison_report(name, base.benchmarks, others, limit=limit)
    if base.harness is None:
        return report
    for title, estimates in base.harness.estimates().items():
        report["base"][title] = {metric: asdict(e) for metric, e in estimates.items()}
    for edit, results in zip(report["edited"], edited.values(), strict=True):
        if results.harness is not None:
            edit["rows"] += compared_in_harness(base.harness, results.harness)
            edit["told"] = told(edit["rows"])
    return report


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _new_label(label: str, taken: dict[str, _Results]) -> str:
    """The label, with a number where two folders have the same name."""
    labels = (label if n == 1 else f"{label} ({n})" for n in itertools.count(1))
    return next(new for new in labels if new not in taken)


def _show(report: dict, say: Callable[[str], None]) -> None:
    if not report["edited"]:
        rows = [["benchmark", "measure", "n", "value", "95 % interval"]]
        rows += [
            [name, m, str(e["n"]), f"{e['value']:.3f}", f"[{e['low']:.3f}, {e['high']:.3f}]"]
            for name, measures in report["base"].items()
            for m, e in measures.items()
        ]
        say(f"\n{table(rows)}")
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
        say(f"\n{edit['label']}\n{table(rows)}")
        for line in edit["told"]:
            say(line)


def _picture(folder: Path, say: Callable[[str], None]) -> list[Path]:
    if not can_draw(say):
        return []
    report = json.loads((folder / RESULT).read_text("utf-8"))
    return [plot_benchmarks(report, folder / "evaluation.png")]
