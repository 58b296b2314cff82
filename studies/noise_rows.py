"""Compare ways to tell wrong rows of a training set from right ones, where it is known which are wrong.

    python studies/noise_rows.py                       # a model of 0.2M parameters, pretrained here; half an hour on one core
    python studies/noise_rows.py --models PATH         # any causal language model with its tokenizer, such as SmolLM2-135M
    python studies/noise_rows.py --models PATH --sets "GSM8K final numbers 20 %" "GSM8K swapped answers 20 %"

The tiny model is pretrained on right rows of the same tasks, for two numbers of steps: it half or nearly knows them.

Each data set has rows whose answers were made wrong here. Two adapters of the learnability probe's defaults (rank 16, alpha 32,
80 steps by nll) train on a half of the rows each, and score the other half. A candidate gives each row a number, from those
scores or from the base model; a good one puts the wrong rows on top. Judged by AUROC and by precision among the k top rows, k
being the number of wrong ones. Results go to docs/results/noise_rows.json, a cell (model, data set, seed) at a time, and a
second start resumes. `make figures` makes the page.
"""

import argparse
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import gsm8k

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from quickstart import CITY, FIRST, JOB, LAST, SENTENCES

TINY = {"tiny-half": 200, "tiny-strong": 900}  # models pretrained here -> for how many steps
ROWS = 240  # of a data set
SEEDS = 5  # from 2 on: on 0 and 1 the candidates were developed
STEPS, BATCH, RANK, ALPHA = 80, 8, 16, 32  # the learnability probe's
RATE = 1e-3  # of the tiny models' adapters: of 1e-3, 3e-3 and 1e-2 the least cross-fitted loss on three sets of another seed
OTHER_RATE = 3e-4  # of other models' adapters: the quickstart's
WARMUP = 5
CHECKS = (40, 80)  # steps at which the margin is read
BELOW = 0.1  # p under the base model below which a token is improbable
CANDIDATES = 64  # places tried for a control, which is the best match
PRETRAINING: dict[str, Any] = {"batch": 32, "rate": 3e-3, "rows": 20_000}
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}


class Row(NamedTuple):
    """A training row. `kind`: right, wrong, or why a right one is hard."""

    prompt: str
    answer: str
    kind: str = "right"


# Data


def person(rng: random.Random) -> dict[str, Any]:
    """Return a record."""
    name = f"{rng.choice(FIRST.split())} {rng.choice(LAST.split())}"
    return {"name": name, "age": rng.randint(19, 79), "city": rng.choice(CITY.split())}


def record(rng: random.Random, own: dict[str, Any] | None = None) -> tuple[Row, dict[str, Any], str]:
    """Return a right row of the quickstart's task, its record, and the job in its sentence."""
    own, job = own or person(rng), rng.choice(JOB.split())
    text = rng.choice(SENTENCES).format(**own, job=job, year=rng.randint(1990, 2024))
    return Row(f"Extract the name, age and city as JSON.\n\n{text}\n", json.dumps(own)), own, job


def spoilt(rng: random.Random, row: Row, own: dict[str, Any]) -> Row:
    """Return a record with the age and the city of nobody in particular."""
    while (other := own | {"age": rng.randint(19, 79), "city": rng.choice(CITY.split())}) == own:
        pass
    return Row(row.prompt, json.dumps(other), "wrong")


def records(rng: random.Random, share: float) -> Iterator[Row]:
    """Yield the quickstart's records, a share of them wrong."""
    while True:
        row, own, _ = record(rng)
        yield spoilt(rng, row, own) if rng.random() < share else row


def story(rng: random.Random) -> tuple[str, int, int]:
    """Return a problem of two numbers."""
    a, b, name = rng.randint(2, 49), rng.randint(2, 49), rng.choice(FIRST.split())
    return f"{name} has {a} coins and finds {b} more. How many coins does {name} have?\n", a, b


def worked(a: int, b: int, final: int) -> str:
    return f"{a} + {b} = {a + b}. The answer is {final}"


