"""Data sets from local files, and the line of a file that is at fault when one can't be read or trained on."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from trl import DatasetMixtureConfig, ScriptArguments

from ..errors import RecipeError
from ..tokens.layouts import CONTENTS, SPEAKERS, align, are_chats, arrange, fault_of, short

OPTIONAL = ("objective_weight", "ref_logprobs")  # columns that the splits of a data set may have each for itself
BOM = codecs.BOM_UTF8  # the libraries read over it
LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # what may stand behind these
MAGIC = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # how such a file begins
ZSTANDARD = b"\x28\xb5\x2f\xfd"


def load_dataset(script: ScriptArguments) -> Any:
    """Load `dataset_name`, a local file or folder or a Hub id; a mapping of splits."""
    name = script.dataset_name or ""
    path = Path(name).expanduser()
    shifted = (file for file in local_files(script.dataset_name) if format_of(file) == "csv" and _is_shifted(file))
    if fault := find_fault(shifted):
        raise ValueError(fault)
    if path.is_file():
        return _load_file(path, script.dataset_train_split, script.dataset_streaming)
    if is_path(name) and not path.exists():
        start = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise FileNotFoundError(f"there is no such file or folder{start}")
    source = _folder(path) if path.is_dir() else {"path": name}
    try:
        splits = datasets.load_dataset(**source, name=script.dataset_config, streaming=script.dataset_streaming)
    except datasets.exceptions.DatasetGenerationError as error:
        if not isinstance(error.__cause__, datasets.table.CastError):  # the first split lacks a column that another has
            raise
        splits = _split_by_split(source)
        names = [{*dataset.column_names} - {*OPTIONAL} for dataset in splits.values()]
        if any(each != names[0] for each in names):
            raise
    return _without_filled(splits)


def _load_file(path: Path, split: str, streaming: bool) -> Any:
    found = format_of(path)
    if found is None:
        raise ValueError(f"{path.suffix!r} is none of {', '.join(LOCAL_FORMATS)}, nor one of these in {', '.join(COMPRESSED)}")
    with open_binary(path):  # which may need a package
        pass
    return datasets.load_dataset(found, data_files={split: escape(str(path))}, streaming=streaming)


def _folder(path: Path) -> dict[str, str]:
    """Return what `datasets` needs to load a local folder, which it takes for a pattern if it holds `[`, `*` or `?`."""
    path = path.resolve()  # `text` is a format's name too, and `.` none at all
    formats = Counter(filter(None, map(format_of, local_files(path))))
    if escape(str(path)) == str(path) or not formats:
        return {"path": str(path)}
    return {"path": formats.most_common(1)[0][0], "data_dir": escape(str(path))}


def load_mixture(mixture: DatasetMixtureConfig, text_field: str) -> Any:
    """Load and mix the data sets of `datasets`; a mapping of splits. Raises RecipeError if their layouts differ."""
    parts = []
    for entry in mixture.datasets:
        dataset = _load_entry(entry, mixture.streaming)
        dataset = dataset if entry.columns is None else dataset.select_columns(entry.columns)
        parts.append(arrange(dataset, f"the data set {_source(entry)}", text_field))
    fractions = [getattr(entry, "fraction", None) for entry in mixture.datasets]  # not in the oldest TRL
    parts = _shares(parts, fractions, mixture.streaming)
    joined = datasets.concatenate_datasets(align(parts, [_source(entry) for entry in mixture.datasets], text_field))
    if mixture.test_split_size is None:
        return datasets.DatasetDict({"train": joined})
    return joined.train_test_split(test_size=mixture.test_split_size)


def _source(entry: Any) -> str:
    """Return what tells an entry of a mixture from the others: its files, else its path."""
    return str(entry.data_files or entry.path)


def _load_entry(entry: Any, streaming: bool) -> Any:
    """Load the split of a data set that is part of a mixture."""
    path, own = Path(entry.path).expanduser(), entry.data_files or entry.data_dir
    if path.is_file():
        return _load_file(path, entry.split, streaming)[entry.split]
    where = {"path": entry.path, "data_dir": entry.data_dir and _literal(entry.data_dir)}
    if path.is_dir() and not own:
        where |= _folder(path)
    files = _literal(entry.data_files, path)
    return datasets.load_dataset(**where, name=entry.name, data_files=files, split=entry.split, streaming=streaming)


def _literal(source: Any, base: Path | None = None) -> Any:
    """Return data files with the paths among them that exist kept from being taken for patterns."""
    if isinstance(source, dict):
        return {key: _literal(value, base) for key, value in source.items()}
    if isinstance(source, (list, tuple)):
        return [_literal(value, base) for value in source]
    exists = source and (Path(source).exists() or (base is not None and (base / source).exists()))
    return escape(str(source)) if exists else source


def _shares(parts: list[Any], fractions: list[float | None], streaming: bool) -> list[Any]:
    """Return of each data set as many rows as `fractions` of the largest mixture that repeats none."""
    weights = [each for each in fractions if each is not None]
    if not weights:
        return parts
    if streaming or len(weights) < len(parts) or sum(weights) <= 0:
        why = "the data sets are streamed" if streaming else "only some of `datasets` have one above 0"
        raise RecipeError(f"Cannot mix by `fraction`: {why}. Give each a `fraction` without `streaming`, or none.")
    shares = [weight / sum(weights) for weight in weights]
    size = min(len(part) / share for part, share in zip(parts, shares, strict=True) if share > 0)
    return [part.select(range(round(share * size))) for part, share in zip(parts, shares, strict=True)]


def _split_by_split(source: dict[str, str]) -> datasets.DatasetDict:
    """Load each split of a folder or a Hub id for itself, with columns of its own."""
    files = datasets.load_dataset_builder(**source).config.data_files or {}
    return datasets.DatasetDict(
        {
            split: datasets.load_dataset(source["path"], data_files={split: list(map(escape, found))}, split=split)
            for split, found in files.items()
        }
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
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or format_of(Path(name)) is not None


def format_of(path: Path) -> str | None:
    """Return the format of a file by its name, compressed or not; None if it is none of ours."""
    return LOCAL_FORMATS.get(Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix)


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed, as `datasets` reads it. Raises RecipeError if that needs a package."""
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(ZSTANDARD):
        try:
            import zstandard
        except ImportError:
            raise RecipeError(f"Cannot read {path}: it is compressed. Run `pip install zstandard`.") from None
        return io.BufferedReader(zstandard.open(path, "rb"))
    opener: Any = next((opener for magic, opener in MAGIC.items() if start.startswith(magic)), Path.open)
    return opener(path, "rb")


