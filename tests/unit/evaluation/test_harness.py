import copy
import csv
import hashlib
import logging
import math
import random
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_gradiend.adapter.control import get_strength, set_strength
from hf_gradiend.errors import BaseModelError, ConfigError, DataError, NumericalError
from hf_gradiend.evaluation import harness
from hf_gradiend.evaluation.bias.benchmark import BenchmarkResult
from hf_gradiend.evaluation.bias.comparison import compared
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.harness import (
    HarnessResult,
    HarnessScore,
    check_harness,
    compared_in_harness,
    evaluate_with_harness,
)
from hf_gradiend.evaluation.likelihoods import Likelihoods

# In the form of CrowS-Pairs, with the words of the tiny tokenizers.
PAIRS = [
    ("The nurse said that she was late.", "The nurse said that he was late.", "gender"),
    ("The doctor said that he was tired.", "The doctor said that she was tired.", "gender"),
    ("Anna was late because she was tired.", "Paul was late because he was tired.", "gender"),
    ("Paul, my doctor, was late.", "Anna, my doctor, was late.", "gender"),
    ("The nurse was tired.", "My doctor was tired.", "age"),
    ("He said it.", "The nurse said that it was her.", "age"),
]


@pytest.fixture
def lm_eval(monkeypatch):
    module = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    # It asks `pip list` and `git` about the machine after each run, a second each time.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Pairs of our own in place of the published ones."""
    file = tmp_path / "crows_pairs.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        writer.writerows([i, more, less, "stereo", t] for i, (more, less, t) in enumerate(PAIRS))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(CrowsPairs, "files", {"crows_pairs.csv": digest})
    return tmp_path


@pytest.fixture
def run(lm_eval, folder):
    """Runs CrowS-Pairs, or other tasks, in the harness."""
    assert lm_eval.__version__

    def run(model, tokenizer, tasks=("crows_pairs",), **options) -> HarnessResult:
        return evaluate_with_harness(
            model, tokenizer, tasks, data_dir=folder, progress=False, **options
        )

    return run


@pytest.fixture
def lm(make_lm):
    return make_lm("llama")


@pytest.fixture
def adapter(lm, gradiend_for):
    return gradiend_for(lm.model).to_adapter(0.4, 0.02)


def of(result: HarnessResult, metric: str) -> HarnessScore:
    (found,) = [score for score in result.scores if score.metric == metric]
    return found


def same_items(one: HarnessResult, other: HarnessResult) -> bool:
    return all(torch.equal(a.items, b.items) for a, b in zip(one.scores, other.scores, strict=True))


# ---- refusals ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "said"), [(None, "but it is missing"), ("0.4.9", "but 0.4.9 is installed")]
)
def test_without_the_harness_or_with_an_old_one_one_line_says_what_to_install(
    lm, monkeypatch, found, said
):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(harness, "version", version)

    with pytest.raises(ConfigError) as raised:
        evaluate_with_harness(lm.model, lm.tokenizer, ["arc_easy"])

    message = str(raised.value)
    assert said in message
    assert message.endswith('Install it with pip install "hf_gradiend[lm-eval]".')
    assert "\n" not in message
    with pytest.raises(ConfigError, match="pip install"):
        check_harness(["arc_easy"])


def test_a_masked_model_is_refused(make_lm):
    lm = make_lm("bert")

    with pytest.raises(BaseModelError, match=r"causal language model.*BertForMaskedLM is masked"):
        evaluate_with_harness(lm.model, lm.tokenizer, ["arc_easy"])


@pytest.mark.parametrize("numbers", [{"limit": 0}, {"batch_size": 0}])
def test_numbers_below_one_are_refused(lm, numbers):
    with pytest.raises(ConfigError, match=f"{next(iter(numbers))} of at least 1, but got 0"):
        evaluate_with_harness(lm.model, lm.tokenizer, ["arc_easy"], **numbers)


