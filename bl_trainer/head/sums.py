"""What a block of logits says about each row, from a few sums over the vocabulary."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .lm_head import Shard


@dataclass
class TokenScores:
    """What a model says about each of N target tokens; all tensors are (N,), float32 or wider where not said otherwise.

    `logp`: log-probability of the target. `entropy`: of the next-token distribution, in nats. `top1`, `top1_logp`: the most
    probable token (its id, int64) and its log-probability. `rank`: how many tokens are more probable than the target
    (int64), 0 if it is the most probable. `log_sum_sq_probs`: log of the sum of squared probabilities. The last two may be None
    where they were not asked for.
    """

    logp: Tensor
    entropy: Tensor
    top1: Tensor
    top1_logp: Tensor
    rank: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None

    @classmethod
    def join(cls, parts: "list[TokenScores]") -> "TokenScores":
        """Return the scores of all the parts' tokens."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        return cls(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})

    def cpu(self) -> "TokenScores":
        """Return the same on the CPU."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return TokenScores(**{name: value.cpu() for name, value in values.items() if value is not None})


class Sums(NamedTuple):
    """What scores are made of, each (rows,): sums over all tokens but `top1`, the most probable, of odds = exp(logit - `top`).

    `others`: of the odds. `weighted`: of odds (logit - top). `squares`: of odds^2. `rank`: how many are above the target.
    """

    at_target: Tensor
    top: Tensor
    top1: Tensor
    others: Tensor
    weighted: Tensor
    squares: Tensor | None
    rank: Tensor | None

    def scores(self) -> TokenScores:
        """Return what the sums say."""
        log_total = self.others.log1p()
        squares = None if self.squares is None else self.squares.log1p() - 2 * log_total
        entropy = log_total - self.weighted / (1 + self.others)
        return TokenScores(self.at_target - self.top - log_total, entropy, self.top1, -log_total, self.rank, squares)

    def joined(self, shard: "Shard") -> "Sums":
        """Return the sums over the whole vocabulary from those over the part `shard`, by one exchange of six numbers.

        `at_target`: -inf where the target is in another part. `top1` and `rank`: of the whole vocabulary.
        """
        given = [self.at_target, self.top, self.top1.to(self.top.dtype), self.others, self.weighted]
        parts = shard.gathered(torch.stack(given + ([] if self.squares is None else [self.squares])))
        at_target, tops, top1s, others, weighted, *squares = parts.unbind(1)
        top, where = tops.max(dim=0)  # of equal ones the first, as in a whole row
        gap = tops - top
        odds = gap.exp()
        # The top of each part but one is among the others now
        joins = (torch.arange(len(tops), device=top.device)[:, None] != where).to(top.dtype)
        moved = torch.where(odds > 0, (weighted + (others + joins) * gap) * odds, 0.0).sum(dim=0)
        return Sums(
            at_target=at_target.amax(dim=0),
            top=top,
            top1=top1s.gather(0, where[None])[0].long(),
            others=((others + joins) * odds).sum(dim=0),
            weighted=moved,
            squares=((squares[0] + joins) * odds**2).sum(dim=0) if squares else None,
            rank=self.rank,
        )
