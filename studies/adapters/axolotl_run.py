"""Train by axolotl's own entry, and record it: `python axolotl_run.py WORK double`."""

import functools
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from record import STEPS, record

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "configs/adapters/axolotl.yaml").read_text(encoding="utf-8"))
WORK = Path(sys.argv[1])
CHATS = {"path": str(WORK / "chats.jsonl"), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}
TINY = {
    "base_model": str(WORK / "model"), "datasets": [CHATS], "gradient_accumulation_steps": 2, "learning_rate": 1e-30,
    "max_steps": STEPS, "bf16": False, "fp16": False, "tf32": False, "max_grad_norm": 0.0, "save_strategy": "no",
    "sdp_attention": True, "use_tensorboard": False, "val_set_size": 0, "special_tokens": {}, "sequence_len": 512,
    "dataset_prepared_path": str(WORK / "axolotl-prepared"), "dataset_num_proc": 1,
}  # fmt: skip


def on_cpu(loader: Any, place: Any) -> None:
    """Have the model on the CPU, where axolotl gives each of several processes a GPU."""
    loader.cfg.device_map = "cpu"
    place(loader)


def run(case: dict[str, Any], output: Path) -> None:
    from axolotl.cli.train import do_cli

    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**RECIPE, **TINY, "bl_trainer": case, "output_dir": str(output)}), encoding="utf-8")
    do_cli(str(config))


if __name__ == "__main__":
    from axolotl.loaders.model import ModelLoader

    ModelLoader._set_device_map_config = functools.partialmethod(on_cpu, ModelLoader._set_device_map_config)
    record("axolotl", {name: version(name) for name in ("axolotl", "transformers", "torch")}, run)
