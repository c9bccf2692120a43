"""Unbiased samples of a row's distribution: which tokens are kept, with which weight. Pure arithmetic in numpy.

Both samplers are functions of probabilities p and uniforms u and of nothing else: an implementation on a device that
is handed the same u keeps the same tokens, but for points that lie within the rounding of its cumulative sum from the
boundary between two tokens. The uniforms are functions of a seed, the text and the row:

1. key: the first 16 bytes of SHA-256(seed as little-endian int64, then input_ids as little-endian int32);
2. Philox4x64-10 (Salmon et al. 2011; numpy's Philox) with that key gives four 64-bit words w for each value of its
   counter, which starts at 1;
3. row t with U uniforms owns words U*t to U*t + U - 1, and u = floor(w / 2^11) / 2^53, in [0, 1).

Arithmetic is in float64. Tokens below e^-87, the least probability that float32 holds, count as impossible: that
moves less than V * 2e-38 of a row's mass.

Letters: N rows, K entries kept, M points a row, U uniforms a row, V vocabulary.
"""

import hashlib
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.head_values import LEAST_LOGP

# A token whose inclusion probability is 1 to rounding is kept for sure, so that no token can be drawn twice.
_SURE = 1 - 1e-10

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


class SampledRows(NamedTuple):
    """ids [N, K] int64, unique in a row, -1 in pads; logweights [N, K] float32, ln of the weights, descending, -inf in
    pads; n_exact [N] int64: so many entries, first in the row, hold their token's own probability, the others were
    drawn and stand for the rest of the mass."""

    ids: Int64
    logweights: NDArray[np.float32]
    n_exact: Int64


def row_uniforms(seed: int, input_ids: NDArray[np.int32], n_uniforms: int) -> Float64:
    """Uniforms in [0, 1) of each row of a text, [max(L - 1, 0), n_uniforms]; the module says which."""
    text = np.ascontiguousarray(input_ids, dtype="<i4").tobytes()
    digest = hashlib.sha256(struct.pack("<q", seed) + text).digest()
    n_rows = max(len(input_ids) - 1, 0)
    words = np.random.Philox(key=np.frombuffer(digest, "<u8", 2)).random_raw(n_rows * n_uniforms)
    return (words >> np.uint64(11)).reshape(n_rows, n_uniforms) * 2.0**-53


def probabilities(logits_NV: NDArray[np.float32]) -> Float64:
    """softmax(logits) [N, V], with 0 for what is below e^-87.

    Raises ValueError for NaN, +inf or an all -inf row, naming the first such row.
    """
    peak_N1 = logits_NV.max(axis=1, keepdims=True, initial=-np.inf)
    unusable = np.flatnonzero(~np.isfinite(peak_N1[:, 0]))
    if len(unusable):
        raise ValueError(f"logits of row {unusable[0]} have NaN, +inf or no finite value; a distribution needs one")
    p_NV = np.subtract(logits_NV, peak_N1, dtype=np.float64)
    np.exp(p_NV, out=p_NV)
    p_NV[p_NV < np.exp(LEAST_LOGP) * p_NV.sum(axis=1, keepdims=True)] = 0.0
    p_NV /= p_NV.sum(axis=1, keepdims=True)
    return p_NV


def varopt_sample(p_NV: Float64, k: int, uniforms_N: Float64, *, max_weight: float | None = None) -> SampledRows:
    """n entries of each row that stand for p without bias: E[weight] = p, and a row's weights sum to 1.

    With p sorted, h is the smallest number such that p_(h) is below thr = (sum of p from p_(h) on) / (n - h). The h
    tokens before it keep their probability; n - h of the others are drawn by systematic sampling with inclusion
    probability p / thr, and each that is drawn weighs thr. Of all ways to keep n tokens without bias this has the
    least summed variance (VarOpt: Cohen, Duffield, Kaplan, Lund, Thorup 2009). A row with at most n possible tokens
    keeps them all, exactly.

    n is min(k, V) = K, or with max_weight, a fraction, the least number for which thr <= max_weight, K at most: every
    token with p >= max_weight is exact then, and n = ceil(sum of min(1, p / max_weight)).

    uniforms_N in [0, 1): drawn are the tokens, in the order of their ids, in whose share of the tail's cumulative
    sum one of the points (u + j) * thr lies, j = 0 .. n - h - 1.
    """
    k = min(k, p_NV.shape[1])
    ids_NK, top_NK = _largest(p_NV, k)
    tail_NV = p_NV.copy()
    np.put_along_axis(tail_NV, ids_NK, 0.0, axis=1)
    beyond_N = tail_NV.sum(axis=1)
    rank_K = np.arange(k)
    n_N = np.full(len(p_NV), k) if max_weight is None else _n_entries(top_NK, beyond_N, max_weight)
    has_more_N = beyond_N + np.where(rank_K >= n_N[:, None], top_NK, 0).sum(axis=1) > 0
    n_exact_N = _n_exact(top_NK, beyond_N, n_N, has_more_N)
    exact_NK = rank_K < n_exact_N[:, None]
    np.put_along_axis(tail_NV, ids_NK, np.where(exact_NK, 0.0, top_NK), axis=1)

    cumulative_NV = np.cumsum(tail_NV, axis=1, out=tail_NV)
    n_drawn_N = np.where(has_more_N, n_N - n_exact_N, 0)
    threshold_N = np.where(n_drawn_N > 0, cumulative_NV[:, -1] / np.maximum(n_drawn_N, 1), 0.0)
    drawn_NK = first_above(cumulative_NV, (uniforms_N[:, None] + rank_K) * threshold_N[:, None])

    place_NK = np.maximum(rank_K - n_exact_N[:, None], 0)
    ids_NK = np.where(exact_NK, ids_NK, np.take_along_axis(drawn_NK, place_NK, axis=1))
    pad_NK = rank_K >= (n_exact_N + n_drawn_N)[:, None]
    with np.errstate(divide="ignore"):
        # a threshold is at most the least exact entry; rounding must not have it otherwise
        logweights_NK = np.log(np.where(exact_NK, np.maximum(top_NK, threshold_N[:, None]), threshold_N[:, None]))
    logweights_NK = np.where(pad_NK, -np.inf, np.minimum(logweights_NK, 0)).astype(np.float32)
    return SampledRows(np.where(pad_NK, -1, ids_NK), logweights_NK, n_exact_N)


