"""Which path is taken, and the reasons that are given for it."""

import re

import logitstore_kernels
import pytest
import torch
from logitstore_kernels import distillation_loss
from logitstore_kernels.dispatch import paths_on, why_no_triton, why_not_the_kernel
from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch

PLAIN = LossTerms(2.0, 0.7, "bucket", True, True)


def teacher_of_k(k):
    ids_NK = torch.arange(k, dtype=torch.int32)[None]
    moment_N = torch.tensor([-1.0])
    return TeacherBatch.from_topk(ids_NK, torch.full((1, k), -9.0), moment_N, moment_N, vocab_size=4096)


def test_cpu_tensors_take_pytorch():
    refusal = why_not_the_kernel(torch.zeros(1, 4096), teacher_of_k(4), PLAIN)
    assert refusal == "Triton's kernels are for CUDA, and the tensors are on cpu"
    assert why_no_triton(torch.device("mps")) == "Triton's kernels are for CUDA, and the tensors are on mps"
    assert why_no_triton(torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("logits", "k", "reason"),
    [
        (torch.zeros(1, 4096), 4, None),
        (torch.zeros(1, 4096), 2048, None),
        (torch.zeros(1, 4096, dtype=torch.bfloat16), 4, None),
        (torch.zeros(1, 4096, dtype=torch.float64), 4, "computes in float32, and the logits are torch.float64"),
        (torch.zeros(1, 4096), 2049, "2049 entries a row, above the kernel's 2048"),
        (torch.zeros(1, 8192)[:, ::2], 4, r"neighbouring elements, and the strides are \(8192, 2\)"),
        (torch.zeros(1, 1).expand(2, 4096), 4, r"neighbouring elements, and the strides are \(0, 0\)"),
    ],
)
def test_what_the_kernel_takes(triton_interpreter, logits, k, reason):
    refusal = why_not_the_kernel(logits, teacher_of_k(k), PLAIN)
    if reason is None:
        assert refusal is None
    else:
        assert re.search(reason, refusal)


def test_entries_are_counted_only_where_the_teacher_is_read(triton_interpreter, value_and_gradient):
    """Cross-entropy alone takes the kernel whatever K is, and is PyTorch's."""
    teacher, logits = teacher_of_k(2049), torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    assert why_not_the_kernel(logits, teacher, LossTerms(2.0, 0.0, "bucket", False, True)) is None
    loss, gradient = value_and_gradient(distillation_loss, logits, teacher, torch.tensor([7]), alpha=0.0)
    expected, slope = value_and_gradient(torch.nn.functional.cross_entropy, logits, torch.tensor([7]))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-9)


def test_every_operation_says_its_path_and_why(triton_interpreter):
    operations = {name for name in logitstore_kernels.__all__ if name[0].islower() and not name.endswith("_parts")}
    on_cuda, on_mps = ({path.operation: path for path in paths_on(torch.device(device))} for device in ("cuda", "mps"))
    assert set(on_cuda) == set(on_mps) == operations
    for name in ("distillation_loss", "fused_linear_distillation_loss"):
        assert on_cuda[name].path == "triton"
        assert on_mps[name].path == "pytorch"
        assert "on mps" in on_mps[name].reason
    assert all(path.reason for path in on_cuda.values())
    assert "interpreter" in paths_on(torch.device("cpu"))[0].reason
