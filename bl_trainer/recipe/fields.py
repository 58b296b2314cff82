"""The fields behind recipe keys, read from the sources of the installed TRL and transformers: importing those takes seconds."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import DependencyError

# Dataclasses of recipe keys, and of a verb's options -> where their sources are
SOURCES = {
    "ScriptArguments": ("trl", "scripts/utils.py"),
    "BLConfig": ("bl_trainer", "training/config.py"),
    "ModelConfig": ("trl", "trainer/model_config.py"),
    "DatasetMixtureConfig": ("trl", "scripts/utils.py"),
    "DatasetConfig": ("trl", "scripts/utils.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
    "TrainArguments": ("bl_trainer", "training/preview.py"),
    "DiagnoseArguments": ("bl_trainer", "diagnosis/options.py"),
    "SweepArguments": ("bl_trainer", "sweep/verb.py"),
    "EvaluateArguments": ("bl_trainer", "evaluation/options.py"),
    "MergeArguments": ("bl_trainer", "training/merge.py"),
    "PrepareArguments": ("bl_trainer", "prepare/options.py"),
    "ConvertArguments": ("bl_trainer", "recipe/convert.py"),
    "ScoreArguments": ("bl_trainer", "cells/verb.py"),
}
RECIPE = ("ScriptArguments", "BLConfig", "ModelConfig", "DatasetMixtureConfig")
OBJECTIVES = ("objectives/functions.py", "objectives/published.py")

KINDS: dict[str, Any] = {kind.__name__: kind for kind in (bool, int, float, str, list, dict)} | {"Any": Any, "None": type(None)}

# Choices that a source computes
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
CHOICES = {"log_level": LOG_LEVELS, "log_level_replica": LOG_LEVELS}


@dataclass(frozen=True)
class Field:
    """
    A key of a recipe, or an option of a verb.

    `owner`: the dataclass that defines it. `kinds`: the classes its value may have; `object` for one that no file can give.
    `items`: those of a list's items. `choices`: the values allowed, empty for any. `default`: None where the source computes
    it. `text` and `metavar`: of its help, empty where it has none.
    """

    name: str
    owner: str
    kinds: frozenset[Any]
    items: frozenset[Any]
    choices: tuple[Any, ...]
    default: Any
    text: str
    metavar: str


@lru_cache
def recipe_fields() -> dict[str, Field]:
    """Return the keys of a recipe. Raises DependencyError where a dataclass is not in its place."""
    return {name: field for each in RECIPE for name, field in fields_of(each).items()}


@lru_cache
def fields_of(name: str) -> dict[str, Field]:
    """Return the fields of a dataclass of `SOURCES`, those of its bases first."""
    return dict(_fields(name, _path(name)))


@lru_cache
def objective_parameters() -> frozenset[str]:
    """Return the names of the parameters of all objectives."""
    trees = [_tree(Path(__file__).parents[1] / source) for source in OBJECTIVES]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    lists = [[arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)] for node in functions]
    return frozenset(name for names in lists if names[:1] == ["logp"] for name in names)


def _path(name: str) -> Path:
    package, file = SOURCES[name]
    found = find_spec(package)  # of a top-level package, which imports nothing
    for folder in (found and found.submodule_search_locations) or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise DependencyError(f"Cannot read recipe keys: {package} has no {file}. Run `pip install --upgrade {package}`.")


@lru_cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _class(name: str, path: Path) -> tuple[ast.ClassDef, Path] | None:
    """Return a class that a file defines or imports from beside it, and where it is defined; None if there is none."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, path
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in {alias.name for alias in node.names}:
            return _class(name, path.parent / f"{str(node.module).replace('.', '/')}.py")
    return None


def _fields(name: str, path: Path) -> Iterator[tuple[str, Field]]:
    found = _class(name, path)
    if found is None:
        raise DependencyError(f"Cannot read recipe keys: {path} has no {name}. Install versions that bl_trainer supports.")
    definition, path = found
    for base in definition.bases:
        if isinstance(base, ast.Name):
            yield from _fields(base.id, _path(base.id) if base.id in SOURCES else path)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_field(node):
            yield node.target.id, _field(node.target.id, name, node, path)


def _is_field(node: ast.AnnAssign) -> bool:
    """Whether it is no class variable, and no field that `__init__` does not take."""
    return "ClassVar" not in ast.unparse(node.annotation) and _keyword(node.value, "init") is not False


def _field(name: str, owner: str, node: ast.AnnAssign, path: Path) -> Field:
    parts = list(_parts(node.annotation))
    choices = [value for part in parts for value in _allowed(part, path) or ()]
    others = [part for part in parts if ast.unparse(part) not in ("str", "None") and _allowed(part, path) is None]
    metadata = _metadata(node.value)
    kinds = frozenset(kind for part in parts for kind in _kinds(part, path))
    items = frozenset(kind for part in parts if isinstance(part, ast.Subscript) for kind in _kinds(part.slice, path))
    is_closed = not others and not (len(parts) > 2)
    allowed = tuple(metadata.get("choices") or CHOICES.get(name) or (choices if is_closed else ()))
    said = [str(metadata.get(key) or "") for key in ("help", "metavar")]
    return Field(name, owner, kinds, items, allowed, _default(node.value), *said)


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the members of a union."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.BinOp):
        yield from _parts(node.left)
        yield from _parts(node.right)
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
        for part in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            yield from _parts(part)
        if ast.unparse(node.value) == "Optional":
            yield ast.Constant(None)
    else:
        yield node


def _allowed(node: ast.expr, path: Path) -> list[Any] | None:
    """Return the values of a `Literal` or an enumeration, None for another type."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        return [ast.literal_eval(value) for value in (node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])]
    found = _class(node.id, path) if isinstance(node, ast.Name) and node.id not in KINDS else None
    if found is None or "Enum" not in "".join(map(ast.unparse, found[0].bases)):
        return None
    values = [each.value for each in found[0].body if isinstance(each, ast.Assign)]
    return [value.value for value in values if isinstance(value, ast.Constant)]


def _kinds(node: ast.expr, path: Path) -> set[Any]:
    allowed = _allowed(node, path)
    if allowed is not None:
        return set(map(type, allowed))
    name = ast.unparse(node.value if isinstance(node, ast.Subscript) else node)
    return {KINDS.get(name, object)}


def _keyword(value: ast.expr | None, name: str) -> Any:
    """Return the literal that `field(...)` gives for a keyword; None if there is none."""
    found = [each.value for each in value.keywords if each.arg == name] if isinstance(value, ast.Call) else []
    return _literal(found[0]) if found else None


def _metadata(value: ast.expr | None) -> dict[str, Any]:
    """Return what the metadata of `field(...)` give as literals."""
    calls = value.keywords if isinstance(value, ast.Call) else []
    found = [each.value for each in calls if each.arg == "metadata" and isinstance(each.value, ast.Dict)]
    pairs = [pair for node in found for pair in zip(node.keys, node.values, strict=True)]
    return {str(key.value): _literal(each) for key, each in pairs if isinstance(key, ast.Constant)}


def _default(value: ast.expr | None) -> Any:
    if not isinstance(value, ast.Call):
        return _literal(value)
    factories = [ast.unparse(each.value) for each in value.keywords if each.arg == "default_factory"]
    return {"list": [], "dict": {}}.get(factories[0]) if factories else _keyword(value, "default")


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:  # the source computes it
        return None
