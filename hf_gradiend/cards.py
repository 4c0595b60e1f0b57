"""Model cards, made from report.json and from nothing else.

The prose stands in card_templates/, one file per kind of card and parts that they share; this
module fills in the numbers.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_gradiend.errors import ConfigError

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
    positive, negative = report["feature_classes"]
    plus, minus = _words(report)
    masked = report["objective"] == "masked"
    names = {
        "plus": plus,
        "minus": minus,
        "positive": positive,
        "negative": negative,
        "repo_id": repo_id,
        "base_model": report["base_model"],
        "short_name": report["base_model"].rpartition("/")[2],
        "task": "fill-mask" if masked else "text-generation",
        "prompt": "The nurse said that [MASK] was late." if masked else "The nurse said that",
    }
    text = _filled(
        kind,
        **names,
        feature=_filled("parts/feature", **names),
        origin=_origin(report),
        encoder=_encoder(report),
        edit=_edit(report, names) if report["edit"] else "",
        adapter=_adapter(report),
        energy=_energy(report),
        limitations=_limitations(plus, minus),
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


def _data(kind: Kind, report: Report, repo_id: str) -> ModelCardData:
    """Front matter: what the Hub shows, filters by and links to."""
    base_model = report["base_model"]
    is_id = "/" in base_model
    task = "fill-mask" if report["objective"] == "masked" else "text-generation"
    relations = {"gradiend": None, "adapter": "adapter", "model": "finetune"}
    return ModelCardData(
        model_name=repo_id.rpartition("/")[2],
        language="en",
        # Changed weights stand under the licence of the weights that were changed.
        license=report["dataset_license" if kind == "gradiend" else "base_model_license"],
        library_name={"gradiend": "hf_gradiend", "adapter": "peft", "model": "transformers"}[kind],
        base_model=base_model if is_id else None,
        base_model_relation=relations[kind] if is_id else None,
        datasets=[report["dataset"]] if "/" in report["dataset"] else None,
        pipeline_tag=None if kind == "gradiend" else task,
        tags=["gradiend", "interpretability", "fairness", "bias"],
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
    after = {measure: found["after"]["value"] for measure, found in report["intervals"].items()}
    texts = "occupations of hf_gradiend"
    return [
        result("imbalance", "imbalance", after["imbalance"], texts, "judge"),
        result("language-model score", "lm_score", after["lm_score"], texts, "judge"),
    ]


def _words(report: Report) -> tuple[str, str]:
    """The words of the + and the − class as a person would say them: "she", "he"."""
    positive, negative = report["feature_classes"]
    words = report["feature_words"] or {}
    return "/".join(words.get(positive, [positive])), "/".join(words.get(negative, [negative]))


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
    rows = [("texts", "n", "correlation", "accuracy")]
    for name, split in encoder["splits"].items():
        r, a = split["correlation"], split["accuracy"]
        rows.append((name, str(r["n"]), _estimate(r), _estimate(a)))
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


def _edit(report: Report, names: Mapping[str, str]) -> str:
    rows = [("measure", "n", "before", "after", "after / before")]
    for measure, label, _ in MEASURES:
        found = report["intervals"][measure]
        before, after, ratio = (_estimate(found[when]) for when in ("before", "after", "ratio"))
        rows.append((label.format_map(names), str(found["before"]["n"]), before, after, ratio))
    return _filled(
        "parts/edit",
        **names,
        step_size=f"{report['edit']['step_size']:.4g}",
        feature_factor=f"{report['edit']['feature_factor']:.4g}",
        table=_table(rows),
        worse=_worse(report),
    )


def _worse(report: Report) -> str:
    """What got worse beyond doubt, and what cannot be told."""
    worse, unclear = [], []
    for measure, label, more_is_better in MEASURES:
        ratio = report["intervals"][measure]["ratio"]
        name = label.partition(" (")[0]
        if more_is_better is not None and ratio["low"] <= 1.0 <= ratio["high"]:
            unclear.append(name)
        elif more_is_better is not None and (ratio["value"] < 1.0) == more_is_better:
            worse.append(f"{name} ({ratio['value']:.3f} times)")
    told = f"What got worse: {', '.join(worse)}." if worse else "No measure got worse beyond doubt."
    if unclear:
        told += f" Whether it changed cannot be told from these texts: {', '.join(unclear)}."
    return told


def _adapter(report: Report) -> str:
    form = report.get("adapter")
    if form is None:
        return ""
    return _filled(
        "parts/adapter",
        n_values=f"{form['n_values']:,}",
        n_selected=f"{report['n_selected']:,}",
        dtype=form["dtype"],
        megabytes=f"{form['bytes'] / 1e6:.1f}",
    )


def _energy(report: Report) -> str:
    by_layer: dict[str, float] = {}
    for name, energy in report["energy"].items():
        number = re.search(r"\.(\d+)\.", name)
        layer = f"layer {number[1]}" if number else "weights outside of layers"
        by_layer[layer] = by_layer.get(layer, 0.0) + energy
    total = sum(by_layer.values()) or 1.0
    largest = sorted(by_layer.items(), key=lambda item: -item[1])[:N_LAYERS]
    shares = ", ".join(f"{layer} ({energy / total:.1%})" for layer, energy in largest)
    return _filled("parts/energy", shares=shares, n_layers=len(by_layer))


def _limitations(plus: str, minus: str) -> str:
    parts = ["parts/limitations"]
    if {plus, minus} == {"she", "he"}:
        parts.insert(0, "parts/limitations_gender")
    return "\n".join(_filled(part) for part in parts)


def _estimate(estimate: Report) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])
