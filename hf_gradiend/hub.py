"""Pushing to the Hub: each push is one commit, with a card that is made from report.json."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx's or requests', as it has
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.cards import Kind, render_card
from hf_gradiend.errors import ConfigError, OutputError, first_line_of
from hf_gradiend.files import read_object
from hf_gradiend.modeling_gradiend import GradiendModel

REPORT = "report.json"


@dataclass(frozen=True)
class PushOptions:
    """Where and how to push.

    Args:
        repo_id: Repository, `"org/name"`; made where it does not exist. `"name"` alone is the
            token's owner's.
        private: Make it private; `None` for the organisation's default.
        revision: Branch to push to; made where it does not exist.
        create_pr: Open a pull request instead of pushing.
        commit_message: Message; `None` for one that says what is pushed.
        token: Token; `None` for the saved one.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    token: str | bool | None = None


def push_gradiend(
    gradiend: GradiendModel,
    options: PushOptions,
    *,
    report: Mapping[str, object] | str | os.PathLike[str] | None = None,
    include_code: bool = False,
    max_shard_size: int | str = "5GB",
) -> CommitInfo:
    """Push a GRADIEND, its card and its report; see `GradiendModel.push_to_hub`.

    Raises:
        ConfigError: If the report is not one, or the repository's name is not allowed.
        OutputError: If the Hub refuses.
    """  # noqa: DOC502 - raised by push_folder
    with tempfile.TemporaryDirectory() as folder:
        gradiend.save_pretrained(folder, include_code=include_code, max_shard_size=max_shard_size)
        return push_folder(folder, "gradiend", options, report=report)


def push_adapter(
    adapter: GradiendAdapter,
    options: PushOptions,
    *,
    report: Mapping[str, object] | str | os.PathLike[str] | None = None,
) -> CommitInfo:
    """Push an adapter, its card and its report; see `GradiendAdapter.push_to_hub`.

    Raises:
        ConfigError: If the report is not one, or the repository's name is not allowed.
        OutputError: If the Hub refuses.
    """  # noqa: DOC502 - raised by push_folder
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        return push_folder(folder, "adapter", options, report=report)


def push_debiased_model(  # noqa: PLR0913 - what is pushed, and its edit
    gradiend: GradiendModel,
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    repo_id: str,
    *,
    feature_factor: float | None = None,
    step_size: float | None = None,
    report: Mapping[str, object] | str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    **options: object,
) -> CommitInfo:
    """Push the base model with the edit in its weights, its tokenizer, a card and the report.

    Args:
        gradiend: The GRADIEND.
        base_model: Its base model; left as it was.
        processing_class: The base model's tokenizer.
        repo_id: Repository, `"org/name"`; made where it does not exist.
        feature_factor: h; `None` for the chosen edit.
        step_size: α; `None` for the chosen edit.
        report: Content or path of report.json; `None` pushes no card.
        max_shard_size: Largest size of one file.
        **options: `private`, `revision`, `create_pr`, `commit_message` and `token`, as in
            `PreTrainedModel.push_to_hub`.

    Returns:
        The commit, or what is said in its place where nothing changed.

    Raises:
        CompatibilityError: If the GRADIEND was made for another base model.
        ConfigError: If no edit is given and none was chosen, or the report is not one.
        OutputError: If the Hub refuses.
    """  # noqa: DOC502 - raised by what it calls
    target = PushOptions(repo_id, **options)  # pyright: ignore[reportArgumentType]
    with tempfile.TemporaryDirectory() as folder:
        with gradiend.edited(base_model, feature_factor, step_size):
            base_model.save_pretrained(folder, max_shard_size=max_shard_size)
        processing_class.save_pretrained(folder)
        return push_folder(folder, "model", target, report=report)


def push_folder(
    folder: str | os.PathLike[str],
    kind: Kind,
    options: PushOptions,
    *,
    report: Mapping[str, object] | str | os.PathLike[str] | None = None,
) -> CommitInfo:
    """Push a folder in one commit, with a card made from the report.

    Interrupted, it leaves the repository as it was. Weights of an earlier push that this one does
    not have are deleted in the same commit; other files stay.

    Args:
        folder: What `save_pretrained` wrote; report.json and pictures in it are pushed as well.
        kind: `"gradiend"`, `"adapter"` or `"model"`.
        options: Where and how to push.
        report: Content or path of report.json; `None` takes the folder's own, if it has one, and
            otherwise leaves the repository's card as it is.

    Returns:
        The commit, or what is said in its place where nothing changed.

    Raises:
        ConfigError: If the folder holds nothing of that kind, the repository holds another one, the
            report is not one, or the repository's name is not allowed.
        OutputError: If the Hub refuses.
    """  # noqa: DOC502 - raised by what it calls
    place = Path(folder)
    _check_kind(place, kind)
    files = {f.relative_to(place).as_posix(): f for f in _files(place)}
    with _hub_errors(options.repo_id):
        options = replace(options, repo_id=_full_name(options))
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file)
        for name, file in sorted(files.items())
        if name not in {"README.md", REPORT}
    ]
    content = _report_of(place, report)
    if content is not None:
        try:
            card = render_card(kind, content, options.repo_id)
        except KeyError as error:
            raise ConfigError(
                f"Expected the whole report.json of a training, but this one lacks {error}. Write "
                f"it again with `hf-gradiend train` or `quickstart`."
            ) from error
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        additions += [
            CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode()),
            CommitOperationAdd(path_in_repo=REPORT, path_or_fileobj=text.encode()),
        ]
    with _hub_errors(options.repo_id):
        return _commit(additions, kind, options)


