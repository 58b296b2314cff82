"""Names of local data files, told apart from those of the Hub."""

from pathlib import Path

LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # what may stand behind these


def is_path(name: str) -> bool:
    """Whether `name` can only be a local path, not a Hub id `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or format_of(Path(name)) is not None


def format_of(path: Path) -> str | None:
    """Return the format of a file by its name, compressed or not; None if it is none of ours."""
    return LOCAL_FORMATS.get(Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix)


def missing(name: str) -> str | None:
    """Return what to say of a local path that is not there; None of one that is, and of a Hub id."""
    path = Path(name).expanduser()
    if not is_path(name) or path.exists():
        return None
    return f"there is no such file or folder{'' if path.is_absolute() else f' in {Path.cwd()}'}"
