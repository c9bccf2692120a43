"""topk_with_tail: a teacher's k most probable tokens and the two moments of all others, where the logits are.

On CUDA a Triton kernel reads the logits where they are (triton_topk.py, chosen by dispatch.py). Elsewhere plain PyTorch
works over row chunks, so that beside the logits only one chunk's buffer lives. The numpy twin is in logitstore/topk.py;
a test holds the two equal. The moments are log-sum-exps over the complement of the head, each relative to its own
peak: never 1 - sum, so a tail of 1e-30 keeps its digits.

Letters: N rows, C rows of a chunk, K entries kept, V vocabulary, W logits columns (W >= V).
"""

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from logitstore_kernels.dispatch import why_not_the_topk_kernel
from logitstore_kernels.row_chunks import rows_per_chunk

_BLOCK = 32


class TopKWithTail(NamedTuple):
    """The head and tail moments of N distributions at T = 1, in nats.

    ids_NK int32, -1 in pads.  logps_NK float32, descending (equal ones by id), -inf in pads.
    tail_logmass_N float32, ln of the summed p of all other tokens.  tail_logmoment_half_N float32, ln of their summed
    sqrt(p). Both -inf where nothing is left.
    """

    ids_NK: Tensor
    logps_NK: Tensor
    tail_logmass_N: Tensor
    tail_logmoment_half_N: Tensor


@torch.no_grad()
def topk_with_tail(
    logits_NV: Tensor,
    k: int,
    *,
    vocab_size: int | None = None,
    min_prob: float | None = None,
    chunk_rows: int | None = None,
) -> TopKWithTail:
    """The k largest of log_softmax(logits) in each row, exact in float32, and the tail's log-mass and half log-moment.

    logits_NV: [N, V] or wider, any float dtype; columns at or beyond vocab_size take no part. K = min(k, vocab_size).
    A token of probability 0 (logit -inf) is never an entry: its place is a pad. Which of several equal tokens is the
    k-th is not specified. A row of nothing but -inf, or with NaN or +inf, gives NaN moments; nothing is checked on the
    device. min_prob: in (0, 1); entries with a probability below it, but for a row's first, become pads and belong to
    the tail. chunk_rows: rows worked on at a time; by default as many as suit the device.

    Raises TypeError / ValueError for logits that are not [N, V] floats, k or chunk_rows below 1, fewer columns than
    vocab_size, or a min_prob outside (0, 1).
    """
    width, vocab_size = check_topk(logits_NV, k, vocab_size, min_prob, chunk_rows)
    n_rows, k = logits_NV.shape[0], min(k, vocab_size)
    device = logits_NV.device
    out = TopKWithTail(
        torch.empty(n_rows, k, dtype=torch.int32, device=device),
        torch.empty(n_rows, k, dtype=torch.float32, device=device),
        torch.empty(n_rows, dtype=torch.float32, device=device),
        torch.empty(n_rows, dtype=torch.float32, device=device),
    )
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    by_kernel = why_not_the_topk_kernel(logits_NV, k, vocab_size) is None
    if chunk_rows is None:
        chunk_rows = max(n_rows, 1) if by_kernel else rows_per_chunk(dtype.itemsize * width, device)
    for start in range(0, n_rows, chunk_rows):
        rows = slice(start, start + chunk_rows)
        if by_kernel:
            from logitstore_kernels.triton_topk import launch_topk

            kept = TopKWithTail(*launch_topk(logits_NV[rows], k, vocab_size=vocab_size))
        else:
            kept = _topk_chunk(logits_NV[rows, :vocab_size].to(dtype), k)
        kept = kept if min_prob is None else _unlikely_to_tail(kept, min_prob)
        for whole, part in zip(out, kept, strict=True):
            whole[rows] = part
    return out


