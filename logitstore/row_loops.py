"""Whole rows of targets: whether they keep the invariants of TeacherTargets, and the offset of a `log` head; compiled.

Letters: R rows, E entries, N rows given, K entries given.
"""

import math

import numpy as np
from numpy.typing import NDArray

from logitstore.compiled import compiled

_LEAST = np.float32(-3.4028235e38)


@compiled
def rows_are_sound(
    offsets: NDArray[np.int64],
    ids_E: NDArray[np.int32],
    logps_E: NDArray[np.float32],
    tail_logmass_R: NDArray[np.float32],
    tail_logmoment_half_R: NDArray[np.float32],
    vocab_size: int,
) -> bool:
    """True where TeacherTargets.validate finds nothing in rows that are no samples; their sizes have been checked."""
    seen = np.zeros((vocab_size >> 6) + 1, np.uint64)
    for r in range(len(offsets) - 1):
        start, stop = offsets[r], offsets[r + 1]
        mass, half = tail_logmass_R[r], tail_logmoment_half_R[r]
        if start == stop:
            if not (math.isnan(mass) and math.isnan(half)):
                return False
            continue
        no_tail = mass == -np.inf
        if not (mass <= 0) or math.isnan(half) or half == np.inf or no_tail != (half == -np.inf):
            return False
        if stop - start == vocab_size and not no_tail:
            return False
        ids, logps = ids_E[start:stop], logps_E[start:stop]
        if logps[0] > 0 or not _entries_are_sound(ids, logps, vocab_size) or _has_repeats(ids, seen):
            return False
    return True


@compiled
def _entries_are_sound(ids_E, logps_E, vocab_size):
    """True where all ids are in the vocabulary, and log-probs finite and descending."""
    sound = logps_E[0] < np.inf
    for e in range(len(ids_E)):
        sound &= (ids_E[e] >= 0) & (ids_E[e] < vocab_size) & (logps_E[e] >= _LEAST)
    for e in range(1, len(ids_E)):
        sound &= logps_E[e] <= logps_E[e - 1]
    return sound


@compiled
def _has_repeats(ids_E, seen):
    """True where two ids of a row are equal; seen: a flag for each id of the vocabulary, 64 a number, none set."""
    met = np.uint64(0)
    for token in ids_E:
        flag = np.uint64(1) << np.uint64(token & 63)
        met |= seen[token >> 6] & flag
        seen[token >> 6] |= flag
    for token in ids_E:
        seen[token >> 6] = 0
    return met != 0


@compiled
def given_rows_are_sound(
    ids_NK: NDArray[np.int64],
    logps_NK: NDArray[np.float32],
    tail_logmass_N: NDArray[np.float32],
    tail_logmoment_half_N: NDArray[np.float32],
    vocab_size: int,
    rounding: float,
) -> bool:
    """True where each row is entries and then pads (negative ids), and what row_input asks of rows holds."""
    seen = np.zeros((vocab_size >> 6) + 1, np.uint64)
    for n in range(len(ids_NK)):
        ids, logps = ids_NK[n], logps_NK[n]
        mass, half = tail_logmass_N[n], tail_logmoment_half_N[n]
        if not (mass <= rounding) or math.isnan(half) or half == np.inf or (mass == -np.inf) != (half == -np.inf):
            return False
        n_entries = 0
        while n_entries < len(ids) and ids[n_entries] >= 0:
            n_entries += 1
        if n_entries == 0 or logps[0] > rounding:
            return False
        for place in range(n_entries, len(ids)):
            if ids[place] >= 0:
                return False
        ids, logps = ids[:n_entries], logps[:n_entries]
        if not _entries_are_sound(ids, logps, vocab_size) or _has_repeats(ids, seen):
            return False
    return True


@compiled
def log_head(
    codes_E: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    table: NDArray[np.float32],
    shares: NDArray[np.float64],
    tail_logmass_R: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(offset [R], log-probs table[code] + offset [E]) that give each row's entries what mass the tail leaves.

    shares [256]: e^table, table being multiples of one step; offset is 0 in rows without entries.
    """
    offset_R, logps_E = np.zeros(len(offsets) - 1, np.float32), np.empty(len(codes_E), np.float32)
    for r in range(len(offsets) - 1):
        start, stop = offsets[r], offsets[r + 1]
        if start == stop:
            continue
        first, total = np.int64(codes_E[start]), 0.0
        for e in range(start, stop):
            total += shares[(np.int64(codes_E[e]) - first) & 255]
        offset_R[r] = _log1mexp(np.float64(tail_logmass_R[r])) - np.float64(table[first]) - math.log(total)
        for e in range(start, stop):
            logps_E[e] = table[codes_E[e]] + offset_R[r]
    return offset_R, logps_E


@compiled
def _log1mexp(x):
    """As temperature.log1mexp."""
    if x > -0.6931471805599453:
        return np.log(-np.expm1(x))
    return np.log1p(-np.exp(x))
