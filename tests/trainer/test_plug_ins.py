"""Plug-ins: each at most ten lines, and a step of each has the gradient of one big batch, also under DDP."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logitstore_kernels import distillation_loss
from logitstore_kernels.reference import distillation_loss_reference
from logitstore_trainer import DistillationLoss, DistillationMixin, OptimizerSteps, TeacherDecoder, collate, distill
from logitstore_trainer.collator import next_token_labels
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainingArguments

import logitstore

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SGD = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "sgd"}


def example(name):
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(tmp_path, kind=TrainingArguments, **settings):
    """One step of two micro-batches of two samples, by plain SGD: a weight changes by minus its gradient."""
    return kind(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **SGD, **settings,
    )  # fmt: skip


@pytest.fixture
def few_path(store, tmp_path):
    """A store of the first four samples, whose lengths differ: an epoch of an example is one optimizer step."""
    with logitstore.create(tmp_path / "few.parquet", store.spec) as writer:
        for sample in (store[i] for i in range(4)):
            writer.append(sample.sample_id, sample.input_ids, sample.targets, loss_mask=sample.loss_mask)
    return tmp_path / "few.parquet"


def one_big_batch(student, store):
    """Loss and gradients of the store's first four samples in one batch, by distillation_loss alone."""
    student, batch = copy.deepcopy(student), collate([store[i] for i in range(4)])
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = distillation_loss(
        logits.flatten(0, 1), TeacherDecoder(store)(batch), next_token_labels(batch["labels"]), 2.0, 0.7
    )
    loss.backward()
    return float(loss.detach()), {name: weight.grad for name, weight in student.named_parameters()}


def changed_by(student, train):
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    train(student)
    return {name: before[name] - weight.detach() for name, weight in student.named_parameters()}


def assert_same_gradient(found, expected, tolerance):
    """Their distance is at most `tolerance` of the whole gradient's norm."""
    assert found.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    distance = torch.stack([(found[name] - g).norm() for name, g in expected.items()]).norm()
    assert norm > 1e-2
    assert float(distance / norm) < tolerance


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_a_plug_in_is_at_most_ten_lines(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    begin, end = (next(i for i, line in enumerate(lines) if f"plug-in: {word}" in line) for word in ("begin", "end"))
    assert 1 <= len([line for line in lines[begin + 1 : end] if line.strip()]) <= 10


def test_plain_loop(store, few_path, new_student):
    student = new_student(2).double()
    _, expected = one_big_batch(student, store)
    train = example("plain_loop").train
    change = changed_by(student, lambda model: train(model, torch.optim.SGD(model.parameters(), 1.0), str(few_path)))
    assert_same_gradient(change, expected, 1e-10)


def test_accelerate_loop(store, few_path, new_student):
    from accelerate import Accelerator

    student = new_student(2).double()
    _, expected = one_big_batch(student, store)
    train = example("accelerate_loop").train
    change = changed_by(
        student,
        lambda model: train(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), 1.0), str(few_path)),
    )
    assert_same_gradient(change, expected, 1e-10)


def test_flat_tokens(store, new_student):
    student = new_student(2).double()
    loss, expected = one_big_batch(student, store)
    split, loss_fn = example("flat_tokens").make_split_and_loss(store)
    parts = [split(collate([store[i] for i in pair])) for pair in ((0, 1), (2, 3))]
    n_valid = sum((labels_N != -100).sum() for _, labels_N in parts)
    total = sum(
        loss_fn(student(input_ids=inputs["input"]).logits.flatten(0, 1), labels_N, n_valid, teacher=inputs["teacher"])
        for inputs, labels_N in parts
    )
    total.backward()
    assert float(total.detach()) == pytest.approx(loss, rel=1e-10)
    assert_same_gradient({name: w.grad for name, w in student.named_parameters()}, expected, 1e-10)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_hf_hook(store, few_path, new_student, tmp_path, slow_loss, settings):
    student = new_student(2).double()
    expected_loss = slow_loss(student, [store[i] for i in range(4)]).loss
    _, expected = one_big_batch(student, store)
    trainer = example("hf_hook").make_trainer(student, arguments(tmp_path, **settings), str(few_path))
    assert_same_gradient(changed_by(student, lambda _: trainer.train()), expected, 1e-10)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected_loss, rel=1e-6)


def test_the_hook_packs(store, few_path, new_student, tmp_path):
    """Four samples in two micro-batches; a cache, which lets samples of a row see each other, is switched off."""
    student = new_student(2).double()
    _, expected = one_big_batch(student, store)
    few = logitstore.open(few_path)
    trainer = Trainer(student, arguments(tmp_path, use_cache=True), train_dataset=few, eval_dataset=few)
    distill(trainer, pack=True)
    n_rows = [len(batch["input_ids"]) for batch in trainer.get_eval_dataloader()]
    assert n_rows[0] < min(len(few), trainer.args.eval_batch_size)
    batch = collate(list(few))
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    separate = DistillationLoss(few)(logits.detach(), batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(separate), rel=1e-6)
    assert_same_gradient(changed_by(student, lambda _: trainer.train()), expected, 1e-10)


def test_the_hook_and_the_loss_of_a_loop_take_other_divergences(store, few_path, new_student, tmp_path):
    student, few = new_student(2).double(), logitstore.open(few_path)
    batch = collate(list(few))
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
    expected = distillation_loss_reference(
        logits.flatten(0, 1), TeacherDecoder(few)(batch), next_token_labels(batch["labels"]), divergence="jsd",
        jsd_beta=0.3,
    )  # fmt: skip
    loss_of = DistillationLoss(few, divergence="jsd", jsd_beta=0.3)
    assert float(loss_of(logits, batch)) == pytest.approx(float(expected), rel=1e-12)
    trainer = Trainer(student, arguments(tmp_path), train_dataset=few)
    distill(trainer, divergence="jsd", jsd_beta=0.3)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match=r"from_hidden computes forward_kl alone, .*divergence='jsd'"):
        loss_of.from_hidden(logits, logits, batch)
    with pytest.raises(ValueError, match="divergence='tvd' is not defined for tail='dropped'"):
        DistillationLoss(few, divergence="tvd", tail="dropped")


