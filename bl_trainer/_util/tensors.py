"""Tensors that processes share out."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(parameter: Tensor) -> Tensor:
    """Return this process's share of a parameter that FSDP2 or ZeRO-3 shards, or all of it; no gradient."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    return getattr(parameter, "ds_tensor", parameter).detach()
