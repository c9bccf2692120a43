"""evaluate_student against float64 loops and dense distributions."""

import math

import pytest
import torch
from logitstore_trainer import TeacherDecoder
from logitstore_trainer.evaluate import evaluate_student, kl_divergence
from torch.utils.data import Subset


def valid_rows(model, store, indices):
    """Float64 logits of the rows that count, with their labels and each row's stored first token."""
    logits, labels, first = [], [], []
    for i in indices:
        sample = store[i]
        with torch.no_grad():
            logits_LV = model(torch.from_numpy(sample.input_ids)[None].long()).logits[0].double()
        for t in range(sample.targets.n_rows):
            if sample.loss_mask[t + 1] and sample.targets.present[t]:
                logits.append(logits_LV[t, :97])
                labels.append(int(sample.input_ids[t + 1]))
                first.append(int(sample.targets.ids[sample.targets.offsets[t]]))
    return torch.stack(logits), torch.tensor(labels), torch.tensor(first)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_against_the_store_equals_the_slow_loop(store, new_student, slow_loss, temperature):
    student = new_student(2)
    expected = slow_loss(student, list(store), temperature=temperature)
    got = evaluate_student(student, store, temperature=temperature, batch_size=5)
    logits, _, first = valid_rows(student, store, range(len(store)))
    assert got.n_tokens == expected.n_tokens == len(first)
    assert got.loss_nats == pytest.approx(expected.ce, rel=2e-6)
    assert got.kl_store_nats == pytest.approx(expected.kl, rel=2e-5)
    assert got.top1_agreement == pytest.approx((logits.argmax(1) == first).double().mean().item(), rel=1e-12)
    assert got.kl_teacher_nats is None
    assert got.top1_against == "store"


def test_uniform_tail_equals_the_kl_to_the_dense_store(store, new_student):
    student = new_student(2)
    kls = []
    for i in range(len(store)):
        sample = store[i]
        dense = torch.from_numpy(sample.targets.dense_logprobs()).double()
        with torch.no_grad():
            logq = student(torch.from_numpy(sample.input_ids)[None].long()).logits[0].double().log_softmax(1)
        for t in sample.targets.present.nonzero()[0]:
            kls.append(float((dense[t].exp() * (dense[t] - logq[t])).sum()))
    got = evaluate_student(student, store, tail="uniform")
    assert got.kl_store_nats == pytest.approx(sum(kls) / len(kls), rel=1e-5)


def test_against_a_live_teacher_is_the_exact_kl(store, new_student, teacher_model):
    student = new_student(2)
    subset = Subset(store, [1, 4, 9])
    teacher_NV, labels, _ = valid_rows(teacher_model, store, subset.indices)
    student_NV, _, _ = valid_rows(student, store, subset.indices)
    logp, logq = teacher_NV.log_softmax(1), student_NV.log_softmax(1)
    got = evaluate_student(student, subset, teacher_model=teacher_model, batch_size=2)
    assert got.n_tokens == len(labels)
    assert got.kl_teacher_nats == pytest.approx((logp.exp() * (logp - logq)).sum(1).mean().item(), rel=1e-5)
    assert got.loss_nats == pytest.approx(-logq.gather(1, labels[:, None]).mean().item(), rel=2e-6)
    agreement = (teacher_NV.argmax(1) == student_NV.argmax(1)).double().mean().item()
    assert got.top1_agreement == pytest.approx(agreement, rel=1e-12)
    assert got.top1_against == "teacher"
    assert got.kl_store_nats < got.kl_teacher_nats


def test_the_teacher_against_itself_is_zero(store, teacher_model):
    """The bucket KL to the store is what 16-bit head values and the coded tail moments lose."""
    got = evaluate_student(teacher_model, store, teacher_model=teacher_model)
    assert got.kl_teacher_nats == pytest.approx(0, abs=1e-6)
    assert got.top1_agreement == 1.0
    assert got.kl_store_nats == pytest.approx(0, abs=1e-4)


def test_the_batch_size_does_not_matter(store, new_student, teacher_model):
    one, all_ = (evaluate_student(new_student(2), store, teacher_model=teacher_model, batch_size=n) for n in (1, 12))
    assert one.n_tokens == all_.n_tokens
    assert one.kl_teacher_nats == pytest.approx(all_.kl_teacher_nats, rel=1e-5)
    assert one.loss_nats == pytest.approx(all_.loss_nats, rel=1e-6)


def test_padded_columns_are_masked(store, new_student, slow_loss):
    student = new_student(2, vocab_size=104)
    expected = slow_loss(student, list(store), temperature=1.0)
    got = evaluate_student(student, store)
    assert got.loss_nats == pytest.approx(expected.ce, rel=2e-6)
    assert got.kl_store_nats == pytest.approx(expected.kl, rel=2e-5)


def test_a_list_of_samples_with_a_decoder(store, new_student):
    samples = [store[2], store[3]]
    got = evaluate_student(new_student(2), samples, TeacherDecoder(store))
    assert got == evaluate_student(new_student(2), Subset(store, [2, 3]))


def test_the_models_mode_is_left_as_it_was(store, new_student):
    student = new_student(2).train()
    evaluate_student(student, Subset(store, [0]))
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_the_models_mode_is_left_as_it_was_where_evaluating_fails(store, new_student):
    student, teacher = new_student(2).train(), new_student(3).eval()
    teacher.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_student(student, store, teacher_model=teacher)
    assert student.training
    assert not teacher.training


def _interrupt(module, args):
    raise KeyboardInterrupt


def test_a_zero_of_the_teacher_adds_nothing():
    teacher = torch.tensor([[0.0, -torch.inf, 0.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 2.0, 1.0]], dtype=torch.float64)
    logq = float(student.log_softmax(1)[0, 0])
    assert kl_divergence(teacher, student).item() == pytest.approx(-math.log(2) - logq, rel=1e-12)


def test_nothing_to_learn_is_refused(store, new_student):
    prompts = [store[0]._replace(loss_mask=store[0].loss_mask & False)]
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_student(new_student(2), prompts, TeacherDecoder(store))


def test_the_result_is_json(store, new_student):
    got = evaluate_student(new_student(2), Subset(store, [0]))
    assert got.to_json()["loss_nats"] == got.loss_nats
