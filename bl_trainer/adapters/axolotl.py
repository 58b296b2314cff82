"""Any objective in axolotl: the plugin `bl_trainer.adapters.axolotl.ObjectivePlugin`, whose keys stand under `bl_trainer:`."""

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from ..objectives import Objective, Threshold
from .transformers import attach

KEYS = ("objective", "threshold")
# Settings that give axolotl another loss, or cut rows up; some would train it in silence
OTHERS = ("rl", "reward_model", "process_reward_model", "use_eaft", "orpo_alpha", "kd_trainer", "diffusion")


def check(config: Mapping[str, Any]) -> None:
    """Raise RecipeError unless an axolotl config has a section `bl_trainer` that its trainer can follow."""
    section = config.get("bl_trainer")
    if not isinstance(section, Mapping) or "objective" not in section:
        raise RecipeError("Cannot read `bl_trainer`: it has no `objective`. Add one, such as `objective: neg_p`.")
    if unknown := sorted(set(section) - set(KEYS)):
        raise RecipeError(f"Cannot read `bl_trainer`: it has no key {unknown[0]!r}. Use {' and '.join(KEYS)}.")
    if found := [key for key in OTHERS if config.get(key)]:
        raise RecipeError(f"Cannot train two losses at once: the config has `{found[0]}`. Remove it, or the plugin.")
    if (config.get("context_parallel_size") or 1) > 1:
        raise RecipeError("Cannot train the objective: parallelism splits a row at targets. Set `context_parallel_size: 1`.")
    Objective.parse(section["objective"])
    Threshold.parse(section.get("threshold"))


def _plugin() -> type:
    from axolotl.integrations.base import BasePlugin

    class ObjectivePlugin(BasePlugin):
        """Train the objective of the config's section `bl_trainer`."""

        def get_input_args(self) -> str:
            return f"{__name__}.ObjectiveArgs"

        def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
            attach(trainer, cfg.bl_trainer["objective"], cfg.bl_trainer.get("threshold"))

    return ObjectivePlugin


def _args() -> type:
    from pydantic import BaseModel, model_validator

    class ObjectiveArgs(BaseModel):
        """The config's section `bl_trainer`, checked before a model loads."""

        bl_trainer: Any = None

        @model_validator(mode="before")
        @classmethod
        def check_objective(cls, data: Any) -> Any:
            check(data)
            return data

    return ObjectiveArgs


def __getattr__(name: str) -> Any:
    """Make axolotl's subclasses on first use (PEP 562)."""
    makers = {"ObjectivePlugin": _plugin, "ObjectiveArgs": _args}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, makers[name]())
