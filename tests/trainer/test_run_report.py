"""What a run shows and leaves: its line of progress, its history over a resumption, and run_report.html."""

import dataclasses
import importlib.util
import re

import pytest
from interrupted_run import STUDENT, InterruptAt
from logitstore_trainer import progress
from logitstore_trainer.cli import main
from logitstore_trainer.report import Plot, cell_text, render_html
from logitstore_trainer.run_report import run_sections
from logitstore_trainer.train import TrainConfig, train
from transformers import TrainerCallback

ENVIRONMENT = {"torch": "2.13.0", "gpu": None}


@pytest.fixture
def config(store_path, tmp_path):
    """Eleven steps; logs after 1, 5 and 10, checkpoints after 3, 6, 9 and 11."""
    return TrainConfig(
        student=STUDENT, data=[str(store_path)], out=str(tmp_path / "out"), steps=11, batch_size=2, device="cpu",
        save_every=3, log_every=5, seed=11, eval_fraction=0.25, eval_every=4,
    )  # fmt: skip


def test_the_history_of_a_resumed_run_is_that_of_a_whole_one(config, tmp_path):
    """Steps between two logs of which a checkpoint lies in the middle, and the last one, are in the history."""
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAt(8)])
    resumed = train(dataclasses.replace(config, resume=True))
    names = ("step", "loss", "kl", "ce", "n_tokens", "learning_rate", "eval_loss", "eval_kl", "eval_ce")
    histories = [[[entry.get(name) for name in names] for entry in one["history"]] for one in (whole, resumed)]
    assert histories[0] == histories[1]
    assert [entry["step"] for entry in resumed["history"] if "kl" in entry] == [1, 3, 5, 6, 9, 10, 11]
    assert resumed["n_tokens"] == whole["n_tokens"] > 0
    assert resumed["steps"] == 11
    for one in (whole, resumed):
        logged = [entry for entry in one["history"] if "kl" in entry]
        tokens = [0, *(entry["n_tokens"] for entry in logged)]
        seconds = [0.0, *(entry["train_s"] for entry in logged)]
        for i, entry in enumerate(logged):
            rate = (tokens[i + 1] - tokens[i]) / (seconds[i + 1] - seconds[i])
            assert entry["tokens_per_s"] == pytest.approx(rate, rel=1e-6)
        assert (one["n_tokens"], one["train_s"]) == (tokens[-1], seconds[-1])
        assert one["tokens_per_s"] == pytest.approx(tokens[-1] / seconds[-1])
    drawn = [
        [part.svg for part in run_sections(one, recipe="", environment=ENVIRONMENT)[1].body] for one in (whole, resumed)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 3


def test_tokens_and_seconds_of_a_run_that_only_had_to_save_are_those_of_its_steps(config, monkeypatch):
    from logitstore_trainer import training_run

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "write_run_report", interrupt)
        with pytest.raises(KeyboardInterrupt, match="interrupted at step 11, checkpoint-11 is kept"):
            train(config)
    metrics = train(dataclasses.replace(config, resume=True))
    assert metrics["n_tokens"] > 0
    assert metrics["tokens_per_s"] == pytest.approx(metrics["n_tokens"] / metrics["train_s"])


