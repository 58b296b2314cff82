"""What `test_faults.py` runs in processes of their own: the train verb, with a fault put into it."""

import os
import resource
import signal
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainerState

import bl_trainer.training.checkpoints
from bl_trainer import BLTrainer
from bl_trainer.cli import main

CALLS = {
    "step": (Trainer, "training_step"),
    "evaluation": (BLTrainer, "prediction_step"),
    "weights": (BLTrainer, "save_model"),
    "optimizer": (Trainer, "_save_optimizer_and_scheduler"),
    "rng": (BLTrainer, "_save_rng_state"),
    "state": (TrainerState, "save_to_json"),
    "saved": (Trainer, "_save_checkpoint"),  # before the manifest
    "manifest": (bl_trainer.training.checkpoints, "write_manifest"),
    "card": (BLTrainer, "create_model_card"),
}


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk(*_):
    """Let no file grow beyond 20 kB; Python ignores the signal, so that writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


class Cut:
    """Cuts a file of the last checkpoint short, or removes it, and kills the process: what a kill while writing leaves."""

    def __init__(self, name, to=0.5):
        self.name, self.to = name, to

    def __call__(self, folder):
        path = max(Path(folder).glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1])) / self.name
        size = path.stat().st_size
        os.truncate(path, int(self.to * size))
        if self.to == 0:
            path.unlink()
        kill()


def put_in(fault, where, number, folder):
    """Call `fault(folder)` after the call `where` for the `number`th time."""
    owner, name = CALLS[where]
    original, calls = getattr(owner, name), []

    def faulty(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == number:
            fault(folder)
        return result

    setattr(owner, name, faulty)


def run(recipe, log, fault=None, where=None, number=1):
    """Train `recipe` in this process, with stdout and stderr in the file `log`."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(int(os.environ.get("BL_TEST_THREADS", 1)))
    sys.stdout.reconfigure(line_buffering=True)
    if fault is not None:
        put_in(fault, where, number, Path(recipe).parent / "out")
    main(["train", "--config", str(recipe)])


if __name__ == "__main__":  # under a launcher: the fault is that of one rank
    name, where, number, rank = sys.argv[2:6]
    if os.environ["RANK"] == rank:
        put_in({"kill": kill, "terminate": terminate}[name], where, int(number), None)
    torch.set_num_threads(int(os.environ.get("BL_TEST_THREADS", 1)))
    main(["train", "--config", sys.argv[1]])
