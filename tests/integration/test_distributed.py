"""Two and three processes against one: the same numbers, whole or sharded, and exact resuming."""

import json
import math
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from hf_gradiend.modeling_gradiend import GradiendModel

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "integration" / "programs"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
COMMON = {"max_train_texts": 40, "max_eval_texts": 8, "seed": 3, "load_best_model_at_end": False}
ADAMW = {"solver": "adamw", "max_steps": 10, "learning_rate": 1e-3, "eval_steps": 5,
         "save_steps": 5, "decoder_initialization": "uniform"}  # fmt: skip
SOLVERS = {
    "adamw": {**ADAMW, "n_seeds": 2},
    "pruned": {**ADAMW, "prune_fraction": 0.3, "prune_texts": 16},
    "warm": {
        **ADAMW,
        "decoder_initialization": "zeros",
        "warm_start": True,
        "source": "diff",
        "prune_texts": 16,
    },
    "closed_form": {"solver": "closed_form", "save_steps": 2},
    "top_k": {"solver": "closed_form", "save_steps": 2, "top_k": 0.3},
}
STOP = {"adamw": 5, "closed_form": 3}

# Processes, and their cases: solver, base model, and how the GRADIEND is kept.
GROUPS = {
    "two": (2, [
        ("adamw", "llama", "sharded"), ("adamw", "llama", "fsdp"), ("closed_form", "bert", "whole"),
        ("closed_form", "llama", "sharded"),
    ]),
    "two_more": (2, [
        ("adamw", "bert", "whole"), ("adamw", "bert", "sharded"), ("adamw", "llama", "whole"),
        ("closed_form", "llama", "fsdp"), ("pruned", "llama", "sharded"),
        ("pruned", "llama", "fsdp"), ("warm", "llama", "sharded"), ("top_k", "llama", "sharded"),
    ]),
    "three": (3, [
        ("adamw", "llama", "fsdp"), ("closed_form", "bert", "whole"),
        ("closed_form", "bert", "sharded"),
    ]),
}  # fmt: skip
RESUMED = [
    ("two", "adamw", "llama", "sharded"), ("two", "closed_form", "bert", "whole"),
    ("two_more", "adamw", "bert", "whole"), ("two_more", "closed_form", "llama", "fsdp"),
    ("three", "adamw", "llama", "fsdp"), ("three", "closed_form", "bert", "sharded"),
]  # fmt: skip
BATCH = {2: 8, 3: 9}  # texts per step over all processes


@pytest.fixture(scope="module")
def place(tmp_path_factory, session_models, session_tokenizers, session_planted):
    """Folder with two tiny base models, a masked and a causal one."""
    folder = tmp_path_factory.mktemp("distributed")
    session_planted("bert").model.save_pretrained(folder / "bert")
    session_planted("bert").tokenizer.save_pretrained(folder / "bert")
    session_models["llama"].save_pretrained(folder / "llama")
    session_tokenizers["causal"].save_pretrained(folder / "llama")
    return folder


