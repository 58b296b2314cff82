"""The folder of a data set: whether it is what is asked for, one that is under way, and putting that in place."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .._util.files import write_text
from ..errors import RecipeError
from .card import CARD, KEY, front_matter, read_card
from .loading import revision_of
from .options import PrepareArguments
from .sources import SETS


def is_done(output: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `output` holds what is asked for. Raises RecipeError if it holds anything else that is not to be replaced."""
    if not output.exists():
        return False
    if not output.is_dir():
        raise RecipeError(f"`--output {output}` is a file. Write another folder.")
    found = {path.name for path in output.iterdir()}
    if not found:
        return False
    made = read_card(output / CARD)
    if made is None or not {"sha256", "files"} <= made.keys():
        raise RecipeError(f"`--output {output}` holds {min(found)}, and is no finished data set. Write another folder.")
    if overwrite:
        foreign = found - {CARD, *made["files"]}
        if foreign:
            raise RecipeError(f"`--output {output}` also holds {min(foreign)}, of your own, which would be lost. Move it away.")
        return False
    _check_made(output, made, settings)
    return True


def _check_made(output: Path, made: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise RecipeError unless a finished data set is the one that is asked for, and has not changed since."""
    other = changed(made["settings"], settings)
    if other:
        raise RecipeError(
            f"`--output {output}` holds a data set prepared with another {', '.join(other)}. Write another folder, or "
            "`--overwrite` to replace it."
        )
    lost = sorted({*made["files"]} - {path.name for path in output.iterdir()})
    if lost:
        raise RecipeError(f"`--output {output}` has lost {lost[0]}. Write `--overwrite` to prepare it again.")
    for split, digest in made["sha256"].items():
        files = (output / name for name in made["files"] if name.startswith(f"{split}-"))
        if sha256(map(read_table, files)) != digest:
            raise RecipeError(
                f"`--output {output}` has changed: its {split} split is not what the card says. Write `--overwrite` to "
                "prepare it again, or another folder."
            )


def changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the settings that are others now; an older card may lack `tokenizer`."""
    return [key for key, value in now.items() if then.get(key, value if key == "tokenizer" else None) != value]


def read_table(path: Path) -> pa.Table | None:
    """Return the table of a Parquet file, None if there is no whole one."""
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError):  # a damaged page is the latter
        return None


def sha256(tables: Iterable[pa.Table | None]) -> str | None:
    """Return the checksum over the rows of `tables`, None if one of these is missing."""
    digest = hashlib.sha256()
    for table in tables:
        if table is None:
            return None
        for row in table.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def open_part(folder: Path, settings: dict[str, Any], options: PrepareArguments) -> dict[str, Any]:
    """Return the record of a preparation that was interrupted, or begin one: its settings, and the revisions of the Hub."""
    if folder.exists():
        record = read_card(folder / CARD)
        other = None if record is None else changed(record["settings"], settings)
        if record is not None and not other:
            return record
        if record is None and any(folder.iterdir()):
            raise RecipeError(f"{folder} holds what prepare-data didn't write. Move it away, or write another `--output`.")
        has_begun = any(folder.glob("*.parquet"))  # what failed before its first file has nothing to lose
        if other and has_begun and not options.overwrite:
            raise RecipeError(
                f"{folder} is left from a preparation with other options that was interrupted ({', '.join(other)}). Resume "
                "with these, or write `--overwrite` to begin anew."
            )
        shutil.rmtree(folder)
    hubs = {} if options.source else {part.hub or part.name: part for part in SETS[options.name].parts}
    record = {"settings": settings, "revisions": {hub: revision_of(part, options.revision) for hub, part in hubs.items()}}
    folder.mkdir(parents=True)
    write_text(folder / CARD, front_matter({KEY: record}))
    return record


def put_in_place(folder: Path, output: Path) -> None:
    """Make the folder of a finished preparation the output, in place of the last one."""
    for part in folder.glob("*.part"):  # of a write that was interrupted
        part.unlink()
    old = output.with_name(f"{output.name}.old")
    if output.exists() and any(output.iterdir()):
        if read_card(old / CARD) is not None:  # of a replacement that was interrupted here
            shutil.rmtree(old)
        output.rename(old)
    folder.rename(output)
    if read_card(old / CARD) is not None:
        shutil.rmtree(old)
