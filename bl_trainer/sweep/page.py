"""What a person sees of a sweep: a table of all arms, the leaderboard as Markdown and as a page, and the winner's recipe."""

import csv
import io
import math
import shlex
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import yaml

from .. import __version__
from .._util.files import write_text
from ..pages.html import Picture, fill
from .cost import Spent
from .design import describe
from .differences import MIN_SEEDS, Difference
from .figures import alpha_curves, alphas_figure, curves_figure, learning_curves, pareto_figure, rulers_figure
from .leaderboard import Leaderboard, Row
from .outcome import arm_folder
from .rulers import RULERS, show, temperatures_of


def write_leaderboard(board: Leaderboard, folder: Path, command: str) -> None:
    """Write leaderboard.csv, .md, .html and winner.yaml into `folder`, each in one go; `command` launches an arm."""
    files = {"leaderboard.csv": arms_csv(board), "leaderboard.md": markdown(board, folder, command)}
    files["leaderboard.html"] = page(board, folder, command)
    if board.rows:
        files["winner.yaml"] = winner(board, folder)
    for name, text in files.items():
        write_text(folder / name, text)


def winner(board: Leaderboard, folder: Path) -> str:
    """Return the recipe of the best setting."""
    row, plan = board.rows[0], board.plan
    output = str(folder).removesuffix("-sweep") + "-winner"
    recipe = {**plan.base, **row.best, "output_dir": output}
    of = f"{len(board.rows) + len(board.stopped)} by {plan.rank_by}{', in short runs' if plan.is_staged else ''}"
    head = f"# {describe(row.best)}: best of {of}. {board.verdict()}"
    return " ".join(head.split()) + "\n" + yaml.safe_dump(recipe, sort_keys=False)


def arms_csv(board: Leaderboard) -> str:
    """Return a line for each arm: its settings, and its rulers or why it has none."""
    settings = {index: result.setting for index, result in board.arms.items()}
    settings |= {index: setting for index, (setting, _) in board.failed.items()}
    keys = list(dict.fromkeys(key for setting in settings.values() for key in setting))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["arm", *keys, *(ruler.name for ruler in board.rulers), "loss", "failed"])
    for index, setting in sorted(settings.items()):
        result = board.arms.get(index)
        values = [ruler.of(result.rulers) if result else None for ruler in board.rulers]
        reason = "" if result else board.failed[index][1]
        lines.writerow([index, *(setting.get(key) for key in keys), *values, result and result.loss, reason])
    return text.getvalue()


def markdown(board: Leaderboard, folder: Path, command: str) -> str:
    """Return the leaderboard in Markdown."""
    header, rows = comparison(board)
    lines = [f"# {board.verdict()}", "", *_explained(board), ""]
    lines += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    for title, parts in _lists(board, folder, command).items():
        lines += ["", f"## {title}", "", *(f"- {part}" for part in parts)]
    return "\n".join(lines) + "\n"


def summary(board: Leaderboard, folder: Path) -> str:
    """Return the leaderboard in a few lines for the terminal."""
    ruler = board.plan.rank_by
    lines = [board.verdict()]
    for row in board.rows:
        lines.append(f"  {row.name}: {ruler} {_value(row, ruler)}{_behind(row)} with {_tuned(row) or 'the recipe as it is'}")
    lines += [f"  stopped after the first stage: {each}" for each in _stopped(board)]
    lines += [f"  ! {each}" for each in (*_warnings(board), *_failed(board))]
    lines.append(f"Cost of {len(board.arms)} runs: {_spent(board)}.")
    winner = f"   winner: {folder / 'winner.yaml'}" if board.rows else ""
    lines.append(f"Leaderboard: {folder / 'leaderboard.html'}{winner}")
    return "\n".join(lines)


