"""`BLConfig` and `BLTrainer`: TRL's `SFTConfig` and `SFTTrainer` with f(p) in place of -log p."""

import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
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
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from .._util.transformers import EvalLoopOutput, TrainOutput
from ..measurement.percentiles import resolve_percentile
from ..objectives.pricing import METRICS
from ..tokens.labels import refuse_misaligned, warn_of_untrained
from ..tokens.names import EXAMPLE_LENGTHS, REFERENCE, ROW
from ..tokens.prepare import Wanted, refuse_untargeted
from ..tokens.streams import StreamCount
from ..tokens.vocabulary import content_free_ids
from .callbacks import BeginTraining, RefuseNonfinite, StopOnSigterm, refuse_nonfinite
from .card import TAG
from .checkpoints import has_model, saving
from .config import threshold_of
from .guards import (
    leaves_no_empty_folder,
    missing_folders,
    refuse_dropped_sets,
    refuse_empty,
    refuse_frozen,
    refuse_unevaluated,
    refuse_unlearnt,
    warn_of_idle,
    warn_of_repeats,
)
from .loss import ObjectiveLoss, OwnHead, TRLHead, explains_lost_images, mean_over_batch, tell_of_loss
from .metrics import TokenMetrics, evaluated, own_targets
from .record import PAPER, RunRecord
from .refusals import refuse_bypass
from .resume import ResumePlan, planned_resume, refuse_other_head, state_of, steps_of, tell_of_resuming
from .scoring import ScoringTrainer

logger = get_logger(__name__)


