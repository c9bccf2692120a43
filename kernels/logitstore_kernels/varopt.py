"""varopt_sample: an unbiased threshold sample of a teacher's rows, drawn where the logits are.

The numpy twin is in logitstore/sampling.py, which says what is drawn from which uniforms; a test holds the two equal.
Computes in float64, on a device without it in float32: there a point within the rounding of a cumulative sum from the
boundary between two tokens may draw the neighbour.

Letters: N rows, C rows of a chunk, K entries kept, V vocabulary, W logits columns (W >= V).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from logitstore_kernels.row_chunks import rows_per_chunk
from logitstore_kernels.topk import check_topk, largest

# Tokens below this are impossible; it is the least log-prob whose probability float32 holds.
_LEAST_LOGP = -87.0
# A token whose inclusion probability is 1 to rounding is kept for sure, so that no token can be drawn twice.
_SURE = 1 - 1e-10
_HAS_FLOAT64 = ("cpu", "cuda")


class SampledRows(NamedTuple):
    """Weighted samples of N rows: E[weight] = p, and a row's weights sum to 1.

    ids_NK int64, unique in a row, -1 in pads. logweights_NK float32, ln of the weights in nats, descending, -inf in
    pads. n_exact_N int64: so many entries, first in the row, hold their token's own probability; the others were drawn.
    """

    ids_NK: Tensor
    logweights_NK: Tensor
    n_exact_N: Tensor


@torch.no_grad()
def varopt_sample(
    logits_NV: Tensor,
    k: int,
    uniforms_N: Tensor,
    *,
    max_weight: float | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> SampledRows:
    """At most k entries of softmax(logits) in each row that stand for it without bias (VarOpt, Cohen et al. 2009).

    The likeliest h tokens of a row keep their probability, k - h of the others are drawn and share what is left; h is
    the least number with which no drawn token would have more than its share. With max_weight, in (0, 1), a row keeps
    as few entries as have no drawn one weigh more, k at most.

    logits_NV: [N, V] or wider, any float dtype; columns at or beyond vocab_size take no part. uniforms_N: [N] floats in
    [0, 1), one a row, on the logits' device. K = min(k, vocab_size). A row of nothing but -inf, or with NaN or +inf,
    has weights of NaN; nothing is checked on the device. chunk_rows: as in topk_with_tail.

    Raises TypeError / ValueError as topk_with_tail does, for uniforms that are not [N] floats or elsewhere, and for a
    max_weight outside (0, 1).
    """
    _, vocab_size = check_topk(logits_NV, k, vocab_size, None, chunk_rows)
    n_rows, k, device = len(logits_NV), min(k, vocab_size), logits_NV.device
    if not isinstance(uniforms_N, Tensor) or not uniforms_N.is_floating_point():
        raise TypeError(f"uniforms_N must be a float tensor, got {getattr(uniforms_N, 'dtype', type(uniforms_N))}")
    if tuple(uniforms_N.shape) != (n_rows,) or uniforms_N.device != device:
        raise ValueError(
            f"uniforms_N must have shape ({n_rows},) on {device}, got {tuple(uniforms_N.shape)} on {uniforms_N.device}"
        )
    if max_weight is not None and not 0 < max_weight < 1:
        raise ValueError(f"max_weight must be in (0, 1), got {max_weight}")
    dtype = torch.float64 if device.type in _HAS_FLOAT64 else torch.float32
    chunk_rows = chunk_rows or rows_per_chunk(dtype.itemsize * vocab_size, device)
    parts = []
    for start in range(0, max(n_rows, 1), chunk_rows):
        rows = slice(start, start + chunk_rows)
        p_CV = _probabilities(logits_NV[rows, :vocab_size].to(dtype))
        parts.append(_sample_chunk(p_CV, k, uniforms_N[rows].to(dtype), max_weight))
    return SampledRows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _probabilities(x_CV: Tensor) -> Tensor:
    """softmax, with 0 for what is below e^-87."""
    p_CV = (x_CV - x_CV.amax(dim=1, keepdim=True)).exp_()
    p_CV.masked_fill_(p_CV < math.exp(_LEAST_LOGP) * p_CV.sum(dim=1, keepdim=True), 0)
    return p_CV.div_(p_CV.sum(dim=1, keepdim=True))


def _sample_chunk(p_CV: Tensor, k: int, uniforms_C: Tensor, max_weight: float | None) -> SampledRows:
    """The samples of a chunk; mutates p_CV."""
    ids_CK = largest(p_CV, k)[1].sort(dim=1).values
    top_CK, order_CK = p_CV.gather(1, ids_CK).sort(dim=1, descending=True, stable=True)
    ids_CK = ids_CK.gather(1, order_CK)
    tail_CV = p_CV.scatter_(1, ids_CK, 0)
    beyond_C = tail_CV.sum(dim=1)
    rank_K = torch.arange(k, device=p_CV.device)
    n_C = torch.full_like(ids_CK[:, 0], k) if max_weight is None else _n_entries(top_CK, beyond_C, max_weight)
    has_more_C = beyond_C + top_CK.masked_fill(rank_K < n_C[:, None], 0).sum(dim=1) > 0
    n_exact_C = _n_exact(top_CK, beyond_C, n_C, has_more_C)
    exact_CK = rank_K < n_exact_C[:, None]
    tail_CV.scatter_(1, ids_CK, top_CK.masked_fill(exact_CK, 0))

    cumulative_CV = tail_CV.cumsum(dim=1)
    total_C1 = cumulative_CV[:, -1:]
    n_drawn_C = torch.where(has_more_C, n_C - n_exact_C, 0)
    threshold_C1 = torch.where(n_drawn_C > 0, total_C1[:, 0] / n_drawn_C.clamp(min=1), 0)[:, None]
    points_CK = (uniforms_C[:, None] + rank_K) * threshold_C1
    # A point that rounding has put at its row's total counts as just below it.
    points_CK = torch.minimum(points_CK, torch.nextafter(total_C1, torch.zeros_like(total_C1)))
    drawn_CK = torch.searchsorted(cumulative_CV, points_CK, right=True).clamp(max=p_CV.shape[1] - 1)

    place_CK = (rank_K - n_exact_C[:, None]).clamp(min=0)
    ids_CK = torch.where(exact_CK, ids_CK, drawn_CK.gather(1, place_CK))
    pad_CK = rank_K >= (n_exact_C + n_drawn_C)[:, None]
    # A threshold is at most the least exact entry; rounding must not have it otherwise.
    logweights_CK = torch.where(exact_CK, torch.maximum(top_CK, threshold_C1), threshold_C1).log().clamp(max=0)
    logweights_CK = logweights_CK.masked_fill(pad_CK, -math.inf).masked_fill(top_CK.isnan(), math.nan)
    return SampledRows(ids_CK.masked_fill(pad_CK, -1), logweights_CK.float(), n_exact_C)


def _n_entries(top_CK: Tensor, beyond_C: Tensor, max_weight: float) -> Tensor:
    """n of each row: the least number of entries whose threshold is at most max_weight, K at most."""
    exact_CK = top_CK >= max_weight
    rest_C = beyond_C + top_CK.masked_fill(exact_CK, 0).sum(dim=1)
    # A rest that is a multiple of max_weight but for rounding is taken as one; any rest at all needs an entry.
    n_drawn_C = torch.maximum((rest_C / max_weight - 1e-9).ceil().long(), (rest_C > 0).long())
    return (exact_CK.sum(dim=1) + n_drawn_C).clamp(max=top_CK.shape[1])


def _n_exact(top_CK: Tensor, beyond_C: Tensor, n_C: Tensor, has_more_C: Tensor) -> Tensor:
    """h of each row: how many of its top tokens keep their own probability. beyond_C: the mass behind the K-th;
    has_more_C: whether a token with a probability is behind the n-th."""
    k = top_CK.shape[1]
    rank_K = torch.arange(k, device=top_CK.device)
    from_here_CK = beyond_C[:, None] + top_CK.flip(1).cumsum(dim=1).flip(1)
    threshold_CK = from_here_CK / (n_C[:, None] - rank_K).clamp(min=1)
    # The last place has no room for a token kept for sure if anything lies behind it.
    below_CK = (top_CK < threshold_CK * _SURE) | (rank_K >= n_C[:, None] - 1)
    first_below_C = rank_K.expand_as(below_CK).masked_fill(~below_CK, k).amin(dim=1)
    return torch.where(has_more_C, first_below_C, (top_CK > 0).sum(dim=1))
