"""Several processes, one store: units claimed, killed, gone on with and joined give the bytes of one process."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import logitstore
from logitstore.errors import CorruptionError, FormatError, SpecMismatchError
from logitstore.file_lock import file_lock
from logitstore.units import RowRange, Units, read_unit_plan, shared_units
from logitstore.work_folder import has_samples, work_path
from logitstore.writer import StoreWriter

from .conftest import Written, make_spec

FORK = multiprocessing.get_context("fork")
UNIT_ROWS = 12


def in_order(samples: list[Written]) -> list[Written]:
    """The samples, numbered from 0 as a collection numbers them."""
    return [s._replace(sample_id=i) for i, s in enumerate(samples)]


def ranges_behind(done, n_rows: int = 75) -> list[RowRange]:
    """Units of UNIT_ROWS rows, two samples each; the last one has no row, so no sample."""
    first = max(done.last_source_row, 0)
    starts = range(first, n_rows, UNIT_ROWS)
    ranges = [RowRange(row, min(row + UNIT_ROWS, n_rows)) for row in starts]
    return [ranges[0]._replace(n_skipped=done.n_of_last_row), *ranges[1:], RowRange(n_rows, n_rows)]


def cut(path: Path, shard_samples: int | None = None, cut_rows=ranges_behind) -> Units:
    units = shared_units(path, make_spec(), shard_samples, cut_rows)
    assert units is not None
    return units


def append(writer: StoreWriter, samples: list[Written], part: RowRange, n_at_most: int | None = None) -> None:
    """The samples of the part that the writer has not, numbered within the unit as a rank does."""
    of_part = [s for s in samples if part.first_row <= s.source_row < part.end_row][part.n_skipped :]
    done = writer.n_acknowledged
    for i, s in enumerate(of_part[done:n_at_most], start=done):
        writer.append(i, s.input_ids, s.targets, s.loss_mask, source_row=s.source_row)


def write_unit(units: Units, samples: list[Written], number: int) -> bool:
    with units.writer(number) as writer:
        if writer is not None:
            append(writer, samples, units.plan.ranges[number])
        return writer is not None


def write_alone(path: Path, samples: list[Written], shard_samples: int | None, stop_at: int | None = None) -> None:
    writer = logitstore.create(path, make_spec(), shard_samples=shard_samples)
    for s in samples[:stop_at]:
        writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask, source_row=s.source_row)
    if stop_at is None:
        writer.close()
    else:
        writer.flush()
        writer.release()


def contents(path: Path) -> list[tuple[str, bytes]]:
    return [(file.name, file.read_bytes()) for file in ([path] if path.is_file() else sorted(path.iterdir()))]


@pytest.mark.parametrize("shard_samples", [None, 33])
@pytest.mark.parametrize("n_alone", [0, 41])
def test_units_written_in_any_order_are_joined_to_the_bytes_of_one_process(
    tmp_path: Path, samples: list[Written], shard_samples: int | None, n_alone: int
) -> None:
    """Also behind 41 samples that one process wrote before, the last of them the first of its row's two."""
    samples = in_order(samples)
    write_alone(tmp_path / "x.parquet", samples, shard_samples)
    path = tmp_path / "units" / "x.parquet"
    path.parent.mkdir()
    if n_alone:
        write_alone(path, samples, shard_samples, stop_at=n_alone)
    units = cut(path, shard_samples)
    assert len(units) == (8 if n_alone == 0 else 6)
    for number in reversed(range(len(units))):
        assert units.n_left() == number + 1
        assert write_unit(units, samples, number)
        assert not write_unit(units, samples, number)  # it is done
    with pytest.raises(logitstore.FormatError if path.exists() else FileNotFoundError, match="finish"):
        logitstore.open(path)
    units.join()
    assert contents(path) == contents(tmp_path / "x.parquet")
    assert not work_path(path).exists()
    assert units.n_left() == 0
    units.join()  # there is nothing left to join
    assert not work_path(path).exists()
    assert shared_units(path, make_spec(), shard_samples, ranges_behind) is None
    assert not work_path(path).exists()
    assert logitstore.verify(path).ok