def test_the_page_holds_figures_settings_and_versions_and_nothing_else_is_needed(config, store, tmp_path):
    metrics = train(config)
    text = (tmp_path / "out" / "run_report.html").read_text(encoding="utf-8")
    shown = [metrics[name] for name in ("loss", "kl", "ce", "eval_loss", "eval_kl", "eval_ce", "n_tokens", "train_s")]
    shown += [metrics["held_out"][name] for name in ("perplexity", "kl_store_nats", "n_tokens")]
    for value in shown:
        assert f">{cell_text(value)}</td>" in text
    assert f"{metrics['held_out']['top1_agreement']:.1%}" in text
    recipe = (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8")
    assert '<pre tabindex="0"># Every setting of this run' in text
    assert "log_every: 5\n" in recipe
    assert all(line in text for line in recipe.splitlines() if "'" not in line)
    assert ">transformers</td>" in text
    assert text.count("<svg ") == 5
    for label in ("KL at T = 2 (nats per token)", "tokens/s", "learning rate", "held out"):
        assert f">{label}</text>" in text
    assert set(re.findall(r'(\S+)="https?://', text)) <= {"xmlns", "xmlns:xlink"}
    assert not re.search(r"<(script|link|img|iframe|object)|@import|src=", text)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_run_without_held_out_text_or_with_another_divergence_has_a_page_too(config, tmp_path):
    train(dataclasses.replace(config, eval_fraction=0.0, loss="tvd", temperature=1.0, steps=1))
    text = (tmp_path / "out" / "run_report.html").read_text(encoding="utf-8")
    assert "held out" not in text
    assert ">total variation at T = 1</text>" in text
    assert "0.7 * T^2 * total variation + 0.3 * cross-entropy" in text


def history(n_logs):
    """A made-up history whose loss and rate are known at every step."""
    return [
        {"step": i + 1, "loss": float(i), "kl": 1.0, "ce": 2.0, "learning_rate": 1e-3, "n_tokens": i,
         "train_s": i + 1.0, "tokens_per_s": 10.0}
        for i in range(n_logs)
    ]  # fmt: skip


def made_up_metrics(n_logs):
    config = {
        "loss": "forward_kl",
        "temperature": 2.0,
        "alpha": 0.7,
        "out": "o",
        "student": "5M",
        "data": ["a/b.parquet"],
    }
    last = history(n_logs)[-1]
    run = {
        "steps": n_logs,
        "epoch": 1.0,
        "n_tokens": last["n_tokens"],
        "train_s": last["train_s"],
        "tokens_per_s": 10.0,
    }
    parts = {name: last[name] for name in ("loss", "kl", "ce")}
    return {**parts, **run, "n_parameters": 7, "config": config, "history": history(n_logs)}


def test_a_long_run_is_drawn_in_few_points_that_are_means_and_says_so():
    metrics = [made_up_metrics(n) for n in (200, 1001)]
    metrics[1]["history"] += [{"step": 500, "eval_loss": 1.0, "eval_kl": 0.5, "eval_ce": 2.0}]
    few, many = (run_sections(each, recipe="", environment=ENVIRONMENT) for each in metrics)
    plots = [
        [part for section in sections for part in section.body if isinstance(part, Plot)] for sections in (few, many)
    ]
    assert {plot.caption for plot in plots[0]} == {""}
    assert {plot.caption for plot in plots[1]} == {'Each point of "training" is the mean of 6 logs.'}
    assert all(len(plot.svg) < 40_000 for plot in plots[1])
    assert len(render_html("t", many)) < 250_000


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: what the clock of the progress display says."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Tick(TrainerCallback):
    """A step takes six seconds."""

    def __init__(self, clock):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        self.clock[0] += 6.0


def test_a_line_of_progress_has_steps_time_left_loss_with_its_parts_and_the_rate(config, capsys, clock):
    train(dataclasses.replace(config, eval_fraction=0.0, temperature=3.0), callbacks=[Tick(clock)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    number = r"[\d.]+"
    figures = rf"; loss {number}, KL at T = 3 {number}, CE {number}, [\d,]+ tokens/s, lr {number}e[-+]\d+"
    assert re.fullmatch(rf"train: 2/11 \(18 %\) steps, 0.1667 steps/s, 12 s, 00:54 left{figures}", lines[0])
    assert re.fullmatch(rf"train: 11/11 \(100 %\) steps, 0.1667 steps/s, 66 s{figures}", lines[-1])
    assert len(lines) == 6
    assert len({line.split(";")[1] for line in lines}) == 5  # the logs of 1, 3, 6 (twice), 10 and 11


def test_the_progress_of_a_resumed_run_counts_the_steps_of_the_whole_run(config, capsys, clock):
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAt(8)])
    capsys.readouterr()
    train(dataclasses.replace(config, resume=True), callbacks=[Tick(clock)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert lines[0] == "train: 8/11 (73 %) steps, 0.1667 steps/s, 12 s, 00:18 left"  # nothing is logged before 9
    assert lines[-1].startswith("train: 11/11 (100 %) steps, 0.1667 steps/s, 30 s; loss ")


def test_held_out_figures_of_the_last_step_are_taken_once_and_within_the_training(config):
    """Reporters that close their run when training ends would begin another one for what is logged later."""
    seen = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.extend(name for name in ("kl", "eval_kl") if name in logs)

        def on_train_end(self, args, state, control, **kwargs):
            seen.append("end")

    metrics = train(dataclasses.replace(config, eval_every=11), callbacks=[Log()])
    assert seen[-3:] == ["kl", "eval_kl", "end"]
    assert seen.count("eval_kl") == 1
    last = [entry for entry in metrics["history"] if "eval_kl" in entry][-1]
    assert (last["step"], last["eval_kl"]) == (11, metrics["eval_kl"])


def test_several_reporters_are_named_with_commas(store_path, tmp_path, capsys):
    arguments = ["train", "--student", STUDENT, "--data", str(store_path), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--report-to", "tensorboard, ghost"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("logitstore: --report-to tensorboard, ghost cannot be used: ghost is not supported, only ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_reporter_that_is_not_installed_is_one_line_before_anything_is_read(name, tmp_path, capsys):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    arguments = [
        "train",
        "--student",
        STUDENT,
        "--data",
        str(tmp_path / "none.parquet"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--report-to", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"logitstore: --report-to {name} cannot be used: ")
    assert f"requires {name} to be installed" in error
    assert error.endswith("; name another, or none\n")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tensorboard_gets_the_loss_its_parts_and_the_rate(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = train(dataclasses.replace(config, report_to="tensorboard", steps=3, log_every=1))
    events = EventAccumulator(str(next((tmp_path / "out" / "runs").iterdir())))
    events.Reload()
    for name in ("loss", "kl", "ce", "tokens_per_s"):
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        logged = [(entry["step"], entry[name]) for entry in metrics["history"] if "kl" in entry]
        assert [step for step, _ in written] == [step for step, _ in logged] == [1, 2, 3]
        assert [value for _, value in written] == pytest.approx([value for _, value in logged], rel=1e-6)
    assert events.Scalars("eval/kl")[-1].value == pytest.approx(metrics["eval_kl"], rel=1e-6)


def test_wandb_gets_the_loss_its_parts_and_the_rate(config, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    metrics = train(dataclasses.replace(config, report_to="wandb", steps=3, log_every=1))
    try:
        last = dict(wandb.run.summary)
    finally:
        wandb.finish()
    logged = [entry for entry in metrics["history"] if "kl" in entry][-1]
    for name in ("loss", "kl", "ce", "tokens_per_s"):
        assert last[f"train/{name}"] == pytest.approx(logged[name], rel=1e-6)
    assert last["eval/kl"] == pytest.approx(metrics["eval_kl"], rel=1e-6)
    assert last["train/global_step"] == 3
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_trackio_gets_the_loss_its_parts_and_the_rate(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    metrics = train(dataclasses.replace(config, report_to="trackio", steps=3, log_every=1))
    (project,) = SQLiteStorage.get_projects()
    (run,) = SQLiteStorage.get_runs(project)
    written = [row for row in SQLiteStorage.get_logs(project, run) if "train/kl" in row]
    logged = [entry for entry in metrics["history"] if "kl" in entry]
    assert len(written) == len(logged) == 3
    (held_out,) = [row for row in SQLiteStorage.get_logs(project, run) if "eval/kl" in row]
    assert held_out["eval/kl"] == pytest.approx(metrics["eval_kl"], rel=1e-6)
    for row, entry in zip(written, logged, strict=True):
        for name in ("loss", "kl", "ce", "tokens_per_s"):
            assert row[f"train/{name}"] == pytest.approx(entry[name], rel=1e-6)
