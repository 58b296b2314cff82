"""Everything that is asked of a GPU, in under nine minutes: `PYTHONPATH=. python benchmarks/gpu_check.py --help`.

Each part runs in a process of its own, for a limited time. Its figures are written to gpu-check-DEVICE.json and
gpu-check-DEVICE.md as they come, and stay there if the run is cut. The same command then runs the missing parts. This process
imports little. The next part imports what it needs while the one before still measures.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bl_trainer._util.files import write_text

BUDGET = 520  # seconds: what is left of nine minutes is for the start, and for wheels
ROUNDS = 7
REQUIRED = ("torch", "transformers", "accelerate", "datasets", "peft", "trl")
OPTIONAL = ("triton", "bitsandbytes", "liger-kernel", "quack-kernels", "cut-cross-entropy")


@dataclass(frozen=True)
class Part:
    """`function`: module:function, called with a `Setting` and a `Reporter`. `seconds`: its limit. `needs`: packages."""

    title: str
    function: str
    seconds: float
    needs: tuple[str, ...] = REQUIRED


# The most valuable first: the last are dropped where time is short
PARTS = {
    "correctness": Part("Errors against full logits in float64", "gpu_correctness:check", 120),
    "head": Part("The loss head, forward and backward", "gpu_parts:head", 160),
    "sweep": Part("Columns at a time of the kernels, rows at a time of the weight's gradient", "gpu_parts:sweep", 40),
    "profile": Part("One call of the loss head", "gpu_parts:profile", 30),
    "step": Part("A training step", "gpu_parts:steps", 80),
    "others": Part("Heads that compile for long", "gpu_parts:others", 60),
    "accuracy": Part("Relative errors of the gradients in half precision", "gpu_parts:accuracy", 30),
    "diagnosis": Part("Diagnosis of a batch", "gpu_parts:diagnosis", 40),
    "qlora": Part("QLoRA", "gpu_parts:qlora", 60, (*REQUIRED, "bitsandbytes")),
    "run": Part("A run from random weights: NLL of the first and the last tenth", "gpu_parts:run", 100),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What the parts measure."""

    device: str
    small: bool
    rounds: int
    checkpoint: str | None = None


class Reporter:
    """Sends what a part finds, and ends its process when nobody listens any more."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def row(self, case: str, raw: Any = None, **cells: Any) -> None:
        """Add a row of the part's table: numbers, text, or {unit: number}; `raw` goes to the JSON alone."""
        self.connection.send(("row", {"case": case, **cells, **({} if raw is None else {"raw": raw})}))

    def note(self, text: str) -> None:
        """Add a line below the part's table."""
        self.connection.send(("note", text))

    def wait(self) -> None:
        """Wait for the word to begin."""
        self._hear()
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        try:
            self.connection.recv()
        except (EOFError, OSError):  # the driver is gone, or has no use for this part
            os._exit(1)


def work(part: Part, setting: Setting, log: Path, connection: Connection) -> None:
    """Import a part, wait for the word to begin, and run it. What it prints goes to the file `log`."""
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    reporter = Reporter(connection)
    module, name = part.function.split(":")
    try:
        function = getattr(import_module(module), name)
        reporter.wait()
        function(setting, reporter)
        connection.send(("done", ""))
    except BaseException as error:
        trace = traceback.format_exc().strip().splitlines()
        connection.send(("failed", "\n".join([f"{type(error).__name__}: {error}", *trace[-12:]])))


class Worker:
    """A part's process."""

    def __init__(self, part: Part, setting: Setting, log: Path):
        # A process that has used CUDA can't be forked
        context: Any = multiprocessing.get_context("forkserver" if setting.device == "cpu" else "spawn")
        context.set_forkserver_preload(sorted({each.function.split(":")[0] for each in PARTS.values()}))
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(part, setting, log, theirs))
        self.process.start()
        theirs.close()

    def follow(self, seconds: float, add: Callable[[str, Any], None]) -> tuple[str, str]:
        """Let it begin, hand on what it finds, and return how it ended: done, failed or cut, and why."""
        end = time.monotonic() + seconds
        try:
            with suppress(OSError):  # it may have failed already, and said why
                self.connection.send("begin")
            while self.connection.poll(max(0.0, end - time.monotonic())) and time.monotonic() < end:
                kind, content = self.connection.recv()
                if kind in ("done", "failed"):
                    self.process.join(5)
                    return kind, content
                add(kind, content)
        except (EOFError, OSError):
            self.process.join(10)
            return "failed", f"its process ended with exit code {self.process.exitcode}"
        finally:
            self.stop()
        return "cut", f"it took more than its {seconds:.0f} s"

    def stop(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.connection.close()


class Record:
    """What has been found, on disk at any time."""

    def __init__(self, folder: Path, setting: Setting, surroundings: dict[str, Any]):
        self.json, self.markdown, self.log = (folder / f"gpu-check-{setting.device}.{end}" for end in ("json", "md", "log"))
        self.content: dict[str, Any] = {"setting": asdict(setting), "code": _code(), **surroundings, "parts": {}}
        if self.json.exists():
            before = json.loads(self.json.read_text())
            asked = {key: value for key, value in before["setting"].items() if key != "rounds"}
            if before["code"] != self.content["code"] or not asked.items() <= self.content["setting"].items():
                raise SystemExit(
                    f"Cannot continue {self.json}: it was measured with other code or options. Remove it, or choose another "
                    "--output."
                )
            self.content["parts"] = before["parts"]

    def has(self, name: str) -> bool:
        """Return whether a part is done."""
        return self.content["parts"].get(name, {}).get("status") == "done"

    def set(self, name: str, status: str, reason: str = "", seconds: float = 0.0) -> None:
        """Say how a part stands: running, done, failed, cut, dropped or absent."""
        parts = self.content["parts"]
        before = parts.get(name) if status != "running" else None
        parts[name] = (before or {"rows": [], "notes": []}) | {"status": status, "reason": reason, "seconds": round(seconds, 1)}
        self.write()

    def add(self, name: str, kind: str, content: Any) -> None:
        self.content["parts"][name][f"{kind}s"].append(content)
        self.write()

    def write(self) -> None:
        write_text(self.json, json.dumps(self.content, indent=1) + "\n")
        write_text(self.markdown, "\n".join(self.page()) + "\n")

    def page(self) -> list[str]:
        """Return the lines of the Markdown page."""
        versions = ", ".join(f"{name} {found}" for name, found in self.content["versions"].items())
        rounds = self.content["setting"]["rounds"]
        lines = [
            f"{self.content['where']}; {versions}, Python {platform.python_version()}. Times are medians of {rounds} rounds."
        ]
        if self.content["setting"]["small"]:
            lines += ["", "A rehearsal with tiny shapes: its times say nothing."]
        if self.content["absent"]:
            lines += ["", f"Absent, and left out: {', '.join(self.content['absent'])}."]
        for name in PARTS:
            if name in self.content["parts"]:
                lines += ["", *_table(PARTS[name].title, self.content["parts"][name])]
        return lines


def _table(title: str, part: dict[str, Any]) -> list[str]:
    lines, rows = [f"**{title}**", ""], part["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "raw"))
    if rows:
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_spell(row.get(key, "-")) for key in columns) + " |" for row in rows] + [""]
    if part["status"] != "done":
        first = part["reason"].splitlines()[0] if part["reason"] else "the run was cut here"
        lines += [f"{part['status'].capitalize()}: {first}."]
    lines += part["notes"]
    return lines if lines[-1] else lines[:-1]


