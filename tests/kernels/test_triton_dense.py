"""The Triton kernels of a dense tail, run by the interpreter, against the float64 reference in value and gradient."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_checks import check_against_float64, kernel_rows, reference_rows, terms_of
from logitstore_kernels import TeacherBatch, distillation_loss, distillation_loss_parts

pytestmark = [
    pytest.mark.usefixtures("triton_interpreter"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.5])
def test_value_and_gradient(case_factory, dtype, temperature):
    check_against_float64(case_factory(3, 205, 9).with_ignored(1), terms_of("dense", temperature), dtype)


@pytest.mark.parametrize(
    "extra", [{"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"softcap": 7.0}, {"label_smoothing": 0.2, "softcap": 20.0}],
    ids=str,
)  # fmt: skip
def test_label_smoothing_z_loss_and_softcap(case_factory, extra):
    check_against_float64(case_factory(2, 130, 5), terms_of("dense", 1.5, **extra), torch.float32)


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 2.0), (0.3, 0.7), (1.0, 4.0)])
def test_the_kl_alone_and_other_temperatures(case_factory, alpha, temperature):
    check_against_float64(case_factory(2, 130, 5), terms_of("dense", temperature, alpha), torch.float32)


@pytest.mark.parametrize(("n", "v", "k"), [(1, 1, 1), (1, 2, 1), (3, 7, 7), (2, 131, 1), (2, 97, 96)])
def test_odd_shapes(case_factory, n, v, k):
    check_against_float64(case_factory(n, v, k), terms_of("dense", 2.0), torch.float32)


def test_more_rows_than_a_block(case_factory):
    case = case_factory(65, 70, 2)
    logits_NV, terms = case.logits_NV.float(), terms_of("dense", 2.0)
    truth_N, truth_gradient = reference_rows(logits_NV.double(), case, terms)
    loss_N, _, _, gradient = kernel_rows(logits_NV, case.teacher, case.labels_N, terms, inplace=True)
    torch.testing.assert_close(loss_N.double(), truth_N, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), truth_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("r", "dtype"), [(1, torch.float16), (33, torch.float32), (1024, torch.bfloat16)], ids=str)
def test_any_number_of_coefficients_and_dtype_of_the_basis(case_factory, shape_factory, r, dtype):
    case = case_factory(2, 100, 4)
    coefs_Nr, basis_Vr, bias_V = shape_factory(2, 100, r=r)
    teacher = case.teacher.with_dense_tail(coefs_Nr.float(), basis_Vr.to(dtype), bias_V.to(dtype))
    check_against_float64(replace(case, teacher=teacher), terms_of("dense", 2.0), torch.float32)


@pytest.mark.full_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 15.0}], ids=str)
def test_the_whole_grid(case_factory, dtype, temperature, alpha, extra):
    for (n, v, k), seed in zip([(4, 403, 64), (3, 640, 1), (66, 65, 64)], range(3), strict=True):
        case = case_factory(n, v, k, seed=seed).with_ignored(0)
        check_against_float64(case, terms_of("dense", temperature, alpha, **extra), dtype)


def test_rows_without_a_tail_and_absent_rows(case_factory):
    """Coefficients of such rows may be anything, and so may the logits of uncounted ones."""
    case = case_factory(4, 100, 4)
    dense, ids_NK = case.teacher.dense_tail, case.teacher.ids_NK.clone()
    coefs_Nr, mass_N = dense.coefs_Nr.clone(), case.teacher.tail_logmass_N.clone()
    half_N = case.teacher.tail_logmoment_half_N.clone()
    mass_N[0] = half_N[0] = -math.inf
    ids_NK[1] = -1
    coefs_Nr[:2] = math.nan
    teacher = TeacherBatch.from_topk(ids_NK, case.teacher.logprobs_NK, mass_N, half_N, vocab_size=100)
    case = replace(case, teacher=teacher.with_dense_tail(coefs_Nr, dense.basis_Vr, dense.bias_V))
    leaf = case.leaf(torch.float32).detach()
    leaf[1] = math.nan
    leaf[2] = math.inf
    case = case.with_ignored(2)
    leaf.requires_grad_()
    loss_N = distillation_loss(leaf, case.teacher, case.labels_N, tail="dense", reduction="none")
    loss_N.sum().backward()
    logits_NV = leaf.detach().double()
    truth_N, truth_gradient = reference_rows(logits_NV, case, terms_of("dense", 2.0))
    torch.testing.assert_close(loss_N.detach().double(), truth_N, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(leaf.grad.double(), truth_gradient, rtol=1e-5, atol=1e-6)
    assert (leaf.grad[1:3] == 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_columns_beyond_the_vocabulary_take_no_part(case_factory, inplace):
    case = case_factory(2, 100, 4)
    wide = torch.cat([case.logits_NV, torch.full((2, 90), 50.0, dtype=torch.float64)], dim=1).float()
    terms = terms_of("dense", 2.0)
    loss_N, _, _, gradient = kernel_rows(wide, case.teacher, case.labels_N, terms, inplace=inplace)
    truth_N, truth_gradient = reference_rows(case.logits_NV.float().double(), case, terms)
    torch.testing.assert_close(loss_N.double(), truth_N, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient[:, :100].double(), truth_gradient, rtol=1e-5, atol=1e-6)
    assert (gradient[:, 100:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_minus_inf_student_logits(case_factory, temperature):
    case = case_factory(4, 70, 5)
    logits_NV = case.logits_NV.clone()
    entries, others = case.teacher.ids_NK.long(), torch.ones(4, 70, dtype=torch.bool)
    others.scatter_(1, entries, False)
    logits_NV[0, entries[0, 1]] = -math.inf  # an entry that the teacher gives mass
    logits_NV[1, others[1].nonzero()[0]] = -math.inf  # one token of the tail
    logits_NV[2, others[2]] = -math.inf  # the whole tail
    case = replace(case, logits_NV=logits_NV, labels_N=entries[:, 0])
    terms = terms_of("dense", temperature)
    truth_N, truth_gradient = reference_rows(logits_NV, case, terms)
    loss_N, _, _, gradient = kernel_rows(logits_NV.float(), case.teacher, case.labels_N, terms)
    assert loss_N.isfinite().tolist() == [False, False, False, True]
    torch.testing.assert_close(loss_N.double(), truth_N, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), truth_gradient, rtol=1e-5, atol=1e-6)


def test_nan_in_a_row_that_counts_is_not_hidden(case_factory):
    """Neither at an entry nor in the tail, where NaN is what marks the entries."""
    case = case_factory(3, 100, 4)
    logits_NV = case.logits_NV.float()
    logits_NV[0, int(case.teacher.ids_NK[0, 1])] = math.nan
    logits_NV[1, next(v for v in range(100) if v not in case.teacher.ids_NK[1])] = math.nan
    loss_N, _, _, gradient = kernel_rows(logits_NV, case.teacher, case.labels_N, terms_of("dense", 2.0))
    assert loss_N.isnan().tolist() == [True, True, False]
    assert gradient[:2].isnan().any(dim=1).all()
    assert gradient[2].isfinite().all()


def test_codes_are_decoded_in_the_kernels(case_factory):
    case = case_factory(3, 100, 6)
    t, table = case.teacher, -torch.arange(256, dtype=torch.float32) / 16
    coded = TeacherBatch.from_codes(
        t.ids_NK, (-t.logprobs_NK.float() * 16).round().clamp(0, 254).to(torch.uint8), table,
        scale_N=torch.tensor([0.5, 1.0, 2.0]), offset_N=torch.tensor([0.0, -0.125, -1.0]),
        tail_logmass_N=t.tail_logmass_N, tail_logmoment_half_N=t.tail_logmoment_half_N, vocab_size=100,
    ).with_dense_tail(*vars(t.dense_tail).values())  # fmt: skip
    check_against_float64(replace(case, teacher=coded), terms_of("dense", 2.0), torch.float32)


def test_equal_tail_logits_are_the_uniform_tail(case_factory):
    case = case_factory(2, 100, 4)
    flat = case.teacher.with_dense_tail(torch.zeros(2, 3), torch.ones(100, 3), torch.full((100,), -2.0))
    dense_N, _, _, dense = kernel_rows(case.logits_NV.float(), flat, case.labels_N, terms_of("dense", 2.0))
    uniform_N, _, _, uniform = kernel_rows(case.logits_NV.float(), flat, case.labels_N, terms_of("uniform", 2.0))
    torch.testing.assert_close(dense_N, uniform_N, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(dense, uniform, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scratch_rows", [2, 100])
def test_values_alone_are_the_same_values(case_factory, monkeypatch, scratch_rows):
    """Without a gradient, rows are marked in scratch memory, as many at a time as fit."""
    from logitstore_kernels import triton_dense_launch

    monkeypatch.setattr(triton_dense_launch, "_SCRATCH_BYTES", scratch_rows * 100 * 4)
    case = case_factory(5, 100, 4).with_ignored(2)
    logits_NV = case.logits_NV.float()
    with torch.no_grad():
        got = distillation_loss_parts(logits_NV, case.teacher, case.labels_N, tail="dense", reduction="none")
    expected = distillation_loss_parts(
        logits_NV.clone().requires_grad_(), case.teacher, case.labels_N, tail="dense", reduction="none"
    )
    assert torch.equal(logits_NV, case.logits_NV.float())
    for values, want in zip(got, expected, strict=True):
        assert torch.equal(values, want.detach())
