"""`Setup`: a trainer's arguments, checked before the model loads."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from datasets import Dataset
from packaging.version import Version
from transformers import TrainingArguments

from .._util.trl import DataCollatorForLanguageModeling
from ..errors import DependencyError, RecipeError
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from ..tokens.columns import check_columns
from ..tokens.idle import check_labels, check_labels_of
from ..tokens.labels import columns_of, plain
from ..tokens.layouts import arrange_all, arrange_one
from ..tokens.prepare import refuse_untargeted
from ..tokens.reference import reference_source, refuse_lost_context
from ..tokens.spans import weighing_of
from .config import objective_of, threshold_of
from .guards import refuse_no_target
from .kept_rows import KeptRows
from .refusals import (
    is_context_parallel,
    refuse_bypass,
    refuse_lm_head_adapter,
    refuse_no_causal_lm,
    refuse_random_start,
    refuse_virtual_tokens,
)


@dataclass(frozen=True)
class Setup:
    """
    What a trainer is built from: nothing in it would train something other than the recipe says.

    `arguments`: `SFTTrainer`'s, with the data sets arranged and `drop_rows` dropped. `reference`: where the objective's
    `ref_logp` comes from: "column", "adapter", or None if it asks for none. `kept`: the rows that `drop_rows` keeps, None for
    all.
    """

    arguments: Mapping[str, Any]
    objective: Objective
    threshold: Threshold
    reference: str | None
    kept: KeptRows | None

    @classmethod
    def check(cls, arguments: Mapping[str, Any]) -> "Setup":
        """Check `SFTTrainer`'s arguments, by name. Raises BLError before the model loads."""
        _refuse_missing_triton()
        args = arguments.get("args")
        if isinstance(args, TrainingArguments):
            refuse_bypass(args)  # a `BLConfig` has been since it was made, but its attributes can be set
        if arguments.get("compute_loss_func") is not None:
            raise RecipeError(
                "`compute_loss_func` would replace the objective. Leave it out, and write your loss as an objective: "
                '`BLConfig(objective="my_package.losses:my_objective")`.'
            )
        peft_config = arguments.get("peft_config") or getattr(arguments["model"], "active_peft_config", None)
        refuse_lm_head_adapter(peft_config)
        refuse_random_start(peft_config)
        refuse_virtual_tokens(peft_config, args)
        objective, threshold = objective_of(args), threshold_of(args)
        given, kept = _kept(arrange_all(dict(arguments)), args)
        _check_sets(given, args, objective)
        reference = _reference(given, objective, peft_config)
        refuse_no_target(refuse_no_causal_lm(given["model"], args), given.get("peft_config"))
        return cls(given, objective, threshold, reference, kept)

    def check_another(self, dataset: Any, name: str, completion_only: bool) -> Any:
        """Return a data set that the trainer gets later, arranged and checked as its evaluation sets were.

        `completion_only`: whether the trainer leaves prompts out. Raises RecipeError.
        """
        given, args = self.arguments, self.arguments.get("args")
        dataset = arrange_one(given, dataset, name)
        _check_columns(given, args, self.objective, dataset, name)
        if not _has_own_collator(given):
            check_labels_of(dataset, name, args, completion_only or getattr(args, "completion_only_loss", None))
            _refuse_untargeted(args, dataset, name)
        return dataset


def _kept(given: dict[str, Any], args: Any) -> tuple[dict[str, Any], KeptRows | None]:
    """Return the arguments without the rows that `drop_rows` drops, and which it keeps."""
    spec = getattr(args, "drop_rows", None)
    if spec is None:
        return given, None
    dataset = given["train_dataset"]
    kept = KeptRows.of(spec, dataset, args.dataset_text_field)
    choose = kept.select if _has_own_collator(given) else kept.numbered
    return {**given, "train_dataset": choose(dataset)}, kept


def _refuse_missing_triton() -> None:
    if Version(version("trl")) < Version("1.16") and find_spec("triton") is None:
        raise DependencyError(
            f"TRL {version('trl')} computes the loss with Triton, which is not installed here. Run `pip install "
            "'trl>=1.16,<2'`, which also computes it without."
        )


def _sets(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training set, then the evaluation sets, by name."""
    evaluated = given.get("eval_dataset")
    sets = {"train": given.get("train_dataset"), **(evaluated if isinstance(evaluated, dict) else {"eval": evaluated})}
    return {name: dataset for name, dataset in sets.items() if dataset is not None and not isinstance(dataset, str)}


def _check_sets(given: Mapping[str, Any], args: Any, objective: Objective) -> None:
    """Raise RecipeError on columns and labels that are wrong, or that would be lost on their way."""
    for name, dataset in _sets(given).items():
        _check_columns(given, args, objective, dataset, name)
    if not _has_own_collator(given):
        check_labels(_sets(given), args, given.get("formatting_func") is not None)
        for name, dataset in _sets(given).items():
            _refuse_untargeted(args, dataset, name)


def _check_columns(given: Mapping[str, Any], args: Any, objective: Objective, dataset: Any, name: str) -> None:
    marks = objective.special_tokens is not None
    check_columns(dataset, name, marks, _obstacle(given, args, marks, any(weighing_of(dataset))))


def _refuse_untargeted(args: Any, dataset: Any, name: str) -> None:
    """Raise RecipeError on a set without a target that nothing prepares."""
    if (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset") and isinstance(dataset, Dataset):
        refuse_untargeted(plain(dataset), name, args)


def _has_own_collator(given: Mapping[str, Any]) -> bool:
    collator = given.get("data_collator")
    return collator is not None and type(collator) is not DataCollatorForLanguageModeling


def _obstacle(given: Mapping[str, Any], args: Any, marks: bool, weighs: bool) -> str | None:
    """Return what would lose the columns of tokens on their way to the loss, if anything; `weighs`: by weights within rows."""
    if args is not None and is_context_parallel(args):
        return "context parallelism cuts sequences up"
    if (marks or weighs) and given.get("formatting_func") is not None:
        return "`formatting_func` renders the examples"
    if weighs and (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        return "`skip_prepare_dataset` leaves out what multiplies and masks by it"
    return "the `data_collator` is your own" if _has_own_collator(given) else None


def _reference(given: Mapping[str, Any], objective: Objective, peft_config: Any) -> str | None:
    columns = {name: columns_of(dataset) for name, dataset in _sets(given).items()}
    source = reference_source(objective, peft_config, columns, given.get("data_collator") is not None)
    if source == "column" and given.get("args") is not None:
        refuse_lost_context(given["args"])
    return source
