"""One of the processes of test_linear_loss_sharded.py: a head under FSDP2 against the float64 loss of whole logits.

Run with RANK, WORLD_SIZE and the path of a file for the processes to meet at; leaves with 0 if everything is equal.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from logitstore_kernels import TeacherBatch, fused_linear_distillation_loss, topk_with_tail
from logitstore_kernels.reference import distillation_loss_reference
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

N, D, V = 9, 6, 37


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(V, D, generator=rng, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.randn(V, generator=rng, dtype=torch.float64))

    def forward(self, hidden_ND, teacher, labels_N, **kwargs):
        assert not isinstance(self.weight, DTensor)
        return fused_linear_distillation_loss(hidden_ND, self.weight, teacher, labels_N, self.bias, **kwargs)


def inputs_of(rank: int):
    rng = torch.Generator().manual_seed(rank + 1)
    hidden_ND = torch.randn(N, D, generator=rng, dtype=torch.float64).requires_grad_()
    teacher = TeacherBatch.from_topk(*topk_with_tail(3 * torch.randn(N, V, generator=rng).double(), 4), vocab_size=V)
    labels_N = torch.randint(V, (N,), generator=rng)
    labels_N[rank] = -100
    return hidden_ND, teacher, labels_N


def expected_of(rank: int, **kwargs):
    """(gradient of the rank's hidden states, mean over the ranks of the gradients of weight and bias)."""
    own, sums = None, [0, 0]
    for other in range(dist.get_world_size()):
        head = Head()
        hidden_ND, teacher, labels_N = inputs_of(other)
        logits_NV = F.linear(hidden_ND, head.weight, head.bias)
        distillation_loss_reference(logits_NV, teacher, labels_N, **kwargs).sum().backward()
        own = hidden_ND.grad if other == rank else own
        sums = [total + part.grad for total, part in zip(sums, (head.weight, head.bias), strict=True)]
    return own, *(total / dist.get_world_size() for total in sums)


def main(meeting_file: str) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=world_size)
    mesh = dist.init_device_mesh("cpu", (world_size,))
    for reduction in ("mean", "none"):
        for inside in (True, False):
            head = Head()
            fully_shard(head, mesh=mesh)
            hidden_ND, teacher, labels_N = inputs_of(rank)
            kwargs = {"reduction": reduction, "chunk_rows": 4}
            if inside:
                loss = head(hidden_ND, teacher, labels_N, **kwargs)
            else:
                assert isinstance(head.weight, DTensor)
                loss = fused_linear_distillation_loss(
                    hidden_ND, head.weight, teacher, labels_N, head.bias, **kwargs
                )  # fmt: skip
            loss.sum().backward()
            got = (hidden_ND.grad, head.weight.grad.full_tensor(), head.bias.grad.full_tensor())
            for one, other in zip(got, expected_of(rank, reduction=reduction), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
