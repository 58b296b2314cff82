"""A model's LM head."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

# Config attributes by which model families multiply their logits
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")

# and by which they bound them, the first as most do
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Head(NamedTuple):
    """A model's LM head: logits = softcap(scale (hidden weight^T + bias)), in float32 or wider."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """Return the head of a transformers causal language model. Raises ValueError if it isn't a matrix of floats."""
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        weight, bias = (whole(getattr(module, name, None)) for name in ("weight", "bias"))
        if bias is None and getattr(getattr(module, "original_module", None), "bias", None) is not None:
            raise ValueError(
                f"Cannot train tokens of the LM head of {type(model).__name__}: PEFT leaves out the head's bias. Remove the "
                "head's tokens from `trainable_token_indices`."
            )
        if weight is None or weight.ndim != 2 or not weight.is_floating_point() or weight.itemsize < 2:
            kind = "no weight" if weight is None else f"a weight of {weight.dtype} and shape {tuple(weight.shape)}"
            raise ValueError(
                f"The LM head, {type(module).__name__}, has {kind}, which gives no probabilities. Leave the head out of "
                "quantization (`llm_int8_skip_modules: [lm_head]`), and out of FSDP1's units of their own."
            )
        scales = [getattr(config, name, None) for name in MULTIPLIERS]
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None:
            scales.append(divisor if config.model_type == "hyperclovax" else 1 / divisor)
        scale = next((float(scale) for scale in scales if scale is not None), 1.0)
        softcaps = (getattr(config, name, None) for name in SOFTCAPS)
        return cls(weight, bias, scale, next((softcap for softcap in softcaps if softcap is not None), None))


def whole(parameter: Any) -> Any:
    """Gather a parameter that FSDP2 shards as a unit of its own; its gradient is the mean over processes, as FSDP2's are."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
