"""What `test_processes.py` launches: the gradient of a model that FSDP2 shards, against that of the whole model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer

from bl_trainer.head import add_scoring, objective_head
from bl_trainer.objectives import Objective, Threshold, price
from conftest import make_double


def gradient(model, ids):
    objective = Objective.parse("neg_p")

    def use(hidden, head, target):
        return objective_head(hidden, head, target, lambda statistics: price(objective, Threshold(), statistics))

    add_scoring(model)
    return lambda: model(input_ids=ids, labels=ids, use=use)[0].cost.sum().backward()


def main(folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(4, 40, (processes, 12), generator=torch.Generator().manual_seed(0))
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
            found = parameter.grad.full_tensor() * processes  # FSDP2 takes the mean
            error = (found - wanted.grad).norm() / wanted.grad.norm()
            assert error < 1e-9, (tied, own_unit, name, error)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
