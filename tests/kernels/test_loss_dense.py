"""The loss with a tail of a given shape: what it is at its fixed points and special cases, and what it leaves alone.

The tests of the other tails have "dense" among theirs: against numpy float64 by hand, gradcheck, odd shapes, pads.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from logitstore_kernels import TeacherBatch, distillation_loss, distillation_loss_parts
from logitstore_kernels.reference import distillation_loss_parts_reference, distillation_loss_reference

LOSSES = [distillation_loss, distillation_loss_reference]
LOSS_PARTS = [distillation_loss_parts, distillation_loss_parts_reference]


def with_own_shape(teacher, teacher_logits_NV):
    """The batch with the teacher's own logits for a tail: coefficients in the basis of one token each."""
    v = teacher_logits_NV.shape[1]
    basis_Vr = torch.eye(v, dtype=teacher_logits_NV.dtype)
    return teacher.with_dense_tail(teacher_logits_NV, basis_Vr, torch.zeros_like(basis_Vr[0]))


def exact_batch(teacher_logits_NV, k):
    """The k most probable tokens and both tail moments in float64, which topk_with_tail would round to float32."""
    logp_NV = teacher_logits_NV.log_softmax(-1)
    logp_NK, ids_NK = logp_NV.topk(k)
    tail_NV = logp_NV.scatter(1, ids_NK, -math.inf)
    moments = (tail_NV.logsumexp(1), (tail_NV / 2).logsumexp(1))
    return TeacherBatch.from_topk(ids_NK, logp_NK, *moments, vocab_size=logp_NV.shape[1])


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 18, 19])
def test_with_the_teachers_own_shape_it_is_the_usual_loop(
    case_factory, value_and_gradient, loss_function, temperature, k
):
    case = case_factory(7, 19, k)
    teacher = with_own_shape(exact_batch(case.teacher_logits_NV, k), case.teacher_logits_NV)

    def usual_loop(student_NV):
        logq_NV = F.log_softmax(student_NV / temperature, dim=-1)
        kd = F.kl_div(logq_NV, F.softmax(case.teacher_logits_NV / temperature, dim=-1), reduction="batchmean")
        return 0.7 * kd * temperature * temperature + 0.3 * F.cross_entropy(student_NV, case.labels_N)

    args = (teacher, case.labels_N, temperature, 0.7, "dense")
    loss, gradient = value_and_gradient(loss_function, case.logits_NV, *args)
    expected, expected_gradient = value_and_gradient(usual_loop, case.logits_NV)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss_parts", LOSS_PARTS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_it_is_zero_at_a_teacher_of_low_rank(
    teacher_from_logits, shape_factory, loss_parts, temperature, dtype, spread
):
    shape = shape_factory(9, 5003, r=24, spread=spread)
    teacher_NV = (shape[0] @ shape[1].T + shape[2]).to(dtype)
    teacher = teacher_from_logits(teacher_NV, 64).with_dense_tail(*(part.to(dtype) for part in shape))
    leaf = teacher_NV.clone().requires_grad_()
    labels_N = torch.zeros(9, dtype=torch.int64)
    parts = loss_parts(leaf, teacher, labels_N, temperature, 1.0, "dense", reduction="none")
    parts.loss.sum().backward()
    assert parts.kl.abs().max() <= 1e-6
    assert leaf.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("bias", [0.0, -7.0])
