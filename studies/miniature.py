"""The model-capability continuum in miniature: a character model of 0.1M parameters, and four cells to fine-tune it on.

The model is pretrained on symbolic string tasks with the package's own trainer, and fine-tuned from that one checkpoint on

- strong: sorting, mastered in pretraining
- mid-rule: reversal, on which pretraining stops half-way
- mid-fact: a substitution cipher, of whose alphabet pretraining shows one half
- weak: a substitution cipher never seen

with clean targets, or with some of their letters replaced at random. An example is a prompt such as `Shgfedcba:` and a
completion such as `abcdefgh`, of equal length everywhere; TRL adds the end token, and only completions are trained on.
"""

import copy
import io
import json
import random
import shutil
import string
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from bl_trainer import BLConfig, BLTrainer
from bl_trainer.diagnosis.options import DiagnoseArguments
from bl_trainer.diagnosis.run import Diagnosis
from bl_trainer.recipe.recipe import Recipe

LETTERS = string.ascii_lowercase
SEEN = LETTERS[::2]  # the letters of the half-known cipher that pretraining shows
LENGTH = 8  # letters of a string; a completion has one token more, the end token
CELLS = {"strong": "S", "mid-rule": "R", "mid-fact": "F", "weak": "W"}  # to the letter that names the task in a prompt
CORRUPTIONS = (0.0, 0.3)

POOL, HELD_OUT = 8192, 256  # examples of a cell; an arm trains on STEPS * BATCH of the pool, chosen by its seed
DIAGNOSED = 20_000  # target tokens
PROBE_STEPS, PROBE_RATE = 80, 1e-3  # of the learnability probe, which takes 10 times the rate for its adapter
STEPS, BATCH = 100, 32

# Shares of the tasks in pretraining: without reversal, then with it until the mean p of its target tokens reaches HALF_WAY,
# half-way between 0.2, where a model stands that knows the form but not the rule, and 1
FIRST = {"copy": 10, "next": 10, "strong": 65, "mid-fact": 15}
SECOND = {"copy": 10, "next": 10, "strong": 50, "mid-fact": 10, "mid-rule": 20}
TASKS = {"copy": "C", "next": "N", **CELLS}
HALF_WAY = 0.6
PRETRAINING: dict[str, Any] = {
    "steps": 700,
    "most_further_steps": 400,
    "batch": 64,
    "learning_rate": 3e-3,
    "further_learning_rate": 5e-4,
}

# What all runs share; the keys of a recipe
TRAINING: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1_000_000,
    "disable_tqdm": True,
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per character."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<end>", *LETTERS, *TASKS.values(), ":"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a model of 105,152 random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def cipher(name: str) -> dict[str, str]:
    """Return a permutation of the letters, the same at all times."""
    return dict(zip(LETTERS, random.Random(name).sample(LETTERS, 26), strict=True))


HALF_KNOWN, UNKNOWN = cipher("half known"), cipher("unknown")
ANSWERS = {
    "copy": lambda text: text,
    "next": lambda text: "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in text),
    "strong": lambda text: "".join(sorted(text)),
    "mid-rule": lambda text: text[::-1],
    "mid-fact": lambda text: "".join(map(HALF_KNOWN.__getitem__, text)),
    "weak": lambda text: "".join(map(UNKNOWN.__getitem__, text)),
}


def example(task: str, rng: random.Random, alphabet: str = LETTERS) -> dict[str, str]:
    """Return a prompt and its right completion."""
    text = "".join(rng.choices(alphabet, k=LENGTH))
    return {"prompt": f"{TASKS[task]}{text}:", "completion": ANSWERS[task](text)}


def corrupted(row: dict[str, str], share: float, rng: random.Random) -> dict[str, str]:
    """Return the example with each letter of its completion replaced, with probability `share`, by one of the 25 others."""
    letters = (rng.choice(LETTERS.replace(c, "")) if rng.random() < share else c for c in row["completion"])
    return {**row, "completion": "".join(letters)}


def cell_folder(folder: Path, cell: str, corruption: float) -> Path:
    """Return where `prepare` puts a cell's train.jsonl, test.jsonl (clean) and recipe.yaml."""
    return folder / f"{cell}-{round(100 * corruption)}"


