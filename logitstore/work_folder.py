"""The sibling folder `x.parquet.work/` of a store that is being written: plan, lock and acknowledged row groups.

`plan.json` says what is being written, so that nothing else is mixed in; `lock` is held (flock) by the process that
writes; `group-NNNNNNNNNNNN.parquet` holds the samples from number N on, complete and forced to the disk. Where several
processes write, `units/` holds what each has of it (units.py).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from logitstore.errors import CorruptionError, FormatError
from logitstore.shard_index import ShardIndex
from logitstore.shard_reader import ShardReader
from logitstore.shard_writer import StoredSample, sync_folder, write_shard
from logitstore.spec import StoreSpec, require_same_spec

UNITS_FOLDER, UNITS_PLAN = "units", "units.json"
_PLAN = "plan.json"


def work_path(store_path: Path) -> Path:
    """`x.parquet.work` for a store at `x.parquet`."""
    return store_path.with_name(store_path.name + ".work")


class Plan(NamedTuple):
    """The spec of a store that is being written, and the samples of each of its shards (None: one file)."""

    spec: StoreSpec
    shard_samples: int | None


class WorkFolder:
    """A claimed work folder; release() lets go of the lock, remove() deletes it all."""

    def __init__(self, folder: Path, lock: IO[bytes], spec: StoreSpec) -> None:
        self.folder, self.spec = folder, spec
        self._lock = lock

    @staticmethod
    def claim(store_path: Path, spec: StoreSpec, shard_samples: int | None, *, resume: bool) -> "WorkFolder":
        """The folder for this store, made or taken over, locked for this process.

        Raises FileExistsError where one is there and resume is False or another process holds it, SpecMismatchError
        where it belongs to another spec or layout, FormatError where its plan cannot be read.
        """
        folder = work_path(store_path)
        if not resume and (any(folder.glob("group-*.parquet")) or (folder / UNITS_FOLDER).exists()):
            raise FileExistsError(f"{folder} holds an unfinished store; resume it, or delete that folder")
        folder.mkdir(parents=True, exist_ok=True)
        work = WorkFolder(folder, _locked(folder), spec)
        try:
            work._agree_on_plan(store_path, spec, shard_samples)
            for partial in folder.glob("*.partial"):
                partial.unlink()
        except BaseException:
            work.release()
            raise
        return work

    def release(self) -> None:
        """Lets another process claim the folder."""
        self._lock.close()

    def remove(self) -> None:
        """Deletes the folder and all in it."""
        delete_work_folder(self.folder)
        self.release()

    def write_group(self, first: int, samples: list[StoredSample], spec_json: bytes) -> None:
        """Writes the samples, numbered from `first` on, as a group that survives a kill and a power loss."""
        final = self._group_path(first)
        partial = final.with_suffix(".partial")
        write_shard(partial, samples, spec_json=spec_json, shard=0, is_last=False)
        os.replace(partial, final)
        sync_folder(self.folder)

    def indices(self, first: int) -> list[ShardIndex]:
        """Index of each group from sample number `first` on. Raises CorruptionError where one in between is missing."""
        found: list[ShardIndex] = []
        expected = first
        for start, path in self._groups():
            if start != expected:
                raise CorruptionError(f"{path}: expected the group that starts at sample {expected}; delete the folder")
            with contextlib.closing(ShardReader(path)) as group:
                found.append(group.index)
            expected += found[-1].n_samples
        return found

    def iter_samples(self, first: int, end: int) -> Iterator[StoredSample]:
        """The samples numbered first to end - 1, their checksums tested."""
        for start, path in self._groups():
            if first <= start < end:
                with contextlib.closing(ShardReader(path)) as group:
                    for i in range(len(group)):
                        yield group.read(i)

    def drop_groups_before(self, end: int) -> None:
        """Deletes the groups whose samples are all numbered below `end`: they are in a committed shard."""
        for start, path in self._groups():
            if start < end:
                path.unlink()

    def _groups(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem.removeprefix("group-")), path) for path in self.folder.glob("group-*.parquet"))

    def _group_path(self, first: int) -> Path:
        return self.folder / f"group-{first:012d}.parquet"

    def _agree_on_plan(self, store_path: Path, spec: StoreSpec, shard_samples: int | None) -> None:
        plan = read_plan(store_path)
        if plan is None or not has_samples(store_path):
            path = self.folder / _PLAN
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"spec": spec.to_json(), "shard_samples": shard_samples}))
            os.replace(partial, path)
            sync_folder(self.folder)
            return
        advice = f"choose another output, or delete {self.folder} to start anew"
        require_same_spec(plan.spec, spec, where=f"the unfinished store in {self.folder}", advice=advice)
        self.spec = plan.spec
        if plan.shard_samples != shard_samples:
            raise FileExistsError(
                f"the unfinished store in {self.folder} has shards of {plan.shard_samples} samples, this run of "
                f"{shard_samples}; {advice}"
            )


def delete_work_folder(folder: Path) -> None:
    """Deletes the work folder of a store that is in place, as far as the system lets us: the store stays finished.

    The plan of its units goes first, so that no process takes units that go away for units that are still to do.
    """
    (folder / UNITS_PLAN).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def has_samples(store_path: Path) -> bool:
    """Whether anything was stored for the store at `store_path`: a shard, or an acknowledged row group or unit."""
    if store_path.is_file():
        return True
    work = work_path(store_path)
    stored = ("group-*.parquet", f"{UNITS_FOLDER}/*.parquet.work/group-*.parquet", f"{UNITS_FOLDER}/*.parquet")
    return any(store_path.glob("*.parquet")) or any(path for pattern in stored for path in work.glob(pattern))


def read_plan(store_path: Path) -> Plan | None:
    """What the unfinished store at `store_path` is to become, None where there is none.

    Raises FormatError where its plan cannot be read.
    """
    path = work_path(store_path) / _PLAN
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_text())
        return Plan(StoreSpec.from_json(plan["spec"]), plan["shard_samples"])
    except (ValueError, KeyError, TypeError, FormatError) as error:
        raise FormatError(f"{path} cannot be read ({error}); delete {path.parent} to start anew") from None


def _locked(folder: Path) -> IO[bytes]:
    lock = open(folder / "lock", "wb")  # noqa: SIM115  (held for as long as the folder is claimed)
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no fcntl on this system: two writers on one output are then the user's to avoid
        pass
    except OSError:
        lock.close()
        raise FileExistsError(f"another process is writing {folder}; wait for it, or stop it") from None
    return lock
