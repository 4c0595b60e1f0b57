"""Choose the edit that balances she and he, write the edited model and an adapter, and push them.

python examples/debias_and_push.py --gradiend gradiend-gender --output_dir debiased
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import cached_file

from hf_gradiend import GradiendAdapter, GradiendError, GradiendModel, load_base_model
from hf_gradiend.evaluation.probe import compared
from hf_gradiend.evaluation.report import choose_gender_edit, edit_probes, is_gender
from hf_gradiend.files import write_json
from hf_gradiend.hub import push_debiased_model


def parse() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--gradiend", required=True, help="folder or Hub id")
    parser.add_argument("--report", help="default: report.json beside the GRADIEND's weights")
    parser.add_argument("--base_model", help="default: the one that the GRADIEND names")
    parser.add_argument("--feature_factor", type=float, help="h; default: the stored edit's")
    parser.add_argument("--step_size", type=float, help="α; default: the stored edit's")
    parser.add_argument("--choose", action="store_true", help="choose again where one is stored")
    parser.add_argument("--top_k", type=float, default=0.01, help="share of weights in the adapter")
    parser.add_argument("--output_dir", default="debiased")
    parser.add_argument("--push_to_hub", action="store_true")
    parser.add_argument("--hub_model_id", help="org/name of the model; the others get a suffix")
    parser.add_argument("--private", action="store_true", default=None)
    args = parser.parse_args()
    if (args.feature_factor is None) != (args.step_size is None):
        parser.error("--feature_factor and --step_size belong together")
    if args.push_to_hub and not args.hub_model_id:
        parser.error("--push_to_hub needs --hub_model_id org/name")
    return args


def edit_of(gradiend: GradiendModel, base: tuple, args: Namespace) -> tuple[float, float]:
    """The edit (h, α) that is given, stored, or else chosen on half of the occupations."""
    if args.step_size is not None:
        return args.feature_factor, args.step_size
    if gradiend.config.step_size is not None and not args.choose:
        return gradiend.config.feature_factor, gradiend.config.step_size
    judged = choose_gender_edit(gradiend, *base, with_sweep=False)
    if judged is None:
        sys.exit("No edit within the limits is better than the base model; nothing was written.")
    return judged.choice.feature_factor, judged.choice.step_size


def judge(gradiend: GradiendModel, base: tuple) -> dict[str, object]:
    """What the edit does on the other half of the occupations, for report.json."""
    _, probe = edit_probes(gradiend, *base)
    before = probe.read()
    with gradiend.edited(base[0]):  # the original bits come back afterwards
        after = probe.read()
    intervals = {}
    for name, found in compared(before, after).items():
        intervals[name] = {when: asdict(estimate) for when, estimate in found.items()}
        old, new, ratio = found["before"].value, found["after"].value, found["ratio"]
        interval = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        print(f"{name:10} {old:.3f} -> {new:.3f}   ratio {interval}")
    measures = {"before": asdict(before.measures), "after": asdict(after.measures)}
    # What the report says of another edit would be wrong of this one.
    return {**measures, "intervals": intervals, "occupations": [], "sweep": [], "strengths": []}


def size_of(adapter: GradiendAdapter, file: Path) -> dict[str, object]:
    """What report.json and the card say of the adapter."""
    config = adapter.config
    return {"n_values": config.n_values, "dtype": config.dtype, "bytes": file.stat().st_size}


def main() -> None:
    """Choose, judge, write, push."""
    args = parse()
    gradiend = GradiendModel.from_pretrained(args.gradiend)
    if not is_gender(gradiend):
        sys.exit("Expected a GRADIEND of she and he, which the package has texts to judge on.")
    place = args.report or cached_file(args.gradiend, "report.json")
    report = json.loads(Path(place).read_text("utf-8"))
    name = args.base_model or gradiend.config.base_model_name_or_path
    base = load_base_model(name, objective=gradiend.config.objective)  # and its tokenizer

    h, alpha = edit_of(gradiend, base, args)
    gradiend.config.update({"feature_factor": h, "step_size": alpha})
    print(f"edit: θ + {alpha:.4g} · dec({h:.3g})")
    report |= {"edit": {"feature_factor": h, "step_size": alpha}, **judge(gradiend, base)}

    folder = Path(args.output_dir)
    adapter = gradiend.to_adapter(top_k=args.top_k, dtype=torch.bfloat16)
    adapter.save_pretrained(folder / "adapter")
    with gradiend.edited(base[0]):
        for part in base:  # model and tokenizer
            part.save_pretrained(folder / "edited-model")
    report["adapter"] = size_of(adapter, folder / "adapter" / "adapter_model.safetensors")
    write_json(folder / "report.json", report)
    print(f"Wrote adapter, edited-model and report.json to {folder}")

    if args.push_to_hub:
        repo, options = args.hub_model_id, {"report": report, "private": args.private}
        commits = [
            push_debiased_model(gradiend, *base, repo, **options),
            adapter.push_to_hub(f"{repo}-adapter", **options),
            gradiend.push_to_hub(f"{repo}-gradiend", **options),
        ]
        print("\n".join(f"Pushed to {commit.commit_url}" for commit in commits))


if __name__ == "__main__":
    try:
        main()
    except (GradiendError, OSError) as error:
        sys.exit(f"debias_and_push.py: {error}")