def test_hf_hook_with_lora(store, few_path, new_student, tmp_path, slow_loss):
    peft = pytest.importorskip("peft")
    student = new_student(2)
    expected = slow_loss(student, [store[i] for i in range(4)]).loss
    adapted = peft.get_peft_model(student, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    trainer = example("hf_hook").make_trainer(adapted, arguments(tmp_path), str(few_path))
    change = changed_by(adapted, lambda _: trainer.train())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-6)
    moved = {name for name, delta in change.items() if float(delta.abs().max()) > 0}
    assert moved
    assert all("lora_B" in name for name in moved)


def test_trl_sft(store, few_path, new_student, tokenizer, tmp_path, slow_loss):
    trl = pytest.importorskip("trl")
    student = new_student(2)
    expected_loss = slow_loss(student, [store[i] for i in range(4)]).loss
    _, expected = one_big_batch(student, store)
    args = arguments(tmp_path, trl.SFTConfig, bf16=False, gradient_checkpointing=False)
    trainer = example("trl_sft").make_trainer(student, args, tokenizer, str(few_path))
    assert_same_gradient(changed_by(student, lambda _: trainer.train()), expected, 1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected_loss, rel=2e-6)


def test_lightning_module(store, few_path, new_student, tmp_path):
    lightning = pytest.importorskip("lightning")
    student = new_student(2).double()
    _, expected = one_big_batch(student, store)
    module = example("lightning_module").DistilledModule(student, str(few_path))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    assert_same_gradient(changed_by(student, lambda _: trainer.fit(module)), expected, 1e-10)


def test_two_processes_of_two_micro_batches_are_one_big_batch(store, store_path, new_student, tmp_path):
    """DDP under torchrun with gloo, from logits and with the fused loss; also one process of four micro-batches."""
    student = new_student(2)
    student.save_pretrained(str(tmp_path / "student"))
    worker = Path(__file__).with_name("plug_in_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    command += [str(store_path), str(tmp_path / "student"), str(tmp_path / "found.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (tmp_path / "found.pt").exists(), done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    for dtype, loss_tolerance, gradient_tolerance in ((torch.float64, 1e-10, 1e-10), (torch.float32, 1e-6, 1e-5)):
        loss, gradient = one_big_batch(student.to(dtype), store)
        alone, loss_of = copy.deepcopy(student), DistillationLoss(store)
        total = 0.0
        loader = DataLoader(Subset(store, range(4)), batch_size=1, collate_fn=collate)
        for batch in next(iter(OptimizerSteps(loader, 4))):
            share = loss_of(alone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch)
            share.backward()
            total += float(share.detach())
        alone_result = (total, {name: weight.grad for name, weight in alone.named_parameters()})
        for of_steps, of_weights in (*found[str(dtype)].values(), alone_result):
            assert of_steps == pytest.approx(loss, rel=loss_tolerance)
            assert_same_gradient(of_weights, gradient, gradient_tolerance)


def test_the_last_step_may_be_shorter_and_steps_can_be_repeated(store):
    steps = OptimizerSteps(DataLoader(Subset(store, range(5)), batch_size=1, collate_fn=collate), 2)
    for _ in range(2):
        seen = [[float(batch["items_per_process"]) for batch in step] for step in steps]
        counts = [int((collate([store[i]])["labels"] != -100).sum()) for i in range(5)]
        assert seen == [[sum(counts[:2])] * 2, [sum(counts[2:4])] * 2, [counts[4]]]
        assert len(steps) == 3
    with pytest.raises(ValueError, match="n_batches=0, expected at least 1"):
        OptimizerSteps([], 0)


class IgnoresTheHook(Trainer):
    """A trainer that computes its loss itself, as TRL's SFTTrainer does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), next_token_labels(inputs["labels"]))


def test_a_trainer_that_ignores_the_hook_is_stopped_before_it_changes_a_weight(store, new_student, tmp_path):
    student = new_student(2)
    trainer = IgnoresTheHook(student, arguments(tmp_path), train_dataset=store)
    distill(trainer)

    def train(_):
        with pytest.raises(RuntimeError, match=r"was not called in the first step.*DistillationMixin"):
            trainer.train()

    assert all(float(delta.abs().max()) == 0 for delta in changed_by(student, train).values())


def test_a_class_that_replaces_the_mixins_loss_is_stopped(store, new_student, tmp_path):
    class Wrong(IgnoresTheHook, DistillationMixin, Trainer):
        pass

    trainer = Wrong(model=new_student(2), args=arguments(tmp_path), train_dataset=store)
    with pytest.raises(RuntimeError, match=r"not called in a step of Wrong.*Put DistillationMixin before"):
        trainer.train()


def test_the_hook_refuses_a_narrower_student_and_another_tokenizer(store, new_student, other_tokenizer, tmp_path):
    with pytest.raises(logitstore.SpecMismatchError, match="predicts 90 tokens"):
        distill(Trainer(new_student(2, vocab_size=90), arguments(tmp_path), train_dataset=store))
    trainer = Trainer(new_student(2), arguments(tmp_path), train_dataset=store, processing_class=other_tokenizer)
    with pytest.raises(logitstore.SpecMismatchError, match="Choose a student with the teacher's tokenizer"):
        distill(trainer)
