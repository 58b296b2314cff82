"""Measure whether a loss head computes what the model's own logits say, before anything trains."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .._util.trl import DataCollatorForLanguageModeling
from ..errors import BLError, RecipeError
from .lm_head import Head
from .ops import score
from .targets import IGNORED, Targets

logger = logging.getLogger(__name__)  # accelerate's needs a state, which a model alone hasn't

TOKENS = 64
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")  # config attributes
DROPOUTS = (torch.dropout, functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)
HEADS = {"own": "bl_trainer's loss head", "trl": "TRL's loss head"}
PRECISION = 1e-4  # of float32 and wider, in which outliers among hidden states cancel
LEAK = 1e-5  # in float32: what later tokens may change in earlier logits, as a share of twice the largest
ROUNDINGS = {"tf32": 2.0**-10, "high": 2.0**-10, "bf16": 2.0**-7, "medium": 2.0**-7}  # of products, by torch's names
COARSE_LEAK = 0.02  # in narrower types, and where quantized products depend on what else is in the batch


class Measured(NamedTuple):
    """Log-probabilities (N,) of labels, and the tensors whose graph leads to all parameters that train by them."""

    logp: Tensor
    roots: tuple[Tensor | None, ...]


def verify_head(model: Any, kind: str = "own", *, trains: bool = True, text: bool = True) -> None:
    """Compare the loss head `kind`, a key of `HEADS`, with the logits that `model` computes itself.

    Args:
        model: A causal language model after `add_scoring`, or a PEFT model around it. It is left as it was.
        trains: Whether to compare the trainable parameters that both depend on, and log-probabilities in training mode, too;
            not possible in a sharded model.
        text: Whether rows are text alone. With images, the collator may tell a class which tokens are a prefix that sees all of
            itself, and nothing is refused for that.

    Raises:
        RecipeError: If log-probabilities of `TOKENS` tokens differ beyond the rounding of the model's type, or one of the two
            can't be computed. If a trainable parameter would get no gradient. If earlier positions see later tokens.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    base = inner.get_base_model() if is_peft_model(inner) else inner
    name = type(base).__name__
    with _mode(model, False, trains), torch.set_grad_enabled(trains):
        with _explained(f"Cannot train {name}: its own forward pass fails"):
            inputs = _tokens(base)
            if not trains:
                _run_head(model, kind, inputs)
            own = _own_logits(model, base, inputs)
        found = _compare(model, name, kind, inputs, *own)
    looks_ahead = text and _looks_ahead(model, inputs, *own)
    if trains:
        _refuse_untrained(name, kind, model, _leaves(own[0]) - _leaves(*found.roots))
        del found
        with _mode(model, True, True), torch.no_grad(), WithoutDropout():
            steady = _steady(lambda: _own_logits(model, base, inputs))
            if steady is not None:
                _compare(model, name, kind, inputs, *steady)
                looks_ahead = looks_ahead and _looks_ahead(model, inputs, *steady)  # not of a prefix that trains causally
    if looks_ahead:
        raise RecipeError(
            f"Cannot train {name}: its earlier positions see later tokens, so it would learn to copy its targets. Choose a "
            "causal language model, or write `model_init_kwargs: {is_decoder: true}` if its class has this setting."
        )


