"""Gradients formed block by block."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp
from torch.torch_version import TorchVersion

from ..objectives.pricing import Price
from .blocks import Blocks, has_wide_products, slices


def adds_to_wide(version: str) -> bool:
    """Return whether this torch adds a product of half-precision matrices to a float32 matrix on CUDA, as since 2.10."""
    return TorchVersion(version) >= "2.10"


ADDS_TO_WIDE = adds_to_wide(torch.__version__)

# Rows that a GPU multiplies at a time: each time it reads and writes the whole gradient in the weight, in float32, which takes
# as long as the product itself at about 800 rows
FLUSH_ROWS = 3072


class Gradients:
    """Collects rows of the gradient in the logits, and multiplies many of them at a time."""

    def __init__(self, blocks: Blocks, needs: list[bool]):
        self.blocks, self.needs = blocks, needs
        tokens, (vocabulary, size) = len(blocks.hidden), blocks.weight.shape
        shapes = ((tokens, size), (vocabulary, size), (vocabulary,))
        self.totals = [
            blocks.weight.new_zeros(shape, dtype=blocks.wide) if need else None
            for shape, need in zip(shapes, needs, strict=True)
        ]
        self.rows = blocks.empty(self._capacity(tokens) if any(needs) else 0, blocks.dtype)
        in_place = any(needs) and blocks.dtype == blocks.wide and not blocks.uses_triton
        self.buffer = None if in_place else blocks.empty(blocks.rows)
        # float16 can't hold small probabilities, nor hidden states times large weights: both are brought into its range
        self.gain = 2.0**10 if blocks.dtype == torch.float16 else 1.0
        self._empty()

    def _empty(self) -> None:
        self.start = 0  # of the first collected block
        self.weighs: list[Tensor] = []
        self.scale: list[Tensor] = []
        self.used: int | Tensor = 0  # rows that are filled
        self.bound = 0  # what that is at most, where the device alone knows

    def _capacity(self, tokens: int) -> int:
        """Return how many rows to collect before they are multiplied."""
        blocks, rows = self.blocks, 2 * self.blocks.rows
        if blocks.hidden.device.type != "cpu":
            fitting = blocks.free // 4 // (len(blocks.weight) * blocks.dtype.itemsize)
            whole = math.ceil(min(FLUSH_ROWS, fitting) / max(blocks.rows, 1))
            rows = max(rows, whole * blocks.rows)
        return min(rows, tokens)

    def room(self, rows: slice) -> Tensor:
        """Return memory for the logits of `rows`, among which those that weigh something will stay."""
        if any(self.needs) and self.bound + rows.stop - rows.start > len(self.rows):
            self.flush()
        return self.rows[self.bound :] if self.buffer is None else self.buffer

    def add(self, rows: slice, block: Any, price: Price) -> None:
        """Keep the rows of a block that weigh something."""
        scale = price.weight
        if price.entropy_slope is not None:  # the block's rows are the whole gradient then, over a scale that fits float16
            scale = torch.maximum(price.weight.abs(), price.entropy_slope.abs())
            unit = torch.where(scale == 0, 1, scale)
            price = price._replace(weight=price.weight / unit, entropy_slope=price.entropy_slope / unit)
        weighs = scale != 0
        if not self.weighs:
            self.start = rows.start
        if len(weighs):
            self.used = block.write(weighs, price, self.gain, self.rows, self.used)
        self.bound = self.used if isinstance(self.used, int) else self.bound + len(weighs)
        self.weighs.append(weighs)
        self.scale.append(scale)

    def flush(self) -> None:
        """Multiply the collected rows with the weight and the hidden states. Waits for the device once."""
        if not self.weighs:
            return
        blocks, found = self.blocks, torch.cat(self.weighs).nonzero()[:, 0]
        # The scale is not rounded: that would be an error of all its row
        index, scale = found + self.start, torch.cat(self.scale)[found, None] * blocks.head.scale
        self._empty()
        if not len(index):
            return
        rows = self.rows[: len(index)]
        unit = 2.0 ** math.frexp(scale.abs().max().item())[1] if blocks.dtype == torch.float16 else 1.0
        in_hidden, in_weight, in_bias = self.totals
        if in_hidden is not None:
            in_hidden.index_copy_(0, index, _in_hidden(rows, blocks.weight, blocks.wide) * (scale / self.gain))
        if in_weight is not None:
            states = (blocks.hidden.index_select(0, index) * (scale / unit)).to(blocks.dtype)
            _add_in_weight(in_weight, rows, states, unit / self.gain)
        if in_bias is not None:
            _add_in_bias(in_bias, rows, scale[:, 0] / self.gain)

    def finish(self) -> list[Tensor | None]:
        """Return the gradients in hidden states, weight and bias, None where none is needed."""
        self.flush()
        shard, in_hidden = self.blocks.head.shard, self.totals[0]
        if shard is not None and in_hidden is not None:
            shard.reduced(in_hidden, ReduceOp.SUM)
        return self.totals


def _in_hidden(rows: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    """Return rows @ weight in type `wide`."""
    if rows.dtype == wide:
        return torch.mm(rows, weight)
    if has_wide_products(rows):
        return torch.mm(rows, weight, out_dtype=wide)
    total = rows.new_zeros(len(rows), weight.shape[1], dtype=wide)
    for part in slices(len(weight)):
        total.addmm_(rows[:, part].to(wide), weight[part].to(wide))
    return total


def _add_in_weight(total: Tensor, rows: Tensor, hidden: Tensor, alpha: float) -> None:
    """Add alpha rows^T @ hidden to `total`."""
    if total.dtype == rows.dtype:
        total.addmm_(rows.t(), hidden, alpha=alpha)
    elif has_wide_products(total) and ADDS_TO_WIDE:
        torch.addmm(total, rows.t(), hidden, out_dtype=total.dtype, alpha=alpha, out=total)
    elif has_wide_products(total):
        for part in slices(len(total)):
            total[part].add_(torch.mm(rows[:, part].t(), hidden, out_dtype=total.dtype), alpha=alpha)
    else:
        wide = hidden.to(total.dtype)
        for part in slices(len(total)):
            total[part].addmm_(rows[:, part].to(total.dtype).t(), wide, alpha=alpha)


def _add_in_bias(total: Tensor, rows: Tensor, scale: Tensor) -> None:
    """Add rows^T @ scale to `total`; `scale` is not rounded to the type of `rows`."""
    for part in slices(len(total)):
        total[part].addmv_(rows[:, part].to(total.dtype).t(), scale)
