"""What users rely on, frozen in api.json: names, signatures, recipe keys, options and the report's keys.

After a change that is meant, `UPDATE_API=1 pytest tests/test_api.py` writes the file anew; its diff belongs into CHANGELOG.md.
"""

import inspect
import json
import os
import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
from trl import SFTConfig

import bl_trainer
from bl_trainer import BLConfig
from bl_trainer.cells.verb import ScoreArguments
from bl_trainer.diagnosis import DiagnoseArguments
from bl_trainer.errors import RecipeError
from bl_trainer.evaluation import EvaluateArguments
from bl_trainer.prepare import PrepareArguments
from bl_trainer.sweep.verb import SweepArguments
from bl_trainer.training.merge import MergeArguments
from conftest import write_recipe

FILE = Path(__file__).with_name("api.json")
ROOMS = ("", ".objectives", ".head", ".losses", ".measurement", ".recipe", ".diagnosis")
TRLS = ("BLConfig", "BLTrainer")  # whose other parameters and methods are TRL's


def signature(thing):
    """Parameters with their defaults, without types, which each Python spells otherwise."""
    found = inspect.signature(thing).parameters.values()
    text = str(inspect.Signature([p.replace(annotation=p.empty) for p in found if p.name != "self"]))
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)


def described(thing):
    if not inspect.isclass(thing):
        return signature(thing) if callable(thing) else type(thing).__name__
    if thing.__name__ in TRLS or issubclass(thing, Exception):
        return [base.__name__ for base in thing.__mro__[1:3]]
    own = {name for base in thing.__mro__ if base.__module__.startswith("bl_trainer") for name in vars(base)}
    own |= {field.name for field in fields(thing)} if is_dataclass(thing) else {*getattr(thing, "_fields", ())}
    members = {}
    for name in sorted(name for name in own if not name.startswith("_")):
        member = getattr(thing, name, None)
        members[name] = signature(member) if callable(member) else "value"
    return {"()": signature(thing), **members}


def api():
    rooms = {f"bl_trainer{room}": import_module(f"bl_trainer{room}") for room in ROOMS}
    options = {
        "diagnose": DiagnoseArguments,
        "evaluate": EvaluateArguments,
        "merge": MergeArguments,
        "prepare-data": PrepareArguments,
        "score": ScoreArguments,
        "sweep": SweepArguments,
    }
    return {
        "names": {
            room: {name: described(getattr(module, name)) for name in sorted(module.__all__)} for room, module in rooms.items()
        },
        "recipe keys": sorted({field.name for field in fields(BLConfig)} - {field.name for field in fields(SFTConfig)}),
        "options": {verb: sorted(field.name for field in fields(each)) for verb, each in sorted(options.items())},
    }


def check(key, found):
    frozen = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if os.environ.get("UPDATE_API"):
        FILE.write_text(json.dumps({**frozen, key: found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        assert found == frozen[key]


@pytest.mark.parametrize("part", ["names", "recipe keys", "options"])
def test_api_is_frozen(part):
    check(part, json.loads(json.dumps(api()[part])))


def test_diagnose_returns_the_report_that_the_verb_writes(checkpoint, data_folder, tmp_path):
    path = write_recipe(tmp_path, checkpoint, data_folder)
    report = bl_trainer.diagnose(path, tmp_path / "report", max_tokens=300, percentiles=[2.5, 99.5])
    written = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    check("report", sorted(written))
    assert json.loads(json.dumps(report.to_json())) == written
    assert 0 < report.total.tokens <= 300
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"report.json", "report.html", "sweep.yaml"}


def test_diagnose_takes_a_mapping_and_writes_nothing_unless_told(checkpoint, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {"model_name_or_path": checkpoint, "dataset_name": str(data_folder), "use_cpu": True, "bf16": False}
    before = {*tmp_path.rglob("*")}
    bl_trainer.diagnose({**keys, "output_dir": "out", "report_to": "none", "objective": {"name": "power", "alpha": 2}})
    assert {*tmp_path.rglob("*")} == before
    with pytest.raises(RecipeError, match="Unknown recipe key 'objectiv'"):
        bl_trainer.diagnose({**keys, "objectiv": "nll"})
    with pytest.raises(RecipeError, match="Unknown recipe key 'max_token'"):
        bl_trainer.diagnose(keys, max_token=3)
    with pytest.raises(RecipeError, match="Cannot read the recipe"):
        bl_trainer.diagnose({**keys, "objective": object()})
