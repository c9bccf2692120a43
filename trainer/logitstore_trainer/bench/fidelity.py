"""How far what a store stands for is from the teacher: KL, total variation, squared error, and their error bars.

KL is computed in float64 from the teacher's logits. `row_divergences` goes in row chunks, so that [L, V] float64 never
exists; `TeacherRows` holds what many comparisons with one teacher share, 20 bytes a logit.

Letters: L sequence length, R rows (L - 1 of a whole sample), S sequences, V vocabulary. T is the temperature.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.logits_source import iter_logit_chunks

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 8 << 20

Float64 = NDArray[np.float64]


class RowDivergences(NamedTuple):
    """kl [R] = KL(p_T || q_T) in nats, without the factor T^2 (inf where q lacks a token that p has);
    tv [R] = half of the sum of |p_T - q_T|, in 0..1; squared [R] = sum of (p_T - q_T)^2, in 0..2. float64; NaN for rows
    of q that are NaN.

    The gradient of a KL to a student s with respect to its logits at T = 1 is s - p, so `squared` is the squared error
    of that gradient where q stands in for p."""

    kl: Float64
    tv: Float64
    squared: Float64


class TeacherRows(NamedTuple):
    """The teacher's rows at one temperature, as tensors: logp = ln p_T and p [R, V] float64, p_single [R, V] float32,
    entropy [R] float64."""

    logp: "Tensor"
    p: "Tensor"
    p_single: "Tensor"
    entropy: "Tensor"

    @classmethod
    def of(cls, logits: Any, n_rows: int, vocab_size: int, temperature: float) -> "TeacherRows":
        """Of the first R rows of the teacher's logits. Raises ValueError as row_divergences does."""
        import torch

        return cls.from_logprobs(torch.cat(list(_logprob_chunks(logits, n_rows, vocab_size, temperature, CHUNK_BYTES))))

    @classmethod
    def from_logprobs(cls, logp_RV: "Tensor") -> "TeacherRows":
        """Of ln p_T [R, V] float64."""
        import torch

        p_RV = logp_RV.exp()
        return cls(logp_RV, p_RV, p_RV.float(), -torch.einsum("rv,rv->r", p_RV, logp_RV))


class Estimate(NamedTuple):
    """mean over rows, and se, its standard error over sequences; None where it is not defined."""

    mean: float | None
    se: float | None


def row_divergences(
    logits: Any, q_logprobs_RV: NDArray[np.float32], *, temperature: float, chunk_bytes: int = CHUNK_BYTES
) -> RowDivergences:
    """Divergences of q from p_T = softmax(logits / T) for the first R rows of the teacher's logits.

    logits: [L >= R, V] numpy array, torch tensor or FactoredLogits at T = 1. q_logprobs_RV: ln q_T, already at T, as
    dense_logprobs(T) returns it. chunk_bytes: size of a row chunk in float32.
    Raises ValueError for shapes that do not fit or a temperature that is not positive.
    """
    n_rows, vocab_size = q_logprobs_RV.shape
    parts, start = [], 0
    for logp_nV in _logprob_chunks(logits, n_rows, vocab_size, temperature, chunk_bytes):
        q_nV = q_logprobs_RV[start : start + len(logp_nV)]
        parts.append(divergences_from(TeacherRows.from_logprobs(logp_nV), q_nV, chunk_bytes=chunk_bytes))
        start += len(logp_nV)
    return _joined(parts)


def divergences_from(
    teacher: TeacherRows, q_logprobs_RV: NDArray[np.float32], *, chunk_bytes: int = CHUNK_BYTES
) -> RowDivergences:
    """Divergences of q, ln q [R, V] float32, from the teacher at the same temperature.

    KL is the difference of cross-entropy and entropy in float64; tv and squared are sums in float64 of differences of
    probabilities in float32.
    """
    import torch

    n_chunk = max(1, chunk_bytes // (4 * teacher.logp.shape[1]))
    parts = []
    of_teacher = zip(*(tensor.split(n_chunk) for tensor in teacher), strict=True)
    of_q = torch.from_numpy(np.ascontiguousarray(q_logprobs_RV)).split(n_chunk)
    for (logp_nV, p_nV, p_single_nV, entropy_n), q_nV in zip(of_teacher, of_q, strict=True):
        kl_n = -torch.einsum("nv,nv->n", p_nV, q_nV.double()) - entropy_n
        odd = torch.nonzero(~torch.isfinite(kl_n))[:, 0]  # where something is -inf or NaN
        if len(odd):
            kl_n[odd] = _kl_with_infinities(p_nV[odd], logp_nV[odd], q_nV[odd])
        difference_nV = q_nV.exp().sub_(p_single_nV)
        tv_n = difference_nV.abs().sum(dim=1, dtype=torch.float64) / 2
        squared_n = difference_nV.square_().sum(dim=1, dtype=torch.float64)
        parts.append(RowDivergences(kl_n.numpy(), tv_n.numpy(), squared_n.numpy()))
    return _joined(parts)


def _kl_with_infinities(p_nV: "Tensor", logp_nV: "Tensor", logq_nV: "Tensor") -> "Tensor":
    """A token that the teacher rules out adds nothing, whatever q says of it: 0 * (-inf - x) would be NaN."""
    import torch

    logq_nV = logq_nV.double()
    terms_nV = torch.where(p_nV > 0, p_nV * (logp_nV - logq_nV), 0.0)
    return torch.where(torch.isnan(logq_nV), logq_nV, terms_nV).sum(dim=1)


def _logprob_chunks(
    logits: Any, n_rows: int, vocab_size: int, temperature: float, chunk_bytes: int
) -> Iterator["Tensor"]:
    """ln p_T of the first rows, float64 [n, V] a chunk."""
    import torch

    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if logits.shape[0] < n_rows or logits.shape[1] != vocab_size:
        raise ValueError(f"logits {tuple(logits.shape)} do not cover the {n_rows} x {vocab_size} reconstruction")
    for logits_nV in iter_logit_chunks(logits, np.arange(n_rows), vocab_size=vocab_size, chunk_bytes=chunk_bytes):
        yield torch.log_softmax(torch.from_numpy(logits_nV).double() / temperature, dim=1)


def _joined(parts: Sequence[RowDivergences]) -> RowDivergences:
    none = RowDivergences(*(np.empty(0) for _ in range(3)))
    return RowDivergences(*(np.concatenate(column) for column in zip(none, *parts, strict=True)))


def estimate(sums_S: Sequence[float], rows_S: Sequence[int]) -> Estimate:
    """The mean over all rows, given each sequence's sum and number of rows, and its standard error over sequences.

    Rows of one text are not independent, so sequences are the units: se is that of a ratio of sums,
    sqrt(S / (S - 1) * sum (sum_s - mean * rows_s)^2) / rows, which for equal lengths is the standard deviation of the
    sequences' means over sqrt(S). Not finite: both None. One sequence: se None.
    """
    x_S, n_S = np.asarray(sums_S, np.float64), np.asarray(rows_S, np.float64)
    n_total = n_S.sum()
    if n_total == 0 or not math.isfinite(x_S.sum()):
        return Estimate(None, None)
    mean = float(x_S.sum() / n_total)
    n_sequences = len(x_S)
    if n_sequences < 2:
        return Estimate(mean, None)
    spread = float(((x_S - mean * n_S) ** 2).sum()) * n_sequences / (n_sequences - 1)
    return Estimate(mean, math.sqrt(spread) / float(n_total))
