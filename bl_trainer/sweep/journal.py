"""The study's journal: a line of JSON for each operation, which a full disk or a power cut can tear."""

import json
from itertools import count
from pathlib import Path

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from .._util.files import write_bytes
from ..errors import RecipeError

START = b'{"op_code":'  # of each operation, as Optuna writes them


def open_journal(path: Path) -> JournalFileBackend:
    """Return the backend of the journal at `path`, mended if it is torn.

    A torn operation was never answered, so that whoever asked for it is gone and the study does without it.
    """
    lock = JournalFileOpenLock(str(path))
    lock.acquire()  # or what another worker is writing would look torn
    try:
        _mend(path)
    finally:
        lock.release()
    return JournalFileBackend(str(path), lock)


def _mend(path: Path) -> None:
    content = path.read_bytes() if path.exists() else b""
    mended = mend(content, path)
    if mended == content:
        return
    copy = next(name for i in count(1) if not (name := path.with_name(f"{path.name}.torn-{i}")).exists())
    write_bytes(copy, content)
    write_bytes(path, mended)
    print(
        f"{path} had a torn line, as a full disk or a power cut leaves it. The sweep continues without its "
        f"{len(content) - len(mended)} bytes. The file as it was is kept in {copy}.",
        flush=True,
    )


def mend(content: bytes, path: Path) -> bytes:
    """Return a journal without what is torn: the end of the file, or what stands before an operation in its line.

    Raises RecipeError on a line that is broken in another way.
    """
    *lines, _ = content.split(b"\n")
    for i, line in enumerate(lines):
        if not _is_whole(line):
            lines[i] = line[max(line.rfind(START), 0) :]
            if not _is_whole(lines[i]):
                raise RecipeError(
                    f"Cannot use the study {path}: line {i + 1} is no operation of Optuna. Restore the file, or start a new "
                    "sweep with another `--sweep_dir`."
                )
    return b"".join(line + b"\n" for line in lines)


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
