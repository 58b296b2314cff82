"""Runs a command that must not outlive the sweep that started it; standard library and psutil alone, to start at once.

    python guard.py FOLDER COMMAND ...

Its stdin is a pipe whose other end only the sweep holds, so that it ends when the sweep does, however that comes.
The command and all that it starts are known by `MARK` in their environment, since launchers give their processes sessions of
their own. A forked process still shows the environment of who forked it, so it is known by the session that `note` wrote down.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil

MARK = "BL_TRAINER_ARM"  # an arm's folder
NOTE = "session"  # file in it: id of the session of its forked process, and when that began
CLOCK = 2.0  # seconds by which a process's time of beginning may seem to change


def note(folder: str) -> None:
    """Write down that this process, the first of its session, is the arm's."""
    (Path(folder) / NOTE).write_text(f"{os.getpid()} {psutil.Process().create_time()}", encoding="utf-8")


def stop(folder: str) -> list[int]:
    """Kill all processes of an arm except this one, and wait for them. Returns their ids."""
    killed, session = [], _session(folder)
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and (_session_of(process) == session or process.environ().get(MARK) == folder):
                process.kill()
                killed.append(process)
        except (psutil.Error, OSError):  # another user's, or gone by now
            continue
    psutil.wait_procs(killed, timeout=60)
    return [process.pid for process in killed]


def _session(folder: str) -> int:
    """Return the session that was noted, or -1 if its first process's id is another's by now."""
    try:
        leader, began = (Path(folder) / NOTE).read_text(encoding="utf-8").split()
        is_another = abs(psutil.Process(int(leader)).create_time() - float(began)) > CLOCK
    except (OSError, ValueError):
        return -1
    except psutil.NoSuchProcess:  # others of its session may be there: their id is not given away before
        return int(leader)
    return -1 if is_another else int(leader)


def _session_of(process: psutil.Process) -> int | None:
    return os.getsid(process.pid) if hasattr(os, "getsid") else None


def main(argv: list[str]) -> int:
    folder, *command = argv
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    is_left = threading.Event()

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        is_left.set()
        stop(folder)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    code = 1 if (found := child.wait()) < 0 and is_left.is_set() else found
    stop(folder)  # what a launcher that was killed has left behind
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
