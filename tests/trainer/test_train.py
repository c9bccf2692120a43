"""`logitstore train`: what it writes, how it resumes, and what it refuses."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted_run import STUDENT, InterruptAt
from logitstore_kernels.reference import distillation_loss_reference
from logitstore_trainer import TeacherDecoder, checkpoints, collate
from logitstore_trainer.collator import next_token_labels
from logitstore_trainer.collect.teacher import choose_dtype
from logitstore_trainer.evaluate import evaluate_student
from logitstore_trainer.student import build_student
from logitstore_trainer.train import TrainConfig, add_arguments, config_of_arguments, run, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import logitstore


@pytest.fixture
def config(store_path, tmp_path):
    """Eight steps over 1.3 epochs of twelve samples, in micro-batches of two and one."""
    return TrainConfig(
        student=STUDENT, data=[str(store_path)], out=str(tmp_path / "out"), steps=8, batch_size=1, grad_accum=2,
        device="cpu", save_every=3, log_every=1, seed=11,
    )  # fmt: skip


def weights(out):
    return load_file(out / "model.safetensors")


def test_trains_evaluates_and_saves(config, store, slow_loss, tmp_path):
    first = build_student(STUDENT, store, seed=config.seed).model.eval()
    metrics = train(dataclasses.replace(config, eval_fraction=0.25, eval_every=4, batch_size=9, steps=20, lr=3e-2))
    out = tmp_path / "out"
    order = torch.randperm(12, generator=torch.Generator().manual_seed(config.seed)).tolist()
    held_out, learned = sorted(order[:3]), sorted(order[3:])
    before = slow_loss(first, [store[i] for i in learned])
    assert metrics["history"][0]["loss"] == pytest.approx(before.loss, rel=1e-5)
    assert metrics["loss"] < 0.8 * before.loss
    assert metrics["loss"] == pytest.approx(2.8 * metrics["kl"] + 0.3 * metrics["ce"], rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(str(out)).eval()
    after = slow_loss(model, [store[i] for i in held_out])
    assert metrics["eval_loss"] == pytest.approx(after.loss, rel=1e-5)
    assert metrics["held_out"]["loss_nats"] == pytest.approx(after.ce, rel=1e-5)
    again = evaluate_student(model, torch.utils.data.Subset(store, held_out), batch_size=9)
    for name in ("n_tokens", "kl_store_nats", "top1_agreement"):
        assert metrics["held_out"][name] == pytest.approx(getattr(again, name), rel=1e-5)
    assert [entry["step"] for entry in metrics["history"] if "eval_loss" in entry] == [4, 8, 12, 16, 20]
    assert metrics["n_tokens"] == 20 * sum(len(store[i].input_ids) for i in learned)
    assert metrics["tokens_per_s"] == pytest.approx(metrics["n_tokens"] / metrics["train_s"])
    assert 0 < metrics["train_s"] < metrics["wall_s"]
    assert json.loads((out / "train_metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["config"]["student"] == STUDENT
    assert AutoTokenizer.from_pretrained(str(out)).get_vocab()["w5"] == 5
    assert not list(out.glob("*partial*"))


def test_alpha_zero_learns_from_the_labels_alone(config, store, slow_loss):
    metrics = train(dataclasses.replace(config, alpha=0.0, steps=2))
    assert [entry["loss"] for entry in metrics["history"] if "kl" in entry] == pytest.approx(
        [entry["ce"] for entry in metrics["history"] if "kl" in entry], rel=1e-6
    )


@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_an_interrupted_run_resumes_to_the_same_bits(config, tmp_path, stop_at):
    """Stopped before the first checkpoint, in the first epoch behind one, and in the second epoch."""
    train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt) as caught:
        train(config, callbacks=[InterruptAt(stop_at)])
    kept = {1: "no checkpoint", 5: "checkpoint-3 is kept", 7: "checkpoint-6 is kept"}[stop_at]
    assert str(caught.value).startswith(f"interrupted at step {stop_at}, {kept}")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    metrics = train(dataclasses.replace(config, resume=True))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [[entry["loss"] for entry in m["history"] if "kl" in entry] for m in (
        metrics, json.loads((tmp_path / "whole" / "train_metrics.json").read_text()))]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_a_half_written_checkpoint_is_ignored_and_removed(config, tmp_path):
    train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAt(4)])
    out = tmp_path / "out"
    half = out / "checkpoint-4"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\0" * 100)
    assert checkpoints.last_complete_checkpoint(out) == out / "checkpoint-3"
    train(dataclasses.replace(config, resume=True))
    assert not half.exists()
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def stopped(config):
    """The folder of a run that was stopped behind its second checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAt(7)])
    return Path(config.out)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("optimizer.pt", "is damaged .*as where it was cut"),
        ("scheduler.pt", "is damaged"),
        ("rng_state.pth", "is damaged"),
        ("model.safetensors", "is damaged .*not fully covered"),
        ("trainer_state.json", "is damaged .no JSON: "),
    ],
)
def test_a_cut_checkpoint_is_named_and_the_one_before_goes_on(config, stopped, name, problem):
    cut = stopped / "checkpoint-6" / name
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(logitstore.CorruptionError) as caught:
        train(dataclasses.replace(config, resume=True))
    assert re.match(f"{re.escape(str(cut))} {problem}", str(caught.value))
    advice = f"delete the folder {cut.parent}, and --resume goes on from checkpoint-3"
    assert str(caught.value).endswith(advice)
    assert "\n" not in str(caught.value)
    shutil.rmtree(cut.parent)
    assert train(dataclasses.replace(config, resume=True))["steps"] == 8


