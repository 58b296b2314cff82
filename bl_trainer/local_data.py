"""Data sets from local files, and the line of a file that is at fault when one can't be read or trained on."""

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from trl import ScriptArguments

OPTIONAL = ("objective_weight", "ref_logprobs")  # columns that the splits of a data set may have each for itself
BOM = codecs.BOM_UTF8  # the libraries read over it
LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def load_dataset(script: ScriptArguments) -> Any:
    """Load `dataset_name`, a local file or folder or a Hub id; a mapping of splits."""
    path = Path(script.dataset_name or "")
    shifted = (file for file in local_files(script.dataset_name) if file.suffix == ".csv" and _is_shifted(file))
    if fault := find_fault(shifted):
        raise ValueError(fault)
    if path.is_file():
        if path.suffix not in LOCAL_FORMATS:
            raise ValueError(f"{path.suffix!r} is none of {', '.join(LOCAL_FORMATS)}")
        return datasets.load_dataset(
            LOCAL_FORMATS[path.suffix],
            data_files={script.dataset_train_split: str(path)},
            streaming=script.dataset_streaming,
        )
    if is_path(script.dataset_name or "") and not path.exists():
        raise FileNotFoundError("there is no such file or folder")
    name = f"./{path}" if path.is_dir() and not path.is_absolute() else script.dataset_name  # `text` is a format's name too
    try:
        splits = datasets.load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)
    except datasets.exceptions.DatasetGenerationError as error:
        if not isinstance(error.__cause__, datasets.table.CastError):  # the first split lacks a column that another has
            raise
        splits = _split_by_split(str(name))
        names = [{*dataset.column_names} - {*OPTIONAL} for dataset in splits.values()]
        if any(each != names[0] for each in names):
            raise
    return _without_filled(splits)


def _split_by_split(name: str) -> datasets.DatasetDict:
    """Load each split of a folder or a Hub id for itself, with columns of its own."""
    files = datasets.load_dataset_builder(name).config.data_files or {}
    return datasets.DatasetDict(
        {split: datasets.load_dataset(name, data_files={split: list(found)}, split=split) for split, found in files.items()}
    )


def _without_filled(splits: Any) -> Any:
    """Return splits without the columns for the trainer that some lack, which loading gives to all, filled with None."""
    for split, dataset in splits.items() if isinstance(splits, datasets.DatasetDict) else ():
        filled = [
            column
            for column in {*OPTIONAL} & {*dataset.column_names}
            if len(dataset) and dataset.data.column(column).null_count == len(dataset)
        ]
        splits[split] = dataset.remove_columns(filled)
    return splits


