"""The head of a vocabulary that processes share out, against the whole one, in float64; and what it costs in communication."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bl_trainer.head.lm_head import Head, Shard, first_token
from bl_trainer.head.ops import compare, log_probs, objective_head, score
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.pricing import price
from bl_trainer.objectives.threshold import Threshold
from forking import ranks

SIZE, TOKENS = 12, 41
OBJECTIVES = ["nll", "neg_p", {"name": "power", "alpha": 10}, "anneal"]
HEADS = {"plain": {}, "whole": {"bias": True, "scale": 0.7, "softcap": 5.0}, "masked": {"masked": True}}


def make(vocabulary, bias=False, scale=1.0, softcap=None, masked=False):
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = new(TOKENS, SIZE), new(vocabulary, SIZE)
    added = new(vocabulary) if bias or masked else None
    if masked:
        added[vocabulary // 3 :] = -torch.inf  # the second process has no token that can come
    target = torch.randint(vocabulary // 3, (TOKENS,), generator=generator)
    target[::2] = torch.randint(vocabulary // 3 if masked else vocabulary, (len(target[::2]),), generator=generator)
    return hidden, Head(weight, added, scale, softcap), target


def part_of(head, processes, rank):
    each = -(-len(head.weight) // processes)
    own = slice(rank * each, (rank + 1) * each)
    shard = Shard(dist.group.WORLD, own.start, len(head.weight))
    return head._replace(
        weight=head.weight[own].clone(), bias=None if head.bias is None else head.bias[own].clone(), shard=shard
    )


def run(hidden, head, target, spec, threshold):
    objective = Objective.parse(spec)
    leaves = [leaf.detach().requires_grad_() for leaf in (hidden, head.weight, head.bias) if leaf is not None]
    head = head._replace(weight=leaves[1], bias=leaves[2] if len(leaves) > 2 else None)
    extras = ("log_sum_sq_probs",)

    def priced(statistics):
        return price(objective, threshold, {**statistics, "progress": 0.5})

    costs = objective_head(leaves[0], head, target, priced, extras)
    return costs, torch.autograd.grad(costs.cost.sum(), leaves)


def check(rank, processes, vocabulary):
    for kind, spec in ((kind, spec) for kind in HEADS for spec in OBJECTIVES):
        hidden, head, target = make(vocabulary, **HEADS[kind])
        part = part_of(head, processes, rank)
        own = slice(part.shard.start, part.shard.start + len(part.weight))
        for threshold in (Threshold(), Threshold(above=0.01)):
            ours, gradients = run(hidden, part, target, spec, threshold)
            wanted, expected = run(hidden, head, target, spec, threshold)
            for name in ("cost", "weight", "kept", "is_top1"):
                torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)
            for name in ("logp", "entropy", "top1", "top1_logp", "log_sum_sq_probs"):
                torch.testing.assert_close(getattr(ours.scores, name), getattr(wanted.scores, name), rtol=1e-9, atol=1e-12)
            expected = [expected[0], *(gradient[own] for gradient in expected[1:])]
            for got, right in zip(gradients, expected, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12)
        ours, wanted = score(hidden, part, target), score(hidden, head, target)
        assert torch.equal(ours.rank, wanted.rank)
        rows = torch.arange(0, TOKENS, 5)
        assert torch.equal(log_probs(hidden, part, rows, target[rows]), log_probs(hidden, head, rows, target[rows]))
        assert torch.equal(compare(hidden, part, 2 * hidden, part).js, compare(hidden, head, 2 * hidden, head).js)


def count(rank, processes, vocabulary):
    """Return how often `objective_head` communicates, and how many numbers a process sends."""
    hidden, head, target = make(vocabulary)
    sent = []
    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce

    def gathering(out, values, **options):
        sent.append(values.numel())
        return gather(out, values, **options)

    def reducing(values, *args, **options):
        sent.append(values.numel())
        return reduce(values, *args, **options)

    dist.all_gather_into_tensor, dist.all_reduce = gathering, reducing
    run(hidden, part_of(head, processes, rank), target, "neg_p", Threshold())
    dist.all_gather_into_tensor, dist.all_reduce = gather, reduce
    return sent


def main(folder):
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    check(rank, processes, 61)  # no multiple of the processes
    Path(folder, f"sent{rank}.json").write_text(json.dumps([count(rank, processes, size) for size in (61, 610)]))
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3])
def test_a_shared_out_head_is_the_whole_one(processes, tmp_path):
    """Cost, statistics and gradients; the numbers sent depend on tokens and hidden size, not on the vocabulary."""
    codes, said = ranks(tmp_path, main, tmp_path, processes=processes)
    assert not any(codes), said[0][-3000:]
    for rank in range(processes):
        small, large = json.loads((tmp_path / f"sent{rank}.json").read_text())
        statistics = 6  # log_sum_sq_probs is one of them
        assert small == large == [statistics * TOKENS, TOKENS * SIZE]


def test_a_process_without_tokens_is_refused():
    assert [first_token(10, 4, rank) for rank in range(4)] == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="The LM head has 9 tokens, which leaves some of 4 processes without any"):
        first_token(9, 4, 0)
