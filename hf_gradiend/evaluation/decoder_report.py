"""What a GRADIEND's edits do over a grid, and which of them each rule chooses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tqdm.auto import tqdm

from hf_gradiend.evaluation.decoder import (
    BALANCE,
    EditChoice,
    EditMeter,
    EditPoint,
    EditRule,
    EditSearch,
    flat,
    measured,
)
from hf_gradiend.evaluation.encoder import class_names
from hf_gradiend.evaluation.probe import EditMeasures, EditProbe, ProbeReading, compared
from hf_gradiend.metrics import Estimate
from hf_gradiend.modeling_gradiend import GradiendModel

# A little inside the limits, which the edit has to keep on other texts as well.
RULES: tuple[EditRule, ...] = (
    EditRule("imbalance", "limits", 0.993, 0.78),
    EditRule("bpi", "limits", 0.993, 0.78),
    EditRule("bpi", "product"),
    EditRule("fpi", "limits", 0.993, 0.78),
    EditRule("fpi", "product"),
    EditRule("mpi", "limits", 0.993, 0.78),
    EditRule("mpi", "product"),
)
FEATURE_FACTORS = (-1.0, -0.5, 0.0, 0.5, 1.0)
# Norm of α · dec(1) over that of the weights, from an edit that hardly shows to a broken model.
SHARES = tuple(2.0**k * 1e-4 for k in range(8))


@dataclass(frozen=True)
class JudgedChoice:
    """An edit that a rule chose on some texts, judged on others.

    Args:
        choice: The choice.
        after: The edited model on the texts of the judgement.
        intervals: Measures before, after and their ratio with 95 % intervals, as `compared` gives.
    """

    choice: EditChoice
    after: EditMeasures
    intervals: dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class DecoderReport:
    """Edits over a grid, and the edit that each rule chooses.

    Args:
        classes: Names of the + class and of the − class.
        before: The base model on the texts of the choice.
        grid: Every edit of the grid on the same texts, without those that break the model.
        judged_before: The base model on the texts of the judgement.
        judged: For each rule its edit; `None` where no edit is better than the base model.
        rules: The rules.
    """

    classes: tuple[str, str]
    before: EditMeasures
    grid: list[EditPoint]
    judged_before: EditMeasures
    rules: tuple[EditRule, ...]
    judged: tuple[JudgedChoice | None, ...]


def evaluate_decoder(
    gradiend: GradiendModel,
    choosing: EditProbe,
    judging: EditProbe,
    *,
    rules: Sequence[EditRule] = RULES,
    grid: tuple[Sequence[float], Sequence[float]] | None = None,
    max_trials: int = 16,
    progress: bool = True,
) -> DecoderReport:
    """Measure edits over a grid, choose by each rule, and judge the choices on other texts.

    A rule starts from the best edit of the grid and refines it by a compass search over h and
    log|α|. Whatever was measured once is not measured again.

    Args:
        gradiend: GRADIEND of one feature.
        choosing: Texts to choose on.
        judging: Other texts, of the same classes.
        rules: What is asked of the edits.
        grid: Feature factors h and step sizes α; `None` for five h and sixteen α of both signs,
            from 1e-4 of the weights' norm, doubling.
        max_trials: Largest number of edits that a rule tries beside the grid.
        progress: Show progress bars.

    Raises:
        CompatibilityError: If the GRADIEND was made for another base model.
        NumericalError: If the base model gives NaN.
    """  # noqa: DOC502 - raised by what it calls
    with EditMeter(gradiend, choosing) as meter:
        if grid is None:
            steps = [meter.step_size_of(share, 1.0) for share in SHARES]
            grid = FEATURE_FACTORS, [*(-step for step in reversed(steps)), *steps]
        points = measured(meter, [(h, a) for h in grid[0] for a in grid[1]], progress)
        choices = [
            _choice(meter, rule, points, max_trials, progress)
            for rule in tqdm(rules, desc="Choosing by each rule", unit="rule", disable=not progress)
        ]
    before = judging.read()
    readings: dict[tuple[float, float], ProbeReading] = {}
    for choice in filter(None, choices):
        edit = choice.feature_factor, choice.step_size
        if edit not in readings:
            with gradiend.edited(judging.model, *edit):
                readings[edit] = judging.read()
    return DecoderReport(
        classes=class_names(gradiend),
        before=meter.before,
        grid=points,
        judged_before=before.measures,
        rules=tuple(rules),
        judged=tuple(
            None
            if choice is None
            else _judged(choice, before, readings[choice.feature_factor, choice.step_size])
            for choice in choices
        ),
    )


def _choice(
    meter: EditMeter,
    rule: EditRule,
    points: Sequence[EditPoint],
    max_trials: int,
    progress: bool,  # noqa: FBT001
) -> EditChoice | None:
    with tqdm(total=max_trials, desc=rule.name, leave=False, disable=not progress) as bar:
        search = EditSearch(meter, rule, max_trials, bar)
        for point in points:
            search.take((point.feature_factor, point.step_size))
        search.refine()
    return search.choice()


def _judged(choice: EditChoice, before: ProbeReading, after: ProbeReading) -> JudgedChoice:
    return JudgedChoice(choice, after.measures, compared(before, after))


def decoder_values(report: DecoderReport) -> dict[str, object]:
    """A decoder report as JSON values, for decoder.json and its figure."""
    return {
        "format": 1,
        "classes": list(report.classes),
        "lm_floor": BALANCE.lm_floor,
        "before": asdict(report.before),
        "grid": [flat(point) for point in report.grid],
        "judged_before": asdict(report.judged_before),
        "choices": [
            {
                **asdict(rule),
                "feature_factor": found.choice.feature_factor,
                "step_size": found.choice.step_size,
                "chosen_after": asdict(found.choice.after),
                "judged_after": asdict(found.after),
                "intervals": {
                    name: {when: asdict(estimate) for when, estimate in estimates.items()}
                    for name, estimates in found.intervals.items()
                },
            }
            for rule, found in zip(report.rules, report.judged, strict=True)
            if found is not None
        ],
        "without_choice": [
            asdict(rule)
            for rule, found in zip(report.rules, report.judged, strict=True)
            if found is None
        ],
    }
