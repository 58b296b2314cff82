"""Install the package beside each stack as the docs say, in fresh environments, and use it: `python install.py STACKS`.

STACKS is the folder of the stacks' environments. A fresh environment has this package alone, and sees a stack's packages. The
losses and adapters must work there. What needs TRL must work, or say in a sentence which package is missing or too old.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = "import importlib.metadata as m; print(*[d.version for d in m.distributions() if d.name == 'trl'])"
OWN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def output_of(*command: object, fails: int = 0) -> list[str]:
    """Return the lines that a command prints, of its errors where it must fail. Raises AssertionError on another exit code."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env=OWN, check=False)
    assert done.returncode == fails, (command, done.returncode, done.stderr)
    return (done.stderr if fails else done.stdout).splitlines()


def install(stack: Path, fresh: Path) -> Path:
    """Make a fresh environment beside that of a stack, with this package; return its programs."""
    output_of(stack / "bin/python", "-m", "venv", "--clear", fresh)
    theirs, own = (
        Path(output_of(where / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")[0])
        for where in (stack, fresh)
    )
    (own / "stack.pth").write_text(f"{theirs}\n", encoding="utf-8")
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # pip would install modules that are there no longer
    output_of(fresh / "bin/python", "-m", "pip", "install", "--no-deps", ".")
    return fresh / "bin"


def check(stack: Path, fresh: Path) -> str:
    """Return what works beside a stack, and what is said of the rest."""
    programs = install(stack, fresh)
    trl = "".join(output_of(programs / "python", "-c", VERSION))
    worked, *sentences = output_of(programs / "python", "-I", ROOT / "tests/core_alone.py")
    assert worked == "worked", worked
    assert all(line.startswith("Cannot use ") for line in sentences), sentences
    state = f"({trl} is installed)" if trl else "(not installed)"
    is_old = not trl or tuple(map(int, trl.split(".")[:2])) < (1, 15)
    assert sentences or not is_old
    assert all(f"trl<2,>=1.15 {state}" in line for line in sentences if is_old), sentences
    verb = output_of(programs / "bl-trainer", "train", "--config", "no-recipe.yaml", fails=2)[-1]
    assert verb.startswith("error: Cannot use bl-trainer train: it needs " if sentences else "error: "), verb
    said = sentences[0] if sentences else "BLTrainer works"
    return f"install beside {stack.name}, {f'trl {trl}' if trl else 'no trl'}: losses and adapters work. {said}"


if __name__ == "__main__":
    stacks = Path(sys.argv[1]).resolve()
    for found in sorted(stacks.glob("*/installed")):
        print(check(found.parent, stacks / "work" / "install" / found.parent.name), flush=True)
