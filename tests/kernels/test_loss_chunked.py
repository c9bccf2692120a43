"""The chunked loss, which distillation_loss runs, against the float64 reference, in value and gradient.

The budget of a low-precision result is twice the error of the reference computed from logits of that dtype.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitstore_kernels import TeacherBatch, distillation_loss, distillation_loss_parts
from logitstore_kernels.chunked import chunked_loss_rows
from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.reference import distillation_loss_parts_reference, distillation_loss_reference

TAILS = ["bucket", "uniform", "renormalised", "dropped", "dense"]
TEMPERATURES = [1.0, 1.5, 2.0, 4.0, 0.7]


def assert_within_twice_the_error(got, yardstick, truth, floor):
    """max |got - truth| is at most twice max |yardstick - truth|, plus a few rounding errors of the truth's size."""
    error, budget = (got - truth).abs().max().item(), (yardstick - truth).abs().max().item()
    allowed = 2 * budget + floor * truth.abs().max().item()
    assert error <= allowed, f"error {error:.3e}, the yardstick's {budget:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradcheck(case_factory, temperature, tail, alpha):
    case = case_factory(3, 11, 4).with_ignored(1)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(z, case.teacher, case.labels_N, temperature, alpha, tail), case.leaf(torch.float64)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_float64_equals_the_reference(case_factory, value_and_gradient, temperature, tail, alpha):
    case = case_factory(6, 37, 5).with_ignored(2)
    args = (case.teacher, case.labels_N, temperature, alpha, tail, -100, "none")
    loss, gradient = value_and_gradient(distillation_loss, case.leaf(torch.float64), *args)
    expected, expected_gradient = value_and_gradient(distillation_loss_reference, case.leaf(torch.float64), *args)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_precision_is_within_twice_the_error_of_pytorch(
    case_factory, value_and_gradient, dtype, tail, temperature, reduction
):
    case = case_factory(33, 1003, 16)  # neither a multiple of 16
    leaf = case.leaf(dtype)
    args = (case.teacher, case.labels_N, temperature, 0.7, tail, -100, reduction)
    truth, truth_gradient = value_and_gradient(distillation_loss_reference, leaf.double(), *args)
    plain, plain_gradient = value_and_gradient(distillation_loss_reference, leaf, *args)
    loss, gradient = value_and_gradient(distillation_loss, leaf, *args)
    assert_within_twice_the_error(loss, plain, truth, floor=1e-7)
    assert_within_twice_the_error(gradient, plain_gradient, truth_gradient, floor=1e-7)


