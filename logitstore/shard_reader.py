"""Reads one shard by file offset: a blob is one pread, its token ids a second, and nothing is used unchecked.

Opening reads the footer and the index in it, whose checksums are the first thing that is tested; pyarrow is never
called. File descriptors are opened on first use in each process, so a reader may be forked, pickled and shared by
threads (pread has no file position to race for).
"""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from logitstore.errors import CorruptionError, FormatError
from logitstore.parquet_pages import MAGIC, MAX_FOOTER_BYTES, footer_key_values, page_crc32_holds
from logitstore.shard_index import KEY as INDEX_KEY
from logitstore.shard_index import ShardIndex, unpack_index
from logitstore.shard_writer import COLUMNS, SPEC_KEY, StoredSample, pages_of_group, tokens_crc32


class ShardReader:
    """One shard file, its index checked. Raises FileNotFoundError, FormatError or CorruptionError on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptors: dict[int, int] = {}
        try:
            self.spec_json, self.index = self._read_footer()
            self._locate_samples()
        except (FormatError, CorruptionError) as error:
            self.close()
            raise type(error)(f"{path}: {error}") from None

    def __len__(self) -> int:
        return self.index.n_samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def read(self, i: int) -> StoredSample:
        """Sample i of the shard, its checksums tested. Raises CorruptionError naming file, sample and what differs."""
        index = self.index
        n_tokens = int(index.n_tokens[i])
        framed = self._pread(int(self._blob_start[i]) - 4, 4 + int(index.blob_bytes[i]))
        blob = framed[4:]
        first_bit = int(self._mask_bit[i])
        ids_bytes = self._pread(int(self._ids_start[i]), 4 * n_tokens)
        mask_start = int(self._mask_start[i])
        mask_bytes = self._pread(mask_start + first_bit // 8, (first_bit % 8 + n_tokens + 7) // 8)
        bits = np.unpackbits(np.frombuffer(mask_bytes, np.uint8), bitorder="little")
        loss_mask = bits[first_bit % 8 : first_bit % 8 + n_tokens].astype(bool)
        input_ids = np.frombuffer(ids_bytes, "<i4").astype(np.int32)
        if len(framed) != 4 + int(index.blob_bytes[i]) or len(input_ids) != n_tokens or len(loss_mask) != n_tokens:
            raise CorruptionError(f"{self._where(i)} lies beyond the end of the file; the file was cut, copy it again")
        if struct.unpack("<I", framed[:4])[0] != index.blob_bytes[i] or zlib.crc32(blob) != index.blob_crc32[i]:
            raise CorruptionError(f"{self._where(i)}: blob does not have its checksum; copy or collect the shard again")
        if tokens_crc32(input_ids, loss_mask) != index.tokens_crc32[i]:
            raise CorruptionError(
                f"{self._where(i)}: input_ids or loss_mask do not have their checksum; copy or collect the shard again"
            )
        sample_id, source_row = int(index.sample_id[i]), int(index.source_row[i])
        return StoredSample(sample_id, source_row, input_ids, loss_mask, int(index.n_present[i]), blob)

    def page_faults(self) -> list[str]:
        """One line for each page without its checksum and each column that the index contradicts; empty: none."""
        faults: list[str] = []
        first = 0
        start = len(MAGIC)
        ends = self._group_ends()
        for group, end in enumerate(ends):
            count = int(self.index.group_samples[group])
            faults += self._faults_of_group(group, start, end, slice(first, first + count))
            first, start = first + count, end
        if start != self.index.data_end:
            faults.append(f"{self.path}: row groups end at byte {start}, the index says {self.index.data_end}")
        return faults

    def close(self) -> None:
        """Closes this process's file descriptor; reading opens it again."""
        descriptor = self._descriptors.pop(os.getpid(), None)
        if descriptor is not None:
            os.close(descriptor)

    def _faults_of_group(self, group: int, start: int, end: int, samples: slice) -> list[str]:
        where = f"{self.path}, row group {group}"
        data = self._pread(start, end - start)
        try:
            pages = pages_of_group(data, start)
        except (FormatError, CorruptionError) as error:
            return [f"{where}: {error}"]
        faults = []
        for name, page in zip(COLUMNS, pages, strict=True):
            content = data[page.content_offset - start : page.end - start]
            if not page_crc32_holds(page, content):
                faults.append(f"{where}: the page of column {name} does not have its checksum")
            elif name in ("input_ids", "loss_mask", "blob"):
                continue
            else:
                expected = getattr(self.index, name)[samples]
                if content != expected.tobytes():
                    faults.append(f"{where}: column {name} differs from the index")
        return faults

    def _group_ends(self) -> list[int]:
        index = self.index
        blob_bytes = np.concatenate([[0], np.cumsum(4 + index.blob_bytes.astype(np.int64))])
        last = np.cumsum(index.group_samples.astype(np.int64))
        sizes = blob_bytes[last] - blob_bytes[last - index.group_samples]
        return [int(end) for end in index.blob_offset.astype(np.int64) + sizes]

    def _read_footer(self) -> tuple[bytes, ShardIndex]:
        size = os.fstat(self._descriptor()).st_size
        if size < 12 or self._pread(0, 4) != MAGIC:
            raise FormatError("not a Parquet file (it does not start with PAR1)")
        footer_bytes, end_magic = struct.unpack("<I4s", self._pread(size - 8, 8))
        if end_magic != MAGIC:
            raise CorruptionError(f"the file of {size:,} bytes does not end with PAR1; it was cut, copy it again")
        if footer_bytes > min(size - 12, MAX_FOOTER_BYTES):
            raise CorruptionError(f"the footer claims {footer_bytes:,} bytes in a file of {size:,}")
        key_values = footer_key_values(self._pread(size - 8 - footer_bytes, footer_bytes))
        for key in (SPEC_KEY, INDEX_KEY):
            if key not in key_values:
                raise FormatError(
                    f"a Parquet file without {key!r}: not written by logitstore, or written anew by another tool"
                )
        index = unpack_index(key_values[INDEX_KEY], key_values[SPEC_KEY])
        if not len(MAGIC) <= index.data_end <= size - 8 - footer_bytes:
            raise CorruptionError(f"data ends at byte {index.data_end} by the index, in a file of {size:,}")
        return key_values[SPEC_KEY], index

    def _locate_samples(self) -> None:
        """File offsets of each sample's blob and ids, and bit offset of its mask within its page."""
        index = self.index
        group = np.repeat(np.arange(len(index.group_samples)), index.group_samples)
        first = (np.cumsum(index.group_samples, dtype=np.int64) - index.group_samples)[group]
        blob_ends = np.concatenate([[0], np.cumsum(4 + index.blob_bytes.astype(np.int64))])
        token_ends = np.concatenate([[0], np.cumsum(index.n_tokens.astype(np.int64))])
        blobs_before = blob_ends[:-1] - blob_ends[first]
        tokens_before = token_ends[:-1] - token_ends[first]
        self._blob_start = index.blob_offset.astype(np.int64)[group] + blobs_before + 4
        self._ids_start = index.ids_offset.astype(np.int64)[group] + 4 * tokens_before
        self._mask_start = index.mask_offset.astype(np.int64)[group]
        self._mask_bit = tokens_before
        beyond = (self._blob_start + index.blob_bytes > index.data_end) | (
            self._ids_start + 4 * index.n_tokens.astype(np.int64) > index.data_end
        )
        if beyond.any():
            raise CorruptionError(f"sample {np.flatnonzero(beyond)[0]} lies beyond the data by the index")

    def _where(self, i: int) -> str:
        return f"{self.path}, sample {i} of {len(self)} (sample_id {self.index.sample_id[i]})"

    def _pread(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor(), size, offset)

    def _descriptor(self) -> int:
        pid = os.getpid()
        if pid not in self._descriptors:
            self._descriptors[pid] = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._descriptors[pid]