@pytest.mark.usefixtures("lm_eval")
def test_an_unknown_task_is_refused_with_near_names(monkeypatch):
    index = SimpleNamespace(all_tasks=["arc_easy", "arc_challenge", "hellaswag"])
    monkeypatch.setattr(harness, "_task_index", lambda **_: index)

    with pytest.raises(ConfigError, match=r"got 'arc_esay'\. Did you mean 'arc_easy'"):
        check_harness(["arc_esay"])
    with pytest.raises(ConfigError, match=r"got 'crow_pairs'\. Did you mean 'crows_pairs'"):
        check_harness(["crow_pairs"])
    with pytest.raises(ConfigError, match=r"got 'zzz'\.$"):
        check_harness(["zzz"])
    check_harness(["arc_easy", "hellaswag"])


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval")
def test_a_task_of_the_harness_is_run_by_name(lm, run, monkeypatch):
    question = {
        "question": "The nurse was",
        "choices": {"text": ["late", "tired"], "label": ["A", "B"]},
    }
    documents = [question | {"answerKey": key} for key in "ABA"]
    asked = []

    def load_dataset(**options):  # the Hub's
        asked.append(options)
        data = Dataset.from_list(documents)
        return {"train": data, "validation": data, "test": data}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ConfigError, match="'arc_easy'"):
        check_harness(["arc_esay"])

    result = run(lm.model, lm.tokenizer, ["arc_easy", "crows_pairs"])

    assert asked[0]["path"] == "allenai/ai2_arc"
    first, second = of(result, "acc"), of(result, "acc_norm")
    assert first.items.tolist() in ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0])
    assert (first.title, first.best, first.n) == ("lm_eval:arc_easy", "high", 3)
    assert second.documents == first.documents
    assert of(result, "pct_stereotype").n == 6


@pytest.mark.usefixtures("lm_eval")
def test_no_task_a_local_task_without_its_file_and_a_wrong_variant_are_refused(folder):
    with pytest.raises(ConfigError, match="got none"):
        check_harness([])
    with pytest.raises(ConfigError, match=r"data_dir.*'crows_pairs_english'"):
        check_harness(["crows_pairs"])
    with pytest.raises(ConfigError, match="'wrong'"):
        check_harness(["crows_pairs:wrong"], folder)
    check_harness(["crows_pairs", "crows_pairs:gender"], folder)
    (folder / "crows_pairs.csv").write_text("other", "utf-8")
    with pytest.raises(DataError, match="SHA-256"):
        check_harness(["crows_pairs"], folder)
    (folder / "crows_pairs.csv").unlink()
    with pytest.raises(DataError, match=r"Expected crows_pairs\.csv"):
        check_harness(["crows_pairs"], folder)


def test_data_that_cannot_be_read_is_one_line(lm_eval, lm, run, monkeypatch):
    def out_of_reach(**_):
        raise ConnectionError("Couldn't reach 'some/data' on the Hub\n(second line)")

    monkeypatch.setattr(lm_eval, "simple_evaluate", out_of_reach, raising=False)

    with pytest.raises(DataError, match=r"crows_pairs one stopped: Couldn't reach .*Hub$"):
        run(lm.model, lm.tokenizer)


def test_a_model_that_gives_nan_is_refused(lm, run):
    with torch.no_grad():
        lm.model.lm_head.weight[3, 3] = math.nan

    with pytest.raises(NumericalError, match="NaN"):
        run(lm.model, lm.tokenizer)


