"""The core, beside any stack: it imports and works with torch alone, and what needs TRL says what is missing."""

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Torch, NumPy, and what torch itself depends on
ALLOWED = (
    "torch", "torchgen", "functorch", "numpy", "filelock", "typing_extensions", "setuptools", "pkg_resources", "sympy",
    "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "triton", "nvidia", "cuda", "bl_trainer",
)  # fmt: skip

ALONE = f"""
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Known(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        root = name.partition(".")[0]
        known = root in sys.stdlib_module_names or root in {ALLOWED!r} or root.startswith("_sysconfigdata")
        return super().find_spec(name, path, target) if known else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Known]
"""

USES = """
import torch
import bl_trainer
import bl_trainer.head, bl_trainer.losses, bl_trainer.objectives
from bl_trainer import LossMetrics, Objective, Threshold, as_loss, fused_objective, per_token

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
print("worked")
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE, timeout=300,
        env={**os.environ, "PYTHONPATH": str(PACKAGE), **environment}, check=False,
    )  # fmt: skip


def test_core_needs_torch_alone():
    done = run(ALONE + USES)
    assert done.stdout == "worked\n", done.stderr
