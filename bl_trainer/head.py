"""What the model says about each target token, from the last hidden states; a batch's logits are never held."""

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from trl.trainer.utils import maybe_gather_lm_head_ctx

# Config attributes by which model families multiply their logits
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Elements of a block of logits. On a CPU the most for which glibc reuses memory (32 MiB); fewer rows read the weight more often
BLOCK = {"cpu": 7 * 2**20, "other": 2**26}


class Head(NamedTuple):
    """A model's LM head: logits = softcap(scale (hidden weight^T + bias)), in float32 or wider."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """Return the head of a transformers causal language model."""
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        weight, bias = module.weight, getattr(module, "bias", None)
        if isinstance(weight, DTensor):
            weight, bias = weight.full_tensor(), bias.full_tensor() if isinstance(bias, DTensor) else bias
        scales = [getattr(config, name, None) for name in MULTIPLIERS]
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None:
            scales.append(divisor if config.model_type == "hyperclovax" else 1 / divisor)
        scale = next((float(scale) for scale in scales if scale is not None), 1.0)
        return cls(weight, bias, scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits, (tokens, vocabulary), of `hidden`, (tokens, hidden size)."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1:
            logits *= self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def blocks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the logits of a few rows of `hidden` at a time, and which rows they are."""
        budget = BLOCK["cpu" if hidden.device.type == "cpu" else "other"]
        size = max(1, budget // self.weight.shape[0])
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            yield rows, self(hidden[rows])


@dataclass
class TokenScores:
    """What a model says about each of N target tokens; all tensors are (N,), float32 where not said otherwise.

    `logp`: log-probability of the target. `entropy`: of the next-token distribution, in nats. `top1`, `top1_logp`: the most
    probable token (its id, int64) and its log-probability. `rank`: how many tokens are more probable than the target
    (int64), 0 if it is the most probable.
    """

    logp: Tensor
    entropy: Tensor
    top1: Tensor
    top1_logp: Tensor
    rank: Tensor

    def cpu(self) -> "TokenScores":
        """Return the same on the CPU."""
        return TokenScores(*(getattr(self, f.name).cpu() for f in fields(self)))


def score(hidden: Tensor, head: Head, target: Tensor) -> TokenScores:
    """Score the tokens `target`, (N,) int64, that follow `hidden`, (N, hidden size). Without gradient.

    Probabilities near 1 keep their distance from 1: log p = -log1p(sum of the others' odds), formed without cancellation.
    """
    parts = [score_block(logits, target[rows]) for rows, logits in head.blocks(hidden)]
    if not parts:
        parts = [score_block(head(hidden), target)]
    return TokenScores(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenScores)))


def score_block(logits: Tensor, target: Tensor) -> TokenScores:
    """Score from `logits`, (rows, vocabulary), which it overwrites."""
    at_target = logits.gather(1, target[:, None])
    top, top1 = logits.max(dim=1, keepdim=True)
    work = torch.empty_like(logits)
    rank = torch.gt(logits, at_target, out=work).sum(dim=1).long()  # as floats: counting booleans is several times slower
    odds = torch.exp(logits.sub_(top), out=work).scatter_(1, top1, 0.0)  # of all but the most probable, relative to it
    others = odds.sum(dim=1)
    log_total = others.log1p()
    entropy = log_total - logits.mul_(odds).sum(dim=1) / (1 + others)
    return TokenScores((at_target - top).squeeze(1) - log_total, entropy, top1.squeeze(1), -log_total, rank)


@dataclass
class TokenDivergences:
    """How far a tuned model's next-token distribution q is from the base model's p, at each of N target tokens; all (N,).

    `forward` = KL(p || q), `reverse` = KL(q || p), `js`: Jensen-Shannon divergence, all in nats over the full vocabulary.
    """

    forward: Tensor
    reverse: Tensor
    js: Tensor

    def cpu(self) -> "TokenDivergences":
        """Return the same on the CPU."""
        return TokenDivergences(self.forward.cpu(), self.reverse.cpu(), self.js.cpu())


def compare(hidden: Tensor, head: Head, base_hidden: Tensor, base_head: Head) -> TokenDivergences:
    """Compare two models' next-token distributions after `hidden` and `base_hidden`, both (N, hidden size).

    Holds two blocks of logits. Raises ValueError if the vocabularies differ in size.
    """
    sizes = base_head.weight.shape[0], head.weight.shape[0]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The base model has a vocabulary of {sizes[0]} tokens, the compared one of {sizes[1]}: their distributions can't "
            "be compared. Compare checkpoints of the same model."
        )
    parts = []
    for rows, logits in head.blocks(hidden):
        base, tuned = base_head(base_hidden[rows]).log_softmax(dim=1), logits.log_softmax(dim=1)
        p, q, gap = base.exp(), tuned.exp(), base - tuned
        middle = torch.logaddexp(base, tuned) - torch.tensor(2.0).log()
        js = (torch.linalg.vecdot(p, base - middle) + torch.linalg.vecdot(q, tuned - middle)) / 2
        parts.append((torch.linalg.vecdot(p, gap), -torch.linalg.vecdot(q, gap), js))
    if not parts:
        return TokenDivergences(*(hidden.new_zeros(0) for _ in range(3)))
    return TokenDivergences(*(torch.cat(column) for column in zip(*parts, strict=True)))


def add_scoring(model: Any) -> None:
    """Let `model(..., labels=labels, use=f)` return f(hidden, head, target) of its target tokens.

    `hidden`: (N, hidden size), `target`: (N,) the labels that are not -100, in reading order, each with the hidden state that
    predicts it. Everything runs inside the model's forward, so that sharded and autocast models work as in training.
    """
    original = model.forward.__func__

    @functools.wraps(original)  # `generate` checks its arguments against the signature
    def forward(self: Any, *args: Any, use: Any = None, **kwargs: Any) -> Any:
        if use is None:
            return original(self, *args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, -labels.shape[1] - 1 : -1]
        module = self.get_output_embeddings()
        hidden, labels = hidden.to(module.weight.device), labels.to(module.weight.device)
        is_target = labels != -100
        parameters = [parameter for parameter in (module.weight, getattr(module, "bias", None)) if parameter is not None]
        with maybe_gather_lm_head_ctx(*parameters):
            return use(hidden[is_target], Head.of(self), labels[is_target])

    model.forward = types.MethodType(forward, model)
