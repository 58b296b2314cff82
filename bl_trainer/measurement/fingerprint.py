"""A hash of a model and of batches, by which what was measured of them is found again."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from .._util.tensors import local
from ..tokens.names import NOT_FOR_THE_MODEL

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> what its bits are read as


def fingerprint(trainer: Any, batches: list[dict[str, Any]]) -> str:
    """Return a hash of the model (its configuration, precision, a sample of each tensor and its sum) and of the batches.

    Tensors are parameters, buffers, and what quantised layers store beside them. A LoRA adapter that does nothing yet is left
    out, so that runs of other rank or seed share the measurement.
    """
    config = {k: v for k, v in trainer.model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    setting = [4, trainer.args.bf16, trainer.args.fp16, json.dumps(config, sort_keys=True, default=str)]
    digest = hashlib.sha256(repr(setting).encode())
    tensors = _tensors(trainer.model)
    for name, tensor in tensors.items():
        pair = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if pair in tensors and "lora_" in name and not tensors[pair].any():
            continue
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        digest.update(f"{plain} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_digest(tensor))
    for batch in batches:
        for name, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor) and name not in NOT_FOR_THE_MODEL:
                digest.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return by name all that the model computes with, of sharded tensors this process's part."""
    found: dict[str, Tensor] = dict(model.named_buffers())  # among them those that aren't saved
    for prefix, module in model.named_modules():
        # One module at a time, since the state of a sharded model is gathered
        module._save_to_state_dict(found, f"{prefix}." if prefix else "", True)
    return {name: local(tensor) for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _digest(tensor: Tensor) -> bytes:
    """Return a sample of a tensor and the sum of its bits, which no order of summation changes."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    step = max(1, tensor.numel() // 1024)
    wide = torch.float32 if tensor.is_floating_point() else torch.int64
    total = tensor.contiguous().view(BITS[tensor.element_size()]).sum(dtype=torch.int64)
    return tensor.flatten()[::step].to(wide).cpu().numpy().tobytes() + total.cpu().numpy().tobytes()
