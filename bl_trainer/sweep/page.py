"""What a person sees of a sweep: a table of all arms, the leaderboard as Markdown and as a page, and the winner's recipe."""

import csv
import io
import itertools
import math
import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from ..pages.html import document, escape, picture, table
from ..training.record import Curve
from .arm import arm_folder
from .leaderboard import MIN_SEEDS, Difference, Leaderboard, Row
from .plan import describe
from .rulers import RULERS, ruler_of

MAX_CURVES = 8
ACROSS = 4  # rulers in a row


def write_leaderboard(board: Leaderboard, folder: Path, command: str) -> None:
    """Write leaderboard.csv, .md, .html and winner.yaml into `folder`, each in one go; `command` launches an arm."""
    files = {"leaderboard.csv": arms_csv(board), "leaderboard.md": markdown(board, folder, command)}
    files["leaderboard.html"] = page(board, folder, command)
    if board.rows:
        files["winner.yaml"] = winner(board, folder)
    for name, text in files.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def winner(board: Leaderboard, folder: Path) -> str:
    """Return the recipe of the best setting."""
    row, plan = board.rows[0], board.plan
    output = str(folder).removesuffix("-sweep") + "-winner"
    recipe = {**plan.base, **row.best, "output_dir": output}
    head = f"# {describe(row.best)}: best of {len(board.rows)} by {plan.rank_by}. {board.verdict()}"
    return " ".join(head.split()) + "\n" + yaml.safe_dump(recipe, sort_keys=False)


def arms_csv(board: Leaderboard) -> str:
    """Return a line for each arm: its settings, and its rulers or why it has none."""
    settings = {index: result["setting"] for index, result in board.arms.items()}
    settings |= {index: setting for index, (setting, _) in board.failed.items()}
    keys = list(dict.fromkeys(key for setting in settings.values() for key in setting))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["arm", *keys, *board.rulers, "loss", "failed"])
    for index, setting in sorted(settings.items()):
        result = board.arms.get(index)
        values = [ruler_of(result, name) for name in board.rulers] if result else [None] * len(board.rulers)
        reason = "" if result else board.failed[index][1]
        lines.writerow([index, *(setting.get(key) for key in keys), *values, result and result["loss"], reason])
    return text.getvalue()


def markdown(board: Leaderboard, folder: Path, command: str) -> str:
    """Return the leaderboard in Markdown."""
    header, rows = comparison(board)
    lines = [f"# {board.verdict()}", "", *_explained(board), ""]
    lines += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    for title, parts in (
        ("Beware", _warnings(board)),
        ("Without a result", _failed(board)),
        ("Commands", _commands(board, folder, command)),
    ):
        if parts:
            lines += ["", f"## {title}", "", *(f"- {part}" for part in parts)]
    return "\n".join(lines) + "\n"


def summary(board: Leaderboard, folder: Path) -> str:
    """Return the leaderboard in a few lines for the terminal."""
    ruler = board.plan.rank_by
    lines = [board.verdict()]
    for row in board.rows:
        lines.append(f"  {row.name}: {ruler} {_value(row, ruler)}{_behind(row)} with {_tuned(row) or 'the recipe as it is'}")
    lines += [f"  ! {each}" for each in (*_warnings(board), *_failed(board))]
    winner = f"   winner: {folder / 'winner.yaml'}" if board.rows else ""
    lines.append(f"Leaderboard: {folder / 'leaderboard.html'}{winner}")
    return "\n".join(lines)


