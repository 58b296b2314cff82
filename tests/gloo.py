"""What `test_launchers.py` launches: the verbs, with CPUs and gloo where accelerate wants GPUs, on which alone it shards."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import deepspeed.comm.torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from bl_trainer import BLTrainer
from bl_trainer.__main__ import main


class Dies(TrainerCallback):
    """Ends the last process, as the kernel does when memory is short, after the step that `DIES_AT` names."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ.get("DIES_AT", "-1")) and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Mortal(BLTrainer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs, callbacks=[Dies()])


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu":
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        deepspeed.comm.torch.build_shm_op = lambda: None  # compiled on first use, and gloo serves
    if sys.argv[1] == "train":
        import bl_trainer.trainer

        bl_trainer.trainer.BLTrainer = Mortal
    main(sys.argv[1:])
