"""What an objective function must keep, checked before a model loads: its parameters, and its costs on a few tokens.

Each check raises RecipeError with a message for the user.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._util.text import is_number, nearest
from ..errors import RecipeError
from .composition import KEYS
from .functions import anneal
from .spec import OBJECTIVES

if TYPE_CHECKING:
    from .objective import Objective

# What the trainer can hand to an objective besides `logp`; see `Objective`.
STATISTICS = ("entropy", "log_sum_sq_probs", "is_top1", "ref_logp", "label", "progress")

SHAPE = (2, 6)
# From impossible to certain, and what one of them may stand among
TOKENS = [-50, -20, -8, -4, -2.5, -1.6, -1, -0.7, -0.3, -0.1, -1e-3, 0]
OTHERS = [-0.2, -0.02, 0, -0.4, -0.05, -0.6, -0.01, -0.15, -0.5, -0.3, -0.25, -0.08]


def check_parameters(objective: "Objective") -> None:
    """Check that the function's first parameter is `logp`, and that the recipe gives the others that need a value."""
    name, own, takes_any = objective.name, *_own_parameters(objective)
    for key in (*KEYS, "name", "weight"):
        if key in own:
            raise RecipeError(
                f"Objective {name!r} has a parameter {key!r}, which in a recipe means the same for every objective: "
                "see `bl_trainer.objectives.composition`. Give the parameter another name."
            )
    supplied = [key for key in objective.parameters if key in STATISTICS]
    surplus = [key for key in objective.parameters if key not in own and not takes_any]
    missing = [key for key, p in own.items() if p.default is p.empty and key not in objective.parameters]
    if supplied or surplus or missing:
        raise RecipeError(_misfit(objective, own, supplied, surplus, missing))
    for key in objective.schedules:
        default = own[key].default if key in own else None
        if default not in (None, inspect.Parameter.empty) and not is_number(default):
            raise RecipeError(
                f"`{key}` of objective {name!r} can't be scheduled: it is no number, its default is {default!r}. "
                "Give it one value."
            )


def _own_parameters(objective: "Objective") -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters that a recipe may give, by name, and whether the function takes any others."""
    function = objective.function  # an unknown name is another mistake
    try:
        first, *others = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"Objective {objective.name!r} is not a function of `logp`: {error}. Give a Python function whose first "
            "parameter is `logp`."
        ) from error
    if first.name != "logp":
        raise RecipeError(f"The first parameter of objective {objective.name!r} must be `logp`, got {first.name!r}.")
    own = {p.name: p for p in others if p.name not in STATISTICS and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return own, any(p.kind is p.VAR_KEYWORD for p in others)


def _misfit(objective: "Objective", own: Mapping[str, Any], supplied: list[str], surplus: list[str], missing: list[str]) -> str:
    """Return the message for parameters that the function doesn't take, or lacks."""
    name = objective.name
    problems = [
        f"{key!r} is a statistic that the trainer supplies" if key in supplied else f"{key!r} is not one of them"
        for key in dict.fromkeys(supplied + surplus)
    ]
    problems += [f"{key!r} is missing" for key in missing]
    example = ", ".join([f"name: {name}", *(f"{key}: {objective.parameters.get(key, '...')}" for key in own)])
    offer = f" Statistics that a function may name: {', '.join(STATISTICS)}." if missing and ":" in name else ""
    near = "".join(nearest(key, (*own, *KEYS)) for key in surplus)
    write = "" if near else f" Write `objective: {'{' + example + '}' if own else name}`."
    if objective.function is anneal:
        write = " For another schedule give `start` and `end` the same one, as `{from: 0.5, to: 5, over: [0.3, 1]}`."
    takes = f"Objective {name!r} takes {', '.join(own) or 'no parameters of its own'}"
    return f"{takes}: {' and '.join(problems)}.{near}{write}{offer}"


def check_contract(objective: "Objective") -> None:
    """Try the function on tokens from impossible to certain, and on each among others: its cost may not change."""
    for progress in (0.0, 1.0, 0.5) if "progress" in objective.statistics else (0.5,):  # the ends first, as the recipe has them
        _check_at(objective.at(progress), progress)


