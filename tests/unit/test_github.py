"""The files in .github/: they parse, say what pyproject.toml says, and call what exists."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hf_gradiend.cli.main import _parser
from hf_gradiend.version import __version__

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOWS = {
    file.stem: yaml.safe_load(file.read_text("utf-8"))
    for file in sorted(GITHUB.glob("workflows/*.yml"))
}
EACH_WORKFLOW = pytest.mark.parametrize("name", WORKFLOWS)
EXTRAS = set(PYPROJECT["project"]["optional-dependencies"])
TOOLS = {"hf-gradiend", "pip", "uv", "ruff", "pyright", "python", "twine"}


def steps(name: str, key: str) -> Iterator[str]:
    """What the steps of a workflow run or use."""
    for job in WORKFLOWS[name]["jobs"].values():
        yield from (step[key] for step in job["steps"] if key in step)


def commands(script: str) -> Iterator[list[str]]:
    """Words of each command of a script of one line."""
    for command in script.split("&&"):
        yield shlex.split(command)


def problem_of(words: list[str]) -> str | None:
    """What keeps a command of ours from running; None if nothing does."""
    tool, *rest = words
    if tool not in TOOLS:
        return f"{tool} is none of {sorted(TOOLS)}"
    if tool == "hf-gradiend":
        try:
            _parser().parse_args(rest)
        except SystemExit:
            return f"hf-gradiend does not take {rest}"
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(rest)):
        if extra not in EXTRAS:
            return f"there is no extra {extra}"
    if "-c" in rest and tool == "pip" and not (ROOT / rest[rest.index("-c") + 1]).is_file():
        return "there are no such constraints"
    return None


@pytest.mark.parametrize(
    "file", sorted(GITHUB.rglob("*.yml")), ids=lambda file: str(file.relative_to(GITHUB))
)
def test_a_file_of_github_is_a_mapping(file):
    assert isinstance(yaml.safe_load(file.read_text("utf-8")), dict)


def test_the_tests_run_on_the_versions_of_python_that_pyproject_names():
    classifiers = PYPROJECT["project"]["classifiers"]
    named = [text.rpartition(" ")[2] for text in classifiers if re.search(r":: 3\.\d+$", text)]

    tested = WORKFLOWS["ci"]["jobs"]["tests"]["strategy"]["matrix"]["python-version"]

    assert tested == named
    assert PYPROJECT["project"]["requires-python"] == f">={named[0]}"


def test_the_lowest_versions_are_tried_on_the_lowest_python():
    (setup,) = (
        step["with"]["python-version"]
        for step in WORKFLOWS["ci"]["jobs"]["lowest-versions"]["steps"]
        if "setup-python" in step.get("uses", "")
    )

    assert f">={setup}" == PYPROJECT["project"]["requires-python"]


@EACH_WORKFLOW
def test_a_workflow_has_no_rights_that_a_job_does_not_ask_for(name):
    workflow = WORKFLOWS[name]
    rights = {job: content["permissions"] for job, content in workflow["jobs"].items()}

    assert workflow["permissions"] == {}
    assert all(
        right == ({"id-token": "write"} if job == "publish" else {"contents": "read"})
        for job, right in rights.items()
    )


@EACH_WORKFLOW
def test_a_job_has_a_time_limit_and_keeps_no_credentials(name):
    for job in WORKFLOWS[name]["jobs"].values():
        assert job["timeout-minutes"] <= 30
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False


@EACH_WORKFLOW
def test_actions_are_pinned_by_major_version(name):
    for used in steps(name, "uses"):
        assert re.fullmatch(r"actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1", used)


@EACH_WORKFLOW
def test_every_command_of_one_line_exists(name):
    scripts = [script for script in steps(name, "run") if "\n" not in script.strip()]

    found = {script: [problem_of(words) for words in commands(script)] for script in scripts}

    assert scripts
    assert {script for script, problems in found.items() if any(problems)} == set()


@pytest.mark.parametrize(
    "script",
    [
        "hf-gradiend quickstart --quick",
        "hf-gradiend dance",
        'pip install ".[developer]"',
        "pip install -c limits.txt torch",
        "ruf check .",
    ],
)
def test_a_planted_command_that_does_not_exist_is_found(script, capsys):
    assert any(problem_of(words) for words in commands(script))
    capsys.readouterr()  # argparse says so, too


def test_the_first_command_of_the_readme_is_run_in_its_fast_form():
    readme = (ROOT / "README.md").read_text("utf-8")
    first = re.findall(r"```bash\n(.*?)\n```", readme, flags=re.DOTALL)[0]

    assert f"{first} --fast" in list(steps("ci", "run"))


def test_quality_is_what_contributors_are_told_to_check():
    told = re.findall(
        r"```bash\n(ruff.*?)```", (GITHUB / "CONTRIBUTING.md").read_text("utf-8"), flags=re.DOTALL
    )[0].split("\n")

    run = {" ".join(words[:2]) for script in steps("ci", "run") for words in commands(script)}

    assert {"ruff format", "ruff check", "pyright"} <= run
    assert [line.partition(" --")[0] for line in told if line] == [
        "ruff format", "ruff check", "pyright", "pytest",
    ]  # fmt: skip


@pytest.mark.parametrize(("tag", "status"), [(f"v{__version__}", 0), ("v9.9.9", 1)])
def test_a_release_is_refused_unless_the_tag_is_the_version(tag, status, tmp_path):
    (script,) = (script for script in steps("release", "run") if "GITHUB_REF_NAME" in script)
    (tmp_path / "python").symlink_to(sys.executable)

    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=ROOT, env={"GITHUB_REF_NAME": tag, "PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == status, done.stderr
    assert ("says " + __version__ in done.stdout) == (status == 1)


def test_the_ways_in_are_where_github_looks_for_them():
    for name in ("CONTRIBUTING.md", "PULL_REQUEST_TEMPLATE.md", "ISSUE_TEMPLATE/config.yml"):
        assert (GITHUB / name).is_file()


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_an_issue_form_has_what_github_requires(name):
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text("utf-8"))

    assert form["name"]
    assert form["description"]
    ids = [item["id"] for item in form["body"]]
    assert len(ids) == len(set(ids))
    for item in form["body"]:
        assert item["type"] in {"textarea", "input"}
        assert item["attributes"]["label"]
