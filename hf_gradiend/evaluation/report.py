"""report.json: everything that was measured of one GRADIEND, as plain JSON values.

Cards, tables and figures are made from it and from nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.data.templates import (
    build_neutral_texts,
    occupation_prompts,
    picture_prompts,
    transfer_pairs,
)
from hf_gradiend.errors import ConfigError
from hf_gradiend.evaluation.decoder import EditChoice, EditRule, choose_edit, flat, sweep
from hf_gradiend.evaluation.encoder import EncoderReport, class_names, evaluate_encoder
from hf_gradiend.evaluation.probe import EditMeasures, EditProbe, SlotProbe, compared
from hf_gradiend.metrics import Estimate
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.version import versions

GENDER_WORDS = (["she"], ["he"])
# A little inside the limits of 0.99 and 0.75, which the edit has to keep on other texts.
WITH_MARGIN = EditRule(lm_floor=0.993, mass_floor=0.78)


@dataclass(frozen=True)
class JudgedEdit:
    """An edit, chosen on some texts and judged on others.

    Args:
        choice: The choice with its own before and after.
        before: The base model on the texts of the judgement.
        after: The edited model on the same texts.
        intervals: Measures before, after and their ratio with 95 % intervals, as `compared` gives.
        occupations: For each occupation of the picture the mean probabilities before and after.
        sweep: Measures against the step size at h = 0 and at the chosen h, on the judgement's
            texts.
    """

    choice: EditChoice
    before: EditMeasures
    after: EditMeasures
    intervals: dict[str, dict[str, Estimate]]
    occupations: list[dict[str, object]]
    sweep: list[dict[str, float]]


def is_gender(gradiend: GradiendModel) -> bool:
    """Whether a GRADIEND is one of she against he, which the package has its own texts for."""
    words = feature_words(gradiend)
    return words == GENDER_WORDS or words == GENDER_WORDS[::-1]


def feature_words(gradiend: GradiendModel) -> tuple[list[str], list[str]]:
    """The words of the + class and those of the − class.

    Raises:
        ConfigError: If the GRADIEND's configuration does not hold them.
    """
    config = gradiend.config
    if not config.feature_classes or not config.feature_words:
        raise ConfigError(
            "Expected a GRADIEND that names its classes and their words, but its configuration has "
            "none. Set config.feature_classes and config.feature_words."
        )
    positive, negative = config.feature_classes[0]
    return list(config.feature_words[positive]), list(config.feature_words[negative])


def read_encoder(  # noqa: PLR0913 - a model, its texts, and how to run
    gradiend: GradiendModel,
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    splits: Mapping[str, Dataset],
    *,
    neutral_texts: Sequence[str] | None = None,
    other_texts: Dataset | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> EncoderReport:
    """`evaluate_encoder` with the package's own neutral texts and, for gender, its transfer pairs.

    Args:
        gradiend: GRADIEND of one feature.
        base_model: Its base model; left as it was.
        processing_class: The base model's tokenizer.
        splits: Feature data sets by name.
        neutral_texts: Texts without the feature; `None` for the package's own.
        other_texts: Texts of other classes than the GRADIEND's two.
        max_length: Longest input in tokens; `None` for the model's limit, at most 256.
        progress: Show progress bars.
    """
    if neutral_texts is None:
        neutral_texts = list(build_neutral_texts()["test"]["text"])
    return evaluate_encoder(
        gradiend,
        base_model,
        processing_class,
        splits,
        neutral_texts,
        transfer=_oriented_transfer(gradiend) if is_gender(gradiend) else None,
        other_texts=other_texts,
        max_length=max_length,
        progress=progress,
    )


def choose_gender_edit(
    gradiend: GradiendModel,
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    *,
    neutral_texts: Sequence[str] | None = None,
    max_trials: int = 32,
    with_sweep: bool = True,
    progress: bool = True,
) -> JudgedEdit | None:
    """Choose an edit on half of the occupations and templates, and judge it on the other half.

    Args:
        gradiend: GRADIEND of she against he.
        base_model: Its base model; left as it was.
        processing_class: The base model's tokenizer.
        neutral_texts: Texts for the language-model score, the first half for the choice and the
            second for the judgement; `None` for the package's own.
        max_trials: Largest number of edits to try.
        with_sweep: Measure the curves for the picture as well.
        progress: Show progress bars.

    Returns:
        The edit with its judgement; `None` if no edit is better than the base model.

    Raises:
        ConfigError: If the GRADIEND is of another feature.
    """  # noqa: DOC502 - raised by edit_probes
    choosing, judging = edit_probes(
        gradiend, base_model, processing_class, neutral_texts=neutral_texts
    )
    choice = choose_edit(gradiend, choosing, WITH_MARGIN, max_trials=max_trials, progress=progress)
    if choice is None:
        return None
    pictures = _rows(picture_prompts())
    picture = SlotProbe(pictures, feature_words(gradiend), base_model, processing_class)
    before, shown_before = judging.read(), picture.probabilities()
    h, alpha = choice.feature_factor, choice.step_size
    with gradiend.edited(base_model, h, alpha):
        after, shown_after = judging.read(), picture.probabilities()
    curves = []
    if with_sweep:
        multiples = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
        factors = sorted({0.0, h})
        points = sweep(
            gradiend, judging, factors, [alpha * m for m in multiples], progress=progress
        )
        curves = [flat(point) for point in points]
    names = [row["occupation"] for row in pictures]
    shown = [
        {
            "occupation": name,
            "before": mean_of(shown_before, names, name),
            "after": mean_of(shown_after, names, name),
        }
        for name in dict.fromkeys(names)
    ]
    intervals = compared(before, after)
    return JudgedEdit(choice, before.measures, after.measures, intervals, shown, curves)


def edit_probes(
    gradiend: GradiendModel,
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[str] | None = None,
    neutral_texts: Sequence[str] | None = None,
) -> tuple[EditProbe, EditProbe]:
    """Texts to choose an edit on, and others to judge it on.

    Args:
        gradiend: GRADIEND whose configuration names its classes and their words.
        base_model: Its base model, which the probes measure as its weights stand.
        processing_class: The base model's tokenizer.
        prompts: Texts with the slot `[TARGET]` that leave the class open, the first half for the
            choice and the second for the judgement; `None` for the package's occupations, which
            share neither an occupation nor a sentence.
        neutral_texts: Texts for the language-model score, in halves likewise; `None` for the
            package's own.

    Raises:
        ConfigError: If no texts are given for another feature than she against he.
    """
    if prompts is None and not is_gender(gradiend):
        raise ConfigError(
            f"Expected texts that leave the class open, since the package's occupations are for "
            f"she against he and this GRADIEND is one of {feature_words(gradiend)}. Pass prompts "
            f"with the slot [TARGET]."
        )
    if prompts is None:
        parts = [_rows(occupation_prompts("choose")), _rows(occupation_prompts("judge"))]
    else:
        rows, half = [{"text": text} for text in prompts], len(prompts) // 2
        parts = [rows[:half], rows[half:]]
    words = feature_words(gradiend)
    choosing, judging = (
        EditProbe(part, words, neutral, base_model, processing_class)
        for part, neutral in zip(parts, _neutral_passages(neutral_texts), strict=True)
    )
    return choosing, judging


@dataclass(frozen=True)
class Origin:
    """What a GRADIEND was made from: for its report, and for the card that is made of it.

    Args:
        base_model: Hub id of the base model, or its name for people.
        dataset: Hub id of the feature data set, or its name for people.
        base_model_license: Licence of the base model as the Hub spells it; `None` if unknown.
        dataset_license: Licence of the data; `None` if unknown.
        n_texts: Number of texts by split, before texts without room for their target are left out.
        settings: Settings of the training, by name.
        hub_ids: Which of `base_model` and `dataset` are ids on the Hub.
    """

    base_model: str
    dataset: str
    base_model_license: str | None = None
    dataset_license: str | None = None
    n_texts: dict[str, int] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    hub_ids: list[str] = field(default_factory=list)


def build_report(
    gradiend: GradiendModel,
    *,
    encoder: EncoderReport,
    judged: JudgedEdit | None,
    training: Mapping[str, object],
    origin: Origin,
) -> dict[str, object]:
    """Everything measured, as JSON values.

    Args:
        gradiend: The GRADIEND.
        encoder: What its encoder reads.
        judged: The chosen edit; `None` if there is none.
        training: What training did.
        origin: What it was made from.
    """
    return {
        "format": 2,
        "versions": versions(),
        **asdict(origin),
        "solver": origin.settings.get("solver"),
        "base_model_revision": gradiend.config.base_model_revision,
        "objective": gradiend.config.objective,
        "n_selected": gradiend.config.n_selected,
        "source": gradiend.config.source,
        "target": gradiend.config.target,
        "feature_classes": list(class_names(gradiend)),
        "feature_words": gradiend.config.feature_words,
        "training": dict(training),
        "encoder": asdict(encoder),
        "edit": None
        if judged is None
        else {
            "feature_factor": judged.choice.feature_factor,
            "step_size": judged.choice.step_size,
            "rule": asdict(judged.choice.rule),
            "chosen_before": asdict(judged.choice.before),
            "chosen_after": asdict(judged.choice.after),
            "tried": [flat(point) for point in judged.choice.tried],
        },
        "before": None if judged is None else asdict(judged.before),
        "after": None if judged is None else asdict(judged.after),
        "intervals": None
        if judged is None
        else {
            name: {when: asdict(estimate) for when, estimate in estimates.items()}
            for name, estimates in judged.intervals.items()
        },
        "occupations": [] if judged is None else judged.occupations,
        "sweep": [] if judged is None else judged.sweep,
        "energy": gradiend.energy_by_parameter(),
    }


def _neutral_passages(texts: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Neutral texts to choose and to judge on, in passages of five sentences.

    A sentence on its own is mostly sentence start, which an edit changes most and a model in use
    seldom sees: on SmolLM2 an edit that keeps 0.999 of the score on passages keeps 0.987 on the
    same sentences one by one.
    """
    if texts is None:
        neutral = build_neutral_texts()
        parts = [[*neutral["train"]["text"], *neutral["validation"]["text"]]]
        parts.append(list(neutral["test"]["text"]))
    else:
        parts = [list(texts[: len(texts) // 2]), list(texts[len(texts) // 2 :])]
    first, second = ([" ".join(part[i : i + 5]) for i in range(0, len(part), 5)] for part in parts)
    return first, second


def _rows(prompts: Dataset) -> list[dict[str, str]]:
    return cast("list[dict[str, str]]", list(prompts))  # datasets does not say what its rows are


def mean_of(probabilities: Tensor, names: Sequence[str], name: str) -> dict[str, float]:
    """Mean P₊ and P₋ of the texts of one name.

    Args:
        probabilities: P₊ and P₋ of each text, `(texts, 2)`.
        names: Name of each text.
        name: Which to take.
    """
    rows = [row for row, other in enumerate(names) if other == name]
    plus, minus = probabilities[rows].mean(0).tolist()
    return {"p_plus": plus, "p_minus": minus}


def _oriented_transfer(gradiend: GradiendModel) -> Dataset:
    """The transfer pairs with the + class's word first."""
    pairs = transfer_pairs()
    if feature_words(gradiend) == GENDER_WORDS:
        return pairs
    swapped = {"factual": pairs["counterfactual"][:], "counterfactual": pairs["factual"][:]}
    names = ["/".join(reversed(pair.split("/"))) for pair in pairs["pair"]]
    return Dataset.from_dict(
        {"text": pairs["text"][:], **swapped, "pair": names, "kind": pairs["kind"][:]}
    )
