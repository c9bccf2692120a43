"""What ours is measured beside: Liger's kernels where they are installed, the loop of distillation articles, PyTorch.

Liger's losses do less (hard labels, or a whole dense teacher): they are the fastest Triton kernels that a user would
take instead. Letters: N rows, D width, V vocabulary. T is the temperature.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from gpu_parts.inputs import ALPHA, Inputs
from gpu_parts.log import NotMeasured
from logitstore_kernels.reference import distillation_loss_reference
from torch import Tensor
from torch.nn import functional


def seed_loop(logits_NV: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """The loss as articles write it, every teacher logit in memory."""
    T = temperature
    teacher_NV = torch.softmax(inputs.teacher_logits_NV / T, -1)
    kl = functional.kl_div(torch.log_softmax(logits_NV / T, -1), teacher_NV, reduction="batchmean")
    return ALPHA * kl * T * T + (1 - ALPHA) * functional.cross_entropy(logits_NV, inputs.labels_N)


def plain_pytorch(logits_NV: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """The same loss as ours, in plain PyTorch."""
    return distillation_loss_reference(logits_NV, inputs.teacher, inputs.labels_N, temperature, ALPHA, "bucket")


def compiled_pytorch(*, dry: bool) -> Callable[..., Tensor]:
    """plain_pytorch through torch.compile; by its front end alone in a dry run, whose CPU code would take minutes."""
    torch._dynamo.reset()
    return torch.compile(plain_pytorch, dynamic=False, backend="eager" if dry else "inductor")


def liger_cross_entropy(logits_NV: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """Hard labels at T = 1, gradient over the logits."""
    return _scalar(_liger().liger_cross_entropy(logits_NV, inputs.labels_N))


def liger_jsd(logits_NV: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """The divergence of two whole distributions at T, from log-softmaxes that it does not take itself."""
    student_NV, teacher_NV = (torch.log_softmax(x / temperature, -1) for x in (logits_NV, inputs.teacher_logits_NV))
    return _scalar(_liger().liger_jsd(student_NV, teacher_NV))


def liger_linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return _scalar(_liger().liger_fused_linear_cross_entropy(hidden_ND, weight_VD, labels_N))


def liger_linear_jsd(hidden_ND: Tensor, weight_VD: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Teacher: hidden states and head of its own."""
    return _scalar(_liger().liger_fused_linear_jsd(hidden_ND, weight_VD, *teacher))


def _liger() -> ModuleType:
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError as error:
        raise NotMeasured("missing", f"liger-kernel cannot be imported: {error}") from error
    return liger


def _scalar(result: Tensor | tuple) -> Tensor:
    """The loss, also from the versions that return it beside others."""
    return result[0] if isinstance(result, tuple) else result
