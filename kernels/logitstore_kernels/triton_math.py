"""Scalar functions that Triton lacks, accurate in float32 and built of what both its compiler and its interpreter have.

Each is within a few units in the last place over the range that the losses use; the obvious forms (log(1 - exp(x)),
1 - 2 / (exp(2x) + 1) near 0) lose every digit there.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0, by its series down to -0.35."""
    series = 1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * series)))
    return tl.where(x > -0.35, series, tl.exp(x) - 1)


@triton.jit
def log1p_of_small(x):
    """ln(1 + x) for x in [-1/2, 0], as 2 artanh(x / (2 + x))."""
    s = x / (2 + x)
    s2 = s * s
    series = 1 / 9 + s2 * (1 / 11 + s2 * (1 / 13 + s2 * (1 / 15)))
    series = 1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * series)))
    return 2 * s * series


@triton.jit
def log1mexp(x):
    """ln(1 - e^x) for x <= 0 (Maechler 2012): 0 at -inf, -inf at 0."""
    near_zero = tl.log(-expm1(x))
    return tl.where(x > -0.6931471805599453, near_zero, log1p_of_small(-tl.exp(tl.minimum(x, -0.6931471805599453))))


@triton.jit
def logaddexp(a, b):
    """ln(e^a + e^b); -inf where both are."""
    high = tl.maximum(a, b)
    finite_high = tl.where(high == float("-inf"), 0.0, high)
    return finite_high + tl.log(tl.exp(a - finite_high) + tl.exp(b - finite_high))


@triton.jit
def logsumexp(x):
    """ln of the sum of e^x over a vector; -inf where every element is."""
    high = tl.max(x, axis=0)
    finite_high = tl.where(high == float("-inf"), 0.0, high)
    return finite_high + tl.log(tl.sum(tl.exp(x - finite_high), axis=0))


@triton.jit
def tanh(x):
    size = tl.abs(x)
    x2 = x * x
    series = 2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835 - x2 * (1382 / 155925)))
    series = x * (1 + x2 * (-1 / 3 + x2 * series))
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.3, series, tl.where(x < 0, -far, far))
