"""Speed of the distillation loss, value and gradient: ours, the same in eager PyTorch, and the dense loop.

Run: make bench, or pytest benchmarks/test_loss_speed.py --benchmark-only. Every loss is held against float64 first; if
one fails, its size gives no number. extra_info: GB/s by bytes counted by hand, and the peak memory beyond the inputs.
The dense tail is timed at three ranks beside the bucket tail and the dense loop, from the same 16 entries a row.
"""

from dataclasses import replace

import pytest
import torch
from logitstore_kernels import TeacherBatch, distillation_loss, topk_with_tail
from logitstore_kernels.reference import distillation_loss_reference
from logitstore_trainer.bench.devices import synchronizer
from logitstore_trainer.bench.kernels import check_faults
from logitstore_trainer.bench.loss_candidates import (
    ALPHA,
    BUFFERS,
    LOSSES,
    Case,
    LossInputs,
    bytes_needed,
    dense_loop_loss,
    relative_errors,
    value_and_gradient,
)
from logitstore_trainer.bench.memory import peak_extra_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((4096, 32_000), (4096, 128_256)) if DEVICE.type == "cuda" else ((128, 32_000), (64, 128_256))
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"
CASES = [Case(n_rows, vocab_size, T, DTYPE) for n_rows, vocab_size in SIZES for T in (1.0, 2.0)]

DENSE_TAIL_K, RANKS = 16, (128, 256, 576)
DENSE_TAIL_CASES = [Case(4096 if DEVICE.type == "cuda" else 256, 49_152, T, DTYPE) for T in (1.0, 2.0)]


def _name(case: Case) -> str:
    return f"{case.n_rows} x {case.vocab_size}, T = {case.temperature:g}, {case.dtype}, {DEVICE.type}"


@pytest.fixture(scope="module", params=CASES, ids=_name)
def checked(request):
    """(case, inputs) of which every loss has passed its check against float64."""
    case = request.param
    inputs = LossInputs.seeded(case, DEVICE)
    faults = check_faults({name: relative_errors(name, inputs) for name in LOSSES}, case)
    assert not faults, "; ".join(faults)
    return case, inputs


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(benchmark, checked, name):
    case, inputs = checked
    wait = synchronizer(DEVICE) or (lambda: None)
    rounds = iter(range(10**6))

    def call():
        value_and_gradient(name, inputs, buffer=next(rounds) % BUFFERS)
        wait()

    benchmark.group = f"loss, value and gradient: {_name(case)}"
    benchmark.pedantic(call, rounds=10, warmup_rounds=1)
    n_bytes = bytes_needed(name, case)
    benchmark.extra_info["bytes_needed"] = n_bytes
    benchmark.extra_info["gb_per_s"] = n_bytes / benchmark.stats["median"] / 1e9
    benchmark.extra_info["extra_peak_bytes"] = peak_extra_bytes(lambda: value_and_gradient(name, inputs), DEVICE)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reduction_of_the_teachers_logits(benchmark, size):
    case = Case(*size, 1.0, DTYPE)
    logits_NV = LossInputs.seeded(case, DEVICE).teacher_logits_NV
    wait = synchronizer(DEVICE) or (lambda: None)

    def call():
        topk_with_tail(logits_NV, 64)
        wait()

    benchmark.group = f"teacher logits to top-64 and tail: {case.n_rows} x {case.vocab_size}, {DTYPE}, {DEVICE.type}"
    benchmark.pedantic(call, rounds=10, warmup_rounds=1)
    benchmark.extra_info["gb_per_s"] = logits_NV.nbytes / benchmark.stats["median"] / 1e9


