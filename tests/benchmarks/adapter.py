"""What an adapter costs, and what is left of its edit when it is made small.

    python tests/benchmarks/adapter.py --gradiend DIR [--base_model DIR] [--skip_effect]

measures, for a gender GRADIEND with a chosen edit: a forward pass of 4×64 tokens with an active
adapter against the plain model; changing the strength against one pass over the bytes that it
touches; loading base model and adapter against the base model alone; and, for the shares of the
weights 0.1 %, 1 %, 10 % and all, the file's size against the base model's in bfloat16 and the fall
in imbalance against the dense float32 edit's, on occupations that the edit was not chosen on.
Prints a table and, last, one JSON object.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from statistics import median

import torch
from peft import PeftModel
from pieces import seconds

from hf_gradiend import GradiendAdapter, GradiendModel, load_base_model
from hf_gradiend.evaluation.report import edit_probes


def forward(base_model, folder, repeats):
    """Alternating passes of the plain and the adapted model, so that a slow moment hits both."""
    ids = torch.randint(10, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
    token = ids[:1, :1]
    adapted = PeftModel.from_pretrained(copy.deepcopy(base_model), folder)
    with torch.no_grad():
        times = {(name, kind): [] for name in ("plain", "adapted") for kind in ("4x64", "1x1")}
        for _ in range(repeats):
            for kind, tokens in (("4x64", ids), ("1x1", token)):
                for name, model in (("plain", base_model), ("adapted", adapted)):
                    call = lambda model=model, tokens=tokens: model(input_ids=tokens)  # noqa: E731
                    call()
                    times[name, kind].append(seconds(call, 3))
    found = {f"{name}_{kind}": median(values) for (name, kind), values in times.items()}
    for kind in ("4x64", "1x1"):
        found[f"ratio_{kind}"] = found[f"adapted_{kind}"] / found[f"plain_{kind}"]
    return found


def scaling(base_model, folder, repeats):
    """Setting the strength, against reading values and originals and writing weights once."""
    model = PeftModel.from_pretrained(copy.deepcopy(base_model), folder)
    model.set_strength(1.0)
    strengths = iter(range(2, 10_000))
    change = seconds(lambda: model.set_strength(1 / next(strengths)), repeats)
    steering = next(m for m in model.modules() if hasattr(m, "steering")).steering
    touched = 0
    for site in steering.sites.values():
        touched += site.weight.originals.nbytes * 2  # original read, weight written
        for update in site.weight.updates:
            touched += sum(t.nbytes for t in (update.weight, update.bias) if t is not None)
        if site.weight.indices is not None:
            touched += site.weight.indices.nbytes
    source = torch.ones(touched // 8)
    target = torch.empty_like(source)
    one_pass = seconds(lambda: target.copy_(source), 5)  # reads and writes half of the bytes each
    return {"seconds": change, "touched_bytes": touched, "one_pass_seconds": one_pass,
            "ratio": change / one_pass}  # fmt: skip


def loading(name, folder, repeats):
    plain = seconds(lambda: load_base_model(name), repeats)

    def with_adapter():
        model, _ = load_base_model(name)
        PeftModel.from_pretrained(model, folder).set_strength(1.0)

    adapted = seconds(with_adapter, repeats)
    return {"plain": plain, "with_adapter": adapted, "ratio": adapted / plain}


def effect(adapter, base_model, probe, before):
    model = adapter.apply_to(base_model)
    after = probe.measure()  # the probe's model is the one under the adapter
    model.unload()
    return {
        "imbalance": after.imbalance,
        "fall": 1 - after.imbalance / before.imbalance,
        "lm_score": after.lm_score / before.lm_score,
        "mass": after.mass / before.mass,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradiend", required=True)
    parser.add_argument("--base_model")
    parser.add_argument("--skip_effect", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    gradiend = GradiendModel.from_pretrained(args.gradiend)
    name = args.base_model or gradiend.config.base_model_name_or_path
    base_model, tokenizer = load_base_model(name)
    base_bytes = 2 * sum(p.numel() for p in base_model.parameters())  # in bfloat16
    probe = None if args.skip_effect else edit_probes(gradiend, base_model, tokenizer)[1]
    before = None if probe is None else probe.measure()
    forms = [
        ("all, float32", None, torch.float32, True),
        ("all, bfloat16", None, torch.bfloat16, True),
    ]
    for share in (0.1, 0.01, 0.001):
        forms += [
            (f"{share:.1%}, bfloat16", share, torch.bfloat16, True),
            (f"{share:.1%}, bfloat16, h fixed", share, torch.bfloat16, False),
        ]
    result = {"threads": torch.get_num_threads(), "base_bytes": base_bytes, "forms": {}}
    for label, top_k, dtype, adjustable in forms:
        adapter = gradiend.to_adapter(top_k=top_k, dtype=dtype, adjustable=adjustable)
        with tempfile.TemporaryDirectory() as folder:
            adapter.save_pretrained(folder)
            row = {"bytes": sum(f.stat().st_size for f in Path(folder).iterdir())}
            row["share_of_base"] = row["bytes"] / base_bytes
            if probe is not None:
                row |= effect(GradiendAdapter.from_pretrained(folder), base_model, probe, before)
            if label in ("all, float32", "1.0%, bfloat16"):
                row["forward"] = forward(base_model, folder, args.repeats)
                row["scaling"] = scaling(base_model, folder, 4 * args.repeats)
                row["loading"] = loading(name, folder, 3)
        result["forms"][label] = row
        print(label, json.dumps(row))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
