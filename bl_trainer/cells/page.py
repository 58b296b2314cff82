"""What a person sees of the cells: tables in Markdown and in the terminal, and a page."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..objectives.temperature import effective_temperature
from ..pages.html import drawn, fill
from .engine import Entry
from .results import Mean, Results

SHOWN = {
    "greedy": "greedy",
    "sampled": "sampled, best T",
    "sampled_1": "sampled, T = 1",
    "variation": "variation, best T",
    "variation_1": "variation, T = 1",
    "format": "format",
    "kept": "old tasks kept",
}
LEGEND = (
    "Greedy: share of questions whose most probable answer is right. Sampled: probability of a right answer, at temperature 1, "
    "or at the best of 1, 0.5 and 0.25 for each cell. Variation: total variation from the right answers' shares; 0 is best. "
    "Format: share of questions whose format tokens are the most probable ones, each given the right tokens before it, in "
    "cells with a new format. Old tasks kept: greedy share of what the model knew, after training over before.",
    "All are computed from probabilities, on questions apart from those that chose the learning rate. Intervals are 95 %, over "
    "pretrained models.",
)


LEAST_KEPT = 0.5
LIMITED = (
    "The best rate for a task may forget everything else. Here a rate counts only if it keeps "
    f"{LEAST_KEPT:.0%} of the old tasks. "
    "In a cell where none does, the one that keeps the most counts."
)


def temperatures(entries: Iterable[Entry]) -> dict[str, str]:
    """Return the effective temperature of each objective by name, in words; label smoothing has none."""
    return {
        entry.name: str(effective_temperature(entry.objective, entry.threshold))
        if not entry.smoothing
        else f"none: p = {1 - entry.smoothing:g} T + {entry.smoothing:g} / vocabulary"
        for entry in entries
    }


def comparison(results: Results, optima: Mapping[str, str], least_kept: float = 0.0) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of all objectives, each metric with its interval and rank.

    `optima`: the effective temperature of each objective, from `temperatures`. `least_kept`: see `Results.choice`.
    """
    metrics = [metric for metric in SHOWN if results.cells_of(metric)]
    header = ["objective", "temperature at its optimum", *(SHOWN[metric] for metric in metrics)]
    rows = []
    for name in results.objectives:
        cells = []
        for metric in metrics:
            value = results.mean(name, metric, results.cells_of(metric), least_kept)
            cells.append(f"{shown(value)} #{results.rank(name, metric, least_kept)}")
        rows.append([name, optima[name], *cells])
    return header, rows


def by_cell(results: Results, metric: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of a metric in each cell; @ the learning rate that validation chose."""
    header = ["cell", *results.objectives]
    rows = []
    for cell in results.cells_of(metric):
        values = (results.mean(name, metric, [cell]).mean for name in results.objectives)
        rates = (results.choice(name, cell, metric).rate for name in results.objectives)
        rows.append([cell, *(f"{value:.3f} @ {rate:g}" for value, rate in zip(values, rates, strict=True))])
    return header, rows


def verdict(results: Results, objective: str, control: str) -> str:
    """Return one sentence on an objective, beside a control."""
    found = results.difference(objective, control, "greedy")
    right, other = (results.mean(name, "greedy").mean for name in (objective, control))
    interval = "" if found.interval is None else f" (95 % interval {found.interval[0]:+.3f} to {found.interval[1]:+.3f})"
    count = len(results.objectives)
    return (
        f"{objective} answers {right:.3f} of the questions right and {control} {other:.3f}, both greedy: {found.mean:+.3f}"
        f"{interval}. It ranks {results.rank(objective, 'greedy')} of {count}."
    )


def shown(mean: Mean) -> str:
    """Return a mean with its interval."""
    return f"{mean.mean:.3f}" + ("" if mean.interval is None else f" ({mean.interval[0]:.3f} to {mean.interval[1]:.3f})")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def report(results: Results, optima: Mapping[str, str]) -> str:
    """Return all tables in Markdown."""
    parts = [
        f"{len(results.models)} pretrained models, {len(results.cells)} cells, {len(results.rows)} runs.",
        *LEGEND,
        markdown(*comparison(results, optima)),
        LIMITED,
        markdown(*comparison(results, optima, LEAST_KEPT)),
        *(f"**{SHOWN[metric]}**\n\n{markdown(*by_cell(results, metric))}" for metric in SHOWN if results.cells_of(metric)),
    ]
    return "\n\n".join(parts) + "\n"


def page(results: Results, objective: str, control: str, optima: Mapping[str, str]) -> str:
    """Return the page of an objective among others; `control`: the one that its title compares it with."""
    header, rows = comparison(results, optima)
    return fill(
        Path(__file__).parent / "page.html.j2",
        title=verdict(results, objective, control),
        measured=f"{len(results.models)} pretrained models, {len(results.cells)} cells.",
        explained=LEGEND,
        header=header,
        rows=rows,
        limited=LIMITED,
        kept_rows=comparison(results, optima, LEAST_KEPT)[1],
        plot=drawn(partial(_draw, results, objective), (6.5, 4), "Greedy answers against total variation, by objective"),
        cells={SHOWN[metric]: by_cell(results, metric) for metric in SHOWN if results.cells_of(metric)},
    )


def _draw(results: Results, objective: str, figure: Figure, theme: Any) -> None:
    """Draw greedy answers against total variation at temperature 1."""
    axes = figure.subplots()
    for name in results.objectives:
        point = results.mean(name, "variation_1").mean, results.mean(name, "greedy").mean
        colour = theme[3][1] if name == objective else theme[3][0]
        axes.plot(*point, "o", color=colour, ms=5)
        axes.annotate(name, point, xytext=(4, 3), textcoords="offset points", fontsize=7, color=theme[0])
    axes.set(xlabel="Total variation at temperature 1 (less is better)", ylabel="Greedy answers that are right")
