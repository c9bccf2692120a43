"""What the tests of the loss kernels share: one launch by the interpreter, and its comparison with float64.

The budget is twice the error of the reference computed from logits of that dtype, the largest of these rows and of
noisy copies of them: on two or three rows alone PyTorch may be right by luck. The interpreter truncates where it
should round to bfloat16, so a bfloat16 gradient is checked in two steps: as float32, and that what is stored is its
truncation. A GPU's conversion rounds to nearest.
"""

import math
from functools import partial

import torch
from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.reference import distillation_loss_reference

BLOCK = 128  # so that small vocabularies have full tiles and a masked one


def assert_within(got, truth, budget, floor=3e-7):
    """Within twice the budget, and some float32 noise."""
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * budget + floor * max(truth.abs().max().item(), 1.0)
    assert error <= allowed, f"error {error:.3e}, the yardstick's {budget:.3e}, allowed {allowed:.3e}"


def kernel_rows(
    logits_NW, teacher, labels_N, terms, *, inplace=False, gradient_dtype=None, block=BLOCK, counted_N=None
):
    """(loss_N, kl_N, ce_N, gradient_NW) of one launch; what is not in place is written into poisoned memory."""
    from logitstore_kernels.triton_dense_launch import launch_dense
    from logitstore_kernels.triton_launch import launch, packed

    is_dense = terms.tail == "dense"
    launch_kernels = launch_dense if is_dense else partial(launch, block=block)
    logits_NW = logits_NW.detach().clone()
    before = logits_NW.clone()
    gradient_NW = logits_NW
    if not inplace:
        gradient_NW = torch.full(logits_NW.shape, math.nan, dtype=gradient_dtype or logits_NW.dtype)
    counted_N = labels_N != -100 if counted_N is None else counted_N
    outputs = launch_kernels(
        logits_NW, gradient_NW, packed(teacher, with_dense_tail=is_dense), labels_N, counted_N.to(torch.uint8),
        torch.ones(len(labels_N)), terms, vocab_size=teacher.vocab_size,
    )  # fmt: skip
    if not inplace:
        torch.testing.assert_close(logits_NW, before, rtol=0, atol=0, equal_nan=True)
    return *outputs, gradient_NW


def reference_rows(logits_NV, case, terms):
    """(loss_N, gradient_NV) of the reference in the logits' dtype; for float64 logits the truth."""
    leaf = logits_NV.detach().clone().requires_grad_()
    loss_N = distillation_loss_reference(
        leaf, case.teacher, case.labels_N, terms.temperature, terms.alpha, terms.tail, -100, "none",
        label_smoothing=terms.label_smoothing, z_loss=terms.z_loss, softcap=terms.softcap,
    )  # fmt: skip
    loss_N.sum().backward()
    return loss_N.detach(), leaf.grad


def errors_of_pytorch(logits_NV, case, terms, n_copies=16):
    """The largest errors (loss, gradient) of the reference in the logits' dtype, over the rows and noisy copies."""
    rng = torch.Generator().manual_seed(0)
    noise = [torch.zeros(logits_NV.shape), *(torch.randn(logits_NV.shape, generator=rng) for _ in range(n_copies))]
    found = []
    for noise_NV in noise:
        x_NV = (logits_NV.float() + 0.1 * noise_NV).to(logits_NV.dtype)
        truth, plain = reference_rows(x_NV.double(), case, terms), reference_rows(x_NV, case, terms)
        found.append([(one.double() - exact).abs().max().item() for one, exact in zip(plain, truth, strict=True)])
    return [max(errors) for errors in zip(*found, strict=True)]


def check_against_float64(case, terms, dtype, *, block=BLOCK):
    logits_NV = case.leaf(dtype).detach()
    truth_N, truth_gradient = reference_rows(logits_NV.double(), case, terms)
    budgets = errors_of_pytorch(logits_NV, case, terms)
    args = (logits_NV, case.teacher, case.labels_N, terms)
    loss_N, _, _, gradient = kernel_rows(*args, gradient_dtype=torch.float32, block=block)
    assert_within(loss_N, truth_N, budgets[0])
    assert_within(gradient.to(dtype), truth_gradient, budgets[1])
    in_place_N, _, _, in_place = kernel_rows(*args, inplace=True, block=block)
    assert torch.equal(in_place_N, loss_N)
    if dtype == torch.bfloat16:
        gradient = (gradient.view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert torch.equal(in_place, gradient.to(dtype))


def terms_of(tail, temperature, alpha=0.7, **extra):
    return LossTerms(temperature, alpha, tail, alpha != 0, alpha != 1, **extra)
