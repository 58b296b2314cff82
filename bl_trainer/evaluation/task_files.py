"""The YAML files of tasks, read without lm-evaluation-harness, which loads slowly."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .._util.text import sentence
from ..errors import RecipeError
from ..recipe.local_files import local_files
from ..recipe.paths import format_of

OWN = Path(__file__).parent / "tasks"


def metrics_of(task: str) -> list[str]:
    """Return the names that a task's metrics have in results, as far as its file lists them; none where that is not known.

    `task`: the name of one of ours, or the path of a YAML file. Tasks of the harness are not looked up: that reads thousands of
    files. Raises RecipeError on a file that is not YAML.
    """
    path = Path(task) if task.endswith((".yaml", ".yml")) else OWN / f"{task}.yaml"
    if not path.is_file():
        return []
    listed, filters = _field(path, "metric_list"), _field(path, "filter_list")
    metrics, kinds = (_values(listed, "metric"), _values(filters, "name"))
    return [f"{metric},{kind}" if kind != "none" else metric for metric in metrics for kind in kinds or ["none"]]


def harness_name(task: str) -> str:
    """Return what the harness calls a task: what its YAML file says, else its name. Two files may say the same.

    Raises RecipeError on a file that is not YAML.
    """
    path = Path(task)
    said = _field(path, "task") if path.suffix in (".yaml", ".yml") and path.is_file() else None
    return said.value if isinstance(said, yaml.ScalarNode) else task


def _values(node: Any, key: str) -> list[str]:
    """Return what the mappings of a list have under a key; nothing if one of them names code there."""
    found = [_entry(item, key) for item in node.value] if isinstance(node, yaml.SequenceNode) else []
    texts = [each.value for each in found if isinstance(each, yaml.ScalarNode) and each.tag != "!function"]
    return texts if len(texts) == len(found) else []


def _field(path: Path, key: str) -> Any:
    """Return the node of a key of a task's file, or of the file that it includes."""
    root = _read(path)
    found, include = _entry(root, key), _entry(root, "include")
    if found is None and isinstance(include, yaml.ScalarNode) and (path.parent / include.value).is_file():
        return _field(path.parent / include.value, key)
    return found


def _entry(node: Any, key: str) -> Any:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if name.value == key), None)


def _read(path: Path) -> Any:
    """Return the root node of a YAML file. Raises RecipeError."""
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "unknown"
        raise RecipeError(f"Cannot read the task file {path}: line {line}: {error.problem}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"Cannot read the task file {path}: {sentence(error)}.") from error


def task_files(path: Path) -> Iterator[Path]:
    """Yield a task's YAML file, and the local files that it names: what it includes, its code and its data.

    Raises RecipeError if it is not YAML.
    """
    root = _read(path)
    yield path
    for node in _scalars(root):
        if node.tag == "!function":
            code = path.parent / f"{node.value.rpartition('.')[0].replace('.', '/')}.py"
            yield from [code] if code.is_file() else []
        elif Path(node.value).suffix in (".yaml", ".yml") and (path.parent / node.value).is_file():
            yield from task_files(path.parent / node.value)
        elif _names_data(node.value):
            yield from local_files(node.value)


def _names_data(value: str) -> bool:
    """Whether a value can only be a path of local data, not a text such as a delimiter `/`."""
    is_folder = "/" in value and bool(value.strip("./ ")) and len(value) < 256 and Path(value).is_dir()
    return is_folder or ("\n" not in value and format_of(Path(value)) is not None)


def _scalars(node: Any) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.CollectionNode):
        for part in node.value:
            for each in part if isinstance(part, tuple) else (part,):
                yield from _scalars(each)
