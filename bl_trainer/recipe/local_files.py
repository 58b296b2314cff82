"""Local data files: their formats, reading them decompressed, and the line at fault when one can't be read or trained on."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import RecipeError
from ..tokens.layouts import are_chats
from ..tokens.messages import CONTENTS, SPEAKERS, fault_of, short
from .paths import COMPRESSED, format_of

BOM = codecs.BOM_UTF8  # the libraries read over it
ZSTANDARD = b"\x28\xb5\x2f\xfd"
MAGIC = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # how such a file begins


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
    """Return the file and line at fault, and why; None if they can all be read.

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


def is_shifted(path: Path) -> bool:
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
                instead = "Quote values with commas" if len(row) > 2 else "Separate the header's names by commas"
                return f"line {rows.line_num}: it has {given} values, the header {len(row) - 1}. {instead}"
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
