"""Where a run's output goes: what is there already, and whether all processes resume from the same checkpoint."""

import tempfile
from pathlib import Path

from accelerate.utils import gather_object

from ..errors import RecipeError
from ..training.card import is_ours
from ..training.resume import ResumePlan
from .keys import WRITTEN


def refuse_unwritable(folder: Path) -> None:
    """Raise RecipeError if nothing can be written in `folder`, or where it is to be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise RecipeError(f"`output_dir: {folder}` can't be written: {error.strerror}. Write another `output_dir`.") from error


def refuse_overwriting(folder: Path, plan: ResumePlan, takes_last: bool) -> None:
    """Raise RecipeError if a run under `plan` would overwrite what `folder` holds.

    `takes_last`: under `resume_from_checkpoint: true`, which replaces broken checkpoints, and a card without any.
    """
    if plan.checkpoint and plan.checkpoint.resolve().parent == folder.resolve():
        return
    present = {path for pattern in WRITTEN for path in folder.glob(pattern)} - plan.skipped.keys()
    card = folder / "README.md"  # a run writes its model card before its first checkpoint
    if takes_last and card in present and is_ours(card):
        present.remove(card)
    if present:
        go_on = "" if plan.checkpoint or takes_last else "`resume_from_checkpoint: true` to resume it, or "
        go_on = go_on if any(folder.glob("checkpoint-*")) else ""
        raise RecipeError(
            f"`output_dir: {folder}` holds {min(present).name}, of an earlier run or your own, which would be overwritten. "
            f"Write {go_on}another `output_dir`."
        )


def refuse_disagreement(plan: ResumePlan, problem: RecipeError | None) -> None:
    """Raise RecipeError, on all processes, if one of them has a problem, or another checkpoint than the rest."""
    own = plan.checkpoint.name if plan.checkpoint else "none"
    found = gather_object([(own, str(problem or ""))])
    if problem:
        raise problem
    for _, theirs in found:
        if theirs:
            raise RecipeError(f"On another machine: {theirs}")
    names = sorted({name for name, _ in found})
    if len(names) > 1:
        raise RecipeError(
            f"`resume_from_checkpoint` finds {' on one machine, '.join(names)} on another. Put `output_dir` where all "
            "machines see it, or copy the checkpoint to each."
        )
