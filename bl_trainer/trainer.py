"""`BLConfig` and `BLTrainer`: TRL's `SFTConfig` and `SFTTrainer` with f(p) in place of -log p."""

import functools
import inspect
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from packaging.version import Version
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from .annotation import end_ids, special_ids, tokenizer_of
from .checkpoint import (
    RECORD_FILE,
    CheckpointError,
    has_model,
    last_whole,
    read_record,
    refuse_lost_epoch,
    refuse_other_recipe,
    why_broken,
    writing,
)
from .columns import (
    TEMPLATE,
    WEIGHT,
    TemplateMark,
    TokenColumns,
    check_columns,
    check_weights,
    columns_of,
    for_each_token,
    lay_out,
)
from .composition import spell
from .head import Head, TokenCosts, add_scoring, objective_head, score
from .interruption import REFERENCE, ROW, RefuseNonfinite, RowCollator, StopOnSigterm, number_rows, refuse_nonfinite
from .measurement import resolve_percentile
from .objectives import Objective, Price, Threshold, masked_cost, price, trains
from .parser import SECRETS
from .reference import base_of, check_reference, has_target, reference_source, refuse_lost_context, truncated
from .refusals import is_context_parallel, refuse_bypass, refuse_lm_head_adapter, refuse_other_logits, refuse_virtual_tokens
from .statistics import MeasurementError

logger = get_logger(__name__)

# The means over target tokens that every run reports
METRICS = ("nll", "target_prob", "kept_fraction", "gradient_weight", "entropy", "mean_token_accuracy")
LOWER_IS_BETTER = ("nll", "perplexity")


@dataclass
class BLConfig(SFTConfig):
    r"""
    Configuration of [`BLTrainer`]: [`~trl.SFTConfig`] and three keys.

    Parameters:
        objective (`str` or `dict[str, Any]`, *optional*, defaults to `"nll"`):
            The objective f(p) to minimise: `"nll"`, `"neg_p"`, `"log_one_minus_p"`, `{"name": "power", "alpha": 10}`, or
            a function of your own by its import path, `"my_package.losses:my_objective"`; composed with schedules, `floor`,
            `mix` and `special_tokens` as [`Objective`] says.
        threshold (`float` or `dict[str, Any]`, *optional*):
            Train only on target tokens of which the current model's probability is at least this, or
            `{"above": 0.2, "below": 0.9, "normalize": "tokens"}`, or `{"above_percentile": 10}`. See [`Threshold`].
        stop_on_nan (`bool`, *optional*, defaults to `False`):
            Stop with a [`LossError`] that names the step and the rows of the training set when the loss of a micro-batch is
            NaN or infinite, and before a step whose gradient is. Waits for the device once per micro-batch and step.

    Raises:
        `ValueError`: on a wrong objective or threshold, and on settings under which something else than the objective
            would be trained: another `loss_type`, label smoothing, Liger's cross-entropies, DeepSpeed sequence parallelism.

    > [!NOTE]
    > `greater_is_better` defaults to `False` for `metric_for_best_model="eval_nll"` and `"eval_perplexity"`.
    """

    objective: dict[str, Any] | str | None = field(
        default="nll",
        metadata={
            "help": "Objective f(p): nll, neg_p, log_one_minus_p, package.module:function, or a mapping such as "
            "{name: power, alpha: 10}."
        },
    )
    threshold: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Train only on target tokens with at least this probability, or a mapping such as "
            "{above: 0.2, below: 0.9, normalize: tokens}."
        },
    )

    stop_on_nan: bool = field(
        default=False,
        metadata={"help": "Stop when the loss is NaN or infinite, with the step and the rows of the training set."},
    )

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["objective", "threshold"]

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            **{key: None for key in SECRETS if hasattr(self, key)},
        }  # transformers pickles its arguments into every checkpoint

    def __post_init__(self) -> None:
        objective, threshold = Objective.parse(self.objective), Threshold.parse(self.threshold)  # type: ignore[arg-type]
        if isinstance(self.objective, Objective):
            self.objective = objective.to_dict()
        if isinstance(self.threshold, Threshold):
            self.threshold = threshold.to_dict()
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False
        super().__post_init__()
        metric = self.metric_for_best_model or ""  # that chooses a checkpoint, or paces a plateau schedule
        if metric.endswith("loss") and not threshold.keeps_all:
            raise ValueError(
                f"`metric_for_best_model: {metric}`, the default of `load_best_model_at_end` and a plateau schedule, falls as "
                "tokens drop out of the `threshold`. Write `metric_for_best_model: eval_nll`, or another metric."
            )
        if metric.endswith("loss") and "progress" in objective.statistics:
            raise ValueError(
                f"`metric_for_best_model: {metric}`, the default of `load_best_model_at_end` and a plateau schedule, changes "
                f"its meaning as the objective's {', '.join(objective.scheduled_at(0)) or 'progress'} moves. Write "
                "`metric_for_best_model: eval_nll`, or another metric."
            )
        if metric.endswith("loss") and not objective.is_ruler:
            raise ValueError(
                f"`metric_for_best_model: {metric}`, the default of `load_best_model_at_end` and a plateau schedule, doesn't "
                f"tell the better model under objective '{spell(objective.to_dict())}', whose cost may fall where targets "
                "become less probable, or the model merely surer. Write `metric_for_best_model: eval_nll`, or another metric."
            )
        refuse_bypass(self)


class BLTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] that minimises the mean of f(p) over target tokens in place of the mean of -log p, p being the
    probability that the model gives the target token (Li et al., https://arxiv.org/abs/2510.00526).

    The only change to what is trained is in `compute_loss`, which hands TRL's own the per-token -f(p) for log p; token
    counting, accumulation, distributed scaling and the MoE auxiliary loss are inherited. log p comes from `objective_head`.
    Where that can't serve, which `train` says, and under `BL_HEAD=trl` in the environment, it comes from TRL's head: then
    `objective="nll"` trains weights that are bit-identical to [`~trl.SFTTrainer`]'s.

    Arguments are [`~trl.SFTTrainer`]'s, with `args` a [`BLConfig`]; a plain [`~trl.SFTConfig`] means `nll`.
    `recipe`, a mapping fit for JSON that you may set, is recorded in every checkpoint with the objective and the versions.
    `compute_loss_func` is refused (`ValueError`), and so are a PEFT adapter on the LM head, prompt-learning PEFT on packed or
    flattened examples, and a model that does to its logits what the head doesn't.

    It reports, in training and evaluation, means over all target tokens since the last log or of the whole evaluation set:
    `nll` (nats), `target_prob` (p), `kept_fraction` (share of tokens within the threshold), `gradient_weight` (-f'(p) p, the
    weight on the NLL gradient; 1 under NLL, 0 for a dropped token), TRL's `entropy` and `mean_token_accuracy`, and in
    evaluation `perplexity` and `loss`, the mean of f. What the objective's schedules have come to is reported beside them, as
    `objective_alpha`; evaluation goes by the values of the moment.

    A column `objective_weight` of a data set, a number >= 0 for each example, multiplies the costs of its tokens; the sum is
    divided by all target tokens as without it. Wrong weights, and data that can't tell what `special_tokens` needs to know, are
    a `ValueError` before the model loads; in a stream when the row is read.
    """

    model: Any  # transformers' declaration leaves out what TRL has made of it
    objective: Objective
    threshold: Threshold

    _tag_names = [*SFTTrainer._tag_names, "bl-trainer"]
    _name = "BLTrainer"
    _paper = {
        "title": "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model "
        "Capability Continuum",
        "id": "2510.00526",
        "citation": """@inproceedings{li2026beyond,
  title     = {Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model
               Capability Continuum},
  author    = {Li, Gaotang and Qiu, Ruizhong and Chen, Xiusi and Ji, Heng and Tong, Hanghang},
  booktitle = {International Conference on Machine Learning},
  year      = {2026},
  note      = {arXiv:2510.00526}
}""",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if Version(version("trl")) < Version("1.16") and find_spec("triton") is None:
            raise ValueError(
                f"TRL {version('trl')} computes the loss with Triton, which is not installed here. Run `pip install "
                "'trl>=1.16,<2'`, which also computes it without."
            )
        given = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments
        if isinstance(given.get("args"), TrainingArguments):
            refuse_bypass(given["args"])
        if given.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` would replace the objective. Leave it out, and write your loss as an objective: "
                '`BLConfig(objective="my_package.losses:my_objective")`.'
            )
        peft_config = given.get("peft_config") or getattr(given.get("model"), "active_peft_config", None)
        refuse_lm_head_adapter(peft_config)
        refuse_virtual_tokens(peft_config, given.get("args"))
        self._refuse_columns(given)
        self.objective = Objective.parse(getattr(given.get("args"), "objective", "nll"))
        self.reference = self._find_reference(given, peft_config)
        previous = signal.getsignal(signal.SIGTERM)
        super().__init__(*args, **kwargs)
        self.threshold = Threshold.parse(getattr(self.args, "threshold", None))
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if "log_sum_sq_probs" in self.objective.statistics:
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "log_sum_sq_probs", "is_top1"))
        add_scoring(base)
        self.reference_head = self._why_reference_head(base)
        refuse_other_logits(base, self.reference_head)
        self._observe: Callable[..., None] | None = None
        self.add_callback(_ResolveThreshold(self))
        if type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = _Collator(**vars(self.data_collator))
        if self.reference == "column" and (not isinstance(self.data_collator, _Collator) or self._is_shared_out("cp", "sp")):
            raise ValueError(
                f"The column `{REFERENCE}` goes with text, and with whole sequences on each device: not with images, nor "
                "with context parallelism. Train an adapter without it: its base model is the reference then."
            )
        self._special_ids = self._find_special_ids()
        self.stops_on_nan = getattr(self.args, "stop_on_nan", False)
        if self.stops_on_nan:
            self.data_collator = RowCollator(self.data_collator)
            self.add_callback(RefuseNonfinite())
        self._sigterm = StopOnSigterm(self.accelerator)
        if getattr(self.args, "enable_jit_checkpoint", False):
            from transformers.trainer_jit_checkpoint import JITCheckpointCallback  # not in the oldest transformers

            self.remove_callback(JITCheckpointCallback)
            signal.signal(signal.SIGTERM, previous)  # which that callback has replaced
            self.add_callback(self._sigterm)
        self._sums: dict[str, Tensor | None] = {"train": None, "eval": None}
        self.recipe: dict[str, Any] | None = None
        self._first_step = 0  # of this process; a resumed run begins later
        self.is_left = False  # whether a finished run was found that is left as it is

    @property
    def was_terminated(self) -> bool:
        """Whether SIGTERM ended training before its last step, with a checkpoint (`enable_jit_checkpoint: true`)."""
        return self._sigterm.stopped and self.state.global_step < self.state.max_steps

    @property
    def has_begun(self) -> bool:
        """Whether a training step has been made in this process."""
        return self.state.global_step > self._first_step

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        numbers = getattr(args, "stop_on_nan", False) and dataset_name == "train"
        marks = Objective.parse(getattr(args, "objective", "nll")).special_tokens is not None
        present = columns_of(dataset)
        check_columns(dataset, dataset_name, marks)
        refers = self.reference == "column" and REFERENCE in present
        if REFERENCE in present and not refers:
            dataset = dataset.remove_columns(REFERENCE)  # which nothing would cut along with the tokens
        asked = {ROW: numbers, WEIGHT: WEIGHT in present, TEMPLATE: marks, REFERENCE: refers}
        columns = [key for key, holds in asked.items() if holds]
        if not columns:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if WEIGHT in columns:
            dataset = check_weights(dataset, dataset_name)
        if (numbers or marks or refers) and ROW not in present:
            dataset = number_rows(dataset)
        length = args.max_length
        cuts = not packing and length is not None and (refers or {WEIGHT, "input_ids"} <= {*present})
        args.max_length = None if packing or cuts else length  # what is per token is cut with the tokens
        try:
            prepared = super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)
        finally:
            args.max_length = length
        how = {"num_proc": args.dataset_num_proc} if isinstance(prepared, Dataset) else {}
        with PartialState().local_main_process_first():
            if refers:
                prepared = prepared.map(check_reference, fn_kwargs={"name": dataset_name}, **how)
            if cuts:
                kept = slice(length) if args.truncation_mode == "keep_start" else slice(-length, None)
                prepared = prepared.map(truncated, fn_kwargs={"kept": kept}, **how).filter(has_target, **how)
            if marks and TEMPLATE not in present:
                mark = TemplateMark(tokenizer_of(processing_class), self.chat_template, dataset_name)
                prepared = prepared.map(mark, **how)
            if not packing:
                return prepared
            prepared = prepared.map(for_each_token(columns), **how).select_columns(["input_ids", "labels", *columns])
            packed = pack_dataset(prepared, length, args.packing_strategy, how)
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [key for key in (ROW, WEIGHT, TEMPLATE, REFERENCE) if key not in self._signature_columns]

    def _refuse_columns(self, given: dict[str, Any]) -> None:
        """Raise ValueError, before the model loads, on columns that are wrong, or that would be lost on their way."""
        args = given.get("args")
        marks = Objective.parse(getattr(args, "objective", "nll")).special_tokens is not None
        collator, obstacle = given.get("data_collator"), None
        if collator is not None and type(collator) is not DataCollatorForLanguageModeling:
            obstacle = "the `data_collator` is your own"
        if marks and given.get("formatting_func") is not None:
            obstacle = "`formatting_func` renders the examples"
        if args is not None and is_context_parallel(args):
            obstacle = "context parallelism cuts sequences up"
        evaluated = given.get("eval_dataset")
        evaluated = evaluated if isinstance(evaluated, dict) else {"eval": evaluated}
        for name, dataset in {"train": given.get("train_dataset"), **evaluated}.items():
            if dataset is not None and not isinstance(dataset, str):
                check_columns(dataset, name, marks, obstacle)

    def _find_special_ids(self) -> Tensor | None:
        """Return the ids of end and special tokens, where the objective has `special_tokens`."""
        if self.objective.special_tokens is None:
            return None
        return torch.tensor(sorted(end_ids(self) | special_ids(tokenizer_of(self.processing_class))))

    def _why_reference_head(self, base: Any) -> str | None:
        """Return why TRL's head computes the loss, or None if ours does, which is exact in fewer products."""
        config = base.config
        reasons = {
            "BL_HEAD=trl asks for it": os.environ.get("BL_HEAD") == "trl",
            "the model has an auxiliary loss of its mixture of experts": self.aux_loss_enabled,
            "the model is multimodal": config.get_text_config() is not config,
            "the sequence or the head is shared out over devices": self._is_shared_out("cp", "sp", "tp"),
            "ZeRO-3 shards the head": is_deepspeed_zero3_enabled(),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _find_reference(self, given: dict[str, Any], peft_config: Any) -> str | None:
        """Return where `ref_logp` comes from, or None if the objective doesn't ask for it."""
        evaluated = given.get("eval_dataset")
        sets = {"train": given.get("train_dataset"), **(evaluated if isinstance(evaluated, dict) else {"eval": evaluated})}
        columns = {name: columns_of(each) for name, each in sets.items() if each is not None}
        source = reference_source(self.objective, peft_config, columns, given.get("data_collator") is not None)
        if source == "column" and given.get("args") is not None:
            refuse_lost_context(given["args"])
        return source

    def _is_shared_out(self, *kinds: str) -> bool:
        return any(getattr(self.accelerator.parallelism_config, f"{kind}_size", 1) > 1 for kind in kinds)

    def resolve_threshold(self) -> None:
        """Measure the probability that `threshold.above_percentile` stands for, unless it is known.

        Raises MeasurementError if it can't be measured, or is above `threshold.below`.
        """
        if self.threshold.resolved:
            return
        above = resolve_percentile(self, float(self.threshold.above_percentile or 0))
        if above > self.threshold.below:
            raise MeasurementError(
                f"`threshold` keeps no token: percentile {self.threshold.above_percentile} is p = {above:.6g}, above "
                f"`below: {self.threshold.below}`. Raise `below`, or lower `above_percentile`."
            )
        self.threshold = replace(self.threshold, above=above)

    def observe_instead(self, observe: Callable[..., None], batches: Iterable[dict[str, Any]]) -> None:
        """Run the evaluation loop over `batches` with `observe(model, batch)` in place of an evaluation step."""
        self._shard()
        self._observe = observe
        try:
            super().evaluation_loop(batches, "Measurement", prediction_loss_only=True)  # type: ignore[arg-type]
        finally:
            self._observe = None

    def _shard(self) -> None:
        """Prepare a model that hasn't trained yet for FSDP2, under which accelerate takes none without its optimizer."""
        if self.accelerator.is_fsdp2 and not self.accelerator._models:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.create_optimizer())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._observe is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._observe(model, inputs)
        return None, None, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        example_lengths, rows = (inputs.pop(name, None) for name in ("example_lengths", ROW))
        if self.reference == "column" and REFERENCE not in inputs:
            raise ValueError(f"This data set has no column `{REFERENCE}`, as the training set has. Add it.")
        columns = TokenColumns(inputs, self._special_ids)

        def forward(**kwargs):
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)
            outputs, cost, weight, kept = (
                self._own_head(model, kwargs, columns)
                if self.reference_head is None
                else self._trl_head(model, kwargs, columns)
            )
            with torch.no_grad():
                logp = outputs.log_probs
                per_token = (-logp, logp.exp(), kept, weight, outputs.entropy, outputs.is_top1, cost)
                self._add(per_token, self._counted(outputs.label_mask, example_lengths), outputs.aux_loss)
            if self.threshold.normalize == "kept":
                cost = cost * self._kept_scale(cost, kept, outputs.label_mask, num_items_in_batch)
            outputs.log_probs = -cost
            return outputs

        result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        if self.stops_on_nan and self.model.training:
            loss, step = (result[0] if return_outputs else result).detach(), self.state.global_step + 1
            refuse_nonfinite(loss, step, rows, self.model, self.accelerator.process_index)
        return result

    def _trl_head(
        self, model, inputs: dict[str, Any], columns: TokenColumns
    ) -> tuple[FusedCausalLMOutput, Tensor, Tensor, Tensor]:
        """Return TRL's outputs; f per token, zero on tokens that don't train; weight on the NLL gradient; which train."""
        ref_logp = None
        if self.reference == "adapter":
            with base_of(model, self.model):
                ref_logp = model(**inputs).log_probs
        outputs = model(**inputs)
        logp, is_target = outputs.log_probs, outputs.label_mask
        known = columns.at(_labels_of(logp, inputs), lambda column, fill: _beside(logp, column, fill))
        kept = is_target & trains(self.threshold, logp, known.get("is_special"))
        available = {
            "entropy": lambda: outputs.entropy,
            "log_sum_sq_probs": lambda: outputs.log_sum_sq_probs,
            "is_top1": lambda: outputs.is_top1,
            "ref_logp": lambda: known["ref_logp"] if ref_logp is None else ref_logp,
            "label": lambda: _labels_of(logp, inputs),
            "progress": self._progress,
            "is_special": lambda: known["is_special"],
        }
        statistics = {name: available[name]() for name in self.objective.statistics}
        return outputs, *masked_cost(self.objective, kept, logp, known.get(WEIGHT), **statistics), kept

    def _own_head(
        self, model, inputs: dict[str, Any], columns: TokenColumns
    ) -> tuple[FusedCausalLMOutput, Tensor, Tensor, Tensor]:
        """The same from `objective_head`, which forms the gradient as it goes."""
        inputs = {key: value for key, value in inputs.items() if key != "fused_lm_head"}
        extras, ref_logp = tuple({"log_sum_sq_probs"} & set(self.objective.statistics)), {}
        if self.reference == "adapter":
            with base_of(model, self.model):
                ref_logp = {"ref_logp": model(**inputs, use=functools.partial(score, extras=()))[0].logp}

        def cost(hidden: Tensor, head: Head, target: Tensor) -> TokenCosts:
            is_target = inputs["labels"][:, 1:] != -100
            known = columns.at(target, lambda column, fill: column[:, 1:][is_target].to(target.device))
            return objective_head(hidden, head, target, self._price, extras, {**known, **ref_logp})

        costs, is_target = model(**inputs, use=cost)
        scores = costs.scores

        def laid_out(values: Tensor) -> Tensor:
            # connected to the model where there is no target too, which a backward needs on every process
            return values.new_zeros(is_target.shape).masked_scatter(is_target, values)

        outputs = FusedCausalLMOutput(
            log_probs=laid_out(scores.logp),
            entropy=laid_out(scores.entropy),
            log_sum_sq_probs=None if scores.log_sum_sq_probs is None else laid_out(scores.log_sum_sq_probs),
            is_top1=laid_out(costs.is_top1),
            label_mask=is_target,
        )
        return outputs, laid_out(costs.cost), laid_out(costs.weight), laid_out(costs.kept)

    def _price(self, statistics: dict[str, Tensor]) -> Price:
        return price(self.objective, self.threshold, {**statistics, "progress": self._progress()})

    def _progress(self, done: int | None = None) -> float:
        """Return the share of training that is done after `done` steps, now unless told."""
        done = self.state.global_step if done is None else done
        return done / self.state.max_steps if self.state.max_steps > 0 else 0.0

    def _scheduled(self, done: int) -> dict[str, float]:
        """Return what the objective's schedules have come to after `done` steps, as it is logged."""
        found = self.objective.scheduled_at(self._progress(done))
        return {f"objective_{name}": value for name, value in found.items()}

    def _kept_scale(self, cost: Tensor, kept: Tensor, is_target: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """What turns TRL's division by all target tokens of the batch into one by the kept tokens of the micro-batch."""
        scale = cost.new_ones(()) / self._whole_count(kept)
        if num_items_in_batch is None:
            return scale * is_target.sum().clamp(min=1)
        if self.args.average_tokens_across_devices:
            scale = scale / (self.accelerator.num_processes // self.get_tp_size())
        return scale * torch.as_tensor(num_items_in_batch).clamp(min=1) / self.current_gradient_accumulation_steps

    def _whole_count(self, kept: Tensor) -> Tensor:
        """Count the micro-batch's kept tokens, at least one, and divide by the processes that its sequences are cut up over."""
        parallelism, count = self.accelerator.parallelism_config, kept.sum()
        if parallelism is None or not parallelism.cp_enabled:
            return count.clamp(min=1)
        mesh = self.accelerator.torch_device_mesh["cp"]
        torch.distributed.all_reduce(count, group=mesh.get_group())
        return count.clamp(min=1) / mesh.size()

    def _counted(self, is_target: Tensor, example_lengths: Tensor | None) -> Tensor:
        """Mask out the examples that accelerate repeats to fill the last batch of an evaluation on several processes."""
        state, accelerator = self.accelerator.gradient_state, self.accelerator
        parallelism = accelerator.parallelism_config
        sharers = parallelism.non_data_parallel_size if parallelism is not None else 1  # processes that get the same examples
        filled = accelerator.num_processes > sharers and state.end_of_dataloader
        if self.model.training or not filled or state.remainder <= 0:
            return is_target
        examples = len(is_target) if example_lengths is None else len(example_lengths)
        own = min(max(state.remainder - accelerator.process_index // sharers * examples, 0), examples)
        is_own = torch.zeros_like(is_target)
        if example_lengths is None:
            is_own[:own] = True
        else:
            is_own[:, : int(example_lengths[:own].sum())] = True
        return is_target & is_own

    def _add(self, per_token: tuple[Tensor, ...], counted: Tensor, aux_loss: Tensor | None) -> None:
        """Add to the sums over target tokens, on the device: [number of tokens, auxiliary loss, *METRICS, f]."""
        wide = torch.float32 if counted.device.type == "mps" else torch.float64
        num_tokens = counted.sum(dtype=wide)
        aux = num_tokens * aux_loss if aux_loss is not None else torch.zeros_like(num_tokens)
        sums = torch.stack([num_tokens, aux, *(torch.where(counted, x, x.new_zeros(())).sum(dtype=wide) for x in per_token)])
        mode = "train" if self.model.training else "eval"
        total = self._sums[mode]
        self._sums[mode] = sums if total is None else total + sums

    def _pop_means(self, mode: str) -> dict[str, float]:
        """Return the means over all processes' target tokens since the last call. The one synchronisation per log."""
        sums, self._sums[mode] = self._sums[mode], None
        if sums is None:
            return {}
        num_tokens, *rest = self.accelerator.reduce(sums, reduction="sum").tolist()
        means = [x / num_tokens if num_tokens else float("nan") for x in rest]
        return dict(zip(("aux_loss", *METRICS, "objective"), means, strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Only where every process logs: `_pop_means` communicates. After a last evaluation the model is not in training mode
        if "loss" in logs or "train_loss" in logs:
            means = self._pop_means("train")
            for name in METRICS:
                if name in means:
                    self._metrics["train"].pop(name, None)  # TRL's list of micro-batch means
                    logs[name] = means[name]
            self._warn(means, logs.get("grad_norm"))
            logs.update(self._scheduled(max(self.state.global_step - 1, 0)))  # by which the last step was made
        super().log(logs, start_time)

    def _warn(self, means: dict[str, float], grad_norm: float | None = None) -> None:
        if means.get("kept_fraction") == 0:
            logger.warning(
                f"Nothing trains: since the last log no target token was within the threshold {self.threshold.to_dict()} "
                f"(kept_fraction 0, mean target_prob {means['target_prob']:.2g}). Widen `threshold`."
            )
        elif means.get("gradient_weight") == 0:
            logger.warning(
                "Nothing trains: since the last log every target token had the weight 0 (gradient_weight 0, mean target_prob "
                f"{means['target_prob']:.2g}). Take an objective with more weight there, or larger numbers in the column "
                f"`{WEIGHT}`, if there is one."
            )
        if grad_norm is not None and not math.isfinite(grad_norm):
            logger.warning(
                f"grad_norm is {grad_norm}: this step changes nothing, or breaks the optimizer's state. If `alpha` is negative "
                "keep the least probable tokens out, e.g. by `threshold: 1.0e-6`."
            )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._shard()
        self.resolve_threshold()
        self._sums["eval"] = None
        processes = self.accelerator.num_processes
        if processes > 1 and not has_length(dataloader.dataset):
            logger.warning(
                f"The evaluation set is streamed to {processes} processes: if its length is not a multiple of their batches, "
                "accelerate repeats examples to fill the last, and they count twice in the metrics."
            )
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._pop_means("eval")
        if means and output.metrics is not None:
            self._warn(means)
            for name in METRICS:
                self._metrics["eval"].pop(name, None)  # TRL's list, which it would log without the name of the set
            loss, aux_loss = means.pop("objective"), means.pop("aux_loss")
            if self.threshold.normalize == "kept":
                loss = loss / means["kept_fraction"] if means["kept_fraction"] else 0.0
            means["loss"] = loss + (self.router_aux_loss_coef * aux_loss if self.aux_loss_enabled else 0.0)
            means |= self._scheduled(self.state.global_step)
            means["perplexity"] = torch.tensor(means["nll"], dtype=torch.float64).exp().item()
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        self._sums["train"], self.is_left = None, False
        listens = getattr(self.args, "enable_jit_checkpoint", False)
        with self._sigterm.listening() if listens else nullcontext():
            if resume_from_checkpoint is True:
                last, _ = last_whole(Path(str(self.args.output_dir)))
                if last is None:
                    raise CheckpointError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
                resume_from_checkpoint = str(last)
            if isinstance(resume_from_checkpoint, str):
                state = self._take_up(resume_from_checkpoint)
                if 0 < self._steps_of(resume_from_checkpoint, state) <= state.global_step:
                    return self._finish(resume_from_checkpoint, state)
            whose = "bl_trainer's own" if self.reference_head is None else f"TRL's, since {self.reference_head}"
            self.accelerator.print(f"Loss head: {whose}.")
            if self.reference is not None:
                what = f"the column `{REFERENCE}`" if self.reference == "column" else "the model without its adapter"
                self.accelerator.print(f"Reference: {what}.")
            if self.train_dataset is not None and WEIGHT in columns_of(self.train_dataset):
                self.accelerator.print(f"Weights of examples: the column `{WEIGHT}`.")
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _take_up(self, checkpoint: str) -> TrainerState:
        """Return the state to go on from, and take over the threshold; says what can't be as in an uninterrupted run."""
        self.threshold = refuse_other_recipe(checkpoint, self.args)
        refuse_lost_epoch(checkpoint)
        if self.threshold.above_percentile is not None:
            self.accelerator.print(
                f"The threshold is p >= {self.threshold.above:.6g}: percentile {self.threshold.above_percentile:g}, as "
                f"{checkpoint} records it."
            )
        state_file = Path(checkpoint) / "trainer_state.json"
        state = TrainerState.load_from_json(str(state_file)) if state_file.is_file() else TrainerState()
        self._first_step = state.global_step
        processes = read_record(checkpoint).get("processes", self.accelerator.num_processes)
        if processes != self.accelerator.num_processes:
            logger.warning(
                f"{checkpoint} is of {processes} processes, and now there are {self.accelerator.num_processes}: batches and "
                "random numbers are others than in an uninterrupted run."
            )
        is_stream = isinstance(self.train_dataset, IterableDataset)
        by_length = getattr(self.args, "train_sampling_strategy", "") == "group_by_length"
        by_length |= bool(getattr(self.args, "group_by_length", False))  # an older transformers'
        if (state.epoch or 0) > 1 and (is_stream or by_length):
            source = "stream" if is_stream else "set grouped by length"
            logger.warning(
                f"{checkpoint} is {state.epoch:.4g} epochs into its run: from a {source} the examples may come in another "
                "order than in an uninterrupted run."
            )
        self.accelerator.print(f"Going on from {checkpoint}, after step {state.global_step}.")
        return state

    def _steps_of(self, checkpoint: str, state: TrainerState) -> int:
        """Return how many steps the run has that `checkpoint` is of, or 0 if it is to be made longer or shorter."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        is_same = read_record(checkpoint).get("num_train_epochs") == self.args.num_train_epochs
        return state.max_steps if is_same else 0

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

    def _record(self) -> dict[str, Any]:
        packages = ("bl_trainer", "trl", "transformers", "accelerate", "peft", "datasets", "torch")
        return {
            "objective": self.objective.resolved.to_dict(),
            "threshold": self.threshold.to_dict(),
            "recipe": self.recipe,
            "processes": self.accelerator.num_processes,
            "save_only_model": self.args.save_only_model,
            "num_train_epochs": self.args.num_train_epochs,
            "versions": {package: version(package) for package in packages},
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORD_FILE).write_text(json.dumps(self._record(), indent=2, default=str) + "\n")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process writes on, and may delete the checkpoint before: only once the others' parts are there
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with writing(str(folder)):
            if self.args.should_save and folder.exists() and why_broken(folder):
                shutil.rmtree(folder)  # what an earlier start left, of which some would stay
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            record = self._record()
            lines = [
                "",
                "",
                "## Objective",
                "",
                "```yaml",
                *(f"{key}: {json.dumps(record[key])}" for key in ("objective", "threshold")),
                "```",
                "",
                "Trained with " + ", ".join(f"{name} {number}" for name, number in record["versions"].items()) + ".",
                "",
            ]
            with open(Path(str(self.args.output_dir)) / "README.md", "a", encoding="utf-8") as card:
                card.write("\n".join(lines))


class _ResolveThreshold(TrainerCallback):
    """Measures a percentile threshold when the model is in place and before the first step."""

    def __init__(self, trainer: BLTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.resolve_threshold()


class _Collator(DataCollatorForLanguageModeling):
    """TRL's collator, which also lays columns out, and says where one example ends in the one row of padding-free mode."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        lay_out(examples, batch)
        if self.padding_free:
            batch["example_lengths"] = torch.tensor([len(example["input_ids"]) for example in examples])
        return batch


def _labels_of(logp: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the token ids that `logp` is about, -100 where there is none; same shape as `logp`."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"].to(logp.device)
    return _beside(logp, inputs["labels"], -100)


def _beside(logp: Tensor, column: Tensor, fill: float) -> Tensor:
    """Return the values of a (batch, length) column that `logp` is about, `fill` where it has none; same shape as `logp`."""
    virtual_tokens = logp.shape[1] + 1 - column.shape[1]  # that prompt-learning PEFT puts in front
    return torch.nn.functional.pad(column.to(logp.device), (virtual_tokens, 0), value=fill)[:, 1:]
