"""The shape of the package: the order of its rooms, its imports, and the length of its functions and classes."""

import ast
import io
import statistics
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bl_trainer"
# Each imports only from those above it
ROOMS = (
    "errors", "_util", "pages", "objectives", "head", "losses", "cells", "tokens", "measurement", "training", "recipe",
    "diagnosis", "prepare", "evaluation", "sweep", "adapters", "cli", "__init__", "__main__",
)  # fmt: skip
LONGEST, MEDIAN, LARGEST = 40, 8, 250
# Private names of others' objects: module of ours -> those that it can't do without
FOREIGN = {
    "bl_trainer.evaluation.grading.values": {"_mpf_"},  # mpmath's, the only exact form of its numbers
    "bl_trainer.head.verification": {"_buffers"},  # torch's, of a module
    "bl_trainer.measurement.forward": {"_prepare_inputs"},  # transformers', which test_foreign.py looks for
    "bl_trainer.measurement.fingerprint": {"_save_to_state_dict"},  # torch's, of a module
    "bl_trainer.sweep.process": {"_run_exitfuncs"},  # of atexit, which processes of multiprocessing end without
    "bl_trainer.training.pace": {"_train_batch_size"},  # transformers', which test_foreign.py looks for
    "bl_trainer.tokens.prepare": {"_prepare_dataset"},  # TRL's, which test_foreign.py looks for
}
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}  # in spite of their names: of named tuples and of `os`


def _modules() -> dict[str, ast.Module]:
    """Return dotted name -> syntax tree of every module; a package goes by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = _modules()
PACKAGES = {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _source(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".") if module in PACKAGES else module.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _imports(module: str, lazy: bool = True) -> list[tuple[str, str]]:
    """Return (module of ours, name) of what a module imports; without `lazy` only what is imported when it is."""
    nodes = ast.walk(MODULES[module]) if lazy else MODULES[module].body
    found = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and _source(module, node).split(".")[0] == "bl_trainer":
            source = _source(module, node)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                found.append((submodule, "") if submodule in MODULES else (source, alias.name))
    return found


def test_every_module_stands_in_a_room_of_the_house() -> None:
    assert {_room(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_from_the_rooms_above_it(module: str) -> None:
    if module == "bl_trainer":  # which hands out names of all rooms when they are asked for
        return
    own = ROOMS.index(_room(module))
    upward = [source for source, _ in _imports(module) if source != "bl_trainer" and ROOMS.index(_room(source)) > own]
    assert not upward


def test_imports_make_no_circle() -> None:
    waiting = {module: {source for source, _ in _imports(module, lazy=False)} - {module} for module in MODULES}
    while waiting:
        free = [module for module, sources in waiting.items() if not sources & waiting.keys()]
        assert free, f"a circle among {sorted(waiting)}"
        for module in free:
            del waiting[module]


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_crosses_a_file(module: str) -> None:
    assert [name for _, name in _imports(module) if name.startswith("_") and not name.startswith("__")] == []


def _own_names(module: str) -> set[str]:
    """Return what a file defines: functions, classes, and names and attributes that it assigns."""
    nodes = list(ast.walk(MODULES[module]))
    found = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return found | {node.attr for node in stored if _is_self(node.value)}


def _is_self(node: ast.expr) -> bool:
    """Whether an object is the method's own, or what it inherits."""
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


@pytest.mark.parametrize("module", [module for module in MODULES if _room(module) != "_util"])
def test_no_private_attribute_of_another_file_is_used(module: str) -> None:
    """Of another object than `self`, by its name: `trainer._x` is well only in the file that defines `_x`."""
    used = {
        node.attr
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not _is_self(node.value)
    }
    private = {name for name in used if not name.startswith("__")} - PUBLIC - FOREIGN.get(module, set())
    assert private - _own_names(module) == set()


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_that_windows_lacks(module: str) -> None:
    nodes = list(ast.walk(MODULES[module]))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert not names & {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


def _code_lines(path: Path) -> set[int]:
    """Return the numbers of the lines that hold code: no blank lines, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def _lengths(kind: type) -> dict[str, int]:
    """Return the lines of code of each function or class."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        code = _code_lines(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                own = range(node.lineno, (node.end_lineno or 0) + 1)  # type: ignore[attr-defined]
                found[f"{path.relative_to(PACKAGE)}:{node.name}:{node.lineno}"] = len(code & set(own))  # type: ignore[attr-defined]
    return found


def test_functions_are_short() -> None:
    lengths = _lengths(ast.FunctionDef)
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
    assert statistics.median(lengths.values()) <= MEDIAN


def test_classes_are_no_larger_than_a_reader_can_hold() -> None:
    """With their docstrings."""
    classes = [(module, node) for module, tree in MODULES.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    lengths = {f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1 for module, node in classes}
    assert {name: length for name, length in lengths.items() if length >= LARGEST} == {}


@pytest.mark.parametrize("room", ["objectives", "losses", "tokens", "measurement", "training"])
def test_what_a_user_can_put_right_is_an_error_of_ours(room: str) -> None:
    """A plain ValueError would be reported as a fault of the program."""
    raised = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if _room(module) == room and isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if isinstance(node.exc.func, ast.Name) and node.exc.func.id in ("Exception", "ValueError")
    ]
    assert raised == []
