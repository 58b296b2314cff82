"""Small files with the columns of the data sets on the Hub, and tokenizers of the kinds that the paper's models have."""

import json
import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bl_trainer.prepare.sources import BOXED

LANGUAGES = ("mar", "tel", "nep", "swa", "wol", "yor", "zul")


def question(i):
    return {
        "question_stem": f"What is {i}?",
        "choices": {"text": [f"{i}{letter}" for letter in "wxyz"], "label": list("ABCD")},
        "answerKey": "ABCD"[i % 4],
        "fact1": "unused",
    }


ROWS = {
    "math": lambda i: {
        "extra_info": {"question": f"What is {i} + 1?", "answer": f"It is \\boxed{{{i + 1}}}."},
        "ability": "math",
    },
    "medical": lambda i: {
        "prompt": f"Case {i}.\nA. rest\nB. work",
        "distilled_answer_string": f"Since {i}, \\boxed{{A}}",
        "answer_letter": "A",
        "reasoning": "unused",
    },
    "coding": lambda i: {"problem": f"Write f{i}.\n", "solution": f"def f{i}():\n    pass\n", "lang": "python"},
    "low_resource": lambda i: {"input": f"swali {i}", "output": f"jibu {i}"},
    "magpie": lambda i: {"conversations": [{"from": "human", "value": f"Hi {i}"}, {"from": "gpt", "value": f"Ho {i}"}]},
    "wizardlm": lambda i: {"instruction": f"Say {i}", "output": f"{i}"},
    "openbookqa": question,
}
LOCAL = ("math", "medical", "coding", "low_resource", "instruction", "openbookqa")  # those that are not generated


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_source(folder, name, count=12):
    """Write what `--source` takes for the data set, and return its path."""
    if name == "low_resource":
        for language in LANGUAGES:
            write_rows(folder / f"{language}.jsonl", map(ROWS[name], range(count)))
    elif name == "instruction":
        for part in ("magpie", "wizardlm"):
            write_rows(folder / f"{part}.jsonl", map(ROWS[part], range(count)))
    elif name == "openbookqa":
        for start, split in enumerate(("train", "validation", "test")):
            write_rows(folder / f"{split}.jsonl", map(ROWS[name], range(start * 100, start * 100 + count)))
    else:
        write_rows(folder / "train.jsonl", map(ROWS[name], range(count)))
    return folder


QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_MATH = QWEN.replace("You are a helpful assistant.", BOXED.replace("\\", "\\\\"))
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + LLAMA
DATED = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|im_start|>system\nToday: ' + date_string + '<|im_end|>' }}"
) + LLAMA.removeprefix("{{ bos_token }}")
TEMPLATES = {
    "qwen": QWEN,
    "qwen-math": QWEN_MATH,
    "llama": LLAMA,
    "gemma": GEMMA,
    "dated": DATED,
    "base": None,
    "base-without-bos": None,
}


def make_tokenizer(kind):
    """A tokenizer of one token per character; all but Qwen's begin a text with a token of its own."""
    special = ["<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"]
    vocab = {token: i for i, token in enumerate([*special, *string.printable])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    begins = kind not in ("qwen", "qwen-math", "base-without-bos")
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", vocab["<|begin|>"])]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>" if begins else None,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|unknown|>",
        additional_special_tokens=special[2:4],
    )
    made.chat_template = TEMPLATES[kind]
    return made
