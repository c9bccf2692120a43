"""DistillationTrainer: the loss it trains on, its gradient under accumulation, its logs, and what it refuses."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from logitstore_trainer import DistillationTrainer, TeacherDecoder, collate
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainingArguments

import logitstore


def arguments(tmp_path, **settings):
    """SGD with a learning rate of 1 and no clipping: the change of a weight is minus its gradient."""
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**defaults, **settings})


def step_change(model, dataset, args, **settings):
    """Each weight's change in one optimizer step, and the trainer."""
    before = copy.deepcopy(model.state_dict())
    trainer = DistillationTrainer(model=model, args=args, train_dataset=dataset, **settings)
    trainer.train()
    return {name: value - before[name] for name, value in model.state_dict().items()}, trainer


@pytest.mark.parametrize(("temperature", "alpha"), [(2.0, 0.7), (1.0, 1.0), (2.0, 0.0)])
def test_first_steps_loss_is_the_reference(tmp_path, store, new_student, slow_loss, temperature, alpha):
    samples = [store[i] for i in range(4)]
    student = new_student(2)
    expected = slow_loss(student, samples, temperature=temperature, alpha=alpha)
    _, trainer = step_change(
        student, Subset(store, range(4)), arguments(tmp_path), temperature=temperature, alpha=alpha
    )
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected.loss, rel=2e-6)
    assert logged["kl"] == pytest.approx(expected.kl, rel=2e-6)
    assert logged["ce"] == pytest.approx(expected.ce, rel=2e-6)
    assert trainer.n_tokens_seen() == sum(len(sample.input_ids) for sample in samples)


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(1, 4), (2, 2), (3, 2)])
def test_accumulation_gives_the_gradient_of_one_big_batch(tmp_path, store, new_student, batch_size, grad_accum):
    """Uneven lengths, float64; with 3 + 1 samples the micro-batches are uneven too."""
    dataset = Subset(store, range(4))
    whole, one = step_change(new_student(2).double(), dataset, arguments(tmp_path))
    args = arguments(tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=grad_accum)
    accumulated, many = step_change(new_student(2).double(), dataset, args)
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-2
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-11, atol=1e-13, msg=name)
    for part in ("loss", "kl", "ce"):
        assert many.state.log_history[0][part] == pytest.approx(one.state.log_history[0][part], rel=1e-6)


def test_gradient_is_that_of_the_mean_over_valid_tokens(tmp_path, store, new_student, slow_loss):
    """One weight, by central differences of the slow loss; a wide step, for Llama's norms compute in float32."""
    samples = [store[i] for i in range(4)]
    student = new_student(2).double()
    weight = student.model.layers[0].mlp.down_proj.weight
    losses, h = [], 2e-3
    for sign in (1, -1):
        with torch.no_grad():
            weight[3, 5] += sign * h
            losses.append(slow_loss(student, samples).loss)
            weight[3, 5] -= sign * h
    change, _ = step_change(student, Subset(store, range(4)), arguments(tmp_path))
    gradient = -float(change["model.layers.0.mlp.down_proj.weight"][3, 5])
    assert gradient == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-3)


def test_logged_parts_are_means_over_the_steps_between_two_logs(tmp_path, store, new_student):
    args = {"max_steps": 4, "learning_rate": 0.0, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    _, every = step_change(new_student(2), store, arguments(tmp_path, **args))
    _, second = step_change(new_student(2), store, arguments(tmp_path, **args, logging_steps=2))
    single = [entry for entry in every.state.log_history if "kl" in entry]
    double = [entry for entry in second.state.log_history if "kl" in entry]
    assert (len(single), len(double)) == (4, 2)
    for part in ("loss", "kl", "ce"):
        for i, entry in enumerate(double):
            expected = (single[2 * i][part] + single[2 * i + 1][part]) / 2
            assert entry[part] == pytest.approx(expected, rel=1e-5), part
    for entry in [*single, *double]:
        assert entry["loss"] == pytest.approx(0.7 * 4 * entry["kl"] + 0.3 * entry["ce"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [5, 12])
@pytest.mark.parametrize("prediction_loss_only", [True, False])
def test_eval_loss_is_the_mean_over_tokens(tmp_path, store, new_student, slow_loss, batch_size, prediction_loss_only):
    """With uneven batches (5 + 5 + 2 samples), where Trainer's own mean of batch means would differ."""
    student = new_student(2)
    expected = slow_loss(student, list(store))
    args = arguments(tmp_path, per_device_eval_batch_size=batch_size, prediction_loss_only=prediction_loss_only)
    metrics = DistillationTrainer(model=student, args=args, eval_dataset=store).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.loss, rel=2e-6)
    assert metrics["eval_kl"] == pytest.approx(expected.kl, rel=2e-6)
    assert metrics["eval_ce"] == pytest.approx(expected.ce, rel=2e-6)


def test_an_eval_batch_without_valid_tokens_weighs_nothing(tmp_path, store, new_student):
    student, args = new_student(2), arguments(tmp_path, per_device_eval_batch_size=1)
    prompt = store[0]._replace(loss_mask=store[0].loss_mask & False)
    with_it, without = (
        DistillationTrainer(
            model=student, args=args, eval_dataset=samples, train_dataset=store, decoder=TeacherDecoder(store)
        ).evaluate()["eval_loss"]
        for samples in ([prompt, store[1], store[2]], [store[1], store[2]])
    )
    assert with_it == without


def test_evaluation_returns_logits_and_labels(tmp_path, store, new_student):
    student = new_student(2)
    trainer = DistillationTrainer(model=student, args=arguments(tmp_path), train_dataset=store)
    output = trainer.predict(Subset(store, [4]))
    batch = collate([store[4]])
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(output.predictions), logits, rtol=1e-5, atol=1e-5)
    assert output.label_ids.tolist() == batch["labels"].tolist()
    assert output.metrics["test_loss"] > 0


