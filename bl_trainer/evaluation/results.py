"""What an evaluation leaves: results.json, the items of each checkpoint and task, and a table."""

import json
import math
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..parser import RecipeError
from ..statistics import t_quantile
from .options import Checkpoint, EvaluateArguments

RESULTS = "results.json"
PACKAGES = ("bl_trainer", "lm_eval", "transformers", "peft", "datasets", "torch")


class Results:
    """The results in a folder, one entry for each checkpoint and task. Raises RecipeError if other ones are there."""

    def __init__(self, options: EvaluateArguments, checkpoints: list[Checkpoint]):
        self.options, self.folder = options, Path(options.output or ".")
        self.prints = {checkpoint.name: checkpoint.fingerprint() for checkpoint in checkpoints}
        self.entries = [] if options.overwrite else self._read()
        for entry in self.entries:
            self._refuse_other(entry)

    def _read(self) -> list[dict[str, Any]]:
        path = self.folder / RESULTS
        if not path.exists():
            return []
        try:
            return json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refusal("a results.json of something else") from error

    def _refusal(self, what: str) -> RecipeError:
        return RecipeError(f"`--output {self.folder}` holds {what}. Write another folder, or add `--overwrite`.")

    def _refuse_other(self, entry: dict[str, Any]) -> None:
        asked = entry["asked"]
        if asked in self.options.tasks:
            for key, value in self.options.deciding(asked).items():
                if entry["options"].get(key) != value:
                    then, now = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (entry["options"].get(key), value))
                    raise self._refusal(f"results of {asked} with other options (`{key}`: {then}, now {now})")
        if self.prints.get(entry["checkpoint"], entry["fingerprint"]) != entry["fingerprint"]:
            raise self._refusal(f"results of another model that was at {entry['checkpoint']}")

    def has(self, checkpoint: Checkpoint, asked: str) -> bool:
        """Whether a task of a checkpoint is done."""
        return any(entry["checkpoint"] == checkpoint.name and entry["asked"] == asked for entry in self.entries)

    def add(self, checkpoint: Checkpoint, asked: str, found: dict[str, Any], chat: bool) -> dict[str, Any]:
        """Write what the harness found; return the new entry."""
        scores = []
        for task, samples in found["samples"].items():
            path = Path("samples") / checkpoint.label / f"{task.replace('/', '__')}.jsonl"
            rows = item_rows(samples)
            _write(self.folder / path, "".join(json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in rows))
            scores += _scores(found, task, len(rows), str(path))
        for group in found.get("groups", {}):
            scores += _scores(found, group, found["results"][group].get("sample_count"), None)
        entry = {
            "checkpoint": checkpoint.name,
            "model": checkpoint.model,
            "adapter": checkpoint.adapter,
            "fingerprint": self.prints[checkpoint.name],
            "asked": asked,
            "scores": scores,
            "chat_template": chat,
            "options": self.options.deciding(asked),
            "batch_size": self.options.batch_size,
            "generation": {name: config.get("generation_kwargs") for name, config in found["configs"].items()},
            "num_fewshot": found["n-shot"],
            "task_versions": found["versions"],
            "versions": {name: version(name) for name in PACKAGES},
        }
        self.entries.append(entry)
        self.write()
        return entry

    def write(self) -> None:
        """Write results.json."""
        content = {"evaluations": self.entries, "differences": self.differences()}
        _write(self.folder / RESULTS, json.dumps(content, indent=1, ensure_ascii=False, default=_plain) + "\n")

    def differences(self) -> list[dict[str, Any]]:
        """Return each checkpoint's paired difference from the first one of the command line, for each metric."""
        return [
            {"checkpoint": entry["checkpoint"], "baseline": first["checkpoint"], "task": score["task"], **difference}
            for asked in self.options.tasks
            for first, *others in [self.of(asked)] if others
            for entry in others
            for score in first["scores"]
            if (difference := self._difference(score, entry, first))
        ]

    def of(self, asked: str) -> list[dict[str, Any]]:
        """The entries of a task, as the command line has the checkpoints."""
        found = {entry["checkpoint"]: entry for entry in self.entries if entry["asked"] == asked}
        return [found[name] for name in self.prints if name in found] or [{}]

    def _difference(self, score: dict[str, Any], entry: dict[str, Any], first: dict[str, Any]) -> dict[str, Any] | None:
        theirs = [s for s in entry["scores"] if (s["task"], s["metric"]) == (score["task"], score["metric"])]
        if not theirs or not score["samples"]:
            return None
        old, new = (read_items(self.folder / s["samples"], score["metric"]) for s in (score, theirs[0]))
        if not old or not math.isclose(statistics.fmean(old.values()), score["value"], abs_tol=1e-9):
            return None  # the metric isn't a mean over items
        return {"metric": score["metric"], **paired_difference(new, old)}


