"""Label smoothing, z-loss, softcap and row weights without a kernel: against PyTorch's own losses and by hand."""

import math

import pytest
import torch
from logitstore_kernels import distillation_loss, distillation_loss_parts
from logitstore_kernels.reference import distillation_loss_parts_reference, distillation_loss_reference

TAILS = ["bucket", "uniform", "renormalised", "dropped", "dense"]
EXTRAS = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 7.0},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 20.0},
]
LOSSES = [distillation_loss, distillation_loss_reference]


@pytest.mark.parametrize("loss_function", LOSSES)
def test_label_smoothing_is_that_of_pytorch(case_factory, loss_function):
    case = case_factory(5, 37, 4)
    loss = loss_function(case.logits_NV, case.teacher, case.labels_N, alpha=0.0, label_smoothing=0.15)
    expected = torch.nn.functional.cross_entropy(case.logits_NV, case.labels_N, label_smoothing=0.15)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_z_loss_is_the_squared_log_normaliser(case_factory, loss_function):
    case = case_factory(5, 37, 4)
    loss = loss_function(case.logits_NV, case.teacher, case.labels_N, alpha=0.25, z_loss=0.03)
    without = loss_function(case.logits_NV, case.teacher, case.labels_N, alpha=0.25)
    expected = without + 0.75 * 0.03 * (case.logits_NV.exp().sum(1).log() ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("tail", TAILS)
def test_a_softcap_is_the_loss_of_capped_logits(case_factory, loss_function, tail):
    case = case_factory(5, 37, 4)
    loss = loss_function(case.logits_NV, case.teacher, case.labels_N, tail=tail, softcap=4.0)
    capped = 4 * torch.tanh(case.logits_NV / 4)
    expected = loss_function(capped, case.teacher, case.labels_N, tail=tail)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("tail", ["bucket", "dense"])
def test_gradient_in_several_chunks(case_factory, extra, inplace, tail):
    case = case_factory(60, 40_001, 4).with_ignored(3)
    leaf, plain = case.leaf(torch.float64), case.leaf(torch.float64)
    args = (case.teacher, case.labels_N, 2.0, 0.7, tail)
    loss = distillation_loss(leaf * 1, *args, inplace=inplace, **extra)
    (3 * loss).backward()
    expected = distillation_loss_reference(plain, *args, **extra)
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_gradcheck(case_factory, extra):
    case = case_factory(3, 11, 4).with_ignored(1)
    weights_N = torch.tensor([0.5, 1.0, 2.0])
    for loss_function in LOSSES:
        assert torch.autograd.gradcheck(
            lambda z, f=loss_function: f(z, case.teacher, case.labels_N, row_weights_N=weights_N, **extra),
            case.leaf(torch.float64),
        )


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_parts_add_up_and_uncounted_rows_are_zero(case_factory, extra):
    case = case_factory(4, 21, 4).with_ignored(1)
    leaf = case.leaf(torch.float32).detach()
    leaf[1] = math.nan
    leaf.requires_grad_()
    for parts_function in (distillation_loss_parts, distillation_loss_parts_reference):
        parts = parts_function(leaf, case.teacher, case.labels_N, 2.0, 0.7, reduction="none", **extra)
        torch.testing.assert_close(parts.loss.detach(), 0.7 * 4 * parts.kl + 0.3 * parts.ce)
        assert [part[1].item() for part in parts] == [0, 0, 0]
    distillation_loss(leaf, case.teacher, case.labels_N, **extra).backward()
    assert (leaf.grad[1] == 0).all()


@pytest.mark.parametrize("parts_function", [distillation_loss_parts, distillation_loss_parts_reference])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_row_weights_multiply_every_part_and_leave_the_denominator(case_factory, parts_function, reduction):
    case = case_factory(4, 21, 4).with_ignored(1)
    weights_N = torch.tensor([0.5, 9.0, 0.0, -2.0])
    logits_NV = case.logits_NV.clone()
    plain = parts_function(logits_NV, case.teacher, case.labels_N, reduction="none")
    logits_NV[2] = math.nan  # a weight of 0 is a row that is not computed
    parts = parts_function(logits_NV, case.teacher, case.labels_N, reduction=reduction, row_weights_N=weights_N)
    for part, plain_N in zip(parts, plain, strict=True):
        expected = weights_N.double() * plain_N
        if reduction != "none":
            expected = expected.sum() / (3 if reduction == "mean" else 1)
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)


def test_a_weighted_mean(case_factory):
    case = case_factory(4, 21, 4)
    weights_N = torch.tensor([0.5, 1.0, 0.25, 2.0])
    loss = distillation_loss(
        case.logits_NV, case.teacher, case.labels_N, row_weights_N=weights_N, num_items_in_batch=weights_N.sum()
    )
    rows = distillation_loss(case.logits_NV, case.teacher, case.labels_N, reduction="none")
    assert loss.item() == pytest.approx(((weights_N * rows).sum() / weights_N.sum()).item(), rel=1e-6)


WRONG = [
    ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1\.0"),
    ({"label_smoothing": True}, TypeError, "label_smoothing must be a number, got bool"),
    ({"z_loss": -1e-4}, ValueError, "z_loss must be finite and at least 0, got -0.0001"),
    ({"z_loss": math.inf}, ValueError, "z_loss must be finite and at least 0, got inf"),
    ({"softcap": 0.0}, ValueError, r"softcap must be positive and finite, got 0\.0; None is for no softcap"),
    ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
    ({"row_weights_N": [1.0, 1.0]}, TypeError, "row_weights_N must be a torch.Tensor, got list"),
    ({"row_weights_N": torch.ones(2, dtype=torch.int64)}, TypeError, "row_weights_N must be of a float dtype, got"),
    ({"row_weights_N": torch.ones(3)}, ValueError, r"row_weights_N must have shape \(2,\).*got \(3,\)"),
    ({"row_weights_N": torch.ones(2, device="meta")}, ValueError, "row_weights_N is on meta but labels_N is on cpu"),
    ({"row_weights_N": torch.ones(2, requires_grad=True)}, ValueError, r"requires a gradient.*pass \.detach\(\)"),
    (
        {"row_weights_N": torch.tensor([1.0, math.nan])},
        ValueError,
        "row 1 has a row weight that is not finite: got nan",
    ),
]


@pytest.mark.parametrize(("extra", "error", "message"), WRONG)
@pytest.mark.parametrize("loss_function", LOSSES)
def test_what_they_may_not_be_is_refused(case_factory, loss_function, extra, error, message):
    case = case_factory(2, 21, 4)
    with pytest.raises(error, match=message):
        loss_function(case.logits_NV, case.teacher, case.labels_N, **extra)
