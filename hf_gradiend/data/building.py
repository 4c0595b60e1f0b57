"""Builds a feature data set from a specification: from its templates, or from a corpus."""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, DatasetDict

from hf_gradiend.data.corpora import Corpus
from hf_gradiend.data.dealing import chosen, deal
from hf_gradiend.data.filling import SlottedText, filled_templates
from hf_gradiend.data.matching import Sieve
from hf_gradiend.data.searching import NOT_DRAWN, least_ranked, search_corpus
from hf_gradiend.data.spec_files import load_spec
from hf_gradiend.data.specification import NAME, CorpusRules, FeatureSpec
from hf_gradiend.data.splitting import Split, split_texts
from hf_gradiend.data.tagging import tag_check
from hf_gradiend.data.templates import build_neutral_texts
from hf_gradiend.errors import ConfigError, DataError
from hf_gradiend.version import __version__

DUPLICATE = "a duplicate"
OTHER_TAG = "another part of speech"


@dataclass(frozen=True)
class BuiltFeature:
    """A feature data set with all that is known about it.

    Args:
        spec: What it was made from.
        dataset: Its splits, as `load_feature_dataset` gives them, with the further columns `name`
            (where the texts have names), `template` (number of the template) or `document`, and
            `split`.
        neutral: Neutral texts in the same splits, with the column `text`; no split where there are
            none.
        statistics: JSON values: what was read, kept and dropped, and what each split holds.
    """

    spec: FeatureSpec
    dataset: DatasetDict
    neutral: DatasetDict
    statistics: dict[str, object]


@dataclass(frozen=True)
class _Material:
    """Texts before they are split.

    Args:
        source: What they are from, for the statistics.
        texts: The texts that are kept so far.
        dropped: Number of the others by the reason.
        neutral: Neutral texts.
        neutral_dropped: Number of those that are not neutral by the reason.
    """

    source: dict[str, object]
    texts: Sequence[SlottedText]
    dropped: Counter[str]
    neutral: Sequence[str]
    neutral_dropped: Counter[str]


