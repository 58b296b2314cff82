"""The check of a GPU, rehearsed on a CPU: what it finds, and that a part that hangs, dies or is killed costs nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from bl_trainer.objectives.threshold import Threshold

ROOT = Path(__file__).parents[1]
STUBS = """
import os, time
from pathlib import Path

def count(name):
    with open("begun", "a") as file:
        file.write(name + "\\n")

def quick(setting, reporter):
    count("quick")
    reporter.row("first", raw=[1, 2], x=1.5, ours={"x": 1.25, "MB": 3000})
    reporter.row("second", x=2)
    reporter.note("A line below.")

def hangs(setting, reporter):
    time.sleep(600)

def waits(setting, reporter):
    count("waits")
    reporter.row("begun", process=os.getpid())
    while not Path("go").exists():
        time.sleep(0.1)

def raises(setting, reporter):
    reporter.row("before")
    raise ValueError("no such kernel")

def dies(setting, reporter):
    os._exit(3)

def prints(setting, reporter):
    print("much")
    import brought
    reporter.row("brought", x=brought.VALUE)
"""
DRIVER = """
import sys
import gpu_check
if __name__ == "__main__":
    named = dict(each.split("=") for each in sys.argv.pop(1).split(","))
    gpu_check.PARTS = {
        name: gpu_check.Part(name, f"stubs:{name}", float(limit), ("no-such-package",) if name == "lacks" else ())
        for name, limit in named.items()
    }
    gpu_check.main()
"""


def begin(tmp_path, parts, *options):
    (tmp_path / "stubs.py").write_text(STUBS)
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", tmp_path)))}
    command = [sys.executable, "driver.py", parts, "--device", "cpu", "--output", "out", *options]
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(tmp_path, parts, *options):
    driver = begin(tmp_path, parts, *options)
    text, _ = driver.communicate()
    return driver.returncode, text


def found(folder):
    return json.loads((folder / "gpu-check-cpu.json").read_text())


def statuses(folder):
    return {name: part["status"] for name, part in found(folder)["parts"].items()}


def until(condition, process=None):
    """Wait for a condition; on no machine does it take long, but a defect may not hang the suite."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.1)


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_hangs_dies_or_raises_costs_no_other(tmp_path):
    code, text = finish(tmp_path, "quick=600,hangs=1,raises=600,dies=600,lacks=600,unknown=600", "--budget", "520")
    assert code == 1
    parts = found(tmp_path / "out")["parts"]
    assert statuses(tmp_path / "out") == {
        "quick": "done", "hangs": "cut", "raises": "failed", "dies": "failed", "lacks": "absent",
        "unknown": "failed",
    }  # fmt: skip
    assert parts["quick"]["rows"] == [
        {"case": "first", "x": 1.5, "ours": {"x": 1.25, "MB": 3000}, "raw": [1, 2]},
        {"case": "second", "x": 2},
    ]
    assert parts["raises"]["rows"] == [{"case": "before"}]
    assert parts["raises"]["reason"].startswith("ValueError: no such kernel\n")
    assert parts["unknown"]["reason"].startswith("AttributeError: module 'stubs' has no attribute 'unknown'")
    assert "exit code 3" in parts["dies"]["reason"]
    page = (tmp_path / "out" / "gpu-check-cpu.md").read_text()
    for line in (
        "| case | x | ours |", "| first | 1.5 | 1.25 x, 3000 MB |", "| second | 2 | - |", "A line below.",
        "Cut: it took more than its 1 s.", "Failed: ValueError: no such kernel.", "Absent: it needs no-such-package.",
    ):  # fmt: skip
        assert line in page
    assert "no-such-package" in page.split("Absent, and left out: ")[1].splitlines()[0]
    assert page in text


