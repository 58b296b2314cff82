"""What a run resumes from: the only place that compares a recipe, or a trainer's arguments, with a checkpoint."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from packaging.version import Version
from transformers import TrainerState, TrainingArguments

from .._util.logs import get_logger
from .._util.process import is_first_here
from ..errors import CheckpointError
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold, spell_probability
from ..tokens.row_hash import SAMPLED, sample_of
from .checkpoints import RECORD_FILE, STATE_FILE, last_whole, pickled_text, read_json, read_record, why_broken
from .config import choice_of, objective_of, threshold_of
from .kept_rows import KeptRows
from .pace import Pace
from .record import source_of

logger = get_logger(__name__)

# What must stay as it was; other keys may change, with a warning. A checkpoint's optimizer brings its own rate and moments
FIXED = (
    "optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "drop_rows",
    "use_dora", "use_rslora", "lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "lora_target_parameters",
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "model_revision",
)  # fmt: skip

SETS = ("lora_target_modules", "lora_modules_to_save", "lora_target_parameters")  # whose order means nothing

OF_GROUPS = {
    "initial_lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1, adam_beta2",
    "eps": "adam_epsilon",
}

# Of an adapter's configuration: what its weights are of, and by which scale they are read
OF_ADAPTERS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
    "target_parameters", "modules_to_save", "exclude_modules", "layers_to_transform", "bias",
)  # fmt: skip

FREE = ("output_dir", "resume_from_checkpoint", "env", "objective", "threshold", "model_name_or_path", "use_peft", "report_to")


@dataclass(frozen=True)
class Given:
    """What a recipe knows besides the training arguments: its keys, their defaults, and its model.

    `meant`: returns what a key's value means, however it is spelled.
    """

    keys: dict[str, Any]
    defaults: dict[str, Any]
    model: str
    use_peft: bool
    meant: Callable[[str, Any], Any]


@dataclass(frozen=True)
class ResumePlan:
    """What a run resumes from.

    `checkpoint`: the folder, None for a new run. `threshold`: the run's, with the percentile that the checkpoint records.
    `skipped`: later checkpoints that are broken, and why. `warnings`: what differs from an uninterrupted run.
    """

    checkpoint: Path | None = None
    threshold: Threshold = field(default_factory=Threshold)
    skipped: dict[Path, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @cached_property
    def state(self) -> TrainerState:
        """The state that the checkpoint holds, a new one if it holds none."""
        path = (self.checkpoint or Path()) / STATE_FILE
        return TrainerState.load_from_json(str(path)) if path.is_file() else TrainerState()

    def say_skipped(self) -> None:
        """Warn on stderr of checkpoints that are skipped."""
        say(f"{path} is skipped, since {why}: it was not written to its end." for path, why in self.skipped.items())
        if self.skipped and self.checkpoint is None:
            say(["no complete checkpoint is left, so training starts anew."])


def say(warnings: Iterable[str]) -> None:
    """Write warnings to stderr, once per machine."""
    for warning in warnings if is_first_here() else ():
        print(f"warning: {warning}", file=sys.stderr)


def plan_resume(
    args: TrainingArguments, requested: str | bool | None, *, processes: int, given: Given | None = None
) -> ResumePlan:
    """Return what to resume from: nothing, the last whole checkpoint of `output_dir` (`true`), or the folder `requested`.

    It reads files and writes none. `processes`: how many train now. `given`: what the recipe says; without one, as in Python,
    a folder's completeness and further keys are not looked at, and its model only by `take_up`. Raises CheckpointError on a
    checkpoint that can't be resumed from, or was trained with something else.
    """
    asked, folder = str(requested or False), Path(args.output_dir or ".")
    skipped: dict[Path, str] = {}
    if asked.lower() == "true":
        checkpoint, skipped = last_whole(folder)
    else:
        checkpoint = None if asked.lower() == "false" else Path(asked)
        if checkpoint and given:
            _refuse_broken(checkpoint)
    if checkpoint is None:
        return ResumePlan(skipped=skipped)
    objective, asked_threshold = objective_of(args), threshold_of(args)
    record = read_record(str(checkpoint))
    threshold = _recorded_threshold(checkpoint, record, asked_threshold)
    _refuse_other_loss(checkpoint, record, objective, threshold, asked_threshold)
    _refuse_other_choice(checkpoint, record, args)
    refuse_lost_epoch(str(checkpoint))
    warnings = [*_warn_of_loss(checkpoint, record, objective), *_warn_of_processes(checkpoint, record, processes)]
    if given:
        _refuse_other_model(checkpoint, given)
        warnings = [*_warn_of_changes(checkpoint, record, given), *warnings]
        if checkpoint.resolve().parent == folder.resolve():
            _refuse_earlier(checkpoint, folder)
    return ResumePlan(checkpoint, threshold, skipped, tuple(warnings))


def planned_resume(args: TrainingArguments, requested: str | bool | ResumePlan | None, processes: int) -> ResumePlan:
    """Return the plan that a recipe has made, or make one, with its warnings. Raises CheckpointError as `plan_resume`.

    `requested`: as `train` was called; None for what `args` say. There `true` may find nothing, as in a recipe.
    """
    if isinstance(requested, ResumePlan):
        return requested
    if requested is None:
        requested = str(args.resume_from_checkpoint or False)
    plan = plan_resume(args, requested, processes=processes)
    plan.say_skipped()
    if requested is True and plan.checkpoint is None:
        raise CheckpointError(
            f"Cannot resume: {args.output_dir} has no complete checkpoint. Leave `resume_from_checkpoint` out to start anew."
        )
    for warning in plan.warnings:
        logger.warning(warning)
    return plan


def _refuse_broken(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: it is not a folder. Write a checkpoint's path, or `true` for the latest "
            "complete one."
        )
    why = why_broken(checkpoint)
    if why:
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: {why}. Choose an earlier checkpoint, or set `resume_from_checkpoint: true` "
            "to use the latest complete one."
        )


def _refuse_earlier(checkpoint: Path, folder: Path) -> None:
    """Raise CheckpointError if `folder` has later checkpoints, which resuming from this one would overwrite."""
    last, _ = last_whole(folder)
    if last is not None and _step_of(last) > _step_of(checkpoint):
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: {last} is later, and would be overwritten. Write another "
            "`output_dir`, or move the later checkpoints away."
        )


def _step_of(checkpoint: Path) -> int:
    return int((read_json(checkpoint / STATE_FILE) or {}).get("global_step", 0))


def _recorded_threshold(checkpoint: Path, record: dict[str, Any], asked: Threshold) -> Threshold:
    """Return the threshold to resume with: a percentile's value is what it was at the start."""
    if record.get("save_only_model"):
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: it was saved with `save_only_model: true`, without what resuming needs: the "
            "optimizer's state and the random numbers. Start a new run from it as `model_name_or_path`."
        )
    if asked.resolved:
        return asked
    value = (record.get("threshold") or {}).get("above")
    if isinstance(value, float) and value > 0:
        return replace(asked, above=value)
    raise CheckpointError(
        f"Cannot resume from {checkpoint}: it doesn't record the probability that `above_percentile: "
        f"{asked.above_percentile}` means, and its model is no longer the one to measure it on. Write it as "
        "`threshold: {above: ...}`."
    )


