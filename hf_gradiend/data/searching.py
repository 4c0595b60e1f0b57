"""Searches a corpus piece by piece, on several processes, and goes on where it was stopped."""

import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from threading import Thread
from typing import TypeVar

from tqdm.auto import tqdm

from hf_gradiend.data.corpora import Corpus, pieces_of
from hf_gradiend.data.dealing import rank
from hf_gradiend.data.matching import NO_WORD, Candidate, Sieve
from hf_gradiend.data.pieces import Piece, sentences
from hf_gradiend.data.specification import FeatureSpec
from hf_gradiend.files import read_object, writable_folder, write_json
from hf_gradiend.version import __version__

NOT_DRAWN = "a duplicate, or more than max_neutral_texts"

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Found:
    """What a corpus, or a piece of it, has for a specification.

    Args:
        digest: Hash of the texts and of the names of their documents.
        n_bytes: Size of the texts in UTF-8.
        n_read: Number of sentences.
        candidates: The sentences that are kept.
        dropped: Number of the other sentences by the reason.
        neutral: Neutral sentences, drawn from all.
        neutral_dropped: Number of the sentences without a class's word that are not among them, by
            the reason.
    """

    digest: str
    n_bytes: int
    n_read: int
    candidates: Sequence[Candidate] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    neutral: Sequence[str] = ()
    neutral_dropped: Mapping[str, int] = field(default_factory=dict)


def search_corpus(
    corpus: Corpus,
    spec: FeatureSpec,
    *,
    num_proc: int = 1,
    work_dir: Path | None = None,
    progress: bool = True,
) -> Found:
    """Search all sentences of a corpus.

    What is found does not depend on the number of processes. Each piece's result is kept in the
    working folder until the caller removes it, under a name that is made of the rules and of the
    piece's own text, so that a second run after a killed one searches only what is left.

    Args:
        corpus: The corpus.
        spec: The specification.
        num_proc: Number of processes.
        work_dir: Folder for the results of single pieces; `None` keeps none.
        progress: Show a progress bar.

    Raises:
        ConfigError: If options of the corpus contradict each other.
        DataError: If the corpus cannot be read or is no text.
    """  # noqa: DOC502 - raised by the functions below
    pieces = pieces_of(corpus)
    if work_dir is not None:
        writable_folder(work_dir)
    search = partial(_searched, spec=spec, work_dir=work_dir)
    total = len(pieces) if isinstance(pieces, Sequence) else None
    found = _in_order(search, pieces, num_proc)
    with tqdm(total=total, desc="Searching", unit="piece", disable=not progress) as bar:
        results = []
        for each in found:
            results.append(each)
            bar.update()
    return _merged(results, spec)


def search_texts(texts: Iterable[tuple[str, str]], spec: FeatureSpec) -> Found:
    """Search the sentences of some texts.

    Args:
        texts: Texts, each with the name of its document before it.
        spec: The specification.
    """
    read = list(texts)
    tally = _Tally(spec, Sieve(spec))
    for document, text in read:
        for sentence in sentences(text):
            tally.add(sentence, document)
    return Found(
        digest=_digest(read),
        n_bytes=sum(len(text.encode()) for _, text in read),
        n_read=tally.n_read,
        candidates=tuple(tally.candidates),
        dropped=dict(tally.dropped),
        neutral=least_ranked(tally.neutral, spec.max_neutral_texts, spec.seed),
        neutral_dropped=dict(tally.neutral_dropped),
    )


def least_ranked(texts: Iterable[str], number: int, seed: int) -> list[str]:
    """Different texts, drawn at random: the same ones, however the texts come in parts."""
    return sorted(set(texts), key=lambda text: (rank(seed, "neutral", text), text))[:number]


@dataclass
class _Tally:
    """What was found in the sentences so far."""

    spec: FeatureSpec
    sieve: Sieve
    n_read: int = 0
    candidates: list[Candidate] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    neutral: list[str] = field(default_factory=list)
    neutral_dropped: Counter[str] = field(default_factory=Counter)

    def add(self, sentence: str, document: str) -> None:
        self.n_read += 1
        hits = self.sieve.finder.find(sentence)
        outcome = self.sieve.read(sentence, hits, document) if hits else NO_WORD
        if isinstance(outcome, Candidate):
            self.candidates.append(outcome)
            return
        self.dropped[outcome] += 1
        if outcome == NO_WORD:
            problem = self.sieve.neutral_problem(sentence, hits)
            if problem is None:
                self.neutral.append(sentence)
            else:
                self.neutral_dropped[problem] += 1


def _searched(piece: Piece, spec: FeatureSpec, work_dir: Path | None) -> Found:
    texts = list(piece.texts())
    if work_dir is None:
        return search_texts(texts, spec)
    file = work_dir / f"{_digest(texts)}-{_rules_digest(spec)}.json"
    if file.is_file():
        kept = read_object(file, "the result of an earlier run")
        return Found(**{**kept, "candidates": [Candidate(**each) for each in kept["candidates"]]})
    found = search_texts(texts, spec)
    write_json(file, asdict(found))
    return found


def _digest(texts: Iterable[tuple[str, str]]) -> str:
    digest = blake2b(digest_size=16)
    for document, text in texts:
        digest.update(f"{document}\x1f{text}\x1e".encode())
    return digest.hexdigest()


def _rules_digest(spec: FeatureSpec) -> str:
    """Hash of what the result of a piece depends on, besides its text."""
    rules = (__version__, spec.classes, spec.corpus, spec.max_neutral_texts, spec.seed)
    return blake2b(repr(rules).encode(), digest_size=16).hexdigest()


def _in_order(work: Callable[[T], R], items: Iterable[T], num_proc: int) -> Iterator[R]:
    """Work on several processes, which take the items only a few ahead of the results.

    Yields:
        The results in the order of the items.
    """
    if num_proc == 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context()
    with ProcessPoolExecutor(num_proc, context, _start_worker, (os.getpid(),)) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _start_worker(parent: int) -> None:
    # Ctrl-C reaches every process of a terminal; the main one tells the others to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # A main process that is killed tells nobody, and the others would wait for work for ever.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _merged(results: Sequence[Found], spec: FeatureSpec) -> Found:
    dropped: Counter[str] = Counter()
    neutral_dropped: Counter[str] = Counter()
    for found in results:
        dropped.update(found.dropped)
        neutral_dropped.update(found.neutral_dropped)
    neutral = least_ranked(
        (text for found in results for text in found.neutral), spec.max_neutral_texts, spec.seed
    )
    not_drawn = dropped[NO_WORD] - neutral_dropped.total() - len(neutral)
    return Found(
        digest=_digest((str(number), found.digest) for number, found in enumerate(results)),
        n_bytes=sum(found.n_bytes for found in results),
        n_read=sum(found.n_read for found in results),
        candidates=[each for found in results for each in found.candidates],
        dropped=dict(sorted(dropped.items())),
        neutral=neutral,
        neutral_dropped=dict(sorted((+neutral_dropped + Counter({NOT_DRAWN: not_drawn})).items())),
    )
