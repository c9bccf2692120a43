"""What one process's columns of the logits say of a row, and what those of all processes say together.

Each process reduces its own columns to a few numbers a row (ShardRows), relative to the largest logit that it sees;
merged, they give KL and cross-entropy, and what a process needs to write the gradient of its own columns. Logs stay
logs: a shard of columns that are all -inf, or none at all, adds nothing.

Letters: R processes (shards of the vocabulary), N rows, K entries kept, S columns of a shard. T is the temperature, z a
student logit, t the teacher's probabilities at T.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from logitstore_kernels.chunk_math import KnownRows, StudentRows, TailShape, needs_shape, times_log_ratio
from logitstore_kernels.loss_terms import LossTerms


class ShardRows(NamedTuple):
    """One shard's numbers of each row [N], all of the dtype to compute in; merged from a stack of them [R, N]."""

    peak: Tensor  # the shard's largest z, -inf where there is none
    tail_peak: Tensor  # the largest z in the shard's part of the tail, less peak
    tail_sum_T: Tensor  # sum over that part of e^((z - its largest) / T)
    lse_T: Tensor  # ln sum over the shard of e^((z - peak) / T)
    lse_1: Tensor  # the same at T = 1
    head_mass: Tensor  # sum of t over the entries in the shard
    head_kl: Tensor  # sum over them of t (ln t - (z - peak) / T)
    label: Tensor  # z of the label less peak, -inf where it is in another shard
    n_tail: Tensor  # tokens of the tail in the shard
    n_tokens: Tensor  # tokens of the vocabulary in the shard
    tail_logits_sum: Tensor  # for the uniform tail: sum over the shard's tail of z - its largest; else 0
    shape_sum: Tensor  # for the dense tail: as TailShape says, over the shard's part; else 0
    shape_log_ratio_sum: Tensor
    shape_largest: Tensor


class MergedRows(NamedTuple):
    """What all shards together say of each row [N]; logs are relative to the largest z of the whole row."""

    peak: Tensor
    lse_T: Tensor
    lse_1: Tensor
    tail_lse_T: Tensor  # ln sum over the whole tail of e^((z - peak) / T)
    shape_largest: Tensor  # the largest tail logit / T of the teacher
    shape_sum: Tensor  # sum over the whole tail of e^(a tail logit / T - shape_largest)
    kl: Tensor
    ce: Tensor


def in_shard(known: KnownRows, vocab_start: int, n_tokens: int) -> KnownRows:
    """The same rows with ids that count the shard's columns; n_tokens, one past them, stands for any other shard.

    Each row gets a pad with that id, so that whatever is done to entries is done to that column, too.
    """

    def local(ids: Tensor) -> Tensor:
        ids = ids - vocab_start
        return torch.where((ids >= 0) & (ids < n_tokens), ids, n_tokens)

    ids_NK = torch.where(known.entry_CK, local(known.ids_CK), n_tokens)
    ids_NK = torch.nn.functional.pad(ids_NK, (0, 1), value=n_tokens)
    logt_NK = torch.nn.functional.pad(known.logt_CK, (0, 1), value=-math.inf)
    return known._replace(ids_CK=ids_NK, entry_CK=ids_NK < n_tokens, logt_CK=logt_NK, label_C=local(known.label_C))


def shard_rows(student: StudentRows, chunk: KnownRows, terms: LossTerms, n_tokens: int) -> ShardRows:
    """The shard's numbers of a chunk's rows, of which chunk_math.stream made `student` and in_shard `chunk`."""
    zeros_C = torch.zeros_like(student.lse_T_C)
    head_mass_C = head_kl_C = zeros_C
    if terms.kl_wanted:
        logt_CK = chunk.logt_CK.masked_fill(~chunk.entry_CK, -math.inf)
        head_mass_C = logt_CK.exp().sum(dim=1)
        head_kl_C = times_log_ratio(logt_CK, student.head_CK / terms.temperature).sum(dim=1)
    shape = student.tail_shape or TailShape(zeros_C, zeros_C, zeros_C)
    logits_sum_C = zeros_C if student.tail_logits_sum_C is None else student.tail_logits_sum_C
    return ShardRows(
        student.peak_C.masked_fill(student.lse_T_C == -math.inf, -math.inf),
        student.tail_peak_C,
        student.tail_sum_T_C,
        student.lse_T_C,
        zeros_C if student.lse_1_C is None else student.lse_1_C,
        head_mass_C,
        head_kl_C,
        student.label_C,
        n_tokens - chunk.entry_CK.sum(dim=1).to(zeros_C.dtype),
        torch.full_like(zeros_C, n_tokens),
        logits_sum_C,
        shape.sum_C,
        shape.log_ratio_sum_C,
        shape.largest_C.masked_fill(shape.sum_C == 0, -math.inf),
    )