def _refuse_other_loss(
    checkpoint: Path, record: dict[str, Any], objective: Objective, threshold: Threshold, asked: Threshold
) -> None:
    """Raise CheckpointError if another objective or threshold is recorded; TRL's own checkpoints are of NLL without one."""
    recorded = record or {"objective": {"name": "nll"}, "threshold": Threshold().to_dict()}
    objective_now = objective.resolved.to_dict()
    for key, value, said in (
        ("objective", objective_now, objective_now),
        ("threshold", threshold.to_dict(), asked.to_dict()),
    ):
        if recorded.get(key) != json.loads(json.dumps(value, default=str)):
            raise CheckpointError(
                f"Cannot resume from {checkpoint}: it was trained with {key} {recorded.get(key)}, the recipe says {said}. "
                f"Resume with the recorded {key}, or start a new run from that checkpoint as `model_name_or_path`."
            )


def _refuse_other_choice(checkpoint: Path, record: dict[str, Any], args: TrainingArguments) -> None:
    """Raise CheckpointError if scores would be compared with the checkpoint's best one, of another metric."""
    before, now = record.get("best"), choice_of(args)
    has_best = (read_json(checkpoint / STATE_FILE) or {}).get("best_metric") is not None
    if before and now and before != now and has_best:
        was, asked = (", ".join(f"`{key}: {str(value).lower()}`" for key, value in each.items()) for each in (before, now))
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: its best score is by {was}, and {asked} is asked for. Restore these keys, or "
            "start a new run from that checkpoint as `model_name_or_path`."
        )


