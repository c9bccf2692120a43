"""Writes a store so that a kill at any instant loses at most the row group that was not acknowledged yet.

Samples are collected into row groups of at most 128 samples, 16 MB or 60 seconds. A full one is acknowledged: written
to the sibling folder `x.parquet.work/` as a small shard of its own, forced to the disk and renamed into place there.
When a shard is complete (or the writer closes) its groups are put together into one file, read back, and renamed to
its final name. Nothing under the final name is ever incomplete or changed afterwards, and what it holds does not
depend on how often the writer was interrupted.

`--out x.parquet` is one file of that name, or, where shard_samples is given, a folder of that name holding nothing
but shards.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from logitstore.codecs.registry import write_tables
from logitstore.errors import CorruptionError
from logitstore.row_input import as_numpy, checked_input_ids
from logitstore.shard_index import ShardIndex, same_index
from logitstore.shard_reader import ShardReader
from logitstore.shard_writer import GROUP_BYTES, GROUP_SAMPLES, StoredSample, sync_folder, write_shard
from logitstore.spec import StoreSpec, require_same_spec
from logitstore.tables import tables_path
from logitstore.targets import TeacherTargets
from logitstore.work_folder import WorkFolder

GROUP_SECONDS = 60.0


@dataclass(frozen=True)
class Acknowledged:
    """n_samples and n_tokens safe on the disk, the source_row of the last sample (-1: none) and how many samples of
    that row there are."""

    n_samples: int = 0
    n_tokens: int = 0
    last_source_row: int = -1
    n_of_last_row: int = 0

    def with_samples(self, samples: list[StoredSample]) -> "Acknowledged":
        """The same with these samples behind them."""
        result = self
        for sample in samples:
            same_row = sample.source_row == result.last_source_row
            result = Acknowledged(
                result.n_samples + 1,
                result.n_tokens + len(sample.input_ids),
                sample.source_row,
                result.n_of_last_row + 1 if same_row else 1,
            )
        return result


class StoreWriter:
    """Made by logitstore.create. A context manager: the store appears when the `with` block ends without an error."""

    def __init__(
        self, path: Path, spec: StoreSpec, shard_samples: int | None, resume: bool, tables_folder: Path | None = None
    ) -> None:
        if shard_samples is not None and shard_samples < 1:
            raise ValueError(f"shard_samples must be at least 1 or None, got {shard_samples}")
        self.path, self.spec, self.shard_samples = path, spec, shard_samples
        self._refuse_finished_store()
        write_tables(spec.codec, tables_folder or tables_path(path))
        self._work = WorkFolder.claim(path, spec, shard_samples, resume=resume)
        try:
            # a resumed store keeps the names that its first run gave to teacher and data set
            self._spec_json = self._work.spec.to_json().encode()
            committed = self._committed_indices()
            self._n_shards = len(committed)
            self._n_committed = sum(index.n_samples for index in committed)
            self._work.drop_groups_before(self._n_committed)
            self._acknowledged = _acknowledged([*committed, *self._work.indices(self._n_committed)])
        except BaseException:
            self._work.release()
            raise
        self._pending: list[StoredSample] = []
        self._pending_bytes = 0
        self._pending_since_s = 0.0
        self.blob_bytes_appended = 0

    @property
    def n_acknowledged(self) -> int:
        """Samples, from the first on, that are safe on the disk; a resumed collection goes on behind them."""
        return self._acknowledged.n_samples

    @property
    def n_pending(self) -> int:
        """Samples appended and not yet acknowledged."""
        return len(self._pending)

    @property
    def acknowledged(self) -> Acknowledged:
        """What is safe on the disk, in the terms in which a collection goes on."""
        return self._acknowledged

    def append(
        self, sample_id: int, input_ids: Any, targets: TeacherTargets, loss_mask: Any = None, source_row: int = -1
    ) -> None:
        """Adds a sample: input_ids [L] with L >= 1, its targets of L - 1 rows, loss_mask bool [L] (None: all True).

        Raises ValueError, CorruptionError or SpecMismatchError for what does not fit, OSError where the disk fails.
        """
        tokens = checked_input_ids(input_ids, self.spec.vocab_size)
        if not all(-(2**63) <= number < 2**63 for number in (int(sample_id), int(source_row))):
            raise ValueError(f"sample_id {sample_id} or source_row {source_row} does not fit into 64 bits")
        if len(tokens) == 0:
            raise ValueError(f"sample {sample_id} has no tokens")
        learned = np.ones(len(tokens), bool) if loss_mask is None else as_numpy(loss_mask)
        if learned.dtype != np.bool_ or learned.shape != tokens.shape:
            raise ValueError(f"loss_mask must be bool [{len(tokens)}], got {learned.dtype} {learned.shape}")
        blob = self.spec.codec.encode(targets, tokens)
        self.append_stored(
            StoredSample(int(sample_id), int(source_row), tokens, learned, int(targets.present.sum()), blob)
        )

    def append_stored(self, sample: StoredSample) -> None:
        """Adds a sample as a ShardReader gave it, encoded by this store's codec. Raises OSError if the disk fails."""
        if self._pending and self._pending_bytes + sample.n_bytes > GROUP_BYTES:
            self.flush()
        if not self._pending:
            self._pending_since_s = time.monotonic()
        self._pending.append(sample)
        self._pending_bytes += sample.n_bytes
        self.blob_bytes_appended += len(sample.blob)
        full = len(self._pending) == GROUP_SAMPLES or self._at_shard_end(self.n_acknowledged + len(self._pending))
        if full or time.monotonic() - self._pending_since_s > GROUP_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Acknowledges what was appended so far; puts a shard together that became complete before it."""
        if not self._pending:
            return
        if self._at_shard_end(self.n_acknowledged) and self.n_acknowledged > self._n_committed:
            self._commit_shard(is_last=False)
        self._work.write_group(self.n_acknowledged, self._pending, self._spec_json)
        self._acknowledged = self._acknowledged.with_samples(self._pending)
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Commits the last shard and removes the work folder. Called by the end of the `with` block."""
        self.flush()
        self._commit_shard(is_last=True)
        self._work.remove()

    def release(self) -> None:
        """Lets go of the unfinished store: what is acknowledged stays, and another writer may go on with it."""
        self._work.release()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self.close()
        finally:
            self.release()

    def _at_shard_end(self, n_samples: int) -> bool:
        return self.shard_samples is not None and n_samples % self.shard_samples == 0

    def _commit_shard(self, *, is_last: bool) -> None:
        final = self.path if self.shard_samples is None else self.path / f"part-{self._n_shards:05d}.parquet"
        partial = self._work.folder / f"shard-{self._n_shards:05d}.partial"
        partial.unlink(missing_ok=True)
        samples = self._work.iter_samples(self._n_committed, self.n_acknowledged)
        index = write_shard(partial, samples, spec_json=self._spec_json, shard=self._n_shards, is_last=is_last)
        _check_written(partial, index, self.n_acknowledged - self._n_committed)
        if self.shard_samples is not None:
            self.path.mkdir(exist_ok=True)
        os.replace(partial, final)
        sync_folder(final.parent)
        self._n_shards += 1
        self._n_committed = self.n_acknowledged
        self._work.drop_groups_before(self._n_committed)

    def _committed_indices(self) -> list[ShardIndex]:
        """Index of each shard that is in place. Raises SpecMismatchError where they are of another store."""
        indices = []
        for path in sorted(self.path.glob("*.parquet")) if self.shard_samples is not None else []:
            with contextlib.closing(ShardReader(path)) as shard:
                found = StoreSpec.from_json(shard.spec_json)
                require_same_spec(
                    found, self.spec, where=str(path), advice="choose another output, or delete that store"
                )
                indices.append(shard.index)
        return indices

    def _refuse_finished_store(self) -> None:
        if self.path.is_file():
            raise FileExistsError(f"{self.path} exists already; choose another name or delete it")
        shards = sorted(self.path.glob("*")) if self.path.is_dir() else []
        if not shards:
            return
        if self.shard_samples is None or any(path.suffix != ".parquet" for path in shards):
            raise FileExistsError(f"{self.path} is a folder with files in it; choose another name or delete it")
        with contextlib.closing(ShardReader(shards[-1])) as last:
            if last.index.is_last:
                raise FileExistsError(f"{self.path} is a finished store; choose another name or delete it")


