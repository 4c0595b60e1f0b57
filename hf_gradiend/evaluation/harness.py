"""Tasks of lm-evaluation-harness on causal models held in memory, edited or with an adapter.

The harness (https://github.com/EleutherAI/lm-evaluation-harness, MIT) is an optional dependency. It
reads its tasks' data from the Hub, or from datasets' cache; the tasks of `LOCAL_TASKS` read a
folder. Numbers are the harness' own; what is added is that two models are compared item by item.
"""

import copy
import difflib
import io
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.base_models import evaluation_mode, objective_of
from hf_gradiend.errors import (
    BaseModelError,
    ConfigError,
    DataError,
    NumericalError,
    first_line_of,
)
from hf_gradiend.evaluation.bias.benchmark import Measure
from hf_gradiend.evaluation.bias.comparison import Row, compared_scores
from hf_gradiend.evaluation.bias.crows_pairs import CrowsPairs
from hf_gradiend.evaluation.bias.suite import folder_of
from hf_gradiend.metrics import Estimate, bootstrap_all

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

logger = logging.getLogger(__name__)

OLDEST = Version("0.4.12")  # earlier ones print tasks that have no YAML file, and stop there

# Metrics with an ideal between their ends. The harness gives a share where the name says percent,
# and calls lower better.
IDEAL_PERCENTAGES = {"pct_stereotype": 50.0}


@dataclass(frozen=True, eq=False)
class HarnessScore:
    """One metric of one task.

    Args:
        task: The task's name.
        metric: The metric's name, with a filter's where the task has filters: `"acc"`,
            `"exact_match,strict-match"`.
        best: `"high"` or `"low"` as the task says, a number that is ideal, or `None`.
        value: The harness' value; `pct_stereotype` in percent.
        stderr: Standard error of a mean; `None` for metrics that are no mean, and for one item.
        n: Number of items.
        documents: Hash of each item's document.
        items: What the harness says of each item, float64 `(n,)` or `(n, k)`; `None` where that is
            not numbers (BLEU).
        aggregate: The metric of any of the items.
    """

    task: str
    metric: str
    best: Literal["high", "low"] | float | None
    value: float
    stderr: float | None
    n: int
    documents: tuple[str, ...]
    items: Tensor | None
    aggregate: Callable[[Tensor], float]

    @property
    def title(self) -> str:
        """The task's name in tables beside the package's own benchmarks: `"lm_eval:arc_easy"`."""
        return f"lm_eval:{self.task}"

    def on(self, rows: Tensor) -> float:
        """The metric of some of the items.

        Raises:
            DataError: If the harness gave no number per item.
        """
        if self.items is None:
            raise DataError(f"Expected a number per item of {self.task}, {self.metric}; none came.")
        return self.aggregate(self.items[rows])


