"""Preparing a data set: read, write as the model takes it, filter, count, and say what was done."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jinja2 import TemplateError
from tqdm.auto import tqdm

from .._util.files import replacing, write_text
from .._util.text import sentence
from ..errors import RecipeError
from ..recipe.local_files import local_files
from .format import Format
from .options import PrepareArguments
from .sources import BOXED, INSTRUCTED, SETS, Part, Row, load, noisy_labels, reader, revision_of, source_of

ROWS_PER_FILE = 5000  # read; of which an interrupted preparation loses at most so many
KEY = "bl_trainer"  # of what this module notes in cards and files
CARD = "README.md"
COUNTS = {
    "rows": "rows",
    "read": "read",
    "empty": "left out, without a prompt or a completion",
    "cut": "{done}, whose target truncation at {length} tokens would cut",
    "lost": "of these, whose target it would cut off whole",
}
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
    one a line. Rows of the test are counted by their length, and never left out for it. Until the data set is whole, it is in
    the folder `output`.part, from where the same options go on. Raises RecipeError.
    """
    output = Path(str(options.output))
    part_folder = output.with_name(f"{output.name}.part")
    paths = [source_of(part, options.source) for part in SETS[options.name].parts]
    form = Format(options.model)
    settings = _settings(options, form, paths)
    try:
        if _is_done(output, settings, options.overwrite):
            print(f"{output} is there already, prepared with the same options.")
            return output
        record = _open_part(part_folder, settings, options)
        counts, digests = _build(part_folder, list(_pieces(options, paths, record["revisions"])), form, options)
        record["files"] = sorted(path.name for path in part_folder.glob("*.parquet"))
        record["sha256"] = digests
        text = _card(record, counts, options)
        write_text(part_folder / CARD, text)
        _put_in_place(part_folder, output)
    except OSError as error:
        raise RecipeError(
            f"`--output {output}` can't be written: {error.strerror or error}. Write another `--output`, or make room."
        ) from error
    for split, counted in counts.items():
        told = "; ".join(f"{count:,} {what}" for what, count in _told(counted, options, [split]))
        print(f"{split}: {told}; {digests[split]}")
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