def _work(path: Path, samples: list[Written], seed: int) -> None:
    """A rank: every unit that nobody is at, from a place of its own on, a group at a time; then the join."""
    units = shared_units(path, make_spec(), 33, ranges_behind)
    if units is None:
        return
    for i in range(len(units)):
        number = (i + 3 * seed) % len(units)
        with units.writer(number) as writer:
            for n in range(1, 2 * UNIT_ROWS + 1) if writer is not None else ():
                append(writer, samples, units.plan.ranges[number], n)
                writer.flush()
                time.sleep(0.002)
    if units.n_left() == 0:
        units.join()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and flock")
def test_processes_killed_at_any_instant_lose_nothing_that_was_acknowledged(
    tmp_path: Path, samples: list[Written]
) -> None:
    samples = in_order(samples)
    write_alone(tmp_path / "x.parquet", samples, 33)
    path = tmp_path / "ranks" / "x.parquet"
    path.parent.mkdir()
    n_killed = seed = 0
    while not (path.exists() and not work_path(path).exists()):
        seed += 1
        assert seed < 200
        ranks = [FORK.Process(target=_work, args=(path, samples, seed + rank)) for rank in range(1 + seed % 3)]
        for process in ranks:
            process.start()
        time.sleep(0.03 * seed)
        before = _acknowledged(path)
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            n_killed += process.exitcode != 0
        assert_kept(before, _acknowledged(path))
    assert n_killed > 2
    assert contents(path) == contents(tmp_path / "x.parquet")


class _Acknowledged(NamedTuple):
    """Of an unfinished store: the units that are done, and (unit, group) of the acknowledged groups of the others."""

    is_joining: bool
    done: set[str]
    groups: set[tuple[str, str]]


def _acknowledged(path: Path) -> _Acknowledged:
    work = work_path(path)
    groups = {(file.parent.name[:6], file.name) for file in work.glob("units/*.work/group-*.parquet")}
    done = {file.stem for file in work.glob("units/*.parquet") if file.is_file()}
    return _Acknowledged((work / "units-done.json").exists() or path.exists(), done, groups)


def assert_kept(before: _Acknowledged, after: _Acknowledged) -> None:
    if not after.is_joining:
        assert before.done <= after.done
        assert all(group in after.groups or group[0] in after.done for group in before.groups)


