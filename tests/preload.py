"""What the fork server imports once: all that a training or a sweep does, and nothing is computed, so that forks are sound."""

import contextlib
import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed looks for accelerators when it is imported

import scipy.io
import scipy.stats  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import bl_trainer.recipe.recipe
import crashing  # noqa: F401

with contextlib.suppress(ImportError):  # the lowest environment lacks them
    import bl_trainer.sweep.verb  # noqa: F401
with contextlib.suppress(ImportError):
    import deepspeed.module_inject  # noqa: F401
with contextlib.suppress(ImportError):
    import gloo  # noqa: F401

gc.freeze()  # each training run ends with a full collection
