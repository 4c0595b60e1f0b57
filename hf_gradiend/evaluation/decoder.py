"""The choice of an edit: what is asked of it, and the search for the one that does it best."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from hf_gradiend.edits import WeightEditor
from hf_gradiend.errors import ConfigError, NumericalError
from hf_gradiend.evaluation.probe import EditMeasures, EditProbe
from hf_gradiend.modeling_gradiend import GradiendModel

Criterion = Literal["imbalance", "bpi", "fpi", "mpi", "several_class_index"]
CRITERIA: tuple[Criterion, ...] = ("imbalance", "bpi", "fpi", "mpi", "several_class_index")
RuleName = Literal["limits", "product"]

Edit = tuple[float, float]  # h, α


@dataclass(frozen=True)
class EditRule:
    """What is asked of an edit.

    Args:
        criterion: What to better: `"imbalance"` or `"bpi"` balances two classes,
            `"several_class_index"` more, `"fpi"` strengthens the + class and `"mpi"` the − class.
        rule: `"limits"` looks for the best criterion (without its factor LMS) among the edits that
            keep the limits below. `"product"` takes the paper's product of LMS and the rest, with
            no limit.
        lm_floor: Least language-model score, relative to the base model's.
        mass_floor: Least probability mass of the classes' words, likewise.

    Raises:
        ConfigError: If there is no such criterion or rule, or imbalance is to be multiplied.

    References:
        Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 5 (the product).
    """

    criterion: Criterion = "imbalance"
    rule: RuleName = "limits"
    lm_floor: float = 0.99
    mass_floor: float = 0.75

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA or self.rule not in {"limits", "product"}:
            raise ConfigError(
                f"Expected a criterion of {', '.join(CRITERIA)} and the rule limits or product, "
                f"but got {self.criterion!r} and {self.rule!r}."
            )
        if self.criterion == "imbalance" and self.rule == "product":
            raise ConfigError(
                "Expected the rule limits for imbalance, which has no product with the "
                "language-model score. Choose bpi for the paper's."
            )

    @property
    def name(self) -> str:
        """For tables and progress bars: the criterion, and how it is weighed."""
        return f"{self.criterion}, {self.rule}"

    @property
    def balances(self) -> bool:
        """Whether the classes are to be made alike, not one of them stronger."""
        return self.criterion not in {"fpi", "mpi"}

    def value(self, measures: EditMeasures) -> float:
        """How good an edit with these measures is; higher is better.

        An index of a model whose language-model score is 0 is 0.
        """
        if self.criterion == "imbalance":
            return -measures.imbalance
        index = float(getattr(measures, self.criterion))
        if self.rule == "product":
            return index
        return index / measures.lm_score if measures.lm_score else 0.0

    def allows_mass(self, measures: EditMeasures, before: EditMeasures) -> bool:
        """Whether an edit keeps the limit of the probability mass."""
        return self.rule == "product" or measures.mass >= self.mass_floor * before.mass

    def allows(self, measures: EditMeasures, before: EditMeasures) -> bool:
        """Whether an edit keeps all limits."""
        keeps_lm = self.rule == "product" or measures.lm_score >= self.lm_floor * before.lm_score
        return keeps_lm and self.allows_mass(measures, before)


BALANCE = EditRule()


@dataclass(frozen=True)
class EditPoint:
    """One edit that was tried.

    Args:
        feature_factor: h.
        step_size: α.
        measures: What the edited model did.
    """

    feature_factor: float
    step_size: float
    measures: EditMeasures


@dataclass(frozen=True)
class EditChoice:
    """The chosen edit.

    Args:
        rule: What was asked of it.
        feature_factor: h of the edit.
        step_size: α of the edit.
        before: The base model on the texts of the choice.
        after: The edited model on the same texts.
        tried: The edits that were measured in full, in order.
    """

    rule: EditRule
    feature_factor: float
    step_size: float
    before: EditMeasures
    after: EditMeasures
    tried: list[EditPoint]


class EditMeter:
    """A base model measured under one edit after the other; each is measured once.

    Edits are applied in place; leaving the context undoes them bit for bit.

    Args:
        gradiend: GRADIEND of one feature.
        probe: Texts to measure on.

    Raises:
        CompatibilityError: If the GRADIEND was made for another base model.
    """

    def __init__(self, gradiend: GradiendModel, probe: EditProbe) -> None:
        if gradiend.config.n_features != 1:
            raise ConfigError(
                f"Expected a GRADIEND of one feature to choose an edit of, but it has "
                f"{gradiend.config.n_features}. Choose with the GRADIENDs that it was joined from."
            )
        self.gradiend, self.probe = gradiend, probe
        self.before = probe.measure()
        self._editor = WeightEditor(gradiend, probe.model)
        self._rough: dict[Edit, EditMeasures | None] = {}
        self._full: dict[Edit, EditMeasures | None] = {}
        self._applied: Edit | None = None

    def __enter__(self) -> "EditMeter":
        self._editor.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._applied = None
        self._editor.__exit__(*error)

    def rough(self, edit: Edit) -> EditMeasures | None:
        """The measures with a language-model score of 1, which is the dearer half to know.

        Returns:
            `None` if the edit breaks the model.
        """
        if edit not in self._rough:
            self._apply(edit)
            try:
                self._rough[edit] = EditMeasures.of(self.probe.probabilities(), 1.0)
            except NumericalError:
                self._rough[edit] = None
        return self._rough[edit]

    def full(self, edit: Edit) -> EditMeasures | None:
        """All measures; `None` if the edit breaks the model."""
        if edit not in self._full:
            rough = self.rough(edit)
            self._full[edit] = None if rough is None else self._with_lm_score(edit, rough)
        return self._full[edit]

    def _with_lm_score(self, edit: Edit, rough: EditMeasures) -> EditMeasures | None:
        self._apply(edit)
        try:
            lm_score = self.probe.language.score(self.probe.model)
        except NumericalError:
            return None
        return rough.with_lm_score(lm_score)

    def _apply(self, edit: Edit) -> None:
        if edit != self._applied:
            self._editor.apply(*edit)
            self._applied = edit

    @torch.no_grad()
    def step_size_of(self, share: float, feature_factor: float) -> float:
        """Step size at which the update has this share of the selected weights' norm.

        Args:
            share: Norm of the update over norm of the weights.
            feature_factor: h.

        Returns:
            α > 0; the share itself where the update is 0.
        """
        weights = sum(float(t.float().square().sum()) for t in self._editor.originals.values())
        update = sum(
            float(value.square().sum()) for value in self.gradiend.decode(feature_factor).values()
        )
        return share * (weights / update) ** 0.5 if update else share


def choose_edit(
    gradiend: GradiendModel,
    probe: EditProbe,
    rule: EditRule = BALANCE,
    *,
    max_trials: int = 48,
    progress: bool = True,
) -> EditChoice | None:
    """The edit (h, α) that does best what is asked, by a bracketed search.

    α doubles, with either sign, from 1e-5 of the weights' norm until a limit is broken or it no
    longer helps: at h = 0 for balance, at h = ±1 for a class to strengthen. From the best point a
    compass search over log|α| and h halves its steps until they are small. Edits are applied in
    place and undone bit for bit.

    Args:
        gradiend: GRADIEND of one feature.
        probe: Texts to choose on; judge the edit on others.
        rule: What is asked of the edit; by default the least imbalance with 99 % of the
            language-model score and 75 % of the probability mass.
        max_trials: Largest number of edits to try.
        progress: Show a progress bar.

    Returns:
        The chosen edit; `None` if no edit that is allowed is better than the base model.

    Raises:
        CompatibilityError: If the GRADIEND was made for another base model.
        NumericalError: If the GRADIEND or the base model holds NaN.
    """  # noqa: DOC502 - raised by what it calls
    with (
        EditMeter(gradiend, probe) as meter,
        tqdm(total=max_trials, desc="Choosing the edit", unit="edit", disable=not progress) as bar,
    ):
        search = EditSearch(meter, rule, max_trials, bar)
        # Where b_d is 0, dec(0) is 0 and only other h do anything.
        factors = (0.0,) if rule.balances and _has_bias(gradiend) else (1.0, -1.0)
        for h in factors:
            first = meter.step_size_of(1e-5, h)
            for sign in (+1.0, -1.0):
                search.bracket(h, sign * first)
        search.refine()
    return search.choice()


def _has_bias(gradiend: GradiendModel) -> bool:
    return any(bool(gradiend.decoder.bias.at(name).any()) for name in gradiend.names)


class EditSearch:
    """The best edit so far under one rule, and what is left of the budget.

    Args:
        meter: Measures the edits.
        rule: What is asked.
        max_trials: Largest number of edits to try.
        bar: Progress bar, moved by one per edit.
    """

    def __init__(self, meter: EditMeter, rule: EditRule, max_trials: int, bar: tqdm) -> None:
        self.meter, self.rule, self.bar = meter, rule, bar
        self.left = max_trials
        self.best: EditPoint | None = None
        self.tried: list[EditPoint] = []
        self.seen: set[Edit] = set()

    def bracket(self, feature_factor: float, step_size: float) -> None:
        """Double the step for as long as it helps; twice in a row it may not."""
        # Each bracket has to beat its own last step, not the best of a bracket before it.
        failed, last = 0, self.meter.before
        while self.left and failed < 2:
            edit = feature_factor, step_size
            self.attempt(edit)
            measures = self._helpful(edit, last)
            failed = failed + 1 if measures is None else 0
            last = measures or last
            step_size *= 2.0

    def _helpful(self, edit: Edit, last: EditMeasures) -> EditMeasures | None:
        """Measures of an edit that is allowed and better than another; `None` for any other."""
        rough = self.meter.rough(edit)
        if rough is None or self.rule.value(rough) <= self.rule.value(last):
            return None
        found = self.meter.full(edit)
        if found is None or not self.rule.allows(found, self.meter.before):
            return None
        return found if self.rule.value(found) > self.rule.value(last) else None

    def refine(self) -> None:
        """Compass search over h and log|α| around the best edit."""
        log_step, h_step = 0.5, 0.1
        while self.best is not None and self.left and h_step > 0.01:
            h, alpha = self.best.feature_factor, self.best.step_size
            neighbours = (
                (h + h_step, alpha),
                (h - h_step, alpha),
                (h, alpha * 2**log_step),
                (h, alpha * 2**-log_step),
            )
            if not any(self.left and abs(e[0]) <= 1.0 and self.attempt(e) for e in neighbours):
                log_step, h_step = log_step / 2, h_step / 2

    def attempt(self, edit: Edit) -> bool:
        """Try an edit; whether it is allowed and the best so far."""
        if edit in self.seen:
            return False
        self.seen.add(edit)
        self.left -= 1
        self.bar.update()
        # Only an edit that would win needs its language-model score.
        rough = self.meter.rough(edit)
        if rough is None or not self._wins(rough):
            return False
        return self.take(edit)

    def take(self, edit: Edit) -> bool:
        """Measure an edit in full; whether it is allowed and the best so far."""
        measures = self.meter.full(edit)
        if measures is None:
            return False
        point = EditPoint(*edit, measures)
        self.tried.append(point)
        if not self._wins(measures) or not self.rule.allows(measures, self.meter.before):
            return False
        self.best = point
        return True

    def _wins(self, measures: EditMeasures) -> bool:
        best = self.meter.before if self.best is None else self.best.measures
        better = self.rule.value(measures) > self.rule.value(best)
        return better and self.rule.allows_mass(measures, self.meter.before)

    def choice(self) -> EditChoice | None:
        """The best edit; `None` if none is better than the base model."""
        if self.best is None:
            return None
        h, alpha, measures = self.best.feature_factor, self.best.step_size, self.best.measures
        return EditChoice(self.rule, h, alpha, self.meter.before, measures, self.tried)


def sweep(
    gradiend: GradiendModel,
    probe: EditProbe,
    feature_factors: Sequence[float],
    step_sizes: Sequence[float],
    *,
    progress: bool = True,
) -> list[EditPoint]:
    """Measure every combination of feature factors and step sizes.

    Args:
        gradiend: GRADIEND of one feature.
        probe: Texts to measure on.
        feature_factors: Values of h.
        step_sizes: Values of α; 0 is the base model.
        progress: Show a progress bar.

    Returns:
        One point per combination, step sizes running fastest; none for an edit that breaks the
        model.
    """
    with EditMeter(gradiend, probe) as meter:
        return measured(meter, [(h, a) for h in feature_factors for a in step_sizes], progress)


def measured(meter: EditMeter, edits: Iterable[Edit], progress: bool) -> list[EditPoint]:  # noqa: FBT001
    """All measures of some edits, without those that break the model."""
    points: list[EditPoint] = []
    for edit in tqdm(list(edits), desc="Sweeping edits", unit="edit", disable=not progress):
        measures = meter.full(edit)
        if measures is not None:
            points.append(EditPoint(*edit, measures))
    return points


def flat(point: EditPoint) -> dict[str, Any]:
    """A point as one flat dictionary, for tables and JSON."""
    content = asdict(point)
    return {**content.pop("measures"), **content}
