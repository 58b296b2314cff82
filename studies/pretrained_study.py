"""Objectives on a pretrained model: `python studies/pretrained_study.py [--tasks records codes]`.

Fine-tunes SmolLM2-135M-Instruct (`--model`), bfloat16 with a LoRA adapter, on

- records: the quickstart's task, which the model nearly knows, with 30 % wrong records
- codes: the same with a code for each city, which the model can't know, and 30 % wrong records
- clean-records: with right records
- figfont: words as ASCII art, the paper's model-weak task
- gsm8k: grade-school mathematics, from the Hub, or from `--gsm8k`, a folder of train.jsonl and test.jsonl

Finished runs are kept in `--folder`, and the same command does the rest. A task whose runs are all finished is written to
`--output`, beside other tasks; `make figures` makes the page. An arm's seed chooses the examples that it trains on, their
order and the adapter's random weights. A pilot seed chooses each objective's learning rate, and is not reported.
"""

import argparse
import gzip
import io
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "0")  # gsm8k may come from there; `continuum` would switch it off

import torch
import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import gsm8k
import quickstart
from anneal_study import ANNEAL, FIRST_SEED, FIXED, TEMPERED
from bl_trainer import BLConfig, BLTrainer
from bl_trainer.cli import main as verb
from bl_trainer.evaluation.grading import final_answer, is_same_math
from bl_trainer.measurement.results import Calibration
from continuum import Scored, begin, board_by, call, means, quiet, read_plan, row_of, sweep
from miniature import cell_folder, read_rows, write_rows

ARMS: list[dict[str, Any]] = [
    *FIXED[:3],
    ANNEAL,
    *TEMPERED,
]  # `power` 10 answers few records right, and an arm takes two minutes of a core
PILOT_SEED = 99
POOL = 1024  # training examples of a set
SYSTEM = "Extract the name, age and city as JSON."
SAMPLED = {"sampled": 1.0, "cooler": 0.5}  # ruler -> temperature
SHORT = 128  # tokens of a figfont example

# What all runs share; the keys of a recipe
ATTENTION = "eager"  # the fastest on a CPU, for short examples
RANK = 16
TRAINING: dict[str, Any] = {
    "use_cpu": True,
    "bf16": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1_000_000,
    "disable_tqdm": True,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "per_device_train_batch_size": 8,
}


@dataclass(frozen=True, eq=False)
class Task:
    """How arms train on a data set, and are judged.

    `noise`: share of wrong training examples. `examples`: held out. `new_tokens`: of an answer at most. `pilot`: the ruler by
    which the pilot chooses the learning rate among `rates`. `arms`: the objectives. `pilot_steps`: by default `steps`.
    """

    name: str
    steps: int
    new_tokens: int
    noise: float = 0.0
    examples: int = 128
    pilot: str = "greedy"
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    arms: tuple[Any, ...] = tuple(ARMS)
    pilot_steps: int | None = None

    def steps_of(self, seed: int) -> int:
        """How many steps a run takes."""
        return self.pilot_steps or self.steps if seed == PILOT_SEED else self.steps

    @property
    def has_cities(self) -> bool:
        """Whether the answers are records of people."""
        return self.name in ("records", "codes")

    @property
    def option(self) -> str:
        """What the command line calls it."""
        return f"clean-{self.name}" if self.has_cities and not self.noise else self.name

    @property
    def rulers(self) -> list[str]:
        """What objectives are compared by."""
        return [*(["greedy", *SAMPLED] if self.has_cities else ["greedy"]), "accuracy", "target_prob"]


TASKS = (
    Task("records", 32, 48, noise=0.3, rates=(1e-3, 3e-3)),
    Task("codes", 80, 48, noise=0.3, rates=(1e-3, 3e-3), arms=(ARMS[0], ANNEAL, *TEMPERED), pilot_steps=40),
    Task("records", 32, 48),
    Task("figfont", 24, 12, pilot="accuracy"),
    Task("gsm8k", 16, 256, examples=64, pilot="accuracy"),
)
OPTIONS = [task.option for task in TASKS]


