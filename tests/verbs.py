"""What `test_diagnosis.py` forks: several verbs, one after the other, in the same processes."""

import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import torch

import bl_trainer.cli
from bl_trainer.measurement import percentiles


def run(argv, cache):
    """Run a verb whose processes measure for themselves."""
    percentiles.CACHE = cache
    bl_trainer.cli.main(argv)


def main(path):
    bl_trainer.cli.end = lambda trainer: trainer.accelerator.wait_for_everyone()  # the processes go on
    for name, argv in json.loads(Path(path).read_text()).items():
        with open(Path(path).with_name(f"{name}.{os.environ['RANK']}.txt"), "w") as file, redirect_stdout(file):
            bl_trainer.cli.main(argv)
    torch.distributed.destroy_process_group()
