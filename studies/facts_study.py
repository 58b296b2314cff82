"""Ask a pretrained model for facts that it was fine-tuned on, some of them wrong: `python studies/facts_study.py`.

SmolLM2-135M-Instruct (`--model`), bfloat16 with a LoRA adapter, is trained on facts about countries. It knows about half of
them. `facts.py` has the cells. An objective has the learning rate of the most right greedy answers to validation facts at a
seed of its own. Other seeds are judged by test facts. A seed draws the order of the rows, the adapter's weights and the wrong
values, but consistent ones. All facts are in all runs' rows, except those held out: the model knows them and nothing trains on
them.

Results go to docs/results/facts.json.gz, a run at a time, and a second start resumes. `make figures` makes the page.
"""

import argparse
import gzip
import io
import itertools
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import pretrained_study
import quickstart
from bl_trainer import BLConfig, BLTrainer
from bl_trainer._util.files import write_bytes
from bl_trainer.cells.field import FIELD
from continuum import begin, call, quiet
from facts import (
    ARMS,
    BATCH,
    CELLS,
    CHOICES,
    COUNTRIES,
    HELD_OUT,
    OUTPUT,
    PARTS,
    PILOT,
    RANK,
    RATES,
    RUN,
    SEEDS,
    TEMPERATURES,
    Fact,
    answers,
    best_rate,
    facts,
    key_of,
    mean_of,
    others,
    read_results,
    rows,
)

TRAINING = {**pretrained_study.TRAINING, "num_train_epochs": 1, "per_device_train_batch_size": BATCH}


class Model:
    """The model, loaded once, on one thread."""

    def __init__(self, path: str, parts: dict[str, list[Fact]] | None = None):
        torch.set_num_threads(1)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.base: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, attn_implementation=pretrained_study.ATTENTION
        )
        self.head = self.base.get_output_embeddings().weight.detach().float()
        self.parts, self.everything = parts or {}, facts(COUNTRIES)
        self.prior: dict[tuple[str, str], float] = {}

    def is_known(self, fact: Fact) -> bool:
        """Whether the pretrained model tells the country's value from CHOICES others of the same relation, drawn at random.

        A value's score is log p(value | question) less log p(value | the same question about `a country`), so that its length
        and its frequency don't matter. The true one has the highest score.
        """
        wrong = random.Random(fact.prompt).sample(others(fact, self.everything), CHOICES)
        first, *rest = (self.score(fact, f" {each.forms[0]}") for each in (fact, *wrong))
        return first > max(rest)

    def score(self, fact: Fact, answer: str) -> float:
        """Return by how much the country of a fact's question makes an answer more probable, in nats."""
        key = fact.relation, answer
        if key not in self.prior:
            self.prior[key] = self._logp([(replace(fact, country="a country").prompt, answer)], "")[0][0].sum().item()
        return self._logp([(fact.prompt, answer)], "")[0][0].sum().item() - self.prior[key]

    def run(self, cell: str, arm: str, rate: float, seed: int) -> dict[str, list[float]]:
        """Train a new adapter, and return what `read` says of it."""
        trained = [*self.parts["validation"], *self.parts["test"]]
        torch.manual_seed(seed)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(self.base, lora)
        with redirect_stdout(io.StringIO()), TemporaryDirectory() as unused:
            data = Dataset.from_list(list(rows(CELLS[cell], trained, self.everything, seed)))
            args = BLConfig(unused, objective=FIELD[arm], learning_rate=rate, seed=seed, **TRAINING)
            BLTrainer(model, args, train_dataset=data, processing_class=self.tokenizer).train()
        found = self.read(cell)
        self.base = model.unload()
        return found

    def read(self, cell: str, end: str | None = None) -> dict[str, list[float]]:
        """Measure the model, with an adapter while there is one in it. A number by fact, of all parts in their order:

        `greedy`: 1 if greedy decoding gives a right answer and then `end`, by default the end token. `right T`: probability of
        a right answer so ended, sampled at temperature T. `variation T`: total variation from the right answers' shares. All by
        the answer's usual tokens, from the logits: nothing is sampled.
        """
        self.base.eval()
        asked = [(fact, text) for part in self.parts.values() for fact in part for text in answers(CELLS[cell], fact)]
        end = self.tokenizer.eos_token if end is None else end
        scored = self._logp([(fact.prompt, text) for fact, text in asked], end)
        forms, found = CELLS[cell].forms, dict[str, list[float]]()
        for start in range(0, len(asked), forms):
            own = scored[start : start + forms]
            found.setdefault("greedy", []).append(float(any(bool(is_top.all()) for _, _, _, is_top in own)))
            for k, temperature in enumerate(TEMPERATURES):
                p = [each[k].sum().exp().item() for each in own]
                found.setdefault(f"right {temperature:g}", []).append(sum(p))
                apart = sum(abs(each - 1 / forms) for each in p) + 1 - sum(p)
                found.setdefault(f"variation {temperature:g}", []).append(apart / 2)
        return {name: [round(value, 4) for value in values] for name, values in found.items()}

    @torch.no_grad()
    def _logp(self, pairs: Sequence[tuple[str, str]], end: str) -> list[tuple[Tensor, ...]]:
        """Return log p of each answer's tokens at each temperature, and whether each token is the most probable one."""
        found = []
        for start in range(0, len(pairs), BATCH):
            ids = []
            for prompt, answer in pairs[start : start + BATCH]:
                given = self.tokenizer(prompt)["input_ids"]
                whole = self.tokenizer(prompt + answer + end)["input_ids"]
                if whole[: len(given)] != given:
                    raise ValueError(f"the tokens of {prompt!r} change when {answer!r} follows")
                ids.append((torch.tensor(whole), len(given)))
            batch = pad_sequence([each for each, _ in ids], batch_first=True)
            mask = pad_sequence([torch.ones_like(each) for each, _ in ids], batch_first=True)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.base.base_model(input_ids=batch, attention_mask=mask).last_hidden_state.float()
            for states, (whole, count) in zip(hidden, ids, strict=True):
                logits, targets = linear(states[count - 1 : len(whole) - 1], self.head), whole[count:, None]
                logp = [(logits / temperature).log_softmax(-1).gather(1, targets)[:, 0] for temperature in TEMPERATURES]
                found.append((*logp, logits.argmax(-1) == targets[:, 0]))
        return found


