"""A head's weight that is sharded over processes: gathered where it is used, its gradient handed back to the shards.

FSDP2 keeps a parameter as a DTensor outside of its module's forward(). Nobody else then gathers it or reduces its
gradient.
"""

import torch
from torch import Tensor


def whole_weight(weight: Tensor) -> Tensor:
    """`weight`, or all of it where it is a DTensor; the gradient is then the mean over the mesh, sharded as weight is.

    Gathering, and reducing the gradient in backward(), wait for every process of the mesh.
    """
    if not torch.distributed.is_available():
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole
