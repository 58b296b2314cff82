"""The learnability probe: are the improbable target tokens of a data set knowledge that the model lacks, or noise?

A LoRA adapter trains by NLL for a few steps on one half of the data. Both models then score the improbable targets of the
other half. Some gain more in log p at their place than the same token gains elsewhere. Such a target is predictable from its
context, as knowledge is and noise isn't.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..errors import MeasurementError, RecipeError
from ..head.lm_head import Head
from ..head.ops import log_probs, score
from ..head.targets import IGNORED
from ..measurement.forward import count_targets, score_batch
from ..measurement.means import Means
from ..recipe.recipe import Recipe
from ..tokens.aligned import MASKS
from ..tokens.annotation import token_batch
from ..tokens.names import TOKEN_WEIGHT
from ..tokens.vocabulary import end_ids, special_ids, tokenizer_of
from ..training.checkpoints import take_average
from ..training.config import BLConfig
from ..training.trainer import BLTrainer
from .advice import judge
from .diagnoser import Diagnoser
from .evidence import BELOW, Evidence, contexts, evidence, foretold, matched, shares, summed
from .report import Foretold, Learnability, Trained

CANDIDATES = 64  # places tried for a control, which is the best match
PROBE_TOKENS = 20_000  # target tokens of the second half that are asked about
PROBE_EXAMPLES = 4096  # the most examples that they are taken from
FEWEST = 10  # examples of a half, below which there is no interval
LORA_FACTOR = 10  # LoRA's best learning rate relative to full fine-tuning's (https://thinkingmachines.ai/blog/lora)


def probe_adapter(recipe: Recipe) -> PeftConfig:
    """Return the recipe's own adapter, or LoRA of rank 16 on all linear layers."""
    return recipe.peft_config or LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def probe_learning_rate(recipe: Recipe) -> float:
    """Return the recipe's learning rate for its own adapter, or `LORA_FACTOR` times that of full fine-tuning."""
    return recipe.training.learning_rate * (1 if recipe.peft_config else LORA_FACTOR)


def probe_arguments(args: BLConfig, steps: int, learning_rate: float) -> BLConfig:
    """Return arguments of diagnosis, made to train the probe's adapter on rows that are prepared."""
    own: dict[str, Any] = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(5, steps // 4),
        "logging_strategy": "no",
        "eval_on_start": False,
        "enable_jit_checkpoint": False,  # SIGTERM ends the probe, which has nothing to save
        "dataloader_drop_last": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "assistant_only_loss": False,  # the labels say it
        "chat_template_path": None,  # the model and the tokenizer have what these three would do to them
        "model_init_kwargs": None,
        "use_liger_kernel": False,
    }
    return replace(args, **{key: value for key, value in own.items() if hasattr(args, key)})


def halves(dataset: Any, seed: int, num_train: int, text_field: str = "text") -> tuple[Dataset, Dataset]:
    """Return up to `num_train` examples of one half of the data set, and up to `PROBE_EXAMPLES` of the other.

    Taken in random order; of a stream, from its beginning. Examples that begin alike are in the same half, whatever their other
    columns: those with the same prompt, the same messages up to the first answer, the same tokens before the first target, or
    the same text. Raises RecipeError if either half has fewer than `FEWEST`.
    """
    parts: tuple[list[Any], list[Any]] = [], []
    most = max(num_train, FEWEST), PROBE_EXAMPLES
    shuffled = dataset.shuffle(seed=seed) if isinstance(dataset, Dataset) else dataset.shuffle(seed=seed, buffer_size=1000)
    for example in shuffled:
        half = half_of(example, text_field)
        if len(parts[half]) < most[half]:
            parts[half].append(example)
        if all(len(part) == size for part, size in zip(parts, most, strict=True)):
            break
    if min(map(len, parts)) < FEWEST:
        raise RecipeError(
            f"`--probe_steps` needs at least {FEWEST} examples in each half of the data, there are {len(parts[0])} and "
            f"{len(parts[1])} (those that begin alike stay together). Leave it out, or add data."
        )
    first, second = (Dataset.from_list(part, features=dataset.features) for part in parts)
    return first, second


def half_of(example: dict[str, Any], text_field: str) -> int:
    """Return which half of the data an example is in, 0 or 1, by how it begins."""
    text = json.dumps(_beginning(example, text_field), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2


def _beginning(example: dict[str, Any], text_field: str) -> Any:
    """Return what two examples must share to be of the same half. Of tokens that all train, that is all of them."""
    messages = example.get("messages")  # into which `arrange` has turned every other layout of conversations
    if example.get("prompt") is not None:
        return example["prompt"]
    if messages:
        answers = [i for i, turn in enumerate(messages) if turn.get("role") == "assistant"]
        return messages[: max(1, answers[0])] if answers else messages
    if example.get("input_ids") is None:
        return example if example.get(text_field) is None else example[text_field]
    ids = example["input_ids"]
    if example.get("labels") is not None:
        trains = [label != IGNORED for label in example["labels"]]
    else:
        rules = [example[key] for key in (*MASKS, TOKEN_WEIGHT) if example.get(key) is not None]
        trains = [all(each) for each in zip(*rules, strict=True)]
    first = trains.index(True) if True in trains else 0
    return ids[:first] if first > 1 else ids  # of a start token alone, all rows would be alike


class Probe:
    """Trains the adapter of `diagnoser`, which does nothing yet, and measures. Nothing else can be measured with it afterwards.

    A target is improbable if p < `BELOW` under the base model; end tokens, special ones and the chat template's own are left
    out. What the rows themselves say of it comes first (`evidence`): a format's token, and one that rows of the same context
    repeat, are predictable; one that these contradict is not. Of the rest training decides. Its control is the same token at
    another place, at which it is not the target and as improbable: of `CANDIDATES` places taken at random, that at which its
    log p is nearest. s is the sign of the token's gain in log p at its own place less its gain at the other. Training that says
    nothing of the place gives s = 1 as often as s = -1, however common the token is. Training that learns where random tokens
    are likely gives s = 1 more often, so `noise` can be too low. An improbable target none of whose places will do has no
    control, s = 0, and counts in `without_control`.

    Found are means over the second half's content, `VALUES`: `learnable`, the mean of 1 for what the rows show to be
    predictable, 0 for what they contradict, s for other improbable targets, 0 for others; `low`, the share of improbable
    targets; `noise`, `low` less `learnable`, which estimates the improbable noise; `contradicted`, a share of it; `gain`, the
    mean rise of log p, in nats.

    `first`: tokenised examples to train on. `batches`: of the second half, as diagnosis collates them; this process's. `most`:
    target tokens of all processes to ask about, at most `PROBE_TOKENS`; 0 for those. Raises MeasurementError if there are none.
    """

    def __init__(
        self,
        diagnoser: Diagnoser,
        recipe: Recipe,
        first: Dataset,
        batches: Iterable[dict[str, Any]],
        steps: int,
        most: int,
    ):
        if not len(first):
            raise MeasurementError("No example of the probe's first half has a target token. Raise `max_length`.")
        self.first, self.steps, self.learning_rate = first, steps, probe_learning_rate(recipe)
        args = probe_arguments(diagnoser.args, steps, self.learning_rate)
        self.trainer = BLTrainer(diagnoser.model, args, train_dataset=first, processing_class=diagnoser.processing_class)
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.train_examples = min(steps * size, len(first))
        self.train_tokens = steps * size * sum(map(len, first["input_ids"])) // len(first)
        own = self._read(batches, math.ceil(min(most or PROBE_TOKENS, PROBE_TOKENS) / args.world_size))
        self.tokens, self.examples, content = (sum(each) for each in zip(*gather_object([own]), strict=True))
        if not content:
            raise MeasurementError("No target token of the probe's second half is content: all are end or template tokens.")

    def _read(self, batches: Iterable[dict[str, Any]], most: int) -> tuple[int, int, int]:
        """Keep batches with `most` target tokens, and where each token is; return their tokens, examples and content tokens."""
        unlike = torch.tensor(sorted(end_ids(self.trainer) | special_ids(tokenizer_of(self.trainer.processing_class))))
        self.batches: list[dict[str, Any]] = []
        none = torch.empty(0, dtype=torch.long)
        columns: list[tuple[Tensor, ...]] = [(none, none, none, none, none, none.bool())]  # a process may have no batch
        tokens, examples = 0, 0
        for batch in batches:
            tokens += int(count_targets(batch))
            own = token_batch(batch)
            rows = torch.arange(len(own.token))
            is_content = ~own.is_template & ~torch.isin(own.token, unlike)
            before = contexts([example["input_ids"] for example in own.examples], own.example, own.place)
            columns.append(
                (torch.full_like(rows, len(self.batches)), rows, own.token, own.example + examples, before, is_content)
            )
            self.batches.append(batch)
            examples += len(own.examples)
            if tokens >= most:
                break
        self.batch, self.row, self.token, self.example, before, is_content = map(torch.cat, zip(*columns, strict=True))
        self.content = is_content.nonzero().flatten()
        self.evidence = Evidence(*(each[self.content] for each in evidence(self.token, self.example, before)))
        return tokens, examples, len(self.content)

    def cost(self) -> str:
        """Say what `run` will do."""
        drawn = "" if self.train_examples == len(self.first) else f" of the {len(self.first):,}"
        return (
            f"Learnability probe: {self.steps} steps of an adapter by nll at learning rate {self.learning_rate:.2g} on "
            f"{self.train_examples:,}{drawn} rows drawn from half of the data, {self.train_tokens:,} tokens forward and "
            f"backward; then {self.tokens:,} target tokens of {self.examples:,} other examples, four times forward. The "
            "recipe's model stays as it is."
        )

    def run(self) -> Learnability:
        """Train and measure, half-way too; return what is found, the same in every process.

        Raises MeasurementError if training makes no step, or ends in NaN.
        """
        base = self._base()
        low = self.content[base < math.log(BELOW)]
        places, before = self._controls(low)
        is_decided = self.evidence.is_decided[base < math.log(BELOW)]
        left_out = sum(gather_object([int((before.isnan() & ~is_decided).sum())]))
        found: list[Means] = []

        def measure() -> None:
            take_average(self.trainer.optimizer)
            found.append(self._measure(base, low, places, before))

        class HalfWay(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                if state.global_step == self.steps // 2:
                    measure()

        self.trainer.add_callback(HalfWay())
        self.trainer.train()
        measure()
        return self._judged([*map(foretold, found)], left_out)

    def _judged(self, found: list[Foretold], left_out: int) -> Learnability:
        probe = Learnability(
            steps=self.steps,
            learning_rate=self.learning_rate,
            below=BELOW,
            without_control=left_out,
            trained=Trained(self.train_examples, self.train_tokens),
            found=found[-1],
            half_way=found[0] if len(found) > 1 else None,
        )
        verdict, why = judge(probe)
        return replace(probe, verdict=verdict, why=why)

    def _each(self, name: str, use: Callable[..., Any], adapted: bool = False) -> Iterable[Any]:
        """Yield `use(i, hidden, head, target)` of each batch, of the base model or the adapted one."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
        for i, inputs in enumerate(tqdm(self.batches, desc=name, disable=hidden)):
            with trainer.accelerator.autocast(), nullcontext() if adapted else model.disable_adapter():
                yield score_batch(trainer, model, inputs, lambda *args, i=i: use(i, *args))

    def _base(self) -> Tensor:
        """Return log p of the content's targets under the base model."""
        parts = self._each("Base model", lambda i, hidden, head, target: score(hidden, head, target).logp.cpu())
        return torch.cat(list(parts))[self.content]

    def _ask(self, name: str, places: Tensor, tokens: Tensor, adapted: bool) -> Tensor:
        """Return log p of `tokens` (N,) at `places` (N,), numbers of targets."""
        batch, found = self.batch[places], torch.empty(len(places))

        def ask(i: int, hidden: Tensor, head: Head, target: Tensor) -> None:
            here = (batch == i).nonzero().flatten()
            rows = self.row[places[here]].to(target.device)
            found[here] = log_probs(hidden, head, rows, tokens[here].to(target.device)).float().cpu()

        for _ in self._each(name, ask, adapted):
            pass
        return found

    def _controls(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each improbable target its control's place, and the token's log p there under the base model.

        NaN where none of the places will do.
        """
        args, token = self.trainer.args, self.token[low]
        generator = torch.Generator().manual_seed(args.seed + args.process_index)
        drawn = self.content[torch.randint(max(len(self.content), 1), (len(low), CANDIDATES), generator=generator)]
        places = torch.cat([low[:, None], drawn], dim=1)
        logp = self._ask("Controls", places.flatten(), token.repeat_interleave(CANDIDATES + 1), False).view(places.shape)
        return matched(drawn, logp, self.token[drawn] == token[:, None])

    def _measure(self, base: Tensor, low: Tensor, controls: Tensor, before: Tensor) -> Means:
        tokens = torch.cat([self.token[self.content], self.token[low]])
        after = self._ask("Adapted model", torch.cat([self.content, controls]), tokens, adapted=True)
        if not all(gather_object([bool(after.isfinite().all())])):
            raise MeasurementError(
                "The learnability probe's training diverged: probabilities are NaN or infinite. Lower `--learning_rate`."
            )
        gain, control = (after[: len(base)] - base).double(), (after[len(base) :] - before).double()
        owner, count = self.example[self.content], int(self.example.max()) + 1 if len(self.example) else 0
        means = summed(shares(base, gain, control, self.evidence), owner, count)
        accelerator = self.trainer.accelerator
        means.gram.copy_(accelerator.reduce(means.gram.to(accelerator.device), reduction="sum").cpu())
        return means
