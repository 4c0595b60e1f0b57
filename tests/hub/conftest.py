"""A Hub on the loopback, people who use it (each a process of its own), and what they publish."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BASE = "acme/tiny-gpt2"


def _load(name):
    """A module of this folder, wherever pytest was started."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loopback_hub = _load("loopback_hub")


class FailedError(Exception):
    """What a person's program raised.

    Args:
        kinds: Names of the exception's class and of those above it.
        message: Its message.
    """

    def __init__(self, kinds: list[str], message: str) -> None:
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds = kinds
        self.message = message

    @property
    def line(self) -> str:
        return self.message.strip().splitlines()[0]


class Person:
    """A process with its own cache and token, whose program's functions are called by name."""

    def __init__(self, program: str, environment: dict[str, str], log: Path, *hidden: str) -> None:
        command = [HERE / "worker.py", HERE / "programs" / f"{program}.py", *hidden]
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment, text=True, encoding="utf-8",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
            )  # fmt: skip

    def __getattr__(self, function: str):
        def call(*args, **kwargs):
            question = {"function": function, "args": args, "kwargs": kwargs}
            self.process.stdin.write(json.dumps(question, default=os.fspath) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line:
                pytest.fail(f"The process ended:\n{self.log.read_text()[-2000:]}")
            answer = json.loads(line)
            if "value" in answer:
                return answer["value"]
            raise FailedError(**answer)

        return call

    def leave(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="package")
def failed():
    return FailedError


@pytest.fixture(scope="package")
def hub():
    server = loopback_hub.LoopbackHub()
    try:
        server.start()
    except OSError as error:
        pytest.skip(f"127.0.0.1 cannot be bound: {error}")
    yield server
    server.stop()


@pytest.fixture(scope="package")
def environment(hub, tmp_path_factory):
    """Function that gives a process's environment, with a cache of its own where none is given."""

    def environment(home=None, **more):
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "TRANSFORMERS_", "HUGGING"))
        }
        return kept | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_test_user",
            "HF_HOME": str(home or tmp_path_factory.mktemp("home")),
            "HF_HUB_DISABLE_XET": "1",  # real, but no protocol that could be served here
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(HERE.parents[1]),
            "PYTHONUTF8": "1",
            **more,
        }

    return environment


@pytest.fixture(scope="package")
def person(environment, tmp_path_factory):
    """Function that starts a person's process."""
    people = []

    def person(program, *hidden, **settings):
        log = tmp_path_factory.mktemp("log") / "stderr"
        people.append(Person(program, environment(**settings), log, *hidden))
        return people[-1]

    yield person
    for one in people:
        one.leave()


@pytest.fixture(scope="package")
def reader_home(tmp_path_factory):
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="package")
def author(person):
    """Trains and pushes."""
    return person("with_package")


@pytest.fixture(scope="package")
def reader(person, reader_home, author):  # noqa: ARG001 - the author's process starts first
    """Loads what the author pushed, with a cache that was empty."""
    return person("with_package", home=reader_home)


@pytest.fixture(scope="package")
def stranger(person, author):  # noqa: ARG001 - the author's process starts first
    """Has transformers alone."""
    return person("without_package", "hf_gradiend")


@dataclass(frozen=True)
class Work:
    """The author's folders, and the numbers of what lies in them.

    Args:
        folder: Folder with `gradiend`, `adapter`, `debiased` and `base`.
        report: Path of report.json.
        encodings: Numbers of the GRADIEND.
        base_logits: Logits of the base model.
        adapter_logits: Logits of the base model with the adapter.
        edited_logits: Logits of the edited base model.
    """

    folder: Path
    report: Path
    encodings: list[float]
    base_logits: list[float]
    adapter_logits: list[float]
    edited_logits: list[float]

    def __getattr__(self, name: str) -> str:
        """The path of a folder."""
        if name in {"gradiend", "adapter", "debiased", "base"}:
            return str(self.folder / name)
        raise AttributeError(name)


@pytest.fixture(scope="package")
def make_work(author, tmp_path_factory, session_planted):
    """Function of a kind of model, its place on the Hub, and the report of another work, if any."""

    def make_work(kind, base, report=None):
        folder = tmp_path_factory.mktemp("work")
        planted = copy.deepcopy(session_planted(kind))
        if planted.model.can_generate():
            planted.model.generation_config.max_new_tokens = 8  # a pipeline's 256 are too many
        planted.model.save_pretrained(folder / "base")
        planted.tokenizer.save_pretrained(folder / "base")
        rows = [{**row, "split": split} for split, part in planted.data.items() for row in part]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        author.push_base(folder / "base", base)
        author.train(base, folder / "data.jsonl", folder, report=report)
        author.save_debiased(folder / "gradiend", base, folder / "debiased")
        return Work(
            folder,
            folder / "gradiend" / "report.json",
            encodings=author.gradiend_numbers(folder / "gradiend"),
            base_logits=author.logits_of_base(folder / "base"),
            adapter_logits=author.logits_with_adapter("GradiendAdapter", folder / "adapter", base),
            edited_logits=author.logits_of_edit(folder / "gradiend", base),
        )

    return make_work


@pytest.fixture(scope="package")
def work(make_work):
    """A base model on the Hub, and a GRADIEND, an adapter and an edited model in folders."""
    return make_work("gpt2", BASE)


@pytest.fixture(scope="package")
def published(author, work):
    """The author's work, pushed from Python: one repository of each kind, with report and card."""
    author.push_gradiend(work.gradiend, "acme/gradiend", report=work.report)
    author.push_adapter(work.adapter, "acme/gradiend-adapter", report=work.report)
    author.push_debiased(work.gradiend, BASE, "acme/gradiend-debiased", report=work.report)
    return work
