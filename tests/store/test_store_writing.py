"""Writing: resumed, killed, on a full disk, twice at once; what was acknowledged is there afterwards."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.work_folder import work_path

from .conftest import assert_same, make_spec, write


def test_an_error_in_the_block_publishes_nothing_and_the_next_run_goes_on(tmp_path: Path, samples) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(RuntimeError, match="teacher"), logitstore.create(path, make_spec()) as writer:
        for s in samples[:140]:
            writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask, source_row=s.source_row)
        assert writer.n_acknowledged == 128
        raise RuntimeError("the teacher broke")
    assert not path.exists()
    with pytest.raises(FileExistsError, match=r"x\.parquet\.work holds an unfinished store; resume it"):
        logitstore.create(path, make_spec())
    with pytest.raises(FileNotFoundError, match="holds an unfinished one"):
        logitstore.open(path)
    with logitstore.create(path, make_spec(), resume=True) as writer:
        assert writer.n_acknowledged == 128
        done = writer.acknowledged
        assert done.n_tokens == sum(len(s.input_ids) for s in samples[:128])
        assert (done.last_source_row, done.n_of_last_row) == (samples[127].source_row, 2)
        for s in samples[128:]:
            writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask, source_row=s.source_row)
    for sample, written in zip(logitstore.open(path), samples, strict=True):
        assert_same(sample, written)


@pytest.mark.parametrize("shard_samples", [None, 33])
def test_an_interrupted_store_ends_up_with_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, samples, shard_samples: int | None
) -> None:
    whole, resumed = tmp_path / "whole.parquet", tmp_path / "resumed.parquet"
    write(whole, samples, shard_samples=shard_samples)
    done, attempts = 0, 0
    while not (resumed.exists() and not work_path(resumed).exists()):
        attempts += 1
        try:
            with logitstore.create(resumed, make_spec(), shard_samples=shard_samples, resume=True) as writer:
                assert writer.n_acknowledged >= done
                done = writer.n_acknowledged
                for n, s in enumerate(samples[done:]):
                    if n == 41:
                        raise RuntimeError
                    if n % 17 == 16:
                        writer.flush()
                    writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask, source_row=s.source_row)
        except RuntimeError:
            continue
    assert attempts > 3
    files = [whole] if shard_samples is None else sorted(whole.iterdir())
    for file in files:
        other = resumed if shard_samples is None else resumed / file.name
        assert file.read_bytes() == other.read_bytes()


_CHILD = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import logitstore
    from store_conftest import make_samples, make_spec
    samples = make_samples(150)
    with logitstore.create(Path({path!r}), make_spec(), shard_samples={shard_samples}, resume=True) as writer:
        start = writer.n_acknowledged
        print("from", start, flush=True)
        for i, s in enumerate(samples[start:], start):
            writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask, source_row=s.source_row)
            if i % 10 == 9:
                writer.flush()
                print("safe", writer.n_acknowledged, flush=True)
"""


