"""The pieces that `speed.py` measures, each in a process of its own, beside the simple way.

Each function takes a `Setting` and returns seconds of ours, of the simple way (what one would write
with transformers and PyTorch alone) and of the floor (the work that nobody can leave out), in one
process and on the same texts.
"""

import copy
import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_gradiend import GradiendModel, GradiendTrainer, GradiendTrainingArguments, load_base_model
from hf_gradiend.base_models import objective_of
from hf_gradiend.cli.common import peak_rss_bytes
from hf_gradiend.data.collation import collate, prepare_texts
from hf_gradiend.data.loading import load_feature_dataset
from hf_gradiend.evaluation.probe import EditProbe
from hf_gradiend.evaluation.report import edit_probes
from hf_gradiend.gradients.forward import project_texts
from hf_gradiend.gradients.objectives import target_log_probabilities
from hf_gradiend.gradients.packing import batch_for, groups_for
from hf_gradiend.parameters import select_parameters, selection_of
from hf_gradiend.training.texts import batch_at

# SmolLM2's three sizes: hidden size, layers, heads, key-value heads, intermediate size.
ARCHITECTURES = {
    "135M": (576, 30, 9, 3, 1536),
    "360M": (960, 32, 15, 5, 2560),
    "1.7B": (2048, 24, 32, 32, 8192),
}


@dataclass
class Setting:
    """What a piece is measured on.

    Args:
        base_model: Folder of a causal model, whose tokenizer is taken in any case.
        data: `train.jsonl` in the gender form.
        architecture: A name of `ARCHITECTURES` for random weights instead of the model's own.
        dtype: Of random weights.
        selection: `layers` or `backbone`.
        prune_fraction: Share of the weights to train; `None` for all.
        batch_size: Texts per step.
        n_texts: Texts of a piece that has no steps.
        steps: Steps that count, after one that does not.
    """

    base_model: str
    data: str
    architecture: str | None = None
    dtype: str = "float32"
    selection: str = "layers"
    prune_fraction: float | None = None
    batch_size: int = 8
    n_texts: int = 64
    steps: int = 4

    def load(self):
        """The base model and its tokenizer."""
        if self.architecture is None:
            return load_base_model(self.base_model)
        hidden, layers, heads, key_value_heads, intermediate = ARCHITECTURES[self.architecture]
        tokenizer = AutoTokenizer.from_pretrained(self.base_model)
        config = LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_value_heads, intermediate_size=intermediate,
            vocab_size=len(tokenizer), tie_word_embeddings=True,
        )  # fmt: skip
        config._name_or_path = self.base_model
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, self.dtype))
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        return model, tokenizer

    def rows(self):
        """The first texts of the data."""
        return load_feature_dataset(self.data)["train"]


def seconds(function, repeats=1):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, args, state, control, **kwargs):  # noqa: ARG002 - transformers' form
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002 - transformers' form
        self.times.append(time.perf_counter() - self.started)


def trained(setting, model, tokenizer, folder, **arguments):
    """A training of the given arguments, and the seconds of its steps."""
    clock = Clock()
    args = GradiendTrainingArguments(
        output_dir=folder, disable_tqdm=True, save_strategy="no", eval_strategy="no",
        load_best_model_at_end=False, parameters=[setting.selection],
        per_device_train_batch_size=setting.batch_size, **arguments,
    )  # fmt: skip
    trainer = GradiendTrainer(model, tokenizer, args, setting.rows(), callbacks=[clock])
    trainer.train()
    return trainer, clock.times


def forward_alone(model, texts, pad_token_id):
    """Seconds of one forward pass of some texts: nothing padded, the head at the slots alone."""
    batch = batch_for(model, texts, pad_token_id)
    with torch.no_grad():
        call = lambda: target_log_probabilities(model, batch)  # noqa: E731
        call()
        return seconds(call, 3)