def local_files(source: Any) -> Iterator[Path]:
    """Yield the existing files that `source` names: a file, a folder, a pattern, or a list or mapping of these."""
    if isinstance(source, dict):
        source = list(source.values())
    if isinstance(source, (list, tuple)):
        for part in source:
            yield from local_files(part)
    elif source and Path(source).expanduser().is_dir():
        yield from sorted(path for path in Path(source).expanduser().rglob("*") if format_of(path))
    elif source:
        path = Path(source).expanduser()
        found = [path] if path.is_file() else map(Path, glob(str(path), recursive=True))
        yield from sorted(path for path in found if path.is_file())


def unreadable_name(files: Iterable[Path]) -> str | None:
    """Return which file `datasets` takes for an address, and what to do; None if it is none of `files`."""
    for path in files:
        if path.suffix in COMPRESSED and {"[", "]"} & {*path.name}:
            return f"{path} is compressed, and its name holds brackets. Rename or decompress it"
    return None


def find_fault(files: Iterable[Path], formats: Iterable[tuple[str, ...]] = ()) -> str | None:
    """Return which line of which of `files` is at fault, and why; None if they can all be read.

    A line must be UTF-8, and one of JSON hold an object. The first of `formats` whose columns a file's first row has must be
    that of all its rows, each of these columns with a text or messages.
    """
    formats = list(formats)
    for path in files:
        if path.suffix in COMPRESSED and not _is_compressed(path):
            return f"{path}: it is not compressed, as {path.suffix} says. Rename it to {path.stem}"
        if format_of(path) == "parquet":
            if not _is_parquet(path):
                return f"{path}: it is no complete Parquet file"
        else:
            try:
                found = _fault_in_whole(path) if _is_one_value(path) else _fault_in_lines(path, formats)
                found = found or (_fault_in_csv(path, formats) if format_of(path) == "csv" else None)
            except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile):
                return f"{path}: the compressed file is truncated or damaged"
            if found:
                return f"{path}, {found}"
    return None


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith((*MAGIC, ZSTANDARD))


