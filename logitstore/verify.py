"""Verifies a store: every checksum, every invariant, and that rows belong to the tokens beside them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from logitstore.errors import LogitStoreError
from logitstore.label_shift import LabelShift
from logitstore.store import LogitStore, shard_paths
from logitstore.store import open as open_store

MAX_FAULTS = 100


@dataclass(frozen=True)
class VerifyReport:
    """faults: one line each, naming file and sample; after MAX_FAULTS a last line says how many more there are.
    label_probability: mean stored probability of the token at shifts -1, 0 and +1 from the label. n_checked: samples
    that read and decoded without a fault."""

    path: Path
    faults: tuple[str, ...]
    n_samples: int
    n_checked: int
    n_tokens: int
    n_present_rows: int
    file_bytes: int
    label_probability: dict[int, float]

    @property
    def ok(self) -> bool:
        """True where there is no fault."""
        return not self.faults


def verify(path: str | os.PathLike[str], on_sample: Callable[[], None] | None = None) -> VerifyReport:
    """The report on the store at `path`; a store that does not even open is a report with that one fault.

    on_sample is called after each sample. Raises FileNotFoundError where there is nothing at `path`, FormatError for a
    folder without shards: there is no store whose faults could be told.
    """
    shard_paths(Path(path))
    try:
        store = open_store(path)
    except LogitStoreError as error:
        return VerifyReport(Path(path), (str(error),), 0, 0, 0, 0, 0, {})
    return verify_store(store, on_sample)


def verify_store(store: LogitStore, on_sample: Callable[[], None] | None = None) -> VerifyReport:
    """Reads and decodes every sample, tests every page's checksum, and proves the alignment of rows and labels."""
    faults = [fault for shard in store.shards for fault in shard.page_faults()]
    shift = LabelShift()
    n_checked = n_present = 0
    for i in range(len(store)):
        try:
            stored, where = store.read_stored(i)
            sample = store.decoded(stored, where)
        except LogitStoreError as error:
            faults.append(str(error))
            continue
        finally:
            if on_sample is not None:
                on_sample()
        if int(sample.targets.present.sum()) != stored.n_present:
            faults.append(f"{store.path}, sample {i}: n_present is {stored.n_present}, its blob has another number")
        n_checked += 1
        n_present += stored.n_present
        shift.add(sample.targets)
    if (fault := shift.fault()) is not None:
        faults.append(f"{store.path}: {fault}")
    return VerifyReport(
        path=store.path,
        faults=tuple(_shortened(faults)),
        n_samples=len(store),
        n_checked=n_checked,
        n_tokens=store.n_tokens,
        n_present_rows=n_present,
        file_bytes=store.file_bytes,
        label_probability=shift.means(),
    )


def _shortened(faults: list[str]) -> list[str]:
    n_more = len(faults) - MAX_FAULTS
    return faults if n_more <= 0 else [*faults[:MAX_FAULTS], f"and {n_more:,} more faults"]