@pytest.mark.parametrize(("n", "v", "k"), [(1, 1, 1), (1, 2, 1), (5, 7, 7), (3, 131, 1), (4, 97, 96), (2, 40_961, 64)])
def test_odd_shapes(case_factory, value_and_gradient, n, v, k):
    case = case_factory(n, v, k)
    for tail in TAILS:
        args = (case.teacher, case.labels_N, 2.0, 0.7, tail)
        truth, truth_gradient = value_and_gradient(distillation_loss_reference, case.leaf(torch.float64), *args)
        loss, gradient = value_and_gradient(distillation_loss, case.leaf(torch.float32), *args)
        torch.testing.assert_close(loss, truth, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(gradient, truth_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_function", [distillation_loss, distillation_loss_reference])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_rows_of_different_lengths(case_factory, value_and_gradient, by_hand, loss_function, tail, temperature):
    case = case_factory(4, 23, 6)
    ids_NK = case.teacher.ids_NK.clone()
    ids_NK[0, 5] = ids_NK[1, 2] = -1  # pads at the end and in between
    ids_NK[2, [0, 1, 3, 4, 5]] = -1
    case = replace(case, teacher=replace(case.teacher, ids_NK=ids_NK))
    args = (case.teacher, case.labels_N, temperature, 0.7, tail, -100, "none")
    loss, gradient = value_and_gradient(loss_function, case.leaf(torch.float64), *args)
    expected = torch.from_numpy(by_hand(case, temperature, 0.7, tail))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    assert gradient.sum(dim=1).abs().max() < 1e-13  # a softmax's gradient has no component along a shift
    _, expected_gradient = value_and_gradient(distillation_loss_reference, case.leaf(torch.float64), *args)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)


@given(
    n=st.integers(0, 5), v=st.integers(1, 40), k=st.integers(1, 16), seed=st.integers(0, 2**20),
    temperature=st.sampled_from(TEMPERATURES), alpha=st.sampled_from([0.0, 0.3, 1.0]), tail=st.sampled_from(TAILS),
    spread=st.sampled_from([0.1, 3.0, 200.0]), n_pads=st.integers(0, 3), ignored=st.integers(0, 31),
    extra=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_batch_equals_the_reference(
    case_factory, value_and_gradient, n, v, k, seed, temperature, alpha, tail, spread, n_pads, ignored, extra
):
    case = case_factory(n, v, k, seed=seed, spread=spread)
    case = case.with_ignored(*(row for row in range(n) if ignored >> row & 1))
    logits_NW = torch.cat([case.logits_NV, torch.full((n, extra), 99.0, dtype=torch.float64)], dim=1)
    ids_NK = case.teacher.ids_NK.clone()
    rng = torch.Generator().manual_seed(seed)
    for _ in range(n_pads if n and ids_NK.shape[1] > 1 else 0):  # pads anywhere; their mass goes to the head's shift
        ids_NK[torch.randint(0, n, (1,), generator=rng), torch.randint(1, ids_NK.shape[1], (1,), generator=rng)] = -1
    half_N = case.teacher.tail_logmoment_half_N
    teacher = TeacherBatch.from_topk(
        ids_NK, case.teacher.logprobs_NK, case.teacher.tail_logmass_N, half_N, vocab_size=case.teacher.vocab_size
    )
    teacher = replace(teacher, dense_tail=case.teacher.dense_tail)
    args = (teacher, case.labels_N, temperature, alpha, tail, -100, "none")
    loss, gradient = value_and_gradient(distillation_loss, logits_NW, *args)
    expected, expected_gradient = value_and_gradient(distillation_loss_reference, logits_NW, *args)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss_parts", [distillation_loss_parts, distillation_loss_parts_reference])
def test_float32_bucket_is_zero_at_the_teacher(case_factory, teacher_from_logits, temperature, loss_parts):
    logits_NV = case_factory(9, 5003, 64).teacher_logits_NV.float()
    teacher, labels_N = teacher_from_logits(logits_NV, 64), torch.zeros(9, dtype=torch.int64)
    leaf = logits_NV.clone().requires_grad_()
    parts = loss_parts(leaf, teacher, labels_N, temperature, 1.0, reduction="none")
    parts.loss.sum().backward()
    assert parts.kl.abs().max() <= 1e-6
    assert leaf.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_float32_uniform_is_zero_at_what_the_batch_stands_for(case_factory, dense_logprobs, temperature):
    case = case_factory(9, 5003, 64)
    logits_NV = (temperature * dense_logprobs(case.teacher, temperature)).float()
    parts = distillation_loss_parts(
        logits_NV, case.teacher, case.labels_N, temperature, tail="uniform", reduction="none"
    )
    assert parts.kl.abs().max() <= 1e-6


@pytest.mark.parametrize("temperature", [1.5, 2.0, 4.0])
def test_gradient_is_the_slope_of_the_returned_loss(case_factory, temperature):
    case = case_factory(2, 30, 4)
    leaf = case.leaf(torch.float64)
    args = (case.teacher, case.labels_N, temperature, 1.0)
    distillation_loss(leaf, *args).backward()
    step = torch.zeros_like(leaf)
    step[0, int(case.teacher.ids_NK[0, 0])] = 1e-5
    with torch.no_grad():
        slope = (distillation_loss(leaf + step, *args) - distillation_loss(leaf - step, *args)) / 2e-5
        at_t = distillation_loss_parts(leaf, *args)
    assert (leaf.grad * step).sum().item() / 1e-5 == pytest.approx(slope.item(), rel=1e-8)
    assert at_t.loss.item() == pytest.approx(temperature**2 * at_t.kl.item(), rel=1e-14)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_a_student_tail_mass_of_1e_minus_9_keeps_its_digits(case_factory, value_and_gradient, tail, temperature):
    case = case_factory(4, 2001, 8)
    logits_NV = case.logits_NV.scatter_add(
        1, case.teacher.ids_NK.long(), torch.full((4, 8), 25.0 * temperature, dtype=torch.float64)
    ).float()
    args = (case.teacher, case.labels_N, temperature, 1.0, tail, -100, "none")
    truth, truth_gradient = value_and_gradient(distillation_loss_reference, logits_NV.double(), *args)
    loss, gradient = value_and_gradient(distillation_loss, logits_NV, *args)
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, truth_gradient, rtol=2e-5, atol=1e-6)


def test_minus_inf_student_logits(case_factory, value_and_gradient):
    case = case_factory(4, 20, 5)
    logits_NV = case.logits_NV.clone()
    entries, others = case.teacher.ids_NK.long(), torch.ones(4, 20, dtype=torch.bool)
    others.scatter_(1, entries, False)
    logits_NV[0, entries[0, 1]] = -math.inf  # an entry that the teacher gives mass
    logits_NV[1, others[1].nonzero()[0]] = -math.inf  # one token of the tail
    logits_NV[2, others[2]] = -math.inf  # the whole tail
    labels_N = entries[:, 0]
    for tail in TAILS:
        for temperature in (1.0, 1.5, 2.0):
            args = (case.teacher, labels_N, temperature, 0.7, tail, -100, "none")
            expected, expected_gradient = value_and_gradient(distillation_loss_reference, logits_NV, *args)
            loss, gradient = value_and_gradient(distillation_loss, logits_NV, *args)
            finite_N = [False, tail not in ("uniform", "dense"), tail in ("renormalised", "dropped"), True]
            assert loss.isfinite().tolist() == finite_N
            assert (loss[~loss.isfinite()] == math.inf).all()
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
            assert gradient.isfinite().all()
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tail", TAILS)
def test_one_hot_teacher(case_factory, tail):
    case = case_factory(3, 20, 1)
    teacher = TeacherBatch.from_topk(
        case.labels_N[:, None],
        torch.zeros(3, 1),
        torch.full((3,), -math.inf),
        torch.full((3,), -math.inf),
        vocab_size=20,
    )
    teacher = replace(teacher, dense_tail=case.teacher.dense_tail)
    for temperature in (1.0, 2.0):
        parts = distillation_loss_parts(case.logits_NV, teacher, case.labels_N, temperature, tail=tail)
        nll = -(case.logits_NV / temperature).log_softmax(-1).gather(1, case.labels_N[:, None]).mean()
        assert parts.kl.item() == pytest.approx(nll.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_parts", [distillation_loss_parts, distillation_loss_parts_reference])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_uncounted_rows_have_no_value_and_a_gradient_of_exactly_zero(case_factory, dtype, loss_parts, tail, poison):
    case = case_factory(6, 21, 4).with_ignored(0, 3)
    ids_NK = case.teacher.ids_NK.clone()
    ids_NK[4] = -1  # absent, though its label is a token
    mass_N, half_N = case.teacher.tail_logmass_N.clone(), case.teacher.tail_logmoment_half_N.clone()
    mass_N[4] = half_N[4] = math.nan
    dense = case.teacher.dense_tail
    coefs_Nr = dense.coefs_Nr.clone()
    coefs_Nr[4] = math.nan
    teacher = TeacherBatch.from_topk(ids_NK, case.teacher.logprobs_NK, mass_N, half_N, vocab_size=21)
    teacher = teacher.with_dense_tail(coefs_Nr, dense.basis_Vr, dense.bias_V)
    leaf = case.leaf(dtype).detach()
    leaf[[0, 3, 4]] = poison
    leaf.requires_grad_()
    parts = loss_parts(leaf, teacher, case.labels_N, tail=tail)
    parts.loss.backward()
    keep_rows = [1, 2, 5]
    kept_teacher = TeacherBatch.from_topk(
        ids_NK[keep_rows], teacher.logprobs_NK[keep_rows], mass_N[keep_rows], half_N[keep_rows], vocab_size=21
    ).with_dense_tail(coefs_Nr[keep_rows], dense.basis_Vr, dense.bias_V)
    expected = distillation_loss_parts_reference(
        leaf.detach()[keep_rows].double(), kept_teacher, case.labels_N[keep_rows], tail=tail
    )
    for got, want in zip(parts, expected, strict=True):
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert (leaf.grad[[0, 3, 4]] == 0).all()
    assert (leaf.grad[keep_rows] != 0).any(dim=1).all()


@pytest.mark.parametrize("loss_function", [distillation_loss, distillation_loss_reference])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_row_that_counts_is_a_loss_of_zero_with_a_graph(case_factory, loss_function, reduction, n_rows):
    case = case_factory(n_rows, 21, 4)
    leaf = case.leaf(torch.float32)
    labels_N = torch.full((n_rows,), -100)
    loss = loss_function(leaf, case.teacher, labels_N, reduction=reduction)
    loss.sum().backward()
    assert loss.shape == ((n_rows,) if reduction == "none" else ())
    assert (loss == 0).all()
    assert (leaf.grad == 0).all()
    assert leaf.grad.shape == (n_rows, 21)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("inplace", [False, True])
def test_columns_beyond_the_vocabulary_take_no_part(case_factory, value_and_gradient, tail, inplace):
    case = case_factory(4, 21, 4).with_ignored(2)
    wide = torch.cat([case.logits_NV, torch.full((4, 3), 50.0, dtype=torch.float64)], dim=1).requires_grad_()
    args = (case.teacher, case.labels_N, 2.0, 0.7, tail)
    expected, expected_gradient = value_and_gradient(distillation_loss_reference, case.logits_NV, *args)
    loss = distillation_loss(wide, *args, inplace=inplace)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(wide.grad[:, :21], expected_gradient, rtol=1e-10, atol=1e-14)
    assert (wide.grad[:, 21:] == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_parts_have_both_terms_whatever_their_weight(case_factory, value_and_gradient, alpha, temperature):
    case = case_factory(5, 21, 4).with_ignored(1)
    for reduction in ("mean", "sum", "none"):
        args = (case.teacher, case.labels_N, temperature, alpha, "uniform", -100, reduction)
        leaf = case.leaf(torch.float64)
        parts = distillation_loss_parts(leaf, *args)
        expected = distillation_loss_parts_reference(case.logits_NV, *args)
        for got, want in zip(parts, expected, strict=True):
            torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-14)
        assert not parts.kl.requires_grad
        assert not parts.ce.requires_grad
        parts.loss.sum().backward()
        _, gradient = value_and_gradient(distillation_loss, case.logits_NV, *args)
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-15)


def test_an_infinite_term_without_weight_stays_out(case_factory):
    case = case_factory(3, 20, 4)
    logits_NV = case.logits_NV.clone()
    logits_NV[0, case.teacher.ids_NK[0, 0]] = -math.inf
    labels_N = case.teacher.ids_NK[:, 1].long()
    for loss_parts in (distillation_loss_parts, distillation_loss_parts_reference):
        parts = loss_parts(logits_NV, case.teacher, labels_N, alpha=0.0)
        assert parts.kl == math.inf
        assert parts.loss.item() == pytest.approx(
            torch.nn.functional.cross_entropy(logits_NV, labels_N).item(), rel=1e-12
        )


def test_int32_ids_and_labels_are_the_same_loss(case_factory):
    case = case_factory(5, 21, 4)
    wide = TeacherBatch.from_topk(
        case.teacher.ids_NK.long(), case.teacher.logprobs_NK, case.teacher.tail_logmass_N,
        case.teacher.tail_logmoment_half_N, vocab_size=21,
    )  # fmt: skip
    loss = distillation_loss(case.logits_NV, case.teacher, case.labels_N.int())
    assert loss.item() == distillation_loss(case.logits_NV, wide, case.labels_N).item()


@pytest.mark.parametrize("tail", TAILS)
def test_zeroing_uncounted_rows_equals_leaving_them_out(case_factory, tail):
    # What accelerators do, where finding the rows would synchronise.
    case = case_factory(6, 21, 4).with_ignored(0, 3)
    logits_NV = case.logits_NV.clone()
    logits_NV[3] = math.nan
    results = []
    for skip_uncounted in (True, False):
        leaf = logits_NV.clone().requires_grad_()
        rows = chunked_loss_rows(
            leaf, case.teacher, case.labels_N, case.labels_N != -100, LossTerms(2.0, 0.7, tail, True, True),
            expected_upstream=torch.ones((), dtype=torch.float64), skip_uncounted=skip_uncounted,
        )  # fmt: skip
        rows.loss_N.sum().backward()
        results.append((rows.loss_N.detach(), rows.kl_N, rows.ce_N, leaf.grad))
    for left_out, zeroed in zip(*results, strict=True):
        # A dense tail is a matrix product, which may round a row differently beside other rows.
        torch.testing.assert_close(left_out, zeroed, rtol=1e-13 if tail == "dense" else 0, atol=0)
        assert (zeroed[[0, 3]] == 0).all()