class Clock(TrainerCallback):
    """A step takes one second, a batch of evaluation a hundred."""

    def __init__(self):
        self.now_s = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.now_s += 1.0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.now_s += 100.0


def test_tokens_and_seconds_of_training_are_logged_and_evaluations_do_not_count(
    tmp_path, store, new_student, monkeypatch
):
    """Two steps are one pass over the twelve samples."""
    clock = Clock()
    monkeypatch.setattr("logitstore_trainer.hf_trainer.time.perf_counter", lambda: clock.now_s)
    settings = {"max_steps": 6, "per_device_train_batch_size": 6, "logging_steps": 2, "eval_strategy": "steps"}
    args = arguments(tmp_path, **settings, eval_steps=1)
    _, trainer = step_change(new_student(2), store, args, eval_dataset=Subset(store, range(3)), callbacks=[clock])
    logged = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert [entry["n_tokens"] for entry in logged] == [store.n_tokens, 2 * store.n_tokens, 3 * store.n_tokens]
    assert [entry["train_s"] for entry in logged] == [2.0, 4.0, 6.0]
    assert [entry["tokens_per_s"] for entry in logged] == [store.n_tokens / 2] * 3


def test_evaluation_during_training_leaves_the_training_parts_alone(tmp_path, store, new_student):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.1}
    args = arguments(tmp_path, **settings, eval_strategy="steps", eval_steps=1)
    _, evaluated = step_change(new_student(2), store, args, eval_dataset=Subset(store, range(3)))
    _, plain = step_change(new_student(2), store, arguments(tmp_path, **settings))
    kls = [entry["kl"] for entry in evaluated.state.log_history if "kl" in entry]
    assert kls == [entry["kl"] for entry in plain.state.log_history if "kl" in entry]
    assert sum("eval_kl" in entry for entry in evaluated.state.log_history) == 3


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_works_with_either_remove_unused_columns(tmp_path, store, new_student, slow_loss, remove_unused_columns):
    student = new_student(2)
    expected = slow_loss(student, [store[0], store[1]])
    args = arguments(tmp_path, remove_unused_columns=remove_unused_columns)
    _, trainer = step_change(student, Subset(store, [0, 1]), args)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.loss, rel=2e-6)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "labels", "teacher_ids", "teacher_tail_logmoment_half"} <= set(trainer._signature_columns)


def test_the_model_is_called_without_labels(tmp_path, store, new_student):
    student, seen = new_student(2), []
    hook = student.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    step_change(student, Subset(store, [0]), arguments(tmp_path))
    hook.remove()
    assert seen == [{"input_ids", "attention_mask"}]


def test_bf16_autocast_stays_near_the_reference(tmp_path, store, new_student, slow_loss):
    student = new_student(2)
    expected = slow_loss(student, [store[i] for i in range(4)])
    _, trainer = step_change(student, Subset(store, range(4)), arguments(tmp_path, bf16=True))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.loss, rel=2e-2)
    assert next(student.parameters()).dtype == torch.float32


def test_a_wider_student_is_masked(tmp_path, store, new_student, slow_loss):
    student = new_student(2, vocab_size=104)
    expected = slow_loss(student, [store[i] for i in range(4)])
    _, trainer = step_change(student, Subset(store, range(4)), arguments(tmp_path))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.loss, rel=2e-6)


def test_the_batch_is_padded_with_the_tokenizers_pad(tmp_path, store, new_student, tokenizer):
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = "w7"
    trainer = DistillationTrainer(
        model=new_student(2), args=arguments(tmp_path), train_dataset=store, processing_class=padding
    )
    batch = trainer.data_collator([store[0], store[1]])
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {7}


