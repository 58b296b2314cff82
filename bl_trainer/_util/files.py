"""Files that other processes read, and that a crash must not tear."""

import os
import uuid
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file in one go: it holds its old content or all of the new one, whatever happens."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one go, as `write_text` does."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")  # a name that no other process writes to
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
