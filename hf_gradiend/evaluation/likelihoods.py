"""Probabilities of tokens in context, many at once: what the bias benchmarks are made of.

A *reading* is one input and the tokens to score in it. A masked model needs one reading per scored
token (with that token masked), a causal model one per text. Readings of the same input share a
row; rows are sorted by length, so that little is padded, and the head runs at the scored positions
alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import evaluation_mode, objective_of, pad_token_id_of
from hf_gradiend.data.collation import pad_rows
from hf_gradiend.errors import DataError, NumericalError
from hf_gradiend.gradients.objectives import head_at_sites

TOKENS_PER_BATCH = {"masked": 4096, "causal": 1024}  # a causal model's head runs at every token


@dataclass(frozen=True)
class Reading:
    """One input of a model and the tokens to score in it.

    Args:
        input_ids: Input.
        sites: Pairs of a position in the input whose logits are read, and the token scored there.
    """

    input_ids: tuple[int, ...]
    sites: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenisedText:
    """A text as tokens.

    Args:
        input_ids: Input, with special tokens.
        ordinary: Positions of the text's own tokens.
        offsets: For each position, where its characters begin and end in the text.
    """

    input_ids: tuple[int, ...]
    ordinary: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The text's own tokens."""
        return tuple(self.input_ids[position] for position in self.ordinary)


