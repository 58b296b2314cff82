"""What `test_losses.py` starts in two processes: the losses of tensors that tensor parallelism shards."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from bl_trainer import as_loss, fused_objective, per_token


def compare(folder, rank):
    """Fail unless losses and gradients of sharded tensors are those of whole ones."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    labels = torch.randint(11, (2, 5))
    labels[0, :2] = -100
    aligned, logits = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100), hidden @ weight.T
    logp = logits.log_softmax(-1).gather(2, aligned.clamp(min=0)[..., None])[..., 0]
    special = labels > 5

    def loss_of_logits(logits, place=lambda whole: whole):
        return as_loss("neg_p", 0.05)({"logits": logits}, place(labels), objective_weight=place(special.double()))

    def check(loss, tensor, placement):
        leaf = tensor.clone().requires_grad_()
        share = distribute_tensor(tensor, mesh, [placement]).requires_grad_()
        right, found = loss(leaf), loss(share)
        right.backward()
        found.backward()
        torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
        torch.testing.assert_close(share.grad.full_tensor(), leaf.grad, rtol=1e-12, atol=1e-15)

    for placement in (Shard(2), Shard(1), Replicate()):
        check(loss_of_logits, logits, placement)
        check(lambda states: fused_objective(states, weight, labels, "neg_p"), hidden, placement)
    with loss_parallel():
        check(loss_of_logits, logits, Shard(2))
    check(lambda logp: per_token(logp, aligned, "neg_p").sum(), logp, Shard(1))
    check(lambda logits: loss_of_logits(logits, lambda whole: distribute_tensor(whole, mesh, [Shard(1)])), logits, Shard(1))
    torch.distributed.destroy_process_group()
