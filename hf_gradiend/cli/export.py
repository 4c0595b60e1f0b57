"""Write an adapter for people without this package: a merged model, a LoRA or Supertuning."""

import argparse
from dataclasses import asdict, replace

from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.adapter.export.fidelity import (
    REPORT_FILE,
    ExportReport,
    check_new_folder,
)
from hf_gradiend.adapter.export.lora import export_lora
from hf_gradiend.adapter.export.merged import export_merged
from hf_gradiend.adapter.export.supertuning import export_supertuning
from hf_gradiend.base_models import load_base_model
from hf_gradiend.cli.common import load_gradiend, table
from hf_gradiend.errors import CompatibilityError, ConfigError
from hf_gradiend.evaluation.effect import EffectReport, measure_effect
from hf_gradiend.files import write_json

# Options that only one form has.
_OPTIONS = {"merged": ("gguf_file",), "lora": ("energy", "max_rank"), "supertuning": ("fraction",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--adapter", help="folder or Hub id of the adapter")
    source.add_argument("--gradiend", help="of a GRADIEND instead: its chosen edit is exported")
    parser.add_argument("--to", choices=list(_OPTIONS), required=True, help="what to write")
    parser.add_argument("--output_dir", required=True, help="new or empty folder for the export")
    parser.add_argument("--base_model", help="default: the one that the adapter names")
    parser.add_argument("--strength", type=float, help="default: the adapter's own")
    parser.add_argument("--gguf_file", help="merged: name of a GGUF file in the base model's place")
    for name, kind, what in (
        ("energy", float, "lora: share of each matrix's energy to keep; default: 0.99"),
        ("max_rank", int, "lora: largest rank; default: 64"),
        ("fraction", float, "supertuning: share of the entries to keep; default: 0.01"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=what)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Export, and of what is not exact measure how much of the effect is kept.

    Raises:
        CompatibilityError: If the adapter names no base model and none is given.
    """
    options = _options(args)
    check_new_folder(args.output_dir)
    adapter = _adapter(args)
    base_name = args.base_model or adapter.config.base_model_name_or_path
    if base_name is None:
        raise CompatibilityError(
            f"Expected a base model, but {args.adapter or args.gradiend!r} names none. Pass "
            f"--base_model."
        )
    options |= {"progress": not args.json}
    revision = None if args.base_model else adapter.config.revision
    effect = None
    if args.to == "merged":
        report = export_merged(adapter, base_name, args.output_dir, revision=revision, **options)
    else:
        export = export_lora if args.to == "lora" else export_supertuning
        objective = "causal" if adapter.config.task_type == "CAUSAL_LM" else None
        model, tokenizer = load_base_model(base_name, revision=revision, objective=objective)
        report = export(adapter, model, args.output_dir, **options)
        effect = measure_effect(model, tokenizer, adapter, args.output_dir)
    content = asdict(report) | {"effect": None if effect is None else asdict(effect)}
    write_json(f"{args.output_dir}/{REPORT_FILE}", content)
    if not args.json:
        print(_table(report, effect))
        print(f"Wrote {args.output_dir} ({report.n_bytes:,} bytes of weights)")
    short = {key: content[key] for key in content if key not in ("ranks", "left_out")}
    return {"output_dir": args.output_dir, "base_model": base_name, **short}


def _options(args: argparse.Namespace) -> dict:
    """The options of the form that were given.

    Raises:
        ConfigError: If one of another form was given.
    """
    given = {
        name: getattr(args, name)
        for names in _OPTIONS.values()
        for name in names
        if getattr(args, name) is not None
    }
    for form, names in _OPTIONS.items():
        alien = [f"--{name}" for name in names if form != args.to and name in given]
        if alien:
            raise ConfigError(
                f"Expected {alien[0]} with --to {form} alone, but got it with --to {args.to}."
            )
    return given


def _adapter(args: argparse.Namespace) -> GradiendAdapter:
    if args.gradiend is None:
        adapter = GradiendAdapter.from_pretrained(args.adapter)
    else:
        adapter = GradiendAdapter.from_gradiend(load_gradiend(args.gradiend))
    if args.strength is None:
        return adapter
    return GradiendAdapter(replace(adapter.config, strength=args.strength), adapter.values)


def _table(report: ExportReport, effect: EffectReport | None) -> str:
    rows = [["parameters", "number", "left out", "share of energy", "energy kept"]]
    for kind, found in report.kinds.items():
        numbers = [str(found.n_parameters), str(found.n_left_out)]
        rows.append([kind, *numbers, f"{found.energy_share:.4f}", f"{found.energy_kept:.4f}"])
    totals = [sum(k.n_parameters for k in report.kinds.values()), len(report.left_out)]
    rows.append(["all", *map(str, totals), "1.0000", f"{report.energy_kept:.4f}"])
    lines = [table(rows)]
    if report.ranks:
        ranks = sorted(report.ranks.values())
        lines.append(f"Ranks: {ranks[0]} to {ranks[-1]}, {ranks[len(ranks) // 2]} in the middle")
    if effect is not None:
        lines.append(
            f"Effect kept: {effect.effect_kept:.4f} at {effect.n_positions} slots; KL to the "
            f"adapter {effect.kl_export:.3g} nats, of the base model {effect.kl_base:.3g}"
        )
    return "\n".join(lines)
