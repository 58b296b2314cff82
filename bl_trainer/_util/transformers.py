"""What this package uses from inside transformers, beyond its public names: a release that moves something breaks here.

tests/test_foreign.py says what each is for.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers.integrations import integration_utils
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import rewrite_logs
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from ..errors import RecipeError

jit_checkpoint_callback: Any = None  # not in the oldest transformers
with suppress(ImportError):
    from transformers.trainer_jit_checkpoint import JITCheckpointCallback as jit_checkpoint_callback

__all__ = [
    "ATTRIBUTES",
    "METHODS",
    "NAMES",
    "Conv1D",
    "EvalLoopOutput",
    "TrainOutput",
    "balancing_loss_of",
    "has_length",
    "is_deepspeed_zero3_enabled",
    "jit_checkpoint_callback",
    "rewrite_logs",
    "tracked_as",
]

BALANCED = {"gate_logits", "num_experts", "top_k", "attention_mask"}  # parameters of a load-balancing loss

# Names -> what breaks without them
NAMES = {
    "rewrite_logs": "the group `objective` in trackers",
    "Conv1D": "the names of GPT-2's linear layers in an error about `lora_target_modules`",
    "EvalLoopOutput": "metrics of an evaluation",
    "TrainOutput": "a run that has all its steps",
    "jit_checkpoint_callback": "`enable_jit_checkpoint`, which saves at the end of a step",
    "has_length": "the steps of a resumed run, and the warning that an evaluation by several processes counts rows twice",
    "is_deepspeed_zero3_enabled": "measurements under ZeRO-3",
}

# Methods of `Trainer` that are overridden or called -> what then breaks
METHODS = {
    "_hp_search_setup": "the refusal to search over the objective",
    "call_model_init": "the loss head of a search's models",
    "_load_from_checkpoint": "the model of a run that has all its steps",
    "_load_optimizer_and_scheduler": "the refusal to resume with another learning rate",
    "_load_best_model": "the best model of a schedule-free optimizer",
    "_save_rng_state": "checkpoints of several processes, kept until all parts are written",
    "_get_output_dir": "the removal of a broken checkpoint that is written again",
    "_prepare_inputs": "measurements",
    "compute_loss_context_manager": "measurements under autocast",
    "evaluation_loop": "measurements and metrics",
    "prediction_step": "measurements",
    "get_total_train_batch_size": "the place in the data where a run resumes",
    "get_tp_size": "the loss under tensor parallelism",
    "create_optimizer": "measurements under FSDP2 before training",
}

# Attributes of a `Trainer` -> what then breaks
ATTRIBUTES = {
    "model_accepts_loss_kwargs": "the count of the global batch's target tokens",
    "current_gradient_accumulation_steps": "`normalize: kept`, and the auxiliary loss",
    "_train_batch_size": "the place where a run with `auto_find_batch_size` resumes",
    "is_fsdp_enabled": "measurements of sharded models",
    "is_deepspeed_enabled": "measurements of sharded models",
}


def balancing_loss_of(model: Any) -> Callable[..., Any] | None:
    """Return the load-balancing loss that a mixture of experts' own forward computes, None where it has none.

    It takes the routers' logits of each layer, `num_experts`, `top_k` and `attention_mask`; more is a RecipeError.
    """
    modules = [sys.modules[kind.__module__] for kind in type(model).__mro__]  # FSDP makes a class of its own of the model's
    own = next((found for module in modules if (found := getattr(module, "load_balancing_loss_func", None))), None)
    if own is not None and not inspect.signature(own).parameters.keys() <= BALANCED:
        raise RecipeError(
            f"Cannot train {type(model).__name__} with its auxiliary loss, which needs more than the routers' logits. Write "
            "`router_aux_loss_coef: 0`."
        )
    return own


@contextmanager
def tracked_as(rename: Callable[[str], str | None]) -> Iterator[None]:
    """Let trackers log each metric under the name that `rename` gives its key; where that is None under their own."""

    def rewritten(logs: dict[str, Any]) -> dict[str, Any]:
        renamed = {key: name for key in logs if (name := rename(key))}
        others = {key: value for key, value in logs.items() if key not in renamed}
        return rewrite_logs(others) | {name: logs[key] for key, name in renamed.items()}

    integration_utils.rewrite_logs = rewritten
    try:
        yield
    finally:
        integration_utils.rewrite_logs = rewrite_logs
