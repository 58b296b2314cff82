"""`BLConfig` and `BLTrainer`: TRL's `SFTConfig` and `SFTTrainer` with f(p) in place of -log p."""

import copy
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollator,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from .._util.logs import get_logger
from .._util.transformers import EvalLoopOutput, TrainOutput, tracked_as
from ..losses.metrics import own_targets
from ..measurement.percentiles import resolve_percentile
from ..objectives.pricing import METRICS
from ..tokens.labels import warn_of_untrained
from ..tokens.names import EXAMPLE_LENGTHS, ROW
from ..tokens.prepare import Wanted, refuse_untargeted
from ..tokens.spans import weighing_of
from ..tokens.streams import StreamCount
from ..tokens.vocabulary import content_free_ids
from .callbacks import BeginTraining, RefuseNonfinite, StopOnSigterm, refuse_nonfinite
from .card import TAG
from .checkpoints import has_model, saving, take_average
from .config import threshold_of
from .guards import (
    leaves_no_empty_folder,
    missing_folders,
    refuse_dropped_sets,
    refuse_empty,
    refuse_frozen,
    refuse_half,
    refuse_other_weights,
    refuse_unevaluated,
    refuse_unlearnt,
    warn_of_few,
    warn_of_idle,
    warn_of_repeats,
)
from .loss import ObjectiveLoss, OwnHead, TRLHead, explains_lost_images, mean_over_batch, progress_of
from .metrics import EVALUATED, TokenMetrics, evaluated, owning_names
from .metrics_log import group
from .record import PAPER, RunRecord
from .refusals import refuse_lost_adapter, refuse_searched
from .resume import ResumePlan, planned_resume, resuming_with, take_up
from .scoring import ScoringTrainer

logger = get_logger(__name__)


