"""Model cards, made from report.json and from nothing else.

The prose stands in card_templates/, one file per kind of card and parts that they share; this
module fills in the numbers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from statistics import fmean
from string import Template
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_gradiend.errors import ConfigError
from hf_gradiend.parameters import layer_of

Kind = Literal["gradiend", "adapter", "model"]
KINDS: tuple[Kind, ...] = ("gradiend", "adapter", "model")
Report = Mapping[str, Any]

# Measure, what it is called, and whether more of it is better (None: neither).
MEASURES: tuple[tuple[str, str, bool | None], ...] = (
    ("imbalance", "imbalance (0 is balanced)", False),
    ("mass", "probability of both words", True),
    ("p_plus", "probability of “{plus}”", None),
    ("p_minus", "probability of “{minus}”", None),
    ("lm_score", "language-model score on neutral text", True),
)
N_LAYERS = 5  # shown, of those with the largest shares


def render_card(kind: Kind, report: Report, repo_id: str) -> str:
    """The README.md of a repository.

    Args:
        kind: `"gradiend"`, `"adapter"` or `"model"`.
        report: Content of report.json.
        repo_id: The repository's id, for the lines that load it.

    Returns:
        Markdown with its front matter. The same report gives the same text.

    Raises:
        ConfigError: If there is no such kind, the report is of another form, or it holds no edit
            for a card that is about one.
    """  # noqa: DOC502 - raised by _check
    _check(kind, report)
    names = _names(report, repo_id)
    text = _filled(
        kind,
        **names,
        feature=_filled("parts/feature", **names),
        example=_filled(f"parts/example_{report['objective']}", **names),
        origin=_origin(report),
        encoder=_encoder(report),
        edit=_edit(report, names) if report["edit"] else "",
        benchmarks=_benchmarks(report),
        adapter=_adapter(report, names),
        energy=_energy(report),
        limitations=_limitations(report),
        citation=_filled("parts/citation"),
        next_step=_filled("parts/next_step" if report["edit"] else "parts/no_edit"),
    )
    body = re.sub(r"\n{3,}", "\n\n", text)
    return str(ModelCard(f"---\n{_data(kind, report, repo_id).to_yaml()}\n---\n\n{body}\n"))


def _filled(template: str, **values: object) -> str:
    file = resources.files("hf_gradiend") / "card_templates" / f"{template}.md"
    return Template(file.read_text("utf-8").strip()).substitute(values)


def _check(kind: Kind, report: Report) -> None:
    """Refuse what no card can be made of.

    Raises:
        ConfigError: As `render_card` says.
    """
    if kind not in KINDS:
        raise ConfigError(f"Expected a card of kind {', '.join(KINDS)}, but got {kind!r}.")
    if report.get("format") != 2:
        raise ConfigError(
            f"Expected a report of format 2, but got {report.get('format')!r}. Write report.json "
            f"again with `hf-gradiend train` or `quickstart`."
        )
    if kind != "gradiend" and not report["edit"]:
        raise ConfigError(
            f"Expected a report with a chosen edit for the card of kind {kind!r}, but this one has "
            f"none. What an edit does must be measured before it is pushed."
        )


def _names(report: Report, repo_id: str) -> dict[str, str]:
    """What several templates name."""
    positive, negative = report["feature_classes"]
    plus, minus = _words(report, positive), _words(report, negative)
    gender = _is_gender(report)
    return {
        "plus": "/".join(plus),
        "minus": "/".join(minus),
        # One word each, for code.
        "plus_word": json.dumps(plus[0], ensure_ascii=False),
        "minus_word": json.dumps(minus[0], ensure_ascii=False),
        "positive": positive,
        "negative": negative,
        "before_slot": "The nurse said that" if gender else "A text of yours, up to the gap:",
        "after_slot": " was late." if gender else ", and the rest of it.",
        "probed": "sentences about occupations" if gender else "texts",
        "repo_id": repo_id,
        "base_model": report["base_model"],
        "short_name": report["base_model"].rpartition("/")[2],
    }


def _is_gender(report: Report) -> bool:
    words = [_words(report, name) for name in report["feature_classes"]]
    return sorted(words) == [["he"], ["she"]]


def _data(kind: Kind, report: Report, repo_id: str) -> ModelCardData:
    """Front matter: what the Hub shows, filters by and links to."""
    base_model = report["base_model"]
    is_id = "base_model" in report["hub_ids"]
    task = "fill-mask" if report["objective"] == "masked" else "text-generation"
    relations = {"gradiend": None, "adapter": "adapter", "model": "finetune"}
    gender = _is_gender(report)
    return ModelCardData(
        model_name=repo_id.rpartition("/")[2],
        language="en" if gender else None,  # of other texts the report does not say it
        # Changed weights stand under the licence of the weights that were changed.
        license=report["dataset_license" if kind == "gradiend" else "base_model_license"],
        library_name={"gradiend": "hf_gradiend", "adapter": "peft", "model": "transformers"}[kind],
        base_model=base_model if is_id else None,
        base_model_relation=relations[kind] if is_id else None,
        datasets=[report["dataset"]] if "dataset" in report["hub_ids"] else None,
        pipeline_tag=None if kind == "gradiend" else task,
        tags=["gradiend", "interpretability", *(["fairness", "bias"] if gender else [])],
        eval_results=_results(kind, report, task),
    )


def _results(kind: Kind, report: Report, task: str) -> list[EvalResult]:
    """Results for `model-index`: of the encoder, or of the edit."""

    def result(name: str, metric: str, value: float, dataset: str, split: str) -> EvalResult:
        return EvalResult(
            task_type=task,
            dataset_type=re.sub(r"\W+", "-", dataset).lower(),
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )

    if kind == "gradiend":
        data, splits = report["dataset"], report["encoder"]["splits"]
        return [
            result(f"{metric} of the encoding", metric, split[metric]["value"], data, name)
            for name, split in splits.items()
            for metric in ("correlation", "accuracy")
        ]
    probed = "occupations of hf_gradiend" if _is_gender(report) else "texts of the judgement"
    return [
        result(
            label.partition(" (")[0],
            measure,
            report["intervals"][measure]["after"]["value"],
            "neutral texts" if measure == "lm_score" else probed,
            "judge",
        )
        for measure, label, more_is_better in _measures(report)
        if more_is_better is not None
    ]


def _words(report: Report, class_name: str) -> list[str]:
    """A class's words as a person would say them; its name where the report has none."""
    return (report["feature_words"] or {}).get(class_name, [class_name])