def build_feature_dataset(
    spec: str | os.PathLike[str] | FeatureSpec,
    *,
    corpus: str | os.PathLike[str] | Corpus | None = None,
    num_proc: int = 1,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> BuiltFeature:
    """Build a feature data set, neutral texts and statistics.

    Without a corpus the texts are the specification's templates; with one, they are sentences of
    the corpus. The same specification and corpus give the same result on every machine, with any
    number of processes.

    Args:
        spec: A YAML file, the name of one of the package's specifications, or a specification.
        corpus: A txt, jsonl or parquet file, a folder of these, or the id of a data set on the
            Hub; `Corpus` has the options. `None` builds from the templates.
        num_proc: Number of processes that search the corpus.
        work_dir: Folder that keeps what was found in each piece of the corpus, so that a second
            call after an interruption goes on; `None` keeps nothing.
        progress: Show progress bars.

    Returns:
        The data set. A text has one row for each class that its word is not of.

    Raises:
        ConfigError: If the specification is not as it should be, or asks for what is not there.
        DataError: If the corpus cannot be read, or gives too few texts.
    """
    spec = spec if isinstance(spec, FeatureSpec) else load_spec(spec)
    if num_proc < 1:
        raise ConfigError(f"Expected at least one process, but got {num_proc}.")
    if corpus is None:
        material = _from_templates(spec)
    else:
        corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
        folder = None if work_dir is None else Path(work_dir)
        material = _from_corpus(corpus, spec, num_proc=num_proc, work_dir=folder, progress=progress)
    texts = list({text.filled: text for text in reversed(material.texts)}.values())[::-1]
    if not texts:
        reasons = [f"{number:,} for {reason}" for reason, number in material.dropped.most_common(3)]
        raise DataError(
            f"Expected texts that the rules keep, but all {material.dropped.total():,} were "
            f"dropped: {', '.join(reasons) or 'no template can be filled'}."
        )
    dealt = split_texts(texts, spec)
    dropped = (
        dealt.dropped + material.dropped + Counter({DUPLICATE: len(material.texts) - len(texts)})
    )
    dataset = DatasetDict(
        {name: Dataset.from_list(_rows(split, name, spec)) for name, split in dealt.splits.items()}
    )
    neutral = _neutral_splits(material.neutral, spec)
    statistics = {
        "specification": spec.id,
        "version": __version__,
        "seed": spec.seed,
        "source": material.source,
        "texts": _sheet(sum(len(split.texts) for split in dealt.splits.values()), dropped),
        "hold_out": list(dealt.hold_out),
        "splits": {
            name: _counts(split, len(dataset[name]), spec) for name, split in dealt.splits.items()
        },
        "neutral": {
            **_sheet(len(material.neutral), material.neutral_dropped),
            "splits": {name: len(rows) for name, rows in neutral.items()},
        },
    }
    return BuiltFeature(spec, dataset, neutral, statistics)


def _from_templates(spec: FeatureSpec) -> _Material:
    if not spec.templates:
        raise ConfigError(
            f"Expected a corpus, since the specification {spec.id!r} has no templates. Pass one "
            f"(--corpus), or write templates."
        )
    own = build_neutral_texts() if spec.language == "en" else {}
    candidates = [*spec.neutral_texts, *(text for rows in own.values() for text in rows["text"])]
    neutral, dropped = _neutral_of(candidates, spec)
    source = {"kind": "templates", "templates": len(spec.templates)}
    return _Material(source, filled_templates(spec), Counter(), neutral, dropped)


def _neutral_of(texts: Sequence[str], spec: FeatureSpec) -> tuple[list[str], Counter[str]]:
    """Texts without a word or a name of the specification, and the number of the others."""
    names = {**spec.corpus.names}
    if NAME in spec.fillers:
        names.update(spec.fillers[NAME].values)
    rules = CorpusRules(
        must_not_have=spec.corpus.must_not_have, names=names, min_words=0, max_words=sys.maxsize
    )
    sieve = Sieve(replace(spec, corpus=rules))
    dropped: Counter[str] = Counter()
    neutral: list[str] = []
    for text in dict.fromkeys(texts):
        problem = sieve.neutral_problem(text, sieve.finder.find(text))
        if problem is None:
            neutral.append(text)
        else:
            dropped[problem] += 1
    kept = least_ranked(neutral, spec.max_neutral_texts, spec.seed)
    dropped[NOT_DRAWN] = len(texts) - len(kept) - dropped.total()
    return kept, +dropped


def _from_corpus(
    corpus: Corpus, spec: FeatureSpec, *, num_proc: int, work_dir: Path | None, progress: bool
) -> _Material:
    rule = spec.corpus.part_of_speech
    has_tag = None if rule is None else tag_check(rule)  # before the search, which may take hours
    found = search_corpus(corpus, spec, num_proc=num_proc, work_dir=work_dir, progress=progress)
    kept, dropped = list(found.candidates), Counter(found.dropped)
    if has_tag is not None:
        kept = [each for each, right in zip(kept, has_tag(kept), strict=True) if right]
        dropped[OTHER_TAG] = len(found.candidates) - len(kept)
    fit = tuple(spec.class_of)
    texts = [SlottedText(c.text, c.word, fit, c.name, None, c.document) for c in kept]
    source = {
        "kind": "corpus", "name": corpus.name, "bytes": found.n_bytes, "digest": found.digest
    }  # fmt: skip
    return _Material(source, texts, +dropped, found.neutral, Counter(found.neutral_dropped))


def _rows(split: Split, name: str, spec: FeatureSpec) -> list[dict[str, object]]:
    """Long form: one row for each text and each class that its word is not of."""
    rows = []
    for text in split.texts:
        options = chosen(split.options(text, spec), spec.seed, "position", text.filled)
        for label, words in options.items():
            row = {
                "text": text.text,
                "factual": text.word,
                "counterfactual": chosen(words, spec.seed, "word", label, text.filled),
                "factual_class": spec.class_of[text.word],
                "counterfactual_class": label,
            }
            rows.append({**row, **_origin(text, spec), "split": name})
    return rows


def _origin(text: SlottedText, spec: FeatureSpec) -> Mapping[str, object]:
    if text.template is None:
        names, origin = bool(spec.corpus.names), {"document": text.document}
    else:
        names, origin = NAME in spec.fillers, {"template": text.template}
    return {"name": text.name, **origin} if names else origin


def _neutral_splits(texts: Sequence[str], spec: FeatureSpec) -> DatasetDict:
    split_of = deal(dict.fromkeys(texts, 1), spec.splits, spec.seed)
    parts = {name: [text for text in texts if split_of[text] == name] for name in spec.splits}
    return DatasetDict(
        {name: Dataset.from_dict({"text": part}) for name, part in parts.items() if part}
    )


def _sheet(n_kept: int, dropped: Mapping[str, int]) -> dict[str, object]:
    """What was read, and where it is."""
    return {
        "read": n_kept + sum(dropped.values()),
        "kept": n_kept,
        "dropped": dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0]))),
    }


def _counts(split: Split, n_rows: int, spec: FeatureSpec) -> dict[str, object]:
    words = Counter(text.word for text in split.texts)
    values = {
        "name": {text.name for text in split.texts} - {""},
        "template": {text.template for text in split.texts} - {None},
        "document": {text.document for text in split.texts} - {""},
    }
    return {
        "texts": len(split.texts),
        "rows": n_rows,
        "classes": {
            label: sum(words[word] for word in {*own}) for label, own in spec.classes.items()
        },
        "words": {word: words[word] for word in spec.class_of},
        "different": {kind: len(found) for kind, found in values.items() if found},
    }
