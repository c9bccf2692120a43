"""The loss with another divergence than forward KL, label smoothing, z-loss or softcap, where there is no kernel.

It is the reference, a chunk of rows at a time.

Each chunk is differentiated by autograd as soon as it is computed, so that what autograd keeps is a few tensors of one
chunk. Several times slower than chunked.py, which does not know these terms.

Letters: N rows, C rows of a chunk, W logits columns (W >= V).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitstore_kernels.chunked import scaled_gradient
from logitstore_kernels.loss_arguments import compute_dtype
from logitstore_kernels.loss_terms import LossRows, LossTerms
from logitstore_kernels.reference import loss_rows_reference
from logitstore_kernels.row_chunks import rows_per_chunk
from logitstore_kernels.teacher_batch import TeacherBatch


def chunked_reference_rows(
    logits_NW: Tensor,
    teacher: TeacherBatch,
    labels_N: Tensor,
    counted_N: Tensor,
    terms: LossTerms,
    *,
    expected_upstream: Tensor,
    inplace: bool = False,
) -> LossRows:
    """The values of each row [N], differentiable once with respect to logits_NW; arguments as in chunked_loss_rows.

    expected_upstream is not used: the gradient is multiplied in backward().
    """
    if torch.is_grad_enabled() and logits_NW.requires_grad:
        return LossRows(*_ChunkedReference.apply(logits_NW, teacher, labels_N, counted_N, terms, inplace))
    return _run(logits_NW.detach(), None, teacher, labels_N, counted_N, terms)


class _ChunkedReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NW, teacher, labels_N, counted_N, terms, inplace):
        logits_NW = logits_NW.detach()  # shares the version counter
        gradient_NW = logits_NW if inplace else torch.empty_like(logits_NW)
        rows = _run(logits_NW, gradient_NW, teacher, labels_N, counted_N, terms)
        ctx.save_for_backward(gradient_NW)
        ctx.mark_non_differentiable(rows.kl_N, rows.ce_N)
        ctx.set_materialize_grads(False)
        return tuple(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N, _kl, _ce):
        if upstream_N is None:
            return (None,) * 6
        (gradient_NW,) = ctx.saved_tensors
        return scaled_gradient(gradient_NW, upstream_N), *(None,) * 5


def _run(
    logits_NW: Tensor,
    gradient_NW: Tensor | None,
    teacher: TeacherBatch,
    labels_N: Tensor,
    counted_N: Tensor,
    terms: LossTerms,
) -> LossRows:
    dtype, n_rows = compute_dtype(logits_NW), len(labels_N)
    rows = LossRows(*(torch.zeros(n_rows, dtype=dtype, device=logits_NW.device) for _ in range(3)))
    chunk_rows = rows_per_chunk(dtype.itemsize * logits_NW.shape[1], logits_NW.device)
    for start in range(0, n_rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        leaf_CW = logits_NW[chunk].to(dtype, copy=True).requires_grad_(gradient_NW is not None)
        with torch.set_grad_enabled(gradient_NW is not None):
            values = loss_rows_reference(leaf_CW, teacher.rows(chunk), labels_N[chunk], counted_N[chunk], terms)
            loss = values.loss_N.sum()
        for row_values, chunk_values in zip(rows, values, strict=True):
            row_values[chunk] = chunk_values.detach()
        if gradient_NW is not None:
            (gradient_CW,) = torch.autograd.grad(loss, leaf_CW)
            gradient_NW[chunk] = gradient_CW.to(gradient_NW.dtype)
    return rows
