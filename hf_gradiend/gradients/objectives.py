"""What is differentiated: the log-probability of a word at the slot of a text."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradiend.data.collation import TargetBatch
from hf_gradiend.errors import BaseModelError


def target_log_probabilities(model: PreTrainedModel, batch: TargetBatch) -> Tensor:
    """Log-probability of each word at the slot of each text.

    The head runs at the read positions only. −log p is the token loss of the paper; a word of
    several tokens has the sum over its tokens, a text of several slots the mean over its slots.

    Args:
        model: Masked or causal language model with its head.
        batch: Texts, sites and scored tokens, on the model's device.

    Returns:
        Log-probabilities of shape `(texts, words)`, in nats, float32.
    """
    return score_terms(site_log_probabilities(model, batch), batch)


def site_log_probabilities(model: PreTrainedModel, batch: TargetBatch) -> Tensor:
    """Log-probabilities of the whole vocabulary at each site, of shape `(sites, vocabulary)`.

    Raises:
        BaseModelError: If the model's logits have another shape than its input asks for.
    """
    with head_at_sites(model, batch.site_rows, batch.site_positions) as at_sites:
        logits = model(**batch.inputs).logits
    if not at_sites:
        logits = logits[batch.site_rows, batch.site_positions].unsqueeze(0)
    if logits.shape[:2] != (1, batch.site_rows.numel()):
        raise BaseModelError(
            f"Expected logits at {batch.site_rows.numel()} positions from {type(model).__name__}, "
            f"but got shape {tuple(logits.shape)}. This architecture is not supported."
        )
    return logits[0].float().log_softmax(-1)  # (1, sites, vocabulary) -> (sites, vocabulary)


def score_terms(log_probabilities: Tensor, batch: TargetBatch) -> Tensor:
    """Weighted sum of the scored tokens of each word, `(sites, vocabulary)` → `(texts, words)`."""
    terms = log_probabilities[batch.term_sites, batch.term_tokens]  # -> (terms,)
    scores = terms.new_zeros(batch.n_texts * batch.n_words)
    scores = scores.index_add(0, batch.term_outputs, terms * batch.term_weights.to(terms.dtype))
    return scores.view(batch.n_texts, batch.n_words)


def side_scores(scores: Tensor, side: str) -> Tensor:
    """What a side's gradient is the gradient of, up to its sign: from (factual, counterfactual).

    Args:
        scores: Log-probabilities, or their derivatives, of shape `(texts, 2)`.
        side: `"factual"`, `"counterfactual"` or `"diff"` (factual − counterfactual).

    Returns:
        Token losses of shape `(texts,)`: minus the log-probability, or its difference.
    """
    factual, counterfactual = -scores[:, 0], -scores[:, 1]
    if side == "diff":
        return factual - counterfactual
    return factual if side == "factual" else counterfactual


@contextmanager
def head_at_sites(model: PreTrainedModel, rows: Tensor, positions: Tensor) -> Iterator[list[bool]]:
    """Let the head see the hidden states at some positions only.

    Every transformers language model hands its backbone's first output to its head, so a hook on
    the backbone serves all heads, with their own scalings and caps. On a vocabulary of 262k the
    head is most of a small model.

    Args:
        model: Language model.
        rows: Row of each position, of shape `(sites,)`.
        positions: Position in its row, of shape `(sites,)`.

    Yields:
        A list that is empty until the head has been kept to the positions, so that the logits have
        shape `(1, sites, vocabulary)`. It stays empty where the model has no separate backbone, or
        its head takes what a part of the backbone (OPT's decoder) gives: then the logits are those
        of the whole batch.
    """
    backbone, kept = model.base_model, []
    if backbone is model:
        yield kept
        return

    def keep_sites(_module: nn.Module, _inputs: object, output):  # noqa: ANN001, ANN202
        kept.append(True)
        hidden = output[0][rows, positions].unsqueeze(0)  # (rows, length, d) -> (1, sites, d)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    handle = backbone.register_forward_hook(keep_sites)
    try:
        yield kept
    finally:
        handle.remove()
