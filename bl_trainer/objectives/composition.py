"""What any objective can be given besides its own parameters: schedules, a floor, other objectives, exempt tokens.

Each is a function of per-token tensors of any one shape, so that a composed objective is elementwise as its parts are.
`Objective.__call__` puts them together, in this order, f being its own function with its parameters' values of the moment:

    f  +  sum of weight * other      `mix`
    -  stopgrad(max(0, floor - w)) * log p      `floor`, w being the weight of the above on the NLL gradient
    or, on special tokens, the objective that `special_tokens` names alone
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._util.text import is_number, nearest, to_number
from ..errors import RecipeError

KEYS = ("floor", "mix", "special_tokens")  # of any objective's mapping, besides `name` and its parameters
SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` while training progress goes over `over`, and is constant outside.

    Progress is the share of optimizer steps done, 0 to 1; `over`: where it begins and ends to move, both within 0 to 1; with
    both the same it jumps there. With x the share of `over` that is done, the value is (1 - s) start + s end, where s = x for
    `linear` and (1 - cos(pi x)) / 2 for `cosine`. Raises RecipeError on anything else.
    """

    start: float
    end: float
    over: tuple[float, float] = (0.0, 1.0)
    shape: str = "linear"

    @classmethod
    def is_meant(cls, value: Any) -> bool:
        """Whether a value in a recipe is to be read as a schedule: a mapping with `from` or `to`."""
        return isinstance(value, Mapping) and bool({"from", "to"} & value.keys())

    @classmethod
    def parse(cls, key: str, spec: Mapping[str, Any]) -> "Schedule":
        """Read `{"from": 0, "to": 2, "over": [0.3, 1.0], "shape": "cosine"}`, the value of `key`. Raises RecipeError."""
        allowed = ("from", "to", "over", "shape")
        example = "Write e.g. `{from: 0, to: 1, over: [0.3, 1.0], shape: linear}`"
        for name in spec:
            if name not in allowed:
                raise RecipeError(f"Unknown key {name!r} in the schedule of `{key}`.{nearest(name, allowed)} {example}.")
        ends = [to_number(spec.get(name)) for name in ("from", "to")]
        for name, value in zip(("from", "to"), ends, strict=True):
            if not is_number(value):
                got = f"got {value!r}" if name in spec else "it is missing"
                raise RecipeError(f"`{name}` in the schedule of `{key}` must be a finite number, {got}. {example}.")
        over = spec.get("over", [0.0, 1.0])
        over = [to_number(end) for end in over] if isinstance(over, (list, tuple)) else over
        is_pair = isinstance(over, (list, tuple)) and len(over) == 2 and all(map(is_number, over))
        if not is_pair or not 0 <= over[0] <= over[1] <= 1:
            raise RecipeError(
                f"`over` in the schedule of `{key}` must be two shares of training, the first not above the second, within 0 "
                f"to 1; got {spec['over']!r}. {example}."
            )
        shape = spec.get("shape", "linear")
        if shape not in SHAPES:
            raise RecipeError(
                f"`shape` in the schedule of `{key}` must be one of {', '.join(SHAPES)}, got {shape!r}. {example}."
            )
        return cls(ends[0], ends[1], (float(over[0]), float(over[1])), shape)

    def at(self, progress: float) -> float:
        """Return the value at this share of training."""
        begin, finish = self.over
        if progress >= finish:
            return self.end
        if progress <= begin:
            return self.start
        share = (progress - begin) / (finish - begin)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return (1 - share) * self.start + share * self.end

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `parse` reads."""
        return {"from": self.start, "to": self.end, "over": list(self.over), "shape": self.shape}


def value_at(value: Any, progress: float | None) -> Any:
    """Return the value of the moment of a setting that may be scheduled. Raises TypeError without `progress` if it is."""
    if not isinstance(value, Schedule):
        return value
    if progress is None:
        raise TypeError("This objective is scheduled: give it `progress`, the share of training that is done, from 0 to 1.")
    return value.at(progress)


def floored(f: Callable[[Tensor], Tensor], logp: Tensor, floor: float) -> Tensor:
    """Return f - stopgrad(max(0, floor - w)) log p, whose weight on the NLL gradient is max(w, floor), w = -df/dlogp being f's.

    The value is f plus the share of NLL that f's weight lacks; what other gradients f has, as in the entropy, stay. f is
    evaluated once. `logp`: float tensor of any shape; the result is of its shape.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logp if logp.requires_grad else logp.detach().clone().requires_grad_()
        cost = f(leaf)
        slope = None
        if cost.requires_grad:
            (slope,) = torch.autograd.grad(cost.sum(), leaf, retain_graph=True, allow_unused=True)
        lacking = torch.full_like(logp, floor) if slope is None else (floor + slope).clamp(min=0)
        # where nothing is lacking, log p = -inf adds nothing either
        cost = cost - torch.where(lacking > 0, lacking * leaf, leaf.new_zeros(()))
    return cost if torch.is_grad_enabled() else cost.detach()


def chosen(which: Tensor, one: Callable[..., Tensor], other: Callable[..., Tensor], tokens: Mapping[str, Any]) -> Tensor:
    """Return `one` of the tokens in `which`, a bool tensor, and `other` of the rest; neither sees the other's tokens."""
    return torch.where(which, one(**hidden(~which, tokens)), other(**hidden(which, tokens)))


# Where a token has no say, functions see a fair coin: every sensible f and its slope are finite there.
COIN_FLIP = {
    "logp": -math.log(2),
    "entropy": math.log(2),
    "log_sum_sq_probs": -math.log(2),
    "is_top1": True,
    "ref_logp": -math.log(2),
    "label": 0,
    "is_special": False,
}


def hidden(which: Tensor, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tokens`, a mapping of statistics, with a fair coin's in place of those in `which`, a bool tensor."""
    return {
        name: torch.where(which, value.new_full((), COIN_FLIP[name]), value) if isinstance(value, Tensor) else value
        for name, value in tokens.items()
    }


def spell(spec: Mapping[str, Any]) -> str:
    """Return an objective's mapping in a few words: `power 0 to 2 over 0.3 to 1 + 0.1 nll, floor 0.1, special tokens nll`.

    Parameters are named, but for `alpha` of `power`.
    """
    named = {key: value for key, value in spec.items() if key not in ("name", *KEYS)}
    bare = spec["name"] == "power"
    parts = [str(spec["name"]), *(_short(value) if bare else f"{key} {_short(value)}" for key, value in named.items())]
    text = " ".join(parts)
    for other in spec.get("mix", ()):
        text += f" + {_short(other['weight'])} {spell({key: value for key, value in other.items() if key != 'weight'})}"
    if "floor" in spec:
        text += f", floor {_short(spec['floor'])}"
    if "special_tokens" in spec:
        text += f", special tokens {spell(spec['special_tokens'])}"
    return text


def _short(value: Any) -> str:
    if not Schedule.is_meant(value):
        return f"{value:g}" if isinstance(value, float) else str(value)
    begin, finish = value["over"]
    over = "" if (begin, finish) == (0, 1) else f" over {begin:g} to {finish:g}"
    return f"{value['from']:g} to {value['to']:g}{over}{'' if value['shape'] == 'linear' else ' ' + value['shape']}"
