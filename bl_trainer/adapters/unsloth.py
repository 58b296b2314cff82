"""Any objective in Unsloth's `SFTTrainer`, from the logits that it makes with `UNSLOTH_RETURN_LOGITS=1`."""

import os
from typing import Any

from ..errors import RecipeError
from . import transformers


def attach(trainer: Any, objective: Any, threshold: Any = None) -> None:
    """Make an Unsloth trainer minimise an objective; see `bl_trainer.adapters.transformers.attach`.

    Set `UNSLOTH_RETURN_LOGITS=1` before the trainer is made. Unsloth then neither packs rows nor leaves out their padding.
    Raises ValueError without it, and where a patched forward makes no logits all the same.
    """
    if os.environ.get("UNSLOTH_RETURN_LOGITS", "0") != "1":
        raise RecipeError("Cannot train under Unsloth: it makes no logits. Set `UNSLOTH_RETURN_LOGITS=1` before the trainer.")
    transformers.attach(trainer, objective, threshold)
