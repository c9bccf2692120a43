"""The Triton loss under autograd and torch.compile, its kernels run by the interpreter: through distillation_loss."""

import pytest
import torch
from logitstore_kernels import TeacherBatch, distillation_loss, distillation_loss_parts
from logitstore_kernels.reference import distillation_loss_reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = [
    pytest.mark.usefixtures("triton_interpreter"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:logits rows are"),
]
TAILS = ["bucket", "uniform", "renormalised", "dropped"]
ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_upstream_gradients_of_each_row(case_factory, dtype):
    case = case_factory(5, 130, 4)
    leaf, plain = case.leaf(dtype), case.leaf(dtype)
    upstream_N = torch.tensor([1.0, 0.0, -2.5, 0.3, 7.0])
    distillation_loss(leaf, case.teacher, case.labels_N, reduction="none").backward(upstream_N)
    expected = distillation_loss_reference(plain.double(), case.teacher, case.labels_N, reduction="none")
    (gradient,) = torch.autograd.grad(expected, plain, upstream_N.double())
    torch.testing.assert_close(leaf.grad, gradient, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_a_reduction(case_factory, reduction, weighted):
    case = case_factory(5, 130, 4).with_ignored(0)
    weights_N = torch.tensor([1.0, 0.5, 0.0, 2.0, -1.0]) if weighted else None
    leaf, plain = case.leaf(torch.float32), case.leaf(torch.float64)
    with torch.no_grad():
        leaf[2] = float("nan") if weighted else leaf[2]
    args = (case.teacher, case.labels_N, 2.0, 0.7, "bucket", -100, reduction)
    (0.25 * distillation_loss(leaf, *args, row_weights_N=weights_N)).backward()
    (0.25 * distillation_loss_reference(plain, *args, row_weights_N=weights_N)).backward()
    torch.testing.assert_close(leaf.grad.double(), plain.grad, rtol=1e-5, atol=1e-7)
    if weighted:
        assert (leaf.grad[2] == 0).all()


def test_rows_whose_factor_is_one_are_not_touched():
    from logitstore_kernels import triton_function  # noqa: F401  defines the operator

    rows = torch.full((3, 300), 0.1, dtype=torch.bfloat16)
    rows[0] = torch.tensor([0x7F81], dtype=torch.int16).view(torch.bfloat16)  # a NaN that any arithmetic would quieten
    before = rows.view(torch.int16).clone()
    torch.ops.logitstore.scale_rows_in_place(rows, torch.tensor([1.0, 1.0, 3.0]))
    assert torch.equal(rows.view(torch.int16)[:2], before[:2])
    torch.testing.assert_close(rows[2].float(), torch.full((300,), 0.3), rtol=1e-2, atol=0)


def test_a_float16_gradient_survives_the_mean_under_a_loss_scale(case_factory):
    case = case_factory(2, 2001, 8, spread=0.5)
    scale = 65_536.0
    leaf, plain = case.leaf(torch.float16), case.leaf(torch.float16)
    (scale * distillation_loss(leaf, case.teacher, case.labels_N, num_items_in_batch=4000)).backward()
    (
        scale * distillation_loss_reference(plain.double(), case.teacher, case.labels_N, num_items_in_batch=4000)
    ).backward()
    assert ((leaf.grad == 0) & (plain.grad != 0)).double().mean() < 0.001


def test_a_kept_graph_can_be_differentiated_again(case_factory):
    case = case_factory(3, 130, 4)
    leaf = case.leaf(torch.float32)
    loss_N = distillation_loss(leaf, case.teacher, case.labels_N, reduction="none")
    (once,) = torch.autograd.grad(loss_N, leaf, torch.full((3,), 3.0), retain_graph=True)
    plain = case.leaf(torch.float64)
    (expected,) = torch.autograd.grad(
        distillation_loss_reference(plain, case.teacher, case.labels_N, reduction="sum"), plain
    )
    torch.testing.assert_close(once.double(), 3 * expected, rtol=1e-5, atol=1e-6)
    once.zero_()  # what a caller does with its gradient must not reach the next one
    (twice,) = torch.autograd.grad(loss_N, leaf, torch.ones(3))
    torch.testing.assert_close(twice.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss_N, leaf, torch.ones(3))


def test_it_cannot_be_differentiated_twice(case_factory):
    case = case_factory(2, 130, 4)
    leaf, upstream = case.leaf(torch.float32), torch.ones((), requires_grad=True)
    loss = distillation_loss(leaf, case.teacher, case.labels_N)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_inplace_writes_the_same_gradient_over_the_logits(case_factory, dtype, tail):
    case = case_factory(3, 130, 4).with_ignored(1)
    leaf, other = case.leaf(dtype), case.leaf(dtype)
    logits_NV = leaf * 1  # mul by a constant does not need its output
    version, address = logits_NV._version, logits_NV.data_ptr()
    args = (case.teacher, case.labels_N, 2.0, 0.7, tail)
    loss = distillation_loss(logits_NV, *args, inplace=True)
    assert logits_NV._version > version
    loss.backward()
    expected = distillation_loss(other * 1, *args)
    expected.backward()
    assert loss.item() == expected.item()
    assert torch.equal(leaf.grad, other.grad)
    assert logits_NV.data_ptr() == address
    assert torch.equal(logits_NV.detach(), other.grad)


def test_inplace_is_noticed_by_whoever_needed_the_logits(case_factory):
    case = case_factory(2, 130, 4)
    logits_NV = case.leaf(torch.float32).tanh()  # its backward needs its output
    loss = distillation_loss(logits_NV, case.teacher, case.labels_N, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_that_was_overwritten_is_noticed(case_factory):
    case = case_factory(2, 130, 4)
    logits_NV = case.leaf(torch.float32) * 1
    loss = distillation_loss(logits_NV, case.teacher, case.labels_N, inplace=True)
    logits_NV.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_leaves_logits_alone_where_no_gradient_is_wanted(case_factory):
    case = case_factory(2, 130, 4)
    leaf = case.leaf(torch.float32)
    with torch.no_grad():
        loss = distillation_loss(leaf, case.teacher, case.labels_N, inplace=True)
    assert torch.equal(leaf.detach(), case.logits_NV.float())
    assert loss.item() == distillation_loss(leaf, case.teacher, case.labels_N).item()


def test_autocast_changes_nothing(case_factory):
    case = case_factory(2, 130, 4)
    leaf, other = case.leaf(torch.float32), case.leaf(torch.float32)
    distillation_loss(leaf, case.teacher, case.labels_N).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distillation_loss(other, case.teacher, case.labels_N).backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("n_rows", [0, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_that_counts_is_a_loss_of_zero_with_a_graph(case_factory, n_rows, reduction):
    case = case_factory(n_rows, 130, 4)
    leaf = case.leaf(torch.float32)
    loss = distillation_loss(leaf, case.teacher, torch.full((n_rows,), -100), reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (leaf.grad == 0).all()


def without_values(device, tail):
    """(logits leaf, teacher, labels, row weights) of 6 rows on `device`."""
    ids_NK, logprobs_NK = torch.zeros(6, 4, dtype=torch.int32, device=device), torch.zeros(6, 4, device=device)
    moment_N = torch.zeros(6, device=device)
    if tail == "sampled":
        teacher = TeacherBatch.from_samples(ids_NK, logprobs_NK, vocab_size=128)
    else:
        teacher = TeacherBatch.from_topk(ids_NK, logprobs_NK, moment_N, moment_N + 1, vocab_size=128)
    leaf = torch.zeros(6, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    return leaf, teacher, torch.zeros(6, dtype=torch.int64, device=device), torch.ones(6, device=device)


@pytest.mark.parametrize("tail", [*TAILS, "sampled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_is_read_by_the_host(tail, reduction):
    """Fake CUDA tensors have no values: whatever would read one, and so wait for the device, raises."""
    with FakeTensorMode(), torch.no_grad():
        leaf, teacher, labels_N, weights_N = without_values("cuda", tail)
        n_items = torch.zeros((), device="cuda") if reduction == "mean" else None
        parts = distillation_loss_parts(
            leaf, teacher, labels_N, 1.0, tail=tail, reduction=reduction, num_items_in_batch=n_items,
            row_weights_N=weights_N,
        )  # fmt: skip
        assert parts.loss.device.type == "cuda"
        assert parts.loss.dtype == torch.float32


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_read_by_the_host_in_backward(inplace):
    from logitstore_kernels.loss_terms import LossTerms
    from logitstore_kernels.triton_function import triton_loss_rows

    leaf, teacher, labels_N, weights_N = without_values("meta", "bucket")
    terms = LossTerms(2.0, 0.7, "bucket", True, True)
    rows = triton_loss_rows(
        leaf * 1, teacher, labels_N, labels_N >= 0, terms, expected_upstream=weights_N, inplace=inplace
    )
    rows.loss_N.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.shape == (6, 128)


@pytest.mark.parametrize(("tail", "inplace"), [("bucket", True), ("sampled", False), ("dense", False)])
def test_torch_compile_takes_it_in_one_graph(case_factory, tail, inplace):
    case = case_factory(3, 130, 4).with_ignored(1)
    teacher = case.teacher
    if tail == "sampled":
        teacher = TeacherBatch.from_samples(teacher.ids_NK, teacher.logprobs_NK, vocab_size=130)

    def loss_of(leaf):
        return 3 * distillation_loss(leaf * 1, teacher, case.labels_N, 1.0, tail=tail, inplace=inplace)

    leaf, other = case.leaf(torch.float32), case.leaf(torch.float32)
    eager = loss_of(leaf)
    eager.backward()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(other)
    compiled.backward()
    assert compiled.item() == eager.item()
    assert torch.equal(other.grad, leaf.grad)


@pytest.mark.parametrize("gradient", ["none", "new", "in_place"])
def test_operators_are_what_they_declare(case_factory, gradient):
    from logitstore_kernels.triton_launch import packed

    case = case_factory(2, 130, 4)
    arguments = (
        *packed(case.teacher), case.labels_N, torch.ones(2, dtype=torch.uint8), torch.ones(2), 130, 2.0, 0.7, "bucket",
        True, True, 0.0, 0.0, None,
    )  # fmt: skip
    operators = torch.ops.logitstore
    operator = {
        "none": operators.loss_rows, "new": operators.loss_rows_and_gradient, "in_place": operators.loss_rows_in_place,
    }[gradient].default  # fmt: skip
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (case.logits_NV.float(), *arguments), test_utils=checks)
    torch.library.opcheck(
        operators.scale_rows_in_place.default, (torch.ones(2, 30), torch.tensor([1.0, 2.0])), test_utils=checks
    )


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an op returns and that none of its inputs has."""

    def __init__(self):
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        new = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in tree_leaves(out)
            if isinstance(x, torch.Tensor)
        }
        self.n_bytes += sum(n_bytes for address, n_bytes in new.items() if address not in known)
        return out


@pytest.mark.parametrize("inplace", [False, True])
def test_memory_beside_the_logits(case_factory, inplace):
    """All that is allocated, the freed included: 64 bytes a row in place, and out of place the gradient as well."""
    n, v = 40, 256
    one = case_factory(1, v, 64).teacher
    teacher = TeacherBatch.from_topk(
        one.ids_NK.repeat(n, 1), one.logprobs_NK.float().repeat(n, 1), one.tail_logmass_N.float().repeat(n),
        one.tail_logmoment_half_N.float().repeat(n), vocab_size=v,
    )  # fmt: skip
    logits_NV = torch.zeros(n, v, requires_grad=True) * 1
    labels_N = torch.full((n,), -100)  # rows that do not count cost the same memory and less time
    with Allocations() as allocations:
        distillation_loss(logits_NV, teacher, labels_N, inplace=inplace)
    gradient_bytes = 0 if inplace else n * v * 4
    checks_of_labels = 8 * n  # made on a CPU alone
    assert 12 * n < allocations.n_bytes - gradient_bytes <= 64 * n + checks_of_labels + 256


def test_a_device_is_made_the_current_one():
    from logitstore_kernels.triton_function import _current

    assert isinstance(_current(torch.device("cuda:1")), torch.cuda.device)
    assert _current(torch.device("cuda:1")).idx == 1
    with _current(torch.device("cpu")):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 130), (130,)])
@pytest.mark.parametrize("kept", [True, False])
def test_gradients_of_a_head_are_scaled_by_the_kernel(dtype, shape, kept):
    from logitstore_kernels.linear_loss import _scaled

    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for factor in (1.0, -2.5):
        given = gradient.clone()
        got = _scaled(given, torch.tensor(factor, dtype=torch.float64), kept=kept)
        # The interpreter truncates to bfloat16, 2^-7 at most.
        torch.testing.assert_close(got.float(), gradient.float() * factor, rtol=0 if factor == 1 else 2**-7, atol=0)
        assert (got.data_ptr() == given.data_ptr()) is not kept
        assert torch.equal(given, gradient) is (kept or factor == 1)


def test_odd_rows_are_warned_of_once(case_factory):
    from logitstore_kernels.triton_launch import _warn_of_odd_rows

    _warn_of_odd_rows.cache_clear()
    case = case_factory(2, 131, 4)
    with pytest.warns(UserWarning, match="logits rows are 131 elements apart.*pad the head's output") as caught:
        _ = [distillation_loss(case.leaf(torch.float32), case.teacher, case.labels_N) for _ in range(2)]
    assert sum("elements apart" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("operation", ["loss", "dense", "topk"])
def test_rows_a_multiple_of_16_bytes_apart_that_triton_cannot_read_wide_are_warned_of(case_factory, operation):
    """Triton asks for strides of 16 elements: 136 columns of bfloat16 are 17 times 16 bytes, and not that."""
    from logitstore_kernels.triton_launch import _warn_of_odd_rows
    from logitstore_kernels.triton_topk import launch_topk

    case = case_factory(2, 136, 4)
    leaf = case.leaf(torch.bfloat16)
    run = {
        "loss": lambda: distillation_loss(leaf, case.teacher, case.labels_N),
        "dense": lambda: distillation_loss(leaf, case.teacher, case.labels_N, tail="dense"),
        "topk": lambda: launch_topk(leaf.detach(), 4, vocab_size=136),
    }[operation]
    _warn_of_odd_rows.cache_clear()
    with pytest.warns(UserWarning, match="logits rows are 136 elements apart"):
        run()
