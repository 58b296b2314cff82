"""Processes forked after the imports, for tests whose subject is not the start of a process."""

import multiprocessing
import os
import runpy
import socket
import sys
import time
import uuid
from contextlib import suppress
from unittest import mock

import torch
from accelerate.commands.launch import launch_command, launch_command_parser

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])  # found from the repository's root; elsewhere each process imports for itself


class Forked:
    """A process that runs `target(log, *args)`, with what tests ask of a `Popen`; its output goes to the file `log`."""

    def __init__(self, target, folder, *args):
        self.log = folder / f"{uuid.uuid4().hex}.log"
        self.process = SERVER.Process(target=target, args=(self.log, *args))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=120):
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it hangs"
        return None, self.log.read_text() if self.log.exists() else ""


def write_to(log):
    """Send all that this process and its libraries print to a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(int(os.environ.get("BL_TEST_THREADS", 1)))
    sys.stdout.reconfigure(line_buffering=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Started(Exception):
    """Raised in place of starting processes."""


def launching(*words):
    """Run `accelerate launch` up to the start of its processes; returns its arguments, and the environment that they get."""
    args, seen = launch_command_parser().parse_args([*map(str, words)]), {}

    def started(command, env=None):
        seen.update(os.environ if env is None else env)
        raise Started

    popen = "accelerate.commands.launch.subprocess.Popen"
    with mock.patch.dict(os.environ), mock.patch("torch.distributed.run.run", started), mock.patch(popen, started):
        with suppress(Started):
            launch_command(args)
    assert seen, "nothing was started"
    return args, seen


def ranks(folder, target, *args, each=None, processes=2, nodes=1, environment=(), cwd=None):
    """Run `target(*args)` on forked ranks that are told what torchrun tells its own. `each`: a further argument for each.

    As under torchrun, the others of a node get a SIGTERM where one fails. `processes`: None for one without a launcher.
    Returns the exit codes and the outputs, rank by rank.
    """
    here = (processes or 1) // nodes
    sizes = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here, "GROUP_WORLD_SIZE": nodes, "ROLE_WORLD_SIZE": processes}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    started = []
    for rank in range(processes or 1):
        own = {"RANK": rank, "LOCAL_RANK": rank % here, "GROUP_RANK": rank // here, "ROLE_RANK": rank, **sizes, **meeting}
        told = {**dict(environment), **(own if processes else {}), "CUDA_VISIBLE_DEVICES": ""}
        told = {key: str(value) for key, value in told.items()}
        started.append(Forked(run_rank, folder, told, cwd, target, *args, *([] if each is None else [each[rank]])))
    _wait(started, here)
    return [rank.returncode for rank in started], [rank.communicate()[1] for rank in started]


def run_rank(log, environment, cwd, target, *args):
    os.environ.update(environment)
    write_to(log)
    if cwd is not None:
        os.chdir(cwd)
    target(*args)


def _wait(started, here, limit=900):
    deadline = time.monotonic() + limit
    while any(each.poll() is None for each in started) and time.monotonic() < deadline:
        time.sleep(0.05)
        for node in (started[i : i + here] for i in range(0, len(started), here)):
            if any(each.poll() for each in node):
                time.sleep(0.1)
                for each in node:
                    each.process.terminate()
    hung = [each for each in started if each.poll() is None]
    for each in hung:
        each.kill()
    assert not hung, "they hang:\n" + "\n".join(each.log.read_text()[-2000:] for each in hung)


def run_script(path, *argv):
    """Run a script in this process, as its command line would."""
    sys.argv = [str(path), *map(str, argv)]
    runpy.run_path(str(path), run_name="__main__")