def memory_pass(n, reads_and_writes):
    """Seconds of moving this many times n float32 numbers, half read and half written."""
    source, target = torch.ones(n), torch.ones(n)
    return seconds(lambda: [target.copy_(source) for _ in range(reads_and_writes // 2)], 3)


def training_step(setting):
    """A step of adamw: floor of five forward passes and one memory pass of 20 n floats."""
    start = time.perf_counter()
    model, tokenizer = setting.load()
    with tempfile.TemporaryDirectory() as folder:
        trainer, times = trained(
            setting, model, tokenizer, folder, solver="adamw", max_steps=setting.steps + 1,
            prune_fraction=setting.prune_fraction,
            **({} if setting.prune_fraction is None else {"prune_texts": 2 * setting.batch_size}),
        )  # fmt: skip
    found = {"whole_seconds": time.perf_counter() - start, "peak_rss_bytes": peak_rss_bytes()}
    n = trainer.model.config.n_selected
    texts = {sign: trainer.train_texts.of_sign(sign) for sign in (+1, -1)}
    batches = [
        batch_at(texts, number, setting.batch_size, trainer.args.seed).texts
        for number in range(1, setting.steps + 1)
    ]
    pad = tokenizer.pad_token_id
    forward = sum(forward_alone(model, batch, pad) for batch in batches) / len(batches)
    update = memory_pass(n, 20)
    return found | {
        "n_selected": n,
        "seconds": sum(times[1:]) / setting.steps,
        "forward_seconds": forward,
        "memory_pass_seconds": update,
        "floor_seconds": 5 * forward + update,
    }


def simple_training_step(setting):
    """The textbook step: two forward passes, one flat vector per gradient, autograd and AdamW."""
    model, tokenizer = setting.load()
    parameters = list(select_parameters(model, setting.selection).parameters(model).values())
    texts = prepare_texts(setting.rows().select(range(200)), tokenizer, objective_of(model)).texts
    n = sum(parameter.numel() for parameter in parameters)
    encoder, decoder = nn.Linear(n, 1), nn.Linear(1, n)
    both = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(both, lr=1e-5, weight_decay=1e-2, foreach=False)

    def gradient(batch, word):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        terms = batch.term_outputs % batch.n_words == word
        sites = batch.term_sites[terms]
        at = logits[batch.site_rows[sites], batch.site_positions[sites]].log_softmax(-1)
        loss = -at.gather(1, batch.term_tokens[terms][:, None]).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    def step(number):
        own = texts[number * setting.batch_size :][: setting.batch_size]
        batch = collate(own, tokenizer.pad_token_id)
        source, other = gradient(batch, 0), gradient(batch, 1)
        loss = nn.functional.mse_loss(decoder(torch.tanh(encoder(source))), source - other)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step(0)
    times = [seconds(lambda number=number: step(number)) for number in range(1, setting.steps + 1)]
    return {"simple_seconds": sum(times) / len(times), "simple_peak_rss_bytes": peak_rss_bytes()}


def closed_form(setting):
    """The closed form's pass, per text: floor of five forward passes of the same batches."""
    model, tokenizer = setting.load()
    with tempfile.TemporaryDirectory() as folder:
        trainer, times = trained(setting, model, tokenizer, folder, max_train_texts=setting.n_texts)
    peak = peak_rss_bytes()
    texts = trainer.train_texts
    fitted, _ = texts.split(trainer.args.calibration_fraction, trainer.args.seed)
    batches = [
        fitted.of_sign(sign)[start : start + setting.batch_size]
        for sign in (+1, -1)
        for start in range(0, len(fitted.of_sign(sign)), setting.batch_size)
    ]
    n_fitted = len(fitted.texts)
    forward = sum(forward_alone(model, b, tokenizer.pad_token_id) for b in batches) / n_fitted
    parameters = list(trainer.selection.parameters(model).values())
    few = sorted(fitted.texts, key=lambda text: text.length)[4::8]

    def text_by_text():
        """Two backward passes a text, and running sums of flat vectors."""
        sums = [torch.zeros(trainer.model.config.n_selected) for _ in range(2)]
        for text in few:
            logits = model(input_ids=torch.tensor([text.readings[0].input_ids])).logits
            for held, reading in zip(sums, text.readings, strict=True):
                (position, token), *_ = reading.sites
                loss = -logits[0, position].log_softmax(-1)[token]
                found = torch.autograd.grad(loss, parameters, retain_graph=True)
                held.add_(torch.cat([g.flatten() for g in found]))

    return {
        "n_selected": trainer.model.config.n_selected,
        "n_texts": n_fitted,
        "seconds": sum(times) / n_fitted,
        "floor_seconds": 5 * forward,
        "simple_seconds": seconds(text_by_text) / len(few),
        "peak_rss_bytes": peak,
    }


def encodings(setting):
    """Both tokens of a text by forward mode: floor of three forward passes of the same batches."""
    model, tokenizer = setting.load()
    selection = select_parameters(model, setting.selection)
    generator = torch.Generator().manual_seed(0)
    if setting.prune_fraction is not None:
        scores = {e.name: torch.rand(e.shape, generator=generator) for e in selection}
        selection = selection.top_k(scores, fraction=setting.prune_fraction)
    direction = {e.name: torch.randn(e.values_shape, generator=generator) * 1e-4 for e in selection}
    rows = setting.rows().select(range(setting.n_texts))
    many = prepare_texts(rows, tokenizer, objective_of(model))
    pad = tokenizer.pad_token_id
    found = {}

    def forward_mode():
        found["ours"] = project_texts(model, many, selection, direction, pad_token_id=pad)

    forward_mode()
    ours = seconds(forward_mode, 3) / len(many)
    peak = peak_rss_bytes()
    forward = sum(
        forward_alone(model, group, pad) for group in groups_for(model, many, batch_size=32)
    )
    flat = None if setting.prune_fraction else selection.flatten(direction)
    result = {
        "n_selected": selection.n_selected,
        "n_texts": len(many),
        "tokens_per_text": sum(text.length for text in many) / len(many),
        "seconds": ours,
        "floor_seconds": 3 * forward / len(many),
        "peak_rss_bytes": peak,
    }
    if flat is None:
        return result
    few = sorted(many.texts, key=lambda text: text.length)[4::16]
    parameters = list(selection.parameters(model).values())

    def one_text(text):
        """A backward pass, one flat vector and a dot product for each of the two tokens."""
        logits = model(input_ids=torch.tensor([text.readings[0].input_ids])).logits
        projections = []
        for reading in text.readings:
            (position, token), *_ = reading.sites
            loss = -logits[0, position].log_softmax(-1)[token]
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            projections.append(float(torch.dot(torch.cat([g.flatten() for g in found]), flat)))
        return projections

    start = time.perf_counter()
    simple = torch.tensor([one_text(text) for text in few])
    result["simple_seconds"] = (time.perf_counter() - start) / len(few)
    gap = (torch.stack([found["ours"][t.index] for t in few]) - simple).abs() / simple.abs()
    return result | {"median_relative_difference": float(gap.median())}


def _small_gradiend(setting, model, tokenizer, folder):
    trainer, _ = trained(setting, model, tokenizer, folder, max_train_texts=32)
    return trainer.model


@torch.no_grad()
def _add(model, update, step_size):
    """An edit as one writes it without the package."""
    for name, parameter in model.named_parameters():
        if name in update:
            parameter.add_(update[name], alpha=step_size)


def decoder_search(setting):
    """One candidate edit, applied and probed: floor of the probe alone, simple way of a copy."""
    model, tokenizer = setting.load()
    with tempfile.TemporaryDirectory() as folder:
        gradiend = _small_gradiend(setting, model, tokenizer, folder)
    probe: EditProbe = edit_probes(gradiend, model, tokenizer)[0]
    steps = itertools.count(1)
    probe.read()

    def in_place():
        with gradiend.edited(model, feature_factor=0.1, step_size=1e-4 * next(steps)):
            probe.read()

    def on_a_copy():
        kept = copy.deepcopy(model)
        _add(kept, gradiend.decode(feature_factor=0.1), 1e-4)
        probe.read()  # the same work as on the copy

    return {
        "n_selected": gradiend.config.n_selected,
        "seconds": seconds(in_place, 3),
        "floor_seconds": seconds(probe.read, 3),
        "simple_seconds": seconds(on_a_copy, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def edit(setting):
    """An edit set and undone, bit for bit: floor of reading and writing what it touches."""
    model, tokenizer = setting.load()
    with tempfile.TemporaryDirectory() as folder:
        gradiend = _small_gradiend(setting, model, tokenizer, folder)

    def in_place():
        with gradiend.edited(model, feature_factor=0.1, step_size=1e-3):
            pass

    def by_state_dict():
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _add(model, gradiend.decode(feature_factor=0.1), 1e-3)
        model.load_state_dict(kept)

    in_place()
    n = gradiend.config.n_selected
    return {
        "n_selected": n,
        "seconds": seconds(in_place, 5),
        # θ, W_d and b_d read, the originals and θ' written; then the originals back.
        "floor_seconds": memory_pass(n, 8) * 7 / 8,
        "simple_seconds": seconds(by_state_dict, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def save_and_load(setting):
    """Saving and loading a GRADIEND: floor of writing and reading the same bytes."""
    model, tokenizer = setting.load()
    with tempfile.TemporaryDirectory() as folder:
        gradiend = _small_gradiend(setting, model, tokenizer, folder)
    selection = selection_of(gradiend)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "state.pt")

        def ours():
            gradiend.save_pretrained(folder)
            GradiendModel.from_pretrained(folder)

        def simple():
            torch.save(gradiend.state_dict(), plain)
            other = GradiendModel(gradiend.config)
            other.load_state_dict(torch.load(plain))

        numbers = torch.ones(3 * selection.n_selected).numpy()

        def bytes_alone():
            numbers.tofile(plain)
            plain.read_bytes()

        ours()
        return {
            "n_selected": selection.n_selected,
            "seconds": seconds(ours, 3),
            "simple_seconds": seconds(simple, 3),
            "floor_seconds": seconds(bytes_alone, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }


PIECES = {
    function.__name__: function
    for function in (
        training_step, simple_training_step, closed_form, encodings, decoder_search, edit,
        save_and_load,
    )
}  # fmt: skip
