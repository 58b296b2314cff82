"""Write objectives.md and objectives.svg, of all built-in objectives: `python tools/objectives_page.py [docs/reference]`.

The page is made of the registry: formulas, texts and sources are the docstrings, parameters and statistics the signatures.
"""

import inspect
import math
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from bl_trainer import Objective
from bl_trainer.objectives import effective_temperature
from bl_trainer.objectives.contract import STATISTICS
from bl_trainer.objectives.objective import OBJECTIVES

P = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
# What each panel shows: label, parameters, and statistics of every token
CURVES: dict[str, list[tuple[str, dict[str, Any], dict[str, float]]]] = {
    "power": [(f"alpha {alpha:g}", {"alpha": alpha}, {}) for alpha in (-0.25, 0.5, 10)],
    "dft": [(f"min_weight {least:g}", {"min_weight": least}, {}) for least in (0, 0.1)],
    "talr": [(f"tau {tau:g}", {"tau": tau}, {}) for tau in (0.5, 1, 4)],
    "profit": [(f"tau {tau:g}", {"tau": tau}, {}) for tau in (0.3,)],
    "focal": [(f"gamma {gamma:g}", {"gamma": gamma}, {}) for gamma in (0.5, 2)],
    "anneal": [
        (f"progress {progress:g}, entropy {entropy:g}", {}, {"progress": progress, "entropy": entropy})
        for progress, entropy in ((0.5, 0), (1, 0), (1, 2))
    ],
    "eaft": [(f"entropy {entropy:g}", {}, {"entropy": entropy}) for entropy in (0.3, 1, 3)],
    "mile": [(f"entropy {entropy:g}", {}, {"entropy": entropy}) for entropy in (0, 0.5, 1)],
    "deft": [(f"sum of p² {square:g}", {}, {"log_sum_sq_probs": math.log(square)}) for square in (0.1, 0.5, 1)],
    "deft_cayley": [(f"mean p {mean:g}", {"mean_p": mean}, {}) for mean in (0, 0.8)],
    "asft": [(f"reference's p {p:g}", {}, {"ref_logp": math.log(p)}) for p in (0.1, 0.5, 0.9)],
    "psft": [(f"reference's p {p:g}", {}, {"ref_logp": math.log(p)}) for p in (0.1, 0.5, 0.9)],
}
PLAIN: list[tuple[str, dict[str, Any], dict[str, float]]] = [("", {}, {})]
# Parameters that must be given, for the effective temperature
EXAMPLES: dict[str, dict[str, Any]] = {
    "power": {"alpha": 0.5},
    "talr": {"tau": 1},
    "profit": {"tau": 0.3},
    "deft_cayley": {"mean_p": 0.8},
}
COSTS = {
    "entropy": "nothing: every run reports it",
    "log_sum_sq_probs": "one more sum over the vocabulary, while a block of logits is there",
    "is_top1": "nothing: every run reports it",
    "ref_logp": "one more forward pass, without gradient and adapter; nothing if a column of the data has it",
    "label": "nothing",
    "progress": "nothing",
}
PAGE = """# Objectives

<!-- Written by tools/objectives_page.py (`make figures`) from the docstrings. -->

Every objective that can be named in a recipe. The gradient of a target token is that of NLL, times a weight; an objective is
its weight.

{table}

The **effective temperature** is where an objective comes to rest: at its optimum it equals `nll` sampled at that temperature.
1 is the data's own distribution, 0 the most probable token alone. Three values are for two tokens of 70 and 30 %, two of 50 %,
and one of 90 % among 25 others: [derivation and check](../results/temperature.md).

*sg* is stop-gradient: the factor counts as a number, without gradient of its own. Parameters without a default must be given:
`objective: {{name: talr, tau: 1.5}}`.

![Weight on the NLL gradient, against p](objectives.svg)

The weight on the NLL gradient against the probability p of the target. Where an objective looks at more than p, for three
values of what it looks at.

**Which one?** [Choosing an objective](../guide/worked-example.md): diagnose, then sweep. The first four are the paper's;
[`anneal`](../results/anneal.md) is ours, with a study of its own. The others are published objectives, included for comparison.
`deft`, `eaft` and `infosft` are tested [beside `nll`](../results/default.md#what-the-judge-says). The others are not.
Each can be scheduled, mixed, given a floor, and spare special tokens: see [Composing objectives](../guide/composing.md).

**Reading the loss.** Some costs also fall while targets become less probable: -sg(p) log p is 0 at p = 0. Others fall while the
model merely becomes surer, where a weight is its entropy. A schedule or a threshold changes what the loss means. So
`metric_for_best_model` defaults to `eval_nll` under every objective but `nll`, and `eval_loss` is refused.
`nll`, `target_prob` and accuracy are reported for every objective.

**What they share.** The sum of costs is divided by all target tokens. Some papers weigh a token by the rest of its batch
(TALR's tau, MiLe's mean weight, DEFT's mean p). Here that is a fixed number, so that the gradient does not depend on how a
batch is cut into micro-batches. All are finite, with their gradients, from log p = -50 to 0.

## What they cost

Objectives of p alone cost what `nll` does. An objective gets exactly the statistics that it asks for:

{costs}

## The reference model

`asft` and `psft` compare with a reference: log p of each target token under another model. There is never a second model in
memory.

- **An adapter** (`use_peft: true`): the reference is the model without it, in the same step: no dropout, no gradient. Modules
  that are trained whole (`lora_modules_to_save`) count as part of the adapter. An adapter that trains biases of the base is
  refused, and so is prompt-learning PEFT.
- **A column `ref_logprobs`** of the data set, with which anything can be trained, in full too. It is a list of floats as long
  as `input_ids`, which must be there as well: entry t is log p of `input_ids[t]` after those before it. The first is not
  used, nor are those of tokens that are no target. It is cut, packed and padded with its tokens; lengths and values are
  checked as the data are prepared, after the model has loaded. All sets of a run must have it. It wins over an adapter. It
  doesn't go with images or context parallelism.

With neither, the run is refused before the model loads. To make the column:

```python
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("my-base")
reference = AutoModelForCausalLM.from_pretrained("my-base").eval()


def with_reference(example):
    prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(example["prompt"] + example["completion"], return_dict=True)["input_ids"]
    ids = torch.tensor([whole])
    with torch.no_grad():
        logp = reference(ids).logits[0, :-1].float().log_softmax(-1)
    return {{
        "input_ids": whole,
        "labels": [-100] * len(prompt) + whole[len(prompt) :],  # -100: no target
        "ref_logprobs": [0.0, *logp.gather(1, ids[0, 1:, None])[:, 0].tolist()],
    }}


for split in ("train", "test"):
    rows = load_dataset("my-data", split=split)
    rows.map(with_reference, remove_columns=rows.column_names).to_json(f"with-reference/{{split}}.jsonl")
```

Then `dataset_name: with-reference`. Packing by anything but `bfd`, and `truncation_mode: keep_end`, take tokens from those
before them, so they are refused with the column.

## One by one

{sections}
"""


