"""The loss through a linear head against the float64 reference of its logits: value and the gradients of all parts."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from logitstore_kernels import (
    TeacherBatch,
    distillation_loss,
    fused_linear_distillation_loss,
    fused_linear_distillation_loss_parts,
)
from logitstore_kernels.dispatch import why_not_the_kernel
from logitstore_kernels.linear_chunks import LinearHead, linear_chunk_rows, linear_loss_rows
from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.reference import distillation_loss_parts_reference, distillation_loss_reference
from torch.utils._python_dispatch import TorchDispatchMode

TAILS = ["bucket", "uniform", "renormalised", "dropped", "dense"]
N, V, D = 10, 37, 6


def head_of(n=N, v=V, d=D, *, dtype=torch.float64, bias=True, extra=0):
    """Leaves hidden_ND, weight_VD and bias (or None) whose logits are a few units wide; `extra` rows pad the head."""
    rng = torch.Generator().manual_seed(5)
    hidden_ND = torch.randn(n, d, generator=rng, dtype=torch.float64)
    weight_VD = torch.randn(v + extra, d, generator=rng, dtype=torch.float64)
    bias_V = torch.randn(v + extra, generator=rng, dtype=torch.float64) if bias else None
    head = (hidden_ND, weight_VD, bias_V)
    return tuple(None if x is None else x.to(dtype).requires_grad_() for x in head)


def linear_reference(hidden_ND, weight_VD, teacher, labels_N, bias, *args, **kwargs):
    """The reference loss of the logits of a Linear."""
    return distillation_loss_reference(F.linear(hidden_ND, weight_VD, bias), teacher, labels_N, *args, **kwargs)


def value_and_gradients(loss_function, head, teacher, labels_N, *args, upstream=None, **kwargs):
    """[loss, gradient of each part of the head that there is], float64; upstream: one number, or [N] for "none"."""
    loss = loss_function(head[0], head[1], teacher, labels_N, head[2], *args, **kwargs)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    gradients = torch.autograd.grad(loss, [part for part in head if part is not None], upstream)
    return [x.detach().double() for x in (loss, *gradients)]


def assert_close(got, expected, *, rtol=1e-11, atol=1e-13):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_float64_equals_the_reference(case_factory, temperature, tail, alpha):
    case = case_factory(N, V, 5).with_ignored(2, 3, 9)
    upstreams = {"mean": torch.tensor(3.0), "sum": torch.tensor(-0.5), "none": torch.linspace(-1, 1, N)}
    for reduction, bias, extra, chunk_rows in [
        ("mean", True, 0, 3), ("mean", False, 3, None), ("sum", True, 3, 1), ("none", True, 2, 4), ("none", False, 0, 7)
    ]:  # fmt: skip
        head = head_of(bias=bias, extra=extra)
        args = (case.teacher, case.labels_N)
        options = {"temperature": temperature, "alpha": alpha, "tail": tail, "reduction": reduction}
        options["upstream"] = upstreams[reduction]
        got = value_and_gradients(fused_linear_distillation_loss, head, *args, **options, chunk_rows=chunk_rows)
        assert_close(got, value_and_gradients(linear_reference, head, *args, **options))


def test_gradcheck(case_factory):
    case = case_factory(4, 9, 3).with_ignored(1)
    head = head_of(4, 9, 3)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: fused_linear_distillation_loss(
                h, w, case.teacher, case.labels_N, b, reduction=reduction, chunk_rows=2
            ),
            head,
        )


def test_samples_and_the_number_of_items(case_factory):
    case = case_factory(N, V, 5).with_ignored(4)
    samples = TeacherBatch.from_samples(case.teacher.ids_NK, case.teacher.logprobs_NK, vocab_size=V)
    for n_items in (None, 17, torch.tensor(17), torch.tensor(0)):
        args = (head_of(), samples, case.labels_N, 1.0, 0.7, "sampled", -100, "mean", n_items)
        got = value_and_gradients(fused_linear_distillation_loss, *args, chunk_rows=4)
        assert_close(got, value_and_gradients(linear_reference, *args))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 5.0},
        {"row_weights_N": torch.linspace(-1, 2, N).double()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_other_terms_of_the_loss(case_factory, options, reduction):
    case = case_factory(N, V, 5).with_ignored(4)
    if "row_weights_N" in options:
        options["row_weights_N"][2] = 0.0
    upstream = torch.linspace(-1, 1, N) if reduction == "none" else torch.tensor(3.0)
    for head, args in itertools.product([head_of(), head_of(bias=False)], [(2.0, 0.7, "bucket"), (1.5, 0.7, "dense")]):
        args = (head, case.teacher, case.labels_N, *args, -100, reduction)
        got = value_and_gradients(fused_linear_distillation_loss, *args, upstream=upstream, chunk_rows=4, **options)
        assert_close(got, value_and_gradients(linear_reference, *args, upstream=upstream, **options))


def coded_teacher(teacher: TeacherBatch) -> TeacherBatch:
    """The same entries with one-byte codes of other values, a scale and an offset to each row."""
    rng = torch.Generator().manual_seed(3)
    codes_NK = torch.randint(256, teacher.ids_NK.shape, generator=rng, dtype=torch.uint8)
    return TeacherBatch.from_codes(
        teacher.ids_NK, codes_NK, torch.linspace(-8, 0, 256), scale_N=torch.linspace(0.5, 1, N),
        offset_N=torch.linspace(-1, 0, N), tail_logmass_N=teacher.tail_logmass_N,
        tail_logmoment_half_N=teacher.tail_logmoment_half_N, vocab_size=V,
    )  # fmt: skip


def test_a_teacher_of_codes(case_factory):
    case = case_factory(N, V, 5).with_ignored(4)
    teacher = coded_teacher(case.teacher)
    for reduction in ("mean", "none"):
        args = (head_of(), teacher, case.labels_N, 2.0, 0.7, "bucket", -100, reduction)
        got = value_and_gradients(fused_linear_distillation_loss, *args, chunk_rows=4)
        assert_close(got, value_and_gradients(linear_reference, *args))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("tail", "weighted"), [("bucket", False), ("bucket", True), ("dense", False)])
def test_the_triton_kernel_between_the_products(case_factory, triton_interpreter, reduction, tail, weighted):
    case = case_factory(N, V, 5).with_ignored(4)
    dense = case.teacher.dense_tail
    teacher = coded_teacher(case.teacher).with_dense_tail(dense.coefs_Nr, dense.basis_Vr, dense.bias_V)
    head = head_of(dtype=torch.float32, extra=2)
    assert why_not_the_kernel(head[0].new_empty(N, V), teacher, LossTerms(2.0, 0.7, tail, True, True)) is None
    exact = tuple(x.detach().double().requires_grad_() for x in head)
    options = {"row_weights_N": torch.linspace(-1, 2, N)} if weighted else {}
    args = (teacher, case.labels_N, 2.0, 0.7, tail, -100, reduction)
    got = value_and_gradients(fused_linear_distillation_loss, head, *args, chunk_rows=4, **options)
    for one, other in zip(got, value_and_gradients(linear_reference, exact, *args, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_row_weights_in_float16(case_factory):
    case = case_factory(N, V, 5).with_ignored(4)
    head = head_of(dtype=torch.float16)
    exact = tuple(x.detach().double().requires_grad_() for x in head)
    args = (case.teacher, case.labels_N)
    for weights_N in (torch.linspace(-3, 300, N), torch.zeros(N)):
        plain = value_and_gradients(linear_reference, head, *args, row_weights_N=weights_N)
        truth = value_and_gradients(linear_reference, exact, *args, row_weights_N=weights_N)
        got = value_and_gradients(fused_linear_distillation_loss, head, *args, row_weights_N=weights_N, chunk_rows=4)
        for ours, yardstick, value in zip(got, plain, truth, strict=True):
            assert (ours - value).abs().max() <= 2 * (yardstick - value).abs().max() + 1e-7 * value.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_precision_is_within_twice_the_error_of_pytorch(case_factory, dtype, reduction):
    n, v, d = 65, 503, 48
    case = case_factory(n, v, 16)
    head = head_of(n, v, d, dtype=dtype)
    head = tuple((x.detach() / d**0.25).requires_grad_() for x in head)
    exact = tuple(x.detach().double().requires_grad_() for x in head)
    for tail in ("bucket", "dense"):
        args = (case.teacher, case.labels_N, 2.0, 0.7, tail, -100, reduction)
        truth = value_and_gradients(linear_reference, exact, *args)
        plain = value_and_gradients(linear_reference, head, *args)
        got = value_and_gradients(fused_linear_distillation_loss, head, *args, chunk_rows=16)
        for ours, yardstick, value in zip(got, plain, truth, strict=True):
            error, budget = (ours - value).abs().max(), (yardstick - value).abs().max()
            assert error <= 2 * budget + 1e-7 * value.abs().max()


def test_the_weight_s_gradient_is_the_sum_over_chunks_as_accelerators_add_it(case_factory, monkeypatch):
    """Products of a chunk in half precision, added in float32: the branch that no CPU takes."""
    monkeypatch.setattr("logitstore_kernels.linear_chunks._WIDENED_PRODUCTS_ON", ())
    n, v, d = 65, 503, 48
    case = case_factory(n, v, 16)
    head = tuple(
        (x.detach() / d**0.25).requires_grad_() for x in head_of(n, v, d, dtype=torch.bfloat16, bias=False)[:2]
    )
    args = (case.teacher, case.labels_N, 2.0, 0.7, "bucket", -100, "sum")
    exact = (*(x.detach().double().requires_grad_() for x in head), None)
    truth = value_and_gradients(linear_reference, exact, *args)
    plain = value_and_gradients(linear_reference, (*head, None), *args)
    got = value_and_gradients(fused_linear_distillation_loss, (*head, None), *args, chunk_rows=16)
    for ours, yardstick, value in zip(got, plain, truth, strict=True):
        assert (ours - value).norm() <= 2 * (yardstick - value).norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(case_factory, reduction):
    n, v, d = 65, 503, 48
    case = case_factory(n, v, 16)
    head = tuple((x.detach() / d**0.25).requires_grad_() for x in head_of(n, v, d, dtype=torch.float32))
    exact = tuple(x.detach().double().requires_grad_() for x in head)
    args = (case.teacher, case.labels_N, 2.0, 0.7, "bucket", -100, reduction)
    truth = value_and_gradients(linear_reference, exact, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = value_and_gradients(linear_reference, head, *args)
        got = value_and_gradients(fused_linear_distillation_loss, head, *args, chunk_rows=16)
        wide = value_and_gradients(fused_linear_distillation_loss, exact, *args)
    for ours, yardstick, value in zip(got, plain, truth, strict=True):
        error, budget = (ours - value).abs().max(), (yardstick - value).abs().max()
        assert budget / 100 < error <= 2 * budget
    assert_close(wide, truth)  # autocast leaves float64 alone


def test_a_weight_of_another_dtype_under_autocast_has_its_gradient_in_that_dtype(case_factory):
    case = case_factory(N, V, 5)
    hidden_ND, weight_VD, bias = head_of(dtype=torch.float32)
    hidden_ND = hidden_ND.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_distillation_loss(hidden_ND, weight_VD, case.teacher, case.labels_N, bias)
    loss.backward()
    assert (hidden_ND.grad.dtype, weight_VD.grad.dtype, bias.grad.dtype) == (torch.bfloat16, *(torch.float32,) * 2)
    # Summed in float32 and never rounded to bfloat16.
    assert (weight_VD.grad != weight_VD.grad.bfloat16()).any()


@pytest.mark.parametrize("skip_uncounted", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_uncounted_rows_leave_no_trace(case_factory, skip_uncounted, poison):
    case = case_factory(N, V, 5).with_ignored(0, 6)
    hidden_ND, weight_VD, bias = (x.detach() for x in head_of())
    counted_N = case.labels_N != -100
    upstream = torch.tensor(0.5, dtype=torch.float64)
    poisoned_ND = hidden_ND.clone()
    poisoned_ND[[0, 6]] = poison
    results = []
    for hidden in (hidden_ND, poisoned_ND):
        rows, gradients = linear_loss_rows(
            LinearHead(hidden, weight_VD, bias), case.teacher, case.labels_N, counted_N,
            LossTerms(2.0, 0.7, "bucket", True, True), chunk_rows=3, upstream=upstream, wanted=(True,) * 3,
            skip_uncounted=skip_uncounted,
        )  # fmt: skip
        assert (gradients.hidden_ND[[0, 6]] == 0).all()
        assert (rows.loss_N[[0, 6]] == 0).all()
        results.append((*rows, *gradients))
    assert all(torch.equal(clean, other) for clean, other in zip(*results, strict=True))
    expected = value_and_gradients(
        linear_reference, head_of(), case.teacher, case.labels_N, reduction="sum", upstream=upstream
    )
    assert_close((results[0][0].sum(), *results[0][3:]), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_and_no_row_that_counts(case_factory, reduction):
    for n in (0, 3):
        case = case_factory(n, V, 5)
        labels_N = torch.full((n,), -100)
        head = head_of(n)
        got = value_and_gradients(fused_linear_distillation_loss, head, case.teacher, labels_N, reduction=reduction)
        assert all((x == 0).all() for x in got)
        assert [x.shape for x in got[1:]] == [x.shape for x in head]


def test_parts(case_factory):
    case = case_factory(N, V, 5).with_ignored(1)
    head = head_of()
    logits_NV = F.linear(*head)
    for reduction, alpha in itertools.product(("mean", "none"), (0.0, 0.4, 1.0)):
        args = (1.5, alpha, "uniform", -100, reduction)
        got = fused_linear_distillation_loss_parts(
            head[0], head[1], case.teacher, case.labels_N, head[2], *args, chunk_rows=4
        )
        expected = distillation_loss_parts_reference(logits_NV, case.teacher, case.labels_N, *args)
        assert [x.requires_grad for x in got] == [True, False, False]
        assert_close([x.detach() for x in got], [x.detach() for x in expected])
        with torch.no_grad():
            again = fused_linear_distillation_loss_parts(
                head[0], head[1], case.teacher, case.labels_N, head[2], *args, chunk_rows=4
            )
        assert not again.loss.requires_grad
        assert_close(again, [x.detach() for x in got], rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts_have_no_gradient(case_factory, wanted, reduction):
    case = case_factory(N, V, 5)
    head = tuple(x.detach().requires_grad_(want) for x, want in zip(head_of(), wanted, strict=True))
    loss = fused_linear_distillation_loss(*head[:2], case.teacher, case.labels_N, head[2], reduction=reduction)
    loss.sum().backward()
    expected = value_and_gradients(
        linear_reference, head_of(), case.teacher, case.labels_N, reduction=reduction
    )[1:]  # fmt: skip
    for part, want, gradient in zip(head, wanted, expected, strict=True):
        assert (part.grad is not None) == want
        if want:
            torch.testing.assert_close(part.grad, gradient, rtol=1e-11, atol=1e-13)


def test_a_kept_graph_can_be_differentiated_again(case_factory):
    case = case_factory(N, V, 5)
    head = head_of()
    loss = fused_linear_distillation_loss(*head[:2], case.teacher, case.labels_N, head[2])
    once = torch.autograd.grad(3 * loss, head, retain_graph=True)
    expected = [x.clone() for x in once]
    for gradient in once:
        gradient.zero_()  # what a caller does with a gradient must not reach the next one
    assert_close([3 * x for x in torch.autograd.grad(loss, head)], expected)
    with pytest.raises(RuntimeError, match="differentiated a second time.*retain_graph=True"):
        torch.autograd.grad(loss, head)


def test_it_cannot_be_differentiated_twice(case_factory):
    case = case_factory(N, V, 5)
    head = head_of()
    for reduction in ("mean", "none"):
        loss = fused_linear_distillation_loss(*head[:2], case.teacher, case.labels_N, head[2], reduction=reduction)
        upstream = torch.ones_like(loss, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss, head[0], upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_float16_gradients_survive_the_mean_under_a_loss_scale(case_factory):
    case = case_factory(4, 2001, 8, spread=0.5)
    head = tuple(x.detach().mul(0.3).requires_grad_() for x in head_of(4, 2001, 4, dtype=torch.float16))
    exact = tuple(x.detach().double().requires_grad_() for x in head)
    args = (case.teacher, case.labels_N, 2.0, 0.7, "bucket", -100, "mean", 4000)
    got = value_and_gradients(fused_linear_distillation_loss, head, *args, upstream=torch.tensor(65_536.0))
    expected = value_and_gradients(linear_reference, exact, *args, upstream=torch.tensor(65_536.0))
    for gradient, truth in zip(got[2:], expected[2:], strict=True):
        assert gradient.isfinite().all()
        assert ((gradient == 0) & (truth != 0)).double().mean() < 0.001


def test_nothing_is_read_by_the_host(case_factory):
    case = case_factory(N, V, 5).with_ignored(2)
    teacher, labels_N = case.teacher.to("meta"), case.labels_N.to("meta")
    for reduction, tail in itertools.product(("mean", "none"), TAILS):
        head = [x.detach().to("meta").requires_grad_() for x in head_of(dtype=torch.bfloat16)]
        loss = fused_linear_distillation_loss(
            *head[:2], teacher, labels_N, head[2], tail=tail, reduction=reduction, chunk_rows=4
        )
        loss.sum().backward()
        assert [x.grad.shape for x in head] == [x.shape for x in head]


class LargestTensor(TorchDispatchMode):
    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.n_elements = max(self.n_elements, storage.nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(case_factory, reduction):
    n, v, d, chunk_rows = 60, 2000, 4, 6
    case = case_factory(n, v, 8).with_ignored(7)
    head = head_of(n, v, d, dtype=torch.float32)
    with LargestTensor() as largest:
        loss = fused_linear_distillation_loss(
            *head[:2], case.teacher, case.labels_N, head[2], reduction=reduction, chunk_rows=chunk_rows
        )
        loss.sum().backward()
    assert largest.n_elements <= chunk_rows * 2048


def test_rows_of_a_chunk_by_device():
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert linear_chunk_rows(8192, 128_256, torch.bfloat16, other) == 2048
    assert linear_chunk_rows(2049, 128_256, torch.bfloat16, other) == 2049
    assert linear_chunk_rows(6000, 128_256, torch.bfloat16, other) == 3000
    assert linear_chunk_rows(100, 128_256, torch.bfloat16, other) == 100
    gigabyte = 10**9  # two buffers of 1,024 rows take 0.53 GB, of 2,048 rows 1.05 GB
    assert linear_chunk_rows(8192, 128_256, torch.bfloat16, other, free_bytes=2 * gigabyte) == 2048
    assert linear_chunk_rows(8192, 128_256, torch.bfloat16, other, free_bytes=gigabyte) == 1024
    assert linear_chunk_rows(8192, 128_256, torch.bfloat16, other, free_bytes=0) == 1
    assert linear_chunk_rows(4096, 65_536, torch.float32, cpu) == 256
    assert linear_chunk_rows(4096, 262_144, torch.float32, cpu) == 128
    assert linear_chunk_rows(0, 262_144, torch.float32, cpu) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_ND": [1.0]}, TypeError, "hidden_ND must be a torch.Tensor, got list"),
        (
            {"weight_VD": torch.ones(V, D, dtype=torch.int64)},
            TypeError,
            "weight_VD must be of a float dtype, got torch",
        ),
        ({"weight_VD": torch.ones(V, D)}, TypeError, "hidden_ND is torch.float64 but weight_VD torch.float32; convert"),
        ({"bias": torch.ones(V)}, TypeError, "hidden_ND is torch.float64 but bias torch.float32"),
        ({"hidden_ND": torch.ones(2, 5, D).double()}, ValueError, r"hidden_ND has shape \(2, 5, 6\)"),
        ({"bias": torch.ones(V, 1).double()}, ValueError, r"bias \[V\]; bias has shape \(37, 1\)"),
        ({"weight_VD": torch.ones(V, D + 1).double()}, ValueError, "width 6 but weight_VD 7; both must be D"),
        ({"bias": torch.ones(V + 1).double()}, ValueError, "bias has 38 elements but weight_VD 37 rows"),
        ({"weight_VD": torch.ones(V - 1, D).double(), "bias": None}, ValueError, "weight_VD has 36 rows, fewer than"),
        ({"hidden_ND": torch.ones(N + 1, D).double()}, ValueError, "hidden_ND has 11, the teacher batch 10"),
        ({"weight_VD": torch.ones(V, D).double().to("meta")}, ValueError, "weight_VD is on meta but hidden_ND on cpu"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        ({"chunk_rows": 2.0}, TypeError, "chunk_rows must be an int or None, got float"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"labels_N": torch.full((N,), V)}, ValueError, r"labels_N\[0\] is 37, expected a token in \[0, 37\)"),
        ({"t": None}, TypeError, "the teacher must be a TeacherBatch, got NoneType"),
    ],
)
def test_what_is_refused(case_factory, change, error, message):
    case = case_factory(N, V, 5)
    hidden_ND, weight_VD, bias = head_of()
    call = {"hidden_ND": hidden_ND, "weight_VD": weight_VD, "t": case.teacher, "labels_N": case.labels_N, "bias": bias}
    for loss_function in (fused_linear_distillation_loss, fused_linear_distillation_loss_parts):
        with pytest.raises(error, match=message):
            loss_function(**(call | change))


def test_it_is_the_loss_of_the_logits(case_factory):
    case = case_factory(N, V, 5).with_ignored(3)
    head = head_of(dtype=torch.float32)
    one_chunk = fused_linear_distillation_loss(*head[:2], case.teacher, case.labels_N, head[2], chunk_rows=N)
    loss = distillation_loss(F.linear(*head), case.teacher, case.labels_N)
    torch.testing.assert_close(one_chunk, loss, rtol=1e-6, atol=0)