def _origin(report: Report) -> str:
    texts = ", ".join(f"{n:,} {split}" for split, n in report["n_texts"].items())
    settings = dict(report["settings"])
    parameters = ", ".join(settings.pop("parameters", []))
    shown = {
        name: value
        for name, value in settings.items()
        if value is not None and name not in {"solver", "source", "target"}
    }
    revision = f" at {report['base_model_revision']}" if report["base_model_revision"] else ""
    solver, source, target = report["solver"], report["source"], report["target"]
    rows = [
        (
            "base model",
            f"{report['base_model']}{revision}; licence: {_license(report, 'base_model')}",
        ),
        ("data", f"{report['dataset']}; licence: {_license(report, 'dataset')}; texts: {texts}"),
        ("method", f"GRADIEND, solver {solver}, source {source}, target {target}"),
        ("weights covered", f"{report['n_selected']:,} ({parameters})"),
        ("settings", _listed(shown)),
        ("made with", _listed(report["versions"])),
    ]
    return _table([("what", "value"), *rows])


def _license(report: Report, of: str) -> str:
    return report[f"{of}_license"] or "not stated"


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _encoder(report: Report) -> str:
    encoder = report["encoder"]
    rows: list[Sequence[str]] = [
        ("texts", "n", "correlation", "accuracy", "three-way accuracy", "n with neutral")
    ]
    for name, split in encoder["splits"].items():
        r, a, three = split["correlation"], split["accuracy"], split["three_way_accuracy"]
        estimates = [_estimate(estimate) for estimate in (r, a, three)]
        rows.append([name, str(r["n"]), *estimates, str(three["n"])])
    transfer = encoder["transfer_in_order"]
    return _filled(
        "parts/encoder",
        table=_table(rows),
        neutral=_estimate(encoder["neutral"]),
        n_neutral=encoder["neutral"]["n"],
        transfer=""
        if transfer is None
        else _filled("parts/transfer", share=_estimate(transfer), n=transfer["n"]),
    )


def _measures(report: Report) -> list[tuple[str, str, bool | None]]:
    """The measures that the report compares: one that was 0 before the edit has no ratio."""
    return [row for row in MEASURES if row[0] in report["intervals"]]


def _edit(report: Report, names: Mapping[str, str]) -> str:
    rows = [("measure", "n", "before", "after", "after / before")]
    for measure, label, _ in _measures(report):
        found = report["intervals"][measure]
        before, after, ratio = (_estimate(found[when]) for when in ("before", "after", "ratio"))
        rows.append((label.format_map(names), str(found["before"]["n"]), before, after, ratio))
    return _filled(
        "parts/edit",
        **names,
        step_size=f"{report['edit']['step_size']:.4g}",
        feature_factor=f"{report['edit']['feature_factor']:.4g}",
        table=_table(rows),
        lm_score=_filled(f"parts/lm_score_{report['objective']}"),
        worse=_worse(report),
    )


