"""The model's forward, made to hand its hidden states to a function."""

import functools
import types
from typing import Any

from .._util.trl import maybe_gather_lm_head_ctx
from .lm_head import Head
from .ops import backbone
from .targets import Targets


def add_scoring(model: Any) -> None:
    """Let `model(..., labels=labels, use=f)` return f(hidden, head, target) of its target tokens, and which are targets.

    `hidden`: (N, hidden size), `target`: (N,) the labels that are not -100, in reading order, each with the hidden state that
    predicts it; which: bool (batch, length - 1). Everything runs inside the model's forward, so that sharded and autocast
    models work as in training. Raises ValueError on labels outside of the vocabulary, and as `Head.of`.
    """
    original = model.forward.__func__

    @functools.wraps(original)  # `generate` checks its arguments against the signature
    def forward(self: Any, *args: Any, use: Any = None, **kwargs: Any) -> Any:
        if use is None:
            return original(self, *args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        hidden = backbone(self)(*args, **kwargs).last_hidden_state[:, -labels.shape[1] : -1]
        module = self.get_output_embeddings()
        parameters = [getattr(module, name) for name in ("weight", "bias") if getattr(module, name, None) is not None]
        with maybe_gather_lm_head_ctx(*parameters):
            head = Head.of(self)
            hidden, targets = hidden.to(head.weight.device), Targets.of(labels.to(head.weight.device))
            chosen, ids = targets.take(hidden), targets.ids
            is_wrong = (ids < 0) | (ids >= head.vocabulary)
            if is_wrong.any():
                raise ValueError(
                    f"A label is {ids[is_wrong][0].item()}, outside of the model's vocabulary of {head.vocabulary} tokens."
                    " Labels to leave out are -100; for added tokens call `model.resize_token_embeddings(len(tokenizer))`."
                )
            return use(chosen, head, ids), targets.mask

    model.forward = types.MethodType(forward, model)
