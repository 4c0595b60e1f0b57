"""Throughput of the bias benchmarks against the model's plain forward passes on the same tokens.

    python tests/benchmarks/bias.py --base_model DIR --data_dir DIR [--limit 200] [--output FILE]

For each benchmark: the whole of it (tokenising, forward passes, log-probabilities, scores), the
plain forward passes of the same inputs in the same batches with all logits, and the simple way,
one input at a time. SEAT is left out: it reads hidden states, a few seconds in all.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hf_gradiend import load_base_model
from hf_gradiend.base_models import evaluation_mode, pad_token_id_of
from hf_gradiend.cli.common import peak_rss_bytes, table
from hf_gradiend.evaluation.bias.suite import BENCHMARKS, folder_of, limited
from hf_gradiend.evaluation.likelihoods import Likelihoods

N_SIMPLE = 40  # inputs of the simple way; its time is scaled up by tokens
Input = tuple[int, ...]


class Recorded(Likelihoods):
    """Likelihoods that remember their batches."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen: list[Sequence[Input]] = []

    def _score(self, batch, sites):
        self.seen.append(batch)
        return super()._score(batch, sites)


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def forward(model, tokenizer, batches: Sequence[Sequence[Input]]) -> None:
    """Plain forward passes with all logits, which are dropped."""
    pad = pad_token_id_of(tokenizer)
    with torch.no_grad(), evaluation_mode(model):
        for batch in batches:
            length = max(map(len, batch))
            ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in batch])
            mask = torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in batch])
            _ = model(input_ids=ids, attention_mask=mask).logits


def measured(name: str, model, tokenizer, args) -> dict[str, object]:
    benchmark = BENCHMARKS[name]()
    items = limited(benchmark, benchmark.load(folder_of(benchmark, args.data_dir)), args.limit)
    likelihoods = Recorded(model, tokenizer, progress=False)
    ours = timed(lambda: benchmark.values(likelihoods, items))
    batches = likelihoods.seen
    inputs = [row for batch in batches for row in batch]
    n_tokens = sum(map(len, inputs))
    plain = timed(lambda: forward(model, tokenizer, batches))
    some = inputs[:: max(1, len(inputs) // N_SIMPLE)]
    simple = timed(lambda: forward(model, tokenizer, [[row] for row in some]))
    simple *= n_tokens / sum(map(len, some))
    return {
        "benchmark": name,
        "items": len(items),
        "inputs": len(inputs),
        "tokens": n_tokens,
        "seconds": ours,
        "plain_seconds": plain,
        "simple_seconds": simple,
        "share_of_plain_throughput": plain / ours,
        "times_faster_than_simple": simple / ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--output")
    args = parser.parse_args()
    model, tokenizer = load_base_model(args.base_model)
    forward(model, tokenizer, [[tuple(range(5, 69))] * 4])  # the first pass is slower
    rows = [measured(name, model, tokenizer, args) for name in BENCHMARKS if name != "seat"]
    result = {"threads": torch.get_num_threads(), "rows": rows, "peak_rss": peak_rss_bytes()}
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    shown = [["benchmark", "inputs", "tokens", "s", "plain s", "of plain", "simple s", "times"]]
    shown += [
        [
            row["benchmark"], f"{row['inputs']:,}", f"{row['tokens']:,}", f"{row['seconds']:.1f}",
            f"{row['plain_seconds']:.1f}", f"{row['share_of_plain_throughput']:.0%}",
            f"{row['simple_seconds']:.1f}", f"{row['times_faster_than_simple']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    print(table(shown))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
