"""The task `completion`: does the greedy continuation equal what the data say?"""

import logging
import re
from typing import Any

from trl import maybe_convert_to_chatml
from trl.data_utils import is_conversational

from .generation import Generation
from .grading.reasoning import without_reasoning
from .options import EvaluateArguments

logger = logging.getLogger(__name__)

COLUMNS = [("prompt", "completion"), ("messages",), ("conversations",)]  # one of these is needed
SPARE = 8  # new tokens beyond the longest gold answer, so that an answer that goes on is seen to


class Completion(Generation):
    """Rows as TRL trains on them: prompt and completion, or messages, whose last one by the assistant is the gold answer."""

    def own_prompt(self, doc: dict[str, Any]) -> Any:
        """The prompt, a text or messages."""
        return _split(doc)[0]

    def prepare(self, lm: Any, options: EvaluateArguments, chat: bool) -> None:
        """Take the model that is evaluated next; say which gold answers its tokenizer can't give back."""
        rights = [gold(doc) for doc in self.asked(options)]
        lost = [right for right in rights if normalise(_round_trip(lm.tokenizer, right)) != normalise(right)]
        if lost:
            logger.warning(
                f"{len(lost)} of {len(rights)} gold answers can't be equalled, since the tokenizer doesn't give them back as "
                f"they are: {lost[0]!r} becomes {_round_trip(lm.tokenizer, lost[0])!r}."
            )
        self.most_tokens = SPARE + max(len(lm.tokenizer(right, add_special_tokens=False)["input_ids"]) for right in rights)
        super().prepare(lm, options, chat)


def _round_trip(tokenizer: Any, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)


def _split(doc: dict[str, Any]) -> tuple[Any, str]:
    """Return the prompt, a text or messages, and the gold answer."""
    if not is_conversational(doc) and "conversations" not in doc:
        return doc["prompt"], doc["completion"]
    doc = maybe_convert_to_chatml(dict(doc))
    messages = doc["prompt"] + doc["completion"] if "prompt" in doc else doc["messages"]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        return messages, ""
    content = messages[last].get("content") or ""
    return messages[:last], content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def prompt_text(doc: dict[str, Any]) -> str:
    """The prompt in words, for the harness's own check of the first row."""
    return str(_split(doc)[0])


def gold(doc: dict[str, Any]) -> str:
    """The gold answer."""
    return _split(doc)[1]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Compare an answer with the gold one, whitespace at the ends apart."""
    answer, right = without_reasoning(results[0]), without_reasoning(gold(doc))
    return {
        "exact_match": float(answer.strip() == right.strip()),
        "normalised_match": float(normalise(answer) == normalise(right)),
    }


def normalise(text: str) -> str:
    """Return `text` without case, punctuation and needless whitespace; signs within numbers stay, and so does a lone "?"."""
    bare = " ".join(re.sub(r"(?![-+.,/:]\d)[^\w\s]", " ", text.casefold()).split())
    return bare or text.strip()
