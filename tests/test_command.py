"""The command `bl-trainer`: what it costs to import, its help, and the verbs from a wheel in an empty folder."""

import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import bl_trainer
from bl_trainer._util.logs import quieten
from bl_trainer.cli import VERBS, main
from bl_trainer.recipe import DATACLASSES
from bl_trainer.recipe.help import USAGE
from conftest import write_recipe
from preparing import write_source

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "scipy", "trl", "transformers", "datasets", "accelerate", "peft", "matplotlib", "yaml")


def run(*command, **options):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT, **options)


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import bl_trainer", set()),
        ("import bl_trainer.cli", set()),
        ("from bl_trainer.cli import main; main(['--help'])", set()),
        ("from bl_trainer.cli import main; main(['train', '--help'])", set()),
        ("from bl_trainer import RecipeError, __version__", set()),
        ("from bl_trainer import Objective, Threshold; Objective.parse('neg_p'); Threshold.parse(0.2)", {"torch", "numpy"}),
        ("import bl_trainer.objectives", {"torch", "numpy"}),
        ("import bl_trainer.head; from bl_trainer import as_loss, fused_objective, per_token", {"torch", "numpy"}),
    ],
)
def test_what_an_import_loads(code, loaded):
    """Modules instead of seconds: those are another machine's."""
    done = run(
        "-c", f"{code}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules], sep='\\n', file=sys.stderr)"
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.split()) <= loaded


def test_public_names_come_when_they_are_asked_for():
    assert {*bl_trainer.__all__} <= {*dir(bl_trainer)}
    for name in bl_trainer.__all__:
        assert getattr(bl_trainer, name) is not None
    for name in ("CheckpointError", "DependencyError", "LossError", "MeasurementError", "RecipeError"):
        assert issubclass(getattr(bl_trainer, name), bl_trainer.BLError)
    assert issubclass(bl_trainer.BLError, ValueError)
    with pytest.raises(AttributeError, match="has no attribute 'BLTrianer'"):
        bl_trainer.BLTrianer  # noqa: B018


def test_help_names_every_verb_with_an_example(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    for verb, summary in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(summary)}$", said, re.M)
        assert f"bl-trainer {verb} " in said
    assert max(map(len, said.splitlines())) < 100


def test_version_is_in_one_place(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"bl-trainer {bl_trainer.__version__}\n"
    assert "version = " not in (ROOT / "pyproject.toml").read_text().split("[project]")[1].split("[project.scripts]")[0]


@pytest.mark.parametrize(("argv", "advice"), [(["trian"], "Did you mean 'train'?"), ([], "no verb."), (["--helo"], "'--helo'")])
def test_a_wrong_verb_is_told_before_torch_loads(argv, advice, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert advice in said
    assert all(verb in said for verb in VERBS)


def help_of(verb, capsys):
    main([verb, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_begins_with_what_it_needs(verb, capsys):
    said = help_of(verb, capsys)
    assert said.startswith(f"usage: bl-trainer {verb} {USAGE[verb]}\n")
    options = re.findall(r"^  --(\w+)", said, re.M)
    assert len(options) == len({*options}), "an option is listed twice"
    required = re.findall(r"--(\w+) [A-Z]+", re.sub(r"\[.*?\]", "", USAGE[verb]))
    assert options[: len(required)] == required


@pytest.mark.parametrize("verb", ["train", "diagnose", "sweep"])
def test_help_lists_every_recipe_key_and_ours_first(verb, capsys):
    said = help_of(verb, capsys)
    keys = re.findall(r"^  --(\w+)", said, re.M)
    assert {field.name for each in DATACLASSES for field in fields(each)} <= {*keys}
    titles = re.findall(r"^(\w.*):$", said, re.M)
    assert titles == [
        "Required", "Options", "Objective", "Model", "Data", "LoRA and quantisation", "Evaluation", "Training",
        "Logging and saving", "Several devices, and the rest",
    ]  # fmt: skip
    ours = re.search(r"^Objective:\n(.*?)\n\n", said, re.M | re.S)[1]
    assert re.findall(r"^  --(\w+)", ours, re.M) == ["objective", "threshold", "loss_head", "stop_on_nan"]
    assert not re.search(r"^  --(\w+) \1", said, re.M | re.I), "an option's name is repeated for its value"
    assert said.index("--objective") < 3000


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "bl_trainer", folder / "source/bl_trainer", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    build = run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder / "source")
    assert build.returncode == 0, build.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_holds_all_files(wheel):
    package = ROOT / "bl_trainer"
    wanted = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("bl_trainer/")}
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        assert f"\nVersion: {bl_trainer.__version__}\n" in archive.read(metadata).decode()
    assert packed == wanted


def test_every_verb_runs_from_the_wheel_in_an_empty_folder(wheel, checkpoint, data_folder, tmp_path):
    """In one process, since the libraries take seconds to import."""
    pytest.importorskip("optuna")
    home, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    installed = run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", home, wheel)
    assert installed.returncode == 0, installed.stderr
    source = write_source(tmp_path / "source", "openbookqa")
    recipe = write_recipe(tmp_path, checkpoint, data_folder, output_dir="out", max_steps=1)
    code = f"""
import bl_trainer, pathlib, sys
from bl_trainer._util.logs import quieten
from bl_trainer.cli import VERBS, main
assert pathlib.Path(bl_trainer.__file__).is_relative_to({str(home)!r}), bl_trainer.__file__
for verb in VERBS:
    main([verb, "--help"])
main(["prepare-data", "openbookqa", "--output", "data", "--source", {str(source)!r}])
main(["diagnose", "--config", {str(recipe)!r}, "--report", "report"])
"""
    environment = {"PYTHONPATH": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    options = {"capture_output": True, "text": True, "check": False, "cwd": empty, "env": environment}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: bl-trainer {verb} " in done.stdout for verb in VERBS)
    assert {path.name for path in empty.iterdir()} == {"data", "report"}
    assert "<style>" in (empty / "report/report.html").read_text(encoding="utf-8")
    script = subprocess.run([home / "bin/bl-trainer", "--version"], **options)
    assert script.stdout == f"bl-trainer {bl_trainer.__version__}\n", script.stderr


def test_messages_that_tell_nothing_are_kept_back():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quieten()
        list(DataLoader([0, 1], pin_memory=True))
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]
