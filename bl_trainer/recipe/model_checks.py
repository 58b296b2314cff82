"""The rules of a recipe about its model, tokenizer, template and adapter, one function each, as in `checks`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .._util.hub import why_unavailable
from .._util.text import nearest, sentence
from ..training.refusals import refuse_lm_head_adapter

if TYPE_CHECKING:
    from .recipe import Recipe


def chat_template_can_be_read(recipe: "Recipe") -> str | None:
    if not recipe.training.chat_template_path:
        return None
    path = Path(recipe.training.chat_template_path)
    what = f"`chat_template_path: {path}`"
    if path.suffix in (".jinja", ".j2"):
        try:
            text = re.sub(r"{%-? *(end)?generation *-?%}", "", path.read_text(encoding="utf-8"))
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        except OSError as error:
            return f"{what} can't be read: {error.strerror}."
        except jinja2.TemplateSyntaxError as error:
            return f"{what}, line {error.lineno}: {error.message}"
        return None
    if fault := why_unavailable(str(path), file="tokenizer_config.json"):
        return f"{what} has no tokenizer, and is no .jinja file: {fault}. Correct the name, or download the model."
    try:  # a model whose template is taken
        AutoTokenizer.from_pretrained(path)
    except Exception as error:  # it can be told in many ways that there is no such model
        return f"{what} has no tokenizer, and is no .jinja file: {sentence(error)}"
    return None


def model_is_known(recipe: "Recipe") -> str | None:
    """transformers says that a Hub has no such model only once the data are prepared, and may leave out the name."""
    name, given = recipe.model.model_name_or_path, recipe.model_init_kwargs()
    elsewhere = {"config", "gguf_file", "cache_dir", "subfolder", "token"} & given.keys()
    if not elsewhere and not Path(str(name)).is_dir():
        recipe.pretrained(AutoConfig, "configuration")
    return None


def attention_is_installed(recipe: "Recipe") -> str | None:
    asked: Any = recipe.model_init_kwargs()["attn_implementation"]
    if not isinstance(asked, str) or asked in ("eager", "sdpa"):
        return None
    known = ["eager", *AttentionInterface().valid_keys()]
    if asked not in known and "/" not in asked:
        names = ", ".join(name for name in known if "|" not in name)  # others are for generation
        near = nearest(asked, known)
        return (
            f"Cannot use `attn_implementation: {asked}`: it is unknown.{near} Write one of {names}, or a kernel's name on the "
            "Hub, `OWNER/NAME`."
        )
    config = recipe.pretrained(AutoConfig, "configuration")
    trusted = recipe.training.trust_remote_code
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=asked, trust_remote_code=trusted)
    except Exception as error:  # a kernel may come from the Hub
        return f"Cannot use `attn_implementation: {asked}`: {sentence(error)} Install it, or set `attn_implementation: sdpa`."
    return None


def adapter_spares_the_head(recipe: "Recipe") -> str | None:
    try:
        refuse_lm_head_adapter(recipe.peft_config)
    except ValueError as error:
        return sentence(error)
    return None


def model_knows_the_end(recipe: "Recipe") -> str | None:
    """TRL says that `eos_token` is none of the model's only once the model is there."""
    end = recipe.training.eos_token
    if end is None:
        return None
    tokenizer = recipe.pretrained(AutoTokenizer, "tokenizer")
    if end in tokenizer.get_vocab():
        return None
    return (
        f"`eos_token: {end}` is not in the vocabulary of {recipe.model.model_name_or_path}. Write `--eos_token` with what "
        f"ends a turn in its chat template, or, for data without one, its own `--eos_token '{tokenizer.eos_token}'`."
    )
