"""Any objective in axolotl: the plugin `bl_trainer.adapters.axolotl.ObjectivePlugin`, whose keys stand under `bl_trainer:`."""

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from ..objectives import Objective, Threshold
from .transformers import attach

# Settings that give axolotl another loss
OTHERS = ("rl", "reward_model", "process_reward_model", "use_eaft", "orpo_alpha", "kd_trainer", "diffusion")


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless an axolotl config has a section `bl_trainer` that its trainer can follow."""
    section = config.get("bl_trainer")
    if not isinstance(section, Mapping) or "objective" not in section:
        raise RecipeError("Cannot read `bl_trainer`: it has no `objective`. Add one, such as `objective: neg_p`.")
    if unknown := sorted(set(section) - {"objective", "threshold"}):
        raise RecipeError(f"Cannot read `bl_trainer`: it has no key {unknown[0]!r}. Use `objective` and `threshold`.")
    if found := [key for key in OTHERS if config.get(key)]:
        raise RecipeError(f"Cannot train two losses at once: the config has `{found[0]}`. Remove it, or the plugin.")
    if (config.get("context_parallel_size") or 1) > 1:
        raise RecipeError("Cannot train the objective: parallelism splits a row at targets. Set `context_parallel_size: 1`.")
    Objective.parse(section["objective"])
    Threshold.parse(section.get("threshold"))


def __getattr__(name: str) -> Any:
    """Make `ObjectivePlugin` and `ObjectiveArgs`, of axolotl's classes, on first use (PEP 562)."""
    if name not in ("ObjectivePlugin", "ObjectiveArgs"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, model_validator

    class ObjectivePlugin(BasePlugin):
        def get_input_args(self) -> str:
            return f"{__name__}.ObjectiveArgs"

        def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
            attach(trainer, cfg.bl_trainer["objective"], cfg.bl_trainer.get("threshold"))

    class ObjectiveArgs(BaseModel):
        bl_trainer: Any = None

        @model_validator(mode="before")
        @classmethod
        def check_objective(cls, data: Any) -> Any:
            check(data)
            return data

    globals().update(ObjectivePlugin=ObjectivePlugin, ObjectiveArgs=ObjectiveArgs)
    return globals()[name]
