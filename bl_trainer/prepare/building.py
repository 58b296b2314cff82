"""Preparing a data set: read, write as the model takes it, filter, count, and say what was done."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError
from tqdm.auto import tqdm

from .._util.files import write_bytes, write_text
from .._util.text import sentence
from ..errors import RecipeError
from ..recipe.datasets import local_files
from .card import CARD, COUNTS, KEY, Counts, card, told, told_overlap
from .folder import is_done, open_part, put_in_place, read_table, sha256
from .format import Format
from .loading import load, reader, source_of
from .options import PrepareArguments
from .sources import SETS, Example, Part, Row, noisy_labels

ROWS_PER_FILE = 5000  # read; of which an interrupted preparation loses at most so many
KEPT = {"index": pa.int64()}  # all other columns that are kept along hold texts


@dataclass
class Piece:
    """What becomes one file: rows `span` of one split of a part; `labels`: those that are to be wrong."""

    split: str
    part: Part
    rows: Sequence[Row]
    span: range
    where: str
    labels: dict[int, str]


def prepare(options: PrepareArguments) -> Path:
    """Prepare the data set that `options` name in `options.output`, and return that folder.

    The folder holds `train-*.parquet`, `test-*.parquet` if the data set has such a part, and a card, README.md. Columns:
    `prompt` and `completion`, each a list of messages or a text (`Format`); `answer`, the gold answer as a text, for
    medical, figfont and openbookqa, which is right even where a completion is made wrong; and what is kept along.

    The content depends on the options and the source alone; the card has its sha256, over the rows as JSON with sorted keys,
    one a line. Rows of the test are counted by their length, and never left out for it. Until the data set is complete, it
    is in the folder `output`.part, from where the same options resume. Raises RecipeError.
    """
    output = Path(str(options.output))
    part_folder = output.with_name(f"{output.name}.part")
    paths = [source_of(part, options.source) for part in SETS[options.name].parts]
    form = Format(options.model)
    settings = _settings(options, form, paths)
    try:
        if is_done(output, settings, options.overwrite):
            print(f"{output} is there already, prepared with the same options.")
            return output
        record = open_part(part_folder, settings, options)
        counts, digests = _build(part_folder, list(_pieces(options, paths, record["revisions"])), form, options)
        record["files"] = sorted(path.name for path in part_folder.glob("*.parquet"))
        record["sha256"] = digests
        overlap = _overlap(part_folder)
        record |= {} if overlap is None else {"overlap": overlap}
        write_text(part_folder / CARD, card(record, counts, options))
        put_in_place(part_folder, output)
    except OSError as error:
        raise RecipeError(
            f"`--output {output}` can't be written: {error.strerror or error}. Write another `--output`, or make room."
        ) from error
    for split, counted in counts.items():
        said = "; ".join(f"{count:,} {what}" for what, count in told(counted, options, [split]))
        print(f"{split}: {said}; {digests[split]}")
    if overlap is not None:
        print(told_overlap(overlap, counts["train"]["rows"]))
    print(f"Prepared in {output}.")
    return output


def _settings(options: PrepareArguments, form: Format, paths: list[Path | None]) -> dict[str, Any]:
    """Return all that decides the content, but for what the Hub holds."""
    files = {
        str(file.relative_to(path.parent)): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for path in paths
        if path
        for file in local_files(path)
    }
    noted = ("name", "model", "keep_long", "limit", "label_noise", "revision")
    return {
        **{key: getattr(options, key) for key in noted},
        **form.describe(),
        "max_length": options.length,
        "seed": options.drawn_with,
        "source": files or None,
    }


def _pieces(options: PrepareArguments, paths: list[Path | None], revisions: dict[str, str]) -> Iterator[Piece]:
    for part, path in zip(SETS[options.name].parts, paths, strict=True):
        loaded = load(part, path, revisions.get(part.hub), options.drawn_with or 0)
        where = f"`--source {path}`" if path else part.hub or part.name
        for split, own in part.splits:
            rows = loaded[own]
            count = min(len(rows), options.limit or len(rows))
            if not count:
                continue
            reader(part, rows, where)
            labels = {}
            if options.label_noise and own == "train":
                right = [rows[i]["answerKey"] for i in range(count)]
                labels = noisy_labels(right, options.label_noise, options.drawn_with or 0)
            for start in range(0, count, ROWS_PER_FILE):
                yield Piece(split, part, rows, range(start, min(start + ROWS_PER_FILE, count)), where, labels)


def _build(folder: Path, pieces: list[Piece], form: Format, options: PrepareArguments) -> tuple[Counts, dict[str, str]]:
    """Write the files that aren't there yet; return what was counted in each split, and its sha256."""
    counts: Counts = {}
    digests: dict[str, str] = {}
    for split in dict.fromkeys(split for part in SETS[options.name].parts for split, _ in part.splits):
        own = [piece for piece in pieces if piece.split == split]
        paths = [folder / f"{split}-{i:05d}-of-{len(own):05d}.parquet" for i in range(len(own))]
        counts[split] = Counter(dict.fromkeys(COUNTS, 0))
        with tqdm(total=sum(len(piece.span) for piece in own), desc=split, unit=" rows", disable=None) as bar:
            for piece, path in zip(own, paths, strict=True):
                counts[split].update(_built(path, piece, form, options, bar))
        digests[split] = str(sha256(map(read_table, paths)))
        if not counts[split]["rows"]:
            shutil.rmtree(folder)
            said = ", ".join(f"{count:,} {what}" for what, count in told(counts[split], options, [split]))
            raise RecipeError(f"Nothing is left for the {split} split of {options.name}: {said}.")
    return counts, digests


