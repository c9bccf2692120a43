"""Which of a row's most probable tokens are kept: a fixed number, those above a probability, or those of a mass.

What is not kept is not lost: its mass moves to the tail, exactly, at T = 1 and T = 2.

Letters: N rows, K entries given.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitstore.codecs.checks import require_fraction
from logitstore.head_values import HeadFormat
from logitstore.row_input import GivenRows


@dataclass(frozen=True)
class Selection:
    """At most k entries; of those, where given, the ones with p >= min_prob, or the first ones up to and including
    the one with which their mass reaches top_p. The first entry of a row is always kept.

    Raises ValueError for min_prob or top_p outside (0, 1), or both at once.
    """

    k: int
    min_prob: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        require_fraction("min_prob", self.min_prob)
        require_fraction("top_p", self.top_p)
        if self.min_prob is not None and self.top_p is not None:
            raise ValueError("min_prob and top_p are two rules for one choice; give one of them")


def selected(given: GivenRows, selection: Selection, head_format: HeadFormat) -> GivenRows:
    """The rows with what `selection` does not keep, and what the head format cannot say, moved to their tails."""
    entry_NK = given.ids >= 0
    logps_NK = np.where(entry_NK, given.logps, -np.inf)
    keep_NK = entry_NK & (np.arange(logps_NK.shape[1]) < selection.k)
    if selection.min_prob is not None:
        keep_NK &= logps_NK >= np.float32(math.log(selection.min_prob))
    if selection.top_p is not None:
        mass_NK = np.cumsum(np.exp(logps_NK.astype(np.float64)), axis=1)
        keep_NK[:, 1:] &= mass_NK[:, :-1] < selection.top_p
    with np.errstate(invalid="ignore"):
        keep_NK &= logps_NK[:, :1] - logps_NK <= head_format.reach_nats
    keep_NK &= logps_NK >= head_format.least_logp
    keep_NK[:, :1] = entry_NK[:, :1]
    return _moved_to_tail(given, logps_NK, entry_NK & ~keep_NK)


def _moved_to_tail(given: GivenRows, logps_NK: NDArray[np.float32], moved_NK: NDArray[np.bool_]) -> GivenRows:
    if not moved_NK.any():
        return given
    moved = np.where(moved_NK, logps_NK, -np.inf).astype(np.float64)
    peak_N1 = moved.max(axis=1, keepdims=True)
    peak_N1[np.isneginf(peak_N1)] = 0
    roots = np.exp((moved - peak_N1) / 2)  # relative to the peak, so that masses that float64 cannot hold are kept
    with np.errstate(divide="ignore"):
        mass_N = np.log(np.einsum("nk,nk->n", roots, roots)) + peak_N1[:, 0]
        half_N = np.log(roots.sum(axis=1)) + peak_N1[:, 0] / 2
    return GivenRows(
        np.where(moved_NK, -1, given.ids),
        given.logps,
        np.logaddexp(given.tail_logmass, mass_N).astype(np.float32),
        np.logaddexp(given.tail_logmoment_half, half_N).astype(np.float32),
    )
