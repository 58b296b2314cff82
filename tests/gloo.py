"""What `test_launchers.py` launches: the verbs, with CPUs and gloo where accelerate wants GPUs, on which alone it shards."""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention
from transformers import TrainerCallback

import bl_trainer.training.trainer
from bl_trainer import BLTrainer
from bl_trainer.cli import main


class Dies(TrainerCallback):
    """Ends the last process, as the kernel does when memory is short, after the step that `DIES_AT` names."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ.get("DIES_AT", "-1")) and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Mortal(BLTrainer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs, callbacks=[Dies()])


ATTEND = F.scaled_dot_product_attention


def attend_over_devices(seq_dim, mesh):
    """Stands in for torch's context-parallel attention, which has no CPU kernel: gathers keys and values instead."""
    ranks = mesh.size()

    def attention(query, key, value, **kwargs):
        whole = [DTensor.from_local(x, mesh, [Shard(seq_dim)]).full_tensor(grad_placements=[Partial()]) for x in (key, value)]
        # torch gives each rank a piece from the front and its counterpart from the back
        pieces = torch.arange(whole[0].shape[seq_dim]).chunk(2 * ranks)
        at = [torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]]) for rank in range(ranks)]
        kwargs.update(is_causal=False, attn_mask=at[mesh.get_local_rank()][:, None] >= torch.cat(at))
        return ATTEND(query, *whole, **kwargs)

    F.scaled_dot_product_attention = attention


def run(verb, argv):
    """Run a verb on CPUs where the launcher says so, and let the last rank of a training die where `DIES_AT` says so."""
    if os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu":
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        # Compiled on first use, and gloo serves. `deepspeed.comm.torch` is torch itself
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        _attention._enable_context_parallel_dispatcher_impl = attend_over_devices
        _attention._disable_context_parallel_dispatcher_impl = lambda: setattr(F, ATTEND.__name__, ATTEND)
    if verb == "train":
        bl_trainer.training.trainer.BLTrainer = Mortal
    main([verb, *argv])


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