def records(seed: int, count: int, wrong: float, name: str) -> list[dict[str, Any]]:
    """Return the quickstart's examples, with SYSTEM as the system prompt; named "codes", with a code for each city."""
    rng = random.Random("codes")
    codes = {
        city: "".join(rng.choices("BCDFGHJKLMNPQRSTVWXZ", k=2)) + str(rng.randint(10, 99)) for city in quickstart.CITY.split()
    }
    rows = quickstart.make_records(seed, count, wrong)
    for row in rows:
        text = row["prompt"][0]["content"].split("\n\n")[1]
        row["prompt"] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        if name == "codes":
            person = json.loads(row["completion"][0]["content"])
            row["completion"][0]["content"] = json.dumps(person | {"city": codes[person["city"]]})
    return rows


def problems(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return examples of GSM8K's rows."""
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]


def prepare(folder: Path, model: str, source: str | None, tasks: Sequence[Task]) -> None:
    """Make data and recipe of each task in `folder`; the same at all times. What is there is kept. `source`: GSM8K's folder."""
    for task in tasks:
        home = cell_folder(folder, task.name, task.noise)
        if (home / "recipe.yaml").exists():
            made_for = yaml.safe_load((home / "recipe.yaml").read_text())["model_name_or_path"]
            if made_for != model:
                raise SystemExit(f"error: {folder} holds the study of {made_for}, not of {model}. Give another --folder.")
            continue
        home.mkdir(parents=True, exist_ok=True)
        data: list[Any]
        if task.name == "figfont":
            argv = ["prepare-data", "figfont", "--output", str(home / "drawn"), "--model", model, "--max_length", str(SHORT)]
            verb([*argv, "--limit", str(8 * POOL)])
            rows = load_dataset(str(home / "drawn"), split="train").to_list()
            data = [rows[:POOL], rows[POOL:]]  # the test split has long ones too
        elif task.name == "gsm8k":
            data = [problems(gsm8k.read(source, split)) for split in ("train", "test")]
        else:
            data = [records(1, POOL, task.noise, task.name), records(2, task.examples, 0.0, task.name)]
        for split, rows, count in zip(("train", "test"), data, (POOL, task.examples), strict=True):
            rows = random.Random(0).sample(rows, min(count, len(rows)))
            write_rows(home / f"{split}.jsonl", [{key: row[key] for key in ("prompt", "completion")} for row in rows])
        keys = {
            "model_name_or_path": model,
            "dtype": "bfloat16",
            "attn_implementation": ATTENTION,
            "dataset_name": str(home),
            "output_dir": str(home / "out"),
            "use_peft": True,
            "lora_r": RANK,
            "lora_alpha": 2 * RANK,
            "lora_dropout": 0.0,
            "lora_target_modules": "all-linear",
            **TRAINING,
            "max_steps": task.steps,
        }
        (home / "recipe.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))


class Pretrained:
    """The model, loaded once; its arms run in this process, on one thread."""

    def __init__(self, folder: Path, model: str):
        torch.set_num_threads(1)
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation=ATTENTION)
        head = self.base.get_output_embeddings()
        # a slice of hidden states, as in generation, would be multiplied by one copy of the weights for each row
        head.register_forward_pre_hook(lambda _, inputs: tuple(each.contiguous() for each in inputs))
        self.head = head.weight.detach().float()
        self.examples: dict[Task, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def arm(self, name: str, noise: float, objective: Any, learning_rate: float, seed: int) -> dict[str, Any]:
        """Fine-tune a new adapter on a task, and return what `evaluate` says of it."""
        task = task_of(name, noise)
        self.held_out(task)
        torch.manual_seed(seed)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(self.base, lora)
        keys = {"learning_rate": learning_rate, "seed": seed, "max_steps": task.steps_of(seed), **TRAINING}
        with redirect_stdout(io.StringIO()), TemporaryDirectory() as unused:
            rows, args = Dataset.from_list(self._read(task, "train")), BLConfig(unused, objective=objective, **keys)
            BLTrainer(model, args, train_dataset=rows, processing_class=self.tokenizer).train()
        found = self.evaluate(name, noise, seed)
        self.base = model.unload()
        return found

    def held_out(self, task: Task) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return of each held-out example its token ids (length), those of the target's content (count), and the pretrained
        model's states (count, size) by which these are predicted; not to be called first while an adapter is in the model."""
        if task not in self.examples:
            pairs = []
            for row in self._read(task, "test"):
                prompt, ids = self._ids(row["prompt"], add_generation_prompt=True), self._ids(row["prompt"] + row["completion"])
                end = len(prompt) + (ids[len(prompt) :] == self.tokenizer.eos_token_id).nonzero()[0].item()
                pairs.append((ids[:end], ids[len(prompt) : end]))
            states = self._states(pairs)
            self.examples[task] = [(*pair, each) for pair, each in zip(pairs, states, strict=True)]
        return self.examples[task]

    def _read(self, task: Task, split: str) -> list[dict[str, Any]]:
        return read_rows(cell_folder(self.folder, task.name, task.noise) / f"{split}.jsonl")

    @torch.no_grad()
    def evaluate(self, name: str, noise: float, seed: int = 0) -> dict[str, Any]:
        """Measure the model, with an adapter while there is one in it, on held-out examples. A number by example:

        `greedy`, and those of SAMPLED by `seed`: 1 if what it answers is right, with PILOT_SEED only where the pilot
        chooses by it; `targets`: tokens of the target, without the end of turn, and sums over these: `nll` (nats), `prob`,
        `top1` and `kl`, KL(base, tuned) in nats.
        `cluster`: the city, which examples share. `calibration_error`: the expected one of all tokens, as a list of one.
        """
        self.base.eval()
        task = task_of(name, noise)
        items: dict[str, Any] = {key: [] for key in ("targets", "nll", "prob", "top1", "kl")}
        calibration, examples = Calibration(), self.held_out(task)
        states = self._states([(ids, targets) for ids, targets, _ in examples])
        for (_, targets, before), after in zip(examples, states, strict=True):
            logp, base_logp = (linear(each, self.head).log_softmax(-1) for each in (after, before))
            top, found = logp.max(-1)
            chosen, is_top = logp.gather(-1, targets[:, None])[:, 0].double(), found == targets
            calibration.add(top.double().exp(), is_top)
            kl = (base_logp.exp() * (base_logp - logp)).sum()
            sums = torch.stack([-chosen.sum(), chosen.exp().sum(), is_top.sum(), kl]).tolist()
            for key, value in zip(items, [len(targets), *sums], strict=True):
                items[key].append(value)
        for key in ("greedy", *SAMPLED):
            if key in ([task.pilot] if seed == PILOT_SEED else task.rulers):
                items[key] = self._right(task, SAMPLED.get(key), seed)
        if task.has_cities:
            items["cluster"] = [json.loads(_said(row))["city"] for row in self._read(task, "test")]
        return {**items, "calibration_error": [calibration.error()]}

    def _ids(self, messages: Any, **options: Any) -> Tensor:
        return self.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, **options)["input_ids"][0]

    @torch.no_grad()
    def _states(self, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return the last hidden states (count, size), float32, by which each pair's targets are predicted: those of the model
        as it is, with an adapter while there is one in it."""
        found = []
        for start in range(0, len(pairs), 16):
            batch = pairs[start : start + 16]
            ids = pad_sequence([ids for ids, _ in batch], batch_first=True)
            mask = pad_sequence([torch.ones_like(ids) for ids, _ in batch], batch_first=True)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.base.base_model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            for states, (whole, targets) in zip(hidden, batch, strict=True):
                found.append(states[len(whole) - len(targets) - 1 : len(whole) - 1])
        return found

    def _right(self, task: Task, temperature: float | None, seed: int) -> list[float]:
        """Return 1 for each right answer; greedy ones without a temperature, otherwise sampled by `seed`."""
        rows, found = self._read(task, "test"), []
        how: dict[str, Any] = {"do_sample": False}
        if temperature is not None:
            torch.manual_seed(seed)
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        for start in range(0, len(rows), 64):
            batch = rows[start : start + 64]
            prompts = [row["prompt"] for row in batch]
            texts = self.tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
            given = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
            with torch.autocast("cpu", torch.bfloat16):
                output = self.base.generate(**given, max_new_tokens=task.new_tokens, **how)
            answers = self.tokenizer.batch_decode(output[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
            found += [float(is_right(task, answer, _said(row))) for answer, row in zip(answers, batch, strict=True)]
        return found


def _said(row: dict[str, Any]) -> str:
    return row["completion"][0]["content"]


def is_right(task: Task, answer: str, target: str) -> bool:
    """Whether an answer is right: the same record, the same number at the end, or the same word."""
    if task.has_cities:
        return quickstart.is_right(answer, target)
    if task.name == "gsm8k":
        said = final_answer(answer)
        return is_same_math(final_answer(target) or "", answer if said is None else said, said is not None)
    return answer.strip() == target


def task_of(name: str, noise: float) -> Task:
    """Return a task."""
    return next(task for task in TASKS if (task.name, task.noise) == (name, noise))


def run_task(folder: Path, task: Task, seeds: int, run: Callable[..., dict[int, Scored]]) -> tuple[list[Scored], list[Scored]]:
    """Run what is left of a task's arms by `run`, which is `continuum.sweep` but for its pool; return the pilot's and the rest.

    The pilot's run first, then those at the learning rates that it has chosen: a sweep for each seed, so that more can follow.
    """
    home = cell_folder(folder, task.name, task.noise)
    place = folder / "sweeps" / home.name
    pilot = read_plan(home, "pilot", {"arms": list(task.arms), "learning_rate": list(task.rates), "seed": [PILOT_SEED]})
    pilot = replace(pilot, rank_by=task.pilot)
    tried = run(pilot, place / "pilot", task.name, task.noise)
    board = board_by(task.pilot, pilot, tried)
    chosen = [{**arm, "learning_rate": row_of(board, arm).best["learning_rate"]} for arm in task.arms]
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        name = f"seed-{seed}"
        arms = run(read_plan(home, name, {"arms": chosen, "seed": [seed]}), place / name, task.name, task.noise)
        found += [arms[i] for i in sorted(arms)]
    return [tried[i] for i in sorted(tried)], found


def read_results(path: Path) -> dict[str, Any]:
    """Return a task's `base`, the pretrained model's metrics, `pilot` and `arms`, by the task's option; {} without a file."""
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}


