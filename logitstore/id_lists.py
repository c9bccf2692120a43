"""Token ids as ranks in candidate lists that the decoder can rebuild from the text and from a row's first entry.

A row's first entry is looked up in the list of what follows its current token and in the list of what stands first
beside its next token; every other entry in the list of what stands in one head together with the first entry, and in
the list of the current token. The two lists of an entry share one code space: code 2 i + 0 is the i-th of the first
list, 2 i + 1 of the second, and the smaller code counts. An id that is in neither has a code behind them, by how
often it occurs anywhere, so that every id of the vocabulary has a code and decoding a code is one look-up.

The first entry is a better key for the others than the next token: what stands in one head belongs together.

Letters: E entries, V vocabulary, P list members of all keys together.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptionError

LIST_LENGTH = 512
ESCAPE = 2 * LIST_LENGTH


@dataclass(frozen=True, eq=False)
class CandidateLists:
    """offsets [V+1] int32 and members [P] int32: the candidates of each token, best first, LIST_LENGTH at most."""

    offsets: NDArray[np.int32]
    members: NDArray[np.int32]

    @cached_property
    def _slots(self) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
        """Open-addressing hash of (key, member) -> place, for encoding."""
        lengths = np.diff(self.offsets)
        keys = np.repeat(np.arange(len(lengths)), lengths)
        places = np.arange(len(self.members)) - np.repeat(self.offsets[:-1], lengths)
        return _hash_table(_pair(keys, self.members), places)

    def places(self, keys_E: NDArray[np.integer], ids_E: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where each id stands in the list of its key [E]; -1 where it does not."""
        slots, places = self._slots
        mask = len(slots) - 1
        pairs = _pair(keys_E.astype(np.int64), ids_E.astype(np.int64))
        at = _hashed(pairs, mask)
        result = np.full(len(pairs), -1, np.int64)
        open_E = np.arange(len(pairs))
        while len(open_E):
            found = slots[at]
            hit = found == pairs[open_E]
            result[open_E[hit]] = places[at[hit]]
            goes_on = ~hit & (found >= 0)
            open_E, at = open_E[goes_on], (at[goes_on] + 1) & mask
        return result

    def at(self, keys_E: NDArray[np.integer], places_E: NDArray[np.integer]) -> NDArray[np.int32]:
        """The ids at these places. Raises CorruptionError for a place behind the end of a list."""
        first, end = self.offsets[keys_E], self.offsets[keys_E + 1]
        index = first + places_E
        if np.any(index >= end):
            raise CorruptionError("an id's code points behind the end of its candidate list")
        return self.members[index]


