"""What `test_launchers.py` forks: steps of a model whose head, and all else, tensor parallelism shares out, on CPUs."""

import json
import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bl_trainer.cli import end
from bl_trainer.head import Head
from ways import Ordered, build


def main(folder, data, output, objective):
    """Train on one or two processes; the weights afterwards go to `output`/trained.pt."""
    is_shared = "WORLD_SIZE" in os.environ
    if is_shared:  # accelerate shards on GPUs alone
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **({"tp_plan": "auto"} if is_shared else {}))
    rows = Dataset.from_list([json.loads(line) for line in Path(data).read_text().splitlines()])
    trainer = build(
        Ordered, AutoTokenizer.from_pretrained(folder), rows, Path(output), model, max_steps=3, gradient_accumulation_steps=2,
        per_device_train_batch_size=4, use_cpu=not is_shared, objective=objective, threshold=0.002,
    )  # fmt: skip
    trainer.train()
    assert trainer.loss_head == "own"
    assert (Head.of(trainer.model).shard is not None) is is_shared
    whole = {
        name: (part.full_tensor() if isinstance(part, DTensor) else part).detach()
        for name, part in trainer.model.named_parameters()
    }
    if int(os.environ.get("RANK", "0")) == 0:
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"weights": whole, "log": log}, Path(output) / "trained.pt")
    end(trainer)
