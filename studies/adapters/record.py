"""Record what a stack built on `transformers.Trainer` trains on, and the gradient of each of its optimizer steps.

A stack's own entry runs unchanged, with four exceptions: the model is in float64 where asked for, the learning rate is 0, so
that each step starts from the same weights, one row of each step loses its targets, and the gradient is kept before it is used.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.trainer_callback import CallbackHandler

STEPS = 2
CASES: dict[str, dict[str, Any]] = {
    "nll": {"objective": "nll"},
    "neg_p": {"objective": "neg_p"},
    "power": {"objective": {"name": "power", "alpha": 10}},
    "anneal": {"objective": "anneal"},
    "threshold": {"objective": "neg_p", "threshold": {"above": 1e-3, "below": 0.5}},
}


def in_own_type(norm: Qwen2RMSNorm, hidden: Tensor) -> Tensor:
    """Normalise in the type of `hidden`, where transformers goes through float32."""
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


class Recorder:
    """Batches (rows of tokens and labels) and gradients (name -> tensor) of each step, since `start`."""

    def __init__(self, double: bool):
        self.double = double
        self.start()
        if double:
            setattr(Qwen2RMSNorm, "forward", in_own_type)  # noqa: B010
        trainer = transformers.Trainer
        self._wrap(trainer, "__init__", self._make)
        self._wrap(trainer, "_get_num_items_in_batch", self._blank)
        self._wrap(trainer, "training_step", self._step)
        self._wrap(CallbackHandler, "on_pre_optimizer_step", self._keep)

    def start(self) -> None:
        self.rows: list[list[dict[str, list[int]]]] = [[]]
        self.gradients: list[dict[str, Tensor]] = []

    @staticmethod
    def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)  # stacks look at signatures
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        setattr(owner, name, wrapped)

    def _make(self, original: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
        if self.double:
            kwargs["model"] = kwargs["model"].double()
        original(trainer, *args, **kwargs)

    def _blank(self, original: Callable[..., Any], trainer: Any, batches: list[Any], *args: Any, **kwargs: Any) -> Any:
        if trainer.model.training:
            batches[-1]["labels"][0] = -100
        return original(trainer, batches, *args, **kwargs)

    def _step(self, original: Callable[..., Any], trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        begins = inputs["position_ids"] == 0 if "position_ids" in inputs else torch.zeros_like(inputs["labels"])
        for tokens, labels, begin in zip(inputs["input_ids"], inputs["labels"], begins, strict=True):
            cuts = begin[1:].nonzero()[:, 0].add(1).tolist()  # a packed row is its examples
            for first, last in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
                if last - first > 1:  # one token is padding: its position is 0, and nothing predicts it
                    self.rows[-1].append({"input_ids": tokens[first:last].tolist(), "labels": labels[first:last].tolist()})
        return original(trainer, model, inputs, *args, **kwargs)

    def _keep(self, original: Callable[..., Any], handler: Any, *args: Any, **kwargs: Any) -> Any:
        found = {name: p.grad.clone() for name, p in handler.model.named_parameters() if p.grad is not None}
        self.gradients.append({name.removeprefix("module."): grad for name, grad in found.items()})
        self.rows.append([])
        return original(handler, *args, **kwargs)


def record(stack: str, versions: dict[str, str], train: Callable[[dict[str, Any], Path], None]) -> None:
    """Run `train` on each case, its own keys and an output folder; write what it did to WORK/STACK.RANK.pt.

    The command line has the folder WORK, which `made.py` filled, and `double` or `single`.
    """
    work, double = Path(sys.argv[1]), sys.argv[2] == "double"
    recorder, found = Recorder(double), {}
    torch.distributed.destroy_process_group = lambda *args: None  # the next case goes on with the same processes
    for name, case in CASES.items():
        recorder.start()
        train(case, work / f"{stack}-{name}")
        found[name] = {"rows": recorder.rows[:-1], "gradients": recorder.gradients}
    processes, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    where = work / f"{stack}.{sys.argv[2]}.{processes}.{rank}.pt"
    torch.save({"stack": stack, "versions": versions, "cases": found}, where)
