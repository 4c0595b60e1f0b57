"""Memory: what `hf-gradiend train --estimate` says against what is taken, and a 1.7 B base model.

    python tests/benchmarks/memory.py --base_model DIR --data DIR [--work DIR]

trains a closed form and a pruned adamw of a small base model, each after its estimate, in processes
of their own, and compares the largest memory (VmHWM) and the seconds. Then it makes a base model of
the shape of SmolLM2-1.7B with random weights in bfloat16 (3.4 GB in --work) and trains 1 % of its
weights on a few texts. Prints tables and, last, one JSON object; run it on an idle machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_gradiend import GradiendTrainer, GradiendTrainingArguments, load_base_model
from hf_gradiend.cli.common import peak_rss_bytes, table
from hf_gradiend.data.loading import load_feature_dataset

RUNS = {
    "closed form": ["--max_train_texts", "64"],
    "adamw, 1 %": ["--solver", "adamw", "--prune_fraction", "0.01", "--max_train_texts", "64",
                   "--max_steps", "8", "--learning_rate", "1e-3"],
}  # fmt: skip
COMMAND = "import sys; from hf_gradiend.cli.main import main; sys.exit(main(sys.argv[1:]))"
GIB = 2**30


def in_own_process(command):
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def against_estimate(args, options):
    """An estimate, then the same training; seconds of the training and of its report."""
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        common = ["-c", COMMAND, "train", "--base_model", args.base_model, "--dataset", args.data,
                  "--output_dir", f"{folder}/run", *options, "--json"]  # fmt: skip
        estimated = in_own_process([*common, "--estimate"])
        taken = in_own_process(common)
    report = sum(phase["seconds"] for phase in estimated["phases"] if phase["name"] == "report")
    pairs = {
        "peak_bytes": (estimated["peak_bytes"], taken["peak_rss_bytes"]),
        "training_seconds": (estimated["seconds"] - report, taken["seconds"]),
        "report_seconds": (report, taken["report_seconds"]),
    }
    return {
        "phases": estimated["phases"],
        **{
            name: {"estimated": first, "taken": second, "ratio": first / second}
            for name, (first, second) in pairs.items()
        },
    }


def make_large(folder, tokenizer_from):
    """A base model of SmolLM2-1.7B's shape with random weights, and SmolLM2's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, intermediate_size=8192,
        vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_large(args):
    """Pruned training of the large model on a few texts; run in a process of its own."""
    started = time.perf_counter()
    model, tokenizer = load_base_model(args.base_model, dtype=torch.bfloat16)
    data = load_feature_dataset(args.data)
    settings = GradiendTrainingArguments(
        output_dir=f"{args.work}/run", use_cpu=True, solver="adamw", max_steps=args.steps,
        prune_fraction=0.01, prune_texts=args.texts, max_train_texts=args.texts,
        max_eval_texts=8, per_device_train_batch_size=8, per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer = GradiendTrainer(model, tokenizer, settings, data["train"], data["validation"])
    trained = trainer.train()
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "n_weights": sum(p.numel() for p in model.parameters()),
        "n_selected": trained.n_selected,
        "n_texts": args.texts,
        "steps": args.steps,
        "base_model_bytes": base,
        "peak_rss_bytes": peak_rss_bytes(),
        "above_base_bytes": peak_rss_bytes() - base,
        "seconds": time.perf_counter() - started,
    }


def large(args):
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        own = [__file__, "--data", args.data, "--work", folder, "--texts", str(args.texts),
               "--steps", str(args.steps)]  # fmt: skip
        making = [*own, "--only", "make_large", "--base_model", args.base_model]
        in_own_process(making)
        return in_own_process([*own, "--only", "train_large", "--base_model", f"{folder}/base"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", required=True, help="small base model, as SmolLM2-135M")
    parser.add_argument("--data", required=True, help="feature data with train and validation")
    parser.add_argument("--work", default=tempfile.gettempdir(), help="folder with 4 GB of room")
    parser.add_argument("--texts", type=int, default=16, help="training texts of the large model")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--without_large", action="store_true")
    parser.add_argument("--only", choices=["make_large", "train_large"], help="a part, in JSON")
    args = parser.parse_args()
    if args.only == "make_large":
        make_large(Path(args.work) / "base", args.base_model)
        print(json.dumps({}))
        return
    if args.only == "train_large":
        print(json.dumps(train_large(args)))
        return
    results = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    rows = [["run", "what", "estimated", "taken", "ratio"]]
    for name, options in RUNS.items():
        found = results[name] = against_estimate(args, options)
        for what, unit in (("peak_bytes", GIB), ("training_seconds", 1), ("report_seconds", 1)):
            pair = found[what]
            values = [f"{pair[key] / unit:.2f}" for key in ("estimated", "taken")]
            shown = "peak GiB" if unit == GIB else what.replace("_", " ")
            rows.append([name, shown, *values, f"{pair['ratio']:.2f}"])
    print(table(rows))
    if not args.without_large:
        found = results["large"] = large(args)
        above, base = found["above_base_bytes"] / GIB, found["base_model_bytes"] / GIB
        print(f"Large: base model {base:.2f} GiB, peak above it {above:.2f} GiB")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
