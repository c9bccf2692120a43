"""The arithmetic of one chunk of rows: student statistics, KL and cross-entropy, gradient, all in given buffers.

The student's tail mass is its own log-sum-exp: the K kept logits are set to -inf in the buffer, so that what is
streamed is the tail alone, right to 1e-6 relative at a mass of 1e-9 and below, where 1 - sum(q) has no digit left.
A row's quantities are relative to its largest logit; the streamed ones to the tail's largest.

Letters: N rows, C rows of a chunk, K entries kept, V vocabulary. T is the temperature, z a student logit, t and q are
the teacher's and the student's probabilities at T.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_kernels.tempering import NOT_NORMALISED, temper_teacher


class ChunkBuffers(NamedTuple):
    """The working memory of a chunk, all of it of the compute dtype; what is in it is said where it is written."""

    x_CV: Tensor  # the logits at first
    out_CV: Tensor | None  # the gradient in the end, scratch before; x_CV itself unless needs_scratch
    shape_CV: Tensor | None  # for a tail of a shape


class KnownRows(NamedTuple):
    """All that is known of a chunk's rows besides the student's logits."""

    ids_CK: Tensor  # int64, pads replaced by an id of the same row
    entry_CK: Tensor  # bool, False in pads
    logt_CK: Tensor  # ln t at T, -inf in pads
    logt_tail_C: Tensor
    n_tail_C: Tensor  # float, at least 1
    label_C: Tensor  # int64, 0 in rows that do not count
    counted_C: Tensor  # bool
    coefs_Cr: Tensor | None  # of the tail's shape, 0 in rows without a tail


class TailShape(NamedTuple):
    """The teacher's tail at T next to the student's, token by token; g is a tail logit / T less the row's largest."""

    sum_C: Tensor  # sum over the tail of e^g, at least 1 unless there is no tail token
    log_ratio_sum_C: Tensor  # sum over the tail of e^g (g - (z - the student's largest in the tail) / T)
    largest_C: Tensor  # the row's largest tail logit / T, 0 where there is no tail token


class StudentRows(NamedTuple):
    """What one stream over the tail leaves of the student; every log is relative to the row's peak logit (over T)."""

    peak_C: Tensor  # the largest z of all columns, 0 where every one is -inf
    head_CK: Tensor  # z - peak, -inf in pads
    label_C: Tensor  # z of the label - peak
    tail_peak_C: Tensor  # the tail's largest z - peak; 0 where every tail logit is -inf
    tail_logits_sum_C: Tensor | None  # sum over the tail of z - the tail's largest z (for the uniform tail)
    tail_shape: TailShape | None  # for the dense tail
    tail_sum_T_C: Tensor  # sum over the tail of e^((z - largest) / T), at least 1 unless every one is -inf
    lse_T_C: Tensor  # ln sum over all columns of e^((z - peak) / T)
    lse_1_C: Tensor | None


def known_rows(
    teacher: TeacherBatch, labels_N: Tensor, counted_N: Tensor, terms: LossTerms, dtype: torch.dtype
) -> KnownRows:
    label_N = torch.where(counted_N, labels_N, 0).long()
    n_tail_N = teacher.n_tail_N.clamp(min=1).to(dtype)
    if not terms.kl_wanted:
        # Cross-entropy alone: the label plays the head, with a teacher that says nothing.
        nothing_N = torch.full_like(n_tail_N, -math.inf)
        entry_N1 = torch.ones_like(label_N, dtype=torch.bool)[:, None]
        return KnownRows(label_N[:, None], entry_N1, nothing_N[:, None], nothing_N, n_tail_N, label_N, counted_N, None)
    tempered = temper_teacher(teacher, temperature=terms.temperature, tail=terms.tail, dtype=dtype)
    coefs_Nr = None
    if terms.tail == "dense":
        no_tail_N1 = (tempered.logt_tail_N == -math.inf)[:, None]
        coefs_Nr = teacher.dense_tail.coefs_Nr.to(dtype).masked_fill(no_tail_N1, 0)
    return KnownRows(teacher.gather_ids_NK, teacher.ids_NK >= 0, *tempered, n_tail_N, label_N, counted_N, coefs_Nr)


def needs_two_exponentials(terms: LossTerms) -> bool:
    return terms.kl_wanted and terms.ce_wanted and terms.temperature != 1


def needs_shape(terms: LossTerms) -> bool:
    return terms.kl_wanted and terms.tail == "dense"


def needs_scratch(terms: LossTerms) -> bool:
    """Whether out_CV must be a buffer of its own, and be there even where no gradient is wanted."""
    return needs_two_exponentials(terms) or needs_shape(terms)


