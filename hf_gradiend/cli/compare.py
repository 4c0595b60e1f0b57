"""Compare GRADIENDs of one base model: directions, largest weights, and whose texts each reads."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_gradiend.cli.common import (
    can_draw,
    display_name,
    feature_data,
    load_base_of,
    load_gradiend,
    speaker,
    split_of,
    table,
)
from hf_gradiend.errors import CompatibilityError, ConfigError
from hf_gradiend.evaluation.features import compare_features, comparison_values
from hf_gradiend.files import writable_folder, write_json
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.plotting import plot_features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--gradiend", action="append", required=True, metavar="[NAME=]DIR",
        help="folder or Hub id of a GRADIEND; repeatable; default name: the folder's",
    )  # fmt: skip
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="[NAME=]DIR",
        help="feature data set that every GRADIEND reads: Hub id, folder or file; repeatable",
    )  # fmt: skip
    parser.add_argument("--base_model", help="default: the one that the GRADIENDs name")
    parser.add_argument("--split", default="test", help="of every data set")
    parser.add_argument("--output_dir", required=True, help="folder for features.json")
    parser.add_argument(
        "--top_k", type=float, default=0.01,
        help="share of the weights, those with the largest |W_d|, whose overlap is counted",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, object]:
    """Compare; write features.json and features.png."""
    places, sources = _named(args.gradiend, "--gradiend"), _named(args.dataset, "--dataset")
    folder = writable_folder(args.output_dir)
    datasets = {name: split_of(feature_data(place), args.split) for name, place in sources.items()}
    gradiends = {name: load_gradiend(place) for name, place in places.items()}
    base_name = args.base_model or _base_model_of(gradiends)
    base_model, tokenizer = load_base_of(next(iter(gradiends.values())), base_name)
    comparison = compare_features(
        gradiends, base_model, tokenizer, datasets, top_k=args.top_k, progress=not args.json
    )
    report = {
        **comparison_values(comparison),
        "base_model": display_name(comparison.base_model),
        "split": args.split,
    }
    written = [write_json(folder / "features.json", report)]
    if can_draw(speaker(args)):
        content = json.loads(written[0].read_text("utf-8"))
        written.append(plot_features(content, folder / "features.png"))
    if not args.json:
        _show(report)
        print(f"\nWrote {', '.join(map(str, written))}")
    return {"output": str(written[0]), **report}


def _named(values: Sequence[str], option: str) -> dict[str, str]:
    """Places by name, from NAME=DIR or DIR.

    Raises:
        ConfigError: If a name is empty or stands for two places.
    """
    places: dict[str, str] = {}
    for value in values:
        name, given, place = value.partition("=")
        if not given:
            name, place = Path(value).stem if Path(value).is_file() else Path(value).name, value
        if not (name and place):
            raise ConfigError(f"Expected {option} NAME=DIR or DIR, but got {value!r}.")
        if name in places:
            raise ConfigError(
                f"Expected {option} with names that differ, but {name!r} stands for "
                f"{places[name]!r} and {place!r}. Name them: {option} NAME=DIR."
            )
        places[name] = place
    return places


def _base_model_of(gradiends: Mapping[str, GradiendModel]) -> str | None:
    """The base model that all GRADIENDs name.

    Raises:
        CompatibilityError: If they name several.
    """
    bases = {name: model.config.base_model_name_or_path for name, model in gradiends.items()}
    if len({*bases.values()}) > 1:
        listed = ", ".join(f"{name} of {base}" for name, base in bases.items())
        raise CompatibilityError(
            f"Expected GRADIENDs of one base model, but got {listed}. Pass --base_model if it is "
            f"the same one in several places."
        )
    return next(iter(bases.values()))


def _show(report: dict) -> None:
    names = [feature["name"] for feature in report["features"]]
    titles = {
        "encoder_cosines": "cosine of the encoders",
        "decoder_cosines": "cosine of the decoders",
        "overlaps": f"top {100 * report['top_k']:g} % of |W_d| shared",
        "chance_overlaps": "the same by chance",
    }
    for key, title in titles.items() if len(names) > 1 else ():
        rows = [
            [name, *(_cell(value) for value in row)]
            for name, row in zip(names, report[key], strict=True)
        ]
        print(f"\n{table([[title, *names], *rows])}")
    if report["readings"]:
        rows = [
            ["feature reads", "classes (+ −)", "n", "mean |h|", "gap", "r", "95 % interval", "own"]
        ]
        for row in report["readings"]:
            r = row["correlation"]
            rows.append(
                [
                    f"{row['feature']}: {row['dataset']}", " ".join(row["classes"]), str(row["n"]),
                    _cell(row["mean_absolute"]), _cell(row["gap"]), _cell(r and r["value"]),
                    f"[{r['low']:.3f}, {r['high']:.3f}]" if r else "–", "yes" * row["own"],
                ]
            )  # fmt: skip
        print(f"\n{table(rows)}")
    rows = [["feature", "weights", "layers with the most energy of the decoder"]]
    for feature in report["features"]:
        energy = sorted(feature["energy_by_layer"].items(), key=lambda item: -item[1])[:3]
        most = ", ".join(f"{layer}: {100 * share:.1f} %" for layer, share in energy)
        rows.append([feature["name"], f"{feature['n_selected']:,}", most])
    print(f"\n{table(rows)}")


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