@dataclass(frozen=True, eq=False)
class IdLists:
    """after: by current token. beside: by next token, for first entries. together: by a row's first entry.

    by_frequency [V] int32: all ids, the most frequent first.
    """

    after: CandidateLists
    beside: CandidateLists
    together: CandidateLists
    by_frequency: NDArray[np.int32]

    @cached_property
    def _frequency_rank(self) -> NDArray[np.int32]:
        rank = np.empty_like(self.by_frequency)
        rank[self.by_frequency] = np.arange(len(rank), dtype=rank.dtype)
        return rank

    def codes(
        self,
        ids_E: NDArray[np.int32],
        is_first_E: NDArray[np.bool_],
        key_E: NDArray[np.int32],
        current_E: NDArray[np.int32],
    ) -> NDArray[np.int64]:
        """The code of each id [E]. key_E: the next token for first entries, the row's first entry for the others."""
        first_list = np.empty(len(ids_E), np.int64)
        for lists, chosen in ((self.beside, is_first_E), (self.together, ~is_first_E)):
            first_list[chosen] = lists.places(key_E[chosen], ids_E[chosen])
        second_list = self.after.places(current_E, ids_E)
        codes = ESCAPE + self._frequency_rank[ids_E].astype(np.int64)
        codes = np.where(second_list >= 0, np.minimum(codes, 2 * second_list + 1), codes)
        return np.where(first_list >= 0, np.minimum(codes, 2 * first_list), codes)

    def ids(
        self, codes_E: NDArray[np.int64], lists: CandidateLists, key_E: NDArray[np.int32], current_E: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """The ids of codes; lists: beside for first entries, together for others.

        Raises CorruptionError for a code that no id has.
        """
        ids = np.empty(len(codes_E), np.int32)
        escaped = codes_E >= ESCAPE
        ranks = codes_E[escaped] - ESCAPE
        if np.any(ranks >= len(self.by_frequency)):
            raise CorruptionError(f"an id's code is outside the vocabulary of {len(self.by_frequency)}")
        ids[escaped] = self.by_frequency[ranks]
        odd = (codes_E & 1).astype(bool)
        for source, keys, chosen in ((lists, key_E, ~odd & ~escaped), (self.after, current_E, odd & ~escaped)):
            ids[chosen] = source.at(keys[chosen], codes_E[chosen] >> 1)
        return ids


class PairCounts:
    """Summed weights of (key, member) pairs, merged as they come so that memory is that of the distinct pairs."""

    def __init__(self, chunk_pairs: int = 1 << 22) -> None:
        self._chunk_pairs = chunk_pairs
        self._merged = np.zeros(0, np.int64), np.zeros(0)
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        self._n_waiting = 0

    def add(self, keys: NDArray[np.integer], members: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        """Adds pairs; the three arrays broadcast, and pairs of weight 0 do not count."""
        pairs, weights = np.broadcast_arrays(_pair(keys, members), weights)
        counted = weights > 0
        self._waiting.append(_summed(pairs[counted], weights[counted].astype(np.float64)))
        self._n_waiting += len(self._waiting[-1][0])
        if self._n_waiting > self._chunk_pairs:
            self._merge()

    def ranked(self, vocab_size: int) -> CandidateLists:
        """Lists of the members seen with each key, the greatest summed weight first, ties by id."""
        self._merge()
        pairs, weights = self._merged
        keys, members = pairs >> 24, pairs & 0xFFFFFF
        order = np.lexsort((members, -weights.astype(np.float32), keys))
        keys, members = keys[order], members[order]
        begins = np.searchsorted(keys, np.arange(vocab_size + 1))
        keep = np.arange(len(keys)) - begins[keys] < LIST_LENGTH
        offsets = np.searchsorted(keys[keep], np.arange(vocab_size + 1)).astype(np.int32)
        return CandidateLists(offsets, members[keep].astype(np.int32))

    def _merge(self) -> None:
        if self._waiting:
            parts = [self._merged, *self._waiting]
            self._merged = _summed(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            self._waiting, self._n_waiting = [], 0


def _summed(pairs: NDArray[np.int64], weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Each pair once, with the sum of its weights."""
    order = np.argsort(pairs, kind="stable")
    pairs, weights = pairs[order], weights[order]
    first = np.flatnonzero(np.diff(pairs, prepend=-1))
    return pairs[first], np.add.reduceat(weights, first) if len(first) else weights


def _pair(keys: NDArray[np.integer], members: NDArray[np.integer]) -> NDArray[np.int64]:
    """Both ids, of at most 24 bits each, in one number."""
    return (np.asarray(keys, np.int64) << 24) | members


def _hashed(pairs: NDArray[np.int64], mask: int) -> NDArray[np.int64]:
    # multiplicative hashing (Knuth, TAOCP 6.4) on the golden ratio
    return ((pairs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(24)).astype(np.int64) & mask


def _hash_table(pairs: NDArray[np.int64], values: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """(pair in each slot, -1 where free; its value) with linear probing, at most half full."""
    size = 1 << max(4, int(2 * len(pairs)).bit_length())
    slots, slot_values = np.full(size, -1, np.int64), np.zeros(size, np.int16)
    left, at = np.arange(len(pairs)), _hashed(pairs, size - 1)
    while len(left):
        free = slots[at] < 0
        slots[at[free]] = pairs[left[free]]  # where several want one slot, the last of them has it
        placed = free & (slots[at] == pairs[left])
        slot_values[at[placed]] = values[left[placed]]
        left, at = left[~placed], (at[~placed] + 1) & (size - 1)
    return slots, slot_values
