"""A YAML file of keys: recipes and sweep files."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .._util.text import sentence
from ..errors import RecipeError

MERGE = "tag:yaml.org,2002:merge"  # of `<<`, whose keys the mapping's own replace


class _UniqueKeys(yaml.SafeLoader):
    """YAML, except that a key given twice is an error; plain YAML takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise RecipeError(f"A key is {key!r} (line {key_node.start_mark.line + 1}). Write a text.")
            if key in seen:
                raise RecipeError(f"The file gives {key!r} twice (line {key_node.start_mark.line + 1}). Keep one of them.")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(paths: list[str], what: str = "recipe") -> dict[str, Any]:
    """Return the mapping of a YAML file. Raises RecipeError on a file that is none, or has a key twice."""
    if not paths:
        raise RecipeError("`--config` needs the path of a recipe. Write `--config recipe.yaml`.")
    path = Path(paths[0])
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.MarkedYAMLError as error:  # whose message quotes the line, which may hold a secret
        line = error.problem_mark.line + 1 if error.problem_mark else "unknown"
        raise RecipeError(f"Cannot read the {what} {path}: line {line}: {error.problem}. Correct the line.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"Cannot read the {what} {path}: {sentence(error)}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"The {what} {path} must be a YAML mapping of keys to values, got {type(config).__name__}.")
    if not isinstance(config.get("env", {}), dict):
        raise RecipeError(f"`env` must be a mapping of environment variables to values, got {type(config['env']).__name__}.")
    for key in config:
        if str(key).endswith("_strategy") and config[key] is False:
            config[key] = "no"  # what YAML makes of an unquoted no
    return config
