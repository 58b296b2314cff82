"""The items of a task: a row for each, with its answer and metrics."""

import json
import statistics
from pathlib import Path
from typing import Any


def item_rows(samples: list[dict[str, Any]], by: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each item; the harness has one for each item and filter.

    With `by`, a column of the data, each metric stands there again by the name METRIC:VALUE OF THAT COLUMN.
    """
    rows: dict[int, dict[str, Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        first = sample["filtered_resps"][0]
        is_choice = isinstance(first, (list, tuple)) and isinstance(first[0], float)  # log-likelihoods of continuations
        row = {"id": sample["doc_id"], "hash": sample["doc_hash"], "prompt": sample["arguments"][0][0]}
        row |= {"gold": sample["target"], "answer": _chosen(sample) if is_choice else _answered(sample), "metrics": {}}
        row = rows.setdefault(sample["doc_id"], row)
        if sample["filter"] != "none" and not is_choice:
            row.setdefault("extracted", {})[sample["filter"]] = first
        _add_metrics(row, sample, by)
    return list(rows.values())


def _chosen(sample: dict[str, Any]) -> str:
    """Return the most probable continuation."""
    best = max(range(len(sample["filtered_resps"])), key=lambda i: sample["filtered_resps"][i][0])
    return sample["arguments"][best][-1]


def _answered(sample: dict[str, Any]) -> Any:
    """Return the answer, or the list of several."""
    answers = sample["resps"][0]
    return answers[0] if len(answers) == 1 else answers


def _add_metrics(row: dict[str, Any], sample: dict[str, Any], by: str | None) -> None:
    for metric in sample["metrics"]:
        name, value = metric_name(metric, sample["filter"]), sample[metric]
        if isinstance(value, list):
            row.setdefault("graded", {})[name] = value
            value = statistics.fmean(value)
        row["metrics"][name] = value
        if by and sample["doc"].get(by):
            row["metrics"][f"{name}:{sample['doc'][by]}"] = value


def metric_name(metric: str, kind: str) -> str:
    """Return a metric's name, with the harness's filter if it has one."""
    return metric if kind == "none" else f"{metric},{kind}"


def read_items(path: Path, metric: str) -> dict[str, float]:
    """Return the value of a metric for each item in a file of items that has it."""
    with path.open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if metric in row["metrics"]]
    return {f"{row['id']} {row['hash']}": row["metrics"][metric] for row in rows}