def _child(tmp_path: Path, path: Path, shard_samples: int | None) -> subprocess.Popen:
    (tmp_path / "store_conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    code = textwrap.dedent(_CHILD).format(tests=str(tmp_path), path=str(path), shard_samples=shard_samples)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("shard_samples", [None, 40])
def test_kill_loses_nothing_acknowledged(tmp_path: Path, samples, shard_samples: int | None) -> None:
    """SIGKILL at random moments, until a run gets through."""
    path = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    safe = 0
    kills = int(os.environ.get("LOGITSTORE_KILLS", "6"))
    for attempt in range(kills + 1):
        child = _child(tmp_path, path, shard_samples)
        first = child.stdout.readline().split()
        assert first[0] == "from", first
        assert int(first[1]) >= safe, "an acknowledged sample is gone"
        if attempt < kills:
            time.sleep(float(rng.random() * 0.06))
            child.send_signal(signal.SIGKILL)
        rest = child.stdout.read()
        child.wait(60)
        safe = max(
            [safe, int(first[1]), *(int(line.split()[1]) for line in rest.splitlines() if line.startswith("safe"))]
        )
        if child.returncode == 0:
            break
    assert child.returncode == 0
    for sample, written in zip(logitstore.open(path), samples, strict=True):
        assert_same(sample, written)
    assert logitstore.verify(path).ok
    assert not work_path(path).exists()


def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_room(tmp_path: Path, samples) -> None:
    """A limit on the size of files stands in for the full disk: the kernel refuses the write in the same way."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.parquet"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(OSError, match="File too large"):
            write(path, samples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not path.exists()
    write(path, samples[logitstore_acknowledged(path) :], resume=True)
    for sample, written in zip(logitstore.open(path), samples, strict=True):
        assert_same(sample, written)


def logitstore_acknowledged(path: Path) -> int:
    """Samples that the next run finds; looked up by claiming the folder and letting go of it."""
    writer = logitstore.create(path, make_spec(), resume=True)
    writer.__exit__(RuntimeError, RuntimeError(), None)
    return writer.n_acknowledged


def test_two_writers_at_once_are_refused(tmp_path: Path, samples) -> None:
    path = tmp_path / "x.parquet"
    with logitstore.create(path, make_spec()) as writer:
        with pytest.raises(FileExistsError, match="another process is writing"):
            logitstore.create(path, make_spec(), resume=True)
        s = samples[0]
        writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask)
    assert len(logitstore.open(path)) == 1


def test_a_finished_store_is_not_overwritten(tmp_path: Path, samples) -> None:
    write(tmp_path / "x.parquet", samples[:3])
    with pytest.raises(FileExistsError, match="exists already"):
        logitstore.create(tmp_path / "x.parquet", make_spec(), resume=True)
    write(tmp_path / "y.parquet", samples[:3], shard_samples=2)
    with pytest.raises(FileExistsError, match="is a finished store"):
        logitstore.create(tmp_path / "y.parquet", make_spec(), shard_samples=2, resume=True)
    (tmp_path / "z.parquet").mkdir()
    (tmp_path / "z.parquet" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="a folder with files in it"):
        logitstore.create(tmp_path / "z.parquet", make_spec(), shard_samples=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "B", "teacher_sha256": "b" * 64}, r"teacher t \(SHA-256 None\), this run teacher B \(SHA-256 bbb"),
        ({"dataset": "d", "dataset_sha256": "d" * 64}, "this run dataset d"),
        ({"codec": logitstore.make_codec("topk", vocab_size=400, k=9)}, "k=6.*this run codec.*k=9"),
        ({"max_length": 7}, "max_length None, this run max_length 7"),
        ({"collection": {"max_tokens": 5}}, "this run collection max_tokens=5"),
    ],
)
def test_another_spec_on_an_unfinished_store_is_refused(tmp_path: Path, samples, change: dict, message: str) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(RuntimeError), logitstore.create(path, make_spec()) as writer:
        writer.append(0, samples[0].input_ids, samples[0].targets)
        writer.flush()
        raise RuntimeError
    with pytest.raises(logitstore.SpecMismatchError, match=message):
        logitstore.create(path, make_spec(**change), resume=True)
    with pytest.raises(FileExistsError, match="shards of None samples, this run of 5"):
        logitstore.create(path, make_spec(), shard_samples=5, resume=True)


def test_a_renamed_teacher_is_the_same_teacher(tmp_path: Path, samples) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(RuntimeError), logitstore.create(path, make_spec(), shard_samples=2) as writer:
        for s in samples[:3]:
            writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask)
        raise RuntimeError
    with logitstore.create(path, make_spec(teacher="moved/t"), shard_samples=2, resume=True) as writer:
        for s in samples[writer.n_acknowledged : 5]:
            writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask)
    store = logitstore.open(path)
    assert len(store) == 5
    assert store.spec.teacher == "t"


def test_bad_samples_are_refused_and_the_rest_is_written(tmp_path: Path, samples) -> None:
    s = samples[4]
    with logitstore.create(tmp_path / "x.parquet", make_spec()) as writer:
        with pytest.raises(ValueError, match="sample 7 has no tokens"):
            writer.append(7, s.input_ids[:0], s.targets)
        with pytest.raises(ValueError, match="loss_mask must be bool"):
            writer.append(7, s.input_ids, s.targets, s.loss_mask[:-1])
        with pytest.raises(ValueError, match="does not fit into 64 bits"):
            writer.append(2**70, s.input_ids, s.targets)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            writer.append(7, s.input_ids + 400, s.targets)
        with pytest.raises(ValueError, match="not the ones that the targets were made with"):
            writer.append(7, s.input_ids[::-1], s.targets)
        writer.append(7, s.input_ids, s.targets)
    stored = logitstore.open(tmp_path / "x.parquet")[0]
    assert stored.sample_id == 7
    assert stored.loss_mask.all()


@pytest.mark.parametrize("shard_samples", [0, -1])
def test_shard_samples_must_be_positive(tmp_path: Path, shard_samples: int) -> None:
    with pytest.raises(ValueError, match="shard_samples must be at least 1"):
        logitstore.create(tmp_path / "x.parquet", make_spec(), shard_samples=shard_samples)


def test_a_spec_whose_parts_disagree_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 400, the store of 401"):
        make_spec(vocab_size=401)
    with pytest.raises(ValueError, match="head_width 399 is below"):
        make_spec(head_width=399)


def test_old_samples_are_flushed_after_a_minute(tmp_path: Path, samples, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = [0.0]
    monkeypatch.setattr("logitstore.writer.time.monotonic", lambda: clock_s[0])
    with logitstore.create(tmp_path / "x.parquet", make_spec()) as writer:
        for s in samples[:3]:
            writer.append(s.sample_id, s.input_ids, s.targets, s.loss_mask)
            assert writer.n_acknowledged == 0
            clock_s[0] += 25
        writer.append(9, samples[3].input_ids, samples[3].targets)
        assert writer.n_acknowledged == 4
