"""Runs a command that must not outlive the sweep that started it; standard library and psutil alone, to start at once.

    python guard.py FOLDER COMMAND ...

Its stdin is a pipe whose other end only the sweep holds, so that it ends when the sweep does, however that comes.
The command and all that it starts are known by `MARK` in their environment, since launchers give their processes sessions of
their own.
"""

import os
import subprocess
import sys
import threading

import psutil

MARK = "BL_TRAINER_ARM"  # an arm's folder


def stop(folder: str) -> list[int]:
    """Kill all processes of an arm except this one, and wait for them. Returns their ids."""
    killed = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == folder:
                process.kill()
                killed.append(process)
        except psutil.Error:  # another user's, or gone by now
            continue
    psutil.wait_procs(killed, timeout=60)
    return [process.pid for process in killed]


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
