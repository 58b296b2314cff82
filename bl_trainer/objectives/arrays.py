"""What an `Objective` may be given in place of a tensor, and the mistake to give it p in place of log p."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import LossError

ROUNDING = 1e-2  # above 0, of log p in half precision


def refuse_probabilities(logp: Tensor) -> None:
    """Raise LossError if `logp` has values above 0, which no log-probability has."""
    if bool((logp > ROUNDING).any()):
        raise LossError(
            f"Cannot take {logp.max().item():g} for a log-probability: log p is at most 0. Give `log(p)` in place of p."
        )


Method = TypeVar("Method", bound=Callable[..., Any])


def takes_arrays(method: Method) -> Method:
    """Let a method of `logp` and statistics take and return NumPy arrays as well as tensors.

    A number counts as an array of no dimensions. Integers are read as float64. An array has no gradient.
    """

    @functools.wraps(method)
    def taking(self: Any, logp: Any, **statistics: Any) -> Any:
        if isinstance(logp, Tensor):
            return method(self, logp, **statistics)
        given = np.asarray(logp)
        leaf = torch.tensor(given if given.dtype.kind == "f" else given.astype(np.float64))
        refuse_probabilities(leaf)
        found = method(self, leaf, **{name: _tensor(value) for name, value in statistics.items()})
        return found.detach().numpy()

    return cast(Method, taking)


def _tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, np.ndarray) else value
