"""What the fork server imports once for all runs. Nothing is computed, so that a fork finds no thread and no CUDA context."""

import gc
import os

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # an import that asks for a GPU would make a context otherwise

import accelerate.commands.launch  # noqa: F401

import bl_trainer.cli
import bl_trainer.diagnosis.options
import bl_trainer.diagnosis.page
import bl_trainer.diagnosis.run
import bl_trainer.diagnosis.terminal
import bl_trainer.evaluation
import bl_trainer.recipe.recipe
import bl_trainer.training.trainer  # noqa: F401

gc.freeze()  # each run ends with a full collection, which would copy all that was imported
