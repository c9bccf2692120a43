"""Speed of the distillation loss, value and gradient: ours, the same in eager PyTorch, and the dense loop.

Run: make bench, or pytest benchmarks/test_loss_speed.py --benchmark-only. Every loss is held against float64 first; if
one fails, its size gives no number. extra_info: GB/s by bytes counted by hand, and the peak memory beyond the inputs.
"""

import pytest
import torch
from logitstore_kernels import topk_with_tail
from logitstore_trainer.bench.devices import synchronizer
from logitstore_trainer.bench.kernels import check_faults
from logitstore_trainer.bench.loss_candidates import (
    BUFFERS,
    LOSSES,
    Case,
    LossInputs,
    bytes_needed,
    relative_errors,
    value_and_gradient,
)
from logitstore_trainer.bench.memory import peak_extra_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((4096, 32_000), (4096, 128_256)) if DEVICE.type == "cuda" else ((128, 32_000), (64, 128_256))
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"
CASES = [Case(n_rows, vocab_size, T, DTYPE) for n_rows, vocab_size in SIZES for T in (1.0, 2.0)]


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
