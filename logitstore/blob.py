"""A blob: the bytes of one sequence's rows, as a 32-byte header and byte planes inside one checksummed zstd frame.

FORMAT.md is normative for the layout. The frame's own checksum (xxh64, 4 bytes) catches damaged bytes, the CRC of
the token ids in the header catches a blob that sits beside another text, the CRC of the codec's configuration one
that is read with another codec. Sizes are checked before anything is allocated from them.
"""

import struct
import threading
import zlib
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from logitstore.errors import CorruptionError, FormatError, SpecMismatchError

MAGIC = b"LGTS"
BLOB_VERSION = 1
_HEADER = struct.Struct("<4sHHIIIIII")
HEADER_BYTES = _HEADER.size
ZSTD_LEVEL = 3


class _Zstd(threading.local):
    """One compressor and one decompressor a thread: making them takes longer than a blob takes them."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_ZSTD = _Zstd()


@dataclass(frozen=True)
class BlobHeader:
    """The header's fields; FORMAT.md says what each byte is."""

    codec_id: int
    n_rows: int
    n_present: int
    n_entries: int
    vocab_size: int
    input_ids_crc32: int
    config_crc32: int

    def pack(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            BLOB_VERSION,
            self.codec_id,
            self.n_rows,
            self.n_present,
            self.n_entries,
            self.vocab_size,
            self.input_ids_crc32,
            self.config_crc32,
        )


def input_ids_crc32(input_ids: NDArray[np.int32]) -> int:
    """CRC-32 (zlib's) of the token ids as little-endian int32."""
    return zlib.crc32(np.ascontiguousarray(input_ids, dtype="<i4").data)


def pack_blob(header: BlobHeader, planes: list[bytes]) -> bytes:
    """One zstd frame, content size and checksum written, of the header followed by the planes."""
    return _ZSTD.compressor.compress(b"".join([header.pack(), *planes]))


def unpack_blob(blob: bytes | memoryview, *, max_payload_bytes: int) -> tuple[BlobHeader, memoryview]:
    """(header, bytes of the planes) of a blob whose payload may not exceed `max_payload_bytes`.

    Raises FormatError for what is no blob of ours or of a newer version, CorruptionError for damage.
    """
    try:
        frame = zstandard.get_frame_parameters(blob)
    except zstandard.ZstdError as error:
        raise CorruptionError(f"blob of {len(blob)} bytes does not start with a zstd frame: {error}") from None
    if not frame.has_checksum or frame.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        raise FormatError("blob's zstd frame has no checksum or no content size; logitstore always writes both")
    size_limit = HEADER_BYTES + max_payload_bytes
    if not HEADER_BYTES <= frame.content_size <= size_limit:
        raise CorruptionError(
            f"blob claims {frame.content_size:,} bytes of content, expected {HEADER_BYTES} to {size_limit:,}"
        )
    try:
        payload = _ZSTD.decompressor.decompress(blob, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptionError(f"blob of {len(blob)} bytes is damaged: {error}") from None
    magic, version, *fields = _HEADER.unpack_from(payload)
    if magic != MAGIC:
        raise FormatError(f"blob starts with {magic!r}, expected {MAGIC!r}")
    if version != BLOB_VERSION:
        raise FormatError(f"blob has format version {version}, this logitstore reads {BLOB_VERSION}; update logitstore")
    return BlobHeader(*fields), memoryview(payload)[HEADER_BYTES:]


def check_header(header: BlobHeader, expected: BlobHeader) -> None:
    """Raises where a header is not that of this codec, vocabulary and text (counts of rows and entries apart)."""
    if header.codec_id != expected.codec_id or header.config_crc32 != expected.config_crc32:
        raise SpecMismatchError(
            f"blob was written by codec {header.codec_id} with configuration {header.config_crc32:#010x}, "
            f"this codec is {expected.codec_id} with {expected.config_crc32:#010x}; read it with the codec in its store"
        )
    if header.vocab_size != expected.vocab_size:
        raise SpecMismatchError(f"blob has a vocabulary of {header.vocab_size}, the codec {expected.vocab_size}")
    if header.input_ids_crc32 != expected.input_ids_crc32 or header.n_rows != expected.n_rows:
        raise CorruptionError(
            f"blob belongs to another text: {header.n_rows} rows, token CRC {header.input_ids_crc32:#010x}; "
            f"the text has {expected.n_rows} rows, CRC {expected.input_ids_crc32:#010x}"
        )
    if header.n_present > header.n_rows or header.n_entries < header.n_present:
        raise CorruptionError(
            f"blob claims {header.n_present} present of {header.n_rows} rows and {header.n_entries} entries"
        )
