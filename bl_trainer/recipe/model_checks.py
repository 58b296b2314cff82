"""The rules of a recipe about its model, tokenizer, template and adapter, one function each, as in `checks`."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from accelerate.utils import is_bnb_available
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .._util.text import sentence
from ..training.refusals import refuse_lm_head_adapter
from .local_files import is_path

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
    try:  # a model whose template is taken
        AutoTokenizer.from_pretrained(path)
    except Exception as error:  # it can be told in many ways that there is no such model
        return f"{what} has no tokenizer, and is no .jinja file: {sentence(error)}"
    return None


def model_is_there(recipe: "Recipe") -> str | None:
    name = recipe.model.model_name_or_path
    if not name:
        return "The recipe names no model. Write `model_name_or_path: ...`, a folder or a Hub id."
    return f"`model_name_or_path: {name}` is not a folder." if is_path(name) and not Path(name).is_dir() else None


def model_is_known(recipe: "Recipe") -> str | None:
    """transformers says that a Hub has no such model only once the data are prepared, and may leave out the name."""
    name, given = recipe.model.model_name_or_path, recipe.model_init_kwargs()
    elsewhere = {"config", "gguf_file", "cache_dir", "subfolder", "token"} & given.keys()
    if not elsewhere and not Path(str(name)).is_dir():
        recipe.pretrained(AutoConfig, "configuration")
    return None


def model_is_no_adapter(recipe: "Recipe") -> str | None:
    folder = Path(str(recipe.model.model_name_or_path))
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() or (folder / "config.json").is_file():
        return None
    base = json.loads(adapter.read_text()).get("base_model_name_or_path")
    return (
        f"`model_name_or_path: {recipe.model.model_name_or_path}` is an adapter of {base}. Write `model_name_or_path: {base}` "
        "to train a new one, `resume_from_checkpoint` besides to go on with a checkpoint, or merge the adapter first."
    )


def model_keys_are_given_once(recipe: "Recipe") -> str | None:
    for key, top in (("dtype", "dtype"), ("revision", "model_revision"), ("attn_implementation", "attn_implementation")):
        if top in recipe.given and key in (recipe.training.model_init_kwargs or {}):
            return f"`{top}` and `{key}` in `model_init_kwargs` say the same thing. Keep one of them."
    return None


def adapter_has_a_part(recipe: "Recipe") -> str | None:
    for key, idle in (("lora_alpha", 0), ("lora_dropout", 1)):
        if recipe.model.use_peft and getattr(recipe.model, key) == idle:
            return f"`{key}: {idle}` trains nothing: the adapter's part is 0. Write another number."
    return None


def quantised_models_train_adapters(recipe: "Recipe") -> str | None:
    model = recipe.model
    quantised = model.load_in_4bit or model.load_in_8bit
    if quantised and not model.use_peft:
        key = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        return f"`{key}`: such a model can't be trained as it is. Write `use_peft: true` for QLoRA."
    if quantised and not is_bnb_available():
        return "`load_in_4bit` and `load_in_8bit` need bitsandbytes. Run `pip install bitsandbytes`."
    return None


def attention_is_installed(recipe: "Recipe") -> str | None:
    asked: Any = recipe.model_init_kwargs()["attn_implementation"]
    if not isinstance(asked, str) or asked in ("eager", "sdpa"):
        return None
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
