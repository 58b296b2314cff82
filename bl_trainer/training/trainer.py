"""`BLConfig` and `BLTrainer`: TRL's `SFTConfig` and `SFTTrainer` with f(p) in place of -log p."""

import copy
import functools
import inspect
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
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
from transformers import TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from ..errors import CheckpointError, MeasurementError, RecipeError
from ..head.lm_head import Head
from ..head.ops import TokenCosts, objective_head, score
from ..head.patch import add_scoring
from ..head.verification import verify_head
from ..measurement.percentiles import resolve_percentile
from ..objectives.objective import Objective
from ..objectives.pricing import Price, masked_cost, price
from ..objectives.threshold import Threshold, spell_probability, trains
from ..tokens.collators import RowCollator, TokenCollator
from ..tokens.columns import TokenColumns, check_columns, check_weights, for_each_token, number_rows
from ..tokens.labels import check_labels, check_rows, columns_of, plain, refuse_misaligned, refuse_without_target
from ..tokens.layouts import arrange_all
from ..tokens.names import REFERENCE, ROW, TEMPLATE, WEIGHT
from ..tokens.reference import base_of, check_reference, has_target, reference_source, refuse_lost_context, truncated
from ..tokens.rendering import check_rendering
from ..tokens.template import TemplateMark
from ..tokens.vocabulary import end_ids, special_ids, tokenizer_of
from .callbacks import BeginTraining, RefuseNonfinite, StopOnSigterm, refuse_nonfinite
from .checkpoints import RECORD_FILE, has_model, last_whole, read_record, why_broken, writing
from .config import METRICS
from .guards import (
    check_length,
    leaves_no_empty_folder,
    missing_folders,
    refuse_dropped,
    refuse_frozen,
    refuse_no_target,
    refuse_unmatched,
)
from .refusals import (
    is_context_parallel,
    refuse_bypass,
    refuse_copied_tied_head,
    refuse_lm_head_adapter,
    refuse_no_causal_lm,
    refuse_replaced_loss,
    refuse_virtual_tokens,
)
from .resume import refuse_lost_epoch, refuse_other_head, refuse_other_recipe

logger = get_logger(__name__)


class BLTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] that minimises the mean of f(p) over target tokens in place of the mean of -log p, p being the
    probability that the model gives the target token (Li et al., https://arxiv.org/abs/2510.00526).

    The only change to what is trained is in `compute_loss`, which hands TRL's own the per-token -f(p) for log p; token
    counting, accumulation, distributed scaling and the MoE auxiliary loss are inherited. log p comes from `objective_head`.
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

    model: Any  # transformers' declaration leaves out what TRL has made of it
    parsed_objective: Objective  # `objective` is the name that transformers' hyperparameter search writes its score to
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

    @leaves_no_empty_folder
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
        given = arrange_all(given)
        self._refuse_columns(given)
        refuse_no_target(refuse_no_causal_lm(given["model"], given.get("args")), given.get("peft_config"))
        self.parsed_objective = Objective.parse(getattr(given.get("args"), "objective", "nll"))
        self.reference = self._find_reference(given, peft_config)
        previous = signal.getsignal(signal.SIGTERM)
        self.made_folders = missing_folders(Path(given["args"].output_dir)) if given.get("args") is not None else []
        super().__init__(**{key: value for key, value in given.items() if key != "self"})
        if given.get("peft_config") is not None:
            refuse_unmatched(self.model)
        self.threshold = Threshold.parse(getattr(self.args, "threshold", None))
        self._has_adapter = is_peft_model(self.model)
        base = self.model.get_base_model() if self._has_adapter else self.model
        for name, dataset in (("training", self.train_dataset), ("evaluation", self.eval_dataset)):
            for each in dataset.values() if isinstance(dataset, dict) else [dataset]:
                check_length(base, each, name)
        self._add_heads(self.model)
        if not self._is_shared_out("sp"):
            # TRL's loss divides by the target tokens of the whole batch, whatever the model's own would do, and shifts labels
            self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self._observe: Callable[..., None] | None = None
        if not self._is_sharded():
            self._verify(self.model)
        self.add_callback(BeginTraining(self))
        if type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = TokenCollator(**vars(self.data_collator))
        if self.reference == "column" and (
            not isinstance(self.data_collator, TokenCollator) or self._is_shared_out("cp", "sp")
        ):
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
        self._tokens_before = 0  # that earlier calls of `train` have seen
        self.recipe: dict[str, Any] | None = None
        self._has_met_targets = False
        self._first_step = 0  # of this process; a resumed run begins later
        self.is_left = False  # whether a finished run was found that is left as it is

    @property
    def was_terminated(self) -> bool:
        """Whether SIGTERM ended training before its last step, with a checkpoint (`enable_jit_checkpoint: true`)."""
        return self._sigterm.stopped and self.state.global_step < self.state.max_steps

    @property
    def loss_head(self) -> str:
        """The loss head in use: `own` or `trl`."""
        return "own" if self.reference_head is None else "trl"

    @property
    def has_begun(self) -> bool:
        """Whether a training step has been made in this process."""
        return self.state.global_step > self._first_step

    def _add_heads(self, model: Any) -> None:
        """Let `model` compute the loss. Raises ValueError if neither our head nor TRL's gives its logits."""
        base = model.get_base_model() if is_peft_model(model) else model
        sums = ("log_sum_sq_probs",) if "log_sum_sq_probs" in self.parsed_objective.statistics else ()
        add_fused_lm_head(base, outputs=("log_probs", "entropy", *sums, "is_top1"))
        add_scoring(base)
        self.reference_head, self._is_verified = self._why_reference_head(base), False
        refuse_copied_tied_head(base, getattr(self.args, "chat_template_path", None))

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if self._has_adapter and not is_peft_model(model):
            raise ValueError(
                "Cannot train the model that `model_init` returns: the trainer's model has an adapter, this one has none. "
                "Return `get_peft_model(model, peft_config)`."
            )
        refuse_frozen(model)
        self._add_heads(model)
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

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        dataset = plain(dataset)
        if formatting_func is None:
            dataset = check_rendering(dataset, processing_class, self.chat_template, f"the {dataset_name} set", args)
        dataset = check_rows(dataset, dataset_name)
        prepared = self._prepare_rows(dataset, processing_class, args, packing, formatting_func, dataset_name)

        def uncut():
            whole = copy.copy(args)
            whole.max_length = None
            return self._prepare_rows(dataset, processing_class, whole, False, formatting_func, dataset_name)

        self._refuse_without_target(prepared, dataset_name, args, uncut)
        return prepared

    def _refuse_without_target(self, prepared: Any, name: str, args: Any, uncut: Callable[[], Any] = tuple) -> None:
        """Raise RecipeError if a prepared set has no target, in what is used of it, and say if cutting took it."""
        used = None
        if isinstance(prepared, IterableDataset) and name == "train" and args.max_steps > 0:
            used = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        refuse_without_target(islice(prepared, used), name, args, lambda: islice(uncut(), used))

    def _prepare_rows(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
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
        sets = {"train": given.get("train_dataset"), **evaluated}
        sets = {name: dataset for name, dataset in sets.items() if dataset is not None and not isinstance(dataset, str)}
        for name, dataset in sets.items():
            check_columns(dataset, name, marks, obstacle)
        if collator is None or type(collator) is DataCollatorForLanguageModeling:
            check_labels(sets, args, given.get("formatting_func") is not None)
            for name, dataset in sets.items():
                if (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset") and isinstance(dataset, Dataset):
                    self._refuse_without_target(plain(dataset), name, args)

    def _find_special_ids(self) -> Tensor | None:
        """Return the ids of end and special tokens, where the objective has `special_tokens`."""
        if self.parsed_objective.special_tokens is None:
            return None
        return torch.tensor(sorted(end_ids(self) | special_ids(tokenizer_of(self.processing_class))))

    def _why_reference_head(self, base: Any) -> str | None:
        """Return why TRL's head computes the loss, or None if ours does, which is exact in fewer products."""
        config = base.config
        reasons = {
            "`loss_head: trl` asks for it": getattr(self.args, "loss_head", "auto") == "trl",
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
        source = reference_source(self.parsed_objective, peft_config, columns, given.get("data_collator") is not None)
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
                f"`threshold` keeps no token: percentile {self.threshold.above_percentile} is p = "
                f"{spell_probability(above, 6)}, above `below: {self.threshold.below}`. Raise `below`, or lower "
                "`above_percentile`."
            )
        self.threshold = replace(self.threshold, above=above)

    def _is_sharded(self) -> bool:
        """Whether a forward pass needs the model as training places it."""
        sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        return sharded or any(parameter.is_meta for parameter in self.model.parameters())

    def _heads_in_use(self) -> set[str]:
        """Return the loss heads that this run computes with; percentiles are measured with `bl_trainer`'s own."""
        return {self.loss_head} | (set() if self.threshold.resolved else {"own"})

    def _verify(self, model: Any) -> None:
        self._is_verified = True
        for kind in sorted(self._heads_in_use()):
            with self.accelerator.autocast():
                verify_head(model, kind, trains=not self._is_sharded())

    def ensure_verified(self) -> None:
        """Verify the loss head of a sharded model once it is in place. Raises ValueError as `verify_head`."""
        if not self._is_verified:
            self._is_verified = True  # the measurement below asks again
            ids = torch.zeros(1, 2, dtype=torch.long)
            self.observe_instead(lambda model, batch: self._verify(model), [{"input_ids": ids, "labels": ids}])

    def observe_instead(self, observe: Callable[..., None], batches: Iterable[dict[str, Any]]) -> None:
        """Run the evaluation loop over `batches` with `observe(model, batch)` in place of an evaluation step."""
        self._shard()
        self.ensure_verified()
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
        refuse_misaligned(inputs)
        example_lengths, rows = (inputs.pop(name, None) for name in ("example_lengths", ROW))
        if self.reference == "column" and REFERENCE not in inputs:
            raise ValueError(f"This data set has no column `{REFERENCE}`, as the training set has. Add it.")
        columns, has_asked = TokenColumns(inputs, self._special_ids), False

        def forward(**kwargs):
            nonlocal has_asked
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)
            has_asked = True
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
        if not has_asked:
            refuse_replaced_loss(super().compute_loss)
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
        statistics = {name: available[name]() for name in self.parsed_objective.statistics}
        return outputs, *masked_cost(self.parsed_objective, kept, logp, known.get(WEIGHT), **statistics), kept

    def _own_head(
        self, model, inputs: dict[str, Any], columns: TokenColumns
    ) -> tuple[FusedCausalLMOutput, Tensor, Tensor, Tensor]:
        """The same from `objective_head`, which forms the gradient as it goes."""
        inputs = {key: value for key, value in inputs.items() if key != "fused_lm_head"}
        extras, ref_logp = tuple({"log_sum_sq_probs"} & set(self.parsed_objective.statistics)), {}
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
        return price(self.parsed_objective, self.threshold, {**statistics, "progress": self._progress()})

    def _progress(self, done: int | None = None) -> float:
        """Return the share of training that is done after `done` steps, now unless told."""
        done = self.state.global_step if done is None else done
        return done / self.state.max_steps if self.state.max_steps > 0 else 0.0

    def _scheduled(self, done: int) -> dict[str, float]:
        """Return what the objective's schedules have come to after `done` steps, as it is logged."""
        found = self.parsed_objective.scheduled_at(self._progress(done))
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
            self._has_met_targets |= math.isfinite(means.get("kept_fraction", math.nan))
            self._warn(means, logs.get("grad_norm"))
            logs.update(self._scheduled(max(self.state.global_step - 1, 0)))  # by which the last step was made
        super().log(logs, start_time)

    def _refuse_unlearnt(self) -> None:
        """Raise RecipeError if training has ended without a step, or without a target in all its steps."""
        if not self.has_begun:
            raise RecipeError(
                "Nothing trained: the training set gave no complete batch, so no step was made. Check its size, "
                "`dataloader_drop_last` and `per_device_train_batch_size`."
            )
        if not self._has_met_targets:
            raise RecipeError(
                "Nothing trained: no row of any step had a target. Every label was -100. Check `labels`, the masks and the "
                "`data_collator`."
            )

    def _warn(self, means: dict[str, float], grad_norm: float | None = None) -> None:
        if math.isnan(means.get("kept_fraction", 0)):
            logger.warning(
                "Nothing trains: since the last log no row had a target; every label was -100. Check `labels`, the masks and "
                "`max_length`."
            )
        elif means.get("kept_fraction") == 0:
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
        self.ensure_verified()
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
        if self._observe is None and math.isnan(means.get("kept_fraction", math.nan)):
            raise RecipeError(
                f"Cannot evaluate the {metric_key_prefix} set: no row has a target. It is empty, or every label is -100."
            )
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

    def _refuse_dropped(self) -> None:
        """Raise RecipeError if `dataloader_drop_last` leaves nothing of a set; of a stream nothing is dropped."""
        if not self.args.dataloader_drop_last:
            return
        sharers = getattr(self.accelerator.parallelism_config, "non_data_parallel_size", 1)
        processes = 1 if self.accelerator.split_batches else self.accelerator.num_processes // sharers
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        evaluated = {} if self.args.eval_strategy == "no" else evaluated
        for name, dataset in {"train": self.train_dataset, **evaluated}.items():
            kind = "train" if name == "train" else "eval"
            if isinstance(dataset, Dataset):
                size = getattr(self.args, f"{kind}_batch_size") * processes
                refuse_dropped(len(dataset), size, name, f"per_device_{kind}_batch_size")

    @leaves_no_empty_folder
    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        self.is_left, self._tokens_before = False, self._total_train_tokens
        if trial is not None:  # whose model is another, and its percentile too
            self.threshold = Threshold.parse(getattr(self.args, "threshold", None))
        self._first_step, self._has_met_targets = 0, False
        if self.model is not None:  # or a search makes it, by `call_model_init`
            refuse_frozen(self.model)
        self._refuse_dropped()
        listens = getattr(self.args, "enable_jit_checkpoint", False)
        with self._sigterm.listening() if listens else nullcontext():
            if resume_from_checkpoint is True:
                last, _ = last_whole(Path(str(self.args.output_dir)))
                if last is None:
                    raise CheckpointError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
                resume_from_checkpoint = str(last)
            if isinstance(resume_from_checkpoint, str):
                refuse_other_head(resume_from_checkpoint, self.loss_head)
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
            output = super().train(resume_from_checkpoint, trial, *args, **kwargs)
            self.average_weights()
            self._refuse_unlearnt()
            return output

    def begin_counting(self) -> None:
        """Forget what has been counted in this call of `train`: `auto_find_batch_size` begins again after a failed step."""
        self._sums["train"], self._total_train_tokens = None, self._tokens_before
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

    def _take_up(self, checkpoint: str) -> TrainerState:
        """Return the state to go on from, and take over the threshold; says what can't be as in an uninterrupted run."""
        self.threshold = refuse_other_recipe(checkpoint, self.args)
        refuse_lost_epoch(checkpoint)
        if self.threshold.above_percentile is not None:
            self.accelerator.print(
                f"The threshold is p >= {spell_probability(self.threshold.above, 6)}: percentile "
                f"{self.threshold.above_percentile:g}, as {checkpoint} records it."
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
            "objective": self.parsed_objective.resolved.to_dict(),
            "threshold": self.threshold.to_dict(),
            "loss_head": self.loss_head,
            "recipe": self.recipe,
            "processes": self.accelerator.num_processes,
            "save_only_model": self.args.save_only_model,
            "num_train_epochs": self.args.num_train_epochs,
            "versions": {package: version(package) for package in packages},
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.average_weights()
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
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
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


def _labels_of(logp: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the token ids that `logp` is about, -100 where there is none; same shape as `logp`."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"].to(logp.device)
    return _beside(logp, inputs["labels"], -100)


def _beside(logp: Tensor, column: Tensor, fill: float) -> Tensor:
    """Return the values of a (batch, length) column that `logp` is about, `fill` where it has none; same shape as `logp`."""
    virtual_tokens = logp.shape[1] + 1 - column.shape[1]  # that prompt-learning PEFT puts in front
    return torch.nn.functional.pad(column.to(logp.device), (virtual_tokens, 0), value=fill)[:, 1:]
