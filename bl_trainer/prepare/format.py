"""How examples are written for a model: as messages, or as text where it has no chat template."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer

from .._util.text import sentence
from ..errors import RecipeError
from .sources import BOXED, Example

USER, ASSISTANT = "User:", "Assistant:"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
DATE = "26 Jul 2024"  # what Llama's templates say where they can't tell the day


class Format:
    """Messages, to which TRL applies the model's template in training and the evaluator in evaluation; without one

        SYSTEM

        User: USER

        Assistant: COMPLETION

    as text; "SYSTEM" and the empty line after it may be missing. TRL adds the beginning and end tokens to text. No
    prompt ends in whitespace, and no completion begins or ends in it, but for the blank that separates text. The instruction
    `BOXED` is taken from the end of a question where the template says it itself, as Qwen2.5-Math's does.

    `model`: whose tokenizer it is, or a tokenizer; None for messages of unknown length. Raises RecipeError if it
    can't be had.
    """

    def __init__(self, model: Any):
        self.tokenizer: Any = model
        self.model = model if isinstance(model, str) else None
        if self.model:
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(self.model)
            except Exception as error:  # it can be told in many ways that there is no such model
                raise RecipeError(f"`--model {model}` has no tokenizer that can be loaded: {sentence(error)}") from error
        self.template = getattr(self.tokenizer, "chat_template", None)
        self.is_chat = self.tokenizer is None or bool(self.template)
        self.has_system = not self.template or self._takes_system()
        self.instructs = bool(self.template) and self._says(BOXED)
        # A template that writes today's date would train and evaluate with different ones
        self.options = {"date_string": DATE} if "strftime_now" in str(self.template) else {}

    def _takes_system(self) -> bool:
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
        try:
            return "S" in self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # the template's own, of any kind
            return False

    def _says(self, text: str) -> bool:
        try:
            return text in self.tokenizer.apply_chat_template([{"role": "user", "content": "U"}], tokenize=False)
        except Exception:  # the template's own, of any kind
            return False

    def schema(self) -> list[tuple[str, pa.DataType]]:
        """The columns that `write` makes, but for those kept along."""
        text = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])) if self.is_chat else pa.string()
        options = pa.struct([(name, pa.string()) for name in self.options])
        return [("prompt", text), ("completion", text), *([("chat_template_kwargs", options)] if self.options else [])]

    def describe(self) -> dict[str, Any]:
        """What the rows depend on."""
        kind = "messages" if self.is_chat else "text"
        digest = hashlib.sha256(str(self.template).encode()).hexdigest()[:16] if self.template else None
        instruction = "the template's" if self.instructs else None
        tokenizer = fingerprint(self.model) if self.model else None
        return {"format": kind, "chat_template": digest, "instruction": instruction, "tokenizer": tokenizer}

    def write(self, example: Example) -> dict[str, Any] | None:
        """Return prompt, completion and the other columns, or None if one of the two would be empty. Raises TypeError."""
        for text in (example.user, example.completion):
            if text is not None and not isinstance(text, str):
                raise TypeError(f"{text!r} stands where a text should")
        user, completion = ((text or "").strip() for text in (example.user, example.completion))
        if not user or not completion:
            return None
        prompt = self.prompt(f"{user}\n{example.suffix}" if example.suffix else user, example.system)
        if not self.is_chat:
            return {"prompt": prompt, "completion": f" {completion}", **example.others}
        row = {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}], **example.others}
        return {**row, "chat_template_kwargs": self.options} if self.options else row

    def prompt(self, user: str, system: str = "") -> Any:
        """Return the prompt of a question: messages, or a text."""
        system, user = system.strip(), user.strip()
        if not self.is_chat:
            prompt = f"{USER} {user}\n\n{ASSISTANT}"
            return f"{system}\n\n{prompt}" if system else prompt
        if self.instructs and not system:
            user = user.removesuffix(f"\n{BOXED}")
        if system and not self.has_system:
            system, user = "", f"{system}\n\n{user}"
        messages = [{"role": "system", "content": system}] if system else []
        return [*messages, {"role": "user", "content": user}]

    def turn_end(self) -> str | None:
        """Return what the template writes behind an answer, up to whitespace, such as `<|im_end|>`; None if that is nothing."""
        if not self.template:
            return None
        messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.options)
        except Exception:  # the template's own, of any kind
            return None
        return next(iter(text.rpartition("ANSWER")[2].split()), None)

    def lengths(self, row: dict[str, Any]) -> tuple[int, int]:
        """Return the tokens of the prompt, and of prompt and completion, as TRL counts them."""
        if self.is_chat:
            prompt, whole = (
                self.tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True, **self.options)
                for messages, asks in ((row["prompt"], True), (row["prompt"] + row["completion"], False))
            )
        else:
            end = self.tokenizer.eos_token or ""
            prompt, whole = self.tokenizer(row["prompt"]), self.tokenizer(row["prompt"] + row["completion"] + end)
        return len(prompt["input_ids"]), len(whole["input_ids"])


def fingerprint(model: str) -> str:
    """Return a hash of a model's tokenizer files, in its folder or in the Hub's cache."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        found = Path(model) / name if Path(model).is_dir() else try_to_load_from_cache(model, name)
        if isinstance(found, (str, Path)) and Path(found).is_file():
            digest.update(f"{name} {Path(found).stat().st_size}".encode() + Path(found).read_bytes())
    return digest.hexdigest()[:16]