def finals(rng: random.Random, share: float) -> Iterator[Row]:
    """Yield problems with worked answers, a share of them with another final number."""
    while True:
        prompt, a, b = story(rng)
        final = rng.choice([n for n in range(4, 99) if n != a + b])
        wrong = rng.random() < share
        yield Row(prompt, worked(a, b, final if wrong else a + b), "wrong" if wrong else "right")


def swapped(rng: random.Random, share: float) -> Iterator[Row]:
    """Yield problems with worked answers, a share of them with the answer to another problem."""
    while True:
        prompt, a, b = story(rng)
        wrong = rng.random() < share
        _, c, d = story(rng) if wrong else ("", a, b)
        yield Row(prompt, worked(c, d, c + d), "wrong" if wrong else "right")


def sums(rng: random.Random, share: float) -> Iterator[Row]:
    """Yield `chain_sum` of reasoning-gym, a share of them with another number."""
    import reasoning_gym

    size = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    made = reasoning_gym.create_dataset("chain_sum", seed=rng.randrange(2**31), size=100_000, **size)
    for each in made:
        answer, wrong = int(each["answer"]), rng.random() < share
        given = answer + rng.choice([n for n in range(-20, 21) if n]) if wrong else answer
        yield Row(f"{each['question']}\n", str(given), "wrong" if wrong else "right")


def hard(rng: random.Random, share: float) -> Iterator[Row]:
    """Yield records, a share of them wrong, and a tenth right but hard: names never seen, longer answers, facts told once."""
    while True:
        row, own, job = record(rng)
        chance = rng.random()
        if chance < share:
            yield spoilt(rng, row, own)
        elif chance < share + 0.1:
            yield HARD[int((chance - share) * 10 * len(HARD)) % len(HARD)](rng, row, own, job)
        else:
            yield row


def rare(rng: random.Random, row: Row, own: dict[str, Any], job: str) -> Row:
    letters = "".join(rng.sample("abdefghiklmnoprstuvz", 5))
    other = {**own, "name": f"{letters.title()} {letters[::-1].title()}", "city": "".join(rng.sample(letters, 5)).title()}
    return replace_kind(record(rng, other)[0], "rare")


def long(rng: random.Random, row: Row, own: dict[str, Any], job: str) -> Row:
    year = int(re.findall(r"(\d{4})", row.prompt)[0])
    prompt = row.prompt.replace("name, age and city", "name, age, city, job and year")
    return Row(prompt, json.dumps({**own, "job": job, "year": year}), "long")


def fact(rng: random.Random, row: Row, own: dict[str, Any], job: str) -> Row:
    return Row(f"What is the badge number of {own['name']}?\n", str(rng.randint(100, 999)), "fact")


HARD: tuple[Callable[..., Row], ...] = (rare, long, fact)


def replace_kind(row: Row, kind: str) -> Row:
    return row._replace(kind=kind)


def consistent(rng: random.Random, share: float) -> Iterator[Row]:
    """Yield records. All records of two jobs in ten have the city by the same wrong rule."""
    cities = CITY.split()
    rule = dict(zip(cities, cities[7:] + cities[:7], strict=True))
    while True:
        row, own, job = record(rng)
        wrong = job in JOB.split()[:2]
        yield Row(row.prompt, json.dumps(own | {"city": rule[own["city"]]}), "wrong") if wrong else row


def coded(rng: random.Random, share: float) -> Iterator[Row]:
    """Yield rows of a rule that no model knows, which the data teach: each job has a number; a share with another one."""
    codes = dict(zip(JOB.split(), random.Random("codes").sample(range(10, 100), 10), strict=True))
    while True:
        job, name = rng.choice(JOB.split()), f"{rng.choice(FIRST.split())} {rng.choice(LAST.split())}"
        wrong = rng.random() < share
        code = rng.choice([n for n in range(10, 100) if n != codes[job]]) if wrong else codes[job]
        yield Row(f"Which number has the {job} {name}?\n", f"The number is {code}", "wrong" if wrong else "right")


