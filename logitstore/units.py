"""A store that several processes write: its rows cut into units, each written by one process and then joined.

`x.parquet.work/units.json` says how the rows of the data set are cut; it does not hang on how many processes there
are, so any number of them can go on. Unit N is written by a StoreWriter of its own to `units/NNNNNN.parquet` in that
folder, under a lock that dies with its process: a unit is done when that file is there, and what a killed process had
acknowledged of one is gone on with. Whoever finds all units done joins them, under a lock, into the store that one
process would have written, sample numbers and shards alike. Nobody coordinates, and nobody waits but for that.

What it gives up: each blob is written four times instead of twice, and one process joins.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from logitstore.errors import CorruptionError, FormatError
from logitstore.file_lock import file_lock
from logitstore.finished import finished_store
from logitstore.shard_reader import ShardReader
from logitstore.shard_writer import sync_folder
from logitstore.spec import StoreSpec, require_same_spec
from logitstore.tables import tables_path
from logitstore.work_folder import UNITS_FOLDER, UNITS_PLAN, has_samples, work_path
from logitstore.writer import Acknowledged, StoreWriter

_COUNTS = "units-done.json"
_LOCK = "units.lock"


class RowRange(NamedTuple):
    """Rows of a data set from first_row on, below end_row (None: all), without the first n_skipped samples of the first
    one; up to the sample that makes max_tokens tokens (None: all)."""

    first_row: int = 0
    end_row: int | None = None
    n_skipped: int = 0
    max_tokens: int | None = None


class UnitPlan(NamedTuple):
    """The spec of the store, samples of each of its shards (None: one file), samples that were written before it was
    cut into units, and the units in order."""

    spec: StoreSpec
    shard_samples: int | None
    n_before: int
    ranges: tuple[RowRange, ...]


class Units:
    """The units of one store, in order. Made by shared_units."""

    def __init__(self, path: Path, spec: StoreSpec, plan: UnitPlan) -> None:
        self.path, self.spec, self.plan = path, spec, plan
        self._folder = work_path(path) / UNITS_FOLDER

    def __len__(self) -> int:
        return len(self.plan.ranges)

    def is_done(self, number: int) -> bool:
        """Whether all samples of the unit are safe on the disk."""
        return self._unit_path(number).exists() or self._is_joining()

    def n_left(self) -> int:
        """Units that are not done."""
        return sum(not self.is_done(number) for number in range(len(self)))

    @contextlib.contextmanager
    def writer(self, number: int) -> Iterator[StoreWriter | None]:
        """A writer for the samples of the unit, behind those that it has; None where it is done or another process
        writes it. The unit is done when the `with` block ends without an error.
        """
        with file_lock(self._folder / f"{number:06d}.lock", wait=False) as is_held:
            if not is_held or self.is_done(number):
                yield None
                return
            tables = tables_path(self.path)
            with StoreWriter(self._unit_path(number), self.spec, None, resume=True, tables_folder=tables) as writer:
                yield writer

    def join(self) -> None:
        """Puts the units, all of which must be done, together to the store; returns when it is there.

        Killed, it goes on where it stopped. Raises CorruptionError where a unit does not read back, SpecMismatchError
        for one of another collection, ValueError where no unit has a sample.
        """
        with file_lock(work_path(self.path) / _LOCK, wait=True) as is_held:
            if not is_held or finished_store(self.path, self.spec) is not None:
                return  # another process has joined them
            counts = self._counts()
            if self.plan.n_before + sum(counts) == 0:
                raise ValueError(f"{self.path}: no row of the data set gave a sample")
            with StoreWriter(self.path, self.spec, self.plan.shard_samples, resume=True) as writer:
                first = self.plan.n_before
                for number, n_samples in enumerate(counts):
                    self._append_unit(writer, number, first, n_samples)
                    first += n_samples

    def _append_unit(self, writer: StoreWriter, number: int, first: int, n_samples: int) -> None:
        """Appends what the writer has not of a unit whose samples are numbered from `first` on, and deletes it."""
        path = self._unit_path(number)
        if writer.n_acknowledged < first + n_samples:
            with contextlib.closing(ShardReader(path)) as unit:
                found = StoreSpec.from_json(unit.spec_json)
                advice = f"delete {work_path(self.path)} to start anew"
                require_same_spec(found, self.spec, where=str(path), advice=advice)
                if len(unit) != n_samples:
                    raise CorruptionError(f"{path} has {len(unit)} samples, had {n_samples} when it was done; {advice}")
                for i in range(max(writer.n_acknowledged - first, 0), n_samples):
                    writer.append_stored(unit.read(i)._replace(sample_id=first + i))
            writer.flush()
        path.unlink(missing_ok=True)

    def _counts(self) -> list[int]:
        """Samples of each unit, written down before the first of them is joined and deleted."""
        path = work_path(self.path) / _COUNTS
        if not path.exists():
            _write_json(path, [self._n_samples(number) for number in range(len(self))])
        try:
            counts = json.loads(path.read_text())
        except ValueError:
            counts = None
        is_sound = isinstance(counts, list) and len(counts) == len(self)
        if not is_sound or not all(type(count) is int and count >= 0 for count in counts):
            raise CorruptionError(
                f"{path} does not say how many samples each of {len(self)} units has; "
                f"delete {path.parent} to start anew"
            )
        return counts

    def _n_samples(self, number: int) -> int:
        with contextlib.closing(ShardReader(self._unit_path(number))) as unit:
            return len(unit)

    def _is_joining(self) -> bool:
        folder = work_path(self.path)
        return (folder / _COUNTS).exists() or not (folder / UNITS_PLAN).exists()

    def _unit_path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.parquet"


def shared_units(
    path: Path, spec: StoreSpec, shard_samples: int | None, cut: Callable[[Acknowledged], Sequence[RowRange]]
) -> Units | None:
    """The units of the unfinished store at `path`, None where it is finished.

    The first process that comes here calls `cut`, which gives the units for what is behind that which one process wrote
    of the store before; the others wait for it. Raises SpecMismatchError where samples of another collection are there,
    FileExistsError where a process is writing it without units, and as logitstore.create(resume=True) does.
    """
    while True:
        work_path(path).mkdir(parents=True, exist_ok=True)
        with file_lock(work_path(path) / _LOCK, wait=True) as is_held:
            if not is_held:
                continue  # the folder went away, with a store that was finished
            if finished_store(path, spec) is not None:
                return None
            plan = _matching_plan(path, spec) or _new_plan(path, spec, shard_samples, cut)
            return Units(path, spec, plan)


def read_unit_plan(path: Path) -> UnitPlan | None:
    """How the unfinished store at `path` is cut, None where it is not. Raises FormatError where it cannot be read."""
    file = work_path(path) / UNITS_PLAN
    try:
        plan = json.loads(file.read_text())
        ranges = tuple(RowRange(*values) for values in plan["ranges"])
        return UnitPlan(StoreSpec.from_json(plan["spec"]), plan["shard_samples"], plan["n_before"], ranges)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, FormatError) as error:
        raise FormatError(f"{file} cannot be read ({error}); delete {file.parent} to start anew") from None


def _matching_plan(path: Path, spec: StoreSpec) -> UnitPlan | None:
    """The plan of the unfinished store; None where there is none, or another one under which nothing was stored yet."""
    plan = read_unit_plan(path)
    if plan is not None:
        if not has_samples(path) and plan.spec.to_json() != spec.to_json():
            return None
        advice = f"choose another output, or delete {work_path(path)} to start anew"
        require_same_spec(plan.spec, spec, where=f"the unfinished store in {work_path(path)}", advice=advice)
    return plan


def _new_plan(
    path: Path, spec: StoreSpec, shard_samples: int | None, cut: Callable[[Acknowledged], Sequence[RowRange]]
) -> UnitPlan:
    writer = StoreWriter(path, spec, shard_samples, resume=True)
    try:
        plan = UnitPlan(spec, shard_samples, writer.n_acknowledged, tuple(cut(writer.acknowledged)))
        (work_path(path) / UNITS_FOLDER).mkdir(exist_ok=True)
        _write_json(work_path(path) / UNITS_PLAN, {**plan._asdict(), "spec": spec.to_json()})
    finally:
        writer.release()
    return plan


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".new")
    with open(partial, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
