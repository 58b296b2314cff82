"""Compare the gradients that stacks took with those of `BLTrainer` on the same rows: `python compare.py WORK`.

`BLTrainer` takes the rows of a step as one batch in one process, in the same type. Writes a line per stack, type and number of
processes, and fails above the tolerance, or where a token is so near a threshold that rounding could decide.
"""

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from record import CASES, STEPS, in_own_type
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from bl_trainer import BLConfig, BLTrainer

TOLERANCE = {"double": 1e-9, "single": 3e-5}
NOTHING = {"input_ids": [0, 0], "labels": [-100, -100]}
IN_FLOAT32 = Qwen2RMSNorm.forward


class InOrder(BLTrainer):
    """Takes the training set in its order."""

    train_dataset: Any

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.all: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.all.append({name: p.grad.clone() for name, p in model.named_parameters()})


def expected(model: Path, case: dict[str, Any], rows: list[list[dict[str, Any]]], dtype: str) -> list[dict[str, Tensor]]:
    """Return `BLTrainer`'s gradient of each step, whose rows are one batch."""
    seen, most = Gradients(), max(map(len, rows))
    rows = [step + [NOTHING] * (most - len(step)) for step in rows]
    with tempfile.TemporaryDirectory() as output:
        args = BLConfig(
            output_dir=output, max_steps=STEPS, per_device_train_batch_size=most, learning_rate=0.0, max_grad_norm=0.0,
            use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_length=None, disable_tqdm=True,
            gradient_checkpointing=False, **case,
        )  # fmt: skip
        data = Dataset.from_list([row for step in rows for row in step])
        weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        weights = weights.double() if dtype == "double" else weights
        tokenizer = AutoTokenizer.from_pretrained(model)
        with redirect_stdout(sys.stderr):  # stdout is for the results
            InOrder(weights, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[seen]).train()
    return seen.all


def difference(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the distance of two gradients, relative to the norm of the second."""
    assert found.keys() == right.keys(), found.keys() ^ right.keys()
    a, b = (torch.cat([each[name].flatten().double() for name in sorted(right)]) for each in (found, right))
    return ((a - b).norm() / b.norm()).item()


def probabilities(model: Path, rows: list[dict[str, Any]]) -> Tensor:
    """Return the probability of each target token of `rows`, in float64."""
    network, found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64), []
    for row in rows:
        tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:], dtype=torch.long)
        logp = network(tokens).logits[0, :-1].log_softmax(-1)
        found.append(logp[torch.arange(len(labels)), labels.clamp(min=0)][labels != -100].exp().detach())
    return torch.cat(found)


def compare(work: Path, first: Path) -> bool:
    """Print how far the recording in `first`, of rank 0, is from `BLTrainer`; return whether it is near enough."""
    stack, dtype, processes, *_ = first.name.split(".")
    ranks = [torch.load(first.with_name(f"{stack}.{dtype}.{processes}.{rank}.pt")) for rank in range(int(processes))]
    setattr(Qwen2RMSNorm, "forward", in_own_type if dtype == "double" else IN_FLOAT32)  # noqa: B010
    worst, near = {}, 1.0
    for name, case in CASES.items():
        recorded = [rank["cases"][name] for rank in ranks]
        rows = [[row for rank in recorded for row in rank["rows"][step]] for step in range(STEPS)]
        right = expected(work / "model", case, rows, dtype)
        worst[name] = max(difference(recorded[0]["gradients"][step], right[step]) for step in range(STEPS))
        if "threshold" in case:
            p, bounds = probabilities(work / "model", [row for step in rows for row in step]), case["threshold"].values()
            near = min((p / bound - 1).abs().min().item() for bound in bounds)
            kept = [((p >= case["threshold"]["above"]) & (p <= case["threshold"]["below"])).double().mean().item()]
            assert 0.1 < kept[0] < 0.9, kept
    versions = ", ".join(f"{package} {number}" for package, number in ranks[0]["versions"].items())
    numbers = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    print(f"{stack}: {versions}; {dtype}, {processes} process(es): {numbers}")
    assert near > 1e-5, f"a token is within {near} of a threshold: use another seed"
    return max(worst.values()) <= TOLERANCE[dtype]


if __name__ == "__main__":
    recordings = sorted(Path(sys.argv[1]).glob("*.0.pt"))
    results = [compare(Path(sys.argv[1]), recording) for recording in recordings]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(not results or not all(results))
