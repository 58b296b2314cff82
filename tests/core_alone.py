"""Use the core, and ask for what needs TRL: `python core_alone.py`, in any environment that has torch and this package.

Prints `worked`, and what each name that needs TRL says if it cannot be had.
"""

import importlib

import torch

import bl_trainer
from bl_trainer import LossMetrics, Objective, Threshold, as_loss, fused_objective, per_token

NEED_TRL = ("BLTrainer", "BLConfig", "Recipe", "diagnose", "bl_trainer.training")


def use() -> None:
    """Compare the three losses' values and gradients."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    labels = torch.randint(9, (2, 5))
    metrics = LossMetrics()
    options = {"objective": {"name": "power", "alpha": 2}, "threshold": 0.01}
    fused = fused_objective(hidden, weight, labels, **options, metrics=metrics)
    logits = hidden @ weight.T
    found = as_loss(**options)({"logits": logits}, labels)
    logp = logits.log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None])[..., 0]
    each = per_token(logp, labels[:, 1:], Objective.parse(options["objective"]), Threshold(0.01)).mean()
    (slope,) = torch.autograd.grad(fused, weight)
    for loss in (found, each):
        torch.testing.assert_close(loss, fused)
        torch.testing.assert_close(torch.autograd.grad(loss, weight, retain_graph=True), (slope,))
    assert Objective.parse("neg_p").weight(torch.tensor([-0.5])) > 0
    assert metrics.pop()["nll"] > 0


if __name__ == "__main__":
    for adapter in ("transformers", "llamafactory", "axolotl", "swift", "verl", "unsloth"):
        importlib.import_module(f"bl_trainer.adapters.{adapter}")
    use()
    print("worked")
    for name in NEED_TRL:
        try:
            importlib.import_module(name) if "." in name else getattr(bl_trainer, name)
        except ImportError as error:
            print(error)