def test_a_checkpoint_with_other_bytes_or_without_a_file_is_named(config, stopped):
    optimizer = stopped / "checkpoint-6" / "optimizer.pt"
    whole = bytearray(optimizer.read_bytes())
    middle = len(whole) // 2
    optimizer.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(logitstore.CorruptionError, match=r"optimizer.pt is damaged \(the checksum of .* is wrong\)"):
        train(dataclasses.replace(config, resume=True))
    optimizer.write_bytes(whole)
    (stopped / "checkpoint-6" / "scheduler.pt").unlink()
    shutil.rmtree(stopped / "checkpoint-3")
    with pytest.raises(logitstore.CorruptionError, match=r"scheduler.pt is missing.* --resume starts anew"):
        train(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b"[1]"])
def test_a_cut_file_of_the_run_is_named(config, stopped, content):
    metrics, settings = stopped / "train_metrics.json", stopped / "train_config.json"
    metrics.write_bytes(content)
    with pytest.raises(
        logitstore.CorruptionError, match=f"{re.escape(str(metrics))} is damaged .*; delete it, and --resume"
    ):
        train(dataclasses.replace(config, resume=True))
    settings.write_bytes(content)
    with pytest.raises(
        logitstore.CorruptionError, match=f"{re.escape(str(settings))} is damaged .*or choose another folder"
    ):
        train(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize("warmup", [0.05, 1.0, 0.0])
def test_a_run_of_one_step_trains(config, store, warmup):
    train(dataclasses.replace(config, steps=1, warmup=warmup))
    before = build_student(STUDENT, store, seed=config.seed).model.state_dict()
    changed = [name for name, value in weights(Path(config.out)).items() if not value.equal(before[name])]
    assert len(changed) == len(weights(Path(config.out)))


class InterruptInsideSave(TrainerCallback):
    """Ctrl-C after Trainer wrote a checkpoint's model, before its marker."""

    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_ctrl_c_while_saving_leaves_nothing_half_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.MarkComplete, "on_save", InterruptInsideSave.on_save)
    with pytest.raises(KeyboardInterrupt, match="no checkpoint had been written yet"):
        train(config)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["recipe.yaml", "train_config.json"]


def test_ctrl_c_while_the_final_model_is_saved(config, tmp_path, monkeypatch):
    """All steps are done: resuming only saves, and the logged losses are still there."""
    train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_json", _interrupt_at_the_metrics(checkpoints.write_json))
        with pytest.raises(KeyboardInterrupt, match="interrupted at step 8, checkpoint-8 is kept"):
            train(config)
    metrics = train(dataclasses.replace(config, resume=True))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    finished = json.loads((tmp_path / "whole" / "train_metrics.json").read_text())
    assert (metrics["kl"], metrics["steps"]) == (finished["kl"], 8)


