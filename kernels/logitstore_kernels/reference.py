"""The distillation loss in plain PyTorch under autograd: the truth that every fast path is tested against.

Written to be read next to the formulas. It keeps several [N, V] tensors and computes in float32 (float64 for float64
logits). Only two things are guarded, because autograd turns 0 * inf into NaN: terms whose teacher probability is 0,
and a student tail whose every logit is -inf.

Letters: N rows, K entries kept, V vocabulary, W student columns (W >= V). T is the temperature.
p is the teacher at T, q the student at T.
"""

import math

import torch
from torch import Tensor

from logitstore_kernels.autocast import without_autocast
from logitstore_kernels.divergences import FORWARD_KL, divergence_rows, times_log_ratio
from logitstore_kernels.loss_arguments import DistillationLossParts, checked_rows, compute_dtype, reduce_rows
from logitstore_kernels.loss_terms import LossRows, LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_kernels.tempering import temper_teacher


def distillation_loss_reference(
    student_logits_NV: Tensor,
    t: TeacherBatch,
    labels_N: Tensor,
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
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
) -> Tensor:
    """alpha * T^2 * D(p, q) + (1 - alpha) * CE, D the divergence; differentiable any number of times."""
    terms = LossTerms(
        temperature, alpha, tail, alpha != 0, True, label_smoothing, z_loss, softcap, divergence, jsd_beta
    )
    return _loss_parts(
        student_logits_NV, t, labels_N, terms, ignore_index, reduction, num_items_in_batch, row_weights_N
    ).loss


def distillation_loss_parts_reference(
    student_logits_NV: Tensor,
    t: TeacherBatch,
    labels_N: Tensor,
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
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
) -> DistillationLossParts:
    """The loss with its two parts; arguments, values and errors as in distillation_loss_parts."""
    terms = LossTerms(temperature, alpha, tail, True, True, label_smoothing, z_loss, softcap, divergence, jsd_beta)
    return _loss_parts(
        student_logits_NV, t, labels_N, terms, ignore_index, reduction, num_items_in_batch, row_weights_N
    )


def _loss_parts(
    student_logits_NV: Tensor,
    t: TeacherBatch,
    labels_N: Tensor,
    terms: LossTerms,
    ignore_index: int,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    row_weights_N: Tensor | None,
) -> DistillationLossParts:
    checked = checked_rows(
        student_logits_NV, t, labels_N, terms, ignore_index, reduction, num_items_in_batch, row_weights_N
    )
    logits_NV = student_logits_NV.to(compute_dtype(student_logits_NV))
    rows = loss_rows_reference(logits_NV, t, labels_N, checked.counted_N, checked.terms)
    return reduce_rows(*rows, checked.weight, reduction)


def loss_rows_reference(
    logits_NW: Tensor, t: TeacherBatch, labels_N: Tensor, counted_N: Tensor, terms: LossTerms
) -> LossRows:
    """The values of each row [N], 0 where counted_N is False, computed in the logits' dtype under autograd."""
    # Selecting before computing is what keeps NaN logits of an uncounted row out of value and gradient.
    logits_NV = torch.where(counted_N[:, None], logits_NW[:, : t.vocab_size], 0)
    if terms.softcap is not None:
        capped_NV = terms.softcap * (logits_NV / terms.softcap).tanh()
        logits_NV = torch.where(logits_NV == -math.inf, logits_NV, capped_NV)
    label_N = torch.where(counted_N, labels_N, 0).long()
    ce_N = torch.where(counted_N, _cross_entropy_rows(logits_NV, label_N, terms), 0)
    kl_N = loss_N = torch.zeros_like(ce_N)
    if terms.kl_wanted:
        kl_N = torch.where(counted_N, _divergence_rows(logits_NV / terms.temperature, t, terms), 0)
    if terms.alpha > 0:  # skipped, not multiplied by 0: an unused term may be infinite
        loss_N = loss_N + terms.alpha * terms.temperature**2 * kl_N
    if terms.alpha < 1:
        loss_N = loss_N + (1 - terms.alpha) * ce_N
    return LossRows(loss_N, kl_N, ce_N)


def _cross_entropy_rows(logits_NV: Tensor, label_N: Tensor, terms: LossTerms) -> Tensor:
    logp_NV = logits_NV.log_softmax(dim=1)
    ce_N = -logp_NV.gather(1, label_N[:, None])[:, 0]
    if terms.label_smoothing > 0:
        ce_N = (1 - terms.label_smoothing) * ce_N - terms.label_smoothing * logp_NV.mean(dim=1)
    if terms.z_loss > 0:
        ce_N = ce_N + terms.z_loss * logits_NV.logsumexp(dim=1) ** 2
    return ce_N


def _divergence_rows(scaled_logits_NV: Tensor, teacher: TeacherBatch, terms: LossTerms) -> Tensor:
    """The divergence of each row in nats, [N]; scaled_logits are the student's logits / T."""
    if terms.divergence == FORWARD_KL:
        return _kl_rows(scaled_logits_NV, teacher, terms.temperature, terms.tail)
    logp_NO, logq_NO = _outcomes(scaled_logits_NV, teacher, terms.temperature, terms.tail)
    return divergence_rows(logp_NO, logq_NO, terms.divergence, terms.jsd_beta)