def _full_name(options: PushOptions) -> str:
    """The repository's id with its owner, as the card has to name it."""
    if "/" in options.repo_id:
        return options.repo_id
    return f"{HfApi(token=options.token).whoami()['name']}/{options.repo_id}"


def _commit(additions: list[CommitOperationAdd], kind: Kind, options: PushOptions) -> CommitInfo:
    """Commit the additions, and delete what they make stale.

    Raises:
        ConfigError: If the repository holds another kind.
    """
    api = HfApi(token=options.token)
    api.create_repo(options.repo_id, private=options.private, exist_ok=True)
    if options.revision is not None and not options.create_pr:
        api.create_branch(options.repo_id, branch=options.revision, exist_ok=True)
    present = api.list_repo_files(options.repo_id, revision=options.revision)
    # Both configurations in one place: transformers would load the adapter's base model.
    alien = "config.json" if kind == "adapter" else "adapter_config.json"
    if alien in present:
        raise ConfigError(
            f"Expected a repository for a push of kind {kind!r}, but {options.repo_id!r} holds "
            f"something else ({alien}). Choose another repository."
        )
    names = {operation.path_in_repo for operation in additions}
    stale = [
        CommitOperationDelete(path_in_repo=name)
        for name in present
        if name not in names and _is_stale(name)
    ]
    return api.create_commit(
        options.repo_id,
        operations=[*additions, *stale],
        commit_message=options.commit_message or f"Upload {kind} with hf_gradiend",
        revision=options.revision,
        create_pr=options.create_pr,
    )


def _is_stale(name: str) -> bool:
    stem = name.partition("-")[0].partition(".")[0]
    weights = stem in {"model", "adapter_model"} and ".safetensors" in name
    return weights or name in {"configuration_gradiend.py", "modeling_gradiend.py"}


def _files(place: Path) -> Iterator[Path]:
    """Find the folder's files, without hidden ones and checkpoints of a training.

    Yields:
        Their paths, in order.
    """
    for file in sorted(place.rglob("*")):
        parts = file.relative_to(place).parts
        hidden = any(part.startswith((".", "checkpoint-")) for part in parts)
        if file.is_file() and not hidden:
            yield file


def _check_kind(place: Path, kind: Kind) -> None:
    """Refuse a folder that holds something else than it is pushed as.

    Raises:
        ConfigError: As `push_folder` says.
    """
    file = place / ("adapter_config.json" if kind == "adapter" else "config.json")
    what = {
        "gradiend": "a GRADIEND",
        "adapter": "a GRADIEND adapter",
        "model": "a language model",
    }[kind]
    if not file.is_file():
        raise ConfigError(f"Expected a folder with {what}, but {str(place)!r} has no {file.name}.")
    content = read_object(file, f"a folder with {what}")
    found = content.get("peft_type" if kind == "adapter" else "model_type")
    expected = {"gradiend": "gradiend", "adapter": "GRADIEND", "model": None}[kind]
    if (expected is not None and found != expected) or (kind == "model" and found == "gradiend"):
        raise ConfigError(
            f"Expected a folder with {what}, but {str(place)!r} holds something of type {found!r}. "
            f"Choose another --kind."
        )


def _report_of(
    place: Path, report: Mapping[str, object] | str | os.PathLike[str] | None
) -> Mapping[str, object] | None:
    if isinstance(report, Mapping):
        return report
    file = place / REPORT if report is None else Path(report)
    if report is None and not file.is_file():
        return None
    return read_object(file, "the report.json of a training")


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """The Hub's refusals as one line that says what to do.

    Raises:
        ConfigError: If the repository's name is not allowed.
        OutputError: If the Hub refuses.
    """
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(
            f"Expected a repository id such as 'org/name', but got {repo_id!r}: "
            f"{first_line_of(error)}"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:  # the last from uploads of large files
        raise OutputError(
            f"Expected to push to {repo_id!r}, but the Hub refused or could not be reached: "
            f"{first_line_of(error)} Check the token (`hf auth login`) and your rights there."
        ) from error
