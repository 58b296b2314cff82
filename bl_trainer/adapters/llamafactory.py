"""Any objective in LLaMA-Factory: `python -m bl_trainer.adapters.llamafactory` in place of `llamafactory-cli train`."""

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from ..objectives import Objective, Threshold
from .transformers import attach

# Settings under which another trainer, in this process or elsewhere, does the training
OTHERS = ("use_mca", "use_hyper_parallel", "use_ray")


def train(recipe: Mapping[str, Any], callbacks: list[Any] | None = None) -> None:
    """Train by a LLaMA-Factory recipe of the stage `sft` that also has the keys `objective` and maybe `threshold`.

    Raises ValueError on settings under which its trainer would minimise something else.
    """
    refuse(recipe)
    from llamafactory.train import tuner
    from llamafactory.train.sft import workflow

    own = {key: recipe[key] for key in ("objective", "threshold") if key in recipe}
    rest = {key: value for key, value in recipe.items() if key not in own}
    base: Any = workflow.CustomSeq2SeqTrainer

    class ObjectiveTrainer(base):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            attach(self, **own)

    workflow.CustomSeq2SeqTrainer = ObjectiveTrainer
    try:
        tuner.run_exp(rest, callbacks)
    finally:
        workflow.CustomSeq2SeqTrainer = base


def refuse(recipe: Mapping[str, Any]) -> None:
    """Raise RecipeError if a recipe has no objective, or the objective would not reach its trainer."""
    if "objective" not in recipe:
        raise RecipeError("Cannot train: the recipe has no `objective`. Add one, such as `objective: neg_p`.")
    if (stage := recipe.get("stage", "sft")) != "sft":
        raise RecipeError(f"Cannot train an objective in the stage {stage!r}. Set `stage: sft`.")
    if found := [key for key in OTHERS if recipe.get(key)]:
        raise RecipeError(f"Cannot train an objective with `{found[0]}`: another trainer would run. Set it to false.")
    Objective.parse(recipe["objective"])
    Threshold.parse(recipe.get("threshold"))


if __name__ == "__main__":
    from llamafactory.hparams import read_args

    given = read_args()
    if not isinstance(given, dict):
        raise RecipeError("Cannot read the recipe: it is no file. Run `python -m bl_trainer.adapters.llamafactory FILE.yaml`.")
    train(given)