def _spell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_spell(each)} {unit}" for unit, each in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _code() -> str:
    """Return a fingerprint of what is measured and what measures."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *(here.parent / "bl_trainer").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _install(wheels: Path, target: str) -> None:
    """Install the wheels of a folder, and nothing else, where this process and its parts find them first."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"Cannot install wheels: {wheels} has none. Name a folder with *.whl files.")
    how = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", target]
    if subprocess.run([sys.executable, "-m", "pip", "install", *how, *files], check=False).returncode:
        raise SystemExit(f"Cannot install the wheels of {wheels}: see pip's error above. Keep one wheel of each package.")
    _look_into(target)


def _look_into(folder: str) -> None:
    """Let this process and its parts import from a folder."""
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def _surroundings(device: str) -> dict[str, Any]:
    """Return the device's name, the versions of packages, and which are absent."""
    where = f"{platform.machine()}, {os.cpu_count()} cores"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            where = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip().splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            raise SystemExit("Cannot find an NVIDIA GPU: nvidia-smi fails. Rehearse with `--device cpu --small`.") from error
    versions: dict[str, str | None] = {}
    for name in dict.fromkeys([*REQUIRED, *OPTIONAL, *(each for part in PARTS.values() for each in part.needs)]):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    known = {name: found for name, found in versions.items() if found is not None}
    return {"where": where, "versions": known, "absent": [name for name in versions if name not in known]}


def check(options: argparse.Namespace, begun: float) -> int:
    """Run the parts that are missing, and return how many went wrong. The budget counts from `begun`."""
    share = options.budget / BUDGET
    rounds = 2 if options.small else max(2, round(ROUNDS * min(1.0, share)))
    setting = Setting(options.device, options.small, rounds, options.checkpoint)
    options.output.mkdir(parents=True, exist_ok=True)
    record = Record(options.output, setting, _surroundings(options.device))
    todo = []
    for name in options.part or PARTS:
        lacking = [package for package in PARTS[name].needs if package in record.content["absent"]]
        if lacking:
            record.set(name, "absent", f"it needs {', '.join(lacking)}")
        elif not record.has(name):
            todo.append(name)
    waiting: Worker | None = None
    for name, following in zip(todo, [*todo[1:], ""], strict=False):
        worker = waiting or Worker(PARTS[name], setting, record.log)
        waiting = Worker(PARTS[following], setting, record.log) if following else None
        left, start = options.budget - (time.monotonic() - begun), time.monotonic()
        limit = min(left, PARTS[name].seconds * max(1.0, share))
        if left < PARTS[name].seconds / 4:
            worker.stop()
            record.set(name, "dropped", f"{max(0, left):.0f} s were left of the {options.budget:.0f} s for all parts")
            continue
        print(f"{name} ...", flush=True)
        record.set(name, "running")
        how, why = worker.follow(limit, partial(record.add, name))
        record.set(name, how, why, time.monotonic() - start)
        print(f"{name}: {how} after {time.monotonic() - start:.0f} s {why}", flush=True)
    print(record.markdown.read_text() if todo else f"Nothing to do: {record.json} has all parts.")
    return sum(part["status"] in ("failed", "cut") for part in record.content["parts"].values())


def main() -> None:
    """Read the options, and run."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: a rehearsal, whose times say nothing")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds for all parts: fewer rounds, and the last dropped"
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="this part only; may be given several times")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install, for a machine without network")
    parser.add_argument("--checkpoint", help="a pretrained model for the part accuracy, in place of random weights")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    # Nothing may wait for a network that isn't there; one device, or trainers would share the batch out
    for key, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0"}.items():
        os.environ.setdefault(key, value)
    _look_into(str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as target:
        if options.wheels:
            _install(options.wheels, target)
        sys.exit(1 if check(options, begun) else 0)


if __name__ == "__main__":
    main()
