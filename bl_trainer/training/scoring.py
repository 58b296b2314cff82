"""`ScoringTrainer`: what training and diagnosis share, a model that scores tokens where and as training places it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from trl import SFTTrainer

from .._util.accelerate import has_prepared
from .._util.bitsandbytes import keep_trainable
from .._util.transformers import is_deepspeed_zero3_enabled
from .._util.trl import add_fused_lm_head
from ..head.patch import add_scoring
from ..head.verification import verify_head, verify_separation
from ..measurement.forward import Lockstep, Observed
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from ..tokens.collators import collator_of
from ..tokens.formatting import formatted
from ..tokens.labels import check_rows, columns_of, plain
from ..tokens.names import JOINED, REFERENCE, ROW, TEMPLATE, WEIGHT
from ..tokens.prepare import Rows, Wanted, prepare
from ..tokens.rendering import check_rendering
from ..tokens.vocabulary import tokenizer_of, warn_of_two_starts
from .guards import check_another, check_loaded
from .refusals import has_balancing_loss, refuse_copied_tied_head, refuse_unweighted
from .setup import Setup


class ScoringTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose model scores target tokens by a verified head, and whose data sets keep our columns.

    `observe` runs anything over batches in place of an evaluation, `prepare_rows` makes a data set ready as training has it.
    Takes [`~trl.SFTTrainer`]'s arguments by name. Raises RecipeError as [`Setup`] does before the model loads, and after it as
    `check_loaded` and `verify_head`.
    """

    model: Any  # transformers' declaration leaves out what TRL has made of it
    parsed_objective: Objective  # `objective` is the name that transformers' hyperparameter search writes its score to
    threshold: Threshold
    reference: str | None  # where `ref_logp` comes from: "column", "adapter" or nowhere
    reference_head: str | None  # why TRL's head computes the loss, None if ours does

    _observer: Callable[..., None] | None = None
    _is_verified = False
    _are_apart: bool  # whether examples that a collator joins in a row need no verification, or no further one

    def __init__(self, **arguments: Any) -> None:
        setup = Setup.check(arguments)
        self.parsed_objective, self.threshold, self.reference = setup.objective, setup.threshold, setup.reference
        self.kept_rows, self._setup = setup.kept, setup
        self._ready: WeakSet[Any] = WeakSet()  # data sets that are prepared, or need no preparation
        self._may_join = setup.arguments.get("data_collator") is not None  # examples in a row, which no setting tells of
        super().__init__(**setup.arguments)
        self.padding_free |= getattr(self.data_collator, "padding_free", False)  # TRL's own, made by the user
        self.train_dataset = check_loaded(self, setup.arguments)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        self._ready.update(each for each in (self.train_dataset, *evaluated) if each is not None)
        self.add_heads(self.model)
        self.verify_whole()
        self.data_collator = collator_of(self)

    @property
    def loss_head(self) -> str:
        """The loss head in use: `own` or `trl`."""
        return "own" if self.reference_head is None else "trl"

    @property
    def sees_images(self) -> bool:
        """Whether the training set has images."""
        return bool(self._is_vision_dataset)

    def add_heads(self, model: Any) -> None:
        """Let `model` compute the loss. Raises RecipeError if neither our head nor TRL's gives its logits."""
        keep_trainable(model)
        base = model.get_base_model() if is_peft_model(model) else model
        sums = ("log_sum_sq_probs",) if "log_sum_sq_probs" in self.parsed_objective.statistics else ()
        add_fused_lm_head(base, outputs=("log_probs", "entropy", *sums, "is_top1"))
        add_scoring(base)
        refuse_unweighted(base, self.args)
        if self.aux_loss_enabled and not has_balancing_loss(base, self.args):
            self.aux_loss_enabled = base.config.get_text_config().output_router_logits = False
        self.reference_head = self._why_reference_head()
        self._is_verified, self._are_apart = False, not self._may_join
        refuse_copied_tied_head(base, getattr(self.args, "chat_template_path", None))

    def _why_reference_head(self) -> str | None:
        """Return why TRL's head computes the loss, or None if ours does, which is exact in fewer products."""
        reasons = {
            "`loss_head: trl` asks for it": getattr(self.args, "loss_head", "auto") == "trl",
            "sequences are shared out over devices": self.is_shared_out("sp"),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def is_shared_out(self, *kinds: str) -> bool:
        """Whether sequences or weights are shared out over devices by a parallelism of these `kinds`: cp, sp, tp."""
        return any(getattr(self.accelerator.parallelism_config, f"{kind}_size", 1) > 1 for kind in kinds)

    # Verification

    def _is_sharded(self) -> bool:
        """Whether a forward pass needs the model as training places it."""
        return self._is_spread() or any(parameter.is_meta for parameter in self.model.parameters())

    def _is_spread(self) -> bool:
        """Whether the weights are spread over processes, which then run each forward pass together."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    def heads_in_use(self) -> set[str]:
        """Return the loss heads that this run computes with; percentiles are measured with `bl_trainer`'s own."""
        return {self.loss_head} | (set() if self.threshold.resolved else {"own"})

    def verify(self, model: Any) -> None:
        """Verify the heads in use, and packed rows. Raises RecipeError as `verify_head` and `verify_separation`."""
        self._is_verified = True
        for kind in sorted(self.heads_in_use()):
            with self.accelerator.autocast():
                verify_head(model, kind, trains=not self._is_sharded(), text=not self.sees_images)
        if self.padding_free:
            with self.accelerator.autocast():
                verify_separation(model, trains=not self._is_sharded())

    def verify_whole(self) -> None:
        """Verify the heads of a model that is in place already, as a sharded one isn't before training."""
        if not self._is_sharded():
            self.verify(self.model)

    def ensure_verified(self) -> None:
        """Verify the loss head of a sharded model once it is in place. Raises RecipeError as `verify_head`."""
        if not self._is_verified:
            self._is_verified = True  # the measurement below asks again
            ids = torch.zeros(1, 2, dtype=torch.long)
            self.observe([{"input_ids": ids, "labels": ids}], lambda model, batch: self.verify(model))

    def _prepare_inputs(self, inputs):
        batch = super()._prepare_inputs(inputs)
        self._verify_apart(batch.pop(JOINED, None) is not None, batch)
        return batch

    def _verify_apart(self, joined: bool, batch: dict[str, Any]) -> None:
        """Verify the model at the first batch in which a user's own collator has joined examples; `joined`: whether here."""
        if self._are_apart:
            return
        if self._is_spread():  # one process may have such a batch before the others
            joined = bool(self.accelerator.reduce(torch.tensor(int(joined), device=self.accelerator.device), reduction="sum"))
        if joined:
            self._are_apart = True
            with self.accelerator.autocast():
                verify_separation(self.model, trains=not self._is_sharded(), batch=batch)

    # Measurement

    def observe(
        self,
        batches: Iterable[dict[str, Any]],
        observer: Callable[..., None],
        *,
        max_tokens: int | None = None,
        label: str = "",
        expected: int | None = None,
    ) -> Observed:
        """Call `observer(model, batch)` on each of this process's batches, in place of an evaluation step.

        Args:
            batches: Collated, with `labels`. All processes make as many forward passes, see [`Lockstep`].
            max_tokens: Stop after the batch that reaches this number of target tokens over all processes.
            label: Of the progress bar, without which there is none; `expected`: its target tokens in all.

        Raises:
            MeasurementError: If a process gets no batch at all.
        """
        self.shard()
        self.ensure_verified()
        hidden = not label or self.args.disable_tqdm or not self.accelerator.is_main_process
        with tqdm(total=expected or max_tokens, desc=label, unit=" tokens", unit_scale=True, disable=hidden) as bar:
            dealt = Lockstep(batches, self.accelerator, max_tokens, bar)
            self._observer = observer
            try:
                super().evaluation_loop(dealt, "Measurement", prediction_loss_only=True)  # type: ignore[arg-type]
            finally:
                self._observer = None
        return Observed(dealt.num_tokens, dealt.is_cut)

    def shard(self) -> None:
        """Prepare a model that hasn't trained yet for FSDP2, under which accelerate takes none without its optimizer."""
        if self.accelerator.is_fsdp2 and not has_prepared(self.accelerator):
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.create_optimizer())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._observer is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._observer(model, inputs)
        return None, None, None

    # Data

    def wanted(self, args: Any, name: str) -> Wanted:
        """Return the columns that the data set `name` is to get or keep."""
        return Wanted()

    def prepare_rows(self, dataset: Any, name: str, *, packing: bool, completion_only: bool | None = None) -> Any:
        """Return another data set, which errors call `name`, ready as the trainer's own is. Raises as `make_ready`."""
        return self.make_ready(Rows(dataset, self.processing_class, self.args, packing, None, name, completion_only))

    def make_ready(self, rows: Rows) -> Any:
        """Return a data set ready to train, checked row by row. Raises RecipeError with the number of the row."""
        rows = formatted(replace(rows, dataset=plain(rows.dataset)))
        dataset = rows.dataset
        if rows.formatting_func is None:
            where = f"the {rows.name} set"
            dataset = check_rendering(dataset, rows.processing_class, self.chat_template, where, rows.args)
        rows = replace(rows, dataset=check_rows(dataset, rows.name))
        prepared = prepare(self, rows, self.wanted(rows.args, rows.name))
        if "input_ids" not in columns_of(rows.dataset):
            warn_of_two_starts(prepared, tokenizer_of(rows.processing_class), rows.name)
        return prepared

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if dataset in self._ready:  # packing it again would join examples that are packed
            return dataset
        prepared = self.make_ready(Rows(dataset, processing_class, args, packing, formatting_func, dataset_name))
        self._ready.add(prepared)
        return prepared

    def _prepare_given(self, dataset: Any, name: str) -> Any:
        """Return a data set given after construction, checked and prepared as the evaluation sets were. Raises RecipeError."""
        if not isinstance(dataset, (Dataset, IterableDataset)) or dataset in self._ready:
            return dataset
        args: Any = self.args
        formatting_func = self._setup.arguments.get("formatting_func")
        given = prepared = self._setup.check_another(dataset, name, self.completion_only_loss)
        if not self._skip_prepare_dataset:
            packing = args.packing if args.eval_packing is None else args.eval_packing
            prepared = self._prepare_dataset(given, self.processing_class, args, packing, formatting_func, name)
        prepared = check_another(self, given, prepared, name)
        self._ready.add(prepared)
        return prepared

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare_given(each, name) for name, each in eval_dataset.items()}
        return super().evaluate(self._prepare_given(eval_dataset, "eval"), ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        return super().predict(self._prepare_given(test_dataset, "test"), ignore_keys, metric_key_prefix)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        own = [ROW, WEIGHT, TEMPLATE, REFERENCE]
        if self.sees_images:  # of whose rows TRL's collator reads this column, which TRL would remove
            own.append(self.args.dataset_text_field)
        self._signature_columns += [key for key in own if key not in self._signature_columns]
