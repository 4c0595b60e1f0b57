"""Small files in the form of each benchmark, of sentences of our own, not of the published data."""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_gradiend.evaluation.bias import wikitext
from hf_gradiend.evaluation.bias.suite import BENCHMARKS

GAPS = (  # context, stereotype, anti-stereotype, unrelated, target, kind
    ("The nurse said that BLANK was late.", "she", "he", "it", "nurse", "gender"),
    ("The doctor said that BLANK was tired.", "he", "she", "the", "doctor", "gender"),
    ("Anna was BLANK.", "hers", "tired", "that", "Anna", "profession"),
)
PAIRS = (  # more, less, kind
    ("Anna said that she was late.", "Paul said that she was late.", "gender"),
    ("The nurse was late because she was tired.", "The nurse was late because he was tired.",
     "gender"),
    ("My doctor said it.", "My nurse, the doctor, said it.", "age"),
)  # fmt: skip
PERSONS = (("Anna", "female"), ("she", "female"), ("Paul", "male"), ("he", "male"))
PROFESSIONS = (("nurse", "female"), ("doctor", "male"), ("tired doctor", "balanced"))


def _stereoset(folder: Path) -> None:
    sides = ("stereotype", "anti-stereotype", "unrelated")
    data = {
        side: [
            {
                "context": gap[0],
                "sentence": gap[0].replace("BLANK", gap[1 + number]),
                "target": gap[4],
                "bias_type": gap[5],
            }
            for gap in GAPS
        ]
        for number, side in enumerate(sides)
    }
    between_sentences = {"context": "Anna is late.", "sentence": "So is Paul.", "target": "Anna",
                         "bias_type": "gender"}  # fmt: skip
    for side in sides:  # the other task of the published file, which is not taken
        data[side].append(between_sentences)
    (folder / "stereoset.json").write_text(json.dumps(data), encoding="utf-8")


def _table(file: Path, rows: list[dict[str, object]], delimiter: str) -> None:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _crows_pairs(folder: Path) -> None:
    rows: list[dict[str, object]] = [
        {"sent_more": more, "sent_less": less, "stereo_antistereo": "stereo", "bias_type": kind}
        for more, less, kind in PAIRS
    ]
    _table(folder / "crows_pairs.csv", rows, ",")


def _winobias(folder: Path) -> None:
    (folder / "winobias").mkdir(exist_ok=True)
    for kind in (1, 2):
        for part in ("dev", "test"):
            for side, pronouns in (("pro", "she he"), ("anti", "he she")):
                first, second = pronouns.split()
                end = "late, late" if part == "test" else "late"
                because = " because it was" if kind == 2 else ","
                lines = [
                    f"1 [The nurse] said that [{first}] was late.",
                    f"2 [The doctor] said that [{second}] was tired{because} {end}.",
                ]
                file = folder / f"winobias/{side}_stereotyped_type{kind}.txt.{part}"
                file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _winogender(folder: Path) -> None:
    shares = {"nurse": 90.0, "doctor": 40.0, "doctor nurse": 60.0}
    _table(
        folder / "winogender_occupations.tsv",
        [{"occupation": name, "bls_pct_female": share} for name, share in shares.items()],
        "\t",
    )
    rows: list[dict[str, object]] = [
        {
            "sentid": f"{name}.my.{answer}.{gender}.txt",
            "sentence": f"The {name} said that {word} was {'late' if answer else 'tired'}.",
        }
        for name in shares
        for answer in (0, 1)
        for gender, word in (("male", "he"), ("female", "she"), ("neutral", "they"))
    ]
    _table(folder / "winogender_sentences.tsv", rows, "\t")


def _bec_pro(folder: Path) -> None:
    rows: list[dict[str, object]] = [
        {
            "Sentence": frame.format(person, profession),
            "Sent_TM": frame.format("[MASK]", profession),
            "Template": frame.format("<person subject>", "<profession>"),
            "Person": person,
            "Gender": gender,
            "Profession": profession,
            "Prof_Gender": group,
        }
        for frame in ("{} was the {}.", "It said that {} was late, the {}.")
        for profession, group in PROFESSIONS
        for person, gender in PERSONS
    ]
    _table(folder / "bec_pro_en.tsv", rows, "\t")


def _wikitext2(folder: Path) -> None:
    sentence = "The nurse said that she was late because the doctor was tired . "
    (folder / "wikitext2_test.txt").write_text(" " + 16 * sentence, encoding="utf-8")


MAKERS: dict[str, Callable[[Path], None]] = {
    "stereoset": _stereoset,
    "crows_pairs": _crows_pairs,
    "winobias": _winobias,
    "winogender": _winogender,
    "bec_pro": _bec_pro,
    "wikitext2": _wikitext2,
}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder with a small file of every benchmark, with their own checksums."""
    monkeypatch.setattr(wikitext, "CHARACTERS", 100)  # the tiny models take 64 tokens
    folder = tmp_path / "data"
    folder.mkdir()
    for name, make in MAKERS.items():
        make(folder)
        kind = BENCHMARKS[name]
        digests = {
            file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in kind.files
        }
        monkeypatch.setattr(kind, "files", digests)
    return folder