@torch.inference_mode(False)
def _check_at(objective: "Objective", progress: float) -> None:
    tokens = probe_tokens(TOKENS, progress)
    if objective.name in OBJECTIVES:
        objective(**tokens)  # its parameters are checked; the rest is tested with the package
        return
    _check_cost(objective, tokens)
    _check_elementwise(objective, tokens, probe_tokens(OTHERS, progress))


def _check_cost(objective: "Objective", tokens: dict[str, Any]) -> None:
    """Check that there is one finite cost per token, with a finite gradient."""
    what = f"Objective {objective.name!r}"
    inputs = (tokens["logp"].requires_grad_(), tokens["entropy"].requires_grad_())
    cost = _tried(objective, tokens)
    if not isinstance(cost, Tensor) or cost.shape != SHAPE or not cost.is_floating_point():
        got = f"{cost.dtype} {tuple(cost.shape)}" if isinstance(cost, Tensor) else type(cost).__name__
        raise RecipeError(
            f"{what} must return one float per token, of the shape of `logp`; for a float32 {SHAPE} it gave {got}. "
            "Don't take the mean or the sum: the trainer does."
        )
    slopes = torch.autograd.grad(cost.sum(), inputs, allow_unused=True) if cost.requires_grad else (None, None)
    if all(slope is None for slope in slopes):
        raise RecipeError(f"{what} has no gradient with respect to `logp`, so nothing would train. Don't detach all of it.")
    when = f" and progress {tokens['progress']:g}" if "progress" in objective.own_statistics else ""
    for values in (cost, *(slope for slope in slopes if slope is not None)):
        if not values.isfinite().all():
            worst = tokens["logp"][~values.isfinite()][0].item()
            raise RecipeError(
                f"{what}, or its gradient, is not finite at log p = {worst:g}{when}. It must be from log p = -50 to 0, "
                "which confident models reach."
            )


def _check_elementwise(objective: "Objective", tokens: dict[str, Any], others: dict[str, Any]) -> None:
    """Check that a token costs the same in another layout, and among other tokens."""
    what, cost = f"Objective {objective.name!r}", _tried(objective, tokens)
    flat = {name: value.flatten() if isinstance(value, Tensor) else value for name, value in tokens.items()}
    if not torch.allclose(_tried(objective, flat), cost.flatten(), rtol=1e-4):
        raise RecipeError(f"{what} depends on how tokens are laid out. It must give the same costs for `logp` of any shape.")
    for i in range(cost.numel()):
        here = torch.arange(cost.numel()).view(SHAPE) == i
        mixed = {
            name: torch.where(here, value, others[name]) if isinstance(value, Tensor) else value
            for name, value in tokens.items()
        }
        if not torch.allclose(_tried(objective, mixed)[here], cost[here], rtol=1e-4):
            raise RecipeError(
                f"{what} makes the cost of one token depend on other tokens, so training would depend on how a batch is "
                "cut into micro-batches and ranks. Compute each token's cost from its own statistics."
            )


def probe_tokens(logp: list[float], progress: float) -> dict[str, Any]:
    """Return statistics, each (2, 6), of tokens with these log-probabilities, as a next-token distribution could have."""
    values = torch.tensor(logp, dtype=torch.float32).view(SHAPE)
    uncertainty = 0.1 + (-values).clamp(max=3)
    return {
        "logp": values,
        "entropy": uncertainty,
        "log_sum_sq_probs": -uncertainty,
        "is_top1": values > -0.69,
        "ref_logp": values / 2 - 0.1,
        "label": torch.zeros(SHAPE, dtype=torch.long),
        "progress": progress,
    }


def _tried(objective: "Objective", tokens: dict[str, Any]) -> Any:
    """Return the costs of `tokens`; what goes wrong is the objective's mistake."""
    before = {name: value.detach().clone() for name, value in tokens.items() if isinstance(value, Tensor)}
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)  # an objective may draw at random for each token
            cost = objective(**tokens)
    except Exception as error:
        raise RecipeError(
            f"Objective {objective.name!r} failed when tried on a few tokens: {type(error).__name__}: {error}"
        ) from error
    for name, value in before.items():
        if not torch.equal(tokens[name], value):
            raise RecipeError(f"Objective {objective.name!r} changes `{name}` in place, which others read. Make a new tensor.")
    return cost
