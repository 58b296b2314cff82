"""Where `ref_logp`, log p under a reference model, comes from: the model without its adapter, or a column of the data set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig

from .._util.text import is_number
from ..errors import RecipeError
from ..head.targets import IGNORED
from ..objectives.objective import Objective
from .names import REFERENCE, ROW

HOW = (
    f"Train an adapter (`use_peft: true`), whose base model is then the reference, or give the data set a column `{REFERENCE}` "
    "beside `input_ids`: log p of each token under the reference."
)

STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # of LoRA, that leave the base model's weights alone


def reference_source(
    asking: Objective, peft_config: PeftConfig | None, columns: Mapping[str, list[str]], collates: bool
) -> str | None:
    """Return where an objective's `ref_logp` comes from: "column" if the data sets have `REFERENCE`, or else "adapter"; None if
    it doesn't ask for it.

    `columns`: names of the columns of each data set. `collates`: whether the batches are made by a collator of the user's own.
    Raises RecipeError if it comes from nowhere, or from where it would be wrong.
    """
    objective = next((part.name for _, part in asking.walk() if "ref_logp" in part.own_statistics), None)
    if objective is None:
        return None
    have = [name for name, names in columns.items() if REFERENCE in names]
    if have:
        for name, names in columns.items():
            if REFERENCE not in names:
                raise RecipeError(
                    f"The set {have[0]!r} has a column `{REFERENCE}`, and {name!r} has none. Add it there, or remove it "
                    "from all sets."
                )
            if "input_ids" not in names:
                raise RecipeError(
                    f"The column `{REFERENCE}` of the set {name!r} has no tokens beside it that it would be about. Give "
                    "`input_ids` as well, and `labels` where not all tokens are targets."
                )
        if collates:
            raise RecipeError(f"A `data_collator` of your own would lose the column `{REFERENCE}`. Leave it out.")
        return "column"
    if peft_config is None:
        raise RecipeError(f"Objective {objective!r} needs a reference model (`ref_logp`), and there is none. {HOW}")
    if peft_config.is_prompt_learning:
        raise RecipeError(
            f"Objective {objective!r} needs a reference model (`ref_logp`), and prompt-learning PEFT makes none: without its "
            "virtual tokens the first target has nothing before it. Take LoRA."
        )
    _refuse_other_base(peft_config, objective)
    return "adapter"


def _refuse_other_base(peft_config: Any, objective: str) -> None:
    """Raise RecipeError if an adapter changes the base model, which is then no reference."""
    if getattr(peft_config, "bias", "none") != "none":
        raise RecipeError(
            f"The adapter trains biases of the base model (`bias: {peft_config.bias}`), which is the reference of objective "
            f"{objective!r}. Write `bias: none`, or give the data set a column `{REFERENCE}`."
        )
    start = getattr(peft_config, "init_lora_weights", True)
    if start not in STARTS or getattr(peft_config, "kasa_config", None) is not None:
        key, value = ("init_lora_weights", start) if start not in STARTS else ("kasa_config", "...")
        raise RecipeError(
            f"The adapter's `{key}: {value}` changes the base model, which is the reference of objective {objective!r}. "
            f"Remove it, or give the data set a column `{REFERENCE}`."
        )


def refuse_lost_context(args: Any) -> None:
    """Raise RecipeError where tokens would be scored after others than those that the column's values are about."""
    key, value, write = "truncation_mode", args.truncation_mode, "keep_start"
    if args.packing:
        key, value, write = "packing_strategy", args.packing_strategy, "bfd"
    if value != write and (args.packing or args.max_length is not None):
        raise RecipeError(
            f"`{key}: {value}` cuts tokens off from those before them, and `{REFERENCE}` was computed after these. Write "
            f"`{key}: {write}`, or train an adapter without the column: its base model is the reference then."
        )


def check_reference(example: dict[str, Any], name: str) -> dict[str, Any]:
    """Check the column of an example of the set `name` against its tokens; what is about no target becomes 0. Raises
    RecipeError with the number of the row."""
    values, labels = example[REFERENCE], example["labels"]
    which = f"`{REFERENCE}` of row {example[ROW]} of the {name} set, counted from 0,"
    rule = "Give one number for each of `input_ids`: log p of that token after those before it; the first is not used."
    if not isinstance(values, list):
        raise RecipeError(f"{which} {'is missing' if values is None else f'is {values!r}, no list'}. {rule}")
    if len(values) != len(labels):
        raise RecipeError(f"{which} has {len(values)} numbers for {len(labels)} tokens. {rule}")
    used = [value if i > 0 and label != IGNORED else 0.0 for i, (value, label) in enumerate(zip(values, labels, strict=True))]
    for value in used:
        if not (is_number(value) and value <= 1e-3):  # above 0 by rounding
            raise RecipeError(f"{which} has {value!r} for a target token. It must be log p, a finite number of at most 0.")
    return {REFERENCE: used}


def truncated(example: dict[str, Any], kept: slice) -> dict[str, Any]:
    """Cut what there is for each token."""
    count = len(example["input_ids"])
    return {name: value[kept] for name, value in example.items() if isinstance(value, list) and len(value) == count}


def has_target(example: dict[str, Any]) -> bool:
    """Return whether anything trains; TRL drops the examples that are cut down to their prompt."""
    return any(label != IGNORED for label in example["labels"])


@contextmanager
def base_of(model: Any, peft_model: Any) -> Iterator[None]:
    """Let `model` be the base model of `peft_model`, which it wraps: no adapter, dropout, noise nor gradient."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), peft_model.disable_adapter():
            yield
    finally:
        model.train(was_training)
