"""A run that goes on with another number of processes takes the steps it would have taken: same samples and losses."""

import json
import os
import subprocess
import sys

import pytest
from logitstore_trainer import DistillationTrainer
from logitstore_trainer.loss_hook import distill
from logitstore_trainer.recipe import noted_samples_per_step
from logitstore_trainer.step_shape import StepShape, shared_step
from logitstore_trainer.train import TrainConfig, train
from transformers import Trainer, TrainingArguments

from logitstore.errors import SpecMismatchError

RUNS = """
import dataclasses, json, os, signal, socket, sys
import torch
from logitstore_trainer.hf_trainer import DistillationTrainer
from logitstore_trainer.train import TrainConfig, train
from transformers import TrainerCallback

torch.set_num_threads(1)

class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            torch.distributed.barrier() if torch.distributed.is_initialized() else None
            os.kill(os.getpid(), signal.SIGKILL)

def record_samples(path):
    step = DistillationTrainer.training_step
    def recorded(self, model, inputs, *args, **kwargs):
        with open(path, "a") as file:
            for ids, keep in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()):
                row = [i for i, k in zip(ids, keep) if k]
                file.write(json.dumps([self.state.global_step + 1, row]) + chr(10))
        return step(self, model, inputs, *args, **kwargs)
    DistillationTrainer.training_step = recorded

def run(config, n_processes, name, *callbacks):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(n_processes):
        pid = os.fork()
        if pid == 0:
            if n_processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_processes),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            record_samples(f"{config.out}.{name}.{rank}.jsonl")
            code = 1
            try:
                train(config, callbacks=callbacks)
                code = 0
            except Exception as error:
                print(repr(error), file=sys.stderr, flush=True)
            os._exit(code)
        children.append(pid)
    ends = [os.waitpid(pid, 0)[1] for pid in children]
    return [os.WTERMSIG(end) if os.WIFSIGNALED(end) else -os.WEXITSTATUS(end) for end in ends]

student, store, folder, batch_size, first, second, stop_at = sys.argv[1:4] + [int(word) for word in sys.argv[4:]]
config = TrainConfig(student=student, data=[store], out=folder + "/whole", epochs=2, batch_size=batch_size * first,
                     device="cpu", save_every=2, log_every=1, seed=11, lr=1e-2)
assert run(config, 1, "whole") == [0]
config = dataclasses.replace(config, out=folder + "/elastic", batch_size=batch_size)
assert run(config, first, "first", KillAt(stop_at)) == [signal.SIGKILL] * first
assert run(dataclasses.replace(config, resume=True), second, "second") == [0] * second
"""