def _built(path: Path, piece: Piece, form: Format, options: PrepareArguments, bar: Any) -> dict[str, int]:
    """Write a piece's file if it isn't there, or is broken since; return what was counted in it."""
    table = read_table(path)
    if table is None or KEY.encode() not in (table.schema.metadata or {}):
        table = _table(piece, form, options, bar)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        write_bytes(path, buffer.getvalue().to_pybytes())
    else:
        bar.update(len(piece.span))
    return json.loads(table.schema.metadata[KEY.encode()])


def _overlap(folder: Path) -> dict[str, int] | None:
    """Count the training rows whose prompt, and whose prompt and completion, a test row has; None without a test split."""
    splits = {split: _pairs(folder, split) for split in ("train", "test")}
    if not all(splits.values()):
        return None
    prompts, rows = {prompt for prompt, _ in splits["test"]}, set(splits["test"])
    return {
        "prompts": sum(prompt in prompts for prompt, _ in splits["train"]),
        "rows": sum(row in rows for row in splits["train"]),
    }


def _pairs(folder: Path, split: str) -> list[tuple[bytes, bytes]]:
    """Return a digest of prompt and completion of each row."""
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    rows = (row for path in paths for row in pq.read_table(path, columns=["prompt", "completion"]).to_pylist())
    return [(_digest(row["prompt"]), _digest(row["completion"])) for row in rows]


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def _table(piece: Piece, form: Format, options: PrepareArguments, bar: Any) -> pa.Table:
    """Return the rows of a piece, with what was counted in the metadata."""
    read = reader(piece.part, piece.rows, piece.where)
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    written: list[dict[str, Any]] = []
    schema = pa.schema([*form.schema(), *((name, KEPT.get(name, pa.string())) for name in piece.part.kept)])
    for i in piece.span:
        made, prompt, whole = _row(piece, i, read, form, options)
        bar.update()
        counts["read"] += 1
        if made is None:
            counts["empty"] += 1
            continue
        is_long = options.length is not None and whole > options.length
        counts["cut"] += is_long
        counts["lost"] += options.length is not None and prompt >= options.length
        if not is_long or options.keep_long or piece.split != "train":  # the test is the same for every model
            written.append(made)
    counts["rows"] = len(written)
    return pa.Table.from_pylist(written, schema.with_metadata({KEY: json.dumps(counts)}))


def _row(
    piece: Piece, i: int, read: Callable[[Row], Example], form: Format, options: PrepareArguments
) -> tuple[dict[str, Any] | None, int, int]:
    """Return row `i` as it is written, None if it is left out, and the tokens of prompt and whole. Raises RecipeError."""
    row = {**piece.rows[i], "label": piece.labels[i]} if i in piece.labels else piece.rows[i]
    try:
        made = form.write(read(row))
        _check_kept(made or {}, piece.part.kept)
        return made, *(form.lengths(made) if made and options.length is not None else (0, 0))
    except TemplateError as error:
        raise RecipeError(
            f"{piece.where}, row {i + 1} of {piece.split}: the chat template of `--model {options.model}` doesn't take it: "
            f"{sentence(error)}"
        ) from error
    except (TypeError, KeyError, ValueError) as error:
        raise RecipeError(f"{piece.where}, row {i + 1} of {piece.split}: {sentence(error)}.") from error


def _check_kept(row: dict[str, Any], kept: Iterable[str]) -> None:
    for name in kept:
        value = row.get(name)
        if name not in KEPT and value is not None and not isinstance(value, str):
            raise TypeError(f"{value!r} stands where a text should, as {name!r}")