def multinomial_sample(p_NV: Float64, uniforms_NU: Float64) -> SampledRows:
    """U draws from p with replacement: the distinct tokens of a row, each with weight count / U. No entry is exact.

    That is the sampler of Random Sampling Knowledge Distillation (Anshumann et al., ACL 2025) at its default tau = 1.
    uniforms_NU in [0, 1): draw j is the token in whose share of the cumulative sum of p, in the order of the ids,
    the point u_j lies. K = min(U, V); entries are ordered by count, then by id.
    """
    n_rows, n_draws = uniforms_NU.shape
    cumulative_NV = np.cumsum(p_NV, axis=1)
    drawn_NU = np.sort(first_above(cumulative_NV, uniforms_NU * cumulative_NV[:, -1:]), axis=1)
    is_first_NU = np.ones((n_rows, n_draws), bool)
    is_first_NU[:, 1:] = drawn_NU[:, 1:] != drawn_NU[:, :-1]
    run_NU = np.cumsum(is_first_NU, axis=1) - 1 + n_draws * np.arange(n_rows)[:, None]
    counts_NU = np.bincount(run_NU.ravel(), minlength=n_rows * n_draws).reshape(n_rows, n_draws)
    ids_NU = np.full(n_rows * n_draws, -1)
    ids_NU[run_NU[is_first_NU]] = drawn_NU[is_first_NU]
    ids_NU = ids_NU.reshape(n_rows, n_draws)
    order_NK = np.lexsort((ids_NU, -counts_NU), axis=1)[:, : p_NV.shape[1]]
    counts_NK = np.take_along_axis(counts_NU, order_NK, axis=1)
    with np.errstate(divide="ignore"):
        logweights_NK = np.log(counts_NK / n_draws).astype(np.float32)
    return SampledRows(np.take_along_axis(ids_NU, order_NK, axis=1), logweights_NK, np.zeros(n_rows, np.int64))


def first_above(cumulative_NV: Float64, points_NM: Float64) -> Int64:
    """Index [N, M] of the first cumulative sum in its row that is above the point: a bisection of all rows at once.

    A point that rounding has put at its row's total counts as just below it, so that the index is always that of a
    token with a share of its own, unless the row's total is 0.
    """
    points_NM = np.minimum(points_NM, np.nextafter(cumulative_NV[:, -1:], 0.0))
    low_NM = np.zeros(points_NM.shape, np.int64)
    high_NM = np.full(points_NM.shape, cumulative_NV.shape[1] - 1, np.int64)
    for _ in range((cumulative_NV.shape[1] - 1).bit_length()):
        middle_NM = (low_NM + high_NM) // 2
        above_NM = np.take_along_axis(cumulative_NV, middle_NM, axis=1) > points_NM
        high_NM = np.where(above_NM, middle_NM, high_NM)
        low_NM = np.where(above_NM, low_NM, np.minimum(middle_NM + 1, high_NM))
    return low_NM


def _largest(p_NV: Float64, k: int) -> tuple[Int64, Float64]:
    """Ids and probabilities of the k most probable tokens, descending, equal ones by id."""
    vocab_size = p_NV.shape[1]
    ids_NK = np.argpartition(p_NV, vocab_size - k, axis=1)[:, vocab_size - k :]
    top_NK = np.take_along_axis(p_NV, ids_NK, axis=1)
    order_NK = np.lexsort((ids_NK, -top_NK), axis=1)
    return np.take_along_axis(ids_NK, order_NK, axis=1), np.take_along_axis(top_NK, order_NK, axis=1)


def _n_entries(top_NK: Float64, beyond_N: Float64, max_weight: float) -> Int64:
    """n of each row: the least number of entries whose threshold is at most max_weight, K at most."""
    exact_NK = top_NK >= max_weight
    rest_N = beyond_N + np.where(exact_NK, 0, top_NK).sum(axis=1)
    # a rest that is a multiple of max_weight but for rounding is taken as one; any rest at all needs an entry
    n_drawn_N = np.maximum(np.ceil(rest_N / max_weight - 1e-9), rest_N > 0)
    return np.minimum(exact_NK.sum(axis=1) + n_drawn_N.astype(np.int64), top_NK.shape[1])


def _n_exact(top_NK: Float64, beyond_N: Float64, n_N: Int64, has_more_N: NDArray[np.bool_]) -> Int64:
    """h of each row: how many of its top tokens keep their own probability. beyond_N: the mass behind the K-th;
    has_more_N: whether a token with a probability is behind the n-th."""
    rank_K = np.arange(top_NK.shape[1])
    from_here_NK = beyond_N[:, None] + np.cumsum(top_NK[:, ::-1], axis=1)[:, ::-1]
    threshold_NK = from_here_NK / np.maximum(n_N[:, None] - rank_K, 1)
    # the last place has no room for a token kept for sure if anything lies behind it
    below_NK = (top_NK < threshold_NK * _SURE) | (rank_K >= n_N[:, None] - 1)
    return np.where(has_more_N, np.argmax(below_NK, axis=1), (top_NK > 0).sum(axis=1))