@dataclass(frozen=True, eq=False)
class HarnessResult:
    """What one model did on tasks of the harness.

    Args:
        scores: One for each task and metric. A group's average is left out: its tasks are there.
    """

    scores: tuple[HarnessScore, ...]

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Metrics that have a number per item, by title and name, with 95 % bootstrap intervals."""
        found: dict[str, dict[str, Estimate]] = {}
        for score in self.scores:
            if score.items is not None:
                estimate = bootstrap_all(lambda rows, on=score.on: {"": on(rows)}, score.n)[""]
                found.setdefault(score.title, {})[score.metric] = estimate
        return found


def evaluate_with_harness(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> HarnessResult:
    """What a causal model does on tasks of lm-evaluation-harness.

    The model is called as it stands, with its adapters and their strengths, and is left as it was;
    so are the states of the random number generators, which the harness seeds.

    Args:
        model: Causal language model with its head, or a `PeftModel` around one.
        tokenizer: Its tokenizer; a copy is used.
        tasks: Names of tasks, tags or groups of the harness, or of `LOCAL_TASKS` with their
            variants (`"crows_pairs:gender"`).
        data_dir: Folder, or Hub id, with the files of `LOCAL_TASKS`.
        limit: Number of items of each task, the first ones, for a quick look; `None` for all.
        batch_size: Number of texts of one forward pass.
        progress: Show what the harness writes to standard error, its progress bars above all.

    Raises:
        BaseModelError: If the model is not causal.
        ConfigError: If the harness is missing or older than 0.4.12, a task is unknown, or a number
            is not positive.
        DataError: If a task's data cannot be read, or the harness refuses a task.
        NumericalError: If the model gives NaN.
    """  # noqa: DOC502 - ConfigError and NumericalError are raised by what it calls
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if objective_of(base) != "causal":  # pyright: ignore[reportArgumentType] - a PeftModel's base
        raise BaseModelError(
            f"Expected a causal language model for lm-evaluation-harness, but "
            f"{type(base).__name__} is masked. The package's own benchmarks take both."
        )
    _check_positive(limit=limit, batch_size=batch_size)
    chosen = _chosen(tasks, data_dir)

    from lm_eval import simple_evaluate  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_random_states_kept())
        if not progress:  # the harness has no switch for its bars
            stack.enter_context(redirect_stderr(io.StringIO()))
        held = HFLM(
            pretrained=_Held(model), tokenizer=copy.deepcopy(tokenizer), backend="causal",
            batch_size=batch_size,
        )  # fmt: skip
        try:
            results = simple_evaluate(
                model=held,
                tasks=chosen,
                task_manager=_task_index(
                    with_defaults=any(isinstance(task, str) for task in chosen)
                ),
                limit=limit,
                bootstrap_iters=0,  # the intervals are ours; the harness' would fork processes
            )
        except BaseModelError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(
                f"Expected tasks that lm-evaluation-harness can read and run here, but among "
                f"{', '.join(tasks)} one stopped: {first_line_of(error)}"
            ) from error
    return HarnessResult(tuple(_scores(results)))


def check_harness(tasks: Sequence[str], data_dir: str | os.PathLike[str] | None = None) -> None:
    """Refuse, before any model runs, tasks that `evaluate_with_harness` would refuse.

    Args:
        tasks: Names of tasks, as there.
        data_dir: Folder, as there.

    Raises:
        ConfigError: If the harness is missing or older than 0.4.12, a task is unknown, there is
            none, or a local one is asked for without a folder.
        DataError: If the folder lacks a local task's file, or has another one than was published.
    """  # noqa: DOC502 - raised by what it calls
    _chosen(tasks, data_dir)


def compared_in_harness(before: HarnessResult, after: HarnessResult) -> list[Row]:
    """One row per task and metric, as `comparison.compared` gives them for our benchmarks.

    The change is resampled by item, the same items for both models. Metrics without a number per
    item are left out, with a warning.

    Args:
        before: What one model did.
        after: What another did on the same items.

    Raises:
        ConfigError: If the two are of different tasks or items.
    """
    sides = [
        [(score.task, score.metric, score.documents) for score in result.scores]
        for result in (before, after)
    ]
    if sides[0] != sides[1]:
        raise ConfigError(
            "Expected two results of the same tasks and items, but the tasks, their data, or the "
            "limit differ."
        )
    pairs = list(zip(before.scores, after.scores, strict=True))
    left = [pair for pair in pairs if pair[0].items is None or pair[1].items is None]
    if left:
        names = ", ".join(f"{first.task} {first.metric}" for first, _ in left)
        logger.warning("Not compared, as there is no number per item: %s", names)
    return [row for pair in pairs if pair not in left for row in _rows(*pair)]


def crows_pairs_task(
    folder: str | os.PathLike[str], variant: str | None = None
) -> "ConfigurableTask":
    """CrowS-Pairs as published (1,508 pairs), scored as the harness' `crows_pairs_english` is.

    The harness' own task reads a revised version of the pairs from the Hub; this one reads
    crows_pairs.csv, so that its `pct_stereotype` is the score `sentence` of `CrowsPairs`. Metrics:
    `likelihood_diff`, the mean of |log P(stereotype) − log P(other)| in nats, and `pct_stereotype`,
    as a share here.

    Args:
        folder: Folder with crows_pairs.csv, or one with such a folder in it.
        variant: A type of bias, as for `CrowsPairs`; `None` for all.

    Returns:
        A task that `lm_eval.simple_evaluate` takes.

    Raises:
        ConfigError: If there is no such variant.
        DataError: If the file is missing or another one than was published.
    """  # noqa: DOC502 - raised by what it calls
    from lm_eval.api.task import ConfigurableTask  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    benchmark = CrowsPairs(variant)
    place = folder_of(benchmark, folder)

    class FromFile(ConfigurableTask):
        def download(self, *_: object, **__: object) -> None:
            self.dataset = {"test": Dataset.from_list(benchmark.load(place))}

    return FromFile(
        config={
            "task": benchmark.title,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_choice": lambda pair: [pair["more"], pair["less"]],
            "doc_to_target": 0,
            "target_delimiter": "",
            "process_results": _preference,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": False}
                for metric in ("likelihood_diff", "pct_stereotype")
            ],
        }
    )


LOCAL_TASKS: Mapping[str, Callable[..., "ConfigurableTask"]] = {CrowsPairs.name: crows_pairs_task}


class _Held:
    """A model as the harness needs it: to call and to generate with.

    A module would be tied again, which overwrites an edited head, and switched to evaluation.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.device, self.config = model.device, model.config

    def __call__(self, input_ids: Tensor) -> Any:  # noqa: ANN401 - the model's output
        output = self.model(input_ids)
        if bool(output.logits.isnan().any()):  # compared, NaN would pass for an answer
            raise NumericalError("Expected finite logits, but got NaN. Is the model broken?")
        return output

    def generate(self, **options: Any) -> Any:  # noqa: ANN401 - transformers'
        return self.model.generate(**options)  # pyright: ignore[reportCallIssue]


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"Expected a {name} of at least 1, but got {number}.")


