"""What head codes say of a row's entries, and the numbers that they are coded as (ranked_layout.py); compiled.

Letters: R rows, E entries.
"""

import numpy as np
from numpy.typing import NDArray

from logitstore.codec_tables import N_RANK_GROUPS, N_TIE_SIZES
from logitstore.compiled import compiled

OK, STEP_TOO_GREAT = 0, 1


# 0, 1, 2, 3, then one group an octave, from rank 128 on the last
_GROUP_OF_RANK = np.array([min(n if n < 4 else 1 + n.bit_length(), N_RANK_GROUPS - 1) for n in range(129)], np.uint8)
_LONGEST_RUN = 17  # of those that differ in ceil(log2(length))
_SIZE_OF_RUN = np.array([0, *(min((n - 1).bit_length(), N_TIE_SIZES) for n in range(1, _LONGEST_RUN + 1))], np.uint8)


@compiled
def rank_groups(offsets: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The group of the rank of each entry [E]."""
    groups_E = np.empty(offsets[-1], np.uint8)
    for r in range(len(offsets) - 1):
        for e in range(offsets[r], offsets[r + 1]):
            groups_E[e] = _GROUP_OF_RANK[min(e - offsets[r], 128)]
    return groups_E


@compiled
def id_contexts(codes_E: NDArray, offsets: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """(tied [E], context of the id [E]). Tied: of the same head code as the entry before it, from rank 2 on.

    Without branches on what is tied, which no processor foresees: -tied is a mask of all bits or none.
    """
    tied_E, contexts_E = np.zeros(len(codes_E), np.bool_), np.empty(len(codes_E), np.uint8)
    for r in range(len(offsets) - 1):
        start, stop = offsets[r], offsets[r + 1]
        to_end = 1  # entries from this one to the end of its run, which stand in contexts_E for now
        for e in range(stop - 1, start + 1, -1):
            tied = np.int64(codes_E[e] == codes_E[e - 1])
            tied_E[e], contexts_E[e] = tied, min(to_end, _LONGEST_RUN)
            to_end = 1 + (to_end & -tied)
        contexts_E[start : start + 1] = 1
        contexts_E[start + 1 : min(start + 2, stop)] = min(to_end, _LONGEST_RUN)
        run = 0
        for e in range(start, stop):
            tied = np.int64(tied_E[e])
            run = (run & -tied) | (np.int64(contexts_E[e]) & (tied - 1))
            size = np.int64(_SIZE_OF_RUN[run])
            untied_context = 3 * np.int64(_GROUP_OF_RANK[min(e - start, 128)]) + min(size, 2)
            contexts_E[e] = untied_context + tied * (3 * N_RANK_GROUPS + size - 1 - untied_context)
    return tied_E, contexts_E


@compiled
def sort_tied(ids_E: NDArray[np.int32], id_codes_E: NDArray[np.int32], tied_E: NDArray[np.bool_]) -> None:
    """Puts the entries of each run in the order of their id codes, in place."""
    begin = 0
    while begin < len(ids_E):
        end = begin + 1
        while end < len(ids_E) and tied_E[end]:
            end += 1
        gap = 1  # Shell's sort with Knuth's gaps, which is insertion for short runs
        while 3 * gap + 1 < end - begin:
            gap = 3 * gap + 1
        while gap:
            for e in range(begin + gap, end):
                code, token, at = id_codes_E[e], ids_E[e], e
                while at >= begin + gap and id_codes_E[at - gap] > code:
                    id_codes_E[at], ids_E[at] = id_codes_E[at - gap], ids_E[at - gap]
                    at -= gap
                id_codes_E[at], ids_E[at] = code, token
            gap //= 3
        begin = end


@compiled
def differences_of_tied(id_codes_E: NDArray[np.int32], tied_E: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Codes, and for a tied entry what its code has beyond one more than the code before it."""
    differences_E = id_codes_E.copy()
    for e in range(1, len(id_codes_E)):
        if tied_E[e]:
            differences_E[e] -= id_codes_E[e - 1] + 1
    return differences_E


@compiled
def undo_differences_of_tied(differences_E: NDArray[np.int32], tied_E: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The codes of which differences_of_tied made these."""
    id_codes_E = np.empty(len(differences_E), np.int64)
    before = 0
    for e in range(len(differences_E)):
        before = differences_E[e] + tied_E[e] * (before + 1)
        id_codes_E[e] = before
    return id_codes_E


@compiled
def steps_of_codes(
    codes_E: NDArray, offsets: NDArray[np.int64], greatest: int, base: int, descends: bool
) -> NDArray[np.int32]:
    """Each code's distance from the one before it in its row, a first one's from base, modulo greatest + 1."""
    steps_E = np.empty(len(codes_E), np.int32)
    for r in range(len(offsets) - 1):
        before = 0
        for e in range(offsets[r], offsets[r + 1]):
            code = np.int64(codes_E[e])
            based = (base - code) & greatest if descends else code ^ base
            steps_E[e] = (based - before) & greatest
            before = based
    return steps_E


@compiled
def codes_of_steps(
    steps_E: NDArray[np.int32], offsets: NDArray[np.int64], greatest: int, base: int, descends: bool, codes_E: NDArray
) -> int:
    """Fills codes_E with the codes of which steps_of_codes made these; OK or STEP_TOO_GREAT."""
    for r in range(len(offsets) - 1):
        based = 0
        for e in range(offsets[r], offsets[r + 1]):
            if steps_E[e] > greatest:
                return STEP_TOO_GREAT
            based = (based + np.int64(steps_E[e])) & greatest
            codes_E[e] = (base - based) & greatest if descends else based ^ base
    return OK
