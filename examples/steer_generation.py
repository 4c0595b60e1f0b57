"""Generate text at several strengths of an adapter, and read what comes after the prompt.

python examples/steer_generation.py --adapter debiased/adapter
"""

import argparse

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gradiend  # noqa: F401 - makes the adapter's type known to peft
from hf_gradiend.evaluation.probe import spellings

PROMPTS = [
    "The nurse was tired because",
    "The engineer was proud because",
    "The doctor said that",
]
STRENGTHS = [-1.0, 0.0, 0.5, 1.0, 2.0]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True, help="folder or Hub id")
    parser.add_argument("--base_model", help="default: the one that the adapter names")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--strengths", nargs="+", type=float, default=STRENGTHS)
    parser.add_argument("--words", nargs=2, default=["she", "he"])
    parser.add_argument("--max_new_tokens", type=int, default=12)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Load, dial, print."""
    args = parse()
    name = args.base_model or PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name)
    base_model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base_model, args.adapter).eval()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = [spellings([word], tokenizer) for word in args.words]  # " she", "She", …

    heads = "".join(f"  {f'P({word})':>7}" for word in args.words)
    for prompt in args.prompts:
        print(f"\n{prompt} …\nstrength{heads}  text")
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        for strength in args.strengths:
            model.set_strength(strength)  # 0 is the base model, 1 the chosen edit
            probabilities = model(**inputs).logits[0, -1].softmax(-1)
            shares = "".join(f"  {float(probabilities[group].sum()):7.3f}" for group in ids)
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=args.max_new_tokens, pad_token_id=pad
            )
            text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
            print(f"{strength:8.2f}{shares}  {' '.join(text.split())}")


if __name__ == "__main__":
    main()