def comparison(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of groups, the base model last."""
    first = board.plan.rank_by
    single = {each for ruler in board.rulers for each in temperatures_of(ruler.name, (one.name for one in board.rulers))}
    others = [ruler.name for ruler in board.rulers if ruler.name != first and ruler.name not in single]
    header = ["", "with", "seeds", first, f"behind by {first}", *others, "own loss"]
    rows = []
    for row in board.rows:
        values = [_value(row, name) for name in others]
        loss = "" if row.loss is None else show(row.loss)
        rows.append([row.name, _tuned(row), str(len(row.arms)), _value(row, first), _difference(row.behind), *values, loss])
    if board.base is not None:
        base = {ruler.name: show(ruler.of(board.base)) for ruler in board.rulers if ruler.is_in(board.base)}
        rows.append(["the base model", "", "", base.get(first, ""), "", *(base.get(name, "") for name in others), ""])
    return header, rows


def page(board: Leaderboard, folder: Path, command: str) -> str:
    """Return the HTML page."""
    header, rows = comparison(board)
    measured, *explained = _explained(board)
    lists = _lists(board, folder, command)
    as_run = lists.pop("Commands", [])
    return fill(
        Path(__file__).parent / "page.html.j2",
        title=f"{_subject(board)}: {board.verdict()}",
        subject=_subject(board),
        date=datetime.now(timezone.utc).date().isoformat(),
        version=__version__,
        verdict=board.verdict(),
        measured=measured,
        header=[name.replace("_", " ").replace("/", "/\u200b") for name in header],
        rows=rows,
        explained=explained,
        beware=lists.pop("Beware", []),
        next=_next(board, folder, command),
        lists={**lists, "Every run's command": as_run[1:]} if as_run else lists,
        **_plots(board, folder),
    )


def _subject(board: Leaderboard) -> str:
    """Return which model and data a sweep compares objectives on."""
    base = board.plan.base
    data = base.get("dataset_name") or ", ".join(str(entry.get("path")) for entry in base.get("datasets") or [])
    return f"{base.get('model_name_or_path')} on {data}"


def _next(board: Leaderboard, folder: Path, command: str) -> dict[str, str]:
    """Return what to do next, and the command for it."""
    if not board.rows:
        return {}
    recipe = shlex.quote(str(folder / "winner.yaml"))
    return {f"Train the winner, {board.rows[0].name}, at full length:": f"{command} -m bl_trainer train --config {recipe}"}


def _plots(board: Leaderboard, folder: Path) -> dict[str, Picture | None]:
    """Return each plot of the page; None where there is nothing to draw."""
    curves, alphas, has_rows = learning_curves(board, folder), alpha_curves(board), bool(board.rows)
    return {
        "rulers": rulers_figure(board) if has_rows else None,
        "curves": curves_figure(curves) if curves else None,
        "alphas": alphas_figure(alphas, board.plan.rank_by) if len(alphas) > 2 else None,
        "drift": pareto_figure(board) if has_rows and RULERS["drift"] in board.rulers else None,
    }


def _lists(board: Leaderboard, folder: Path, command: str) -> dict[str, list[str]]:
    """Return title -> items of each list that has any."""
    parts = {
        "Stopped after the first stage": _stopped(board),
        "Beware": _warnings(board),
        "Without a result": _failed(board),
        "Cost": [f"{len(board.arms)} runs: {_spent(board)}."],
        "Commands": _commands(board, folder, command),
    }
    return {title: items for title, items in parts.items() if items}


def _stopped(board: Leaderboard) -> list[str]:
    """Return a line for each group that the first stage left out."""
    name, seed = board.plan.rank_by, board.plan.seeds[0]
    return [
        f"{row.name}: {name} {_value(row, name)} with {_tuned(row) or 'the recipe as it is'}, seed {seed} alone"
        for row in board.stopped
    ]


def _spent(board: Leaderboard) -> str:
    return Spent.of(board.arms.values()).scaled(len(board.arms)) or "not known"


def _explained(board: Leaderboard) -> list[str]:
    data = next(iter(board.arms.values()), None)
    lines = [ruler.explanation for ruler in board.rulers if ruler.name in RULERS]
    measured = f"Measured on {data.examples:,} test examples, {data.tokens:,} target tokens." if data else ""
    return [
        f"{measured} Ranked by {board.plan.rank_by}. {_limited(board)}",
        *_at_best_temperature(board),
        *_staged(board),
        "Each objective is shown at its best setting. The same test data choose the setting and judge it, for all alike. "
        f"Brackets hold 95 % intervals over seeds, or the seeds' values where there are fewer than {MIN_SEEDS}.",
        '"Behind" is the difference from the first row. It is paired by seed and by test example where there are several, and '
        "its interval counts both. p is the probability of such a difference by chance. p-values are Holm-corrected for all "
        "rows; intervals are not.",
        *lines,
    ]


def _limited(board: Leaderboard) -> str:
    """Return what the ranking makes of forgetting."""
    limit = board.plan.limit
    if math.isinf(limit):
        return "Forgetting is not measured: add `probe: DATA`, or `retain: TASK/METRIC`, of what the model knew before."
    return f"A setting that forgets more than {limit:g} (`max_drift`) stands behind all that do not."


def _at_best_temperature(board: Leaderboard) -> list[str]:
    if not any(row.temperatures for row in board.rows):
        return []
    return [
        "METRIC@best is each run's best over the sampling temperatures, chosen on the same items. leaderboard.csv has each "
        "temperature."
    ]


def _forgetful(board: Leaderboard) -> list[str]:
    """Return a line for each row whose best setting forgets too much."""
    found = []
    for row in board.rows:
        if row.forgetful:
            setting, lost = row.forgetful
            own = describe({key: value for key, value in setting.items() if key not in row.group}) or "the only setting"
            shown = "another setting is shown" if setting != row.best else "no setting forgets less"
            found.append(f"{row.name}: its best by {board.plan.rank_by}, {own}, forgets {show(lost)}: {shown}.")
    return found


def _staged(board: Leaderboard) -> list[str]:
    """Return what the rows of a short sweep are worth."""
    if not board.plan.is_staged:
        return []
    length = ", ".join(f"{key} {value:g}" for key, value in board.plan.budget.items())
    return [
        f"Runs are short ({length}). An objective that learns fast looks better in a short run. The first stage ran each "
        f"setting at seed {board.plan.seeds[0]} and chose the finalists. The table compares these at other seeds, so a lucky "
        "first seed does not count. Objectives that stopped after the first stage have no rank."
    ]


def _warnings(board: Leaderboard) -> list[str]:
    warnings = [*board.plan.notes, *_forgetful(board)]
    for row in board.rows:
        warnings += [f"{row.name}: {each}; a wider range may do better." for each in row.at_edge]
        if len(row.arms) < len(board.plan.judging_seeds):
            warnings.append(f"{row.name}: {len(row.arms)} of {len(board.plan.judging_seeds)} seeds finished.")
    if len({(result.examples, result.tokens) for result in board.arms.values()}) > 1:
        warnings.append("Runs have different numbers of test tokens, by their tokenizers. Their metrics can't be compared.")
    for package, versions in board.mixed_versions().items():
        warnings.append(f"Runs used different versions of {package} ({', '.join(versions)}). Their metrics may differ by it.")
    ruler = RULERS.get(board.plan.rank_by)
    if ruler and ruler.favours:
        warnings.append(f"`rank_by: {ruler.name}` is what {ruler.favours} itself optimises, which favours it.")
    return warnings


def _failed(board: Leaderboard) -> list[str]:
    return [f"run {index:03d}, {describe(setting)}: {reason}" for index, (setting, reason) in sorted(board.failed.items())]


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
        return f"{show(behind.mean)} (no interval: nothing to pair by)"
    interval = "no interval: all differ alike" if behind.interval is None else " to ".join(map(show, behind.interval))
    shown = f"{show(behind.mean)} ({interval})"
    if "seeds" in behind.over and len(behind.by_seed) < MIN_SEEDS:
        shown = f"{show(behind.mean)} (by seed: {_listed(behind.by_seed)})"
    if "seeds" not in behind.over:
        return f"{shown} over examples alone"
    shown += f", p = {behind.p_value:.2g}" + ("" if "examples" in behind.over else " over seeds alone")
    return shown + ("" if behind.is_significant else ": no significant difference")


def _value(row: Row, ruler: str) -> str:
    mean, interval = row.values[ruler]
    at = f" at temperature {row.temperatures[ruler]:g}" if ruler in row.temperatures else ""
    if interval:
        return f"{show(mean)} ({show(interval[0])} to {show(interval[1])}){at}"
    return f"{show(mean)}" + (f" ({_listed(row.each[ruler])})" if len(row.each[ruler]) > 1 else "") + at


def _listed(values: Iterable[float]) -> str:
    return ", ".join(map(show, values))
