"""The reference loss against numpy float64 by hand, against the usual full-logits loop, and at its fixed points."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from logitstore_kernels import TeacherBatch
from logitstore_kernels.reference import distillation_loss_parts_reference, distillation_loss_reference

TAILS = ["bucket", "uniform", "renormalised", "dropped", "dense"]
TEMPERATURES = [1.0, 1.5, 2.0, 4.0, 0.7]


def usual_loop(student_NV, teacher_NV, labels_N, temperature, alpha=0.7):
    """The loop over full teacher logits that people write, as its article has it."""
    kd = F.kl_div(
        F.log_softmax(student_NV / temperature, dim=-1),
        F.softmax(teacher_NV / temperature, dim=-1),
        reduction="batchmean",
    )
    return alpha * kd * temperature * temperature + (1 - alpha) * F.cross_entropy(student_NV, labels_N)


def all_tokens_kept(teacher_NV):
    """A batch with k = V whose log-probs are exactly these float64 numbers."""
    n, v = teacher_NV.shape
    return TeacherBatch.from_topk(
        torch.arange(v).expand(n, v), teacher_NV.log_softmax(-1), torch.full((n,), -math.inf), vocab_size=v
    )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_reference_equals_the_sum_by_hand(case_factory, by_hand, temperature, tail):
    case = case_factory(6, 23, 5).with_ignored(2)
    got = distillation_loss_reference(
        case.logits_NV, case.teacher, case.labels_N, temperature, 0.6, tail, reduction="none"
    )
    np.testing.assert_allclose(got.numpy(), by_hand(case, temperature, 0.6, tail), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_with_every_token_kept_it_is_the_usual_loop(case_factory, temperature, tail):
    case = case_factory(7, 19, 19)
    ours, usual = case.leaf(torch.float64), case.leaf(torch.float64)
    teacher = all_tokens_kept(case.teacher_logits_NV).with_dense_tail(
        torch.ones(7, 1), torch.ones(19, 1), torch.ones(19)
    )
    loss = distillation_loss_reference(ours, teacher, case.labels_N, temperature, tail=tail)
    expected = usual_loop(usual, case.teacher_logits_NV, case.labels_N, temperature)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=0)
    torch.testing.assert_close(ours.grad, usual.grad, rtol=1e-12, atol=1e-14)


def test_the_mean_is_over_rows_that_count(case_factory):
    case = case_factory(7, 19, 19).with_ignored(0, 4)
    keep_rows = [1, 2, 3, 5, 6]
    loss = distillation_loss_reference(case.logits_NV, all_tokens_kept(case.teacher_logits_NV), case.labels_N)
    expected = usual_loop(
        case.logits_NV[keep_rows], case.teacher_logits_NV[keep_rows], case.labels_N[keep_rows], temperature=2.0
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradcheck(case_factory, temperature, tail, alpha):
    case = case_factory(3, 11, 4).with_ignored(1)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss_reference(z, case.teacher, case.labels_N, temperature, alpha, tail),
        case.leaf(torch.float64),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bucket_is_zero_at_the_teacher(case_factory, temperature):
    case = case_factory(9, 301, 16)
    parts = distillation_loss_parts_reference(
        case.teacher_logits_NV, case.teacher, case.labels_N, temperature, reduction="none"
    )
    assert parts.kl.abs().max() <= 1e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_uniform_is_zero_at_what_the_batch_stands_for(case_factory, dense_logprobs, temperature):
    case = case_factory(9, 301, 16)
    logits_NV = temperature * dense_logprobs(case.teacher, temperature)
    parts = distillation_loss_parts_reference(
        logits_NV, case.teacher, case.labels_N, temperature, tail="uniform", reduction="none"
    )
    assert parts.kl.abs().max() <= 1e-6


def test_renormalised_at_the_teacher_is_minus_log_kept_mass(case_factory):
    case = case_factory(9, 301, 16)
    kept_N = case.teacher_logits_NV.softmax(-1).gather(1, case.teacher.ids_NK.long()).sum(1)
    parts = distillation_loss_parts_reference(
        case.teacher_logits_NV, case.teacher, case.labels_N, 1.0, tail="renormalised", reduction="none"
    )
    torch.testing.assert_close(parts.kl, -kept_N.log(), rtol=1e-6, atol=1e-7)


def test_dropped_is_negative_for_a_student_surer_than_the_teacher(case_factory):
    case = case_factory(4, 50, 3)
    surer_NV = case.teacher_logits_NV.scatter_add(
        1, case.teacher.ids_NK.long(), torch.full((4, 3), 4.0, dtype=torch.float64)
    )
    kl = {
        tail: distillation_loss_parts_reference(
            surer_NV, case.teacher, case.labels_N, 1.0, tail=tail, reduction="none"
        ).kl
        for tail in TAILS
    }
    assert (kl["dropped"] < -0.01).all()
    assert min(kl[tail].min() for tail in TAILS if tail != "dropped") >= 0


def test_reductions_and_the_denominator(case_factory):
    case = case_factory(6, 23, 5).with_ignored(1, 3)
    per_row = distillation_loss_parts_reference(case.logits_NV, case.teacher, case.labels_N, reduction="none")
    assert per_row.loss[1] == per_row.kl[3] == per_row.ce[1] == 0
    torch.testing.assert_close(per_row.loss, 0.7 * 4 * per_row.kl + 0.3 * per_row.ce)
    for kwargs, denominator in [
        ({"reduction": "sum"}, 1),
        ({}, 4),
        ({"num_items_in_batch": 10}, 10),
        ({"num_items_in_batch": torch.tensor(10)}, 10),
        ({"num_items_in_batch": torch.tensor([10])}, 10),
    ]:
        parts = distillation_loss_parts_reference(case.logits_NV, case.teacher, case.labels_N, **kwargs)
        for got, rows in zip(parts, per_row, strict=True):
            torch.testing.assert_close(got, rows.sum() / denominator, rtol=1e-13, atol=0)


def test_kl_and_ce_carry_no_graph(case_factory):
    case = case_factory(3, 11, 4)
    parts = distillation_loss_parts_reference(case.leaf(torch.float64), case.teacher, case.labels_N)
    assert parts.loss.requires_grad
    assert not parts.kl.requires_grad
    assert not parts.ce.requires_grad
