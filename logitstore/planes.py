"""Byte planes: how ragged entries are laid out in a blob, and read back.

Entries go rank by rank: the first entries of all rows, then the second entries of the rows that have one, and so on.
Numbers of more than one byte are split into planes of equal significance, lowest first.

Letters: R rows, E entries.
"""

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptionError


def offsets_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row boundaries [R+1] of ragged entries, from the entries of each row [R]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def rank_major_order(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Entry indices [E] in the order in which they are stored: by rank, rows in order within a rank."""
    filled = counts[counts > 0]
    if len(filled) and filled.min() == filled.max():
        return np.arange(counts.sum()).reshape(len(filled), int(filled[0])).T.reshape(-1)
    starts = np.cumsum(counts) - counts
    rank_E = np.arange(counts.sum()) - np.repeat(starts, counts)
    return np.argsort(rank_E.astype(np.uint16), kind="stable")


def delta_along_rank(codes_E: NDArray, offsets: NDArray[np.int64]) -> NDArray:
    """Each entry's code minus the one before it in its row, modulo the code's range; first entries stay."""
    delta_E = codes_E.copy()
    delta_E[1:] -= codes_E[:-1]
    firsts = offsets[:-1][np.diff(offsets) > 0]
    delta_E[firsts] = codes_E[firsts]
    return delta_E


def undo_delta_along_rank(delta_E: NDArray, offsets: NDArray[np.int64]) -> NDArray:
    """The codes of which `delta_along_rank` made these differences."""
    running_E = np.cumsum(delta_E, dtype=delta_E.dtype)
    counts = np.diff(offsets)
    firsts = offsets[:-1][counts > 0]
    before = np.zeros(len(firsts), delta_E.dtype)
    before[firsts > 0] = running_E[firsts[firsts > 0] - 1]
    return running_E - np.repeat(before, counts[counts > 0])


def byte_planes(values: NDArray, n_bytes: int) -> list[bytes]:
    """The lowest byte of each value, then the next, as n_bytes byte strings."""
    return [((values >> (8 * byte)) & 255).astype(np.uint8).tobytes() for byte in range(n_bytes)]


class PlaneReader:
    """Takes arrays off the front of a payload; asking for more than there is raises CorruptionError."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._position = 0

    def take(self, dtype: str, count: int) -> NDArray:
        """The next `count` numbers, a read-only view."""
        size = np.dtype(dtype).itemsize * count
        if self._position + size > len(self._payload):
            raise CorruptionError(f"blob's content ends at byte {len(self._payload)}, {self._position + size} expected")
        array = np.frombuffer(self._payload, dtype, count, self._position)
        self._position += size
        return array

    def take_planes(self, n_bytes: int, count: int, dtype: type) -> NDArray:
        """`count` numbers of n_bytes planes each, put together as `dtype`."""
        values = self.take("u1", count).astype(dtype)
        for byte in range(1, n_bytes):
            values |= self.take("u1", count).astype(dtype) << dtype(8 * byte)
        return values

    def take_rest(self) -> NDArray[np.uint8]:
        """All bytes that are left, a read-only view."""
        return self.take("u1", len(self._payload) - self._position)

    def finish(self) -> None:
        """Raises CorruptionError where something is left over."""
        if self._position != len(self._payload):
            raise CorruptionError(
                f"blob's content has {len(self._payload)} bytes, its rows take {self._position}; the rest is not ours"
            )