def _warn_of_loss(checkpoint: Path, record: dict[str, Any], objective: Objective) -> Iterator[str]:
    """Yield what isn't known of the checkpoint's loss; raises CheckpointError if another trainer's was another than NLL."""
    if record:
        if record.get("objective_source") not in (None, source_of(objective)):
            yield f"the code of the objective has changed since {checkpoint}: the run continues by the new one."
        return
    loss = pickled_text(checkpoint / "training_args.bin", "loss_type")
    if loss is None:
        yield f"{checkpoint} does not record its loss, which is taken for NLL. If it was another, start a new run."
    elif loss not in ("", "nll", "chunked_nll"):
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: it was trained with `loss_type: {loss}`. Start a new run from that checkpoint "
            "as `model_name_or_path`."
        )


def _warn_of_processes(checkpoint: Path, record: dict[str, Any], processes: int) -> Iterator[str]:
    before = record.get("processes", processes)
    if before != processes:
        yield (
            f"{checkpoint} is of {before} processes, and now there are {processes}: batches and random numbers are others "
            "than in an uninterrupted run."
        )


def _warn_of_changes(checkpoint: Path, record: dict[str, Any], given: Given) -> Iterator[str]:
    """Yield which keys have changed since; raises CheckpointError if one of them is `FIXED`."""
    recorded = record.get("recipe")
    if recorded is None:
        return
    now = json.loads(json.dumps(given.keys, default=str))
    changed = {}
    for key in sorted({*recorded, *now} - set(FREE)):
        before, after = (given.meant(key, values.get(key, given.defaults.get(key))) for values in (recorded, now))
        if _compared(key, before) != _compared(key, after):
            changed[key] = f"`{key}` from {before} to {after}"
    for key in FIXED:
        if key in changed:
            raise CheckpointError(
                f"Cannot resume from {checkpoint}: the recipe changes {changed[key]}. Change it back, or write another "
                "`output_dir`."
            )
    if changed:
        yield f"since {checkpoint} the recipe has changed: {', '.join(changed.values())}."


def _compared(key: str, value: Any) -> Any:
    """Return a value by which two spellings of the same are equal."""
    if key not in SETS or value is None:
        return value
    return sorted(value) if isinstance(value, list) else [value]


def refuse_lost_epoch(checkpoint: str) -> None:
    """Raise CheckpointError if the installed libraries would resume within a later epoch with the first one's examples.

    accelerate below 1.15 begins to count epochs anew when it skips what was trained, and transformers below 5 doesn't tell it
    the epoch afterwards.
    """
    epoch = (read_json(Path(checkpoint) / STATE_FILE) or {}).get("epoch") or 0
    installed = {name: version(name) for name in ("accelerate", "transformers")}
    if epoch < 1 or not epoch % 1 or Version(installed["accelerate"]) >= Version("1.15"):
        return
    if Version(installed["transformers"]) < Version("5"):
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: it is {epoch:.4g} epochs into its run, and accelerate "
            f"{installed['accelerate']} with transformers {installed['transformers']} would continue with the examples of the "
            "first. Run `pip install 'accelerate>=1.15'`."
        )


def _refuse_other_model(checkpoint: Path, given: Given) -> None:
    """Raise CheckpointError unless `checkpoint` holds an adapter of the recipe's model, or without `use_peft` a whole model."""
    path, model = checkpoint / "adapter_config.json", given.model
    if path.is_file() is not given.use_peft:
        holds, says = ("an adapter", "no `use_peft`") if path.is_file() else ("a whole model", "`use_peft: true`")
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: it holds {holds}, and the recipe has {says}. Restore the checkpoint's recipe."
        )
    _refuse_other_base(checkpoint, model)


