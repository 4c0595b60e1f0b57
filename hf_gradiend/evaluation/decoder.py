"""What an edit does to the words at a slot, and the choice of the edit."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import evaluation_mode, objective_of, pad_token_id_of
from hf_gradiend.data.collation import batches_by_length, collate, prepare_texts
from hf_gradiend.edits import WeightEditor
from hf_gradiend.errors import DataError, NumericalError
from hf_gradiend.evaluation.language_model import LanguageModelProbe
from hf_gradiend.gradients.objectives import site_log_probabilities
from hf_gradiend.metrics import Estimate, bootstrap
from hf_gradiend.modeling_gradiend import GradiendModel


@dataclass(frozen=True)
class EditMeasures:
    """What a model says at slots that do not determine the class, and how well it models language.

    Args:
        imbalance: Mean |P₊ − P₋| / (P₊ + P₋), in [0, 1]; 0 is balanced. A text at which both are 0
            counts as 1.
        mass: Mean P₊ + P₋, in [0, 1].
        p_plus: Mean probability P₊ of the + class's words.
        p_minus: Mean probability P₋ of the − class's words.
        lm_score: Language-model score on neutral text, in [0, 1]; higher is better.
        bpi: Balanced index LMS · mean[(1 − |P₊ − P₋|)(P₊ + P₋)], in [0, 1]; higher is more
            balanced.
        fpi: + class index LMS · mean[(1 − P₋) · P₊], in [0, 1].
        mpi: − class index LMS · mean[(1 − P₊) · P₋], in [0, 1].

    References:
        Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 5 (BPI, FPI, MPI).
    """

    imbalance: float
    mass: float
    p_plus: float
    p_minus: float
    lm_score: float
    bpi: float
    fpi: float
    mpi: float

    @classmethod
    def of(cls, probabilities: Tensor, lm_score: float) -> "EditMeasures":
        """Measures from probabilities `(texts, 2)` of the + and − class and the LM score."""
        plus, minus = probabilities.double().unbind(1)
        mass = plus + minus
        return cls(
            # 0/0 would be NaN, which compares as better than everything.
            imbalance=float(((plus - minus).abs() / mass).masked_fill(mass == 0, 1.0).mean()),
            mass=float(mass.mean()),
            p_plus=float(plus.mean()),
            p_minus=float(minus.mean()),
            lm_score=lm_score,
            bpi=lm_score * float(((1 - (plus - minus).abs()) * mass).mean()),
            fpi=lm_score * float(((1 - minus) * plus).mean()),
            mpi=lm_score * float(((1 - plus) * minus).mean()),
        )


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
        feature_factor: h of the edit.
        step_size: α of the edit.
        before: The base model on the texts of the choice.
        after: The edited model on the same texts.
        tried: The edits that were measured in full, in order: each was better than the best
            before it.
    """

    feature_factor: float
    step_size: float
    before: EditMeasures
    after: EditMeasures
    tried: list[EditPoint]


class EditProbe:
    """Slots and neutral texts, tokenised once, on which any number of edits are measured.

    Args:
        prompts: Rows with `text`, whose slot does not determine the class.
        words: The words of the + class and those of the − class.
        neutral_texts: Texts for the language-model score.
        base_model: Base model (for its objective).
        processing_class: Its tokenizer.
        batch_size: Prompts per forward pass.

    Raises:
        DataError: If a class has no word that is a single token.
    """

    def __init__(
        self,
        prompts: Sequence[Mapping[str, str]],
        words: tuple[Sequence[str], Sequence[str]],
        neutral_texts: Sequence[str],
        base_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
    ) -> None:
        self.model = base_model
        objective = objective_of(base_model)
        self.token_ids = [spellings(group, processing_class) for group in words]
        rows = [{"text": row["text"], "word": words[0][0]} for row in prompts]
        texts = prepare_texts(rows, processing_class, objective, words=("word",))
        self.n_texts = texts.n_rows
        self.rows_read = [text.index for text in texts]
        self.batches = [
            ([text.index for text in group], collate(group, pad_token_id_of(processing_class)))
            for group in batches_by_length(texts, batch_size)
        ]
        self.language = LanguageModelProbe(neutral_texts, processing_class, objective)

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """P₊ and P₋ at the slot of every text, `(texts, 2)` float32 on the CPU; mean over slots.

        Texts without room for their target are left out.

        Raises:
            NumericalError: If a probability is NaN.
        """
        found = torch.full((self.n_texts, 2), torch.nan)
        with evaluation_mode(self.model):
            for indices, batch in self.batches:
                on_device = batch.to(self.model.device)
                probability = site_log_probabilities(self.model, on_device).exp()
                masses = torch.stack([probability[:, ids].sum(1) for ids in self.token_ids], 1)
                weighted = masses[on_device.term_sites] * on_device.term_weights[:, None]
                sums = masses.new_zeros(batch.n_texts, 2)
                sums.index_add_(0, on_device.term_outputs, weighted)
                found[indices] = sums.cpu()
        read = found[self.rows_read]
        if not bool(torch.isfinite(read).all()):
            raise NumericalError("Expected finite probabilities at the slots, but got NaN.")
        return read

    def measure(self) -> EditMeasures:
        """Measures of the model as its weights stand now."""
        return self.read().measures

    def read(self) -> "ProbeReading":
        """What the model says as its weights stand now, text by text."""
        return ProbeReading(
            self.probabilities(), self.language.sums_by_text(self.model), self.language
        )