def verify_separation(model: Any, *, trains: bool = True, batch: Mapping[str, Any] | None = None) -> None:
    """Compare the logits of an example that follows another in one row with those of the same example in front.

    Rounding bounds this in narrow types, where a small leak would pass. There an example's first logits, which what stands in
    front changes most, must not change with it. What stands behind an example shows whether logits vary by themselves, as of
    experts and dynamic scales. Then rounding alone is the bound.

    Args:
        model: As in `verify_head`. Its rows are those of `padding_free` and of packing, which `position_ids` divide.
        trains: As in `verify_head`; False for a sharded model.
        batch: Of a user's own collator, whose keys say where examples end; None for what TRL's collator gives.

    Raises:
        RecipeError: If an example's logits depend on where it stands, or if the model can't compute such rows.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    base = inner.get_base_model() if is_peft_model(inner) else inner
    advice = "Remove `packing` and `padding_free`, or choose another `attn_implementation`."
    if batch is not None:
        advice = "Let the `data_collator` give one example per row, or leave it out and write `padding_free: true`."
    failure = f"Cannot train {type(base).__name__} on packed rows"
    with _mode(model, False, trains), torch.no_grad():
        ids = _tokens(base)["input_ids"]
        one, other = ids[:, (ids.shape[1] + 1) // 2 :].tolist()  # the halves that differ
        size, orders = len(one), ((one, other), (other, one), (one[::-1], other), (other, one[::-1]))
        with _explained(failure, advice):
            found = [_own_logits(model, base, _flattened(rows, base.device, batch)) for rows in orders]
        rows = [logits[0, -2 * size :] for logits, _ in found]  # virtual tokens may stand in front
        behind, front = (rows[i][size:] for i in (0, 2)), (rows[i][:size] for i in (1, 3))
        is_apart = _are_apart(*behind, *front, is_exact=_is_exact(model, *found[0]))
    if not is_apart:
        raise RecipeError(f"{failure}: an example would see those before it in its row. {advice}")


def _are_apart(behind: Tensor, other: Tensor, front: Tensor, another: Tensor, *, is_exact: bool) -> bool:
    """Whether an example's logits are its own: `behind` two others, `other` after another one, and in `front` of these two."""
    moved, leak, noise = _gaps(behind, front), _gaps(behind, other), _gaps(front, another)
    bound, changed = _size(front), torch.maximum(moved, leak)  # a model that sees all of a row may not mind where it stands
    if is_exact:
        return changed.max().item() <= LEAK * bound
    # Rounding may send a token to another expert, which is no sight of the other example
    is_leak = noise.max().item() == 0 and leak[0].item() > LEAK * bound
    return changed.median().item() <= COARSE_LEAK * bound and not is_leak


def _gaps(one: Tensor, other: Tensor) -> Tensor:
    """Return the largest difference at each place; none where both mask a token by the same infinity."""
    return torch.where(one == other, 0, (one - other).abs()).amax(dim=-1)


def _flattened(rows: tuple[list[int], ...], device: Any, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return examples in one row, as TRL's collator lays them out, or with the keys of the batch `like`."""
    batch = dict(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": row} for row in rows]))
    if like is not None:
        owner = torch.cat([torch.full((len(row),), i, dtype=torch.int32) for i, row in enumerate(rows)])[None]
        batch |= {"attention_mask": _mask_of(owner, like.get("attention_mask")), "seq_idx": owner}
        batch = {key: value for key, value in batch.items() if key in like}
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items() if key != "labels"}
    return {**inputs, "use_cache": False}


def _mask_of(owner: Tensor, like: Tensor | None) -> Tensor:
    """Return an attention mask of tokens (1, length) that belong to the examples `owner`, as the mask `like` is made."""
    if like is None or like.ndim < 4:
        return torch.ones_like(owner)
    sees = ((owner[..., None] == owner[:, None]) & torch.ones(owner.shape[1], owner.shape[1]).tril().bool())[:, None]
    return (
        torch.where(sees, 0.0, torch.finfo(like.dtype).min).to(like.dtype) if like.is_floating_point() else sees.to(like.dtype)
    )


def _compare(model: Any, name: str, kind: str, inputs: dict[str, Any], logits: Tensor, precision: float) -> Measured:
    """Return what the loss head computes. Raises RecipeError if it differs from the model's own `logits`."""
    length = inputs["input_ids"].shape[1]
    labels = _extremes(logits, length)
    with _explained(f"Cannot train {name} with {HEADS[kind]}", _advice(kind)):
        found = (_own_head if kind == "own" else _trl_head)(model, {**inputs, "labels": labels}, logits.shape[-1])
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))[:, -length:-1]
    wanted = wide.log_softmax(-1).gather(2, Targets.of(labels).labels[..., None]).flatten()
    difference = torch.where(wanted.isnan(), 0, (found.logp.to(wanted.device) - wanted).abs())
    _refuse_difference(name, kind, difference.max().item(), precision * _size(wide))
    return found


