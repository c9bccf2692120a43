"""`logitstore collect` with codecs that are fitted first: chosen for a goal, or named; and what a later run does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from logitstore_trainer.cli import main
from transformers import AutoModelForCausalLM

import logitstore
from logitstore.tables import tables_path
from logitstore.work_folder import work_path


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of the planner's configurations are enough for a tiny teacher."""
    fitted = {"head": "log", "head_step": 0.5, "k": 64, "min_prob": 0.002}
    monkeypatch.setattr("logitstore_trainer.plan.plan.UNFITTED", ({"k": 8}, {"k": 64}))
    monkeypatch.setattr("logitstore_trainer.plan.plan.RESIDUAL", (fitted,))
    monkeypatch.setattr("logitstore_trainer.plan.plan.PREDICTED", ({**fitted, "tail": "predicted", "tail_step": 0.13},))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i} + {i} = ", "completion": f"{2 * i}" + "!" * (i % 7)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def collect(teacher: Path, dataset: Path, out: Path, *options: str) -> int:
    arguments = ["--teacher", str(teacher), "--dataset", str(dataset), "--out", str(out)]
    return main(["collect", *arguments, "--device", "cpu", "--dtype", "float32", *options])


def mean_kl(store: logitstore.LogitStore, teacher: Path) -> float:
    """KL(teacher || store) at T = 1 over the present rows, in float64 from the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    kl, n_rows = 0.0, 0
    for sample in store:
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.input_ids)[None].long()).logits[0, :-1, :260]
        present = sample.targets.present
        log_p = logits.log_softmax(-1).numpy()[present]
        kl += float((np.exp(log_p) * (log_p - sample.targets.dense_logprobs()[present])).sum())
        n_rows += int(present.sum())
    return kl / n_rows


def never(*args, **kwargs):
    pytest.fail("it planned, or fitted, again")


def test_auto_says_what_it_chose_and_the_store_keeps_to_the_goal(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.parquet"
    tables_before_the_first_shard = []

    def create(*args, **kwargs):
        assert not out.exists()
        writer = real_create(*args, **kwargs)
        tables_before_the_first_shard.extend(tables_path(out).glob("*.safetensors"))
        return writer

    real_create = logitstore.create
    monkeypatch.setattr(logitstore, "create", create)
    assert collect(teacher_folder, prompts, out, "--codec", "auto", "--max-kl", "0.004", "--tokens", "1e9") == 0
    said = capsys.readouterr().out
    assert "choosing a codec on 230 rows of 40 texts spread over prompts.jsonl: a KL of at most 0.004 nats" in said
    assert "chosen in " in said
    assert "1,000,000,000 tokens take " in said
    assert "warning: fitted to only 187 rows; a fitted codec gets better with more" in said
    store = logitstore.open(out)
    codec = store.spec.codec
    assert (codec.tail, codec.tail_step) == ("predicted", 0.13)
    assert [path.stem for path in tables_before_the_first_shard] == [codec.tables_sha256]
    assert store.verify().ok
    assert mean_kl(store, teacher_folder) < 0.004
    assert dict(store.spec.collection)["max_kl"] == 0.004


def test_of_what_reaches_the_goal_auto_takes_what_this_collection_takes_least_for(
    teacher_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """230 rows: tables of half a megabyte would be nearly all of the store."""
    out = tmp_path / "x.parquet"
    assert collect(teacher_folder, prompts, out, "--codec", "auto", "--max-kl", "0.004") == 0
    store = logitstore.open(out)
    assert (store.spec.codec.k, store.spec.codec.is_fitted) == (64, False)
    assert mean_kl(store, teacher_folder) < 0.004


def test_auto_for_a_size_takes_the_least_kl_in_it(teacher_folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    assert collect(teacher_folder, prompts, out, "--codec", "auto", "--max-bytes-per-token", "45") == 0
    store = logitstore.open(out)
    assert (store.spec.codec.tail, store.spec.codec.tail_step) == ("predicted", 0.13)  # k = 8 takes less than 45, too
    assert store.blob_bytes / store.n_present_rows < 45
    assert store.verify().ok


def test_a_later_run_reads_the_tables_and_another_goal_is_refused(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted behind the first row group; then every run but the first must not plan."""
    goal = ("--codec", "auto", "--max-kl", "0.004", "--tokens", "1e9", "--batch-size", "1")
    assert collect(teacher_folder, prompts, tmp_path / "whole.parquet", *goal) == 0
    out = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("logitstore_trainer.collect.teacher_run.FLUSH_SECONDS", -1.0)
        append, appended = logitstore.StoreWriter.append, []

        def interrupted(self, *args, **kwargs):
            if len(appended) == 9:
                raise KeyboardInterrupt
            appended.append(args[0])
            return append(self, *args, **kwargs)

        patch.setattr("logitstore.writer.StoreWriter.append", interrupted)
        assert collect(teacher_folder, prompts, out, *goal) == 1
    assert list(work_path(out).glob("group-*.parquet"))
    monkeypatch.setattr("logitstore_trainer.collect.codec_choice.make_plan", never)
    monkeypatch.setattr("logitstore_trainer.collect.codec_choice.draw_sample", never)
    capsys.readouterr()
    same = ("--max-kl", "0.004", "--tokens", "1e9")
    others = (("--max-kl", "0.02"), ("--max-bytes-per-token", "40"), (*same, "--plan-rows", "50"))
    for other in others:
        assert collect(teacher_folder, prompts, out, "--codec", "auto", *other) == 2
        error = capsys.readouterr().err
        assert f"the unfinished store in {work_path(out)} has collection" in error
        assert error.count("\n") == 1
    assert "has collection no plan_rows, this run collection plan_rows=50; " in error
    assert collect(teacher_folder, prompts, out, *goal) == 0
    assert "going on behind " in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert collect(teacher_folder, prompts, out, *goal) == 0
    assert "finished already" in capsys.readouterr().out
    assert collect(teacher_folder, prompts, out, "--codec", "auto", "--max-kl", "0.02", "--tokens", "1e9") == 2
    assert f"{out} has collection max_kl=0.004, this run collection max_kl=0.02; choose" in capsys.readouterr().err
    assert collect(teacher_folder, prompts, out, "--set", "head=log") == 2
    error = capsys.readouterr().err
    assert "head=log, tail=predicted, " in error
    assert "this run codec name=topk, vocab_size=260, k=64, head=log, tail=residual; choose" in error