def write_results(path: Path, task: Task, base: dict[str, float], pilot: list[Scored], arms: list[Scored]) -> None:
    """Write a task's results beside those of other tasks; numbers of six digits."""
    kept = [{"setting": each.setting, "items": each.items} for each in arms]
    tried = [{"setting": each.setting, task.pilot: each.rulers[task.pilot]} for each in pilot]
    results = read_results(path) | {task.option: rounded({"base": base, "pilot": tried, "arms": kept})}
    text = json.dumps(dict(sorted(results.items())), separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def rounded(value: Any) -> Any:
    """Return the same with numbers of six digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Prepare, run what is left, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("pretrained"))
    parser.add_argument("--model", default=str(quickstart.MODEL), help="by default the one that `make quickstart` makes")
    parser.add_argument("--gsm8k", help="folder of train.jsonl and test.jsonl, in place of the Hub's openai/gsm8k")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=OPTIONS, default=OPTIONS)
    parser.add_argument("--output", type=Path, default=Path("docs/results/pretrained.json.gz"))
    options = parser.parse_args()
    quiet()
    tasks = [task for task in TASKS if task.option in options.tasks]
    prepare(options.folder, options.model, options.gsm8k, tasks)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, begin, (Pretrained, options.folder, options.model)) as pool:
        run = partial(sweep, pool=pool, jobs=options.jobs)
        for task in tasks:
            base = means(pool.submit(call, "evaluate", task.name, task.noise).result())
            write_results(options.output, task, base, *run_task(options.folder, task, options.seeds, run))


if __name__ == "__main__":
    main()
