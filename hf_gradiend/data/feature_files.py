"""Writes a feature data set as a folder that `load_dataset` and the Hub understand."""

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import cast

from datasets import Dataset

from hf_gradiend.data.building import BuiltFeature
from hf_gradiend.data.publishing import render_dataset_card
from hf_gradiend.files import empty_folder, replaced_folder, write_json


def save_feature_dataset(built: BuiltFeature, path: str | os.PathLike[str]) -> Path:
    """Write a feature data set.

    The folder holds the splits in `data/`, neutral texts in `neutral/` (a second configuration),
    statistics.json, spec.yaml, and README.md, which is the card and names the files of both
    configurations. `load_feature_dataset(path)` and `load_neutral_texts(path)` read it, and
    `hf upload org/name path --repo-type dataset` brings it to the Hub.

    Args:
        built: What `build_feature_dataset` gives.
        path: A new or empty folder. It appears once it is complete.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder holds files, or cannot be written.
    """  # noqa: DOC502 - raised by empty_folder
    folder = empty_folder(path, "the data set")
    parts = {"default": ("data", built.dataset), "neutral": ("neutral", built.neutral)}
    with replaced_folder(folder) as fresh:
        configs = []
        for config, (name, splits) in parts.items():
            written = {
                str(split): _write_rows(fresh / name, str(split), rows)
                for split, rows in splits.items()
            }
            if written:
                configs.append(_config(config, name, written))
        write_json(fresh / "statistics.json", built.statistics)
        (fresh / "spec.yaml").write_text(built.spec.source, "utf-8")
        (fresh / "README.md").write_text(_card(built, {"configs": configs}), "utf-8")
    return folder


def _write_rows(folder: Path, split: str, rows: Dataset) -> str:
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps(row, ensure_ascii=False) + "\n"
        for row in cast("Iterable[Mapping[str, object]]", rows)
    ]
    content = "".join(lines).encode()
    (folder / f"{split}.jsonl").write_bytes(content)
    return blake2b(content, digest_size=16).hexdigest()


def _config(config: str, folder: str, digests: Mapping[str, str]) -> dict[str, object]:
    files = [{"split": split, "path": f"{folder}/{split}.jsonl"} for split in digests]
    # datasets 5.2 knows a local folder with a card by the folder's name and this entry alone:
    # without a digest it would take the rows of an older data set of that name from its cache.
    digest = blake2b("".join(digests.values()).encode(), digest_size=16).hexdigest()
    return {"config_name": config, "description": f"BLAKE2b {digest}", "data_files": files}


def _card(built: BuiltFeature, metadata: Mapping[str, object]) -> str:
    spec = built.spec
    return render_dataset_card(
        built.dataset,
        f"your-org/{spec.id}",
        name=spec.name,
        license=spec.license,
        about=f"{spec.about}\n\n{_account(built)}",
        language=spec.language,
        metadata=metadata,
    )


def _account(built: BuiltFeature) -> str:
    """How it was made, for the card."""
    statistics: dict = built.statistics
    source, texts, spec = statistics["source"], statistics["texts"], built.spec
    made_from = (
        f"the {source['templates']:,} templates of spec.yaml"
        if source["kind"] == "templates"
        else f"the sentences of the corpus “{source['name']}” by the rules of spec.yaml"
    )
    held_out = " and ".join(f"a {kind}" for kind in statistics["hold_out"] or ["text"])
    lines = [
        f"Built by hf_gradiend {statistics['version']} from {made_from}: of {texts['read']:,} "
        f"texts, {texts['kept']:,} are kept; statistics.json says why the others are not. No two "
        f"splits share {held_out}.",
    ]
    if len(spec.classes) > 2:
        first, second, *_ = spec.classes
        lines.append(
            f"Each text has one row for each of the {len(spec.classes) - 1} other classes. "
            f'`load_feature_dataset(…, classes=("{first}", "{second}"))` takes the rows of two.'
        )
    if built.neutral:
        n_neutral = sum(len(rows) for rows in built.neutral.values())
        lines.append(
            f"The configuration `neutral` has {n_neutral:,} texts without a word of the feature; "
            f"`load_neutral_texts` reads them."
        )
    return "\n\n".join(lines)
