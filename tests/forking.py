"""Processes forked after the imports, for tests whose subject is not the start of a process."""

import multiprocessing
import uuid

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
