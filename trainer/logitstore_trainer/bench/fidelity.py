"""How far what a store stands for is from the teacher: KL, total variation, squared error, and their error bars.

Everything is computed in float64 from the teacher's logits, in row chunks, so that [L, V] float64 never exists.

Letters: L sequence length, R rows (L - 1 of a whole sample), S sequences, V vocabulary. T is the temperature.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.logits_source import iter_logit_chunks

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
    import torch

    n_rows, vocab_size = q_logprobs_RV.shape
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if logits.shape[0] < n_rows or logits.shape[1] != vocab_size:
        raise ValueError(f"logits {tuple(logits.shape)} do not cover the {n_rows} x {vocab_size} reconstruction")
    kl_R, tv_R, squared_R = (np.empty(n_rows) for _ in range(3))
    start = 0
    chunks = iter_logit_chunks(logits, np.arange(n_rows), vocab_size=vocab_size, chunk_bytes=chunk_bytes)
    for logits_nV in chunks:
        stop = start + len(logits_nV)
        logp_nV = torch.log_softmax(torch.from_numpy(logits_nV).double() / temperature, dim=1)
        logq_nV = torch.from_numpy(np.ascontiguousarray(q_logprobs_RV[start:stop])).double()
        p_nV = logp_nV.exp()
        # 0 * (-inf - x) is NaN; a token that the teacher rules out adds nothing, whatever q says of it
        terms_nV = torch.where(p_nV > 0, p_nV * (logp_nV - logq_nV), torch.zeros((), dtype=torch.float64))
        terms_nV = torch.where(torch.isnan(logq_nV), logq_nV, terms_nV)
        kl_R[start:stop] = terms_nV.sum(dim=1).numpy()
        difference_nV = p_nV - logq_nV.exp()
        tv_R[start:stop] = difference_nV.abs().sum(dim=1).numpy() / 2
        squared_R[start:stop] = difference_nV.square().sum(dim=1).numpy()
        start = stop
    return RowDivergences(kl_R, tv_R, squared_R)


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
