"""What a caller hands over, checked: logits, hidden states, labels."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from ..errors import LossError
from ..head.targets import IGNORED, Targets, shifted
from ..objectives.objective import Objective

# Outputs, of transformers, whose logits at t predict the label at t
ALIGNED = ("MaskedLMOutput", "Seq2SeqLMOutput", "Seq2SeqMoEOutput", "TokenClassifierOutput")


def gathered(value: Any) -> Any:
    """Return a value, and all of a tensor that several processes share, such as logits under tensor parallelism.

    Every process then computes the same loss. Its gradient is cut as the tensor was.
    """
    return value.full_tensor() if isinstance(value, DTensor) else value


def targets_of(labels: Tensor) -> Targets:
    """Return the targets of labels (batch, length), unshifted, or (N,), aligned; places are numbered as outputs are."""
    labels = labels.long()
    return Targets(labels if labels.ndim == 1 else pad(shifted(labels, IGNORED), (0, 1), value=IGNORED))


def at_targets(targets: Targets, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values, (N,), of columns of the labels' shape at the targets."""
    index = targets.index
    flat = {name: column.to(index.device).flatten() for name, column in columns.items()}
    return {name: flat[name][index + (column.ndim == 2)] for name, column in columns.items()}


def logits_of(outputs: Any) -> Tensor:
    """Return a model's logits, gathered. Raises LossError where there are none."""
    logits: Any = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None and isinstance(outputs, Tensor):
        raise LossError(
            f"Cannot compute the loss: got a tensor, {outputs.dtype} of shape {tuple(outputs.shape)}. Give the model's output "
            "or `{'logits': logits}`, and then the labels."
        )
    if logits is None and isinstance(outputs, (tuple, list)):
        raise LossError(
            f"Cannot compute the loss: the model's output is a {type(outputs).__name__}, without names. Call the model with "
            "`return_dict=True`."
        )
    if type(outputs).__name__ in ALIGNED:
        raise LossError(
            f"Cannot compute the loss: the model predicts each label at its own place ({type(outputs).__name__}). Use a causal "
            "language model."
        )
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.numel() or not logits.is_floating_point():
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
        what = "the model's output has no logits" if shape is None else f"the logits are {logits.dtype} of shape {shape}"
        raise LossError(
            f"Cannot compute the loss: {what}. Switch off the kernel that leaves them out, or use `fused_objective`. "
            "Liger's fused cross-entropy and chunked losses make none; Unsloth makes them with `UNSLOTH_RETURN_LOGITS=1`."
        )
    return gathered(logits)


def check_states(hidden: Any, weight: Any) -> None:
    """Raise LossError unless these are hidden states, and a head's weight that fits them."""
    for what, each, instead in (
        ("hidden states", hidden, "last_hidden_state` of the model's output"),
        ("weight", weight, "lm_head.weight`"),
    ):
        if not isinstance(each, Tensor):
            raise LossError(f"Cannot compute the loss: got {type(each).__name__} for the {what}. Give `{instead}.")
    if hidden.ndim not in (2, 3) or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise LossError(
            f"Cannot compute the loss: hidden states of shape {tuple(hidden.shape)} do not fit a weight of shape "
            f"{tuple(weight.shape)}. Give (batch, length, H) or (N, H), and (vocabulary, H)."
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise LossError(
            f"Cannot compute the loss: hidden states are {hidden.dtype}, the weight is {weight.dtype}. Convert one of them, or "
            "use autocast."
        )


def check_bounds(scale: Any, softcap: Any) -> None:
    """Raise LossError unless the scale of logits is a number, and their bound one above 0 or None."""
    if not isinstance(scale, Real) or not (softcap is None or (isinstance(softcap, Real) and float(softcap) > 0)):
        raise LossError(
            f"Cannot compute the loss: `scale` {scale!r} must be a number, `softcap` {softcap!r} a number above 0 or None. "
            "Multiply hidden states by a scale that trains."
        )


def check_labels(labels: Any, shape: torch.Size, vocabulary: int, of: str) -> bool:
    """Raise LossError unless `labels` are ids of the vocabulary, one for each of the model's outputs.

    Returns whether a row's first token is a label, which nothing predicts. One synchronisation for both.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise LossError(
            f"Cannot compute the loss: labels are {got}, not token ids. Give an integer tensor, -100 where no target is."
        )
    if labels.shape != shape:
        raise LossError(
            f"Cannot compute the loss: labels have shape {tuple(labels.shape)}, the {of} {tuple(shape)}. Give labels that are "
            "neither shifted nor truncated; the loss shifts them itself."
        )
    is_wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= vocabulary)
    has_wrong, has_first = torch.stack([is_wrong.any(), (labels[..., :1] != IGNORED).any()]).tolist()
    if has_wrong:
        wrong = labels[is_wrong][0].item()
        raise LossError(
            f"Cannot compute the loss: a label is {wrong}, outside of the vocabulary of {vocabulary} tokens. Write -100 where "
            "no target is; for added tokens call `model.resize_token_embeddings(len(tokenizer))`."
        )
    return bool(has_first)


def read_targets(labels: Any, logp: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the ids of tokens, and which are targets."""
    if not isinstance(logp, Tensor) or not logp.is_floating_point():
        got = str(logp.dtype) if isinstance(logp, Tensor) else type(logp).__name__
        raise LossError(f"Cannot price tokens: log p is {got}. Give a float tensor of log-probabilities.")
    if not isinstance(labels, Tensor) or labels.shape != logp.shape or labels.is_floating_point() or labels.is_complex():
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise LossError(
            f"Cannot price tokens: labels are {got}, log p has shape {tuple(logp.shape)}. Give one token id per log p, "
            "-100 where no target is, or a bool mask of targets."
        )
    labels = labels.to(logp.device)
    if labels.dtype != torch.bool:
        if labels.numel() and ((labels == 0) | (labels == 1)).all():
            raise LossError("Cannot price tokens: the labels are 0 and 1, as a mask's are. Give `mask.bool()`.")
        return labels.long(), labels != IGNORED
    if "label" in objective.statistics:
        raise LossError(f"Cannot price tokens: objective {objective.name!r} needs token ids, labels are a mask. Give ids.")
    return labels.long(), labels