@dataclass(frozen=True, eq=False)
class ProbeReading:
    """What one model said on a probe's texts.

    Args:
        probabilities: P₊ and P₋ at the slots, `(texts, 2)`.
        language_sums: As `LanguageModelProbe.sums_by_text` gives them, `(neutral texts, 2)`.
        language: The probe of neutral texts.
    """

    probabilities: Tensor
    language_sums: Tensor
    language: LanguageModelProbe

    @property
    def measures(self) -> EditMeasures:
        """The measures of all texts."""
        return EditMeasures.of(self.probabilities, self.language.score_of(self.language_sums))

    def value(self, name: str, texts: Tensor) -> float:
        """One measure on a resample: of neutral texts for `"lm_score"`, else of the slots."""
        if name == "lm_score":
            return self.language.score_of(self.language_sums[texts])
        return getattr(EditMeasures.of(self.probabilities[texts], 1.0), name)

    def n_texts(self, name: str) -> int:
        """Number of texts that a measure is taken on."""
        return len(self.language_sums) if name == "lm_score" else len(self.probabilities)


def compared(before: ProbeReading, after: ProbeReading) -> dict[str, dict[str, Estimate]]:
    """Each measure before and after with its 95 % interval, and the ratio on the same resamples.

    Args:
        before: Reading of one model.
        after: Reading of another on the same probe.

    Returns:
        For `imbalance`, `mass`, `p_plus`, `p_minus` and `lm_score` the estimates `before`, `after`
        and `ratio` (after / before, paired by text).
    """
    found: dict[str, dict[str, Estimate]] = {}
    for name in ("imbalance", "mass", "p_plus", "p_minus", "lm_score"):
        n = before.n_texts(name)
        found[name] = {
            "before": bootstrap(lambda texts, name=name: before.value(name, texts), n),
            "after": bootstrap(lambda texts, name=name: after.value(name, texts), n),
            "ratio": bootstrap(lambda texts, name=name: _ratio(before, after, name, texts), n),
        }
    return found


def _ratio(before: ProbeReading, after: ProbeReading, name: str, texts: Tensor) -> float:
    base = before.value(name, texts)
    if base == 0.0:
        raise ValueError(f"Expected a {name} above 0 before the edit.")
    return after.value(name, texts) / base