def _chosen(
    tasks: Sequence[str], data_dir: str | os.PathLike[str] | None
) -> list["str | ConfigurableTask"]:
    """The tasks as the harness takes them: its own by name, local ones as objects.

    Raises:
        ConfigError: If the harness is missing or old, or there is no task.
    """
    try:
        found = version("lm-eval")
    except PackageNotFoundError:
        found = None
    if found is None or Version(found) < OLDEST:
        raise ConfigError(
            f"Expected lm-evaluation-harness {OLDEST} or later, but {found or 'it'} is "
            f"{'installed' if found else 'missing'}. Install it with pip install "
            f'"hf_gradiend[lm-eval]".'
        )
    if not tasks:
        raise ConfigError("Expected names of tasks of lm-evaluation-harness, but got none.")
    return [
        _local_task(name, data_dir) if name.partition(":")[0] in LOCAL_TASKS else _known(name)
        for name in dict.fromkeys(tasks)
    ]


def _local_task(name: str, data_dir: str | os.PathLike[str] | None) -> "ConfigurableTask":
    if data_dir is None:
        raise ConfigError(
            f"Expected data_dir, a folder with the files of {name}, but got none. Tasks of the "
            f"harness that read the Hub have other names, such as 'crows_pairs_english'."
        )
    task, _, variant = name.partition(":")
    return LOCAL_TASKS[task](data_dir, variant or None)


def _known(name: str) -> str:
    known = _task_index(with_defaults=True).all_tasks
    if name in known:
        return name
    near = difflib.get_close_matches(name, [*known, *LOCAL_TASKS], n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ConfigError(
        f"Expected the name of a task of lm-evaluation-harness, but got {name!r}.{hint}"
    )


@cache  # seconds: more than 10,000 files, which do not change
def _task_index(*, with_defaults: bool) -> "TaskManager":
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    return TaskManager(include_defaults=with_defaults)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _preference(pair: Mapping[str, str], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    del pair
    (more, _), (less, _) = results
    return {"likelihood_diff": abs(more - less), "pct_stereotype": float(more > less)}


def _scores(results: Mapping[str, Any]) -> Iterator[HarnessScore]:
    for task, samples in results["samples"].items():
        found: dict[tuple[str, str], list[tuple[str, Any]]] = {}
        for sample in samples:
            for metric in sample["metrics"]:
                place = found.setdefault((metric, sample["filter"]), [])
                place.append((sample["doc_hash"], sample[metric]))
        for (metric, filter_name), values in found.items():
            value = float(results["results"][task][f"{metric},{filter_name}"])
            items = _numbers([item for _, item in values])
            aggregate = None if items is None else _aggregate(results, task, metric, items, value)
            unit = 100.0 if metric in IDEAL_PERCENTAGES else 1.0
            stderr = None
            if aggregate is _mean and items is not None and len(items) > 1:
                stderr = unit * float(items.std()) / math.sqrt(len(items))
            yield HarnessScore(
                task=task,
                metric=metric if filter_name == "none" else f"{metric},{filter_name}",
                best=_best(metric, results["higher_is_better"].get(task, {}).get(metric)),
                value=unit * value,
                stderr=stderr,
                n=len(values),
                documents=tuple(document for document, _ in values),
                items=None if aggregate is None or items is None else unit * items,
                aggregate=aggregate or _mean,
            )


def _numbers(values: Sequence[object]) -> Tensor | None:
    try:
        return torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError):  # texts, of which BLEU is made
        return None


def _mean(items: Tensor) -> float:
    return float(items.mean())


def _aggregate(
    results: Mapping[str, Any], task: str, metric: str, items: Tensor, value: float
) -> Callable[[Tensor], float] | None:
    """How the harness came from the items to the value; `None` where that cannot be repeated."""
    from lm_eval.api.registry import get_aggregation  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    said = [
        entry.get("aggregation")
        for entry in results["configs"][task].get("metric_list") or ()
        if entry["metric"] == metric
    ]
    function = get_aggregation(said[0]) if said and said[0] not in {None, "mean"} else None

    def named(items: Tensor) -> float:
        rows = items.tolist()
        return float(function(rows if items.ndim == 1 else [tuple(row) for row in rows]))  # pyright: ignore[reportOptionalCall]

    tried = [_mean] if function is None else [named, _mean]
    return next((each for each in tried if math.isclose(each(items), value, abs_tol=1e-12)), None)


def _best(metric: str, higher_is_better: bool | None) -> Literal["high", "low"] | float | None:  # noqa: FBT001
    if metric in IDEAL_PERCENTAGES:
        return IDEAL_PERCENTAGES[metric]
    if higher_is_better is None:
        return None
    return "high" if higher_is_better else "low"


def _rows(first: HarnessScore, second: HarnessScore) -> list[Row]:
    # The ends of the scale, which the harness does not say, cancel in a change of the distance.
    measure = Measure(first.metric, 0.0, 0.0, first.best)
    return compared_scores(
        first.title,
        [measure],
        lambda rows: {first.metric: first.on(rows)},
        lambda rows: {first.metric: second.on(rows)},
        first.n,
    )
