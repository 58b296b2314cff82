"""What this package uses from inside lm-eval, beyond its public names: a release that moves something breaks here.

tests/test_foreign.py says what each is for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from lm_eval import evaluator
from lm_eval.evaluator import get_git_commit_hash
from lm_eval.tasks._yaml_loader import load_yaml

__all__ = ["ATTRIBUTES", "NAMES", "get_git_commit_hash", "load_yaml", "share_out", "without_git"]

# Names -> what breaks without them
NAMES = {
    "load_yaml": "tasks whose data `--data` gives, and the refusal of a broken task file",
    "get_git_commit_hash": "an evaluation outside of a git repository, without git's complaint",
}

# Attributes of an `HFLM` -> what then breaks
ATTRIBUTES = {
    "_rank": "evaluation by several processes: each would answer all questions",
    "_world_size": "evaluation by several processes: each would answer all questions",
}


def share_out(lm: Any, accelerator: Accelerator) -> None:
    """Let an `HFLM` around a loaded model answer its share of the questions, as the harness does to one that it loads."""
    if accelerator.num_processes > 1:
        lm.accelerator, lm._rank, lm._world_size = accelerator, accelerator.process_index, accelerator.num_processes


@contextmanager
def without_git() -> Iterator[None]:
    """Let the harness not ask git for the commit of the working folder, which it would note and we don't read."""
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = get_git_commit_hash
