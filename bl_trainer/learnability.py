"""The learnability probe: are the improbable target tokens of a data set knowledge that the model lacks, or noise?

A LoRA adapter is trained by NLL for a few steps on one half of the data, and both models are asked about the improbable
targets of the other half. Those that have gained more than other tokens which were as improbable there can be foretold from
the first half, as knowledge can and noise can't.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .annotation import token_batch
from .head import Head, log_probs, score
from .measurement import count_targets, score_batch
from .objectives import Objective
from .parser import RecipeError
from .recipe import Recipe
from .statistics import ExampleKey, ExampleSums, Means, MeasurementError, TokenBatch
from .trainer import BLTrainer

BELOW = 0.1  # p under the base model below which a target is improbable
CANDIDATES = 64  # of which a control is the best match
PROBE_TOKENS = 20_000  # target tokens of the second half that are asked about
PROBE_EXAMPLES = 4096  # the most examples that they are taken from
LORA_FACTOR = 10  # LoRA's best learning rate relative to full fine-tuning's (https://thinkingmachines.ai/blog/lora)


def probe_adapter(recipe: Recipe) -> PeftConfig:
    """Return the recipe's own adapter, or LoRA of rank 16 on all linear layers."""
    return recipe.peft_config or LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def probe_learning_rate(recipe: Recipe) -> float:
    """Return the recipe's learning rate for its own adapter, or `LORA_FACTOR` times that of full fine-tuning."""
    return recipe.training.learning_rate * (1 if recipe.peft_config else LORA_FACTOR)


def halves(dataset: Any, seed: int, num_train: int) -> tuple[Dataset, Dataset]:
    """Return up to `num_train` examples of one half of the data set, and up to `PROBE_EXAMPLES` of the other.

    Taken in random order; of a stream, from its beginning. Examples of the same prompt, or without prompts equal ones, are in
    the same half. Raises RecipeError if either has fewer than 10.
    """
    parts: tuple[list[Any], list[Any]] = [], []
    most = num_train, PROBE_EXAMPLES
    shuffled = dataset.shuffle(seed=seed) if isinstance(dataset, Dataset) else dataset.shuffle(seed=seed, buffer_size=1000)
    for example in shuffled:
        text = json.dumps(example.get("prompt", example), sort_keys=True, default=str)
        half = hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2
        if len(parts[half]) < most[half]:
            parts[half].append(example)
        if all(len(part) == size for part, size in zip(parts, most, strict=True)):
            break
    if min(map(len, parts)) < 10:
        raise RecipeError(
            f"`--probe_steps` needs at least 10 examples in each half of the data, there are {len(parts[0])} and "
            f"{len(parts[1])} (those of one prompt stay together). Leave it out, or add data."
        )
    first, second = (Dataset.from_list(part, features=dataset.features) for part in parts)
    return first, second


@dataclass
class _Asked:
    """A batch of the second half: what goes into the model, its target tokens, and which are improbable.

    Of the n improbable ones: `pairs` (n, 2), ids of target and control; `before` (n, 2), their log p under the base model;
    `is_fair` (n,), whether there is a control.
    """

    inputs: dict[str, Any]
    tokens: TokenBatch
    is_low: Tensor
    pairs: Tensor
    before: Tensor
    is_fair: Tensor


class Learnability:
    """Means over the second half's target tokens, after some steps on the first.

    A target is improbable if p < `BELOW` under the base model. Its control is another improbable target of the data that is
    improbable at this place too: of `CANDIDATES` taken at random, the nearest to it in log p. With s the sign of the target's
    gain in log p less its control's, training that says nothing about this place gives s = 1 as often as s = -1.

    `learnable`: mean of s, 0 on targets that are not improbable. `low`: share of improbable targets. `learnable`/`low` is the
    share of improbable targets that training foretells, if it foretells those for sure and knows nothing of the rest.
    """

    VALUES = ("learnable", "low")

    def __init__(self, asked: Iterable[tuple[_Asked, Tensor]], accelerator: Any):
        self.total = Means(self.VALUES)
        sums = ExampleSums(self._count)
        for batch, after in asked:
            rise = after - batch.before
            learnable = torch.zeros(len(batch.is_low), dtype=torch.float64)
            learnable[batch.is_low] = torch.where(batch.is_fair, (rise[:, 0] - rise[:, 1]).sign(), 0).double()
            sums.add(batch.tokens, torch.stack([learnable, batch.is_low.double()]))
        self.total.gram.copy_(accelerator.reduce(self.total.gram.to(accelerator.device), reduction="sum").cpu())

    def _count(self, keys: list[ExampleKey], num_tokens: Tensor, sums: Tensor) -> None:
        self.total.add(num_tokens, sums)


