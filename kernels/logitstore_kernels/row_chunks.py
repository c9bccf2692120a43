"""How the rows of [N, V] logits are split into chunks that one working buffer holds."""

from typing import NamedTuple

import torch
from torch import Tensor

# On a CPU a chunk should stay in cache through ten passes, and yet be big enough that starting the threads of each pass
# doesn't count: of 1 to 32 MiB, 2 to 8 are best at V = 49,152, the larger ones on a busy machine. An accelerator wants
# few launches.
_CPU_BYTES = 8 << 20
_ACCELERATOR_BYTES = 32 << 20


class RowChunk(NamedTuple):
    """rows: index of the chunk's rows in [N, ...] tensors.  runs: the same rows as pairs of slices (of chunk, of N).

    A run is of consecutive rows: on a CPU, copying wide rows by index takes six times as long as by slice.
    """

    rows: slice | Tensor
    runs: list[tuple[slice, slice]]


def rows_per_chunk(row_bytes: int, device: torch.device) -> int:
    """The rows of row_bytes each that one working buffer should hold on this device; at least 1."""
    return max(1, (_CPU_BYTES if device.type == "cpu" else _ACCELERATOR_BYTES) // row_bytes)


def row_chunks(counted_N: Tensor, chunk_rows: int, *, skip_uncounted: bool) -> list[RowChunk]:
    """The rows in order, chunk_rows at a time; skip_uncounted (it reads counted_N) leaves out rows that are False."""
    if skip_uncounted and not counted_N.all():
        chunks = counted_N.nonzero()[:, 0].split(chunk_rows)
        return [RowChunk(rows, _runs(rows)) for rows in chunks if len(rows)]
    n_rows = len(counted_N)
    chunks = [slice(start, min(start + chunk_rows, n_rows)) for start in range(0, n_rows, chunk_rows)]
    return [RowChunk(rows, [(slice(0, rows.stop - rows.start), rows)]) for rows in chunks]


def zero_rows(x_NV: Tensor, zero_N: Tensor) -> None:
    """Mutates x_NV to 0 in the rows where zero_N, which it reads, is True; the other rows are not touched."""
    rows = zero_N.nonzero()[:, 0]
    if len(rows):
        for _, run in _runs(rows):
            x_NV[run] = 0


def _runs(rows: Tensor) -> list[tuple[slice, slice]]:
    """Ascending row numbers as runs: [3, 4, 7] -> [(0:2, 3:5), (2:3, 7:8)]."""
    starts = [0, *((rows.diff() > 1).nonzero()[:, 0] + 1).tolist()]
    stops = [*starts[1:], len(rows)]
    firsts = rows[starts].tolist()
    return [
        (slice(start, stop), slice(first, first + stop - start))
        for start, stop, first in zip(starts, stops, firsts, strict=True)
    ]
