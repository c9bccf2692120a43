"""The k most probable tokens of each row, and the two moments of all the others, from raw logits in numpy.

The torch twin, which runs where the teacher runs, is logitstore_kernels.topk_with_tail; a test holds the two equal.
Both take the moments from log-sum-exps over the complement of the head, never from 1 - sum.

Letters: N rows, K entries kept, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class TopKWithTail(NamedTuple):
    """ids [N, K] int32 (-1 pads), logps [N, K] float32 at T = 1, descending (-inf in pads), tail_logmass [N] float32
    = ln of the other tokens' mass, tail_logmoment_half [N] float32 = ln of the other tokens' sum of sqrt(p)."""

    ids: NDArray[np.int32]
    logps: NDArray[np.float32]
    tail_logmass: NDArray[np.float32]
    tail_logmoment_half: NDArray[np.float32]


def topk_with_tail(logits_NV: NDArray[np.float32], k: int) -> TopKWithTail:
    """The head and tail moments of softmax(logits); ties at the k-th place are broken arbitrarily.

    logits_NV float32 [N, V]. A token of probability 0 (logit -inf) is never an entry: its place is a pad. Sums are
    taken in float32, head and tail each relative to its own peak, so that a tail of 1e-60 is not lost. Raises
    ValueError for NaN, +inf or an all -inf row, naming the first such row.
    """
    n_rows, vocab_size = logits_NV.shape
    k = min(k, vocab_size)
    if n_rows == 0:
        empty = np.zeros(0, np.float32)
        return TopKWithTail(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), empty, empty)
    peak_N1 = logits_NV.max(axis=1, keepdims=True)
    unusable = np.flatnonzero(~np.isfinite(peak_N1[:, 0]))
    if len(unusable):
        raise ValueError(f"logits of row {unusable[0]} have NaN, +inf or no finite value; a distribution needs one")
    ids_NK = np.argpartition(logits_NV, vocab_size - k, axis=1)[:, vocab_size - k :]
    head_NK = np.take_along_axis(logits_NV, ids_NK, axis=1)
    order_NK = np.lexsort((ids_NK, -head_NK), axis=1)
    ids_NK = np.take_along_axis(ids_NK, order_NK, axis=1)
    head_NK = np.take_along_axis(head_NK, order_NK, axis=1)

    tail_NV = logits_NV.copy()
    np.put_along_axis(tail_NV, ids_NK, np.float32(-np.inf), axis=1)
    tail_peak_N1 = tail_NV.max(axis=1, keepdims=True)
    tail_peak_N1[np.isneginf(tail_peak_N1)] = 0.0
    np.subtract(tail_NV, tail_peak_N1, out=tail_NV)
    tail_NV *= np.float32(0.5)
    np.exp(tail_NV, out=tail_NV)
    with np.errstate(divide="ignore"):
        half_N = np.log(tail_NV.sum(axis=1)) + 0.5 * tail_peak_N1[:, 0]
        np.square(tail_NV, out=tail_NV)
        log_tail_N = np.log(tail_NV.sum(axis=1)) + tail_peak_N1[:, 0]
    log_head_N = np.log(np.exp(head_NK - peak_N1).sum(axis=1)) + peak_N1[:, 0]
    lse_N = np.logaddexp(log_tail_N, log_head_N)
    logps_NK = np.minimum(head_NK - lse_N[:, None], 0)
    pad_NK = np.isneginf(head_NK)
    return TopKWithTail(
        np.where(pad_NK, -1, ids_NK).astype(np.int32),
        np.where(pad_NK, -np.inf, logps_NK).astype(np.float32),
        (log_tail_N - lse_N).astype(np.float32),
        (half_N - 0.5 * lse_N).astype(np.float32),
    )
