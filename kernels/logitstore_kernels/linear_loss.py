"""fused_linear_distillation_loss: the loss of hidden states through a linear head, the front door.

The logits of a few thousand rows exist at a time (linear_chunks.py). The gradients are made with the values: three
matrix products of the size of the head in all, as with logits that are kept. Only where every row may get an upstream
gradient of its own, with reduction="none", they are made in backward(), where the logits are computed again: a fourth.

Letters: N rows, D width, V vocabulary. T is the temperature.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitstore_kernels.chunked import graph_is_kept
from logitstore_kernels.dispatch import why_no_triton
from logitstore_kernels.linear_arguments import check_head, check_head_against, logits_dtype
from logitstore_kernels.linear_chunks import (
    HeadGradients,
    LinearHead,
    free_bytes_on,
    linear_chunk_rows,
    linear_loss_rows,
)
from logitstore_kernels.loss_arguments import (
    DistillationLossParts,
    checked_rows,
    logits_like,
    reduce_rows,
)
from logitstore_kernels.loss_terms import LossRows, LossTerms
from logitstore_kernels.sharded_weight import whole_weight
from logitstore_kernels.teacher_batch import TeacherBatch


def fused_linear_distillation_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    t: TeacherBatch,
    labels_N: Tensor,
    bias: Tensor | None = None,
    temperature: float = 2.0,
    alpha: float = 0.7,
    tail: str = "bucket",
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    row_weights_N: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """distillation_loss(hidden_ND @ weight_VD^T + bias, t, labels_N, ...), without ever holding logits of all N rows.

    hidden_ND: [N, D], any float dtype. Rows that do not count have a gradient of exactly 0, even if they are NaN.
    weight_VD: [V, D] or longer, of the same dtype, as in torch.nn.Linear and an lm_head; rows at or beyond t.vocab_size
        (padding of the head) take no part. It may be a DTensor, whose parts are then gathered here: see below.
    bias: [V], as long as weight_VD and of its dtype, or None.
    All others: as in distillation_loss.
    chunk_rows: rows whose logits are held at a time; None for what suits the device (linear_chunk_rows).

    Under autocast the logits have its dtype, whatever those of hidden_ND and weight_VD; logits are rounded to their
    dtype as a Linear's are. The gradients of weight_VD and bias are summed over the chunks in float32 (float64 for
    float64). Gradients cannot be differentiated again. Under torch.compile it is a break in the graph.

    FSDP2: called from the forward() of a module that holds the head, weight_VD is the whole tensor and nothing has to
    be done. Called from elsewhere it is a DTensor: it is gathered, and its gradient is the mean over the mesh, as
    FSDP2's own is, reduced in backward(). Every rank must take part.

    Raises TypeError / ValueError as distillation_loss does, and for a hidden_ND, weight_VD and bias that do not go
    together.
    """
    terms = LossTerms(temperature, alpha, tail, alpha != 0, alpha != 1, label_smoothing, z_loss, softcap)
    return _loss_parts(
        hidden_ND, weight_VD, t, labels_N, bias, terms, ignore_index, reduction, num_items_in_batch, row_weights_N,
        chunk_rows,
    ).loss  # fmt: skip


def fused_linear_distillation_loss_parts(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    t: TeacherBatch,
    labels_N: Tensor,
    bias: Tensor | None = None,
    temperature: float = 2.0,
    alpha: float = 0.7,
    tail: str = "bucket",
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    row_weights_N: Tensor | None = None,
    chunk_rows: int | None = None,
) -> DistillationLossParts:
    """(loss, kl, ce) as from distillation_loss_parts; arguments and errors as in fused_linear_distillation_loss."""
    terms = LossTerms(temperature, alpha, tail, True, True, label_smoothing, z_loss, softcap)
    return _loss_parts(
        hidden_ND, weight_VD, t, labels_N, bias, terms, ignore_index, reduction, num_items_in_batch, row_weights_N,
        chunk_rows,
    )  # fmt: skip


class _Call(NamedTuple):
    """What a call asks for, besides the tensors that may have gradients."""

    teacher: TeacherBatch
    labels_N: Tensor
    counted_N: Tensor
    terms: LossTerms
    weight: Tensor  # what a row is multiplied with, 0 axes or [N]
    reduction: str
    chunk_rows: int
    dtype: torch.dtype


def _loss_parts(
    hidden_ND, weight_VD, teacher, labels_N, bias, terms, ignore_index, reduction, num_items_in_batch, row_weights_N,
    chunk_rows,
) -> DistillationLossParts:  # fmt: skip
    check_head(hidden_ND, weight_VD, bias)
    check_head_against(hidden_ND, weight_VD, teacher, chunk_rows)
    terms, counted_N, weight = checked_rows(
        logits_like(hidden_ND, len(weight_VD)), teacher, labels_N, terms, ignore_index, reduction, num_items_in_batch,
        row_weights_N,
    )  # fmt: skip
    dtype, device = logits_dtype(hidden_ND), hidden_ND.device
    if chunk_rows is None:
        chunk_rows = linear_chunk_rows(
            len(hidden_ND), teacher.vocab_size, dtype, device, free_bytes=free_bytes_on(device)
        )  # fmt: skip
    call = _Call(teacher, labels_N, counted_N, terms, weight, reduction, chunk_rows, dtype)
    weight_VD, bias = whole_weight(weight_VD), None if bias is None else whole_weight(bias)
    if not _wanted(hidden_ND, weight_VD, bias):
        rows, _ = _run(hidden_ND, weight_VD, bias, call, None, (False,) * 3)
        return reduce_rows(*rows, weight, reduction)
    if reduction == "none":
        return reduce_rows(*_LinearLossRows.apply(hidden_ND, weight_VD, bias, call), weight, reduction)
    return DistillationLossParts(*_LinearLoss.apply(hidden_ND, weight_VD, bias, call))


def _wanted(*head: Tensor | None) -> tuple[bool, ...] | None:
    """Whether the gradient of hidden states, weight and bias is wanted, or None where none of them is."""
    wanted = tuple(torch.is_grad_enabled() and part is not None and part.requires_grad for part in head)
    return wanted if any(wanted) else None


def _run(
    hidden_ND: Tensor, weight_VD: Tensor, bias: Tensor | None, call: _Call, upstream: Tensor | None, wanted: tuple
) -> tuple[LossRows, HeadGradients]:
    tokens = slice(0, call.teacher.vocab_size)
    bias_V = None if bias is None else bias.detach()[tokens].to(call.dtype)
    head = LinearHead(hidden_ND.detach().to(call.dtype), weight_VD.detach()[tokens].to(call.dtype), bias_V)
    return linear_loss_rows(
        head, call.teacher, call.labels_N, call.counted_N, call.terms, chunk_rows=call.chunk_rows, upstream=upstream,
        wanted=wanted,
    )  # fmt: skip


class _LinearLoss(torch.autograd.Function):
    """The reduced loss; its gradients are made with it, multiplied with the weight of a row."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias, call):
        rest = call.weight.new_ones(())
        if call.dtype == torch.float16 and call.weight.numel():
            # It has no room for gradients divided by N before a GradScaler has multiplied them. What is left out here
            # is a power of two, so that multiplying with it in backward() rounds nothing.
            largest = call.weight.abs().amax()
            rest = torch.where(largest > 0, largest, 1).log2().ceil().exp2()
        rows, ctx.gradients = _run(hidden_ND, weight_VD, bias, call, call.weight / rest, ctx.needs_input_grad[:3])
        ctx.rest = rest
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in (hidden_ND, weight_VD, bias)]
        ctx.set_materialize_grads(False)
        parts = reduce_rows(*rows, call.weight, call.reduction)
        ctx.mark_non_differentiable(parts.kl, parts.ce)
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _kl, _ce):
        if upstream is None:
            return (None,) * 4
        if ctx.gradients is None:
            raise RuntimeError(
                "the distillation loss was differentiated a second time; its gradients were handed out by the first "
                "backward(). Pass retain_graph=True to that one, or compute the loss again"
            )
        gradients, kept = ctx.gradients, graph_is_kept()
        if not kept:
            ctx.gradients = None
        factor = upstream * ctx.rest
        scaled = (_scaled(gradient, factor, kept=kept) for gradient in gradients)
        return *(_shaped(*pair) for pair in zip(scaled, ctx.like, strict=True)), None


