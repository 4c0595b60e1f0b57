"""Every shipped feature on one base model: each pair of classes, a control, and two axes in one.

    python tests/benchmarks/features.py --base_model DIR [--features religion number]
                                        [--output_dir DIR] [--draws 2]

Learns each pair of classes of a feature (`train_contrasts`) and reads templates that were held out.
The control is the same training where by the throw of a coin the classes of a text have changed
places or not, so that no word tells the class. It is read on held-out texts whose classes have
changed places likewise (`control`: what can be learned of such classes at all), and on the true
classes (`against true`: to which side the direction that is left happens to lean; of either sign).
A draw for which training refuses to give an encoder, since the classes' means come out in the wrong
order, is counted and has no correlation. With gender and number among the features, their GRADIENDs
are joined, and each axis reads both features. --output_dir keeps a report.json for each pair.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend import GradiendModel, GradiendTrainingArguments, load_base_model
from hf_gradiend.cli.common import feature_data, origin_of, peak_rss_bytes
from hf_gradiend.cli.contrasts import other_rows
from hf_gradiend.errors import NumericalError
from hf_gradiend.evaluation.features import compare_features
from hf_gradiend.evaluation.report import build_report, read_encoder
from hf_gradiend.files import write_json
from hf_gradiend.metrics import pearson_correlation
from hf_gradiend.training.axes import join_axes
from hf_gradiend.training.contrasts import rows_of
from hf_gradiend.training.several_classes import train_contrasts

FEATURES = ("gender", "number", "sentiment", "race", "religion")
JOINED = ("gender", "number")
N_TRAIN, N_TEST = 150, 300  # texts of a class to learn from, and of a pair to read


class Setting:
    """A base model and how to train on it."""

    def __init__(self, base_model: str, folder: str, output_dir: str | None) -> None:
        self.name = base_model
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load_base_model(base_model)
        self.folder = folder
        self.output_dir = None if output_dir is None else Path(output_dir)

    def arguments(self, n_classes: int, seed: int = 0) -> GradiendTrainingArguments:
        return GradiendTrainingArguments(
            output_dir=self.folder, disable_tqdm=True, max_train_texts=N_TRAIN * n_classes,
            seed=seed, save_strategy="no", load_best_model_at_end=False,
        )  # fmt: skip


def drawn(rows: Dataset, number: int = N_TEST) -> Dataset:
    return rows.shuffle(seed=0).select(range(min(number, len(rows))))


def shuffled(rows: Dataset, seed: int) -> Dataset:
    """The same rows of one pair; by the throw of a coin a text's classes change places.

    A sentence that stands there with both words is one text: either both change, or none.
    """
    generator = torch.Generator().manual_seed(seed)
    texts: dict[tuple, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        texts[row["text"], frozenset((row["factual"], row["counterfactual"]))].append(number)
    heads = torch.rand(len(texts), generator=generator) < 0.5
    changed = [
        n for numbers, head in zip(texts.values(), heads, strict=True) if head for n in numbers
    ]
    own, other = rows["factual_class"][:], rows["counterfactual_class"][:]
    for number in changed:
        own[number], other[number] = other[number], own[number]
    columns = {name: rows[name][:] for name in ("text", "factual", "counterfactual")}
    return Dataset.from_dict({**columns, "factual_class": own, "counterfactual_class": other})


def control(setting: Setting, train: Dataset, test: Dataset, draws: int) -> dict:
    """Correlations of what shuffled classes teach, one for each draw that gives an encoder."""
    against_shuffled: list[float] = []
    against_true: list[float] = []
    for seed in range(draws):
        try:
            ((_, gradiend),) = train_contrasts(
                setting.model,
                setting.tokenizer,
                setting.arguments(2, seed),
                shuffled(train, seed),
            )
        except NumericalError:
            continue
        h = gradiend.encode_texts(setting.model, setting.tokenizer, test, progress=False)[:, 0]
        for rows, found in ((shuffled(test, draws + seed), against_shuffled), (test, against_true)):
            first = min(rows["factual_class"])
            signs = torch.tensor([1.0 if own == first else -1.0 for own in rows["factual_class"]])
            found.append(pearson_correlation(h, signs))
    return {
        "control": against_shuffled,
        "against_true": against_true,
        "refused": draws - len(against_true),
    }


def of_pair(rows: Dataset, pair: set[str]) -> Dataset:
    classes = zip(rows["factual_class"], rows["counterfactual_class"], strict=True)
    return rows.select([row for row, both in enumerate(classes) if {*both} == pair])


def learn(
    setting: Setting, feature: str, draws: int, held: dict[str, GradiendModel]
) -> dict[str, dict]:
    """Learn and read all pairs of a feature; a GRADIEND to be joined is put into `held`."""
    data = feature_data(feature)
    n_classes = len({*data["train"]["factual_class"]})
    arguments = setting.arguments(n_classes)
    found: dict[str, dict] = {}
    learned = train_contrasts(setting.model, setting.tokenizer, arguments, data["train"])
    for contrast, gradiend in learned:
        test = drawn(rows_of(contrast, data["test"]))
        encoder = read_encoder(
            gradiend,
            setting.model,
            setting.tokenizer,
            {"test": test},
            other_texts=other_rows(contrast, data["test"]),
            progress=False,
        )
        if setting.output_dir is not None:
            report = build_report(
                gradiend,
                encoder=encoder,
                judged=None,
                training={},
                origin=origin_of(setting.name, feature, data, arguments),
            )
            folder = setting.output_dir / feature / contrast.name
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "report.json", report)
        split = encoder.splits["test"]
        found[contrast.name] = {
            "correlation": split.correlation.value,
            "interval": [split.correlation.low, split.correlation.high],
            "accuracy": split.accuracy.value,
            "neutral_mean_absolute": encoder.neutral.value,
            "other_classes": {
                name: [other.mean.value, other.mean_absolute.value]
                for name, other in encoder.other_classes.items()
            },
            "n": split.correlation.n,
        }
        show(feature, contrast.name, found[contrast.name])
        if feature in JOINED:
            held[feature] = gradiend
        del gradiend  # 1.3 GB for SmolLM2
    for name, pair in found.items() if draws else ():
        train, test = (of_pair(data[split], {*name.split("-")}) for split in ("train", "test"))
        pair.update(control(setting, train, drawn(test), draws))
        show_control(feature, name, pair)
    return found


def join(setting: Setting, gradiends: dict[str, GradiendModel]) -> list[dict]:
    """What each axis of the joined GRADIEND reads in each feature's held-out texts."""
    data = {name: feature_data(name) for name in gradiends}
    joined = join_axes(
        list(gradiends.values()),
        setting.model,
        setting.tokenizer,
        [each["validation"] for each in data.values()],
        progress=False,
    )
    gradiends.clear()  # two times the memory of the joined one
    texts = {name: drawn(each["test"]) for name, each in data.items()}
    comparison = compare_features(
        {"joined": joined}, setting.model, setting.tokenizer, texts, progress=False
    )
    found = [
        {
            "axis": reading.feature,
            "texts": reading.dataset,
            "own": reading.own,
            "correlation": None if reading.correlation is None else reading.correlation.value,
            "gap": reading.gap,
            "mean_absolute": reading.mean_absolute,
        }
        for reading in comparison.readings
    ]
    for each in found:
        print(
            f"{each['axis']:24} reads {each['texts']:8} r {each['correlation']:+.3f}  "
            f"gap {each['gap']:+.3f}  mean |h| {each['mean_absolute']:.3f}",
            flush=True,
        )
    return found


