"""`logitstore collect` from the command line: what it stores, how it goes on, what it refuses and in which words."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer.cli import main
from transformers import AutoModelForCausalLM

import logitstore
from logitstore.work_folder import work_path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """20 rows of a prompt and a completion of different lengths."""
    rows = [{"prompt": f"{i} + {i} = ", "completion": f"{2 * i}" + "!" * (i % 7)} for i in range(20)]
    return write_jsonl(tmp_path / "my prompts.jsonl", rows)


def collect(teacher: Path, dataset: Path, out: Path, *options: str) -> int:
    arguments = ["--teacher", str(teacher), "--dataset", str(dataset), "--out", str(out)]
    return main(["collect", *arguments, "--device", "cpu", "--dtype", "float32", *options])


def teacher_logprobs(teacher: Path, input_ids: np.ndarray) -> np.ndarray:
    """ln p [L, 260] in float64 from the model's own forward; the last 24 columns of its head are padding."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.from_numpy(input_ids)[None].long()).logits[0, :, :260]
    return logits.log_softmax(dim=-1).numpy()


def test_the_seed_article_s_flags_give_a_verified_store_of_the_teacher_s_distributions(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "teacher_logits.parquet"
    arguments = ["--teacher", str(teacher_folder), "--dataset", str(prompts), "--out", str(out)]
    assert main(["collect", *arguments, "--dtype", "float32"]) == 0  # auto is bfloat16 on some CPUs
    store = logitstore.open(out)
    assert len(store) == 20
    assert store.spec.vocab_size == 260
    assert store.spec.head_width == 284
    assert "284 columns" in capsys.readouterr().out
    for i in (0, 7, 19):
        sample = store[i]
        assert (sample.sample_id, sample.source_row) == (i, i)
        text = f"{i} + {i} = {2 * i}" + "!" * (i % 7)
        assert len(sample.input_ids) == len(text) + 1  # a token a byte, and EOS
        assert sample.input_ids[-1] == 0
        n_prompt = len(f"{i} + {i} = ")
        np.testing.assert_array_equal(sample.loss_mask, np.arange(len(text) + 1) >= n_prompt)
        np.testing.assert_array_equal(sample.targets.present, sample.loss_mask[1:])
        truth = teacher_logprobs(teacher_folder, sample.input_ids)[:-1][sample.targets.present]
        stored = sample.targets.dense_logprobs()[sample.targets.present]
        top = np.argsort(-truth, axis=1)[:, :64]
        error = np.take_along_axis(stored - truth, top, axis=1)
        assert np.abs(error).max() < 0.02
        kl = (np.exp(truth) * (truth - stored)).sum(axis=1)
        assert kl.max() < 0.02
    assert store.verify().ok
    assert store.tokenizer_folder is not None
    assert main(["verify", str(out)]) == 0
    assert main(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.split("\n", 2)[2].split("bytes\n", 1)[-1])
    assert facts["samples"] == 20
    assert facts["bytes_per_token"] == pytest.approx(store.blob_bytes / store.n_present_rows)
    assert main(["head", str(out), "--sample", "3", "--rows", "2"]) == 0
    assert "'6'" in capsys.readouterr().out
    assert main(["head", str(out), "--sample", "20"]) == 2
    assert "has 20 samples" in capsys.readouterr().err


@pytest.mark.parametrize("tail_step", [None, 0.3])
def test_tables_of_a_fitted_codec_are_used(
    teacher_folder: Path, prompts: Path, tmp_path: Path, tail_step: float | None, capsys: pytest.CaptureFixture
) -> None:
    plain = tmp_path / "plain.parquet"
    assert collect(teacher_folder, prompts, plain) == 0
    texts = [sample.input_ids for sample in logitstore.open(plain)]
    logits = [teacher_logprobs(teacher_folder, ids).astype(np.float32) for ids in texts]
    codec = logitstore.make_codec("topk", vocab_size=260, k=8, head="log", tail="predicted", tail_step=tail_step)
    logitstore.calibrate(codec, logits, texts).save(tmp_path / "tables")
    out = tmp_path / "fitted.parquet"
    assert collect(teacher_folder, prompts, out, "--tables", str(tmp_path / "tables")) == 0
    store = logitstore.open(out)
    assert store.verify().ok
    codec = store.spec.codec
    assert (codec.tail, codec.tail_step, codec.is_fitted) == ("predicted", tail_step, True)
    for sample, values in zip(store, logits, strict=True):
        expected = codec.targets_from_logits(values, sample.input_ids, sample.targets.present)
        present = sample.targets.present
        np.testing.assert_allclose(
            sample.targets.dense_logprobs(2.0)[present], expected.dense_logprobs(2.0)[present], atol=0.4
        )
        difference = np.abs(sample.targets.dense_logprobs(2.0) - expected.dense_logprobs(2.0))[present]
        assert difference.mean() < 0.01  # a coefficient at the edge of its interval may round the other way
    again = tmp_path / "again.parquet"
    assert collect(teacher_folder, prompts, again, "--tables", str(out)) == 0
    assert logitstore.open(again).spec.codec == codec
    capsys.readouterr()
    assert collect(teacher_folder, prompts, tmp_path / "x", "--tables", str(out), "--set", "k=3") == 2
    assert "--tables names a codec with all its options" in capsys.readouterr().err
    other = logitstore.make_codec("topk", vocab_size=50, k=4)
    logitstore.calibrate(other, np.zeros((5, 50), np.float32), np.arange(5)).save(tmp_path / "other")
    assert collect(teacher_folder, prompts, tmp_path / "x", "--tables", str(tmp_path / "other")) == 2
    assert "fitted for a vocabulary of 50, " in capsys.readouterr().err


def test_batches_do_not_change_what_is_stored(teacher_folder: Path, prompts: Path, tmp_path: Path) -> None:
    assert collect(teacher_folder, prompts, tmp_path / "a.parquet", "--batch-size", "1", "--set", "head=fp16") == 0
    assert collect(teacher_folder, prompts, tmp_path / "b.parquet", "--batch-size", "7", "--set", "head=fp16") == 0
    for a, b in zip(logitstore.open(tmp_path / "a.parquet"), logitstore.open(tmp_path / "b.parquet"), strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_allclose(a.targets.dense_logprobs(), b.targets.dense_logprobs(), atol=6e-3)


def test_a_row_with_an_empty_completion_is_skipped_and_said(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"prompt": "2 + 2 = ", "completion": completion} for completion in ("4", "", "four")]
    assert collect(teacher_folder, write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "x.parquet") == 0
    assert "3 rows -> 2 samples" in (said := capsys.readouterr().out)
    assert "1 rows skipped: the completion is empty" in said
    assert [sample.source_row for sample in logitstore.open(tmp_path / "x.parquet")] == [0, 2]
    assert collect(teacher_folder, write_jsonl(tmp_path / "d.jsonl", rows[1:2]), tmp_path / "y.parquet") == 2
    error = capsys.readouterr().err
    assert "1 rows skipped: the completion is empty); there is nothing to learn in them" in error


def test_keep_prompt_stores_every_row(teacher_folder: Path, prompts: Path, tmp_path: Path) -> None:
    assert collect(teacher_folder, prompts, tmp_path / "x.parquet", "--keep-prompt", "--set", "k=5") == 0
    sample = logitstore.open(tmp_path / "x.parquet")[4]
    assert sample.targets.present.all()
    assert not sample.loss_mask.all()


def test_generate_lets_the_teacher_complete_prompts(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dataset = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"say {i}"} for i in range(5)])
    assert collect(teacher_folder, dataset, tmp_path / "x.parquet") == 2
    assert (
        "nothing to learn; add completions, or let the teacher write them with --generate N" in capsys.readouterr().err
    )
    assert collect(teacher_folder, dataset, tmp_path / "x.parquet", "--generate", "6", "--batch-size", "2") == 0
    store = logitstore.open(tmp_path / "x.parquet")
    assert len(store) == 5
    for i, sample in enumerate(store):
        n_prompt = len(f"say {i}")
        assert n_prompt < len(sample.input_ids) <= n_prompt + 6
        # greedy: each learned token is the one that the stored row ranks first
        for t in np.flatnonzero(sample.targets.present):
            assert sample.targets.ids[sample.targets.offsets[t]] == sample.input_ids[t + 1]
    assert collect(teacher_folder, prompts_with_text(tmp_path), tmp_path / "y.parquet", "--generate", "6") == 2
    assert "--generate is for rows that are a `prompt` alone, not text" in capsys.readouterr().err


