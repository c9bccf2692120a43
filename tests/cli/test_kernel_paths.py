"""`logitstore kernels`: the paths that it prints are those that a call takes."""

import json

import pytest
import torch
from logitstore_kernels.dispatch import paths_on, why_not_the_kernel
from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_trainer.cli import main
from logitstore_trainer.devices import choose_device


def path_of_a_call() -> str:
    teacher = TeacherBatch.from_topk(
        torch.tensor([[3]]), torch.tensor([[-1.0]]), torch.tensor([-0.5]), torch.tensor([0.1]), vocab_size=64
    )
    refusal = why_not_the_kernel(torch.zeros(1, 64), teacher, LossTerms(2.0, 0.7, "bucket", True, True))
    return "triton" if refusal is None else "pytorch"


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_the_printed_path_is_the_one_taken(capsys, monkeypatch, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert main(["kernels", "--device", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    loss = next(path for path in facts["operations"] if path["operation"] == "distillation_loss")
    assert loss["path"] == path_of_a_call() == ("triton" if interpret == "1" else "pytorch")
    assert facts["device"] == "cpu"
    assert facts["torch"] == torch.__version__


def test_the_table_names_every_operation_with_its_reason(capsys):
    assert main(["kernels", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for path in paths_on(torch.device("cpu")):
        line = next(line for line in out.splitlines() if line.split()[:1] == [path.operation])
        assert path.path in line
        assert line.endswith(path.reason)


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert main(["kernels", "--device", "abacus"]) == 2
    assert "--device is 'abacus', expected auto, cpu, cuda" in capsys.readouterr().err


def test_without_a_device_it_is_the_fastest_there_is(capsys):
    assert main(["kernels"]) == 0
    assert capsys.readouterr().out.startswith(f"device {choose_device('auto').type}")
