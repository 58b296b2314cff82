"""The rules of a recipe that need torch, but no other library: its precision, its objective and its threshold."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .._util.text import sentence

if TYPE_CHECKING:
    from .reading import Keys


def faults_of_precision(keys: "Keys") -> list[str]:
    """Return what is wrong with bfloat16 on a machine without an accelerator.

    It loads torch, and so leaves out a recipe at fault for which nothing else does.
    """
    is_half = not keys["fp16"] if keys["bf16"] is None else keys["bf16"]  # TRL's default
    if keys["use_cpu"] or not (is_half or keys["bf16_full_eval"]) or find_spec("torch_xla"):
        return []
    if keys.faults and not {"objective", "threshold"} & keys.values.keys():
        return []
    import torch

    if torch.accelerator.is_available():
        return []
    key = "bf16: true" if is_half else "bf16_full_eval: true"
    what = f"`{key}`{'' if key.partition(':')[0] in keys else ', the default,'}"
    return [f"{what} needs a GPU, and this machine has none. Write `use_cpu: true`, and `bf16: false` for float32."]


def faults_of_objective(keys: "Keys") -> list[str]:
    """Return what is wrong with the objective and the threshold, which needs torch alone.

    A user's function is tried once, by the trainer; here only for a recipe that does not get there.
    """
    found = []
    for key in [key for key in ("objective", "threshold") if key in keys.values]:
        if not keys.faults and _names_a_function(keys.values[key]):
            continue
        from ..objectives.objective import Objective
        from ..objectives.threshold import Threshold

        parse: Any = Objective.parse if key == "objective" else Threshold.parse
        try:
            parse(keys.values[key])
        except Exception as error:  # also of a user's function, which may raise anything
            said = sentence(error)
            found.append(said if f"`{key}`" in said else f"`{key}`: {said}")
    return found


def _names_a_function(value: Any) -> bool:
    """Whether an objective, or a part of it, goes by an import path."""
    if isinstance(value, dict | list):
        return any(map(_names_a_function, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and ":" in value
