"""A checkpoint and its base model on the same tokens."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from .._util.logs import get_logger
from ..errors import RecipeError
from ..head.lm_head import Head
from ..head.ops import TokenDivergences, TokenScores, compare, score
from ..head.patch import add_scoring
from ..head.verification import verify_head
from ..measurement.forward import score_batch
from ..recipe.recipe import Recipe
from ..training.checkpoints import quantization_in, quantization_of, read_record

logger = get_logger(__name__)


def warn_of_quantization(adapter: str, config: Any) -> None:
    """Warn if a run's adapter was trained over a base that was quantised otherwise than the model of `config`."""
    record = read_record(adapter)
    if not record:
        return
    then, now = (_bits(quantization_of(each)) for each in (record, {"quantization": quantization_in(config) or {}}))
    if then != now:
        logger.warning(
            f"The adapter `--compare {adapter}` was trained over a base in {then}, and is compared over one in {now}. Write "
            "the same `load_in_4bit` or `load_in_8bit` to measure what was trained."
        )


def _bits(quantization: dict[str, Any]) -> str:
    """Return how weights are quantised, in words."""
    if quantization.get("load_in_4bit"):
        double = ", twice quantised" if quantization.get("bnb_4bit_use_double_quant") else ""
        return f"4 bits ({quantization.get('bnb_4bit_quant_type', 'fp4')}{double})"
    return "8 bits" if quantization.get("load_in_8bit") else "full precision"


class Pair:
    """The recipe's model and a tuned one, both scored on a batch."""

    def __init__(self, trainer: Any, recipe: Recipe, path: str):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise RecipeError("`--compare` needs a whole model on each device. Launch it without FSDP and DeepSpeed.")
        self.trainer = trainer
        self.adapter = (Path(path) / "adapter_config.json").is_file()
        if self.adapter:
            base = PeftConfig.from_pretrained(path).base_model_name_or_path
            if base != recipe.model.model_name_or_path:
                logger.warning(
                    f"The adapter `--compare {path}` was trained on {base}, the recipe's model is another by its name."
                )
            warn_of_quantization(path, trainer.model.config)
        if self.adapter and isinstance(trainer.model, PeftModel):
            trainer.model.load_adapter(path, "tuned")
            trainer.model.set_adapter("tuned")
        elif self.adapter:
            trainer.model = PeftModel.from_pretrained(trainer.model, path, adapter_name="tuned")
        else:
            kwargs = trainer.args.model_init_kwargs or {}
            kwargs = {**kwargs, "revision": None, "quantization_config": None}  # as it was saved, whatever the recipe says
            try:
                self.tuned = AutoModelForCausalLM.from_pretrained(path, **kwargs).to(trainer.model.device).eval()
            except (OSError, ValueError) as error:
                raise RecipeError(f"Can't load the model `--compare {path}`: {' '.join(str(error).split())}") from error
            add_scoring(self.tuned)
        with trainer.accelerator.autocast():
            verify_head(trainer.model if self.adapter else self.tuned, trains=False)

    def __call__(self, batch: dict[str, Any]) -> tuple[TokenScores, TokenScores, TokenDivergences]:
        trainer = self.trainer
        model = trainer.model

        def keep(hidden: Tensor, head: Head, target: Tensor) -> Any:
            return hidden, head, score(hidden, head, target)

        with trainer.accelerator.autocast():
            if self.adapter:
                with model.disable_adapter():
                    hidden, head, base = score_batch(trainer, model, batch, keep)
                own, own_head, tuned = score_batch(trainer, model, batch, keep)
            else:
                hidden, head, base = score_batch(trainer, model, batch, keep)
                own, own_head, tuned = score_batch(trainer, self.tuned, batch, keep)
            with torch.no_grad():
                divergences = compare(own, own_head, hidden, head)
        return base.cpu(), tuned.cpu(), divergences.cpu()
