"""Streaming statistics of target-token probabilities: bounded memory, mergeable, the same however the tokens are dealt out.

Everything is a sum in float64 or a count, on the CPU, so that statistics of two parts of the data add up to those of the
whole, on one process or many.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from scipy.special import stdtrit
from torch import Tensor

from .head import TokenDivergences, TokenScores

# p, or 1 - p from 1/2 on, is binned by the leading bits of its float64 form: exponent and MANTISSA bits. So every bin is at
# most 2^-MANTISSA of min(p, 1 - p) wide. Bin 0 has what is below 2^LEAST.
MANTISSA, LEAST = 11, -126
_SHIFT = 52 - MANTISSA
_FIRST = (1023 + LEAST << MANTISSA) - 1  # the leading bits of bin 0
_HALF = (1022 << MANTISSA) - _FIRST  # the bin of 1/2
PERCENTILE_ERROR = 2.0**-MANTISSA
TINY = 1e-300  # a threshold in place of p = 0, which would be none

PAPER_CONFIDENT = 0.55  # the p above which the paper counts tokens (its Tab. 6)
CONFLICT_ENTROPY = 0.5  # nats; and
CONFLICT_PROB = 0.05  # p of the target: below both, the model is sure of something else
KINDS = ("all", "eos", "special", "template", "content")
VALUES = ("prob", "nll", "entropy", "top1", "above_paper", "conflicts")
# Which values a mean can have, if not all
BOUNDS = {
    **dict.fromkeys(("prob", "base_prob", "top1", "base_top1", "above_paper", "conflicts", "low"), (0.0, 1.0)),
    **dict.fromkeys(("nll", "base_nll", "entropy", "kl", "reverse_kl"), (0.0, math.inf)),
    "js": (0.0, math.log(2)),
    "learnable": (-1.0, 1.0),
    "noise": (0.0, 2.0),
}
EDGE = 16  # positions counted one by one from the start and from the end of a response
RELATIVE = 20  # bins of relative position in a response
CONFIDENCE_BINS = 20
OTHER = "(other)"
MAX_GROUPS = 100
MAX_PARTS = 10_000  # examples, cut up by packing, of which further parts are waited for


class MeasurementError(ValueError):
    """Data or weights that can't be measured; the message is one sentence for the user."""


class ProbabilityHistogram:
    """Counts of tokens by p, fine enough for percentiles and for the mean of any function of p.

    Its resolution is `PERCENTILE_ERROR` = 2^-11 of min(p, 1 - p): 0.0005 relative, near 0 as near 1. `rows` histograms side
    by side. Below 2^LEAST, p counts as 0 (and likewise 1 - p).
    """

    def __init__(self, rows: int = 1):
        self.counts = torch.zeros(rows, 2 * _HALF + 1, dtype=torch.int64)

    def add(self, logp: Tensor, row: int = 0) -> None:
        """Count tokens by their log-probability, a float tensor of any shape. Raises MeasurementError on NaN."""
        wide = logp.detach().flatten().cpu().double()
        if wide.isnan().any():
            raise MeasurementError("The model gives probabilities that are NaN. Check the checkpoint, or try `dtype: float32`.")
        p, rest = wide.exp(), -wide.expm1()
        small = torch.minimum(p, rest).clamp(min=0)
        bins = ((small.view(torch.int64) >> _SHIFT) - _FIRST).clamp(min=0)
        bins = torch.where(p <= 0.5, bins, 2 * _HALF - bins)
        self.counts[row] += torch.bincount(bins, minlength=self.counts.shape[1])

    def values(self) -> tuple[Tensor, Tensor]:
        """Return log p and log(1 - p) at the middle of each bin, float64."""
        edges = self._edges()
        middle = (edges[:-1] + edges[1:]) / 2
        middle[0] = 0
        middle = torch.cat([middle, edges[-1:]])  # of its own bin only p = 1/2 is in use
        log_p = torch.cat([middle.log(), torch.log1p(-middle[:-1].flip(0))])
        log_rest = torch.cat([torch.log1p(-middle), middle[:-1].flip(0).log()])
        return log_p, log_rest

    @staticmethod
    def _edges() -> Tensor:
        """Return the lower edge of each bin up to that of 1/2, float64."""
        edges = (torch.arange(_HALF + 1) + _FIRST << _SHIFT).view(torch.float64)
        edges[0] = 0
        return edges

    def _lowest(self) -> Tensor:
        """Return for each bin a p that none of its tokens is below, float64."""
        edges = self._edges()
        rest = edges[1:].flip(0)
        above_half = 1 - rest
        rounded_up = 1 - above_half < rest
        return torch.cat([edges, torch.where(rounded_up, above_half.nextafter(torch.zeros(())), above_half)])

    def percentiles(self, ranks: Sequence[float], row: int = 0) -> list[float]:
        """Return for each of `ranks` (0 to 100) the smallest p with at least that share of tokens at or below it.

        It is the lower edge of its bin, so that a threshold there keeps all tokens of that p. At most `PERCENTILE_ERROR` *
        min(p, 1 - p) too low, or what a float64 can't hold. NaN if nothing was counted.
        """
        cumulative = self.counts[row].cumsum(0)
        total = int(cumulative[-1])
        if not total:
            return [math.nan] * len(ranks)
        # rounded, so that 10 % of 30 tokens is the third although 0.1 * 30 exceeds 3 in floating point
        needed = torch.tensor([max(1, math.ceil(round(rank / 100 * total, 6))) for rank in ranks])
        found = torch.searchsorted(cumulative, needed).clamp(max=len(cumulative) - 1)
        return self._lowest()[found].tolist()

    def cut(self, rank: float) -> float:
        """Return this percentile as a threshold, which has to be above 0."""
        return max(self.percentiles([rank])[0], TINY)

    def buckets(self, count: int, row: int = 0) -> Tensor:
        """Return the number of tokens in each of `count` equal parts of [0, 1], by the middle of their bins."""
        p = self.values()[0].exp()
        index = (p * count).long().clamp(max=count - 1)
        return torch.zeros(count, dtype=torch.int64).index_add_(0, index, self.counts[row])

    def state(self) -> dict[str, list[int]]:
        """Return the first row's counts, without the empty bins, for JSON."""
        index = self.counts[0].nonzero().flatten()
        return {"bins": index.tolist(), "counts": self.counts[0][index].tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, list[int]]) -> "ProbabilityHistogram":
        """Read what `state` returned."""
        made = cls()
        made.counts[0, torch.tensor(state["bins"], dtype=torch.int64)] = torch.tensor(state["counts"], dtype=torch.int64)
        return made