class _LinearLossRows(torch.autograd.Function):
    """The loss of each row; its gradients are made in backward(), which knows what each row's is multiplied with."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias, call):
        rows, _ = _run(hidden_ND, weight_VD, bias, call, None, (False,) * 3)
        ctx.call = call
        ctx.save_for_backward(hidden_ND, weight_VD, bias)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rows.kl_N, rows.ce_N)
        return tuple(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N, _kl, _ce):
        if upstream_N is None:
            return (None,) * 4
        head = ctx.saved_tensors
        _, gradients = _run(*head, ctx.call, upstream_N, ctx.needs_input_grad[:3])
        like = [None if x is None else (x.shape, x.dtype) for x in head]
        return *(_shaped(*pair) for pair in zip(gradients, like, strict=True)), None


def _scaled(gradient: Tensor | None, factor: Tensor, *, kept: bool) -> Tensor | None:
    """gradient * factor, in place unless it is kept for another backward(). Where Triton is, and on a CPU, a factor of
    1 is no pass, and nobody waits to know it."""
    if gradient is None:
        return None
    gradient = gradient.clone() if kept else gradient
    if gradient.dtype != torch.float64 and why_no_triton(gradient.device) is None:
        from logitstore_kernels import triton_function  # noqa: F401 - it defines the operator

        rows_NW = gradient if gradient.dim() == 2 else gradient[None]
        torch.ops.logitstore.scale_rows_in_place(rows_NW, factor.float().expand(len(rows_NW)).contiguous())
    elif factor.device.type != "cpu" or factor != 1:
        gradient.mul_(factor)
    return gradient


def _shaped(gradient: Tensor | None, like: tuple[torch.Size, torch.dtype] | None) -> Tensor | None:
    """The gradient in the dtype of what it is the gradient of, 0 in the rows of a head's padding."""
    if gradient is None:
        return None
    shape, dtype = like
    gradient = gradient.to(dtype)
    if gradient.shape == shape:
        return gradient
    return torch.cat([gradient, gradient.new_zeros(shape[0] - len(gradient), *shape[1:])])
