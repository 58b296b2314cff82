"""Write the tables of docs/reference/loss-head.md: `python tools/loss_head_page.py [docs/reference]`.

They are made of the code's own decisions: tiny models of each family go through the verification that a run begins with, and
recipes through the checks before a model loads. Nothing trains.
"""

import importlib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

from bl_trainer import BLConfig
from bl_trainer._util.trl import add_fused_lm_head
from bl_trainer.head.patch import add_scoring
from bl_trainer.head.verification import verify_head, verify_separation
from bl_trainer.training.refusals import refuse_bypass, refuse_lm_head_adapter, refuse_virtual_tokens
from bl_trainer.training.scoring import ScoringTrainer

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "Llama": "llama", "Mistral": "mistral", "Qwen3": "qwen3", "Qwen3-MoE": "qwen3_moe", "Qwen3-Next": "qwen3_next",
    "Gemma 2": "gemma2", "Gemma 3": "gemma3_text", "Gemma 3n": "gemma3n_text", "Gemma 4": "gemma4_text",
    "Llama 4": "llama4_text", "Mixtral": "mixtral", "gpt-oss": "gpt_oss", "DeepSeek-V3": "deepseek_v3",
    "GLM-4-MoE": "glm4_moe", "Phi-3": "phi3", "OLMo 2": "olmo2", "SmolLM3": "smollm3", "Granite": "granite",
    "Cohere 2": "cohere2", "Falcon": "falcon", "GPT-2": "gpt2", "GPT-J": "gptj", "OPT": "opt", "Mamba 2": "mamba2",
    "Jamba": "jamba", "RecurrentGemma": "recurrent_gemma", "BERT": "bert",
}  # fmt: skip
LORA = partial(LoraConfig, target_modules=["q_proj"], task_type="CAUSAL_LM")
PROMPT = partial(PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=3)
PREFIX = partial(PrefixTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=3)
# What the reader knows it by; keys of the recipe; the adapter; how the launcher shares the work out
SETUPS: tuple[tuple[str, dict[str, Any], Callable[..., Any] | None, dict[str, Any]], ...] = (
    ("full fine-tuning, on one device or several", {}, None, {}),
    ("FSDP2", {"fsdp": {"version": 2}}, None, {}),
    ("FSDP1", {"fsdp": {"version": 1}}, None, {}),
    ("ZeRO-3", {"deepspeed": True}, None, {}),
    ("tensor parallelism", {}, None, {"tp_size": 2}),
    ("context parallelism, `pad_to_multiple_of: 4`", {"pad_to_multiple_of": 4}, None, {"cp_size": 2}),
    ("context parallelism", {}, None, {"cp_size": 2}),
    ("sequence parallelism (DeepSpeed)", {}, None, {"sp_size": 2, "sp_backend": "deepspeed"}),
    ("LoRA", {}, LORA, {}),
    ("LoRA, `lora_modules_to_save: [lm_head]`", {}, partial(LORA, modules_to_save=["lm_head"]), {}),
    ("LoRA on `lm_head`", {}, partial(LORA, target_modules=["q_proj", "lm_head"]), {}),
    ("prompt tuning", {}, PROMPT, {}),
    ("prompt tuning, packed", {"packing": True}, PROMPT, {}),
    ("prefix tuning, `gradient_checkpointing: true`", {"gradient_checkpointing": True}, PREFIX, {}),
    ("`loss_head: trl`", {"loss_head": "trl"}, None, {}),
    ("`loss_type: dft`", {"loss_type": "dft"}, None, {}),
)
HEADER = "model", "own head", "TRL's head", "packed or padding-free"
FULL = {"tp_size": 1, "cp_size": 1, "sp_size": 1, "sp_backend": "deepspeed"}


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ("---",) * len(header), *rows))


def said(check: Callable[[], object], model: str = "") -> str:
    """Return what a check says, without the model's class; ✓ if nothing."""
    try:
        check()
    except ValueError as error:
        text = re.sub(rf"^Cannot train {model}[^:]*: ", "", str(error)) if model else str(error)
        return re.sub(r" by up to \S+ nats, rounding explains \S+", ".", text)  # figures of one processor
    return "✓"


def family_row(label: str, model: Any) -> tuple[str, ...]:
    """Return what the verification says of a model: by each head, and in packed rows."""
    add_fused_lm_head(model)
    add_scoring(model)
    name = type(model).__name__
    checks = (partial(verify_head, model), partial(verify_head, model, "trl"), partial(verify_separation, model))
    return label, *(said(check, name) for check in checks)


def families() -> str:
    """Return the table of families, and of multimodal classes on text, with its notes."""
    sys.path.insert(0, str(ROOT / "tests"))
    helpers = [importlib.import_module(name) for name in ("conftest", "families", "multimodal")]
    conftest, tiny, multimodal = helpers
    tokenizer = conftest.make_tokenizer()
    rows = [family_row(label, tiny.tiny_model(name)) for label, name in FAMILIES.items()]
    rows += [
        family_row(f"`{name}ForConditionalGeneration`", multimodal.make_multimodal(name, tokenizer)) for name in multimodal.TEXT
    ]
    reasons = list(dict.fromkeys(cell for _, *cells in rows for cell in cells if cell != "✓"))
    short = {reason: f"refused ({i})" for i, reason in enumerate(reasons, 1)}
    notes = "".join(f"{i}. {reason}\n" for i, reason in enumerate(reasons, 1))
    versions = " and ".join(f"{name} {version(name)}" for name in ("transformers", "trl"))
    return (
        f"With {versions}:\n\n" + table(HEADER, [tuple(short.get(cell, cell) for cell in row) for row in rows]) + "\n" + notes
    )


def setups(folder: str) -> str:
    """Return the table of which head serves each set-up, or why none does."""
    rows = []
    for label, keys, adapter, shared in SETUPS:
        own = {key: value for key, value in keys.items() if key not in ("fsdp", "deepspeed", "loss_type")}
        args = BLConfig(**{"output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, **own})
        if "fsdp" in keys:
            args.fsdp_plugin_args = {"fsdp_version": keys["fsdp"]["version"]}
        args.loss_type = keys.get("loss_type", args.loss_type)
        args.parallelism_config = SimpleNamespace(**{**FULL, **shared}) if shared else None
        peft_config = adapter() if adapter else None
        found = said(partial(check_setup, args, peft_config))
        rows.append((label, head_of(args) if found == "✓" else f"refused: {found}"))
    return table(("set-up", "head"), rows)


def check_setup(args: Any, peft_config: Any) -> None:
    """Run the checks of a recipe that come before its model loads."""
    refuse_bypass(args)
    refuse_lm_head_adapter(peft_config)
    refuse_virtual_tokens(peft_config, args)


def head_of(args: Any) -> str:
    """Return which head a trainer of these arguments chooses."""
    trainer: Any = SimpleNamespace(args=args, accelerator=SimpleNamespace(parallelism_config=args.parallelism_config))
    trainer.is_shared_out = partial(ScoringTrainer.is_shared_out, trainer)
    reason = ScoringTrainer._why_reference_head(trainer)
    return "own" if reason is None else f"TRL's, since {reason}"


def main(folder: str = str(ROOT / "docs" / "reference")) -> None:
    """Put the tables between their markers."""
    page = (ROOT / "docs" / "reference" / "loss-head.md").read_text()
    with tempfile.TemporaryDirectory() as output:
        tables = {"families": families(), "set-ups": setups(output)}
    for name, found in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = before + start + found + end + rest.split(end)[1]
    Path(folder, "loss-head.md").write_text(page)


if __name__ == "__main__":
    main(*sys.argv[1:])
