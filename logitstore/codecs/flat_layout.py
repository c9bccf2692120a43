"""Blob layout 1: ids and head codes as plain byte planes, which zstd alone compresses.

Nothing has to be fitted for it. Planes go rank by rank (all rows' first entries, then all second ones ...), ids by
bytes, codes as differences along the rank, which lets zstd see that neighbouring ranks have neighbouring values.

Letters: R rows, P present rows, E entries.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.blob import BlobHeader, pack_blob
from logitstore.codecs.checks import taken_counts
from logitstore.head_values import HeadFormat
from logitstore.id_planes import decode_ids, encode_ids, id_bytes
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
    [P] uint16, scale and offset [R] float32 where the head format stores them, and the steps of corrections
    [P, width] int32 where the codec has such."""

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    codes: NDArray[np.uint8] | NDArray[np.uint16]
    moment_codes: tuple[NDArray[np.uint16], NDArray[np.uint16]]
    scale: NDArray[np.float32] | None
    offset: NDArray[np.float32] | None
    correction_steps: NDArray[np.int32] | None = None


def encode_flat(header: BlobHeader, head_format: HeadFormat, rows: StoredRows) -> bytes:
    """The blob of these rows; header's counts of rows and entries are filled in here."""
    n_present = int(np.count_nonzero(np.diff(rows.offsets)))
    header = replace(header, n_present=n_present, n_entries=len(rows.ids))
    return pack_blob(header, [plane for _, plane in flat_planes(head_format, rows, header.vocab_size)])


def flat_planes(head_format: HeadFormat, rows: StoredRows, vocab_size: int) -> list[tuple[str, bytes]]:
    """The planes in the order of the blob, each with what it is for: "ids", "values", "tail" or "side"."""
    counts = np.diff(rows.offsets)
    present = counts > 0
    order = rank_major_order(counts)
    planes = [("side", counts.astype("<u2").tobytes())]
    planes += [("tail", codes.astype("<u2").tobytes()) for codes in rows.moment_codes]
    if head_format.has_row_scale and rows.scale is not None and rows.offset is not None:
        planes += [("values", numbers[present].astype("<f2").tobytes()) for numbers in (rows.scale, rows.offset)]
    planes += [("ids", plane) for plane in encode_ids(rows.ids, order, vocab_size)]
    delta = delta_along_rank(rows.codes, rows.offsets)[order]
    return planes + [("values", plane) for plane in byte_planes(delta, head_format.code_bytes)]


def decode_flat(header: BlobHeader, planes: PlaneReader, head_format: HeadFormat, *, k: int) -> StoredRows:
    """The rows of a blob that checks.opened_blob has opened. Raises CorruptionError."""
    counts = taken_counts(planes, header, "<u2", max_entries=k)
    moment_codes = planes.take("<u2", header.n_present), planes.take("<u2", header.n_present)
    scale = offset = None
    if head_format.has_row_scale:
        scale, offset = (np.zeros(header.n_rows, np.float32) for _ in range(2))
        scale[counts > 0], offset[counts > 0] = (planes.take("<f2", header.n_present) for _ in range(2))
    order, offsets = rank_major_order(counts), offsets_of(counts)
    ids = decode_ids(planes, order, header.vocab_size)
    delta = np.empty(header.n_entries, head_format.code_type)
    delta[order] = planes.take_planes(head_format.code_bytes, header.n_entries, head_format.code_type)
    planes.finish()
    return StoredRows(offsets, ids, undo_delta_along_rank(delta, offsets), moment_codes, scale, offset)


def max_row_bytes(vocab_size: int, k: int, head_format: HeadFormat) -> int:
    """Bytes of a full row: its count, two moments, scale and offset, and k entries."""
    return 2 + 4 + 4 + min(k, vocab_size) * (id_bytes(vocab_size) + head_format.code_bytes)
