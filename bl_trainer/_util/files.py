"""Files that other processes read, and that a crash must not tear."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on leaving, its file takes the place of `path` in one go.

    Whatever happens, `path` holds its old content or all of the new one, on disk. A kill may leave a file `*.part` behind.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")  # a name that no other process writes to
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one go, as `replacing` does."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 in one go, as `replacing` does."""
    write_bytes(path, text.encode())
