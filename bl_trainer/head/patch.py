"""The model's forward, made to hand its hidden states to a function."""

import functools
import types
from typing import Any, NamedTuple

from torch import Tensor

from .._util.transformers import balancing_loss_of
from .._util.trl import maybe_gather_lm_head_ctx
from ..errors import RecipeError
from .lm_head import Head
from .targets import Targets


class Scored(NamedTuple):
    """What a model with `add_scoring` returns. `found`: by `use`. `is_target`: bool (batch, places). `aux_loss`: () or None."""

    found: Any
    is_target: Tensor
    aux_loss: Tensor | None


def add_scoring(model: Any) -> None:
    """Let `model(..., labels=labels, use=f)` return f(hidden, head, target) of its target tokens, as `Scored`.

    `hidden`: (N, hidden size), `target`: (N,) the labels that are not -100, in reading order, each with the hidden state that
    predicts it; places: length - 1, or length where `shift_labels` are given, which are labels of the places themselves. With
    `output_router_logits=True` the load-balancing loss of a mixture of experts is computed beside it. Everything runs inside
    the model's forward, so that sharded and autocast models work as in training. Raises RecipeError on labels outside of the
    vocabulary, and as `Head.of`.
    """
    original = model.forward.__func__

    @functools.wraps(original)  # `generate` checks its arguments against the signature
    def forward(self: Any, *args: Any, use: Any = None, **kwargs: Any) -> Any:
        if use is None:
            return original(self, *args, **kwargs)
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        kwargs["use_cache"] = False
        outputs = _body_outputs(self, original, args, kwargs)
        hidden = outputs.last_hidden_state if labels is None else outputs.last_hidden_state[:, -labels.shape[1] :]
        aux_loss = _aux_loss(self, outputs, kwargs) if kwargs.get("output_router_logits") else None
        module = self.get_output_embeddings()
        parameters = [getattr(module, name) for name in ("weight", "bias") if getattr(module, name, None) is not None]
        with maybe_gather_lm_head_ctx(*parameters):
            head = Head.of(self)
            place = head.weight.device
            targets = Targets.of(labels.to(place)) if shift_labels is None else Targets(shift_labels.to(place))
            chosen, ids = targets.take(hidden[:, : targets.labels.shape[1]].to(place)), targets.ids
            is_wrong = (ids < 0) | (ids >= head.vocabulary)
            if is_wrong.any():
                raise RecipeError(
                    f"A label is {ids[is_wrong][0].item()}, outside of the model's vocabulary of {head.vocabulary} tokens."
                    " Labels to leave out are -100; for added tokens call `model.resize_token_embeddings(len(tokenizer))`."
                )
            # layers may be spread over devices
            return Scored(use(chosen, head, ids), targets.mask, None if aux_loss is None else aux_loss.to(place))

    model.forward = types.MethodType(forward, model)


def _body_outputs(model: Any, original: Any, args: Any, kwargs: Any) -> Any:
    """Return the outputs of what makes the last hidden states, for a forward's inputs."""
    body = _body(model)
    if body is not model:
        return body(*args, **kwargs)
    # Its forward embeds images, then calls a language model with a head of its own (Llama 4)
    kept: list[Any] = []
    hook = _body(model.get_decoder()).register_forward_hook(lambda module, args, outputs: kept.append(outputs))
    try:
        original(model, *args, logits_to_keep=1, **kwargs)
    finally:
        hook.remove()
    return kept[-1]


def _body(model: Any) -> Any:
    """Return the module under the LM head, `model` itself if there is none; some prefixes name no module (Llama 4)."""
    return getattr(model, "model", model) if model.base_model is model else model.base_model


def _aux_loss(model: Any, outputs: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Return the load-balancing loss that a mixture of experts' own forward computes, a mean over the micro-batch's tokens.

    None where no layer has a router, as in the dense models of some classes, or the model has no such loss.
    """
    balancing, config = balancing_loss_of(model), model.config.get_text_config()
    if balancing is None or not outputs.router_logits:
        return None
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    top_k, mask = config.num_experts_per_tok, inputs.get("attention_mask")
    return balancing(outputs.router_logits, num_experts=experts, top_k=top_k, attention_mask=mask)