def _interrupt_at_the_metrics(write_json):
    def write(path, value):
        if path.name == checkpoints.METRICS_NAME:
            raise KeyboardInterrupt
        write_json(path, value)

    return write


def test_a_finished_run_is_not_repeated(config, tmp_path, capsys):
    metrics = train(dataclasses.replace(config, steps=2))
    model = tmp_path / "out" / "model.safetensors"
    written_ns = model.stat().st_mtime_ns
    again = train(dataclasses.replace(config, steps=2, resume=True), callbacks=[InterruptAt(1)])
    assert again == json.loads(json.dumps(metrics))
    assert "finished: nothing to do" in capsys.readouterr().err
    assert model.stat().st_mtime_ns == written_ns


def test_resuming_with_other_settings_is_refused_naming_both(config):
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAt(2)])
    with pytest.raises(logitstore.SpecMismatchError, match=r"alpha was 0.7, is 0.5; lr was None, is 0.1"):
        train(dataclasses.replace(config, resume=True, lr=0.1, alpha=0.5))


def test_resuming_with_another_store_is_refused(config, new_store, store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAt(2)])
    other = new_store(tmp_path / "other.parquet", dataset_sha256="beef", tokenizer_sha256=store.spec.tokenizer_sha256)
    with pytest.raises(logitstore.SpecMismatchError, match="dataset_sha256 was None, is 'beef'"):
        train(dataclasses.replace(config, resume=True, data=[str(other)]))


def test_a_folder_in_use_is_refused(config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no training run"):
        train(config)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    train(dataclasses.replace(config, steps=1))
    with pytest.raises(ValueError, match="continue it with --resume, or choose another folder"):
        train(dataclasses.replace(config, steps=1))


def test_several_stores_are_one_data_set(config, store_path, new_store, store, tmp_path):
    other = new_store(tmp_path / "b.parquet", seed=5, tokenizer_sha256=store.spec.tokenizer_sha256)
    both = dataclasses.replace(config, data=[str(store_path), str(other)], steps=None, batch_size=4, grad_accum=1)
    metrics = train(both)
    assert metrics["steps"] == 6
    assert metrics["n_tokens"] == store.n_tokens + logitstore.open(other).n_tokens


def test_a_student_of_another_family_is_refused(config, new_student, other_tokenizer, tmp_path):
    folder = tmp_path / "qwen"
    new_student(3).save_pretrained(str(folder))
    other_tokenizer.save_pretrained(str(folder))
    with pytest.raises(
        logitstore.SpecMismatchError, match="the student's tokenizer .* is not that of the store's teacher"
    ):
        train(dataclasses.replace(config, student=str(folder)))
    assert not Path(config.out).exists()
    assert train(dataclasses.replace(config, steps=1))["steps"] == 1  # the folder is still free


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"--alpha 1.5 must lie in \[0, 1\]"),
        ({"temperature": 0.0}, r"--temperature 0.0 must be above 0"),
        ({"steps": 0}, "--steps 0 must be above 0"),
        ({"seed": -1}, r"--seed -1 must lie in \[0, 2\^32\)"),
        ({"seed": 1 << 32}, "--seed 4294967296 must lie in"),
        ({"eval_fraction": 1.0}, r"--eval-fraction 1.0 must lie"),
        ({"eval_fraction": 0.1, "eval_data": "x"}, "exclude each other"),
        ({"dtype": "fp8"}, "--dtype 'fp8' is not one of auto, bfloat16, float32"),
        ({"data": "x.parquet"}, "must be a list"),
        ({"data": ["x.parquet", ""]}, "data has an empty path"),
        ({"student": ""}, "student is empty, expected a name or a path"),
        ({"out": " "}, "out is empty"),
        ({"eval_data": ""}, "eval_data is empty"),
        ({"save_every": -1}, "must not be negative"),
        ({"tail": "ghost"}, "--tail 'ghost' is not one of"),
    ],
)
def test_settings_that_make_no_run_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, **settings))


