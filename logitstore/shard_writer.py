"""Writes one shard: a Parquet file in the direct layout, in which every value's place follows from an index.

REQUIRED columns, one uncompressed PLAIN page of version 1 a column chunk, page checksums, the blob column last. The
file is written under the name that the caller gives, read back and checked as a whole, and forced to the disk; the
caller renames it into place. Nothing of pyarrow's layout is assumed: the offsets in the index are read from the page
headers that it wrote.
"""

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptionError, FormatError
from logitstore.parquet_pages import Page, read_page
from logitstore.shard_index import KEY as INDEX_KEY
from logitstore.shard_index import ShardIndex, pack_index

if TYPE_CHECKING:
    import pyarrow.parquet

SPEC_KEY = "logitstore.spec"
GROUP_SAMPLES = 128
GROUP_BYTES = 16 << 20
COLUMNS = (
    "sample_id",
    "source_row",
    "n_tokens",
    "n_present",
    "blob_bytes",
    "blob_crc32",
    "tokens_crc32",
    "input_ids",
    "loss_mask",
    "blob",
)


class StoredSample(NamedTuple):
    """A sample as it is stored: input_ids int32 [L], loss_mask bool [L], the encoded blob and its present rows."""

    sample_id: int
    source_row: int
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    n_present: int
    blob: bytes

    @property
    def n_bytes(self) -> int:
        """Bytes that the sample takes in a row group, page headers apart."""
        return len(self.blob) + 5 * len(self.input_ids) + 40


