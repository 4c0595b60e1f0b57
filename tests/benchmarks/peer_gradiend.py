"""Time a training step and the encoder evaluation of the official package `gradiend`.

Run it on Linux with the interpreter of an environment that has `gradiend` 0.2.3. The last line of
stdout is one JSON object. What is timed is the package's own `train()` and `evaluate_encoder()`,
unpatched; its public callbacks split the step. Its settings, chosen for speed:

- `source="factual"`, `target="diff"`; by default float32, one neuron, AdamW: our problem.
- `train_batch_size` texts of one class make one gradient, and one gradient one update.
- No evaluation while training, one seed. A checkpoint that it writes after step 1 is not counted.
- `params` names the block weights for `layers`, so that the embeddings are frozen and get no
  gradient; unset, it selects the `backbone`.
- As many threads as PyTorch takes by default, fixed before `train()` sets `OMP_NUM_THREADS=1`.
- `precompute_gradient_batches` stays off, the default: on a CPU the overlapping thread competes
  for the same cores, could hide no more than the update, and runs on into the evaluation.

It reads a text up to its first slot and pads it to 256 tokens, so the time depends on how many
texts there are and not on which. Its evaluation has no batch size: one text, one gradient.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from gradiend import TextPredictionTrainer, TrainingArguments, __version__
from gradiend.trainer.core.callbacks import TrainingCallback

COUNTERFACTUAL = {"F": ("he", "M"), "M": ("she", "F")}
COLUMNS = ("masked", "label", "label_class", "alternative", "alternative_class", "split")


class StepClock(TrainingCallback):
    """Seconds of both halves of each step, and the peak memory of the steps after the first.

    The package calls `on_step_begin` once the gradients are there, `on_step_end` after the update.
    """

    def __init__(self) -> None:
        self.gradient_seconds: list[float] = []
        self.update_seconds: list[float] = []
        self.peak_rss = 0
        self._ended = threading.Event()

    def on_train_begin(self, config, **kwargs):  # noqa: ARG002 - gradiend's form
        self._last = time.perf_counter()

    def _lap(self) -> float:
        start, self._last = self._last, time.perf_counter()
        return self._last - start

    def on_step_begin(self, step, config, **kwargs):  # noqa: ARG002 - gradiend's form
        self.gradient_seconds.append(self._lap())

    def on_step_end(self, step, loss, model, config, **kwargs):  # noqa: ARG002 - gradiend's form
        self.update_seconds.append(self._lap())
        if step == 1:
            threading.Thread(target=self._sample_memory, daemon=True).start()
        if kwargs["last_iteration"]:
            self._ended.set()

    def _sample_memory(self) -> None:
        while not self._ended.wait(0.02):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak_rss = max(self.peak_rss, pages * os.sysconf("SC_PAGE_SIZE"))


def read_rows(path: Path, per_class: dict[str, int]) -> list[tuple[str, ...]]:
    """Rows of the package's merged form (`COLUMNS`): the first texts of each class, by split.

    Args:
        path: Lines with `masked`, `name`, `pronoun` and `label` ("F" or "M").
        per_class: Number of texts of each class in a split, in the order of taking.
    """
    splits = [split for split, count in per_class.items() for _ in range(count)]
    rows: dict[str, list[tuple[str, ...]]] = {label: [] for label in COUNTERFACTUAL}
    for text in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        label, found = text["label"], rows[text["label"]]
        if len(found) < len(splits):
            masked = text["masked"].replace("[NAME]", text["name"])
            split = splits[len(found)]
            found.append((masked, text["pronoun"], label, *COUNTERFACTUAL[label], split))
    return [row for found in rows.values() for row in found]


def main() -> None:
    """Train, evaluate and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", required=True, help="folder of a causal model")
    parser.add_argument("--data", type=Path, required=True, help="masked, name, pronoun, label")
    parser.add_argument("--batch_size", type=int, default=32, help="texts per training step")
    parser.add_argument("--steps", type=int, default=2, help="counted steps, after one warm-up")
    parser.add_argument("--selection", choices=("layers", "backbone"), default="layers")
    parser.add_argument(
        "--encode_texts", type=int, default=8, help="rounded up to even; 0 for none"
    )
    options = parser.parse_args()

    torch.set_num_threads(torch.get_num_threads())
    batches = options.steps // 2 + 1  # Of each class: the classes take turns, warm-up included.
    per_class = {"train": options.batch_size * batches}
    per_class["validation"] = (options.encode_texts + 1) // 2
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.csv")
        with data.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *read_rows(options.data, per_class)])
        training_args = TrainingArguments(
            source="factual",
            target="diff",
            train_batch_size=options.batch_size,
            max_steps=options.steps + 1,
            do_eval=False,
            max_seeds=1,
            mask_placeholder="[PRONOUN]",
            params=["*.layers.*"] if options.selection == "layers" else None,
        )
        start = time.perf_counter()
        trainer = TextPredictionTrainer(
            options.base_model, data=str(data), target_classes=["F", "M"], args=training_args
        )
        trainer.train(output_dir=str(Path(folder, "model")), callbacks=[clock])
        train_seconds = time.perf_counter() - start
        train_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        model = trainer.get_model()
        per_text = None
        if options.encode_texts:
            start = time.perf_counter()
            report = trainer.evaluate_encoder(model, split="validation", return_df=True)
            per_text = (time.perf_counter() - start) / len(report["encoder_df"])

    gradient, update = clock.gradient_seconds[1:], clock.update_seconds[1:]
    result = {
        "package": "gradiend",
        "version": __version__,
        "n_selected": len(model),
        "batch_size": options.batch_size,
        "seconds_per_step": statistics.median(map(sum, zip(gradient, update, strict=True))),
        "gradient_seconds_per_step": statistics.median(gradient),
        "update_seconds_per_step": statistics.median(update),
        "encode_seconds_per_text": per_text,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "steps_peak_rss_bytes": clock.peak_rss,
        "train_seconds": train_seconds,  # with loading and saving
        "train_peak_rss_bytes": train_peak,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
