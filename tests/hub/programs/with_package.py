"""What a person with hf_gradiend does: trains, pushes, loads, and reads off numbers."""

import json
import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from hf_gradiend import (
    GradiendAdapter,
    GradiendAdapterConfig,
    GradiendError,
    GradiendModel,
    GradiendTrainer,
    GradiendTrainingArguments,
    load_base_model,
    load_feature_dataset,
    set_strength,
)
from hf_gradiend.cli import main
from hf_gradiend.evaluation.report import Origin, build_report, choose_gender_edit, read_encoder
from hf_gradiend.hub import push_debiased_model

IDS = torch.tensor([[5, 7, 11, 13]])


# ---- making and pushing ----


def push_base(folder, repo_id):
    model, tokenizer = load_base_model(folder)
    model.push_to_hub(repo_id)
    tokenizer.push_to_hub(repo_id)


def train(base, data, folder, *, report=None):
    """A GRADIEND with a chosen edit and its report, as the commands make them, and its adapter.

    With a report, its edit is taken over, and the report is made one of this base model.
    """
    splits = load_feature_dataset(data)
    model, tokenizer = load_base_model(base)
    place = Path(folder) / "gradiend"
    arguments = GradiendTrainingArguments(
        output_dir=str(place), disable_tqdm=True, feature_classes=["F", "M"]
    )
    trainer = GradiendTrainer(
        base_model=model, processing_class=tokenizer, args=arguments,
        train_dataset=splits["train"], eval_dataset=splits["validation"],
    )  # fmt: skip
    trainer.train()
    gradiend = trainer.model
    if report is None:
        report = _measured(gradiend, model, tokenizer, splits["test"], base)
    else:
        report = json.loads(Path(report).read_text())
        report |= {"base_model": base, "objective": gradiend.config.objective}
    gradiend.config.feature_factor = report["edit"]["feature_factor"]
    gradiend.config.step_size = report["edit"]["step_size"]
    gradiend.save_pretrained(place)
    (place / "report.json").write_text(json.dumps(report))
    gradiend.to_adapter().save_pretrained(f"{folder}/adapter")


def _measured(gradiend, model, tokenizer, texts, base):
    judged = choose_gender_edit(
        gradiend, model, tokenizer, max_trials=12, with_sweep=False, progress=False
    )
    encoder = read_encoder(gradiend, model, tokenizer, {"test": texts}, progress=False)
    origin = Origin(
        base,
        "names",
        n_texts={"test": len(texts)},
        settings={"solver": "closed_form"},
        hub_ids=["base_model"],
    )
    return build_report(gradiend, encoder=encoder, judged=judged, training={}, origin=origin)


def push_gradiend(folder, repo_id, *, changed=False, **options):
    gradiend = GradiendModel.from_pretrained(folder)
    if changed:
        gradiend.flip_()
        gradiend.config.step_size *= 2
    return _told(gradiend.push_to_hub(repo_id, **options))


def push_adapter(folder, repo_id, **options):
    return _told(GradiendAdapter.from_pretrained(folder).push_to_hub(repo_id, **options))


def push_debiased(folder, base, repo_id, **options):
    model, tokenizer = load_base_model(base)
    gradiend = GradiendModel.from_pretrained(folder)
    return _told(push_debiased_model(gradiend, model, tokenizer, repo_id, **options))


def _told(commit: CommitInfo) -> dict[str, str | None]:
    return {"commit": commit.oid, "pull_request": commit.pr_url}


def save_debiased(folder, base, output):
    model, tokenizer = load_base_model(base)
    GradiendModel.from_pretrained(folder).merge_into(model).save_pretrained(output)
    tokenizer.save_pretrained(output)


def command_line(*argv, token="hf_test_user"):
    """Exit code and the two streams of `hf-gradiend`."""
    before = os.environ["HF_TOKEN"]
    out, err = StringIO(), StringIO()
    try:
        os.environ["HF_TOKEN"] = token
        with redirect_stdout(out), redirect_stderr(err):
            code = main(argv)
    finally:
        os.environ["HF_TOKEN"] = before
    return code, out.getvalue(), err.getvalue()


# ---- numbers ----


def gradiend_numbers(place, *, auto=False, **options):
    """What an encoder reads from three gradients, and what the decoder gives."""
    model = (AutoModel if auto else GradiendModel).from_pretrained(place, **options)
    generator = torch.Generator().manual_seed(0)
    gradients = {
        entry["name"]: torch.randn(3, *entry["shape"], generator=generator) / 100
        for entry in model.config.parameters
    }
    decoded = [update.double().square().sum().item() for update in model.decode(0.5).values()]
    return [*model.encode(gradients).flatten().tolist(), *decoded]


def logits(place, **options):
    return _logits(AutoModelForCausalLM.from_pretrained(place, **options))


def logits_of_base(base):
    return _logits(load_base_model(base)[0])


def logits_of_edit(place, base):
    model, _ = load_base_model(base)
    with GradiendModel.from_pretrained(place).edited(model):
        return _logits(model)


def logits_with_adapter(way, place, base, **options):
    model, _ = load_base_model(base)
    if way == "PeftModel":
        model = PeftModel.from_pretrained(model, place, **options)
    elif way == "load_adapter":
        model.load_adapter(place, **options)
    elif way == "GradiendAdapter":
        model = GradiendAdapter.from_pretrained(place, **options).apply_to(model)
    elif way == "from_gradiend":
        model = get_peft_model(model, GradiendAdapterConfig.from_gradiend(place, **options))
    return _logits(model)


def load_adapter(place, **options):
    GradiendAdapter.from_pretrained(place, **options)


def make_adapter_config(place):
    GradiendAdapterConfig.from_gradiend(place)


def load_broken_adapter(way, place, base):
    """The errors of loading an adapter and of using it, and the logits at strength 0."""
    model, _ = load_base_model(base)
    errors = []
    try:
        if way == "PeftModel":
            PeftModel.from_pretrained(model, place)
        else:
            model.load_adapter(place)
    except Exception as error:  # noqa: BLE001 - peft's own, whatever it is
        errors.append(str(error))
    try:
        _logits(model)
    except GradiendError as error:
        errors.append(str(error))
        set_strength(model, 0.0)
    return errors, _logits(model)


@torch.no_grad()
def _logits(model):
    return model(IDS).logits[0, -1].tolist()


def run_code(*blocks):
    """Run the blocks of a card one after the other; what they print, and the model's logits."""
    names, out = {}, StringIO()
    with redirect_stdout(out):
        for block in blocks:
            exec(block, names)
    return out.getvalue(), _logits(names["model"]) if "model" in names else None
