"""Which tokens of a batch are targets, and which place predicts each."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

IGNORED = -100  # the label of a token that is no target


def shifted(values: Tensor, fill: float, virtual_tokens: int = 0) -> Tensor:
    """Lay values of tokens out beside the places that predict these tokens.

    `values`: (batch, length), one per token. `virtual_tokens`: how many prompt-learning PEFT puts in front, which get `fill`.
    Returns (batch, `virtual_tokens` + length - 1): nothing predicts the first token of all.
    """
    return (pad(values, (virtual_tokens, 0), value=fill) if virtual_tokens else values)[:, 1:]


@dataclass(frozen=True, eq=False)
class Targets:
    """
    The target tokens of a batch. What needs a wait for the device is computed when it is first asked for.

    `labels`: (batch, places), the id of the token that each place predicts, `IGNORED` where that is no target.
    """

    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor, virtual_tokens: int = 0) -> "Targets":
        """Return the targets among `labels`, (batch, length), one per token as collated. `virtual_tokens`: as in `shifted`."""
        return cls(shifted(labels, IGNORED, virtual_tokens))

    @cached_property
    def mask(self) -> Tensor:
        """Which places predict a target; bool, the shape of `labels`."""
        return self.labels != IGNORED

    @cached_property
    def index(self) -> Tensor:
        """Numbers of these places among all, in reading order; int64 (N,)."""
        return self.mask.flatten().nonzero().squeeze(1)

    @cached_property
    def ids(self) -> Tensor:
        """Token ids of the targets, in reading order; (N,)."""
        return self.labels.flatten()[self.index]

    def take(self, values: Tensor) -> Tensor:
        """Return the targets' own values, (N, ...), of what has one per place, (batch, places, ...)."""
        return values.flatten(0, 1).index_select(0, self.index)


def are_shifted(tokens: Any, labels: Any) -> bool:
    """Whether labels, an array (rows, length) as `tokens`, stand a place before their tokens: the loss would shift them again.

    So they do if some target differs from its own token, and each is the next one.
    """
    is_target = labels != IGNORED
    ahead = is_target[:, :-1]
    here, following = (tokens == labels)[is_target].all(), (tokens[:, 1:] == labels[:, :-1])[ahead].all()
    return bool(~here & following & ahead.any())
