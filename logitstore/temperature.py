"""What a stored row (head entries and two tail moments) says at a temperature T.

The order is fixed: shift the head so that its mass is 1 - tail mass, temper head and tail, normalise. The tail is
known through its log-moment rho(beta) = ln sum over the tail of p^beta with beta = 1/T. Two points of it are stored
(beta = 1 and 1/2) and one is free (beta = 0: ln n for n tail tokens); rho is convex, and between the three points we
draw straight lines. That is exact at T = 1 and T = 2 and an upper bound in between and above T = 2; for T < 1 the
last line is extended, a lower bound.

Letters: R rows, E entries.
"""

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


def log1mexp(x: Float64) -> Float64:
    """ln(1 - e^x) for x <= 0, without cancellation (Maechler 2012); -inf at 0, and 0 at -inf."""
    with np.errstate(divide="ignore"):
        return np.where(x > -0.6931471805599453, np.log(-np.expm1(x)), np.log1p(-np.exp(x)))


def segment_logsumexp(values_E: Float64, offsets: Int64) -> Float64:
    """ln of the sum of e^values over each row's entries [R]; -inf for a row without entries."""
    n_rows = len(offsets) - 1
    out = np.full(n_rows, -np.inf)
    keep_rows = np.flatnonzero(np.diff(offsets) > 0)
    if len(keep_rows) == 0:
        return out
    starts = offsets[keep_rows]
    counts = np.diff(offsets)[keep_rows]
    peaks = np.maximum.reduceat(values_E, starts)
    sums = np.add.reduceat(np.exp(values_E - np.repeat(peaks, counts)), starts)
    out[keep_rows] = peaks + np.log(sums)
    return out


def shifted_head(logps_E: Float32, offsets: Int64, tail_logmass_R: Float32) -> Float64:
    """Head log-probs [E] moved by one constant a row, so that a row's head mass is exactly 1 - tail mass."""
    logps = logps_E.astype(np.float64)
    counts = np.diff(offsets)
    shift_R = log1mexp(tail_logmass_R.astype(np.float64)) - segment_logsumexp(logps, offsets)
    return logps + np.repeat(shift_R, counts)


def tail_logmoment(
    tail_logmass_R: Float32, tail_logmoment_half_R: Float32, n_tail_R: Int64, *, temperature: float
) -> Float64:
    """rho(1/T) [R] in nats: piecewise linear through (0, ln n), (1/2, half moment), (1, log-mass); -inf if no mass."""
    beta = 1.0 / temperature
    mass = tail_logmass_R.astype(np.float64)
    half = tail_logmoment_half_R.astype(np.float64)
    has_mass = np.isfinite(mass) & (n_tail_R > 0)
    safe_mass = np.where(has_mass, mass, 0.0)
    safe_half = np.where(has_mass, half, 0.0)
    if beta >= 0.5:
        weight = 2.0 * beta - 1.0
        rho = safe_half + weight * (safe_mass - safe_half)
    else:
        log_n = np.log(np.maximum(n_tail_R, 1).astype(np.float64))
        rho = log_n + 2.0 * beta * (safe_half - log_n)
    return np.where(has_mass, rho, -np.inf)
