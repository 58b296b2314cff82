"""What an evaluation leaves in its folder: results.json, and the items of each checkpoint and task."""

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from .._util.files import write_text
from ..errors import RecipeError
from .exploration import at_temperature, is_pass
from .items import item_rows, read_items
from .options import Checkpoint, EvaluateArguments
from .scores import MACRO, largest_difference, macro, paired_difference, scores_of
from .task_files import harness_name

logger = logging.getLogger(__name__)

RESULTS = "results.json"
PACKAGES = ("bl_trainer", "lm_eval", "transformers", "peft", "datasets", "torch")
MEASURING = ("bl_trainer", "lm_eval")  # those of which another version may score the same answers otherwise


@dataclass(frozen=True)
class Answered:
    """What the harness found by one way to answer; metrics are named after its `temperature`, if it has one."""

    temperature: float | None
    options: EvaluateArguments
    found: dict[str, Any]

    def rows_and_scores(self, name: str, path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the items and the scores of one of the harness's tasks; `path`: of the file of items."""
        found = self.found
        by = (found["configs"][name].get("metadata") or {}).get("by")
        higher = found["higher_is_better"].get(name, {})
        rows = item_rows(found["samples"][name], by, self.options.ks, higher)
        scores = scores_of(found["results"][name], name, len(rows), path, rows, higher)
        for row in rows:
            row["metrics"] = {at_temperature(key, self.temperature): value for key, value in row["metrics"].items()}
        return rows, [{**score, "metric": at_temperature(score["metric"], self.temperature)} for score in scores]

    @property
    def generation(self) -> dict[str, Any]:
        """How each task was answered."""
        configs = self.found["configs"].items()
        return {at_temperature(name, self.temperature): config.get("generation_kwargs") for name, config in configs}


class Results:
    """The results in a folder, one entry for each checkpoint and task. Raises RecipeError if other ones are there."""

    def __init__(self, options: EvaluateArguments, checkpoints: list[Checkpoint]):
        self.options, self.folder = options, Path(options.output or ".")
        self.prints = {checkpoint.name: checkpoint.fingerprint() for checkpoint in checkpoints}
        self.quantised = [note for note in map(_quantised, checkpoints) if note]
        self.names: dict[str, set[str]] = {}  # of each task's files of items
        found = self._read()[0]
        self.names = _known_names(options, found)
        _refuse_shared(self.names)
        self.replaced = [entry for entry in found if self._is_to_go(entry)]
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
        if self.options.overwrite:  # a task's names may be known only since it was run
            others = [entry for entry in others if self._shared(entry) is None]
        for fault in filter(None, map(self._fault, [] if self.options.overwrite else others)):
            raise _refusal(self.folder, fault)
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
            raise _refusal(self.folder, "a results.json of something else") from error

    def _fault(self, entry: dict[str, Any]) -> str | None:
        """Why results can't stand beside those that are asked for, None if they can."""
        task, checkpoint = entry["task"], entry["checkpoint"]
        other = _other_option(entry, self.options.deciding(task)) if task in self.options.tasks else None
        if other:
            return f"results of {task} with {other}"
        if self.prints.get(checkpoint, entry["fingerprint"]) != entry["fingerprint"]:
            return f"results of another model that was at {checkpoint}"
        items = [score["samples"] for score in entry["scores"] if score["samples"]]
        lost = next((path for path in items if not (self.folder / path).is_file()), None)
        return f"results of {task} whose items, {lost}, are gone" if lost else self._shared(entry)

    def _shared(self, entry: dict[str, Any]) -> str | None:
        """Why this evaluation would replace the items of another task's results, None if it would not, or by the same."""
        if entry["checkpoint"] not in self.prints:
            return None
        return next(filter(None, (_shared_items(entry, task, names, self.options) for task, names in self.names.items())), None)

    def has(self, checkpoint: Checkpoint, task: str) -> bool:
        """Whether a task of a checkpoint is done."""
        return any((entry["checkpoint"], entry["task"]) == (checkpoint.name, task) for entry in self.entries)

    def add(self, checkpoint: Checkpoint, task: str, answered: list[Answered], chat: bool) -> None:
        """Write what the harness found: of each of its tasks that has items (a group has several), and of groups."""
        scores: list[dict[str, Any]] = []
        files: dict[str, str] = {}
        for way in answered:
            self.names[task] |= {*map(_file_name, way.found["samples"])}
            _refuse_shared(self.names)
            for name in way.found["samples"]:
                path = f"samples/{checkpoint.label}/{at_temperature(_file_name(name), way.temperature)}.jsonl"
                rows, own = way.rows_and_scores(name, path)
                if way.options.pass_at and not any(is_pass(metric) for row in rows for metric in row["metrics"]):
                    logger.warning(
                        f"`--pass_at` has no effect on {name}: it has no metric that is 1 for right answers, else 0."
                    )
                files[path] = "".join(_json(row) for row in rows)
                scores += own
            for name in way.found.get("groups", {}):
                scores += scores_of(way.found["results"][name], name, None, None)
        self.own.append(json.loads(_json(self._entry(checkpoint, task, answered, scores, chat))))
        self.write(files)

    def _entry(self, checkpoint: Checkpoint, task: str, answered: list[Answered], scores: Any, chat: bool) -> dict[str, Any]:
        found = answered[0].found
        return {
            "checkpoint": checkpoint.name,
            "model": checkpoint.model,
            "adapter": checkpoint.adapter,
            "fingerprint": self.prints[checkpoint.name],
            "task": task,
            "scores": scores,
            "chat_template": chat,
            "options": self.options.deciding(task),
            "batch_size": self.options.batch_size,
            "generation": {key: kwargs for way in answered for key, kwargs in way.generation.items()},
            "num_fewshot": found["n-shot"],
            "task_versions": found["versions"],
            "versions": {name: version(name) for name in PACKAGES},
        }

    def write(self, files: dict[str, str] | None = None) -> None:
        """Write results.json and `files`, by their path; other evaluations may write to the same folder."""
        with _locked(self.folder):
            self._merge()
            for path, text in (files or {}).items():
                _write(self.folder / path, text)
            _write(self.folder / RESULTS, _json(self.content(), indent=1))

    def content(self) -> dict[str, Any]:
        """What results.json holds."""
        notes = self.notes()
        found = {"evaluations": self.entries, "differences": self.differences() + self._other_differences()}
        return {**found, "notes": notes} if notes else found

    def notes(self) -> list[str]:
        """Return what makes the checkpoints of this evaluation less comparable: quantised bases, packages of other versions."""
        found = [*self.quantised]
        for task in self.options.tasks:
            for package, versions in mixed_versions(entry.get("versions", {}) for entry in self.of(task)).items():
                found.append(
                    f"{task} was run with different versions of {package} ({', '.join(versions)}). Differences may come from "
                    "that. Add `--overwrite` to run it again."
                )
        return found

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
                    found.append({**pair, **key, **paired_difference(items[0], items[1], old["metric"])})
                    whole = old["metric"].partition(":")[0] + MACRO
                    parts.setdefault(whole, []).append(found[-1])
                    most[whole] = max(most.get(whole, 0.0), largest_difference(*items, metric=old["metric"]))
                elif key.items() <= new.items() and old["metric"].endswith(MACRO):
                    bounds = -most[old["metric"]], most[old["metric"]]
                    found.append({**pair, **key, **macro(parts[old["metric"]][1:], "difference", bounds)})
        return found


def _file_name(name: str) -> str:
    """Return how the file of items of one of the harness's tasks is called."""
    return name.replace("/", "__")


def _names(entries: Iterable[dict[str, Any]]) -> set[str]:
    """Return the names of the files of items of entries. A group has several."""
    return {_file_name(score["task"]) for entry in entries for score in entry["scores"] if score["samples"]}


def _known_names(options: EvaluateArguments, found: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Return the names of the files of items of each task, as far as they are known before the harness has loaded it.

    `found`: entries that the folder holds, which tell those of a group.
    """
    kept = [] if options.overwrite else found
    return {
        task: {_file_name(harness_name(task)), *_names(entry for entry in kept if entry["task"] == task)}
        for task in options.tasks
    }


def check_items(options: EvaluateArguments, tasks: Mapping[str, Iterable[str]]) -> None:
    """Raise RecipeError if tasks would write the items of each other, or of other results in the folder.

    `tasks`: the harness's tasks in each of those that the options name, which are known once the harness has loaded them.
    """
    path = Path(options.output or ".") / RESULTS
    found = [] if options.overwrite or not path.exists() else json.loads(path.read_text(encoding="utf-8"))["evaluations"]
    names = _known_names(options, found)
    for task, own in tasks.items():
        names[task] = {*names.get(task, ()), *map(_file_name, own)}
    _refuse_shared(names)
    checkpoints = [checkpoint.name for checkpoint in options.checkpoints()] if found else []
    for entry in found:
        for task, mine in names.items() if entry["checkpoint"] in checkpoints else ():
            if fault := _shared_items(entry, task, mine, options):
                raise _refusal(path.parent, fault)


def _refusal(folder: Path, what: str) -> RecipeError:
    return RecipeError(f"`--output {folder}` holds {what}. Write another folder, or add `--overwrite`.")


def _shared_items(entry: dict[str, Any], task: str, names: Iterable[str], options: EvaluateArguments) -> str | None:
    """Return what is wrong if `task` writes files of items, `names`, over those of another task with other options, or None."""
    shared = sorted({*names} & _names([entry]))
    if entry["task"] == task or not shared:
        return None
    other = _other_option(entry, options.deciding(task))
    return f"results of {entry['task']} on the items of {shared[0]}, as {task} has them, with {other}" if other else None


def _refuse_shared(names: Mapping[str, Iterable[str]]) -> None:
    """Raise RecipeError if two of the tasks that are asked for would write the same items; `names`: of the files of each."""
    owners: dict[str, str] = {}
    for task, own in names.items():
        for name in sorted(own):
            if owners.setdefault(name, task) != task:
                raise RecipeError(
                    f"`--tasks {owners[name]},{task}`: both would write the items of the task {name!r}. Evaluate each by a "
                    "command of its own, with another `--output`, or rename the task in its file."
                )


def _other_option(entry: dict[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return which option an entry has otherwise than `now`, None if it has none."""
    defaults = {key: each.default for key, each in EvaluateArguments.__dataclass_fields__.items()}
    for key, value in now.items():
        then = entry["options"].get(key, defaults.get(key))
        is_same = sorted(then.values()) == sorted(value.values()) if key == "files" else then == value  # under any path
        if not is_same:
            return f"other options (`{key}`: {then}, now {value})"
    return None


def _quantised(checkpoint: Checkpoint) -> str | None:
    """Return what to note of a checkpoint with quantised weights, None of others."""
    quantization = checkpoint.quantization
    if not quantization:
        return None
    bits = 4 if quantization.get("load_in_4bit") else 8
    if quantization is checkpoint.asked:
        return f"{checkpoint.name} is evaluated in {bits} bits, as `--quantization` asks."
    return f"{checkpoint.name} is evaluated over its base in {bits} bits, as it was trained."


def _key(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["checkpoint"], entry["task"]


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


def mixed_versions(used: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the versions of each package of `MEASURING` with more than one version; there may be none."""
    used = list(used)
    found = {name: sorted({each[name] for each in used if name in each}) for name in MEASURING}
    return {name: versions for name, versions in found.items() if len(versions) > 1}
