"""Train any objective in a plain PyTorch loop: `python examples/pytorch_loop.py MODEL DATA.jsonl`.

The rows of DATA.jsonl hold `text`. The loss head never holds the logits of a batch.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bl_trainer import LossMetrics, fused_objective

ACCUMULATED = 2  # micro-batches per step


def main(model: str, data: str, steps: int = 10) -> dict[str, float]:
    """Train `model` for a few steps of two rows each, and return the metrics of the last step."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line).get("text") for line in Path(data).read_text(encoding="utf-8").splitlines()]
    if None in rows:
        raise SystemExit(f"error: Cannot train on {data}: line {rows.index(None) + 1} has no `text`. Add the column `text`.")
    optimizer, metrics = torch.optim.AdamW(network.parameters(), lr=1e-5), LossMetrics()
    for step in range(steps):
        batches = [tokenizer(rows[(ACCUMULATED * step + i) % len(rows)], return_tensors="pt") for i in range(ACCUMULATED)]
        num_items = sum(batch["input_ids"].shape[1] - 1 for batch in batches)  # the first token of a row is no target
        for batch in batches:
            hidden = network.base_model(**batch).last_hidden_state
            loss = fused_objective(
                hidden,
                network.lm_head.weight,
                batch["input_ids"],
                "neg_p",
                threshold=0.01,
                num_items=num_items,
                metrics=metrics,
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found = metrics.pop()
        print(f"step {step + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
