"""Checks the part of speech of the word at a slot, with spaCy where it is installed."""

from collections.abc import Callable, Sequence

from hf_gradiend.data.loading import TARGET_SLOT
from hf_gradiend.data.matching import Candidate
from hf_gradiend.data.specification import PartOfSpeech
from hf_gradiend.errors import ConfigError, first_line_of


def tag_check(rule: PartOfSpeech) -> Callable[[Sequence[Candidate]], list[bool]]:
    """Load a spaCy pipeline.

    Args:
        rule: The pipeline and the tags.

    Returns:
        A function that says of each candidate whether the word at its first slot has one of the
        tags.

    Raises:
        ConfigError: If spaCy or the pipeline is not installed.
    """
    try:
        import spacy  # noqa: PLC0415  # pyright: ignore[reportMissingImports] - optional
    except ImportError as error:
        raise ConfigError(
            "Expected spaCy for corpus.part_of_speech, but it is not installed. Install it with "
            'pip install "hf_gradiend[spacy]", or remove the key.'
        ) from error
    try:
        pipeline = spacy.load(rule.model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a spaCy pipeline, but {rule.model!r} cannot be loaded: "
            f"{first_line_of(error)} Install it with python -m spacy download {rule.model}."
        ) from error

    def has_tag(candidates: Sequence[Candidate]) -> list[bool]:
        documents = pipeline.pipe(
            candidate.text.replace(TARGET_SLOT, candidate.word) for candidate in candidates
        )
        found = []
        for candidate, document in zip(candidates, documents, strict=True):
            start = candidate.text.index(TARGET_SLOT)
            end = start + len(candidate.word)
            span = document.char_span(start, end, alignment_mode="expand")
            # Of several words the last one tells: "Middle Eastern" is an adjective.
            found.append(span[-1].pos_ in rule.tags)
        return found

    return has_tag
