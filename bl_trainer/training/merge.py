"""The merge verb: an adapter and its base as one model, that loads without PEFT."""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, BitsAndBytesConfig

from .._util.files import write_text
from .._util.hub import why_unavailable
from .._util.peft import LoraLayer
from .._util.text import sentence
from ..errors import RecipeError
from .card import write_card
from .checkpoints import RECORD_FILE, last_whole, quantization_of, read_record

ADAPTER = "adapter_config.json"

EMBEDDINGS = re.compile(r"\b(embed_tokens|wte|embed_in)(\.token_adapter)?(\.base_layer)?\.weight$")

PROCESSOR = ("processor_config.json", "preprocessor_config.json")


@dataclass
class MergeArguments:
    """Options of the merge verb; `run`: the folder of the adapter."""

    run: str = field(default="", init=False)
    output: str | None = field(default=None, metadata={"help": "Folder for the merged model; it must not exist yet."})
    base: str | None = field(
        default=None, metadata={"help": "Base model, folder or Hub name, where it is no longer at the adapter's own path."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Precision: auto, float32, bfloat16, float16; auto is the base model's."}
    )

    def check(self) -> None:
        """Raise RecipeError if there is nothing to merge, or nowhere to write it."""
        run, output = Path(self.run), Path(self.output or "")
        if not run.is_dir():
            raise RecipeError(f"Cannot merge {run}: it is not a folder. Give a run's `output_dir`, or one of its checkpoints.")
        if not (run / ADAPTER).is_file():
            raise RecipeError(f"Cannot merge {run}: {_why_nothing(run)}")
        if not self.output:
            raise RecipeError(f"`--output` is missing: the folder for the merged model. Write e.g. `--output {run}-merged`.")
        if output.exists():
            raise RecipeError(f"Cannot merge into `--output {output}`: it exists already. Write another folder.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise RecipeError(f"`--dtype {self.dtype}` is unknown. Write auto, float32, bfloat16 or float16.")


def _why_nothing(run: Path) -> str:
    if (run / "config.json").is_file():
        return f"there is nothing to merge, it holds a whole model. Use {run} as it is."
    last, _ = last_whole(run)
    if last is not None and (last / ADAPTER).is_file():
        return f"it holds no adapter, the run has not ended. Give its checkpoint: `bl-trainer merge {last}`."
    return f"it holds no {ADAPTER}. Give a run's `output_dir`, or one of its checkpoints."


def merge(options: MergeArguments) -> Path:
    """Merge an adapter into its base, and write the model as one that loads without PEFT.

    The merge is PEFT's own. A base that was quantised for training is quantised alike and dequantised first, so that the
    merged model computes what was trained. Returns the folder, which holds sharded weights, tokenizer with chat template,
    generation config, the run's record and a model card. It appears complete or not at all.

    Raises RecipeError on a wrong option, a base that can't be loaded, and weights that PEFT can't merge.
    """
    options.check()
    run, output = Path(options.run), Path(str(options.output))
    config = _config(run, options.base)
    processing_class: Any = _processing_class(run, str(config.base_model_name_or_path))
    model = _merged(run, config, _base(run, config, options.dtype))
    _align(model, processing_class)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        part = Path(scratch) / "model"
        model.save_pretrained(part)
        processing_class.save_pretrained(part)
        _write_record(run, str(config.base_model_name_or_path), part, output, bool(processing_class.chat_template))
        shutil.move(part, output)
    return output


def _config(run: Path, base: str | None) -> PeftConfig:
    """Return the adapter's configuration, with `base` in place of its own base model if it is given."""
    try:
        config = PeftConfig.from_pretrained(str(run))
    except Exception as error:  # of JSON, or of PEFT's many configurations
        raise RecipeError(f"Cannot read {run / ADAPTER}: {sentence(error)}") from error
    if base is not None:
        config.base_model_name_or_path, config.revision = base, None
    name = config.base_model_name_or_path
    if not name:
        raise RecipeError(f"Cannot merge {run}: its {ADAPTER} names no base model. Add `--base MODEL`.")
    if fault := why_unavailable(name, config.revision):
        raise RecipeError(f"Cannot load {name}, the base model of {run}: {fault}. Add `--base MODEL` if it is elsewhere.")
    return config


def _base(run: Path, config: PeftConfig, dtype: str) -> Any:
    """Load the base as it was trained on: quantised if it was, with its weights in plain numbers again."""
    name: Any = config.base_model_name_or_path
    quantization = quantization_of(read_record(str(run)))
    kwargs: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(**quantization)} if quantization else {}
    try:
        kind = getattr(AutoConfig.from_pretrained(name, revision=config.revision), "architectures", None) or [""]
        loader: Any = getattr(transformers, kind[0], AutoModelForCausalLM)
        model = loader.from_pretrained(name, revision=config.revision, dtype=dtype, **kwargs)
        return model.dequantize() if getattr(model, "is_quantized", False) else model
    except Exception as error:  # it can be told in many ways that there is no such model
        raise RecipeError(
            f"Cannot load {name}, the base model of {run}: {sentence(error)} Add `--base MODEL` if it is elsewhere."
        ) from error


def _merged(run: Path, config: PeftConfig, base: Any) -> Any:
    rows = _embeddings(run)
    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows)
    try:
        tuned: Any = PeftModel.from_pretrained(base, str(run), config=config)
        _untie(tuned.get_base_model())
        with torch.no_grad():
            model = tuned.merge_and_unload(safe_merge=True)
    except Exception as error:  # the shapes of another base, numbers that are not finite, or a kind that has no merge
        raise RecipeError(
            f"Cannot merge {run} into {config.base_model_name_or_path}: {sentence(error)} Check that this is the base that the "
            "adapter was trained on."
        ) from error
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model


def _untie(model: Any) -> None:
    """Give the head weights of its own if LoRA changes one of two tied layers, since the merge would change both."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    inner, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if head is not None and inner.weight is head.weight and any(isinstance(layer, LoraLayer) for layer in layers):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _embeddings(run: Path) -> int | None:
    """Return the rows of the input embeddings that the adapter holds whole, as of a grown vocabulary; None if it doesn't."""
    path = run / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if EMBEDDINGS.search(name)]
        return file.get_slice(names[0]).get_shape()[0] if names else None


def _processing_class(run: Path, base: str) -> Any:
    """Return the run's tokenizer or processor, the base model's where the run has none."""
    source = str(run) if any(run.glob("tokenizer*")) else base
    loader: Any = AutoProcessor if any((run / name).is_file() for name in PROCESSOR) else AutoTokenizer
    return loader.from_pretrained(source)


def _align(model: Any, processing_class: Any) -> None:
    """Let the merged model end and pad by the tokens that the run has trained with, besides the base model's own."""
    tokenizer, config, generation = (
        getattr(processing_class, "tokenizer", processing_class),
        model.config,
        model.generation_config,
    )
    if tokenizer.eos_token_id is not None:
        ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        ends = list(dict.fromkeys(end for end in (tokenizer.eos_token_id, *ends) if end is not None))
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None:
        generation.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _write_record(run: Path, base: str, part: Path, output: Path, chats: bool) -> None:
    """Write the run's record and a card of the merged model, if a run of ours has left a record."""
    record = read_record(str(run))
    if not record:
        return
    record |= {"base_model": base, "is_adapter": False, "quantization": None, "merged": {"adapter": str(run), "base": base}}
    write_text(part / RECORD_FILE, json.dumps(record, indent=2) + "\n")
    write_card(part / "README.md", record, output.name, str(output), chats)
