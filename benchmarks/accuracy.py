"""How far each head's gradient is from float64's, on the hidden states that a pretrained model has on text.

`python benchmarks/accuracy.py --help`; by default on what `make quickstart` has prepared. Reported are relative errors,
|g - g64| / |g64|, of the gradients in hidden states and weight, and how many of the tokens a threshold at p = 0.2 puts on
the wrong side. float64 starts from the same rounded hidden states and weight.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import _ChunkedLogProbFunction

from bl_trainer.head.lm_head import Head
from bl_trainer.head.ops import objective_head
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.pricing import price
from bl_trainer.objectives.threshold import Threshold

OBJECTIVES: dict[str, Any] = {"nll": "nll", "neg_p": "neg_p", "power 10": {"name": "power", "alpha": 10}}
EDGE = 0.2


def ours(hidden: Tensor, weight: Tensor, target: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """`objective_head`."""
    head = Head(weight, None, 1.0, None)
    outputs = objective_head(hidden, head, target, lambda statistics: price(objective, Threshold(), statistics))
    return outputs.cost.sum(), outputs.scores.logp


def trl(hidden: Tensor, weight: Tensor, target: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """TRL's fused head, with the objective on top."""
    logp, *_ = _ChunkedLogProbFunction.apply(
        hidden, weight, None, target, 1.0, 32768, None, 1.0, ("log_probs", "entropy", "is_top1")
    )
    return objective(logp).sum(), logp.detach()


def full(hidden: Tensor, weight: Tensor, target: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Full logits, widened to float32."""
    logits = F.linear(hidden, weight)
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(1, target[:, None])[:, 0]
    return objective(logp).sum(), logp.detach()


ARMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"ours": ours, "TRL": trl, "full logits": full}


def gradients(
    arm: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, target: Tensor, objective: Objective
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients in hidden states and weight, in float64, and log p."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    cost, logp = arm(hidden, weight, target, objective)
    return [gradient.double() for gradient in torch.autograd.grad(cost, (hidden, weight))], logp


def measure(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, dict[str, list[float]]]:
    """Return, by objective and arm, the errors in hidden states and weight, and how many tokens are on the wrong side."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, spec in OBJECTIVES.items():
        objective = Objective.parse(spec)
        exact, exact_logp = gradients(full, hidden.double(), weight.double(), target, objective)
        found[name] = {}
        for arm, function in ARMS.items():
            grads, logp = gradients(function, hidden, weight, target, objective)
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(grads, exact, strict=True)]
            flips = int(((logp.double().exp() >= EDGE) != (exact_logp.exp() >= EDGE)).sum())
            found[name][arm] = [*errors, flips]
    return found


def states(checkpoint: str, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states of a checkpoint on `ids`, (1, length), the weight of its head, and the targets."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(ids.device)
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0, :-1]
    return hidden, model.get_output_embeddings().weight.detach(), ids[0, 1:]


def read_ids(checkpoint: str, text: Path, tokens: int, device: str) -> Tensor:
    """Return the first tokens of a text, and the one that follows them."""
    return (
        AutoTokenizer.from_pretrained(checkpoint)(text.read_text(), return_tensors="pt").input_ids[:, : tokens + 1].to(device)
    )


def main() -> None:
    """Measure, print a Markdown table, and write it to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="quickstart/SmolLM2-135M-Instruct", help="a checkpoint without a bias in its head")
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="a folder for accuracy-DEVICE.md and .json")
    options = parser.parse_args()
    ids = read_ids(options.model, options.text, options.tokens, options.device)
    lines = [
        f"{Path(options.model).name} on {ids.shape[1] - 1} tokens of {options.text.name}, {options.device}; torch "
        f"{version('torch')}, trl {version('trl')}. In each cell: relative error of the gradient in hidden states, in the "
        f"weight; tokens on the wrong side of p >= {EDGE}.",
        "",
        "| dtype | objective | " + " | ".join(ARMS) + " |",
        "|---|---" + "|---" * len(ARMS) + "|",
    ]
    record: dict[str, list[float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, target = states(options.model, ids, dtype)
        for name, found in measure(hidden, weight, target).items():
            record |= {f"{dtype}, {name}, {arm}": figures for arm, figures in found.items()}
            cells = [f"{in_hidden:.1e}, {in_weight:.1e}; {flips}" for in_hidden, in_weight, flips in found.values()]
            lines.append(f"| {str(dtype).removeprefix('torch.')} | {name} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"accuracy-{options.device}.md").write_text("\n".join(lines) + "\n")
        (options.output / f"accuracy-{options.device}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
