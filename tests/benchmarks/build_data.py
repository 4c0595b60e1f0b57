"""Speed of searching raw text for a feature's sentences, in megabytes a second and core.

    python tests/benchmarks/build_data.py FILE.txt [FILE.txt …] [--spec gender] [--megabytes 50]

makes a corpus of this size by shuffling the lines of the files again and again, and searches it
with each number of processes. Prints a table and, last, one JSON object. Each run has two numbers:
megabytes a second of the clock, and a second of processor time, which other programs on the
machine hardly change.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from hf_gradiend.cli.common import table
from hf_gradiend.data.corpora import Corpus
from hf_gradiend.data.searching import search_corpus
from hf_gradiend.data.spec_files import load_spec


def make_corpus(files, n_bytes, place):
    """Lines of the files, shuffled and repeated until they have the size."""
    lines = [line for file in files for line in file.read_text("utf-8").split("\n") if line.strip()]
    rng, size = random.Random(0), 0
    with place.open("w", encoding="utf-8") as corpus:
        while size < n_bytes:
            rng.shuffle(lines)
            for line in lines:
                corpus.write(line + "\n")
                size += len(line.encode()) + 1
                if size >= n_bytes:
                    break
    return place


def processor_seconds():
    """Of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(corpus, spec, num_proc):
    started, used = time.perf_counter(), processor_seconds()
    found = search_corpus(Corpus(corpus), spec, num_proc=num_proc, progress=False)
    seconds, cores = time.perf_counter() - started, processor_seconds() - used
    megabytes = found.n_bytes / 1e6
    return {
        "num_proc": num_proc,
        "megabytes": round(megabytes, 1),
        "sentences": found.n_read,
        "kept": len(found.candidates),
        "seconds": round(seconds, 2),
        "processor_seconds": round(cores, 2),
        "megabytes_per_second": round(megabytes / seconds, 2),
        "megabytes_per_second_and_core": round(megabytes / cores, 2),
        "digest": found.digest,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="text in UTF-8")
    parser.add_argument("--spec", default="gender")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    spec = load_spec(args.spec)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(args.files, args.megabytes * 1e6, Path(folder) / "corpus.txt")
        runs = [measure(corpus, spec, num_proc) for num_proc in args.num_proc]
    rows = [["processes", "MB", "sentences", "kept", "seconds", "MB/s", "MB/s and core"]]
    for run in runs:
        rows.append(
            [
                str(run["num_proc"]), f"{run['megabytes']}", f"{run['sentences']:,}",
                f"{run['kept']:,}", f"{run['seconds']}", f"{run['megabytes_per_second']}",
                f"{run['megabytes_per_second_and_core']}",
            ]
        )  # fmt: skip
    print(table(rows))
    print(json.dumps({"spec": spec.id, "words": len(spec.class_of), "runs": runs}))


if __name__ == "__main__":
    main()
