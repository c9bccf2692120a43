"""LogitStore: the samples of a store, as a map-style dataset.

A store is one shard file of the name it was given, or a folder of that name with shards in it. Reading is random
access, verified, safe under fork, spawn and threads, and in any order; a torch DataLoader takes it as it is.
"""

import builtins
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.codecs.registry import codec_with_tables_at_hand, tables_file_name
from logitstore.errors import CorruptionError, FormatError, LogitStoreError, SpecMismatchError
from logitstore.shard_reader import ShardReader
from logitstore.shard_writer import StoredSample
from logitstore.spec import StoreSpec
from logitstore.tables import checked_tokenizer_folder, tables_path
from logitstore.targets import TeacherTargets

if TYPE_CHECKING:
    from logitstore.verify import VerifyReport


class Sample(NamedTuple):
    """One sequence: input_ids int32 [L], loss_mask bool [L] (True where input_ids[t] is to be learned), targets of
    L - 1 rows, and where it came from: sample_id, and source_row, its row in the data set (-1: not known)."""

    sample_id: int
    source_row: int
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    targets: TeacherTargets


class LogitStore:
    """A finished store, opened by logitstore.open(path)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._shards = [ShardReader(shard_path) for shard_path in shard_paths(self.path)]
        _check_completeness(self.path, self._shards)
        spec = StoreSpec.from_json(self._shards[0].spec_json)
        self.spec = replace(spec, codec=codec_with_tables_at_hand(spec.codec, tables_path(self.path)))
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Sample:
        """Sample i (negative: from the end). Raises IndexError, CorruptionError or FormatError."""
        return self.decoded(*self.read_stored(i))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def read_stored(self, i: int) -> tuple[StoredSample, str]:
        """Sample i as it is stored, its checksums tested and not decoded, and its place in words."""
        n_samples = len(self)
        if not -n_samples <= i < n_samples:
            raise IndexError(f"sample {i} of a store of {n_samples}: {self.path}")
        i %= n_samples
        number = int(np.searchsorted(self._ends, i, side="right"))
        shard = self._shards[number]
        within = i - (int(self._ends[number]) - len(shard))
        return shard.read(within), f"{shard.path}, sample {within}"

    def decoded(self, stored: StoredSample, where: str) -> Sample:
        """The sample of which read_stored gave this. Raises CorruptionError naming its place."""
        codec = self.spec.codec
        if codec.tables_sha256 is not None and codec.tables is None:
            path = tables_path(self.path) / tables_file_name(codec.tables_sha256)
            raise SpecMismatchError(f"{self.path} is coded with tables that are missing: copy {path} along with it")
        try:
            targets = codec.decode(stored.blob, stored.input_ids)
        except (LogitStoreError, ValueError) as error:
            raise CorruptionError(f"{where}: {error}") from None
        return Sample(stored.sample_id, stored.source_row, stored.input_ids, stored.loss_mask, targets)

    def verify(self) -> "VerifyReport":
        """Reads and checks everything; see logitstore.verify."""
        from logitstore.verify import verify_store

        return verify_store(self)

    @property
    def shards(self) -> list[ShardReader]:
        """The shards in order."""
        return list(self._shards)

    @property
    def n_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(int(shard.index.n_tokens.sum(dtype=np.int64)) for shard in self._shards)

    @property
    def n_present_rows(self) -> int:
        """Rows with a stored distribution."""
        return sum(int(shard.index.n_present.sum(dtype=np.int64)) for shard in self._shards)

    @property
    def blob_bytes(self) -> int:
        """Bytes of all blobs: headers, checksums and zstd frames included."""
        return sum(int(shard.index.blob_bytes.sum(dtype=np.int64)) for shard in self._shards)

    @property
    def file_bytes(self) -> int:
        """Bytes of the shard files."""
        return sum(shard.path.stat().st_size for shard in self._shards)

    @property
    def tokenizer_folder(self) -> Path | None:
        """The teacher's tokenizer files beside the store, checked; None where there are none."""
        return checked_tokenizer_folder(self.path, self.spec.tokenizer_files_sha256)


def open(path: str | os.PathLike[str]) -> LogitStore:
    """The store at `path`.

    Raises FileNotFoundError, FormatError for what is no store or lacks a shard, CorruptionError for damaged metadata
    and SpecMismatchError where shards of different stores lie in one folder.
    """
    return LogitStore(path)


def shard_paths(path: Path) -> list[Path]:
    """The shard files of the store at `path`, in order.

    Raises FileNotFoundError where there is nothing, FormatError for a folder without shards.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        shards = sorted(entry for entry in path.glob("*.parquet") if entry.is_file())
        if not shards:
            raise FormatError(f"{path}: a folder without .parquet files, not a store")
        return shards
    work = path.with_name(path.name + ".work")
    hint = f"; {work} holds an unfinished one, finish it first" if work.is_dir() else ""
    raise FileNotFoundError(f"no store at {path}{hint}")


def _check_completeness(path: Path, shards: builtins.list[ShardReader]) -> None:
    for number, shard in enumerate(shards):
        if shard.spec_json != shards[0].spec_json:
            raise SpecMismatchError(
                f"{shard.path} and {shards[0].path} have different specs; a store holds shards of one collection only"
            )
        if shard.index.shard != number:
            raise FormatError(f"{path}: shard {number} is missing, {shard.path.name} is shard {shard.index.shard}")
        if shard.index.is_last != (number == len(shards) - 1):
            which = "the" if shard.index.is_last else "not the"
            raise FormatError(
                f"{path}: {len(shards)} shards here, but {shard.path.name} is {which} last one; "
                "finish the collection, or copy all shards"
            )
