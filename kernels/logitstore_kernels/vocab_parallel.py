"""vocab_parallel_distillation_loss: the loss where every process has some columns of the logits (tensor parallelism).

One pass reduces a process's columns to 14 numbers a row (vocab_shards.py), one all-gather shares them, and a second
pass computes its part of the gradient from the logits again. No process ever sees the others' logits, and nothing of
K numbers a row is sent. Plain PyTorch over row chunks.

Letters: N rows, C rows of a chunk, S columns of this process, V vocabulary. T is the temperature.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitstore_kernels.chunk_math import (
    ChunkBuffers,
    KnownRows,
    StudentRows,
    known_rows,
    needs_shape,
    stream,
    write_gradient,
)
from logitstore_kernels.chunked import scaled_gradient
from logitstore_kernels.loss_arguments import (
    DistillationLossParts,
    checked_rows,
    compute_dtype,
    logits_like,
    reduce_rows,
)
from logitstore_kernels.loss_terms import LossRows, LossTerms
from logitstore_kernels.row_chunks import rows_per_chunk
from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_kernels.vocab_shards import MergedRows, ShardRows, in_shard, in_whole_row, merge, shard_rows


def vocab_parallel_distillation_loss(
    student_logits_NS: Tensor,
    t: TeacherBatch,
    labels_N: Tensor,
    temperature: float = 2.0,
    alpha: float = 0.7,
    tail: str = "bucket",
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    *,
    vocab_start: int,
    group: Any = None,
) -> Tensor:
    """distillation_loss of the logits whose columns [vocab_start, vocab_start + S) this process has; equal in all.

    student_logits_NS: [N, S], any float dtype. The processes' columns make up the vocabulary without gap or overlap;
        their numbers may differ, and columns at or beyond t.vocab_size (padding of the head) take no part.
    t, labels_N: those of the whole rows, with ids of the whole vocabulary, the same in every process.
    vocab_start: the token of the first column.
    group: the torch.distributed process group of the shards; None for the default one.

    Everything else as in distillation_loss, of which label smoothing, z-loss, softcap, row weights and inplace are not
    here. The gradient is that of this process's columns for the loss of the whole rows, which every process is to
    differentiate alike; backward() communicates nothing. Every process must call.

    Raises TypeError / ValueError as distillation_loss does, for a vocab_start that is no column number, and on a CPU
    where the columns of all processes are not as many as the vocabulary's.
    """
    return _loss_parts(
        student_logits_NS, t, labels_N, temperature, alpha, tail, ignore_index, reduction, num_items_in_batch,
        vocab_start, group, kl_wanted=alpha != 0, ce_wanted=alpha != 1,
    ).loss  # fmt: skip


def vocab_parallel_distillation_loss_parts(
    student_logits_NS: Tensor,
    t: TeacherBatch,
    labels_N: Tensor,
    temperature: float = 2.0,
    alpha: float = 0.7,
    tail: str = "bucket",
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    *,
    vocab_start: int,
    group: Any = None,
) -> DistillationLossParts:
    """(loss, kl, ce) as from distillation_loss_parts; arguments and errors as in vocab_parallel_distillation_loss."""
    return _loss_parts(
        student_logits_NS, t, labels_N, temperature, alpha, tail, ignore_index, reduction, num_items_in_batch,
        vocab_start, group, kl_wanted=True, ce_wanted=True,
    )  # fmt: skip


class _Shard(NamedTuple):
    """A process's columns of the vocabulary: n_tokens of them from vocab_start on, and the group of all processes."""

    vocab_start: int
    n_tokens: int
    group: Any


def _loss_parts(
    logits_NS, teacher, labels_N, temperature, alpha, tail, ignore_index, reduction, num_items_in_batch, vocab_start,
    group, *, kl_wanted, ce_wanted,
) -> DistillationLossParts:  # fmt: skip
    _check_shard(logits_NS, teacher, vocab_start)
    like_whole_rows = logits_like(logits_NS, teacher.vocab_size)
    asked = LossTerms(temperature, alpha, tail, kl_wanted, ce_wanted)
    terms, counted_N, weight = checked_rows(
        like_whole_rows, teacher, labels_N, asked, ignore_index, reduction, num_items_in_batch
    )
    shard = _Shard(vocab_start, min(logits_NS.shape[1], max(0, teacher.vocab_size - vocab_start)), group)
    known = known_rows(teacher, labels_N, counted_N, terms, compute_dtype(logits_NS))
    rows = LossRows(*_VocabParallelLoss.apply(logits_NS, teacher, known, terms, weight, shard))
    return reduce_rows(*rows, weight, reduction)


