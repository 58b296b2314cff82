"""The settings of a run, `BLConfig`, and the rule which metric chooses a checkpoint."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from .._util.text import SECRETS, listed
from ..errors import RecipeError
from ..losses.metrics import compares_models
from ..objectives.objective import Objective
from ..objectives.spec import named
from ..objectives.threshold import Threshold
from ..tokens.row_cut import RowCut
from .refusals import refuse_bypass

RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

LOWER_IS_BETTER = ("nll", "perplexity")


@dataclass
class BLConfig(SFTConfig):
    r"""
    Configuration of [`BLTrainer`]: [`~trl.SFTConfig`] and five keys.

    Parameters:
        objective (`str` or `dict[str, Any]`, *optional*, defaults to `"nll"`):
            The objective f(p) to minimise: `"nll"`, `"neg_p"`, `"log_one_minus_p"`, `{"name": "power", "alpha": 10}`, or
            a function of your own, `my_losses.gated`, kept as its import path `"my_losses:gated"`; composed with schedules,
            `floor`, `mix` and `special_tokens` as [`Objective`] says.
        threshold (`float` or `dict[str, Any]`, *optional*):
            Train only on target tokens whose probability under the current model is at least this, or
            `{"above": 0.2, "below": 0.9, "normalize": "tokens"}`, or `{"above_percentile": 10}`. See [`Threshold`].
        loss_head (`str`, *optional*, defaults to `"auto"`):
            `"trl"` computes log-probabilities with TRL's loss head; `"auto"` does so only where `bl_trainer`'s doesn't apply.
        stop_on_nan (`bool`, *optional*, defaults to `False`):
            Stop when the loss of a micro-batch is NaN or infinite, and before a step whose gradient is. The [`LossError`]
            names the step and the rows of the training set. Waits for the device once per micro-batch and step.
        drop_rows (`str`, *optional*):
            Rows of the training set to leave out, by a column of the scores that `diagnose --scores` wrote:
            `"out/scores noise_score > 4"`. The scores must be of exactly these rows.

    Raises:
        `RecipeError`: on a wrong objective, threshold or `drop_rows`, and on settings under which something else than the
            objective would be trained: another `loss_type`, label smoothing, Liger's cross-entropies, DeepSpeed sequence
            parallelism.

    > [!NOTE]
    > `metric_for_best_model` defaults to `"eval_nll"` where a metric is needed, unless the loss is NLL's itself; and
    > `greater_is_better` to `False` for `"eval_nll"` and `"eval_perplexity"`.
    """

    objective: dict[str, Any] | str | None = field(
        default="nll",
        metadata={
            "help": "Objective f(p): nll, neg_p, log_one_minus_p, package.module:function, or a mapping such as "
            "{name: power, alpha: 10}.",
            "metavar": "NAME|JSON",
        },
    )
    threshold: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Train only on target tokens with at least this probability, or a mapping such as "
            "{above: 0.2, below: 0.9, normalize: tokens}.",
            "metavar": "P|JSON",
        },
    )

    loss_head: str = field(
        default="auto",
        metadata={
            "help": "Loss head: trl uses TRL's, with which nll trains exactly SFTTrainer's weights; auto uses it only where "
            "bl_trainer's doesn't apply.",
            "metavar": "auto|trl",
        },
    )

    stop_on_nan: bool = field(
        default=False,
        metadata={"help": "Stop when the loss is NaN or infinite, with the step and the rows of the training set."},
    )

    drop_rows: str | None = field(
        default=None,
        metadata={
            "help": "Rows of the training set to leave out, by scores of `diagnose --scores`: 'out/scores noise_score > 4'.",
            "metavar": "SCORES COLUMN SIGN NUMBER",
        },
    )

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["objective", "threshold"]

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key != "_parsed"}
        # transformers pickles its arguments into every checkpoint
        return {**state, **{key: None for key in SECRETS if hasattr(self, key)}}

    def __copy__(self) -> "BLConfig":
        """Return a copy with all that pickles leave out: secrets, and what was parsed."""
        made = type(self).__new__(type(self))
        vars(made).update({**vars(self), "_parsed": dict(self._known())})
        return made

    @property
    def parsed_objective(self) -> Objective:
        """The objective, parsed once however often it is asked for."""
        return self._parse("objective", Objective.parse)

    @property
    def parsed_threshold(self) -> Threshold:
        """The threshold, parsed once however often it is asked for."""
        return self._parse("threshold", Threshold.parse)

    def _known(self) -> dict[str, tuple[Any, Any]]:
        """Return what each key was, and what it was parsed to."""
        return vars(self).setdefault("_parsed", {})

    def _parse(self, key: str, parse: Callable[[Any], Any]) -> Any:
        known, spec = self._known(), getattr(self, key)
        if key not in known or known[key][0] != spec:
            try:
                known[key] = copy.deepcopy(spec), parse(spec)
            except RecipeError as error:
                said = str(error)
                raise (error if f"`{key}" in said else RecipeError(f"`{key}`: {said}")) from error.__cause__
        return known[key][1]

    def _parsed_both(self) -> tuple[Objective, Threshold]:
        """Return the objective and the threshold. Raises RecipeError with the mistakes of both."""
        faults = []
        for key in ("objective", "threshold"):
            try:
                getattr(self, f"parsed_{key}")
            except RecipeError as error:
                faults.append(error)
        if len(faults) > 1:
            raise RecipeError(listed([*map(str, faults)], "the configuration"))
        if faults:
            raise faults[0]
        return self.parsed_objective, self.parsed_threshold

    def _keep_as_written(self, key: str, parsed: Objective | Threshold) -> None:
        """Keep the key fit for JSON, and what it was parsed to."""
        if isinstance(getattr(self, key), Threshold):
            setattr(self, key, parsed.to_dict())
        self._known()[key] = copy.deepcopy(getattr(self, key)), parsed

    def __post_init__(self) -> None:
        self.objective = named(self.objective)
        if self.drop_rows is not None:
            RowCut.parse(self.drop_rows)
        for old, new in RENAMED.items():  # TRL's defaults go by the old names, of which transformers warns
            if getattr(self, new, None) is None and hasattr(self, new):
                setattr(self, new, getattr(self, old))
        objective, threshold = self._parsed_both()
        self._keep_as_written("objective", objective)
        self._keep_as_written("threshold", threshold)
        chooses = self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau"
        is_ruler = compares_models(objective, threshold)
        if self.metric_for_best_model is None and chooses and not is_ruler:
            self.metric_for_best_model = "eval_nll"
        metric = self.metric_for_best_model or ""
        if metric.endswith("loss") and not is_ruler:
            raise RecipeError(
                f"Cannot choose by `metric_for_best_model: {metric}`: only the loss of `objective: nll` without `threshold` "
                "tells the better model. Write `metric_for_best_model: eval_nll`, or remove the key."
            )
        if self.greater_is_better is None and metric.endswith(LOWER_IS_BETTER):
            self.greater_is_better = False
        super().__post_init__()
        self._keep_as_written("objective", objective)  # a mapping that was JSON text
        self._keep_as_written("threshold", threshold)
        refuse_bypass(self)


def choice_of(args: Any) -> dict[str, Any] | None:
    """Return by which metric `args` choose the best checkpoint, and in which direction; None if they choose none."""
    metric = args.metric_for_best_model
    if metric is None:
        return None
    return {"metric_for_best_model": f"eval_{metric.removeprefix('eval_')}", "greater_is_better": bool(args.greater_is_better)}


def objective_of(args: Any) -> Objective:
    """Return the parsed objective of `args`; of a plain `SFTConfig`, or None, `nll`."""
    return args.parsed_objective if isinstance(args, BLConfig) else Objective.parse(getattr(args, "objective", "nll"))


def threshold_of(args: Any) -> Threshold:
    """Return the parsed threshold of `args`; of a plain `SFTConfig`, or None, one that keeps all tokens."""
    return args.parsed_threshold if isinstance(args, BLConfig) else Threshold.parse(getattr(args, "threshold", None))
