"""Kill training runs with SIGKILL and resume them until they end; every run is a fork of this one.

python killed_runs.py settings.json: `data`, a `case`, the number of `processes`, the folder
`place`, `kills`: a number of kills at random moments, or "every file" for one at each file
operation of the run, and `found`, the file for what became of it. A broken file is an error.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from train_cases import run

from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.training.checkpoints import checkpoints_in

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_at(operation: int, folder: Path) -> list[int]:
    """Kill this process at its n-th file operation in a folder; a list that counts them."""
    seen = [0]

    def hook(event: str, arguments: tuple) -> None:
        reads = event == "open" and "r" in str(arguments[1])
        # shutil.rmtree names the files of an open folder without their path.
        inside = str(folder) in str(arguments[0]) or event in {"os.remove", "os.rmdir"}
        if event in FILE_OPERATIONS and inside and not reads:
            seen[0] += 1
            if seen[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def start(case: dict, data: dict, processes: int, folder: Path, operation: int = 0) -> list[int]:
    """Fork the processes of a run that goes on from its last checkpoint; their ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(processes):
        if (child := os.fork()) != 0:
            ids.append(child)
            continue
        if processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            }  # fmt: skip
        seen = die_at(operation, folder)
        resume = bool(checkpoints_in(folder)) or None
        arguments = {**case["arguments"], "output_dir": str(folder)}
        found = run({**case, "arguments": arguments, "resume": resume}, data)
        (folder.parent / f"found-{rank}").write_text(
            json.dumps({**found, "resumed": resume, "operations": seen[0]}), "utf-8"
        )
        if processes > 1:
            PartialState().destroy_process_group()
        os._exit(0)
    return ids


def wait(ids: list[int]) -> bool:
    """Wait for processes; whether all of them came to their end."""
    statuses = [os.waitpid(number, 0)[1] for number in ids]
    return not any(statuses)


def kill(ids: list[int]) -> bool:
    for number in random.sample(ids, len(ids)):
        os.kill(number, signal.SIGKILL)
    return wait(ids)


def check_files(folder: Path) -> None:
    """Every file is whole, and so is every checkpoint, and the GRADIEND where there is one."""
    for file in folder.rglob("*"):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text("utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 - safe_open has no iterator
                    content.get_tensor(name)
    for checkpoint in folder.glob("checkpoint-*"):
        names = {file.name for file in checkpoint.iterdir()}
        assert "trainer_state.json" in names, names
        assert any(name.startswith("solver") for name in names), names
    if (folder / "config.json").exists():
        GradiendModel.from_pretrained(folder)


def result(folder: Path) -> dict:
    found = json.loads((folder.parent / "found-0").read_text("utf-8"))
    weights = GradiendModel.from_pretrained(folder).state_dict()
    return {
        "history": found["history"],
        "digest": found["digest"],
        "weights": {name: tensor.tolist() for name, tensor in weights.items()},
    }


def randomly_killed(settings: dict, expected: dict, seconds: float) -> dict:
    case, data, n, place = (settings[key] for key in ("case", "data", "processes", "place"))
    kills = resumed = runs = 0
    while kills < settings["kills"]:
        folder, runs = Path(place) / f"run-{runs}" / "out", runs + 1
        folder.mkdir(parents=True)
        ended = False
        while not ended:
            ids = start(case, data, n, folder)
            if kills < settings["kills"]:
                time.sleep(random.uniform(0.0, seconds))
                ended = kill(ids)
                kills += not ended
            else:
                assert wait(ids), "a run that nobody killed failed"
                ended = True
            check_files(folder)
        resumed += bool(json.loads((folder.parent / "found-0").read_text("utf-8"))["resumed"])
        assert result(folder) == expected
    return {"kills": kills, "runs": runs, "resumed": resumed}


def killed_at_each_file(settings: dict, expected: dict, operations: int) -> dict:
    case, data, place = (settings[key] for key in ("case", "data", "place"))
    resumed = 0
    for operation in range(1, operations + 1):
        folder = Path(place) / f"run-{operation}" / "out"
        folder.mkdir(parents=True)
        assert not wait(start(case, data, 1, folder, operation)), "nobody was killed"
        check_files(folder)
        assert wait(start(case, data, 1, folder)), "it did not go on"
        check_files(folder)
        resumed += bool(json.loads((folder.parent / "found-0").read_text("utf-8"))["resumed"])
        hidden = [path.name for path in folder.rglob(".*")]
        assert not hidden, hidden
        assert result(folder) == expected
    return {"kills": operations, "resumed": resumed}


def main(settings: dict) -> None:
    random.seed(0)
    torch.set_num_threads(1)
    folder = Path(settings["place"]) / "whole" / "out"
    folder.mkdir(parents=True)
    started = time.perf_counter()
    assert wait(start(settings["case"], settings["data"], settings["processes"], folder))
    seconds = time.perf_counter() - started
    expected = result(folder)
    if settings["kills"] == "every file":
        first = json.loads((folder.parent / "found-0").read_text("utf-8"))
        found = killed_at_each_file(settings, expected, first["operations"])
    else:
        found = randomly_killed(settings, expected, seconds)
    Path(settings["found"]).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
