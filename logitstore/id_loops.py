"""Token ids to and from codes in candidate lists, as id_lists.py describes them; compiled.

Encoding reads a row's lists from their beginning and asks of each member whether it is one of the row's ids, which a
small hash of these answers. Looking up every (key, id) instead would need a hash of all pairs, and a cache miss an
entry.

Letters: R rows, E entries, V vocabulary, P list members of all keys together.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.compiled import compiled
from logitstore.id_lists import ESCAPE

OK, OUTSIDE_VOCABULARY, BEHIND_LIST = 0, 1, 2
_SLOTS_OF_ENTRY = 64  # so many that a member that is none of the row's ids mostly meets a free slot
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing (Knuth, TAOCP 6.4)
_ONE = np.uint64(1)


class Lists(NamedTuple):
    """offsets [V+1] and members [P] of CandidateLists."""

    offsets: NDArray[np.int32]
    members: NDArray[np.int32]


@compiled
def codes_of_ids(
    ids_E: NDArray[np.int32],
    offsets: NDArray[np.int64],
    tokens: NDArray[np.int32],
    beside: Lists,
    after: Lists,
    together: Lists,
    frequency_rank_V: NDArray[np.int32],
) -> NDArray[np.int32]:
    """The codes [E] of ids that are unique in a row; row r has current token tokens[r], next token tokens[r + 1]."""
    codes_E = np.empty(len(ids_E), np.int32)
    for e in range(len(ids_E)):
        codes_E[e] = ESCAPE + frequency_rank_V[ids_E[e]]
    slots, shift = _free_slots(offsets)
    for r in range(len(offsets) - 1):
        start, stop = offsets[r], offsets[r + 1]
        if start == stop:
            continue
        current, following, first = tokens[r], tokens[r + 1], ids_E[start]
        _code_one(codes_E, start, first, after, current, 1)
        _code_one(codes_E, start, first, beside, following, 0)
        if stop - start > 1:
            _enter(slots, shift, ids_E, start, stop)
            _code_others(codes_E, start, stop, ids_E, together, first, 0, slots, shift)
            _code_others(codes_E, start, stop, ids_E, after, current, 1, slots, shift)
            _clear(slots, shift, ids_E, start, stop)
    return codes_E


@compiled
def _code_one(codes_E, entry, token, lists, key, side):
    """Lowers the code of one entry to that of its id's place in the list of key."""
    begin, end = np.int64(lists.offsets[key]), np.int64(lists.offsets[key + 1])
    for place in range(min(end - begin, (codes_E[entry] - side + 1) >> 1)):
        if lists.members[begin + place] == token:
            codes_E[entry] = 2 * place + side
            return


@compiled
def _code_others(codes_E, start, stop, ids_E, lists, key, side, slots, shift):
    """Lowers the codes of a row's entries from the second on to those of their ids' places in the list of key."""
    greatest, left = 0, stop - start - 1
    for e in range(start + 1, stop):
        greatest = max(greatest, codes_E[e])
    begin, end = np.int64(lists.offsets[key]), np.int64(lists.offsets[key + 1])
    last_slot = np.uint64(len(slots) - 1)
    for place in range(min(end - begin, (greatest - side + 1) >> 1)):
        token = lists.members[begin + place]
        at = (np.uint64(token) * _GOLDEN) >> shift
        while slots[at]:
            entry = start + slots[at]
            if ids_E[entry] == token:
                codes_E[entry] = min(codes_E[entry], 2 * place + side)
                left -= 1
                break
            at = (at + _ONE) & last_slot
        if left == 0:
            return


@compiled
def _free_slots(offsets):
    """(slots, a power of two of them, for the longest row; the shift that makes a slot of a product)."""
    longest = 1
    for r in range(len(offsets) - 1):
        longest = max(longest, offsets[r + 1] - offsets[r])
    bits = 4
    while (1 << bits) < _SLOTS_OF_ENTRY * longest:
        bits += 1
    return np.zeros(1 << bits, np.uint16), np.uint64(64 - bits)


@compiled
def _enter(slots, shift, ids_E, start, stop):
    """Puts the rank of each entry of a row but the first where its id is looked for."""
    last_slot = np.uint64(len(slots) - 1)
    for e in range(start + 1, stop):
        at = (np.uint64(ids_E[e]) * _GOLDEN) >> shift
        while slots[at]:
            at = (at + _ONE) & last_slot
        slots[at] = e - start


@compiled
def _clear(slots, shift, ids_E, start, stop):
    last_slot = np.uint64(len(slots) - 1)
    for e in range(start + 1, stop):
        at = (np.uint64(ids_E[e]) * _GOLDEN) >> shift
        while slots[at]:
            slots[at] = 0
            at = (at + _ONE) & last_slot


@compiled
def ids_of_codes(
    codes_E: NDArray[np.int64],
    offsets: NDArray[np.int64],
    tokens: NDArray[np.int32],
    beside: Lists,
    after: Lists,
    together: Lists,
    by_frequency_V: NDArray[np.int32],
    ids_E: NDArray[np.int32],
) -> int:
    """Fills ids_E; OK, or what is wrong with the first code that no id has. Codes are at least 0."""
    for r in range(len(offsets) - 1):
        start, stop = offsets[r], offsets[r + 1]
        if start == stop:
            continue
        after_begin, after_end = np.int64(after.offsets[tokens[r]]), np.int64(after.offsets[tokens[r] + 1])
        key, offsets_V, members = tokens[r + 1], beside.offsets, beside.members
        begin, end = np.int64(offsets_V[key]), np.int64(offsets_V[key + 1])
        for e in range(start, stop):
            code = codes_E[e]
            place = code >> 1
            if code >= ESCAPE:
                if code - ESCAPE >= len(by_frequency_V):
                    return OUTSIDE_VOCABULARY
                ids_E[e] = by_frequency_V[code - ESCAPE]
            elif code & 1:
                if place >= after_end - after_begin:
                    return BEHIND_LIST
                ids_E[e] = after.members[after_begin + place]
            else:
                if place >= end - begin:
                    return BEHIND_LIST
                ids_E[e] = members[begin + place]
            if e == start:
                key, offsets_V, members = ids_E[e], together.offsets, together.members
                begin, end = np.int64(offsets_V[key]), np.int64(offsets_V[key + 1])
    return OK
