"""The model card of a run: what was trained on what, how well, and how to use it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, metadata_load

TAG = "bl-trainer"

MEASURED = ("nll", "perplexity", "target_prob", "mean_token_accuracy")

SNIPPET = """from transformers import pipeline

generator = pipeline("text-generation", model={model})
prompt = {prompt}
print(generator(prompt, max_new_tokens=64, do_sample=False, return_full_text=False)[0]["generated_text"])"""

QUESTION = "What is the capital of France?"

LOST = ("licence",)  # a key of TRL's card that the Hub doesn't know


def is_ours(card: Path) -> bool:
    """Whether a run of ours wrote `card`."""
    try:
        return TAG in ((metadata_load(card) or {}).get("tags") or ())
    except (OSError, ValueError, yaml.YAMLError):
        return False


def snippet(model: str, chats: bool) -> str:
    """Return the Python lines that generate with the model at `model`, a folder or Hub name; `chats`: with a chat template."""
    prompt = json.dumps([{"role": "user", "content": QUESTION}] if chats else QUESTION)
    return SNIPPET.format(model=json.dumps(model), prompt=prompt)


def write_card(card: Path, record: Mapping[str, Any], name: str, where: str, chats: bool, data: str | None = None) -> None:
    """Put our text into `card`, in place of TRL's, whose metadata it keeps; without a card it begins a new one.

    `record`: a `RunRecord`'s fields. `name`: the model's. `where`: the folder or Hub name that loads it. `chats`: whether it
    has a chat template. `data`: the data set's name on the Hub; the recipe's otherwise.
    """
    content = ModelCard.load(card) if card.exists() else ModelCard(f"---\ntags: [{TAG}]\n---\n")
    metadata: Any = content.data
    for key in LOST:
        metadata.pop(key, None)
    metadata.model_name = name
    metadata.library_name = "peft" if record.get("is_adapter") else "transformers"
    metadata.pipeline_tag = metadata.get("pipeline_tag") or "text-generation"
    base = record.get("base_model")
    if base and not Path(base).exists():
        metadata.base_model = base
    use = f"## Use\n\n```python\n{snippet(where, chats)}\n```"
    parts = [_title(name, record, data), use, _metrics(record.get("metrics") or {}), _procedure(record), _cite(content.text)]
    content.text = "\n" + "\n\n".join(part for part in parts if part) + "\n"
    content.save(card)


def before_and_after(history: list[dict[str, Any]], best: int | None = None) -> dict[str, tuple[float | None, float]]:
    """Return each metric of an evaluation as it was before training, if it was measured, and afterwards.

    `history`: a trainer's `log_history`. `best`: the step whose weights the model has, None for the last. A metric that was
    measured before training alone is left out.
    """
    evaluated = [entry for entry in history if any(key.startswith("eval_") for key in entry)]
    names = [key for entry in evaluated for key in entry if key.startswith("eval_") and key.endswith(MEASURED)]
    found: dict[str, tuple[float | None, float]] = {}
    for name in dict.fromkeys(names):
        values = {entry["step"]: entry[name] for entry in evaluated if name in entry}
        last = best if best in values else max(values)
        if last != 0 or best == 0:
            found[name] = values.get(0), values[last]
    return found


def _title(name: str, record: Mapping[str, Any], data: str | None) -> str:
    data, base = data or _data_of(record.get("recipe") or {}), record.get("base_model")
    what, of = ("a LoRA adapter", "on") if record.get("is_adapter") else ("a fine-tuned version", "of")
    what += f" {of} {_linked(base)}" if base else ""
    what += ", an adapter merged into it" if record.get("merged") else ""
    on = f", trained on {_linked(data, 'datasets/')}" if data else ""
    return f"# {name}\n\nThis model is {what}{on} with the objective {_spelled(record)}."


def _data_of(recipe: Mapping[str, Any]) -> str | None:
    paths = [str(entry.get("path")) for entry in recipe.get("datasets") or () if isinstance(entry, Mapping)]
    return recipe.get("dataset_name") or ", ".join(paths) or None


def _linked(name: str, kind: str = "") -> str:
    """Return a Hub name as a link, and anything else as it is."""
    is_hub = not Path(name).exists() and name.count("/") == 1 and name[0] not in "./~"
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_hub else f"`{name}`"


def _spelled(record: Mapping[str, Any]) -> str:
    objective = dict(record["objective"])
    name = objective.pop("name")
    return f"`{name}`" if not objective else f"`{name}` ({json.dumps(objective)})"


def _metrics(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    rows = [
        f"| `{name}` | {'' if before is None else f'{before:.4g}'} | {after:.4g} |" for name, (before, after) in metrics.items()
    ]
    return "\n".join(["## Evaluation", "", "| metric | before training | after |", "|---|---|---|", *rows])


def _procedure(record: Mapping[str, Any]) -> str:
    lines = [f"{key}: {json.dumps(record[key])}" for key in ("objective", "threshold")]
    dropped = record.get("drop_rows")
    if dropped:
        lines.append(f"drop_rows: {json.dumps(dropped['rule'])}  # {dropped['dropped']:,} of {dropped['rows']:,} rows")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return "\n".join(["## Objective", "", "```yaml", *lines, "```", "", f"Trained with {versions}."])


def _cite(text: str) -> str:
    """Return what TRL's card says after its heading on citations, and the links to trackers that it begins with."""
    trackers = [line.strip() for line in text.splitlines() if line.startswith("[<img ")]
    _, heading, rest = text.partition("## Citations")
    return "\n\n".join([*trackers, (heading + rest).strip()]).strip()