def create(
    path: str | os.PathLike[str], spec: StoreSpec, shard_samples: int | None = None, resume: bool = False
) -> StoreWriter:
    """A writer for a new store at `path`: one file, or a folder of shards of `shard_samples` samples each.

    resume True: goes on with an unfinished store of the same spec, behind its n_acknowledged samples.
    Raises FileExistsError where a store is there (or an unfinished one and resume is False), SpecMismatchError where
    the unfinished one has another spec, OSError where the folder cannot be written.
    """
    return StoreWriter(Path(path), spec, shard_samples, resume)


def _check_written(path: Path, expected: ShardIndex, n_samples: int) -> None:
    """Reads a written shard back as a whole. Raises CorruptionError where it is not what was meant."""
    with contextlib.closing(ShardReader(path)) as shard:
        if len(shard) != n_samples or not same_index(shard.index, expected):
            raise CorruptionError(f"{path} reads back with another index than was written; is the disk sound?")
        for i in range(len(shard)):
            shard.read(i)


def _acknowledged(indices: list[ShardIndex]) -> Acknowledged:
    if not any(index.n_samples for index in indices):
        return Acknowledged()
    source_row = np.concatenate([index.source_row for index in indices])
    other_rows = np.flatnonzero(source_row != source_row[-1])
    n_of_last_row = len(source_row) - (int(other_rows[-1]) + 1 if len(other_rows) else 0)
    n_tokens = sum(int(index.n_tokens.sum(dtype=np.int64)) for index in indices)
    return Acknowledged(len(source_row), n_tokens, int(source_row[-1]), n_of_last_row)