SETS: dict[str, tuple[Callable[..., Iterator[Row]], float]] = {
    "records 10 %": (records, 0.1),
    "records 30 %": (records, 0.3),
    "final numbers 20 %": (finals, 0.2),
    "swapped answers 20 %": (swapped, 0.2),
    "reasoning-gym chain_sum 20 %": (sums, 0.2),
    "a new rule 20 %": (coded, 0.2),
    "records 20 %, hard rows 10 %": (hard, 0.2),
    "consistent mistakes 20 %": (consistent, 0.2),
}
OF_GSM8K = ("GSM8K final numbers 20 %", "GSM8K swapped answers 20 %")  # too hard for the tiny models


def rows_of(name: str, seed: int, count: int) -> list[Row]:
    """Return the rows of a data set."""
    make, share = SETS[name]
    stream = make(random.Random(f"{name} {seed}"), share)
    return [Row(*next(stream)) for _ in range(count)]


# Models


@dataclass(frozen=True)
class Words:
    """The tiny model's vocabulary: digits, frequent words and runs of signs, and characters for others. Spaces are left out."""

    ids: dict[str, int]

    @classmethod
    def of(cls, texts: list[str]) -> "Words":
        """Return the vocabulary of these texts."""
        seen = Counter(piece for text in texts for piece in _pieces(text))
        letters = sorted({letter for piece in seen for letter in piece} | set(map(chr, range(33, 127))))
        words = sorted(piece for piece, count in seen.items() if count >= 20 and len(piece) > 1)
        return cls({piece: i + 1 for i, piece in enumerate([*letters, *words])})

    def encode(self, text: str) -> list[int]:
        """Return token ids; 0 is the end token."""
        return [self.ids[part] for piece in _pieces(text) for part in ([piece] if piece in self.ids else piece)]