def spellings(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens that spell one of the words: with and without space, any capitals.

    Args:
        words: Words of one class.
        tokenizer: Tokenizer of the base model.

    Raises:
        DataError: If no token spells any of them.
    """
    wanted = {word.strip().casefold() for word in words}
    ids = list(range(len(tokenizer)))
    found = [
        i
        for i, text in zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True)
        if text.strip().casefold() in wanted
    ]
    if not found:
        raise DataError(
            f"Expected a class with a word that is a single token of this tokenizer, but none of "
            f"{sorted(wanted)} is."
        )
    return found


def choose_edit(
    gradiend: GradiendModel,
    probe: EditProbe,
    *,
    lm_floor: float = 0.99,
    mass_floor: float = 0.75,
    max_trials: int = 48,
    progress: bool = True,
) -> EditChoice | None:
    """The edit (h, α) with the least imbalance that keeps the model's abilities.

    A bracketed search: α doubles, with either sign at h = 0, from 1e-5 of the weights' norm until a
    limit is broken or it no longer helps; from the best point a compass search over log|α| and h
    halves its steps until they are small. Edits are applied in place and undone bit for bit.

    Args:
        gradiend: GRADIEND of one feature.
        probe: Texts to choose on; judge the edit on others.
        lm_floor: Least language-model score, relative to the base model's.
        mass_floor: Least probability mass of the two classes' words, likewise.
        max_trials: Largest number of edits to try.
        progress: Show a progress bar.

    Returns:
        The chosen edit; `None` if no edit within the limits is better than the base model.

    Raises:
        CompatibilityError: If the GRADIEND was made for another base model.
        NumericalError: If the GRADIEND or the base model holds NaN.
    """  # noqa: DOC502 - raised by what it calls
    before = probe.measure()
    with (
        WeightEditor(gradiend, probe.model) as editor,
        tqdm(total=max_trials, desc="Choosing the edit", unit="edit", disable=not progress) as bar,
    ):
        search = _EditSearch(
            probe,
            editor,
            before,
            (lm_floor * before.lm_score, mass_floor * before.mass),
            max_trials,
            bar,
        )
        search.run(_first_step(gradiend, editor))
    best = search.best
    if best is None:
        return None
    return EditChoice(best.feature_factor, best.step_size, before, best.measures, search.tried)


class _EditSearch:
    """State of one `choose_edit`: the best edit so far and what is left of the budget."""

    def __init__(
        self,
        probe: EditProbe,
        editor: WeightEditor,
        before: EditMeasures,
        floors: tuple[float, float],
        max_trials: int,
        bar: tqdm,
    ) -> None:
        self.probe, self.editor, self.before = probe, editor, before
        self.lm_floor, self.mass_floor = floors
        self.left = max_trials
        self.bar = bar
        self.best: EditPoint | None = None
        self.tried: list[EditPoint] = []
        self.seen: set[tuple[float, float]] = set()

    def run(self, first_step: float) -> None:
        for sign in (+1.0, -1.0):
            self._bracket(sign * first_step)
        log_step, h_step = 0.5, 0.1
        while self.best is not None and self.left and h_step > 0.01:
            h, alpha = self.best.feature_factor, self.best.step_size
            neighbours = (
                (h + h_step, alpha),
                (h - h_step, alpha),
                (h, alpha * 2**log_step),
                (h, alpha * 2**-log_step),
            )
            if not any(self.left and abs(h) <= 1.0 and self.attempt(h, a) for h, a in neighbours):
                log_step, h_step = log_step / 2, h_step / 2

    def _bracket(self, step: float) -> None:
        """Double the step at h = 0 for as long as it helps; twice in a row it may not."""
        failed = 0
        while self.left and failed < 2:
            failed = 0 if self.attempt(0.0, step) else failed + 1
            step *= 2.0

    def attempt(self, h: float, alpha: float) -> bool:
        """Try an edit; whether it is within the limits and the best so far."""
        if (h, alpha) in self.seen:
            return False
        self.seen.add((h, alpha))
        self.left -= 1
        self.bar.update()
        self.editor.apply(h, alpha)
        try:
            return self._is_better(h, alpha)
        except NumericalError:  # an edit that breaks the model is out of the limits
            return False

    def _is_better(self, h: float, alpha: float) -> bool:
        probabilities = self.probe.probabilities()
        rough = EditMeasures.of(probabilities, self.before.lm_score)
        best = self.before if self.best is None else self.best.measures
        # The language-model score is the dearer half: only an edit that would win needs it.
        if rough.imbalance >= best.imbalance or rough.mass < self.mass_floor:
            return False
        lm_score = self.probe.language.score(self.probe.model)
        point = EditPoint(h, alpha, EditMeasures.of(probabilities, lm_score))
        self.tried.append(point)
        if lm_score < self.lm_floor:
            return False
        self.best = point
        return True


def _first_step(gradiend: GradiendModel, editor: WeightEditor) -> float:
    """Step size at which the update has 1e-5 of the selected weights' norm."""
    weights = sum(float(t.float().square().sum()) for t in editor.originals.values())
    update = sum(
        float(gradiend.decoder.bias.at(name).detach().float().square().sum())
        for name in gradiend.names
    )
    return 1e-5 * (weights / update) ** 0.5 if update else 1e-5


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
        One point per combination, step sizes running fastest.
    """
    points: list[EditPoint] = []
    grid = [(h, alpha) for h in feature_factors for alpha in step_sizes]
    with WeightEditor(gradiend, probe.model) as editor:
        for h, alpha in tqdm(grid, desc="Sweeping edits", unit="edit", disable=not progress):
            editor.apply(h, alpha)
            points.append(EditPoint(h, alpha, probe.measure()))
    return points


def flat(point: EditPoint) -> dict[str, float]:
    """A point as one flat dictionary, for tables and JSON."""
    content = asdict(point)
    return {**content.pop("measures"), **content}
