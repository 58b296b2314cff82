"""The adapter for verl against verl's own `sft_loss`, and where verl's trainer looks it up. Its engines need GPUs.

`nll` must give the loss and gradient of `sft_loss`, and each objective those of `as_loss` on the same logits.
"""

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from verl.trainer import sft_trainer
from verl.utils import tensordict_utils
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers import engine_workers
from verl.workers.utils import losses

from bl_trainer import as_loss
from bl_trainer.adapters.verl import SFTLoss, install

RANKS, VOCABULARY, LENGTHS = 2, 11, (7, 4, 5)


def made() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return rows of logits, of tokens, and of their loss mask, of which one has no target."""
    torch.manual_seed(0)
    tokens = [torch.randint(VOCABULARY, (length,)) for length in LENGTHS]
    masks = [torch.arange(len(row)) >= (2 if i != 1 else len(row)) for i, row in enumerate(tokens)]
    logits = [(2 * torch.randn(len(row), VOCABULARY, dtype=torch.float64)).requires_grad_() for row in tokens]
    return logits, tokens, [mask.long() for mask in masks]


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def by_verl(loss: Any, logits: list[Tensor], tokens: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a loss called as verl's engines do, with the batch's count of targets, and its gradient."""
    flat, ids = torch.cat(logits), torch.cat(tokens).roll(-1)
    logp = flat.log_softmax(-1).gather(1, ids[:, None])[:, 0].split(LENGTHS)
    data = tensordict_utils.get_tensordict(
        {"input_ids": nested(tokens), "loss_mask": nested(masks)}, {"pad_mode": DatasetPadMode.NO_PADDING}
    )
    count = torch.cat(masks).sum().item()
    tensordict_utils.assign_non_tensor(data, batch_num_tokens=count, dp_size=RANKS)
    found, _ = loss(config=None, model_output={"log_probs": nested(list(logp))}, data=data)
    return found.detach(), list(torch.autograd.grad(found, logits))


def by_logits(case: dict[str, Any], logits: list[Tensor], tokens: list[Tensor], masks: list[Tensor]) -> Any:
    """Return the loss of the same rows from their logits, padded, and its gradient."""
    labels = [torch.where(mask.bool(), row, -100) for row, mask in zip(tokens, masks, strict=True)]
    outputs = {"logits": pad_sequence(logits, batch_first=True)}
    found = RANKS * as_loss(**case)(outputs, pad_sequence(labels, batch_first=True, padding_value=-100))
    return found.detach(), list(torch.autograd.grad(found, logits))


def looked_up() -> Any:
    """Return the loss that verl's trainer gives its worker."""
    given = []
    worker = SimpleNamespace(set_loss_fn=lambda loss_fn: given.append(loss_fn), engine=None)
    sft_trainer.TrainingWorker = lambda config: worker
    engine_workers.TrainingWorkerConfig = lambda **settings: settings
    names = ("model_config", "engine_config", "optimizer_config", "checkpoint_config", "profiler_config")
    sft_trainer.SFTTrainer._build_engine(SimpleNamespace(**dict.fromkeys(names)))
    return given[0].func


if __name__ == "__main__":
    rows = made()
    torch.testing.assert_close(by_verl(SFTLoss("nll"), *rows), by_verl(losses.sft_loss, *rows), rtol=1e-12, atol=0)
    for case in (
        {"objective": "neg_p"},
        {"objective": {"name": "power", "alpha": 10}},
        {"objective": "neg_p", "threshold": 0.05},
    ):
        torch.testing.assert_close(by_verl(SFTLoss(**case), *rows), by_logits(case, *rows), rtol=1e-12, atol=1e-15)
    install("neg_p")
    assert isinstance(looked_up(), SFTLoss)
    print(f"verl {version('verl')}, torch {version('torch')}: 5 passed, 0 failed")
