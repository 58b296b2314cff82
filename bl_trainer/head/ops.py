"""What the model says about each target token, and what the objective makes of it, from the last hidden states.

A batch's logits are never held: they are formed a block of rows at a time, used, and overwritten by the next.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MeasurementError
from ..objectives.pricing import Price
from .blocks import Blocks, RowBlocks
from .gradients import Gradients
from .lm_head import Head
from .sums import TokenScores


class TokenCosts(NamedTuple):
    """What `objective_head` returns, each (N,); only `cost` carries gradient.

    `cost`: f. `weight`: of the token on the NLL gradient. `kept`: bool, whether it trains.
    """

    cost: Tensor
    weight: Tensor
    kept: Tensor
    scores: TokenScores
    is_top1: Tensor


@torch.compiler.disable
def score(hidden: Tensor, head: Head, target: Tensor, extras: tuple[str, ...] = ("rank",)) -> TokenScores:
    """Score the tokens `target`, (N,) int64, that follow `hidden`, (N, hidden size), with `extras`. Without gradient.

    Probabilities near 1 keep their distance from 1: log p = -log1p(sum of the others' odds), formed without cancellation.
    """
    blocks = Blocks(hidden, head)
    buffer = blocks.empty(blocks.rows)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        parts = [blocks.block(rows, buffer, target, extras).scores for rows in blocks]
    return TokenScores.join(parts)


@torch.compiler.disable
def log_probs(hidden: Tensor, head: Head, rows: Tensor, tokens: Tensor) -> Tensor:
    """Return log p of `tokens` (M,) after the rows `rows` (M,) of `hidden`, (N, hidden size); (M,). Without gradient."""
    blocks = Blocks(hidden, head.whole())
    buffer = blocks.empty(blocks.rows)
    found = buffer.new_empty(len(rows))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for block in blocks:
            here = ((rows >= block.start) & (rows < block.stop)).nonzero().flatten()
            logits, own = blocks.logits(block, buffer), rows[here] - block.start
            found[here] = logits[own, tokens[here]] - logits.logsumexp(dim=1)[own]
    return found


@dataclass
class TokenDivergences:
    """How far a tuned model's next-token distribution q is from the base model's p, at each of N target tokens; all (N,).

    `forward` = KL(p || q), `reverse` = KL(q || p), `js`: Jensen-Shannon divergence, all in nats over the full vocabulary.
    """

    forward: Tensor
    reverse: Tensor
    js: Tensor

    def cpu(self) -> "TokenDivergences":
        """Return the same on the CPU."""
        return TokenDivergences(self.forward.cpu(), self.reverse.cpu(), self.js.cpu())


def compare(hidden: Tensor, head: Head, base_hidden: Tensor, base_head: Head) -> TokenDivergences:
    """Compare two models' next-token distributions after `hidden` and `base_hidden`, both (N, hidden size).

    Holds two blocks of logits, and some of the rows a few times. Raises MeasurementError if the vocabularies differ in size.
    """
    sizes = base_head.vocabulary, head.vocabulary
    if sizes[0] != sizes[1]:
        raise MeasurementError(
            f"The base model has a vocabulary of {sizes[0]} tokens, the compared one of {sizes[1]}: their distributions can't "
            "be compared. Compare checkpoints of the same model."
        )
    blocks, base_blocks = Blocks(hidden, head.whole()), Blocks(base_hidden, base_head.whole())
    buffer, base_buffer = blocks.empty(blocks.rows), base_blocks.empty(blocks.rows)
    parts = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for rows in blocks:
            both = blocks.logits(rows, buffer), base_blocks.logits(rows, base_buffer)
            for logits, base_logits in zip(*(x.split(max(blocks.cached_rows, 1)) for x in both), strict=True):
                base, tuned = base_logits.log_softmax(dim=1), logits.log_softmax(dim=1)
                middle = torch.logaddexp(base, tuned) - math.log(2)
                js = (_divergence(base, middle) + _divergence(tuned, middle)) / 2
                parts.append((_divergence(base, tuned), _divergence(tuned, base), js))
    return TokenDivergences(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """Return KL(p || q) of each row; a token with p = 0 adds nothing."""
    gap = torch.where(logp == -torch.inf, 0, logp - logq)
    p = logp.exp().clamp(min=torch.finfo(logp.dtype).tiny)  # where p underflows and q = 0, the divergence is infinite, not NaN
    return torch.linalg.vecdot(p.to(gap.dtype), gap)  # of models of two types, the wider


@torch.compiler.disable
def objective_head(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    price: Callable[[dict[str, Tensor]], Price],
    extras: tuple[str, ...] = (),
    columns: Mapping[str, Tensor] | None = None,
) -> TokenCosts:
    """Return the cost of each target token, with its gradient in `hidden`, `head.weight` and `head.bias` already formed.

    `hidden`: (N, hidden size). `target`: (N,) int64. `price(statistics)` makes the costs of a block of tokens,
    elementwise, from their `logp`, `entropy`, `is_top1`, `label`, `log_sum_sq_probs` where `extras` names it, and `columns`,
    (N,) each: what else is known of the tokens.

    The gradient of the sum of costs in the logits is w (softmax - onehot), where w is `Price.weight`. So a block of logits is
    formed once, by one product. Rows with w = 0 stay out of the two products that make the gradients. Products are in
    the autocast type, or else the weight's; logits, costs and sums over blocks in float32 or wider.

    The incoming gradient must be the same for all tokens: where it isn't, the result is NaN. The gradient can be taken once,
    and has no derivative (RuntimeError).
    """
    leaves = hidden, head.weight, head.bias
    needs = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    held = sum(leaf.numel() for leaf, need in zip(leaves, needs, strict=True) if leaf is not None and need)
    blocks = Blocks(hidden, head, held)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        gradients = Gradients(blocks, needs)
        keep = gradients.add if any(needs) else None
        costs, _ = price_blocks(blocks, target, price, extras, columns, gradients.room, keep)
        grads = gradients.finish()
    return costs._replace(cost=_Attach.apply(costs.cost, grads, *leaves)) if any(needs) else costs


def price_blocks(
    blocks: RowBlocks,
    target: Tensor,
    price: Callable[[dict[str, Tensor]], Price],
    extras: tuple[str, ...],
    columns: Mapping[str, Tensor] | None,
    room: Callable[[slice], Tensor],
    keep: Callable[[slice, Any, Price], None] | None = None,
) -> tuple[TokenCosts, Tensor | None]:
    """Return the costs of target tokens without graph, and df/dentropy, (N,), None where f ignores it.

    `room(rows)` returns memory for a block of logits. `keep(rows, block, price)` takes what a gradient is made of.
    """
    parts, prices, hits = [], [], []
    for rows in blocks:
        block = blocks.block(rows, room(rows), target, extras, keep is not None)
        names = {name: getattr(block.scores, name) for name in ("logp", "entropy", *extras)}
        label = target[rows]
        hits.append(block.scores.top1 == label)
        known = {name: column[rows] for name, column in (columns or {}).items()}
        prices.append(price({**names, **known, "label": label, "is_top1": hits[-1]}))
        parts.append(block.scores)
        if keep is not None:
            keep(rows, block, prices[-1])
    cost, weight, kept = (torch.cat(column) for column in list(zip(*prices, strict=True))[:3])
    slopes = [each.entropy_slope for each in prices if each.entropy_slope is not None]
    slope = torch.cat(slopes) if slopes else None
    return TokenCosts(cost, weight, kept, TokenScores.join(parts), torch.cat(hits)), slope


class _Attach(torch.autograd.Function):
    """Gives a sum of costs the gradients that were formed along with it."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, grads: list[Tensor | None], *leaves: Tensor | None) -> Tensor:
        ctx.grads, ctx.dtypes = grads, [None if leaf is None else leaf.dtype for leaf in leaves]
        return cost.clone()  # FSDP2 warns of views

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph
            raise RuntimeError("The objective head has no second derivative. Take the gradient without `create_graph`.")
        if ctx.grads is None:
            raise RuntimeError("The gradient of the objective head can be taken once. Compute the cost again.")
        (each,), grads, ctx.grads = incoming, iter(ctx.grads), None
        scale = each[0] if len(each) else each.new_ones(())
        scale = torch.where((each == scale).all(), scale, torch.nan)
        return None, None, *(_scaled(next(grads), scale, dtype) for dtype in ctx.dtypes)


def _scaled(grad: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    if grad is None:
        return None
    return torch.mul(grad, scale, out=grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype))