def show(feature: str, name: str, pair: dict) -> None:
    low, high = pair["interval"]
    others = "".join(
        f"  {other} h {mean:+.2f} |h| {size:.2f}"
        for other, (mean, size) in pair["other_classes"].items()
    )
    print(
        f"{feature:10} {name:20} r {pair['correlation']:.3f} [{low:.3f}, {high:.3f}]  "
        f"accuracy {pair['accuracy']:.3f}  neutral |h| {pair['neutral_mean_absolute']:.2f}  "
        f"n {pair['n']}{others}",
        flush=True,
    )


def show_control(feature: str, name: str, pair: dict) -> None:
    control, true = pair["control"], pair["against_true"]
    means = f"{fmean(control):+.3f}  against true {fmean(true):+.3f}" if control else "none"
    print(
        f"{feature:10} {name:20} shuffled: control {means}  "
        f"({len(control)} draws, {pair['refused']} refused)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=FEATURES)
    parser.add_argument("--output_dir")
    parser.add_argument("--draws", type=int, default=4, help="shufflings of the control")
    args = parser.parse_args()
    started = time.perf_counter()
    result: dict[str, object] = {}
    held: dict[str, GradiendModel] = {}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(args.base_model, folder, args.output_dir)
        for feature in sorted(args.features, key=FEATURES.index):
            result[feature] = learn(setting, feature, args.draws, held)
            if len(held) == len(JOINED):
                result["joined"] = join(setting, held)
    result["seconds"] = time.perf_counter() - started
    result["peak_rss"] = peak_rss_bytes()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
