"""Train by ms-swift's own entry, and record it: `python swift_run.py WORK double`."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from record import STEPS, record

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "configs/adapters/swift.yaml").read_text(encoding="utf-8"))
WORK = Path(sys.argv[1])
TINY = {
    "model": str(WORK / "model"), "model_type": "qwen2", "template": "qwen", "dataset": str(WORK / "chats.jsonl"),
    "gradient_accumulation_steps": 2, "learning_rate": 0.0, "max_steps": STEPS, "torch_dtype": "float32", "save_strategy": "no",
    "use_cpu": True, "max_grad_norm": 0.0, "use_hf": True, "split_dataset_ratio": 0, "report_to": "none",
    "gradient_checkpointing": False, "attn_impl": "sdpa", "dataset_num_proc": 1, "dataloader_num_workers": 0,
}  # fmt: skip


def run(case: dict[str, Any], output: Path) -> None:
    from swift.cli.main import parse_yaml_args
    from swift.pipelines import sft_main

    plugin = WORK / f"plugin_{output.name.replace('-', '_')}.py"
    plugin.write_text(f"from bl_trainer.adapters.swift import register\n\nregister(**{case!r})\n", encoding="utf-8")
    config = output.with_suffix(".yaml")
    settings = {**RECIPE, **TINY, "external_plugins": str(plugin), "output_dir": str(output)}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    arguments = [str(config)]
    parse_yaml_args(arguments)
    sft_main(arguments)


if __name__ == "__main__":
    record("swift", {name: version(name) for name in ("ms-swift", "transformers", "torch")}, run)
