"""Measure whether a loss head computes what the model's own logits say, before anything trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from .lm_head import Head
from .ops import score

TOKENS = 8
HEADS = {"own": "bl_trainer's loss head", "trl": "TRL's loss head"}
PRECISION = 1e-4  # of float32 and wider, in which outliers among hidden states cancel


class Measured(NamedTuple):
    """Log-probabilities (N,) of labels, and the tensors whose graph leads to all parameters that train by them."""

    logp: Tensor
    roots: tuple[Tensor | None, ...]


def verify_head(model: Any, kind: str = "own", *, trains: bool = True) -> None:
    """Compare the loss head `kind`, a key of `HEADS`, with the logits that `model` computes itself.

    Args:
        model: A causal language model after `add_scoring`, or a PEFT model around it. It is left as it was.
        trains: Whether to compare the trainable parameters that both depend on, too; not possible in a sharded model.

    Raises:
        ValueError: If log-probabilities of `TOKENS` tokens differ beyond the rounding of the model's type, if a trainable
            parameter would get no gradient, or if one of the two can't be computed.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    name = type(base).__name__
    with _evaluating(model, trains), torch.set_grad_enabled(trains):
        with _explained(f"Cannot train {name}: its own forward pass fails"):
            inputs = _tokens(base)
            logits, precision = _own_logits(model, base, inputs)
        labels = _extremes(logits)
        with _explained(f"Cannot train {name} with {HEADS[kind]}"):
            found = (_own_head if kind == "own" else _trl_head)(model, {**inputs, "labels": labels}, logits.shape[-1])
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))[:, -TOKENS:-1]
    wanted = wide.log_softmax(-1).gather(2, labels[:, 1:, None]).flatten()
    difference = torch.where(wanted.isnan(), 0, (found.logp.to(wanted.device) - wanted).abs())
    _refuse_difference(name, kind, difference.max().item(), precision * _size(wide))
    if trains:
        _refuse_untrained(name, kind, model, _leaves(logits) - _leaves(*found.roots))


@contextmanager
def _evaluating(model: Any, whole: bool) -> Iterator[None]:
    """Run in evaluation mode; restore each module's mode, and in a whole model what modules keep of a forward pass."""
    states: list[tuple[Any, dict[str, Any]]] = [
        (module, dict(vars(module)) if whole else {"training": module.training}) for module in model.modules()
    ]
    for module, _ in states:
        # A quantized layer is left in training mode: it may repack its weights for evaluation
        module.training = not all(parameter.is_floating_point() for parameter in module.parameters(recurse=False))
    try:
        yield
    finally:
        for module, state in states:
            if whole:
                vars(module).clear()
            vars(module).update(state)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say in a sentence what failed, whatever code of a model or of PEFT raised."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(("Cannot", "The LM head")):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {reason}. Choose a causal language model, or another adapter.") from error


def _tokens(base: Any) -> dict[str, Any]:
    """Return two equal rows of ids from the middle of the vocabulary, where no special tokens are."""
    size = base.config.get_text_config().vocab_size
    ids = ((size // 2 + torch.arange(TOKENS, device=base.device)) % size).repeat(2, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def _own_logits(model: Any, base: Any, inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """Return the logits that the model computes itself, and the relative precision they are computed in."""
    dtypes: list[torch.dtype] = []
    hook = base.get_output_embeddings().register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    try:
        logits = _run(model, **inputs).logits
    finally:
        hook.remove()
    return logits, max(PRECISION, *(torch.finfo(dtype).eps for dtype in (*dtypes, logits.dtype)))


def _run(model: Any, **inputs: Any) -> Any:
    """Run the model, and leave the random numbers as they were: each run sees the same."""
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        return model(**inputs)


def _extremes(logits: Tensor) -> Tensor:
    """Return labels that a wrong scale moves most: the most probable tokens in one row, the least probable in the other."""
    last = logits.detach()[:, -TOKENS:]
    possible = last.masked_fill(last == -torch.inf, torch.inf)
    labels = torch.stack([last[0].argmax(-1), possible[1].argmin(-1)])
    return labels.roll(1, dims=1).index_fill(1, labels.new_zeros(1), -100)


def _size(logits: Tensor) -> float:
    """Return twice the largest finite logit: both the label's and the most probable token's are rounded."""
    return 2 * logits.abs().nan_to_num(0, 0, 0).max().item()


def _own_head(model: Any, inputs: dict[str, Any], vocabulary: int) -> Measured:
    def use(hidden: Tensor, head: Head, target: Tensor) -> Measured:
        rows, size = head.weight.shape
        if (rows, size) != (vocabulary, hidden.shape[-1]):
            raise ValueError(
                f"its LM head takes {size} features for {rows} tokens, its last hidden states have {hidden.shape[-1]} and its "
                f"logits {vocabulary}"
            )
        return Measured(score(hidden, head, target, ()).logp, (hidden, head.weight, head.bias))

    return _run(model, **inputs, use=use)[0]


def _trl_head(model: Any, inputs: dict[str, Any], vocabulary: int) -> Measured:
    outputs = _run(model, **inputs, fused_lm_head=True)
    return Measured(outputs.log_probs.detach()[outputs.label_mask], (outputs.log_probs,))


def _refuse_difference(name: str, kind: str, largest: float, bound: float) -> None:
    if not largest <= bound:  # NaN too
        raise ValueError(
            f"Cannot train {name} with {HEADS[kind]}: its log-probabilities differ from the model's own by up to "
            f"{largest:.3g} nats, rounding explains {bound:.1g}. The head multiplies the last hidden states with the LM head, "
            f"the model does more. {_advice(kind)}"
        )


def _refuse_untrained(name: str, kind: str, model: Any, lost: set[Tensor]) -> None:
    names = [key for key, parameter in model.named_parameters() if parameter in lost]
    if names:
        raise ValueError(
            f"Cannot train {name} with {HEADS[kind]}: {len(names)} trainable parameters of the model's logits would get no "
            f"gradient, among them `{names[0]}`. Freeze them, or remove their adapter. {_advice(kind)}"
        )


def _advice(kind: str) -> str:
    other = "remove `loss_head: trl` if the recipe has it, or " if kind == "trl" else ""
    text = f"{other}choose a model whose logits are its LM head's output."
    return text[0].upper() + text[1:]


def _leaves(*tensors: Tensor | None) -> set[Tensor]:
    """Return the leaves that need a gradient in the graph of `tensors`."""
    found = {tensor for tensor in tensors if tensor is not None and tensor.is_leaf and tensor.requires_grad}
    nodes = [tensor.grad_fn for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.add(node.variable)
        following = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= following
        nodes += following
    return found
