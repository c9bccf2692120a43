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


@dataclass(frozen=True, eq=False)
class IdLists:
    """after: by current token. beside: by next token, for first entries. together: by a row's first entry.

    by_frequency [V] int32: all ids, the most frequent first.
    """

    after: CandidateLists
    beside: CandidateLists
    together: CandidateLists
    by_frequency: NDArray[np.int32]

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.by_frequency)

    @cached_property
    def _frequency_rank(self) -> NDArray[np.int32]:
        rank = np.empty_like(self.by_frequency)
        rank[self.by_frequency] = np.arange(len(rank), dtype=rank.dtype)
        return rank

    @cached_property
    def _arrays(self) -> tuple:
        """beside, after and together as compiled loops take them."""
        from logitstore.id_loops import Lists

        return tuple(Lists(lists.offsets, lists.members) for lists in (self.beside, self.after, self.together))

    def codes(
        self, ids_E: NDArray[np.int32], offsets: NDArray[np.int64], tokens: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """The code of each id [E], ids being unique in a row: offsets [R+1] of the rows' entries, tokens [R+1]."""
        from logitstore import id_loops

        return id_loops.codes_of_ids(ids_E, offsets, tokens, *self._arrays, self._frequency_rank)

    def ids(
        self, codes_E: NDArray[np.int64], offsets: NDArray[np.int64], tokens: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """The ids of which `codes` made these, at least 0. Raises CorruptionError for a code that no id has."""
        from logitstore import id_loops

        ids_E = np.empty(len(codes_E), np.int32)
        status = id_loops.ids_of_codes(codes_E, offsets, tokens, *self._arrays, self.by_frequency, ids_E)
        if status == id_loops.OUTSIDE_VOCABULARY:
            raise CorruptionError(f"an id's code is outside the vocabulary of {len(self.by_frequency)}")
        if status == id_loops.BEHIND_LIST:
            raise CorruptionError("an id's code points behind the end of its candidate list")
        return ids_E


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
