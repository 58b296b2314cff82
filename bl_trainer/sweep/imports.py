"""What the fork server imports once for all runs. Nothing is computed, so that a fork finds no thread and no CUDA context."""

import contextlib
import gc
import os

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # an import that asks for a GPU would make a context otherwise

import bl_trainer._util.accelerate
import bl_trainer.cli
import bl_trainer.diagnosis.options
import bl_trainer.diagnosis.page
import bl_trainer.diagnosis.run
import bl_trainer.diagnosis.terminal
import bl_trainer.evaluation
import bl_trainer.recipe.recipe
import bl_trainer.training.trainer  # noqa: F401

with contextlib.suppress(Exception):  # of many kinds on a machine that it can't serve
    import deepspeed  # noqa: F401, which accelerate imports at the end of each run if it is installed

gc.freeze()  # each run ends with a full collection, which would copy all that was imported