def stream(buffers: ChunkBuffers, chunk: KnownRows, terms: LossTerms) -> StudentRows:
    """Reduce a chunk of logits x_CV. With m the tail's largest z, mutates x_CV to e^((z - m) / T), 0 at entries, and
    out_CV to e^(z - m) where that is needed. shape_CV is mutated from the teacher's tail logits / T to e^g, 0 at
    entries, g being such a logit less the largest of the tail."""
    x_CV, two_exponentials = buffers.x_CV, needs_two_exponentials(terms)
    temperature = terms.temperature if terms.kl_wanted else 1.0
    head_CK = x_CV.gather(1, chunk.ids_CK).masked_fill_(~chunk.entry_CK, -math.inf)
    label_C = x_CV.gather(1, chunk.label_C[:, None])[:, 0]
    x_CV.scatter_(1, chunk.ids_CK, -math.inf)
    tail_peak_C = x_CV.amax(dim=1)
    peak_C = torch.maximum(tail_peak_C, head_CK.amax(dim=1))
    peak_C = peak_C.masked_fill(peak_C == -math.inf, 0)
    tail_peak_C = torch.where(tail_peak_C == -math.inf, peak_C, tail_peak_C)
    x_CV.sub_(tail_peak_C[:, None])
    tail_logits_sum_C = None
    if terms.kl_wanted and terms.tail == "uniform":
        tail_logits_sum_C = x_CV.scatter_(1, chunk.ids_CK, 0).sum(dim=1)
        x_CV.scatter_(1, chunk.ids_CK, -math.inf)
    tail_shape = _shape_beside(buffers, chunk, temperature) if needs_shape(terms) else None
    if two_exponentials and temperature != 2:
        torch.exp(x_CV, out=buffers.out_CV)
    if temperature != 1:
        x_CV.mul_(1 / temperature)
    tail_sum_T_C = x_CV.exp_().sum(dim=1)
    if two_exponentials and temperature == 2:
        torch.square(x_CV, out=buffers.out_CV)  # half the price of a second exponential

    head_CK.sub_(peak_C[:, None])
    tail_peak_C = tail_peak_C - peak_C
    lse_T_C = _logsumexp_of_parts(head_CK, tail_peak_C, tail_sum_T_C, temperature)
    lse_1_C = lse_T_C if temperature == 1 else None
    if two_exponentials:
        lse_1_C = _logsumexp_of_parts(head_CK, tail_peak_C, buffers.out_CV.sum(dim=1), 1.0)
    label_C = label_C - peak_C
    return StudentRows(
        peak_C, head_CK, label_C, tail_peak_C, tail_logits_sum_C, tail_shape, tail_sum_T_C, lse_T_C, lse_1_C
    )


def _shape_beside(buffers: ChunkBuffers, chunk: KnownRows, temperature: float) -> TailShape:
    """Reduce the tail logits / T in shape_CV beside the student's z - m in x_CV. Mutates shape_CV to e^g, 0 at entries,
    and out_CV to whatever.

    g and z / T are subtracted before they are summed: where student and teacher agree, little is left to be rounded.
    """
    x_CV, work_CV, shape_CV = buffers
    shape_CV.scatter_(1, chunk.ids_CK, -math.inf)
    largest_C1 = shape_CV.amax(dim=1, keepdim=True)
    largest_C1.masked_fill_(largest_C1 == -math.inf, 0)
    shape_CV.sub_(largest_C1)
    torch.sub(shape_CV, x_CV, alpha=1 / temperature, out=work_CV)
    shape_CV.exp_()
    # NaN is 0 * inf at entries and where the teacher gives a token nothing; one from the student is in its lse_T too.
    work_CV.mul_(shape_CV).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return TailShape(shape_CV.sum(dim=1), work_CV.sum(dim=1), largest_C1[:, 0])


def _logsumexp_of_parts(head_CK: Tensor, tail_peak_C: Tensor, tail_sum_C: Tensor, temperature: float) -> Tensor:
    tail_lse_C = tail_peak_C / temperature + tail_sum_C.log()
    return torch.logaddexp(tail_lse_C, (head_CK / temperature).logsumexp(dim=1))


