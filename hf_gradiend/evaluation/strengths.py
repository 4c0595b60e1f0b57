"""What a model says at each strength of an adapter."""

from collections.abc import Mapping, Sequence
from typing import cast

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.adapter.control import set_strength
from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.data.templates import picture_prompts
from hf_gradiend.evaluation.probe import SlotProbe
from hf_gradiend.evaluation.report import mean_of

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


def measure_strengths(
    adapter: GradiendAdapter,
    base_model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    words: tuple[Sequence[str], Sequence[str]],
    *,
    strengths: Sequence[float] = STRENGTHS,
    progress: bool = True,
) -> list[dict[str, object]]:
    """Probabilities of two classes' words for ten occupations, at each strength.

    Args:
        adapter: The adapter.
        base_model: Base model that it fits; left as it was.
        processing_class: The base model's tokenizer.
        words: The words of the + class and those of the − class.
        strengths: Strengths to measure at.
        progress: Show a progress bar.

    Returns:
        For each strength `{"strength": float, "occupations": [{"occupation": str, "p_plus": float,
        "p_minus": float}, …]}`, means over the sentences of an occupation.

    Raises:
        CompatibilityError: If the adapter was made for another base model.
    """  # noqa: DOC502 - raised by apply_to
    rows = cast("list[Mapping[str, str]]", list(picture_prompts()))
    names = [row["occupation"] for row in rows]
    probe = SlotProbe(rows, words, base_model, processing_class)
    measured: list[dict[str, object]] = []
    with adapter.applied(base_model) as model:
        bar = tqdm(strengths, desc="Dialling the strength", unit="strength", disable=not progress)
        for number in bar:
            set_strength(model, number)
            probabilities = probe.probabilities()
            means = [
                {"occupation": name, **mean_of(probabilities, names, name)}
                for name in dict.fromkeys(names)
            ]
            measured.append({"strength": number, "occupations": means})
    return measured
