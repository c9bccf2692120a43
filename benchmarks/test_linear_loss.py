"""The loss through a linear head, value and all gradients: fused, and from logits that are kept; time and peak memory.

Run: make bench, or pytest benchmarks/test_linear_loss.py --benchmark-only. The fused loss is held against the other one
in float64 first. extra_info: the peak memory beyond the inputs, and what of it is not a gradient that is handed out.
"""

import pytest
import torch
import torch.nn.functional as F
from logitstore_kernels import TeacherBatch, distillation_loss, fused_linear_distillation_loss, topk_with_tail
from logitstore_trainer.bench.devices import synchronizer
from logitstore_trainer.bench.memory import peak_extra_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, V, DTYPE = (8192, 4096, 128_256, torch.bfloat16) if DEVICE.type == "cuda" else (2048, 128, 49_152, torch.float32)


def kept_logits_loss(hidden_ND, weight_VD, teacher, labels_N):
    return distillation_loss(F.linear(hidden_ND, weight_VD), teacher, labels_N, inplace=True)


LOSSES = {"fused": fused_linear_distillation_loss, "logits kept": kept_logits_loss}


@pytest.fixture(scope="module")
def inputs():
    rng = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=rng)
    weight_VD = torch.randn(V, D, generator=rng) * 3 / D**0.5
    few = topk_with_tail(3 * torch.randn(64, V, generator=rng), 64)
    teacher = TeacherBatch.from_topk(*(part.repeat(N // 64, *[1] * (part.dim() - 1)) for part in few), vocab_size=V)
    labels_N = torch.randint(V, (N,), generator=rng)
    head = tuple(x.to(DEVICE, DTYPE).requires_grad_() for x in (hidden_ND, weight_VD))
    return head, teacher.to(DEVICE), labels_N.to(DEVICE)


def value_and_gradients(name, head, teacher, labels_N):
    loss = LOSSES[name](*head, teacher, labels_N)
    return loss.detach(), *torch.autograd.grad(loss, head)


@pytest.fixture(scope="module")
def checked(inputs):
    """The inputs, on whose first rows the losses agree with float64."""
    (hidden_ND, weight_VD), teacher, labels_N = inputs
    few = slice(0, 16)
    columns = (teacher.ids_NK, teacher.logprobs_NK, teacher.tail_logmass_N, teacher.tail_logmoment_half_N)
    rest = (TeacherBatch.from_topk(*(column[few] for column in columns), vocab_size=V), labels_N[few])
    part = tuple(x.detach().requires_grad_() for x in (hidden_ND[few], weight_VD))
    exact = tuple(x.detach().double().requires_grad_() for x in part)
    truth = value_and_gradients("logits kept", exact, *rest)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[DTYPE]
    for name in LOSSES:
        for got, value in zip(value_and_gradients(name, part, *rest), truth, strict=True):
            assert (got.double() - value).abs().max() <= rounding * value.abs().max()
    return inputs


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(benchmark, checked, name):
    wait = synchronizer(DEVICE) or (lambda: None)

    def call():
        value_and_gradients(name, *checked)
        wait()

    benchmark.group = f"loss through a head: {N} x {D} x {V}, {DTYPE}, {DEVICE.type}"
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    peak_bytes = peak_extra_bytes(call, DEVICE)
    gradient_bytes = sum(x.nbytes for x in checked[0])
    benchmark.extra_info["extra_peak_bytes"] = peak_bytes
    benchmark.extra_info["extra_peak_bytes_besides_gradients"] = peak_bytes - gradient_bytes
    if name == "fused" and DEVICE.type == "cpu":
        assert peak_bytes - gradient_bytes < N * V * DTYPE.itemsize / 4
