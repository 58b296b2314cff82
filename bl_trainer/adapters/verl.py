"""Any objective in verl's supervised fine-tuning: a module named by `model.external_lib` calls `install`."""

from typing import Any

import torch
from torch import Tensor

from ..errors import LossError
from ..head.targets import IGNORED
from ..losses import per_token
from ..losses.pricing import Pricing
from ..objectives import Objective, Threshold


def install(objective: Any, threshold: Any = None) -> None:
    """Give verl's SFT trainers an objective in place of `sft_loss`, which they look up when they start.

    `objective`, `threshold`: as in a recipe. verl tells its loss neither training progress nor, by default, the entropy.
    """
    from verl.workers.utils import losses

    losses.sft_loss = SFTLoss(objective, threshold)


class SFTLoss:
    """verl's `sft_loss` with an objective: its mean cost over the targets of the global batch, times the number of ranks."""

    def __init__(self, objective: Any, threshold: Any = None):
        read = Pricing.read(objective, threshold, None)
        self.objective: Objective = read.objective
        self.threshold: Threshold = read.threshold

    def __call__(self, config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a micro-batch, and no metrics, from `log_probs`, and `loss_mask` or `response_mask`."""
        logp, entropy = model_output["log_probs"], model_output.get("entropy")
        if logp.is_nested:
            labels = following(data["input_ids"], data["loss_mask"])
            logp, entropy = logp.values(), None if entropy is None else entropy.values()
        else:
            labels = data["response_mask"].bool()
        known = {} if entropy is None else {"entropy": entropy}
        cost = per_token(logp, labels, self.objective, self.threshold, **known)
        loss = cost.sum() / data["batch_num_tokens"] * data["dp_size"]
        return loss, {}


def following(tokens: Tensor, mask: Any) -> Tensor:
    """Return the label of each of the nested tokens' log p, flat: the next token of its row, -100 where that is no target."""
    first, is_target = mask.offsets()[:-1], mask.values().bool()
    if is_target[first].any():
        raise LossError("Cannot count targets: `loss_mask` has a row's first token, which nothing predicts. Set it to 0 there.")
    return torch.where(is_target, tokens.values(), IGNORED).roll(-1)
