"""DenseTail: the logits that it writes, how a batch carries it, and every tail that is refused."""

from dataclasses import replace

import pytest
import torch
from logitstore_kernels import TeacherBatch
from logitstore_kernels.dense_tail import DenseTail

N, V, R = 3, 11, 2


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch(case_factory, **changes):
    parts = {"coefs_Nr": numbers(N, R), "basis_Vr": numbers(V, R), "bias_V": numbers(V)} | changes
    return case_factory(N, V, 4).teacher.with_dense_tail(**parts)


@pytest.mark.parametrize("basis_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("v", "r"), [(1, 1), (17, 3), (3001, 129)])  # the last in several blocks
def test_logits_are_the_product_accumulated_in_the_buffers_dtype(dtype, basis_dtype, v, r):
    coefs_Cr, basis_Vr, bias_V = numbers(5, r, dtype=dtype), numbers(v, r, dtype=basis_dtype), numbers(v, seed=1)
    buffer_CV = torch.full((5, v), torch.nan, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        DenseTail(coefs_Cr, basis_Vr, bias_V).write_logits(buffer_CV, coefs_Cr, temperature=1.5)
    expected_CV = (coefs_Cr.double() @ basis_Vr.double().T + bias_V.double()) / 1.5
    terms_CV = coefs_Cr.double().abs() @ basis_Vr.double().abs().T + bias_V.double().abs()
    assert ((buffer_CV - expected_CV).abs() <= 4 * torch.finfo(dtype).eps * terms_CV).all()


def test_a_batch_carries_it_and_keeps_what_else_it_has(case_factory):
    plain = replace(case_factory(N, V, 4).teacher, dense_tail=None)
    kept = (plain.ids_NK, plain.logprobs_NK, plain.tail_logmass_N)
    assert TeacherBatch.from_topk(*kept, vocab_size=V).dense_tail is None
    assert plain.to("meta").dense_tail is None
    coefs_Nr, basis_Vr, bias_V = numbers(N, R, dtype=torch.float64), numbers(V, R, dtype=torch.bfloat16), numbers(V)
    t = plain.with_dense_tail(coefs_Nr, basis_Vr, bias_V)
    assert t.dense_tail.coefs_Nr is coefs_Nr
    assert t.dense_tail.basis_Vr is basis_Vr
    assert t.dense_tail.bias_V is bias_V
    assert t.ids_NK is plain.ids_NK
    assert t.tail_logmoment_half_N is plain.tail_logmoment_half_N
    assert t.uniform_moment().dense_tail is t.dense_tail
    assert t.with_dense_tail(2 * coefs_Nr, basis_Vr, bias_V).dense_tail.coefs_Nr is not coefs_Nr


def test_to_moves_every_tensor_and_copies_none_in_vain(case_factory):
    t = batch(case_factory)
    moved = t.to("meta").dense_tail
    assert {x.device.type for x in (moved.coefs_Nr, moved.basis_Vr, moved.bias_V)} == {"meta"}
    assert t.to("cpu").dense_tail.basis_Vr is t.dense_tail.basis_Vr
    assert t.to("meta").with_dense_tail(moved.coefs_Nr, moved.basis_Vr, moved.bias_V).device.type == "meta"


WRONG_TAILS = [
    ({"coefs_Nr": [[0.0]]}, TypeError, "coefs_Nr must be a torch.Tensor, got list"),
    ({"basis_Vr": None}, TypeError, "basis_Vr must be a torch.Tensor, got NoneType"),
    ({"bias_V": 0.0}, TypeError, "bias_V must be a torch.Tensor, got float"),
    (
        {"coefs_Nr": numbers(N, R).half()},
        TypeError,
        r"coefs_Nr must be torch\.float32 or torch\.float64, got torch\.float16",
    ),
    ({"basis_Vr": numbers(V, R).int()}, TypeError, r"basis_Vr must be torch\.float16 or .*, got torch\.int32"),
    ({"bias_V": numbers(V).int()}, TypeError, r"bias_V must be torch\.float16 or .*, got torch\.int32"),
    ({"coefs_Nr": numbers(N)}, ValueError, r"coefs_Nr must have 2 axes .*got shape \(3,\)"),
    ({"basis_Vr": numbers(V)}, ValueError, r"basis_Vr must have 2 axes .*got shape \(11,\)"),
    ({"bias_V": numbers(V, 1)}, ValueError, r"bias_V must have 1 axes .*got shape \(11, 1\)"),
    ({"coefs_Nr": numbers(N + 1, R)}, ValueError, r"coefs_Nr must have shape \(3, 2\) to go with ids_NK, got \(4, 2\)"),
    ({"basis_Vr": numbers(V + 1, R)}, ValueError, r"basis_Vr must have shape \(11, 2\) to go with voc.*got \(12, 2\)"),
    ({"bias_V": numbers(V - 1)}, ValueError, r"bias_V must have shape \(11,\) to go with vocab_size, got \(10,\)"),
    ({"basis_Vr": numbers(V, 3)}, ValueError, "basis_Vr has 3 columns but coefs_Nr 2 coefficients a row; both must be"),
    (
        {"coefs_Nr": numbers(N, 1025), "basis_Vr": numbers(V, 1025)},
        ValueError,
        "coefs_Nr must have 1 to 1024 coefficients a row, got 1025",
    ),
    (
        {"coefs_Nr": numbers(N, 0), "basis_Vr": numbers(V, 0)},
        ValueError,
        "coefs_Nr must have 1 to 1024 coefficients a row, got 0",
    ),
    (
        {"basis_Vr": numbers(V, R).to("meta")},
        ValueError,
        "coefs_Nr is on cpu, basis_Vr on meta, bias_V on cpu; move them to one device",
    ),
    (
        {"coefs_Nr": numbers(N, R).to("meta"), "basis_Vr": numbers(V, R).to("meta"), "bias_V": numbers(V).to("meta")},
        ValueError,
        r"coefs_Nr is on meta but ids_NK is on cpu; move the whole batch with \.to\(device\)",
    ),
    (
        {"coefs_Nr": torch.tensor([[0.0, 1.0], [torch.nan, 2.0], [torch.inf, 3.0]])},
        ValueError,
        r"teacher row 1 has tail coefficients that are not finite: got \[nan, 2\.0\] \(2 such rows\)",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_TAILS, ids=[wrong[2][:40] for wrong in WRONG_TAILS])
def test_wrong_tails_are_refused(case_factory, changes, error, message):
    with pytest.raises(error, match=message):
        batch(case_factory, **changes)


def test_1024_coefficients_are_not_too_many(case_factory):
    t = batch(case_factory, coefs_Nr=numbers(N, 1024), basis_Vr=numbers(V, 1024))
    assert t.dense_tail.coefs_Nr.shape == (N, 1024)


def test_rows_without_a_tail_may_have_any_coefficients(case_factory):
    case = case_factory(N, V, 4)
    ids_NK, mass_N = case.teacher.ids_NK.clone(), case.teacher.tail_logmass_N.clone()
    ids_NK[0], mass_N[1] = -1, -torch.inf
    coefs_Nr = numbers(N, R)
    coefs_Nr[:2] = torch.nan
    replace(case.teacher, ids_NK=ids_NK, tail_logmass_N=mass_N).with_dense_tail(coefs_Nr, numbers(V, R), numbers(V))


def test_samples_have_no_tail():
    samples = TeacherBatch.from_samples(torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1), vocab_size=V)
    with pytest.raises(
        ValueError, match="a batch of weighted samples has no tail; with_dense_tail is for batches of top"
    ):
        samples.with_dense_tail(numbers(N, R), numbers(V, R), numbers(V))