def split(known: dict[Fact, bool]) -> dict[str, list[Fact]]:
    """Return the facts of each part, and those held out; known ones first."""
    order = random.Random(0).sample(list(known), len(known))
    yes, no = ([fact for fact in order if known[fact] is flag] for flag in (True, False))
    parts = {}
    for part, count in PARTS.items():
        parts[part] = yes[:count] + no[:count]
        yes, no = yes[count:], no[count:]
    parts["held out"] = yes[:HELD_OUT]
    sizes = {part: len(each) for part, each in parts.items()}
    if sizes != {**{part: 2 * count for part, count in PARTS.items()}, "held out": HELD_OUT}:
        raise SystemExit(f"error: of {len(known)} facts the model knows {sum(known.values())}, which gives parts of {sizes}")
    return parts


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results whole."""
    text = json.dumps(results, sort_keys=True, separators=(",", ":"))
    write_bytes(path, gzip.compress(text.encode(), mtime=0))


def complete(path: Path, results: dict[str, Any], wanted: Iterable[tuple[str, str, float, int]], pool: Executor) -> None:
    """Run what the results lack."""
    left = [each for each in wanted if key_of(*each) not in results["runs"]]
    futures = {pool.submit(call, "run", *each): each for each in left}
    for future in as_completed(futures):
        run = futures[future]
        results["runs"][key_of(*run)] = future.result()
        write_results(path, results)
        figures = {part: round(mean_of(results, future.result(), "greedy", part), 3) for part in (*PARTS, "held out")}
        print(key_of(*run), figures, flush=True)


def prepare(path: Path, model: str) -> dict[str, Any]:
    """Return the results, begun with what the pretrained model knows if there are none."""
    results = read_results(path)
    if not results:
        judge = Model(model)
        parts = split({fact: judge.is_known(fact) for fact in judge.everything})
        listed = [
            {**asdict(fact), "part": part, "is_known": part == "held out" or i < len(each) // 2}
            for part, each in parts.items()
            for i, fact in enumerate(each)
        ]
        results = {"facts": listed, "runs": {}, "untrained": {}}
        write_results(path, results)
    return results


def parts_of(results: dict[str, Any]) -> dict[str, list[Fact]]:
    """Return the facts of each part."""
    parts: dict[str, list[Fact]] = {}
    for each in results["facts"]:
        parts.setdefault(each["part"], []).append(Fact(each["country"], each["relation"], tuple(each["forms"])))
    return parts


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--model", default=str(quickstart.MODEL), help="by default the one that `make quickstart` makes")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(RUN))
    options = parser.parse_args()
    quiet()
    results = prepare(options.output, options.model)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, begin, (Model, options.model, parts_of(results))) as pool:
        for cell in options.cells:
            if cell not in results["untrained"]:
                results["untrained"][cell] = pool.submit(call, "read", cell, "").result()
                write_results(options.output, results)
            pilots = itertools.product([cell], ARMS, RATES, [PILOT])
            complete(options.output, results, pilots, pool)
            chosen = [(cell, arm, best_rate(results, cell, arm), seed) for seed in SEEDS for arm in ARMS]
            complete(options.output, results, chosen, pool)


if __name__ == "__main__":
    main()
