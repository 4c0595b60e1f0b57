"""Train cases one after the other, alone or under torchrun; what each process saw goes to a file.

python train_cases.py settings.json: `data`, `cases` by name, and `found`, a file name with {rank}.
"""

import hashlib
import json
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

import hf_gradiend as hg


class Stop(TrainerCallback):
    """Stops at a step as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, _, state, *__, **___):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class CtrlC(TrainerCallback):
    """Sends Ctrl-C, as a terminal and a launcher do, in the middle of a step of one process."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, _, state, *__, **___):
        if state.global_step == self.step - 1 and not state.is_world_process_zero:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


CALLBACKS = {"stop": Stop, "ctrl_c": CtrlC}


def trainer_of(case, data):
    """The trainer of a case: `base_model`, `arguments`, `fully_shard`, and a step to stop at."""
    arguments = hg.GradiendTrainingArguments(use_cpu=True, disable_tqdm=True, **case["arguments"])
    model, tokenizer = hg.load_base_model(case["base_model"])
    if case.get("fully_shard"):
        for layer in model.base_model.layers:
            fully_shard(layer)
        fully_shard(model)
    splits = [Dataset.from_list(data[name]) for name in ("train", "validation")]
    callbacks = [kind(case[name]) for name, kind in CALLBACKS.items() if name in case]
    return hg.GradiendTrainer(model, tokenizer, arguments, *splits, callbacks)


def digest(model):
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return content.hexdigest()


def run(case, data):
    trainer = trainer_of(case, data)
    try:
        result = trainer.train(resume_from_checkpoint=case.get("resume"))
    except KeyboardInterrupt:
        return {"stopped": trainer.state.global_step}
    return {
        "history": result.history,
        "n_candidates": trainer.selection.n_selected,  # before a top_k
        "n_kept": trainer.share.of(trainer.selection).n_selected,
        "shows": trainer.state.is_world_process_zero,
        "digest": digest(trainer.model),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    state = PartialState(cpu=True)
    found = {name: run(case, settings["data"]) for name, case in settings["cases"].items()}
    content = json.dumps({"processes": state.num_processes, "cases": found})
    Path(settings["found"].format(rank=state.process_index)).write_text(content, "utf-8")
    state.destroy_process_group()
