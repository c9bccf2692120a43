"""Which path computes a loss or a reduction: Triton where it can, else row chunks of plain PyTorch. Decided here alone.

The kernel takes float16, bfloat16 and float32 logits on CUDA where Triton is installed, and of the divergences forward
KL alone. With Triton's own switch TRITON_INTERPRET=1 set before Triton is imported, its interpreter runs the kernel on
CPU tensors, slowly: for tests.
Nothing here reads a value of a tensor.

Letters: N rows, W logits columns.
"""

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from logitstore_kernels.chunked import chunked_loss_rows
from logitstore_kernels.chunked_reference import chunked_reference_rows
from logitstore_kernels.divergences import FORWARD_KL
from logitstore_kernels.loss_terms import LossRows, LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_KERNEL_SLOTS = 2048  # entries of a row that one program holds in registers


class OperationPath(NamedTuple):
    """How an operation is computed: "triton" or "pytorch", and why, in words."""

    operation: str
    path: str
    reason: str


def loss_rows(
    logits_NW: Tensor,
    teacher: TeacherBatch,
    labels_N: Tensor,
    counted_N: Tensor,
    terms: LossTerms,
    *,
    expected_upstream: Tensor,
    inplace: bool = False,
) -> LossRows:
    """The values of each row [N], 0 where counted_N is False, differentiable once; see chunked_loss_rows.

    expected_upstream: what a row's loss is going to be multiplied with, 0 axes or [N]; whatever it is, the gradient is
    right, and if it is right nothing is computed twice.
    """
    if why_not_the_kernel(logits_NW, teacher, terms) is None:
        from logitstore_kernels.triton_function import triton_loss_rows

        return triton_loss_rows(
            logits_NW, teacher, labels_N, counted_N, terms, expected_upstream=expected_upstream, inplace=inplace
        )
    rows_function = chunked_loss_rows if terms.is_plain else chunked_reference_rows
    if expected_upstream.dim():
        expected_upstream = torch.ones((), dtype=expected_upstream.dtype, device=expected_upstream.device)
    return rows_function(
        logits_NW, teacher, labels_N, counted_N, terms, expected_upstream=expected_upstream, inplace=inplace
    )


def why_not_the_kernel(logits_NW: Tensor, teacher: TeacherBatch, terms: LossTerms) -> str | None:
    """Why the Triton kernel does not take these logits, or None if it does."""
    refusal = why_no_triton(logits_NW.device)
    if refusal is not None:
        return refusal
    if terms.kl_wanted and terms.divergence != FORWARD_KL:
        return f"the kernel computes forward KL, and the divergence is {terms.divergence}"
    if logits_NW.dtype not in KERNEL_DTYPES:
        return f"the kernel computes in float32, and the logits are {logits_NW.dtype}"
    if terms.kl_wanted and teacher.ids_NK.shape[1] > MAX_KERNEL_SLOTS:
        return f"the teacher has {teacher.ids_NK.shape[1]} entries a row, above the kernel's {MAX_KERNEL_SLOTS}"
    if logits_NW.shape[0] and (logits_NW.stride(1) != 1 or logits_NW.stride(0) < logits_NW.shape[1]):
        return f"the kernel needs whole rows of neighbouring elements, and the strides are {logits_NW.stride()}"
    return None


def why_not_the_topk_kernel(logits_NW: Tensor, k: int, vocab_size: int) -> str | None:
    """Why the Triton kernel does not take the k largest of these logits, or None if it does."""
    refusal = why_no_triton(logits_NW.device)
    if refusal is not None:
        return refusal
    if logits_NW.dtype not in KERNEL_DTYPES:
        return f"the kernel computes in float32, and the logits are {logits_NW.dtype}"
    if logits_NW.shape[0] and logits_NW.stride(1) != 1:
        return f"the kernel needs rows of neighbouring elements, and the strides are {logits_NW.stride()}"
    from logitstore_kernels.triton_topk import fits_topk

    if not fits_topk(vocab_size, k):
        return f"k = {k} of {vocab_size} is more than one program holds"
    return None


def why_no_triton(device: torch.device) -> str | None:
    """Why nothing on this device can be computed with Triton, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and is_interpreting()):
        return None
    return f"Triton's kernels are for CUDA, and the tensors are on {device.type}"


def is_interpreting() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def paths_on(device: torch.device) -> list[OperationPath]:
    """The path of every operation for tensors on `device`, of the dtypes and shapes that the kernels are made for."""
    refusal = why_no_triton(device)
    path, reason = "pytorch", f"row chunks of plain PyTorch: {refusal}"
    topk_reason = reason
    if refusal is None:
        how = "Triton's interpreter, on the CPU and slowly" if device.type == "cpu" else "Triton, compiled at first use"
        path, reason = (
            "triton",
            f"{how}; float64 logits and other divergences than forward KL go through row chunks of PyTorch",
        )
        topk_reason = f"{how}; float64 logits and a k above 127 over a large vocabulary go through plain PyTorch"
    no_kernel = "row chunks of plain PyTorch: there is no kernel for it"
    return [
        OperationPath("distillation_loss", path, reason),
        OperationPath("fused_linear_distillation_loss", path, f"matrix products of torch, and between them: {reason}"),
        OperationPath("vocab_parallel_distillation_loss", "pytorch", no_kernel),
        OperationPath("topk_with_tail", path, topk_reason),
        OperationPath("topk_with_tail_linear", path, f"matrix products of torch, and between them: {topk_reason}"),
        OperationPath("varopt_sample", "pytorch", no_kernel),
    ]