def _steady(own_logits: Callable[[], tuple[Tensor, float]]) -> tuple[Tensor, float] | None:
    """Return logits in training mode; None where they are others each time, or need more than tokens."""
    try:
        (logits, precision), (again, _) = own_logits(), own_logits()
    except Exception as error:  # of any model's code: in training mode it may need more than tokens
        logger.warning(f"The loss head is verified in evaluation mode only: in training mode the model raises {error!r}.")
        return None
    gap = _gaps(logits, again).max().item()
    return (logits, precision) if gap <= precision * _size(logits) else None


class WithoutDropout(TorchFunctionMode):
    """Makes dropout do nothing, be it a module or a function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


@contextmanager
def _mode(model: Any, training: bool, whole: bool) -> Iterator[None]:
    """Run in a mode; restore each module's own, and in a whole model what modules keep of a forward pass."""
    states: list[tuple[Any, dict[str, Any]]] = [
        (module, dict(vars(module)) if whole else {"training": module.training}) for module in model.modules()
    ]
    buffers = [(dict(module._buffers), module) for module, _ in states] if whole else []
    # A first forward pass may register hooks, and note on the module that it has
    tables = [kept for _, state in states for key, kept in state.items() if "_hooks" in key and isinstance(kept, dict)]
    hooks = [(table, dict(table)) for table in tables]
    copies = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    for module, _ in states:
        # A quantized layer is left in training mode: it may repack its weights for evaluation
        is_float = all(parameter.is_floating_point() for parameter in module.parameters(recurse=False))
        module.training = training or not is_float
    try:
        yield
    finally:
        for module, state in states:
            if whole:
                vars(module).clear()
            vars(module).update(state)
        for kept, module in buffers:
            module._buffers.update(kept)
        for present, before in hooks:
            present.clear()
            present.update(before)
        for buffer, copy in copies:
            buffer.data.copy_(copy)


@contextmanager
def _explained(what: str, advice: str = "Choose a causal language model, or another adapter.") -> Iterator[None]:
    """Say in a sentence what failed, whatever code of a model or of PEFT raised."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BLError) and str(error).startswith(("Cannot", "The LM head")):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"{what}: {reason.rstrip('.')}. {advice}") from error


def _tokens(base: Any) -> dict[str, Any]:
    """Return two rows of ids from the middle of the vocabulary, where no special tokens are; their first halves are equal."""
    config = base.config.get_text_config()
    size = getattr(config, "vocab_size", None) or len(base.get_output_embeddings().weight)
    length = min([TOKENS, *(value for key in POSITIONS if isinstance(value := getattr(config, key, None), int) and value > 1)])
    steps = torch.arange(length, device=base.device)
    other = torch.where(steps < (length + 1) // 2, steps, 3 * steps + 1)
    ids = size // 2 + torch.stack([steps, other]) % max(1, size // 4)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def _run_head(model: Any, kind: str, inputs: dict[str, Any]) -> None:
    """Run the loss head once: ZeRO-3 fetches by the order of an earlier pass, which must be one like those in training."""
    asks = {"use": lambda *parts: None} if kind == "own" else {"fused_lm_head": True}
    _run(model, **inputs, labels=inputs["input_ids"], **asks)


def _own_logits(model: Any, base: Any, inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """Return the logits that the model computes itself, and the relative precision they are computed in."""
    dtypes: list[torch.dtype] = []
    hook = base.get_output_embeddings().register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    try:
        logits = _run(model, **inputs).logits
    finally:
        hook.remove()
    rounding = _product_rounding(logits.device.type)
    return logits, max(PRECISION, rounding, *(torch.finfo(dtype).eps for dtype in (*dtypes, logits.dtype)))


def _product_rounding(device: str) -> float:
    """Return the relative rounding of float32 products, which a recipe's `tf32: true` leaves to TF32."""
    backend: Any = torch.backends.cuda.matmul if device == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(backend, "fp32_precision"):  # before torch 2.9
        return ROUNDINGS.get(torch.get_float32_matmul_precision(), 0.0)
    return max(ROUNDINGS.get(each.fp32_precision, 0.0) for each in (backend, torch.backends))