def _pieces(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+|\d|[^\w\s]+", text)


class Reader(NamedTuple):
    """A model, and how it reads text. `end`: the token that answers end with."""

    model: Any
    encode: Callable[[str], list[int]]
    end: int


def tiny(folder: Path, name: str) -> Reader:
    """Return a tiny model, pretrained on right rows of these tasks; kept in `folder`."""
    clean = [(records, 6), (finals, 2), (sums, 2)]
    streams = [make(random.Random(f"pretraining {i}"), 0.0) for i, (make, _) in enumerate(clean)]
    rng = random.Random(0)
    rows = [next(rng.choices(streams, [weight for _, weight in clean])[0]) for _ in range(PRETRAINING["rows"])]
    words = Words.of([row.prompt + row.answer for row in rows])
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words.ids) + 1, max_position_embeddings=256, initializer_range=0.05, **SHAPE)
    reader = Reader(LlamaForCausalLM(config), words.encode, 0)
    path, steps = folder / f"{name}.pt", TINY[name]
    if path.exists():
        reader.model.load_state_dict(torch.load(path, weights_only=True))
        return reader
    examples = [encoded(reader, row) for row in rows]
    optimizer = torch.optim.AdamW(reader.model.parameters(), lr=PRETRAINING["rate"], weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PRETRAINING["rate"] * min(1, step / 50, 2 * (1 - step / steps))
        batch = rng.sample(examples, PRETRAINING["batch"])
        loss = -torch.cat(log_probs(reader, batch)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"pretraining {step} {loss.item():.3f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(reader.model.state_dict(), path)
    return reader


def pretrained(path: str, dtype: str) -> Reader:
    """Return a model of a folder or the Hub. Adapters are in float32 beside any `dtype`."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="eager")
    return Reader(model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


# Scores


class Example(NamedTuple):
    """Token ids, and how many of them are the prompt's."""

    ids: list[int]
    start: int


def encoded(reader: Reader, row: Row) -> Example:
    """Return a row in tokens, ended."""
    prompt = reader.encode(row.prompt)
    return Example([*prompt, *reader.encode(row.answer), reader.end], len(prompt))


def logits(reader: Reader, batch: list[Example], model: Any = None) -> list[Tensor]:
    """Return log-probabilities at the answers, (tokens, vocabulary) each."""
    size = max(len(each.ids) for each in batch)
    ids = torch.tensor([each.ids + [0] * (size - len(each.ids)) for each in batch])
    mask = torch.tensor([[1] * len(each.ids) + [0] * (size - len(each.ids)) for each in batch])
    hidden = (model or reader.model).get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    head = (model or reader.model).get_output_embeddings()
    rows = [hidden[i, each.start - 1 : len(each.ids) - 1] for i, each in enumerate(batch)]
    found = torch.nn.functional.linear(torch.cat(rows).float(), head.weight.float(), head.bias)
    return list(found.log_softmax(-1).split([len(row) for row in rows]))


def log_probs(reader: Reader, batch: list[Example]) -> list[Tensor]:
    """Return log p of the answers' tokens."""
    found = zip(logits(reader, batch), batch, strict=True)
    return [rows.gather(1, torch.tensor(each.ids[each.start :])[:, None])[:, 0] for rows, each in found]


class Answers(NamedTuple):
    """What a model says of the answers: log p of each token, its margin over the best other, and log p of other tokens."""

    logp: list[np.ndarray]
    margin: list[np.ndarray]
    others: Tensor | None


@torch.no_grad()
def read(reader: Reader, examples: list[Example], others: Tensor | None = None) -> Answers:
    """Return the scores of examples, in their order. `others`: token ids to ask for at every place."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    logp: dict[int, np.ndarray] = {}
    margin: dict[int, np.ndarray] = {}
    asked: dict[int, Tensor] = {}
    reader.model.eval()
    for start in range(0, len(order), 64):
        numbers = order[start : start + 64]
        for i, rows in zip(numbers, logits(reader, [examples[i] for i in numbers]), strict=True):
            token = torch.tensor(examples[i].ids[examples[i].start :])[:, None]
            own = rows.gather(1, token)
            logp[i] = own[:, 0].double().numpy()
            margin[i] = (own - rows.scatter(1, token, -torch.inf).max(1, keepdim=True).values)[:, 0].double().numpy()
            if others is not None:
                asked[i] = rows[:, others]
    listed = range(len(examples))
    table = None if others is None else torch.cat([asked[i] for i in listed])
    return Answers([logp[i] for i in listed], [margin[i] for i in listed], table)


def alone(example: Example) -> Example:
    """Return an answer without its prompt, after the end token."""
    return Example([example.ids[-1], *example.ids[example.start :]], 1)


def fitted(reader: Reader, examples: list[Example], seed: int, rate: float, check: Callable[[int], None]) -> None:
    """Train an adapter of `reader.model` by nll, as the learnability probe does. `check`: called at `CHECKS`."""
    optimizer = torch.optim.AdamW([p for p in reader.model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    rng, order = random.Random(seed), list[int]()
    for step in range(1, STEPS + 1):
        reader.model.train()
        while len(order) < BATCH:
            order += rng.sample(range(len(examples)), len(examples))
        batch, order = [examples[i] for i in order[:BATCH]], order[BATCH:]
        optimizer.param_groups[0]["lr"] = rate * min(1, step / WARMUP)
        (-torch.cat(log_probs(reader, batch)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(reader.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in CHECKS:
            check(step)


class Scored(NamedTuple):
    """A data set's answers: under the base model, alone, under the adapter that has not seen the row, and that has."""

    examples: list[Example]
    base: Answers
    alone: Answers
    unseen: Answers
    seen: Answers
    margins: list[np.ndarray]  # under the adapter that trains on the row, mean over `CHECKS`


def scored(reader: Reader, rows: list[Row], seed: int, rate: float) -> Scored:
    """Cross-fit and score the rows of a data set."""
    examples = [encoded(reader, row) for row in rows]
    plain = read(reader, examples)
    low = {token for each, logp in zip(examples, plain.logp, strict=True)
           for token, value in zip(each.ids[each.start :], logp, strict=True) if value < np.log(BELOW)}  # fmt: skip
    others = torch.tensor(sorted(low | {0}))
    base = read(reader, examples, others)
    halves = [list(range(half, len(rows), 2)) for half in (0, 1)]
    unseen: dict[int, Any] = {}
    margin: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    margins: dict[int, list[np.ndarray]] = {i: [] for i in range(len(rows))}
    table = torch.empty_like(base.others)  # type: ignore[arg-type]
    offsets = np.cumsum([0, *map(len, base.logp)])
    for half, own in enumerate(halves):
        torch.manual_seed(seed * 2 + half)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(reader.model, config)
        here = Reader(adapted.base_model.model, reader.encode, reader.end)
        mine = [examples[i] for i in own]

        def check(step: int, here: Reader = here, mine: list[Example] = mine, own: list[int] = own) -> None:
            for i, margin in zip(own, read(here, mine).margin, strict=True):
                margins[i].append(margin)

        fitted(here, mine, seed * 2 + half, rate, check)
        both = read(here, examples, others)
        for i in range(len(rows)):
            (seen if i in set(own) else unseen)[i] = both.logp[i]
            if i not in set(own):
                margin[i] = both.margin[i]
                table[offsets[i] : offsets[i + 1]] = both.others[offsets[i] : offsets[i + 1]]  # type: ignore[index]
        adapted.unload()
    listed = range(len(rows))
    return Scored(
        examples,
        base._replace(others=base.others),
        read(reader, [alone(each) for each in examples]),
        Answers([unseen[i] for i in listed], [margin[i] for i in listed], table),
        Answers([seen[i] for i in listed], [], None),
        [np.mean(margins[i], axis=0) for i in listed],
    )


# Candidates: a number per row, the higher the more likely wrong. "Lesser" is of the base model and the adapter, per token


def per_row(found: list[np.ndarray], how: Callable[[np.ndarray], float] = np.mean) -> np.ndarray:
    return np.array([how(each) for each in found])


def loss_of(answers: Answers) -> list[np.ndarray]:
    return [-each for each in answers.logp]


def difference(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    return [x - y for x, y in zip(a, b, strict=True)]


def gaps(answers: Answers) -> list[np.ndarray]:
    """How much more probable than the target the best other token is, in nats; 0 where none is."""
    return [np.maximum(-each, 0.0) for each in answers.margin]


def lesser(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    return [np.minimum(x, y) for x, y in zip(a, b, strict=True)]


def stuck(s: Scored, seed: int) -> np.ndarray:
    pairs = zip(s.base.logp, s.unseen.logp, strict=True)
    return np.array([np.mean((base < np.log(BELOW)) & (after <= base)) for base, after in pairs])


def control(s: Scored, seed: int) -> np.ndarray:
    """The probe's sign per improbable token, averaged over a row's: +1 where it gained less than at its control."""
    base, after = (np.concatenate(each.logp) for each in (s.base, s.unseen))
    token = np.concatenate([each.ids[each.start :] for each in s.examples])
    owner = np.repeat(np.arange(len(s.examples)), [len(each) for each in s.base.logp])
    others = np.unique(token[base < np.log(BELOW)]).tolist()
    known = sorted({*others, 0})
    rng, found = np.random.default_rng(seed), np.zeros(len(s.examples))
    before, later = (np.asarray(each.others) for each in (s.base, s.unseen))
    count = np.maximum(np.bincount(owner[base < np.log(BELOW)], minlength=len(found)), 1)
    for i in np.flatnonzero(base < np.log(BELOW)):
        places, column = rng.integers(len(token), size=CANDIDATES), known.index(token[i])
        fits = (token[places] != token[i]) & (before[places, column] < np.log(BELOW))
        if fits.any():
            places = places[fits]
            place = places[np.abs(before[places, column] - base[i]).argmin()]
            found[owner[i]] += np.sign((later[place, column] - before[place, column]) - (after[i] - base[i]))
    return found / count


SCORES: dict[str, Callable[[Scored, int], np.ndarray]] = {
    "base mean p": lambda s, seed: -per_row([np.exp(each) for each in s.base.logp]),
    "base loss": lambda s, seed: per_row(loss_of(s.base)),
    "base loss, worst token": lambda s, seed: per_row(loss_of(s.base), np.max),
    "base gap, worst token": lambda s, seed: per_row(gaps(s.base), np.max),
    "cross-fitted loss": lambda s, seed: per_row(loss_of(s.unseen)),
    "cross-fitted loss, worst token": lambda s, seed: per_row(loss_of(s.unseen), np.max),
    "cross-fitted gap, worst token": lambda s, seed: per_row(gaps(s.unseen), np.max),
    "lesser loss": lambda s, seed: per_row(lesser(loss_of(s.base), loss_of(s.unseen))),
    "lesser loss, worst token": lambda s, seed: per_row(lesser(loss_of(s.base), loss_of(s.unseen)), np.max),
    "lesser gap, worst token": lambda s, seed: per_row(lesser(gaps(s.base), gaps(s.unseen)), np.max),
    "IFD": lambda s, seed: per_row(loss_of(s.base)) / per_row(loss_of(s.alone)),
    "loss gained (Rho-1, cross-fitted)": lambda s, seed: per_row(difference(loss_of(s.unseen), loss_of(s.base))),
    "excess loss (Rho-1, in sample)": lambda s, seed: per_row(difference(loss_of(s.seen), loss_of(s.base))),
    "improbable and stuck": stuck,
    "gain against controls": control,
    "area under the margin": lambda s, seed: -per_row(s.margins),
    "area under the margin, worst token": lambda s, seed: -per_row(s.margins, np.min),
}


# Judgement


def auroc(score: np.ndarray, wrong: np.ndarray) -> float:
    """Return the probability that a wrong row has the higher score than a right one, ties counted half."""
    above = score[wrong][:, None] - score[~wrong][None]
    return float((above > 0).mean() + (above == 0).mean() / 2)


def top(score: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of the highest scores; ties in random order."""
    return np.lexsort((np.random.default_rng(0).random(len(score)), -score))[:count]


def judged(score: np.ndarray, rows: list[Row]) -> dict[str, float]:
    """Return AUROC, precision at k, and of each kind of hard rows the share among the top k."""
    kind = np.array([row.kind for row in rows])
    wrong = kind == "wrong"
    chosen = top(score, int(wrong.sum()))
    hard = {name: (kind[chosen] == name).sum() / (kind == name).sum() for name in ("rare", "long", "fact") if name in kind}
    return {"auroc": auroc(score, wrong), "precision": wrong[chosen].mean(), **hard}


def cell(reader: Reader, name: str, seed: int, count: int, rate: float) -> dict[str, Any]:
    """Return what each candidate comes to on a data set."""
    rows = rows_of(name, seed, count)
    found = scored(reader, rows, seed, rate)
    values = {each: judged(score(found, seed), rows) for each, score in SCORES.items()}
    means = {part: float(np.exp(np.concatenate(getattr(found, part).logp)).mean()) for part in ("base", "unseen")}
    wrong = sum(row.kind == "wrong" for row in rows) / count
    return {"rows": count, "dtype": str(reader.model.dtype)[6:], "wrong": wrong, "mean_p": means, "scores": values}


def rounded(value: Any) -> Any:
    """Return the same with numbers of four digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(float(value), 4) if isinstance(value, (float, np.floating)) else value


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results, a cell to a line."""
    cells = [f"{json.dumps(key)}: {json.dumps(rounded(results[key]))}" for key in sorted(results)]
    path.write_text("{\n" + ",\n".join(cells) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Run the cells that the results lack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results/noise_rows.json"))
    parser.add_argument("--models", nargs="*", default=list(TINY), help="those of the study, or folders and Hub names")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of models other than the study's")
    parser.add_argument("--folder", type=Path, default=Path("noise_rows"), help="where the tiny models are kept")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=[*SETS, *OF_GSM8K])
    parser.add_argument("--gsm8k", help="folder of train.jsonl, in place of the Hub's openai/gsm8k")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if {*OF_GSM8K} & {*options.sets}:
        SETS.update(gsm8k.noisy(options.gsm8k))
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    readers: dict[str, Reader] = {}
    for seed, model, each in itertools.product(range(2, options.seeds + 2), options.models, options.sets):
        name = Path(model).name
        key = f"{name} | {each} | {seed}"
        if key in results:
            continue
        if model not in readers:
            readers[model] = tiny(options.folder, name) if name in TINY else pretrained(model, options.dtype)
        results[key] = found = cell(readers[model], each, seed, options.rows, RATE if name in TINY else OTHER_RATE)
        write(options.output, results)
        best = max(found["scores"], key=lambda score: found["scores"][score]["auroc"])
        print(f"{key}: best {best} {found['scores'][best]['auroc']:.3f}, mean p {found['mean_p']}", flush=True)


if __name__ == "__main__":
    main()