def tokens_crc32(input_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> int:
    """CRC-32 of the ids as little-endian int32, followed by the mask as one byte a token."""
    return zlib.crc32(loss_mask.astype("u1").tobytes(), zlib.crc32(input_ids.astype("<i4").tobytes()))


def grouped(samples: Iterable[StoredSample]) -> Iterator[list[StoredSample]]:
    """Row groups of at most GROUP_SAMPLES samples and GROUP_BYTES bytes (one sample at least), in order."""
    group: list[StoredSample] = []
    size = 0
    for sample in samples:
        if group and (len(group) == GROUP_SAMPLES or size + sample.n_bytes > GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(sample)
        size += sample.n_bytes
    if group:
        yield group


def write_shard(
    path: Path, samples: Iterable[StoredSample], *, spec_json: bytes, shard: int, is_last: bool
) -> ShardIndex:
    """Writes the samples to a new file `path`, flushed to the disk; returns its index.

    Raises OSError where the file cannot be written; what is there of it then is incomplete and of no use.
    """
    import pyarrow.parquet

    with open(path, "xb") as file:
        writer = pyarrow.parquet.ParquetWriter(
            file,
            _schema(),
            compression="NONE",
            use_dictionary=False,
            write_statistics=["sample_id", "source_row", "n_tokens"],
            write_page_checksum=True,
            write_page_index=True,
            data_page_version="1.0",
            data_page_size=1 << 30,
        )
        try:
            index = _write_groups(writer, file, path, samples, spec_json, shard=shard, is_last=is_last)
            writer.close()
        except BaseException:
            writer.is_open = False  # else its __del__ writes a footer into the closed file, and prints that it cannot
            raise
        file.flush()
        os.fsync(file.fileno())
    return index


def _write_groups(
    writer: "pyarrow.parquet.ParquetWriter",
    file: IO[bytes],
    path: Path,
    samples: Iterable[StoredSample],
    spec_json: bytes,
    *,
    shard: int,
    is_last: bool,
) -> ShardIndex:
    """Writes row groups, and spec and index as the footer's key-values; returns the index."""
    group_rows: list[tuple[int, ...]] = []
    sample_rows: list[tuple[int, ...]] = []
    data_end = file.tell()
    for group in grouped(samples):
        start = data_end
        rows = [_index_row(sample) for sample in group]
        writer.write_table(_table(group, rows), row_group_size=GROUP_SAMPLES)
        file.flush()
        data_end = file.tell()
        group_rows.append((len(group), *_value_offsets(path, start, data_end, group)))
        sample_rows += rows
    index = ShardIndex(shard, is_last, data_end, *_columns(group_rows, 4), *_columns(sample_rows, 7))
    writer.add_key_value_metadata({SPEC_KEY: spec_json.decode(), INDEX_KEY: pack_index(index, spec_json)})
    return index


def sync_folder(folder: Path) -> None:
    """Forces a folder's entries, so renames in it, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _schema() -> "pyarrow.Schema":
    import pyarrow as pa

    types = {
        "sample_id": pa.int64(),
        "source_row": pa.int64(),
        "n_tokens": pa.uint32(),
        "n_present": pa.uint32(),
        "blob_bytes": pa.uint32(),
        "blob_crc32": pa.uint32(),
        "tokens_crc32": pa.uint32(),
        "input_ids": pa.list_(pa.field("element", pa.int32(), nullable=False)),
        "loss_mask": pa.list_(pa.field("element", pa.bool_(), nullable=False)),
        "blob": pa.binary(),
    }
    return pa.schema([pa.field(name, types[name], nullable=False) for name in COLUMNS])


def _index_row(sample: StoredSample) -> tuple[int, ...]:
    """The sample's fixed-width columns, in the order of COLUMNS."""
    return (
        sample.sample_id,
        sample.source_row,
        len(sample.input_ids),
        sample.n_present,
        len(sample.blob),
        zlib.crc32(sample.blob),
        tokens_crc32(sample.input_ids, sample.loss_mask),
    )


def _columns(rows: list[tuple[int, ...]], width: int) -> list[NDArray[np.int64]]:
    return list(np.array(rows, np.int64).reshape(len(rows), width).T)


def _table(group: list[StoredSample], rows: list[tuple[int, ...]]) -> "pyarrow.Table":
    import pyarrow as pa

    schema = _schema()
    ends = np.cumsum([0, *(len(sample.input_ids) for sample in group)]).astype(np.int32)
    arrays = [
        pa.array(column, schema.field(name).type)
        for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=False)
    ]
    for name in ("input_ids", "loss_mask"):
        values = np.concatenate([getattr(sample, name) for sample in group])
        arrays.append(pa.ListArray.from_arrays(ends, pa.array(values), type=schema.field(name).type))
    arrays.append(pa.array([sample.blob for sample in group], pa.binary()))
    return pa.table(arrays, schema=schema)


def _value_offsets(path: Path, start: int, end: int, group: list[StoredSample]) -> tuple[int, int, int]:
    """File offsets of the first value of the group's blob, input_ids and loss_mask pages, from the page headers."""
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    pages = pages_of_group(data, start)
    n_tokens = sum(len(sample.input_ids) for sample in group)
    blob_bytes = sum(4 + len(sample.blob) for sample in group)
    ids, mask, blob = pages[COLUMNS.index("input_ids") :]
    if blob.end != end or (ids.n_values, mask.n_values, blob.n_values) != (n_tokens, n_tokens, len(group)):
        raise FormatError(
            f"{path}: this pyarrow lays out row groups in a way that logitstore does not read back; use another version"
        )
    return blob.end - blob_bytes, ids.end - 4 * n_tokens, mask.end - (n_tokens + 7) // 8


def pages_of_group(data: bytes | memoryview, file_offset: int) -> list[Page]:
    """The one page of each of COLUMNS in a row group's bytes, which start at `file_offset` of the file.

    Raises FormatError or CorruptionError where there is another number of pages, or other bytes among them.
    """
    pages: list[Page] = []
    position = 0
    while position < len(data) and len(pages) <= len(COLUMNS):
        page = read_page(data, file_offset=file_offset, position=position)
        pages.append(page)
        position = page.end - file_offset
    if len(pages) != len(COLUMNS) or position != len(data):
        raise CorruptionError(
            f"row group at byte {file_offset} has {len(pages)} pages up to byte {file_offset + position}, "
            f"expected {len(COLUMNS)} up to byte {file_offset + len(data)}"
        )
    return pages
