"""A model's LM head."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor import Shard as Rows

from ..errors import RecipeError

# Config attributes by which model families multiply their logits
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")

# and by which they bound them, the first as most do
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Shard(NamedTuple):
    """A process's part, from token `start` on, of a `vocabulary` that the processes of `group` share out."""

    group: Any
    start: int
    vocabulary: int

    def own(self, target: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return token ids as indices of this part, of `size` tokens, 0 for those of another part; and which are of this."""
        is_here = (target >= self.start) & (target < self.start + size)
        return torch.where(is_here, target - self.start, 0), is_here

    def gathered(self, values: Tensor) -> Tensor:
        """Return what each process has as `values`, (processes, *values.shape), without gradient."""
        processes = dist.get_world_size(self.group)
        found = values.new_empty(processes * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(found, values, group=self.group)
        return found.view(processes, *values.shape)

    def joined(self, part: Tensor) -> Tensor:
        """Return all parts of a tensor whose rows are the vocabulary's, in order."""
        room = part.new_zeros(_rows_each(self.vocabulary, dist.get_world_size(self.group)), *part.shape[1:])
        room[: len(part)] = part
        return self.gathered(room).flatten(0, 1)[: self.vocabulary]

    def reduced(self, values: Tensor, operation: Any) -> Tensor:
        """Return `values` reduced over the processes, in place, without gradient."""
        dist.all_reduce(values, operation, group=self.group)
        return values


class Head(NamedTuple):
    """A model's LM head: logits = softcap(scale (hidden weight^T + bias)), in float32 or wider.

    With a `shard`, weight and bias are those of this process's part of the vocabulary.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    shard: Shard | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, in all parts."""
        return len(self.weight) if self.shard is None else self.shard.vocabulary

    def whole(self) -> "Head":
        """Return the head of the whole vocabulary, without gradient."""
        shard = self.shard
        if shard is None:
            return self
        bias = None if self.bias is None else shard.joined(self.bias.detach())
        return self._replace(weight=shard.joined(self.weight.detach()), bias=bias, shard=None)

    @classmethod
    def of(cls, model: Any) -> "Head":
        """Return the head of a transformers causal language model. Raises RecipeError if it isn't a matrix of floats."""
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        leaves = [getattr(module, name, None) for name in ("weight", "bias")]
        shard = _shard_of(leaves[0]) if (getattr(model, "_tp_size", None) or 1) > 1 else None
        weight, bias = (whole(leaf) if shard is None else _own(leaf) for leaf in leaves)
        if bias is None and getattr(getattr(module, "original_module", None), "bias", None) is not None:
            raise RecipeError(
                f"Cannot train tokens of the LM head of {type(model).__name__}: PEFT leaves out the head's bias. Remove the "
                "head's tokens from `trainable_token_indices`."
            )
        if weight is None or weight.ndim != 2 or not weight.is_floating_point() or weight.itemsize < 2:
            kind = "no weight" if weight is None else f"a weight of {weight.dtype} and shape {tuple(weight.shape)}"
            raise RecipeError(
                f"The LM head, {type(module).__name__}, has {kind}, which gives no probabilities. Leave the head out of "
                "quantization (`llm_int8_skip_modules: [lm_head]`), and out of FSDP1's units of their own."
            )
        scales = [getattr(config, name, None) for name in MULTIPLIERS]
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None:
            scales.append(divisor if config.model_type == "hyperclovax" else 1 / divisor)
        scale = next((float(scale) for scale in scales if scale is not None), 1.0)
        softcaps = (getattr(config, name, None) for name in SOFTCAPS)
        return cls(weight, bias, scale, next((softcap for softcap in softcaps if softcap is not None), None), shard)


def _shard_of(weight: Any) -> Shard | None:
    """Return this process's part of a head that tensor parallelism cuts up, None where it is whole."""
    if not isinstance(weight, DTensor) or weight.placements != (Rows(0),):
        return None
    mesh, vocabulary = weight.device_mesh, len(weight)
    return Shard(mesh.get_group(), first_token(vocabulary, mesh.size(), mesh.get_local_rank()), vocabulary)


def first_token(vocabulary: int, processes: int, rank: int) -> int:
    """Return the first token of a process's part of the head. Raises RecipeError if some process has none, on all of them."""
    each = _rows_each(vocabulary, processes)
    if each * (processes - 1) >= vocabulary:
        raise RecipeError(
            f"The LM head has {vocabulary} tokens, which leaves some of {processes} processes without any. Use fewer processes "
            "for tensor parallelism."
        )
    return rank * each


def _rows_each(vocabulary: int, processes: int) -> int:
    """Return how many tokens a part has, but for the last ones."""
    return math.ceil(vocabulary / processes)


def _own(parameter: Any) -> Any:
    """Return this process's part of a parameter; each token's gradient is formed where its part is."""
    return None if parameter is None else parameter.to_local()


def whole(parameter: Any) -> Any:
    """Gather a parameter that FSDP2 shards as a unit of its own; its gradient is the mean over processes, as FSDP2's are."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