def test_without_its_tables_a_later_run_says_which_are_missing_or_damaged(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, options = tmp_path / "x.parquet", ("--set", "head=log", "--set", "k=4")
    assert collect(teacher_folder, prompts, out, *options) == 0
    (tables,) = tables_path(out).glob("*.safetensors")
    content = bytearray(tables.read_bytes())
    content[-3] ^= 1
    tables.write_bytes(content)
    assert collect(teacher_folder, prompts, out, *options) == 1
    assert "copy them again" in capsys.readouterr().err
    tables.unlink()
    assert collect(teacher_folder, prompts, out, *options) == 2
    assert f"{tables} are missing; copy the folder along" in capsys.readouterr().err


def test_a_run_that_stored_nothing_claims_nothing(
    teacher_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*args):
        raise ValueError("before the first row group")

    out, goal = tmp_path / "x.parquet", ("--codec", "auto", "--max-bytes-per-token", "45")
    with monkeypatch.context() as patch:
        patch.setattr("logitstore_trainer.collect.teacher_run.choose_forward", stops)
        assert collect(teacher_folder, prompts, out, *goal) == 2
        assert "predicted" in (work_path(out) / "plan.json").read_text()
        patch.setattr("logitstore_trainer.collect.codec_choice.make_plan", never)  # for the same goal nothing is fitted
        assert collect(teacher_folder, prompts, out, *goal) == 2
    assert collect(teacher_folder, prompts, out, "--codec", "auto", "--max-kl", "0.01") == 0
    assert logitstore.open(out).spec.codec.k == 8


def test_a_plan_that_found_no_codec_gives_no_tables(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert collect(teacher_folder, prompts, tmp_path / "x.parquet", "--tables", str(tmp_path)) == 2
    assert f"--tables {tmp_path} holds a plan without a codec: nothing reached its goal" in capsys.readouterr().err


def test_a_goal_that_nothing_reaches_is_one_line_and_leaves_nothing(
    teacher_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "x.parquet"
    assert collect(teacher_folder, prompts, out, "--codec", "auto", "--max-kl", "1e-9") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no configuration reaches a KL of at most 1e-09 nats at T = 1; the nearest: predicted, p >= 0.002" in error
    assert error.endswith("logitstore plan --teacher ... --dataset ...")
    assert not out.exists()
    assert not work_path(out).exists()
    assert not tables_path(out).exists()


@pytest.mark.parametrize(
    ("options", "tail"),
    [
        (["--set", "head=log", "--set", "min_prob=0.001"], "residual"),
        (["--set", "head=sqrtp", "--set", "k=9"], "residual"),
        (["--set", "tail=predicted", "--set", "k=9"], "predicted"),
        (["--set", "head=log", "--set", "tail=predicted", "--set", "tail_step=0.2", "--set", "k=9"], "predicted"),
        (["--set", "head=log", "--set", "k=100"], "residual"),
        (["--set", "head=log", "--set", "tail=predicted", "--set", "k=100"], "predicted"),
    ],
    ids=lambda value: "-".join(value[1::2]) if isinstance(value, list) else value,
)
def test_a_named_codec_that_needs_tables_is_fitted_first(
    teacher_folder: Path,
    prompts: Path,
    tmp_path: Path,
    options: list[str],
    tail: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "x.parquet"
    assert collect(teacher_folder, prompts, out, *options) == 0
    said = capsys.readouterr().out
    assert "fitting the codec to 230 rows of 40 texts spread over prompts.jsonl" in said
    assert f"of tables in {tables_path(out)}" in said
    store = logitstore.open(out)
    assert (store.spec.codec.tail, store.spec.codec.is_fitted) == (tail, True)
    assert store.verify().ok
    plain = tmp_path / "plain.parquet"
    k = store.spec.codec.k
    assert collect(teacher_folder, prompts, plain, "--set", f"k={k}") == 0
    assert store.blob_bytes < logitstore.open(plain).blob_bytes
    assert mean_kl(store, teacher_folder) < mean_kl(logitstore.open(plain), teacher_folder) * 1.2 + 0.01
    monkeypatch.setattr("logitstore_trainer.collect.codec_choice.draw_sample", never)
    capsys.readouterr()
    assert collect(teacher_folder, prompts, out, *options) == 0
    assert "finished already" in capsys.readouterr().out
    assert collect(teacher_folder, prompts, out, *options, "--set", "k=10") == 2
    error = capsys.readouterr().err
    assert f"k={k}" in error
    assert "this run codec" in error
    assert "k=10" in error


def test_prompts_that_the_teacher_completes_are_planned_for_too(teacher_folder: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "p.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(9)))
    out = tmp_path / "x.parquet"
    goal = ("--codec", "auto", "--max-kl", "0.05", "--temperature", "2", "--tokens", "1e9", "--generate", "6")
    assert collect(teacher_folder, dataset, out, *goal, "--keep-prompt") == 0
    assert logitstore.open(out).verify().ok
    collection = dict(logitstore.open(out).spec.collection)
    assert (collection["goal_temperature"], collection["goal_tokens"]) == (2.0, 1e9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codec", "auto"], "--codec auto needs a goal: --max-kl NATS or --max-bytes-per-token B"),
        (["--max-kl", "0.1"], "--max-kl and --max-bytes-per-token are for --codec auto; add it, or leave them out"),
        (["--codec", "auto", "--max-kl", "0.1", "--set", "k=3"], "--codec auto chooses all options; leave out --set"),
        (["--codec", "auto", "--max-kl", "0.1", "--tables", "t"], "--tables names a codec with all its options"),
        (["--codec", "auto", "--max-kl", "-1"], "--max-kl must be above 0, got -1.0"),
        (["--codec", "auto", "--max-kl", "0.1", "--plan-rows", "0"], "--plan-rows must be at least 1, got 0"),
        (["--plan-rows", "9"], "--plan-rows is for codecs that are fitted first: --codec auto, head=log, tail=predict"),
        (["--temperature", "2"], "--temperature belongs to a goal: add --max-kl or --max-bytes-per-token"),
        (["--tokens", "2"], "--tokens belongs to a goal: add --max-kl or --max-bytes-per-token"),
        (["--set", "tail=predicted", "--set", "depth=3"], "no option 'depth'"),
        (["--set", "head=log", "--set", "head_step=-1"], "head_step"),
    ],
)
def test_bad_arguments_are_one_line(
    teacher_folder: Path, prompts: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert collect(teacher_folder, prompts, tmp_path / "x.parquet", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.parametrize(("name", "message"), [("x.txt", "ends in '.txt', expected .parquet or no ending"), ("x", "")])
def test_a_store_s_name_ends_in_parquet_or_not_at_all(
    teacher_folder: Path, prompts: Path, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert collect(teacher_folder, prompts, tmp_path / name) == (2 if message else 0)
    assert message in capsys.readouterr().err
    assert (tmp_path / name).exists() == (not message)


def test_one_text_is_too_few_to_choose_on(teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = tmp_path / "p.jsonl"
    dataset.write_text('{"text": "only one"}\n')
    assert collect(teacher_folder, dataset, tmp_path / "x.parquet", "--codec", "auto", "--max-kl", "0.1") == 2
    assert "p.jsonl gives one text; a plan fits on some and measures on others" in capsys.readouterr().err
