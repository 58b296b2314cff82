"""The strict parser of recipes: which keys there are, and what may stand behind them."""

import math
import re
from dataclasses import fields
from enum import Enum
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from .._util.text import nearest, sentence
from .._util.trl import DatasetConfig
from ..errors import RecipeError
from ..objectives.composition import KEYS
from ..objectives.objective import OBJECTIVES
from ..training.config import SECRETS
from .help import verb_help
from .keys import DATACLASSES, NAMES, REPLACED


class Parser(TrlParser):
    """TRL's parser, made to reject what it would ignore and to end in one sentence."""

    kind = "recipe key"

    def error(self, message: str) -> Any:
        raise RecipeError(message[:1].upper() + message[1:] + ".")

    def format_help(self) -> str:
        hints = {key: hint for each in self.dataclass_types for key, hint in get_type_hints(each).items()}
        return verb_help(self.prog, self._actions, {key: kinds_of(hint) for key, hint in hints.items()}, self.description)

    @property
    def known(self) -> list[str]:
        """All recipe keys."""
        return [action.dest for action in self._actions if action.dest != "help"]

    def is_given(self, key: str, argv: list[str]) -> bool:
        """Whether the command line sets `key`."""
        options = {o for action in self._actions if action.dest == key for o in action.option_strings}
        return any(arg.split("=", 1)[0] in options for arg in argv)

    def check(self, config: dict[str, Any], argv: list[str]) -> None:
        """Raise RecipeError on a key that does not exist or a value that argparse takes from a file unseen."""
        known = self.known
        for key, value in config.items():
            if key not in known and key != "env":
                raise RecipeError(self._unknown(str(key), value))
        options = self._option_string_actions
        for i, arg in enumerate(argv):
            option, _, value = arg.partition("=")
            if option.startswith("--") and option not in options:
                value = value or (argv[i + 1] if i + 1 < len(argv) else "")
                raise RecipeError(self._unknown(option[2:].replace("-", "_"), value))
        hints = {key: hint for each in self.dataclass_types for key, hint in get_type_hints(each).items()}
        for action in self._actions:
            if action.dest in config:
                config[action.dest] = _checked(action, hints[action.dest], config[action.dest])

    def parse(self, config: dict[str, Any], argv: list[str]) -> list[Any]:
        """Return the dataclasses that keys of a file and a command line make, the latter winning. Raises RecipeError."""
        try:
            return self._parse(config, argv)
        except RecipeError:
            raise
        except Exception as error:  # of the libraries' checks, which are of many kinds and seldom name the key
            message = sentence(error)
            if "bf16/gpu" in message:
                message += " On a machine without a GPU write `use_cpu: true`."
            if not any(re.search(rf"\b{key}\b", message) for key in self.known):
                message = f"{_suspects(config, message)}{message}"
            raise RecipeError(message) from error

    def _parse(self, config: dict[str, Any], argv: list[str]) -> list[Any]:
        parser = type(self)(self.dataclass_types, prog=self.prog, allow_abbrev=False)
        parser.set_defaults_with_config(**config)
        return list(parser.parse_args_into_dataclasses(argv, look_for_args_file=False))

    def _unknown(self, key: str, value: Any) -> str:
        """Return what to say of a key that there is not."""
        kind = self.kind
        if key in REPLACED:
            line = REPLACED[key]
            value = str(value).lower() if isinstance(value, bool) else value
            what = f"Write `{line.format(value=value)}` instead." if line else "Remove it: it no longer has an effect."
            return f"`{key}` is not a {kind} any more. {what}"
        of_objectives = {*KEYS, *(name for each in OBJECTIVES.values() for name in signature(each).parameters)}
        if kind == Parser.kind and key in of_objectives:
            return f"Unknown {kind} {key!r}. It belongs to the objective: write `objective: {{name: ..., {key}: {value}}}`."
        near = nearest(key, self.known)
        for name in (field.name for each in self.dataclass_types if each not in DATACLASSES for field in fields(each)):
            near = near.replace(repr(name), f"`--{name}`")  # an option of the verb, on the command line alone
        return f"Unknown {kind} {key!r}.{near} See `{self.prog} --help` for all {kind.split()[-1]}s."


def kinds_of(hint: Any) -> set[Any]:
    """The classes that a type hint allows; of an enumeration and of `Literal`, those of their values."""
    if get_origin(hint) in (list, dict):
        return {get_origin(hint)}
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    if get_args(hint):
        return set().union(*map(kinds_of, get_args(hint)))
    return {str} if isinstance(hint, type) and issubclass(hint, Enum) else {hint}


