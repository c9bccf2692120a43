"""What callers hand to a codec, checked once and brought to one shape.

Letters: L sequence length, N rows given, K entries given.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-5  # a log-prob of a sure token may come out of fp32 arithmetic this far above 0


class GivenRows(NamedTuple):
    """ids [N, K] int64 (pads -1), logps [N, K] float32, tail moments [N] float32."""

    ids: NDArray[np.int64]
    logps: NDArray[np.float32]
    tail_logmass: NDArray[np.float32]
    tail_logmoment_half: NDArray[np.float32]


def checked_input_ids(input_ids: Any, vocab_size: int) -> NDArray[np.int32]:
    """input_ids as int32 [L]. Raises ValueError for another shape or an id outside the vocabulary."""
    ids = as_numpy(input_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids must be one row of integers, got shape {ids.shape}, dtype {ids.dtype}")
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        raise ValueError(
            f"input_ids[{outside[0]}] is {ids[outside[0]]}, outside the vocabulary 0..{vocab_size - 1}; "
            "text and codec belong to different tokenizers"
        )
    return ids.astype(np.int32)


def checked_keep_mask(keep_mask: Any, n_tokens: int) -> NDArray[np.bool_]:
    """keep_mask as bool [L-1], all True where it is None. Raises ValueError for another shape or dtype."""
    n_rows = max(n_tokens - 1, 0)
    if keep_mask is None:
        return np.ones(n_rows, bool)
    keep = as_numpy(keep_mask)
    if keep.dtype != np.bool_ or keep.shape != (n_rows,):
        raise ValueError(
            f"keep_mask must be bool [{n_rows}], one for each row of {n_tokens} tokens, got {keep.dtype} {keep.shape}"
        )
    return keep


def checked_rows(
    ids: Any, logps: Any, tail_logmass: Any, tail_logmoment_half: Any, *, keep_mask: NDArray[np.bool_], vocab_size: int
) -> GivenRows:
    """The rows that keep_mask keeps. Raises ValueError for what is no list of top entries with two moments."""
    given = GivenRows(
        as_numpy(ids).astype(np.int64),
        as_numpy(logps).astype(np.float32),
        as_numpy(tail_logmass).astype(np.float32),
        as_numpy(tail_logmoment_half).astype(np.float32),
    )
    n_given, n_kept = given.ids.shape[0], int(keep_mask.sum())
    if given.ids.ndim != 2 or given.logps.shape != given.ids.shape:
        raise ValueError(f"ids and logps must be [N, K], got {given.ids.shape} and {given.logps.shape}")
    if given.tail_logmass.shape != (n_given,) or given.tail_logmoment_half.shape != (n_given,):
        raise ValueError(f"tail moments must be [{n_given}], got {given[2].shape} and {given[3].shape}")
    if n_given == len(keep_mask):
        given = GivenRows(*(array[keep_mask] for array in given))
    elif n_given != n_kept:
        raise ValueError(f"{n_given} rows given, expected {len(keep_mask)}, or the {n_kept} that keep_mask keeps")
    _check_values(given, vocab_size)
    return given._replace(logps=np.minimum(given.logps, 0))


def _check_values(given: GivenRows, vocab_size: int) -> None:
    entry_NK = given.ids >= 0
    logps = np.where(entry_NK, given.logps, -np.inf)
    ordered_ids = np.sort(given.ids, axis=1)
    twice = (ordered_ids[:, 1:] == ordered_ids[:, :-1]) & (ordered_ids[:, 1:] >= 0)
    moments = np.stack([given.tail_logmass, given.tail_logmoment_half])
    infinite = np.isneginf(moments)
    faults = {
        f"an id at or beyond the vocabulary of {vocab_size}": (given.ids >= vocab_size).any(axis=1),
        "no entry": ~entry_NK.any(axis=1),
        "a log-prob that is NaN, infinite or above 0": (
            entry_NK & ~(np.isfinite(given.logps) & (given.logps <= _ROUNDING))
        ).any(axis=1),
        "log-probs that are not descending, or an entry behind a pad": (logps[:, 1:] > logps[:, :-1]).any(axis=1),
        "a token id twice": twice.any(axis=1),
        "a tail moment that is NaN or infinite (-inf in both means no tail)": (
            np.isnan(moments) | np.isposinf(moments)
        ).any(axis=0)
        | (infinite[0] != infinite[1]),
        "a tail log-mass above 0": given.tail_logmass > _ROUNDING,
    }
    for what, broken_N in faults.items():
        rows = np.flatnonzero(broken_N)
        if len(rows):
            raise ValueError(f"row {rows[0]} of the given rows has {what}")


def as_numpy(array: Any) -> NDArray:
    """A numpy view or copy of an array-like or torch tensor."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy has no bfloat16
    return np.asarray(array)
