"""What the package uses of others beyond their public names: a release that moves something fails here, by name."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from transformers import Trainer
from trl import SFTTrainer

from bl_trainer import BLTrainer
from bl_trainer._util import accelerate as of_accelerate
from bl_trainer._util import transformers as of_transformers
from bl_trainer._util import trl as of_trl
from ways import train

PACKAGE = Path(importlib.import_module("bl_trainer").__file__).parent
PACKAGES = ("accelerate", "lm_eval", "peft", "transformers", "trl")  # each with a file of its own in _util
# What they document beside their own names; all else of them is inside
PUBLIC = {
    "accelerate.logging", "accelerate.utils", "lm_eval.api.task", "lm_eval.models.huggingface", "lm_eval.models.vllm_causallms",
    "lm_eval.tasks", "transformers.integrations", "transformers.utils", "trl.data_utils",
}  # fmt: skip


@pytest.mark.parametrize("name", [*of_trl.METHODS, *of_transformers.METHODS])
def test_methods_are_there(name):
    kind, what = (SFTTrainer, of_trl.METHODS) if name in of_trl.METHODS else (Trainer, of_transformers.METHODS)
    assert callable(getattr(kind, name, None)), f"{kind.__name__} has no {name}: this breaks {what[name]}"


def test_attributes_are_there(tokenizer, text_data, tmp_path):
    trainer = train(BLTrainer, tokenizer, text_data, tmp_path)
    for name, what in {**of_trl.ATTRIBUTES, **of_transformers.ATTRIBUTES}.items():
        assert hasattr(trainer, name), f"a trainer has no {name}: this breaks {what}"
    for name, what in of_accelerate.ATTRIBUTES.items():
        assert hasattr(trainer.accelerator, name), f"an accelerator has no {name}: this breaks {what}"


@pytest.mark.parametrize("name", ["_rank", "_world_size"])
def test_the_harness_reads_its_share_of_them(name):
    kind = pytest.importorskip("lm_eval.models.huggingface").HFLM
    from bl_trainer._util import lm_eval as of_lm_eval

    reads = getattr(kind, name[1:]).fget.__code__.co_names
    assert name in reads, f"the harness doesn't read {name}: this breaks {of_lm_eval.ATTRIBUTES[name]}"


def test_the_preparation_takes_the_same_arguments():
    names = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert list(inspect.signature(SFTTrainer._prepare_dataset).parameters) == names


def _imports(path: Path) -> list[tuple[str, str, str]]:
    """Return (module, name, name here) of all that a file imports from the packages."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.module or "", alias.name, alias.asname or alias.name) for alias in node.names]
        if isinstance(node, ast.Import):
            found += [(alias.name, "", "") for alias in node.names]
    return [each for each in found if each[0].split(".")[0] in PACKAGES]


def _is_inside(module: str, name: str) -> bool:
    return ("." in module and module not in PUBLIC) or name.startswith("_")


@pytest.mark.parametrize("package", PACKAGES)
def test_all_that_is_imported_from_inside_has_a_sentence(package):
    path = PACKAGE / "_util" / f"{package}.py"
    source = {
        node.targets[0].id: node.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    said = ast.literal_eval(source["NAMES"]) if "NAMES" in source else {}
    assert {here for module, name, here in _imports(path) if _is_inside(module, name)} == set(said)


def test_one_file_imports_from_inside():
    for path in PACKAGE.rglob("*.py"):
        found = {module for module, name, _ in _imports(path) if _is_inside(module, name)}
        own = path.stem if path.parent.name == "_util" else ""
        assert not {module for module in found if module.split(".")[0] != own}, f"{path}: import it in _util/"
