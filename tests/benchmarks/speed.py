"""Speed and memory of the parts that the project exists for, each as a ratio in one run.

    python tests/benchmarks/speed.py --base_model DIR --data train.jsonl [--peer_python PYTHON]

measures encodings against one backward pass and a dot product per text, the fused AdamW update
against one pass of 20 n floats through memory, and, with the Python of an environment that has the
official `gradiend` package, our training step against its own (same model, weights, batch and
threads; each in a process of its own). Prints a table and, last, one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from hf_gradiend import GradiendConfig, GradiendModel, load_base_model, select_parameters
from hf_gradiend.base_models import objective_of
from hf_gradiend.data.collation import collate, prepare_texts
from hf_gradiend.data.loading import load_feature_dataset
from hf_gradiend.gradients.backward import gradient_stream
from hf_gradiend.gradients.forward import project_texts
from hf_gradiend.training.update import AdamWSettings, FusedAdamW

SETTINGS = AdamWSettings(1e-5, 1e-2, 0.9, 0.999, 1e-8)


def seconds(function, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def encoding(model, tokenizer, texts, selection):
    """Forward mode at batch 32 against one backward pass and a dot product per token and text.

    The simple way is transformers' own forward pass, `torch.autograd.grad`, one flat vector and a
    dot product, on every sixteenth text by length. Forward mode reads both tokens at once.
    """
    generator = torch.Generator().manual_seed(0)
    direction = {e.name: torch.randn(e.shape, generator=generator) * 1e-4 for e in selection}
    flat = selection.flatten(direction)
    pad = tokenizer.pad_token_id
    many = texts
    few = sorted(many.texts, key=lambda text: text.length)[8::16]
    parameters = list(selection.parameters(model).values())
    found = {}

    def forward_mode():
        found["fast"] = project_texts(model, many, selection, direction, pad_token_id=pad)

    def simple(n_words):
        found["simple"] = torch.tensor([simple_way(text, n_words) for text in few])

    def simple_way(text, n_words):
        readings = text.readings[:n_words]
        logits = model(input_ids=torch.tensor([readings[0].input_ids])).logits
        projections = []
        for reading in readings:
            (position, token), *_ = reading.sites
            loss = -logits[0, position].log_softmax(-1)[token]
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
            projections.append(float(torch.dot(torch.cat([g.flatten() for g in gradients]), flat)))
        return projections[0]

    forward_mode()
    forward_time = seconds(forward_mode, 1) / len(many)
    one_token = seconds(lambda: simple(1), 1) / len(few)
    both_tokens = seconds(lambda: simple(2), 1) / len(few)
    ours = torch.stack([found["fast"][text.index, 0] for text in few])
    gap = (ours - found["simple"]).abs() / found["simple"].abs()
    return {
        "n_texts": len(many),
        "tokens_per_text": sum(text.length for text in many) / len(many),
        "seconds_per_text_both_tokens": forward_time,
        "simple_seconds_per_text_one_token": one_token,
        "simple_seconds_per_text_both_tokens": both_tokens,
        "times_faster_one_token": one_token / forward_time,
        "times_faster_both_tokens": both_tokens / forward_time,
        "median_relative_difference": float(gap.median()),
        "largest_relative_difference": float(gap.max()),
    }


def update(n=100_000_000):
    """One fused AdamW step on n weights against moving 20 n floats (10 n read, 10 n written)."""
    config = GradiendConfig(parameters=[{"name": "w", "shape": [n]}])
    fused = FusedAdamW(GradiendModel(config), SETTINGS)
    source, target = {"w": torch.full((n,), 1e-3)}, {"w": torch.full((n,), 1e-3)}

    def memory_pass():
        for _ in range(10):
            target["w"].copy_(source["w"])

    fused.step(source, target)
    memory_pass()
    step, floor = seconds(lambda: fused.step(source, target), 5), seconds(memory_pass, 5)
    return {"n": n, "seconds": step, "memory_pass_seconds": floor, "ratio": step / floor}


def training_step(args):
    """Seconds and peak memory of training steps; run in a process of its own."""
    model, tokenizer = load_base_model(args.base_model)
    selection = select_parameters(model, args.selection)
    rows = load_feature_dataset(args.data)["train"]
    rows = rows.filter(lambda row: row["factual_class"] == "F").select(range(4 * args.batch_size))
    texts = prepare_texts(rows, tokenizer, objective_of(model)).texts
    batches = [texts[i : i + args.batch_size] for i in range(0, len(texts), args.batch_size)]
    config = GradiendConfig(parameters=selection.to_config())
    fused = FusedAdamW(GradiendModel(config), SETTINGS)
    sides = ("factual", "diff")
    values = {s: {e.name: torch.zeros(e.shape) for e in selection} for s in sides}
    times = []
    with gradient_stream(model, selection) as stream:
        for batch in batches[: args.steps + 1]:
            start = time.perf_counter()
            losses = stream.losses(collate(batch, tokenizer.pad_token_id), sides)
            for side in sides:
                stream.backward(
                    losses[side],
                    lambda name, gradient, held=values[side]: held[name].copy_(gradient),
                    retain_graph=side == "factual",
                )
            fused.step(values["factual"], values["diff"])
            times.append(time.perf_counter() - start)
    return {
        "n_selected": selection.n_selected,
        "seconds_per_step": median(times[1:]),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def in_own_process(command):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def against_gradiend(args):
    common = [
        "--base_model", args.base_model, "--data", args.data, "--batch_size", str(args.batch_size),
        "--steps", str(args.steps), "--selection", args.selection,
    ]  # fmt: skip
    peer_script = str(Path(__file__).with_name("peer_gradiend.py"))
    ours = in_own_process([sys.executable, __file__, "--only_step", *common])
    theirs = in_own_process([args.peer_python, peer_script, *common])
    return {
        "batch_size": args.batch_size,
        "ours": ours,
        "gradiend": theirs,
        "times_faster": theirs["seconds_per_step"] / ours["seconds_per_step"],
        "share_of_peak_memory": ours["peak_rss_bytes"] / theirs["peak_rss_bytes"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--data", required=True, help="train.jsonl in the gender form")
    parser.add_argument("--peer_python", help="Python of an environment with gradiend 0.2.3")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--selection", default="layers")
    parser.add_argument("--only_step", action="store_true", help="our training step alone")
    args = parser.parse_args()
    if args.only_step:
        print(json.dumps(training_step(args)))
        return
    results = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    results["update"] = update()
    model, tokenizer = load_base_model(args.base_model)
    texts = prepare_texts(
        load_feature_dataset(args.data)["train"].select(range(256)), tokenizer, objective_of(model)
    )
    results["encoding"] = encoding(model, tokenizer, texts, select_parameters(model))
    del model
    if args.peer_python:
        results["training_step"] = against_gradiend(args)
    for name, found in results.items():
        if isinstance(found, dict):
            for key, value in found.items():
                print(f"{name:15}{key:38}{value}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
