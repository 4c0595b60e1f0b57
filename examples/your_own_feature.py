"""Make data for a feature of your own from a few lines of YAML, and learn it.

python examples/your_own_feature.py --spec examples/hot_and_cold.yaml
"""

import argparse
import sys
from pathlib import Path

import hf_gradiend as hg
from hf_gradiend.cli.common import origin_of, table
from hf_gradiend.data.building import build_feature_dataset
from hf_gradiend.data.feature_files import save_feature_dataset
from hf_gradiend.evaluation.report import build_report, read_encoder
from hf_gradiend.files import write_json
from hf_gradiend.plotting import plot_encodings
from hf_gradiend.training.trainer import training_summary


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", required=True, help="YAML file, or religion, race, number …")
    parser.add_argument("--classes", nargs=2, help="two of the classes, where there are more")
    parser.add_argument("--base_model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output_dir", default="my-feature", help="new or empty folder")
    return parser.parse_args()


def build(args: argparse.Namespace) -> Path:
    """Build the data set, write it with its card, and say what it holds."""
    built = build_feature_dataset(args.spec)
    rows = [["split", "texts", "rows"]]
    for split, counts in built.statistics["splits"].items():
        rows.append([split, str(counts["texts"]), str(counts["rows"])])
    print(table(rows))
    return save_feature_dataset(built, Path(args.output_dir) / "data")


def train(base_model: str, data_dir: Path, data: dict, folder: Path) -> dict:
    """Learn the feature in closed form and read the encoder; the report's content."""
    base, tokenizer = hg.load_base_model(base_model)
    arguments = hg.GradiendTrainingArguments(output_dir=str(folder))
    trainer = hg.GradiendTrainer(base, tokenizer, arguments, data["train"], data["validation"])
    training = training_summary(trainer.train())
    held_out = {"validation": data["validation"], "test": data["test"]}
    neutral = hg.load_neutral_texts(data_dir)
    encoder = read_encoder(trainer.model, base, tokenizer, held_out, neutral_texts=neutral)
    origin = origin_of(base_model, str(data_dir), data, arguments)
    return build_report(
        trainer.model, encoder=encoder, judged=None, training=training, origin=origin
    )


def main() -> None:
    """Data, training, the test correlation, a picture."""
    args = parse()
    data_dir = build(args)
    classes = tuple(args.classes) if args.classes else None
    data = hg.load_feature_dataset(data_dir, classes=classes)
    folder = Path(args.output_dir)
    report = train(args.base_model, data_dir, data, folder)
    write_json(folder / "report.json", report)
    test = report["encoder"]["splits"]["test"]["correlation"]
    print(
        f"test: correlation {test['value']:.3f} [{test['low']:.3f}, {test['high']:.3f}] "
        f"(n = {test['n']}, templates that were never trained on)"
    )
    try:
        print(f"Wrote {plot_encodings(report, folder / 'encodings.png')}")
    except ImportError as error:  # no matplotlib
        print(error)


if __name__ == "__main__":
    try:
        main()
    except hg.GradiendError as error:
        sys.exit(f"your_own_feature.py: {error}")
