"""What a stack of models says of questions whose right answers are known, computed from its probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Item
from .training import Rows
from .transformer import Shape, logits, unpack
from .vocabulary import END
from .world import Tokens

TEMPERATURES = (1.0, 0.5, 0.25)
AT_ONCE = 1024  # rows of all models in one forward pass


class Questions(NamedTuple):
    """Questions of each of several models, row by row an answer of one; all (models, answers, ...).

    `tokens`: (..., length + 1). `is_target`, `is_format`: (..., length), of the tokens after the first. `item`: which question.
    `share`: of the answer among the right ones.
    """

    tokens: Tensor
    is_target: Tensor
    is_format: Tensor
    item: Tensor
    share: Tensor


def encode(rows: Sequence[tuple[Tokens, Tokens]], length: int) -> tuple[Tensor, Tensor]:
    """Return ids, (rows, `length` + 1), and which of them but the first are targets: a completion and the end after it."""
    tokens = torch.full((len(rows), length + 1), END)
    is_target = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(rows):
        whole = torch.tensor((*prompt, *completion, END))
        tokens[i, : len(whole)] = whole
        is_target[i, len(prompt) - 1 : len(whole) - 1] = True
    return tokens, is_target


def length_of(rows: Sequence[tuple[Tokens, Tokens]]) -> int:
    """Return the length of the longest input: all tokens but the end."""
    return max(len(prompt) + len(completion) for prompt, completion in rows)


def stacked(sets: Sequence[Sequence[tuple[Tokens, Tokens]]]) -> Rows:
    """Return training rows of several sets, as long as the longest."""
    length = max(map(length_of, sets))
    parts = [encode(rows, length) for rows in sets]
    return Rows(torch.stack([tokens for tokens, _ in parts]), torch.stack([is_target for _, is_target in parts]))


def questions(sets: Sequence[Sequence[Item]]) -> Questions:
    """Return the questions of several models, as many for each."""
    rows = [[(item.prompt, answer) for item in items for answer, _ in item.answers] for items in sets]
    tokens, is_target = stacked(rows)
    is_format = torch.zeros_like(is_target)
    for i, items in enumerate(sets):
        for j, asked in enumerate(item for item in items for _ in item.answers):
            for place in asked.format:
                is_format[i, j, len(asked.prompt) - 1 + place] = True
    item = torch.tensor([[j for j, item in enumerate(items) for _ in item.answers] for items in sets])
    share = torch.tensor([[share for item in items for _, share in item.answers] for items in sets], dtype=torch.float64)
    return Questions(tokens, is_target, is_format, item, share)


@torch.no_grad()
def score(shape: Shape, stack: Tensor, asked: Questions) -> dict[str, Tensor]:
    """Return metrics of each model and question, (models, questions), float64, all exact and none of them sampled.

    `greedy`: 1 if the most probable tokens are a right answer. `sampled_T`: the probability of a right answer at temperature T.
    `variation_T`: total variation between the answers at temperature T and the shares of the right ones. `format`: 1 if each
    token of the format is the most probable one, given those before it; 1 where there is none.
    """
    size = max(1, AT_ONCE // asked.tokens.shape[1])
    parts = []
    for i in range(0, len(stack), size):
        part = Questions(*(each[i : i + size] for each in asked))
        found = logits(shape, unpack(shape, stack[i : i + size]), part.tokens[..., :-1]).double()
        parts.append(_metrics(found, part))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _metrics(found: Tensor, asked: Questions) -> dict[str, Tensor]:
    labels, count = asked.tokens[..., 1:], int(asked.item.max()) + 1
    is_top = found.argmax(-1) == labels

    def per_item(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), count).scatter_add_(1, asked.item, values)

    metrics = {"greedy": per_item((is_top | ~asked.is_target).all(-1).double())}
    for temperature in TEMPERATURES:
        logp = (found / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        p = torch.where(asked.is_target, logp, 0.0).sum(-1).exp()
        sampled = per_item(p)
        metrics[f"sampled_{temperature:g}"] = sampled
        metrics[f"variation_{temperature:g}"] = (per_item((p - asked.share).abs()) + 1 - sampled) / 2
    right = (is_top | ~asked.is_format).all(-1).double()
    metrics["format"] = per_item(right) / per_item(torch.ones_like(right))
    return metrics