def _checked(action: Any, hint: Any, value: Any) -> Any:
    """Return a value from a file as it is to be used; raises RecipeError if it isn't what the key takes."""
    constants = [action.default, *([] if action.const is None else [action.const])]
    key, kinds = action.dest, kinds_of(hint) | set(map(type, constants))
    if key in ("objective", "threshold", "resume_from_checkpoint"):  # their own readers check them
        return value
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else without_secrets({key: value})[key]
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"`{key}: {shown}` must be a finite number.")
    if isinstance(value, float) and float not in kinds and int in kinds and value % 1 == 0:
        value = int(value)
    if not isinstance(value, (bool, str, list, dict, type(None))) and kinds <= {str, type(None)}:
        value = str(value)
    # argparse and the libraries read texts as these
    takes: dict[type, set[Any]] = {int: {int, float}, str: {str, bool, int, float, list, dict}}
    if Any not in kinds and not takes.get(type(value), {type(value)}) & kinds:
        wanted = " or ".join(NAMES[kind] for kind in NAMES if kind in kinds)
        how = f"Write {wanted}" if wanted else "A recipe can't give it; see whether `accelerate launch` can"
        raise RecipeError(f"`{key}: {shown}` is of the wrong type. {how}.")
    if isinstance(value, str) and list in kinds and str not in kinds and key != "lora_target_modules":
        value = [value]
    if isinstance(value, str) and dict in kinds and str not in kinds:
        raise RecipeError(f"`{key}: {shown}` is of the wrong type. Write a mapping.")
    if action.choices and value not in action.choices:
        near = nearest(value, map(str, action.choices))
        raise RecipeError(f"`{key}: {shown}` is not allowed.{near} Allowed: {', '.join(map(str, action.choices))}.")
    return value


def _suspects(config: dict[str, Any], message: str) -> str:
    """Return the start of a message that names no key: those that it spells otherwise or whose values it quotes, else all."""
    spelled = [key for key in config if re.search(rf"\b{key}\b", message, re.IGNORECASE)]
    quoted = [key for key, value in config.items() if isinstance(value, str) and repr(value) in message]
    names = ", ".join(f"`{key}`" for key in spelled or quoted or config)
    return f"Cannot use {names}: " if spelled or quoted else f"Cannot use one of the keys {names}: " if config else ""


class _UniqueKeys(yaml.SafeLoader):
    """YAML, except that a key given twice is an error; plain YAML takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise RecipeError(f"The file gives {key!r} twice (line {key_node.start_mark.line + 1}). Keep one of them.")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(paths: list[str], what: str = "recipe") -> dict[str, Any]:
    if not paths:
        raise RecipeError("`--config` needs the path of a recipe. Write `--config recipe.yaml`.")
    path = Path(paths[0])
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.MarkedYAMLError as error:  # whose message quotes the line, which may hold a secret
        line = error.problem_mark.line + 1 if error.problem_mark else "unknown"
        raise RecipeError(f"Can't read the {what} {path}: line {line}: {error.problem}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"Can't read the {what} {path}: {sentence(error)}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"The {what} {path} must be a YAML mapping of keys to values, got {type(config).__name__}.")
    if not isinstance(config.get("env", {}), dict):
        raise RecipeError(f"`env` must be a mapping of environment variables to values, got {type(config['env']).__name__}.")
    for key in config:
        if str(key).endswith("_strategy") and config[key] is False:
            config[key] = "no"  # what YAML makes of an unquoted no
    entries = config.get("datasets") or []
    if not isinstance(entries, list):
        raise RecipeError(f"`datasets` must be a list of mappings with `path`, got {entries!r}.")
    for entry in entries:
        allowed = [f.name for f in fields(DatasetConfig)]
        if not isinstance(entry, dict) or "path" not in entry:
            raise RecipeError(f"Each of `datasets` must be a mapping with `path`, got {entry!r}.")
        for key in entry:
            if key not in allowed:
                raise RecipeError(f"Unknown key {key!r} in `datasets`.{nearest(key, allowed)} Allowed: {', '.join(allowed)}.")
    return config


def without_secrets(given: dict[str, Any]) -> dict[str, Any]:
    """Return recipe keys with the values of `env` and of tokens left out."""
    hidden: dict[str, Any] = {key: "<redacted>" for key in SECRETS if key in given}
    if "env" in given:
        hidden["env"] = dict.fromkeys(given["env"], "<redacted>")
    return {**given, **hidden}