def _check_shard(logits_NS: Tensor, teacher: TeacherBatch, vocab_start: int) -> None:
    if not isinstance(teacher, TeacherBatch):
        raise TypeError(f"the teacher must be a TeacherBatch, got {type(teacher).__name__}")
    if not isinstance(logits_NS, Tensor):
        raise TypeError(f"student_logits_NS must be a torch.Tensor, got {type(logits_NS).__name__}")
    if not logits_NS.is_floating_point():
        raise TypeError(f"student_logits_NS must be of a float dtype, got {logits_NS.dtype}")
    if logits_NS.dim() != 2:
        raise ValueError(f"student_logits_NS must be [N, S], got shape {tuple(logits_NS.shape)}; flatten B and L")
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int):
        raise TypeError(f"vocab_start must be an int, got {type(vocab_start).__name__}")
    if vocab_start < 0:
        raise ValueError(f"vocab_start must be the token of the shard's first column, got {vocab_start}")


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NS, teacher, known, terms, expected_upstream, shard):
        # float16 has no room for gradients divided by N before a GradScaler has multiplied them.
        if logits_NS.dtype == torch.float16:
            expected_upstream = torch.ones_like(expected_upstream)
        logits_NS = logits_NS.detach()
        run = _Run(logits_NS, teacher, in_shard(known, shard.vocab_start, shard.n_tokens), terms, shard)
        merged = merge(run.all_shards(), known, terms)
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(run.gradient(merged, expected_upstream), expected_upstream)
        loss_N = torch.zeros_like(merged.kl)
        if terms.alpha > 0:
            loss_N.add_(merged.kl, alpha=terms.alpha * terms.temperature**2)
        if terms.alpha < 1:
            loss_N.add_(merged.ce, alpha=1 - terms.alpha)
        ctx.mark_non_differentiable(merged.kl, merged.ce)
        return loss_N, merged.kl, merged.ce

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N, _kl, _ce):
        if upstream_N is None:
            return (None,) * 6
        gradient_NS, expected_upstream = ctx.saved_tensors
        return scaled_gradient(gradient_NS, upstream_N / expected_upstream), *(None,) * 5


class _Run:
    """The two passes of a process over its own columns; the buffers are one column wider, for ids of other shards."""

    def __init__(
        self, logits_NS: Tensor, teacher: TeacherBatch, known: KnownRows, terms: LossTerms, shard: _Shard
    ) -> None:
        self._logits_NS, self._teacher, self._known, self._terms, self._shard = logits_NS, teacher, known, terms, shard
        width, like = shard.n_tokens + 1, known.logt_CK
        n_rows = len(known.label_C)
        chunk_rows = max(1, min(n_rows, rows_per_chunk(width * like.element_size(), like.device)))
        self._chunks = [slice(start, min(start + chunk_rows, n_rows)) for start in range(0, n_rows, chunk_rows)]
        self._x_CS, self._out_CS = like.new_empty(chunk_rows, width), like.new_empty(chunk_rows, width)
        self._shape_CS = like.new_empty(chunk_rows, width) if needs_shape(terms) else None

    def all_shards(self) -> ShardRows:
        """What every process says of every row, [R, N] each; one all-gather."""
        n_rows = len(self._known.label_C)
        own_FN = self._known.logt_CK.new_empty(len(ShardRows._fields), n_rows)
        for rows in self._chunks:
            chunk, _, student = self._stream(rows)
            for whole_N, part in zip(
                own_FN, shard_rows(student, chunk, self._terms, self._shard.n_tokens), strict=True
            ):
                whole_N[rows] = part
        world_size = torch.distributed.get_world_size(self._shard.group)
        gathered = [torch.empty_like(own_FN) for _ in range(world_size)]
        torch.distributed.all_gather(gathered, own_FN, group=self._shard.group)
        shards_RN = ShardRows(*torch.stack(gathered, dim=1))
        self._check_vocabulary(shards_RN.n_tokens)
        return shards_RN

    def gradient(self, merged: MergedRows, expected_upstream: Tensor) -> Tensor:
        """[N, S] of the logits' dtype: the gradient of sum(expected_upstream * loss_N) for this process's columns."""
        gradient_NS = torch.zeros_like(self._logits_NS)
        for rows in self._chunks:
            chunk, buffers, student = self._stream(rows)
            student = in_whole_row(student, MergedRows(*(part[rows] for part in merged)), self._terms)
            write_gradient(buffers, student, chunk, self._terms, expected_upstream)
            buffers.out_CV.masked_fill_(~chunk.counted_C[:, None], 0)
            gradient_NS[rows, : self._shard.n_tokens] = buffers.out_CV[:, :-1]
        return gradient_NS

    def _stream(self, rows: slice) -> tuple[KnownRows, ChunkBuffers, StudentRows]:
        n_rows, n_tokens = rows.stop - rows.start, self._shard.n_tokens
        chunk = KnownRows(*(None if part is None else part[rows] for part in self._known))
        buffers = ChunkBuffers(
            *(None if buffer is None else buffer[:n_rows] for buffer in (self._x_CS, self._out_CS, self._shape_CS))
        )
        buffers.x_CV[:, :n_tokens].copy_(self._logits_NS[rows, :n_tokens])
        buffers.x_CV[:, n_tokens] = -torch.inf
        if needs_shape(self._terms):
            if n_tokens:
                start = self._shard.vocab_start
                tail = self._teacher.dense_tail.tokens(slice(start, start + n_tokens))
                tail.write_logits(buffers.shape_CV[:, :n_tokens], chunk.coefs_Cr, temperature=self._terms.temperature)
            buffers.shape_CV[:, n_tokens] = -torch.inf
        return chunk, buffers, stream(buffers, chunk, self._terms)

    def _check_vocabulary(self, n_tokens_RN: Tensor) -> None:
        if n_tokens_RN.device.type != "cpu" or n_tokens_RN.shape[1] == 0:
            return
        counts = [int(count) for count in n_tokens_RN[:, 0]]
        if sum(counts) != self._teacher.vocab_size:
            raise ValueError(
                f"the processes' columns must make up the vocabulary of {self._teacher.vocab_size}, but they have "
                f"{' + '.join(map(str, counts))} of its tokens; check vocab_start and the shards' widths"
            )