def check_topk(
    logits_NV: Tensor, k: int, vocab_size: int | None, min_prob: float | None, chunk_rows: int | None
) -> tuple[int, int]:
    """(width of the logits, vocab_size); raises TypeError / ValueError as topk_with_tail says."""
    if not isinstance(logits_NV, Tensor):
        raise TypeError(f"logits_NV must be a torch.Tensor, got {type(logits_NV).__name__}")
    if not logits_NV.is_floating_point():
        raise TypeError(f"logits_NV must be of a float dtype, got {logits_NV.dtype}")
    if logits_NV.dim() != 2:
        raise ValueError(f"logits_NV must be [N, V], got shape {tuple(logits_NV.shape)}; flatten with .flatten(0, 1)")
    width = logits_NV.shape[1]
    vocab_size = width if vocab_size is None else vocab_size
    for name, value in (("k", k), ("vocab_size", vocab_size), ("chunk_rows", 1 if chunk_rows is None else chunk_rows)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if vocab_size > width:
        raise ValueError(f"logits_NV has {width} columns, fewer than vocab_size={vocab_size}")
    if min_prob is not None and (isinstance(min_prob, bool) or not isinstance(min_prob, numbers.Real)):
        raise TypeError(f"min_prob must be a number or None, got {type(min_prob).__name__}")
    if min_prob is not None and not 0 < min_prob < 1:
        raise ValueError(f"min_prob must be in (0, 1), got {min_prob}")
    return width, vocab_size


def _topk_chunk(x_CV: Tensor, k: int) -> TopKWithTail:
    """The result for a chunk of logits. One place more than k is looked up: it is the tail's peak, without a pass."""
    vocab_size = x_CV.shape[1]
    values, ids = largest(x_CV, min(k + 1, vocab_size))
    ids_CK = ids[:, :k].sort(dim=1).values
    head_CK, order_CK = x_CV.gather(1, ids_CK).sort(dim=1, descending=True, stable=True)
    ids_CK = ids_CK.gather(1, order_CK)
    peak_C1 = head_CK[:, :1]

    tail_peak_C1 = values[:, k:] if vocab_size > k else peak_C1
    tail_peak_C1 = torch.where(tail_peak_C1 == -math.inf, peak_C1, tail_peak_C1)
    root_CV = torch.add(-0.5 * tail_peak_C1, x_CV, alpha=0.5)
    root_CV.scatter_(1, ids_CK, -math.inf).exp_()
    # From here on every log is relative to the row's largest logit, which keeps float32's digits for what differs.
    tail_peak_C = (tail_peak_C1 - peak_C1)[:, 0]
    head_CK = head_CK - peak_C1
    half_C = tail_peak_C / 2 + root_CV.sum(dim=1).log()
    mass_C = tail_peak_C + root_CV.square_().sum(dim=1).log()
    lse_C = torch.logaddexp(head_CK.logsumexp(dim=1), mass_C)
    pad_CK = head_CK == -math.inf
    return TopKWithTail(
        ids_CK.masked_fill(pad_CK, -1).int(),
        (head_CK - lse_C[:, None]).clamp(max=0).float(),
        (mass_C - lse_C).clamp(max=0).float(),
        (half_C - lse_C / 2).float(),
    )


def _unlikely_to_tail(kept: TopKWithTail, min_prob: float) -> TopKWithTail:
    """The same with entries below min_prob, but for the first of a row, moved to the tail."""
    ids_CK, logps_CK, mass_C, half_C = kept
    moved_CK = logps_CK < torch.tensor(math.log(min_prob), dtype=torch.float32)
    moved_CK[:, 0] = False
    moved_logps_CK = logps_CK.masked_fill(~moved_CK, -math.inf)
    return TopKWithTail(
        ids_CK.masked_fill(moved_CK, -1),
        logps_CK.masked_fill(moved_CK, -math.inf),
        torch.logaddexp(mass_C, moved_logps_CK.logsumexp(dim=1)),
        torch.logaddexp(half_C, (moved_logps_CK / 2).logsumexp(dim=1)),
    )


def largest(x_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the k largest of each row.

    On a CPU topk over a whole vocabulary costs more than everything else here. The k largest lie in the k blocks with
    the largest maxima, so only those are sorted; block j is the columns j, j + n, j + 2n ..., which makes the maxima
    one vectorised pass.
    """
    n_blocks = x_CV.shape[1] // _BLOCK
    if x_CV.device.type != "cpu" or n_blocks < 4 * k:
        return tuple(x_CV.topk(k, dim=1))
    n_columns = n_blocks * _BLOCK
    maxima_CM = x_CV[:, :n_columns].unflatten(1, (_BLOCK, n_blocks)).amax(dim=1)
    blocks_CK = maxima_CM.topk(k, dim=1, sorted=False).indices
    ids_CJ = (blocks_CK[:, :, None] + torch.arange(0, n_columns, n_blocks)).flatten(1)
    rest_CJ = torch.arange(n_columns, x_CV.shape[1]).expand(len(x_CV), -1)
    ids_CJ = torch.cat([ids_CJ, rest_CJ], dim=1)
    values_CK, places_CK = x_CV.gather(1, ids_CJ).topk(k, dim=1)
    return values_CK, ids_CJ.gather(1, places_CK)
