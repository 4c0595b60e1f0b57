"""Reports and the cards that are expected of them.

After a wanted change of a card, run `PYTHONPATH=. python tests/unit/cards/regenerate.py` and read
the difference: it writes these cards and those of model_cards/.
"""

import json
from pathlib import Path

from hf_gradiend.cards import KINDS, render_card

FOLDER = Path(__file__).parent
MODEL_CARDS = FOLDER.parents[2] / "model_cards"
REPORT = json.loads((FOLDER / "report.json").read_text("utf-8"))
MASKED = {**REPORT, "objective": "masked", "base_model": "org/tiny-bert"}
WITHOUT_EDIT = {
    **REPORT,
    **dict.fromkeys(("edit", "before", "after", "intervals")),
    "occupations": [],
    "adapter": None,
    "strengths": [],
}
# Other words, in data of the user's own, of which little is known.
PLAIN = {
    **WITHOUT_EDIT,
    "base_model": "my-bert",
    "hub_ids": [],
    "base_model_revision": None,
    "base_model_license": None,
    "dataset": "articles",
    "dataset_license": None,
    "objective": "masked",
    "feature_classes": ["feminine", "masculine"],
    "feature_words": {"feminine": ["die", "eine"], "masculine": ["der", "ein"]},
    "encoder": {**REPORT["encoder"], "transfer": [], "transfer_in_order": None},
}


def _estimate(value: float, half_width: float) -> dict[str, float]:
    low, high = value - half_width, value + half_width
    return {"value": value, "low": low, "high": high, "n": 120}


def _row(measure: str, best: object, before: float, after: float, verdict: str) -> dict:
    return {
        "benchmark": "winogender", "measure": measure, "best": best,
        "before": _estimate(before, 0.125), "after": _estimate(after, 0.125),
        "change": _estimate(after - before, 0.0625), "verdict": verdict,
    }  # fmt: skip


BENCHMARKED = {
    **REPORT,
    "evaluation": {
        "limit": 100,
        "papers": {"winogender": "Rudinger et al. (2018), https://aclanthology.org/N18-2002"},
        "edited": [
            {
                "label": "edited-model",
                "rows": [
                    _row("correlation", 0.0, 0.5, 0.25, "better"),
                    _row("rmse", None, 0.25, 0.3125, "neither is better"),
                    _row("accuracy", "high", 0.75, 0.75, "cannot be told"),
                ],
                "told": ["Better: winogender correlation.", "Worse: nothing."],
            }
        ],
    },
}

# File, without its ending: kind of the card, report.
CASES = {
    "gradiend": ("gradiend", REPORT),
    "adapter": ("adapter", REPORT),
    "model": ("model", REPORT),
    "gradiend_without_edit": ("gradiend", WITHOUT_EDIT),
    "gradiend_of_other_words": ("gradiend", PLAIN),
    "model_masked": ("model", MASKED),
    "model_with_benchmarks": ("model", BENCHMARKED),
}


def render(name: str) -> str:
    kind, report = CASES[name]
    return render_card(kind, report, f"me/{name}")


if __name__ == "__main__":
    for name in CASES:
        (FOLDER / f"{name}.md").write_text(render(name), "utf-8")
    for file in sorted(MODEL_CARDS.glob("*/report.json")):
        report = json.loads(file.read_text("utf-8"))
        repos = json.loads(file.with_name("repos.json").read_text("utf-8"))
        for kind in KINDS:
            card = render_card(kind, report, repos[kind])
            file.with_name(f"{kind}.md").write_text(card, "utf-8")
