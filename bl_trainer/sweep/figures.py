"""The plots of a sweep's page."""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from ..pages.html import Picture, drawn
from ..training.metrics_log import Curve
from .leaderboard import Leaderboard
from .outcome import arm_folder
from .rulers import Ruler

MAX_CURVES = 8
ACROSS = 4  # rulers in a row
WIDTH, HEIGHT = 7.2, 2.9  # inches

Points = list[tuple[int, float]]


def rulers_figure(board: Leaderboard) -> Picture:
    """Return each ruler of each group, with its interval or values."""
    size = (WIDTH, max(1.6, 0.9 + 0.22 * len(board.rows)))
    return drawn(partial(_draw_rulers, board), size, "Each metric of each objective, with 95 % intervals or values")


def curves_figure(curves: dict[str, Points]) -> Picture:
    """Return the learning curves."""
    return drawn(partial(_draw_curves, curves), (WIDTH, HEIGHT), "Test nll over the steps of training")


def alphas_figure(alphas: dict[float, tuple[float, Any]], ruler: str) -> Picture:
    """Return the ruler along the family of `power`."""
    return drawn(partial(_draw_alphas, alphas, ruler), (WIDTH, HEIGHT), "The metric against alpha")


def pareto_figure(board: Leaderboard) -> Picture:
    """Return the ruler against what it costs in drift."""
    return drawn(partial(_draw_pareto, board), (WIDTH, HEIGHT), "The metric against drift from the base model")


def _draw_rulers(board: Leaderboard, figure: Figure, theme: Any) -> None:
    shown = [ruler for ruler in board.rulers if ruler.log is None]  # an exp shows nothing that its log doesn't
    rows = math.ceil(len(shown) / ACROSS)
    every = figure.subplots(rows, min(len(shown), ACROSS), sharey=True, squeeze=False).flat
    for axes, ruler in itertools.zip_longest(every, shown):
        if ruler is None:
            axes.set_visible(False)
        else:
            _draw_ruler(board, ruler, axes, theme)


def _draw_ruler(board: Leaderboard, ruler: Ruler, axes: Axes, theme: Any) -> None:
    colour, places = theme[3][0], list(range(len(board.rows)))[::-1]
    for place, row in zip(places, board.rows, strict=True):
        mean, interval = row.values[ruler.name]
        if interval:
            axes.plot(interval, [place, place], "-", color=colour, lw=1.5)
        else:
            axes.plot(row.each[ruler.name], [place] * len(row.each[ruler.name]), "|", color=colour, ms=6)
        axes.plot([mean], [place], "o", color=colour, ms=4)
    if board.base is not None and ruler.name in board.base:
        axes.axvline(board.base[ruler.name], color=theme[1], lw=1, ls="--")
    axes.set(yticks=places, yticklabels=[row.name for row in board.rows], ylim=(-0.6, len(places) - 0.4))
    axes.set_xlabel(ruler.name.replace("_", " "), size=7.5)
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="x", nbins=3)


def _draw_curves(curves: dict[str, Points], figure: Figure, theme: Any) -> None:
    axes = figure.subplots()
    for k, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, label=name, color=theme[3][k % len(theme[3])])
    axes.set(xlabel="step", ylabel="test nll, mean over seeds")
    axes.legend(fontsize=7.5)


def _draw_alphas(alphas: dict[float, tuple[float, Any]], ruler: str, figure: Figure, theme: Any) -> None:
    axes = figure.subplots()
    places = sorted(alphas)
    axes.plot(places, [alphas[alpha][0] for alpha in places], "o-", color=theme[3][0])
    for alpha in places:
        if alphas[alpha][1]:
            axes.plot([alpha, alpha], alphas[alpha][1], "-", color=theme[3][0], lw=1)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="alpha", ylabel=ruler, xticks=places, xticklabels=[f"{alpha:g}" for alpha in places])


def _draw_pareto(board: Leaderboard, figure: Figure, theme: Any) -> None:
    axes, ruler = figure.subplots(), board.plan.rank_by
    for k, row in enumerate(board.rows):
        x, y = row.values["drift"][0], row.values[ruler][0]
        axes.plot([x], [y], "o", color=theme[3][k % len(theme[3])])
        axes.annotate(row.name, (x, y), (5, 4), textcoords="offset points", size=7.5)
    axes.set(xlabel="drift: KL(base, tuned), nats per token", ylabel=ruler)
    axes.margins(x=0.2)


def learning_curves(board: Leaderboard, folder: Path) -> dict[str, Points]:
    """Return for each group the held-out nll that its best setting's runs logged, as a mean over seeds."""
    found = {}
    for row in board.rows[:MAX_CURVES]:
        values: dict[int, list[float]] = {}
        for index in row.arms:
            for step, value in Curve(arm_folder(folder, index) / "model").points("eval_nll"):
                values.setdefault(step, []).append(value)
        points = [(step, sum(each) / len(each)) for step, each in sorted(values.items()) if len(each) == len(row.arms)]
        if points:
            found[row.name] = points
    return found


def alpha_curves(board: Leaderboard) -> dict[float, tuple[float, Any]]:
    """Return the ruler by alpha, of the groups that differ in the objective alone and have one."""
    found: dict[float, tuple[float, Any]] = {}
    for row in board.rows:
        objective = Objective.read(row.group.get("objective") or "nll").to_dict()
        name, alpha = objective.pop("name"), objective.pop("alpha", None)
        alpha = {"nll": 0.0, "neg_p": 1.0}.get(name, alpha if name == "power" and not isinstance(alpha, dict) else None)
        plain = Threshold.parse(row.group.get("threshold")) == Threshold() and row.group.keys() <= {"objective", "threshold"}
        if alpha is not None and plain and not objective:  # a composed one is no point of the family
            found[float(alpha)] = row.values[board.plan.rank_by]
    return found