def prompts_with_text(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "t.jsonl", [{"text": "some text " * 30}, {"text": "more"}])


def test_max_tokens_and_windows(teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = prompts_with_text(tmp_path)
    assert collect(teacher_folder, dataset, tmp_path / "x.parquet", "--max-length", "64") == 0
    assert "5 windows cut from longer texts" in capsys.readouterr().out
    store = logitstore.open(tmp_path / "x.parquet")
    rows = sum(int(sample.targets.present.sum()) for sample in store)
    assert rows == (300 + 1 - 1) + (4 + 1 - 1)  # every token of a document but its first has exactly one row
    options = ("--max-length", "64", "--max-tokens", "100")
    assert collect(teacher_folder, dataset, tmp_path / "y.parquet", *options) == 0
    assert logitstore.open(tmp_path / "y.parquet").n_tokens == 128


def test_finished_it_says_so_and_other_settings_are_refused(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "x.parquet"
    assert collect(teacher_folder, prompts, out) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert collect(teacher_folder, prompts, out) == 0
    assert "finished already, 20 samples" in capsys.readouterr().out

    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    teacher = tmp_path / "teacher"
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    model.lm_head.weight.data[3] += 1
    model.save_pretrained(teacher)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (teacher_folder / name).exists():
            (teacher / name).write_bytes((teacher_folder / name).read_bytes())
    for arguments, message in [
        ((teacher_folder, other, out), "has dataset my prompts.jsonl (SHA-256"),
        ((teacher, prompts, out), f"has teacher {teacher_folder} (SHA-256"),
        ((teacher_folder, prompts, out, "--set", "k=7"), "k=64, head=int8"),
        ((teacher_folder, prompts, out, "--max-length", "50"), "max_length 512, this run max_length 50"),
    ]:
        assert collect(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "this run" in error
        assert error.count("\n") == 1
    assert out.read_bytes() == before


@pytest.mark.parametrize("shape", ["prompt+completion", "text", "generate"])
def test_interrupted_at_any_group_it_goes_on_to_the_same_store(
    teacher_folder: Path, tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ctrl-C after every few samples, until a run gets through: the store has the bytes of an uninterrupted one."""
    if shape == "text":
        dataset = write_jsonl(tmp_path / "d.jsonl", [{"text": "abcdefgh" * n} for n in (3, 20, 1, 17, 9)])
        options = ["--max-length", "32", "--batch-size", "1"]
    elif shape == "generate":
        dataset = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"say {i}"} for i in range(9)])
        options = ["--generate", "5", "--generate-temperature", "1", "--batch-size", "1"]
    else:
        rows = [{"prompt": f"{i}", "completion": "x" * (1 + i % 5)} for i in range(14)]
        dataset = write_jsonl(tmp_path / "d.jsonl", rows)
        options = ["--batch-size", "1"]
    assert collect(teacher_folder, dataset, tmp_path / "whole.parquet", *options) == 0

    real_append = logitstore.StoreWriter.append
    appended = [0]

    def append_and_interrupt(self, *args, **kwargs):
        real_append(self, *args, **kwargs)
        appended[0] += 1
        if appended[0] % 3 == 0:
            self.flush()
        if appended[0] % 4 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(logitstore.StoreWriter, "append", append_and_interrupt)
    out = tmp_path / "resumed.parquet"
    codes = []
    while not codes or codes[-1] == 1:
        codes.append(collect(teacher_folder, dataset, out, *options))
    assert codes == [1] * (len(codes) - 1) + [0]
    assert len(codes) > 2
    error = capsys.readouterr().err
    assert "interrupted with" in error
    assert f"safe in {work_path(out)}; the same command goes on from there" in error
    assert "Traceback" not in error
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_several_shards_and_resume_keeps_their_number(
    teacher_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore_trainer.collect.size.SHARD_BYTES", 8_000)
    out = tmp_path / "x.parquet"
    assert collect(teacher_folder, prompts, out) == 0
    assert out.is_dir()
    store = logitstore.open(out)
    assert len(store.shards) > 1
    assert [sample.sample_id for sample in store] == list(range(20))
    assert collect(teacher_folder, prompts, out) == 0


def test_ctrl_c_ends_in_one_line(teacher_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "a long document " * 200} for _ in range(400)]
    dataset = write_jsonl(tmp_path / "d.jsonl", rows)
    out = tmp_path / "x.parquet"
    command = [sys.executable, "-m", "logitstore_trainer", "collect", "--teacher", str(teacher_folder)]
    command += ["--dataset", str(dataset), "--out", str(out), "--max-length", "64", "--batch-size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a suite that runs in the background has SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in child.stdout:
        if line.startswith("estimate from the first"):
            break
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 1, error
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("logitstore: interrupted with")
    assert not out.exists()
    assert work_path(out).is_dir()


def test_a_full_disk_says_what_is_safe(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    out = tmp_path / "x.parquet"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
        code = collect(teacher_folder, prompts, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    error = capsys.readouterr().err
    assert code == 2
    assert "File too large" in error
    assert "Traceback" not in error
    assert collect(teacher_folder, prompts, out) == 0
    assert len(logitstore.open(out)) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "d.jsonl:2: malformed JSON"),
        ('{"text": "a"}\n{"text": null}\n', "d.jsonl:2: `text` is null, expected a string"),
        ('{"text": 3}\n', "d.jsonl:1: `text` is a number (3), expected a string"),
        ("", "d.jsonl: the dataset is empty"),
        ('{"body": "a"}\n', "found columns `body`; expected `text`"),
    ],
)
def test_a_bad_line_fails_before_the_teacher_loads(
    teacher_folder: Path, tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr("logitstore_trainer.collect.source.load_teacher", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "d.jsonl").write_text(content)
    assert collect(teacher_folder, tmp_path / "d.jsonl", tmp_path / "x.parquet") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("logitstore: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "x.parquet.work").exists()


def test_bad_arguments_are_one_line(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "x.parquet"
    encoder = tmp_path / "bert"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    for arguments, message in [
        ((tmp_path / "absent", prompts, out), "no such folder or .gguf file"),
        ((encoder, prompts, out), "not a causal language model"),
        ((teacher_folder, tmp_path / "absent.jsonl", out), "no such dataset file"),
        ((teacher_folder, prompts, tmp_path / "file" / "x.parquet"), "--out cannot be written"),
        ((teacher_folder, prompts, out, "--set", "k"), "--set takes OPTION=VALUE, got 'k'"),
        ((teacher_folder, prompts, out, "--set", "depth=3"), "no option 'depth'"),
        ((teacher_folder, prompts, out, "--set", "vocab_size=5"), "--set vocab_size is not an option"),
        ((teacher_folder, prompts, out, "--generate-temperature", "nan"), "--generate-temperature must be 0 or above"),
        ((teacher_folder, prompts, out, "--codec", "top-k"), "no codec is named 'top-k'"),
        ((teacher_folder, prompts, out, "--max-length", "100000"), "beyond the 512 positions"),
        ((teacher_folder, prompts, out, "--max-length", "8"), "the prompt fills the window"),
        ((teacher_folder, prompts, out, "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        ((teacher_folder, prompts, out, "--device", "abacus"), "--device"),
    ]:
        assert collect(*arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()


def test_an_unknown_command_or_none_shows_the_usage(capsys: pytest.CaptureFixture) -> None:
    for argv in ([], ["unknown"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert "usage: logitstore" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["collect", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "teacher_logits.parquet" in shown
    assert "8 -m logitstore_trainer collect \\\n      --teacher" in shown  # a line that can be pasted


def test_verify_of_a_damaged_store_exits_with_1(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "x.parquet"
    assert collect(teacher_folder, prompts, out) == 0
    damaged = bytearray(out.read_bytes())
    damaged[logitstore.open(out).shards[0].index.data_end - 20] ^= 4
    out.write_bytes(damaged)
    capsys.readouterr()
    assert main(["verify", str(out)]) == 1
    assert "blob does not have its checksum" in capsys.readouterr().out
    out.write_bytes(damaged[:-100])
    assert main(["verify", str(out)]) == 1
    assert main(["inspect", str(out)]) == 1
    assert "it was cut, copy it again" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "absent.parquet")]) == 2


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_verify_of_a_folder_without_shards_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str]
) -> None:
    (tmp_path / "notes.txt").write_text("no shard")
    assert main(["verify", str(tmp_path), *options]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"logitstore: {tmp_path}: a folder without .parquet files, not a store\n"
    assert printed.out == ""


def test_the_size_of_a_large_data_set_is_extrapolated(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """200 rows of 2 to 8 tokens and EOS, of which 40 are looked at."""
    monkeypatch.setattr("logitstore_trainer.collect.size.COUNTED_ROWS", 100)
    monkeypatch.setattr("logitstore_trainer.collect.size.SAMPLED_ROWS", 40)
    dataset = write_jsonl(tmp_path / "d.jsonl", [{"text": "x" * (2 + i % 7)} for i in range(200)])
    assert collect(teacher_folder, dataset, tmp_path / "x.parquet", "--set", "k=3") == 0
    printed = capsys.readouterr().out
    samples, tokens = (
        int(n.replace(",", "")) for n in re.search(r"about ([\d,]+) samples of ([\d,]+) tokens", printed).groups()
    )
    assert samples == 200
    assert tokens == pytest.approx(logitstore.open(tmp_path / "x.parquet").n_tokens, rel=0.1)


def test_killed_after_the_last_shard_it_is_finished(
    teacher_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("logitstore_trainer.collect.size.SHARD_BYTES", 8_000)
    out = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("logitstore.work_folder.WorkFolder.remove", lambda self: None)
        assert collect(teacher_folder, prompts, out) == 0
    assert work_path(out).is_dir()
    assert collect(teacher_folder, prompts, out) == 0
    assert "finished already, 20 samples" in capsys.readouterr().out
    assert not work_path(out).exists()


def test_a_run_that_failed_before_its_first_group_claims_nothing(
    teacher_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "logitstore_trainer.collect.source.load_teacher", lambda *a, **k: (_ for _ in ()).throw(ValueError("no"))
        )
        assert collect(teacher_folder, prompts, tmp_path / "x.parquet") == 2
    assert work_path(tmp_path / "x.parquet").is_dir()
    assert collect(teacher_folder, prompts, tmp_path / "x.parquet", "--set", "k=5") == 0
    assert logitstore.open(tmp_path / "x.parquet").spec.codec.k == 5


def test_another_generation_config_is_another_collection_of_generated_completions_only(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    to_complete = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"say {i}"} for i in range(3)])
    runs = [(to_complete, tmp_path / "generated.parquet", "--generate", "4"), (prompts, tmp_path / "given.parquet")]
    for run in runs:
        assert collect(teacher, *run) == 0
    file = teacher / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [0, 70]}))
    capsys.readouterr()
    assert collect(teacher, *runs[0]) == 2
    assert "generation_config_sha256=" in capsys.readouterr().err
    assert collect(teacher, *runs[1]) == 0
    assert "finished already" in capsys.readouterr().out
    generated, given = (logitstore.open(run[1]).spec for run in runs)
    assert generated.teacher_sha256 == given.teacher_sha256  # still stores of one teacher


def test_generated_completions_stay_within_the_window(teacher_folder: Path, tmp_path: Path) -> None:
    dataset = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x" * n} for n in (3, 20, 28, 29)])
    options = ("--generate", "10", "--max-length", "32")
    assert collect(teacher_folder, dataset, tmp_path / "x.parquet", *options) == 0
    lengths = [len(sample.input_ids) for sample in logitstore.open(tmp_path / "x.parquet")]
    assert all(n <= 32 for n in lengths)
    assert len(lengths) == 4


def test_another_chat_template_is_another_collection(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    dataset = write_jsonl(tmp_path / "m.jsonl", [{"messages": messages}])
    assert collect(teacher_folder, dataset, tmp_path / "x.parquet") == 0
    copy = tmp_path / "teacher"
    shutil.copytree(teacher_folder, copy)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n", "assistant \\n"))
    assert collect(copy, dataset, tmp_path / "x.parquet") == 2
    assert "chat_template_sha256" in capsys.readouterr().err
