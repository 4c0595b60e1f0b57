"""Make checkpoints with the official package `gradiend` and record what it computes with them.

Run it with the interpreter of an environment that has `gradiend` 0.2.3, as
`test_gradiend_format.py` does. For each of `CASES` it trains on a base model and writes a folder:

- `checkpoint/`: what the package's own `save_pretrained` writes.
- `recorded.safetensors`: `encodings` of a few texts of the test split, of shape (texts, features),
  and of each parameter the `gradient.<name>` that was encoded and the `decoded.<name>` of that
  encoding, of shape (texts, *shape).
- `recorded.json`: the `texts` with their words and classes, and `mean_by_feature_class`, the mean
  encoding of the gradients of each class's tokens in the package's own evaluation of the test
  split, or null: it fails for the source "diff".
"""

import argparse
import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

N_TEXTS = 12


@dataclass(frozen=True)
class Case:
    """A checkpoint to make.

    Args:
        source: Which gradient is encoded.
        target: Which gradient is decoded.
        base: Folder of the base model.
        trained: Whether to train until the classes are told apart, not just a few steps.
        kept: Share of the weights to keep in the end; `None` for all.
        safe: Write safetensors, not pickles.
        architecture: Fields in which the GRADIEND differs; it is then untrained, since the
            training arguments of these names have no effect.
        settings: Further training arguments.
    """

    source: str
    target: str = "diff"
    base: str = "bert"
    trained: bool = False
    kept: float | None = None
    safe: bool = True
    architecture: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


CASES = {
    "factual": Case("factual", trained=True),
    "alternative": Case("alternative", trained=True),
    "diff": Case("diff", trained=True),
    "indices": Case("factual", "alternative", kept=0.02),
    "mixed": Case("alternative", "factual", kept=0.5),
    "bin": Case("factual", safe=False, architecture={"bias_decoder": False}),
    "pruned_bin": Case("diff", kept=0.1, safe=False),
    "two_features": Case("factual", architecture={"latent_dim": 2}),
    "gpt2": Case("factual", base="gpt2"),
    "gpt2_indices": Case("alternative", base="gpt2", kept=0.02),
    "named_objective": Case("factual", settings={"prediction_objective": "mlm_mask_token"}),
    "layers": Case("factual", settings={"params": ["*.layer.*"]}),
}


def train(base: Path, output: Path, case: Case):
    """The package's own trainer after training on a base model's `data.csv`."""
    # Here, since pytest imports every file of the tests, also where there is no gradiend.
    from gradiend import TextPredictionTrainer, TrainingArguments  # noqa: PLC0415

    args = TrainingArguments(
        source=case.source,
        target=case.target,
        train_batch_size=8,
        learning_rate=1e-2,
        num_train_epochs=40,
        max_steps=100 if case.trained else 4,
        eval_steps=50,
        do_eval=case.trained,
        max_seeds=1,
        **case.settings,
    )
    trainer = TextPredictionTrainer(
        str(base), data=str(base / "data.csv"), target_classes=["F", "M"], args=args
    )
    trainer.train(output_dir=str(output / "trained"))
    return trainer


def read_texts(base: Path) -> list[dict[str, str]]:
    """Some texts of the test split, of both classes."""
    with (base / "data.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    return rows[:: len(rows) // N_TEXTS][:N_TEXTS]


def record(model, texts: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Gradients, encodings and decoded gradients of texts, all of them the package's own."""
    gradients, encodings, decoded = [], [], []
    for row in texts:
        text = row["masked"].replace("[MASK]", model.tokenizer.mask_token or "").strip()
        if model.is_decoder_only_model:
            text = row["masked"].split("[MASK]")[0].strip()
        sides = {
            "factual": model.create_gradients(text, row["label"], return_dict=True),
            "alternative": model.create_gradients(text, row["alternative"], return_dict=True),
        }
        names = sides["factual"]
        sides["diff"] = {n: sides["factual"][n] - sides["alternative"][n] for n in names}
        gradients.append(sides[model.source])
        with torch.no_grad():
            back, h = model.gradiend(sides[model.source], return_encoded=True)
        encodings.append(h)
        decoded.append(back)
    recorded = {"encodings": torch.stack(encodings)}
    for name in gradients[0]:
        recorded[f"gradient.{name}"] = torch.stack([g[name] for g in gradients])
        recorded[f"decoded.{name}"] = torch.stack([d[name] for d in decoded])
    return recorded


def main() -> None:
    """Make all checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bases", type=Path, help="folder of the base models, each with a data.csv")
    parser.add_argument("output", type=Path, help="folder to write to")
    options = parser.parse_args()
    for name, case in CASES.items():
        base, output = options.bases / case.base, options.output / name
        trainer = train(base, output, case)
        model = trainer.get_model()
        if case.architecture:
            old, fields = model.gradiend, {"latent_dim": 1, **case.architecture}
            model.gradiend = type(old)(
                old.input_dim, param_map=old.param_map, **fields, **old.kwargs
            )
        if case.kept is not None:
            model.prune_gradiend(topk=case.kept, inplace=True)
        model.save_pretrained(str(output / "checkpoint"), use_safetensors=case.safe)
        texts, means = read_texts(base), None
        save_file(record(model, texts), str(output / "recorded.safetensors"))
        if case.trained and case.source != "diff":
            means = trainer.evaluate_encoder(model, split="test")["mean_by_feature_class"]
        content = {"texts": texts, "mean_by_feature_class": means}
        (output / "recorded.json").write_text(json.dumps(content, indent=2), "utf-8")


if __name__ == "__main__":
    main()
