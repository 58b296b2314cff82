"""The items of a task: a row for each, with its answer and metrics."""

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .exploration import diversity, pass_at, pass_name
from .grading.reasoning import split_reasoning


def item_rows(
    samples: list[dict[str, Any]], by: str | None = None, ks: Sequence[int] = (), higher: Mapping[str, Any] = {}
) -> list[dict[str, Any]]:
    """Return a row for each item; the harness has one for each item and filter.

    With `by`, a column of the data, each metric stands there again by the name METRIC:VALUE OF THAT COLUMN. `ks`: the k of
    pass@k, which metrics get whose values are all 0 or 1, unless lower is better. `higher`: metric -> whether higher is better,
    as far as the task says it.
    """
    rows: dict[int, dict[str, Any]] = {}
    able = {metric for metric in _metrics(samples) if ks and higher.get(metric) is not False}
    judged = {metric for metric in able if all(_is_judged(sample.get(metric)) for sample in samples)}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        first = sample["filtered_resps"][0]
        is_choice = isinstance(first, (list, tuple)) and isinstance(first[0], float)  # log-likelihoods of continuations
        row = {"id": sample["doc_id"], "hash": sample["doc_hash"], "prompt": sample["arguments"][0][0]}
        row |= {"gold": sample["target"], "answer": _chosen(sample) if is_choice else _answered(sample), "metrics": {}}
        row = rows.setdefault(sample["doc_id"], row)
        if sample["filter"] != "none" and not is_choice:
            row.setdefault("extracted", {})[sample["filter"]] = first
        _add_metrics(row, sample, by, dict.fromkeys(judged, ks))
    return list(rows.values())


def _metrics(samples: list[dict[str, Any]]) -> set[str]:
    return {metric for sample in samples for metric in sample["metrics"]}


def _is_judged(value: Any) -> bool:
    """Whether a metric says of each answer to an item that it is right or wrong."""
    return all(isinstance(each, (int, float)) and each in (0, 1) for each in _values(value))


def _values(value: Any) -> list[Any]:
    """Return a metric's value of each answer to an item."""
    return value if isinstance(value, list) else [value]


def _chosen(sample: dict[str, Any]) -> str:
    """Return the most probable continuation."""
    best = max(range(len(sample["filtered_resps"])), key=lambda i: sample["filtered_resps"][i][0])
    return sample["arguments"][best][-1]


def _answered(sample: dict[str, Any]) -> Any:
    """Return the answer, or the list of several."""
    answers = sample["resps"][0]
    return answers[0] if len(answers) == 1 else answers


def _add_metrics(row: dict[str, Any], sample: dict[str, Any], by: str | None, ks: dict[str, Collection[int]]) -> None:
    found: dict[str, Any] = {}
    for metric in sample["metrics"]:
        name, value = metric_name(metric, sample["filter"]), sample[metric]
        if isinstance(value, list):
            row.setdefault("graded", {})[name] = value
        found[name] = statistics.fmean(value) if isinstance(value, list) else value
        values = _values(value)
        found |= {pass_name(name, k): pass_at(int(sum(values)), len(values), k) for k in ks.get(metric, ())}
    if isinstance(row["answer"], list):
        found |= diversity([split_reasoning(answer, row["prompt"])[0] for answer in row["answer"]])
    row["metrics"] |= found
    if by and sample["doc"].get(by):
        row["metrics"] |= {f"{name}:{sample['doc'][by]}": value for name, value in found.items()}


def metric_name(metric: str, kind: str) -> str:
    """Return a metric's name, with the harness's filter if it has one."""
    return metric if kind == "none" else f"{metric},{kind}"


def read_items(path: Path, metric: str) -> dict[str, float]:
    """Return the value of a metric for each item in a file of items that has it."""
    with path.open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if metric in row["metrics"]]
    return {f"{row['id']} {row['hash']}": row["metrics"][metric] for row in rows}
