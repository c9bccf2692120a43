"""Page headers and footers of Parquet files, read in pure Python.

pyarrow is not asked, because a damaged footer can abort the whole process inside it. What is parsed here is Thrift's
compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md) as far as Parquet
uses it (https://github.com/apache/parquet-format); whatever does not fit raises CorruptionError.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from logitstore.errors import CorruptionError, FormatError

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 1 << 28
_MAX_DEPTH = 16
_BOOL_TRUE, _BOOL_FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


@dataclass(frozen=True)
class Page:
    """One data page: where its content lies in the file, and what its header says of it."""

    content_offset: int
    content_bytes: int
    n_values: int
    crc32: int | None

    @property
    def end(self) -> int:
        """Offset of the first byte after the page."""
        return self.content_offset + self.content_bytes


class _Compact:
    """A cursor over compact-protocol bytes; structs come back as {field id: value}."""

    def __init__(self, data: bytes | memoryview, position: int = 0) -> None:
        self.data, self.position = data, position

    def byte(self) -> int:
        if self.position >= len(self.data):
            raise CorruptionError(f"Parquet metadata ends in the middle of a field, at byte {self.position}")
        self.position += 1
        return self.data[self.position - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise CorruptionError(f"Parquet metadata has an overlong number at byte {self.position}")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def binary(self) -> bytes:
        size = self.varint()
        if size > len(self.data) - self.position:
            raise CorruptionError(f"Parquet metadata claims a string of {size} bytes at byte {self.position}")
        self.position += size
        return bytes(self.data[self.position - size : self.position])

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise CorruptionError("Parquet metadata is nested too deep")
        fields: dict[int, Any] = {}
        field_id = 0
        while (head := self.byte()) != 0:
            delta, kind = head >> 4, head & 15
            field_id = field_id + delta if delta else self.zigzag()
            fields[field_id] = kind == _BOOL_TRUE if kind in (_BOOL_TRUE, _BOOL_FALSE) else self.value(kind, depth)
        return fields

    def sequence(self, depth: int) -> list[Any]:
        head = self.byte()
        size, kind = head >> 4, head & 15
        if size == 15:
            size = self.varint()
        if size > len(self.data) - self.position:
            raise CorruptionError(f"Parquet metadata claims a list of {size} items at byte {self.position}")
        if kind in (_BOOL_TRUE, _BOOL_FALSE):
            return [self.byte() == _BOOL_TRUE for _ in range(size)]
        return [self.value(kind, depth) for _ in range(size)]

    def value(self, kind: int, depth: int) -> Any:
        readers: dict[int, Callable[[], Any]] = {
            _BYTE: self.byte,
            _I16: self.zigzag,
            _I32: self.zigzag,
            _I64: self.zigzag,
            _DOUBLE: lambda: [self.byte() for _ in range(8)],
            _BINARY: self.binary,
            _LIST: lambda: self.sequence(depth + 1),
            _SET: lambda: self.sequence(depth + 1),
            _STRUCT: lambda: self.struct(depth + 1),
        }
        if kind not in readers:
            raise CorruptionError(f"Parquet metadata has a field of unknown type {kind} at byte {self.position}")
        return readers[kind]()


def read_page(data: bytes | memoryview, *, file_offset: int, position: int) -> Page:
    """The page whose header starts at data[position]; data[0] lies at `file_offset` of the file.

    Raises FormatError for a page that is not one uncompressed PLAIN data page of version 1.
    """
    cursor = _Compact(data, position)
    fields = cursor.struct()
    data_header = fields.get(5)
    if fields.get(1) != 0 or not isinstance(data_header, dict):
        raise FormatError(f"page at byte {file_offset + position} is not a data page of version 1")
    if fields.get(2) != fields.get(3) or data_header.get(2) != 0:
        raise FormatError(f"page at byte {file_offset + position} is compressed or not PLAIN")
    size, n_values = fields.get(3), data_header.get(1)
    if not isinstance(size, int) or size < 0 or not isinstance(n_values, int) or n_values < 0:
        raise CorruptionError(f"page at byte {file_offset + position} has no size")
    crc = fields.get(4)
    return Page(file_offset + cursor.position, size, n_values, None if crc is None else crc & 0xFFFFFFFF)


def page_crc32_holds(page: Page, content: bytes | memoryview) -> bool:
    """True where the page's content has the CRC-32 that its header states."""
    return page.crc32 is not None and zlib.crc32(content) == page.crc32


def footer_key_values(footer: bytes) -> dict[str, bytes]:
    """The key-value metadata of a Parquet footer. Raises CorruptionError for what is no footer."""
    pairs = _Compact(footer).struct().get(5, [])
    if not isinstance(pairs, list) or not all(isinstance(p, dict) and isinstance(p.get(1), bytes) for p in pairs):
        raise CorruptionError("Parquet footer has no key-value metadata")
    return {pair[1].decode("utf-8", "replace"): pair.get(2, b"") for pair in pairs}
