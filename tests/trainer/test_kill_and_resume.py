"""SIGKILL at steps and inside a checkpoint, then --resume: losses and weights are bit for bit those of a whole run.

The student has dropout, so that the random state matters as well as optimizer, schedule and order of samples.
"""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

RUNS = """
import dataclasses, os, signal, sys
from logitstore_trainer.train import TrainConfig, train
import logitstore_trainer.training_run
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def __init__(self, event, step):
        self.event, self.step = event, step
    def _kill(self, event, state):
        if (event, state.global_step) == (self.event, self.step):
            os.kill(os.getpid(), signal.SIGKILL)
    def on_step_end(self, args, state, control, **kwargs):
        self._kill("step", state)
    def on_save(self, args, state, control, **kwargs):
        self._kill("save", state)

def in_child(config, *callbacks):
    pid = os.fork()
    if pid == 0:
        train(config, callbacks=callbacks)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)

config = TrainConfig(student=sys.argv[1], data=[sys.argv[2]], out=sys.argv[3] + "/whole", steps=8, batch_size=1,
                     grad_accum=2, device="cpu", save_every=3, log_every=1, seed=11, lr=1e-2)
assert in_child(config) == 0
for name in sys.argv[4:]:
    event, step = name.split("-")
    killed = dataclasses.replace(config, out=sys.argv[3] + "/" + name)
    assert in_child(killed, Kill(event, int(step))) == signal.SIGKILL, name
    assert not os.path.exists(killed.out + "/model.safetensors")
    assert in_child(dataclasses.replace(killed, resume=True)) == 0, name
"""
KILLED_AT = ("step-1", "step-4", "step-7", "save-6")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_resumes_to_the_same_bits(store_path, new_student, tokenizer, tmp_path):
    student = new_student(2)
    student.config.attention_dropout = 0.2
    student.save_pretrained(str(tmp_path / "student"))
    tokenizer.save_pretrained(str(tmp_path / "student"))
    command = [sys.executable, "-c", RUNS, str(tmp_path / "student"), str(store_path), str(tmp_path), *KILLED_AT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, losses = load_file(tmp_path / "whole" / "model.safetensors"), _losses(tmp_path / "whole")
    assert len(losses) == 8
    for name in KILLED_AT:
        resumed = load_file(tmp_path / name / "model.safetensors")
        assert all(resumed[key].equal(value) for key, value in whole.items()), name
        assert _losses(tmp_path / name) == losses, name


def _losses(out):
    history = json.loads((out / "train_metrics.json").read_text())["history"]
    return [(entry["step"], entry["loss"], entry["kl"], entry["ce"]) for entry in history if "kl" in entry]
