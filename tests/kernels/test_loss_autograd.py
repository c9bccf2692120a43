"""How the fast loss behaves under autograd: upstream gradients, kept graphs, in place, memory, no host reads."""

import pytest
import torch
from logitstore_kernels import TeacherBatch, distillation_loss, distillation_loss_parts
from logitstore_kernels.reference import distillation_loss_parts_reference, distillation_loss_reference
from torch.utils._python_dispatch import TorchDispatchMode

TAILS = ["bucket", "uniform", "renormalised", "dropped", "dense"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_upstream_gradients_of_each_row(case_factory, dtype):
    case = case_factory(5, 21, 4)
    leaf, plain = case.leaf(dtype), case.leaf(dtype)
    upstream_N = torch.tensor([1.0, 0.0, -2.5, 0.3, 7.0], dtype=torch.float64)
    rows = distillation_loss(leaf, case.teacher, case.labels_N, reduction="none")
    rows.backward(upstream_N.to(rows.dtype))
    expected = distillation_loss_reference(plain.double(), case.teacher, case.labels_N, reduction="none")
    (gradient,) = torch.autograd.grad(expected, plain, upstream_N)
    torch.testing.assert_close(leaf.grad, gradient, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_upstream_gradient_of_the_mean_and_through_a_layer(case_factory):
    case = case_factory(5, 21, 4).with_ignored(0)
    weight = torch.eye(21, dtype=torch.float64, requires_grad=True)
    (0.25 * distillation_loss(case.logits_NV @ weight, case.teacher, case.labels_N)).backward()
    other = torch.eye(21, dtype=torch.float64, requires_grad=True)
    (0.25 * distillation_loss_reference(case.logits_NV @ other, case.teacher, case.labels_N)).backward()
    torch.testing.assert_close(weight.grad, other.grad, rtol=1e-11, atol=1e-14)


def test_a_float16_gradient_survives_the_mean_under_a_loss_scale(case_factory):
    # 1 / 4,000 of a probability of 1e-5 is below float16's smallest number; a GradScaler's 65,536 comes in backward().
    case = case_factory(4, 2001, 8, spread=0.5)
    scale = 65_536.0
    leaf, plain = case.leaf(torch.float16), case.leaf(torch.float16)
    (scale * distillation_loss(leaf, case.teacher, case.labels_N, num_items_in_batch=4000)).backward()
    (
        scale * distillation_loss_reference(plain.double(), case.teacher, case.labels_N, num_items_in_batch=4000)
    ).backward()
    lost = ((leaf.grad == 0) & (plain.grad != 0)).double().mean()
    assert lost < 0.001


def test_a_kept_graph_can_be_differentiated_again(case_factory, value_and_gradient):
    case = case_factory(5, 21, 4)
    leaf = case.leaf(torch.float64)
    loss_N = distillation_loss(leaf, case.teacher, case.labels_N, reduction="none")
    ones_N = torch.ones(5, dtype=torch.float64)
    (once,) = torch.autograd.grad(loss_N, leaf, 3.0 * ones_N, retain_graph=True)
    _, expected = value_and_gradient(distillation_loss_reference, leaf, case.teacher, case.labels_N, reduction="sum")
    torch.testing.assert_close(once, 3.0 * expected, rtol=1e-11, atol=1e-14)
    once.zero_()  # what a caller does with its gradient must not reach the next one
    (twice,) = torch.autograd.grad(loss_N, leaf, ones_N)
    torch.testing.assert_close(twice, expected, rtol=1e-11, atol=1e-14)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss_N, leaf, ones_N)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"divergence": "reverse_kl"}])
def test_a_gradient_that_was_overwritten_is_noticed(case_factory, options):
    case = case_factory(5, 130, 4)
    logits_NV = case.leaf(torch.float32) * 1
    loss = distillation_loss(logits_NV, case.teacher, case.labels_N, inplace=True, **options)
    logits_NV.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_cannot_be_differentiated_twice(case_factory):
    case = case_factory(3, 11, 4)
    leaf = case.leaf(torch.float64)
    upstream = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = distillation_loss(leaf, case.teacher, case.labels_N)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", TAILS)
def test_inplace_writes_the_same_gradient_over_the_logits(case_factory, value_and_gradient, dtype, tail):
    case = case_factory(5, 21, 4).with_ignored(1)
    leaf = case.leaf(dtype)
    logits_NV = leaf * 1  # mul by a constant does not need its output
    version = logits_NV._version
    args = (case.teacher, case.labels_N, 2.0, 0.7, tail)
    loss = distillation_loss(logits_NV, *args, inplace=True)
    assert logits_NV._version > version
    loss.backward()
    expected, expected_gradient = value_and_gradient(distillation_loss, case.leaf(dtype), *args)
    assert torch.equal(loss.detach().double(), expected)
    assert torch.equal(leaf.grad.double(), expected_gradient)
    assert torch.equal(logits_NV.detach().double(), expected_gradient)


