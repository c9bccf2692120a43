"""The arithmetic of one chunk of rows: student statistics, KL and cross-entropy, gradient, all in given buffers.

The student's tail mass is its own log-sum-exp: the K kept logits are set to -inf in the buffer, so that what is
streamed is the tail alone, right to 1e-6 relative at a mass of 1e-9 and below, where 1 - sum(q) has no digit left.
A row's quantities are relative to its largest logit; the streamed ones to the tail's largest.

Letters: N rows, C rows of a chunk, K entries kept, V vocabulary. T is the temperature, z a student logit, t and q are
the teacher's and the student's probabilities at T.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_kernels.tempering import NOT_NORMALISED, temper_teacher


@dataclass(frozen=True)
class LossTerms:
    """What is computed: kl_wanted / ce_wanted say which softmaxes are taken; one with a weight above 0 must be."""

    temperature: float
    alpha: float
    tail: str
    kl_wanted: bool
    ce_wanted: bool


class KnownRows(NamedTuple):
    """All that is known of a chunk's rows besides the student's logits."""

    ids_CK: Tensor  # int64, pads replaced by an id of the same row
    entry_CK: Tensor  # bool, False in pads
    logt_CK: Tensor  # ln t at T, -inf in pads
    logt_tail_C: Tensor
    n_tail_C: Tensor  # float, at least 1
    label_C: Tensor  # int64, 0 in rows that do not count
    counted_C: Tensor  # bool


class StudentRows(NamedTuple):
    """What one stream over the tail leaves of the student; every log is relative to the row's peak logit (over T)."""

    head_CK: Tensor  # z - peak, -inf in pads
    label_C: Tensor  # z of the label - peak
    tail_peak_C: Tensor  # the tail's largest z - peak; 0 where every tail logit is -inf
    tail_logits_sum_C: Tensor | None  # sum over the tail of z - the tail's largest z (for the uniform tail)
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
        return KnownRows(label_N[:, None], entry_N1, nothing_N[:, None], nothing_N, n_tail_N, label_N, counted_N)
    tempered = temper_teacher(teacher, temperature=terms.temperature, tail=terms.tail, dtype=dtype)
    return KnownRows(teacher.gather_ids_NK, teacher.ids_NK >= 0, *tempered, n_tail_N, label_N, counted_N)


def needs_two_exponentials(terms: LossTerms) -> bool:
    return terms.kl_wanted and terms.ce_wanted and terms.temperature != 1


def stream(x_CV: Tensor, scratch_CV: list[Tensor], chunk: KnownRows, terms: LossTerms) -> StudentRows:
    """Reduce a chunk of logits x_CV. With m the tail's largest z, mutates x_CV to e^((z - m) / T), 0 at entries, and
    scratch_CV, where there is one, to e^(z - m)."""
    temperature = terms.temperature if terms.kl_wanted else 1.0
    head_CK = x_CV.gather(1, chunk.ids_CK).masked_fill_(~chunk.entry_CK, -math.inf)
    label_C = x_CV.gather(1, chunk.label_C[:, None])[:, 0]
    x_CV.scatter_(1, chunk.ids_CK, -math.inf)
    tail_peak_C = x_CV.amax(dim=1)
    peak_C = torch.maximum(tail_peak_C, head_CK.amax(dim=1))
    tail_peak_C = torch.where(tail_peak_C == -math.inf, peak_C, tail_peak_C)
    x_CV.sub_(tail_peak_C[:, None])
    tail_logits_sum_C = None
    if terms.kl_wanted and terms.tail == "uniform":
        tail_logits_sum_C = x_CV.scatter_(1, chunk.ids_CK, 0).sum(dim=1)
        x_CV.scatter_(1, chunk.ids_CK, -math.inf)
    if scratch_CV and temperature != 2:
        torch.exp(x_CV, out=scratch_CV[0])
    if temperature != 1:
        x_CV.mul_(1 / temperature)
    tail_sum_T_C = x_CV.exp_().sum(dim=1)
    if scratch_CV and temperature == 2:
        torch.square(x_CV, out=scratch_CV[0])  # half the price of a second exponential

    head_CK.sub_(peak_C[:, None])
    tail_peak_C = tail_peak_C - peak_C
    lse_T_C = _logsumexp_of_parts(head_CK, tail_peak_C, tail_sum_T_C, temperature)
    lse_1_C = lse_T_C if temperature == 1 else None
    if scratch_CV:
        lse_1_C = _logsumexp_of_parts(head_CK, tail_peak_C, scratch_CV[0].sum(dim=1), 1.0)
    return StudentRows(head_CK, label_C - peak_C, tail_peak_C, tail_logits_sum_C, tail_sum_T_C, lse_T_C, lse_1_C)


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
        kl_C = _times_log_ratio(chunk.logt_CK, logq_CK).sum(dim=1)
        tail_logq_C = student.tail_peak_C / terms.temperature - student.lse_T_C
        if terms.tail == "uniform":
            tail_logq_C += student.tail_logits_sum_C / (chunk.n_tail_C * terms.temperature)
            kl_C += _times_log_ratio(chunk.logt_tail_C, tail_logq_C, -chunk.n_tail_C.log())
        elif terms.tail == "bucket":
            tail_logq_C += student.tail_sum_T_C.log()
            kl_C += _times_log_ratio(chunk.logt_tail_C, tail_logq_C)
    return kl_C.masked_fill(~chunk.counted_C, 0), ce_C.masked_fill(~chunk.counted_C, 0)


def _times_log_ratio(logt: Tensor, logq: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """t * (ln t + shift - ln q), 0 where t = 0."""
    t = logt.exp()
    return (t * (logt + shift - logq)).masked_fill_(t == 0, 0)


def write_gradient(
    x_CV: Tensor,
    scratch_CV: list[Tensor],
    student: StudentRows,
    chunk: KnownRows,
    terms: LossTerms,
    expected_upstream: Tensor,
) -> None:
    """Mutates x_CV, as stream left it, to the chunk's gradient with respect to the logits * expected_upstream.

    A tail column's gradient is c_T e^((z - m) / T) + c_1 e^(z - m) - b with three numbers a row, m the tail's largest
    logit. t_tail / q_tail, which may overflow, never appears: q_j / q_tail = e^((z_j - m) / T) / tail_sum_T.
    """
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

    if dense_1_C is not None and not scratch_CV:
        dense_T_C, dense_1_C = dense_T_C + dense_1_C, None
    x_CV.mul_(dense_T_C[:, None])
    if dense_1_C is not None:
        x_CV.addcmul_(scratch_CV[0], dense_1_C[:, None])
    if terms.alpha > 0 and terms.tail == "uniform":
        each_tail_C1 = (t_tail_C / chunk.n_tail_C * kl_scale)[:, None]
        x_CV.sub_(each_tail_C1)
        head_CK += each_tail_C1 * chunk.entry_CK
    # Entries hold 0 (uniform: what head_CK makes up for) and pads add 0, so that adding is writing.
    x_CV.scatter_add_(1, chunk.ids_CK, head_CK)
    if terms.alpha < 1:
        x_CV.scatter_add_(1, chunk.label_C[:, None], (-ce_scale).expand(len(x_CV), 1))