def _outcomes(scaled_logits_NV: Tensor, teacher: TeacherBatch, temperature: float, tail: str) -> tuple[Tensor, Tensor]:
    """(ln p, ln q) over what the tail tells apart: entries and tail [N, K + 1], or all tokens [N, V].

    A tail without mass ("renormalised") is one outcome, too: where p = 0, a divergence adds up the student's
    probabilities, and those of tokens apart and together are the same.
    """
    logt_NK, logt_tail_N = temper_teacher(teacher, temperature=temperature, tail=tail, dtype=scaled_logits_NV.dtype)
    ids_NK, pad_NK = teacher.gather_ids_NK, teacher.ids_NK < 0
    lse_N1 = scaled_logits_NV.logsumexp(dim=1, keepdim=True)
    if tail in ("bucket", "renormalised"):
        logq_NK = (scaled_logits_NV.gather(1, ids_NK) - lse_N1).masked_fill(pad_NK, -math.inf)
        logq_tail_N = _logsumexp(scaled_logits_NV.scatter(1, ids_NK, -math.inf)) - lse_N1[:, 0]
        return torch.cat([logt_NK, logt_tail_N[:, None]], 1), torch.cat([logq_NK, logq_tail_N[:, None]], 1)
    if tail == "dense":
        logp_NV = logt_tail_N[:, None] + _tail_logshape(teacher, ids_NK, logt_tail_N, temperature)
    else:
        n_tail_N = teacher.n_tail_N.clamp(min=1).to(logt_tail_N.dtype)
        logp_NV = (logt_tail_N - n_tail_N.log())[:, None].expand_as(scaled_logits_NV)
    # A pad repeats an id of its row, so entries are added to zeros instead of written.
    logp_NV = logp_NV.scatter(1, ids_NK, 0).scatter_add(1, ids_NK, logt_NK.masked_fill(pad_NK, 0))
    return logp_NV, scaled_logits_NV - lse_N1


def _kl_rows(scaled_logits_NV: Tensor, teacher: TeacherBatch, temperature: float, tail: str) -> Tensor:
    """KL(p || q) of each row in nats, [N]; scaled_logits are the student's logits / T."""
    logt_NK, logt_tail_N = temper_teacher(teacher, temperature=temperature, tail=tail, dtype=scaled_logits_NV.dtype)
    ids_NK = teacher.gather_ids_NK
    lse_N = scaled_logits_NV.logsumexp(dim=1)
    logq_NK = scaled_logits_NV.gather(1, ids_NK) - lse_N[:, None]
    kl_N = times_log_ratio(logt_NK, logq_NK).sum(dim=1)
    if tail == "bucket":
        logq_tail_N = _logsumexp(scaled_logits_NV.scatter(1, ids_NK, -math.inf)) - lse_N
        return kl_N + times_log_ratio(logt_tail_N, logq_tail_N)
    if tail == "uniform":
        n_tail_N = teacher.n_tail_N.clamp(min=1).to(lse_N.dtype)
        logt_each_N1 = (logt_tail_N - n_tail_N.log())[:, None]
        each_NV = times_log_ratio(logt_each_N1, scaled_logits_NV - lse_N[:, None])
        return kl_N + each_NV.scatter(1, ids_NK, 0).sum(dim=1)
    if tail == "dense":
        logt_NV = logt_tail_N[:, None] + _tail_logshape(teacher, ids_NK, logt_tail_N, temperature)
        return kl_N + times_log_ratio(logt_NV, scaled_logits_NV - lse_N[:, None]).sum(dim=1)
    return kl_N  # "renormalised", "dropped" and "sampled": what there is of a tail is taken care of in the teacher


def _tail_logshape(teacher: TeacherBatch, ids_NK: Tensor, logt_tail_N: Tensor, temperature: float) -> Tensor:
    """ln of each tail token's share of the tail at T [N, V], -inf at entries; in rows without a tail whatever."""
    dtype, dense = logt_tail_N.dtype, teacher.dense_tail
    coefs_Nr = dense.coefs_Nr.to(dtype).masked_fill((logt_tail_N == -math.inf)[:, None], 0)
    with without_autocast(coefs_Nr.device):
        logits_NV = (coefs_Nr @ dense.basis_Vr.to(dtype).T + dense.bias_V.to(dtype)) / temperature
    logits_NV = logits_NV.scatter(1, ids_NK, -math.inf)
    # A tail of no tokens has a log-sum of -inf; 0 in its place keeps -inf - -inf away.
    lse_N1 = _logsumexp(logits_NV)[:, None]
    return logits_NV - lse_N1.masked_fill(lse_N1 == -math.inf, 0)


def _logsumexp(x_NV: Tensor) -> Tensor:
    """ln sum e^x of each row; unlike torch.logsumexp, a row of nothing but -inf has a gradient of 0 and not NaN."""
    peak_N1 = x_NV.detach().amax(dim=1, keepdim=True)
    empty_N1 = peak_N1 == -math.inf
    peak_N1 = peak_N1.masked_fill(empty_N1, 0)
    sum_N1 = (x_NV - peak_N1).exp().sum(dim=1, keepdim=True)
    return (peak_N1 + sum_N1.masked_fill(empty_N1, 1).log()).masked_fill(empty_N1, -math.inf)[:, 0]