class BLTrainer(ScoringTrainer):
    """
    [`~trl.SFTTrainer`] that minimises the mean of f(p) over target tokens in place of the mean of -log p, p being the
    probability that the model gives the target token (Li et al., https://arxiv.org/abs/2510.00526).

    What trains differs in `compute_loss` alone, which divides and adds up as TRL's does. log p comes from `objective_head`.
    Where that can't serve, which `train` says, and under `loss_head: trl`, it comes from TRL's head: then
    `objective="nll"` trains weights that are bit-identical to [`~trl.SFTTrainer`]'s, where that counts target tokens rightly:
    for a model with `accepts_loss_kwargs = False` its gradient depends on how a batch is cut, and this one's doesn't.

    Arguments are [`~trl.SFTTrainer`]'s, with `args` a [`BLConfig`]; a plain [`~trl.SFTConfig`] means `nll`.
    `recipe`, a mapping fit for JSON that you may set, is recorded in every checkpoint with the objective and the versions.
    `compute_loss_func` is refused (`ValueError`), and so are a PEFT adapter on the LM head, prompt-learning PEFT on packed or
    flattened examples, and a model whose own log-probabilities the head doesn't compute (see [`verify_head`]).

    It reports, in training and evaluation, means over all target tokens since the last log or of the whole evaluation set:
    `nll` (nats), `target_prob` (p), `kept_fraction` (share of tokens within the threshold), `gradient_weight` (-f'(p) p, the
    weight on the NLL gradient; 1 under NLL, 0 for a dropped token), TRL's `entropy` and `mean_token_accuracy`, and in
    evaluation `perplexity` and `loss`, the mean of f. What the objective's schedules have come to is reported beside them, as
    `objective_alpha`; evaluation goes by the values of the moment.

    A column `objective_weight` of a data set, a number >= 0 for each example, multiplies the costs of its tokens; the sum is
    divided by all target tokens as without it. Wrong weights, and data that can't tell what `special_tokens` needs to know, are
    a `ValueError` before the model loads; in a stream when the row is read.

    Conversations in ShareGPT's layout, as JSON text, or in a column of another name train as `messages` do. A row without a
    training text, or of which the chat template leaves out a message, is a `ValueError` that names the row.
    """

    _tag_names = [*SFTTrainer._tag_names, TAG]
    _name = "BLTrainer"
    _paper = PAPER

    recipe: dict[str, Any] | None = None
    is_left = False  # whether a finished run was found that is left as it is
    _has_met_targets = False
    _first_step = 0  # of this process; a resumed run begins later

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
        if not self.is_shared_out("sp"):
            # TRL's loss divides by the target tokens of the whole batch, whatever the model's own would do, and shifts labels
            self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        marks = self.parsed_objective.special_tokens is not None
        self._special_ids = content_free_ids(self) if marks else None
        self.stops_on_nan = getattr(self.args, "stop_on_nan", False)
        self._sigterm = StopOnSigterm(self.accelerator)
        self._add_callbacks(on_sigterm)
        self.token_metrics = TokenMetrics(self.accelerator, self.get_tp_size())

    def _add_callbacks(self, on_sigterm: Any) -> None:
        self.add_callback(BeginTraining(self))
        if self.stops_on_nan:
            self.add_callback(RefuseNonfinite())
        if getattr(self.args, "enable_jit_checkpoint", False):
            self._sigterm.take_over(self, on_sigterm)

    @property
    def was_terminated(self) -> bool:
        """Whether SIGTERM ended training before its last step, with a checkpoint (`enable_jit_checkpoint: true`)."""
        return self._sigterm.stopped and self.state.global_step < self.state.max_steps

    @property
    def has_begun(self) -> bool:
        """Whether a training step has been made in this process."""
        return self.state.global_step > self._first_step

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if self._has_adapter and not is_peft_model(model):
            raise ValueError(
                "Cannot train the model that `model_init` returns: the trainer's model has an adapter, this one has none. "
                "Return `get_peft_model(model, peft_config)`."
            )
        refuse_frozen(model)
        self.add_heads(model)
        return model

    def _hp_search_setup(self, trial):
        given = [getattr(self.args, key, None) for key in ("objective", "threshold")]
        super()._hp_search_setup(trial)
        if [getattr(self.args, key, None) for key in ("objective", "threshold")] != given:
            raise ValueError(
                "Cannot search over `objective` or `threshold` with `hyperparameter_search`: they are set when the trainer is "
                "built. Remove them from `hp_space`, and compare objectives by `bl-trainer sweep`."
            )
        refuse_bypass(self.args)

    def wanted(self, args, name):
        numbers = getattr(args, "stop_on_nan", False) and name == "train"
        return Wanted(numbers, self.parsed_objective.special_tokens is not None, self.reference == "column")

    def make_ready(self, rows):
        prepared = self._stream_count.after(rows, super().make_ready(self._stream_count.before(rows)))
        warn_of_untrained(rows.dataset, prepared, rows.name, rows.args)
        refuse_untargeted(prepared, rows.name, rows.args, lambda: ScoringTrainer.make_ready(self, rows.untruncated()))
        return prepared

    def resolve_threshold(self) -> None:
        """Measure the probability that `threshold.above_percentile` stands for, unless it is known.

        Raises MeasurementError if it can't be measured, or is above `threshold.below`.
        """
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
        refuse_misaligned(inputs)
        example_lengths, rows = (inputs.pop(name, None) for name in (EXAMPLE_LENGTHS, ROW))
        if self.reference == "column" and REFERENCE not in inputs:
            raise ValueError(f"This data set has no column `{REFERENCE}`, as the training set has. Add it.")
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        with explains_lost_images(self.args.max_length):
            tokens = self.objective_loss(model, inputs, self._progress())
        loss = mean_over_batch(self, tokens, num_items_in_batch)
        if self.model.training:
            self.token_metrics.add("train", tokens, tokens.is_target)
            self.token_metrics.count(inputs)
            if self.stops_on_nan:
                step = self.state.global_step + 1
                refuse_nonfinite(loss.detach(), step, rows, self.model, self.accelerator.process_index)
        else:
            self.token_metrics.add("eval", tokens, own_targets(self.accelerator, tokens.is_target, example_lengths))
        if not return_outputs:
            return loss
        with torch.no_grad():  # no loss head makes the logits
            return loss, model(**{key: value for key, value in inputs.items() if key != "labels"})

    def _progress(self, done: int | None = None) -> float:
        """Return the share of training that is done after `done` steps, now unless told."""
        done = self.state.global_step if done is None else done
        return done / self.state.max_steps if self.state.max_steps > 0 else 0.0

    def _scheduled(self, done: int) -> dict[str, float]:
        """Return what the objective's schedules have come to after `done` steps, as it is logged."""
        found = self.parsed_objective.scheduled_at(self._progress(done))
        return {f"objective_{name}": value for name, value in found.items()}

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
            self._has_met_targets |= math.isfinite(means.get("kept_fraction", math.nan))
            warn_of_idle(means, self.threshold, logs.get("grad_norm"))
            logs.update(self._scheduled(max(self.state.global_step - 1, 0)))  # by which the last step was made
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.shard()
        self.ensure_verified()
        self.resolve_threshold()
        self.token_metrics.clear("eval")
        warn_of_repeats(dataloader.dataset, self.accelerator.num_processes)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._pop_means("eval")
        refuse_unevaluated(means, metric_key_prefix)
        if means and output.metrics is not None:
            warn_of_idle(means, self.threshold)
            coefficient = self.router_aux_loss_coef if self.aux_loss_enabled else 0.0
            means = evaluated(means, self.threshold, coefficient) | self._scheduled(self.state.global_step)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    @leaves_no_empty_folder
    def train(
        self,
        resume_from_checkpoint: str | bool | ResumePlan | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        self.is_left = False
        self.token_metrics.begin()
        if trial is not None:  # whose model is another, and its percentile too
            self.threshold = threshold_of(self.args)
        self._first_step, self._has_met_targets = 0, False
        if trial is None:  # else `call_model_init` makes another
            refuse_frozen(self.model)
        refuse_dropped_sets(self)
        listens = getattr(self.args, "enable_jit_checkpoint", False)
        with self._sigterm.listening() if listens else nullcontext():
            plan = planned_resume(self.args, resume_from_checkpoint, self.accelerator.num_processes)
            checkpoint = str(plan.checkpoint) if plan.checkpoint else None
            if checkpoint:
                refuse_other_head(checkpoint, self.loss_head)
                state = self._take_up(checkpoint, plan)
                if 0 < steps_of(self.args, checkpoint, state) <= state.global_step:
                    return self._finish(checkpoint, state)
            tell_of_loss(self)
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
            self.average_weights()
            self._stream_count.tell(self.args)
            refuse_unlearnt(self.has_begun, self._has_met_targets)
            return output

    def begin_counting(self) -> None:
        """Forget what has been counted in this call of `train`: `auto_find_batch_size` begins again after a failed step."""
        self.token_metrics.restart()
        self._stream_count.restart()
        self._metrics["train"].clear()

    def average_weights(self) -> None:
        """Let the model have the averaged weights of a schedule-free optimizer, which are its result.

        The next training step returns to the point that it trains at.
        """
        average = getattr(self.optimizer, "eval", None)
        if callable(average):
            average()

    def _load_best_model(self) -> None:
        self.average_weights()  # or saving would average the best model's with the last step's
        super()._load_best_model()

    def _take_up(self, checkpoint: str, plan: ResumePlan) -> TrainerState:
        """Return the state to resume from, and take over its threshold; says what differs from an uninterrupted run."""
        self.threshold, state = plan.threshold, state_of(checkpoint)
        self._first_step = state.global_step
        tell_of_resuming(self, checkpoint, state)
        return state

    def _finish(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """Take up a run that has all its steps; transformers would train one more. What it has saved is left as it is."""
        logger.warning(f"{checkpoint} is at step {state.global_step} of {state.max_steps}: nothing is left to train.")
        self.state = state
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # whose model can't be loaded without training
        self.is_left = sharded or has_model(Path(str(self.args.output_dir)))
        if not sharded:
            self._load_from_checkpoint(checkpoint)
            if self.args.load_best_model_at_end and state.best_model_checkpoint:
                self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.average_weights()
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            RunRecord.of(self).write(Path(output_dir or str(self.args.output_dir)))

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
            RunRecord.of(self).append_to_card(Path(str(self.args.output_dir)) / "README.md")
