"""Scores of tasks over their items, and differences between checkpoints on the same items."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._util.intervals import Bounds, mean_interval
from .exploration import bounds_of, has_direction, is_of_all
from .grading.reasoning import split_reasoning
from .items import metric_name

MACRO = ":macro"  # of a metric's name: the mean over groups of items

Rows = Sequence[dict[str, Any]]  # one for each item


def scores_of(
    found: Mapping[str, Any], task: str, items: int | None, path: str | None, rows: Rows = (), higher: Mapping[str, Any] = {}
) -> list[dict[str, Any]]:
    """Return the scores of a task: of each metric, then of it by group of items, and over groups.

    Args:
        found: what the harness found, with names such as `acc,none` and `acc_stderr,none`.
        items: how many there are; None for a group of tasks, which has no `rows`.
        path: of the file of items.
        higher: metric -> whether higher is better, as far as the task says it.
    """
    scores: list[dict[str, Any]] = []
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            name, shared = metric_name(metric, kind), {"higher_is_better": higher.get(metric), "samples": path}
            stderr = found.get(f"{metric}_stderr,{kind}")
            score = {"task": task, "metric": name, "value": value}
            score |= _precision(
                name, [row["metrics"].get(name) for row in rows], value, stderr if isinstance(stderr, float) else None
            )
            own = [{**score, **_counts(rows, items)}, *_by_group(task, name, rows, items)]
            scores += [{**each, **shared} for each in own]
    return scores + _of_all_answers(task, items, path, rows)


def _of_all_answers(task: str, items: int | None, path: str | None, rows: Rows) -> list[dict[str, Any]]:
    """Return the scores of an item's answers taken together. The harness does not compute them."""
    scores: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for row in rows for name in row["metrics"] if is_of_all(name) and ":" not in name):
        values = [row["metrics"][name] for row in rows if name in row["metrics"]]
        score = {"task": task, "metric": name, **_mean(name, values)}
        shared = {"higher_is_better": True if has_direction(name) else None, "samples": path}
        own = [{**score, "is_mean": True, **_counts(rows, items)}, *_by_group(task, name, rows, items)]
        scores += [{**each, **shared} for each in own]
    return scores


def _mean(metric: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of a metric's values, one for each item, with its standard error and 95 % interval."""
    mean, stderr, items = statistics.fmean(values), standard_error(values), len(values)
    return {"value": mean, "stderr": stderr, "interval": _interval(mean, stderr, [items], items - 1, bounds_of(metric, values))}


def _precision(metric: str, values: list[Any], score: Any, stderr: Any) -> dict[str, Any]:
    """Return a score's standard error and interval, and whether it is the mean over items of `values`.

    `stderr`: the harness's own, a number or "N/A".
    """
    is_mean = bool(values) and all(isinstance(value, (int, float)) for value in values)
    is_mean = is_mean and math.isclose(statistics.fmean(values), score, abs_tol=1e-9)
    if is_mean:
        return {**_mean(metric, values), "value": score, "is_mean": True}
    return {"stderr": stderr if isinstance(stderr, float) else None, "interval": None, "is_mean": False}


def _by_group(task: str, name: str, rows: Rows, items: int | None) -> Iterator[dict[str, Any]]:
    """Yield a metric's scores by group of items, then the mean over groups, if there are any."""
    parts = []
    for group in sorted({other for row in rows for other in row["metrics"] if other.startswith(f"{name}:")}):
        own = [row for row in rows if group in row["metrics"]]
        values = [row["metrics"][group] for row in own]
        score = {"task": task, "metric": group, **_mean(group, values)}
        parts.append({**score, "is_mean": True, **_counts(own, len(own))})
    yield from parts
    if parts:
        bounds = bounds_of(
            name, (row["metrics"][part["metric"]] for part in parts for row in rows if part["metric"] in row["metrics"])
        )
        whole = {"task": task, "metric": name + MACRO, **_counts(rows, items), **macro(parts, "value", bounds)}
        yield {**whole, "is_mean": False}


def _counts(rows: Rows, items: int | None) -> dict[str, Any]:
    """Count items, answers to each, and the answers that are empty or whose reasoning is unfinished."""
    given = [row["answer"] if isinstance(row["answer"], list) else [row["answer"]] for row in rows]
    said = [split_reasoning(answer, row["prompt"]) for row, answers in zip(rows, given, strict=True) for answer in answers]
    empty = sum(is_finished and not text.strip() for text, is_finished in said) if rows else None
    unfinished = sum(not is_finished for _, is_finished in said) if rows else None
    return {"items": items, "answers": len(given[0]) if rows else 1, "empty": empty, "unfinished": unfinished}


def paired_difference(new: dict[str, float], old: dict[str, float], metric: str = "") -> dict[str, Any]:
    """Return the mean of new - old over the items in both, its standard error, and its 95 % interval.

    The interval is None below 10 items, where it would be a guess, and where items that all differ alike could differ by
    anything. `metric`: the name of what is compared.
    """
    values = [new[item] - old[item] for item in old.keys() & new.keys()]
    mean, stderr = statistics.fmean(values) if values else None, standard_error(values)
    most = largest_difference(new, old, metric=metric)
    found = {"difference": mean, "stderr": stderr, "items": len(values)}
    return {**found, "interval": _interval(mean, stderr, [len(values)], len(values) - 1, (-most, most))}


def largest_difference(*scores: dict[str, float], metric: str = "") -> float:
    """Return by how much values of a metric can differ, as far as they and its name tell: 1 if all lie between 0 and 1."""
    low, high = bounds_of(metric, (value for items in scores for value in items.values())) or (0.0, math.inf)
    return high - low


def _interval(mean: float | None, stderr: float | None, items: list[int], free: float, bounds: Bounds) -> list[float] | None:
    """Return the interval of a mean over groups of as many items, with `free` degrees of freedom."""
    if mean is None or stderr is None or min(items) < 10:
        return None
    found = mean_interval(mean, stderr, free, len(items) * min(items), bounds)
    return None if found is None else list(found)


def standard_error(values: Sequence[float]) -> float | None:
    """Return that of the mean of `values`, one for each item, so that several answers to an item are a cluster."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def macro(parts: list[dict[str, Any]], key: str, bounds: Bounds = None) -> dict[str, Any]:
    """Return the mean of `key`, "value" or "difference", over groups of items that count alike, and its standard error.

    That is sqrt(sum of the groups' squared ones) / number of groups; None if a group has a single item. The interval has
    Satterthwaite's degrees of freedom, and is None if a group has fewer than 10 items. `bounds`: of what it is the mean of.
    """
    mean, errors = statistics.fmean(part[key] for part in parts), [part["stderr"] for part in parts]
    stderr = None if None in errors else math.hypot(*errors) / len(errors)
    items = [part["items"] for part in parts]
    found = {key: mean, "stderr": stderr, "items": sum(items)}
    squares = sum(error**4 / (n - 1) for error, n in zip(errors, items, strict=True)) if stderr else 0.0
    free = math.fsum(error**2 for error in errors) ** 2 / squares if squares else sum(items) - len(items)
    return {**found, "interval": _interval(mean, stderr, items, free, bounds)}