class Probe:
    """Trains the adapter of `trainer`, which does nothing yet, and measures. Nothing else can be measured with it afterwards.

    `first`: tokenised examples to train on. `batches`: of the second half, as diagnosis collates them; this process's. `most`:
    target tokens of all processes to ask about, at most `PROBE_TOKENS`; 0 for those. Raises MeasurementError if there are none.
    """

    def __init__(
        self, trainer: BLTrainer, recipe: Recipe, first: Dataset, batches: Iterable[dict[str, Any]], steps: int, most: int
    ):
        self.trainer, self.first, self.steps = trainer, first, steps
        self.learning_rate = probe_learning_rate(recipe)
        self.batches: list[tuple[dict[str, Any], TokenBatch]] = []
        tokens, limit = 0, math.ceil(min(most or PROBE_TOKENS, PROBE_TOKENS) / trainer.accelerator.num_processes)
        for batch in batches:
            tokens += int(count_targets(batch))
            own = token_batch(batch)
            self.batches.append((batch, own))
            if tokens >= limit:
                break
        args = trainer.args
        examples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.train_examples = min(steps * examples, len(first))
        self.train_tokens = steps * examples * sum(map(len, first["input_ids"])) // len(first)
        self.tokens = sum(gather_object([tokens]))
        self.examples = sum(gather_object([sum(len(own.examples) for _, own in self.batches)]))
        if not self.tokens:
            raise MeasurementError("No example of the probe's second half has a target token.")

    def cost(self) -> str:
        """Say what `run` will do."""
        return (
            f"Learnability probe: {self.steps} steps of an adapter by nll at learning rate {self.learning_rate:.2g} on "
            f"{self.train_examples:,} examples, {self.train_tokens:,} tokens forward and backward; then {self.tokens:,} target "
            f"tokens of {self.examples:,} other examples, four times forward. The recipe's model stays as it is."
        )

    def run(self) -> dict[str, Any]:
        """Train and measure, half-way too; return what is found, a mapping fit for JSON, the same in every process."""
        asked = self._ask()
        found: list[Learnability] = []

        class HalfWay(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                if state.global_step == self.steps // 2:
                    found.append(self._measure(asked))

        self._train(HalfWay())
        found.append(self._measure(asked))
        parts = [each.total.summary() for each in found]
        return {
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "below": BELOW,
            "trained": {"examples": self.train_examples, "tokens": self.train_tokens},
            **parts[-1],
            "half_way": parts[0] if len(parts) > 1 else None,
        }

    def _train(self, callback: TrainerCallback) -> None:
        trainer, args = self.trainer, self.trainer.args
        trainer.objective, trainer.train_dataset = Objective.parse("nll"), self.first
        own = {
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant_with_warmup",
            "lr_scheduler_kwargs": None,
            "warmup_steps": min(5, self.steps // 4),
            "logging_strategy": "no",
            "eval_on_start": False,
        }
        recipe = {key: getattr(args, key) for key in own}  # which the report names
        vars(args).update(own)
        trainer.add_callback(callback)
        try:
            trainer.train()
        finally:
            vars(args).update(recipe)

    def _each(self, name: str, use: Callable[..., Any], adapted: bool = False) -> Iterable[Any]:
        """Yield `use(hidden, head, target)` of each batch, of the base model or the adapted one."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
        for i, (inputs, _) in enumerate(tqdm(self.batches, desc=name, disable=hidden)):
            with trainer.accelerator.autocast(), nullcontext() if adapted else model.disable_adapter():
                yield score_batch(trainer, model, inputs, lambda *args, i=i: use(i, *args))

    def _ask(self) -> list[_Asked]:
        """Find the improbable targets, and their controls, with the base model."""
        low: list[Tensor] = []

        def find(i: int, hidden: Tensor, head: Head, target: Tensor) -> Tensor:
            logp = score(hidden, head, target).logp
            low.append((logp < math.log(BELOW)).cpu())
            return target[low[-1].to(target.device)].cpu()

        own = [token for tokens in self._each("Base model", find) for token in tokens.tolist()]
        pool = torch.tensor(sorted(gather_object(own)), dtype=torch.int64)

        def match(i: int, hidden: Tensor, head: Head, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            is_low = low[i].to(target.device)
            target = target[is_low, None]
            candidates = pool[self._draw(self.batches[i][1], low[i], len(pool))].to(target.device)
            logp = log_probs(hidden[is_low], head, torch.cat([target, candidates], dim=1))
            gap = (logp[:, 1:] - logp[:, :1]).abs()
            gap[(candidates == target) | (logp[:, 1:] >= math.log(BELOW))] = math.inf
            best = gap.argmin(dim=1, keepdim=True)
            pairs = torch.cat([target, candidates.gather(1, best)], dim=1)
            before = torch.cat([logp[:, :1], logp[:, 1:].gather(1, best)], dim=1)
            return pairs.cpu(), before.cpu(), gap.gather(1, best)[:, 0].isfinite().cpu()

        matched = self._each("Controls", match)
        return [_Asked(*batch, is_low, *each) for batch, is_low, each in zip(self.batches, low, matched, strict=True)]

    def _draw(self, tokens: TokenBatch, is_low: Tensor, size: int) -> Tensor:
        """Return `CANDIDATES` random numbers below `size` for each improbable token, whichever process and batch has it."""
        owners, counts = tokens.example[is_low].unique_consecutive(return_counts=True)
        drawn = [torch.empty(0, CANDIDATES, dtype=torch.int64)]
        for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
            generator = torch.Generator().manual_seed((self.trainer.args.seed + tokens.examples[owner]["row"]) % 2**63)
            drawn.append(torch.randint(size, (count, CANDIDATES), generator=generator))
        return torch.cat(drawn)

    def _measure(self, asked: list[_Asked]) -> Learnability:
        def compare(i: int, hidden: Tensor, head: Head, target: Tensor) -> Tensor:
            return log_probs(hidden[asked[i].is_low.to(hidden.device)], head, asked[i].pairs.to(hidden.device)).cpu()

        after = self._each("Adapted model", compare, adapted=True)
        return Learnability(zip(asked, after, strict=True), self.trainer.accelerator)
