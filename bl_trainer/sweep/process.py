"""Processes of a sweep's runs: forked after the imports where that works, else new ones under a guard."""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from . import guard

LAUNCHER = "accelerate.commands.launch"
IMPORTS = "bl_trainer.sweep.imports"


class Running(Protocol):
    """A command that is running, with its output in a log, and that ends when the sweep does."""

    def poll(self) -> int | None:
        """Return the exit code, above 128 or below 0 if a signal ended it; None while it runs."""

    def stop(self) -> None:
        """End it and all that it has started, without waiting."""

    def wait(self) -> None:
        """Wait for its end."""


Start = Callable[[str, list[str], dict[str, str], Path], Running]  # arm's folder, command, environment, log


class Guarded:
    """A command in a new process, under a guard."""

    def __init__(self, folder: str, command: list[str], environment: dict[str, str], log: Path):
        with log.open("ab") as output:
            self.guard = subprocess.Popen(
                [sys.executable, guard.__file__, folder, *command],
                stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True,
            )  # fmt: skip

    def poll(self) -> int | None:
        return self.guard.poll()

    def stop(self) -> None:
        if self.guard.stdin is not None:
            self.guard.stdin.close()

    def wait(self) -> None:
        self.guard.wait()


class Forked:
    """A command of Python's, run by a process that the server has forked after the imports."""

    def __init__(self, folder: str, command: list[str], environment: dict[str, str], log: Path):
        self.folder = folder
        self.process = _server().Process(target=_begin, args=(folder, command, environment, str(log.absolute())))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def stop(self) -> None:
        if self.poll() is None:
            guard.stop(self.folder)
            self.process.kill()

    def wait(self) -> None:
        self.process.join()


def starter(folder: Path, needs_gpu: bool, modules: list[str]) -> Start:
    """Return how runs are to be started: forked if that works here, which a first fork tells, else as new processes.

    `modules`: what to import beforehand, besides what all runs need.
    """
    if sys.platform != "linux":
        return Guarded
    _server().set_forkserver_preload([IMPORTS, *modules])
    log = folder / "fork.log"
    trial = _server().Process(target=_try, args=(needs_gpu, str(log)))
    with contextlib.suppress(EOFError, OSError):  # from a server that the imports have ended
        trial.start()
        trial.join()
        if trial.exitcode == 0:
            return Forked
    print(f"Runs start as new processes, which takes longer: a forked one failed ({log}).", flush=True)
    return Guarded


def _server() -> Any:
    return multiprocessing.get_context("forkserver")


def _try(needs_gpu: bool, log: str) -> None:
    """Raise in a forked process if forks of its kind can't train."""
    _redirect(log)
    if IMPORTS not in sys.modules:
        __import__(IMPORTS)  # which says why
    if threading.active_count() > 1:
        raise RuntimeError(f"the imports have started threads: {threading.enumerate()}")
    import torch

    if needs_gpu:
        torch.zeros(1, device="cuda")


def _begin(folder: str, command: list[str], environment: dict[str, str], log: str) -> None:
    """Do in this process, which was forked, what a command does in a new one."""
    os.setsid()
    guard.note(folder)
    threading.Thread(target=_end_with_sweep, args=(folder,), daemon=True).start()
    _redirect(log)
    try:
        run_as_main(command, environment)
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves without


def _end_with_sweep(folder: str) -> None:
    """End this process and all that it has started when the sweep has ended, however that came."""
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        multiprocessing.connection.wait([sweep.sentinel])
        guard.stop(folder)
        os._exit(1)


def _redirect(log: str) -> None:
    """Have all output go to the end of a file, a line at a time."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def run_as_main(command: list[str], environment: dict[str, str]) -> None:
    """Do what `python -m MODULE ...` or `python FILE ...` does in an environment.

    What accelerate would launch as a single new process runs in this one.
    """
    os.environ.clear()
    os.environ.update(environment)
    _, first, *rest = command
    if first != "-m":
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
    elif rest[0] == LAUNCHER:
        from .._util.accelerate import launch_here

        launch_here(rest, run_as_main)
    else:
        _take_threads()
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)


def _take_threads() -> None:
    """Have torch take as many threads as the environment says, which it has read before."""
    import torch

    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