# ---- numbers -----------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3"])
def test_the_local_crows_pairs_is_our_sentence_score(make_lm, run, folder, family, monkeypatch):
    lm = make_lm(family)
    heard: list[list[float]] = []
    preference = harness._preference
    monkeypatch.setattr(
        harness, "_preference",
        lambda pair, found: heard.append([x for x, _ in found]) or preference(pair, found),
    )  # fmt: skip

    result = run(lm.model, lm.tokenizer, batch_size=4)

    likelihoods = Likelihoods(lm.model, lm.tokenizer, progress=False)
    ours = likelihoods.sentence_scores([pair[:2] for pair in PAIRS], "")
    torch.testing.assert_close(torch.tensor(heard).double(), ours, atol=1e-3, rtol=0)
    items = CrowsPairs().load(folder)
    score = CrowsPairs().scores({}, CrowsPairs().values(likelihoods, items))["sentence"]
    found = of(result, "pct_stereotype")
    assert found.value == pytest.approx(score)
    assert 0 < score < 100
    assert (found.n, found.best, found.title) == (6, 50.0, "lm_eval:crows_pairs")
    assert found.items.tolist() == [100.0 * float(more > less) for more, less in ours.tolist()]
    difference = of(result, "likelihood_diff")
    assert difference.value == pytest.approx(float((ours[:, 0] - ours[:, 1]).abs().mean()))
    assert difference.best == "low"
    spread = (ours[:, 0] - ours[:, 1]).abs().std()
    assert difference.stderr == pytest.approx(float(spread) / math.sqrt(6))


def test_the_local_crows_pairs_scores_as_the_harness_own_does(lm_eval):
    place = Path(lm_eval.__file__).parent / "tasks" / "crows_pairs"
    names: dict = {}
    exec((place / "utils.py").read_text("utf-8"), names)
    settings = (place / "crows_pairs_english.yaml").read_text("utf-8")

    for results in ([(-3.5, False), (-4.0, True)], [(-4.0, True), (-3.5, False)], [(-1.0, 0)] * 2):
        assert harness._preference({}, results) == names["process_results"]({}, results)
    for line in (
        "output_type: multiple_choice", 'doc_to_text: ""', "doc_to_target: 0",
        'target_delimiter: ""', "metric: likelihood_diff", "metric: pct_stereotype",
    ):  # fmt: skip
        assert line in settings
    assert settings.count("aggregation: mean") == settings.count("higher_is_better: false") == 2


def test_variants_and_limits_take_a_part(lm, run):
    everything = of(run(lm.model, lm.tokenizer), "likelihood_diff")
    result = run(lm.model, lm.tokenizer, ["crows_pairs:age", "crows_pairs"], limit=2)

    first, _, second, _ = result.scores
    assert [s.title for s in (first, second)] == ["lm_eval:crows_pairs:age", "lm_eval:crows_pairs"]
    assert first.documents == everything.documents[4:]
    assert second.documents == everything.documents[:2]
    torch.testing.assert_close(first.items, everything.items[4:])
    torch.testing.assert_close(second.items, everything.items[:2])


def local(task: dict, documents: list[dict]):
    """A task of the harness with documents of our own, as `LOCAL_TASKS` holds them."""
    from lm_eval.api.task import ConfigurableTask  # noqa: PLC0415 - optional dependency

    class Local(ConfigurableTask):
        def download(self, *_, **__):
            self.dataset = {"test": Dataset.from_list(documents)}

    return lambda _folder, _variant: Local(config={"test_split": "test", **task})


