"""Streaming statistics of target-token probabilities: bounded memory, mergeable, the same however the tokens are dealt out.

Everything is a sum in float64 or a count, on the CPU. So statistics of two parts of the data add up to those of the whole,
on one process or many.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..errors import MeasurementError
from ..head.ops import TokenDivergences, TokenScores
from ..tokens.annotation import TokenBatch
from .histogram import ProbabilityHistogram
from .means import VALUES, ExampleKey, ExampleSums, Means
from .reader import Reader, conflicts

PAPER_CONFIDENT = 0.55  # the p above which the paper counts tokens (its Tab. 6)

KINDS = ("all", "eos", "special", "template", "content")

EDGE = 16  # positions counted one by one from the start and from the end of a response

RELATIVE = 20  # bins of relative position in a response

CONFIDENCE_BINS = 20

OTHER = "(other)"

MAX_GROUPS = 100


def refuse_nan(values: Tensor, rows: Tensor) -> None:
    """Raise MeasurementError if a token's value is NaN. `rows`: (N,), number of each one's row, negative in a stream."""
    if not values.isnan().any():
        return
    row = int(rows[values.isnan()].min())
    where = f"row {row} of the data set" if row >= 0 else "an example of the stream"
    raise MeasurementError(
        f"The model gives probabilities that are NaN in {where}. Check the checkpoint, or try `dtype: float32` and "
        "`bf16: false`."
    )


class Calibration:
    """Reliability of the most probable token: by its probability, how often it is the target."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, CONFIDENCE_BINS, dtype=torch.float64)  # tokens, confidence, hits

    def add(self, confidence: Tensor, is_hit: Tensor) -> None:
        """Add tokens: probability of the most probable token and whether it is the target, both (N,)."""
        index = (confidence * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
        self.sums.index_add_(1, index, torch.stack([torch.ones_like(confidence), confidence, is_hit.to(confidence)]).double())

    def error(self) -> float:
        """Return the expected calibration error, sum over bins of (tokens / all tokens) |confidence - hit rate|."""
        tokens, confidence, hits = self.sums
        return ((confidence - hits).abs().sum() / tokens.sum()).item()

    def curve(self) -> list[dict[str, float]]:
        """Return tokens, mean confidence and hit rate of each bin in use."""
        return [
            {"tokens": int(tokens), "confidence": (confidence / tokens).item(), "accuracy": (hits / tokens).item()}
            for tokens, confidence, hits in self.sums.T
            if tokens
        ]


class Measurement:
    """All that one pass over the target tokens leaves behind. The report that is made of it: `diagnosis.summary`.

    `eos`, `special`: ids of the tokenizer's end and special tokens.
    """

    def __init__(self, eos: Sequence[int] = (), special: Sequence[int] = ()):
        self.eos, self.special = torch.tensor(sorted(eos)), torch.tensor(sorted(special))
        self.histogram = ProbabilityHistogram(len(KINDS))
        self.kinds = torch.zeros(len(KINDS), 1 + len(VALUES), dtype=torch.float64)  # tokens, then sums of VALUES
        self.examples = ProbabilityHistogram()  # of each example's mean p
        self.spread = torch.zeros(3, dtype=torch.float64)  # examples, sum and sum of squares of their mean p
        self.positions = torch.zeros(2, 2 * EDGE + RELATIVE, dtype=torch.float64)  # tokens, sum of p
        self.calibration = Calibration()
        self.groups: dict[str, Means] = {}
        self.total = Means()
        self.unmarked = torch.zeros(1, dtype=torch.float64)
        self.responses = torch.zeros(2, dtype=torch.float64)  # responses, and those that follow something that is no target
        self.reader = Reader()
        self.sums = ExampleSums(self._count)

    def add(self, batch: TokenBatch, scores: TokenScores) -> None:
        """Add a batch's target tokens. `scores` must be on the CPU. Raises MeasurementError on NaN."""
        logp, p = scores.logp.double(), scores.logp.double().exp()
        refuse_nan(scores.logp + scores.entropy, torch.tensor([each["row"] for each in batch.examples])[batch.example])
        is_conflict = conflicts(scores)
        is_hit = scores.top1 == batch.token
        values = torch.stack([p, -logp, scores.entropy.double(), is_hit.double(),
                              (p > PAPER_CONFIDENT).double(), is_conflict.double()])  # fmt: skip
        is_eos, is_special = torch.isin(batch.token, self.eos), torch.isin(batch.token, self.special)
        kinds = (torch.ones_like(is_eos), is_eos, is_special, batch.is_template, ~(is_eos | is_special | batch.is_template))
        for k, mask in enumerate(kinds):
            self.histogram.add(logp[mask], k)
            self.kinds[k] += torch.cat([mask.sum().double()[None], values[:, mask].sum(1)])
        self.unmarked += batch.is_unmarked.sum()
        begins = batch.position == 0
        self.responses += torch.stack([begins.sum(), (begins & (batch.place > 1)).sum()])
        self._add_positions(batch, p)
        self.calibration.add(scores.top1_logp.double().exp(), is_hit)

        num_tokens, sums = self.sums.add(batch, values)
        means = sums / num_tokens.clamp(min=1)
        gap = torch.where(is_conflict, scores.top1_logp - scores.logp, 0.0)
        gap = gap.new_zeros(len(num_tokens)).scatter_reduce_(0, batch.example, gap, "amax")
        self.reader.add(batch, scores, num_tokens, means[0], means[1], gap)

    def _count(self, keys: list[ExampleKey], num_tokens: Tensor, sums: Tensor) -> None:
        self.total.add(num_tokens, sums)
        members: dict[str, list[int]] = {}
        for i, (_, name) in enumerate(keys):
            if name is not None:
                members.setdefault(name, []).append(i)
        for name, mine in members.items():
            self._group(name).add(num_tokens[mine], sums[:, mine])
        present = num_tokens > 0
        means = (sums[0] / num_tokens.clamp(min=1))[present]
        self.examples.add(means.log())
        self.spread += torch.stack([present.sum().double(), means.sum(), (means**2).sum()])

    def _add_positions(self, batch: TokenBatch, p: Tensor) -> None:
        from_end = batch.length - 1 - batch.position
        relative = 2 * EDGE + batch.position * RELATIVE // batch.length
        for index, mask in (
            (batch.position, batch.position < EDGE),
            (EDGE + from_end, from_end < EDGE),
            (relative, torch.ones_like(relative, dtype=torch.bool)),
        ):
            self.positions.index_add_(1, index[mask], torch.stack([torch.ones_like(p), p])[:, mask])

    def _group(self, name: str) -> Means:
        if name not in self.groups and len(self.groups.keys() - {OTHER}) >= MAX_GROUPS:
            name = OTHER
        return self.groups.setdefault(name, Means())

    def reduce(self, accelerator: Any) -> None:
        """Finish, and add up over all processes; every process ends with the whole."""
        self.sums.finish()
        if accelerator.num_processes == 1:
            return
        for tensor in (self.histogram.counts, self.examples.counts, self.kinds, self.spread, self.positions,
                       self.calibration.sums, self.total.gram, self.unmarked, self.responses):  # fmt: skip
            tensor.copy_(accelerator.reduce(tensor.to(accelerator.device), reduction="sum").cpu())
        self.groups = merge_groups(gather_object([self.groups]))
        readers, self.reader = gather_object([self.reader]), Reader()
        for reader in readers:
            self.reader.merge(reader)


def merge_groups(parts: list[dict[str, Means]]) -> dict[str, Means]:
    """Add up groups of several processes, at most MAX_GROUPS; one that lies in a process's OTHER goes there as a whole."""
    merged: dict[str, Means] = {}
    names = sorted({name for part in parts for name in part} - {OTHER})
    whole = [name for name in names if all(name in part or OTHER not in part for part in parts)][:MAX_GROUPS]
    for part in parts:
        for name, means in part.items():
            merged.setdefault(name if name in whole else OTHER, Means()).gram += means.gram
    return merged


class Comparison:
    """What one pass with two models leaves behind: the base model's p and the tuned model's q on the same target tokens."""

    VALUES = ("kl", "reverse_kl", "js", "base_prob", "prob", "base_nll", "nll", "base_top1", "top1")
    BUCKETS = 10

    def __init__(self) -> None:
        self.total = Means(self.VALUES)
        self.sums = ExampleSums(self._count)
        self.examples: list[tuple[float, ...]] = []  # row, target tokens and the sum of each value
        self.calibration = {"base": Calibration(), "tuned": Calibration()}
        self.moved = torch.zeros(self.BUCKETS, self.BUCKETS, dtype=torch.int64)  # tokens by bucket of p, bucket of q

    def add(self, batch: TokenBatch, base: TokenScores, tuned: TokenScores, divergences: TokenDivergences) -> None:
        """Add a batch's target tokens; all on the CPU. Raises MeasurementError on NaN."""
        p, q = base.logp.double().exp(), tuned.logp.double().exp()
        hits = base.top1 == batch.token, tuned.top1 == batch.token
        values = torch.stack([divergences.forward.double(), divergences.reverse.double(), divergences.js.double(), p, q,
                              -base.logp.double(), -tuned.logp.double(), hits[0].double(), hits[1].double()])  # fmt: skip
        if values.isnan().any():
            raise MeasurementError(
                "The compared checkpoint gives probabilities that are NaN. Check it, or try `dtype: float32`."
            )
        self.sums.add(batch, values)
        self.calibration["base"].add(base.top1_logp.double().exp(), hits[0])
        self.calibration["tuned"].add(tuned.top1_logp.double().exp(), hits[1])
        before, after = ((x * self.BUCKETS).long().clamp(max=self.BUCKETS - 1) for x in (p, q))
        self.moved += torch.bincount(before * self.BUCKETS + after, minlength=self.BUCKETS**2).view_as(self.moved)

    def _count(self, keys: list[ExampleKey], num_tokens: Tensor, sums: Tensor) -> None:
        self.total.add(num_tokens, sums)
        figures = torch.cat([num_tokens[None].double(), sums]).T.tolist()
        self.examples += [(row, *each) for (row, _), each in zip(keys, figures, strict=True) if each[0]]

    def reduce(self, accelerator: Any) -> None:
        """Finish, and add up over all processes."""
        self.sums.finish()
        self.examples.sort()
        if accelerator.num_processes == 1:
            return
        self.examples = sorted(gather_object(self.examples))
        for tensor in (self.total.gram, self.moved, *(calibration.sums for calibration in self.calibration.values())):
            tensor.copy_(accelerator.reduce(tensor.to(accelerator.device), reduction="sum").cpu())
