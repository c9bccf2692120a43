"""The index of a shard: where each sample lies in the file, and the checksums of what lies there.

It is written into the Parquet footer's key-value metadata under KEY, as base64 of one checksummed zstd frame. It is
all that a reader needs; the Parquet metadata proper is for other tools. About 20 bytes a sample.

Letters: G row groups, S samples of the shard.
"""

import base64
import binascii
import struct
import zlib
from dataclasses import dataclass, fields

import numpy as np
import zstandard
from numpy.typing import NDArray

from logitstore.errors import CorruptionError, FormatError

KEY = "logitstore.index"
MAGIC = b"LGIX"
INDEX_VERSION = 1
MAX_SAMPLES = 1 << 26
_HEADER = struct.Struct("<4sHHIIQI")
_IS_LAST = 1

_GROUP_TYPES = {"group_samples": "<u4", "blob_offset": "<u8", "ids_offset": "<u8", "mask_offset": "<u8"}
_SAMPLE_TYPES = {
    "sample_id": "<i8",
    "source_row": "<i8",
    "n_tokens": "<u4",
    "n_present": "<u4",
    "blob_bytes": "<u4",
    "blob_crc32": "<u4",
    "tokens_crc32": "<u4",
}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Row groups [G]: group_samples, and the file offsets of the first value of the blob, input_ids and loss_mask
    pages. Samples [S]: the columns of the same names. `shard` is this file's place in its store, `is_last` says that
    no shard follows, `data_end` is the offset where the last row group ends."""

    shard: int
    is_last: bool
    data_end: int
    group_samples: NDArray[np.uint32]
    blob_offset: NDArray[np.uint64]
    ids_offset: NDArray[np.uint64]
    mask_offset: NDArray[np.uint64]
    sample_id: NDArray[np.int64]
    source_row: NDArray[np.int64]
    n_tokens: NDArray[np.uint32]
    n_present: NDArray[np.uint32]
    blob_bytes: NDArray[np.uint32]
    blob_crc32: NDArray[np.uint32]
    tokens_crc32: NDArray[np.uint32]

    @property
    def n_samples(self) -> int:
        """S."""
        return len(self.sample_id)


def pack_index(index: ShardIndex, spec_json: bytes) -> str:
    """The index as text for the footer; it carries the CRC of the store's spec, which lies beside it."""
    header = _HEADER.pack(
        MAGIC,
        INDEX_VERSION,
        _IS_LAST if index.is_last else 0,
        index.shard,
        len(index.group_samples),
        index.data_end,
        zlib.crc32(spec_json),
    )
    arrays = [getattr(index, name).astype(kind).tobytes() for name, kind in {**_GROUP_TYPES, **_SAMPLE_TYPES}.items()]
    compressor = zstandard.ZstdCompressor(level=9, write_checksum=True, write_content_size=True)
    return base64.b64encode(compressor.compress(b"".join([header, *arrays]))).decode()


def unpack_index(text: bytes, spec_json: bytes) -> ShardIndex:
    """The index that `pack_index` wrote. Raises FormatError for a newer version, CorruptionError for damage."""
    payload = _payload(text)
    magic, version, flags, shard, n_groups, data_end, spec_crc32 = _HEADER.unpack_from(payload)
    if magic != MAGIC:
        raise CorruptionError(f"shard index starts with {magic!r}, expected {MAGIC!r}")
    if version != INDEX_VERSION:
        raise FormatError(f"shard index has version {version}, logitstore reads {INDEX_VERSION}; update logitstore")
    if zlib.crc32(spec_json) != spec_crc32:
        raise CorruptionError("the store's spec in the footer does not have the checksum that the index states")
    group_bytes = sum(np.dtype(kind).itemsize for kind in _GROUP_TYPES.values())
    sample_bytes = sum(np.dtype(kind).itemsize for kind in _SAMPLE_TYPES.values())
    n_samples, left_over = divmod(len(payload) - _HEADER.size - n_groups * group_bytes, sample_bytes)
    if n_samples < 0 or left_over:
        raise CorruptionError(f"shard index of {len(payload)} bytes does not hold {n_groups} row groups")
    arrays, position = {}, _HEADER.size
    for types, count in ((_GROUP_TYPES, n_groups), (_SAMPLE_TYPES, n_samples)):
        for name, kind in types.items():
            arrays[name] = np.frombuffer(payload, kind, count, position)
            position += arrays[name].nbytes
    if int(arrays["group_samples"].sum()) != n_samples:
        raise CorruptionError(f"shard index has {n_samples} samples, its row groups {arrays['group_samples'].sum()}")
    return ShardIndex(shard, bool(flags & _IS_LAST), data_end, **arrays)


def same_index(a: ShardIndex, b: ShardIndex) -> bool:
    """True where all fields are equal."""
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(ShardIndex))


def _payload(text: bytes) -> bytes:
    try:
        frame = base64.b64decode(text, validate=True)
        parameters = zstandard.get_frame_parameters(frame)
        limit = _HEADER.size + MAX_SAMPLES * 64
        if not parameters.has_checksum or not _HEADER.size <= parameters.content_size <= limit:
            raise CorruptionError(f"shard index claims {parameters.content_size} bytes, or carries no checksum")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except (binascii.Error, zstandard.ZstdError) as error:
        raise CorruptionError(f"shard index is damaged: {error}") from None