LATE_RANK = """
import os, socket, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from logitstore_trainer.checkpoints import MarkComplete, last_complete_checkpoint

out = Path(sys.argv[1])
folder = out / "checkpoint-3"
folder.mkdir()
is_first = os.fork() != 0
torch.distributed.init_process_group("gloo", f"file://{out}/meet", rank=0 if is_first else 1, world_size=2)
args, state = SimpleNamespace(output_dir=out), SimpleNamespace(is_world_process_zero=is_first, global_step=3)
if not is_first:
    time.sleep(0.5)
    assert last_complete_checkpoint(out) is None
    (folder / "rng_state_1.pth").touch()
MarkComplete().on_save(args, state, None)
if is_first:
    assert (folder / "rng_state_1.pth").exists()
    assert last_complete_checkpoint(out) == folder
    raise SystemExit(os.waitpid(-1, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_checkpoint_is_complete_once_every_process_has_written_its_part(tmp_path):
    command = [sys.executable, "-c", LATE_RANK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("batch_size", "first", "second", "stop_at"), [(2, 2, 1, 3), (2, 1, 2, 5), (3, 2, 1, 3)])
def test_a_run_goes_on_with_another_number_of_processes(
    store, store_path, new_student, tokenizer, tmp_path, batch_size, first, second, stop_at
):
    """Killed in the first epoch (the last case: in the second), a step behind its checkpoint."""
    new_student(2).save_pretrained(str(tmp_path / "student"))
    tokenizer.save_pretrained(str(tmp_path / "student"))
    numbers = [str(number) for number in (batch_size, first, second, stop_at)]
    command = [sys.executable, "-c", RUNS, str(tmp_path / "student"), str(store_path), str(tmp_path), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    n_samples = batch_size * first
    for name, n_processes in (("whole", 1), ("elastic", second)):
        recipe = tmp_path / name / "recipe.yaml"
        assert f"# here steps of {n_samples} samples on {n_processes} process" in recipe.read_text()
        assert noted_samples_per_step(recipe) == n_samples
    assert f"takes steps of {n_samples} samples: {second} processes share them" in done.stderr

    whole = _samples_of_steps(tmp_path, "whole.whole", store)
    before, after = (_samples_of_steps(tmp_path, f"elastic.{name}", store) for name in ("first", "second"))
    checkpoint = stop_at - stop_at % 2
    assert sorted(before) == list(range(1, stop_at + 1))
    assert min(after) == checkpoint + 1
    taken = {step: samples for step, samples in before.items() if step <= checkpoint} | after
    assert taken == whole
    steps_per_epoch = len(store) // n_samples
    for epoch in range(2):
        steps = range(1 + epoch * steps_per_epoch, 1 + (epoch + 1) * steps_per_epoch)
        assert sorted(sample for step in steps for sample in taken[step]) == list(range(len(store)))

    expected, losses = _losses(tmp_path / "whole"), _losses(tmp_path / "elastic")
    assert len(losses) == 2 * steps_per_epoch
    assert losses == [pytest.approx(loss, rel=1e-4) for loss in expected]


def _samples_of_steps(folder, name, store):
    """{step: numbers of the samples that all processes together took in it, in rising order}."""
    number_of = {tuple(sample.input_ids.tolist()): i for i, sample in enumerate(store)}
    taken = {}
    for path in sorted(folder.glob(f"{name}.*.jsonl")):
        for line in path.read_text().splitlines():
            step, ids = json.loads(line)
            taken.setdefault(step, []).append(number_of[tuple(ids)])
    return {step: sorted(samples) for step, samples in taken.items()}


def _losses(out):
    history = json.loads((out / "train_metrics.json").read_text())["history"]
    return [(entry["step"], entry["loss"], entry["kl"], entry["ce"]) for entry in history if "kl" in entry]


@pytest.mark.parametrize(
    ("n_samples", "n_processes", "largest_batch", "expected"),
    [
        (8, 1, 4, StepShape(4, 2, 1)),
        (8, 4, 4, StepShape(2, 1, 4)),
        (24, 2, 8, StepShape(6, 2, 2)),
        (6, 2, 8, StepShape(3, 1, 2)),
        (14, 2, 4, StepShape(1, 7, 2)),
    ],
)
def test_a_step_is_shared_in_the_largest_batches_that_fit(n_samples, n_processes, largest_batch, expected):
    assert shared_step(n_samples, n_processes, largest_batch) == expected
    assert expected.n_samples == n_samples


def test_processes_that_cannot_share_a_step_are_refused(store_path, new_student, tokenizer, tmp_path, monkeypatch):
    new_student(2).save_pretrained(str(tmp_path / "student"))
    tokenizer.save_pretrained(str(tmp_path / "student"))
    config = dict(student=str(tmp_path / "student"), data=[str(store_path)], out=str(tmp_path / "out"), device="cpu")
    train(TrainConfig(**config, steps=1, batch_size=2))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ValueError, match=r"steps of 2 samples, which 3 processes cannot share .* one of 1, 2 processes"
    ):
        train(TrainConfig(**config, steps=1, batch_size=2, resume=True))


def test_trainer_itself_refuses_a_checkpoint_of_steps_of_another_size(store, new_student, tmp_path):
    def trainer(batch_size, grad_accum, by_hook=False, **settings):
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=grad_accum, **settings,
        )  # fmt: skip
        if not by_hook:
            return DistillationTrainer(model=new_student(2), args=args, train_dataset=store)
        hooked = Trainer(model=new_student(2), args=args, train_dataset=store)
        distill(hooked)
        return hooked

    trainer(2, 1).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    message = r"step 2 is of steps of 2 samples, this run takes 4 \(batch size 2 \* accumulation 2 \* 1 processes\)"
    for options in ({}, {"by_hook": True}, {"restore_callback_states_from_checkpoint": True}):
        with pytest.raises(SpecMismatchError, match=message):
            trainer(2, 2, **options).train(resume_from_checkpoint=checkpoint)
    assert trainer(1, 2).train(resume_from_checkpoint=checkpoint).global_step == 4
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    values = json.loads(state.read_text())
    del values["stateful_callbacks"]["SamplesPerStep"]
    state.write_text(json.dumps(values))
    assert trainer(2, 2).train(resume_from_checkpoint=checkpoint).global_step == 4  # one that does not say it
