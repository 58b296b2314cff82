"""Train by LLaMA-Factory's own entry, and record it: `python llamafactory_run.py WORK double [packed]`."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from record import STEPS, record

from bl_trainer.adapters.llamafactory import train

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "configs/adapters/llamafactory.yaml").read_text(encoding="utf-8"))
WORK = Path(sys.argv[1])
TINY = {
    "model_name_or_path": str(WORK / "model"), "dataset": "chats", "dataset_dir": str(WORK), "gradient_accumulation_steps": 2,
    "learning_rate": 0.0, "max_steps": STEPS, "bf16": False, "use_cpu": True, "flash_attn": "sdpa", "save_strategy": "no",
    "overwrite_cache": True, "overwrite_output_dir": True, "max_grad_norm": 0.0, "disable_gradient_checkpointing": True,
}  # fmt: skip

# Its mask, of an example each, is in float32
PACKED = {"neat_packing": True, "cutoff_len": 400} if sys.argv[3:] == ["packed"] else {}


def run(case: dict[str, Any], output: Path) -> None:
    own = {key: value for key, value in RECIPE.items() if key not in ("objective", "threshold")}
    train({**own, **TINY, **PACKED, **case, "output_dir": str(output)})


if __name__ == "__main__":
    record(
        "llamafactory-packed" if PACKED else "llamafactory",
        {name: version(name) for name in ("llamafactory", "transformers", "torch")},
        run,
    )
