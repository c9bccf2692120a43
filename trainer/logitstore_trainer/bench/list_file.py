"""A Parquet file of nested lists, as people write them without a store: one row a sample, lists of lists of values.

It times its own writing and reading on one core, and reads everything back before it says how large it is.

Letters: R rows of one sample, W values a row.
"""

import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from logitstore.errors import CorruptionError

_SAMPLES_PER_ROW_GROUP = 128


class Totals(NamedTuple):
    """Sums over the measured samples. container_bytes: files as a user would keep them, the text's ids included.
    tail_s: seconds of the tail model, 0 where there is none. bytes_of: blob_bytes by what they are for, where known."""

    n_rows: int
    blob_bytes: int
    container_bytes: int
    encode_s: float
    decode_s: float
    tail_s: float = 0.0
    bytes_of: dict[str, float] = {}  # noqa: RUF012


class ListFile:
    """Columns of [R, W] arrays, one array a sample, next to the sample's input_ids."""

    def __init__(self, path: Path, compression: str) -> None:
        self._path, self._compression = path, compression
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[dict[str, NDArray[Any]]] = []
        self._crc32s: list[dict[str, int]] = []
        self._n_rows, self._encode_s = 0, 0.0
        # the first write of a process starts threads and loads code: not a part of anyone's speed
        pq.write_table(pa.table({"warm": _nested_lists(np.zeros(4, np.int32), [(2, 2)])}), pa.BufferOutputStream())

    def append(self, input_ids: NDArray[np.int32], columns: Mapping[str, NDArray[Any]]) -> None:
        """Adds one sample; every 128 samples are written as a row group."""
        self._pending.append({"input_ids": input_ids, **columns})
        self._n_rows += len(input_ids) - 1
        if len(self._pending) == _SAMPLES_PER_ROW_GROUP:
            self._write()

    def close(self) -> Totals:
        """The totals; blob bytes are those of the compressed list columns, decoding is file to flat arrays.

        Raises CorruptionError if a row group reads back otherwise than it was written, ValueError without samples.
        """
        self._write()
        if self._writer is None:
            raise ValueError(f"{self._path}: no samples were added")
        start_s = time.perf_counter()
        self._writer.close()
        self._encode_s += time.perf_counter() - start_s
        decode_s = 0.0
        with pq.ParquetFile(self._path) as file:
            for index, written in enumerate(self._crc32s):
                start_s = time.perf_counter()
                table = file.read_row_group(index, columns=list(written), use_threads=False)
                values = {name: _flat_values(table.column(name)) for name in written}
                decode_s += time.perf_counter() - start_s
                if {name: zlib.crc32(array.data) for name, array in values.items()} != written:
                    raise CorruptionError(f"{self._path}: row group {index} reads back other values than were written")
            blob_bytes = _list_column_bytes(file.metadata)
        return Totals(self._n_rows, blob_bytes, self._path.stat().st_size, self._encode_s, decode_s)

    def _write(self) -> None:
        if not self._pending:
            return
        names = [name for name in self._pending[0] if name != "input_ids"]
        start_s = time.perf_counter()
        columns = {"input_ids": pa.array([sample["input_ids"] for sample in self._pending])}
        flat = {name: np.concatenate([sample[name].reshape(-1) for sample in self._pending]) for name in names}
        for name in names:
            columns[name] = _nested_lists(flat[name], [sample[name].shape for sample in self._pending])
        table = pa.table(columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression=self._compression)
        self._writer.write_table(table)
        self._encode_s += time.perf_counter() - start_s
        self._crc32s.append({name: zlib.crc32(array.data) for name, array in flat.items()})
        self._pending = []


def _nested_lists(flat: NDArray[Any], shapes: list[tuple[int, ...]]) -> pa.ListArray:
    widths = np.concatenate([np.full(n_rows, width) for n_rows, width in shapes])
    row_offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)
    sample_offsets = np.concatenate([[0], np.cumsum([n_rows for n_rows, _ in shapes])]).astype(np.int32)
    rows = pa.ListArray.from_arrays(pa.array(row_offsets), pa.array(flat))
    return pa.ListArray.from_arrays(pa.array(sample_offsets), rows)


def _flat_values(column: pa.ChunkedArray) -> NDArray[Any]:
    return np.concatenate([chunk.flatten().flatten().to_numpy() for chunk in column.chunks])


def _list_column_bytes(metadata: pq.FileMetaData) -> int:
    """Compressed bytes of every column but input_ids."""
    total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        columns = (row_group.column(index) for index in range(row_group.num_columns))
        total += sum(c.total_compressed_size for c in columns if not c.path_in_schema.startswith("input_ids"))
    return total
