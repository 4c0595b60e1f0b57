"""CrowS-Pairs in lm-evaluation-harness and here, on a real causal model and all published pairs.

The model is not among the shared ones: SMOLLM2 names the folder of SmolLM2-135M-Instruct.
"""

import logging
import os
from pathlib import Path

import pytest
import torch

from hf_gradiend.base_models import load_base_model
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.bias.suite import run_benchmark
from hf_gradiend.evaluation.harness import evaluate_with_harness

BIAS = Path(__file__).parents[2].parent / "shared" / "data" / "bias"


@pytest.mark.slow
def test_the_harness_and_our_sentence_score_agree_on_all_published_pairs():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    if not (BIAS / "crows_pairs.csv").is_file():
        pytest.skip(f"crows_pairs.csv is not at {BIAS}")
    if not Path(os.environ.get("SMOLLM2", "")).joinpath("config.json").is_file():
        pytest.skip("SMOLLM2 does not name the folder of SmolLM2-135M-Instruct")
    model, tokenizer = load_base_model(os.environ["SMOLLM2"])

    theirs = evaluate_with_harness(model, tokenizer, ["crows_pairs"], data_dir=BIAS, progress=False)
    ours = run_benchmark(CrowsPairs(), model, tokenizer, BIAS, progress=False)

    (score,) = [score for score in theirs.scores if score.metric == "pct_stereotype"]
    sentence = ours.score()["sentence"]
    prefers = 100.0 * (ours.values[:, -2] > ours.values[:, -1]).double()
    logging.getLogger(__name__).info(
        "harness %.4f ± %.4f, ours %.4f, pairs that differ: %d of %d",
        score.value, score.stderr, sentence, (score.items != prefers).sum(), score.n,
    )  # fmt: skip
    assert score.n == ours.n == 1508
    assert score.value == pytest.approx(sentence, abs=0.1)
    assert torch.equal(score.items, prefers)  # each pair alike
    # The control: both would agree on 50 where nothing is told apart. Measured: 55.57 % ± 1.28.
    assert score.value > 50.0 + 3.0 * score.stderr
