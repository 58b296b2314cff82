"""Tasks whose answers are generated: prompts as in training, k answers to each item, graded one by one."""

import json
import math
import re
import statistics
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask

from .._util.text import sentence
from ..errors import RecipeError
from ..prepare.format import ASSISTANT, USER, Format
from .exploration import FORMAT
from .grading.reasoning import split_reasoning
from .options import EvaluateArguments

ANSWER = "ANSWER"  # stands where a rendered conversation has an answer


class Generation(ConfigurableTask):
    """A task of the harness whose rows bring their prompt, or a question that becomes one as in `prepare-data`.

    Both are rendered as TRL renders them in training.

    `process_results` of its configuration grades one answer, without its reasoning. With several answers to an item a metric
    is the list of their values, and the score the mean of the items' means (Avg@k).
    """

    answer_format: re.Pattern[str] | None = None

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        first = self.own_prompt(self.eval_docs[0])
        self.is_chat = None if first is None else isinstance(first, list)  # None: the question becomes a prompt either way
        self.most_tokens: Any = (self.config.generation_kwargs or {}).get("max_gen_toks")

    @cached_property
    def _test_docs(self) -> Any:
        return super().test_docs()

    def test_docs(self) -> Any:
        """The items, processed once."""
        return self._test_docs

    def own_prompt(self, doc: dict[str, Any]) -> Any:
        """The row's own prompt, a text or messages; None if it has none."""
        return doc.get("prompt") or None

    def asked(self, options: EvaluateArguments) -> list[Any]:
        """The items that `options.limit` leaves, as the harness counts them."""
        docs, limit = self.eval_docs, options.limit
        count = len(docs) if limit is None else math.ceil(len(docs) * limit) if limit < 1 else int(limit)
        return list(islice(docs, count))

    def prepare(self, lm: Any, options: EvaluateArguments, chat: bool) -> None:
        """Take the model that is evaluated next, and how to generate with it.

        Raises RecipeError if its tokenizer can't render the prompts, or it has no room for them.
        """
        if self.is_chat and not lm.tokenizer.chat_template:
            raise RecipeError(f"The data of {self.task_name!r} are messages, but the tokenizer has no chat template.")
        self.format = Format(lm.tokenizer)
        self.format.is_chat = chat
        try:
            prompts = [self.fewshot_context(doc, 0, apply_chat_template=chat) for doc in self.asked(options)]
        except TemplateError as error:
            raise RecipeError(f"The model's chat template doesn't take {self.task_name!r}: {sentence(error)}.") from error
        longest = max(len(lm.tok_encode(prompt)) for prompt in prompts)
        room, asked = lm.max_length - longest, options.max_new_tokens
        if room < (asked or 1):
            raise RecipeError(
                f"The longest prompt of {self.task_name!r} has {longest} tokens, and the model takes {lm.max_length} in all: "
                + (f"`--max_new_tokens` can be {room} at most." if room > 0 else "take it out of the data.")
            )
        most = self.most_tokens + max(len(self._encode(self.lead(doc))) for doc in self.asked(options))
        kwargs: dict[str, Any] = {"max_gen_toks": asked or min(most, room), "do_sample": False, "temperature": 0.0}
        if options.is_sampled:
            # without cuts of the distribution, which generation_config.json may ask for, and transformers does (top_k 50)
            kwargs |= {"do_sample": True, "temperature": options.sampling_temperature, "top_p": 1.0, "top_k": 0}
        # the end tokens that the model doesn't stop at by itself, and what goes on with a next turn of its own making
        kwargs["until"] = [end for end in (self.format.turn_end(),) if end]
        kwargs["until"] += [f"\n{USER}"] if any(map(_is_written, prompts)) else []
        self.set_config("generation_kwargs", kwargs, update=True)
        self.set_config("repeats", options.samples)
        if options.format:
            self.answer_format = re.compile(options.format, re.DOTALL)
            self._aggregation_list[FORMAT], self._higher_is_better[FORMAT] = mean_of_items, True

    def fewshot_context(
        self,
        doc: dict[str, Any],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        **kwargs: Any,
    ) -> str:
        """Return the prompt, in the chat template if it is one of messages or `apply_chat_template`."""
        prompt, options = self._asked_as(doc)
        return prompt if isinstance(prompt, str) else self._render(doc, prompt, add_generation_prompt=True, **options)

    def lead(self, doc: dict[str, Any]) -> str:
        """Return what the template writes between the prompt and an answer in training, such as an empty think block."""
        prompt, options = self._asked_as(doc)
        if isinstance(prompt, str):
            return ""
        asked = self._render(doc, prompt, add_generation_prompt=True, **options)
        try:
            trained = self._render(doc, [*prompt, {"role": "assistant", "content": ANSWER}], **options)
        except TemplateError:  # it takes no answer here, so that none was trained
            return ""
        before = trained.rpartition(ANSWER)[0]
        return before.removeprefix(asked) if before.startswith(asked) else ""

    def _asked_as(self, doc: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the prompt, a text or messages, and the options of the template."""
        prompt = self.own_prompt(doc)
        if prompt is not None:
            return prompt, doc.get("chat_template_kwargs") or {}
        return self.format.prompt(self.doc_to_text(doc), self.config.description or ""), self.format.options

    def _render(self, doc: dict[str, Any], messages: list[Any], **options: Any) -> str:
        tools = json.loads(doc["tools"]) if isinstance(doc.get("tools"), str) else doc.get("tools")
        return self.format.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    def _encode(self, text: str) -> list[int]:
        return self.format.tokenizer(text, add_special_tokens=False)["input_ids"]

    def apply_filters(self) -> None:
        """Keep all answers to an item. The harness would take the first."""
        for instance in self._instances:
            instance.filtered_resps["none"] = instance.resps

    def process_results(self, doc: dict[str, Any], results: list[list[str]]) -> dict[str, Any]:
        """Return each metric of an item: a value, or one for each of several answers."""
        prompt = self.fewshot_context(doc, 0)
        blank = " " if _is_written(prompt) else ""  # which the format puts before an answer
        lead = self.format.tokenizer.decode(self._encode(self.lead(doc)), skip_special_tokens=True)
        unsaid = split_reasoning(lead, prompt)[0]
        said = [split_reasoning(answer.removeprefix(blank), prompt)[0].removeprefix(unsaid) for answer in results[0]]
        graded = [self._graded(doc, answer) for answer in said]
        if len(graded) == 1:
            return graded[0]
        return {metric: [each[metric] for each in graded] for metric in graded[0]}

    def _graded(self, doc: dict[str, Any], answer: str) -> dict[str, Any]:
        """Return each metric of an answer. Raises RecipeError if the task's code fails: all answers are lost then."""
        own = {FORMAT: float(bool(self.answer_format.fullmatch(answer.strip())))} if self.answer_format else {}
        try:
            return self.config.process_results(doc, [answer]) | own
        except Exception as error:
            row = next((f"row {i + 1}" for i, each in enumerate(self.eval_docs) if each == doc), "a row")
            said = repr(answer[:80] + "..." * (len(answer) > 80))
            why = f"{type(error).__name__}: {sentence(error).rstrip('.')}"
            raise RecipeError(
                f"Cannot grade {row} of {self.task_name!r}, with the answer {said}: {why}. Correct the row or the task."
            ) from error

    def aggregation(self) -> dict[str, Callable[[list[Any]], float]]:
        """How an item's values become a score, for each metric."""
        return dict.fromkeys(self._aggregation_list, mean_of_items)


def _is_written(prompt: str) -> bool:
    """Whether a prompt is text as `Format` writes it."""
    return prompt.endswith(f"\n\n{ASSISTANT}")


def mean_of_items(values: list[Any]) -> float:
    """The mean over items of an item's value, or of the mean of its values."""
    return statistics.fmean(map(item_mean, values))


def item_mean(value: Any) -> float:
    return statistics.fmean(value) if isinstance(value, list) else float(value)