def _is_parquet(path: Path) -> bool:
    try:
        pq.read_metadata(path)
    except pa.ArrowInvalid:
        return False
    return True


def is_empty(file: Path) -> bool:
    """Whether a file that has no fault holds no rows."""
    if format_of(file) == "parquet":
        return not pq.read_metadata(file).num_rows
    with open_binary(file) as lines:
        written = list(islice(filter(None, (line.removeprefix(BOM).strip() for line in lines)), 2))
    return len(written) < 2 if format_of(file) == "csv" else written in ([], [b"[]"], [b"{}"])


def _is_one_value(path: Path) -> bool:
    """Whether a file is one value of JSON, not one in each line: an array, or an object over several lines."""
    if format_of(path) != "json":
        return False
    with open_binary(path) as file:
        if file.read(1024).removeprefix(BOM).lstrip().startswith(b"["):
            return True
    with open_binary(path) as file:
        return file.readline().removeprefix(BOM).strip() == b"{"


def _fault_in_whole(path: Path) -> str | None:
    with open_binary(path) as file:
        content = file.read().removeprefix(BOM)
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
    is_chat = False
    with open_binary(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.removeprefix(BOM if number == 1 else b"").decode().rstrip("\r\n")
                if format_of(path) != "json" or not text.strip():
                    continue
                row = json.loads(text)
            except RecursionError:
                return f"line {number}: its values are nested too deeply"
            except UnicodeDecodeError as error:
                return f"line {number}: {_not_utf8(error)}"
            except json.JSONDecodeError as error:
                return f"line {number}: {error.msg.removesuffix(' at')} at column {error.colno}"
            if not isinstance(row, dict):
                return f"line {number}: it holds {short(row)}, not an object"
            if columns is None:
                columns = next((each for each in formats if set(each) <= row.keys()), ())
                is_chat = bool(columns) and are_chats(row, columns)
            fault = _fault_in_row(row, columns, is_chat)
            if fault:
                return f"line {number}: {fault}"
    return None


def _is_shifted(path: Path) -> bool:
    """Whether the first row has more values than the header, so that pandas moves them to the wrong columns in silence."""
    with io.TextIOWrapper(open_binary(path), newline="", encoding="utf-8-sig", errors="replace") as lines:
        return None in next(_csv_rows(lines), {})


def _csv_rows(lines: Any) -> Any:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the default
    return csv.DictReader(lines)


def _fault_in_csv(path: Path, formats: list[tuple[str, ...]]) -> str | None:
    with io.TextIOWrapper(open_binary(path), newline="", encoding="utf-8-sig") as lines:
        rows = _csv_rows(lines)
        columns: tuple[str, ...] = next((each for each in formats if set(each) <= set(rows.fieldnames or ())), ())
        is_chat: bool | None = None
        for row in rows:
            if None in row:
                given = len(row) - 1 + len(row[None])
                return f"line {rows.line_num}: it has {given} values, the header {len(row) - 1}. Quote values with commas"
            empty = next((column for column in columns if not row[column]), None)
            if empty:
                return f"line {rows.line_num}: {empty!r} is empty"
            is_chat = bool(columns) and are_chats(row, columns) if is_chat is None else is_chat
            fault = _fault_in_row(row, columns, is_chat)
            if fault:
                return f"line {rows.line_num}: {fault}"
    return None


def _fault_in_row(row: dict[str, Any], columns: tuple[str, ...], is_chat: bool) -> str | None:
    for column in columns:
        if column not in row:
            return f"it has no {column!r}"
        fault = fault_of(row[column], is_chat, (SPEAKERS, CONTENTS))
        if fault:
            return f"{column!r} {fault}"
    return None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8 text. Save the file as UTF-8"
