"""`drop_rows`: the rows of a training set that its scores keep, found by number and verified by hash."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from .._util.text import nearest, sentence
from ..errors import RecipeError
from ..tokens.labels import plain
from ..tokens.names import ROW
from ..tokens.row_cut import RowCut
from ..tokens.row_hash import hashed_columns, hashes_of

MATCHED = ("row", "row_hash")  # columns that every file of scores has


@dataclass(frozen=True)
class KeptRows:
    """
    The rows that train. `numbers`: theirs in the training set, ascending. `record`: what a run's record says of them.

    The record's `hash` is of the kept rows' numbers and hashes, so that equal records mean equal training rows.
    """

    numbers: list[int]
    record: dict[str, Any]

    @classmethod
    def of(cls, spec: str, dataset: Any, text_field: str) -> "KeptRows":
        """Return the rows of a training set that `drop_rows: spec` keeps.

        Raises RecipeError on scores that can't be read, lack the column, or are not of exactly these rows, and if no row with
        a target is kept. A row without a score is kept if it has no target, as it trains nothing.
        """
        cut, rows = RowCut.parse(spec), plain(dataset)
        if not isinstance(rows, Dataset):
            raise RecipeError(f"{_cannot(cut)}: a stream's rows have no numbers. Write `dataset_streaming: false`.")
        table = _table(cut)
        hashes = hashes_of(rows, hashed_columns(rows, text_field))
        _refuse_others(cut, table, hashes)
        trains = _trains(table)
        dropped = cut.drops(_values(cut, table, trains))
        numbers = np.flatnonzero(~dropped).tolist()
        if not numbers:
            raise RecipeError(f"{_cannot(cut)}: it drops all {len(hashes):,} rows. Move the number.")
        if trains.any() and not trains[numbers].any():
            raise RecipeError(f"{_cannot(cut)}: none of the rows that it keeps has a target. Move the number.")
        digest = hashlib.sha256(repr([(number, hashes[number]) for number in numbers]).encode()).hexdigest()[:16]
        return cls(numbers, {"rule": str(cut), "rows": len(hashes), "dropped": int(dropped.sum()), "hash": digest})

    def select(self, dataset: Dataset) -> Dataset:
        """Return the rows of the training set that are kept."""
        return plain(dataset).select(self.numbers)

    def numbered(self, dataset: Dataset) -> Dataset:
        """Return the same, each with its number in the training set, by which errors call it."""
        kept = self.select(dataset)
        return kept if ROW in kept.column_names else kept.add_column(ROW, self.numbers)


def without_dropped(dataset: Any, args: Any) -> Any:
    """Return a training set without the rows that `args.drop_rows` drops. Raises RecipeError as `KeptRows.of`."""
    if args.drop_rows is None:
        return dataset
    return KeptRows.of(args.drop_rows, dataset, args.dataset_text_field).select(dataset)


def _cannot(cut: RowCut) -> str:
    return f"Cannot drop rows by `drop_rows: {cut}`"


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def _table(cut: RowCut) -> pa.Table:
    """Return the columns that the cut needs, by row. Raises RecipeError on files that lack them."""
    files = _files(cut.path)
    if not files or not all(path.is_file() for path in files):
        raise RecipeError(f"{_cannot(cut)}: there are no scores. Run `diagnose --scores` first, and name its folder.")
    parts = [_read(cut, path) for path in files]
    return pa.concat_tables(parts, promote_options="permissive").sort_by("row")


def _read(cut: RowCut, path: Path) -> pa.Table:
    try:
        schema = pq.read_schema(path)
        names = [name for name in dict.fromkeys((*MATCHED, "targets", cut.column)) if name in schema.names]
        table = pq.read_table(path, columns=names)
    except (OSError, pa.ArrowException) as error:
        if path.suffix.lower() != ".parquet":
            raise RecipeError(f"{_cannot(cut)}: {path} is no Parquet file. Name one, or a folder of scores.") from error
        raise RecipeError(f"{_cannot(cut)}: {path} can't be read ({sentence(error)}). Score the rows again.") from error
    for name in (*MATCHED, cut.column):
        if name not in names:
            near = nearest(name, schema.names)
            raise RecipeError(f"{_cannot(cut)}: {path} has no column {name!r}.{near} Name a column of numbers.")
    if not pa.types.is_integer(table["row"].type) or table["row"].null_count:
        raise RecipeError(
            f"{_cannot(cut)}: the column 'row' of {path} must hold integers without nulls. Number every row from 0."
        )
    kind = schema.field(cut.column).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise RecipeError(f"{_cannot(cut)}: the column {cut.column!r} holds {kind}. Name a column of numbers.")
    return table


def _refuse_others(cut: RowCut, table: pa.Table, hashes: list[str]) -> None:
    """Raise RecipeError unless the scores are of these rows, each once."""
    for problem in _problems(table["row"].to_pylist(), table["row_hash"].to_pylist(), hashes):
        raise RecipeError(f"{_cannot(cut)}: {problem}.")


def _problems(rows: list[Any], theirs: list[Any], hashes: list[str]) -> Iterator[str]:
    """Yield what tells the scores from those of these rows. `rows`: of the scores, ascending."""
    lacks = "row {} of the training set has no score. Run `diagnose --scores` to its end"
    for place, (row, its) in enumerate(zip(rows, theirs, strict=True)):
        if place and row == rows[place - 1]:
            yield f"row {row} is scored twice. Remove a file"
        elif place >= len(hashes):
            yield f"they score row {row}, and the training set has {len(hashes):,} rows. Score this data set"
        elif row != place:
            yield lacks.format(place)
        elif its != hashes[place]:
            yield f"row {place} of the training set is another one in the scores. Score this data set"
    if len(rows) < len(hashes):
        yield lacks.format(len(rows))


def _trains(table: pa.Table) -> np.ndarray:
    """Return whether each row has a target; all do where the scores do not say."""
    if "targets" not in table.column_names:
        return np.ones(len(table), dtype=bool)
    return table["targets"].to_numpy() > 0


def _values(cut: RowCut, table: pa.Table, trains: np.ndarray) -> np.ndarray:
    """Return the score of each row; of one without a target NaN, which no comparison holds for."""
    values = table[cut.column].to_numpy().astype(np.float64)
    for row in np.flatnonzero(np.isnan(values) & trains):
        raise RecipeError(f"{_cannot(cut)}: {cut.column} of row {row} is missing or NaN. Choose another column.")
    return values