class BLTrainer(ScoringTrainer):
    """
    [`~trl.SFTTrainer`] that minimises the mean of f(p) over target tokens in place of the mean of -log p. p is the probability
    that the model gives the target token (Li et al., https://arxiv.org/abs/2510.00526).

    Arguments are [`~trl.SFTTrainer`]'s, with `args` a [`BLConfig`]; a plain [`~trl.SFTConfig`] means `nll`. Training differs in
    `compute_loss` alone. Under `loss_head: trl` an `objective` of `"nll"` trains [`~trl.SFTTrainer`]'s weights bit for bit,
    but for models with `accepts_loss_kwargs = False`: with TRL their gradient depends on how a batch is cut.
    `recipe`, a mapping fit for JSON that you may set, is recorded in every checkpoint with the objective and the versions.

    It reports, in training and evaluation, means over all target tokens since the last log or of the whole evaluation set:
    `nll` (nats), `target_prob` (p), `kept_fraction` (share of tokens within the threshold), `gradient_weight` (-f'(p) p, the
    weight on the NLL gradient; 1 under NLL, 0 for a dropped token), TRL's `entropy` and `mean_token_accuracy`; in evaluation
    `perplexity` and `loss`, the mean of f; beside them what schedules have come to, as `objective_alpha`.

    A column `objective_weight`, a number >= 0 for each example, multiplies the costs of its tokens; the sum is divided by all
    targets. So do a message's `weight` and a list `token_weight` beside `input_ids`, where 0 masks. Common chat layouts train.

    Raises `BLError`, a `ValueError`, before the model loads: on arguments that would train something else than the objective,
    and on rows that can't train, with their numbers (those of a stream when they are read). And before the first step: on a
    model whose own log-probabilities the loss head doesn't compute (see [`verify_head`]).
    """

    _tag_names = [*SFTTrainer._tag_names, TAG]
    _name = "BLTrainer"
    _paper = PAPER

    recipe: dict[str, Any] | None = None
    is_left = False  # whether a finished run was found that is left as it is

    @leaves_no_empty_folder
    def __init__(
        self,
        model: Any,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.made_folders = missing_folders(Path(str(args.output_dir))) if args is not None else []
        on_sigterm = signal.getsignal(signal.SIGTERM)
        self._stream_count = StreamCount()
        super().__init__(**given)
        self._has_adapter = is_peft_model(self.model)
        refuse_half(self.model, self.is_deepspeed_enabled)
        refuse_other_weights(self.model, optimizers[0])
        if not self.is_shared_out("sp"):
            # TRL's loss divides by the target tokens of the whole batch, whatever the model's own would do, and shifts labels
            self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        marks = self.parsed_objective.special_tokens is not None
        self._special_ids = content_free_ids(self) if marks else None
        self.stops_on_nan = getattr(self.args, "stop_on_nan", False)
        self.token_metrics = TokenMetrics(self.accelerator, self.get_tp_size())
        self._begin, self._sigterm = BeginTraining(self), StopOnSigterm(self.accelerator, self.args)
        for callback in (self._begin, *([RefuseNonfinite()] if self.stops_on_nan else [])):
            self.add_callback(callback)
        self._sigterm.take_over(self, on_sigterm)

    @property
    def was_terminated(self) -> bool:
        """Whether SIGTERM ended training before its last step, with a checkpoint (`enable_jit_checkpoint: true`)."""
        return self._sigterm.stopped and self.state.global_step < self.state.max_steps

    @property
    def has_begun(self) -> bool:
        """Whether a training step has been made in this process."""
        return self._begin.steps > 0

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        refuse_lost_adapter(model, self._has_adapter)
        refuse_frozen(model)
        self.add_heads(model)
        return model

    def _hp_search_setup(self, trial):
        before = copy.copy(self.args)
        super()._hp_search_setup(trial)
        refuse_searched(self.args, before)

    def wanted(self, args, name):
        numbers = getattr(args, "stop_on_nan", False) and name == "train"
        return Wanted(numbers, self.parsed_objective.special_tokens is not None, self.reference == "column", weighs=True)

    def make_ready(self, rows):
        prepared = self._stream_count.after(rows, super().make_ready(self._stream_count.before(rows)))
        warn_of_untrained(rows.dataset, prepared, rows.name, rows.args, lambda: weighing_of(rows.dataset).masks)
        refuse_untargeted(prepared, rows.name, rows.args, lambda: ScoringTrainer.make_ready(self, rows.untruncated()))
        return prepared

    def resolve_threshold(self) -> None:
        """Measure a percentile threshold, unless it is known. Raises MeasurementError if it can't be, or is above `below`."""
        if self.threshold.resolved:
            return
        above = resolve_percentile(self, float(self.threshold.above_percentile or 0))
        refuse_empty(self.threshold, above)
        self.threshold = replace(self.threshold, above=above)

    @property
    def objective_loss(self) -> ObjectiveLoss:
        """The loss of a batch's tokens, as it is now: a percentile threshold is resolved when training begins."""
        head = OwnHead() if self.reference_head is None else TRLHead()
        adapted = self.model if self.reference == "adapter" else None
        return ObjectiveLoss(self.parsed_objective, self.threshold, head, self._special_ids, adapted)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        example_lengths, rows = (inputs.pop(name, None) for name in (EXAMPLE_LENGTHS, ROW))
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        with explains_lost_images(self.args.max_length):
            tokens = self.objective_loss(model, inputs, progress_of(self.state))
        loss = mean_over_batch(self, tokens, num_items_in_batch)
        if self.model.training:
            self.token_metrics.add("train", tokens, tokens.is_target)
            self.token_metrics.count(inputs)
            if self.stops_on_nan:
                refuse_nonfinite(loss.detach(), self.state.global_step + 1, rows, self.model, self.accelerator.process_index)
        else:
            self.token_metrics.add("eval", tokens, own_targets(self.accelerator, tokens.is_target, example_lengths))
        if not return_outputs:
            return loss
        with torch.no_grad():  # no loss head makes the logits
            return loss, model(**{key: value for key, value in inputs.items() if key != "labels"})

    def _pop_means(self, mode: str) -> dict[str, float]:
        """Return the means since the last call, and let TRL log its own other metrics."""
        means = self.token_metrics.pop(mode)
        if means:
            self._metrics[mode]["num_tokens"] = [self.token_metrics.num_tokens]
        if means and self.aux_loss_enabled:
            self._metrics[mode]["aux_loss"] = [means["aux_loss"]]
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Only where every process logs: `_pop_means` communicates. After a last evaluation the model is not in training mode
        if "loss" in logs or "train_loss" in logs:
            means = self._pop_means("train")
            logs.update({name: means[name] for name in METRICS if name in means})
            warn_of_idle(means, self.threshold, self.state.log_history, logs.get("grad_norm"))
            warn_of_few(means, self.threshold, self.state.log_history)
            logs.update(self.objective_loss.scheduled_at(progress_of(self.state, before=1)))  # by which the last step was made
        with tracked_as(group):
            super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader: DataLoader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        self.shard()
        self.ensure_verified()
        self.resolve_threshold()
        self.token_metrics.clear("eval")
        warn_of_repeats(dataloader.dataset, self.accelerator.num_processes)
        scheduled = self.objective_loss.scheduled_at(progress_of(self.state))
        with owning_names(self, metric_key_prefix, {*EVALUATED, *scheduled}):
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._pop_means("eval")
        refuse_unevaluated(means, metric_key_prefix)
        if means and output.metrics is not None:
            coefficient = self.router_aux_loss_coef if self.aux_loss_enabled else 0.0
            means = evaluated(means, self.threshold, coefficient) | scheduled
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    @leaves_no_empty_folder
    def train(
        self, resume_from_checkpoint: str | bool | ResumePlan | None = None, trial=None, ignore_keys_for_eval=None
    ) -> TrainOutput:
        self.is_left = False
        self.token_metrics.begin()
        if trial is None:
            refuse_frozen(self.model)
        else:  # `call_model_init` makes another model, which has another percentile
            self.threshold = threshold_of(self.args)
            resume_from_checkpoint = resume_from_checkpoint or False  # the configuration's is not a trial's
        refuse_dropped_sets(self)
        with self._sigterm.listening():
            plan = planned_resume(self.args, resume_from_checkpoint, self.accelerator.num_processes)
            if plan.checkpoint is not None:
                if take_up(self, plan):
                    return self._load_finished(plan)
            output = super().train(str(plan.checkpoint) if plan.checkpoint else None, trial, ignore_keys_for_eval)
            take_average(self.optimizer)
            self._stream_count.tell(self.args)
            refuse_unlearnt(self.has_begun, self.token_metrics.has_met_targets)
            return output

    def begin_counting(self) -> None:
        """Forget what has been counted in this call of `train`: `auto_find_batch_size` begins again after a failed step."""
        self.token_metrics.restart()
        self._stream_count.restart()
        self._metrics["train"].clear()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resuming_with(checkpoint, self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        take_average(self.optimizer)  # or saving would average the best model's with the last step's
        super()._load_best_model()

    def _load_finished(self, plan: ResumePlan) -> TrainOutput:
        """Load a run that has all its steps; transformers would train one more. What it has saved is left as it is."""
        self.state = plan.state
        done, steps = self.state.global_step, self.state.max_steps
        logger.warning(f"{plan.checkpoint} is at step {done} of {steps}: nothing is left to train.")
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # whose model can't be loaded without training
        self.is_left = sharded or has_model(Path(str(self.args.output_dir)))
        if not sharded:
            self._load_from_checkpoint(str(plan.checkpoint))
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
                self._load_best_model()
        return TrainOutput(done, 0.0, {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        take_average(self.optimizer)
        with RunRecord.last_in(self, Path(output_dir or str(self.args.output_dir))):
            super().save_model(output_dir, _internal_call)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process writes on, and may delete the checkpoint before: only once the others' parts are there
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with saving(folder, self.accelerator, self.args.should_save):
            super()._save_checkpoint(model, trial)

    def create_model_card(  # type: ignore[override]  # TRL's own, which differs from transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            RunRecord.of(self).write_card(self, model_name, dataset_name)