def test_equal_logits_are_the_uniform_tail(case_factory, value_and_gradient, loss_function, temperature, bias):
    case = case_factory(6, 1003, 5)
    flat = case.teacher.with_dense_tail(torch.zeros(6, 2), torch.ones(1003, 2), torch.full((1003,), bias))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        args = (case.labels_N, temperature, 0.7)
        dense = value_and_gradient(loss_function, case.leaf(dtype), flat, *args, "dense")
        uniform = value_and_gradient(loss_function, case.leaf(dtype), flat, *args, "uniform")
        for got, expected in zip(dense, uniform, strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize(("n", "v", "k", "r"), [(1, 2, 1, 1), (1, 37, 1, 1), (4, 97, 96, 5), (3, 130, 7, 1024)])
def test_odd_ranks(shape_factory, case_factory, by_hand, loss_function, n, v, k, r):
    case = case_factory(n, v, k)
    case = replace(case, teacher=case.teacher.with_dense_tail(*shape_factory(n, v, r=r)))
    loss_N = loss_function(case.logits_NV, case.teacher, case.labels_N, 2.0, 0.7, "dense", reduction="none")
    torch.testing.assert_close(loss_N, torch.from_numpy(by_hand(case, 2.0, 0.7, "dense")), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("basis_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("coef_dtype", [torch.float32, torch.float64])
def test_what_is_stored_small_is_computed_wide(
    case_factory, value_and_gradient, loss_function, basis_dtype, coef_dtype
):
    case = case_factory(6, 203, 5)
    dense = case.teacher.dense_tail
    small = case.teacher.with_dense_tail(
        dense.coefs_Nr.to(coef_dtype), dense.basis_Vr.to(basis_dtype), dense.bias_V.to(basis_dtype)
    )
    wide = small.with_dense_tail(
        small.dense_tail.coefs_Nr.double(), small.dense_tail.basis_Vr.double(), small.dense_tail.bias_V.double()
    )
    args = (case.labels_N, 2.0, 1.0, "dense")
    expected = value_and_gradient(distillation_loss_reference, case.leaf(torch.float64), wide, *args)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        got = value_and_gradient(loss_function, case.leaf(dtype), small, *args)
        torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_without_tail_mass_have_no_tail_term(case_factory, value_and_gradient, loss_function, temperature):
    case = case_factory(4, 23, 5)
    mass_N, half_N = case.teacher.tail_logmass_N.clone(), case.teacher.tail_logmoment_half_N.clone()
    mass_N[1] = half_N[1] = -math.inf
    dense = case.teacher.dense_tail
    coefs_Nr = dense.coefs_Nr.clone()
    coefs_Nr[1] = math.nan
    teacher = replace(case.teacher, tail_logmass_N=mass_N, tail_logmoment_half_N=half_N)
    teacher = teacher.with_dense_tail(coefs_Nr, dense.basis_Vr, dense.bias_V)
    args = (case.labels_N, temperature, 0.7)
    loss_N, gradient_NV = value_and_gradient(loss_function, case.logits_NV, teacher, *args, "dense", reduction="none")
    without_N, without_NV = value_and_gradient(
        loss_function, case.logits_NV, teacher, *args, "renormalised", reduction="none"
    )
    torch.testing.assert_close(loss_N[1], without_N[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_NV[1], without_NV[1], rtol=1e-12, atol=1e-15)
    assert loss_N.isfinite().all()


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_a_token_that_neither_side_holds_possible(case_factory, value_and_gradient, loss_function, dtype, temperature):
    case = case_factory(3, 23, 5)
    others_NV = torch.ones(3, 23, dtype=torch.bool).scatter_(1, case.teacher.ids_NK.long(), False)
    token = int(others_NV.all(dim=0).nonzero()[0, 0])
    dense = case.teacher.dense_tail
    bias_V = dense.bias_V.clone()
    bias_V[token] = -1e4  # a probability of 0 in every float dtype
    teacher = case.teacher.with_dense_tail(dense.coefs_Nr, dense.basis_Vr, bias_V)
    logits_NV = case.leaf(dtype).detach()
    logits_NV[:, token] = -math.inf
    labels_N = case.teacher.ids_NK[:, 0].long()
    args = (teacher, labels_N, temperature, 0.7, "dense", -100, "none")
    loss_N, gradient_NV = value_and_gradient(loss_function, logits_NV, *args)
    nearly_NV = logits_NV.double().masked_fill(logits_NV == -math.inf, -1e5)
    expected_N, expected_NV = value_and_gradient(distillation_loss_reference, nearly_NV, *args)
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-5, atol=1e-6)
    assert (gradient_NV[:, token] == 0).all()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_at_alpha_0_the_tail_is_not_touched(case_factory, value_and_gradient, loss_function):
    case = case_factory(4, 23, 5)
    dense = case.teacher.dense_tail
    teacher = case.teacher.with_dense_tail(dense.coefs_Nr, dense.basis_Vr * math.nan, dense.bias_V)
    loss, gradient = value_and_gradient(loss_function, case.logits_NV, teacher, case.labels_N, 2.0, 0.0, "dense")
    expected = value_and_gradient(F.cross_entropy, case.logits_NV, case.labels_N)
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("loss_parts", LOSS_PARTS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_reductions_and_parts(case_factory, loss_parts, alpha):
    case = case_factory(6, 23, 5).with_ignored(1, 3)
    args = (case.logits_NV, case.teacher, case.labels_N, 1.5, alpha, "dense")
    rows = loss_parts(*args, reduction="none")
    assert rows.loss[1] == rows.kl[3] == rows.ce[1] == 0
    torch.testing.assert_close(rows.loss, alpha * 2.25 * rows.kl + (1 - alpha) * rows.ce)
    for kwargs, denominator in [({"reduction": "sum"}, 1), ({}, 4), ({"num_items_in_batch": torch.tensor([10])}, 10)]:
        for got, value_N in zip(loss_parts(*args, **kwargs), rows, strict=True):
            torch.testing.assert_close(got, value_N.sum() / denominator, rtol=1e-13, atol=0)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_the_other_tails_are_what_they_are_without_it(case_factory, value_and_gradient, loss_function):
    case = case_factory(6, 23, 5)
    for tail in ("bucket", "uniform", "renormalised", "dropped"):
        args = (case.labels_N, 2.0, 0.7, tail)
        got = value_and_gradient(loss_function, case.logits_NV, case.teacher, *args)
        expected = value_and_gradient(loss_function, case.logits_NV, replace(case.teacher, dense_tail=None), *args)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
