"""Plots of objectives and thresholds. matplotlib loads when the first one is drawn."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._util.text import nearest
from ..errors import DependencyError, LossError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .objective import Objective

POINTS = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
TOP = 4.0  # of the vertical axis: some weights have no bound
STYLES = ("-", "--", ":", "-.")
# What is drawn of each statistic: its values by default, its name in a legend, and whether the legend has exp(value)
SHOWN: dict[str, tuple[tuple[Any, ...], str, bool]] = {
    "entropy": ((0.0, 1.0, 3.0), "entropy", False),
    "log_sum_sq_probs": ((math.log(0.1), math.log(0.5), 0.0), "sum of p²", True),
    "is_top1": ((False, True), "top 1", False),
    "ref_logp": ((math.log(0.1), math.log(0.5), math.log(0.9)), "reference's p", True),
    "label": ((0,), "label", False),
    "is_special": ((False, True), "special token", False),
    "progress": ((0.0, 0.5, 1.0), "progress", False),
}


def axes_of(axes: "Axes | None") -> "Axes":
    """Return the given axes, or those of a new figure. Raises DependencyError without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise DependencyError("Cannot plot: matplotlib is not installed. Run `pip install matplotlib`.") from error
    return axes or pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")[1]


def plot_objective(objective: "Objective", axes: "Axes | None", given: Mapping[str, Any]) -> "Axes":
    """Draw -f'(p) p against p for each combination of statistics: colours for the first, line styles for the others."""
    curves = _curves(objective, given)
    axes = axes_of(axes)
    colours: dict[Any, Any] = {}
    styles: dict[Any, str] = {}
    for values in curves:
        first, *rest = values.values() if values else (None,)
        style = styles.setdefault(tuple(rest), STYLES[len(styles) % len(STYLES)])
        weight = objective.gradient_weight(POINTS.log(), **{name: _spread(name, value) for name, value in values.items()})
        label = ", ".join([repr(objective), *(_label(name, value) for name, value in values.items())])
        (line,) = axes.plot(POINTS.numpy(), weight.numpy(), style, color=colours.get(first), label=label)
        colours[first] = line.get_color()
    _finish(axes)
    return axes


def _curves(objective: "Objective", given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the statistics of each curve, by name."""
    for name in given:
        if name not in objective.statistics:
            allowed = f"Give {' or '.join(objective.statistics)}." if objective.statistics else "Leave it out."
            near = nearest(name, objective.statistics)
            raise LossError(f"Cannot plot {objective!r}: it does not depend on {name!r}.{near} {allowed}")
    names = [name for name in SHOWN if name in objective.statistics]
    values = [_listed(given[name]) if name in given else SHOWN[name][0] for name in names]
    return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values)]


def _listed(value: Any) -> Sequence[Any]:
    return np.atleast_1d(np.asarray(value)).tolist()


def _spread(name: str, value: Any) -> Any:
    """Return a statistic of every point; training progress is one number."""
    if name == "progress":
        return value
    dtype = {"is_top1": torch.bool, "is_special": torch.bool, "label": torch.long}.get(name, POINTS.dtype)
    return torch.full(POINTS.shape, value, dtype=dtype)


def _label(name: str, value: Any) -> str:
    _, words, is_log = SHOWN[name]
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {math.exp(value) if is_log else value:.3g}"


def _finish(axes: "Axes") -> None:
    """Set labels, and limits that hold all curves but those that leave at the top."""
    weights = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    low, high = min(weights.min(), 0.0), max(weights.max(), 1.0)
    axes.set(xlabel="probability p of the target token", ylabel="weight on the NLL gradient", xlim=(0, 1))
    axes.set_ylim(1.05 * max(low, -TOP), 1.05 * min(high, TOP))
    axes.spines[["top", "right"]].set_visible(False)
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if len(axes.lines) > 4 else {}
    axes.legend(frameon=False, fontsize=8, **beside)