def _is_done(output: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `output` holds what is asked for. Raises RecipeError if it holds anything else that is not to be replaced."""
    if not output.exists():
        return False
    if not output.is_dir():
        raise RecipeError(f"`--output {output}` is a file. Write another folder.")
    found = {path.name for path in output.iterdir()}
    if not found:
        return False
    made = _read_card(output / CARD)
    if made is None or not {"sha256", "files"} <= made.keys():
        raise RecipeError(f"`--output {output}` holds {min(found)}, and is no finished data set. Write another folder.")
    if overwrite:
        foreign = found - {CARD, *made["files"]}
        if foreign:
            raise RecipeError(f"`--output {output}` also holds {min(foreign)}, of your own, which would be lost. Move it away.")
        return False
    other = [key for key, value in settings.items() if made["settings"].get(key) != value]
    if other:
        raise RecipeError(
            f"`--output {output}` holds a data set prepared with another {', '.join(other)}. Write another folder, or "
            "`--overwrite` to replace it."
        )
    lost = sorted(set(made["files"]) - found)
    if lost:
        raise RecipeError(f"`--output {output}` has lost {lost[0]}. Write `--overwrite` to prepare it again.")
    for split, digest in made["sha256"].items():
        files = (output / name for name in made["files"] if name.startswith(f"{split}-"))
        if _sha256(map(_read_table, files)) != digest:
            raise RecipeError(
                f"`--output {output}` has changed: its {split} split is not what the card says. Write `--overwrite` to "
                "prepare it again, or another folder."
            )
    return True


def _read_card(path: Path) -> dict[str, Any] | None:
    """Return what this module has noted in a card, None if it is not one of its cards."""
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2) if path.is_file() else []
    try:
        noted = yaml.safe_load(parts[1]) if len(parts) == 3 else None
    except yaml.YAMLError:
        return None
    record = noted.get(KEY) if isinstance(noted, dict) else None
    if not isinstance(record, dict) or not {"settings", "revisions"} <= record.keys():
        return None
    kinds = {"settings": dict, "revisions": dict, "files": list, "sha256": dict}
    return record if all(isinstance(record.get(key, kind()), kind) for key, kind in kinds.items()) else None


def _read_table(path: Path) -> pa.Table | None:
    """Return the table of a Parquet file, None if there is no whole one."""
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError):  # a damaged page is the latter
        return None


def _sha256(tables: Iterable[pa.Table | None]) -> str | None:
    """Return the checksum over the rows of `tables`, None if one of these is missing."""
    digest = hashlib.sha256()
    for table in tables:
        if table is None:
            return None
        for row in table.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _open_part(folder: Path, settings: dict[str, Any], options: PrepareArguments) -> dict[str, Any]:
    """Return the record of a preparation that was interrupted, or begin one: its settings, and the revisions of the Hub."""
    if folder.exists():
        record = _read_card(folder / CARD)
        if record is not None and record["settings"] == settings:
            for torn in folder.glob("*.part"):  # by a kill
                torn.unlink()
            return record
        if record is None and any(folder.iterdir()):
            raise RecipeError(f"{folder} holds what prepare-data didn't write. Move it away, or write another `--output`.")
        has_begun = any(folder.glob("*.parquet"))  # what failed before its first file has nothing to lose
        if record is not None and has_begun and not options.overwrite:
            raise RecipeError(
                f"{folder} is left from a preparation with other options that was interrupted. Go on with these, or write "
                "`--overwrite` to begin anew."
            )
        shutil.rmtree(folder)
    hubs = {} if options.source else {part.hub or part.name: part for part in SETS[options.name].parts}
    record = {"settings": settings, "revisions": {hub: revision_of(part, options.revision) for hub, part in hubs.items()}}
    folder.mkdir(parents=True)
    write_text(folder / CARD, _front_matter({KEY: record}))
    return record


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


def _build(
    folder: Path, pieces: list[Piece], form: Format, options: PrepareArguments
) -> tuple[dict[str, Counter[str]], dict[str, str]]:
    """Write the files that aren't there yet; return what was counted in each split, and its sha256."""
    counts: dict[str, Counter[str]] = {}
    digests: dict[str, str] = {}
    for split in dict.fromkeys(split for part in SETS[options.name].parts for split, _ in part.splits):
        own = [piece for piece in pieces if piece.split == split]
        counts[split], paths = Counter(dict.fromkeys(COUNTS, 0)), []
        with tqdm(total=sum(len(piece.span) for piece in own), desc=split, unit=" rows", disable=None) as bar:
            for i, piece in enumerate(own):
                path = folder / f"{split}-{i:05d}-of-{len(own):05d}.parquet"
                table = _read_table(path)
                if table is None or KEY.encode() not in (table.schema.metadata or {}):  # not there, or broken since
                    table = _table(piece, form, options, bar)
                    with replacing(path) as part:
                        pq.write_table(table, part)
                else:
                    bar.update(len(piece.span))
                counts[split].update(json.loads(table.schema.metadata[KEY.encode()]))
                paths.append(path)
        digests[split] = str(_sha256(map(_read_table, paths)))
        if not counts[split]["rows"]:
            shutil.rmtree(folder)
            told = ", ".join(f"{count:,} {what}" for what, count in _told(counts[split], options, [split]))
            raise RecipeError(f"Nothing is left for the {split} split of {options.name}: {told}.")
    return counts, digests


def _table(piece: Piece, form: Format, options: PrepareArguments, bar: Any) -> pa.Table:
    """Return the rows of a piece, with what was counted in the metadata."""
    read = reader(piece.part, piece.rows, piece.where)
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    written: list[dict[str, Any]] = []
    schema = pa.schema([*form.schema(), *((name, KEPT.get(name, pa.string())) for name in piece.part.kept)])
    for i in piece.span:
        row = {**piece.rows[i], "label": piece.labels[i]} if i in piece.labels else piece.rows[i]
        try:
            made = form.write(read(row))
            _check_kept(made or {}, piece.part.kept)
            prompt, whole = form.lengths(made) if made and options.length is not None else (0, 0)
        except TemplateError as error:
            raise RecipeError(
                f"{piece.where}, row {i + 1} of {piece.split}: the chat template of `--model {options.model}` doesn't take it: "
                f"{sentence(error)}"
            ) from error
        except (TypeError, KeyError, ValueError) as error:
            raise RecipeError(f"{piece.where}, row {i + 1} of {piece.split}: {sentence(error)}.") from error
        bar.update()
        counts["read"] += 1
        if made is None:
            counts["empty"] += 1
            continue
        if options.length is not None:
            counts["cut"] += whole > options.length
            counts["lost"] += prompt >= options.length
            # The test is the same for every model
            if whole > options.length and not options.keep_long and piece.split == "train":
                continue
        written.append(made)
    counts["rows"] = len(written)
    return pa.Table.from_pylist(written, schema.with_metadata({KEY: json.dumps(counts)}))


def _check_kept(row: dict[str, Any], kept: Iterable[str]) -> None:
    for name in kept:
        value = row.get(name)
        if name not in KEPT and value is not None and not isinstance(value, str):
            raise TypeError(f"{value!r} stands where a text should, as {name!r}")


def _put_in_place(folder: Path, output: Path) -> None:
    old = output.with_name(f"{output.name}.old")
    if output.exists() and any(output.iterdir()):
        if _read_card(old / CARD) is not None:  # of a replacement that was interrupted here
            shutil.rmtree(old)
        output.rename(old)
    folder.rename(output)
    if _read_card(old / CARD) is not None:
        shutil.rmtree(old)


def _told(counts: Counter[str], options: PrepareArguments, splits: list[str]) -> Iterator[tuple[str, int]]:
    """What was counted, in words that are true of all of `splits`."""
    done = "kept" if options.keep_long or "train" not in splits else "left out"
    done = "left out of train and kept in test" if done == "left out" and "test" in splits else done
    for key, what in COUNTS.items():
        if key in ("cut", "lost"):
            if options.length is None:
                continue
            what = what.format(length=options.length, done=done)
        yield what, counts[key]


def _front_matter(content: dict[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"


def _card(record: dict[str, Any], counts: dict[str, Counter[str]], options: PrepareArguments) -> str:
    """Return the data set's card: source, revision, rows, filters, seed, format, checksums, departures from the paper."""
    settings, chosen = record["settings"], SETS[options.name]
    # No `configs`: with these the datasets library takes its cache for the folder's last content, whatever is in it now
    front = _front_matter({KEY: record})
    lines = [f"# {options.name}", "", "Prepared by bl_trainer's `prepare-data` for supervised fine-tuning.", ""]
    if options.source:
        sources = ", ".join(f"{name} (sha256 {digest})" for name, digest in settings["source"].items())
    else:
        configs = [part.config for part in chosen.parts if part.config]
        of = f", configurations {', '.join(configs)}" if configs else ""
        what = "revision" if chosen.parts[0].hub else "generated by"
        sources = "; ".join(f"{hub}, {what} {revision}" for hub, revision in record["revisions"].items()) + of
    lines.append(f"- Source: {sources}.")
    if settings["seed"] is not None:
        lines.append(f"- Seed: {settings['seed']}.")
    if options.limit:
        lines.append(f"- Only the first {options.limit:,} rows of each split of the source.")
    if options.label_noise:
        lines.append(f"- Label noise: {options.label_noise:g} of the completions made of the training split are wrong letters.")
    kind = "messages" if settings["format"] == "messages" else "text, `User: ...` and `Assistant: ...`"
    by = f", as {options.model} takes it" if options.model else "; lengths were not counted, as no `--model` was given"
    lines.append(f"- Format: {kind}{by}.")
    if settings["instruction"] and options.name in INSTRUCTED:
        lines.append(f"- Instruction: {options.model}'s template says it in a turn of its own: {BOXED}")
    lines += [f"- Departure: {departure}" for departure in chosen.departures]
    lines += ["", f"| | {' | '.join(counts)} |", f"|---|{'---|' * len(counts)}"]
    told = {split: dict(_told(counted, options, list(counts))) for split, counted in counts.items()}
    for what in next(iter(told.values())):
        lines.append(f"| {what} | {' | '.join(f'{told[split][what]:,}' for split in counts)} |")
    lines.append(f"| sha256 of the rows | {' | '.join(record['sha256'].values())} |")
    return front + "\n".join(lines) + "\n"
