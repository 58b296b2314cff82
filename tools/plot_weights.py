"""Draw W_f(p) of the built-in objectives: `python tools/plot_weights.py [docs/weights.svg]`."""

import sys
from typing import Any

import matplotlib.pyplot as plt
import torch

from bl_trainer import Objective

SPECS: list[tuple[str, str | dict[str, Any]]] = [
    ("power, alpha = -0.25", {"name": "power", "alpha": -0.25}),
    ("nll", "nll"),
    ("power, alpha = 0.5", {"name": "power", "alpha": 0.5}),
    ("neg_p", "neg_p"),
    ("power, alpha = 10", {"name": "power", "alpha": 10}),
    ("log_one_minus_p", "log_one_minus_p"),
]


def main(path: str) -> None:
    """Write the figure to `path`."""
    p = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    plt.rcParams["svg.hashsalt"] = "bl_trainer"  # the same bytes every time
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for label, spec in SPECS:
        weight = Objective.parse(spec).weight(p.log())
        axes.plot(p, weight / weight.max(), label=label)
    axes.set(xlabel="probability p of the target token", ylabel="pull on its logit, W(p) / max W", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/weights.svg")
