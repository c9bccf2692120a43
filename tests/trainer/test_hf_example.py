"""The plug-in example: ten lines in the user's own Trainer, with the loss of the reference."""

import importlib.util
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "hf_trainer.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("hf_trainer_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plug_in_is_at_most_ten_lines():
    lines = EXAMPLE.read_text().splitlines()
    begin, end = (next(i for i, line in enumerate(lines) if f"plug-in: {word}" in line) for word in ("begin", "end"))
    assert 1 <= len([line for line in lines[begin + 1 : end] if line.strip()]) <= 10


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(12, 1), (5, 3)])
def test_its_loss_is_the_reference(
    example, store, store_path, new_student, slow_loss, tmp_path, batch_size, grad_accum
):
    """All twelve samples in one step; in micro-batches of 5, 5 and 2 the loss is the same."""
    student = new_student(2)
    expected = slow_loss(student, list(store))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=batch_size, logging_steps=1,
        gradient_accumulation_steps=grad_accum, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = example.make_trainer(student, args, str(store_path))
    assert isinstance(trainer, Trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.loss, rel=2e-6)
