"""A stack of small transformers of one shape, computed as one: every weight has the models as its first axis."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder: pre-norm without gains, learnt positions, squared ReLU, no biases, no tied weights."""

    width: int
    heads: int
    layers: int
    vocabulary: int
    length: int  # tokens of its longest input

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of each matrix, in the order of a model's weights. `embed` has tokens, then places."""
        d = self.width
        layer = {"attention": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
        layers = {f"{name}{i}": size for i in range(self.layers) for name, size in layer.items()}
        return {"embed": (self.vocabulary + self.length, d), **layers, "head": (d, self.vocabulary)}

    @property
    def count(self) -> int:
        """Weights of a model."""
        return sum(rows * columns for rows, columns in self.matrices.values())


def initial(shape: Shape, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights of one new model, (count,): normal, of standard deviation 0.3 over the root of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, (rows, columns) in shape.matrices.items():
        scale = (
            0.1 if name == "embed" else 0.0 if name == "head" else (1 if name[:2] in ("at", "up") else 0.3) / math.sqrt(rows)
        )
        parts.append(scale * torch.randn(rows * columns, generator=generator, dtype=torch.float64))
    return torch.cat(parts).to(dtype)


def unpack(shape: Shape, stack: Tensor) -> dict[str, Tensor]:
    """Return views of a stack of weights, (models, count), by name: each (models, inputs, outputs)."""
    sizes = [rows * columns for rows, columns in shape.matrices.values()]
    parts = stack.split(sizes, dim=1)
    return {name: part.unflatten(1, size) for (name, size), part in zip(shape.matrices.items(), parts, strict=True)}


def logits(shape: Shape, weights: dict[str, Tensor], tokens: Tensor, first: int = 0) -> Tensor:
    """Return logits (models, rows, length - first, vocabulary) of the next token, at the places from `first` on.

    `tokens`: ids, (models, rows, length): each model has rows of its own.
    """
    models, rows, length = tokens.shape
    dtype = weights["embed"].dtype
    embed, places = weights["embed"].split([shape.vocabulary, shape.length], dim=1)
    hot = one_hot(tokens.flatten(1), shape.vocabulary).to(dtype)  # a product: its gradient is one too, where an index's is slow
    x = (hot @ embed).unflatten(1, (rows, length)) + places[:, None, :length]
    x = x.flatten(1, 2)
    for i in range(shape.layers):
        parts = (_norm(x) @ weights[f"attention{i}"]).view(models * rows, length, 3, shape.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(models, rows * length, shape.width) @ weights[f"out{i}"]
        x = x + SquaredRelu.apply(_norm(x) @ weights[f"up{i}"]) @ weights[f"down{i}"]
    x = x.unflatten(1, (rows, length))[:, :, first:].flatten(1, 2)
    return (_norm(x) @ weights["head"]).view(models, rows, length - first, shape.vocabulary)


def _norm(x: Tensor) -> Tensor:
    return Norm.apply(x)


class Norm(torch.autograd.Function):
    """x over the root of its mean square, plus a little; autograd's own reads memory three times as often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = math.sqrt(x.shape[-1]) / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (grads[0] * y).mean(-1, keepdim=True)
        return torch.addcmul(grads[0], y, along, value=-1).mul_(scale)


class SquaredRelu(torch.autograd.Function):
    """max(0, x)^2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grads[0] * positive).mul_(2)