def test_a_killed_run_leaves_its_figures_and_goes_on(tmp_path):
    driver = begin(tmp_path, "quick=600,waits=600,raises=600")
    out = tmp_path / "out" / "gpu-check-cpu.json"
    until(lambda: out.exists() and found(out.parent)["parts"].get("waits", {}).get("rows"), driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert statuses(out.parent) == {"quick": "done", "waits": "running"}
    (row,) = found(out.parent)["parts"]["waits"]["rows"]
    until(lambda: not is_alive(row["process"]))  # it doesn't hold the device
    assert "Running: the run was cut here." in (out.parent / "gpu-check-cpu.md").read_text()
    (tmp_path / "go").touch()
    assert finish(tmp_path, "quick=600,waits=600,raises=600")[0] == 1
    assert statuses(out.parent) == {"quick": "done", "waits": "done", "raises": "failed"}
    assert len(found(out.parent)["parts"]["waits"]["rows"]) == 1
    assert (tmp_path / "begun").read_text().split() == ["quick", "waits", "waits"]
    code, text = finish(tmp_path, "quick=600,waits=600")
    assert "Nothing to do" in text
    before = out.read_text()
    code, text = finish(tmp_path, "quick=600", "--small")
    assert code == 1
    assert "Cannot continue out/gpu-check-cpu.json: it was measured with other code or options. Remove it" in text
    assert out.read_text() == before


def test_short_of_time_rounds_are_fewer_and_the_last_parts_are_dropped(tmp_path):
    code, _ = finish(tmp_path, "quick=100,hangs=600", "--budget", "130")
    assert code == 0
    assert found(tmp_path / "out")["setting"]["rounds"] == 2
    assert statuses(tmp_path / "out") == {"quick": "done", "hangs": "dropped"}
    assert "Dropped: " in (tmp_path / "out" / "gpu-check-cpu.md").read_text()


def test_wheels_are_brought_along(tmp_path):
    code, text = finish(tmp_path, "prints=600", "--wheels", "wheels")
    assert code == 1
    assert "Cannot install wheels: wheels has none. Name a folder with *.whl files." in text
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "brought-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "VALUE = 7\n")
        wheel.writestr("brought-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1\n")
        wheel.writestr("brought-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("brought-1.dist-info/RECORD", "")
    code, text = finish(tmp_path, "prints=600", "--wheels", "wheels")
    assert code == 0, text
    assert found(tmp_path / "out")["parts"]["prints"]["rows"] == [{"case": "brought", "x": 7}]
    assert (tmp_path / "out" / "gpu-check-cpu.log").read_text() == "much\n"
    (tmp_path / "wheels" / "brought-2-py3-none-any.whl").write_bytes(b"no wheel")
    code, text = finish(tmp_path, "prints=600", "--wheels", "wheels")
    assert code == 1
    assert "Cannot install the wheels of wheels: see pip's error above." in text


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = finish(tmp_path, "quick=600", "--device", "cuda")
    assert code == 1
    assert "Cannot find an NVIDIA GPU: nvidia-smi fails. Rehearse with `--device cpu --small`." in text


COLUMNS = {
    "correctness": {"way", "cases", "log p", "in hidden", "in weight", "in bias", "wrong"},
    "head": {"products", "ours", "TRL", "full logits"},
    "sweep": {"x products", "MB"},
    "profile": {"calls", "ms", "%"},
    "step": {"s", "x TRL nll", "tokens/s", "MB", "MB x TRL nll"},
    "others": set(),
    "accuracy": {"ours", "TRL", "full logits"},
    "diagnosis": {"s", "x forward pass", "MB"},
    "qlora": {"steps", "first", "last"},
    "run": {"steps", "first", "last"},
}
ROWS = {
    "correctness": 19,
    "head": 16,
    "sweep": 12,
    "step": 10,
    "others": 0,
    "accuracy": 6,
    "diagnosis": 6,
    "qlora": 3,
    "run": 3,
}


def test_rehearsal(tmp_path):
    """All parts on a CPU, with tiny shapes; the limits leave time for a machine that is busy."""
    command = [
        sys.executable,
        "benchmarks/gpu_check.py",
        "--device",
        "cpu",
        "--small",
        "--budget",
        "100000",
        "--output",
        tmp_path,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # which is slow
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    content = found(tmp_path)
    lacks = "bitsandbytes" in content["absent"]
    assert statuses(tmp_path) == {name: "absent" if name == "qlora" and lacks else "done" for name in COLUMNS}, content
    assert done.returncode == 0, done.stderr
    assert content["versions"]["torch"] == torch.__version__
    for name, part in content["parts"].items():
        if part["status"] == "done":
            assert len(part["rows"]) == ROWS.get(name, len(part["rows"]))
            assert set().union(*part["rows"]) >= COLUMNS[name], name
    assert all(row["wrong"] == 0 for row in content["parts"]["correctness"]["rows"])
    assert all(row["last"] < row["first"] for row in content["parts"]["run"]["rows"])


@pytest.fixture
def correctness(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_correctness

    some = [case for case in gpu_correctness.cases(True) if case.dtype == torch.float32 and case.vocabulary == 1029]
    monkeypatch.setattr(gpu_correctness, "cases", lambda small: some)
    return gpu_correctness


class Rows:
    """Takes the rows of a part."""

    def __init__(self):
        self.rows = []

    def row(self, case, **cells):
        self.rows.append({"case": case, **cells})


def check(correctness):
    from gpu_check import Setting

    rows = Rows()
    correctness.check(Setting("cpu", True, 2), rows)
    return rows.rows


def test_correctness_holds(correctness):
    assert sum(row["cases"] for row in check(correctness)) > 20


def broken_price(correctness):
    price = correctness.price
    return "price", lambda *args: price(*args)._replace(weight=1.001 * price(*args).weight)


def broken_threshold(correctness):
    price = correctness.price
    return "price", lambda objective, threshold, known: price(objective, Threshold(), known)


def broken_head(correctness):
    head = correctness.objective_head
    return "objective_head", lambda hidden, parts, *rest: head(hidden, parts._replace(scale=1.0), *rest)


def failing_head(correctness):
    def fail(*args):
        raise RuntimeError("no kernel image")

    return "objective_head", fail


@pytest.mark.parametrize("breaks", [broken_price, broken_threshold, broken_head, failing_head])
def test_correctness_fails_where_a_kernel_is_wrong(breaks, correctness, monkeypatch):
    monkeypatch.setattr(correctness, *breaks(correctness))
    with pytest.raises(AssertionError, match=r"\d+ cases are wrong: .*(Errors|no kernel image)"):
        check(correctness)