def merge(shards_RN: ShardRows, known: KnownRows, terms: LossTerms) -> MergedRows:
    """The whole rows' values and log-sum-exps from the shards' [R, N] and from what is known of them in all shards."""
    temperature = terms.temperature if terms.kl_wanted else 1.0
    peak_N = shards_RN.peak.amax(dim=0)
    shift_RN = shards_RN.peak - peak_N
    lse_T_N = (shards_RN.lse_T + shift_RN / temperature).logsumexp(dim=0)
    lse_1_N = (shards_RN.lse_1 + shift_RN).logsumexp(dim=0)
    tail_peak_RN = shards_RN.tail_peak + shift_RN
    tail_lse_N = (shards_RN.tail_sum_T.log() + tail_peak_RN / temperature).logsumexp(dim=0)
    largest_N, shape_sum_N = _shape_in_all(shards_RN)
    kl_N = ce_N = torch.zeros_like(lse_T_N)
    if terms.ce_wanted:
        ce_N = lse_1_N - (shards_RN.label + shift_RN).amax(dim=0)
    if terms.kl_wanted:
        head_RN = shards_RN.head_kl - _unless_zero(shards_RN.head_mass, shift_RN / temperature)
        kl_N = head_RN.sum(dim=0) + shards_RN.head_mass.sum(dim=0) * lse_T_N
        if terms.tail == "bucket":
            kl_N = kl_N + times_log_ratio(known.logt_tail_C, tail_lse_N - lse_T_N)
        elif terms.tail == "uniform":
            logits_sum_N = (shards_RN.tail_logits_sum + _unless_zero(shards_RN.n_tail, tail_peak_RN)).sum(dim=0)
            logq_N = logits_sum_N / (known.n_tail_C * temperature) - lse_T_N
            kl_N = kl_N + times_log_ratio(known.logt_tail_C, logq_N, -known.n_tail_C.log())
        elif terms.tail == "dense":
            share_RN = (shards_RN.shape_largest - largest_N).exp() / shape_sum_N
            log_ratio_RN = (shards_RN.shape_largest - largest_N) - tail_peak_RN / temperature
            mean_RN = shards_RN.shape_log_ratio_sum + _unless_zero(shards_RN.shape_sum, log_ratio_RN)
            logq_N = shape_sum_N.log() - _unless_zero(share_RN, mean_RN).sum(dim=0) - lse_T_N
            kl_N = kl_N + times_log_ratio(known.logt_tail_C, logq_N)
    kl_N, ce_N = kl_N.masked_fill(~known.counted_C, 0), ce_N.masked_fill(~known.counted_C, 0)
    return MergedRows(peak_N, lse_T_N, lse_1_N, tail_lse_N, largest_N, shape_sum_N, kl_N, ce_N)


def _shape_in_all(shards_RN: ShardRows) -> tuple[Tensor, Tensor]:
    """(largest tail logit / T of each row, sum over the whole tail of e^(such a logit less it)); 0 and 0 for none."""
    largest_N = shards_RN.shape_largest.amax(dim=0)
    largest_N = largest_N.masked_fill(largest_N == -math.inf, 0)
    return largest_N, (shards_RN.shape_sum * (shards_RN.shape_largest - largest_N).exp()).sum(dim=0)


def _unless_zero(factor: Tensor, x: Tensor) -> Tensor:
    """factor * x, and 0 where factor is 0, whatever x is."""
    return (factor * x).masked_fill(factor == 0, 0)


def in_whole_row(student: StudentRows, merged: MergedRows, terms: LossTerms) -> StudentRows:
    """The shard's rows as chunk_math.write_gradient needs them to write the shard's part of the whole gradient.

    Sums over the whole tail are relative to the shard's own largest, so that one may be inf: nothing is left of its
    reciprocal in this shard.
    """
    temperature = terms.temperature if terms.kl_wanted else 1.0
    alive_C = student.lse_T_C > -math.inf
    shift_C = torch.where(alive_C, student.peak_C - merged.peak, -math.inf)
    tail_peak_C = student.tail_peak_C + shift_C
    tail_shape = None
    if needs_shape(terms):
        sum_C = merged.shape_sum * (merged.shape_largest - student.tail_shape.largest_C).exp()
        tail_shape = student.tail_shape._replace(sum_C=sum_C)
    return student._replace(
        head_CK=student.head_CK + shift_C[:, None],
        tail_peak_C=tail_peak_C,
        tail_shape=tail_shape,
        tail_sum_T_C=(merged.tail_lse_T - tail_peak_C / temperature).exp(),
        lse_T_C=merged.lse_T,
        lse_1_C=merged.lse_1,
    )
