"""`logitstore collect` as several processes: the store of one process, whatever is killed and however many go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer.cli import main
from logitstore_trainer.collect.ranks import Rank, rank_of_process
from logitstore_trainer.collect.shared_collection import unit_order
from logitstore_trainer.devices import device_of_process

import logitstore
from logitstore.work_folder import work_path

TIMEOUT_S = 600


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 texts, of 1 to 13 windows of 16 tokens: 5 units, of several row groups each."""
    rows = [{"text": f"{i} " + "abcdefgh" * (1 + i * 7 % 25)} for i in range(150)]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


def words(teacher: Path, dataset: Path, out: Path, *options: str) -> list[str]:
    running = ["--device", "cpu", "--dtype", "float32", "--batch-size", "1", "--max-length", "16"]
    return ["collect", "--teacher", str(teacher), "--dataset", str(dataset), "--out", str(out), *running, *options]


def started(arguments: list[str], **environment: str) -> subprocess.Popen:
    """A process of the command with these variables beside the tests' own."""
    return subprocess.Popen(
        [sys.executable, "-m", "logitstore_trainer", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def ended(process: subprocess.Popen) -> str:
    output, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, error
    return output


@pytest.fixture(scope="module")
def whole(teacher_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process writes, as fresh as the ranks: what is saved of a tokenizer hangs on its past."""
    out = tmp_path_factory.mktemp("whole") / "x.parquet"
    ended(started(words(teacher_folder, texts, out)))
    return out


def test_ranks_that_are_killed_and_gone_on_with_by_another_number_write_the_bytes_of_one_process(
    teacher_folder: Path, texts: Path, whole: Path, tmp_path: Path
) -> None:
    """Three of torchrun's, one of which is killed while the others go on to their end; all of them; two of an array."""
    out = tmp_path / "x.parquet"
    arguments = words(teacher_folder, texts, out)
    units = work_path(out) / "units"

    def wait_for(pattern: str) -> None:
        stop_s = time.monotonic() + TIMEOUT_S
        while not any(units.glob(pattern)):
            assert time.monotonic() < stop_s
            time.sleep(0.01)

    ranks = [started(arguments, RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank)) for rank in range(3)]
    wait_for("*.parquet.work/group-*.parquet")
    for process in ranks:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    acknowledged = {file: file.stat().st_mtime_ns for file in units.glob("*.work/group-*.parquet")}
    assert acknowledged
    with pytest.raises(FileNotFoundError, match="holds an unfinished one, finish it first"):
        logitstore.open(out)
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_MAX": "8"}
    ranks = [started(arguments, SLURM_ARRAY_TASK_ID=str(7 + rank), **array) for rank in range(2)]
    wait_for("*.lock")
    assert all(not file.exists() or file.stat().st_mtime_ns == time for file, time in acknowledged.items())
    said = [ended(process) for process in ranks]
    assert "rank 0 of 2: " in said[0]
    assert any("units are done: joining them" in output for output in said)
    ends = (" rows at ", "units still with other ranks: ", "finished already")
    assert all(any(end in output for end in ends) for output in said)
    assert out.read_bytes() == whole.read_bytes()
    assert not work_path(out).exists()
    assert main(["verify", str(out)]) == 0


def test_the_others_do_what_a_killed_rank_has_begun_and_a_rank_that_is_started_twice_does_no_harm(
    teacher_folder: Path, texts: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.parquet"
    arguments = words(teacher_folder, texts, out)
    ranks = [started([*arguments, "--rank", str(rank), "--ranks", "2"], RANK="5", WORLD_SIZE="9") for rank in (0, 1, 1)]
    stop_s = time.monotonic() + TIMEOUT_S
    while not any((work_path(out) / "units").glob("*.parquet")):
        assert time.monotonic() < stop_s
        time.sleep(0.01)
    ranks[0].send_signal(signal.SIGKILL)
    ranks[0].communicate()
    for process in ranks[1:]:
        assert "rank 1 of 2: " in ended(process)
    if not out.exists():  # the killed one held the last unit until both others had passed it
        assert main([*arguments, "--rank", "0", "--ranks", "1"]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not work_path(out).exists()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, n_samples: int) -> None:
    """Ctrl-C once, after so many samples, of which every third is acknowledged."""
    real_append = logitstore.StoreWriter.append
    appended = [0]

    def append(self, *args, **kwargs) -> None:
        real_append(self, *args, **kwargs)
        appended[0] += 1
        if appended[0] % 3 == 0:
            self.flush()
        if appended[0] == n_samples:
            raise KeyboardInterrupt

    monkeypatch.setattr(logitstore.StoreWriter, "append", append)


RANK = ("--rank", "1", "--ranks", "3")


@pytest.mark.parametrize("shape", ["text", "max-tokens", "generate"])
@pytest.mark.parametrize(("first", "second"), [((), RANK), (RANK, ()), (RANK, RANK)])
def test_one_process_and_several_go_on_with_what_the_other_began(
    teacher_folder: Path,
    tmp_path: Path,
    shape: str,
    first: tuple[str, ...],
    second: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Interrupted within the windows of a text; one rank alone does the units of all."""
    monkeypatch.setattr("logitstore_trainer.collect.unit_rows.MIN_UNIT_ROWS", 3)
    monkeypatch.setattr("logitstore_trainer.collect.size.SHARD_BYTES", 20_000)
    rows = [{"text": f"{i}" + "abcdefgh" * (1 + 5 * i % 9)} for i in range(14)]
    options: tuple[str, ...] = ()
    if shape == "generate":
        rows = [{"prompt": f"say {i}"} for i in range(14)]
        options = ("--generate", "5", "--generate-temperature", "1")
    if shape == "max-tokens":
        options = ("--max-tokens", "300")
    dataset = write_jsonl(tmp_path / "d.jsonl", rows)
    whole, out = tmp_path / "whole.parquet", tmp_path / "x.parquet"
    assert main(words(teacher_folder, dataset, whole, *options)) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        assert main(words(teacher_folder, dataset, out, *options, *first)) == 1
    assert f"samples done; what was done is safe in {work_path(out)}" in capsys.readouterr().err
    assert main(words(teacher_folder, dataset, out, *options, *second)) == 0
    said = capsys.readouterr().out
    assert ("units of rows" in said) == bool(first or second)
    files = [whole] if whole.is_file() else sorted(whole.iterdir())
    assert len(files) == (len(list(out.iterdir())) if out.is_dir() else 1)
    for file in files:
        assert file.read_bytes() == (out / file.name if out.is_dir() else out).read_bytes()
    assert not work_path(out).exists()
    assert main(words(teacher_folder, dataset, out, *options, *second)) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_codec_is_fitted_beforehand_and_its_tables_are_there_once(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("logitstore_trainer.collect.unit_rows.MIN_UNIT_ROWS", 2)
    dataset = write_jsonl(tmp_path / "d.jsonl", [{"text": f"{i} and some more"} for i in range(9)])
    out = tmp_path / "x.parquet"
    for options in (("--codec", "auto", "--max-kl", "0.5"), ("--set", "head=log")):
        assert main(words(teacher_folder, dataset, out, *options, *RANK)) == 2
        error = capsys.readouterr().err
        assert "3 ranks would each fit a codec of their own; make one first, with logitstore plan --out DIR" in error
        assert error.count("\n") == 1
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 260, 200).astype(np.int32)
    codec = logitstore.make_codec("topk", vocab_size=260, k=8, head="log")
    logits = rng.standard_normal((200, 260)).astype(np.float32) * 3
    logitstore.calibrate(codec, logits, ids).save(tmp_path / "tables")
    tables = ("--tables", str(tmp_path / "tables"))
    assert main(words(teacher_folder, dataset, tmp_path / "whole.parquet", *tables)) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert main(words(teacher_folder, dataset, out, *tables, *RANK)) == 1
    assert list(work_path(out).rglob("*.safetensors")) == []
    assert main(words(teacher_folder, dataset, out, *tables, *RANK)) == 0
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert logitstore.open(out).verify().ok


def test_what_ranks_refuse_is_one_line(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a prompt longer than the window"}] * 3)
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": f"{i} and some more"} for i in range(9)])
    out = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert main(words(teacher_folder, texts, out, *RANK)) == 1
    capsys.readouterr()
    for arguments, message in [
        (
            (prompts, tmp_path / "a.parquet", "--generate", "4", "--max-tokens", "9", *RANK),
            "--max-tokens with --generate",
        ),
        ((prompts, tmp_path / "b.parquet", "--generate", "4", *RANK), "no row of the data set gave a sample"),
        ((texts, out, "--set", "k=5", *RANK), f"the unfinished store in {work_path(out)} has codec"),
        ((texts, out, "--set", "k=5"), f"the unfinished store in {work_path(out)} has codec"),
        ((texts, out, "--rank", "1"), "--rank and --ranks go together"),
        ((texts, out, "--rank", "3", "--ranks", "3"), "--rank 3 of --ranks 3: expected 0 to one below the number"),
    ]:
        assert main(words(teacher_folder, *arguments)) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(words(teacher_folder, texts, out)) == 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(5, 8, 1)),
        ({"RANK": "5"}, Rank(0, 1, 0)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}, Rank(3, 4, 3)),
        ({"SLURM_NTASKS": "4"}, Rank(0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Rank(1, 2, 0)),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4"}, Rank(0, 4, 0)),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, Rank(3, 4, 0)),
        # --array=1-9:4
        (
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "4",
            },
            Rank(1, 3, 0),
        ),
        # --array=2,30: numbers without a step
        ({"SLURM_ARRAY_TASK_ID": "30", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "2"}, Rank(0, 2, 0)),
        # an array of 3 tasks, each of which starts 8 processes
        (
            {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "RANK": "7", "WORLD_SIZE": "8"},
            Rank(23, 24, 0),
        ),
    ],
)
def test_the_rank_is_that_of_the_launcher(environment: dict[str, str], expected: Rank) -> None:
    assert rank_of_process(environment) == expected
    assert rank_of_process(environment, 1, 2) == Rank(1, 2, expected.local)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "a", "WORLD_SIZE": "2"}, "the environment has RANK='a', expected a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2: expected 0 to one below"),
        (
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "2"},
            "SLURM_ARRAY_TASK_ID 1 of SLURM_ARRAY_TASK_COUNT 2 from SLURM_ARRAY_TASK_MIN 2 in steps of 1 is no place",
        ),
    ],
)
def test_an_environment_that_makes_no_rank_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_of_process(environment)


@pytest.mark.parametrize(("n_units", "count"), [(0, 3), (1, 3), (10, 3), (7, 7), (64, 5)])
def test_every_unit_is_in_the_order_of_every_rank_and_first_in_that_of_one(n_units: int, count: int) -> None:
    orders = [unit_order(n_units, Rank(index, count)) for index in range(count)]
    assert all(sorted(order) == list(range(n_units)) for order in orders)
    shares = [order[: len(range(index, n_units, count))] for index, order in enumerate(orders)]
    assert sorted(number for share in shares for number in share) == list(range(n_units))


def test_a_process_takes_the_gpu_of_its_place_on_the_machine() -> None:
    assert [device_of_process(device, 3) for device in ("cpu", "mps", "cuda:1")] == ["cpu", "mps", "cuda:1"]
    n_gpus = torch.cuda.device_count()
    for device in ("auto", "cuda"):
        assert device_of_process(device, 3) == (f"cuda:{3 % n_gpus}" if n_gpus else device)
