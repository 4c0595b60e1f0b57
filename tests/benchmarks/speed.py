"""Speed and memory of what the project exists for, against the simple way, `gradiend` and a floor.

    python tests/benchmarks/speed.py --base_model DIR --data train.jsonl [--peer_python PYTHON]

Every piece of `pieces.py` runs in a process of its own, so that its peak memory is its own. The
simple way is what one would write with transformers and PyTorch alone; the floor counts forward
passes and bytes that nobody can leave out; `gradiend` 0.2.3 runs by the Python of an environment
that has it (same model, weights, batch and threads). `--grow` measures how training steps and
encodings grow with the model (random weights of 135 M, 360 M and 1.7 B), the batch, the number of
texts and the number of processes. Prints tables and, last, one JSON object.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pieces import ARCHITECTURES, PIECES, Setting

GIB = 2.0**30
HERE = Path(__file__)


def in_own_process(command, **environment):
    """The JSON object in the last line that a command prints."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = done.stdout.strip().splitlines()[-1]
    print(found, file=sys.stderr, flush=True)  # for whoever has to interrupt the rest
    return json.loads(found)


def piece(name, setting, processes=1):
    print(f"… {name} {setting.architecture or ''}", file=sys.stderr, flush=True)
    arguments = [str(HERE), "--piece", name, "--setting", json.dumps(asdict(setting))]
    if processes == 1:
        return in_own_process([sys.executable, *arguments])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    threads = str(max(1, torch.get_num_threads() // processes))
    return in_own_process(
        [sys.executable, *launcher, *arguments], OMP_NUM_THREADS=threads, ACCELERATE_USE_CPU="true"
    )


def peer(args, setting, encode_texts=16):
    """Training and encoder evaluation of the official package."""
    script = str(HERE.with_name("peer_gradiend.py"))
    return in_own_process(
        [
            args.peer_python, script, "--base_model", setting.base_model, "--data", setting.data,
            "--batch_size", str(setting.batch_size), "--steps", str(setting.steps),
            "--selection", setting.selection, "--encode_texts", str(encode_texts),
        ]
    )  # fmt: skip


def pieces(args, setting):
    found = {name: piece(name, setting) for name in PIECES if not name.startswith("simple_")}
    found["training_step"] |= piece("simple_training_step", setting)
    if args.peer_python:
        theirs = peer(args, setting)
        found["training_step"]["gradiend_seconds"] = theirs["seconds_per_step"]
        found["encodings"]["gradiend_seconds"] = theirs["encode_seconds_per_text"]
        # The same again on the paper's choice of weights, as a whole: model, steps and files.
        whole = replace(setting, selection="backbone", steps=args.whole_steps)
        ours, theirs = piece("training_step", whole), peer(args, whole, encode_texts=0)
        found["whole_training"] = {
            "n_selected": ours["n_selected"],
            "steps": whole.steps + 1,
            "step_seconds": ours["seconds"],
            "gradiend_step_seconds": theirs["seconds_per_step"],
            "seconds": ours["whole_seconds"],
            "gradiend_seconds": theirs["train_seconds"],
            "peak_rss_bytes": ours["peak_rss_bytes"],
            "gradiend_peak_rss_bytes": theirs["train_peak_rss_bytes"],
            "share_of_gradiends_memory": ours["peak_rss_bytes"] / theirs["train_peak_rss_bytes"],
        }
    for row in found.values():
        for other in ("simple", "gradiend", "floor"):
            if f"{other}_seconds" in row:
                row[f"times_{other}"] = row["seconds"] / row[f"{other}_seconds"]
    return found


def growth(setting):
    """One row for each size of model, batch, number of texts and number of processes."""
    pruned = replace(setting, prune_fraction=0.01, steps=2, n_texts=32)
    rows = {}
    for name in ARCHITECTURES:
        dtype = "bfloat16" if name == "1.7B" else "float32"
        at = replace(pruned, architecture=name, dtype=dtype)
        rows[f"step, 1 % of {name} in {dtype}"] = piece("training_step", at)
        rows[f"encodings, {name} in {dtype}"] = piece("encodings", replace(at, prune_fraction=None))
    for batch_size in (4, 16, 32):
        at = replace(setting, batch_size=batch_size, steps=2)
        rows[f"step, batch {batch_size}"] = piece("training_step", at)
    for n_texts in (32, 128):
        rows[f"closed form, {n_texts} texts"] = piece(
            "closed_form", replace(setting, n_texts=n_texts)
        )
    each = replace(setting, batch_size=setting.batch_size // 2)
    rows["step, two processes of half the batch"] = piece("training_step", each, processes=2)
    return rows


def table(rows):
    """Times, memory and ratios as aligned lines."""
    heads = ("seconds", "peak GiB", "of simple", "of gradiend", "of floor")
    print(f"{'':44}" + "".join(f"{head:>13}" for head in heads))
    for name, row in rows.items():
        cells = [f"{row['seconds']:.4g}", f"{row['peak_rss_bytes'] / GIB:.2f}"]
        for other in ("simple", "gradiend", "floor"):
            floor = row.get(f"{other}_seconds")
            cells.append("" if floor is None else f"{row['seconds'] / floor:.3g}")
        print(f"{name:44}" + "".join(f"{cell:>13}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", help="folder of a causal model")
    parser.add_argument("--data", help="train.jsonl in the gender form")
    parser.add_argument("--peer_python", help="Python of an environment with gradiend 0.2.3")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--whole_steps", type=int, default=16, help="of the whole training")
    parser.add_argument("--only", nargs="+", choices=sorted(PIECES), help="these pieces alone")
    parser.add_argument("--grow", action="store_true", help="measure the growth as well")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.piece:
        found = PIECES[args.piece](Setting(**json.loads(args.setting)))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    setting = Setting(args.base_model, args.data, batch_size=args.batch_size, steps=args.steps)
    results = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if args.only:
        results["pieces"] = {name: piece(name, setting) for name in args.only}
    else:
        results["pieces"] = pieces(args, setting)
    table({name: row for name, row in results["pieces"].items() if "seconds" in row})
    if args.grow:
        results["growth"] = growth(setting)
        table(results["growth"])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
