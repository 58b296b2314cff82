"""Which examples a person should read."""

import heapq
import math
import random
from typing import Any

from torch import Tensor

from ..head.ops import TokenScores
from ..tokens.annotation import TokenBatch

CONFLICT_ENTROPY = 0.5  # nats; and
CONFLICT_PROB = 0.05  # p of the target: below both, the model is sure of something else


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
