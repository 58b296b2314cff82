"""A recipe as its file and the command line give it: every wrong key and value is found before any library is loaded."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .._util.text import from_json, listed, nearest, without_secrets
from ..errors import RecipeError
from .fields import Field, fields_of, objective_parameters, recipe_fields
from .keys import NAMES, RENAMED, REPLACED
from .rules import KEY_RULES, PLACE_RULES, TRAINING_RULES
from .torch_rules import faults_of_objective, faults_of_precision
from .yaml_file import load_yaml

OWN_READERS = ("objective", "threshold", "resume_from_checkpoint")  # keys whose values are checked where they are read
OF_OBJECTIVES = ("floor", "mix", "special_tokens")  # of any objective's mapping
LISTED = 200  # characters of allowed values beside a suggestion; transformers knows 43 optimizers
TRUTHS = {**dict.fromkeys(("yes", "true", "t", "y", "1"), True), **dict.fromkeys(("no", "false", "f", "n", "0"), False)}


@dataclass
class Keys:
    """
    The keys of a recipe.

    `config`: those of the file, and `argv`: the command line, both with today's names. `values`: of both, the command line
    winning, without those at fault. `given`: the names of all. `renamed`: old names -> today's.
    """

    config: dict[str, Any] = field(default_factory=dict)
    argv: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def __contains__(self, key: str) -> bool:
        return key in self.given

    def __getitem__(self, key: str) -> Any:
        """Return the value of a key, or its default."""
        return self.values.get(key, recipe_fields()[key].default)


def read_keys(argv: list[str], verb: str = "train", own: Iterable[str] = (), tries: bool = False) -> Keys:
    """Read `--config recipe.yaml --any_key value ...`. Raises RecipeError, which lists every mistake.

    `own`: options of the verb, which are no recipe keys. `tries`: also parse the objective where nothing else is wrong.
    """
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    keys, own = Keys(), {*own}
    where = "the recipe"
    if "--config" in argv:
        index = argv.index("--config")
        where = "".join(argv[index + 1 : index + 2])
        keys.config = load_yaml(argv[index + 1 : index + 2])
        argv = argv[:index] + argv[index + 2 :]
    if not keys.config and not any(arg.split("=", 1)[0].replace("-", "_") == "__model_name_or_path" for arg in argv):
        instead = ", or `--model M --data D.jsonl`" if {"model", "data"} <= own else ""
        path = next((arg for arg in argv if not arg.startswith("-") and arg.endswith((".yaml", ".yml"))), None)
        found = f": `{path}` needs `--config` before it" if path else ""
        raise RecipeError(f"No recipe is given{found}. Write `{verb} --config {path or 'recipe.yaml'}`{instead}.")
    _read_file(keys, own, verb)
    is_old = any(key in REPLACED for key in keys.config)
    _read_command_line(keys, argv, own, verb)
    for rule in KEY_RULES + PLACE_RULES + (TRAINING_RULES if verb == "train" else ()):
        keys.faults += rule(keys)
    keys.faults += faults_of_precision(keys)
    if keys.faults or tries:
        keys.faults += faults_of_objective(keys)
    if keys.faults:
        keys.faults = [as_given(fault, keys.renamed) for fault in keys.faults]
        hint = f"`bl-trainer convert {where} -o NEW.yaml` rewrites the recipe of an older version." if is_old else ""
        several = len(keys.faults) > 1
        raise RecipeError(listed(keys.faults, where) + (f"{chr(10) if several else ' '}{hint}" if hint else ""))
    return keys


def faults_of(config: dict[str, Any]) -> list[str]:
    """Return what is wrong with the keys of a file, wherever it is to be used."""
    keys = Keys(dict(config))
    _read_file(keys, set(), "train")
    return keys.faults + [fault for rule in KEY_RULES for fault in rule(keys)]


def _read_file(keys: Keys, own: set[str], verb: str) -> None:
    for key in list(keys.config):
        if key in own:
            keys.faults.append(f"`{key}` is not a recipe key. Give it on the command line: `--{key} ...`.")
        elif key == "datasets":
            keys.faults += _faults_of_entries(keys.config[key] or [])
            keys.given.add(key)
            if isinstance(keys.config[key], (list, type(None))):
                keys.values[key] = keys.config[key]
        elif key == "env":
            keys.given.add(key)
        elif key in recipe_fields():
            keys.config[key] = _take(keys, key, keys.config[key])
        elif _is_renamed(key, keys.config[key]):
            new = RENAMED[key]
            if new in keys.config:
                keys.faults.append(f"`{key}` is the old name of `{new}`, and the recipe gives both. Remove `{key}`.")
                continue
            keys.renamed[key] = new
            keys.config[new] = _take(keys, new, keys.config.pop(key))
        else:
            keys.faults.append(unknown(str(key), keys.config[key], f"bl-trainer {verb}", own=own))


def _is_renamed(key: Any, value: Any) -> bool:
    """Whether a key has a new name for the same thing: `warmup_ratio: 1` is not one step."""
    return key in RENAMED and not (key == "warmup_ratio" and not _is_share(value))


def _is_share(value: Any) -> bool:
    try:
        return 0 <= float(value) < 1
    except (TypeError, ValueError):
        return False


def _read_command_line(keys: Keys, argv: list[str], own: set[str], verb: str) -> None:
    """Take the options of `argv`, and write it to `keys.argv` with today's names."""
    for option, words, tokens in _options(argv):
        name = option[2:].replace("-", "_")
        if _is_renamed(name, words[0] if words else None) and name not in recipe_fields():
            keys.renamed[name] = name = RENAMED[name]
            tokens = [f"--{name}", *words]
        keys.argv += tokens
        switched_off = name.removeprefix("no_") if name not in recipe_fields() else name
        if not option:
            keys.faults += [
                f"Cannot use the argument {word!r}: it belongs to no option. Write `--KEY VALUE`." for word in words
            ]
        elif name in recipe_fields():
            _take_words(keys, name, words)
        elif switched_off in recipe_fields() and recipe_fields()[switched_off].default is True and not words:
            _take(keys, switched_off, False)
        elif name not in own:
            keys.faults.append(unknown(name, " ".join(words), f"bl-trainer {verb}", own=own))


