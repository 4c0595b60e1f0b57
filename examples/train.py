"""Train a GRADIEND with `accelerate launch`, read its encoder, choose an edit, and push it all.

accelerate launch examples/train.py --config examples/train_gender.yaml
"""

import argparse
import importlib.util
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from datasets import DatasetDict
from transformers import HfArgumentParser

import hf_gradiend as hg
from hf_gradiend.cli.common import license_of, origin_of, split_of
from hf_gradiend.data.templates import OWN_TEXTS, OWN_TEXTS_LICENSE, build_gender_pronouns
from hf_gradiend.evaluation.report import build_report, choose_gender_edit, is_gender, read_encoder
from hf_gradiend.files import write_json
from hf_gradiend.hub import PushOptions, push_folder
from hf_gradiend.plotting import plot_all
from hf_gradiend.training.trainer import training_summary

HUB = ("push_to_hub", "hub_model_id", "hub_private_repo")  # options that this script acts upon


@dataclass
class ScriptArguments:
    """What the training arguments do not hold: Hub ids, folders, or a file of texts."""

    base_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    dataset: str | None = None  # the package's own texts of she and he


def parse(argv: list[str]) -> tuple[ScriptArguments, hg.GradiendTrainingArguments, dict]:
    """Options of the command line, over those of `--config`, a YAML or JSON file."""
    kinds = (ScriptArguments, hg.GradiendTrainingArguments)
    # Without its usage line, of 150 options, an error of the parser is one line.
    parser = HfArgumentParser(kinds, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--config", help="YAML or JSON file of options; the command line wins")
    if file := parser.parse_known_args(argv)[0].config:
        try:
            content = dict(yaml.safe_load(Path(file).read_text("utf-8")))
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            parser.error(f"expected `name: value` in {file}: {' '.join(str(error).split())}")
        known = {item.name for kind in kinds for item in fields(kind)}
        if unknown := [key for key in content if key not in known]:
            parser.error(f"unknown key {unknown[0]!r} in {file}; --help lists all")
        for key, value in content.items():
            values = value if isinstance(value, list) else [value]
            argv = argv if value is None else [f"--{key}", *map(str, values), *argv]
    given = vars(parser.parse_args(argv))
    hub = {name: given.pop(name, None) for name in HUB}
    if hub["push_to_hub"] and not hub["hub_model_id"]:
        parser.error("--push_to_hub needs --hub_model_id org/name")
    return (*parser.parse_dict(given, allow_extra_keys=True), hub)


def evaluate(trainer: hg.GradiendTrainer, data: DatasetDict) -> dict:
    """Read the encoder, and choose and judge an edit; the arguments of `build_report`."""
    parts = (trainer.model, trainer.base_model, trainer.processing_class)
    splits = {name: data[name] for name in data if name != "train"} or data
    encoder, judged = read_encoder(*parts, splits), None
    for name, split in encoder.splits.items():
        print(f"{name}: correlation {split.correlation.value:.3f} (n = {split.correlation.n})")
    if is_gender(trainer.model):  # the package has texts to choose on for she and he alone
        judged = choose_gender_edit(*parts)
    if judged is not None:
        h, alpha = judged.choice.feature_factor, judged.choice.step_size
        trainer.model.config.update({"feature_factor": h, "step_size": alpha})
        trainer.model.config.save_pretrained(trainer.args.output_dir)
        before, after = judged.before.imbalance, judged.after.imbalance
        print(f"edit: θ + {alpha:.4g} · dec({h:.3g}), imbalance {before:.3f} -> {after:.3f}")
    return {"encoder": encoder, "judged": judged}


def main() -> None:
    """Train on all processes; evaluate and write on the main one."""
    script, arguments, hub = parse(sys.argv[1:])
    model = hg.load_base_model(base := script.base_model)  # and its tokenizer
    data = hg.load_feature_dataset(script.dataset) if script.dataset else build_gender_pronouns()
    texts = (split_of(data, "train"), data.get("validation"))
    trainer = hg.GradiendTrainer(*model, arguments, *texts)
    trainer.accelerator.print(f"Processes: {trainer.accelerator.num_processes}")
    training = training_summary(trainer.train())
    if trainer.accelerator.is_main_process:
        licenses = None if script.dataset else (license_of(base, "model"), OWN_TEXTS_LICENSE)
        origin = origin_of(base, script.dataset or OWN_TEXTS, data, arguments, licenses)
        parts = {"training": training, "origin": origin, **evaluate(trainer, data)}
        report = build_report(trainer.model, **parts)
        folder = write_json(Path(arguments.output_dir) / "report.json", report).parent
        if importlib.util.find_spec("matplotlib"):
            plot_all(report, folder)
        print(f"Wrote {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
        if hub["push_to_hub"]:
            options = PushOptions(hub["hub_model_id"], private=hub["hub_private_repo"])
            print(f"Pushed to {push_folder(folder, 'gradiend', options).commit_url}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except hg.GradiendError as error:
        sys.exit(f"train.py: {error}")
