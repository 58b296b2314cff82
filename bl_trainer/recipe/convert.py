"""`bl-trainer convert`: the recipe of an older TRL, or of another trainer, as one of ours."""

import argparse
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .._util.text import listed
from ..errors import RecipeError
from .axolotl import AXOLOTL
from .dialects import TRL, Dialect, Draft
from .keys import IDLE_UNDER, NEEDS
from .llama_factory import LLAMA_FACTORY
from .reading import faults_of
from .yaml_file import load_yaml

WIDTH = 120
UNREAD = ("constant", "constant_with_warmup")  # schedules that read no arguments
UNWARMED = ("constant", "reduce_lr_on_plateau")  # schedules without warmup


@dataclass
class ConvertArguments:
    """Options of the convert verb: the recipe to read, and the file to write."""

    recipe: Path
    output: Path = field(metadata={"help": "The recipe to write, which must not be there yet; -o for short."})

    @classmethod
    def read(cls, argv: list[str]) -> "ConvertArguments":
        """Read `OLD.yaml --output NEW.yaml`. Raises RecipeError."""
        parser = _Parser(prog="bl-trainer convert", allow_abbrev=False, add_help=False)
        parser.add_argument("recipe", nargs="?")
        parser.add_argument("-o", "--output")
        given = parser.parse_args(argv)
        if not given.recipe or not given.output:
            missing = "`--output`" if given.recipe else "The recipe"
            raise RecipeError(f"{missing} is missing. Write `bl-trainer convert OLD.yaml --output NEW.yaml`.")
        return cls(Path(given.recipe), Path(given.output))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RecipeError(f"{message[:1].upper()}{message[1:]}. Write `bl-trainer convert OLD.yaml --output NEW.yaml`.")


def convert(options: ConvertArguments) -> tuple[str, list[str]]:
    """Write the recipe, and its chat template beside it. Returns what was done, and what now trains otherwise.

    Raises RecipeError where a file would be overwritten, and on a recipe that can't be trained as it was meant.
    """
    draft = Draft(load_yaml([str(options.recipe)]), options.output)
    dialect = dialect_of(draft.old)
    try:
        dialect.translate(draft)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"Cannot convert {options.recipe}: a key has a value that {dialect.name} does not take.") from error
    _drop_evaluation(draft)
    _drop_idle(draft)
    if faults := faults_of(draft.new):
        raise RecipeError(f"Cannot convert {options.recipe}: {listed(faults, 'its new keys')}")
    texts = {**draft.files, options.output: render(draft, dialect, options.recipe.name)}
    _write(texts)
    kept = len(draft.new.keys() - draft.notes.keys())
    done = f"{kept} keys kept, {len(draft.new) - kept} changed or added, {len(draft.dropped)} dropped"
    return f"Wrote {' and '.join(map(str, reversed(texts)))} from a recipe of {dialect.name}: {done}.", draft.changed


def dialect_of(old: dict[str, Any]) -> Dialect:
    """Return the dialect of a recipe, by the keys that only one of them has."""
    if "base_model" in old:
        return AXOLOTL
    return LLAMA_FACTORY if {"stage", "finetuning_type", "cutoff_len"} & old.keys() else TRL


def _drop_evaluation(draft: Draft) -> None:
    """Drop an evaluation for which a mixture holds out no rows, so that the recipe trains at its first launch."""
    if draft.new.get("datasets") and not draft.new.get("test_split_size") and draft.new.get("eval_strategy", "no") != "no":
        for key in ("eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end"):
            draft.new.pop(key, None)
        draft.lose("eval_strategy", "a mixture holds out no rows by itself; write `test_split_size` to evaluate")


def _drop_idle(draft: Draft) -> None:
    """Drop keys that do nothing without another, which ours refuses."""
    for key in sorted(draft.new.keys() & NEEDS.keys()):
        other, _ = NEEDS[key]
        packs = key == "packing_strategy" and draft.new.get("eval_packing")
        if other not in draft.new and not packs:
            del draft.new[key]
            draft.drop(key, f"it does nothing without `{other}`")
    for key in sorted(draft.new.keys() & IDLE_UNDER.keys()):
        other, values = IDLE_UNDER[key]
        if draft.new.get(other) in values:
            del draft.new[key]
            draft.drop(key, f"it does nothing under `{other}: {draft.new[other]}`")
    schedule = draft.new.get("lr_scheduler_type")
    for key, schedules, lacks in (("warmup_steps", UNWARMED, "warmup"), ("lr_scheduler_kwargs", UNREAD, "arguments")):
        if draft.new.get(key) and schedule in schedules:
            draft.drop(key, f"{draft.new.pop(key)}: `lr_scheduler_type: {schedule}` has no {lacks}")


def _write(texts: dict[Path, str]) -> None:
    """Write files that are not there yet. Raises RecipeError."""
    for path in texts:
        if path.exists():
            raise RecipeError(f"Cannot write {path}: it is there already. Choose another `--output`.")
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise RecipeError(f"Cannot write {error.filename}: {error.strerror}. Choose another `--output`.") from error


def render(draft: Draft, dialect: Dialect, source: str) -> str:
    """Return the text of the new recipe, with what was changed and dropped as comments."""
    lines = [f"# From the {dialect.name} recipe {source}, by `bl-trainer convert`."]
    if draft.changed:
        lines += ["#", "# CHANGES TRAINING: bl_trainer has no counterpart of these."]
        lines += [line for each in draft.changed for line in _comment(each)]
    if draft.dropped:
        lines += ["#", "# Dropped, without effect on training:"]
        lines += [line for each in draft.dropped for line in _comment(each)]
    for key, value in draft.new.items():
        text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=WIDTH).rstrip("\n")
        note = " ".join(draft.notes.get(key, "").split())
        lines += ["", f"# {note}"] if note and "\n" in text else []
        lines.append(f"{text}  # {note}" if note and "\n" not in text else text)
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent="#   - ", subsequent_indent="#     ")