def comparison(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of groups, the base model last."""
    ruler = board.plan.rank_by
    others = [name for name in board.rulers if name != ruler]
    header = ["", "with", "seeds", ruler, f"behind by {ruler}", *others, "own loss"]
    rows = []
    for row in board.rows:
        values = [_value(row, name) for name in others]
        loss = "" if row.loss is None else f"{row.loss:.4g}"
        first = [row.name, _tuned(row), str(len(row.arms)), _value(row, ruler), _difference(row.behind)]
        rows.append([*first, *values, loss])
    if board.base is not None:
        base = (
            {**board.base, "perplexity": ruler_of({"rulers": board.base}, "perplexity")} if "nll" in board.base else board.base
        )
        shown = {name: f"{base[name]:.4g}" for name in board.rulers if name in base}
        rows.append(["the base model", "", "", shown.get(ruler, ""), "", *(shown.get(name, "") for name in others), ""])
    return header, rows


def page(board: Leaderboard, folder: Path, command: str) -> str:
    """Return the HTML page."""
    header, rows = comparison(board)
    explained = _explained(board)
    sections = [f"<header><h1>{escape(board.verdict())}</h1>{_paragraphs(explained[:1])}</header>"]
    drawn = _picture("rulers", board) if board.rows else ""
    judged = drawn + table(header, rows) + _paragraphs(explained[1:])
    sections.append(f"<section><h2>All by the same rulers</h2>{judged}</section>")
    curves = _curves(board, folder)
    if curves:
        drawn = picture(partial(_draw_curves, curves), (7.2, 2.9), "Held-out nll over the steps of training")
        sections.append(f"<section><h2>Learning curves</h2>{drawn}</section>")
    alphas = alpha_curves(board)
    if len(alphas) > 2:
        drawn = picture(partial(_draw_alphas, alphas, board.plan.rank_by), (7.2, 2.9), "The ruler against alpha")
        sections.append(f"<section><h2>Along alpha</h2><p>nll is alpha 0, neg_p alpha 1.</p>{drawn}</section>")
    if board.rows and "drift" in board.rulers:
        sections.append(f"<section><h2>What it costs in drift</h2>{_picture('pareto', board)}</section>")
    for title, parts in (
        ("Beware", _warnings(board)),
        ("Without a result", _failed(board)),
        ("Commands", _commands(board, folder, command)),
    ):
        if parts:
            items = "".join(f"<li>{escape(part)}</li>" for part in parts)
            sections.append(f"<section><h2>{title}</h2><ul>{items}</ul></section>")
    return document(board.verdict(), sections)


def _explained(board: Leaderboard) -> list[str]:
    data = next(iter(board.arms.values()), None)
    lines = [f"{name}: {RULERS[name][1]}; {RULERS[name][0]} is better." for name in RULERS if name in board.rulers]
    measured = f"Measured on {data['examples']:,} held-out examples, {data['tokens']:,} target tokens." if data else ""
    return [
        f"{measured} Ranked by {board.plan.rank_by}.",
        "Each stands for its best setting, chosen by the mean over seeds on the same held-out data. In brackets are 95 % "
        f"intervals over seeds, or the seeds' values if there are fewer than {MIN_SEEDS}. What it is behind by is paired by "
        "seed and by held-out example, where there are several of each, and the interval counts both; p is Holm's, for all of "
        "these comparisons, the interval that of the one.",
        *lines,
    ]


def _warnings(board: Leaderboard) -> list[str]:
    warnings = [*board.plan.notes]
    for row in board.rows:
        warnings += [f"{row.name}: {each}; a wider range may do better." for each in row.at_edge]
        if len(row.arms) < len(board.plan.seeds):
            warnings.append(f"{row.name}: {len(row.arms)} of {len(board.plan.seeds)} seeds finished.")
    if len({(result["examples"], result["tokens"]) for result in board.arms.values()}) > 1:
        warnings.append("Arms have other held-out tokens, as other tokenizers make them: their rulers can't be compared.")
    if board.plan.rank_by in ("nll", "perplexity", "target_prob"):
        own = "neg_p" if board.plan.rank_by == "target_prob" else "nll"
        warnings.append(f"`rank_by: {board.plan.rank_by}` is what {own} itself optimises, which favours it.")
    return warnings


def _failed(board: Leaderboard) -> list[str]:
    return [f"arm {index:03d}, {describe(setting)}: {reason}" for index, (setting, reason) in sorted(board.failed.items())]


def _commands(board: Leaderboard, folder: Path, command: str) -> list[str]:
    launched = [
        f"{command} -m bl_trainer train --config {shlex.quote(str(arm_folder(folder, i) / 'recipe.yaml'))}" for i in board.arms
    ]
    if not board.rows:
        return []
    winner = f"{command} -m bl_trainer train --config {shlex.quote(str(folder / 'winner.yaml'))}"
    return [f"{winner}   (to train the winner)", *(f"{each}   (as it was run)" for each in launched)]


def _tuned(row: Row) -> str:
    return describe({key: value for key, value in row.best.items() if key not in row.group}) if row.best != row.group else ""


def _behind(row: Row) -> str:
    return f", behind by {_difference(row.behind)}" if row.behind else ""


def _difference(behind: Difference | None) -> str:
    if behind is None:
        return ""
    if behind.p_value is None:
        return f"{behind.mean:.4g} (no interval: nothing to pair by)"
    interval = "no interval: all differ alike" if behind.interval is None else "{:.4g} to {:.4g}".format(*behind.interval)
    shown = f"{behind.mean:.4g} ({interval})"
    if "seeds" in behind.over and len(behind.by_seed) < MIN_SEEDS:
        shown = f"{behind.mean:.4g} (by seed: {_listed(behind.by_seed)})"
    if "seeds" not in behind.over:
        return f"{shown} over examples alone"
    shown += f", p = {behind.p_value:.2g}" + ("" if "examples" in behind.over else " over seeds alone")
    return shown + ("" if behind.is_significant else ": no significant difference")


def _value(row: Row, ruler: str) -> str:
    mean, interval = row.values[ruler]
    if interval:
        return f"{mean:.4g} ({interval[0]:.4g} to {interval[1]:.4g})"
    return f"{mean:.4g}" + (f" ({_listed(row.each[ruler])})" if len(row.each[ruler]) > 1 else "")


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _paragraphs(lines: list[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _picture(name: str, board: Leaderboard) -> str:
    if name == "rulers":
        height = 0.9 + 0.22 * len(board.rows)
        return picture(
            partial(_draw_rulers, board), (7.2, max(1.6, height)), "Each ruler of each objective, with 95 % intervals or values"
        )
    return picture(partial(_draw_pareto, board), (7.2, 2.9), "The ruler against drift from the base model")


def _drawn(board: Leaderboard) -> list[str]:
    return [name for name in board.rulers if name != "perplexity"]


def _draw_rulers(board: Leaderboard, figure: Figure, theme: Any) -> None:
    names = _drawn(board)
    places = list(range(len(board.rows)))[::-1]
    every = figure.subplots(math.ceil(len(names) / ACROSS), min(len(names), ACROSS), sharey=True, squeeze=False).flat
    for axes, name in itertools.zip_longest(every, names):
        if name is None:
            axes.set_visible(False)
            continue
        for place, row in zip(places, board.rows, strict=True):
            mean, interval = row.values[name]
            if interval:
                axes.plot(interval, [place, place], "-", color=theme[3][0], lw=1.5)
            else:
                axes.plot(row.each[name], [place] * len(row.each[name]), "|", color=theme[3][0], ms=6)
            axes.plot([mean], [place], "o", color=theme[3][0], ms=4)
        if board.base is not None and name in board.base:
            axes.axvline(board.base[name], color=theme[1], lw=1, ls="--")
        axes.set(yticks=places, yticklabels=[row.name for row in board.rows], ylim=(-0.6, len(places) - 0.4))
        axes.set_xlabel(name.replace("_", " "), size=7.5)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=3)


def _draw_curves(curves: dict[str, list[tuple[int, float]]], figure: Figure, theme: Any) -> None:
    axes = figure.subplots()
    for k, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, label=name, color=theme[3][k % len(theme[3])])
    axes.set(xlabel="step", ylabel="held-out nll, mean over seeds")
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


def _curves(board: Leaderboard, folder: Path) -> dict[str, list[tuple[int, float]]]:
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
        objective = Objective.parse(row.group.get("objective") or "nll").to_dict()
        name, alpha = objective.pop("name"), objective.pop("alpha", None)
        alpha = {"nll": 0.0, "neg_p": 1.0}.get(name, alpha if name == "power" and not isinstance(alpha, dict) else None)
        plain = Threshold.parse(row.group.get("threshold")) == Threshold() and row.group.keys() <= {"objective", "threshold"}
        if alpha is not None and plain and not objective:  # a composed one is no point of the family
            found[float(alpha)] = row.values[board.plan.rank_by]
    return found