@dataclass
class TokenBatch:
    """Target tokens of a batch, in reading order, and the examples that they belong to.

    All (N,), on the CPU. `token`: ids. `example`: index into `examples`. `place`: index into that example's `input_ids`.
    `position`: 0, 1, ... within a response, an unbroken run of target tokens; `length`: of that response. `is_template`:
    whether the token is the chat template's own; `is_unmarked`: whether that can't be told. `examples`: mappings with `row`,
    its number in the data set or, where it has none, a negative number of its own; `group`; `input_ids`; and `is_part`, whether
    packing has cut it up.
    """

    token: Tensor
    example: Tensor
    place: Tensor
    position: Tensor
    length: Tensor
    is_template: Tensor
    is_unmarked: Tensor
    examples: list[dict[str, Any]]


class Means:
    """Means over tokens whose uncertainty counts examples, not tokens, since the tokens of one example are alike.

    With s_i the sum of a value over the n_i tokens of example i, the mean is R = sum s_i / sum n_i, and its variance, by
    linearisation, c sum (s_i - R n_i)^2 / (sum n_i)^2, with c of `unequal`. All that is kept is the Gram matrix of
    (1, n_i, s_i, ..., n_i^2, n_i^3).
    """

    def __init__(self, names: Sequence[str] = VALUES):
        self.names = tuple(names)
        self.gram = torch.zeros(len(names) + 4, len(names) + 4, dtype=torch.float64)

    def add(self, num_tokens: Tensor, sums: Tensor) -> None:
        """Add m examples: `num_tokens` (m,), and `sums` (names, m) of each value over their tokens."""
        size = num_tokens.double()[None]
        rows = torch.cat([torch.ones_like(size), size, sums.double(), size**2, size**3])[:, num_tokens > 0]
        self.gram += rows @ rows.T

    @property
    def num_examples(self) -> int:
        return int(self.gram[0, 0])

    @property
    def num_tokens(self) -> int:
        return int(self.gram[0, 1])

    def mean(self, name: str) -> float:
        """Return the mean over tokens; NaN if there are none."""
        return (self.gram[0, 2 + self.names.index(name)] / self.gram[0, 1]).item()

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of `mean`, or None below 10 examples, where it would be a guess.

        It is for the source that the examples were drawn from, and within `BOUNDS`.
        """
        if self.num_examples < 10:
            return None
        j, mean, total = 2 + self.names.index(name), self.mean(name), self.gram[0, 1]
        residual = self.gram[j, j] - 2 * mean * self.gram[1, j] + mean**2 * self.gram[1, 1]
        sums = (self.gram[1, 1], self.gram[1, -2], self.gram[-2, -2], self.gram[-2, -1])
        factor, free = unequal(*((each / total**k).item() for k, each in enumerate(sums, 2)))
        reach = t_quantile(free) * math.sqrt(max(0.0, factor * residual.item())) / total.item()
        return within((mean - reach, mean + reach), BOUNDS.get(name))

    def summary(self) -> dict[str, Any]:
        """Return counts, means and the interval of the first value."""
        first = self.names[0]
        counts = {"examples": self.num_examples, "tokens": self.num_tokens}
        means = {name: self.mean(name) for name in self.names}
        return {**counts, **means, f"{first}_interval": self.interval(first)}


ExampleKey = tuple[int, str | None]  # row and group


class ExampleSums:
    """Hands sums over examples on to `count(keys, num_tokens, sums)`, each example once, also where packing cuts it up.

    `keys`: (row, group) of each example.
    Of an example that is cut up, the parts come one by one; at most `MAX_PARTS` such examples wait for more.
    """

    def __init__(self, count: Callable[[list[ExampleKey], Tensor, Tensor], None]):
        self.count = count
        self.waiting: dict[ExampleKey, Any] = {}

    def add(self, batch: TokenBatch, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add `values`, (names, N), of a batch's tokens. Returns number of tokens and sums by example, (m,) and (names, m)."""
        examples = batch.examples
        num_tokens = torch.bincount(batch.example, minlength=len(examples))
        sums = values.new_zeros(len(values), len(examples)).index_add_(1, batch.example, values)
        whole = torch.tensor([not example["is_part"] for example in examples], dtype=torch.bool)
        keys = [(example["row"], example["group"]) for example in examples]
        self.count([keys[e] for e in whole.nonzero().flatten().tolist()], num_tokens[whole], sums[:, whole])
        for e in (~whole).nonzero().flatten().tolist():
            key = keys[e]
            tokens, total = self.waiting.pop(key, (0, 0))
            self.waiting[key] = (tokens + num_tokens[e], total + sums[:, e])
        self.finish(MAX_PARTS)
        return num_tokens, sums

    def finish(self, keep: int = 0) -> None:
        """Count the examples of which no part has come for longest, down to `keep`."""
        keys = list(itertools.islice(self.waiting, max(0, len(self.waiting) - keep)))
        if keys:
            tokens, sums = zip(*(self.waiting.pop(key) for key in keys), strict=True)
            self.count(keys, torch.stack(tokens), torch.stack(sums, dim=1))


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


