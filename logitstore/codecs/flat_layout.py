"""Blob layout 1: ids and head codes as plain byte planes, which zstd alone compresses.

Nothing has to be fitted for it. Planes go rank by rank (all rows' first entries, then all second ones ...), ids by
bytes, codes as differences along the rank, which lets zstd see that neighbouring ranks have neighbouring values.

Letters: R rows, P present rows, E entries.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.blob import BlobHeader, check_header, pack_blob, unpack_blob
from logitstore.errors import CorruptionError
from logitstore.head_values import HeadFormat
from logitstore.planes import (
    PlaneReader,
    byte_planes,
    delta_along_rank,
    offsets_of,
    rank_major_order,
    undo_delta_along_rank,
)

CODEC_ID = 1


class StoredRows(NamedTuple):
    """What a layout stores and gives back: offsets [R+1], ids [E] int32, head codes [E], moment codes (odds, excess)
    [P] uint16, and scale and offset [R] float32 where the head format stores them."""

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    codes: NDArray[np.uint8] | NDArray[np.uint16]
    moment_codes: tuple[NDArray[np.uint16], NDArray[np.uint16]]
    scale: NDArray[np.float32] | None
    offset: NDArray[np.float32] | None


def encode_flat(header: BlobHeader, head_format: HeadFormat, rows: StoredRows) -> bytes:
    """The blob of these rows; header's counts of rows and entries are filled in here."""
    counts = np.diff(rows.offsets)
    present = counts > 0
    order = rank_major_order(counts)
    header = replace(header, n_present=int(present.sum()), n_entries=len(rows.ids))
    planes = [counts.astype("<u2").tobytes(), *(codes.astype("<u2").tobytes() for codes in rows.moment_codes)]
    if head_format.has_row_scale and rows.scale is not None and rows.offset is not None:
        planes += [numbers[present].astype("<f2").tobytes() for numbers in (rows.scale, rows.offset)]
    planes += byte_planes(rows.ids[order], id_bytes(header.vocab_size))
    planes += byte_planes(delta_along_rank(rows.codes, rows.offsets)[order], head_format.code_bytes)
    return pack_blob(header, planes)


def decode_flat(blob: bytes | memoryview, expected: BlobHeader, head_format: HeadFormat, *, k: int) -> StoredRows:
    """The rows of a blob. Raises FormatError, CorruptionError or SpecMismatchError."""
    n_id_bytes = id_bytes(expected.vocab_size)
    row_bytes = 2 + 4 + 4 + k * (n_id_bytes + head_format.code_bytes)
    header, payload = unpack_blob(blob, max_payload_bytes=expected.n_rows * row_bytes)
    check_header(header, expected)
    planes = PlaneReader(payload)
    counts = planes.take("<u2", header.n_rows).astype(np.int64)
    check_counts(counts, header, k)
    moment_codes = planes.take("<u2", header.n_present), planes.take("<u2", header.n_present)
    scale = offset = None
    if head_format.has_row_scale:
        scale, offset = (np.zeros(header.n_rows, np.float32) for _ in range(2))
        scale[counts > 0], offset[counts > 0] = (planes.take("<f2", header.n_present) for _ in range(2))
    order, offsets = rank_major_order(counts), offsets_of(counts)
    ids = np.empty(header.n_entries, np.int32)
    ids[order] = planes.take_planes(n_id_bytes, header.n_entries, np.int32)
    code_type = np.uint8 if head_format.code_bytes == 1 else np.uint16
    delta = np.empty(header.n_entries, code_type)
    delta[order] = planes.take_planes(head_format.code_bytes, header.n_entries, code_type)
    planes.finish()
    return StoredRows(offsets, ids, undo_delta_along_rank(delta, offsets), moment_codes, scale, offset)


def check_counts(counts: NDArray[np.int64], header: BlobHeader, k: int) -> None:
    """Raises CorruptionError where the rows' entries are not those that the header and the codec allow."""
    if counts.sum() != header.n_entries or np.count_nonzero(counts) != header.n_present:
        raise CorruptionError(f"row counts add up to {counts.sum()} entries, the header says {header.n_entries}")
    if counts.max(initial=0) > k:
        raise CorruptionError(f"a row has {counts.max()} entries, the codec keeps {k} at most")


def id_bytes(vocab_size: int) -> int:
    """Bytes that hold an id of the vocabulary."""
    return 1 if vocab_size <= 1 << 8 else 2 if vocab_size <= 1 << 16 else 3