def test_a_missing_store_is_refused_before_the_folder_is_made(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no store at .*missing\.parquet"):
        train(dataclasses.replace(config, data=[str(tmp_path / "missing.parquet")]))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(config):
    with pytest.raises(ValueError, match="--device cuda: this PyTorch sees no such device"):
        train(dataclasses.replace(config, device="cuda"))


def test_the_command_line_has_the_defaults_of_the_config(config, store_path, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    required = ["--student", STUDENT, "--data", str(store_path), "--out", str(tmp_path / "cli")]
    args = parser.parse_args(required)
    expected = TrainConfig(student=STUDENT, data=[str(store_path)], out=str(tmp_path / "cli"))
    assert config_of_arguments(args) == expected
    args = parser.parse_args([*required, "--steps", "3", "--device", "cpu", "--eval-fraction", "0.2", "--lr", "0.01"])
    assert run(args) == 0
    printed = capsys.readouterr().out
    assert "3 steps of" in printed
    assert re.search(
        r"training, last logged: loss [\d.]+, KL at T = 2 \(without its factor T\^2\) [\d.]+, cross-entropy", printed
    )
    assert "held out: cross-entropy" in printed
    assert "KL(stored teacher || student) at T = 1" in printed
    assert (tmp_path / "cli" / "model.safetensors").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_whoever_may_read_the_configuration_may_read_the_weights(config, umask):
    before = os.umask(umask)
    try:
        train(dataclasses.replace(config, steps=1))
    finally:
        os.umask(before)
    for path in Path(config.out).iterdir():
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_dtypes_have_a_short_and_a_long_name_in_both_commands(config):
    for short, long in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        assert dataclasses.replace(config, dtype=short) == dataclasses.replace(config, dtype=long)
        assert choose_dtype(short, torch.device("cpu")) == choose_dtype(long, torch.device("cpu")) == long
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    required = ["--student", STUDENT, "--data", "x", "--out", "y"]
    assert parser.parse_args([*required, "--dtype", "fp32"]).dtype == "float32"
    assert parser.parse_args([*required, "--dtype", "bfloat16"]).dtype == "bfloat16"


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import argparse, sys; from logitstore_trainer.train import add_arguments; "
        "p = argparse.ArgumentParser(); add_arguments(p); p.format_help(); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


FULL_DISK = """
import resource, sys
from logitstore_trainer.train import TrainConfig, train
import logitstore_trainer.training_run
for limit_bytes in map(int, sys.argv[4:]):
    out = f"{sys.argv[3]}-{limit_bytes}"
    config = TrainConfig(student=sys.argv[1], data=[sys.argv[2]], out=out, steps=2, device="cpu", save_every=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        train(config)
    except OSError as error:
        print("OSError:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file there")
def test_a_disk_that_takes_no_more_is_one_line(store_path, tmp_path):
    """The model is 97 kB, the optimizer state twice that: the limit meets the one, then the other."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL_DISK, STUDENT, str(store_path), str(out), "50000", "120000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2
    for line, limit_bytes in zip(lines, (50000, 120000), strict=True):
        folder = f"{out}-{limit_bytes}"
        assert line.startswith(f"OSError: cannot write to {folder}, is the disk full?")
        assert checkpoints.last_complete_checkpoint(tmp_path / f"out-{limit_bytes}") is None


def test_a_tail_that_there_is_not_is_refused_before_the_folder_is_claimed(store_path, tmp_path, capsys):
    from logitstore_trainer.cli import main

    out = tmp_path / "student"
    arguments = ["train", "--student", "llama:layers=1,width=32,heads=1", "--data", str(store_path), "--out", str(out)]
    assert main([*arguments, "--tail", "ghost"]) == 2
    assert "--tail 'ghost' is not one of bucket, uniform" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--tail", "dense"]) == 2
    assert "tail='dense' is not for a store of codec 'topk'; use tail='bucket'" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("nonesuch", "nonesuch is not supported, only "), ("absent", "AbsentCallback requires absent to be installed")],
)
def test_a_reporter_that_there_is_not_is_one_line_before_the_student(
    store_path, tmp_path, capsys, monkeypatch, name, message
):
    from logitstore_trainer.cli import main
    from transformers.integrations import integration_utils

    def absent():
        raise RuntimeError("AbsentCallback requires absent to be installed. Run `pip install absent`.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "absent", absent)
    out = tmp_path / "student"
    assert (
        main(["train", "--student", "./none", "--data", str(store_path), "--out", str(out), "--report-to", name]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith(f"logitstore: --report-to {name} cannot be used: {message}")
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_reporter_gets_what_is_logged(config, monkeypatch):
    from transformers.integrations import integration_utils

    logged = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ours", Reporter)
    metrics = train(dataclasses.replace(config, steps=2, report_to="ours"))
    assert [entry["kl"] for entry in logged if "kl" in entry] == [
        entry["kl"] for entry in metrics["history"] if "kl" in entry
    ]
    assert metrics["config"]["report_to"] == "ours"


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd", "tvd"])
def test_other_divergences_train(config, store, loss):
    batch = collate(list(store))
    with torch.no_grad():
        logits_NV = build_student(STUDENT, store, seed=config.seed).model.eval()(
            batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.flatten(0, 1)  # fmt: skip
    before = distillation_loss_reference(
        logits_NV, TeacherDecoder(store)(batch), next_token_labels(batch["labels"]), alpha=1.0,
        divergence=loss, jsd_beta=0.3,
    )  # fmt: skip
    settings = {"loss": loss, "jsd_beta": 0.3, "alpha": 1.0, "steps": 20, "batch_size": 12, "grad_accum": 1, "lr": 3e-2}
    metrics = train(dataclasses.replace(config, **settings))
    assert metrics["history"][0]["loss"] == pytest.approx(before.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(4 * metrics["kl"], rel=1e-4)
    assert metrics["loss"] < 0.9 * before.item()


def test_a_divergence_that_does_not_go_with_the_tail_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="divergence='tvd' is not defined for tail='dropped'"):
        train(dataclasses.replace(config, loss="tvd", tail="dropped"))
    with pytest.raises(ValueError, match="--loss 'kl' is not one of forward_kl, reverse_kl, jsd, tvd"):
        train(dataclasses.replace(config, loss="kl"))
    with pytest.raises(ValueError, match=r"--jsd-beta 1.0 must lie in \(0, 1\)"):
        train(dataclasses.replace(config, jsd_beta=1.0))
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_is_stopped_and_saves_nothing_of_it(config, tmp_path):
    """The weights that such a run would save are NaN, and transformers' Trainer logs its loss as 0."""
    with pytest.raises(ValueError, match=r"the loss up to step \d is nan: .*lower --lr \(its peak is 1e\+30\)"):
        train(dataclasses.replace(config, lr=1e30, warmup=0, steps=8, save_every=8))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["recipe.yaml", "train_config.json"]


def test_a_student_whose_weights_are_no_numbers_is_said_to_be_at_fault(config, new_student, tokenizer, tmp_path):
    student = new_student(2)
    with torch.no_grad():
        student.model.norm.weight[0] = torch.nan
    student.save_pretrained(str(tmp_path / "student"))
    tokenizer.save_pretrained(str(tmp_path / "student"))
    with pytest.raises(ValueError, match=r"the loss of the first step is nan, .*: check the student"):
        train(dataclasses.replace(config, student=str(tmp_path / "student")))


@pytest.mark.parametrize("n_samples", [0, 2])
def test_data_in_which_nothing_is_to_be_learned_is_refused_before_anything_is_trained(
    config, store, store_path, tmp_path, n_samples
):
    path = tmp_path / "nothing.parquet"
    with logitstore.create(path, store.spec) as writer:
        for sample in (store[i] for i in range(n_samples)):
            nothing = np.zeros(len(sample.input_ids), dtype=bool)
            writer.append(sample.sample_id, sample.input_ids, sample.targets, loss_mask=nothing)
    problem = f"nothing to measure on, none of the tokens of {n_samples} samples is to be learned"
    with pytest.raises(ValueError, match=problem):
        train(dataclasses.replace(config, eval_data=str(path)))
    with pytest.raises(ValueError, match="leaves no sample|nothing to train on, none of the tokens of 2 samples"):
        train(dataclasses.replace(config, data=[str(path)]))
    assert not (tmp_path / "out").exists()
    train(dataclasses.replace(config, data=[str(path), str(store_path)], steps=1))  # some of it is enough