def values(student: StudentRows, chunk: KnownRows, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """KL at T and cross-entropy of a chunk's rows in nats, each 0 where it is not wanted or the row does not count."""
    kl_C = ce_C = torch.zeros_like(student.label_C)
    if terms.ce_wanted:
        ce_C = student.lse_1_C - student.label_C
    if terms.kl_wanted:
        logq_CK = student.head_CK / terms.temperature - student.lse_T_C[:, None]
        kl_C = times_log_ratio(chunk.logt_CK, logq_CK).sum(dim=1)
        tail_logq_C = student.tail_peak_C / terms.temperature - student.lse_T_C
        if terms.tail == "uniform":
            tail_logq_C += student.tail_logits_sum_C / (chunk.n_tail_C * terms.temperature)
            kl_C += times_log_ratio(chunk.logt_tail_C, tail_logq_C, -chunk.n_tail_C.log())
        elif terms.tail == "dense":
            sum_C, log_ratio_sum_C, _ = student.tail_shape
            tail_logq_C += sum_C.log() - log_ratio_sum_C / sum_C
            kl_C += times_log_ratio(chunk.logt_tail_C, tail_logq_C)
        elif terms.tail == "bucket":
            tail_logq_C += student.tail_sum_T_C.log()
            kl_C += times_log_ratio(chunk.logt_tail_C, tail_logq_C)
    return kl_C.masked_fill(~chunk.counted_C, 0), ce_C.masked_fill(~chunk.counted_C, 0)


def times_log_ratio(logt: Tensor, logq: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """t * (ln t + shift - ln q), 0 where t = 0."""
    t = logt.exp()
    return (t * (logt + shift - logq)).masked_fill_(t == 0, 0)


def write_gradient(
    buffers: ChunkBuffers,
    student: StudentRows,
    chunk: KnownRows,
    terms: LossTerms,
    expected_upstream: Tensor,
) -> None:
    """Mutates out_CV to the chunk's gradient with respect to the logits * expected_upstream; x_CV is as stream left it.

    A tail column's gradient is c_T e^((z - m) / T) + c_1 e^(z - m) - b with three numbers a row, m the tail's largest
    logit; with a dense tail b is the token's own, b_0 e^g. t_tail / q_tail, which may overflow, never appears:
    q_j / q_tail = e^((z_j - m) / T) / tail_sum_T.
    """
    x_CV, out_CV, shape_CV = buffers
    kl_scale = terms.alpha * terms.temperature * expected_upstream  # T^2 / T
    ce_scale = (1 - terms.alpha) * expected_upstream
    head_CK = torch.zeros_like(student.head_CK)
    dense_T_C = torch.zeros_like(student.label_C)
    if terms.alpha > 0:
        t_CK, t_tail_C = chunk.logt_CK.exp(), chunk.logt_tail_C.exp()
        q_CK = (student.head_CK / terms.temperature - student.lse_T_C[:, None]).exp_()
        q_scale_C = torch.exp(student.tail_peak_C / terms.temperature - student.lse_T_C)
        if terms.tail in NOT_NORMALISED:
            head_mass_C = t_CK.sum(dim=1)
            q_CK *= head_mass_C[:, None]
            q_scale_C *= head_mass_C
        elif terms.tail == "bucket":
            q_scale_C -= t_tail_C / student.tail_sum_T_C.clamp(min=1)
        head_CK = (q_CK - t_CK) * kl_scale
        dense_T_C = q_scale_C * kl_scale
    dense_1_C = None
    if terms.alpha < 1:
        head_CK += (student.head_CK - student.lse_1_C[:, None]).exp_() * ce_scale
        dense_1_C = torch.exp(student.tail_peak_C - student.lse_1_C) * ce_scale

    if dense_1_C is not None and needs_two_exponentials(terms):
        out_CV.mul_(dense_1_C[:, None]).addcmul_(x_CV, dense_T_C[:, None])
    else:
        torch.mul(x_CV, (dense_T_C if dense_1_C is None else dense_T_C + dense_1_C)[:, None], out=out_CV)
    if terms.alpha > 0 and terms.tail == "dense":
        shape_scale_C = t_tail_C / student.tail_shape.sum_C.clamp(min=1) * kl_scale
        out_CV.addcmul_(shape_CV, shape_scale_C[:, None], value=-1)
    if terms.alpha > 0 and terms.tail == "uniform":
        each_tail_C1 = (t_tail_C / chunk.n_tail_C * kl_scale)[:, None]
        out_CV.sub_(each_tail_C1)
        head_CK += each_tail_C1 * chunk.entry_CK
    # Entries hold 0 (uniform: what head_CK makes up for) and pads add 0, so that adding is writing.
    out_CV.scatter_add_(1, chunk.ids_CK, head_CK)
    if terms.alpha < 1:
        out_CV.scatter_add_(1, chunk.label_C[:, None], (-ce_scale).expand(len(x_CV), 1))
