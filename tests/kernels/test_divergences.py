"""Reverse KL, JSD and total variation against numpy float64 by hand, in value and gradient; and for which tails."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from logitstore_kernels import TeacherBatch, distillation_loss, distillation_loss_parts
from logitstore_kernels.dispatch import why_not_the_kernel
from logitstore_kernels.divergences import TAILS_OF_DIVERGENCE
from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.reference import distillation_loss_parts_reference, distillation_loss_reference

DEFINED = [(name, tail) for name, tails in TAILS_OF_DIVERGENCE.items() if name != "forward_kl" for tail in tails]
UNDEFINED = [(name, tail) for name, tails in TAILS_OF_DIVERGENCE.items() for tail in ("renormalised", "dropped")
             if tail not in tails]  # fmt: skip


@pytest.mark.parametrize(("divergence", "tail"), [*DEFINED, ("forward_kl", "bucket"), ("forward_kl", "dense")])
def test_nothing_is_read_by_the_host_but_on_a_cpu(case_factory, divergence, tail):
    """A meta tensor has no value that could be read: .item(), .any() in an if, nonzero() and the like raise."""
    case = case_factory(40, 50, 5).with_ignored(3)
    teacher = case.teacher.with_dense_tail(torch.randn(40, 2), torch.randn(50, 2), torch.randn(50)).to("meta")
    logits = torch.empty(40, 50, device="meta", requires_grad=True)
    parts = distillation_loss_parts(logits, teacher, case.labels_N.to("meta"), tail=tail, divergence=divergence)
    parts.loss.backward()
    assert logits.grad.shape == logits.shape
    with pytest.raises(RuntimeError, match="meta"):
        bool(parts.loss > 0)


def teacher_over_the_vocabulary(case, row, temperature, tail):
    """p [V] in float64, or over entries and one tail [K + 1] for "bucket"; and the ids of the entries."""
    teacher, beta = case.teacher, 1 / temperature
    entry = teacher.ids_NK[row].numpy() >= 0
    ids = teacher.ids_NK[row].numpy()[entry]
    head = np.exp(teacher.logprobs_NK[row].double().numpy()[entry])
    mass, half = (float(x[row]) for x in (teacher.tail_logmass_N, teacher.tail_logmoment_half_N))
    n_tail = teacher.vocab_size - len(ids)
    head = (head / head.sum() * (1 - math.exp(mass))) ** beta
    tail_mass = (
        math.exp(np.interp(beta, [0, 0.5, 1], [math.log(n_tail), half, mass])) if tail != "renormalised" else 0.0
    )
    total = head.sum() + tail_mass
    head, tail_mass = head / total, tail_mass / total
    if tail == "bucket":
        return np.append(head, tail_mass), ids
    p_V = np.full(teacher.vocab_size, tail_mass / n_tail)
    if tail == "dense":
        dense = teacher.dense_tail
        shape = np.exp((dense.basis_Vr.double() @ dense.coefs_Nr[row].double() + dense.bias_V.double()).numpy() * beta)
        shape[ids] = 0
        p_V = tail_mass * shape / shape.sum()
    p_V[ids] = head
    return p_V, ids


def divergence_by_hand(z_V, case, row, temperature, tail, divergence, beta):
    p, ids = teacher_over_the_vocabulary(case, row, temperature, tail)
    q = np.exp(z_V / temperature - np.max(z_V / temperature))
    q = q / q.sum()
    if tail == "bucket":
        q = np.append(q[ids], np.delete(q, ids).sum())

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    m = beta * p + (1 - beta) * q
    return {
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tvd": lambda: 0.5 * np.abs(p - q).sum(),
    }[divergence]()


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
@pytest.mark.parametrize(("divergence", "tail"), DEFINED)
@pytest.mark.parametrize("k", [1, 5])
def test_values_equal_the_sum_by_hand(case_factory, divergence, tail, temperature, k):
    case = case_factory(4, 23, k).with_ignored(2)
    for function in (distillation_loss_parts_reference, distillation_loss_parts):
        got = function(case.logits_NV, case.teacher, case.labels_N, temperature, 0.6, tail, reduction="none",
                       divergence=divergence, jsd_beta=0.3)  # fmt: skip
        hand = [divergence_by_hand(case.logits_NV[row].numpy(), case, row, temperature, tail, divergence, 0.3)
                if row != 2 else 0.0 for row in range(4)]  # fmt: skip
        np.testing.assert_allclose(got.kl.numpy(), hand, rtol=1e-11, atol=1e-13)
        expected = 0.6 * temperature**2 * np.array(hand) + 0.4 * got.ce.numpy()
        np.testing.assert_allclose(got.loss.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("divergence", "tail"), DEFINED)
def test_the_gradient_is_that_of_the_sum_by_hand(case_factory, value_and_gradient, divergence, tail):
    case, step, temperature = case_factory(3, 13, 4, seed=3), 1e-6, 2.0
    arguments = (case.teacher, case.labels_N, temperature, 1.0, tail)
    options = {"divergence": divergence, "jsd_beta": 0.3, "reduction": "none"}
    loss, gradient = value_and_gradient(distillation_loss_reference, case.logits_NV, *arguments, **options)
    expected = torch.zeros_like(gradient)
    for row in range(3):
        for v in range(13):
            ends = []
            for sign in (1, -1):
                z_V = case.logits_NV[row].numpy().copy()
                z_V[v] += sign * step
                ends.append(temperature**2 * divergence_by_hand(z_V, case, row, temperature, tail, divergence, 0.3))
            expected[row, v] = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=2e-8)
    chunked, its_gradient = value_and_gradient(distillation_loss, case.logits_NV, *arguments, **options)
    torch.testing.assert_close(chunked, loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(its_gradient, gradient, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("divergence", "tail"), DEFINED)
def test_float32_with_pads_ignored_rows_and_impossible_tokens(case_factory, value_and_gradient, divergence, tail):
    case = case_factory(6, 29, 4, seed=5).with_ignored(4)
    ids_NK, logps_NK = case.teacher.ids_NK.clone(), case.teacher.logprobs_NK.clone()
    ids_NK[1, 2:], ids_NK[3] = -1, -1  # a short row, and an absent one
    teacher = TeacherBatch.from_topk(ids_NK, logps_NK, case.teacher.tail_logmass_N,
                                     case.teacher.tail_logmoment_half_N, vocab_size=29)  # fmt: skip
    dense = case.teacher.dense_tail
    teacher = teacher.with_dense_tail(dense.coefs_Nr, dense.basis_Vr, dense.bias_V)
    logits_NV = case.logits_NV.clone()
    logits_NV[0, [3, 7]] = -math.inf
    logits_NV[4] = math.nan
    arguments, options = (teacher, case.labels_N, 2.0, 1.0, tail), {"divergence": divergence}
    truth, true_gradient = value_and_gradient(distillation_loss_reference, logits_NV, *arguments, **options)
    assert truth.isfinite()
    assert true_gradient.isfinite().all()
    assert (true_gradient[[3, 4]] == 0).all()
    loss, gradient = value_and_gradient(distillation_loss, logits_NV.float(), *arguments, **options)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tvd"])
def test_at_the_teacher_itself_value_and_gradient_are_zero(case_factory, value_and_gradient, divergence):
    case = case_factory(3, 11, 11)
    no_tail_N, logp_NV = torch.full((3,), -math.inf), case.teacher_logits_NV.log_softmax(-1)
    teacher = TeacherBatch.from_topk(torch.arange(11).expand(3, 11), logp_NV, no_tail_N, no_tail_N, vocab_size=11)
    loss, gradient = value_and_gradient(
        distillation_loss, case.teacher_logits_NV, teacher, case.labels_N, 2.0, 1.0, divergence=divergence
    )
    assert abs(loss.item()) < 1e-12
    assert gradient.abs().max() < (1.0 if divergence == "tvd" else 1e-12)  # tvd has a kink there


def test_jsd_tends_to_both_kls(case_factory):
    case = case_factory(3, 17, 5)
    arguments = (case.logits_NV, case.teacher, case.labels_N, 1.0, 1.0, "uniform")
    near_0 = distillation_loss(*arguments, divergence="jsd", jsd_beta=1e-7) / 1e-7
    near_1 = distillation_loss(*arguments, divergence="jsd", jsd_beta=1 - 1e-7) / 1e-7
    assert near_0.item() == pytest.approx(distillation_loss(*arguments).item(), rel=1e-4)
    assert near_1.item() == pytest.approx(distillation_loss(*arguments, divergence="reverse_kl").item(), rel=1e-4)


@pytest.mark.parametrize("loss_function", [distillation_loss, distillation_loss_reference])
@pytest.mark.parametrize(("divergence", "tail"), UNDEFINED)
def test_a_tail_that_it_is_not_defined_for_is_refused(case_factory, loss_function, divergence, tail):
    case = case_factory(3, 17, 5)
    with pytest.raises(
        ValueError, match=f"divergence='{divergence}' is not defined for tail='{tail}'.*use one of bucket"
    ):
        loss_function(case.logits_NV, case.teacher, case.labels_N, tail=tail, divergence=divergence)


def test_samples_are_refused():
    teacher = TeacherBatch.from_samples(torch.tensor([[1, 2]]), torch.tensor([[-0.7, -0.7]]), vocab_size=5)
    for divergence in ("reverse_kl", "jsd", "tvd"):
        with pytest.raises(ValueError, match="not defined for tail='sampled': weights of samples are no probabilities"):
            distillation_loss(torch.zeros(1, 5), teacher, torch.tensor([1]), 1.0, tail="sampled", divergence=divergence)


@pytest.mark.parametrize("loss_function", [distillation_loss, distillation_loss_reference])
def test_other_wrong_arguments_are_refused(case_factory, loss_function):
    case = case_factory(3, 17, 5)
    arguments = (case.logits_NV, case.teacher, case.labels_N)
    with pytest.raises(ValueError, match="divergence must be one of forward_kl, reverse_kl, jsd, tvd, got 'kl'"):
        loss_function(*arguments, divergence="kl")
    with pytest.raises(ValueError, match=r"jsd_beta must be in \(0, 1\), got 1.0"):
        loss_function(*arguments, divergence="jsd", jsd_beta=1.0)
    with pytest.raises(TypeError, match="jsd_beta must be a number, got str"):
        loss_function(*arguments, divergence="jsd", jsd_beta="half")
    massless = TeacherBatch.from_topk(case.teacher.ids_NK, case.teacher.logprobs_NK, torch.full((3,), -math.inf),
                                      torch.full((3,), -math.inf), vocab_size=17)  # fmt: skip
    with pytest.raises(ValueError, match="infinite in row 0: the teacher's tail has tokens but no mass"):
        loss_function(case.logits_NV, massless, case.labels_N, divergence="reverse_kl")


def test_the_kernel_takes_forward_kl_alone(case_factory, triton_interpreter):
    case = case_factory(3, 17, 5)
    logits_NV = case.logits_NV.float()
    terms = LossTerms(2.0, 0.7, "bucket", True, True)
    assert why_not_the_kernel(logits_NV, case.teacher, terms) is None
    assert why_not_the_kernel(logits_NV, case.teacher, replace(terms, divergence="jsd")) == (
        "the kernel computes forward KL, and the divergence is jsd"
    )
