"""What this package sets inside bitsandbytes, which may not be installed."""

from torch import nn

from ..errors import RecipeError


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from laying out 4-bit weights for inference alone, on CPUs with AVX512-BF16.

    It does so in the first forward pass in evaluation mode, for good, and gradients stop at these layers from then on.
    Raises RecipeError if it has done so already.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise RecipeError(
                    f"Cannot train {type(model).__name__}: a forward pass on this CPU has laid out its 4-bit weights for "
                    "inference, and gradients stop there. Load the model again, and use it only after the trainer is made."
                )
