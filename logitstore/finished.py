"""Whether a store is finished, and is the one that is asked for."""

import contextlib
from pathlib import Path

from logitstore.shard_reader import ShardReader
from logitstore.spec import StoreSpec, require_same_spec
from logitstore.store import LogitStore
from logitstore.store import open as open_store
from logitstore.work_folder import delete_work_folder, read_plan, work_path


def finished_store(path: Path, spec: StoreSpec) -> LogitStore | None:
    """The finished store at `path`; None where there is none, or shards of it are still to come.

    A work folder that was left behind after the last shard was in place is removed. Raises SpecMismatchError for a
    store of another spec, and what logitstore.open raises for one that is broken.
    """
    if not path.exists() or (path.is_dir() and read_plan(path) is not None and not _has_last_shard(path)):
        return None
    store = open_store(path)
    require_same_spec(store.spec, spec, where=str(path), advice="choose another --out, or delete that store")
    delete_work_folder(work_path(path))
    return store


def _has_last_shard(path: Path) -> bool:
    shards = sorted(path.glob("*.parquet"))
    if not shards:
        return False
    with contextlib.closing(ShardReader(shards[-1])) as last:
        return last.index.is_last
