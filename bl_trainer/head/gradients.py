"""Gradients formed block by block."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ..objectives.pricing import Price
from .blocks import Blocks, has_wide_products, slices


def adds_to_wide(version: str) -> bool:
    """Return whether this torch adds a product of half-precision matrices to a float32 matrix on CUDA, as since 2.10."""
    return TorchVersion(version) >= "2.10"


ADDS_TO_WIDE = adds_to_wide(torch.__version__)


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
        self.rows = blocks.empty(min(2 * blocks.rows, tokens) if any(needs) else 0, blocks.dtype)
        in_place = any(needs) and blocks.dtype == blocks.wide and not blocks.uses_triton
        self.buffer = None if in_place else blocks.empty(blocks.rows)
        # float16 can't hold small probabilities, nor hidden states times large weights: both are brought into its range
        self.gain = 2.0**10 if blocks.dtype == torch.float16 else 1.0
        self.index: list[Tensor] = []
        self.scale: list[Tensor] = []
        self.filled = 0

    def room(self, rows: slice) -> Tensor:
        """Return memory for the logits of `rows`, among which those that weigh something will stay."""
        if any(self.needs) and self.filled + rows.stop - rows.start > len(self.rows):
            self.flush()
        return self.rows[self.filled :] if self.buffer is None else self.buffer

    def add(self, rows: slice, block: Any, price: Price) -> None:
        """Keep the rows of a block that weigh something."""
        scale = price.weight
        if price.entropy_slope is not None:  # the block's rows are the whole gradient then, over a scale that fits float16
            scale = torch.maximum(price.weight.abs(), price.entropy_slope.abs())
            unit = torch.where(scale == 0, 1, scale)
            price = price._replace(weight=price.weight / unit, entropy_slope=price.entropy_slope / unit)
        index = scale.nonzero()[:, 0]
        block.write(index, price, self.gain, self.rows[self.filled : self.filled + len(index)])
        self.filled += len(index)
        self.index.append(index + rows.start)
        self.scale.append(scale[index, None] * self.blocks.head.scale)

    def flush(self) -> None:
        """Multiply the collected rows with the weight and the hidden states."""
        if not self.filled:
            return
        blocks, rows = self.blocks, self.rows[: self.filled]
        # The scale is not rounded: that would be an error of all its row
        index, scale = torch.cat(self.index), torch.cat(self.scale)
        self.filled, self.index, self.scale = 0, [], []
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