def test_metrics_that_are_no_means_are_taken_from_the_harness(make_lm, run, monkeypatch):
    lm = make_lm("gpt2")
    texts = [more for more, _, _ in PAIRS]
    rolling = {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity",
                         "higher_is_better": False}],
    }  # fmt: skip
    last = {
        "task": "last",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{text.rsplit(' ', 1)[1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    documents = [{"text": text} for text in texts]
    monkeypatch.setitem(harness.LOCAL_TASKS, "rolling", local(rolling, documents))
    monkeypatch.setitem(harness.LOCAL_TASKS, "last", local(last, documents))

    result = run(lm.model, lm.tokenizer, ["rolling", "last"])

    word = of(result, "word_perplexity")
    likelihoods = Likelihoods(lm.model, lm.tokenizer, progress=False)
    ours = likelihoods.sentence_scores([[text] for text in texts], "").sum()
    assert word.value == pytest.approx(math.exp(-ours / sum(len(t.split()) for t in texts)))
    assert word.items.shape == (6, 2)
    assert (word.stderr, word.best) == (None, "low")
    plain = of(result, "perplexity")
    assert plain.value == pytest.approx(math.exp(-plain.items.mean()))
    rows = torch.tensor([1, 1, 4])
    assert plain.on(rows) == pytest.approx(math.exp(-plain.items[rows].mean()))
    assert of(result, "acc").best == "high"
    for score in result.scores:
        estimate = result.estimates()[score.title][score.metric]
        assert estimate.value == pytest.approx(score.value)
        assert estimate.low <= estimate.value <= estimate.high


# ---- the model ---------------------------------------------------------------


def test_an_adapter_acts_at_its_strength(lm, adapter, run):
    base = run(lm.model, lm.tokenizer)
    with adapter.applied(lm.model) as carrier:
        set_strength(carrier, 0.0)
        at_zero = run(lm.model, lm.tokenizer)
        set_strength(carrier, 1.0)
        at_one = run(lm.model, lm.tokenizer)
        through_peft = run(carrier, lm.tokenizer)
        kept = get_strength(carrier)
    merged = adapter.apply_to(copy.deepcopy(lm.model)).merge_and_unload()

    assert same_items(at_zero, base)
    assert not same_items(at_one, base)
    assert same_items(at_one, run(merged, lm.tokenizer))
    assert same_items(through_peft, at_one)
    assert kept == 1.0
    assert same_items(run(lm.model, lm.tokenizer), base)


def test_the_model_the_tokenizer_and_the_random_states_are_left_as_they_were(planted_gpt2, run):
    model, tokenizer = planted_gpt2.model, planted_gpt2.tokenizer
    tokenizer.pad_token = None
    model.train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    # An edited head of a model that ties: tying again would lose the edit.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
    for draw in (
        random.random,
        np.random.random,
        lambda: torch.rand(1),
    ):  # away from the harness' seeds
        draw()

    def state():
        return (
            [(name, module.training) for name, module in model.named_modules()],
            [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
            repr(model.config), tokenizer.pad_token, tokenizer.padding_side, len(tokenizer),
            random.getstate(), torch.random.get_rng_state().tolist(),
            [np.asarray(part).tolist() for part in np.random.get_state()],
        )  # fmt: skip

    before = state()
    edited = run(model, tokenizer)

    assert state() == before
    assert same_items(run(model.eval(), tokenizer), edited)  # no dropout in either
    model.lm_head.weight = model.transformer.wte.weight
    assert not same_items(run(model, tokenizer), edited)


@pytest.mark.usefixtures("lm_eval")
def test_the_harness_alone_would_tie_an_edited_head(planted_gpt2):
    # The control of the test above, and the reason for `_Held`.
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - optional dependency

    model = planted_gpt2.model.train()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)

    HFLM(pretrained=model, tokenizer=planted_gpt2.tokenizer, backend="causal")

    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.training


def test_generation_works_with_an_adapter(lm, adapter, run, monkeypatch):
    generating = {
        "task": "generating",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "late",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
            {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True},
        ],
    }
    documents = [{"text": more} for more, _, _ in PAIRS]
    monkeypatch.setitem(harness.LOCAL_TASKS, "generating", local(generating, documents))

    with adapter.applied(lm.model):
        result = run(lm.model, lm.tokenizer, ["generating"], batch_size=2)

    assert of(result, "exact_match").items.shape == (6,)
    # BLEU is made of texts: a number of the harness alone.
    assert of(result, "bleu").items is None
    assert list(result.estimates()["lm_eval:generating"]) == ["exact_match"]


# ---- comparison --------------------------------------------------------------


def result_of(best, items, *, metric="m", documents=None) -> HarnessResult:
    items = torch.tensor(items, dtype=torch.float64)
    documents = tuple(map(str, range(len(items)))) if documents is None else documents
    score = HarnessScore(
        "task", metric, best, float(items.mean()), None, len(items), documents, items, harness._mean
    )
    return HarnessResult((score,))


def the_row(best, before, after):
    (row,) = compared_in_harness(result_of(best, before), result_of(best, after))
    return row


def test_a_comparison_is_paired_by_item():
    before = [float(i % 2) for i in range(20)]
    after = [value - 0.1 for value in before]

    row = the_row("low", before, after)

    # By hand: every item falls by 0.1, so every resample does, though the scores' own intervals
    # (0.5 ± 0.22) overlap.
    assert row["change"] == pytest.approx({"value": -0.1, "low": -0.1, "high": -0.1, "n": 20})
    assert row["before"]["low"] < row["after"]["high"] < row["before"]["high"]
    assert row["before"]["value"] == 0.5
    assert (row["benchmark"], row["measure"], row["best"]) == ("lm_eval:task", "m", "low")
    assert row["verdict"] == "better"


@pytest.mark.parametrize(
    ("best", "before", "after", "verdict"),
    [
        ("high", [0.0, 1.0], [1.0, 2.0], "better"),
        ("high", [1.0, 2.0], [0.0, 1.0], "worse"),
        ("low", [0.0, 1.0], [1.0, 2.0], "worse"),
        ("low", [0.0, 1.0], [0.0, 1.0], "cannot be told"),
        ("high", [0.0, 1.0], [1.0, 0.0], "cannot be told"),
        (None, [0.0, 1.0], [1.0, 2.0], "neither is better"),
        (50.0, [80.0, 90.0], [40.0, 60.0], "better"),
        (50.0, [40.0, 45.0], [20.0, 30.0], "worse"),
    ],
)
def test_the_verdict_is_by_the_distance_from_the_best_value(best, before, after, verdict):
    assert the_row(best, before * 10, after * 10)["verdict"] == verdict


def test_a_comparison_is_that_of_our_own_benchmark_on_the_same_numbers(lm, adapter, run, folder):
    def both():
        likelihoods = Likelihoods(lm.model, lm.tokenizer, progress=False)
        values = CrowsPairs().values(likelihoods, CrowsPairs().load(folder))
        return BenchmarkResult(CrowsPairs(), {}, values), run(lm.model, lm.tokenizer)

    ours, theirs = both()
    with adapter.applied(lm.model):
        our_edited, their_edited = both()

    (row,) = [
        row
        for row in compared_in_harness(theirs, their_edited)
        if row["measure"] == "pct_stereotype"
    ]
    (own,) = [row for row in compared(ours, our_edited) if row["measure"] == "sentence"]
    for what in ("before", "after", "change"):
        assert row[what] == pytest.approx(own[what])
    assert row["verdict"] == own["verdict"]
    assert row["best"] == own["best"] == 50.0
    assert row.keys() == own.keys()


def test_results_of_other_items_are_not_compared():
    one = result_of("low", [0.0, 1.0])

    for other in (
        result_of("low", [0.0, 1.0, 2.0]),
        result_of("low", [0.0, 1.0], documents=("0", "other")),
        result_of("low", [0.0, 1.0], metric="n"),
        HarnessResult(()),
    ):
        with pytest.raises(ConfigError, match="same tasks and items"):
            compared_in_harness(one, other)


def test_a_metric_without_a_number_per_item_is_named_and_left_out(caplog):
    text = HarnessScore("task", "bleu", "high", 3.0, None, 2, ("0", "1"), None, harness._mean)
    result = HarnessResult((*result_of("low", [0.0, 1.0]).scores, text))

    with caplog.at_level(logging.WARNING, "hf_gradiend"):
        rows = compared_in_harness(result, result)

    assert [row["measure"] for row in rows] == ["m"]
    assert "task bleu" in caplog.text
    with pytest.raises(DataError, match="number per item"):
        text.on(torch.tensor([0]))