def test_inplace_is_noticed_by_whoever_needed_the_logits(case_factory):
    case = case_factory(5, 21, 4)
    logits_NV = case.leaf(torch.float64).tanh()  # its backward needs its output
    loss = distillation_loss(logits_NV, case.teacher, case.labels_N, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_leaves_logits_alone_where_no_gradient_is_wanted(case_factory):
    case = case_factory(5, 21, 4)
    leaf = case.leaf(torch.float64)
    with torch.no_grad():
        loss = distillation_loss(leaf, case.teacher, case.labels_N, inplace=True)
    assert torch.equal(leaf.detach(), case.logits_NV)
    assert loss.item() == distillation_loss(leaf, case.teacher, case.labels_N).item()


@pytest.mark.parametrize("loss_function", [distillation_loss, distillation_loss_reference])
@pytest.mark.parametrize("tail", TAILS)
def test_autocast_changes_nothing(case_factory, value_and_gradient, loss_function, tail):
    case = case_factory(5, 1003, 4)
    args = (case.leaf(torch.float32), case.teacher, case.labels_N, 2.0, 0.7, tail)
    plain = value_and_gradient(loss_function, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = value_and_gradient(loss_function, *args)
    assert torch.equal(plain[0], under[0])
    assert torch.equal(plain[1], under[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tail", TAILS)
def test_nothing_is_read_by_the_host(case_factory, tail, reduction):
    # A tensor on "meta" has no values: whatever tries to read one, for an if, an .item() or a shape, raises.
    case = case_factory(6, 21, 4)
    leaf = case.leaf(torch.bfloat16).detach().to("meta").requires_grad_()
    parts = distillation_loss_parts(
        leaf, case.teacher.to("meta"), case.labels_N.to("meta"), tail=tail, reduction=reduction
    )
    parts.loss.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.shape == (6, 21)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [range(5), [1], []], ids=["all ignored", "one ignored", "none ignored"])
@pytest.mark.parametrize("n_items", [torch.tensor(0), torch.tensor([0]), torch.tensor(0.0)])
def test_no_item_in_the_batch_is_no_loss(case_factory, dtype, ignored, n_items):
    case = case_factory(5, 21, 4).with_ignored(*ignored)
    for parts_function in (distillation_loss_parts, distillation_loss_parts_reference):
        leaf = case.leaf(dtype)
        parts = parts_function(leaf, case.teacher, case.labels_N, num_items_in_batch=n_items)
        assert [part.item() for part in parts] == [0, 0, 0]
        (1024 * parts.loss).backward()
        assert (leaf.grad == 0).all()


def test_the_number_of_items_is_not_read_by_the_host(case_factory):
    case = case_factory(6, 21, 4)
    leaf = case.leaf(torch.float32).detach().to("meta").requires_grad_()
    n_items = torch.tensor(0, device="meta")
    distillation_loss(leaf, case.teacher.to("meta"), case.labels_N.to("meta"), num_items_in_batch=n_items).backward()
    assert leaf.grad.shape == (6, 21)


class LargeAllocations(TorchDispatchMode):
    """Collects the size of every storage that an op returns, is at least n_elements elements and is not `known`."""

    def __init__(self, n_elements: int, known: torch.Tensor) -> None:
        super().__init__()
        self.n_elements, self.storages = n_elements, {}
        self.known_address = known.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                n_elements = storage.nbytes() // tensor.element_size()
                if n_elements >= self.n_elements and storage.data_ptr() != self.known_address:
                    self.storages[storage.data_ptr()] = (str(func), n_elements)
        return out


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", ["bucket", "dense"])
def test_no_tensor_of_n_times_v_but_the_gradient(teacher_from_logits, shape_factory, dtype, inplace, tail):
    n, v = 160, 32_768
    rng = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(n, v, generator=rng).to(dtype).requires_grad_()
    teacher = teacher_from_logits(torch.randn(1, v, generator=rng), 8)
    teacher = TeacherBatch(
        *(x.expand(n, *x.shape[1:]) for x in (teacher.ids_NK, teacher.logprobs_NK, teacher.tail_logmass_N,
          teacher.tail_logmoment_half_N)), vocab_size=v,
    )  # fmt: skip
    coefs_Nr, basis_Vr, bias_V = shape_factory(n, v, r=128)
    teacher = teacher.with_dense_tail(coefs_Nr.float(), basis_Vr.bfloat16(), bias_V.float())
    labels_N = torch.arange(n)
    labels_N[::3] = -100
    with LargeAllocations(n * v, known=logits_NV) as large:
        loss = distillation_loss(logits_NV, teacher, labels_N, tail=tail, inplace=inplace)
        (2 * loss).backward()
    assert len(large.storages) == (0 if inplace else 1), large.storages
    assert logits_NV.grad[1].abs().max() > 0