def prepare(folder: Path, seed: int = 0) -> None:
    """Make the pretrained checkpoint `folder`/model, and data and recipe of each cell; the same for the same seed.

    The training sets of a cell differ in corruption only. Files that are there from an earlier, finished call are kept. Raises
    SystemExit if that had another seed.
    """
    note = Path("model") / "pretraining_seed"
    if (folder / "model").exists():
        if (its := (folder / note).read_text()) != str(seed):
            raise SystemExit(f"error: {folder} was made with the pretraining seed {its}, not {seed}. Give another --folder.")
        return
    for cell in CELLS:
        rng = random.Random(f"{cell} {seed}")
        rows = list({row["prompt"]: row for row in (example(cell, rng) for _ in range(POOL + HELD_OUT + 8))}.values())
        train, test = rows[:POOL], rows[POOL : POOL + HELD_OUT]
        for corruption in CORRUPTIONS:
            noise = random.Random(f"{cell} {corruption} {seed}")
            path = cell_folder(folder, cell, corruption)
            path.mkdir(parents=True, exist_ok=True)
            write_rows(path / "train.jsonl", [corrupted(row, corruption, noise) for row in train])
            write_rows(path / "test.jsonl", test)
            recipe = {"model_name_or_path": str(folder / "model"), "dataset_name": str(path), "output_dir": str(path / "out")}
            (path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **TRAINING}, sort_keys=False))
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    model, tokenizer = pretrain(seed), make_tokenizer()
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / note.name).write_text(str(seed))
    part.rename(folder / "model")


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read rows from JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def pretrain(seed: int) -> LlamaForCausalLM:
    """Return the model after pretraining on `FIRST`, and on `SECOND` until reversal is known half-way."""
    torch.set_num_threads(1)  # more would gain nothing, and change the last digits
    tokenizer, rng = make_tokenizer(), random.Random(f"pretraining {seed}")
    model = make_model(tokenizer, seed)
    probe = encode([example("mid-rule", rng) for _ in range(HELD_OUT)], tokenizer)
    batch, steps = PRETRAINING["batch"], (PRETRAINING["steps"], PRETRAINING["most_further_steps"])
    first, second = (
        [
            example(task, rng, SEEN if task == "mid-fact" else LETTERS)
            for task in rng.choices(list(shares), list(shares.values()), k=batch * n)
        ]
        for shares, n in zip((FIRST, SECOND), steps, strict=True)
    )
    keys: dict[str, Any] = {"seed": seed, "per_device_train_batch_size": batch}
    train(model, tokenize(first, tokenizer), **keys, max_steps=steps[0], learning_rate=PRETRAINING["learning_rate"])
    keys |= {"max_steps": steps[1], "learning_rate": PRETRAINING["further_learning_rate"], "lr_scheduler_type": "constant"}
    train(model, tokenize(second, tokenizer), [StopHalfWay(probe)], **keys)
    return model.eval()


class StopHalfWay(TrainerCallback):
    """Ends training once the mean p of the target tokens of encoded examples is at least HALF_WAY."""

    def __init__(self, probe: tuple[Tensor, Tensor]):
        self.probe = probe

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 5 == 0:
            control.should_training_stop = bool(score(model, *self.probe)[0].exp().mean() >= HALF_WAY)
            model.train()


def encode(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return token ids of prompts (N, LENGTH + 2) and of completions with the end token (N, LENGTH + 1)."""
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt")["input_ids"]
    targets = tokenizer([row["completion"] + tokenizer.eos_token for row in rows], return_tensors="pt")["input_ids"]
    return prompts, targets


def tokenize(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Return rows tokenised as TRL does it, with labels, so that `train` need not do it again for each arm."""
    prompts, targets = (part.tolist() for part in encode(rows, tokenizer))
    return Dataset.from_dict(
        {
            "input_ids": [p + t for p, t in zip(prompts, targets, strict=True)],
            "labels": [[-100] * len(p) + t for p, t in zip(prompts, targets, strict=True)],
        }
    )


def train(model: Any, dataset: Dataset, callbacks: list[TrainerCallback] | None = None, **keys: Any) -> None:
    """Train the model in place with `BLTrainer` on tokenised rows. `keys`: of the recipe, over `TRAINING`."""
    torch.set_flush_denormal(True)  # as the train verb does
    skip = {"skip_prepare_dataset": True}
    with redirect_stdout(io.StringIO()), TemporaryDirectory() as unused:
        args = BLConfig(output_dir=unused, dataset_kwargs=skip, **{**TRAINING, **keys})
        tokenizer = make_tokenizer()
        BLTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks).train()


