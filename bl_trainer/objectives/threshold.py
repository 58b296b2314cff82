"""Thresholds on p: which target tokens train (paper, Eq. 4 and section 5.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._util.text import from_json, is_number, nearest, to_number
from ..errors import LossError, RecipeError
from .plot import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, repr=False)
class Threshold:
    """Train only on target tokens with above <= p <= below (paper, Eq. 4); p is the current model's, without gradient.

    `above`, `below`: probabilities, both inclusive: a token on a bound is kept, however its log p is rounded.
    `above_percentile`: `above` is to be this percentile (0 to 100) of the starting model's p over the target tokens of the
    training set (section 5.1), which the trainer measures; until then it is not `resolved`. `normalize`: what the sum of costs
    is divided by. `tokens`: all target tokens of the batch, exact under gradient accumulation and on several processes. `kept`:
    the kept tokens of each micro-batch, all micro-batches weighing the same, as the paper's code does. Raises RecipeError on
    anything else.
    """

    above: float = 0.0
    below: float = 1.0
    normalize: str = "tokens"
    above_percentile: float | None = None

    def __post_init__(self) -> None:
        for name in ("above", "below"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                is_rank = name == "above" and is_number(value) and 1 < value < 100
                percentile = f" For a percentile write `threshold: {{above_percentile: {value:g}}}`." if is_rank else ""
                raise RecipeError(f"`threshold` `{name}` must be a probability between 0 and 1, got {value!r}.{percentile}")
        if self.above > self.below:
            raise RecipeError(
                f"`threshold` keeps no token: above = {self.above} exceeds below = {self.below}. Tokens with "
                "above <= p <= below are kept; swap the two."
            )
        rank = self.above_percentile
        if rank is not None and (not is_number(rank) or not 0 < rank < 100):
            raise RecipeError(f"`threshold` `above_percentile` must be a number above 0 and below 100, got {rank!r}.")
        if self.normalize not in ("tokens", "kept"):
            raise RecipeError(f"`threshold` `normalize` must be `tokens` or `kept`, got {self.normalize!r}.")

    @classmethod
    def parse(cls, spec: "float | str | Mapping[str, Any] | Threshold | None") -> "Threshold":
        """Read `0.2` (meaning `{"above": 0.2}`), `{"above": 0.2, "below": 0.9, "normalize": "kept"}`, also as JSON text.

        None keeps every token. Raises RecipeError on an unknown key or value, and if `above` and `above_percentile` are given.
        """
        if isinstance(spec, Threshold):
            return spec
        spec = to_number(from_json("threshold", spec, '{"above": 0.2, "below": 0.9}'))
        if spec is None or (isinstance(spec, str) and spec.lower() in ("none", "null")):  # as the command line has it
            return cls()
        if is_number(spec):
            return cls(above=spec)  # type: ignore[arg-type]
        if not isinstance(spec, Mapping) or not spec:
            raise RecipeError(
                f"`threshold` must be a probability or a mapping, got {spec!r}. Write `threshold: 0.2`, or `threshold: "
                "{above: 0.2, below: 0.9}`."
            )
        allowed = [f.name for f in fields(cls)]
        for key in spec:
            if key not in allowed:
                raise RecipeError(f"Unknown key {key!r} in `threshold`.{nearest(key, allowed)} Allowed: {', '.join(allowed)}.")
        if "above" in spec and "above_percentile" in spec:
            raise RecipeError(f"`threshold` has both `above` and `above_percentile`: {dict(spec)}. Keep one of them.")
        return cls(**{key: to_number(value) for key, value in spec.items()})

    def __repr__(self) -> str:
        rank = self.above_percentile
        words = [] if rank is None else [f"p >= percentile {rank:g}"]
        words += [f"p >= {spell_probability(self.above)}"] if self.above else []
        words += [f"p <= {spell_probability(self.below)}"] if self.below < 1 else []
        divisor = [] if self.normalize == "tokens" else [f"normalize {self.normalize}"]
        return ", ".join([*(words or ["no threshold"]), *divisor])

    @property
    def resolved(self) -> bool:
        """Whether `above` is known."""
        return self.above_percentile is None or self.above > 0

    @property
    def keeps_all(self) -> bool:
        """Whether no token is ever dropped."""
        return self.resolved and (self.above, self.below) == (0, 1)

    def keep(self, logp: Tensor) -> Tensor:
        """Return which tokens train: bool tensor of the shape of `logp`."""
        logp = logp.detach()
        low, high = self._log_bounds(logp.dtype)
        return ~((logp < low) | (logp > high))  # keeps NaN, so that a diverged model shows in the loss

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Shade the p of tokens that do not train, and return the matplotlib axes.

        `axes`: those of an objective's plot; by default a new figure. Raises LossError while `above_percentile` is not
        measured, and DependencyError without matplotlib.
        """
        if not self.resolved:
            raise LossError(
                f"Cannot plot {self!r}: the percentile is not measured yet. Give a probability as `above`, or plot "
                "`trainer.threshold`."
            )
        axes = axes_of(axes)
        for low, high in ((0, self.above), (self.below, 1)):
            if low < high:
                axes.axvspan(low, high, color="0.5", alpha=0.2, lw=0)
        axes.set(xlabel="probability p of the target token", xlim=(0, 1))
        return axes

    def _log_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return the log p of the bounds, each moved outwards by the rounding of log p in `dtype`."""
        low = -math.inf if self.above == 0 else math.log(self.above) - _rounding(self.above, dtype)
        if self.below in (0, 1):
            return low, math.inf if self.below else -math.inf
        return low, math.log(self.below) + _rounding(self.below, dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `parse` reads."""
        spec = {"above": self.above, "below": self.below, "normalize": self.normalize}
        if self.above_percentile is None:
            return spec
        resolved = {"above": self.above} if self.resolved else {}
        return {**resolved, "above_percentile": self.above_percentile, "below": self.below, "normalize": self.normalize}


def _rounding(p: float, dtype: torch.dtype) -> float:
    """Return how far in log p a token of this p may lie from log p in `dtype`; near p = 1 a small part of 1 - p."""
    return min(torch.finfo(dtype).eps * (1 - math.log(p)), 2**-17 * (1 - p) / p)


def spell_probability(p: float, digits: int = 3) -> str:
    """Return p with `digits` digits, those of 1 - p if p would look like 1."""
    rest = 1 - p
    return f"1 - {rest:.{digits}g}" if 0 < rest < 10**-digits else f"{p:.{digits}g}"


def trains(threshold: Threshold, logp: Tensor, is_special: Tensor | None = None) -> Tensor:
    """Return which tokens train: those that the threshold keeps, and special ones, whose objective is `special_tokens`."""
    kept = threshold.keep(logp)
    return kept if is_special is None else kept | is_special