class Likelihoods:
    """Log-probabilities of tokens under a masked or causal language model.

    Args:
        model: The model; left as it was.
        tokenizer: Its tokenizer.
        tokens_per_batch: Largest number of tokens of one forward pass; `None` for 4,096 (masked)
            or 1,024 (causal).
        progress: Show progress bars.

    Raises:
        BaseModelError: If the model has no language-model head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokens_per_batch: int | None = None,
        progress: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.objective = objective_of(model)
        self.tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH[self.objective]

    @cached_property
    def special_id(self) -> int:
        """The mask token, or the token before a causal model's text, whose first token it predicts.

        Raises:
            DataError: If a masked model's tokenizer has no mask token, or a causal one's neither a
                beginning-of-sequence nor an end-of-sequence token.
        """
        special = self.tokenizer.mask_token_id
        if self.objective == "causal":
            special = self.tokenizer.bos_token_id
            special = self.tokenizer.eos_token_id if special is None else special
        if not isinstance(special, int):
            what = "a mask token" if self.objective == "masked" else "a token that begins or ends"
            raise DataError(f"Expected a tokenizer with {what}; it has none.")
        return special

    @property
    def is_masked(self) -> bool:
        """Whether the model predicts masked tokens."""
        return self.objective == "masked"

    def tokenised(self, text: str, longest: int | None = None) -> TokenisedText:
        """A text as tokens: with the tokenizer's special tokens for a masked model.

        A causal model's text begins with the token that begins a document, once.

        Args:
            text: The text.
            longest: Number of its own tokens after which it is cut; `None` for all.

        Raises:
            DataError: If the text has no tokens, or more than the model can take.
        """
        encoded = self.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=self.is_masked
        )
        ids: list[int] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
        offsets = [tuple(pair) for pair in encoded["offset_mapping"]]  # pyright: ignore[reportGeneralTypeIssues]
        special = set(self.tokenizer.all_special_ids) if self.is_masked else set()
        if not self.is_masked:
            ids, offsets = [self.special_id, *ids], [(0, 0), *offsets]
        ordinary = [i for i, token in enumerate(ids) if token not in special]
        ordinary = ordinary if self.is_masked else ordinary[1:]
        if longest is not None and len(ordinary) > longest:
            cut, end = ordinary[longest], ordinary[-1] + 1  # the closing special tokens stay
            ids, offsets = ids[:cut] + ids[end:], offsets[:cut] + offsets[end:]
            ordinary = ordinary[:longest]
        positions = getattr(self.model.config, "max_position_embeddings", None) or len(ids)
        limit = min(positions, self.tokenizer.model_max_length)  # RoBERTa's counts two more
        if not ordinary or len(ids) > limit:
            raise DataError(
                f"Expected texts of 1 to {limit:,} tokens, but {text[:60]!r} has {len(ids):,}."
            )
        return TokenisedText(tuple(ids), tuple(ordinary), tuple(offsets))  # pyright: ignore[reportArgumentType]

    def readings(
        self, text: TokenisedText, positions: Sequence[int] | None = None
    ) -> list[Reading]:
        """What has to be read to score tokens of a text.

        Args:
            text: The text.
            positions: Positions in `input_ids` to score; `None` for all of the text's own.
        """
        wanted = text.ordinary if positions is None else tuple(positions)
        if not self.is_masked:
            # transformers' logits at position i − 1 predict the token at i.
            return [Reading(text.input_ids, tuple((i - 1, text.input_ids[i]) for i in wanted))]
        return [self._masked(text.input_ids, position) for position in wanted]

    def _masked(self, ids: tuple[int, ...], position: int) -> Reading:
        masked = (*ids[:position], self.special_id, *ids[position + 1 :])
        return Reading(masked, ((position, ids[position]),))

    def sentence_scores(self, groups: Sequence[Sequence[str]], description: str) -> Tensor:
        """(Pseudo-)log-likelihoods of groups of sentences.

        A masked model predicts each token from all the others.

        Args:
            groups: As many sentences in each.
            description: What the progress bar says.

        Returns:
            Nats, float64 `(groups, sentences of a group)`.
        """
        readings = [self.readings(self.tokenised(text)) for group in groups for text in group]
        found = self.log_probabilities(readings, description)
        return torch.stack([p.sum() for p in found]).view(len(groups), -1)

    def log_probabilities(
        self, texts: Sequence[Sequence[Reading]], description: str
    ) -> list[Tensor]:
        """Log-probabilities of the scored tokens of many texts.

        Args:
            texts: The readings of each text.
            description: What the progress bar says.

        Returns:
            For each text its log-probabilities in nats, float64 `(scored tokens,)`, in the order
            of its readings. A text's numbers do not depend on the others.

        Raises:
            NumericalError: If a logit is NaN.
        """  # noqa: DOC502 - raised by _score
        rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for readings in texts:
            for reading in readings:
                rows.setdefault(reading.input_ids, []).extend(reading.sites)
        wanted = {ids: tuple(dict.fromkeys(sites)) for ids, sites in rows.items()}
        found: dict[tuple[tuple[int, ...], tuple[int, int]], float] = {}
        with (
            evaluation_mode(self.model),
            tqdm(
                total=len(wanted), desc=description, unit="input", disable=not self.progress
            ) as bar,
        ):
            for batch in self._batches(list(wanted)):
                sites = [(row, *site) for row, ids in enumerate(batch) for site in wanted[ids]]
                values = self._score(batch, sites).tolist()
                for (row, position, token), value in zip(sites, values, strict=True):
                    found[batch[row], (position, token)] = value
                bar.update(len(batch))
        return [
            torch.tensor(
                [found[reading.input_ids, site] for reading in readings for site in reading.sites],
                dtype=torch.float64,
            )
            for readings in texts
        ]

    def _batches(self, rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Rows of similar length, the longest first, each batch within the budget of tokens."""
        batches: list[list[tuple[int, ...]]] = []
        for ids in sorted(rows, key=len, reverse=True):
            if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > self.tokens_per_batch:
                batches.append([])
            batches[-1].append(ids)
        return batches

    @torch.no_grad()
    def _score(
        self, batch: Sequence[tuple[int, ...]], sites: Sequence[tuple[int, int, int]]
    ) -> Tensor:
        device = self.model.device
        ids, mask = pad_rows(batch, pad_token_id_of(self.tokenizer))
        rows, positions, tokens = torch.tensor(sites).unbind(1)
        rows, positions = rows.to(device), positions.to(device)
        with head_at_sites(self.model, rows, positions) as at_sites:
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        logits = (logits[0] if at_sites else logits[rows, positions]).float()  # (sites, vocabulary)
        chosen = logits.gather(1, tokens.to(device)[:, None]).squeeze(1)
        scores = chosen - logits.logsumexp(1)
        if not bool(torch.isfinite(scores).all()):
            raise NumericalError("Expected finite logits, but got NaN. Is the model broken?")
        return scores.cpu()
