"""The Triton kernel of the loss, run by Triton's interpreter, against the float64 reference in value and gradient."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from kernel_checks import BLOCK, check_against_float64, kernel_rows, reference_rows, terms_of
from logitstore_kernels import TeacherBatch, distillation_loss, distillation_loss_parts
from logitstore_kernels.reference import distillation_loss_parts_reference

pytestmark = [
    pytest.mark.usefixtures("triton_interpreter"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:logits rows are"),
]
TAILS = ["bucket", "uniform", "renormalised", "dropped"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.5])
def test_value_and_gradient(case_factory, dtype, tail, temperature):
    check_against_float64(case_factory(3, 301, 9).with_ignored(1), terms_of(tail, temperature), dtype)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 2.0), (1.0, 2.0), (1.0, 0.7), (0.3, 4.0)])
@pytest.mark.parametrize("tail", TAILS)
def test_each_term_alone_and_other_temperatures(case_factory, tail, alpha, temperature):
    check_against_float64(case_factory(2, 259, 5), terms_of(tail, temperature, alpha), torch.float32)


@pytest.mark.parametrize(("n", "v", "k"), [(1, 1, 1), (1, 2, 1), (3, 7, 7), (2, 131, 1), (2, 97, 96), (2, 256, 3)])
@pytest.mark.parametrize("tail", TAILS)
def test_odd_shapes(case_factory, n, v, k, tail):
    check_against_float64(case_factory(n, v, k), terms_of(tail, 2.0), torch.float32)


@pytest.mark.parametrize(
    "extra",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 7.0},
        {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("tail", TAILS)
def test_label_smoothing_z_loss_and_softcap(case_factory, tail, extra):
    for temperature, alpha in ((1.0, 0.7), (1.5, 0.7), (2.0, 0.0)):
        check_against_float64(case_factory(2, 259, 5), terms_of(tail, temperature, alpha, **extra), torch.float32)


@pytest.mark.full_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 15.0}], ids=str)
def test_the_whole_grid(case_factory, dtype, tail, temperature, alpha, extra):
    for (n, v, k), seed in zip([(4, 1003, 64), (3, 640, 1), (2, 65, 64)], range(3), strict=True):
        case = case_factory(n, v, k, seed=seed).with_ignored(0)
        check_against_float64(case, terms_of(tail, temperature, alpha, **extra), dtype)


@pytest.mark.parametrize("tail", TAILS)
def test_rows_of_different_lengths_and_absent_rows(case_factory, tail):
    case = case_factory(4, 300, 6)
    ids_NK = case.teacher.ids_NK.clone()
    ids_NK[0, 5] = ids_NK[1, 2] = -1  # pads at the end and in between
    ids_NK[2, [0, 1, 3, 4, 5]] = -1
    ids_NK[3] = -1
    case = replace(case, teacher=replace(case.teacher, ids_NK=ids_NK))
    for temperature in (1.0, 2.0):
        leaf = case.leaf(torch.float32)
        loss_N = distillation_loss(leaf, case.teacher, case.labels_N, temperature, tail=tail, reduction="none")
        loss_N.sum().backward()
        truth_N, truth_gradient = reference_rows(case.logits_NV, case, terms_of(tail, temperature))
        torch.testing.assert_close(loss_N.detach().double(), truth_N, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(leaf.grad.double(), truth_gradient, rtol=1e-5, atol=1e-6)
        assert (leaf.grad[3] == 0).all()


@pytest.mark.parametrize("numbers", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_codes_are_decoded_in_the_kernel(case_factory, tail, numbers):
    case = case_factory(3, 300, 6)
    t, table = case.teacher, -torch.arange(256, dtype=torch.float32) / 16
    table[255] = math.nan  # no entry has that code
    codes_NK = (-t.logprobs_NK.float() * 16).round().clamp(0, 254).to(torch.uint8)
    codes_NK[0, 5] = 255
    ids_NK = t.ids_NK.clone()
    ids_NK[0, 5] = -1
    row_numbers = {"scale_N": torch.tensor([0.5, 1.0, 2.0]), "offset_N": torch.tensor([0.0, -0.125, -1.0])}
    coded = TeacherBatch.from_codes(
        ids_NK, codes_NK, table, **(row_numbers if numbers else {}), tail_logmass_N=t.tail_logmass_N,
        tail_logmoment_half_N=t.tail_logmoment_half_N, vocab_size=300,
    )  # fmt: skip
    check_against_float64(replace(case, teacher=coded), terms_of(tail, 2.0), torch.float32)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_uncounted_rows_have_no_value_and_a_gradient_of_exactly_zero(case_factory, tail, inplace, poison):
    case = case_factory(3, 300, 4)
    logits_NV = case.logits_NV.float()
    logits_NV[1] = poison
    counted_N = torch.tensor([True, False, True])
    loss_N, kl_N, ce_N, gradient = kernel_rows(
        logits_NV, case.teacher, case.labels_N, terms_of(tail, 2.0), inplace=inplace, counted_N=counted_N
    )
    assert loss_N[1] == kl_N[1] == ce_N[1] == 0
    assert (gradient[1] == 0).all()
    assert (gradient[[0, 2]] != 0).any(dim=1).all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_columns_beyond_the_vocabulary_take_no_part(case_factory, tail, inplace):
    case = case_factory(2, 200, 4)
    wide = torch.cat([case.logits_NV, torch.full((2, 90), 50.0, dtype=torch.float64)], dim=1).float()
    loss_N, _, _, gradient = kernel_rows(wide, case.teacher, case.labels_N, terms_of(tail, 2.0), inplace=inplace)
    truth_N, truth_gradient = reference_rows(case.logits_NV.float().double(), case, terms_of(tail, 2.0))
    torch.testing.assert_close(loss_N.double(), truth_N, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient[:, :200].double(), truth_gradient, rtol=1e-5, atol=1e-6)
    assert (gradient[:, 200:] == 0).all()


def test_minus_inf_student_logits(case_factory):
    case = case_factory(4, 150, 5)
    logits_NV = case.logits_NV.clone()
    entries, others = case.teacher.ids_NK.long(), torch.ones(4, 150, dtype=torch.bool)
    others.scatter_(1, entries, False)
    logits_NV[0, entries[0, 1]] = -math.inf  # an entry that the teacher gives mass
    logits_NV[1, others[1].nonzero()[0]] = -math.inf  # one token of the tail
    logits_NV[2, others[2]] = -math.inf  # the whole tail
    case = replace(case, logits_NV=logits_NV, labels_N=entries[:, 0])
    for tail, temperature in itertools.product(TAILS, (1.0, 1.5, 2.0)):
        terms = terms_of(tail, temperature)
        truth_N, truth_gradient = reference_rows(logits_NV, case, terms)
        loss_N, _, _, gradient = kernel_rows(logits_NV.float(), case.teacher, case.labels_N, terms)
        assert loss_N.isfinite().tolist() == [False, tail != "uniform", tail in ("renormalised", "dropped"), True]
        torch.testing.assert_close(loss_N.double(), truth_N, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient.double(), truth_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_a_ruled_out_token_stays_so_under_a_softcap(case_factory, tail):
    case = case_factory(2, 150, 5)
    logits_NV = case.logits_NV.clone()
    logits_NV[0, 7 if 7 not in case.teacher.ids_NK[0] else 8] = -math.inf
    case = replace(case, logits_NV=logits_NV, labels_N=case.teacher.ids_NK[:, 0].long())
    terms = terms_of(tail, 2.0, softcap=5.0)
    truth_N, truth_gradient = reference_rows(logits_NV, case, terms)
    loss_N, _, _, gradient = kernel_rows(logits_NV.float(), case.teacher, case.labels_N, terms)
    torch.testing.assert_close(loss_N.double(), truth_N, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), truth_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_nan_in_a_row_that_counts_is_not_hidden(case_factory, tail):
    case = case_factory(2, 300, 4)
    for column in (int(case.teacher.ids_NK[0, 1]), 299):
        logits_NV = case.logits_NV.float()
        logits_NV[0, column] = math.nan
        loss_N, *_ = kernel_rows(logits_NV, case.teacher, case.labels_N, terms_of(tail, 2.0))
        assert loss_N.isnan().tolist() == [True, False]


def test_an_id_or_label_outside_the_vocabulary_is_nan_and_touches_no_memory(case_factory):
    # On a CPU both are refused; on an accelerator nobody reads them before the kernel does.
    case = case_factory(2, 300, 4)
    ids_NK, labels_N = case.teacher.ids_NK.clone(), case.labels_N.clone()
    ids_NK[0, 2] = 300
    labels_N[1] = 301
    teacher = replace(case.teacher, ids_NK=ids_NK)
    wide = torch.full((4, 300), 5.0)
    wide[:2] = case.logits_NV.float()
    from logitstore_kernels.triton_launch import launch, packed

    outputs = launch(
        wide[:2], wide[:2], packed(teacher), labels_N, torch.ones(2, dtype=torch.uint8), torch.ones(2),
        terms_of("bucket", 2.0), vocab_size=300, block=BLOCK,
    )  # fmt: skip
    assert outputs.loss_N.isnan().all()
    assert (wide[2:] == 5.0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bucket_is_zero_at_the_teacher(case_factory, teacher_from_logits, temperature):
    logits_NV = case_factory(2, 5003, 64).teacher_logits_NV.float()
    teacher, labels_N = teacher_from_logits(logits_NV, 64), torch.zeros(2, dtype=torch.int64)
    leaf = logits_NV.clone().requires_grad_()
    parts = distillation_loss_parts(leaf, teacher, labels_N, temperature, 1.0, reduction="none")
    parts.loss.sum().backward()
    assert parts.kl.abs().max() <= 1e-6
    assert leaf.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("tail", TAILS)
def test_a_student_tail_mass_of_1e_minus_9_keeps_its_digits(case_factory, tail):
    case = case_factory(2, 2001, 8)
    logits_NV = case.logits_NV.scatter_add(
        1, case.teacher.ids_NK.long(), torch.full((2, 8), 50.0, dtype=torch.float64)
    ).float()
    terms = terms_of(tail, 2.0, 1.0)
    truth_N, truth_gradient = reference_rows(logits_NV.double(), case, terms)
    loss_N, _, _, gradient = kernel_rows(logits_NV, case.teacher, case.labels_N, terms, block=1024)
    torch.testing.assert_close(loss_N.double(), truth_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), truth_gradient, rtol=2e-5, atol=1e-6)


def test_samples(case_factory):
    case = case_factory(3, 300, 6)
    weights_NK = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) * 2
    samples = TeacherBatch.from_samples(case.teacher.ids_NK, weights_NK.log(), vocab_size=300)
    check_against_float64(replace(case, teacher=samples), terms_of("sampled", 1.0), torch.float32)


@pytest.mark.parametrize("tail", TAILS)
def test_values_alone_are_the_same_values(case_factory, tail):
    """Without a gradient, rows are masked in scratch memory that programs use again and again."""
    case = case_factory(5, 300, 4).with_ignored(2)
    logits_NV = case.logits_NV.float()
    with torch.no_grad():
        got = distillation_loss_parts(logits_NV, case.teacher, case.labels_N, tail=tail, reduction="none")
    with_gradient = distillation_loss_parts(
        logits_NV.clone().requires_grad_(), case.teacher, case.labels_N, tail=tail, reduction="none"
    )
    assert torch.equal(logits_NV, case.logits_NV.float())
    for values, expected in zip(got, with_gradient, strict=True):
        assert torch.equal(values, expected.detach())


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parts_have_both_terms_whatever_their_weight(case_factory, alpha, reduction):
    case = case_factory(3, 200, 4).with_ignored(1)
    args = (case.teacher, case.labels_N, 1.5, alpha, "uniform", -100, reduction)
    parts = distillation_loss_parts(case.leaf(torch.float32), *args)
    expected = distillation_loss_parts_reference(case.logits_NV, *args)
    for got, want in zip(parts, expected, strict=True):
        torch.testing.assert_close(got.detach().double(), want, rtol=2e-6, atol=2e-6)


def test_an_infinite_term_without_weight_stays_out(case_factory):
    case = case_factory(2, 200, 4)
    logits_NV = case.logits_NV.float()
    logits_NV[0, case.teacher.ids_NK[0, 0]] = -math.inf
    labels_N = case.teacher.ids_NK[:, 1].long()
    leaf = logits_NV.requires_grad_()
    parts = distillation_loss_parts(leaf, case.teacher, labels_N, alpha=0.0)
    parts.loss.backward()
    assert parts.kl == math.inf
    assert parts.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(leaf, labels_N).item(), rel=1e-6)
    assert leaf.grad.isfinite().all()


def test_int32_labels_and_int64_ids(case_factory):
    case = case_factory(2, 200, 4)
    logits_NV, terms = case.logits_NV.float(), terms_of("bucket", 2.0)
    expected = kernel_rows(logits_NV, case.teacher, case.labels_N, terms)
    wide = replace(case.teacher, ids_NK=case.teacher.ids_NK.long())
    for got, want in zip(kernel_rows(logits_NV, wide, case.labels_N.int(), terms), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("n_columns", [300, 304])
def test_rows_that_are_apart(case_factory, n_columns):
    """A view of the first columns of a wider buffer: what lies between the rows is left alone."""
    case = case_factory(3, 300, 4)
    wide = torch.full((3, 320), 7.0)
    wide[:, :300] = case.logits_NV.float()
    view = wide[:, :n_columns].detach().requires_grad_()
    loss = distillation_loss(view * 1, case.teacher, case.labels_N)
    with_gap = wide.clone()
    leaf = torch.zeros(3, n_columns, requires_grad=True)
    logits = with_gap[:, :n_columns].add_(leaf)
    gap = distillation_loss(logits, case.teacher, case.labels_N, inplace=True)
    gap.backward()
    assert gap.item() == loss.item()
    assert (with_gap[:, n_columns:] == 7.0).all()
    assert leaf.grad.abs().sum() > 0


def test_addresses_beyond_two_to_the_31_are_computed_in_64_bits(case_factory):
    """Rows 2^31 elements apart, of which only the pages in use exist."""
    case = case_factory(2, 130, 3)
    stride = 2**31 + 16
    storage = torch.UntypedStorage(2 * (stride + 256))
    logits = torch.empty(0, dtype=torch.float16).set_(storage, 0, (2, 130), (stride, 1))
    logits.copy_(case.logits_NV)
    expected = kernel_rows(logits.clone(), case.teacher, case.labels_N, terms_of("bucket", 2.0), inplace=True)
    from logitstore_kernels.triton_launch import launch, packed

    outputs = launch(
        logits, logits, packed(case.teacher), case.labels_N, torch.ones(2, dtype=torch.uint8), torch.ones(2),
        terms_of("bucket", 2.0), vocab_size=130, block=BLOCK,
    )  # fmt: skip
    assert torch.equal(outputs.loss_N, expected[0])
    assert torch.equal(logits, expected[3])