def _basis_and_bias(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    basis_Vr = torch.randn(case.vocab_size, rank, generator=generator) / rank**0.5
    return basis_Vr.to(DEVICE), torch.randn(case.vocab_size, generator=generator).to(DEVICE)


def _with_dense_tail(inputs: LossInputs, case: Case, rank: int) -> LossInputs:
    generator = torch.Generator().manual_seed(rank + 1)
    coefs_Nr = torch.randn(case.n_rows, rank, generator=generator).to(DEVICE)
    return replace(inputs, teacher=inputs.teacher.with_dense_tail(coefs_Nr, *_basis_and_bias(case, rank)))


@pytest.fixture(scope="module", params=DENSE_TAIL_CASES, ids=_name)
def few_entries(request):
    """(case, inputs) whose teacher batch keeps DENSE_TAIL_K entries a row."""
    case = request.param
    inputs = LossInputs.seeded(case, DEVICE)
    top = topk_with_tail(inputs.teacher_logits_NV, DENSE_TAIL_K)
    return case, replace(inputs, teacher=TeacherBatch.from_topk(*top, vocab_size=case.vocab_size))


def _gradient_of(loss_function, logits_NV: torch.Tensor, *args) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits_NV.detach().requires_grad_()
    loss = loss_function(leaf, *args)
    loss.backward()
    return loss.detach(), leaf.grad


def _check_dense_tail(inputs: LossInputs) -> None:
    """Value and gradient of the first rows, within twice the error of eager PyTorch (or a rounding) of float64."""
    few = slice(0, 16)
    t, dense = inputs.teacher, inputs.teacher.dense_tail
    columns = (t.ids_NK, t.logprobs_NK, t.tail_logmass_N, t.tail_logmoment_half_N)
    teacher = TeacherBatch.from_topk(*(column[few] for column in columns), vocab_size=t.vocab_size)
    teacher = teacher.with_dense_tail(dense.coefs_Nr[few], dense.basis_Vr, dense.bias_V)
    args = (teacher, inputs.labels_N[few], inputs.temperature, ALPHA, "dense")
    logits_NV = inputs.student_logits[0][few]
    truth = _gradient_of(distillation_loss_reference, logits_NV.double(), *args)
    eager = _gradient_of(distillation_loss_reference, logits_NV, *args)
    ours = _gradient_of(distillation_loss, logits_NV, *args)
    rounding = {"float32": 1e-6, "bfloat16": 8e-3}[DTYPE]
    for got, yardstick, exact in zip(ours, eager, truth, strict=True):
        size = exact.abs().max()
        budget = max(2 * float((yardstick - exact).abs().max() / size), rounding)
        assert float((got - exact).abs().max() / size) <= budget


@pytest.mark.parametrize("candidate", ["dense loop", "bucket", *RANKS])
def test_dense_tail(benchmark, few_entries, candidate):
    case, inputs = few_entries
    item = torch.finfo(getattr(torch, DTYPE)).bits // 8
    n_bytes = 2 * case.n_rows * case.vocab_size * item  # logits read, gradient written
    if candidate == "dense loop":
        n_bytes += case.n_rows * case.vocab_size * item
    else:
        n_bytes += case.n_rows * (DENSE_TAIL_K * 8 + 8 + 8)  # ids and log-probs, two moments, label
    if candidate in RANKS:
        n_bytes += 4 * (case.n_rows * candidate + case.vocab_size * (candidate + 1))
        inputs = _with_dense_tail(inputs, case, candidate)
        _check_dense_tail(inputs)
    args = (inputs.teacher, inputs.labels_N, case.temperature, ALPHA, "dense" if candidate in RANKS else "bucket")
    wait = synchronizer(DEVICE) or (lambda: None)
    rounds = iter(range(10**6))

    def call():
        logits_NV = inputs.student_logits[next(rounds) % BUFFERS]
        if candidate == "dense loop":
            _gradient_of(dense_loop_loss, logits_NV, inputs)
        else:
            _gradient_of(distillation_loss, logits_NV, *args)
        wait()

    benchmark.group = f"dense tail, {DENSE_TAIL_K} entries: {_name(case)}"
    benchmark.pedantic(call, rounds=10, warmup_rounds=1)
    benchmark.extra_info["bytes_needed"] = n_bytes
    benchmark.extra_info["gb_per_s"] = n_bytes / benchmark.stats["median"] / 1e9
    benchmark.extra_info["extra_peak_bytes"] = peak_extra_bytes(call, DEVICE)
