"""The core, beside any stack: it imports and works with torch alone, and what needs TRL says what is missing."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import core_alone
from bl_trainer import DependencyError
from bl_trainer._util import requirements

PACKAGE = Path(__file__).parents[1]
# Torch, NumPy, and what torch itself depends on
ALLOWED = (
    "torch", "torchgen", "functorch", "numpy", "filelock", "typing_extensions", "setuptools", "pkg_resources", "sympy",
    "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "triton", "nvidia", "cuda", "bl_trainer",
)  # fmt: skip

ALONE = f"""
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Known(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        root = name.partition(".")[0]
        known = root in sys.stdlib_module_names or root in {ALLOWED!r} or root.startswith("_sysconfigdata")
        return super().find_spec(name, path, target) if known else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Known]
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE, timeout=300,
        env={**os.environ, "PYTHONPATH": str(PACKAGE), **environment}, check=False,
    )  # fmt: skip


NO_METADATA = """
import importlib.metadata

def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = importlib.metadata.requires = missing
"""
USE = f"import runpy\nrunpy.run_path({str(Path(core_alone.__file__))!r}, run_name='__main__')\n"


def test_core_and_adapters_need_torch_alone_and_the_rest_says_what_is_missing():
    missing = ", ".join(f"{name} (not installed)" for name in requirements.STACK)
    starts = [f"Cannot use {name}: it needs {missing}. Run `pip install 'accelerate' " for name in core_alone.NEED_TRL]
    done = run(ALONE + NO_METADATA + USE)
    first, *others = done.stdout.splitlines() or [""]
    assert first == "worked", done.stderr
    assert [line[: len(start)] for line, start in zip(others, starts, strict=True)] == starts


def package(folder, name, version):
    """Lay out an installed package that can't be imported."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise RuntimeError('an old version in a new environment')")
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_core_works_beside_an_old_trl(tmp_path):
    package(tmp_path, "trl", "0.24.0")
    done = run(USE, PYTHONPATH=os.pathsep.join([str(tmp_path), str(PACKAGE)]))
    first, *others = done.stdout.splitlines() or [""]
    assert first == "worked", done.stderr
    for line, name in zip(others, core_alone.NEED_TRL, strict=True):
        assert line == (
            f"Cannot use {name}: it needs trl<2,>=1.15 (0.24.0 is installed). Run `pip install 'trl<2,>=1.15'` in an "
            "environment of its own; objectives and `as_loss` work without them."
        )


def test_a_verb_beside_an_old_trl_is_one_line(tmp_path):
    package(tmp_path, "trl", "2.0.0")
    code = "from bl_trainer.cli import main; main(['train', '--config', 'recipe.yaml'])"
    done = run(code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(PACKAGE)]))
    assert done.returncode == 2
    assert done.stderr.startswith("error: Cannot use bl-trainer train: it needs trl<2,>=1.15 (2.0.0 is installed). Run `pip")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("found", "bound", "fits"),
    [
        ("1.15", ">=1.15,<2", True),
        ("1.15.0", ">=1.15,<2", True),
        ("1.16.0.dev0", "<2,>=1.15", True),
        ("2.13.0+cpu", ">=2.8", True),
        ("2.0.0", "<2,>=1.15", False),
        ("1.9.3", "<2,>=1.15", False),
        ("4.56.1", ">=4.56.2", False),
        ("0.1", "", True),
    ],
)
def test_versions_are_compared_as_numbers(found, bound, fits, monkeypatch):
    monkeypatch.setattr(requirements, "version", lambda name: found)
    monkeypatch.setattr(requirements, "bounds", lambda: dict.fromkeys(requirements.STACK, bound))
    with nullcontext() if fits else pytest.raises(DependencyError, match=f"{re.escape(found)} is installed"):
        with requirements.needs_stack("BLTrainer"):
            pass


def test_a_package_that_an_import_lacks_is_named():
    with pytest.raises(DependencyError, match=r"needs matplotlib>=3.9 \(not installed\). Run `pip install 'matplotlib>=3.9'`"):
        with requirements.needs_stack("diagnose"):
            raise ModuleNotFoundError("No module named 'matplotlib.pyplot'", name="matplotlib.pyplot")
    with pytest.raises(ModuleNotFoundError, match="bl_trainer"), requirements.needs_stack("diagnose"):
        raise ModuleNotFoundError("No module named 'bl_trainer.gone'", name="bl_trainer.gone")


def test_bounds_are_those_of_the_project_file(monkeypatch):
    listed = re.search(r"\ndependencies = \[(.*?)\n\]", (PACKAGE / "pyproject.toml").read_text(), re.DOTALL)[1]
    declared = re.findall(r'"(.*?)"', listed)
    lines = [*declared, "optuna>=5; extra == 'sweep'", 'pytest; extra == "test"']
    monkeypatch.setattr(requirements, "requires", lambda name: lines)
    assert [name + bound for name, bound in requirements.bounds().items()] == declared
    assert {*requirements.STACK} <= requirements.bounds().keys()
    signs = {sign for line in declared for sign in re.findall(r"[<>=!~]+", line)}
    assert signs <= requirements.COMPARISONS.keys()