def test_joined_and_killed_before_the_work_folder_is_gone_it_is_finished(
    tmp_path: Path, samples: list[Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    samples = in_order(samples)
    units = cut(path)
    for number in range(len(units)):
        write_unit(units, samples, number)
    with monkeypatch.context() as patch:
        patch.setattr("logitstore.work_folder.WorkFolder.remove", lambda self: None)
        units.join()
    assert work_path(path).exists()
    units.join()
    assert not work_path(path).exists()
    assert len(logitstore.open(path)) == len(samples)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and flock")
def test_a_unit_that_another_process_is_at_is_left_to_it(tmp_path: Path, samples: list[Written]) -> None:
    path = tmp_path / "x.parquet"
    samples = in_order(samples)
    units = cut(path)
    with units.writer(0) as writer:
        assert writer is not None
        answers = FORK.SimpleQueue()
        other = FORK.Process(target=lambda: answers.put([write_unit(units, samples, 0), write_unit(units, samples, 1)]))
        other.start()
        other.join()
        assert answers.get() == [False, True]
        append(writer, samples, units.plan.ranges[0])
    assert units.n_left() == len(units) - 2


def test_other_collections_and_one_process_without_units_are_kept_apart(tmp_path: Path, samples: list[Written]) -> None:
    path = tmp_path / "x.parquet"
    samples = in_order(samples)
    units = cut(path)
    other = make_spec(teacher_sha256="f" * 64)
    assert shared_units(path, other, None, ranges_behind) is not None  # nothing is stored yet
    units = cut(path)
    assert write_unit(units, samples, 2)
    assert has_samples(path)
    with pytest.raises(
        SpecMismatchError, match=r"x\.parquet\.work has teacher .*, this run teacher .*; choose another"
    ):
        shared_units(path, other, None, ranges_behind)
    with pytest.raises(FileExistsError, match=r"holds an unfinished store; resume it, or delete"):
        logitstore.create(path, make_spec())
    alone = tmp_path / "alone.parquet"
    with (
        logitstore.create(alone, make_spec(), resume=True) as writer,
        pytest.raises(FileExistsError, match=r"another process is writing .*alone\.parquet\.work"),
    ):
        append(writer, samples, RowRange(0, 5))
        cut(alone)


def test_what_does_not_fit_is_refused_when_units_are_joined(tmp_path: Path, samples: list[Written]) -> None:
    samples = in_order(samples)
    path = tmp_path / "x.parquet"
    units = cut(path)
    for number in range(len(units)):
        write_unit(units, samples, number)
    first, own = work_path(path) / "units" / "000000.parquet", tmp_path / "own"
    first.rename(own)
    with logitstore.create(first, make_spec(keep_prompt=True)) as writer:
        append(writer, samples, units.plan.ranges[0])
    with pytest.raises(SpecMismatchError, match=r"000000\.parquet has keep_prompt True, this run keep_prompt False"):
        units.join()
    own.rename(first)
    counts = json.loads((work_path(path) / "units-done.json").read_text())
    (work_path(path) / "units-done.json").write_text(json.dumps([counts[0] + 1, *counts[1:]]))
    with pytest.raises(CorruptionError, match=r"000000\.parquet has 24 samples, had 25 when it was done; delete"):
        units.join()
    for damaged in ("", "{}", "[1]", json.dumps([-1, *counts[1:]]), json.dumps([True, *counts[1:]]), b"\xff"):
        data = damaged if isinstance(damaged, bytes) else damaged.encode()
        (work_path(path) / "units-done.json").write_bytes(data)
        with pytest.raises(CorruptionError, match=r"units-done\.json does not say how many samples each of .*; delete"):
            units.join()
    (work_path(path) / "units.json").write_text("{")
    with pytest.raises(FormatError, match=r"units\.json cannot be read .*; delete .* to start anew"):
        read_unit_plan(path)

    empty = cut(tmp_path / "empty.parquet", cut_rows=lambda done: [RowRange(0, 0), RowRange(0, 0)])
    for number in range(2):
        write_unit(empty, samples, number)
    with pytest.raises(ValueError, match=r"empty\.parquet: no row of the data set gave a sample"):
        empty.join()


def test_a_file_system_or_a_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(
            OSError, match=r"a\.lock cannot be locked \(No locks available\); .* need a file system with"
        ):
            file_lock(tmp_path / "a.lock", wait=False).__enter__()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(OSError, match="which this system lacks"):
        file_lock(tmp_path / "a.lock", wait=False).__enter__()


_WAITER = """
import sys
from pathlib import Path
from logitstore.file_lock import file_lock
print("waiting", flush=True)
with file_lock(Path(sys.argv[1]), wait=True) as is_held:
    print(is_held, Path(sys.argv[1]).exists())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_a_lock_that_was_deleted_while_waited_for_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with file_lock(path, wait=False) as is_held:
        assert is_held
        waiter = subprocess.Popen([sys.executable, "-c", _WAITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert waiter.stdout.readline() == "waiting\n"
        with pytest.raises(subprocess.TimeoutExpired):
            waiter.wait(0.5)
        path.unlink()
    assert waiter.communicate(timeout=60)[0] == "True True\n"
    with file_lock(tmp_path / "no folder" / "a.lock", wait=True) as is_held:
        assert not is_held
