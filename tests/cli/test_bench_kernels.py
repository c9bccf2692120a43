"""`bench kernels`: checks that can fail, bytes counted by hand, memory of calls whose memory is known."""

import argparse
import json

import pytest
import torch
from logitstore_trainer.bench import kernels
from logitstore_trainer.bench.loss_candidates import (
    ALPHA,
    DENSE,
    EAGER,
    LOSSES,
    OURS,
    Case,
    LossInputs,
    bytes_needed,
    relative_errors,
    value_and_gradient,
)
from logitstore_trainer.bench.memory import peak_extra_bytes
from logitstore_trainer.cli import main

CPU = torch.device("cpu")
MIB = 2**20


def test_measured_rows_hold_size_times_bytes_and_memory(tmp_path):
    cases = (Case(8, 500, 1.0, "float32"), Case(8, 500, 2.0, "float32"))
    results, faults = kernels.measure(cases, CPU, repeats=2)
    assert faults == []
    assert [(row["loss"], row["temperature"]) for row in results] == [(n, T) for T in (1.0, 2.0) for n in LOSSES]
    for row in results:
        assert (row["n_rows"], row["vocab_size"], row["dtype"], row["device"], row["calls"]) == (
            8,
            500,
            "float32",
            "cpu",
            2,
        )
        assert row["gb_per_s"] == pytest.approx(row["bytes_needed"] / (row["p50_ms"] / 1e3) / 1e9)
        assert row["extra_peak_bytes"] >= 8 * 500 * 4  # the gradient at least
        assert row["loss_error"] < 1e-5
        assert row["gradient_error"] < 1e-5
    page = kernels.write_outputs(tmp_path / "out", results, CPU)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    facts = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert (facts["device"], facts["k"], facts["alpha"]) == ("cpu", 64, 0.7)
    assert page.read_text().count("<svg ") == 2


def test_bytes_by_hand():
    # 2 rows of 100 logits, read and written; 64 entries of 8 bytes, two moments of 4 and a label of 8 a row
    case = Case(2, 100, 2.0, "float32")
    assert bytes_needed(OURS, case) == 2 * 2 * 100 * 4 + 2 * (64 * 8 + 8 + 8)
    assert bytes_needed(EAGER, case) == bytes_needed(OURS, case)
    assert bytes_needed(DENSE, case) == 3 * 2 * 100 * 4
    assert bytes_needed(DENSE, Case(2, 100, 2.0, "bfloat16")) == 3 * 2 * 100 * 2
    assert bytes_needed(OURS, Case(1, 10, 2.0, "float32")) == 80 + 10 * 8 + 16


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_dense_loop_is_the_loss_of_the_articles(temperature):
    inputs = LossInputs.seeded(Case(6, 50, temperature, "float32"), CPU).in_float64()
    found, gradient = value_and_gradient(DENSE, inputs)
    s, t, y = inputs.student_logits[0], inputs.teacher_logits_NV, inputs.labels_N
    logp, logq = (t / temperature).log_softmax(1), (s / temperature).log_softmax(1)
    kl = (logp.exp() * (logp - logq)).sum(1).mean()
    ce = -s.log_softmax(1)[torch.arange(6), y].mean()
    assert found == pytest.approx(float(ALPHA * temperature**2 * kl + (1 - ALPHA) * ce), rel=1e-12)
    one_hot = torch.nn.functional.one_hot(y, 50)
    by_hand = ALPHA * temperature * (logq.exp() - logp.exp()) + (1 - ALPHA) * (s.softmax(1) - one_hot)
    torch.testing.assert_close(gradient, by_hand / 6, rtol=1e-10, atol=1e-14)


