"""What an evaluation leaves: results.json, the items of each checkpoint and task, and a table."""

import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from .._util.files import write_text
from .._util.intervals import mean_interval
from ..errors import RecipeError
from .grading.reasoning import split_reasoning
from .options import Checkpoint, EvaluateArguments

RESULTS = "results.json"
MACRO = ":macro"  # of a metric's name: the mean over groups of items
COUNTED = {"empty": "empty answers", "unfinished": "unfinished reasoning"}  # columns of the table, where there are any
PACKAGES = ("bl_trainer", "lm_eval", "transformers", "peft", "datasets", "torch")


class Results:
    """The results in a folder, one entry for each checkpoint and task. Raises RecipeError if other ones are there."""

    def __init__(self, options: EvaluateArguments, checkpoints: list[Checkpoint]):
        self.options, self.folder = options, Path(options.output or ".")
        self.prints = {checkpoint.name: checkpoint.fingerprint() for checkpoint in checkpoints}
        self.replaced = [entry for entry in self._read()[0] if self._is_to_go(entry)]
        self.own: list[dict[str, Any]] = []  # those of this evaluation
        self.earlier: list[tuple[str, ...]] = []  # differences that other evaluations have computed
        self._merge()
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise RecipeError(f"`--output {self.folder}` can't be written: {error.strerror}. Write another folder.") from error

    def _is_to_go(self, entry: dict[str, Any]) -> bool:
        """Whether `--overwrite` is given, and is about this entry."""
        asked = entry["checkpoint"] in self.prints and entry["task"] in self.options.tasks
        return self.options.overwrite and (asked or self._fault(entry) is not None)

    def _merge(self) -> None:
        """Take what results.json holds by now, with this evaluation's entries in place of those that they replace.

        Raises RecipeError if it holds other results than those that are asked for.
        """
        found, self.earlier = self._read()
        gone = {_json(entry) for entry in (*self.replaced, *self.own)}
        others = [entry for entry in found if _json(entry) not in gone]
        for fault in filter(None, map(self._fault, [] if self.options.overwrite else others)):
            raise self._refusal(fault)
        keys = [_key(entry) for entry in self.own]
        self.entries = [entry for entry in others if _key(entry) not in keys] + self.own

    def _read(self) -> tuple[list[dict[str, Any]], list[tuple[str, ...]]]:
        """Return the entries of results.json, and which differences it holds: of which checkpoints, in which task."""
        path = self.folder / RESULTS
        if not path.exists():
            return [], []
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for entry in found["evaluations"]:
                self._fault(entry)
            pairs = [(each["checkpoint"], each["baseline"], each["task"]) for each in found.get("differences", [])]
            return found["evaluations"], list(dict.fromkeys(pairs))
        except RecipeError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if self.options.overwrite:
                return [], []
            raise self._refusal("a results.json of something else") from error

    def _refusal(self, what: str) -> RecipeError:
        return RecipeError(f"`--output {self.folder}` holds {what}. Write another folder, or add `--overwrite`.")

    def _fault(self, entry: dict[str, Any]) -> str | None:
        """Why results can't stand beside those that are asked for, None if they can."""
        task, checkpoint = entry["task"], entry["checkpoint"]
        now = self.options.deciding(task) if task in self.options.tasks else {}
        defaults = {key: each.default for key, each in EvaluateArguments.__dataclass_fields__.items()}
        for key, value in now.items():
            then = entry["options"].get(key, defaults.get(key))
            is_same = sorted(then.values()) == sorted(value.values()) if key == "files" else then == value  # under any path
            if not is_same:
                return f"results of {task} with other options (`{key}`: {then}, now {value})"
        if self.prints.get(checkpoint, entry["fingerprint"]) != entry["fingerprint"]:
            return f"results of another model that was at {checkpoint}"
        items = [score["samples"] for score in entry["scores"] if score["samples"]]
        lost = next((path for path in items if not (self.folder / path).is_file()), None)
        return f"results of {task} whose items, {lost}, are gone" if lost else None

    def has(self, checkpoint: Checkpoint, task: str) -> bool:
        """Whether a task of a checkpoint is done."""
        return any((entry["checkpoint"], entry["task"]) == (checkpoint.name, task) for entry in self.entries)

    def add(self, checkpoint: Checkpoint, task: str, found: dict[str, Any], chat: bool) -> None:
        """Write what the harness found: of each of its tasks that has items (a group has several), and of groups."""
        scores: list[dict[str, Any]] = []
        files: dict[str, str] = {}
        for name, samples in found["samples"].items():
            path = f"samples/{checkpoint.label}/{name.replace('/', '__')}.jsonl"
            rows = item_rows(samples, (found["configs"][name].get("metadata") or {}).get("by"))
            files[path] = "".join(_json(row) for row in rows)
            scores += _scores(found["results"][name], name, len(rows), path, rows, found["higher_is_better"].get(name, {}))
        for name in found.get("groups", {}):
            scores += _scores(found["results"][name], name, None, None)
        entry = {
            "checkpoint": checkpoint.name,
            "model": checkpoint.model,
            "adapter": checkpoint.adapter,
            "fingerprint": self.prints[checkpoint.name],
            "task": task,
            "scores": scores,
            "chat_template": chat,
            "options": self.options.deciding(task),
            "batch_size": self.options.batch_size,
            "generation": {name: config.get("generation_kwargs") for name, config in found["configs"].items()},
            "num_fewshot": found["n-shot"],
            "task_versions": found["versions"],
            "versions": {name: version(name) for name in PACKAGES},
        }
        self.own.append(json.loads(_json(entry)))
        self.write(files)

    def write(self, files: dict[str, str] | None = None) -> None:
        """Write results.json and `files`, by their path; other evaluations may write to the same folder."""
        with _locked(self.folder):
            self._merge()
            for path, text in (files or {}).items():
                _write(self.folder / path, text)
            _write(self.folder / RESULTS, _json(self.content(), indent=1))

    def content(self) -> dict[str, Any]:
        """What results.json holds."""
        return {"evaluations": self.entries, "differences": self.differences() + self._other_differences()}

    def of(self, task: str) -> list[dict[str, Any]]:
        """The entries of a task, in the command line's order of checkpoints."""
        found = {entry["checkpoint"]: entry for entry in self.entries if entry["task"] == task}
        return [found[name] for name in self.prints if name in found]

    def differences(self) -> list[dict[str, Any]]:
        """Return how each checkpoint differs from the first one of the command line, on the same items, for each metric."""
        return [each for new, old in self._pairs() for each in self._difference(new, old)]

    def _pairs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(entry, entries[0]) for entries in map(self.of, self.options.tasks) for entry in entries[1:]]

    def _other_differences(self) -> list[dict[str, Any]]:
        """Return the differences that other evaluations have computed, as the entries are now."""
        own = [(_key(new), _key(old)) for new, old in self._pairs()]
        others = {
            (_key(new), _key(old)): (new, old)
            for checkpoint, baseline, task in self.earlier
            for new in self.entries
            for old in self.entries
            if (new["checkpoint"], old["checkpoint"]) == (checkpoint, baseline) and new["task"] == old["task"]
            if any(score["task"] == task for score in new["scores"])
        }
        return [each for pair, entries in others.items() if pair not in own for each in self._difference(*entries)]

    def _difference(self, new_entry: dict[str, Any], old_entry: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        pair = {"checkpoint": new_entry["checkpoint"], "baseline": old_entry["checkpoint"]}
        parts: dict[str, list[dict[str, Any]]] = {}
        most: dict[str, float] = {}
        for old in old_entry["scores"]:
            for new in new_entry["scores"]:
                key = {name: old[name] for name in ("task", "metric")}
                if key.items() <= new.items() and old["is_mean"] and new["is_mean"]:
                    items = [read_items(self.folder / each["samples"], old["metric"]) for each in (new, old)]
                    found.append({**pair, **key, **paired_difference(*items)})
                    whole = old["metric"].partition(":")[0] + MACRO
                    parts.setdefault(whole, []).append(found[-1])
                    most[whole] = max(most.get(whole, 0.0), largest_difference(*items))
                elif key.items() <= new.items() and old["metric"].endswith(MACRO):
                    found.append({**pair, **key, **macro(parts[old["metric"]][1:], "difference", most[old["metric"]])})
        return found


def _key(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["checkpoint"], entry["task"]


def item_rows(samples: list[dict[str, Any]], by: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each item; the harness has one for each item and filter.

    With `by`, a column of the data, each metric stands there again by the name METRIC:VALUE OF THAT COLUMN.
    """
    rows: dict[int, dict[str, Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        first = sample["filtered_resps"][0]
        is_choice = isinstance(first, (list, tuple)) and isinstance(first[0], float)
        if is_choice:  # log-likelihoods of continuations
            best = max(range(len(sample["filtered_resps"])), key=lambda i: sample["filtered_resps"][i][0])
            answer = sample["arguments"][best][-1]
        else:
            answers = sample["resps"][0]
            answer = answers[0] if len(answers) == 1 else answers
        row = {"id": sample["doc_id"], "hash": sample["doc_hash"], "prompt": sample["arguments"][0][0]}
        row |= {"gold": sample["target"], "answer": answer, "metrics": {}}
        row = rows.setdefault(sample["doc_id"], row)
        if sample["filter"] != "none" and not is_choice:
            row.setdefault("extracted", {})[sample["filter"]] = first
        for metric in sample["metrics"]:
            name, value = _name(metric, sample["filter"]), sample[metric]
            if isinstance(value, list):
                row.setdefault("graded", {})[name] = value
                value = statistics.fmean(value)
            row["metrics"][name] = value
            if by and sample["doc"].get(by):
                row["metrics"][f"{name}:{sample['doc'][by]}"] = value
    return list(rows.values())


def read_items(path: Path, metric: str) -> dict[str, float]:
    """Return the value of a metric for each item in a file of items that has it."""
    with path.open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if metric in row["metrics"]]
    return {f"{row['id']} {row['hash']}": row["metrics"][metric] for row in rows}


def paired_difference(new: dict[str, float], old: dict[str, float]) -> dict[str, Any]:
    """Return the mean of new - old over the items in both, its standard error, and its 95 % interval.

    The interval is None below 10 items, where it would be a guess, and where items that all differ alike could differ by
    anything.
    """
    values = [new[item] - old[item] for item in old.keys() & new.keys()]
    mean, stderr, most = statistics.fmean(values) if values else None, standard_error(values), largest_difference(new, old)
    found = {"difference": mean, "stderr": stderr, "items": len(values)}
    return {**found, "interval": _interval(mean, stderr, [len(values)], most)}


def largest_difference(*scores: dict[str, float]) -> float:
    """Return by how much values of a metric can differ, as far as they tell: 1 if all lie between 0 and 1."""
    return 1.0 if all(0 <= value <= 1 for items in scores for value in items.values()) else math.inf


def _interval(mean: float | None, stderr: float | None, items: list[int], most: float) -> list[float] | None:
    """Return the interval of a mean over groups of as many items."""
    groups = len(items)
    if mean is None or stderr is None or sum(items) < 10 * groups:
        return None
    found = mean_interval(mean, stderr, sum(items) - groups, groups * min(items), (-most, most))
    return None if found is None else list(found)


def standard_error(values: Sequence[float]) -> float | None:
    """Return that of the mean of `values`, one for each item, so that several answers to an item are a cluster."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def macro(parts: list[dict[str, Any]], key: str, most: float = math.inf) -> dict[str, Any]:
    """Return the mean of `key`, "value" or "difference", over groups of items that count alike, and its standard error.

    That is sqrt(sum of the groups' squared ones) / number of groups; None if a group has a single item. `most`: the largest
    difference there can be.
    """
    mean, errors = statistics.fmean(part[key] for part in parts), [part["stderr"] for part in parts]
    stderr = None if None in errors else math.hypot(*errors) / len(errors)
    items = [part["items"] for part in parts]
    found = {key: mean, "stderr": stderr, "items": sum(items)}
    return found if key == "value" else {**found, "interval": _interval(mean, stderr, items, most)}


def table(results: Results) -> str:
    """Return the scores, and the differences from the first checkpoint, as lines of text."""
    entries = [entry for task in results.options.tasks for entry in results.of(task)]
    scores = [{**score, "checkpoint": entry["checkpoint"]} for entry in entries for score in entry["scores"]]
    scores.sort(key=lambda score: (score["task"], score["metric"]))  # checkpoints stay in their order
    counted = {key: name for key, name in COUNTED.items() if any(score.get(key) for score in scores)}
    rows: list[tuple[str, ...]] = [("task", "metric", "checkpoint", "value ± standard error", "items", *counted.values())]
    for s in scores:
        counts = [_share(s, key) for key in counted]
        rows.append((*_names(s), _figure(s["value"], s["stderr"]), str(s["items"] or ""), *counts))
    lines, differences = _columns(rows), results.differences()
    if differences:
        wide = [("task", "metric", "checkpoint", "difference", "95 % interval", "items")]
        wide += [(*_names(d), _figure(d["difference"], d["stderr"], "+"), _range(d), str(d["items"])) for d in differences]
        lines += ["", f"Difference from {next(iter(results.prints))} on the same items:", *_columns(wide)]
    return "\n".join(lines)


def _names(row: dict[str, Any]) -> tuple[str, str, str]:
    answers = row.get("answers", 1)
    return row["task"], row["metric"] + (f", Avg@{answers}" if answers > 1 else ""), row["checkpoint"]


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


def _range(difference: dict[str, Any]) -> str:
    low, high = difference["interval"] or (None, None)
    return "not enough to tell" if low is None else f"{low:+.4f} to {high:+.4f}"


def _name(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric},{kind}"


def _scores(
    found: dict[str, Any], task: str, items: int | None, path: str | None, rows: Any = (), higher: Any = ()
) -> list[dict[str, Any]]:
    scores = []
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            name, stderr = _name(metric, kind), found.get(f"{metric}_stderr,{kind}")
            stderr = stderr if isinstance(stderr, float) else None  # "N/A"
            values = [row["metrics"].get(name) for row in rows]
            is_mean = all(isinstance(v, (int, float)) for v in values) and bool(values)
            is_mean = is_mean and math.isclose(statistics.fmean(values), value, abs_tol=1e-9)
            score = {"task": task, "metric": name, "value": value, "stderr": standard_error(values) if is_mean else stderr}
            shared = {"higher_is_better": dict(higher).get(metric), "samples": path}
            scores.append({**score, **_counts(rows, items), "is_mean": is_mean, **shared})
            groups = sorted({other for row in rows for other in row["metrics"] if other.startswith(f"{name}:")})
            parts = []
            for group in groups:
                part = [row for row in rows if group in row["metrics"]]
                values = [row["metrics"][group] for row in part]
                score = {"task": task, "metric": group, "value": statistics.fmean(values), "stderr": standard_error(values)}
                parts.append({**score, **_counts(part, len(part)), "is_mean": True, **shared})
            scores += parts
            if parts:
                score = {"task": task, "metric": name + MACRO, **_counts(rows, items), **macro(parts, "value")}
                scores.append({**score, "is_mean": False, **shared})
    return scores


def _counts(rows: Any, items: int | None) -> dict[str, Any]:
    """Count items, answers to each, and the answers that are empty or whose reasoning is unfinished."""
    given = [row["answer"] if isinstance(row["answer"], list) else [row["answer"]] for row in rows]
    said = [split_reasoning(answer, row["prompt"]) for row, answers in zip(rows, given, strict=True) for answer in answers]
    empty = sum(is_finished and not text.strip() for text, is_finished in said) if rows else None
    unfinished = sum(not is_finished for _, is_finished in said) if rows else None
    return {"items": items, "answers": len(given[0]) if rows else 1, "empty": empty, "unfinished": unfinished}


def _json(value: Any, **kwargs: Any) -> str:
    def plain(each: Any) -> Any:
        return each.item() if hasattr(each, "item") else str(each)

    return json.dumps(value, ensure_ascii=False, default=plain, **kwargs) + "\n"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other evaluation write to a folder of results meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{RESULTS}.lock")
        lock.acquire()
    except OSError as error:
        raise RecipeError(f"Cannot write to {folder}: {error.strerror}. Choose another folder.") from error
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise RecipeError(f"Can't write {path}: {error.strerror}.") from error
