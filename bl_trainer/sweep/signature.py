"""What a sweep's folder says it is of, so that two sweeps are never mixed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from .._util.files import write_text
from .._util.text import sentence
from ..errors import RecipeError
from .plan import Plan

SCHEMA = 1  # of what a study holds; a study of another one is refused


def digest(plan: Plan) -> str:
    """Return a hash of a plan."""
    return hashlib.sha256(json.dumps(plan.fingerprint(), sort_keys=True).encode()).hexdigest()[:16]


def sign(plan: Plan, folder: Path, write: bool = True) -> None:
    """Write into a sweep's folder what it is of, or raise RecipeError if it is another's."""
    path = folder / "sweep.json"
    if not write and not path.exists():
        return
    own = {"schema": SCHEMA, "parts": plan.fingerprint()}
    with FileLock(folder / "sweep.lock"):
        if not path.exists() or not path.stat().st_size:
            write_text(path, json.dumps(own, indent=1) + "\n")
            return
        found = _read(path)
    what, instead = f"The sweep in {folder}", "Write another `--sweep_dir`, or remove that one"
    if found.get("schema") != SCHEMA:
        raise RecipeError(
            f"{what} is of another version of bl_trainer (schema {found.get('schema')}, now {SCHEMA}). {instead}."
        )
    then, now = found["parts"], plan.fingerprint()
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if changed:
        back = "write `preset: full` to resume its grid" if "preset" in {*now} - {*then} else "go back to what it was"
        raise RecipeError(
            f"{what} had another {', another '.join(changed)}, and its runs can't be compared with these. {instead}; or {back}."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and (found.get("schema") != SCHEMA or isinstance(found.get("parts"), dict)):
            return found
        raise ValueError("it holds something else")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"Cannot read {path}: {sentence(error)}. Remove the sweep's folder, or choose another `--sweep_dir`."
        ) from error
