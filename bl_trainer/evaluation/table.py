"""The table of an evaluation, for the terminal."""

from collections.abc import Sequence
from typing import Any

from .exploration import is_of_all
from .results import Results

COUNTED = {"empty": "empty answers", "unfinished": "unfinished reasoning"}  # columns of the table, where there are any


def table(results: Results) -> str:
    """Return the scores, and the differences from the first checkpoint, as lines of text."""
    entries = [entry for task in results.options.tasks for entry in results.of(task)]
    scores = [{**score, "checkpoint": entry["checkpoint"]} for entry in entries for score in entry["scores"]]
    scores.sort(key=lambda score: (score["task"], score["metric"]))  # checkpoints stay in their order
    counted = {key: name for key, name in COUNTED.items() if any(score.get(key) for score in scores)}
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "checkpoint", "value ± standard error", "95 % interval", "items", *counted.values())
    ]
    for s in scores:
        counts = [_share(s, key) for key in counted]
        rows.append((*_names(s), _figure(s["value"], s["stderr"]), _range(s.get("interval")), str(s["items"] or ""), *counts))
    lines, differences = _columns(rows), results.differences()
    if differences:
        wide = [("task", "metric", "checkpoint", "difference", "95 % interval", "items")]
        wide += [
            (*_names(d), _figure(d["difference"], d["stderr"], "+"), _range(d["interval"], "+"), str(d["items"]))
            for d in differences
        ]
        lines += ["", f"Difference from {next(iter(results.prints))} on the same items:", *_columns(wide)]
    lines += [line for note in results.notes() for line in ("", f"Note: {note}")]
    return "\n".join(lines)


def _names(row: dict[str, Any]) -> tuple[str, str, str]:
    answers, is_mean = row.get("answers", 1), not is_of_all(row["metric"])
    return row["task"], row["metric"] + (f", Avg@{answers}" if answers > 1 and is_mean else ""), row["checkpoint"]


def _share(score: dict[str, Any], key: str) -> str:
    count, answers = score.get(key), score.get("answers", 1)
    return "" if count is None else f"{count} of {score['items'] * answers}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _figure(value: Any, stderr: Any, sign: str = "") -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:{sign}.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def _range(interval: Sequence[float] | None, sign: str = "") -> str:
    if interval is None:
        return "not enough to tell" if sign else ""
    low, high = interval
    return f"{low:{sign}.4f} to {high:{sign}.4f}"
