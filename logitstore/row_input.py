"""What callers hand to a codec, checked once and brought to one shape.

Letters: L sequence length, N rows given, K entries given.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.head_values import LEAST_LOGP

_ROUNDING = 1e-5  # a log-prob of a sure token may come out of fp32 arithmetic this far above 0
_WEIGHT_SUM_ERROR = 1e-3


class GivenRows(NamedTuple):
    """ids [N, K] int64 (pads -1), logps [N, K] float32, tail moments [N] float32."""

    ids: NDArray[np.int64]
    logps: NDArray[np.float32]
    tail_logmass: NDArray[np.float32]
    tail_logmoment_half: NDArray[np.float32]


class GivenSamples(NamedTuple):
    """ids [N, K] int64 (pads -1), logweights [N, K] float32, n_exact [N] int64."""

    ids: NDArray[np.int64]
    logweights: NDArray[np.float32]
    n_exact: NDArray[np.int64]


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


def check_logit_rows(logits: Any, n_tokens: int) -> None:
    """Raises ValueError where there are not as many rows of logits as tokens."""
    if hasattr(logits, "shape") and logits.shape[0] != n_tokens:
        raise ValueError(f"{logits.shape[0]} rows of logits for {n_tokens} tokens, expected as many")


def checked_rows(
    ids: Any,
    logps: Any,
    tail_logmass: Any,
    tail_logmoment_half: Any,
    *,
    keep_mask: NDArray[np.bool_],
    vocab_size: int,
    compiled: bool = False,
) -> GivenRows:
    """The rows that keep_mask keeps; compiled: True where loading compiled loops for it pays.

    Raises ValueError for what is no list of top entries with two moments.
    """
    given = GivenRows(
        as_numpy(ids).astype(np.int64),
        as_numpy(logps).astype(np.float32),
        as_numpy(tail_logmass).astype(np.float32),
        as_numpy(tail_logmoment_half).astype(np.float32),
    )
    n_given = given.ids.shape[0]
    if given.ids.ndim != 2 or given.logps.shape != given.ids.shape:
        raise ValueError(f"ids and logps must be [N, K], got {given.ids.shape} and {given.logps.shape}")
    if given.tail_logmass.shape != (n_given,) or given.tail_logmoment_half.shape != (n_given,):
        raise ValueError(f"tail moments must be [{n_given}], got {given[2].shape} and {given[3].shape}")
    given = GivenRows(*_kept(given, keep_mask))
    if not (compiled and _are_sound(given, vocab_size)):
        _check_values(given, vocab_size)
    return given._replace(logps=np.minimum(given.logps, 0))


def checked_samples(
    ids: Any, logweights: Any, n_exact: Any, *, keep_mask: NDArray[np.bool_], vocab_size: int, max_entries: int
) -> GivenSamples:
    """The rows that keep_mask keeps; n_exact None: no entry is exact.

    Raises ValueError for what is no list of weighted samples whose weights sum to 1.
    """
    ids, logweights = as_numpy(ids).astype(np.int64), as_numpy(logweights).astype(np.float32)
    if ids.ndim != 2 or logweights.shape != ids.shape:
        raise ValueError(f"ids and logweights must be [N, K], got {ids.shape} and {logweights.shape}")
    n_exact = np.zeros(len(ids), np.int64) if n_exact is None else as_numpy(n_exact).astype(np.int64)
    if n_exact.shape != (len(ids),):
        raise ValueError(f"n_exact must be [{len(ids)}], got {n_exact.shape}")
    given = GivenSamples(*_kept((ids, logweights, n_exact), keep_mask))
    no_tail_N = np.full(len(given.ids), -np.inf, np.float32)
    _check_values(GivenRows(given.ids, given.logweights, no_tail_N, no_tail_N), vocab_size)
    entry_NK = given.ids >= 0
    counts_N = entry_NK.sum(axis=1)
    sum_N = np.where(entry_NK, np.exp(given.logweights.astype(np.float64)), 0).sum(axis=1)
    _refuse(
        {
            f"more than {max_entries} entries": counts_N > max_entries,
            "more exact entries than entries, or fewer than 0": (given.n_exact < 0) | (given.n_exact > counts_N),
            f"a weight below e^{LEAST_LOGP:.0f}": (entry_NK & (given.logweights < LEAST_LOGP)).any(axis=1),
            "weights that do not sum to 1": ~(np.abs(sum_N - 1) < _WEIGHT_SUM_ERROR),
        }
    )
    return given._replace(logweights=np.minimum(given.logweights, 0))


def _kept(columns: Iterable[NDArray], keep_mask: NDArray[np.bool_]) -> list[NDArray]:
    """The kept rows of columns that hold them alone, or all rows. Raises ValueError for any other number of rows."""
    columns = list(columns)
    n_given, n_kept = len(columns[0]), int(keep_mask.sum())
    if n_given == len(keep_mask) != n_kept:
        return [column[keep_mask] for column in columns]
    if n_given != n_kept:
        raise ValueError(f"{n_given} rows given, expected {len(keep_mask)}, or the {n_kept} that keep_mask keeps")
    return columns


def _are_sound(given: GivenRows, vocab_size: int) -> bool:
    """True where _check_values finds nothing."""
    from logitstore.row_loops import given_rows_are_sound

    return given_rows_are_sound(*map(np.ascontiguousarray, given), vocab_size, _ROUNDING)


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
    _refuse(faults)


def _refuse(faults: dict[str, NDArray[np.bool_]]) -> None:
    """Raises ValueError with the first row of the first fault that any row has."""
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
