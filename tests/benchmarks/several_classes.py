"""Six pairs of four classes: learned together against one after the other.

    python tests/benchmarks/several_classes.py --base_model DIR [--n_templates 48] [--own_texts]

The four seasons, in sentences that all of them fit; with --own_texts each class has sentences of
its own, as a corpus gives them. Both ways make and write six GRADIENDs of the same texts; that
their decoders are equal is tested in tests/unit/training/test_several_classes.py.
"""

import argparse
import json
import tempfile
import time

import torch
from datasets import Dataset

from hf_gradiend import GradiendTrainer, GradiendTrainingArguments, load_base_model
from hf_gradiend.cli.common import peak_rss_bytes
from hf_gradiend.training.several_classes import train_contrasts

SEASONS = ("spring", "summer", "autumn", "winter")
WHO = (
    "My neighbour",
    "Our teacher",
    "The old gardener",
    "A friend of mine",
    "The postman",
    "Everyone",
)
WHAT = (
    "likes to walk by the river in", "painted the fence again last", "always sleeps badly in",
    "told us a long story about", "remembers very little of that", "will visit the islands next",
    "bought this coat in the", "wrote a short poem about",
)  # fmt: skip
PLACE = ("", "In our town, ", "As far as we know, ", "To be honest, ")


def rows(n_templates: int, own_texts: bool) -> Dataset:
    stems = [f"{place}{who if not place else who[0].lower() + who[1:]} {what} [TARGET]."
             for what in WHAT for who in WHO for place in PLACE]  # fmt: skip
    found = []
    for number, season in enumerate(SEASONS):
        start = number * n_templates if own_texts else 0
        texts = (stems * 4)[start : start + n_templates]
        found += [
            {
                "text": text, "factual": season, "factual_class": season,
                "counterfactual": other, "counterfactual_class": other,
            }
            for text in texts
            for other in SEASONS
            if other != season
        ]  # fmt: skip
    return Dataset.from_list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--n_templates", type=int, default=48)
    parser.add_argument("--own_texts", action="store_true")
    args = parser.parse_args()
    model, tokenizer = load_base_model(args.base_model)
    data = rows(args.n_templates, args.own_texts)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GradiendTrainingArguments(
            output_dir=folder, disable_tqdm=True, save_strategy="no", load_best_model_at_end=False
        )
        started = time.perf_counter()
        names: list[str] = []
        for contrast, gradiend in train_contrasts(model, tokenizer, arguments, data):
            gradiend.save_pretrained(folder)
            names.append(contrast.name)
        together = time.perf_counter() - started
        started = time.perf_counter()
        for name in names:
            pair = name.split("-")
            own = data.filter(
                lambda row, pair=pair: (
                    {row["factual_class"], row["counterfactual_class"]} == {*pair}
                )
            )
            trainer = GradiendTrainer(model, tokenizer, arguments, own)
            trainer.train()
        apart = time.perf_counter() - started
    result = {
        "texts": len(set(zip(data["text"], data["factual"], strict=True))),
        "together_seconds": together,
        "one_after_the_other_seconds": apart,
        "times_faster": apart / together,
        "threads": torch.get_num_threads(),
        "peak_rss": peak_rss_bytes(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
