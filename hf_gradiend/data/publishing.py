"""Pushes a feature data set to the Hub, with a card that says what it holds."""

from collections.abc import Mapping
from importlib import resources
from string import Template

from datasets import DatasetDict
from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData

from hf_gradiend.data.loading import FEATURE_COLUMNS, classes_of, validate_feature_dataset
from hf_gradiend.errors import ConfigError

_SHOWN = 20  # words of a class


def push_feature_dataset(  # noqa: PLR0913 - what a card has to say, and where to push
    dataset: DatasetDict,
    repo_id: str,
    *,
    name: str,
    license: str,
    about: str,
    language: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Pushes a feature data set as parquet, and then its card.

    `load_feature_dataset(repo_id)` reads it back. Two commits: interrupted between them, the data
    are there with the card that `datasets` writes, and a second call completes it.

    Args:
        dataset: Splits as `load_feature_dataset` gives them.
        repo_id: Repository, `"org/name"`; made where it does not exist.
        name: Name for people.
        license: Licence as the Hub spells it, such as `"cc0-1.0"`.
        about: How it was made, from what and by whom; Markdown.
        language: Code of the texts' language, such as `"en"`; `None` leaves it out.
        private: Make it private; `None` for the organisation's default.
        token: Token; `None` for the saved one.

    Returns:
        The commit of the card.

    Raises:
        ConfigError: If name, licence or the account of how it was made is blank.
        DataError: If the data do not have the form.
        HfHubHTTPError: If the Hub refuses.
    """  # noqa: DOC502 - raised by what it calls
    options = {"name": name, "license": license, "about": about, "language": language}
    render_dataset_card(dataset, repo_id, **options)  # refuses before anything is pushed
    dataset.push_to_hub(repo_id, private=private, token=token)
    written = DatasetCard.load(repo_id, repo_type="dataset", token=token).data.to_dict()
    card = DatasetCard(render_dataset_card(dataset, repo_id, **options, metadata=written))
    return card.push_to_hub(repo_id, repo_type="dataset", token=token, commit_message="Write card")


def render_dataset_card(
    dataset: DatasetDict,
    repo_id: str,
    *,
    name: str,
    license: str,
    about: str,
    language: str | None = None,
    metadata: Mapping[str, object] | None = None,
) -> str:
    """The README.md of a feature data set's repository.

    Args:
        dataset: Splits as `load_feature_dataset` gives them.
        repo_id: The repository's id, for the lines that load it.
        name: Name for people.
        license: Licence as the Hub spells it.
        about: How it was made; Markdown.
        language: Code of the texts' language; `None` leaves it out.
        metadata: Front matter that `datasets` wrote, which names the files of each split; kept.

    Returns:
        Markdown with its front matter.

    Raises:
        ConfigError: If name, licence or the account of how it was made is blank.
        DataError: If the data do not have the form.
    """  # noqa: DOC502 - DataError is raised by validate_feature_dataset
    required = {"name": name, "license": license, "about": about}
    blank = [key for key, value in required.items() if not value.strip()]
    if blank:
        raise ConfigError(f"Expected a data set card that says {', '.join(blank)}, but got none.")
    validate_feature_dataset(dataset)
    ours = {
        "language": language,
        "license": license,
        "pretty_name": name,
        "task_categories": ["fill-mask", "text-generation"],
        "tags": ["gradiend", "counterfactual", "interpretability"],
    }
    data = DatasetCardData(**{**(metadata or {}), **ours})  # pyright: ignore[reportArgumentType]
    template = resources.files("hf_gradiend") / "card_templates" / "dataset.md"
    body = Template(template.read_text("utf-8")).substitute(
        **required,
        repo_id=repo_id,
        further_columns=_further_columns(dataset),
        classes=_classes(dataset),
        splits=_splits(dataset),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _further_columns(dataset: DatasetDict) -> str:
    columns = {column for rows in dataset.values() for column in rows.column_names}
    further = sorted(columns.difference(FEATURE_COLUMNS))
    return f"- Further columns: {', '.join(f'`{column}`' for column in further)}.\n" * bool(further)


def _classes(dataset: DatasetDict) -> str:
    """Each class with its words, those of the texts themselves and those of the other class."""
    words: dict[str, set[str]] = {}
    for rows in dataset.values():
        for kind in ("factual", "counterfactual"):
            for label, word in zip(rows[f"{kind}_class"], rows[kind], strict=True):
                words.setdefault(label, set()).add(word)
    return "\n".join(f"- `{label}`: {_listed(sorted(words[label]))}" for label in sorted(words))


def _listed(words: list[str]) -> str:
    rest = len(words) - _SHOWN
    shown = ", ".join(f"“{word}”" for word in words[:_SHOWN])
    return shown + (f" and {rest:,} more" if rest > 0 else "")


def _splits(dataset: DatasetDict) -> str:
    lines, classes = [], classes_of(dataset.values())
    for split, rows in dataset.items():
        labels = rows["factual_class"][:]
        parts = [f"{labels.count(label):,} of `{label}`" for label in sorted(set(labels))]
        # Of three classes and more, each text has several rows.
        noun = "texts" if len(classes) == 2 else "rows"
        lines.append(f"- `{split}`: {len(rows):,} {noun}, {' and '.join(parts)}")
    return "\n".join(lines)