def test_with_every_token_kept_ours_is_the_dense_loop():
    # K = 64 entries and a vocabulary of 50: nothing is left to the tail
    inputs = LossInputs.seeded(Case(6, 50, 2.0, "float32"), CPU)
    loss, gradient = value_and_gradient(OURS, inputs)
    dense_loss, dense_gradient = value_and_gradient(DENSE, inputs)
    assert float(loss) == pytest.approx(float(dense_loss), rel=1e-5)
    torch.testing.assert_close(gradient, dense_gradient, rtol=1e-4, atol=1e-7)


def test_inputs_are_the_same_every_time_and_buffers_differ():
    first, again = (LossInputs.seeded(Case(3, 40, 1.0, "bfloat16"), CPU) for _ in range(2))
    assert torch.equal(first.student_logits[1], again.student_logits[1])
    assert not torch.equal(first.student_logits[0], first.student_logits[1])
    assert first.student_logits[0].dtype == torch.bfloat16
    assert not torch.equal(value_and_gradient(OURS, first, 0)[1], value_and_gradient(OURS, first, 1)[1])


def test_errors_are_measured_against_float64():
    inputs = LossInputs.seeded(Case(20, 300, 2.0, "float32"), CPU)
    for name in LOSSES:
        loss_error, gradient_error = relative_errors(name, inputs)
        assert loss_error < 1e-6
        assert 0 < gradient_error < 1e-5


def test_a_loss_that_is_off_is_a_fault_and_gives_no_number(tmp_path, capsys, monkeypatch):
    case = Case(4, 100, 2.0, "float32")
    errors = {OURS: (1e-3, 1e-8), EAGER: (1e-8, 1e-8), DENSE: (1e-8, 0.5)}
    faults = kernels.check_faults(errors, case)
    assert len(faults) == 2
    assert faults[0].startswith(f"{OURS} at Case(n_rows=4")
    assert faults[0].endswith("loss is off by 0.001 of its size, allowed 1e-06")
    assert faults[1].endswith("gradient is off by 0.5 of its size, allowed 0.01")
    assert kernels.check_faults({OURS: (3e-8, 1.9e-5), EAGER: (1e-8, 1e-5), DENSE: (0.0, 0.0)}, case) == []
    assert len(kernels.check_faults({OURS: (float("nan"), 0.0), EAGER: (0.0, 0.0), DENSE: (0.0, 0.0)}, case)) == 1

    monkeypatch.setitem(LOSSES, OURS, lambda logits, inputs: LOSSES[EAGER](logits, inputs) * 1.01)
    measured = kernels.measure((case,), CPU, repeats=1)
    assert measured.results == []
    assert len(measured.faults) == 2
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    arguments = parser.parse_args(["--out", str(tmp_path / "out"), "--device", "cpu", "--quick"])
    assert kernels.run(arguments) == 1
    assert "check against float64 failed, nothing was measured: logitstore distillation_loss" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(MIB // 4)  # 1 MiB

    def one_after_the_other():
        for _ in range(3):
            y = x + 1
            del y

    def together():
        kept = [x + 1 for _ in range(3)]
        return len(kept)

    # the number 1 becomes a tensor of a few bytes in each addition
    assert peak_extra_bytes(one_after_the_other, CPU) == pytest.approx(MIB, abs=128)
    assert peak_extra_bytes(together, CPU) == pytest.approx(3 * MIB, abs=128)
    assert peak_extra_bytes(lambda: None, CPU) == 0


def test_peak_memory_counts_buffers_inside_an_operator():
    x = torch.zeros(256, 1024)  # 1 MiB; logsumexp makes one more of that size and returns 1 KiB
    assert peak_extra_bytes(lambda: torch.logsumexp(x, 1), CPU) >= MIB


@pytest.mark.parametrize("device", ["foo", "cuda:99", "xpu"])
def test_a_device_that_is_not_here_is_said_in_one_line(device, tmp_path, capsys):
    assert main(["bench", "kernels", "--device", device, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"logitstore: --device is {device!r}, ")
    assert error.rstrip().endswith(("expected auto, cpu, cuda, cuda:N or mps", "use --device auto"))
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
