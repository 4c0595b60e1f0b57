"""Build a feature data set from a YAML specification, by its templates or from raw text."""

import argparse
import shutil
import time
from collections.abc import Mapping

from hf_gradiend.cli.common import table
from hf_gradiend.data.building import build_feature_dataset
from hf_gradiend.data.corpora import Corpus
from hf_gradiend.data.feature_files import save_feature_dataset
from hf_gradiend.data.spec_files import load_spec, package_specs
from hf_gradiend.errors import ConfigError
from hf_gradiend.files import empty_folder

# Options that are about a corpus, with their defaults.
_OF_CORPUS = {"column": "text", "config": None, "split": "train", "streaming": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("spec", help=f"YAML file, or one of {', '.join(package_specs())}")
    parser.add_argument(
        "--corpus", help="raw text: txt, jsonl or parquet, a folder of these, or a Hub id"
    )
    parser.add_argument("--column", default="text", help="column of the corpus with the text")
    parser.add_argument("--config", help="configuration of a corpus on the Hub")
    parser.add_argument("--split", default="train", help="split of a corpus on the Hub")
    parser.add_argument(
        "--streaming", action="store_true", help="read a corpus on the Hub without storing it"
    )
    parser.add_argument("--output_dir", required=True, help="new or empty folder for the data set")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that search the corpus")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Build the data set and write it, with its card, neutral texts and statistics.

    What a run has found in a corpus stays beside the output folder until the data set is complete,
    so that the same command goes on after an interruption.
    """
    started = time.perf_counter()
    spec = load_spec(args.spec)
    corpus = _corpus(args)
    folder = empty_folder(args.output_dir, "the data set").resolve()
    work_dir = folder.with_name(f".{folder.name}.partial")
    built = build_feature_dataset(
        spec, corpus=corpus, num_proc=args.num_proc, work_dir=work_dir, progress=not args.json
    )
    save_feature_dataset(built, folder)
    shutil.rmtree(work_dir, ignore_errors=True)  # without a corpus there is none
    if not args.json:
        _show(built.statistics)
        print(f"\nWrote {args.output_dir} ({time.perf_counter() - started:.0f} s)")
    return {
        **built.statistics,
        "output_dir": args.output_dir,
        "seconds": time.perf_counter() - started,
        "files": sorted(
            file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
        ),
    }


def _corpus(args: argparse.Namespace) -> Corpus | None:
    options = {name: getattr(args, name) for name in _OF_CORPUS}
    if args.corpus is not None:
        return Corpus(args.corpus, **options)
    for name, value in options.items():
        if value != _OF_CORPUS[name]:
            raise ConfigError(f"Expected --corpus with --{name}, but got --{name} alone.")
    return None


def _show(statistics: Mapping) -> None:
    texts = statistics["texts"]
    rows = [["texts", "number", "share"], ["read", f"{texts['read']:,}", ""]]
    for what, number in [("kept", texts["kept"]), *texts["dropped"].items()]:
        rows.append([what, f"{number:,}", f"{number / texts['read']:.1%}"])
    print(table(rows))
    splits = statistics["splits"]
    classes = list(next(iter(splits.values()))["classes"])
    rows = [["split", "texts", *classes, "rows"]]
    for name, split in splits.items():
        numbers = [split["texts"], *split["classes"].values(), split["rows"]]
        rows.append([name, *(f"{number:,}" for number in numbers)])
    print(f"\n{table(rows)}")
    neutral = statistics["neutral"]
    print(f"\nNeutral texts: {neutral['kept']:,} of {neutral['read']:,} read")
