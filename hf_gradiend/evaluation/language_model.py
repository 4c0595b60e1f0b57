"""How well a model still predicts ordinary text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import (
    Objective,
    check_tokenizer,
    evaluation_mode,
    pad_token_id_of,
)
from hf_gradiend.data.collation import DEFAULT_MAX_LENGTH, pad_rows
from hf_gradiend.errors import DataError, NumericalError
from hf_gradiend.gradients.objectives import head_at_sites


@dataclass(frozen=True)
class _ScoredBatch:
    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    positions: Tensor
    labels: Tensor
    first_text: int


class LanguageModelProbe:
    """Neutral texts, tokenised once, on which any number of models (or edits) are scored.

    Special tokens are never masked and never scored.

    Args:
        texts: Neutral texts.
        tokenizer: Tokenizer of the models.
        objective: `"masked"` or `"causal"`.
        batch_size: Texts per forward pass; few, since the logits of all their tokens are held.
        max_length: Longest input in tokens; the rest of a text is not read.
        mask_share: Share of the tokens to mask for a masked model, in (0, 1).
        n_draws: Number of times a masked model reads each text, each time with other masks. One
            draw over a hundred sentences moves in steps of about 1 %, the size of what is to be
            seen.
        seed: Seed of the masks.

    Raises:
        DataError: If no token of the texts can be scored, or a masked model has no mask token.
    """

    def __init__(  # noqa: PLR0913 - the texts, how to read them, and how to draw the masks
        self,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        objective: Objective,
        *,
        batch_size: int = 8,
        max_length: int = DEFAULT_MAX_LENGTH,
        mask_share: float = 0.15,
        n_draws: int = 4,
        seed: int = 0,
    ) -> None:
        check_tokenizer(tokenizer)
        if objective == "masked" and tokenizer.mask_token_id is None:
            raise DataError(
                "Expected a tokenizer with a mask token for a masked model; it has none."
            )
        self.objective: Objective = objective
        generator = torch.Generator().manual_seed(seed)
        encoded = [
            tokenizer(text, truncation=True, max_length=min(max_length, tokenizer.model_max_length))
            for text in texts
        ]
        rows = sorted((row["input_ids"] for row in encoded), key=len, reverse=True)
        # Drawn text by text, so that the masks do not depend on batches and padding.
        draws = [torch.rand(n_draws, len(row), generator=generator) for row in rows]
        special_ids = torch.tensor(tokenizer.all_special_ids)
        mask_token_id = cast("int", tokenizer.mask_token_id)
        self.batches: list[_ScoredBatch] = []
        self.n_texts = len(rows)
        for start in range(0, len(rows), batch_size):
            batch = pad_rows(rows[start : start + batch_size], pad_token_id_of(tokenizer))
            ordinary = (batch[1] == 1) & ~torch.isin(batch[0], special_ids)
            if objective == "causal":
                scored = [self._causal(batch, ordinary, start)]
            else:
                drawn = torch.ones(n_draws, *ordinary.shape)
                for row, draw in enumerate(draws[start : start + batch_size]):
                    drawn[:, row, : draw.shape[1]] = draw
                scored = [
                    self._masked(batch, (draw < mask_share) & ordinary, mask_token_id, start)
                    for draw in drawn
                ]
            self.batches += [part for part in scored if part.labels.numel()]
        self.n_tokens = sum(batch.labels.numel() for batch in self.batches)
        if not self.n_tokens:
            raise DataError(
                f"Expected neutral texts with tokens to score, but the {len(texts):,} texts have "
                f"none."
            )

    def score(self, model: PreTrainedModel) -> float:
        """Language-model score of a model, in [0, 1]; higher is better.

        Args:
            model: Masked or causal language model; left as it was.

        Returns:
            Masked: accuracy at the masked tokens. Causal: 1/(1 + NLL), NLL in nats per token.

        Raises:
            NumericalError: If the logits are NaN.

        References:
            Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 5 (decoder).
        """  # noqa: DOC502 - raised by sums_by_text
        return self.score_of(self.sums_by_text(model))

    def score_of(self, sums: Tensor) -> float:
        """Score of sums and counts `(texts, 2)` as `sums_by_text` gives them, of any of the texts.

        Args:
            sums: One row per text; a resample of the texts is one of the rows.

        Raises:
            ValueError: If these texts have no scored token.
        """
        total, n_tokens = sums.sum(0).tolist()
        if not n_tokens:
            raise ValueError("Expected texts with tokens to score.")
        mean = total / n_tokens
        return mean if self.objective == "masked" else 1.0 / (1.0 + mean)

    @torch.no_grad()
    def sums_by_text(self, model: PreTrainedModel) -> Tensor:
        """Hits at masked tokens, or the negative log-likelihood in nats, and the tokens scored.

        Args:
            model: Masked or causal language model; left as it was.

        Returns:
            `(texts, 2)` float64 on the CPU, in the probe's own order.

        Raises:
            NumericalError: If the logits are NaN.
        """
        sums = torch.zeros(self.n_texts, 2, dtype=torch.float64)
        with evaluation_mode(model):
            for batch in self.batches:
                logits = self._logits(model, batch)
                labels = batch.labels.to(logits.device)
                best, found = logits.max(-1)  # NaN wins over every number
                if not bool(torch.isfinite(best).all()):
                    raise NumericalError("Expected finite logits on neutral text, but got NaN.")
                if self.objective == "masked":
                    values = (found == labels).double()
                else:
                    values = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                rows = torch.stack([values.double().cpu(), torch.ones(len(values))], 1)
                sums.index_add_(0, batch.first_text + batch.rows, rows.double())
        return sums

    @staticmethod
    def _logits(model: PreTrainedModel, batch: _ScoredBatch) -> Tensor:
        device = model.device
        rows, positions = batch.rows.to(device), batch.positions.to(device)
        with head_at_sites(model, rows, positions) as at_sites:
            logits = model(
                input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
            ).logits
        return (logits[0] if at_sites else logits[rows, positions]).float()  # (tokens, vocabulary)

    @staticmethod
    def _causal(batch: tuple[Tensor, Tensor], ordinary: Tensor, first: int) -> _ScoredBatch:
        rows, positions = ordinary[:, 1:].nonzero(as_tuple=True)
        return _ScoredBatch(*batch, rows, positions, batch[0][rows, positions + 1], first)

    @staticmethod
    def _masked(
        batch: tuple[Tensor, Tensor], chosen: Tensor, mask_token_id: int, first: int
    ) -> _ScoredBatch:
        rows, positions = chosen.nonzero(as_tuple=True)
        labels = batch[0][rows, positions]
        return _ScoredBatch(
            batch[0].masked_fill(chosen, mask_token_id), batch[1], rows, positions, labels, first
        )