def item_rows(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each item; the harness has one for each item and filter."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        first = sample["filtered_resps"][0]
        is_choice = isinstance(first, (list, tuple)) and isinstance(first[0], float)
        if is_choice:  # log-likelihoods of continuations
            best = max(range(len(sample["filtered_resps"])), key=lambda i: sample["filtered_resps"][i][0])
            answer = sample["arguments"][best][-1]
        else:
            answer = sample["resps"][0][0]
        row = rows.setdefault(
            sample["doc_id"],
            {
                "id": sample["doc_id"],
                "hash": sample["doc_hash"],
                "prompt": sample["arguments"][0][0],
                "gold": sample["target"],
                "answer": answer,
                "metrics": {},
            },
        )
        if sample["filter"] != "none" and not is_choice:
            row.setdefault("extracted", {})[sample["filter"]] = first
        row["metrics"].update({_name(metric, sample["filter"]): sample[metric] for metric in sample["metrics"]})
    return list(rows.values())


def read_items(path: Path, metric: str) -> dict[str, float]:
    """Return the values of a metric, one for each item, from a file of items; none if they aren't numbers."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    values = {f"{row['id']} {row['hash']}": row["metrics"].get(metric) for row in rows}
    return values if all(isinstance(value, (int, float)) for value in values.values()) else {}


def paired_difference(new: dict[str, float], old: dict[str, float]) -> dict[str, Any]:
    """Return the mean of new - old over the items in both, its standard error, and its 95 % interval.

    The interval is None below 10 items, where it would be a guess.
    """
    values = [new[item] - old[item] for item in old.keys() & new.keys()]
    mean = statistics.fmean(values) if values else None
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    interval = None
    if mean is not None and stderr is not None and len(values) >= 10:
        reach = t_quantile(len(values) - 1) * stderr
        interval = [mean - reach, mean + reach]
    return {"difference": mean, "stderr": stderr, "interval": interval, "items": len(values)}


def table(results: Results) -> str:
    """Return the scores, and the differences from the first checkpoint, as lines of text."""
    scores = [
        (score["task"], score["metric"], entry["checkpoint"], _figure(score["value"], score["stderr"]), str(score["items"] or ""))
        for asked in results.options.tasks
        for entry in results.of(asked)
        for score in entry.get("scores", [])
    ]
    differences = [
        (d["task"], d["metric"], d["checkpoint"], _figure(d["difference"], d["stderr"], "+"), str(d["items"]), _range(d["interval"]))
        for d in results.differences()
    ]
    scores.sort(key=lambda row: row[:2])  # stable: checkpoints stay in their order
    lines = _columns([("task", "metric", "checkpoint", "value ± standard error", "items"), *scores])
    if differences:
        lines += ["", f"Differences from {next(iter(results.prints))} on the same items:"]
        lines += _columns([("task", "metric", "checkpoint", "difference", "items", "95 % interval"), *differences])
    return "\n".join(lines)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _figure(value: Any, stderr: Any, sign: str = "") -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:{sign}.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def _range(interval: list[float] | None) -> str:
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "too few items"


def _name(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric},{kind}"


def _scores(found: dict[str, Any], task: str, items: int | None, path: str | None) -> list[dict[str, Any]]:
    scores = []
    for key, value in found["results"][task].items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = found["results"][task].get(f"{metric}_stderr,{kind}")
            stderr = stderr if isinstance(stderr, float) else None  # "N/A"
            scores.append(
                {"task": task, "metric": _name(metric, kind), "value": value, "stderr": stderr, "items": items, "samples": path}
            )
    return scores


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise RecipeError(f"Can't write {path}: {error.strerror}.") from error