def is_path(name: str) -> bool:
    """Whether `name` can only be a local path, not a Hub id `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in LOCAL_FORMATS


def local_files(source: Any) -> Iterator[Path]:
    """Yield the existing files that `source` names: a file, a folder, a pattern, or a list or mapping of these."""
    if isinstance(source, dict):
        source = list(source.values())
    if isinstance(source, (list, tuple)):
        for part in source:
            yield from local_files(part)
    elif source and Path(source).is_dir():
        yield from sorted(path for path in Path(source).rglob("*") if path.suffix in LOCAL_FORMATS)
    elif source:
        yield from sorted(path for path in map(Path, glob(str(source), recursive=True)) if path.is_file())


def find_fault(files: Iterable[Path], formats: Iterable[tuple[str, ...]] = ()) -> str | None:
    """Return which line of which of `files` is at fault, and why; None if they can all be read.

    A line must be UTF-8, and one of JSON hold an object. The first of `formats` whose columns a file's first row has must be
    that of all its rows, each of these columns with a text or messages.
    """
    formats = list(formats)
    for path in files:
        if path.suffix == ".parquet":
            if not _is_parquet(path):
                return f"{path}: it is no complete Parquet file"
        else:
            found = _fault_in_whole(path) if _is_one_value(path) else _fault_in_lines(path, formats)
            found = found or (_fault_in_csv(path, formats) if path.suffix == ".csv" else None)
            if found:
                return f"{path}, {found}"
    return None


def _is_parquet(path: Path) -> bool:
    try:
        pq.read_metadata(path)
    except pa.ArrowInvalid:
        return False
    return True


def is_empty(file: Path) -> bool:
    """Whether a file that has no fault holds no rows."""
    if file.suffix == ".parquet":
        return not pq.read_metadata(file).num_rows
    lines = (line.removeprefix(BOM).strip() for line in file.read_bytes().split(b"\n"))
    written = list(islice(filter(None, lines), 2))
    return len(written) < 2 if file.suffix == ".csv" else written in ([], [b"[]"], [b"{}"])


def _is_one_value(path: Path) -> bool:
    """Whether a file is one value of JSON, not one in each line: an array, or an object over several lines."""
    with path.open("rb") as file:
        if LOCAL_FORMATS.get(path.suffix) != "json" or file.read(1024).removeprefix(BOM).lstrip().startswith(b"["):
            return LOCAL_FORMATS.get(path.suffix) == "json"
        file.seek(0)
        return path.suffix == ".json" and file.readline().removeprefix(BOM).strip() == b"{"


def _fault_in_whole(path: Path) -> str | None:
    content = path.read_bytes().removeprefix(BOM)
    try:
        json.loads(content)
    except json.JSONDecodeError as error:
        return f"line {error.lineno}: {error.msg}"
    except RecursionError:
        return "line 1: its values are nested too deeply"
    except UnicodeDecodeError as error:
        return f"line {content[: error.start].count(10) + 1}: {_not_utf8(error)}"
    return None


def _fault_in_lines(path: Path, formats: list[tuple[str, ...]]) -> str | None:
    columns: tuple[str, ...] | None = None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.removeprefix(BOM if number == 1 else b"").decode().rstrip("\r\n")
                if LOCAL_FORMATS.get(path.suffix) != "json" or not text.strip():
                    continue
                row = json.loads(text)
            except RecursionError:
                return f"line {number}: its values are nested too deeply"
            except UnicodeDecodeError as error:
                return f"line {number}: {_not_utf8(error)}"
            except json.JSONDecodeError as error:
                return f"line {number}: {error.msg.removesuffix(' at')} at column {error.colno}"
            if not isinstance(row, dict):
                return f"line {number}: it holds {_short(row)}, not an object"
            if columns is None:
                columns = next((each for each in formats if set(each) <= row.keys()), ())
            for column in columns:
                fault = _fault_in_column(row, column)
                if fault:
                    return f"line {number}: {fault}"
    return None


def _is_shifted(path: Path) -> bool:
    """Whether the first row has more values than the header, so that pandas moves them to the wrong columns in silence."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        return None in next(_csv_rows(lines), {})


def _csv_rows(lines: Any) -> Any:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the default
    return csv.DictReader(lines)


def _fault_in_csv(path: Path, formats: list[tuple[str, ...]]) -> str | None:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = _csv_rows(lines)
        columns: tuple[str, ...] = next((each for each in formats if set(each) <= set(rows.fieldnames or ())), ())
        for row in rows:
            if None in row:
                given = len(row) - 1 + len(row[None])
                return f"line {rows.line_num}: it has {given} values, the header {len(row) - 1}. Quote values with commas"
            for column in columns:
                if not row[column]:
                    return f"line {rows.line_num}: {column!r} is empty"
    return None


def _fault_in_column(row: dict[str, Any], column: str) -> str | None:
    if column not in row:
        return f"it has no {column!r}"
    value = row[column]
    is_text = isinstance(value, str) and column != "messages"
    if is_text or (value and isinstance(value, list) and all(map(_is_message, value))):
        return None
    return f"{column!r} is {_short(value)}, not a text or messages with role and content"


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and "role" in value
        and (isinstance(value.get("content"), (str, list)) or bool(value.get("tool_calls")))
    )


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8 text. Save the file as UTF-8"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
