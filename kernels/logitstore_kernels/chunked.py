"""The distillation loss over row chunks, value and analytic gradient in one pass: the fast path for CPU and MPS.

A chunk of logits is copied to one buffer (row_chunks.py says how large; a second one for a dense tail) and turned into
the gradient (chunk_math.py), whose own memory is the scratch where that has the dtype to compute in and its rows all
count; else it is one more buffer. Nothing of N * V elements is made besides the gradient, and with inplace=True not
even that. Computes in float32, in float64 for float64 logits. The price: the gradient exists before backward() asks for
it, and it cannot be differentiated again.

Letters: N rows, C rows of a chunk, V vocabulary, W logits columns (W >= V). T is the temperature.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitstore_kernels.chunk_math import (
    ChunkBuffers,
    KnownRows,
    known_rows,
    needs_scratch,
    needs_shape,
    stream,
    values,
    write_gradient,
)
from logitstore_kernels.loss_arguments import compute_dtype
from logitstore_kernels.loss_terms import LossRows, LossTerms
from logitstore_kernels.row_chunks import RowChunk, row_chunks, rows_per_chunk, zero_rows
from logitstore_kernels.teacher_batch import TeacherBatch


def chunked_loss_rows(
    logits_NW: Tensor,
    teacher: TeacherBatch,
    labels_N: Tensor,
    counted_N: Tensor,
    terms: LossTerms,
    *,
    expected_upstream: Tensor,
    inplace: bool = False,
    skip_uncounted: bool | None = None,
) -> LossRows:
    """alpha * T^2 * KL + (1 - alpha) * CE of each row, differentiable once with respect to logits_NW.

    logits_NW: [N, W] of any float dtype; the gradient has that dtype.
    expected_upstream: 0 axes, compute dtype; what a row's loss is going to be multiplied with. It is folded into the
        stored gradient, so that the factor in backward() is 1 and the gradient is rounded once.
    inplace: True, where a gradient is wanted, mutates logits_NW: it becomes the gradient and its version counter moves
        on, so that autograd notices whoever needed the logits.
    skip_uncounted: whether rows that do not count are left out, which saves their time, or computed and zeroed; finding
        them synchronises with the host, so by default only on a CPU.
    """
    if skip_uncounted is None:
        skip_uncounted = logits_NW.device.type == "cpu"
    if torch.is_grad_enabled() and logits_NW.requires_grad:
        return LossRows(
            *_ChunkedLoss.apply(
                logits_NW, teacher, labels_N, counted_N, terms, expected_upstream, inplace, skip_uncounted
            )
        )
    return _run(logits_NW.detach(), teacher, labels_N, counted_N, terms, expected_upstream, None, skip_uncounted)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NW, teacher, labels_N, counted_N, terms, expected_upstream, inplace, skip_uncounted):
        # float16 has no room for gradients divided by N before a GradScaler has multiplied them.
        if logits_NW.dtype == torch.float16:
            expected_upstream = torch.ones_like(expected_upstream)
        logits_NW = logits_NW.detach()  # shares the version counter
        gradient_NW = logits_NW if inplace else torch.empty_like(logits_NW)
        rows = _run(logits_NW, teacher, labels_N, counted_N, terms, expected_upstream, gradient_NW, skip_uncounted)
        ctx.save_for_backward(gradient_NW, expected_upstream)
        ctx.mark_non_differentiable(rows.kl_N, rows.ce_N)
        ctx.set_materialize_grads(False)
        return tuple(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N, _kl, _ce):
        if upstream_N is None:
            return (None,) * 8
        gradient_NW, expected_upstream = ctx.saved_tensors
        return scaled_gradient(gradient_NW, upstream_N / expected_upstream), *(None,) * 7


def scaled_gradient(gradient_NW: Tensor, factor_N: Tensor) -> Tensor:
    """The gradient that forward() saved, each row times its factor. Mutates it, unless the graph is kept and it may be
    asked for again."""
    if graph_is_kept():
        gradient_NW = gradient_NW.clone()
    _scale_rows(gradient_NW, factor_N)
    return gradient_NW


def graph_is_kept() -> bool:
    """Whether this backward() runs with retain_graph=True, so that it may be followed by another one.

    Where PyTorch does not say (the call is private to it), yes: that costs a copy of the gradient, nothing else.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def _scale_rows(gradient_NW: Tensor, factor_N: Tensor) -> None:
    """Multiply each row in place, by chunks: mixed dtypes on a CPU make a float32 copy of all they are given."""
    if factor_N.device.type == "cpu" and bool((factor_N == 1).all()):
        return
    chunk_rows = _rows_per_chunk(gradient_NW)
    for start in range(0, gradient_NW.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        gradient_NW[rows].mul_(factor_N[rows, None])


def _rows_per_chunk(logits_NW: Tensor) -> int:
    return rows_per_chunk(compute_dtype(logits_NW).itemsize * logits_NW.shape[1], logits_NW.device)


class _Memory:
    """The buffers of a run over chunks, each made when a chunk first needs it."""

    def __init__(self, like: Tensor, terms: LossTerms, chunk_rows: int, vocab_size: int) -> None:
        self._like, self._terms, self._shape = like, terms, (chunk_rows, vocab_size)
        self._made: dict[str, Tensor] = {}

    def of_chunk(self, chunk: RowChunk, gradient_NV: Tensor | None) -> ChunkBuffers:
        """Buffers for the chunk's rows, out_CV being their very gradient where it is computed in place."""
        n_rows = sum(of_chunk.stop - of_chunk.start for of_chunk, _ in chunk.runs)
        x_CV = self._buffer("x", n_rows)
        shape_CV = self._buffer("shape", n_rows) if needs_shape(self._terms) else None
        if self.is_in_place(chunk, gradient_NV):
            return ChunkBuffers(x_CV, gradient_NV[chunk.runs[0][1]], shape_CV)
        return ChunkBuffers(x_CV, self._buffer("out", n_rows) if needs_scratch(self._terms) else x_CV, shape_CV)

    def is_in_place(self, chunk: RowChunk, gradient_NV: Tensor | None) -> bool:
        return gradient_NV is not None and len(chunk.runs) == 1 and gradient_NV.dtype == self._like.dtype

    def _buffer(self, name: str, n_rows: int) -> Tensor:
        if name not in self._made:
            self._made[name] = self._like.new_empty(self._shape)
        return self._made[name][:n_rows]


@torch.no_grad()
def _run(
    logits_NW: Tensor,
    teacher: TeacherBatch,
    labels_N: Tensor,
    counted_N: Tensor,
    terms: LossTerms,
    expected_upstream: Tensor,
    gradient_NW: Tensor | None,
    skip_uncounted: bool,
) -> LossRows:
    """The values of all rows and, unless gradient_NW is None, their gradient * expected_upstream written into it."""
    n_rows, vocab_size = logits_NW.shape[0], teacher.vocab_size
    known = known_rows(teacher, labels_N, counted_N, terms, compute_dtype(logits_NW))
    kl_N, ce_N = torch.zeros_like(known.n_tail_C), torch.zeros_like(known.n_tail_C)
    chunk_rows = min(_rows_per_chunk(logits_NW), n_rows)
    memory = _Memory(known.logt_CK, terms, chunk_rows, vocab_size)
    gradient_NV = None if gradient_NW is None else gradient_NW[:, :vocab_size]
    if gradient_NW is not None:
        gradient_NW[:, vocab_size:] = 0
        if skip_uncounted:
            zero_rows(gradient_NW, ~counted_N)
    for row_chunk in row_chunks(counted_N, max(chunk_rows, 1), skip_uncounted=skip_uncounted):
        rows, runs = row_chunk
        chunk = KnownRows(*(None if value is None else value[rows] for value in known))
        buffers = memory.of_chunk(row_chunk, gradient_NV)
        for buffer_rows, run in runs:
            buffers.x_CV[buffer_rows].copy_(logits_NW[run, :vocab_size])
        if needs_shape(terms):
            teacher.dense_tail.write_logits(buffers.shape_CV, chunk.coefs_Cr, temperature=terms.temperature)
        student = stream(buffers, chunk, terms)
        kl_N[rows], ce_N[rows] = values(student, chunk, terms)
        if gradient_NV is not None:
            write_gradient(buffers, student, chunk, terms, expected_upstream)
            if not skip_uncounted:
                buffers.out_CV.masked_fill_(~chunk.counted_C[:, None], 0)
            for buffer_rows, run in () if memory.is_in_place(row_chunk, gradient_NV) else runs:
                gradient_NV[run] = buffers.out_CV[buffer_rows]
    loss_N = torch.zeros_like(kl_N)
    if terms.alpha > 0:
        loss_N.add_(kl_N, alpha=terms.alpha * terms.temperature**2)
    if terms.alpha < 1:
        loss_N.add_(ce_N, alpha=1 - terms.alpha)
    return LossRows(loss_N, kl_N, ce_N)
