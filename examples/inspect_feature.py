"""Where a feature sits: its energy by layer and kind of weight, and its largest single weights.

python examples/inspect_feature.py --gradiend gradiend-gender
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

import torch

from hf_gradiend import GradiendModel
from hf_gradiend.evaluation.features import energy_by_layer
from hf_gradiend.parameters import selection_of
from hf_gradiend.plotting import plot_energy

LAYER = re.compile(r"\.(\d+)\.")  # model.layers.3.mlp.up_proj.weight


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradiend", required=True, help="folder or Hub id")
    parser.add_argument("--n_weights", type=int, default=10, help="single weights to show")
    parser.add_argument("--output_dir", default=".", help="folder for energy.png")
    return parser.parse_args()


def shares_by_kind(energy: dict[str, float]) -> dict[str, float]:
    """Shares of the energy by kind of weight."""
    total = sum(energy.values())
    shares: dict[str, float] = defaultdict(float)
    for name, value in energy.items():
        shares[kind_of(name)] += value / total
    return shares


def shares_by_layer(energy: dict[str, float]) -> dict[str, float]:
    """Shares of the energy by layer."""
    return {
        "outside of layers" if layer is None else f"layer {layer}": share
        for layer, share in energy_by_layer(energy).items()
    }


def kind_of(name: str) -> str:
    """A weight's place in its layer: `mlp.up_proj` of `model.layers.3.mlp.up_proj.weight`."""
    return LAYER.split(name)[-1].removesuffix(".weight").removesuffix(".bias")


def show(title: str, shares: dict[str, float]) -> None:
    """Print shares with bars, the largest first."""
    print(f"\n{title:32} share of the energy")
    longest = max(shares.values())
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"{name:32} {share:6.1%}  {'#' * round(30 * share / longest)}")


@torch.no_grad()
def largest_weights(gradiend: GradiendModel, number: int) -> list[tuple[float, str, tuple]]:
    """Value, name and position of the decoder's weights that are furthest from 0."""
    found = []
    for entry in selection_of(gradiend):
        values = gradiend.decoder.weight.at(entry.name)[0]  # of the first feature
        values = entry.scatter(values).float()  # a sparse GRADIEND holds a part of the entries
        top = values.abs().flatten().topk(min(number, values.numel())).indices
        for position in zip(*torch.unravel_index(top, values.shape), strict=True):
            place = tuple(map(int, position))
            found.append((float(values[place]), entry.name, place))
    return sorted(found, key=lambda item: -abs(item[0]))[:number]


def main() -> None:
    """Read the decoder, print the tables, draw the picture."""
    args = parse()
    gradiend = GradiendModel.from_pretrained(args.gradiend)
    energy = gradiend.energy_by_parameter()
    print(f"{gradiend.config.n_selected:,} weights in {len(energy)} parameters")
    show("kind of weight", shares_by_kind(energy))
    show("layer", shares_by_layer(energy))
    print(
        f"\nlargest single weights of the decoder, of a norm of {sum(energy.values()) ** 0.5:.4g}"
    )
    for value, name, place in largest_weights(gradiend, args.n_weights):
        print(f"{value:+.3e}  {name}[{', '.join(map(str, place))}]")
    try:
        report = {
            "energy": energy,
            "n_selected": gradiend.config.n_selected,
            "base_model": Path(gradiend.config.base_model_name_or_path or "base model").name,
            "solver": "decoder",
        }
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        print(f"\nWrote {plot_energy(report, Path(args.output_dir) / 'energy.png')}")
    except ImportError as error:  # no matplotlib
        print(f"\n{error}")


if __name__ == "__main__":
    main()
