"""The PyTorch paths need no operator that Apple's MPS backend lacks, and no float64.

The list of what MPS has is PyTorch's own native_functions.yaml, which comes with torch. Tensors are on "meta", where
the code takes the path that it takes on every device that is no CPU. An operator that the list gives to all backends
alike, because it is made of others, is looked into: it is run on CPU tensors of the same shape, and its parts are
checked.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from logitstore_kernels import (
    TeacherBatch,
    distillation_loss_parts,
    fused_linear_distillation_loss,
    topk_with_tail,
    topk_with_tail_linear,
    varopt_sample,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

TAILS = ["bucket", "uniform", "renormalised", "dropped", "dense", "sampled"]
# Kernels that are calls of other operators; the first two serve every backend that has none of its own.
MADE_OF_OTHERS = {"CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd"}


def _backends_of_every_op() -> dict[str, set[str]]:
    """For each ATen operator the dispatch keys that have a kernel for it."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    listed = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    entries = {entry["func"].split("(")[0]: entry for entry in listed}

    def keys(name: str) -> set[str]:
        entry = entries[name]
        own = {key.strip() for group in entry.get("dispatch", {}) for key in group.split(",")}
        if delegate := entry.get("structured_delegate"):
            return own | keys(delegate)
        return own or {"CompositeImplicitAutograd"}

    return {name: keys(name) for name in entries}


class OnlyOpsOfMps(TorchDispatchMode):
    """Collects in `missing` what MPS has no kernel for and in `float64_ops` what makes a float64 tensor."""

    BACKENDS = _backends_of_every_op()

    def __init__(self) -> None:
        super().__init__()
        self.missing, self.float64_ops, self.seen = set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if name not in self.seen:
            self.seen.add(name)
            backends = self.BACKENDS.get(name, set())
            if backends & MADE_OF_OTHERS and "MPS" not in backends:
                self._look_into(func, args, kwargs)
            elif "MPS" not in backends:
                self.missing.add(name)
        out = func(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            self.float64_ops.add(name)
        return out

    def _look_into(self, func, args, kwargs):
        on_cpu = tree_map_only(torch.Tensor, lambda x: torch.zeros_like(x, device="cpu"), (args, dict(kwargs)))
        on_cpu[1].update({"device": torch.device("cpu")} if kwargs.get("device") is not None else {})
        with self:
            func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *on_cpu[0], **on_cpu[1])


def test_the_list_knows_what_mps_lacks():
    x = torch.ones(2, 3, device="meta")
    with OnlyOpsOfMps() as mode:
        x.logsumexp(1), x.exp_(), x[:, 1], x.sort(dim=1), x.double()
    assert mode.missing == set()
    assert mode.seen >= {"logsumexp", "amax", "exp_", "select.int", "sort", "sort.stable", "_to_copy"}
    assert "_to_copy" in mode.float64_ops
    with OnlyOpsOfMps() as mode:
        torch.linalg.eigvals(torch.ones(2, 2, device="meta")), torch.special.ndtri(x), torch.histc(x)
    assert mode.missing == {"linalg_eig", "special_ndtri"}


def on_mps(run) -> None:
    """Call `run`, and fail if MPS lacks an operator that it takes or if it computes in float64."""
    with OnlyOpsOfMps() as mode:
        run()
    assert mode.missing == set()
    assert mode.float64_ops == set()


def teacher_of(case, tail: str, dtype: torch.dtype) -> TeacherBatch:
    teacher = case.teacher
    if tail == "sampled":
        return TeacherBatch.from_samples(teacher.ids_NK, teacher.logprobs_NK, vocab_size=21).to("meta")
    dense = teacher.dense_tail
    tail_of = (dense.coefs_Nr.float(), dense.basis_Vr.to(dtype), dense.bias_V.to(dtype))
    return teacher.with_dense_tail(*tail_of).to("meta")


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.5, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss(case_factory, tail, temperature, dtype):
    case = case_factory(6, 21, 4)
    temperature = 1.0 if tail == "sampled" else temperature
    teacher, labels_N = teacher_of(case, tail, dtype), case.labels_N.to("meta")
    options = ({"reduction": "none"}, {"inplace": True}, {"num_items_in_batch": torch.tensor(3.0)})

    def run():
        for alpha, kwargs in itertools.product((0.0, 0.7, 1.0), options):
            leaf = torch.empty(6, 24, dtype=dtype, device="meta", requires_grad=True)
            loss = distillation_loss_parts(leaf * 1, teacher, labels_N, temperature, alpha, tail, **kwargs).loss
            loss.sum().backward()
            assert leaf.grad.shape == (6, 24)

    on_mps(run)


@pytest.mark.parametrize("tail", TAILS)
def test_the_other_terms_of_the_loss(case_factory, tail):
    case = case_factory(6, 21, 4)
    teacher, labels_N = teacher_of(case, tail, torch.float32), case.labels_N.to("meta")
    weights_N = torch.empty(6, device="meta")
    terms = ({"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 30.0}, {"row_weights_N": weights_N})

    def run():
        for kwargs in terms:
            leaf = torch.empty(6, 24, device="meta", requires_grad=True)
            distillation_loss_parts(leaf, teacher, labels_N, 1.0, 0.7, tail, **kwargs).loss.backward()
            assert leaf.grad.shape == (6, 24)

    on_mps(run)


def test_a_teacher_of_codes(case_factory):
    case = case_factory(6, 21, 4)
    given = case.teacher
    teacher = TeacherBatch.from_codes(
        given.ids_NK, torch.full((6, 4), 9, dtype=torch.uint8), torch.linspace(-8, 0, 256), scale_N=torch.ones(6),
        offset_N=torch.zeros(6), tail_logmass_N=given.tail_logmass_N,
        tail_logmoment_half_N=given.tail_logmoment_half_N, vocab_size=21,
    ).to("meta")  # fmt: skip
    labels_N = case.labels_N.to("meta")
    on_mps(lambda: distillation_loss_parts(torch.empty(6, 21, device="meta"), teacher, labels_N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_topk_with_tail(dtype):
    logits_NV = torch.empty(6, 24, dtype=dtype, device="meta")
    hidden_ND, weight_VD = (torch.empty(n, 8, dtype=dtype, device="meta") for n in (6, 24))
    on_mps(lambda: topk_with_tail(logits_NV, 5, vocab_size=21, min_prob=0.1))
    on_mps(lambda: topk_with_tail_linear(hidden_ND, weight_VD, 5, vocab_size=21, scale=0.5, softcap=30.0))


@pytest.mark.parametrize("max_weight", [None, 0.1])
def test_varopt_sample(max_weight):
    logits_NV, uniforms_N = torch.empty(6, 24, device="meta"), torch.empty(6, device="meta")
    on_mps(lambda: varopt_sample(logits_NV, 5, uniforms_N, vocab_size=21, max_weight=max_weight))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_through_a_head(case_factory, tail, dtype):
    case = case_factory(6, 21, 4)
    teacher, labels_N = teacher_of(case, tail, dtype), case.labels_N.to("meta")
    shapes = ((6, 8), (24, 8), (24,))

    def run():
        for reduction in ("mean", "none"):
            head = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
            loss = fused_linear_distillation_loss(
                head[0], head[1], teacher, labels_N, head[2], 1.0, 0.7, tail, reduction=reduction, chunk_rows=4
            )
            loss.sum().backward()
            assert [part.grad.shape for part in head] == [part.shape for part in head]

    on_mps(run)