def _options(argv: list[str]) -> list[tuple[str, list[str], list[str]]]:
    """Return each option of a command line with its words, and with what was written: `--a=b` is not `--a b` to all.

    Words before the first option stand under an empty name.
    """
    found: list[tuple[str, list[str], list[str]]] = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        if arg.startswith("--"):
            found.append((name, [value] if equals else [], [arg]))
        elif found:
            found[-1][1].append(arg)
            found[-1][2].append(arg)
        else:
            found.append(("", [arg], [arg]))
    return found


def _take_words(keys: Keys, key: str, words: list[str]) -> None:
    """Take a key of the command line."""
    field = recipe_fields()[key]
    takes_list = list in field.kinds and str not in field.kinds
    if not words and bool not in field.kinds:
        keys.faults.append(f"`--{key}` needs a value. Write `--{key} VALUE`.")
        keys.given.add(key)
        return
    extra = [] if takes_list else words[1:]
    keys.faults += [f"Cannot use the argument {word!r}: `--{key}` takes one value." for word in extra]
    value: Any = words if takes_list else words[0] if words else True
    if isinstance(value, str) and value.lower() in ("none", "null") and str not in field.kinds:
        value = None
    _take(keys, key, value)


def _take(keys: Keys, key: str, value: Any) -> Any:
    """Take a key with its value as it is to be used; note what is wrong with it."""
    keys.given.add(key)
    keys.values.pop(key, None)
    try:
        value = _checked(recipe_fields()[key], value)
        keys.values[key] = _meant(recipe_fields()[key], value)
    except RecipeError as error:
        keys.faults.append(str(error))
    return value


