"""What the package uses of others beyond their public names: a release that moves something fails here, by name."""

import importlib
import inspect
from pathlib import Path

import pytest
from transformers import Trainer
from trl import SFTTrainer

from bl_trainer import BLTrainer
from bl_trainer._util import transformers as of_transformers
from bl_trainer._util import trl as of_trl
from ways import train

PACKAGE = Path(importlib.import_module("bl_trainer").__file__).parent
INSIDE = ("trl.trainer", "transformers.integrations.deepspeed", "transformers.trainer")


@pytest.mark.parametrize("name", [*of_trl.METHODS, *of_transformers.METHODS])
def test_methods_are_there(name):
    kind, what = (SFTTrainer, of_trl.METHODS) if name in of_trl.METHODS else (Trainer, of_transformers.METHODS)
    assert callable(getattr(kind, name, None)), f"{kind.__name__} has no {name}: this breaks {what[name]}"


def test_attributes_are_there(tokenizer, text_data, tmp_path):
    trainer = train(BLTrainer, tokenizer, text_data, tmp_path)
    for name, what in {**of_trl.ATTRIBUTES, **of_transformers.ATTRIBUTES}.items():
        assert hasattr(trainer, name), f"a trainer has no {name}: this breaks {what}"


def test_the_preparation_takes_the_same_arguments():
    names = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert list(inspect.signature(SFTTrainer._prepare_dataset).parameters) == names


def test_one_file_imports_from_inside():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "_util":
            inside = [
                line for line in path.read_text().splitlines() if line.strip().startswith(tuple(f"from {m}" for m in INSIDE))
            ]
            assert not inside, f"{path}: import it in _util/trl.py or _util/transformers.py"