def test_a_step_without_valid_tokens_changes_nothing(tmp_path, store, new_student):
    batch_of_prompts = [store[0]._replace(loss_mask=store[0].loss_mask & False)]
    change, trainer = step_change(new_student(2), batch_of_prompts, arguments(tmp_path), decoder=TeacherDecoder(store))
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert all(float(value.abs().max()) == 0.0 for value in change.values())


def test_a_narrower_student_is_refused(tmp_path, store, new_student):
    with pytest.raises(logitstore.SpecMismatchError, match=r"predicts 90 tokens.*distributions over 97.*tiny-teacher"):
        DistillationTrainer(model=new_student(2, vocab_size=90), args=arguments(tmp_path), train_dataset=store)


def test_another_tokenizer_is_refused_naming_both(tmp_path, store, new_student, other_tokenizer):
    theirs = logitstore.tokenizer_sha256(other_tokenizer.get_vocab())
    with pytest.raises(logitstore.SpecMismatchError) as caught:
        DistillationTrainer(
            model=new_student(2), args=arguments(tmp_path), train_dataset=store, processing_class=other_tokenizer
        )
    message = str(caught.value)
    assert theirs[:12] in message
    assert store.spec.tokenizer_sha256[:12] in message
    assert "tiny-teacher" in message
    assert "Choose a student with the teacher's tokenizer" in message
    assert "\n" not in message


def test_options_that_would_replace_the_loss_are_refused(tmp_path, store, new_student):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 would be ignored"):
        DistillationTrainer(
            model=new_student(2), args=arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=store
        )
    with pytest.raises(ValueError, match="compute_loss_func would be ignored"):
        DistillationTrainer(
            model=new_student(2), args=arguments(tmp_path), train_dataset=store, compute_loss_func=lambda *a: 0
        )


def test_another_collator_is_refused_at_the_first_step(tmp_path, store, new_student):
    def labels_only(samples):
        return {k: v for k, v in collate(samples).items() if not k.startswith("teacher_")}

    trainer = DistillationTrainer(
        model=new_student(2), args=arguments(tmp_path), train_dataset=store, data_collator=labels_only
    )
    with pytest.raises(ValueError, match="no teacher_ids"):
        trainer.train()


class HeadOnly(torch.nn.Module):
    """A model without attention, whose masks transformers would look at on the host."""

    def __init__(self):
        super().__init__()
        self.logits_of_token = torch.nn.Embedding(97, 97, device="meta")

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits_of_token(input_ids))


def test_the_loss_reads_nothing_on_the_host(tmp_path, store, new_student):
    """Meta tensors have no values: whatever reads one raises."""
    trainer = DistillationTrainer(model=new_student(2), args=arguments(tmp_path), train_dataset=store)
    batch = {name: tensor.to("meta") for name, tensor in collate([store[0], store[1]]).items()}
    loss = trainer.compute_loss(HeadOnly(), batch, num_items_in_batch=torch.tensor(5, device="meta"))
    loss.backward()
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


TWO_RANKS = """
import os, sys, torch
import logitstore
from torch.utils.data import Subset
from transformers import LlamaForCausalLM, TrainingArguments
from logitstore_trainer import DistillationTrainer
store, folder, out = logitstore.open(sys.argv[1]), sys.argv[2], sys.argv[3]
args = TrainingArguments(
    output_dir=out, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, optim="sgd",
    learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no",
    report_to="none", disable_tqdm=True, use_cpu=True, per_device_eval_batch_size=1,
)
model = LlamaForCausalLM.from_pretrained(folder)
trainer = DistillationTrainer(model=model, args=args, train_dataset=Subset(store, range(4)))
trainer.train()
evaluated = trainer.evaluate(Subset(store, range(4)))
if trainer.is_world_process_zero():
    torch.save((trainer.model.state_dict(), trainer.state.log_history[0], evaluated), out + "/result.pt")
torch.distributed.barrier()
os._exit(0)
"""


def test_two_ranks_give_the_gradient_of_one_big_batch(tmp_path, store, store_path, new_student, slow_loss):
    """Two processes, two micro-batches of one sample each: four samples of uneven lengths in one step."""
    (tmp_path / "two").mkdir()
    new_student(2).save_pretrained(str(tmp_path / "student"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    command += [str(tmp_path / "two_ranks.py"), str(store_path), str(tmp_path / "student"), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (tmp_path / "two" / "result.pt").exists(), done.stderr[-2000:]
    weights, logged, evaluated = torch.load(tmp_path / "two" / "result.pt")

    student = new_student(2)
    expected = slow_loss(student, [store[i] for i in range(4)])
    step_change(student, Subset(store, range(4)), arguments(tmp_path))
    for name, value in student.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6, msg=name)
    after = slow_loss(student, [store[i] for i in range(4)])
    for part in ("loss", "kl", "ce"):
        assert logged[part] == pytest.approx(getattr(expected, part), rel=1e-5)
        assert evaluated[f"eval_{part}"] == pytest.approx(getattr(after, part), rel=1e-4)