def _worse(report: Report) -> str:
    """What got worse beyond doubt, and what cannot be told."""
    worse, unclear = [], []
    for measure, label, more_is_better in _measures(report):
        ratio = report["intervals"][measure]["ratio"]
        name = label.partition(" (")[0]
        if more_is_better is not None and ratio["low"] <= 1.0 <= ratio["high"]:
            unclear.append(name)
        elif more_is_better is not None and (ratio["value"] < 1.0) == more_is_better:
            worse.append(f"{name}, {_estimate(ratio)} times what it was")
    told = f"**What got worse:** {'; '.join(worse) or 'nothing beyond doubt'}."
    if unclear:
        told += f" Whether it changed cannot be told from these texts: {', '.join(unclear)}."
    return told


def _benchmarks(report: Report) -> str:
    """Base model against edited ones on published benchmarks, where the report has them."""
    evaluation = report.get("evaluation")
    if evaluation is None or not evaluation["edited"]:
        return ""
    limit = evaluation["limit"]
    return _filled(
        "parts/benchmarks",
        limit="" if limit is None else f", at most {limit:,} of each",
        tables="\n\n".join(_benchmarks_of(edit) for edit in evaluation["edited"]),
        papers="; ".join(f"{name}: {paper}" for name, paper in evaluation["papers"].items()),
    )


def _benchmarks_of(edit: Report) -> str:
    rows: list[Sequence[str]] = [
        ("benchmark", "measure", "best", "n", "base model", "edited", "change", "verdict")
    ]
    for row in edit["rows"]:
        best = row["best"] if isinstance(row["best"], str) else _best(row["best"])
        estimates = (_estimate(row[when]) for when in ("before", "after", "change"))
        n = f"{row['change']['n']:,}"
        rows.append((row["benchmark"], row["measure"], best, n, *estimates, row["verdict"]))
    return _filled(
        "parts/benchmarks_edit",
        label=edit["label"],
        table=_table(rows),
        told=" ".join(edit["told"]),
    )


def _best(best: float | None) -> str:
    return "–" if best is None else f"{best:g}"


def _adapter(report: Report, names: Mapping[str, str]) -> str:
    form = report.get("adapter")
    if form is None:
        return ""
    size = _filled(
        "parts/adapter",
        n_values=f"{form['n_values']:,}",
        n_selected=f"{report['n_selected']:,}",
        dtype=form["dtype"],
        megabytes=f"{form['bytes'] / 1e6:.1f}",
    )
    strengths = report.get("strengths")
    return f"{size}\n\n{_strengths(report, names)}" if strengths else size


def _strengths(report: Report, names: Mapping[str, str]) -> str:
    """What the adapter itself does at each strength, and the whole edit beside it."""
    rows = [("strength", *(f"probability of “{names[side]}”" for side in ("plus", "minus")))]
    for point in report["strengths"]:
        rows.append((f"{point['strength']:g}", *_mean_probabilities(point["occupations"])))
    whole = [occupation["after"] for occupation in report["occupations"]]
    if whole:
        rows.append(("the whole edit", *_mean_probabilities(whole)))
    n_occupations = len(report["strengths"][0]["occupations"])
    return _filled("parts/strengths", table=_table(rows), n=n_occupations)


def _mean_probabilities(occupations: Sequence[Report]) -> tuple[str, str]:
    plus, minus = (fmean(row[side] for row in occupations) for side in ("p_plus", "p_minus"))
    return f"{plus:.3f}", f"{minus:.3f}"


def _energy(report: Report) -> str:
    by_layer: dict[str, float] = {}
    for name, energy in report["energy"].items():
        number = layer_of(name)
        layer = "the weights outside of layers" if number is None else f"layer {number}"
        by_layer[layer] = by_layer.get(layer, 0.0) + energy
    total = sum(by_layer.values()) or 1.0
    largest = sorted(by_layer.items(), key=lambda item: -item[1])[:N_LAYERS]
    shares = ", ".join(f"{layer} ({energy / total:.1%})" for layer, energy in largest)
    return _filled(
        "parts/energy",
        n_shown=len(largest),
        n_layers=len(by_layer),
        shares=shares,
        share=f"{sum(energy for _, energy in largest) / total:.1%}",
    )


def _limitations(report: Report) -> str:
    parts = ["gender"] * _is_gender(report) + ["texts"] + ["edit"] * bool(report["edit"])
    unseen = (
        "" if report.get("evaluation") else ", and other biases and abilities were not looked at"
    )
    return "\n".join(_filled(f"parts/limitations_{part}", unseen=unseen) for part in parts)


def _estimate(estimate: Report) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])
