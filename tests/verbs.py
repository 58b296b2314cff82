"""What `test_diagnosis.py` and `test_scores.py` fork: several verbs, one after the other, in the same processes."""

import itertools
import json
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch

import bl_trainer.cli
from bl_trainer.diagnosis import score_files
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


def score(argvs, rows_per_file, killed_at):
    """Run `diagnose --scores` with files of so many rows, and die in the middle of writing one, if at all."""
    score_files.FEWEST, count = rows_per_file, itertools.count(1)
    write = score_files.pq.write_table

    def torn(table, path):
        write(table, path)
        if next(count) == killed_at:
            os.truncate(path, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    score_files.pq = SimpleNamespace(
        write_table=torn, read_table=score_files.pq.read_table, read_schema=score_files.pq.read_schema
    )
    bl_trainer.cli.end = lambda trainer: trainer.accelerator.wait_for_everyone()
    for argv in argvs:
        bl_trainer.cli.main(argv)