def _refuse_other_base(checkpoint: Path, model: str) -> None:
    """Raise CheckpointError if the checkpoint was trained from another model than `model`, a folder or Hub name.

    A whole model of the same run, such as the checkpoint itself, may stand for the one that it was trained from.
    """
    path, what, key = checkpoint / "adapter_config.json", "it is an adapter of", "base_model_name_or_path"
    bases: set[Any] = {model}
    if not path.is_file():
        path, what, key = checkpoint / RECORD_FILE, "it was trained from", "base_model"
        bases |= {read_record(model).get(key)}
    base = (read_json(path) or {}).get(key)
    if base and model and base not in bases and Path(base).resolve() != Path(model).resolve():
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: {what} {base}, and the model is {model}. Write "
            f"`model_name_or_path: {base}`, or another `output_dir` for a new run. If it is the same model in another place, "
            f"correct `{key}` in {path}."
        )


def take_up(trainer: Any, plan: ResumePlan) -> bool:
    """Let `trainer` go by the plan's threshold; print where it resumes, and warn of what differs from an uninterrupted run.

    Returns whether the checkpoint has all steps of the trainer's run. Raises CheckpointError if it records another model, loss
    head, as heads round gradients differently, other rows, or another adapter's configuration.
    """
    checkpoint, state = plan.checkpoint or Path(), plan.state
    _refuse_other_base(checkpoint, getattr(trainer.model.config, "name_or_path", None) or "")
    _refuse_other_head(checkpoint, trainer.loss_head)
    _refuse_other_rows(checkpoint, trainer.kept_rows)
    _refuse_other_adapter(checkpoint, trainer.model)
    _warn_of_other_rows(checkpoint, trainer.train_dataset)
    trainer.threshold = threshold = plan.threshold
    if threshold.above_percentile is not None:
        trainer.accelerator.print(
            f"The threshold is p >= {spell_probability(threshold.above, 6)}: percentile {threshold.above_percentile:g}, as "
            f"{checkpoint} records it."
        )
    pace = Pace.resumed(trainer, state)
    steps = pace.length(trainer.args)
    is_finished = 0 < steps <= state.global_step
    if not is_finished:
        for warning in (*_warn_of_order(checkpoint, state, trainer), *_warn_of_place(checkpoint, state, trainer, pace, steps)):
            logger.warning(warning)
    trainer.accelerator.print(f"Resuming from {checkpoint}, after step {state.global_step}.")
    return is_finished


def _warn_of_order(checkpoint: Path, state: TrainerState, trainer: Any) -> Iterator[str]:
    """Yield why the libraries may give the examples in another order than in an uninterrupted run."""
    args, rest = trainer.args, "the examples may come in another order than in an uninterrupted run."
    is_stream = isinstance(trainer.train_dataset, IterableDataset)
    strategy = getattr(args, "train_sampling_strategy", "random")
    by_length = strategy == "group_by_length" or bool(getattr(args, "group_by_length", False))  # an older transformers'
    if (state.epoch or 0) > 1 and (is_stream or by_length):
        source = "stream" if is_stream else "set grouped by length"
        yield f"{checkpoint} is {state.epoch:.4g} epochs into its run: from a {source} {rest}"
    is_seeded = getattr(args.accelerator_config, "use_seedable_sampler", True)
    if not is_seeded and not (is_stream or by_length or strategy != "random"):
        yield f"`accelerator_config: {{use_seedable_sampler: false}}` draws the order anew where a run resumes: {rest}"


def _warn_of_place(checkpoint: Path, state: TrainerState, trainer: Any, pace: Pace, steps: int) -> Iterator[str]:
    """Yield where the run resumes in its data and in its objective's schedule, if the checkpoint was elsewhere."""
    step, recorded = state.global_step, read_record(str(checkpoint)).get("pace")
    before, now = Pace(**recorded).at(step) if recorded else None, pace.at(step)
    if before and before != now and not trainer.args.ignore_data_skip:
        place, other = (f"example {examples:,} of epoch {epochs + 1}" for epochs, examples in (before, now))
        yield (
            f"{checkpoint} has trained up to {place}, and the run resumes after {other}: some examples are trained twice or "
            "left out. To keep the place, restore the batch size, `gradient_accumulation_steps`, the number of processes, and "
            "the number of rows."
        )
    if "progress" in trainer.parsed_objective.statistics and state.max_steps != steps and min(state.max_steps, steps) > 0:
        yield (
            f"the objective goes by training progress, which the change of length from {state.max_steps:,} to {steps:,} steps "
            f"moves: it resumes at {step / steps:.0%} of its schedule, where it was at {step / state.max_steps:.0%}."
        )


