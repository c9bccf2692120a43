"""`logitstore eval`: its numbers against float64 loops, its files, and what it refuses."""

import json
import math

import pytest
import torch
from logitstore_trainer.calibration import calibration_bins, calibration_error, calibration_sums
from logitstore_trainer.cli import COMMANDS, main
from logitstore_trainer.held_out import split_by_source_row


@pytest.fixture
def students(new_student, tokenizer, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders, start=2):
        new_student(seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def rows_of(model, store, indices):
    """(confidence, is right) of every token to be learned, in float64."""
    rows = []
    for i in indices:
        sample = store[i]
        with torch.no_grad():
            p_LV = model(torch.from_numpy(sample.input_ids)[None].long()).logits[0].double().softmax(1)
        for t in range(sample.targets.n_rows):
            if sample.loss_mask[t + 1] and sample.targets.present[t]:
                confidence, guess = p_LV[t].max(0)
                rows.append((float(confidence), int(guess) == int(sample.input_ids[t + 1])))
    return rows


def slow_calibration_error(rows):
    total = 0.0
    for b in range(15):
        inside = [row for row in rows if b / 15 < row[0] <= (b + 1) / 15]
        total += abs(sum(right - confidence for confidence, right in inside))
    return total / len(rows)


def test_its_numbers_are_those_of_slow_loops(students, store, store_path, new_student, slow_loss, tmp_path, capsys):
    out = tmp_path / "eval"
    command = ["eval", *map(str, students), "--data", str(store_path), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--eval-fraction", "0.3", "--seed", "4"]) == 0
    results = json.loads((out / "results.json").read_text())["students"]
    held_out = split_by_source_row([store], 0.3, 4).held_out
    assert list(results) == [str(folder) for folder in students]
    for seed, got in enumerate(results.values(), start=2):
        expected = slow_loss(new_student(seed), [store[i] for i in held_out], temperature=1.0)
        rows = rows_of(new_student(seed), store, held_out)
        assert got["n_tokens"] == expected.n_tokens == len(rows) == sum(b["n_rows"] for b in got["calibration"])
        assert got["loss_nats"] == pytest.approx(expected.ce, rel=1e-5)
        assert got["perplexity"] == pytest.approx(math.exp(expected.ce), rel=1e-4)
        assert got["kl_store_nats"] == pytest.approx(expected.kl, rel=1e-4)
        assert got["calibration_error"] == pytest.approx(slow_calibration_error(rows), abs=1e-6)
    printed = capsys.readouterr().out
    page = (out / "report.html").read_text()
    for folder, got in zip(students, results.values(), strict=True):
        assert f"{got['calibration_error']:.2%}" in next(line for line in printed.splitlines() if str(folder) in line)
        assert str(folder) in page
    assert page.count("<svg") == 3


def test_with_a_live_teacher_its_kl_to_itself_is_zero(students, store_path, tmp_path):
    out = tmp_path / "eval"
    one, two = map(str, students)
    assert main(["eval", one, two, "--teacher", one, "--data", str(store_path), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())["students"]
    assert results[one]["kl_teacher_nats"] == pytest.approx(0, abs=1e-6)
    assert results[one]["top1_agreement"] == 1
    assert results[two]["kl_teacher_nats"] > 0.1


def test_calibration_of_a_model_that_is_sure_and_wrong_is_1_and_bins_have_closed_tops():
    logits_NV = torch.tensor([[200.0, 0, 0], [0, 200.0, 0]])
    sums = calibration_sums(logits_NV, torch.tensor([1, 2]))
    assert calibration_error(sums) == pytest.approx(1.0)
    bins = calibration_bins(sums)
    assert (bins[14].n_rows, bins[14].mean_confidence, bins[14].accuracy) == (2, 1.0, 0.0)
    assert bins[0].mean_confidence is None
    assert calibration_error(calibration_sums(logits_NV, torch.tensor([0, 1]))) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0 must be above 0"),
        (["--eval-fraction", "1.5"], "--eval-fraction 1.5 must lie in (0, 1)"),
        (["--tail", "sampled"], "sampled"),
        (["--temperature", "-1"], "--temperature -1.0 must be above 0 and finite"),
    ],
)
def test_bad_arguments_are_one_line(students, store_path, tmp_path, capsys, words, message):
    out = tmp_path / "eval"
    assert main(["eval", str(students[0]), "--data", str(store_path), "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_teacher_that_is_none_or_of_other_tokens_is_refused(
    students, new_student, other_tokenizer, store_path, tmp_path, capsys
):
    """A size, which is random weights, was taken for a teacher."""
    other = tmp_path / "other"
    new_student(5).save_pretrained(other)
    other_tokenizer.save_pretrained(other)
    command = ["eval", str(students[0]), "--data", str(store_path), "--out", str(tmp_path / "eval"), "--device", "cpu"]
    for teacher, message in (
        ("llama:layers=2,width=32,heads=2", "llama:layers=2,width=32,heads=2"),
        (str(other), "the teacher's tokenizer"),
        (str(store_path), "a file; expected a folder, a .gguf file or a name on the hub"),
    ):
        assert main([*command, "--teacher", teacher]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "eval").exists()


def test_students_without_weights_or_named_twice_are_refused(students, store_path, tmp_path, capsys):
    tail = ["--data", str(store_path), "--out", str(tmp_path / "eval")]
    assert main(["eval", "llama:layers=2,width=32,heads=2", *tail]) == 2
    assert "has random weights; name a model folder" in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()
    assert main(["eval", str(students[0]), str(students[0]), *tail]) == 2
    assert "is named twice" in capsys.readouterr().err
    other_name = f"{students[0].parent}/../{students[0].parent.name}/{students[0].name}"
    assert main(["eval", str(students[0]), other_name, *tail]) == 2
    assert f"{other_name} is named twice, also as {students[0]}; name each once" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_empty_arguments_are_one_line_in_every_command(command, capsys):
    for words, message in (
        (["--out", ""], "there is an empty argument behind --out; name something, or leave it out"),
        (["--out="], "--out has an empty value; name something, or leave the option out"),
        ([" "], f"there is an empty argument behind {command}"),
    ):
        assert main([command, *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
