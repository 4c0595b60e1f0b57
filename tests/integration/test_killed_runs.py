"""Training runs that are killed with SIGKILL, at random moments and at each file operation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "integration" / "programs" / "killed_runs.py"
COMMON = {"per_device_train_batch_size": 8, "max_eval_texts": 8}
ADAMW = {"solver": "adamw", "max_steps": 12, "learning_rate": 1e-3, "eval_steps": 2,
         "save_steps": 2, "save_total_limit": 1}  # fmt: skip
CLOSED_FORM = {"solver": "closed_form", "eval_steps": 1, "save_steps": 1}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks")


@pytest.fixture
def killed(tmp_path, session_planted):
    """Function of arguments, processes and kills; what became of the runs."""
    planted = session_planted("bert")
    planted.model.save_pretrained(tmp_path / "base")
    planted.tokenizer.save_pretrained(tmp_path / "base")
    data = {name: part.to_list() for name, part in planted.data.items()}

    def killed(kills, *, processes=1, **arguments) -> dict:
        case = {"base_model": str(tmp_path / "base"), "arguments": {**COMMON, **arguments}}
        content = {"data": data, "case": case, "processes": processes, "kills": kills}
        file, found = tmp_path / "settings.json", tmp_path / "found.json"
        content |= {"place": str(tmp_path / "runs"), "found": str(found)}
        file.write_text(json.dumps(content), "utf-8")
        environment = {
            **{name: value for name, value in os.environ.items() if "ACCELERATE" not in name},
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"), "ACCELERATE_USE_CPU": "true",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(file)],
            env=environment, capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(found.read_text("utf-8"))

    return killed


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        pytest.param(1, ADAMW, id="adamw"),
        pytest.param(1, CLOSED_FORM, id="closed_form", marks=pytest.mark.slow),
        pytest.param(2, {**ADAMW, "shard": True}, id="two_sharded_adamw", marks=pytest.mark.slow),
        pytest.param(2, CLOSED_FORM, id="two_closed_form", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_ends_as_the_uninterrupted_one(killed, processes, arguments):
    found = killed(10, processes=processes, **arguments)

    assert found["kills"] == 10
    assert found["resumed"] > 0  # the control: some kills came after a checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [{**ADAMW, "max_steps": 4}, CLOSED_FORM], ids=["adamw", "closed_form"]
)
def test_a_run_killed_at_any_file_operation_ends_as_the_uninterrupted_one(killed, arguments):
    found = killed("every file", max_train_texts=32, **arguments)

    assert found["kills"] > 20
    assert found["resumed"] > 5  # the control