def _checked(field: Field, value: Any) -> Any:
    """Return a value as it is to be used; raises RecipeError if it isn't what the key takes."""
    key, kinds = field.name, field.kinds | {type(field.default)} | ({bool} if bool in field.kinds else set())
    if key in OWN_READERS:
        return value
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else without_secrets({key: value})[key]
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"`{key}: {shown}` must be a finite number.")
    if isinstance(value, float) and float not in kinds and int in kinds and value % 1 == 0:
        value = int(value)
    if isinstance(value, int) and value in (0, 1) and bool in kinds and int not in kinds and float not in kinds:
        value = bool(value)
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
    if value is None and type(None) in field.kinds:
        return None
    if field.choices and value not in field.choices:
        near, several = nearest(str(value), map(str, field.choices)), ", ".join(map(str, field.choices))
        allowed = "" if near and len(several) > LISTED else f" Allowed: {several}."
        raise RecipeError(f"`{key}: {shown}` is not allowed.{near}{allowed}")
    return value


def _meant(field: Field, value: Any) -> Any:
    """Return the number, truth value or mapping that a text spells, where the key takes no text.

    Raises RecipeError on a text that spells none.
    """
    if dict in field.kinds and field.name not in OWN_READERS:
        return from_json(field.name, value, '{"key": "value"}')
    if not isinstance(value, str) or str in field.kinds or not {bool, int, float} & field.kinds:
        return value
    if value.lower() in ("none", "null") and type(None) in field.kinds and bool not in field.kinds:
        return None
    for kind in (int, float):
        if kind in field.kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    if bool in field.kinds and value.lower() in TRUTHS:
        return TRUTHS[value.lower()]
    wanted = " or ".join(NAMES[kind] for kind in NAMES if kind in field.kinds)
    raise RecipeError(f"`{field.name}: {value}` is of the wrong type. Write {wanted}.")


def meant(key: str, value: Any) -> Any:
    """Return what a key's value means, however it is spelled: `"1e-3"` is a number. A value that means nothing stays."""
    if key not in recipe_fields():
        return value
    try:
        return _meant(recipe_fields()[key], _checked(recipe_fields()[key], value))
    except RecipeError:
        return value


def as_given(fault: str, renamed: dict[str, str]) -> str:
    """Return a message with the names of keys that the recipe gives: `renamed` has its old names, and today's."""
    for old, new in renamed.items():
        fault = re.sub(rf"`{new}(?=[`:])", f"`{old}", fault)
    return fault


def unknown(key: str, value: Any, program: str, own: Iterable[str] = (), kind: str = "recipe key") -> str:
    """Return what to say of a key that there is not, of the options `own` or, besides, of a recipe."""
    is_recipe = kind == "recipe key"
    if is_recipe and (key in REPLACED or key in RENAMED):
        line = REPLACED.get(key, f"{RENAMED.get(key)}: ...")
        value = str(value).lower() if isinstance(value, bool) else value
        what = f"Write `{line.format(value=value)}` instead." if line else "Remove it: it no longer has an effect."
        return f"`{key}` is not a {kind} any more. {what}"
    if is_recipe and key in {*OF_OBJECTIVES, *objective_parameters()}:
        return f"Unknown {kind} {key!r}. It belongs to the objective: write `objective: {{name: ..., {key}: {value}}}`."
    near = nearest(key, [*(recipe_fields() if is_recipe else ()), *own])
    for name in own:
        near = near.replace(repr(name), f"`--{name}`")  # given on the command line alone
    return f"Unknown {kind} {key!r}.{near} See `{program} --help` for all {kind.split()[-1]}s."


def _faults_of_entries(entries: Any) -> list[str]:
    """Return what is wrong with the entries of `datasets`."""
    if not isinstance(entries, list):
        return [f"`datasets` must be a list of mappings with `path`, got {entries!r}."]
    allowed = [*fields_of("DatasetConfig")]
    faults = []
    for entry in entries:
        if not isinstance(entry, dict) or "path" not in entry:
            faults.append(f"Each of `datasets` must be a mapping with `path`, got {entry!r}.")
            continue
        faults += [
            f"Unknown key {key!r} in `datasets`.{nearest(key, allowed)} Allowed: {', '.join(allowed)}."
            for key in entry
            if key not in allowed
        ]
    return faults