def launched(
    place: Path, processes: int, program: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the programs beside this file, alone or under torchrun."""
    environment = {
        **{name: value for name, value in os.environ.items() if "ACCELERATE" not in name},
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    launch = (*TORCHRUN, str(processes)) if processes > 1 else ()
    return subprocess.run(
        [sys.executable, *launch, str(PROGRAMS / program), *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(place, session_planted):
    """Function of a number of processes and cases that runs them; what each process saw."""
    data = {name: part.to_list() for name, part in session_planted("bert").data.items()}

    def run(processes: int, cases: dict[str, dict]) -> list[dict]:
        file, found = place / f"settings-{processes}.json", place / f"found-{processes}-{{rank}}"
        content = {"cases": cases, "data": data, "found": str(found)}
        file.write_text(json.dumps(content), "utf-8")
        done = launched(place, processes, "train_cases.py", str(file))
        assert done.returncode == 0, done.stderr[-6000:]
        files = [Path(str(found).format(rank=rank)) for rank in range(processes)]
        ranks = [json.loads(file.read_text("utf-8")) for file in files]
        assert [rank["processes"] for rank in ranks] == [processes] * processes
        return [rank["cases"] for rank in ranks]

    return run


@pytest.fixture(scope="module")
def case(place):
    """Function of a solver, a base model, how it is kept, and texts per step and process."""

    def case(solver: str, base: str, kind: str, size: int, output: str, **settings) -> dict:
        arguments = {**COMMON, **SOLVERS[solver], "shard": kind == "sharded"}
        arguments |= {"per_device_train_batch_size": size, "output_dir": str(place / output)}
        settings |= {"base_model": str(place / base), "fully_shard": kind == "fsdp"}
        return {"arguments": arguments, **settings}

    return case


@pytest.fixture(scope="module")
def one(run, case):
    """Function of a group of cases: what one process finds with as large batches."""

    @lru_cache
    def one(group: str) -> dict:
        n, specs = GROUPS[group]
        cases = {
            f"{solver}-{base}": case(
                solver, base, "whole", BATCH[n], f"one-{group}-{solver}-{base}"
            )
            for solver, base in sorted({spec[:2] for spec in specs})
        }
        cases["half"] = case("adamw", "llama", "whole", BATCH[n] // 2, f"half-{group}")
        return run(1, cases)[0]

    return one


@pytest.fixture(scope="module")
def several(run, case):
    """Function of a group of cases: what each process finds; some are stopped and resumed, too."""

    @lru_cache
    def several(group: str) -> list[dict]:
        n, specs = GROUPS[group]
        cases = {}

        def add(name: str, spec: tuple[str, ...], output: str, **settings) -> None:
            cases[name] = case(*spec, BATCH[n] // n, f"{group}-{output}", **settings)

        for spec in specs:
            name = "-".join(spec)
            add(name, spec, name)
            if (group, *spec) in RESUMED:
                add(f"stopped-{name}", spec, f"again-{name}", stop=STOP[spec[0]])
                add(f"resumed-{name}", spec, f"again-{name}", resume=True)
        if group == "two":
            spec = ("closed_form", "bert", "whole")
            add("ctrl_c", spec, "ctrl_c", ctrl_c=3)
            add("after_ctrl_c", spec, "ctrl_c", resume=True)
        return run(n, cases)

    return several


def each(cases):
    """Parameters of a test; all groups but the first are slow."""
    marks = {"two": []}
    params = [pytest.param(*c, marks=marks.get(c[0], [pytest.mark.slow])) for c in cases]
    return pytest.mark.parametrize(("group", "solver", "base", "kind"), params)


EACH_CASE = each([(group, *spec) for group, (_, specs) in GROUPS.items() for spec in specs])


def losses(found: dict) -> list[float]:
    return [v for log in found["history"] for name, v in sorted(log.items()) if "loss" in name]


@EACH_CASE
def test_several_processes_have_the_losses_of_one(one, several, group, solver, base, kind):
    alone = losses(one(group)[f"{solver}-{base}"])

    for rank in several(group):
        assert losses(rank[f"{solver}-{base}-{kind}"]) == pytest.approx(alone, rel=1e-6)
    assert len(alone) >= 4
    if (solver, base) == ("adamw", "llama"):  # the control: other batches, other losses
        assert losses(one(group)["half"]) != pytest.approx(alone, rel=1e-3)


@EACH_CASE
def test_several_processes_write_the_gradiend_of_one(
    place, one, several, group, solver, base, kind
):
    assert one(group)
    assert several(group)
    folders = (place / f"one-{group}-{solver}-{base}", place / f"{group}-{solver}-{base}-{kind}")
    expected, found = (GradiendModel.from_pretrained(f).state_dict() for f in folders)

    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # The gradient of a key's bias is 0, a softmax does not see it: what is there is rounding.
        if not name.endswith("key.bias"):
            difference = (found[name].double() - tensor.double()).norm()
            assert difference <= 1e-4 * tensor.double().norm(), name
    configs = [(folder / "config.json").read_text("utf-8") for folder in folders]
    assert configs[0] == configs[1]


@EACH_CASE
def test_each_process_keeps_its_rows_and_loads_the_same_whole(several, group, solver, base, kind):
    ranks = [rank[f"{solver}-{base}-{kind}"] for rank in several(group)]
    kept = [rank["n_kept"] for rank in ranks]
    n_weights = ranks[0]["n_candidates"]

    assert len({rank["digest"] for rank in ranks}) == 1
    # Progress bars and trackers are the main process's.
    assert [rank["shows"] for rank in ranks] == [True, *[False] * (len(ranks) - 1)]
    if kind == "whole":
        assert kept == [n_weights] * len(ranks)
    else:
        assert sum(kept) == n_weights
        assert max(kept) < 1.3 * n_weights / len(ranks)


@each(RESUMED)
def test_several_processes_go_on_to_the_same_bits(several, group, solver, base, kind):
    name = f"{solver}-{base}-{kind}"

    for rank in several(group):
        assert rank[f"stopped-{name}"] == {"stopped": STOP[solver]}  # the control
        resumed = rank[f"resumed-{name}"]
        assert resumed["digest"] == rank[name]["digest"]
        assert resumed["history"] == rank[name]["history"]
        assert resumed["shows"] == rank[name]["shows"]


def test_ctrl_c_at_one_process_stops_all_after_the_same_step(several):
    for rank in several("two"):
        assert rank["ctrl_c"] == {"stopped": 3}
        assert rank["after_ctrl_c"]["digest"] == rank["closed_form-bert-whole"]["digest"]


# ---- the command line ----


@pytest.fixture(scope="module")
def command(place, session_planted):
    """Function of options of `hf-gradiend train` that runs it on two processes."""
    planted, data = session_planted("gpt2"), place / "data"
    planted.model.save_pretrained(place / "gpt2")
    planted.tokenizer.save_pretrained(place / "gpt2")
    data.mkdir()
    for name, part in planted.data.items():
        part.to_json(data / f"{name}.jsonl")

    def command(*options: str) -> subprocess.CompletedProcess[str]:
        base = ("--base_model", str(place / "gpt2"), "--dataset", str(data))
        return launched(place, 2, "command.py", "train", *base, *options)

    return command


@pytest.mark.parametrize("form", ["json", "table"])
def test_one_process_of_the_command_writes_and_prints(command, tmp_path, form):
    folder = tmp_path / "out"
    options = ["--json"] if form == "json" else []

    done = command("--output_dir", str(folder), "--batch_size", "4", *options)

    assert done.returncode == 0, done.stderr[-6000:]
    report = json.loads((folder / "report.json").read_text("utf-8"))
    correlation = report["encoder"]["splits"]["test"]["correlation"]["value"]
    lines = done.stdout.splitlines()
    if form == "json":
        (line,) = lines
        assert json.loads(line)["encoder"]["test"]["correlation"] == correlation > 0.85
    else:
        assert [line.split()[0] for line in lines].count("test") == 1
        assert sum(line.startswith("Wrote") for line in lines) == 1
    # The control: two processes with 4 texts each shared the steps.
    n_fitted = 0.75 * report["n_texts"]["train"]
    assert report["training"]["global_step"] == 2 * math.ceil(n_fitted / 2 / 8)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--contrasts", "pairs"], "one process for several contrasts, but got 2"),
        (["--estimate"], "--estimate on one process, but got 2"),
    ],
    ids=str,
)
def test_what_the_command_does_on_one_process_alone_is_refused(command, tmp_path, option, message):
    done = command("--output_dir", str(tmp_path / "out"), *option)

    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr.split("hf-gradiend train:")[0]
    assert not done.stdout
