"""Write temperature.md and temperature.svg: `python tools/temperature_page.py [docs/results]`.

Predictions are computed here. The measurements in docs/results/temperature.json are those of studies/temperature_study.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from bl_trainer.cells.field import stored
from bl_trainer.cells.results import Results, over_models
from bl_trainer.objectives import OBJECTIVES, Objective, effective_temperature, spell

MEASURED = Path(__file__).parents[1] / "docs" / "results" / "temperature.json"
# Of objectives with parameters that must be given, or whose defaults show little
SPECS: dict[str, list[dict[str, Any]]] = {
    "power": [{"alpha": alpha} for alpha in (-0.5, 0.25, 0.5, 10)],
    "anneal": [{}, *({"start": c, "end": c} for c in (0.25, 0.5, 1))],
    "dft": [{}, {"min_weight": 0.1}],
    "talr": [{"tau": 1.5}],
    "profit": [{"tau": 0.1}],
    "deft_cayley": [{"mean_p": 0.5}],
}
COMPOSED: list[tuple[dict[str, Any], float | None]] = [
    ({"name": "neg_p", "mix": {"nll": 0.1}}, None),
    ({"name": "neg_p", "floor": 0.1}, None),
    ({"name": "nll"}, 0.2),
]
PAGE = """# Effective temperature

<!-- Written by tools/temperature_page.py (`make figures`). -->

An objective that favours probable tokens sharpens the model. This page says how much: at its optimum, many an objective equals
`nll` sampled at a lower temperature.

## The derivation

Let tokens v follow one context with probability T_v. Training moves the logits z of that context by the expected gradient

    dz = sum_v T_v (w_v (e_v - p) - s_v dH/dz)

Here w_v is the objective's weight on the NLL gradient at target v. e_v is one at v and zero elsewhere. s_v is the slope in the
entropy H. Whatever the objective detaches is held. Without a slope in H, training rests where p_v is proportional to T_v w_v.

- `nll` has w = 1 and rests at p = T.
- `power` with alpha = a < 1 has w = p^a. It rests where p^(1-a) ~ T, so **p_v ~ T_v^(1/(1-a))**: T at temperature 1 - a.
- `power` with a >= 1 has no such rest. It ends at the most probable token alone, which is temperature 0. `neg_p` has a = 1.
- With a = c e^-H, and H detached, the exponent depends on where p comes to rest. The temperature is 1 - c e^-H(p), with H at p.
- A weight of the entropy alone (`eaft`, `mile`) is the same for every token of a context. It rests at p = T.

So compare objectives at equal temperature, or each at its best temperature. An objective that samples well at temperature 1 may
be `nll` at a lower one.

Sharpening has a price: valid alternatives go as well as noise. No function of p and H can tell 70 to 30 noise from 70 to 30
diversity. Of two equally valid answers one takes over where the temperature in the second column is 0. Then it has all
probability, or with a floor on the weights nearly all.

## The table

Each column is a distribution T: two tokens of 70 and 30 %, two of 50 % each, and one of 90 % with 25 of 0.4 %. The model starts
at p = T and follows the gradient. Schedules are read at the end of training, and a reference model has p = T. For 50 to 50 the
temperature is the limit as T becomes even. A run that ends before its optimum is less sharp than the table says.

{table}

1 is T itself, 0 the most probable token alone. Above 1 the model is flatter than T. An objective with three equal values has a
fixed temperature. Where they differ it depends on T, and no single temperature makes `nll` its equal.

```python
from bl_trainer.objectives import effective_temperature

print(effective_temperature("neg_p"))
print(effective_temperature({{"name": "power", "alpha": 0.5}}).fixed)
print([rest.p for rest in effective_temperature("my_losses:my_objective", threshold=0.1).rests])
```

It takes any objective and threshold, a function of your own too. It uses the weights that training uses.

## Predicted and measured

`python studies/temperature_study.py` trains one small transformer per objective on three contexts with such T. 52 to 48
replaces 50 to 50. Training begins with `nll` and continues with the objective. The largest difference between predicted and
measured p is {worst}. Each cell has the predicted, then the measured p of the first token.

![Predicted and measured probability of the first token](temperature.svg)

{measured}

That tests the derivation. It does not test runs that end early, learn little, or share weights among many contexts. On the
[cells](cells.md), after 80 steps, `power 0.5` at temperature 1 is not what `nll` is at 0.5. The share of right answers differs
by {cells}, and on the [judge's cells](default.md) by {judged} (95 %, eight models each).
"""


def table() -> str:
    """Return the table of all objectives."""
    specs = [({"name": name, **given}, None) for name in OBJECTIVES for given in SPECS.get(name, [{}])]
    lines = ["| objective | 70 to 30 | 50 to 50 | 90 and 25 x 0.4 | fixed |", "|---|---|---|---|---|"]
    for spec, threshold in [*specs, *COMPOSED]:
        found = effective_temperature(spec, threshold)
        name = spell(Objective.parse(spec).to_dict()) + ("" if threshold is None else f", threshold {threshold:g}")
        values = " | ".join(f"{rest.temperature:.3f}" for rest in found.rests)
        lines.append(f"| `{name}` | {values} | {'' if found.fixed is None else f'{found.fixed:.2g}'} |")
    return "\n".join(lines)


def apart(results: Results) -> str:
    """Return how many more answers `power 0.5` has right at temperature 1 than `nll` at temperature 0.5."""
    ours, theirs = (results.mean(*each).by_model for each in (("power 0.5", "sampled_1"), ("nll", "sampled_0.5")))
    found = over_models({model: ours[model] - theirs[model] for model in ours}, (-1.0, 1.0))
    low, high = found.interval or (found.mean, found.mean)
    return f"{found.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def comparison(measured: dict[str, dict[str, list[float]]]) -> str:
    """Return the table of predicted and measured p of the first token."""
    lines = ["| objective | 70 to 30 | 52 to 48 | 90 and 25 x 0.4 |", "|---|---|---|---|"]
    for name, one in measured.items():
        pairs = zip(one["predicted"], one["measured"], strict=True)
        lines.append(f"| `{name}` | {' | '.join(f'{p:.3f} / {q:.3f}' for p, q in pairs)} |")
    return "\n".join(lines)


def worst(measured: dict[str, dict[str, list[float]]]) -> str:
    """Return the largest difference, and where it is."""
    found = max((abs(p - q), name) for name, one in measured.items() for p, q in zip(*one.values(), strict=True))
    return f"{found[0]:.4f} (`{found[1]}`)"


def draw(measured: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Write the figure."""
    plt.rcParams["svg.hashsalt"] = "bl_trainer"  # the same bytes every time
    figure, axes = plt.subplots(figsize=(4.2, 4))
    for i, (title, marker) in enumerate((("70 to 30", "o"), ("52 to 48", "s"), ("90 and 25 x 0.4", "^"))):
        points = [(one["predicted"][i], one["measured"][i]) for one in measured.values()]
        axes.plot(*zip(*points, strict=True), marker, ms=5, label=title, alpha=0.7, linestyle="none")
    axes.plot([0.45, 1], [0.45, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="predicted p of the first token", ylabel="measured")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(folder: str) -> None:
    """Write page and figure into `folder`."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    judged = stored(MEASURED.with_name("judged.json.gz"))
    parts = {"cells": apart(stored()), "judged": apart(judged)}
    page = PAGE.format(table=table(), worst=worst(measured), measured=comparison(measured), **parts)
    (Path(folder) / "temperature.md").write_text(page, encoding="utf-8")
    draw(measured, Path(folder) / "temperature.svg")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
