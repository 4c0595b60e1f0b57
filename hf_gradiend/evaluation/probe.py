"""What a model says at slots that do not determine a class, and how well it models language."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import evaluation_mode, objective_of, pad_token_id_of
from hf_gradiend.data.collation import prepare_texts
from hf_gradiend.errors import DataError, NumericalError
from hf_gradiend.evaluation.language_model import LanguageModelProbe
from hf_gradiend.gradients.objectives import site_log_probabilities
from hf_gradiend.gradients.packing import passes_over
from hf_gradiend.metrics import Estimate, bootstrap_all


@dataclass(frozen=True)
class EditMeasures:
    """What a model says at slots that do not determine the class, and how well it models language.

    Args:
        imbalance: Mean (max − min) / sum of the classes' probabilities, in [0, 1]: for two classes
            |P₊ − P₋| / (P₊ + P₋); 0 is balanced. A text at which all are 0 counts as 1.
        mass: Mean sum of the classes' probabilities, in [0, 1].
        p_plus: Mean probability P₊ of the + class's words.
        p_minus: Mean probability P₋ of the − class's words.
        p_others: Mean probabilities of the words of further classes.
        lm_score: Language-model score on neutral text, in [0, 1]; higher is better.
        bpi: Balanced index LMS · mean[(1 − |P₊ − P₋|)(P₊ + P₋)], in [0, 1]; higher is more
            balanced.
        fpi: + class index LMS · mean[(1 − P₋) · P₊], in [0, 1].
        mpi: − class index LMS · mean[(1 − P₊) · P₋], in [0, 1].
        several_class_index: LMS · mean[(1 − (max − min)) · min] over all classes, in [0, 1]; higher
            is more balanced.

    References:
        Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 5 (BPI, FPI, MPI).
    """

    imbalance: float
    mass: float
    p_plus: float
    p_minus: float
    p_others: tuple[float, ...]
    lm_score: float
    bpi: float
    fpi: float
    mpi: float
    several_class_index: float

    @classmethod
    def of(cls, probabilities: Tensor, lm_score: float) -> "EditMeasures":
        """Measures from the classes' probabilities `(texts, classes)` and the LM score.

        The first class is +, the second −.
        """
        p = probabilities.double()
        plus, minus = p[:, 0], p[:, 1]
        total, spread = p.sum(1), p.amax(1) - p.amin(1)
        return cls(
            # 0/0 would be NaN, which compares as better than everything.
            imbalance=float((spread / total).masked_fill(total == 0, 1.0).mean()),
            mass=float(total.mean()),
            p_plus=float(plus.mean()),
            p_minus=float(minus.mean()),
            p_others=tuple(p[:, 2:].mean(0).tolist()),
            lm_score=lm_score,
            bpi=lm_score * float(((1 - (plus - minus).abs()) * (plus + minus)).mean()),
            fpi=lm_score * float(((1 - minus) * plus).mean()),
            mpi=lm_score * float(((1 - plus) * minus).mean()),
            several_class_index=lm_score * float(((1 - spread) * p.amin(1)).mean()),
        )

    def with_lm_score(self, lm_score: float) -> "EditMeasures":
        """Measures that were taken with a language-model score of 1, with another one."""
        indices = ("bpi", "fpi", "mpi", "several_class_index")
        scaled = {name: lm_score * getattr(self, name) for name in indices}
        return replace(self, lm_score=lm_score, **scaled)


class SlotProbe:
    """Texts with a slot, tokenised once, at which any number of models or edits are read.

    Args:
        prompts: Rows with `text`, whose slot does not determine the class.
        words: The words of each class: of the + class, of the − class, and of any others.
        base_model: Base model, read as its weights stand.
        processing_class: Its tokenizer.
        batch_size: Prompts per forward pass.

    Raises:
        DataError: If a class has no word that is a single token.
    """

    def __init__(
        self,
        prompts: Sequence[Mapping[str, str]],
        words: Sequence[Sequence[str]],
        base_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
    ) -> None:
        self.model = base_model
        objective = objective_of(base_model)
        self.token_ids = [spellings(group, processing_class) for group in words]
        # One token is read at the slot, so that a word of one token has to stand there.
        whole = {str(processing_class.decode([i])).strip().casefold() for i in self.token_ids[0]}
        word = next(word for word in words[0] if word.strip().casefold() in whole)
        rows = [{"text": row["text"], "word": word} for row in prompts]
        texts = prepare_texts(rows, processing_class, objective, words=("word",))
        self.n_texts = texts.n_rows
        self.rows_read = [text.index for text in texts]
        self.texts = texts
        self.pad_token_id = pad_token_id_of(processing_class)
        self.batch_size = batch_size

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """Each class's probability at the slot of every text; mean over slots.

        Returns:
            `(texts, classes)` float32 on the CPU; texts without room for their target are left out.

        Raises:
            NumericalError: If a probability is NaN.
        """
        found = torch.full((self.n_texts, len(self.token_ids)), torch.nan)
        with evaluation_mode(self.model):
            for group, batch in passes_over(
                self.model, self.texts, pad_token_id=self.pad_token_id, batch_size=self.batch_size
            ):
                probability = site_log_probabilities(self.model, batch).exp()
                masses = torch.stack([probability[:, ids].sum(1) for ids in self.token_ids], 1)
                weighted = masses[batch.term_sites] * batch.term_weights[:, None]
                sums = masses.new_zeros(batch.n_texts, len(self.token_ids))
                sums.index_add_(0, batch.term_outputs, weighted)
                found[[text.index for text in group]] = sums.cpu()
        read = found[self.rows_read]
        if not bool(torch.isfinite(read).all()):
            raise NumericalError("Expected finite probabilities at the slots, but got NaN.")
        return read


class EditProbe(SlotProbe):
    """Texts with a slot and neutral texts, on which any number of edits are measured.

    Args:
        prompts: As in `SlotProbe`.
        words: As in `SlotProbe`.
        neutral_texts: Texts for the language-model score.
        base_model: Base model, measured as its weights stand.
        processing_class: Its tokenizer.
        batch_size: Prompts per forward pass.

    Raises:
        DataError: If a class has no word that is a single token, or there is no neutral text.
    """

    def __init__(
        self,
        prompts: Sequence[Mapping[str, str]],
        words: Sequence[Sequence[str]],
        neutral_texts: Sequence[str],
        base_model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
    ) -> None:
        super().__init__(prompts, words, base_model, processing_class, batch_size=batch_size)
        objective = objective_of(base_model)
        self.language = LanguageModelProbe(neutral_texts, processing_class, objective)

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
        probabilities: Of the classes at the slots, `(texts, classes)`.
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
        and `ratio` (after / before, paired by text). A measure that is 0 before is left out: it
        has no ratio.
    """
    return {
        name: bootstrap_all(
            lambda texts, name=name: _before_and_after(before, after, name, texts),
            before.n_texts(name),
        )
        for name in ("imbalance", "mass", "p_plus", "p_minus", "lm_score")
        if before.value(name, torch.arange(before.n_texts(name)))
    }


def _before_and_after(
    before: ProbeReading, after: ProbeReading, name: str, texts: Tensor
) -> dict[str, float]:
    was, is_now = before.value(name, texts), after.value(name, texts)
    if was == 0.0:
        raise ValueError(f"Expected a {name} above 0 before the edit.")
    return {"before": was, "after": is_now, "ratio": is_now / was}


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
