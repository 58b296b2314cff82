"""What `test_faults.py` runs in processes of their own: the train verb, with a fault put into it."""

import os
import resource
import signal
from pathlib import Path

from transformers import Trainer, TrainerState

import bl_trainer.training.checkpoints
from bl_trainer import BLTrainer
from bl_trainer.cli import main
from forking import write_to

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
    write_to(log)
    if fault is not None:
        put_in(fault, where, number, Path(recipe).parent / "out")
    main(["train", "--config", str(recipe)])


def run_rank(recipe, fault, where, number, rank):
    """Train `recipe` in this process, one of several; the fault is that of one rank."""
    if os.environ["RANK"] == rank:
        put_in(fault, where, number, None)
    main(["train", "--config", str(recipe)])