class Reader:
    """A bounded choice of examples for a person to read.

    Kept are the most surprising (highest mean -log p), the most conflicting (the token that the model contradicts most
    confidently: largest log p(most probable) - log p(target) among confident conflicts), and a sample, from which the
    typical ones are taken: those nearest to its median of mean p.
    """

    KEPT, SAMPLE, WINDOW = 20, 100, 400

    def __init__(self) -> None:
        self.heaps: dict[str, list[tuple[float, int, dict[str, Any]]]] = {"surprising": [], "conflicting": [], "sample": []}

    def add(self, batch: TokenBatch, scores: TokenScores, num_tokens: Tensor, prob: Tensor, nll: Tensor, gap: Tensor) -> None:
        """Offer the examples of a batch. All (examples,): number of tokens, mean p, mean -log p, largest gap of a conflict."""
        for e, example in enumerate(batch.examples):
            if not num_tokens[e]:
                continue
            row = example["row"]
            keys: dict[str, float] = {"surprising": nll[e].item(), "sample": -random.Random(row).random()}
            if gap[e] > 0:
                keys["conflicting"] = gap[e].item()
            wanted = [name for name, key in keys.items() if self._has_room(name, key)]
            if wanted:
                record = self._record(batch, scores, e, {"prob": prob[e].item(), "nll": nll[e].item(), "gap": gap[e].item()})
                for name in wanted:
                    self._push(name, (keys[name], row, record))

    def _size(self, name: str) -> int:
        return self.SAMPLE if name == "sample" else self.KEPT

    def _has_room(self, name: str, key: float) -> bool:
        heap = self.heaps[name]
        return len(heap) < self._size(name) or key > heap[0][0]

    def _push(self, name: str, item: tuple[float, int, dict[str, Any]]) -> None:
        heap = self.heaps[name]
        if any(item[:2] == other[:2] for other in heap):
            return
        if len(heap) < self._size(name):
            heapq.heappush(heap, item)
        else:
            heapq.heappushpop(heap, item)

    def _record(self, batch: TokenBatch, scores: TokenScores, e: int, means: dict[str, float]) -> dict[str, Any]:
        assert scores.rank is not None  # `score` gives it
        example, here = batch.examples[e], (batch.example == e).nonzero().flatten()
        targets = batch.place[here].tolist()
        worst = targets[int((conflicts(scores)[here] * 1000.0 - scores.logp[here]).argmax())]
        length, start = len(example["input_ids"]), max(0, targets[0] - 60)
        if worst - start >= self.WINDOW:
            start = worst - self.WINDOW // 2
        stop = min(length, start + self.WINDOW)
        shown = [i for i, position in enumerate(targets) if start <= position < stop]
        index = here[shown]
        return {
            "row": example["row"],
            "group": example["group"],
            "is_part": example["is_part"],
            "tokens": len(targets),
            **means,
            "cut": [start, length - stop],
            "input_ids": example["input_ids"][start:stop],
            "targets": [targets[i] - start for i in shown],
            "p": scores.logp[index].exp().tolist(),
            "rank": scores.rank[index].tolist(),
            "top1": scores.top1[index].tolist(),
            "top1_p": scores.top1_logp[index].exp().tolist(),
            "entropy": scores.entropy[index].tolist(),
        }

    def merge(self, other: "Reader") -> None:
        """Take in another reader's examples."""
        for name, heap in other.heaps.items():
            for item in heap:
                if self._has_room(name, item[0]):
                    self._push(name, item)

    def chosen(self) -> dict[str, list[dict[str, Any]]]:
        """Return the examples under `surprising`, `conflicting` and `typical`, each in order."""
        lists = {
            name: [item[2] for item in sorted(heap, key=lambda item: (-item[0], item[1]))] for name, heap in self.heaps.items()
        }
        sample = sorted(lists.pop("sample"), key=lambda record: (record["prob"], record["row"]))
        median = sample[len(sample) // 2]["prob"] if sample else 0.0
        lists["typical"] = sorted(sample, key=lambda record: (abs(record["prob"] - median), record["row"]))[: self.KEPT]
        return lists


def conflicts(scores: TokenScores) -> Tensor:
    """Return which tokens are confident conflicts: entropy <= CONFLICT_ENTROPY and p <= CONFLICT_PROB; bool (N,)."""
    return (scores.entropy <= CONFLICT_ENTROPY) & (scores.logp <= math.log(CONFLICT_PROB))


class Measurement:
    """All that one pass over the target tokens leaves behind; see `continuum.summarise` for what is made of it.

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
        if (scores.logp + scores.entropy).isnan().any():
            row = min(batch.examples[e]["row"] for e in batch.example[(scores.logp + scores.entropy).isnan()].tolist())
            where = f"row {row} of the data set" if row >= 0 else "an example of the stream"
            raise MeasurementError(
                f"The model gives probabilities that are NaN in {where}. Check the checkpoint, or try `dtype: float32` and "
                "`bf16: false`."
            )
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


def unequal(second: float, third: float, fourth: float, fifth: float) -> tuple[float, float]:
    """Return (c, degrees of freedom) for the mean of clusters of unequal weights.

    The arguments are the sums of the 2nd to 5th powers of the weights w_i, which sum to 1. With e_i the deviation of a
    cluster's mean from the mean, c sum (w_i e_i)^2 is the variance of the mean, without bias if all clusters vary alike.
    The degrees of freedom are Satterthwaite's. m equal weights give m/(m - 1) and m - 1.

    Source: Bell and McCaffrey, "Bias reduction in standard errors for linear regression with multi-stage samples", 2002.
    """
    trace = second - 2 * third + second**2
    square = fourth - 4 * fifth + 4 * second * fourth + 2 * third**2 - 4 * second**2 * third + second**4
    return second / trace, max(1.0, trace**2 / square)


def t_quantile(free: float) -> float:
    """Return the 97.5 % quantile of Student's t with `free` degrees of freedom."""
    return float(stdtrit(free, 0.975))


def within(interval: tuple[float, float], bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Return what of an interval lies within the bounds of its metric, if it has any."""
    low, high = bounds or (-math.inf, math.inf)
    return max(low, interval[0]), min(high, interval[1])