def described(name: str) -> tuple[str, str, list[str]]:
    """Return the formula of f, that of the weight, and the other paragraphs of an objective's docstring."""
    first, *others = (" ".join(part.split()) for part in (inspect.getdoc(OBJECTIVES[name]) or "").split("\n\n"))
    found = re.fullmatch(r"f\(p\) = (.*), weight on the NLL gradient (.*)\.", first)
    assert found, f"the first sentence of `{name}` is not its formula"
    return found[1], found[2], [part for part in others if not part.startswith("`logp`:")]


def parameters(name: str) -> dict[str, str]:
    """Return the parameters of an objective, with their defaults in YAML or an ellipsis."""
    own = [p for p in inspect.signature(OBJECTIVES[name]).parameters.values() if p.name not in ("logp", *STATISTICS)]
    return {p.name: "..." if p.default is p.empty else _yaml(p.default) for p in own}


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def recipe(name: str) -> str:
    """Return how a recipe has the objective, with all its parameters."""
    given = "".join(f", {key}: {value}" for key, value in parameters(name).items())
    return f"objective: {{name: {name}{given}}}" if given else f"objective: {name}"


def temperature(name: str) -> str:
    """Return the effective temperature of an objective, by its defaults or `EXAMPLES`."""
    given = EXAMPLES.get(name, {})
    found = effective_temperature({"name": name, **given})
    values = [found.fixed] if found.fixed is not None else [rest.temperature for rest in found.rests]
    shown = ", ".join("infinity" if math.isinf(value) else f"{value:.2f}" for value in values)
    return shown + "".join(f" ({key} {value:g})" for key, value in given.items())


def page() -> str:
    """Return the page."""
    rows, sections = [], []
    for name in OBJECTIVES:
        f, weight, texts = described(name)
        asks = ", ".join(f"`{statistic}`" for statistic in Objective(name).statistics)
        rows.append(f"| [`{name}`](#{name}) | `{f}` | `{weight}` | {asks} | {temperature(name)} |")
        needs = f"Asks for {asks}." if asks else "Needs p alone."
        lines = [f"### {name}", f"```yaml\n{recipe(name)}\n```", f"f(p) = `{f}`; weight `{weight}`. {needs}", *texts]
        sections.append("\n\n".join(lines))
    header = "| objective | f(p) | weight on the NLL gradient | asks for | effective temperature |\n|---|---|---|---|---|\n"
    costs = "".join(f"| `{name}` | {COSTS[name]} |\n" for name in STATISTICS)
    return PAGE.format(
        table=header + "\n".join(rows),
        costs="| statistic | what it costs |\n|---|---|\n" + costs.rstrip(),
        sections="\n\n".join(sections),
    )


def draw(path: Path) -> None:
    """Write the figure, a panel for each objective."""
    plt.rcParams["svg.hashsalt"] = "bl_trainer"  # the same bytes every time
    figure, grid = plt.subplots(3, 6, figsize=(13, 6.4), sharex=True, sharey=True)
    for axes, name in zip(grid.flat, OBJECTIVES, strict=False):
        for label, given, statistics in CURVES.get(name, PLAIN):
            values = {k: value if k == "progress" else torch.full_like(P, value) for k, value in statistics.items()}
            axes.plot(P, Objective(name, given).gradient_weight(P.log(), **values), label=label, linewidth=1.2)
            if label:
                axes.legend(frameon=False, fontsize=7, loc="upper left")
        axes.set_title(name, fontsize=9)
        axes.set(xlim=(0, 1), ylim=(-0.25, 3.2))
        axes.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(OBJECTIVES) :]:
        axes.set_visible(False)
    figure.supxlabel("probability p of the target token", fontsize=9)
    figure.supylabel("weight on the NLL gradient", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(folder: str) -> None:
    """Write page and figure into `folder`."""
    (Path(folder) / "objectives.md").write_text(page(), encoding="utf-8")
    draw(Path(folder) / "objectives.svg")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")