@torch.no_grad()
def score(model: Any, prompts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p of the target tokens, and whether they are the most probable; both of the shape of `targets`."""
    logp = model.eval()(torch.cat([prompts, targets], dim=1)).logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
    return logp.gather(-1, targets[..., None])[..., 0], logp.argmax(-1) == targets


@torch.no_grad()
def generate(model: Any, prompts: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Return `length` new tokens for each of (N, L) prompts, padded after the end token: greedily, or, with a `generator`,
    sampled at temperature 1."""
    pad, end = model.config.pad_token_id, model.config.eos_token_id
    tokens, cache, is_done, made = prompts, None, torch.zeros(len(prompts), 1, dtype=torch.bool), []
    for _ in range(length):
        output = model.eval()(tokens, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1], output.past_key_values
        tokens = logits.argmax(-1, True) if generator is None else torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = tokens.masked_fill(is_done, pad)
        is_done |= tokens == end
        made.append(tokens)
    return torch.cat(made, dim=1)


class Miniature:
    """What `prepare` made, loaded once; its arms run in this process, on one thread."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        self.folder, self.tokenizer = folder, make_tokenizer()
        self.base = LlamaForCausalLM.from_pretrained(folder / "model").eval()
        self.tokenized: dict[tuple[str, float], Dataset] = {}

    def arm(
        self,
        cell: str,
        corruption: float = 0.3,
        objective: Any = "nll",
        threshold: Any = None,
        learning_rate: float = 1e-3,
        seed: int = 0,
        **keys: Any,
    ) -> dict[str, Any]:
        """Fine-tune a copy of the model on a cell, and return what `evaluate` says of it.

        `seed` chooses which examples of the cell are trained on, their order, and the samples. `keys`: further recipe keys.
        """
        given = {"objective": objective, "threshold": threshold, "learning_rate": learning_rate, "seed": seed, **keys}
        model = copy.deepcopy(self.base).train()
        train(model, self.data(cell, corruption), **given)
        return self.evaluate(model, cell, seed)

    def data(self, cell: str, corruption: float) -> Dataset:
        """Return a cell's training set, tokenised."""
        if (cell, corruption) not in self.tokenized:
            rows = read_rows(cell_folder(self.folder, cell, corruption) / "train.jsonl")
            self.tokenized[cell, corruption] = tokenize(rows, self.tokenizer)
        return self.tokenized[cell, corruption]

    def evaluate(self, model: Any, cell: str, seed: int = 0) -> dict[str, Any]:
        """Measure a model, None for the pretrained one, on a cell's held-out examples, which are clean. A number per example:

        `greedy`, `sampled` (at temperature 1): 1 if the text generated is exactly right; sums over its target tokens, the end
        token among them: `nll` (nats), `prob`, `top1`; and `targets`, how many those are. The expectation of `sampled` is
        exp(-`nll`).
        """
        model = self.base if model is None else model
        prompts, targets = encode(read_rows(cell_folder(self.folder, cell, 0.0) / "test.jsonl"), self.tokenizer)
        logp, is_top1 = score(model, prompts, targets)
        answers = {"greedy": generate(model, prompts, targets.shape[1])}
        answers["sampled"] = generate(model, prompts, targets.shape[1], torch.Generator().manual_seed(seed))
        return {
            **{name: (answer == targets).all(1).int().tolist() for name, answer in answers.items()},
            "nll": (-logp.double()).sum(1).tolist(),
            "prob": logp.double().exp().sum(1).tolist(),
            "top1": is_top1.sum(1).tolist(),
            "targets": [targets.shape[1]] * len(targets),
        }

    def diagnose(self, cell: str, corruption: float) -> dict[str, Any]:
        """Return the package's diagnosis of the cell's recipe, on a sample of DIAGNOSED tokens and with the learnability probe;
        a mapping as in report.json."""
        argv = ["--config", str(cell_folder(self.folder, cell, corruption) / "recipe.yaml")]
        argv += ["--report", "unused", "--max_tokens", str(DIAGNOSED), "--disable_tqdm", "true"]
        argv += ["--probe_steps", str(PROBE_STEPS), "--learning_rate", str(PROBE_RATE)]
        with redirect_stdout(io.StringIO()):
            return Diagnosis(Recipe.read(argv, "diagnose", DiagnoseArguments)).run().to_json()
