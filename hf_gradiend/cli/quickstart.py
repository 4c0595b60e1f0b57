"""Learn, read and dial the gender feature of a real small model, with pictures."""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.adapter.values import ADAPTER_FILE
from hf_gradiend.base_models import load_base_model
from hf_gradiend.cli.common import (
    can_draw,
    display_name,
    encoder_table,
    feature_data,
    license_of,
    origin_of,
    peak_rss_bytes,
    short_splits,
    speaker,
    split_of,
    table,
)
from hf_gradiend.cli.quickstart_model import HUB_ID, LICENSE, quickstart_model
from hf_gradiend.data.templates import OWN_TEXTS, OWN_TEXTS_LICENSE, build_gender_pronouns
from hf_gradiend.evaluation.report import (
    JudgedEdit,
    Origin,
    build_report,
    choose_gender_edit,
    feature_words,
    is_gender,
    read_encoder,
)
from hf_gradiend.evaluation.strengths import STRENGTHS, measure_strengths
from hf_gradiend.files import replaced_folder, writable_folder, write_json
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.plotting import plot_all
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.trainer import GradiendTrainer, training_summary

MEASURES = ("imbalance", "mass", "bpi", "p_plus", "p_minus", "lm_score")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--output_dir", default="gradiend-quickstart", help="folder for the results"
    )
    parser.add_argument("--base_model", help="Hub id or folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", help="feature data set; default: the package's own texts")
    parser.add_argument("--max_train_texts", type=int, default=400)
    parser.add_argument(
        "--fast", action="store_true", help="fewer texts and edits; for a first look"
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """The whole path: data → gradients → GRADIEND → edit → evaluation → files and pictures."""
    started = time.perf_counter()
    folder = writable_folder(args.output_dir)
    say = speaker(args)
    place = args.base_model or str(quickstart_model(say))
    base_model, tokenizer = load_base_model(place)
    name = display_name(place)
    data = build_gender_pronouns() if args.dataset is None else feature_data(args.dataset)
    n_texts = min(args.max_train_texts, 96) if args.fast else args.max_train_texts
    say(f"\n1. Learning the feature of {name} from {n_texts} texts")
    arguments = GradiendTrainingArguments(
        output_dir=str(folder / "gradiend"),
        max_train_texts=n_texts,
        disable_tqdm=args.json,
        save_strategy="no",
        logging_strategy="no",
        load_best_model_at_end=False,
    )
    trainer = GradiendTrainer(
        base_model=base_model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=split_of(data, "train"),
    )
    trained = trainer.train()
    gradiend = trainer.model

    say("\n2. Reading texts, neutral tokens and words that were never trained on")
    splits = {split: data[split] for split in ("validation", "test") if split in data}
    if args.fast:
        splits = {k: v.shuffle(seed=0).select(range(min(60, len(v)))) for k, v in splits.items()}
    encoder = read_encoder(gradiend, base_model, tokenizer, splits, progress=not args.json)

    say("\n3. Choosing an edit on half of the occupations, judging it on the other half")
    judged = None
    if is_gender(gradiend):
        judged = choose_gender_edit(
            gradiend, base_model, tokenizer,
            max_trials=10 if args.fast else 32, with_sweep=not args.fast, progress=not args.json,
        )  # fmt: skip
    report = build_report(
        gradiend,
        encoder=encoder,
        judged=judged,
        training=training_summary(trained),
        origin=_origin(args, data, arguments),
    )
    adapter = _save_models(gradiend, base_model, tokenizer, judged, folder)
    if adapter is not None:
        say("\n4. Dialling the adapter's strength")
        report["adapter"] = {
            "n_values": adapter.config.n_values,
            "dtype": adapter.config.dtype,
            "bytes": (folder / "adapter" / ADAPTER_FILE).stat().st_size,
        }
        report["strengths"] = measure_strengths(
            adapter, base_model, tokenizer, feature_words(gradiend),
            strengths=STRENGTHS[::2] if args.fast else STRENGTHS, progress=not args.json,
        )  # fmt: skip
    pictures = _pictures(report, folder, say)
    report["seconds"] = time.perf_counter() - started
    report["peak_rss_bytes"] = peak_rss_bytes()
    report["files"] = sorted(
        str(path.relative_to(folder))
        for path in (
            folder / "gradiend",
            folder / "adapter",
            folder / "edited-model",
            *pictures,
            folder / "report.json",
        )
        if path.exists() or path.name == "report.json"
    )
    write_json(folder / "report.json", report)
    _show(report, judged, folder, say)
    return _short(report)


def _save_models(
    gradiend: GradiendModel,
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judged: JudgedEdit | None,
    folder: Path,
) -> GradiendAdapter | None:
    """Write gradiend/ and, where an edit was chosen, adapter/ and edited-model/.

    Returns:
        The adapter, with 1 % of the weights.
    """
    if judged is not None:
        gradiend.config.feature_factor = judged.choice.feature_factor
        gradiend.config.step_size = judged.choice.step_size
    gradiend.save_pretrained(folder / "gradiend")
    if judged is None:
        return None
    adapter = gradiend.to_adapter(top_k=0.01, dtype=torch.bfloat16)
    adapter.save_pretrained(folder / "adapter")
    with gradiend.edited(base_model), replaced_folder(folder / "edited-model") as fresh:
        base_model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return adapter


def _origin(
    args: argparse.Namespace, data: DatasetDict, arguments: GradiendTrainingArguments
) -> Origin:
    """What the quickstart learned from; it knows the licences of its own model and texts."""
    base_model, dataset = args.base_model or HUB_ID, args.dataset or OWN_TEXTS
    licenses = (
        LICENSE if args.base_model is None else license_of(base_model, "model"),
        OWN_TEXTS_LICENSE if args.dataset is None else license_of(dataset, "dataset"),
    )
    return origin_of(base_model, dataset, data, arguments, licenses)


def _pictures(report: dict, folder: Path, say) -> list[Path]:  # noqa: ANN001 - print, or nothing
    if not can_draw(say):
        return []
    # As a reader of report.json sees it, so that no picture shows what the file does not hold.
    return plot_all(json.loads(json.dumps(report)), folder)


def _show(report: dict, judged: JudgedEdit | None, folder: Path, say) -> None:  # noqa: ANN001
    encoder = report["encoder"]
    say(f"\n{encoder_table(encoder['splits'])}")
    say(f"Neutral tokens: mean |h| {encoder['neutral']['value']:.3f} (0 is neutral)")
    if encoder["transfer_in_order"] is not None:
        _show_transfer(encoder, say)
    if judged is None:
        say("\nNo edit within the limits is better than the base model; none was written.")
    else:
        before, after = report["before"], report["after"]
        rows = [["on occupations not chosen on", "before", "after", "after / before"]]
        rows += [
            [
                m, f"{before[m]:.4f}", f"{after[m]:.4f}",
                f"{after[m] / before[m]:.3f}" if before[m] else "–",
            ]
            for m in MEASURES
        ]  # fmt: skip
        edit = report["edit"]
        say(f"\nEdit: θ + {edit['step_size']:.4g} · dec({edit['feature_factor']:.3g})")
        say(table(rows))
    minutes, gib = report["seconds"] / 60, report["peak_rss_bytes"] / 2**30
    say(f"\n{minutes:.1f} minutes, {gib:.1f} GiB. In {folder}: {', '.join(report['files'])}")


def _show_transfer(encoder: dict, say) -> None:  # noqa: ANN001
    pairs = [pair for pair in encoder["transfer"] if pair["kind"] == "feature"]
    in_order = sum(pair["positive"] > pair["negative"] for pair in pairs)
    say(f"Words never trained on: {in_order} of {len(pairs)} pairs in the right order")
    rows = [["pair", encoder["classes"][0], encoder["classes"][1], "gap"]]
    rows += [
        [p["pair"], f"{p['positive']:+.2f}", f"{p['negative']:+.2f}",
         f"{p['positive'] - p['negative']:+.2f}"]
        for p in sorted(
            encoder["transfer"], key=lambda p: (p["kind"], p["negative"] - p["positive"])
        )
    ]  # fmt: skip
    say(table(rows))


def _short(report: dict) -> dict[str, object]:
    kept = ("base_model", "n_selected", "solver", "seconds", "peak_rss_bytes", "files")
    edit = report["edit"]
    measures = {
        when: None if report[when] is None else {name: report[when][name] for name in MEASURES}
        for when in ("before", "after")
    }
    return {
        **{name: report[name] for name in kept},
        "encoder": short_splits(report["encoder"]["splits"]),
        "neutral_mean_absolute": report["encoder"]["neutral"]["value"],
        "transfer_in_order": (report["encoder"]["transfer_in_order"] or {}).get("value"),
        "edit": None if edit is None else {k: edit[k] for k in ("feature_factor", "step_size")},
        **measures,
    }