def _run(model: Any, **inputs: Any) -> Any:
    """Run the model, and leave the random numbers as they were: each run sees the same."""
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            return model(**inputs)
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _extremes(logits: Tensor, length: int) -> Tensor:
    """Return labels that a wrong scale moves most: the most probable tokens in one row, the least probable in the other."""
    last = logits.detach()[:, -length:]
    possible = last.masked_fill(last == -torch.inf, torch.inf)
    labels = torch.stack([last[0].argmax(-1), possible[1].argmin(-1)])
    return labels.roll(1, dims=1).index_fill(1, labels.new_zeros(1), IGNORED)


def _size(logits: Tensor) -> float:
    """Return twice the largest finite logit: both the label's and the most probable token's are rounded."""
    return 2 * logits.abs().nan_to_num(0, 0, 0).max().item()


def _own_head(model: Any, inputs: dict[str, Any], vocabulary: int) -> Measured:
    def use(hidden: Tensor, head: Head, target: Tensor) -> Measured:
        rows, size = head.vocabulary, head.weight.shape[1]
        if (rows, size) != (vocabulary, hidden.shape[-1]):
            raise ValueError(
                f"its LM head takes {size} features for {rows} tokens, its last hidden states have {hidden.shape[-1]} and its "
                f"logits {vocabulary}"
            )
        return Measured(score(hidden, head, target, ()).logp, (hidden, head.weight, head.bias))

    return _run(model, **inputs, use=use).found


def _trl_head(model: Any, inputs: dict[str, Any], vocabulary: int) -> Measured:
    outputs = _run(model, **inputs, fused_lm_head=True)
    return Measured(outputs.log_probs.detach()[outputs.label_mask], (outputs.log_probs,))


def _refuse_difference(name: str, kind: str, largest: float, bound: float) -> None:
    if not largest <= bound:  # NaN too
        raise RecipeError(
            f"Cannot train {name} with {HEADS[kind]}: its log-probabilities differ from the model's own by up to "
            f"{largest:.3g} nats, rounding explains {bound:.1g}. The head multiplies the last hidden states with the LM head, "
            f"the model does more. {_advice(kind)}"
        )


def _refuse_untrained(name: str, kind: str, model: Any, lost: set[Tensor]) -> None:
    names = [key for key, parameter in model.named_parameters() if parameter in lost]
    if names:
        raise RecipeError(
            f"Cannot train {name} with {HEADS[kind]}: {len(names)} trainable parameters of the model's logits would get no "
            f"gradient, among them `{names[0]}`. Freeze them, or remove their adapter. {_advice(kind)}"
        )


def _looks_ahead(model: Any, inputs: dict[str, Any], logits: Tensor, precision: float) -> bool:
    """Whether logits differ in the half that both rows share, by the half in which the rows differ."""
    length = inputs["input_ids"].shape[1]
    first, second = logits.detach()[:, -length:][:, : (length + 1) // 2]
    gap = _gaps(first, second).max().item()
    return gap > (LEAK if _is_exact(model, logits, precision) else COARSE_LEAK) * _size(logits)


def _is_exact(model: Any, logits: Tensor, precision: float) -> bool:
    """Whether all that `logits` came through is in float32 or wider, not the head alone."""
    are_wide = (parameter.is_floating_point() and parameter.itemsize >= 4 for parameter in model.parameters())
    return precision <= PRECISION and not torch.is_autocast_enabled(logits.device.type) and all(are_wide)


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
