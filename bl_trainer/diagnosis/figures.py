"""The plots of a report."""

from collections.abc import Callable
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from ..pages.html import Picture, drawn
from .continuum import ANCHORS
from .report import BUCKETS, Report

ALT_TEXTS = {
    "continuum": "Mean p on the continuum from model-weak to model-strong, with the paper's base models",
    "histogram": "Share of target tokens by their probability p",
    "gradient": "Share of the gradient from each tenth of p, for each objective",
    "reliability": "How often the most probable token is the target, by its probability; larger dots hold more tokens",
    "positions": "Mean p by position: from the start, along, and from the end of a response",
    "examples": "How many examples have which mean p",
    "moved": "Where the probability of target tokens moved: p under the base model against p after tuning",
}


def figures(report: Report) -> dict[str, Callable[[Report, Figure, Any], None]]:
    """Return the drawing functions of the figures that this report has, by name."""
    names: dict[str, Any] = {
        "continuum": _draw_continuum,
        "histogram": _draw_histogram,
        "gradient": _draw_gradient,
        "reliability": _draw_reliability,
        "positions": _draw_positions,
        "examples": _draw_examples,
    }
    if report.compare:
        names["moved"] = _draw_moved
    return names


def figure_size(name: str) -> tuple[float, float]:
    return 7.2, 1.9 if name == "continuum" else 2.9


def figure(name: str, report: Report) -> Picture:
    return drawn(partial(figures(report)[name], report), figure_size(name), ALT_TEXTS[name])


def _draw_continuum(report: Report, figure: Figure, theme: Any) -> None:
    text, muted, _, colours = theme
    axes, placement, total = figure.subplots(), report.placement, report.total
    edges = [0, *placement.cuts, 1]
    for i, region in enumerate(ANCHORS):
        axes.axvspan(edges[i], edges[i + 1], color=colours[i], alpha=0.12, lw=0)
        axes.text((edges[i] + edges[i + 1]) / 2, 0.93, f"model-{region}", ha="center", va="top", color=muted)
        points = [p for *_, p in ANCHORS[region]]
        axes.plot(points, [0.3] * len(points), "o", color=colours[i], ms=5, alpha=0.8)
        label = f"{ANCHORS[region][0][0]} {min(points):.2f}-{max(points):.2f}"
        axes.text(max(sum(points) / len(points), 0.005), 0.12, label, ha="left" if i == 0 else "center", va="center", size=8)
    low, high = total.prob_interval or (total.prob, total.prob)
    axes.plot([low, high], [0.56, 0.56], "-", color=text, lw=2)
    axes.plot([total.prob], [0.56], "D", color=text, ms=7)
    side = "right" if total.prob > 0.7 else "left"
    axes.annotate(f"here: {total.prob:.3f}", (total.prob, 0.56), (10 if side == "left" else -10, 7),
                  textcoords="offset points", ha=side, weight="bold")  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1), yticks=[], xlabel="mean p of the target tokens (dots: base models in the paper, Tab. 5)")
    axes.spines["left"].set_visible(False)


def _draw_histogram(report: Report, figure: Figure, theme: Any) -> None:
    axes, counts = figure.subplots(), report.histogram
    width, total = 1 / len(counts), sum(counts)
    axes.bar([(i + 0.5) * width for i in range(len(counts))], [c / total for c in counts], width * 0.92, color=theme[3][0])
    for rank in ("10", "50"):
        axes.axvline(report.percentiles[rank], color=theme[1], lw=1, ls="--")
        axes.annotate(f" {rank}%", (report.percentiles[rank], 0.9), xycoords=("data", "axes fraction"), color=theme[1], size=8)
    axes.set(xlim=(0, 1), xlabel="p of the target token (dashed: percentiles)", ylabel="share of tokens")


def _draw_gradient(report: Report, figure: Figure, theme: Any) -> None:
    axes = figure.subplots()
    shown = report.objectives[:6]
    width = 0.85 / len(shown)
    for k, item in enumerate(shown):
        where = [b + 0.075 + (k + 0.5) * width for b in range(BUCKETS)]
        label = f"{item.name}  (scale {item.scale:.2g})"
        axes.bar(where, item.buckets, width * 0.95, label=label, color=theme[3][k])
    axes.set(xticks=range(BUCKETS + 1), xticklabels=[f"{b / BUCKETS:.1f}" for b in range(BUCKETS + 1)], xlim=(0, BUCKETS))
    axes.set(xlabel="p of the target token", ylabel="share of the gradient")
    axes.legend(fontsize=7.5)


def _draw_reliability(report: Report, figure: Figure, theme: Any) -> None:
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color=theme[1], lw=1)
    curves = {"": report.calibration}
    if report.compare:
        curves = {f"{name} (error {part.error:.3f})": part for name, part in report.compare.train.calibration.items()}
    for k, (name, part) in enumerate(curves.items()):
        most = max(item.tokens for item in part.curve)
        axes.scatter(
            [item.confidence for item in part.curve],
            [item.accuracy for item in part.curve],
            [4 + 60 * item.tokens / most for item in part.curve],
            color=theme[3][k], alpha=0.8, label=name, clip_on=False,
        )  # fmt: skip
    if len(curves) > 1:
        axes.legend(fontsize=8)
    axes.set(
        xlim=(0, 1), ylim=(0, 1), xlabel="probability of the most probable token", ylabel="share in which it is the target"
    )


def _draw_positions(report: Report, figure: Figure, theme: Any) -> None:
    parts = {"first": "tokens from the start", "relative": "position in the response", "last": "tokens from the end"}
    for axes, (part, label) in zip(figure.subplots(1, 3, sharey=True), parts.items(), strict=True):
        curve = [float("nan") if p is None else p for _, p in getattr(report.positions, part)]
        count = len(curve)
        x = [(i + 0.5) / count for i in range(count)] if part == "relative" else list(range(count))
        axes.plot(x, curve, "o-", color=theme[3][0], ms=3, clip_on=False)
        if part == "last":
            axes.invert_xaxis()
        axes.set(xlabel=label, ylim=(0, 1))
        if part == "first":
            axes.set_ylabel("mean p")


def _draw_examples(report: Report, figure: Figure, theme: Any) -> None:
    axes, counts = figure.subplots(), report.examples.histogram
    width = 1 / len(counts)
    axes.bar([(i + 0.5) * width for i in range(len(counts))], counts, width * 0.92, color=theme[3][0])
    axes.set(xlim=(0, 1), xlabel="mean p of an example", ylabel="examples")


def _draw_moved(report: Report, figure: Figure, theme: Any) -> None:
    moved = report.compare.train.moved if report.compare else []
    shares = [[count / max(1, sum(row)) for count in row] for row in moved]
    axes = figure.subplots()
    image = axes.imshow(shares, origin="lower", extent=(0, 1, 0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, label="share of the row")
    axes.set(xlabel="p after tuning", ylabel="p under the base model")
