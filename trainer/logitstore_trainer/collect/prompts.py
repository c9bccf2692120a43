"""The rows of a dataset file, checked from the first to the last before anything slow begins.

A JSONL (.jsonl, .ndjson, .json), Parquet (.parquet) or text (.txt, one document a line) file is read twice.
The first pass checks every row, so that a bad line at the end of the file fails in the first minute and not
after a night of teacher time, and notes where each row begins (16 bytes a row). The second pass yields the
rows, from any row on; the dataset itself is never held in memory.

All rows of a file have one shape, that of its first row: mixed shapes are more often a slip than a wish.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitstore_trainer.collect.rows import EXPECTED, SHAPES, Row, checked_row, shape_of
from logitstore_trainer.progress import Progress

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_JSON_SUFFIXES, ".parquet", ".txt")
_READ_BYTES = 1 << 20
_PARQUET_BATCH_ROWS = 256


@dataclass(frozen=True)
class Dataset:
    """A checked dataset file: `rows()` reads it again.

    `shape` is a key of SHAPES, `sha256` that of the file's bytes. `offsets` [n_rows] int64 is the byte at
    which each row's line begins, `lines` [n_rows] int64 its line number from 1 (both empty for Parquet).
    """

    path: Path
    shape: str
    n_rows: int
    sha256: str
    offsets: np.ndarray = field(repr=False)
    lines: np.ndarray = field(repr=False)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yields the rows from row `start` on, checked again. Raises as read_dataset does."""
        if start >= self.n_rows:
            return
        if self.path.suffix.lower() == ".parquet":
            records = _parquet_records(self.path, start)
        else:
            records = _line_records(self.path, int(self.offsets[start]), int(self.lines[start]))
        for i, record in enumerate(records, start=start):
            yield checked_row(i, record.where, record.value, self.shape)


def read_dataset(path: str | Path) -> Dataset:
    """Returns the dataset at `path` with every row checked.

    Raises OSError (missing, a directory, unreadable) or ValueError (anything else that is wrong with the file,
    its first bad row named as path:line).
    """
    path = Path(path)
    _require_readable_file(path)
    digest = hashlib.sha256()
    offsets, lines = array("q"), array("q")
    shape, first_where, n_rows = "", "", 0
    is_parquet = path.suffix.lower() == ".parquet"
    with Progress(total=path.stat().st_size, desc=f"checking {path.name}", unit="bytes") as shown:

        def seen(block: bytes) -> None:
            digest.update(block)
            shown.update(len(block))

        if is_parquet:
            _read_through(path, seen)
        for record in _parquet_records(path, 0) if is_parquet else _line_records(path, 0, 1, seen):
            if n_rows == 0:
                shape, first_where = shape_of(record.value, record.where), record.where
            elif (row_shape := shape_of(record.value, record.where)) != shape:
                raise ValueError(
                    f"{record.where}: this row is `{row_shape}`, but {first_where} is `{shape}`; "
                    f"put rows of different shapes into different files"
                )
            checked_row(n_rows, record.where, record.value, shape)
            n_rows += 1
            if not is_parquet:
                offsets.append(record.offset)
                lines.append(record.line)
    if n_rows == 0:
        raise ValueError(f"{path}: the dataset is empty; expected at least one row with {EXPECTED}")
    return Dataset(path, shape, n_rows, digest.hexdigest(), np.array(offsets), np.array(lines))


def _require_readable_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: the dataset is a directory; name one file ({', '.join(_SUFFIXES)})")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such dataset file; check --dataset")
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path}: unknown file type {path.suffix!r}; expected one of {', '.join(_SUFFIXES)}")
    try:
        path.open("rb").close()
    except PermissionError as error:
        raise PermissionError(f"{path}: not readable ({error.strerror}); check its permissions") from None


def _read_through(path: Path, seen: Callable[[bytes], None]) -> None:
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            seen(block)


class _Record(NamedTuple):
    where: str
    value: Any
    offset: int
    line: int


def _line_records(
    path: Path, offset: int, line: int, seen: Callable[[bytes], None] = lambda block: None
) -> Iterator[_Record]:
    """Yields each line that is not blank, parsed, from the byte and line number given on."""
    is_json = path.suffix.lower() in _JSON_SUFFIXES
    with path.open("rb") as file:
        file.seek(offset)
        for number, raw in enumerate(file, start=line):
            seen(raw)
            start, offset = offset, offset + len(raw)
            if start == 0:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            where = f"{path}:{number}"
            text = _decoded(raw, where).rstrip("\r\n")
            if text.strip():
                yield _Record(where, _parsed_json(text, where) if is_json else {"text": text}, start, number)


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start} of the line); "
            f"convert the file to UTF-8"
        ) from None


def _parsed_json(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        hint = "expected one JSON object per line"
        if line.lstrip().startswith("["):
            hint += "; the file looks like one JSON array: write its elements one per line (jq -c '.[]')"
        elif line.strip() in ("{", "}"):
            hint += "; the file looks like indented JSON: write each object on one line (jq -c .)"
        raise ValueError(f"{where}: malformed JSON at column {error.colno}: {error.msg}; {hint}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise ValueError(f"{where}: JSON that cannot be read: {error}; expected an object of strings") from None
    return value


def _parquet_records(path: Path, start: int) -> Iterator[_Record]:
    """Yields the rows from `start` on as dicts, reading only the columns of the file's shape."""
    try:
        with pq.ParquetFile(path) as file:
            shape = shape_of(dict.fromkeys(file.schema_arrow.names), str(path))
            columns = [*SHAPES[shape], *(["tools"] if "tools" in file.schema_arrow.names else [])]
            first = 0  # whole row groups before `start` are not read
            groups = []
            for group in range(file.num_row_groups):
                n_group_rows = file.metadata.row_group(group).num_rows
                if groups or first + n_group_rows > start:
                    groups.append(group)
                else:
                    first += n_group_rows
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=columns):
                for row, value in enumerate(batch.to_pylist(), start=first):
                    if row >= start:
                        yield _Record(f"{path}:row {row}", value, -1, -1)
                first += batch.num_rows
    except (pa.ArrowException, UnicodeDecodeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable Parquet file: {line}; write it again") from None