@contextmanager
def resuming_with(checkpoint: str | None, optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Let a trainer load a checkpoint's optimizer and scheduler, and continue by the schedule as it is now.

    The last learning rate of a shorter run's schedule would otherwise hold for one more step. Raises CheckpointError if the
    checkpoint brings settings of the optimizer that are not the trainer's.
    """
    groups = [dict(group) for group in getattr(optimizer, "param_groups", ())]
    yield
    if checkpoint is None:
        return
    for before, group in zip(groups, getattr(optimizer, "param_groups", ()), strict=False):
        for name, key in OF_GROUPS.items():
            if name in before and name in group and _numbers(before[name]) != _numbers(group[name]):
                raise CheckpointError(
                    f"Cannot resume from {checkpoint}: its optimizer keeps {key} {group[name]}, and {before[name]} is "
                    "asked for. Restore it, or start a new run from that checkpoint as `model_name_or_path`."
                )
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper has one
    rates = getattr(schedule, "lr_lambdas", ())
    for group, rate in zip(optimizer.param_groups if rates else (), rates, strict=False):
        group["lr"] = group["initial_lr"] * rate(schedule.last_epoch)
    if rates:
        state = schedule.state_dict() | {"_last_lr": [group["lr"] for group in optimizer.param_groups]}
        schedule.load_state_dict(state)  # which is logged


def _numbers(value: Any) -> list[float]:
    """Return a setting's numbers; a sharded checkpoint gives lists for tuples."""
    return [float(each) for each in (value if isinstance(value, (list, tuple)) else [value])]


def _refuse_other_adapter(checkpoint: Path | None, model: Any) -> None:
    """Raise CheckpointError if `model` would read the checkpoint's adapter by another configuration than trained it."""
    path = (checkpoint or Path()) / "adapter_config.json"
    recorded, adapters = read_json(path) or {}, getattr(model, "peft_config", None) or {}
    config = next(iter(adapters.values()), None)
    for key in OF_ADAPTERS if config is not None else ():
        before, now = (_as_recorded(value) for value in (recorded.get(key), getattr(config, key, None)))
        if key in recorded and before != now:
            raise CheckpointError(
                f"Cannot resume from {checkpoint}: its adapter has `{key}` {before}, the trainer's {now}. Restore it, or "
                "start a new run."
            )


def _as_recorded(value: Any) -> Any:
    """Return a value of an adapter's configuration as a file has it; lists are sets, and empty ones are none."""
    return (sorted(value, key=str) if isinstance(value, (set, list, tuple)) else value) or None


def _refuse_other_head(checkpoint: Path | None, loss_head: str) -> None:
    recorded = read_record(str(checkpoint)).get("loss_head", loss_head)
    if recorded != loss_head:
        advice = "Add" if recorded == "trl" else "Remove"
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: the loss head changed from `{recorded}` to `{loss_head}`. They round gradients "
            f"differently. {advice} `loss_head: trl` and launch as before, or start a new run with another `output_dir`."
        )


def _warn_of_other_rows(checkpoint: Path | None, dataset: Any) -> None:
    before, now = read_record(str(checkpoint)).get("rows"), sample_of(dataset)
    if before and now and before != {key: now.get(key) for key in before}:  # an older record has fewer
        logger.warning(
            f"The training set has changed since {checkpoint}: it had {before['count']:,} rows, and has {now['count']:,}. The "
            f"number and the tokens of {SAMPLED} rows are compared, so more may differ. The run continues with the new rows."
        )


def _refuse_other_rows(checkpoint: Path | None, kept: KeptRows | None) -> None:
    """Raise CheckpointError if `drop_rows` keeps other rows than the checkpoint's did, also by the same rule."""
    recorded, now = read_record(str(checkpoint)).get("drop_rows") or {}, kept.record if kept else {}
    if recorded.get("hash") != now.get("hash"):
        before, after = (
            f"{each['dropped']:,} of {each['rows']:,} by {each['rule']}" if each else "none" for each in (recorded, now)
        )
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: `drop_rows` dropped other rows ({before}, now {after}). Restore the scores and "
            "the key, or start a new run with another `output_dir`."
        )
