"""What `worker.py` asks on several processes: the gradient of a model that FSDP2 shards, against that of the whole model."""

import torch
from torch.distributed.fsdp import fully_shard

from bl_trainer.head.ops import objective_head
from bl_trainer.head.patch import add_scoring
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.pricing import price
from bl_trainer.objectives.threshold import Threshold
from conftest import make_double


def gradient(model, ids):
    objective = Objective.parse("neg_p")

    def use(hidden, head, target):
        return objective_head(hidden, head, target, lambda statistics: price(objective, Threshold(), statistics))

    add_scoring(model)
    return lambda: model(input_ids=ids, labels=ids, use=use).found.cost.sum().backward()


def errors(tokenizer):
    """Return the relative error of each parameter's gradient, the head tied, with the rest, and as a unit of its own."""
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ids, found = torch.randint(4, 40, (processes, 12), generator=torch.Generator().manual_seed(0)), {}
    for tied, own_unit in ((True, False), (False, False), (False, True)):
        whole, sharded = (make_double(tokenizer, tie_word_embeddings=tied) for _ in range(2))
        gradient(whole, ids)()
        step = gradient(sharded, ids[rank : rank + 1])
        for layer in sharded.model.layers:
            fully_shard(layer)
        if own_unit:
            fully_shard(sharded.lm_head)
        fully_shard(sharded)
        step()
        for (name, parameter), wanted in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            mean = parameter.grad.full_tensor() * processes  # FSDP2 takes the mean
            found[tied, own_unit, name] = ((mean - wanted.grad).norm() / wanted.grad.norm()).item()
    return found
